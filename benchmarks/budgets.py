"""Budgets that the measured loss decides, beside plain ones: one-shot pruning by magnitude, without fine-tuning.

Trains a network, prunes it by |w| with budgets from each allocation, and measures the loss on the test images. The
search looks at training images only. Then prunes as much as a limit on the loss accepts, and says what that costs on
the test images.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import prunax
from benchmarks import datasets, harness, loop, methods, models
from prunax import allocation, search

PyTree = Any

EXAMPLES = """\
examples:
  python -m benchmarks.budgets --quick
  python -m benchmarks.budgets --out benchmarks/results
"""
EPOCHS = {"digits": 40}  # 5 for the larger sets
PLAIN = {
    "uniform": allocation.uniform,
    "erdos_renyi": allocation.erdos_renyi,
    "lamp": allocation.lamp,
    "global_ranking": allocation.global_ranking,
}
LABELS = {
    "dense": "dense",
    "random": "random weights, uniform",
    "uniform": "uniform",
    "erdos_renyi": "Erdos-Renyi",
    "lamp": "LAMP",
    "global_ranking": "global",
    "greedy": "`allocate`, without a key",
    "evolved": "`allocate`, with a key",
    "max_sparsity": "`max_sparsity`",
}


def losses(model: Any, images: jax.Array, labels: jax.Array) -> Callable[[PyTree], jax.Array]:
    """The mean loss over some images, as a function of the params."""

    def loss_fn(params: PyTree) -> jax.Array:
        logits = models.apply(model, params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


def train(model: Any, data: loop.Data, seed: int, epochs: int, rate: float) -> PyTree:
    """Trains with Adam and a cosine schedule."""
    key, start = jax.random.split(jax.random.key(seed))
    params = models.init(model, start, data.train_images)
    batch = min(128, len(data.train_labels))
    steps = epochs * loop.steps_per_epoch(len(data.train_labels), batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = loop.State(params, optimizer.init(params), key)
    apply = functools.partial(models.apply, model)
    epoch = jax.jit(functools.partial(loop.train_epoch, apply, optimizer, batch_size=batch))
    for _ in range(epochs):
        state, _ = epoch(data, state)
    return state.params


def within(
    loss_fn: Callable[[PyTree], jax.Array], params: PyTree, limit: float, share: Any
) -> PyTree:
    """The masks of the largest sparsity of a plain allocation whose loss is within a limit, by bisection."""

    @jax.jit
    def pruned_at(params: PyTree, sparsity: jax.Array) -> tuple[PyTree, jax.Array]:
        masks = prunax.compute_masks(params, sparsity, allocation=share)
        return masks, loss_fn(prunax.apply_masks(params, masks))

    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        if pruned_at(params, jnp.float32(middle))[1] <= limit:
            low = middle
        else:
            high = middle
    return pruned_at(params, jnp.float32(low))[0]


def run(
    dataset: datasets.Dataset,
    network: str,
    seed: int,
    args: argparse.Namespace,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Trains one network and prunes it in every way.

    Returns:
        Figures by way of pruning, at the given sparsity under `"allocations"`, within the limit under `"limits"`.
    """
    note("training")
    data = loop.Data(*map(jnp.asarray, dataset[1:5]))
    model = models.MODELS[network](dataset.num_classes)
    params = train(model, data, seed, EPOCHS.get(dataset.name, 5), args.learning_rate)
    # A part of the training images: enough for a handful of numbers, and quicker.
    images, labels = data.train_images[: args.images], data.train_labels[: args.images]
    loss_fn = losses(model, images, labels)
    of_search = jax.jit(loss_fn)
    of_test = jax.jit(losses(model, data.test_images, data.test_labels))
    apply = functools.partial(models.apply, model)
    accuracy = jax.jit(lambda p: loop.evaluate(apply, p, data.test_images, data.test_labels))

    def figures(masks: PyTree) -> dict[str, Any]:
        pruned = prunax.apply_masks(params, masks)
        summary = prunax.summarize(params, masks)
        return {
            "sparsity": summary.sparsity,
            "sparsities": {leaf.path: leaf.sparsity for leaf in summary.leaves if leaf.prunable},
            "searched_loss": float(of_search(pruned)),
            "test_loss": float(of_test(pruned)),
            "test_accuracy": float(accuracy(pruned)),
        }

    # Nothing pruned; summarize counts kernels as prunable.
    dense = figures(prunax.compute_masks(params, 0.0))
    found = {"dense": dense}
    random = prunax.scores.random(params, key=jax.random.key(seed))
    found["random"] = figures(prunax.compute_masks(params, args.sparsity, scores=random))
    for name, share in PLAIN.items():
        note(name)
        found[name] = figures(prunax.compute_masks(params, args.sparsity, allocation=share))

    note("measuring curves")
    begin = time.perf_counter()
    measured = search.sensitivity(loss_fn, params, batch_size=args.batch_size)
    seconds = {"sensitivity": time.perf_counter() - begin}
    options = {"measured": measured, "batch_size": args.batch_size}
    for name, key in (("greedy", None), ("evolved", jax.random.key(seed))):
        note(f"allocate, {name}")
        begin = time.perf_counter()
        result = search.allocate(
            loss_fn, params, args.sparsity, key=key, generations=args.generations, **options
        )
        seconds[name] = time.perf_counter() - begin
        found[name] = figures(result.masks) | {
            "starts": result.start_losses,
            "history": result.history,
        }

    note("max_sparsity")
    begin = time.perf_counter()
    accepted = search.max_sparsity(loss_fn, params, max_increase=args.max_increase, **options)
    seconds["max_sparsity"] = time.perf_counter() - begin
    limits = {"max_sparsity": figures(accepted.masks)}
    for name, share in PLAIN.items():
        note(f"bisecting {name}")
        limits[name] = figures(within(loss_fn, params, accepted.limit, share))
    return {
        "dataset": dataset.name,
        "network": network,
        "seed": seed,
        "allocations": found,
        "limits": limits,
        "seconds": seconds,
    }


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    settings, found = content["settings"], {}
    for name in dict.fromkeys((r["dataset"], r["network"]) for r in content["records"]):
        dataset, network = name
        runs = [r for r in content["records"] if (r["dataset"], r["network"]) == name]
        title = f"{network} on {dataset}, {len(runs)} seed{'s' * (len(runs) > 1)}"
        found[f"budgets/{dataset}/{network}"] = _allocations(
            f"{title}: {settings['sparsity']:.0%} pruned, not fine-tuned", runs
        )
        found[f"budgets-limit/{dataset}/{network}"] = _limits(
            f"{title}: pruned as far as a loss {settings['max_increase']:g} above dense accepts",
            runs,
        )
    return found


def _allocations(title: str, runs: Sequence[Mapping[str, Any]]) -> harness.Table:
    rows = []
    for name in runs[0]["allocations"]:
        of = [r["allocations"][name] for r in runs]
        rows.append(
            (
                LABELS[name],
                harness.spread([f["searched_loss"] for f in of], ".3f", 1),
                harness.spread([f["test_loss"] for f in of], ".3f", 1),
                harness.spread([f["test_accuracy"] for f in of], ".1f"),
                " ".join(
                    f"{statistics.mean(100 * s for s in leaf):.1f}"
                    for leaf in zip(*(f["sparsities"].values() for f in of), strict=True)
                ),
            )
        )
    columns = "budgets", "loss searched on", "test loss", "test accuracy %", "pruned % by layer"
    return harness.Table(columns, rows, title=title)


def _limits(title: str, runs: Sequence[Mapping[str, Any]]) -> harness.Table:
    rows = []
    for name in runs[0]["limits"]:
        pairs = [(r["limits"][name], r["allocations"]["dense"]) for r in runs]
        rows.append(
            (
                LABELS[name] if name == "max_sparsity" else f"{LABELS[name]}, bisected",
                harness.spread([f["sparsity"] for f, _ in pairs]),
                harness.spread(
                    [f["searched_loss"] - d["searched_loss"] for f, d in pairs], ".4f", 1
                ),
                f"{max(f['searched_loss'] - d['searched_loss'] for f, d in pairs):.5f}",
                harness.spread([f["test_loss"] - d["test_loss"] for f, d in pairs], ".4f", 1),
                harness.spread([f["test_accuracy"] - d["test_accuracy"] for f, d in pairs]),
            )
        )
    columns = (
        "found by",
        "pruned %",
        "increase searched on",
        "largest",
        "increase in test loss",
        "test accuracy, points",
    )
    return harness.Table(columns, rows, title=title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 2 and one line on a bad argument."""
    parser = _parser()
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    if args.quick:
        args.datasets, args.networks, args.seeds, args.generations = ["digits"], ["mlp"], 1, 8
    console = Console()
    names = "sparsity max_increase learning_rate images generations".split()
    settings = {name: getattr(args, name) for name in names} | {"epochs": EPOCHS | {"others": 5}}
    file = args.out / ("budgets-quick.json" if args.quick else "budgets.json")
    if args.quick:
        file.unlink(missing_ok=True)
    key = ("dataset", "network", "seed")
    try:
        results = harness.Results(file, settings, "python -m benchmarks.budgets", key)
    except ValueError as error:
        parser.error(str(error))
    jobs = list(itertools.product(args.datasets, args.networks, range(args.seeds)))
    load = functools.cache(lambda name: methods.load(name, console))
    with harness.progress(console) as progress:
        task = progress.add_task("budgets", total=len(jobs), note="")
        for name, network, seed in jobs:
            if results.find(name, network, seed) is None:
                at = f"{name} {network} {seed}: "
                note = lambda what, at=at: progress.update(task, note=at + what)  # noqa: E731
                results.add(run(load(name), network, seed, args, note))
            progress.advance(task)

    head = f"Budgets decided by the loss\n\nWritten by `{results.command}`."
    harness.publish(file, head, results.content, tables, console)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("budgets", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--quick", action="store_true", help="digits, one seed, few generations")
    add("--datasets", nargs="+", default=["digits", "fashion_mnist"], metavar="NAME")
    add(
        "--networks",
        nargs="+",
        default=["mlp", "lenet5"],
        choices=["mlp", "lenet5", "cnn"],
        metavar="NAME",
    )
    add("--seeds", type=int, default=3, help="how many (3)")
    add("--sparsity", type=float, default=0.95, help="of all kernels together (0.95)")
    add("--max-increase", type=float, default=0.01, help="limit on the loss above dense (0.01)")
    add("--learning-rate", type=float, default=1e-3, help="Adam's, at the start (0.001)")
    add("--images", type=int, default=4096, help="training images that the search looks at (4096)")
    add("--generations", type=int, default=32, help="of 8 networks each (32)")
    add("--batch-size", type=int, default=1, help="networks measured at once (1)")
    return parser


if __name__ == "__main__":
    main()
