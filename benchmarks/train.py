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
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

import prunax
from benchmarks import datasets, figures, harness, loop, models, recipes

EXAMPLES = """\
examples:
  python -m benchmarks.train --dataset digits --method magnitude --sparsity 0.9
  python -m benchmarks.train --dataset digits --compare
  python -m benchmarks.train --dataset fashion_mnist --model cnn --method global --sparsity 0.95
  python -m benchmarks.train --dataset cifar10 --model resnet --epochs 20 --method magnitude
"""
# The defaults below were chosen on digits by --validation: the test images had no part in it.


class Run(NamedTuple):
    """One training run.

    Attributes:
        method: its name in `recipes.RECIPES`.
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
    summary: prunax.reports.Summary
    exact: bool | None
    seconds: float
    compile_seconds: float

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end of training, in [0, 1]."""
        return self.metrics.accuracy[-1]


def train(
    method: str,
    model: Any,
    data: loop.Data,
    settings: recipes.Settings,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 64,
    on_epoch: Callable[[int, float], None] = lambda seed, accuracy: None,
) -> list[Run]:
    """Trains a model by one method, once for each seed.

    Args:
        method: a name in `recipes.RECIPES`.
        model: one of `models.MODELS`, made for a number of classes.
        data: images and labels, on the device.
        settings: what all methods have in common.
        seeds: one run each. Runs of the same seed start from the same weights, whatever the method.
        batch_size: images a step.
        on_epoch: told the seed and the test accuracy after each epoch.

    Returns:
        One `Run` a seed.
    """
    recipe = recipes.RECIPES[method][0](settings)
    programs: dict[int, Any] = {}
    runs = []
    for seed in seeds:
        init_key, shuffle_key, score_key = jax.random.split(jax.random.key(seed), 3)
        params, masks = models.init(model, init_key, data.train_images), None
        history, seconds, compile_seconds = [], 0.0, 0.0
        for i, phase in enumerate(recipe.phases):
            optimizer_state = phase.optimizer(score_key, masks).init(params)
            state = loop.State(params, optimizer_state, shuffle_key)
            start = time.perf_counter()
            if i not in programs:
                program = functools.partial(_epoch, model, phase, batch_size)
                programs[i] = jax.jit(program).lower(state, data, score_key, masks).compile()
                compile_seconds += time.perf_counter() - start
                start = time.perf_counter()
            for _ in range(phase.epochs):
                state, metrics = programs[i](state, data, score_key, masks)
                history.append(jax.tree.map(float, metrics))
                on_epoch(seed, history[-1].accuracy)
            seconds += time.perf_counter() - start
            params, shuffle_key = state.params, state.key
            masks = getattr(state.opt_state, "masks", masks)  # those that prunax.prune keeps
            if phase.threshold is not None:
                masks = prunax.compute_masks(params, threshold=phase.threshold)
                params = prunax.apply_masks(params, masks)
        summary = prunax.summarize(params, masks)
        runs.append(
            Run(
                method,
                seed,
                loop.Metrics(*map(list, zip(*history, strict=True))),
                summary,
                _is_exact(params, masks, recipe.pools, settings.sparsity),
                seconds,
                compile_seconds,
            )
        )
    return runs


def _epoch(
    model: Any,
    phase: recipes.Phase,
    batch_size: int,
    state: loop.State,
    data: loop.Data,
    key: jax.Array,
    masks: Any,
) -> tuple[loop.State, loop.Metrics]:
    apply = functools.partial(models.apply, model)
    optimizer = phase.optimizer(key, masks)
    return loop.epoch(apply, optimizer, data, state, batch_size=batch_size, l1=phase.l1)


def _is_exact(params: Any, masks: Any, pools: str | None, sparsity: float) -> bool | None:
    if pools is None:
        return None
    summary = prunax.summarize(params, masks)
    sizes = [(leaf.weights, leaf.kept) for leaf in summary.leaves if leaf.prunable]
    if pools == "model":
        sizes = [(summary.weights, summary.kept)]
    asked = all(weights - kept == round(sparsity * weights) for weights, kept in sizes)
    masked = prunax.apply_masks(params, masks)
    return asked and jax.tree.all(jax.tree.map(jnp.array_equal, params, masked))


def result_table(runs: Sequence[Run], title: str) -> harness.Table:
    """One row a method: means over the seeds, and their standard deviation where there are several.

    The difference to dense is taken seed by seed, in points of test accuracy.
    """
    dense = {run.seed: run.accuracy for run in runs if run.method == "dense"}
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        of_method = [run for run in runs if run.method == method]
        points = [100 * (run.accuracy - dense[run.seed]) for run in of_method]
        exact = {run.exact for run in of_method}
        rows.append(
            (
                method,
                _mean_and_deviation([100 * run.accuracy for run in of_method]),
                "" if method == "dense" else _mean_and_deviation(points, "+.2f"),
                f"{statistics.mean(run.summary.sparsity for run in of_method):.2%}",
                "" if exact == {None} else ("yes" if exact == {True} else "NO"),
                f"{statistics.mean(run.seconds for run in of_method):.1f}",
            )
        )
    columns = "method", "test accuracy %", "against dense", "sparsity", "exact", "seconds"
    return harness.Table(title, columns, rows)


def _mean_and_deviation(values: Sequence[float], form: str = ".2f") -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def default_epochs(count: int) -> int:
    """Epochs for a number of training images: 600,000 images in all, in at most 120 passes."""
    return min(max(600_000 // count, 1), 120)


def report(
    args: argparse.Namespace,
    arguments: Sequence[str],
    dataset: datasets.Dataset,
    runs: Sequence[Run],
    table: harness.Table,
) -> dict[str, Any]:
    """Every figure of an invocation, ready for JSON."""
    return {
        "command": " ".join(["python -m benchmarks.train", *arguments]),
        "environment": harness.environment(),
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
    settings = recipes.Settings(
        sparsity=args.sparsity,
        epochs=args.epochs,
        steps=loop.steps_per_epoch(count, batch_size),
        learning_rate=args.learning_rate,
        l1=args.l1,
        threshold=args.threshold,
    )

    runs: list[Run] = []
    methods = recipes.RECIPES if args.compare else dict.fromkeys(["dense", args.method])
    with harness.progress(console) as progress:
        tasks = {
            method: progress.add_task(method, start=False, total=args.seeds * args.epochs, note="")
            for method in methods
        }
        for method, task in tasks.items():
            progress.start_task(task)
            runs += train(
                method,
                models.MODELS[args.model](dataset.num_classes),
                loop.Data(*map(jnp.asarray, dataset[1:5])),
                settings,
                seeds=range(args.seed, args.seed + args.seeds),
                batch_size=batch_size,
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
    harness.write_json(file, report(args, arguments, dataset, runs, table))
    figures.save_training(file.with_suffix(".png"), runs, title, settings.steps)
    console.print(f"Figures: {os.path.relpath(file)} and .png", soft_wrap=True, highlight=False)


def _parser() -> argparse.ArgumentParser:
    methods = "\n".join(f"  {name:<12}{about}" for name, (_, about) in recipes.RECIPES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        epilog=f"{EXAMPLES}\nmethods:\n{methods}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", default="digits", help="digits, fashion_mnist, or any TFDS name (digits)")
    add("--model", choices=models.MODELS, default="mlp", help="(mlp)")
    add(
        "--method", choices=recipes.RECIPES, default="magnitude", help="(magnitude)", metavar="NAME"
    )
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
    add("--out", type=Path, default=harness.OUT, help="folder of the results (benchmarks/out)")
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
