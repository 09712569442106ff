"""Dynamic sparse training, and why growth by the gradient of one small batch fails.

RigL beside SET and static masks: networks x optimizers x sparsities, five seeds, and RigL as published (it grows by the
gradient of one batch) beside that of prunax (by the mean gradient less its part of rank one). Then, in short runs at
90%, each thing that may be at fault changed alone. Each result is written as soon as it is there, and the same command
goes on where it stopped.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import rich.console

import prunax
from benchmarks import harness, loop, methods, recipes
from prunax import allocation, patterns, scores, transforms

PyTree = Any

EXAMPLES = """\
examples:
  python -m benchmarks.regrowth --networks mlp --sparsities 0.9 --seeds 2
  python -m benchmarks.regrowth --out benchmarks/results
"""
EPOCHS = {"mlp": 3, "lenet5": 5, "resnet": 2}
RATES = {
    "mlp": {"adam": 4e-3, "sgd": 0.1},
    "lenet5": {"adam": 4e-3, "sgd": 0.03},
    "resnet": {"adam": 4e-3, "sgd": 0.1},
}
OPTIMIZERS = "adam", "sgd"
SPARSITIES = (0.9, 0.95, 0.98)
WHY_EPOCHS, WHY_SPARSITY = 3, 0.9
MEAN = scores.ema_gradients(scores.gradient, 0.99)
DEFLATED = scores.ema_gradients(scores.deflated_gradient, 0.99)


class Change(NamedTuple):
    """What an experiment changes of RigL as published.

    Attributes:
        grow: the growth score.
        regrown: how a grown weight's second moment starts in Adam: "anew", "corrected" or "mean".
        options: of `dynamic_sparse`.
        centred: images have mean 0 and standard deviation 1 instead of lying in [0, 1].
    """

    grow: scores.Score = scores.gradient
    regrown: str = "anew"
    options: Mapping[str, Any] = {}
    centred: bool = False


def by_unit(params: PyTree, grads: PyTree) -> PyTree:
    """Gradients relative to the root mean squares of their unit's and their input's."""

    def score(g: jax.Array) -> jax.Array:
        if g.ndim < 2:
            return jnp.zeros(())
        square = jnp.square(g).reshape(-1, g.shape[-1])
        usual = square.mean(1, keepdims=True) * square.mean(0) / (square.mean() + 1e-30)
        return jnp.abs(g) / jnp.sqrt(usual + 1e-30).reshape(g.shape)

    return jax.tree.map(score, grads)


def deflated_by_unit(params: PyTree, grads: PyTree) -> PyTree:
    """Gradients less their part of rank one, relative to the root mean square of what is left to their unit."""

    def score(s: jax.Array) -> jax.Array:
        if s.ndim < 2:
            return jnp.zeros(())
        others = tuple(range(s.ndim - 1))
        return s / jnp.sqrt(jnp.mean(jnp.square(s), others, keepdims=True) + 1e-30)

    return jax.tree.map(score, scores.deflated_gradient(params, grads))


METHODS = {
    "static": None,  # random masks that stay
    "set": Change(scores.random),  # random ones grow
    "rigl, one batch": Change(),  # the largest gradients of one batch, as published
    "rigl": Change(DEFLATED),  # the largest mean gradients, less their part of rank one
    "rigl, by unit": Change(scores.ema_gradients(deflated_by_unit, 0.99)),
}
CHANGES = {
    "static": None,
    "set": Change(scores.random),
    "set, second moments from the layer's mean": Change(scores.random, "mean"),
    "set, bias corrected by weight": Change(scores.random, "corrected"),
    "rigl, one batch": Change(),
    "rigl, second moments from the layer's mean": Change(regrown="mean"),
    "rigl, bias corrected by weight": Change(regrown="corrected"),
    "rigl, constant fan-in": Change(options={"pattern": patterns.ConstantFanIn()}),
    "rigl, gradients relative to their unit's": Change(by_unit),
    "rigl, a third of the drop fraction": Change(options={"drop_fraction": 0.1}),
    "rigl, less its part of rank one": Change(scores.deflated_gradient),
    "rigl, mean gradient": Change(MEAN),
    "rigl, mean gradient, constant fan-in": Change(
        MEAN, options={"pattern": patterns.ConstantFanIn()}
    ),
    "rigl, mean gradient, relative to their unit's": Change(scores.ema_gradients(by_unit, 0.99)),
    "rigl, mean gradient less its part of rank one": Change(DEFLATED),
    "static, centred images": None,
    "set, centred images": Change(scores.random, centred=True),
    "rigl, centred images": Change(centred=True),
    "rigl, mean gradient, centred images": Change(MEAN, centred=True),
    "rigl, mean gradient less its part of rank one, centred images": Change(DEFLATED, centred=True),
}


class Moments(NamedTuple):
    """State of `adam`: all of the params' shapes, so that a grown weight's start at zero again."""

    steps: PyTree
    first: PyTree
    second: PyTree


def adam(rate: optax.Schedule, regrown: str) -> optax.GradientTransformation:
    """Adam that counts the steps of each weight since it grew.

    Args:
        rate: the learning rate.
        regrown: "corrected": each weight's bias correction is that of its own steps. "mean": the second moment of a
            grown weight starts at the mean of its layer's, and the correction is that of all steps.
    """
    if regrown == "anew":
        return optax.adam(rate)
    b1, b2 = 0.9, 0.999

    def init(params: PyTree) -> Moments:
        return Moments(*(jax.tree.map(jnp.zeros_like, params) for _ in range(3)))

    def leaf(g: jax.Array, t: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        if regrown == "mean":
            old = (t > 0) & (v > 0)
            v = jnp.where(t > 0, v, jnp.sum(jnp.where(old, v, 0)) / jnp.maximum(old.sum(), 1))
        t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * jnp.square(g)
        age = t if regrown == "corrected" else jnp.max(t)
        corrected = jnp.sqrt(v / (1 - b2**age)) + 1e-8
        return m / (1 - b1**age) / corrected, t, m, v

    def update(grads: PyTree, state: Moments, params: Any = None) -> tuple[PyTree, Moments]:
        found = jax.tree.map(leaf, grads, *state)
        updates, *rest = (
            jax.tree.map(lambda f, i=i: f[i], found, is_leaf=lambda f: isinstance(f, tuple))
            for i in range(4)
        )
        return updates, Moments(*rest)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(rate)
    )


def recipe(
    budget: recipes.Budget, optimizer: str, sparsity: float, change: Change | None
) -> recipes.Recipe:
    """A method at a sparsity; None for static masks."""
    rate = recipes.learning_rate(budget)

    def wrapped(key: jax.Array, masks: PyTree) -> optax.GradientTransformation:
        if optimizer == "sgd":
            inner = optax.sgd(rate, momentum=0.9)
            if budget.network == "lenet5":
                inner = optax.chain(optax.clip_by_global_norm(1.0), inner)
        else:
            inner = adam(rate, "anew" if change is None else change.regrown)
        if change is None:
            return transforms.static_sparse(inner, sparsity, key=key)
        options: dict[str, Any] = {"every": 100, "end_step": budget.at(0.75), **change.options}
        return transforms.dynamic_sparse(inner, sparsity, grow=change.grow, key=key, **options)

    return recipes.Recipe(wrapped)


def run(
    budget: recipes.Budget,
    optimizer: str,
    sparsity: float,
    change: Change | None,
    data: loop.Data,
    seeds: int,
) -> dict[str, Any]:
    """Trains all seeds in one program and measures."""
    network = budget.network
    made = recipe(budget, optimizer, sparsity, change)

    def all_seeds(params: PyTree, keys: jax.Array, data: loop.Data) -> methods.Outcome:
        return methods.each_seed(
            lambda params, key: methods.run(made, budget, 10, data, params, key), params, keys
        )

    keys = methods.keys_of(seeds)
    params = methods.initial(network, 10, keys, data.train_images[:1])
    if network == "lenet5" and optimizer == "sgd":
        params = scaled(params, sparsity)
    args = params, keys, data
    outcome = jax.block_until_ready(methods.compile_(all_seeds, *args)(*args))
    test, seen = (data.test_images, data.test_labels), data.train_images[: methods.SEEN]
    accuracy = methods.accuracy(network, 10, outcome.params, *test, seen)
    return {"test_accuracy": accuracy.tolist(), **where_connections_are(budget, outcome, data)}


def scaled(params: PyTree, sparsity: float) -> PyTree:
    """Weights of all seeds divided by the root of their layer's density, so that signals keep their size.

    Without it, and with gradients that are not clipped, SGD leaves some seeds of LeNet-5 at one class at 98%, whichever
    way connections grow (Evci et al., Gradient Flow in Sparse Neural Networks, 2022, arXiv:2010.03533).
    """
    one = jax.tree.map(lambda leaf: leaf[0], params)
    masks = prunax.compute_masks(one, sparsity, allocation=allocation.erdos_renyi)
    return jax.tree.map(lambda w, m: w / jnp.sqrt(jnp.mean(m, dtype=jnp.float32)), params, masks)


def where_connections_are(
    budget: recipes.Budget, outcome: methods.Outcome, data: loop.Data
) -> dict[str, Any]:
    """Of LeNet-300-100's first layer: the largest fan-in, and units that are 0 on a thousand test images."""
    if budget.network != "mlp":
        return {}
    images = data.test_images[:1000]
    images = images.reshape(len(images), -1)
    first = outcome.params["Dense_0"]
    most = outcome.masks["Dense_0"]["kernel"].sum(1).max(-1)
    units = jnp.einsum("np,spu->snu", images, first["kernel"]) + first["bias"][:, None]
    return {
        "largest_fan_in": most.tolist(),
        "units_at_zero": jnp.mean(units.max(1) <= 0, axis=-1).tolist(),
    }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def accuracy_table(records: Sequence[Mapping[str, Any]], network: str) -> harness.Table:
    """Test accuracy of each optimizer and method: mean and standard error over the seeds, in %."""
    found = {
        (r["optimizer"], r["method"], r["sparsity"]): r for r in records if r["network"] == network
    }
    sparsities = sorted({s for *_, s in found})
    rows = []
    for optimizer, method in itertools.product(OPTIMIZERS, METHODS):
        cells = []
        for s in sparsities:
            r = found.get((optimizer, method, s))
            cells.append("" if r is None else _cell(r["test_accuracy"]))
        if any(cells):
            rows.append((f"{optimizer}: {method}", *cells))
    columns = "optimizer, method", *(f"{s:.0%}" for s in sparsities)
    title = f"{methods.NETWORKS[network]}: test accuracy, %"
    return harness.Table(columns, rows, title=title)


def order_table(records: Sequence[Mapping[str, Any]]) -> harness.Table:
    """What each step of the order gives: differences seed by seed in points, and whether they exceed their error."""
    key = "network", "optimizer", "sparsity", "method"
    found = {tuple(r[k] for k in key): r["test_accuracy"] for r in records}
    steps = {
        "set over static": ("set", "static"),
        "rigl, one batch, over set": ("rigl, one batch", "set"),
        "rigl over set": ("rigl", "set"),
        "rigl, by unit, over set": ("rigl, by unit", "set"),
    }
    rows = []
    for network, optimizer, sparsity in dict.fromkeys(k[:3] for k in found):
        cells = []
        for one, other in steps.values():
            a, b = (found.get((network, optimizer, sparsity, m)) for m in (one, other))
            cells.append("" if a is None or b is None else _difference(a, b))
        rows.append((f"{methods.NETWORKS[network]}, {optimizer}, {sparsity:.0%}", *cells))
    return harness.Table(
        ("network, optimizer, sparsity", *steps), rows, title="The order: differences in points"
    )


def why_table(records: Sequence[Mapping[str, Any]]) -> harness.Table:
    """One change at a time."""
    rows = [
        (
            r["method"],
            _cell(r["test_accuracy"]),
            f"{statistics.mean(r['largest_fan_in']):.0f}",
            f"{100 * statistics.mean(r['units_at_zero']):.1f}",
        )
        for r in records
    ]
    columns = "what is changed", "test accuracy, %", "most at one unit", "units always 0, %"
    title = f"LeNet-300-100, Adam, {WHY_SPARSITY:.0%}, {WHY_EPOCHS} epochs: one change at a time"
    return harness.Table(columns, rows, title=title)


def _cell(values: Sequence[float]) -> str:
    return f"{100 * statistics.mean(values):.2f} ± {100 * standard_error(values):.2f}"


def _difference(a: Sequence[float], b: Sequence[float]) -> str:
    points = [100 * (x - y) for x, y in zip(a, b, strict=True)]
    mean, error = statistics.mean(points), standard_error(points)
    verdict = "" if mean > error else ", no" if mean > -error else ", reversed"
    return f"{mean:+.2f} ± {error:.2f}{verdict}"


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    compared = [r for r in content["records"] if r["part"] == "compare"]
    changed = [r for r in content["records"] if r["part"] == "why"]
    named = {
        f"regrowth/{network}": accuracy_table(compared, network)
        for network in dict.fromkeys(r["network"] for r in compared)
    }
    if compared:
        named["regrowth/order"] = order_table(compared)
    if changed:
        named["regrowth/why"] = why_table(changed)
    return named


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    console = rich.console.Console()
    dataset = methods.load(args.dataset, console)
    data = loop.Data(*map(jnp.asarray, dataset[1:5]))
    batch_size = 128 if len(dataset.train_labels) > 10_000 else 32
    steps = loop.steps_per_epoch(len(dataset.train_labels), batch_size)
    settings: dict[str, Any] = {
        "dataset": dataset.name,
        "epochs": EPOCHS if args.epochs is None else dict.fromkeys(methods.NETWORKS, args.epochs),
        "why_epochs": args.epochs or WHY_EPOCHS,
        "batch_size": batch_size,
        "learning_rates": RATES,
        "seeds": args.seeds,
    }
    key = "part", "network", "optimizer", "method", "sparsity"
    results = harness.Results(
        args.out / "regrowth.json", settings, "python -m benchmarks.regrowth", key
    )

    def once(*named: Any, change: Change | None, data: loop.Data) -> None:
        if results.find(*named) is not None:
            return
        part, network, optimizer, _, sparsity = named
        epochs = settings["why_epochs"] if part == "why" else settings["epochs"][network]
        budget = recipes.Budget(network, epochs, steps, batch_size, RATES[network][optimizer])
        found = run(budget, optimizer, sparsity, change, data, args.seeds)
        results.add(dict(zip(key, named, strict=True)) | found)
        console.print(*named, _cell(found["test_accuracy"]))

    if not args.no_why:
        for name, change in CHANGES.items():
            images = centre(data) if "centred" in name else data
            once("why", "mlp", "adam", name, WHY_SPARSITY, change=change, data=images)
    chosen = itertools.product(args.networks, args.sparsities, args.optimizers)
    for network, sparsity, optimizer in chosen:
        for method, change in METHODS.items():
            once("compare", network, optimizer, method, sparsity, change=change, data=data)
    head = (
        f"Dynamic sparse training on {dataset.name}\n\nWritten by `{results.command}`: mean ± standard error of "
        f"{args.seeds} seeds."
    )
    harness.publish(results.path, head, results.content, tables, console)


def centre(data: loop.Data) -> loop.Data:
    """Images of mean 0 and standard deviation 1 over all training pixels."""
    mean, deviation = data.train_images.mean(), data.train_images.std()
    return data._replace(
        train_images=(data.train_images - mean) / deviation,
        test_images=(data.test_images - mean) / deviation,
    )


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("regrowth", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--dataset", default="fashion_mnist", help="(fashion_mnist; digits where it is not there)")
    add(
        "--networks",
        nargs="+",
        choices=methods.NETWORKS,
        default=list(methods.NETWORKS),
        help="(all)",
    )
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="(all)")
    add("--sparsities", nargs="+", type=float, default=list(SPARSITIES), help="(0.9 0.95 0.98)")
    add("--seeds", type=int, default=5, help="how many (5)")
    add("--epochs", type=int, help="of each run (3, 5 and 2)")
    add("--no-why", action="store_true", help="leave out the changes one at a time")
    return parser


if __name__ == "__main__":
    main()
