"""Times exact mask selection side by side with sorting, `lax.top_k` and `numpy.partition`.

Every rival turns the magnitudes of one float32 matrix into a mask that prunes the same number of weights. Calls take
turns, and the median of each counts. `torch.topk` and `torch.kthvalue` join in where torch is installed.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from rich.console import Console

from benchmarks import harness
from prunax import counts, selection

RNG = np.random.default_rng(0)
INPUTS: dict[str, Callable[[int], np.ndarray]] = {
    "normal": lambda n: RNG.standard_normal(n),
    "equal": lambda n: np.ones(n),
    "two values": lambda n: RNG.integers(0, 2, n),
    "sorted": lambda n: np.sort(np.abs(RNG.standard_normal(n))),
    "denormal": lambda n: RNG.standard_normal(n) * 1e-40,
    "outlier": lambda n: np.where(np.arange(n) == 7, 3e38, RNG.standard_normal(n)),
    "cauchy": lambda n: RNG.standard_cauchy(n),
    "integers": lambda n: RNG.integers(-100, 100, n),
}


@jax.jit
def prunax_mask(w: jax.Array, k: jax.Array) -> jax.Array:
    return selection.keep_largest([Partial(jnp.abs, w)], [(0,)], [counts.Count(k * 0, k)])[0]


@jax.jit
def argsort_mask(w: jax.Array, k: jax.Array) -> jax.Array:
    order = jnp.argsort(jnp.abs(w).reshape(-1))
    rank = jnp.arange(w.size, dtype=jnp.uint32)
    return jnp.ones(w.size, bool).at[order].set(rank >= k).reshape(w.shape)


def rivals(w: jax.Array, k: int, slow: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    host = np.abs(np.asarray(w))
    pruned = jnp.uint32(k)
    top_k = jax.jit(lambda w: jax.lax.top_k(jnp.abs(w).reshape(-1), w.size - k)[0][-1])
    found: dict[str, Callable[[], Any]] = {
        "prunax": lambda: prunax_mask(w, pruned),
        "numpy.partition": lambda: host >= np.partition(host.reshape(-1), k)[k],
    }
    if slow:
        found |= {"argsort": lambda: argsort_mask(w, pruned), "lax.top_k": lambda: top_k(w)}
        if importlib.util.find_spec("torch"):
            import torch

            t = torch.from_numpy(host.reshape(-1).copy())
            found["torch.topk"] = lambda: t.topk(k, largest=False)
            found["torch.kthvalue"] = lambda: t >= t.kthvalue(k + 1).values
    return found


def measure(name: str, n: int, sparsity: float, slow: bool, repeats: int) -> dict[str, Any]:
    rows = max(d for d in range(1, 5000) if n % d == 0)
    w = jnp.asarray(INPUTS[name](n), jnp.float32).reshape(rows, -1)
    k = round(sparsity * n)
    kept = prunax_mask(w, jnp.uint32(k))
    assert int(jnp.sum(kept)) == n - k
    seconds = harness.median_seconds(rivals(w, k, slow), repeats)
    return {"input": name, "size": n, "sparsity": sparsity, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 million only, fewer repeats")
    parser.add_argument("--out", type=Path, default=harness.OUT)
    args = parser.parse_args()
    console = Console()
    sizes = [10**7] if args.quick else [10**4, 10**5, 10**6, 10**7, 10**8]
    cases = [("normal", n, s, s == 0.9) for n in sizes for s in (0.5, 0.9, 0.99)]
    cases += [(name, 10**7, 0.9, False) for name in INPUTS if name != "normal"]
    results = []
    with harness.progress(console) as progress:
        task = progress.add_task("selection", total=len(cases), note="")
        for name, n, s, slow in cases:
            repeats = 5 if args.quick or n > 10**7 else 15
            results.append(measure(name, n, s, slow, repeats))
            progress.update(task, advance=1, note=f"{name}, {n:,}")
    names = list(dict.fromkeys(name for r in results for name in r["seconds"]))
    table = harness.Table(
        "milliseconds (median), float32",
        ["input, size, sparsity", *names],
        [
            [
                f"{r['input']}, {r['size']:,}, {r['sparsity']}",
                *(f"{1e3 * r['seconds'][m]:.2f}" if m in r["seconds"] else "" for m in names),
            ]
            for r in results
        ],
    )
    console.print(table)
    file = args.out / "selection.json"
    harness.write_json(file, {"environment": harness.environment(), "results": results})
    console.print(f"Figures: {file}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
