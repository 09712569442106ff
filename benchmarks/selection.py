"""Times exact mask selection side by side with sorting, `lax.top_k`, `numpy.partition` and PyTorch.

Every rival turns the magnitudes of one float32 matrix into a mask that prunes the same number of weights. Calls take
turns, and the median of each counts. `torch.topk`, `torch.kthvalue` and `torch.nn.utils.prune` join in where torch is
installed. Then: how the cost grows, hard inputs, what `compute_masks` stores, and what its first call costs in a fresh
process without a compilation cache.
"""

import argparse
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from rich.console import Console

import prunax
from benchmarks import harness
from prunax import _counts, _selection

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
    return _selection.keep_largest([Partial(jnp.abs, w)], [(0,)], [_counts.Count(k * 0, k)])[0]


@jax.jit
def largest(w: jax.Array) -> jax.Array:
    """What memory alone allows: one pass over the weights."""
    return jax.lax.reduce(w.reshape(math.gcd(w.size, 64), -1), np.float32(0), jax.lax.max, (1,))


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
        "one read (max)": lambda: largest(w),
        "numpy.partition": lambda: host >= np.partition(host.reshape(-1), k)[k],
    }
    if slow:
        found |= {"argsort": lambda: argsort_mask(w, pruned), "lax.top_k": lambda: top_k(w)}
        if importlib.util.find_spec("torch"):
            import torch

            t = torch.from_numpy(host.reshape(-1).copy())
            found["torch.topk"] = lambda: t.topk(k, largest=False)
            found["torch.kthvalue"] = lambda: t >= t.kthvalue(k + 1).values
            found["torch.nn.utils.prune"] = lambda: torch_prune(torch, t, k)
    return found


def torch_prune(torch: Any, t: Any, k: int) -> Any:
    """A mask by `torch.nn.utils.prune.l1_unstructured`, of a fresh module that holds the weights."""
    from torch.nn.utils import prune

    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(t, requires_grad=False))
    return prune.l1_unstructured(module, "weight", amount=k).weight_mask


def stored(n: int) -> dict[str, Any]:
    """What compute_masks needs beyond the params, relative to them: masks, and memory while it runs."""
    side = round(n**0.5)
    params = {f"kernel_{i}": jnp.zeros((side, side)) for i in range(3)}
    size = sum(leaf.nbytes for leaf in params.values())
    found = {}
    for name, options in WAYS.items():
        compiled = jax.jit(lambda p, o=options: prunax.compute_masks(p, 0.5, **o)).lower(params)
        memory = compiled.compile().memory_analysis()
        found[name] = {
            "masks": memory.output_size_in_bytes / size,
            "temporary": memory.temp_size_in_bytes / size,
        }
    return found


WAYS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "global": {"allocation": prunax.allocation.global_ranking},
    "NM(2, 4)": {"pattern": prunax.patterns.NM(2, 4)},
    "ConstantFanIn()": {"pattern": prunax.patterns.ConstantFanIn()},
    "Block((16, 16))": {"pattern": prunax.patterns.Block((16, 16))},
    "Channel()": {"pattern": prunax.patterns.Channel()},
}


def first_call(leaves: int, allocation: Any) -> float:
    """Seconds of the first compute_masks call of this process, on leaves of up to 16 shapes, as large models have."""
    shapes = [(a, b) for a in (32, 64, 96, 128) for b in (32, 64, 96, 128)]
    params = {
        f"layer_{i}/kernel": jnp.asarray(RNG.standard_normal(shapes[i % 16]), jnp.float32)
        for i in range(leaves)
    }
    jax.block_until_ready(params)
    begin = time.perf_counter()
    jax.block_until_ready(prunax.compute_masks(params, 0.9, allocation=allocation))
    return time.perf_counter() - begin


def calls(repeats: int) -> dict[str, float]:
    """Seconds of `compute_masks` of ten million weights, called as it is and under jit, in turns."""
    params = {"kernel": jnp.asarray(RNG.standard_normal((3200, 3125)), jnp.float32)}
    jitted = jax.jit(lambda params: prunax.compute_masks(params, 0.9))
    ways = {
        "called": lambda: prunax.compute_masks(params, 0.9),
        "under jit": lambda: jitted(params),
    }
    return harness.median_seconds(ways, repeats)


def cold(leaves: int, name: str) -> float:
    """`first_call` in a process of its own, without a compilation cache."""
    command = [sys.executable, "-m", "benchmarks.selection", "--cold", str(leaves), name]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(name: str, n: int, sparsity: float, slow: bool, repeats: int) -> dict[str, Any]:
    rows = max(d for d in range(1, 5000) if n % d == 0)
    w = jnp.asarray(INPUTS[name](n), jnp.float32).reshape(rows, -1)
    k = round(sparsity * n)
    kept = prunax_mask(w, jnp.uint32(k))
    assert int(jnp.sum(kept)) == n - k
    seconds = harness.median_seconds(rivals(w, k, slow), repeats)
    return {"input": name, "size": n, "sparsity": sparsity, "seconds": seconds}


def measure_all(quick: bool, console: Console) -> dict[str, Any]:
    sizes = [10**7] if quick else [10**4, 10**5, 10**6, 10**7, 10**8]
    # Sorting 100 million takes minutes.
    cases = [("normal", n, s, s == 0.9 and n < 10**8) for n in sizes for s in (0.5, 0.9, 0.99)]
    cases += [(name, 10**7, 0.9, False) for name in INPUTS if name != "normal"]
    starts = [(leaves, name) for leaves in (1, 30, 300) for name in ("uniform", "global")]
    results, first = [], []
    with harness.progress(console) as progress:
        task = progress.add_task("selection", total=len(cases) + len(starts), note="")
        for leaves, name in starts:
            progress.update(task, note=f"first call, {leaves} leaves")
            first.append({"leaves": leaves, "allocation": name, "seconds": cold(leaves, name)})
            progress.update(task, advance=1)
        for name, n, sparsity, slow in cases:
            progress.update(task, note=f"{name}, {n:,}, {sparsity}")
            repeats = 5 if quick or n > 10**7 or (slow and n == 10**7) else 15
            results.append(measure(name, n, sparsity, slow, repeats))
            progress.update(task, advance=1)
    return {
        "results": results,
        "first call": first,
        "stored": stored(10**6),
        "calls": calls(5 if quick else 25),
    }


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    results = content["results"]
    names = list(dict.fromkeys(name for r in results for name in r["seconds"]))
    times = harness.Table(
        ["input, size, sparsity", *names],
        [
            [
                f"{r['input']}, {r['size']:,}, {r['sparsity']}",
                *(f"{1e3 * r['seconds'][m]:.2f}" if m in r["seconds"] else "" for m in names),
            ]
            for r in results
        ],
        title="Milliseconds (median), float32",
    )
    first = harness.Table(
        ["leaves, allocation", "seconds"],
        [
            [f"{r['leaves']}, {r['allocation']}", f"{r['seconds']:.1f}"]
            for r in content["first call"]
        ],
        title="First call of compute_masks in a fresh process, no compilation cache",
    )
    memory = harness.Table(
        ["masks", "result", "while it runs"],
        [[n, f"{m['masks']:.2f}", f"{m['temporary']:.2f}"] for n, m in content["stored"].items()],
        title="Memory of compute_masks, bytes relative to the params'",
    )
    return {
        "selection": times,
        "selection/rivals": rivals_table(results),
        "selection/expectations": expectations(content),
        "selection/first-call": first,
        "selection/memory": memory,
    }


def rivals_table(results: Sequence[Mapping[str, Any]]) -> harness.Table:
    """All rivals on ten million normal weights."""
    (seconds,) = (
        r["seconds"]
        for r in results
        if (r["input"], r["size"], r["sparsity"]) == ("normal", 10**7, 0.9)
    )
    return harness.Table(
        ["way", "ms", "relative to prunax"],
        [[n, f"{1e3 * s:.1f}", f"{s / seconds['prunax']:.1f}"] for n, s in seconds.items()],
        title="The mask of 10 million float32 weights at 90%",
    )


def expectations(content: Mapping[str, Any]) -> harness.Table:
    """What the library promises, and what was found."""
    normal = {
        (r["size"], r["sparsity"]): r["seconds"]
        for r in content["results"]
        if r["input"] == "normal"
    }
    ten = normal[10**7, 0.9]
    ours = ten["prunax"]
    rows = [
        (
            f"{rival} / prunax, 10 million",
            f"at least {least}",
            ten[rival] / ours,
            ten[rival] / ours >= least,
        )
        for rival, least in (("argsort", 100), ("torch.topk", 15))
        if rival in ten
    ]
    part = ours / ten["numpy.partition"]
    rows.append(("prunax / numpy.partition, 10 million", "at most 1.2", part, part <= 1.2))
    hard = max(r["seconds"]["prunax"] for r in content["results"] if r["input"] != "normal") / ours
    rows.append(("hardest input / normal", "at most 3", hard, hard <= 3))
    if (10**8, 0.9) in normal:
        growth, read = (
            sum(normal[10**8, s][what] for s in (0.5, 0.9, 0.99))
            / sum(normal[10**7, s][what] for s in (0.5, 0.9, 0.99))
            for what in ("prunax", "one read (max)")
        )
        rows.append(
            ("100 million / 10 million, all sparsities", "at most 10", growth, growth <= 10)
        )
        rows.append(("the same of one read", "", read, None))
    called = content["calls"]["called"] / content["calls"]["under jit"]
    rows.append(("called / under jit, 10 million", "at most 1.5", called, called <= 1.5))
    cold = max(r["seconds"] for r in content["first call"] if r["leaves"] == 300)
    rows.append(("first call, 300 leaves, seconds", "at most 5", cold, cold <= 5))
    memory = content["stored"]["uniform"]
    extra = memory["masks"] + memory["temporary"]
    rows.append(("extra memory / params, uniform", "at most 1.3", extra, extra <= 1.3))
    return harness.Table(
        ["what", "expected", "found", "met"],
        [
            (what, limit, f"{found:.2f}", {True: "yes", False: "no", None: ""}[met])
            for what, limit, found, met in rows
        ],
        title="Expectations",
    )


def main() -> None:
    parser = harness.parser("selection", __doc__)
    parser.add_argument("--quick", action="store_true", help="10 million only, fewer repeats")
    parser.add_argument("--cold", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cold:
        leaves, name = args.cold
        print(
            first_call(
                int(leaves), {"allocation": prunax.allocation.uniform, **WAYS[name]}["allocation"]
            )
        )
        return
    console = Console()
    content = harness.content("python -m benchmarks.selection", **measure_all(args.quick, console))
    harness.publish(args.out / "selection.json", "Mask selection", content, tables, console)


if __name__ == "__main__":
    main()
