"""Pruning for robustness: learned scores under an adversarial loss (HYDRA), and flat minima (SAM).

A network of 100 hidden units on 10,000 images of Fashion-MNIST. One trained against PGD is pruned in three ways, while
it goes on training against PGD for as many steps: by magnitude, at once, as HYDRA's paper does it for comparison; by
magnitude, gradually; and by HYDRA, which learns a score a weight and then fine-tunes what is left. Beside them the
dense networks, trained on clean images and against PGD. Then magnitude pruning at minima of Adam and of SAM.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console

import prunax
from benchmarks import finetuning, harness, loop, methods, models, robustness

PyTree = Any

EXAMPLES = """\
examples:
  python -m benchmarks.adversarial --sparsities 0.9 --seeds 1
  python -m benchmarks.adversarial --out benchmarks/results
"""
IMAGES = 10_000
EPOCHS, PRUNE, TUNE = 4, 3, 3  # of training before pruning, of pruning, and of fine-tuning
RATE, SCORE_RATE = 1e-3, 5e-3
RADIUS, STEPS = 0.1, 3  # of the attack in training, in pixel values of [0, 1]
RADII = (0.05, 0.1)
RESTARTS, PGD_STEPS, ATTACKED = 3, 20, 1000  # of the evaluation, and test images attacked
METHODS = (
    "dense",
    "magnitude",
    "dense, adversarial",
    "magnitude at once, adversarial",
    "magnitude, adversarial",
    "hydra",
)
SHOT = (0.8, 0.9, 0.95)  # pruned at once, without fine-tuning, at the minima of Adam and SAM
CORRUPTIONS = {
    "noise": (robustness.noise, (0.05, 0.1, 0.2)),
    "blur": (robustness.blur, (0.6, 1.0, 1.5)),
    "brightness": (robustness.brightness, (0.1, 0.2, 0.3)),
    "contrast": (robustness.contrast, (0.3, 0.5, 0.7)),
    "occlusion": (robustness.occlusion, (0.25, 0.4, 0.5)),
}
MODEL = models.MLP(10, (100,))
ALLOCATION = prunax.allocation.erdos_renyi


def attack(
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array | None,
    radius: float,
    steps: int,
) -> jax.Array:
    """PGD from a random start, or with no key and one step FGSM; the infinity norm."""

    def loss(x: jax.Array) -> jax.Array:
        logits = models.apply(MODEL, params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    size = radius if steps == 1 else 2.5 * radius / steps

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = x + size * jnp.sign(jax.grad(loss)(x))
        return jnp.clip(jnp.clip(x, images - radius, images + radius), 0, 1), None

    start = images
    if key is not None:
        start = images + jax.random.uniform(key, images.shape, minval=-radius, maxval=radius)
    return jax.lax.scan(step, jnp.clip(start, 0, 1), None, length=steps)[0]


def train(
    variables: PyTree,
    params_of: Callable[[PyTree], PyTree],
    tx: optax.GradientTransformation,
    data: loop.Data,
    key: jax.Array,
    epochs: int,
    adversarial: bool,
) -> tuple[PyTree, Any]:
    """Trains variables, from which `params_of` makes the network's params."""

    def loss(variables: PyTree, step: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        params = params_of(variables)
        if adversarial:
            start = jax.random.fold_in(jax.random.fold_in(key, 1), step)
            fixed = jax.lax.stop_gradient(params)
            images = jax.lax.stop_gradient(attack(fixed, images, labels, start, RADIUS, STEPS))
        return finetuning.cross_entropy(MODEL, params, images, labels)

    return finetuning.scan_steps(loss, tx, variables, data, key, epochs)


def adam(data: loop.Data, epochs: int, rate: float = RATE) -> optax.GradientTransformation:
    """Adam whose rate falls to zero along a cosine."""
    steps = epochs * loop.steps_per_epoch(len(data.train_labels), finetuning.BATCH)
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def same(variables: PyTree) -> PyTree:
    """Variables that are the params."""
    return variables


def begin(data: loop.Data, key: jax.Array, adversarial: bool) -> PyTree:
    """The dense network that is pruned."""
    params = models.init(MODEL, key, data.train_images)
    return train(params, same, adam(data, EPOCHS), data, key, EPOCHS, adversarial)[0]


def go_on(method: str, sparsity: float, params: PyTree, data: loop.Data, key: jax.Array) -> PyTree:
    """Prunes a dense network and fine-tunes it, or goes on training it dense: as many steps in all."""
    adversarial = method not in ("dense", "magnitude")
    if method != "hydra":
        tx = adam(data, PRUNE + TUNE)
        if "at once" in method:
            masks = prunax.compute_masks(params, sparsity, allocation=ALLOCATION)
            params, tx = prunax.apply_masks(params, masks), prunax.transforms.fixed_masks(tx, masks)
        elif sparsity:
            steps = PRUNE * loop.steps_per_epoch(len(data.train_labels), finetuning.BATCH)
            schedule = prunax.schedules.polynomial(sparsity, 0, steps, every=20)
            tx = prunax.prune(tx, schedule, allocation=ALLOCATION)
        return train(params, same, tx, data, key, PRUNE + TUNE, adversarial)[0]

    def masked(scores: PyTree) -> PyTree:
        sizes = jax.tree.map(jnp.abs, scores)
        return prunax.learned.straight_through(params, sizes, sparsity, allocation=ALLOCATION)

    scores = jax.tree.map(lambda w: w / (jnp.max(jnp.abs(w)) + 1e-12), params)
    tx = adam(data, PRUNE, SCORE_RATE)
    scores, _ = train(scores, masked, tx, data, key, PRUNE, adversarial)
    sizes = jax.tree.map(jnp.abs, scores)
    masks = prunax.compute_masks(params, sparsity, scores=sizes, allocation=ALLOCATION)
    tx = prunax.transforms.fixed_masks(adam(data, TUNE), masks)
    key = jax.random.fold_in(key, 2)
    tuned, _ = train(prunax.apply_masks(params, masks), same, tx, data, key, TUNE, adversarial)
    return tuned


def measure(params: PyTree, data: loop.Data, key: jax.Array) -> dict[str, jax.Array]:
    """All figures of one network, as shares; `ece` is the calibration error over 15 bins."""
    apply = functools.partial(models.apply, MODEL)
    images, labels = data.test_images, data.test_labels

    def accuracy(x: jax.Array, labels: jax.Array = labels) -> jax.Array:
        return jnp.mean(apply(params, x).argmax(-1) == labels)

    probabilities = jax.nn.softmax(apply(params, images))
    sure, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bins = jnp.minimum((15 * sure).astype(jnp.int32), 14)
    gaps = jax.ops.segment_sum(right - sure, bins, 15)
    found = {
        "train": accuracy(data.train_images, data.train_labels),
        "clean": right.mean(),
        "ece": jnp.abs(gaps).sum() / len(labels),
    }
    for name, (corrupt, sizes) in CORRUPTIONS.items():

        def corrupted(size: jax.Array, corrupt: Any = corrupt) -> jax.Array:
            return accuracy(corrupt(apply, params, images, labels, key, size=size))

        each = jax.lax.map(corrupted, jnp.array(sizes))
        found |= {f"{name} {i + 1}": each[i] for i in range(len(sizes))}
    images, labels = images[:ATTACKED], labels[:ATTACKED]
    found["clean, attacked images"] = accuracy(images, labels)
    for radius in RADII:
        found[f"fgsm {radius}"] = accuracy(attack(params, images, labels, None, radius, 1), labels)

        def survives(key: jax.Array, radius: float = radius) -> jax.Array:
            x = attack(params, images, labels, key, radius, PGD_STEPS)
            return apply(params, x).argmax(-1) == labels

        each = jax.lax.map(survives, jax.random.split(key, RESTARTS))
        found[f"pgd {radius}"] = jnp.mean(jnp.all(each, axis=0))
    return found


def sam(data: loop.Data, epochs: int) -> optax.GradientTransformation:
    """SAM over Adam: every second step climbs 0.05 along the gradient, the next one descends from there."""
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(adam(data, epochs), climb, sync_period=2, reset_state=False)


def flatness(sharp: bool, data: loop.Data, key: jax.Array) -> dict[str, jax.Array]:
    """Test accuracy dense, pruned at once without fine-tuning, and pruned gradually through `prune`."""
    epochs = EPOCHS if sharp else 2 * EPOCHS  # as many descents
    make = adam if sharp else sam
    apply = functools.partial(models.apply, MODEL)

    def accuracy(params: PyTree) -> jax.Array:
        return loop.evaluate(apply, params, data.test_images, data.test_labels)

    start = models.init(MODEL, key, data.train_images)
    params, _ = train(start, same, make(data, epochs), data, key, epochs, False)
    found = {"dense": accuracy(params)}
    for sparsity in SHOT:
        masks = prunax.compute_masks(params, sparsity, allocation=prunax.allocation.global_ranking)
        found[f"at once, {sparsity:.0%}"] = accuracy(prunax.apply_masks(params, masks))
    steps = epochs * loop.steps_per_epoch(len(data.train_labels), finetuning.BATCH)
    schedule = prunax.schedules.polynomial(0.95, steps // 10, steps // 2, every=20)
    tx = prunax.prune(make(data, epochs), schedule, allocation=ALLOCATION)
    pruned, _ = train(start, same, tx, data, key, epochs, False)
    return found | {"gradually, 95%": accuracy(pruned)}


def robust_table(records: Sequence[Mapping[str, Any]]) -> harness.Table:
    """A row a method and sparsity: means over the seeds, in %."""
    rows = []
    for r in records:
        found = r["found"]
        mean = {name: 100 * statistics.mean(values) for name, values in found.items()}
        corrupted = [
            f"{statistics.mean(mean[f'{name} {i}'] for i in (1, 2, 3)):.1f}" for name in CORRUPTIONS
        ]
        attacks = [harness.spread(found[f"{a} {r}"], ".1f") for r in RADII for a in ("fgsm", "pgd")]
        rows.append(
            (
                f"{r['method']}, {r['sparsity']:.0%}" if r["sparsity"] else r["method"],
                harness.spread(found["clean"], ".1f"),
                *attacks,
                *corrupted,
                f"{mean['ece']:.1f}",
                f"{mean['train'] - mean['clean']:.1f}",
            )
        )
    attacks = [f"{a}, {r}" for r in RADII for a in ("FGSM", "PGD")]
    columns = "method, sparsity", "clean", *attacks, *CORRUPTIONS, "calibration error", "gap"
    title = "Accuracy, %, clean, attacked and corrupted (mean of three severities)"
    return harness.Table(columns, rows, title=title)


def severity_table(records: Sequence[Mapping[str, Any]]) -> harness.Table:
    """Each corruption at each severity: means over the seeds, in %."""
    names = [f"{name} {i}" for name in CORRUPTIONS for i in (1, 2, 3)]
    rows = [
        (
            f"{r['method']}, {r['sparsity']:.0%}" if r["sparsity"] else r["method"],
            *(f"{100 * statistics.mean(r['found'][name]):.1f}" for name in names),
        )
        for r in records
    ]
    return harness.Table(("method, sparsity", *names), rows, title="Severities: accuracy, %")


def flatness_table(records: Sequence[Mapping[str, Any]]) -> harness.Table:
    """Adam's minima beside SAM's."""
    rows = [
        (r["method"], *(harness.spread(values) for values in r["found"].values())) for r in records
    ]
    title = "Magnitude pruning at flat and at sharp minima: test accuracy, %"
    return harness.Table(("optimizer", *records[0]["found"]), rows, title=title)


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    robust = [r for r in content["records"] if r["part"] == "robust"]
    flat = [r for r in content["records"] if r["part"] == "flatness"]
    named = {}
    if robust:
        robust.sort(key=lambda r: (r["sparsity"], METHODS.index(r["method"])))
        named["adversarial"] = robust_table(robust)
        named["adversarial/severities"] = severity_table(robust)
    if flat:
        named["adversarial/flatness"] = flatness_table(flat)
    return named


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    console = rich.console.Console()
    dataset = methods.load(args.dataset, console)
    data = loop.Data(*map(jnp.asarray, dataset[1:5]))
    data = data._replace(
        train_images=data.train_images[:IMAGES], train_labels=data.train_labels[:IMAGES]
    )
    settings = {
        "dataset": dataset.name,
        "images": len(data.train_labels),
        "epochs": {"before": EPOCHS, "pruning": PRUNE, "fine-tuning": TUNE},
        "batch_size": finetuning.BATCH,
        "learning_rates": {"weights": RATE, "scores": SCORE_RATE},
        "attack in training": {"radius": RADIUS, "steps": STEPS},
        "attack": {"radii": RADII, "steps": PGD_STEPS, "restarts": RESTARTS, "images": ATTACKED},
        "seeds": args.seeds,
    }
    command, key = "python -m benchmarks.adversarial", ("part", "method", "sparsity")
    results = harness.Results(args.out / "adversarial.json", settings, command, key)
    keys = methods.keys_of(args.seeds)

    @functools.cache
    def started(adversarial: bool) -> PyTree:
        def all_seeds(keys: jax.Array, data: loop.Data) -> PyTree:
            return methods.each_seed(lambda key: begin(data, key, adversarial), keys)

        return methods.compile_(all_seeds, keys, data)(keys, data)

    @jax.jit
    def measured(params: PyTree, keys: jax.Array, data: loop.Data) -> Any:
        return methods.each_seed(lambda p, k: measure(p, data, k), params, keys)

    def add(part: str, method: str, sparsity: float, found: Mapping[str, jax.Array]) -> None:
        named = {"part": part, "method": method, "sparsity": sparsity}
        results.add(named | {"found": {k: v.tolist() for k, v in found.items()}})
        console.print(*named.values(), {k: round(float(v.mean()), 4) for k, v in found.items()})

    dense = ("dense", "dense, adversarial")
    pruned = [m for m in METHODS if m not in dense]
    order = [*reversed(pruned), "dense, adversarial", "dense"]
    jobs = [(m, 0.0 if m in dense else s) for s, m in itertools.product(args.sparsities, order)]
    for method, sparsity in jobs:
        if results.find("robust", method, sparsity) is None:

            def all_seeds(
                params: PyTree,
                keys: jax.Array,
                data: loop.Data,
                name: str = method,
                s: float = sparsity,
            ) -> PyTree:
                return methods.each_seed(lambda p, k: go_on(name, s, p, data, k), params, keys)

            start = started(method not in ("dense", "magnitude")), keys, data
            trained = methods.compile_(all_seeds, *start)(*start)
            add("robust", method, sparsity, measured(trained, keys, data))
    for name, sharp in (("Adam", True), ("SAM", False)):
        if results.find("flatness", name, 0.0) is None:

            def both(keys: jax.Array, data: loop.Data, sharp=sharp) -> Any:
                return methods.each_seed(lambda key: flatness(sharp, data, key), keys)

            add("flatness", name, 0.0, methods.compile_(both, keys, data)(keys, data))
    head = (
        f"Pruning for robustness on {dataset.name}\n\nWritten by `{command}`: mean ± standard deviation of "
        f"{args.seeds} seeds, {len(data.train_labels)} training images, {EPOCHS} epochs before pruning and "
        f"{PRUNE + TUNE} from then on. Attacks of {RADIUS} in training, PGD of {PGD_STEPS} steps from {RESTARTS} "
        f"random starts on {ATTACKED} test images."
    )
    harness.publish(results.path, head, results.content, tables, console)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("adversarial", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--dataset", default="fashion_mnist", help="(fashion_mnist; digits where it is not there)")
    add("--sparsities", nargs="+", type=float, default=[0.95], help="(0.95)")
    add("--seeds", type=int, default=3, help="how many (3)")
    return parser


if __name__ == "__main__":
    main()
