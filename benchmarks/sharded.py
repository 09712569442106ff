"""Masks of sharded params: what travels between devices, what each device stores, and whether the result is the same.

A model of several matrices is sharded over a mesh (eight host devices where there is no accelerator). For each way to
mask it the compiled program is read: collectives by kind, and temporary memory relative to the params that a device
holds. The rival is the usual way, all magnitudes concatenated and sorted.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

FLAG = "--xla_force_host_platform_device_count"
if __name__ == "__main__" and FLAG not in os.environ.get("XLA_FLAGS", ""):  # read once, by jax
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from rich.console import Console  # noqa: E402

import prunax  # noqa: E402
from benchmarks import harness  # noqa: E402
from prunax import allocation, patterns  # noqa: E402

PyTree = Any
COLLECTIVES = "all-gather all-to-all collective-permute all-reduce".split()
SPECS = {
    "rows": PartitionSpec("data", None),
    "columns": PartitionSpec(None, "model"),
    "both": PartitionSpec("data", "model"),
    "rows over all": PartitionSpec(("data", "model"), None),
}


def sort_masks(params: PyTree) -> PyTree:
    """Global ranking by argsort of one long vector."""
    leaves, treedef = jax.tree.flatten(params)
    flat = jnp.concatenate([jnp.abs(leaf).reshape(-1) for leaf in leaves])
    order = jnp.argsort(flat)
    keep = jnp.ones(flat.size, bool).at[order].set(jnp.arange(flat.size) >= round(0.9 * flat.size))
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(keep, cuts)
    return treedef.unflatten(p.reshape(w.shape) for p, w in zip(parts, leaves, strict=True))


def uniform(params: PyTree) -> PyTree:
    return prunax.compute_masks(params, 0.9)


def global_ranking(params: PyTree) -> PyTree:
    return prunax.compute_masks(params, 0.9, allocation=allocation.global_ranking)


def by_pattern(pattern: patterns.Pattern) -> Callable[[PyTree], PyTree]:
    return lambda params: prunax.compute_masks(params, 0.5, pattern=pattern)


WAYS: dict[str, Callable[[PyTree], PyTree]] = {
    "argsort, global": sort_masks,
    "prunax, uniform": uniform,
    "prunax, global": global_ranking,
    **{
        f"prunax, {pattern}": by_pattern(pattern)
        for pattern in (
            patterns.NM(2, 4),
            patterns.ConstantFanIn(),
            patterns.Block((16, 16)),
            patterns.Channel(),
        )
    },
}


def make(size: int, mesh: jax.sharding.Mesh) -> tuple[dict[str, np.ndarray], PyTree]:
    """The matrices of a model, on the host and sharded."""
    rng = np.random.default_rng(0)
    host = {name: rng.standard_normal((size, size), np.float32) for name in SPECS}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return host, {name: jax.device_put(x, shardings[name]) for name, x in host.items()}


def measure(
    name: str, mesh: jax.sharding.Mesh, host: PyTree, params: PyTree, repeats: int
) -> dict[str, Any]:
    """Compile a way to mask, read the program, run it, and compare with one device."""
    way = WAYS[name]
    result: dict[str, Any] = {"way": name, "mesh": str(mesh.axis_types[0])}
    with jax.set_mesh(mesh):
        try:
            compiled = jax.jit(way).lower(params).compile()
        except (
            Exception
        ) as error:  # explicit sharding refuses what would gather, by errors of many types
            return result | {"refused": str(error).splitlines()[0]}
        text = compiled.as_text()
        masks = compiled(params)
        seconds = harness.median_seconds({name: lambda: compiled(params)}, repeats)[name]
    found = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    held = sum(x.addressable_shards[0].data.nbytes for x in params.values())
    expected = jax.jit(way)(jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), host))
    return result | {
        "collectives": {kind: found[kind] for kind in COLLECTIVES},
        "temporary bytes / params bytes": compiled.memory_analysis().temp_size_in_bytes / held,
        "sharded like params": all(
            masks[n].sharding.is_equivalent_to(params[n].sharding, 2) for n in params
        ),
        "as on one device": all(np.array_equal(masks[n], expected[n]) for n in params),
        "seconds": seconds,
    }


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """The table of a results file, by the name that `render.py` knows it by."""
    rows = []
    for r in content["results"]:
        if "refused" in r:
            cells = ["refused", *[""] * (len(COLLECTIVES) + 3)]
        else:
            cells = [
                *(str(r["collectives"][kind]) for kind in COLLECTIVES),
                f"{r['temporary bytes / params bytes']:.2f}",
                "yes" if r["sharded like params"] else "no",
                "yes" if r["as on one device"] else "no",
                f"{1e3 * r['seconds']:.1f}",
            ]
        rows.append((f"{r['way']}, {r['mesh']}", *cells))
    columns = (
        "masks, mesh",
        *COLLECTIVES,
        "temporary / params",
        "sharded like params",
        "as on one device",
        "ms",
    )
    return {"sharded": harness.Table(columns, rows, title="Masks of sharded params")}


def main() -> None:
    parser = harness.parser("sharded", __doc__)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of each matrix")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    console = Console()
    count = len(jax.devices())
    shape = (max(count // 2, 1), 2 if count > 1 else 1)
    results = []
    kinds = (AxisType.Explicit, AxisType.Auto)
    with harness.progress(console) as progress:
        task = progress.add_task("sharded", total=len(WAYS) * len(kinds), note="")
        for kind in kinds:
            mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
            host, params = make(args.size, mesh)
            for name in WAYS:
                progress.update(task, note=f"{name}, {kind}")
                results.append(measure(name, mesh, host, params, args.repeats))
                progress.update(task, advance=1)
    file = args.out / "sharded.json"
    content = harness.content(
        "python -m benchmarks.sharded",
        mesh=dict(zip(("data", "model"), shape, strict=True)),
        params={name: [args.size, args.size] for name in SPECS},
        results=results,
    )
    harness.publish(file, "Mask selection on shards", content, tables, console)


if __name__ == "__main__":
    main()
