"""Trains, prunes and evaluates a small network on real images.

Prints the test accuracy of the dense and of the pruned network, the sparsity of each layer and the time,
and writes all figures as JSON and the curves as PNG.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

import prunax
from benchmarks import datasets, figures, harness, loop, models, recipes
from benchmarks.recipes import Budget, Method, gradual
from prunax import allocation, reports, scores

EXAMPLES = """\
examples:
  python -m benchmarks.train --dataset digits --method magnitude --sparsity 0.9
  python -m benchmarks.train --dataset digits --compare
  python -m benchmarks.train --dataset fashion_mnist --model cnn --method global --sparsity 0.95
  python -m benchmarks.train --dataset cifar10 --model resnet --epochs 20 --method magnitude
"""
# The defaults below were chosen on digits by --validation: the test images had no part in it.
MIDDLE = {"begin": 0.2, "end": 0.7, "updates": 50}
METHODS = {
    name: Method("", about, recipe, options)
    for name, about, recipe, options in (
        ("dense", "no pruning", recipes.dense, {}),
        ("magnitude", "|w|, gradually, within each layer", gradual, MIDDLE),
        ("saliency", "|w g| of one batch, likewise", gradual, MIDDLE | {"score": scores.saliency}),
        ("gradient", "|g| of one batch, likewise", gradual, MIDDLE | {"score": scores.gradient}),
        ("random", "at random, likewise", gradual, MIDDLE | {"score": scores.random}),
        (
            "global",
            "|w|, gradually, layers ranked together",
            gradual,
            MIDDLE | {"allocation": allocation.global_ranking},
        ),
        (
            "l1",
            "an L1 penalty, then a threshold, then fine-tuning",
            recipes.l1,
            {"strength": 6e-4, "threshold": 1e-3, "end": 0.7},
        ),
        (
            "one-shot",
            "|w|, all at once, then fine-tuning",
            recipes.one_shot,
            {"at": 0.5, "allocation": allocation.uniform},
        ),
    )
}
# What the target is a share of: each layer's weights, unless it says otherwise here.
POOLS = {"dense": None, "l1": None, "global": "model"}


class Run(NamedTuple):
    """One training run.

    Attributes:
        method: its name in `METHODS`.
        seed: of the initial weights, the shuffling and random scores.
        metrics: `loop.Metrics` of lists, one value an epoch.
        summary: of the final masks.
        exact: whether the masks prune as many weights as the target asks for, and every one of those
            weights is exactly zero; None for a method that aims at no number.
        seconds: training and evaluation, without compilation.
        compile_seconds: compilation; 0 where the program of the seed before was used again.
    """

    method: str
    seed: int
    metrics: loop.Metrics
    summary: reports.Summary
    exact: bool | None
    seconds: float
    compile_seconds: float

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end of training, in [0, 1]."""
        return self.metrics.accuracy[-1]


def train(
    method: str,
    recipe: recipes.Recipe,
    model: Any,
    data: loop.Data,
    budget: Budget,
    sparsity: float,
    *,
    seeds: Sequence[int] = (0,),
    on_epoch: Callable[[int, float], None] = lambda seed, accuracy: None,
) -> list[Run]:
    """Trains a model by one method, once for each seed.

    Args:
        method: its name in `METHODS`.
        recipe: what it does.
        model: one of `models.MODELS`, made for a number of classes.
        data: images and labels, on the device.
        budget: what all methods have in common.
        sparsity: the target.
        seeds: one run each. Runs of the same seed start from the same weights, whatever the method.
        on_epoch: told the seed and the test accuracy after each epoch.

    Returns:
        One `Run` a seed.
    """

    @jax.jit
    def epoch(state: loop.State, data: loop.Data, key: jax.Array) -> Any:
        apply = functools.partial(models.apply, model)
        optimizer = recipe.optimizer(key, None)
        return loop.epoch(apply, optimizer, data, state, batch_size=budget.batch_size)

    program, runs = None, []
    for seed in seeds:
        init_key, shuffle_key, score_key = jax.random.split(jax.random.key(seed), 3)
        params = models.init(model, init_key, data.train_images)
        state = loop.State(params, recipe.optimizer(score_key, None).init(params), shuffle_key)
        history, start, compile_seconds = [], time.perf_counter(), 0.0
        if program is None:
            program = epoch.lower(state, data, score_key).compile()
            compile_seconds = time.perf_counter() - start
        for _ in range(budget.epochs):
            state, metrics = program(state, data, score_key)
            history.append(jax.tree.map(float, metrics))
            on_epoch(seed, history[-1].accuracy)
        seconds = time.perf_counter() - start - compile_seconds
        masks = recipe.masks(state.params, state.opt_state)
        summary = prunax.summarize(state.params, masks)
        exact = _is_exact(state.params, masks, summary, POOLS.get(method, "leaf"), sparsity)
        metrics = loop.Metrics(*map(list, zip(*history, strict=True)))
        runs.append(Run(method, seed, metrics, summary, exact, seconds, compile_seconds))
    return runs


def _is_exact(
    params: Any, masks: Any, summary: reports.Summary, pools: str | None, sparsity: float
) -> bool | None:
    if pools is None:
        return None
    sizes = [(leaf.weights, leaf.kept) for leaf in summary.leaves if leaf.prunable]
    if pools == "model":
        sizes = [(summary.weights, summary.kept)]
    asked = all(weights - kept == round(sparsity * weights) for weights, kept in sizes)
    masked = prunax.apply_masks(params, masks)
    return asked and jax.tree.all(jax.tree.map(jnp.array_equal, params, masked))


def result_table(runs: Sequence[Run], title: str) -> reports.Table:
    """One row a method: means over the seeds, and their standard deviation where there are several.

    The difference to dense is taken seed by seed, in points of test accuracy.
    """
    dense = {run.seed: run.accuracy for run in runs if run.method == "dense"}
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        of_method = [run for run in runs if run.method == method]
        points = [run.accuracy - dense[run.seed] for run in of_method]
        exact = {run.exact for run in of_method}
        rows.append(
            (
                method,
                harness.spread([run.accuracy for run in of_method]),
                "" if method == "dense" else harness.spread(points, "+.2f"),
                f"{statistics.mean(run.summary.sparsity for run in of_method):.2%}",
                "" if exact == {None} else ("yes" if exact == {True} else "NO"),
                f"{statistics.mean(run.seconds for run in of_method):.1f}",
            )
        )
    columns = "method", "test accuracy %", "against dense", "sparsity", "exact", "seconds"
    return reports.Table(columns, rows, title=title)


def default_epochs(count: int) -> int:
    """Epochs for a number of training images: 600,000 images in all, in at most 120 passes."""
    return min(max(600_000 // count, 1), 120)


def report(
    args: argparse.Namespace,
    dataset: datasets.Dataset,
    runs: Sequence[Run],
    table: reports.Table,
) -> dict[str, Any]:
    """Every figure of an invocation, ready for JSON."""
    return {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "dataset": {
            "name": dataset.name,
            "train": len(dataset.train_labels),
            "test": len(dataset.test_labels),
            "image": list(dataset.train_images.shape[1:]),
            "classes": dataset.num_classes,
        },
        "table": table.markdown().splitlines(),
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "test_accuracy": run.accuracy,
                "sparsity": run.summary.sparsity,
                "exact": run.exact,
                "seconds": run.seconds,
                "compile_seconds": run.compile_seconds,
                "epochs": run.metrics._asdict(),
                "summary": run.summary.to_dict(),
            }
            for run in runs
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 2 and one line on a bad argument."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    args = parser.parse_args(arguments)
    args.seeds = args.seeds or (3 if args.compare else 1)
    console = Console()
    start = time.perf_counter()
    try:
        dataset = datasets.load(args.dataset)
    except datasets.DatasetError as error:
        parser.error(str(error))
    if args.validation:
        dataset = datasets.hold_out(dataset)
    count = len(dataset.train_labels)
    batch_size = min(args.batch_size, count)
    args.epochs = args.epochs or default_epochs(count)
    steps = loop.steps_per_epoch(count, batch_size)
    budget = Budget(args.model, args.epochs, steps, batch_size, args.learning_rate)
    of_l1 = {"l1": {"strength": args.l1, "threshold": args.threshold}}
    data = loop.Data(*map(jnp.asarray, dataset[1:5]))

    runs: list[Run] = []
    methods = METHODS if args.compare else dict.fromkeys(["dense", args.method])
    with harness.progress(console) as progress:
        tasks = {
            method: progress.add_task(method, start=False, total=args.seeds * args.epochs, note="")
            for method in methods
        }
        for method, task in tasks.items():
            progress.start_task(task)
            options = {**METHODS[method].options, **of_l1.get(method, {})}
            runs += train(
                method,
                METHODS[method].recipe(budget, args.sparsity, **options),
                models.MODELS[args.model](dataset.num_classes),
                data,
                budget,
                args.sparsity,
                seeds=range(args.seed, args.seed + args.seeds),
                on_epoch=lambda seed, accuracy, task=task: progress.update(
                    task, advance=1, note=f"seed {seed}: {accuracy:.1%}"
                ),
            )

    images = f"{len(dataset.test_labels)} {'validation' if args.validation else 'test'} images"
    seeds = f"mean ± deviation of {args.seeds} seeds" if args.seeds > 1 else f"seed {args.seed}"
    title = f"{args.dataset}, {args.model}, target {args.sparsity:.4g}: {images}, {seeds}"
    table = result_table(runs, title)
    if not args.compare:
        console.print(f"Layers of {args.method}, seed {runs[-1].seed}:", runs[-1].summary)
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s in all, compilation included.")

    what = "compare" if args.compare else args.method
    stem = f"train-{args.dataset}-{args.model}-{what}-{args.sparsity:g}".replace("/", "-")
    file = args.out / f"{stem}.json"
    command = " ".join(["python -m benchmarks.train", *arguments])
    harness.write_json(file, harness.content(command, **report(args, dataset, runs, table)))
    figures.save_training(file.with_suffix(".png"), runs, title, steps)
    console.print(f"Figures: {os.path.relpath(file)} and .png", soft_wrap=True, highlight=False)


def _parser() -> argparse.ArgumentParser:
    methods = "\n".join(f"  {name:<12}{method.about}" for name, method in METHODS.items())
    parser = harness.parser("train", __doc__, f"{EXAMPLES}\nmethods:\n{methods}")
    add = parser.add_argument
    add("--dataset", default="digits", help="digits, fashion_mnist, or any TFDS name (digits)")
    add("--model", choices=models.MODELS, default="mlp", help="(mlp)")
    add("--method", choices=METHODS, default="magnitude", help="(magnitude)", metavar="NAME")
    add("--compare", action="store_true", help="run all methods, ending with one table")
    add("--sparsity", type=_fraction, default=0.9, help="weights to remove, 0 to 1 (0.9)")
    add("--epochs", type=_count, help="of each run (as many as see 600,000 images, at most 120)")
    add("--batch-size", type=_count, default=64, help="images a step (64)")
    add("--learning-rate", type=_positive, default=2e-3, help="Adam's, at the start (0.002)")
    add("--l1", type=_positive, default=6e-4, help="weight of the penalty, for method l1 (6e-4)")
    add("--threshold", type=_positive, default=1e-3, help="method l1 prunes |w| up to it (0.001)")
    add("--seed", type=int, default=0, help="the first seed (0)")
    add("--seeds", type=_count, help="how many, one after the other (1; with --compare 3)")
    add("--validation", action="store_true", help="hold out training images and evaluate on them")
    return parser


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        percent = f" Pass {value / 100:g} for {value:g}%." if 1 < value <= 100 else ""
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}.{percent}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}.")
    return value


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}.")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}.") from None


if __name__ == "__main__":
    main()
