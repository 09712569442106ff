"""Make a ResNet and a small vision transformer smaller: accuracy, size, operations and measured time.

Trains a network, removes channels, heads and features until a fraction of its floating-point operations is left,
fine-tunes what is left, and times both networks side by side.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from benchmarks import datasets, harness, loop, models
from prunax import allocation, structured, trees

EXAMPLES = """\
examples:
  python -m benchmarks.structured --quick
  python -m benchmarks.structured --dataset fashion_mnist --epochs 12 --fine-tune 8
"""


class ViT(nn.Module):
    """A small vision transformer: patches, learned positions, mean over the patches."""

    num_classes: int
    width: int = 64
    heads: int = 4
    hidden: int = 128
    depth: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patch = 4 if images.shape[1] >= 16 else 2
        x = nn.Conv(self.width, (patch, patch), patch, padding="VALID")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
            y = nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(1))


NETWORKS = {"resnet": functools.partial(models.ResNet, channels=32), "vit": ViT}


class Row(NamedTuple):
    """One network at one size.

    Attributes:
        network: its name.
        target: fraction of the operations asked for; 1 for the dense one.
        accuracy: on the test images, after fine-tuning, in [0, 1].
        pruned_accuracy: before fine-tuning.
        params: number of parameters.
        flops: operations for one image, as `structured.count_flops` counts.
        single: seconds for one image, median.
        batched: seconds for a batch, median.
    """

    network: str
    target: float
    accuracy: float
    pruned_accuracy: float
    params: int
    flops: float
    single: float
    batched: float


def train(
    apply: Callable[..., jax.Array], params: Any, data: loop.Data, epochs: int, rate: float
) -> tuple[Any, float]:
    """Trains with Adam and a cosine schedule. Returns the params and the test accuracy."""
    batch = min(64, len(data.train_labels))
    steps = epochs * loop.steps_per_epoch(len(data.train_labels), batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = loop.State(params, optimizer.init(params), jax.random.key(0))
    step = jax.jit(functools.partial(loop.epoch, apply, optimizer, batch_size=batch))
    metrics = None
    for _ in range(epochs):
        state, metrics = step(data, state)
    assert metrics is not None
    return state.params, float(metrics.accuracy)


def run(
    name: str, data: loop.Data, classes: int, args: argparse.Namespace, note: Callable[[str], None]
) -> tuple[list[Row], dict[str, float]]:
    """Trains one network, and prunes it to each target."""
    model = NETWORKS[name](classes)
    apply = functools.partial(models.apply, model)
    one, many = data.test_images[:1], data.test_images[: args.batch]
    params = models.init(model, jax.random.key(args.seed), data.train_images)
    start = time.perf_counter()
    structured.axis_groups(apply, params, one)
    analysis = time.perf_counter() - start
    note(f"{name}: training")
    params, accuracy = train(apply, params, data, args.epochs, args.learning_rate)

    sizes = {1.0: (apply, params, accuracy, accuracy)}
    for target in args.targets:
        note(f"{name}: {target:g} of the operations")
        small = structured.prune_channels(
            apply,
            params,
            one,
            target=target,
            round_to=args.round_to,
            allocation=functools.partial(allocation.global_ranking, normalize=True)
            if args.ranking == "global"
            else allocation.uniform,
            where=lambda path, leaf: trees.is_kernel(path, leaf) and "query" not in path,
        )
        images, labels = data.test_images, data.test_labels
        before = float(
            jax.jit(functools.partial(loop.evaluate, small.fn))(small.params, images, labels)
        )
        tuned, after = train(small.fn, small.params, data, args.fine_tune, args.learning_rate / 2)
        sizes[target] = (small.fn, tuned, after, before)

    note(f"{name}: timing")
    times = [
        harness.median_seconds(
            {
                str(target): functools.partial(jax.jit(fn), p, images)
                for target, (fn, p, *_) in sizes.items()
            },
            args.repeats,
        )
        for images in (one, many)
    ]
    rows = [
        Row(
            name,
            target,
            after,
            before,
            int(structured.count_parameters(fn, p)),
            structured.count_flops(fn, p, one),
            times[0][str(target)],
            times[1][str(target)],
        )
        for target, (fn, p, after, before) in sizes.items()
    ]
    return rows, {"analysis_seconds": analysis}


def result_table(rows: Sequence[Row], title: str) -> harness.Table:
    """One line a network and size. The last column is the speedup of a batch over the reduction of operations."""
    lines = []
    for row in rows:
        dense = next(r for r in rows if r.network == row.network and r.target == 1)
        speedup, reduction = dense.batched / row.batched, dense.flops / row.flops
        lines.append(
            (
                f"{row.network} {row.target:g}",
                f"{100 * row.accuracy:.2f}",
                f"{100 * row.pruned_accuracy:.2f}",
                f"{row.params:,}",
                f"{row.flops / 1e6:.2f}",
                f"{1e3 * row.single:.2f}",
                f"{1e3 * row.batched:.2f}",
                f"{dense.single / row.single:.2f}",
                f"{speedup:.2f}",
                f"{speedup / reduction:.2f}",
            )
        )
    columns = (
        "network and share of FLOPs",
        "accuracy %",
        "before tuning %",
        "params",
        "MFLOPs",
        "single ms",
        "batch ms",
        "speedup single",
        "speedup batch",
        "of the FLOP ratio",
    )
    return harness.Table(title, columns, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(arguments)
    if args.quick:
        args.dataset, args.epochs, args.fine_tune, args.repeats = "digits", 1, 1, 5
    console = Console()
    try:
        dataset = datasets.load(args.dataset)
    except datasets.DatasetError as error:
        console.print(f"{error} Using digits.")
        dataset = datasets.load("digits")
    data = loop.Data(*map(jnp.asarray, dataset[1:5]))
    rows: list[Row] = []
    details = {}
    for name in args.networks:
        more, details[name] = run(name, data, dataset.num_classes, args, console.print)
        rows += more
    title = f"{dataset.name}: structural pruning, {args.epochs} + {args.fine_tune} epochs, batch {args.batch}"
    table = result_table(rows, title)
    console.print(table)
    file = args.out / f"structured-{dataset.name}.json"
    content = {
        "command": " ".join(["python -m benchmarks.structured", *arguments]),
        "environment": harness.environment(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "images": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "table": table.markdown().splitlines(),
        "rows": [row._asdict() for row in rows],
        "details": details,
    }
    harness.write_json(file, content)
    console.print(f"Figures: {file}", soft_wrap=True, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.structured",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", default="fashion_mnist", help="any of benchmarks.datasets (fashion_mnist)")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(both)")
    add("--targets", nargs="+", type=float, default=[0.5, 0.25], help="shares of FLOPs (0.5 0.25)")
    add("--ranking", choices=["uniform", "global"], default="uniform", help="(uniform)")
    add("--round-to", type=int, default=1, help="widths are multiples of it (1)")
    add("--epochs", type=int, default=12, help="of dense training (12)")
    add("--fine-tune", type=int, default=8, help="epochs after pruning (8)")
    add("--learning-rate", type=float, default=2e-3, help="Adam's, at the start (0.002)")
    add("--batch", type=int, default=128, help="images of the batched timing (128)")
    add("--repeats", type=int, default=30, help="timed calls (30)")
    add("--seed", type=int, default=0, help="(0)")
    add("--quick", action="store_true", help="digits, one epoch each: does it run?")
    add("--out", type=Path, default=harness.OUT, help="folder of the results (benchmarks/out)")
    return parser


if __name__ == "__main__":
    main()
