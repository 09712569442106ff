"""Products of one vector with weights in fewer bytes: does XLA make less time of them, as decoding needs?

One matrix, batch 1, where reading the weights is all the work there is. Dense in float32, bfloat16 and int8; half of
the weights as values and two bits each (2:4), in the same three; weights kept anywhere as values and a bitmask.
Widening is part of the product. Of several ways to write one the fastest counts, beside what the bytes would allow.
Where a compiler is, also by kernels outside of XLA.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console

import prunax
from benchmarks import harness, kernels

Array = jax.Array
SHAPES = [(576, 1536), (4096, 1024), (4096, 4096)]  # inputs x outputs
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


class Format(NamedTuple):
    """Weights `(in, out)` in some form, and ways to multiply them.

    Attributes:
        arrays: what is stored.
        products: `product(x, *arrays)`, by name.
    """

    arrays: tuple[Array, ...]
    products: Mapping[str, Callable[..., Array]]


def wide(values: Array) -> Array:
    """As float32, of bfloat16 by its bits: a conversion that XLA fuses well."""
    if values.dtype != jnp.bfloat16:
        return values.astype(jnp.float32)
    bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


def sums(products: list[Array]) -> Array:
    """Sums along the second axis, of several arrays in one loop: XLA vectorises that where it does not one."""
    zeros = (np.float32(0),) * len(products)
    return sum(lax.reduce(tuple(products), zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1,)))


def stored(w: np.ndarray, kind: str) -> tuple[Array, Array]:
    """Weights in a dtype, and what gives them back: of int8 the scale of each row, else one."""
    if kind != "int8":
        return jnp.asarray(w, DTYPES[kind]), jnp.ones(1)
    flat = w.reshape(len(w), -1)
    scale = np.abs(flat).max(1) / 127
    quantised = np.round(flat / scale[:, None]).reshape(w.shape)
    return jnp.asarray(quantised, jnp.int8), jnp.asarray(scale, jnp.float32)


def dense(w: np.ndarray, kind: str) -> Format:
    """All weights; the outputs come first where a loop sums over inputs."""

    def dot(x: Array, w: Array, scale: Array) -> Array:
        if w.dtype == jnp.bfloat16:
            x = x.astype(w.dtype)
        return jnp.dot(w, x, preferred_element_type=jnp.float32) * scale

    def cast_dot(x: Array, w: Array, scale: Array) -> Array:
        return (wide(w) @ x) * scale

    def loop(parts: int) -> Callable[..., Array]:
        def product(x: Array, w: Array, scale: Array) -> Array:
            split, xs = w.reshape(len(w), parts, -1), x.reshape(parts, -1)
            return sums([xs[i][None] * wide(split[:, i]) for i in range(parts)]) * scale

        return product

    ways: dict[str, Callable[..., Array]] = {"dot of widened": cast_dot}
    if kind != "int8":
        ways["dot"] = dot
    return Format(stored(w.T, kind), ways | {f"loop of {n}": loop(n) for n in (1, 4, 8)})


def mask_of(w: np.ndarray, sparsity: float | None) -> np.ndarray:
    """The mask by magnitude, (out, in); None for two of four."""
    pattern = prunax.patterns.NM(2, 4) if sparsity is None else prunax.patterns.Unstructured()
    return np.asarray(prunax.compute_masks({"kernel": w}, sparsity, pattern=pattern)["kernel"]).T


def pairs(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every four inputs the two weights of larger magnitude, and their places: both (out, in / 4, 2)."""
    groups = w.T.reshape(w.shape[1], -1, 4)
    kept = np.argsort(~mask_of(w, None).reshape(groups.shape), axis=2, kind="stable")[..., :2]
    return np.take_along_axis(groups, kept, 2), kept


def two_of_four(w: np.ndarray, kind: str) -> Format:
    """Two weights of every four inputs, and which: two bits each, a byte for four inputs."""
    values, kept = pairs(w)
    places = jnp.asarray(kept[..., 0] | kept[..., 1] << 2, jnp.uint8)
    v, scale = stored(values.transpose(0, 2, 1), kind)

    def loop(x: Array, v: Array, scale: Array, places: Array) -> Array:
        xs = x.reshape(-1, 4).T

        def chosen(i: int) -> Array:
            place = places >> (2 * i) & 3
            low = jnp.where(place == 0, xs[0], xs[1])
            return jnp.where(place < 2, low, jnp.where(place == 2, xs[2], xs[3]))

        return sums([wide(v[:, i]) * chosen(i) for i in range(2)]) * scale

    def gather(x: Array, v: Array, scale: Array, places: Array) -> Array:
        first = 4 * jnp.arange(places.shape[1])
        return sums([wide(v[:, i]) * x[first + (places >> (2 * i) & 3)] for i in range(2)]) * scale

    return Format((v, scale, places), {"loop": loop, "gather": gather})


def bitmask(w: np.ndarray, kind: str, sparsity: float) -> Format:
    """The kept weights of each output in a row, as long as the longest, and a bit for each weight."""
    mask = mask_of(w, sparsity)
    order = np.argsort(~mask, axis=1, kind="stable")[:, : mask.sum(1).max()]
    values = np.take_along_axis(np.where(mask, w.T, 0), order, 1)
    bits = jnp.asarray(np.packbits(mask, axis=1, bitorder="little"))
    v, scale = stored(values, kind)

    def expand(x: Array, v: Array, scale: Array, bits: Array) -> Array:
        shifts = np.arange(8, dtype=np.uint8)
        kept = (bits[:, :, None] >> shifts & 1).reshape(len(bits), -1)
        place = jnp.cumsum(kept.astype(jnp.int32), axis=1) - 1
        row = wide(jnp.take_along_axis(v, jnp.maximum(place, 0), axis=1))
        return jnp.where(kept > 0, row, 0) @ x * scale

    return Format((v, scale, bits), {"expand": expand})


def dense_kernel(w: np.ndarray, kind: str) -> Format:
    """All weights, by a kernel outside of XLA."""
    v, scale = stored(w.T, kind)
    return Format((v, jnp.broadcast_to(scale, len(v))), {"kernel": kernels.dense})


def masked_kernel(w: np.ndarray, kind: str, sparsity: float | None) -> Format:
    """The kept weights and a bit for each weight, by a kernel outside of XLA; None for two of four."""
    mask = mask_of(w, sparsity)
    v, scale = stored(w.T, kind)
    flat = jnp.pad(v[mask], (0, kernels.PADDING))
    starts = np.cumsum(mask.sum(1)) - mask.sum(1)
    bits = np.packbits(mask, axis=1, bitorder="little")
    arrays = flat, jnp.asarray(bits), jnp.asarray(starts, jnp.int32)
    return Format((*arrays, jnp.broadcast_to(scale, len(mask))), {"kernel": kernels.masked})


def fastest(f: Format, x: Array, repeats: int = 7) -> Callable[..., Array]:
    """The product of a format that takes the least time here."""
    calls = {way: functools.partial(jax.jit(p), x, *f.arrays) for way, p in f.products.items()}
    seconds = harness.median_seconds(calls, repeats)
    return f.products[min(seconds, key=lambda way: seconds[way])]


FORMATS: dict[str, Callable[[np.ndarray], Format]] = {
    **{f"dense, {k}": lambda w, k=k: dense(w, k) for k in DTYPES},
    **{f"2:4, {k}": lambda w, k=k: two_of_four(w, k) for k in DTYPES},
    "bitmask 75%, bfloat16": lambda w: bitmask(w, "bfloat16", 0.75),
    "bitmask 90%, bfloat16": lambda w: bitmask(w, "bfloat16", 0.9),
}
KERNELS: dict[str, Callable[[np.ndarray], Format]] = {}
for _kind in ("bfloat16", "int8"):
    KERNELS[f"dense, {_kind}, not XLA"] = functools.partial(dense_kernel, kind=_kind)
    for _name, _sparsity in (("2:4", None), ("bitmask 75%", 0.75), ("bitmask 90%", 0.9)):
        KERNELS[f"{_name}, {_kind}, not XLA"] = functools.partial(
            masked_kernel, kind=_kind, sparsity=_sparsity
        )


def measure(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """All formats of one matrix, in turns."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    x = jnp.asarray(rng.standard_normal(shape[0]), jnp.float32)
    asked = FORMATS | (KERNELS if kernels.available() else {})
    made = {name: make(w) for name, make in asked.items()}
    compiled = {
        (name, way): jax.jit(product)
        for name, f in made.items()
        for way, product in f.products.items()
    }
    calls = {
        (name, way): functools.partial(product, x, *made[name].arrays)
        for (name, way), product in compiled.items()
    }
    seconds = harness.median_seconds(calls, repeats)
    return [
        {
            "shape": shape,
            "format": name,
            "bytes": sum(a.nbytes for a in f.arrays),
            "seconds": {way: seconds[name, way] for way in f.products},
        }
        for name, f in made.items()
    ]


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """The table of a results file, by the name that `render.py` knows it by."""
    results = content["results"]
    rows = []
    for r in results:
        way = min(r["seconds"], key=r["seconds"].get)
        (base,) = (
            b for b in results if b["shape"] == r["shape"] and b["format"] == "dense, float32"
        )
        found = min(base["seconds"].values()) / r["seconds"][way]
        rows.append(
            (
                r["format"],
                " x ".join(map(str, r["shape"])),
                way,
                f"{r['bytes'] / 1e6:.2f}",
                f"{1e3 * r['seconds'][way]:.3f}",
                f"{base['bytes'] / r['bytes']:.2f}",
                f"{found:.2f}",
            )
        )
    columns = "weights", "shape", "fastest way", "MB", "ms", "bytes allow", "times as fast"
    return {"formats": harness.Table(columns, rows, text=3, title="Products of one vector")}


def main() -> None:
    parser = harness.parser("formats", __doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    console = Console()
    with harness.progress(console) as progress:
        task = progress.add_task("formats", total=len(SHAPES), note="")
        results = []
        for shape in SHAPES:
            results += measure(shape, args.repeats)
            progress.update(task, advance=1)
    content = harness.content("python -m benchmarks.formats", results=results)
    harness.publish(args.out / "formats.json", "Formats of fewer bytes", content, tables, console)


if __name__ == "__main__":
    main()
