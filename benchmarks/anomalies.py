"""What screening finds: faults planted in batches and in pruned params, and false alarms on clean ones."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

import prunax
from benchmarks import finetuning, harness, loop, methods, models
from prunax import reports

PyTree = Any
Fault = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]

EXAMPLES = """\
examples:
  python -m benchmarks.anomalies --trials 20
  python -m benchmarks.anomalies --out benchmarks/results
"""
BATCH, GOOD = 128, 1000
SPARSITIES = (0.0, 0.5, 0.9, 0.98)


def _some(rng: np.random.Generator, share: float) -> np.ndarray:
    return rng.choice(BATCH, int(share * BATCH), replace=False)


def _noise(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Any:
    x[_some(rng, 0.05)] = rng.random((int(0.05 * BATCH), *x.shape[1:]))
    return x, y


def _patch(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Any:
    rows = _some(rng, 0.1)
    x[rows, 1:5, 1:5] = 1.0
    y[rows] = 0
    return x, y


def _loud(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Any:
    x[_some(rng, 0.01)] *= 100
    return x, y


def _not_a_number(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Any:
    x[tuple(rng.integers(n) for n in x.shape)] = np.nan
    return x, y


def _half_of_the_classes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Any:
    rows = np.flatnonzero(y < 5)
    rows = rng.choice(rows, BATCH)
    return x[rows], y[rows]


def _twice_as_often(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Any:
    rows = rng.choice(BATCH, BATCH, p=np.where(y == 0, 2, 1) / np.sum(np.where(y == 0, 2, 1)))
    return x[rows], y[rows]


FAULTS: dict[str, Fault] = {
    "clean": lambda x, y, rng: (x, y),
    "one NaN": _not_a_number,
    "all pixels equal": lambda x, y, rng: (np.full_like(x, rng.random()), y),
    "one image, repeated": lambda x, y, rng: (np.broadcast_to(x[:1], x.shape), y[:1].repeat(BATCH)),
    "not scaled (times 255)": lambda x, y, rng: (x * 255, y),
    "scaled twice (by 255)": lambda x, y, rng: (x / 255, y),
    "inverted": lambda x, y, rng: (1 - x, y),
    "contrast halved": lambda x, y, rng: (x / 2, y),
    "labels of one half only": _half_of_the_classes,
    "one label twice as often": _twice_as_often,
    "labels shuffled": lambda x, y, rng: (x, rng.permutation(y)),
    "poisoned: one image times 100": _loud,
    "poisoned: 5% noise": _noise,
    "poisoned: 10% with a white patch, one label": _patch,
}


def batch_records(data: loop.Data, trials: int) -> list[dict[str, Any]]:
    """The share of batches of each fault in which anything is found, without a good batch and with one."""
    train_x, train_y = np.asarray(data.train_images), np.asarray(data.train_labels)
    test_x, test_y = np.asarray(data.test_images), np.asarray(data.test_labels)
    good = {"image": train_x[:GOOD], "label": train_y[:GOOD]}
    records = []
    for name, fault in FAULTS.items():
        rng, found = np.random.default_rng(0), {"alone": 0, "compared": 0}
        kinds: set[str] = set()
        for _ in range(trials):
            rows = rng.choice(len(test_y), BATCH, replace=False)
            x, y = fault(test_x[rows], test_y[rows], rng)
            batch = {"image": x.astype(np.float32), "label": y}
            alone = reports.screen_batch(batch, low=0.0, high=1.0)
            compared = reports.screen_batch(batch, low=0.0, high=1.0, like=good)
            found["alone"] += bool(alone)
            found["compared"] += bool(compared)
            kinds |= {f"{f.path}: {f.kind}" for f in compared}
        records.append(
            {"part": "batch", "fault": name, "trials": trials, "found": found, "as": sorted(kinds)}
        )
    return records


def trained(data: loop.Data, seeds: int) -> list[PyTree]:
    """LeNet-300-100 after one epoch."""
    model = models.MLP(10)

    @jax.jit
    def train(key: jax.Array, data: loop.Data) -> PyTree:
        params = models.init(model, key, data.train_images)

        def loss(params: PyTree, step: jax.Array, *batch: jax.Array) -> jax.Array:
            return finetuning.cross_entropy(model, params, *batch)

        return finetuning.scan_steps(loss, optax.adam(1e-3), params, data, key, 1)[0]

    return [train(jax.random.key(seed), data) for seed in range(seeds)]


def plant(
    params: PyTree, rng: np.random.Generator, change: Callable[[np.ndarray, Any], None]
) -> PyTree:
    """Changes one kernel at one of its kept weights."""
    leaves, treedef = jax.tree.flatten(params)
    kernels = [i for i, leaf in enumerate(leaves) if leaf.ndim > 1]
    at = kernels[rng.integers(len(kernels))]
    leaf = np.array(leaves[at])
    kept = np.argwhere(leaf)
    change(leaf, tuple(kept[rng.integers(len(kept))]))
    leaves[at] = leaf
    return treedef.unflatten(leaves)


def _set(value: float) -> Callable[[np.ndarray, Any], None]:
    def change(leaf: np.ndarray, at: Any) -> None:
        leaf[at] = value

    return change


def _times_usual(times: float) -> Callable[[np.ndarray, Any], None]:
    def change(leaf: np.ndarray, at: Any) -> None:
        leaf[at] = times * np.median(np.abs(leaf[leaf != 0])) / 0.6745

    return change


def _flip(bit: int) -> Callable[[np.ndarray, Any], None]:
    def change(leaf: np.ndarray, at: Any) -> None:
        leaf.view(np.uint32)[at] ^= np.uint32(1 << bit)

    return change


def _empty(leaf: np.ndarray, at: Any) -> None:
    leaf[:] = 0


CHANGES = {
    "clean": lambda leaf, at: None,
    "one NaN": _set(np.nan),
    "one weight 20 times the usual": _times_usual(20),
    "one weight 40 times the usual": _times_usual(40),
    "one weight 1000 times the usual": _times_usual(1000),
    "highest bit of an exponent flipped": _flip(30),
    "sign flipped": _flip(31),
    "a layer pruned whole": _empty,
}


def param_records(data: loop.Data, trials: int) -> list[dict[str, Any]]:
    """The share of params of each fault in which anything but units without weights is found."""
    networks = [
        jax.tree.map(
            np.asarray,
            prunax.apply_masks(
                params,
                prunax.compute_masks(params, sparsity, allocation=prunax.allocation.erdos_renyi),
            ),
        )
        for params in trained(data, 3)
        for sparsity in SPARSITIES
    ]
    records = []
    for name, change in CHANGES.items():
        rng, found, kinds = np.random.default_rng(0), 0, set[str]()
        for trial in range(trials):
            params = plant(networks[trial % len(networks)], rng, change)
            seen = {f.kind for f in reports.screen_params(params)} - {"units without weights"}
            found += bool(seen)
            kinds |= seen
        records.append(
            {"part": "params", "fault": name, "trials": trials, "found": found, "as": sorted(kinds)}
        )
    return records


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""

    def rate(found: int, trials: int) -> str:
        return f"{100 * found / trials:.1f}"

    batches = [
        (
            r["fault"],
            ", ".join(r["as"]),
            *(rate(r["found"][k], r["trials"]) for k in ("alone", "compared")),
        )
        for r in content["records"]
        if r["part"] == "batch"
    ]
    params = [
        (r["fault"], ", ".join(r["as"]), rate(r["found"], r["trials"]))
        for r in content["records"]
        if r["part"] == "params"
    ]
    return {
        "anomalies/batches": harness.Table(
            ("planted", "found as", "low and high, %", "and like, %"),
            batches,
            title="Batches in which something is found",
            text=2,
        ),
        "anomalies/params": harness.Table(
            ("planted", "found as", "found, %"),
            params,
            title="Params in which something is found",
            text=2,
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = harness.parser("anomalies", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--dataset", default="fashion_mnist", help="(fashion_mnist; digits where it is not there)")
    add("--trials", type=int, default=20, help="of each fault (20)")
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    console = rich.console.Console()
    dataset = methods.load(args.dataset, console)
    data = loop.Data(*map(jnp.asarray, dataset[1:5]))
    settings = {"dataset": dataset.name, "batch": BATCH, "good": GOOD, "trials": args.trials}
    records = batch_records(data, args.trials) + param_records(data, args.trials)
    command = "python -m benchmarks.anomalies"
    content = harness.content(command, settings=settings, records=records)
    head = (
        f"Screening on {dataset.name}\n\nWritten by `{command}`: {args.trials} batches of {BATCH} test images, and "
        f"LeNet-300-100 at {len(SPARSITIES)} sparsities, with each fault. On clean ones every finding is a false alarm."
    )
    harness.publish(args.out / "anomalies.json", head, content, tables, console)


if __name__ == "__main__":
    main()
