"""Movement pruning beside magnitude, where it is meant for: fine-tuning a trained network to another task.

LeNet-300-100 learns one half of the classes of Fashion-MNIST, and is then pruned while it is fine-tuned to the other
half. By magnitude the weights stay that were large for the first task, by movement (learned scores) those that grow
away from zero on the second. All methods have the same steps, batches, learning rate and sparsity of each layer.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console

import prunax
from benchmarks import harness, loop, methods, models

PyTree = Any

EXAMPLES = """\
examples:
  python -m benchmarks.finetuning --seeds 1 --sparsities 0.9 0.99
  python -m benchmarks.finetuning --out benchmarks/results
"""
SPARSITIES = (0.97,)
METHODS = ("magnitude", "movement")
BATCH, FIRST_EPOCHS, EPOCHS = 128, 2, 2
RATE, SCORE_RATE = 1e-3, 1e-2
BEGIN, END = 0.1, 0.7  # of the fine-tuning, from where to where the sparsity grows
ALLOCATION = prunax.allocation.erdos_renyi


def half(data: loop.Data, first: bool, classes: int) -> loop.Data:
    """The images of one half of the classes, labelled from 0 on."""
    middle = classes // 2

    def of(images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = labels < middle if first else labels >= middle
        return images[chosen], labels[chosen] % middle

    return loop.Data(
        *of(data.train_images, data.train_labels), *of(data.test_images, data.test_labels)
    )


def scan_steps(
    loss: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    variables: PyTree,
    data: loop.Data,
    key: jax.Array,
    epochs: int,
) -> tuple[PyTree, Any]:
    """Trains any variables by ``loss(variables, step, images, labels)``; returns them and the optimizer's state."""
    count = len(data.train_labels)
    steps = loop.steps_per_epoch(count, BATCH)
    rows = jnp.concatenate(
        [
            jax.random.permutation(k, count)[: steps * BATCH].reshape(steps, BATCH)
            for k in jax.random.split(key, epochs)
        ]
    )

    def step(carry: tuple[PyTree, Any], xs: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        variables, state = carry
        t, rows = xs
        batch = data.train_images[rows], data.train_labels[rows]
        grads = jax.grad(loss)(variables, t, *batch)
        updates, state = tx.update(grads, state, variables)
        return (optax.apply_updates(variables, updates), state), None

    carry = variables, tx.init(variables)
    return jax.lax.scan(step, carry, (jnp.arange(len(rows)), rows))[0]


def cross_entropy(model: Any, params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a batch."""
    logits = models.apply(model, params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pretrain(model: Any, data: loop.Data, key: jax.Array) -> PyTree:
    """The dense network of the first half."""
    params = models.init(model, key, data.train_images)

    def loss(params: PyTree, step: jax.Array, *batch: jax.Array) -> jax.Array:
        return cross_entropy(model, params, *batch)

    return scan_steps(loss, optax.adam(RATE), params, data, key, FIRST_EPOCHS)[0]


def fine_tune(
    method: str, sparsity: float, model: Any, params: PyTree, data: loop.Data, key: jax.Array
) -> PyTree:
    """The params of the second half, pruned."""
    steps = EPOCHS * loop.steps_per_epoch(len(data.train_labels), BATCH)
    adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    schedule = prunax.schedules.polynomial(sparsity, int(BEGIN * steps), int(END * steps), every=10)

    def loss(params: PyTree, step: jax.Array, *batch: jax.Array) -> jax.Array:
        return cross_entropy(model, params, *batch)

    if method == "dense":
        return scan_steps(loss, adam, params, data, key, EPOCHS)[0]
    if method == "magnitude":
        tx = prunax.prune(adam, schedule, allocation=ALLOCATION)
        return scan_steps(loss, tx, params, data, key, EPOCHS)[0]

    def masked_loss(both: PyTree, step: jax.Array, *batch: jax.Array) -> jax.Array:
        masked = prunax.learned.straight_through(
            both["params"], both["scores"], schedule(step), allocation=ALLOCATION
        )
        return cross_entropy(model, masked, *batch)

    tx = optax.partition(
        {"params": adam, "scores": optax.adam(SCORE_RATE)}, {"params": "params", "scores": "scores"}
    )
    both = {"params": params, "scores": jax.tree.map(jnp.zeros_like, params)}
    both, _ = scan_steps(masked_loss, tx, both, data, key, EPOCHS)
    masks = prunax.compute_masks(
        both["params"], sparsity, scores=both["scores"], allocation=ALLOCATION
    )
    return prunax.apply_masks(both["params"], masks)


def run(
    method: str, sparsity: float, classes: int, halves: Sequence[loop.Data], seeds: int
) -> dict[str, Any]:
    """All seeds of a method at a sparsity."""
    model = models.MLP(classes // 2)
    apply = functools.partial(models.apply, model)

    def all_seeds(keys: jax.Array, first: loop.Data, second: loop.Data) -> Any:
        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            params = pretrain(model, first, jax.random.fold_in(key, 0))
            key = jax.random.fold_in(key, 1)
            params = fine_tune(method, sparsity, model, params, second, key)
            accuracy = loop.evaluate(apply, params, second.test_images, second.test_labels)
            return accuracy, loop.sparsity(params)

        return methods.each_seed(one, keys)

    args = methods.keys_of(seeds), *halves
    accuracy, zeros = jax.block_until_ready(methods.compile_(all_seeds, *args)(*args))
    return {"test_accuracy": accuracy.tolist(), "zeros": zeros.tolist()}


def accuracy_table(records: Sequence[Mapping[str, Any]]) -> harness.Table:
    """Accuracy on the second half of the classes, in %."""
    found = {(r["method"], r["sparsity"]): r["test_accuracy"] for r in records}
    sparsities = sorted({s for _, s in found if s})
    rows = []
    if ("dense", 0.0) in found:
        rows.append(("dense", harness.spread(found["dense", 0.0]), *[""] * (len(sparsities) - 1)))
    for method in METHODS:
        cells = [
            harness.spread(found[method, s]) if (method, s) in found else "" for s in sparsities
        ]
        rows.append((method, *cells))
    pairs = [(found.get(("movement", s)), found.get(("magnitude", s))) for s in sparsities]
    over = [
        harness.spread([x - y for x, y in zip(a, b, strict=True)], "+.2f") if a and b else ""
        for a, b in pairs
    ]
    rows.append(("movement over magnitude, points", *over))
    title = "LeNet-300-100, fine-tuned from one half of the classes to the other: test accuracy, %"
    return harness.Table(("method", *(f"{s:.0%}" for s in sparsities)), rows, title=title)


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    return {"finetuning": accuracy_table(content["records"])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    console = rich.console.Console()
    dataset = methods.load(args.dataset, console)
    data, classes = loop.Data(*map(jnp.asarray, dataset[1:5])), dataset.num_classes
    settings = {
        "dataset": dataset.name,
        "epochs": [FIRST_EPOCHS, EPOCHS],
        "batch_size": BATCH,
        "learning_rates": {"weights": RATE, "scores": SCORE_RATE},
        "seeds": args.seeds,
    }
    command, key = "python -m benchmarks.finetuning", ("method", "sparsity")
    results = harness.Results(args.out / "finetuning.json", settings, command, key)
    halves = [half(data, first, classes) for first in (True, False)]
    for sparsity in sorted(args.sparsities):
        for method, target in (("dense", 0.0), *((m, sparsity) for m in METHODS)):
            if results.find(method, target) is None:
                found = run(method, target, classes, halves, args.seeds)
                results.add({"method": method, "sparsity": target} | found)
                console.print(method, target, harness.spread(found["test_accuracy"]))
    head = (
        f"Fine-tuning on {dataset.name}\n\nWritten by `{command}`: mean ± standard deviation of {args.seeds} seeds, "
        f"{FIRST_EPOCHS} epochs on the first half of the classes and {EPOCHS} on the second."
    )
    harness.publish(results.path, head, results.content, tables, console)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("finetuning", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--dataset", default="fashion_mnist", help="(fashion_mnist; digits where it is not there)")
    add("--sparsities", nargs="+", type=float, default=list(SPARSITIES), help="(0.97)")
    add("--seeds", type=int, default=5, help="how many (5)")
    return parser


if __name__ == "__main__":
    main()
