"""What pruning does to generalisation and robustness, beside dense training.

For each method and sparsity: accuracy on the training and on the test images and the gap between them, on test images
with noise, blur, changed brightness or a hidden patch, and under attacks by the gradient (FGSM and PGD).
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from benchmarks import figures, harness, loop, methods, models

PyTree = Any
Perturbation = Callable[[Any, PyTree, jax.Array, jax.Array, jax.Array], jax.Array]

EXAMPLES = """\
examples:
  python -m benchmarks.robustness --quick
  python -m benchmarks.robustness --out benchmarks/results
"""
METHODS = "magnitude rigl static".split()
QUICK = {"methods": ["magnitude", "static"], "sparsities": [0.9, 0.98], "seeds": 2}
FULL = {"methods": METHODS, "sparsities": list(methods.SPARSITIES), "seeds": 3}
LEARNING_RATES = {"mlp": 2e-3, "lenet5": 8e-3, "resnet": 1.6e-2}  # that methods.py chooses
EPSILON = 0.02  # of the attacks, in pixel values of [0, 1]; the infinity norm


def noise(
    apply: Any,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    size: float = 0.1,
) -> jax.Array:
    """Gaussian noise of standard deviation 0.1."""
    return jnp.clip(images + size * jax.random.normal(key, images.shape), 0, 1)


def blur(
    apply: Any,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    size: float = 1.0,
) -> jax.Array:
    """A Gaussian blur of 5x5 pixels and standard deviation 1."""
    weights = jnp.exp(-((jnp.arange(-2.0, 3.0) / size) ** 2) / 2)
    weights = weights / weights.sum()
    for axis in (1, 2):
        size = images.shape[axis]
        padded = jnp.pad(images, [(2, 2) if i == axis else (0, 0) for i in range(4)], mode="edge")
        images = sum(
            w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(weights)
        )
    return images


def brightness(
    apply: Any,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    size: float = 0.2,
) -> jax.Array:
    """0.2 more at every pixel."""
    return jnp.clip(images + size, 0, 1)


def contrast(
    apply: Any,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    size: float = 0.5,
) -> jax.Array:
    """Pixels nearer to their image's mean, by half."""
    mean = images.mean((1, 2, 3), keepdims=True)
    return mean + (1 - size) * (images - mean)


def occlusion(
    apply: Any,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    size: float = 0.25,
) -> jax.Array:
    """A black square of a quarter of the image's width, at a random place in each image."""
    count, height, width, _ = images.shape
    side = jnp.maximum(size * width, 1).astype(jnp.int32)
    rows, columns = jax.random.split(key)
    top = jax.random.randint(rows, (count, 1, 1, 1), 0, height - side + 1)
    left = jax.random.randint(columns, (count, 1, 1, 1), 0, width - side + 1)
    y, x = jnp.arange(height)[None, :, None, None], jnp.arange(width)[None, None, :, None]
    hidden = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    return jnp.where(hidden, 0.0, images)


def fgsm(apply: Any, params: PyTree, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
    """One step of the gradient's sign (Goodfellow et al., 2015, arXiv:1412.6572)."""
    return _ascend(apply, params, images, images, labels, EPSILON)


def pgd(apply: Any, params: PyTree, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
    """Ten steps from a random start, projected (Madry et al., 2018, arXiv:1706.06083)."""
    start = images + jax.random.uniform(key, images.shape, minval=-EPSILON, maxval=EPSILON)

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _ascend(apply, params, x, images, labels, EPSILON / 4), None

    return jax.lax.scan(step, jnp.clip(start, 0, 1), None, length=10)[0]


def _ascend(
    apply: Any,
    params: PyTree,
    x: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    size: float,
) -> jax.Array:
    """A step that raises the loss, kept within reach of the images."""

    def loss(x: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels).sum()

    x = x + size * jnp.sign(jax.grad(loss)(x))
    return jnp.clip(jnp.clip(x, images - EPSILON, images + EPSILON), 0, 1)


PERTURBATIONS: dict[str, Perturbation] = {
    "noise": noise,
    "blur": blur,
    "brightness": brightness,
    "occlusion": occlusion,
    "fgsm": fgsm,
    "pgd": pgd,
}


@functools.partial(jax.jit, static_argnames=("network", "classes"))
def measure(
    network: str,
    classes: int,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    seen: jax.Array,
) -> dict[str, jax.Array]:
    """Accuracy of one set of params under each perturbation, in batches that cover every image.

    Batch normalisation takes the statistics of the training images `seen`.
    """
    predict = models.as_used(models.MODELS[network](classes), params, seen)
    found = {}

    def apply(_: PyTree, images: jax.Array) -> jax.Array:
        return predict(images)

    for i, (name, perturb) in enumerate(PERTURBATIONS.items()):

        def right(xs: tuple[jax.Array, jax.Array, jax.Array], perturb=perturb) -> jax.Array:
            image, label, key = xs
            x = perturb(apply, params, image[None], label[None], key)
            return jnp.argmax(apply(params, x)[0]) == label

        keys = jax.random.split(jax.random.key(i), len(labels))
        found[name] = jnp.mean(jax.lax.map(right, (images, labels, keys), batch_size=1000))
    return found


def accuracies(
    network: str, outcome: methods.Outcome, data: loop.Data, classes: int
) -> dict[str, list[float]]:
    """All accuracies of an outcome with a leading axis of seeds."""
    seen = data.train_images[: methods.SEEN]
    train, test = (
        methods.accuracy(network, classes, outcome.params, images, labels, seen)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        )
    )
    found = [
        measure(
            network,
            classes,
            jax.tree.map(lambda leaf, seed=seed: leaf[seed], outcome.params),
            data.test_images,
            data.test_labels,
            seen,
        )
        for seed in range(len(test))
    ]
    accuracy = {"train": train.tolist(), "test": test.tolist()}
    return accuracy | {name: [float(f[name]) for f in found] for name in PERTURBATIONS}


def label(record: Mapping[str, Any]) -> str:
    """The name of a row: the method, and its allocation where that is not the one of all."""
    main = methods.main_allocation(record)
    return record["method"] if main else f"{record['method']}, {record['allocation']}"


def robustness_table(content: Mapping[str, Any], network: str) -> harness.Table:
    """A row a method and sparsity: means over the seeds, in %; the gap in points."""
    columns = ("method", "sparsity", "train", "test", "gap", *PERTURBATIONS)
    rows = []
    for r in content["records"]:
        if r["network"] != network:
            continue
        mean = {name: 100 * float(np.mean(values)) for name, values in r["accuracy"].items()}
        sparsity = "" if r["method"] == "dense" else f"{r['sparsity']:.0%}"
        rows.append(
            (
                label(r),
                sparsity,
                f"{mean['train']:.2f}",
                harness.spread(r["accuracy"]["test"]),
                f"{mean['train'] - mean['test']:.2f}",
                *(harness.spread(r["accuracy"][name]) for name in PERTURBATIONS),
            )
        )
    title = f"{methods.NETWORKS[network]}: accuracy, %, clean and perturbed"
    return harness.Table(columns, rows, title=title)


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    networks = dict.fromkeys(r["network"] for r in content["records"])
    return {f"robustness/{network}": robustness_table(content, network) for network in networks}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 2 and one line on a bad argument."""
    parser = _parser()
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    console = rich.console.Console()
    begin = time.perf_counter()
    dataset = methods.load(args.dataset, console)
    data, classes = loop.Data(*map(jnp.asarray, dataset[1:5])), dataset.num_classes
    budget = methods.budget_for(args.network, dataset, args.epochs, args.quick)
    budget = budget._replace(learning_rate=LEARNING_RATES[args.network])
    settings = {
        "dataset": dataset.name,
        "epochs": budget.epochs,
        "batch_size": budget.batch_size,
        "learning_rate": budget.learning_rate,
        "seeds": list(range(args.seeds)),
        "epsilon": EPSILON,
    }
    file = args.out / ("robustness-quick.json" if args.quick else "robustness.json")
    try:
        results = methods.Results(file, settings, "python -m benchmarks.robustness")
    except ValueError as error:
        parser.error(str(error))
    pairs = methods.with_allocations(args.methods, args.allocations)
    jobs = [("dense", "", 0.0), *((m, a, s) for m, a in pairs for s in sorted(args.sparsities))]
    with harness.progress(console) as progress:
        task = progress.add_task("robustness", total=len(jobs), note="")
        for method, name, sparsity in jobs:
            progress.update(task, note=f"{args.network} {method} {name} {sparsity:g}")
            if results.find(budget, method, name, sparsity) is None:
                outcome, *_ = methods.train_method(
                    method, name, sparsity, budget, classes, data, args.seeds
                )
                results.add(
                    {
                        "network": args.network,
                        "method": method,
                        "allocation": name,
                        "sparsity": sparsity,
                        "learning_rate": budget.learning_rate,
                        "options": methods.METHODS[method].options,
                        "accuracy": accuracies(args.network, outcome, data, classes),
                    }
                )
            progress.advance(task)

    content = results.content
    about = "\n".join(f"- {name}: {f.__doc__}" for name, f in PERTURBATIONS.items())
    head = (
        f"Robustness on {dataset.name}\n\nWritten by `{content['command']}`: mean ± standard deviation of "
        f"{args.seeds} seeds, {budget.epochs} epochs. Attacks reach {EPSILON} in pixel values of [0, 1].\n\n{about}"
    )
    harness.publish(file, head, content, tables, console)
    figures.save_robustness(file.with_suffix(".png"), content)
    console.print(f"{time.perf_counter() - begin:.0f} s in all, compilation included.")


def _parser() -> argparse.ArgumentParser:
    trained_once = [name for name, m in methods.METHODS.items() if m.recipe and m.allocations]
    parser = harness.parser("robustness", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--quick", action="store_true", help="few methods and sparsities, short training")
    add("--dataset", default="fashion_mnist", help="(fashion_mnist; digits where it is not there)")
    add("--network", choices=methods.NETWORKS, default="mlp", help="(mlp)")
    add("--methods", nargs="+", choices=trained_once, metavar="NAME", help=f"({' '.join(METHODS)})")
    add(
        "--allocations",
        nargs="+",
        choices=methods.recipes.ALLOCATIONS,
        default=["erk", "global"],
        help="each method with those of them that methods.py has it with (erk global)",
    )
    add("--sparsities", nargs="+", type=float, help=f"({' '.join(map(str, methods.SPARSITIES))})")
    add("--seeds", type=int, help="how many (3)")
    add("--epochs", type=int, help="of each run (as methods.py)")
    return parser


if __name__ == "__main__":
    main()
