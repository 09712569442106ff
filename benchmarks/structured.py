"""Make a ResNet and a small vision transformer smaller: accuracy, size, operations and measured time.

Trains a network, removes channels and features until a fraction of its floating-point operations is left, fine-tunes
what is left, and times both networks side by side. The dense network is trained on for as many epochs as the smaller
ones are fine-tuned, so that all have seen the same images.

Training goes on where it stopped: it is saved every half a minute, in the folder of results.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from benchmarks import datasets, harness, models, smollm
from prunax import allocation, structured

EXAMPLES = """\
examples:
  python -m benchmarks.structured --quick
  python -m benchmarks.structured --part train --minutes 4   # again and again, until it says that all is trained
  python -m benchmarks.structured --part time
  python -m benchmarks.structured --part smollm
"""
PyTree = Any
DENSE = 1.0
STEM = "structured"


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "resnet": (models.BatchNormResNet, 2e-3),
    "vit": (models.ViT, 1e-3),
}


def predict(model: nn.Module, variables: PyTree, images: jax.Array) -> jax.Array:
    """Logits."""
    return model.apply(variables, images)


def learn(model: nn.Module, variables: PyTree, images: jax.Array) -> tuple[jax.Array, PyTree]:
    """Logits with the batch's own statistics, and the new running ones."""
    logits, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return logits, changed


class State(NamedTuple):
    """What one step hands to the next."""

    variables: PyTree
    opt_state: PyTree
    step: int


class Stage(NamedTuple):
    """One network at one size, to be trained for some epochs.

    Attributes:
        name: of the file that its epochs are saved in.
        predict: the network as used.
        learn: the network as trained.
        variables: its parameters and statistics at the start.
        epochs: how many.
        rate: the learning rate at the start; it falls to zero as a half cosine.
    """

    name: str
    predict: Callable[..., Any]
    learn: Callable[..., Any]
    variables: PyTree
    epochs: int
    rate: float


class Unfinished(Exception):
    """The time is over before the training is."""


def train(
    stage: Stage, data: datasets.Dataset, folder: Path, deadline: float, note: Callable[[str], None]
) -> PyTree:
    """Trains with Adam, going on from what is saved. Returns the variables after the last epoch."""
    count, size = len(data.train_labels), min(64, len(data.train_labels))
    steps = count // size
    optimizer = optax.adam(optax.cosine_decay_schedule(stage.rate, stage.epochs * steps))
    state = State(stage.variables, optimizer.init(stage.variables["params"]), 0)
    file = folder / f"{stage.name}.msgpack"
    if file.exists():
        state = flax.serialization.from_bytes(state, file.read_bytes())

    def loss_fn(params: PyTree, rest: PyTree, images: jax.Array, labels: jax.Array) -> Any:
        logits, changed = stage.learn({"params": params, **rest}, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, changed

    @jax.jit
    def step(variables: PyTree, opt_state: PyTree, images: jax.Array, labels: jax.Array) -> Any:
        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        grads, changed = jax.grad(loss_fn, has_aux=True)(params, rest, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return {"params": optax.apply_updates(params, updates), **changed}, opt_state

    def save() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(flax.serialization.to_bytes(state))
        note(f"{stage.name}: step {state.step} of {stage.epochs * steps}")

    variables, opt_state, first = state
    saved = time.monotonic()
    for i in range(int(first), stage.epochs * steps):
        epoch, place = divmod(i, steps)
        rows = np.random.default_rng(epoch).permutation(count)[place * size : (place + 1) * size]
        batch = data.train_images[rows], data.train_labels[rows]
        variables, opt_state = jax.block_until_ready(step(variables, opt_state, *batch))
        state = State(variables, opt_state, i + 1)
        if state.step == stage.epochs * steps or time.monotonic() > min(saved + 30, deadline):
            save()
            saved = time.monotonic()
        if time.monotonic() > deadline:
            raise Unfinished
    return jax.tree.map(jnp.asarray, state.variables)


def accuracy(stage: Stage, variables: PyTree, data: datasets.Dataset) -> float:
    """On the test images, in [0, 1]."""
    fn = jax.jit(lambda variables, x: stage.predict(variables, x).argmax(-1))
    count = len(data.test_labels)
    size = next(n for n in (500, 120, 1) if count % n == 0)
    parts = [fn(variables, data.test_images[i : i + size]) for i in range(0, count, size)]
    return float(np.mean(np.concatenate(parts) == data.test_labels))


class Trained(NamedTuple):
    """A network at one size, before (`stage.variables`) and after its training."""

    stage: Stage
    variables: PyTree


def stages(
    network: str,
    data: datasets.Dataset,
    args: argparse.Namespace,
    deadline: float,
    note: Callable[[str], None],
) -> tuple[dict[float, Trained], dict[str, float]]:
    """Trains one network, prunes it to each target, and trains on at every size.

    Returns:
        For each share of the operations the trained network, 1 for the dense one; and the seconds that the analysis
        and the pruning took.
    """
    make, rate = NETWORKS[network]
    model = make(data.num_classes)
    fn, fit = functools.partial(predict, model), functools.partial(learn, model)
    one = data.test_images[:1]
    variables = model.init(jax.random.key(args.seed), jnp.asarray(one))
    start = time.perf_counter()
    structured.axis_groups(fn, variables, one)
    seconds = {"analysis": time.perf_counter() - start}
    folder = args.out / "structured"
    first = Stage(f"{network}-first", fn, fit, variables, args.epochs, rate)
    variables = train(first, data, folder, deadline, note)

    trained = {}
    for target in (DENSE, *args.targets):
        stage = Stage(f"{network}-{target:g}", fn, fit, variables, args.fine_tune, rate / 2)
        if target < DENSE:
            start = time.perf_counter()
            small = structured.prune_channels(
                fn,
                variables,
                one,
                target=target,
                round_to=args.round_to,
                allocation=allocation.uniform,
            )
            seconds[f"pruning to {target:g}"] = time.perf_counter() - start
            stage = stage._replace(
                predict=small.fn,
                learn=structured.shrink_function(fit, small.keep),
                variables=small.params,
            )
        trained[target] = Trained(stage, train(stage, data, folder, deadline, note))
    return trained, seconds


def measure(
    network: str, data: datasets.Dataset, trained: Mapping[float, Trained], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Accuracy, sizes and times of one network at every size."""
    one = data.test_images[:1]
    times = {}
    for kind, count in (("single", 1), ("batched", args.batch)):
        images = jnp.asarray(data.test_images[:count])
        calls = {
            str(target): functools.partial(jax.jit(t.stage.predict), t.variables, images)
            for target, t in trained.items()
        }
        times[kind] = harness.median_seconds(calls, args.repeats)
    return [
        {
            "network": network,
            "target": target,
            "accuracy": accuracy(stage, variables, data),
            "before": accuracy(stage, stage.variables, data),
            "params": int(structured.count_parameters(stage.predict, variables["params"])),
            "flops": structured.count_flops(stage.predict, variables, one),
            "single": times["single"][str(target)],
            "batched": times["batched"][str(target)],
        }
        for target, (stage, variables) in trained.items()
    ]


def stress(args: argparse.Namespace) -> dict[str, Any]:
    """Analyses SmolLM2-135M, and removes half its feed-forward units and a third of its key-value heads.

    The weights are random: sizes and times do not depend on them.
    """
    model = smollm.Llama(smollm.Config(layers=2) if args.quick else smollm.Config())
    fn = functools.partial(_language, model)
    tokens = jnp.asarray(np.arange(args.tokens)[None] % 1000, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    rng = np.random.default_rng(args.seed)
    params = jax.tree.map(
        lambda s: 0.02 * rng.standard_normal(s.shape, np.float32).astype(s.dtype), shapes
    )
    start = time.perf_counter()
    groups = structured.axis_groups(fn, shapes, tokens)
    analysis = time.perf_counter() - start
    start = time.perf_counter()
    small = structured.prune_channels(
        fn,
        params,
        tokens,
        # Brackets that stand for themselves are written [[] in a glob.
        allocation=allocation.by_path({"*gate/kernel*": 0.5, "*key/kernel[[]1]": 1 / 3}),
    )
    pruning = time.perf_counter() - start
    sizes = {"dense": (fn, params), "small": (small.fn, small.params)}
    calls = {
        name: functools.partial(jax.jit(f), jax.tree.map(jnp.asarray, p), tokens)
        for name, (f, p) in sizes.items()
    }
    seconds = harness.median_seconds(calls, max(3, args.repeats // 6))
    return {
        "layers": model.config.layers,
        "leaves": len(jax.tree.leaves(shapes)),
        "groups": len(groups),
        "free_groups": sum(not group.frozen for group in groups),
        "tokens": args.tokens,
        "analysis_seconds": analysis,
        "pruning_seconds": pruning,
        "params": {n: int(structured.count_parameters(*pair)) for n, pair in sizes.items()},
        "flops": {n: structured.count_flops(*pair, tokens) for n, pair in sizes.items()},
        "seconds": seconds,
    }


def _language(model: nn.Module, params: PyTree, tokens: jax.Array) -> jax.Array:
    return model.apply(params, tokens)


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    found = {}
    if content.get("rows"):
        found[STEM] = _result_table(content)
    if content.get("smollm"):
        found[f"{STEM}/smollm"] = _stress_table(content["smollm"])
    return found


def _result_table(content: Mapping[str, Any]) -> harness.Table:
    """One line a network and size. The last columns are speedups over the reduction of operations."""
    rows, settings = content["rows"], content["settings"]
    lines = []
    for row in rows:
        dense = next(r for r in rows if r["network"] == row["network"] and r["target"] == DENSE)
        single, batched, fewer = (dense[k] / row[k] for k in ("single", "batched", "flops"))
        lines.append(
            (
                f"{row['network']}, {row['target']:g}",
                f"{100 * row['accuracy']:.2f}",
                f"{100 * row['before']:.2f}",
                f"{row['params']:,}",
                f"{row['flops'] / 1e6:.1f}",
                f"{1 / fewer:.3f}",
                f"{1e3 * row['single']:.2f}",
                f"{1e3 * row['batched']:.1f}",
                f"{single:.2f}",
                f"{batched:.2f}",
                f"{single / fewer:.2f}",
                f"{batched / fewer:.2f}",
            )
        )
    columns = (
        "network, FLOPs asked for",
        "accuracy %",
        "before tuning %",
        "params",
        "MFLOPs",
        "of dense",
        "one image ms",
        "batch ms",
        "speedup, one",
        "speedup, batch",
        "over FLOP ratio, one",
        "over FLOP ratio, batch",
    )
    title = (
        f"{content['dataset']}, {content['images']['train']:,} training images, {settings['epochs']} epochs and "
        f"{settings['fine_tune']} of fine-tuning (the dense networks too), one seed, batch of {settings['batch']}"
    )
    return harness.Table(columns, lines, title=title)


def _stress_table(found: Mapping[str, Any]) -> harness.Table:
    dense, small = (
        {k: found[k][name] for k in ("params", "flops", "seconds")} for name in ("dense", "small")
    )
    lines = [
        (name, f"{s['params']:,}", f"{s['flops'] / 1e9:.1f}", f"{1e3 * s['seconds']:.0f}")
        for name, s in (
            ("dense", dense),
            ("half the feed-forward units, two of three heads", small),
        )
    ]
    title = (
        f"{found['layers']} layers of SmolLM2-135M, {found['tokens']} tokens: "
        f"{found['free_groups']} groups that may shrink among {found['leaves']} leaves, "
        f"found in {found['analysis_seconds']:.1f} s"
    )
    return harness.Table(("network", "params", "GFLOPs", "ms"), lines, title=title)


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Accuracy against measured time, a line for each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("batched", "flops"), strict=True):
        for i, network in enumerate(dict.fromkeys(row["network"] for row in content["rows"])):
            rows = [row for row in content["rows"] if row["network"] == network]
            dense = rows[0][kind]
            x, y = [row[kind] / dense for row in rows], [100 * row["accuracy"] for row in rows]
            axes.plot(x, y, "os"[i % 2] + "-", label=network)
        axes.set_xlabel({"batched": "time of a batch", "flops": "FLOPs"}[kind] + ", share of dense")
        axes.set_xlim(0, 1.05)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(arguments)
    if args.quick:
        args.dataset, args.epochs, args.fine_tune, args.repeats = "digits", 1, 1, 5
    console = Console()
    note = functools.partial(console.print, highlight=False)
    deadline = time.monotonic() + 60 * args.minutes
    file = args.out / f"{STEM}.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if args.part in ("train", "time", "all"):
        try:
            data = datasets.load(args.dataset)
        except datasets.DatasetError as error:
            note(f"{error} Using digits.")
            data = datasets.load("digits")
        # The files are in no order, so that the first images are as good as any.
        some = slice(args.images or None)
        data = data._replace(
            train_images=data.train_images[some], train_labels=data.train_labels[some]
        )
        rows, seconds = [], {}
        for network in args.networks:
            try:
                trained, seconds[network] = stages(network, data, args, deadline, note)
            except Unfinished:
                note("Not all is trained yet: run this again.")
                return
            if args.part != "train":
                rows += measure(network, data, trained, args)
        if args.part == "train":
            note("All is trained: go on with --part time.")
            return
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "part", "minutes")}
        content |= {
            "dataset": data.name,
            "images": {"train": len(data.train_labels), "test": len(data.test_labels)},
            "settings": settings,
            "seconds": seconds,
            "rows": rows,
        }
    if args.part in ("smollm", "all"):
        content["smollm"] = stress(args)
    content |= {"environment": harness.environment() | {"usable_cores": _usable_cores()}}
    harness.publish(file, "Structural pruning", content, tables, console)
    if content.get("rows"):
        draw(content, file.with_suffix(".png"))


def _usable_cores() -> int:
    """How many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("structured", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--part", choices=["train", "time", "smollm", "all"], default="all", help="(all)")
    add("--minutes", type=float, default=1e6, help="stop training after so long")
    add("--dataset", default="fashion_mnist", help="any of benchmarks.datasets (fashion_mnist)")
    add("--images", type=int, default=15_000, help="training images, 0 for all (15000)")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(both)")
    add("--targets", nargs="+", type=float, default=[0.5, 0.25], help="shares of FLOPs (0.5 0.25)")
    add("--round-to", type=int, default=8, help="widths are multiples of it (8)")
    add("--epochs", type=int, default=4, help="of dense training (4)")
    add("--fine-tune", type=int, default=2, help="epochs after pruning (2)")
    add("--batch", type=int, default=128, help="images of the batched timing (128)")
    add("--tokens", type=int, default=128, help="length of the language model's input (128)")
    add("--repeats", type=int, default=30, help="timed calls (30)")
    add("--seed", type=int, default=0, help="(0)")
    add("--quick", action="store_true", help="digits, one epoch each: does it run?")
    return parser


if __name__ == "__main__":
    main()
