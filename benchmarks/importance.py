"""Compares gate importance with magnitude and chance as what channels and features are removed by.

Trains the ResNet and the vision transformer of `benchmarks.structured`, removes units by each until a fraction of the
floating-point operations is left, and fine-tunes. Accuracy before and after, over several seeds; the dense networks are
trained on for as many epochs as the smaller ones are fine-tuned.

What the JSON file has already is not run again, and training goes on where it stopped.
"""

import argparse
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from benchmarks import datasets, harness, structured
from prunax import scores
from prunax import structured as structure

EXAMPLES = """\
examples:
  python -m benchmarks.importance --quick
  python -m benchmarks.importance --networks vit --seeds 1
"""
STEM = "importance"
BY = ("magnitude", "gates", "random")
DENSE = structured.DENSE
PyTree = Any


def unit_scores(
    by: str, fn: Any, variables: PyTree, data: datasets.Dataset, args: argparse.Namespace, seed: int
) -> PyTree:
    """What `prune_channels` ranks units by; None for |w|."""
    if by == "magnitude":
        return None
    if by == "random":
        return scores.random(variables, key=jax.random.key(seed))

    def loss_fn(variables: PyTree, batch: Any) -> jax.Array:
        images, labels = batch
        logits = fn(variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    groups = structure.axis_groups(fn, variables, data.train_images[:1])
    batches = [
        (data.train_images[i : i + 64], data.train_labels[i : i + 64])
        for i in range(0, args.examples, 64)
    ]
    free = structure.prunable_groups(groups, variables)
    return structure.gate_importance(loss_fn, variables, batches, free, per_example=True)


def run(
    network: str, seed: int, data: datasets.Dataset, args: argparse.Namespace, note: Any
) -> list[dict[str, Any]]:
    """One network and seed: dense, and made smaller in every way."""
    make, rate = structured.NETWORKS[network]
    model = make(data.num_classes)
    fn = functools.partial(structured.predict, model)
    fit = functools.partial(structured.learn, model)
    one = jnp.asarray(data.test_images[:1])
    variables = model.init(jax.random.key(seed), one)
    folder = args.out / STEM

    def trained(name: str, predict: Any, learn: Any, variables: PyTree, epochs: int, rate: float):
        stage = structured.Stage(
            f"{network}-{seed}-{name}", predict, learn, variables, epochs, rate
        )
        return stage, structured.train(stage, data, folder, math.inf, note)

    _, variables = trained("first", fn, fit, variables, args.epochs, rate)
    whole = structure.count_flops(fn, variables, one)
    records = []
    for by, target in [("dense", DENSE), *((by, t) for by in BY for t in args.targets)]:
        predict, learn, own = fn, fit, variables
        if by != "dense":
            small = structure.prune_channels(
                fn,
                variables,
                one,
                target=target,
                round_to=8,
                scores=unit_scores(by, fn, variables, data, args, seed),
            )
            predict, learn = small.fn, structure.shrink_function(fit, small.keep)
            own = small.params
        stage, tuned = trained(f"{by}-{target:g}", predict, learn, own, args.fine_tune, rate / 2)
        records.append(
            {
                "network": network,
                "seed": seed,
                "by": by,
                "target": target,
                "flops": structure.count_flops(predict, own, one) / whole,
                "before": structured.accuracy(stage, own, data),
                "accuracy": structured.accuracy(stage, tuned, data),
            }
        )
    return records


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    settings, records = content["settings"], content["records"]
    lines = []
    for network, by, target in dict.fromkeys((r["network"], r["by"], r["target"]) for r in records):
        own = [r for r in records if (r["network"], r["by"], r["target"]) == (network, by, target)]
        lines.append(
            (
                f"{network}, {target:g}",
                by,
                f"{sum(r['flops'] for r in own) / len(own):.3f}",
                harness.spread([r["before"] for r in own]),
                harness.spread([r["accuracy"] for r in own]),
            )
        )
    lines.sort(key=lambda line: (line[0].split(",")[0], -float(line[0].split(",")[1])))
    title = (
        f"{settings['dataset']}, {settings['images']:,} training images, {settings['epochs']} epochs and "
        f"{settings['fine_tune']} of fine-tuning (the dense networks too), {settings['seeds']} seeds, gates from "
        f"{settings['examples']} images"
    )
    columns = (
        "network, FLOPs asked for",
        "removed by",
        "FLOPs",
        "accuracy before tuning %",
        "after %",
    )
    return {STEM: harness.Table(columns, lines, title=title)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    if args.quick:
        args.epochs, args.fine_tune, args.seeds = 1, 1, 1
    console = Console()
    note = functools.partial(console.print, highlight=False)
    data = datasets.load(args.dataset)
    some = slice(args.images or None)
    data = data._replace(train_images=data.train_images[some], train_labels=data.train_labels[some])
    names = ("dataset", "images", "epochs", "fine_tune", "targets", "examples", "seeds")
    settings = {name: getattr(args, name) for name in names}
    settings["images"] = len(data.train_labels)
    key = ["network", "seed", "by", "target"]
    file = args.out / f"{STEM}.json"
    results = harness.Results(file, settings, "python -m benchmarks.importance", key)
    for seed in range(args.seeds):
        for network in args.networks:
            if results.find(network, seed, "dense", DENSE) is None:
                results.add(*run(network, seed, data, args, note))
    head = "Gate importance against magnitude"
    harness.publish(file, head, results.content, tables, console)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(STEM, __doc__, EXAMPLES)
    add = parser.add_argument
    add("--dataset", default="digits", help="any of benchmarks.datasets (digits)")
    add("--images", type=int, default=0, help="training images, 0 for all (0)")
    add("--networks", nargs="+", choices=structured.NETWORKS, default=list(structured.NETWORKS))
    add("--targets", nargs="+", type=float, default=[0.5, 0.25], help="shares of FLOPs (0.5 0.25)")
    add("--epochs", type=int, default=12, help="of dense training (12)")
    add("--fine-tune", type=int, default=2, help="epochs after pruning (2)")
    add("--examples", type=int, default=512, help="images for the gates (512)")
    add("--seeds", type=int, default=3, help="(3)")
    add("--quick", action="store_true", help="one seed, one epoch each: does it run?")
    return parser


if __name__ == "__main__":
    main()
