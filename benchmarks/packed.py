"""Times packed weights beside the dense product, by shape, batch and sparsity, and finds where packing starts to pay.

Masks are those of `compute_masks` on random normal weights. `Block((64, 64)), even` has equally many blocks in all
block columns instead. What `export.fastest` chooses is timed once more, beside dense, in turns of its own.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import prunax
from benchmarks import harness
from prunax import export
from prunax.patterns import NM, Block, ConstantFanIn, Pattern, Unstructured

COMMAND = "python -m benchmarks.packed"
SHAPES = [(1024, 1024), (1024, 4096), (4096, 4096)]
BATCHES = [1, 16, 128, 512]
SPARSITIES = [0.5, 0.75, 0.9, 0.95, 0.98]
BLOCK = Block((64, 64))
GATHERED: list[tuple[str, Pattern]] = [
    ("ConstantFanIn()", ConstantFanIn()),
    ("Unstructured()", Unstructured()),
]


def even_blocks(shape: tuple[int, int], sparsity: float, seed: int) -> jax.Array:
    """A mask with the same number of random blocks in each block column."""
    rows, columns = BLOCK.unit_shape(shape)
    kept = round((1 - sparsity) * rows)
    rank = np.random.default_rng(seed).random((rows, columns)).argsort(axis=0).argsort(axis=0)
    return BLOCK.expand(jnp.asarray(rank < kept), shape)


def cases(part: str) -> Iterator[tuple[str, Pattern, tuple[int, int], float | None, list[int]]]:
    """Name, pattern, shape, sparsity and batches of all that is measured."""
    for shape in SHAPES:
        if part in ("blocks", "all"):
            for sparsity in SPARSITIES:
                yield "Block((64, 64))", BLOCK, shape, sparsity, BATCHES
                yield "Block((64, 64)), even", BLOCK, shape, sparsity, BATCHES
        if part in ("inputs", "all"):
            yield "NM(2, 4)", NM(2, 4), shape, None, BATCHES[:1]
            for name, pattern in GATHERED:
                for sparsity in SPARSITIES[2:]:
                    yield name, pattern, shape, sparsity, BATCHES[:3]


def measure(
    name: str,
    pattern: Pattern,
    shape: tuple[int, int],
    sparsity: float | None,
    batches: list[int],
    repeats: int,
) -> list[dict[str, Any]]:
    w = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    if name.endswith("even"):
        assert sparsity is not None
        mask = even_blocks(shape, sparsity, seed=1)
    else:
        mask = prunax.compute_masks({"kernel": w}, sparsity, pattern=pattern)["kernel"]
    weights = {
        "dense": export.Dense(jnp.where(mask, w, 0)),
        "packed": export.pack(w, mask, pattern),
    }
    results = []
    for batch in batches:
        x = jnp.asarray(np.random.default_rng(2).standard_normal((batch, shape[0])), jnp.float32)
        np.testing.assert_allclose(x @ weights["packed"], x @ weights["dense"], atol=2e-2)
        seconds = export.matmul_seconds(weights, x, repeats=repeats)
        chosen = export.fastest(w, mask, x, pattern=pattern, repeats=repeats)
        again = export.matmul_seconds(
            {"dense": weights["dense"], "chosen": chosen}, x, repeats=repeats
        )
        results.append(
            {
                "pattern": name,
                "shape": shape,
                "sparsity": 1 - float(jnp.mean(mask)),
                "batch": batch,
                "seconds": seconds,
                "speedup": seconds["dense"] / seconds["packed"],
                "chosen": type(chosen).__name__,
                "chosen_speedup": again["dense"] / again["chosen"],
            }
        )
    return results


def speedups(results: list[dict[str, Any]]) -> harness.Table:
    """A row for each pattern, shape and sparsity, a column for each batch."""
    keys = list(
        dict.fromkeys((r["pattern"], tuple(r["shape"]), round(r["sparsity"], 3)) for r in results)
    )
    by_case = {
        (r["pattern"], tuple(r["shape"]), round(r["sparsity"], 3), r["batch"]): r for r in results
    }
    batches = sorted({r["batch"] for r in results})
    rows = []
    for key in keys:
        found = [by_case.get((*key, batch)) for batch in batches]
        cells = [
            f"{r['speedup']:.2f}{'' if r['chosen'] != 'Dense' else ' (dense)'}" if r else ""
            for r in found
        ]
        rows.append([key[0], " x ".join(map(str, key[1])), f"{key[2]:.1%}", *cells])
    columns = ["pattern", "shape", "sparsity", *(f"batch {b}" for b in batches)]
    return harness.Table(
        columns, rows, title="times as fast as dense; (dense): what `fastest` keeps"
    )


def where_it_pays(results: list[dict[str, Any]]) -> harness.Table:
    """The lowest sparsity measured at which `fastest` takes the packed form, there and at every higher one."""
    rows = []
    batches = sorted({r["batch"] for r in results})
    for pattern, shape in dict.fromkeys((r["pattern"], tuple(r["shape"])) for r in results):
        cells = []
        for batch in batches:
            wanted = (pattern, shape, batch)
            mine = [r for r in results if (r["pattern"], tuple(r["shape"]), r["batch"]) == wanted]
            pays = None
            for r in sorted(mine, key=lambda r: -r["sparsity"]):
                if r["chosen"] == "Dense":
                    break
                pays = r["sparsity"]
            cells.append("" if not mine else "never" if pays is None else f"{pays:.1%}")
        rows.append([pattern, " x ".join(map(str, shape)), *cells])
    return harness.Table(
        ["pattern", "shape", *(f"batch {b}" for b in batches)],
        rows,
        title="pays from this sparsity on",
    )


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    results = content["results"]
    return {"packed": speedups(results), "packed/pays": where_it_pays(results)}


def main() -> None:
    parser = harness.parser("packed", __doc__)
    parser.add_argument("--part", choices=["blocks", "inputs", "all"], default="all")
    parser.add_argument("--shape", type=int, nargs=2, help="this shape only")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    console = Console()
    file = args.out / "packed.json"
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"] if file.exists() else []
    todo = [c for c in cases(args.part) if args.shape is None or c[2] == tuple(args.shape)]
    with harness.progress(console) as progress:
        task = progress.add_task("packed", total=len(todo), note="")
        for name, pattern, shape, sparsity, batches in todo:
            new = measure(name, pattern, shape, sparsity, batches, args.repeats)
            places = {(r["pattern"], tuple(r["shape"]), r["sparsity"], r["batch"]) for r in new}
            results = [
                r
                for r in results
                if (r["pattern"], tuple(r["shape"]), r["sparsity"], r["batch"]) not in places
            ] + new
            results.sort(key=lambda r: (r["pattern"], [*r["shape"]], r["sparsity"], r["batch"]))
            # At once: what was measured stays, should the rest not be.
            harness.write_json(file, harness.content(COMMAND, results=results))
            progress.update(task, advance=1, note=f"{name}, {shape[0]} x {shape[1]}")
    slowest = min(r["chosen_speedup"] for r in results)
    text = f"What `fastest` chose, timed again, was at least {slowest:.2f} times as fast as dense."
    content = harness.content(COMMAND, results=results)
    harness.publish(file, f"Packed weights, float32\n\n{text}", content, tables, console)
    console.print(text)


if __name__ == "__main__":
    main()
