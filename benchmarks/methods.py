"""Compares sparse training methods: networks x methods x sparsities x seeds, on real images.

Every run of one network has the same steps, batches, learning rates and initial weights; only lottery tickets train
more than once. All methods share sparsity out among layers alike (Erdős-Rényi), but for those that leave it to
a penalty; a second table has other allocations. The learning rate is chosen on held-out training images for dense
training alone, and given to all. For each sparsity the strength of the L1 penalty is searched for in short trainings of
one seed. Each result is written as soon as it is there, and the same command goes on where it stopped.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

import prunax
from benchmarks import datasets, figures, harness, loop, models, recipes
from benchmarks.recipes import METHODS, Budget, Recipe

PyTree = Any

EXAMPLES = """\
examples:
  python -m benchmarks.methods --quick
  python -m benchmarks.methods --out benchmarks/results
  python -m benchmarks.methods --network mlp --methods rigl set static --sparsities 0.98
"""
SPARSITIES = (0.9, 0.95, 0.98)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
NETWORKS = {"mlp": "LeNet-300-100", "lenet5": "LeNet-5", "resnet": "ResNet"}
QUICK = {
    "network": ["mlp"],
    "methods": "dense static magnitude one-shot straight-through proximal-l1 rigl snip".split(),
    "sparsities": [0.9, 0.98],
    "seeds": 2,
}
FULL = {
    "network": list(NETWORKS),
    "methods": list(METHODS),
    "sparsities": list(SPARSITIES),
    "seeds": 5,
}
# How many training images a run sees, one by one. Convolutions cost more.
IMAGES = {"mlp": 600_000, "lenet5": 300_000, "resnet": 120_000}
# Networks that draw lottery tickets: two epochs of the ResNet leave no early one to rewind to.
TICKETS = "mlp", "lenet5"
# Training images whose statistics batch normalisation takes for testing.
SEEN = 2000
# Which of two methods one expects to be the more accurate at 98%.
ORDERS = (
    ("magnitude", "one-shot"),
    ("magnitude", "random"),
    ("rigl", "set"),
    ("set", "static"),
    ("snip", "static"),
    ("imp", "imp-reinit"),
)
# Between which the L1 penalty that gives a sparsity is looked for, relative to the learning rate.
STRENGTHS = 0.01, 100.0


class Outcome(NamedTuple):
    """One training, or one a seed along the leading axes.

    Attributes:
        params: after training, masked.
        masks: True = kept.
        zeros: whether the network that was trained had exactly these params, so that masking them changed nothing.
        losses: mean training loss of each epoch.
    """

    params: PyTree
    masks: PyTree
    zeros: jax.Array
    losses: jax.Array


@functools.partial(jax.jit, static_argnames=("network", "classes"))
def initial(network: str, classes: int, keys: jax.Array, images: jax.Array) -> PyTree:
    """Fresh params with a leading axis of seeds: the same ones for every method."""
    model = models.MODELS[network](classes)
    return each_seed(lambda key: models.init(model, jax.random.fold_in(key, 0), images), keys)


def run(
    recipe: Recipe, budget: Budget, classes: int, data: loop.Data, params: PyTree, key: jax.Array
) -> Outcome:
    """One whole run: masks before training, training. Compile it.

    Args:
        recipe: what the method does.
        budget: what all methods have in common.
        classes: number of labels.
        data: images and labels.
        params: fresh ones.
        key: of the seed. The same key gives the same batches, whatever the method.
    """
    model = models.MODELS[budget.network](classes)
    masks = None
    if recipe.start is not None:
        total = len(data.train_labels)
        rows = jax.random.choice(
            jax.random.fold_in(key, 1), total, (min(1000, total),), replace=False
        )
        images, labels = data.train_images[rows], data.train_labels[rows]

        def loss(params: PyTree) -> jax.Array:
            logits = models.apply(model, params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        masks = recipe.start(loss, functools.partial(models.apply, model), params, images)
    return train(recipe, budget, classes, data, params, masks, key)


def train(
    recipe: Recipe,
    budget: Budget,
    classes: int,
    data: loop.Data,
    params: PyTree,
    masks: PyTree,
    key: jax.Array,
    epochs: int | None = None,
) -> Outcome:
    """Trains from given params, all epochs within `lax.scan`.

    Args:
        recipe: as in `run`.
        budget: as in `run`.
        classes: as in `run`.
        data: as in `run`.
        params: where to begin.
        masks: those before training, for recipes that have them.
        key: shuffles, and draws random scores.
        epochs: how many; None for all that the budget has left.
    """
    model = models.MODELS[budget.network](classes)
    optimizer = recipe.optimizer(jax.random.fold_in(key, 2), masks)

    def apply(params: PyTree, images: jax.Array) -> jax.Array:
        return models.apply(model, recipe.forward(params), images)

    def epoch(state: loop.State, _: None) -> tuple[loop.State, jax.Array]:
        return loop.train_epoch(apply, optimizer, data, state, batch_size=budget.batch_size)

    state = loop.State(params, optimizer.init(params), jax.random.fold_in(key, 3))
    length = budget.epochs - budget.begin if epochs is None else epochs
    state, losses = jax.lax.scan(epoch, state, None, length=length)
    masks = recipe.masks(state.params, state.opt_state)
    params = prunax.apply_masks(state.params, masks)
    same = jax.tree.map(lambda a, b: jnp.all(a == b), recipe.forward(state.params), params)
    zeros = jnp.all(jnp.stack(jax.tree.leaves(same)))
    return Outcome(params, masks, zeros, losses)


@functools.partial(jax.jit, static_argnames=("network", "classes"))
def accuracy(
    network: str,
    classes: int,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Accuracy of params with a leading axis of seeds, in [0, 1].

    Batch normalisation takes the statistics of the training images `seen`, or of the images themselves.
    """
    model = models.MODELS[network](classes)

    def of_seed(params: PyTree) -> jax.Array:
        predict = models.as_used(model, params, images if seen is None else seen)
        return loop.evaluate(lambda _, x: predict(x), params, images, labels)

    return each_seed(of_seed, params)


def each_seed(function: Callable[..., Any], *args: Any) -> Any:
    """Maps over the leading axis: side by side on an accelerator, one after the other on a CPU.

    On two cores `vmap` was measured no faster, and it computes three sets of weights' worth of memory at once.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda xs: function(*xs), args)
    return jax.vmap(function)(*args)


def keys_of(seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(seeds))


def compile_(function: Callable[..., Any], *args: Any) -> Any:
    """Compiles a function for arguments. On CPU with LLVM's lower effort: a third quicker, programs as fast."""
    cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if cpu else None
    return jax.jit(function).lower(*args).compile(compiler_options=options)


def with_allocations(methods: Sequence[str], allocations: Sequence[str]) -> list[tuple[str, str]]:
    """Methods with each of their allocations that is among those given; "" for methods without."""
    return [
        (method, name)
        for method in methods
        for name in METHODS[method].allocations or ("",)
        if name in ("", *allocations)
    ]


def lotteries(network: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The allocations with which a network draws lottery tickets."""
    names = dict.fromkeys(name for method, name in pairs if METHODS[method].recipe is None)
    return list(names) if network in TICKETS else []


def train_method(
    method: str,
    allocation: str,
    sparsity: float,
    budget: Budget,
    classes: int,
    data: loop.Data,
    seeds: int,
    **options: Any,
) -> tuple[Outcome, float, float]:
    """All seeds of a method at a sparsity. Returns them, the seconds of the training and of the compilation.

    Args:
        method: a name in `METHODS`.
        allocation: one of its allocations; "" for a method without.
        sparsity: the target.
        budget: what all methods have in common.
        classes: number of labels.
        data: images and labels.
        seeds: how many.
        **options: of the recipe, besides the method's own.
    """
    if allocation:
        options["allocation"] = recipes.ALLOCATIONS[allocation]
    recipe = METHODS[method].recipe(budget, sparsity, **METHODS[method].options, **options)

    def all_seeds(params: PyTree, keys: jax.Array, data: loop.Data) -> Outcome:
        return each_seed(
            lambda params, key: run(recipe, budget, classes, data, params, key), params, keys
        )

    begin = time.perf_counter()
    keys = keys_of(seeds)
    args = initial(budget.network, classes, keys, data.train_images[:1]), keys, data
    program = compile_(all_seeds, *args)
    between = time.perf_counter()
    outcome = jax.block_until_ready(program(*args))
    return outcome, time.perf_counter() - between, between - begin


def choose_rate(
    results: harness.Results,
    budget: Budget,
    classes: int,
    data: loop.Data,
    seeds: int,
    on_start: Callable[[str], None] = lambda what: None,
) -> float:
    """The learning rate with which dense training is most accurate on images it has not seen.

    Among `RATES`, and twice and half of the best for as long as that is the first or the last.

    Args:
        results: by network and learning rate: what is done.
        budget: of each training.
        classes: number of labels.
        data: training images, and others in the place of test images.
        seeds: how many.
        on_start: told what is about to run.
    """
    found: dict[float, float] = {}
    todo = list(RATES)
    while todo:
        for rate in todo:
            if not (done := results.find(budget.network, rate)):
                on_start(f"{budget.network} dense, rate {rate:g}")
                of_rate = budget._replace(learning_rate=rate)
                outcome, *_ = train_method("dense", "", 0.0, of_rate, classes, data, seeds)
                evaluated = data.test_images, data.test_labels, data.train_images[:SEEN]
                accuracies = accuracy(budget.network, classes, outcome.params, *evaluated)
                done = {
                    "network": budget.network,
                    "learning_rate": rate,
                    "held_out_accuracy": _numbers(accuracies),
                }
                results.add(done)
            found[rate] = statistics.mean(done["held_out_accuracy"])
        best = max(found, key=found.__getitem__)
        todo = [r for r, edge in ((2 * best, max), (best / 2, min)) if best == edge(found)]
    return best


def strength_for(sparsity: float, budget: Budget, classes: int, data: loop.Data) -> float:
    """The strength of `proximal_l1` that drives a share of seed 0's weights to zero, bisected."""
    end = METHODS["proximal-l1"].options["end"]
    (key,) = keys_of(1)
    params = jax.tree.map(
        lambda leaf: leaf[0], initial(budget.network, classes, keys_of(1), data.train_images[:1])
    )
    epochs = math.ceil(end * budget.epochs)  # no weight becomes zero afterwards

    def realised(strength: jax.Array, params: PyTree, data: loop.Data) -> jax.Array:
        recipe = recipes.proximal_l1(budget, sparsity, end=end, strength=strength)
        return loop.sparsity(train(recipe, budget, classes, data, params, None, key, epochs).params)

    program = compile_(realised, jnp.float32(1), params, data)
    low, high = STRENGTHS
    for _ in range(9):
        middle = math.sqrt(low * high)
        more = program(jnp.float32(middle), params, data) < sparsity
        low, high = (middle, high) if more else (low, middle)
    return math.sqrt(low * high)


def lottery(
    sparsities: Sequence[float],
    budget: Budget,
    classes: int,
    data: loop.Data,
    seeds: int,
    *,
    rewind: float,
    allocation: Any,
    tickets: Mapping[float, Sequence[prunax.lottery.Ticket]] | None = None,
) -> Iterator[tuple[float, list[prunax.lottery.Ticket], dict[str, Outcome], float]]:
    """Iterative magnitude pruning through a list of sparsities, in rounds of about 20%.

    Args:
        sparsities: increasing.
        budget: of each round.
        classes: number of labels.
        data: images and labels.
        seeds: how many.
        rewind: the fraction of the training to rewind to, in whole epochs.
        allocation: shares each round's sparsity out.
        tickets: those of earlier calls, by sparsity: the last one is gone on from.

    Yields:
        At each sparsity: it, one ticket a seed, the outcomes of `imp` and `imp-reinit`, and the seconds.
    """
    early = max(round(rewind * budget.epochs), 1)
    late = budget._replace(begin=early)
    dense = METHODS["dense"].recipe(budget, 0.0)
    under_masks = Recipe(recipes.under_masks(budget))
    under_masks_late = Recipe(recipes.under_masks(late))

    @jax.jit
    def start(params: PyTree, key: jax.Array, data: loop.Data) -> PyTree:
        return train(dense, budget, classes, data, params, None, key, early).params

    @jax.jit
    def go_on(params: PyTree, masks: PyTree, key: jax.Array, data: loop.Data) -> Outcome:
        return train(
            under_masks_late, late, classes, data, params, masks, jax.random.fold_in(key, 4)
        )

    @jax.jit
    def train_fresh(params: PyTree, masks: PyTree, key: jax.Array, data: loop.Data) -> Outcome:
        params = prunax.apply_masks(params, masks)
        return train(under_masks, budget, classes, data, params, masks, key)

    keys, image = keys_of(seeds), data.train_images[:1]
    fresh_keys = jax.vmap(lambda key: jax.random.fold_in(key, 5))(keys)
    params = _unstack(initial(budget.network, classes, keys, image), seeds)
    fresh = _unstack(initial(budget.network, classes, fresh_keys, image), seeds)
    origins = [start(p, key, data) for p, key in zip(params, keys, strict=True)]
    before, current = max((tickets or {}).items(), default=(0.0, [None] * seeds))
    for sparsity in sparsities:
        begin = time.perf_counter()
        outcomes, now = [], []
        for key, origin, ticket in zip(keys, origins, current, strict=True):
            last: list[Outcome] = []

            def round_(params: PyTree, masks: PyTree, key=key, last=last) -> PyTree:
                last[:] = [go_on(params, masks, key, data)]
                return last[0].params

            for fraction in _fractions(before, sparsity, dense_first=ticket is None):
                # One round from the ticket, so that the fraction may differ from round to round.
                resume = None if ticket is None else ticket._replace(round=0)
                (ticket,) = prunax.lottery.iterative_magnitude_pruning(
                    round_,
                    origin,
                    rounds=0 if ticket is None else 1,
                    fraction=fraction,
                    resume=resume,
                    allocation=allocation,
                )
            outcomes.append(last[0])
            now.append(ticket)
        refreshed = [
            train_fresh(p, ticket.masks, key, data)
            for p, ticket, key in zip(fresh, now, keys, strict=True)
        ]
        found = {"imp": _stack(outcomes), "imp-reinit": _stack(refreshed)}
        before, current = sparsity, now
        yield sparsity, now, found, time.perf_counter() - begin


def _fractions(before: float, target: float, *, dense_first: bool) -> list[float]:
    """The sparsity after each round from one sparsity to the next: all but the last one about 20% of what is left."""
    ratio = (1 - target) / (1 - before)
    rounds = max(round(math.log(ratio) / math.log(0.8)), 1)
    steps = [1 - (1 - before) * ratio ** (r / rounds) for r in range(1, rounds)]
    return [0.0] * dense_first + [*steps, target]


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(tree: PyTree, count: int) -> list[PyTree]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def record(
    budget: Budget,
    method: str,
    allocation: str,
    sparsity: float,
    outcome: Outcome,
    data: loop.Data,
    classes: int,
    seconds: float,
    trainings: int = 1,
) -> dict[str, Any]:
    """What is kept of an outcome with a leading axis of seeds. Training accuracy is that of 10,000 images."""
    seen = data.train_images[:SEEN]
    evaluate = functools.partial(accuracy, budget.network, classes, outcome.params, seen=seen)
    layers, sizes, fan_in = {}, {}, {}
    named = zip(prunax.trees.paths(outcome.masks), jax.tree.leaves(outcome.masks), strict=True)
    for name, mask in named:
        if mask.ndim > 1:  # one mask a seed: scalars, of leaves that are left alone, have one axis
            pruned = np.sum(~np.asarray(mask), axis=tuple(range(1, mask.ndim)))
            sizes[name] = mask[0].size
            layers[name] = pruned
            fan_in[name] = np.asarray(mask).sum(tuple(range(1, mask.ndim - 1))).max(-1).tolist()
    total = sum(sizes.values())
    return {
        "network": budget.network,
        "method": method,
        "allocation": allocation,
        "sparsity": sparsity,
        "learning_rate": budget.learning_rate,
        "options": METHODS[method].options,
        "test_accuracy": _numbers(evaluate(data.test_images, data.test_labels)),
        "train_accuracy": _numbers(
            evaluate(data.train_images[:10_000], data.train_labels[:10_000])
        ),
        "realised_sparsity": _numbers(sum(layers.values()) / total),
        "layer_sparsity": {name: _numbers(n / sizes[name]) for name, n in layers.items()},
        "layer_weights": sizes,
        "largest_fan_in": fan_in,
        "exact_zeros": bool(np.all(outcome.zeros)),
        "losses": [_numbers(losses) for losses in np.asarray(outcome.losses)],
        "trainings": trainings,
        "seconds": round(seconds, 1),
    }


def _numbers(values: Any) -> list[float]:
    return [round(float(v), 6) for v in np.asarray(values)]


class Results(harness.Results):
    """Results by network, method, allocation and sparsity, for as long as a method's options stay the same."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], command: str = "python -m benchmarks.methods"
    ) -> None:
        super().__init__(path, settings, command, ("network", "method", "allocation", "sparsity"))

    def find(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, budget: Budget, method: str, allocation: str, sparsity: float
    ) -> dict[str, Any] | None:
        """The result of a row at a sparsity, unless its options have changed since.

        Raises:
            ValueError: the file holds results of the network with another learning rate.
        """
        rates = {r["learning_rate"] for r in self.records if r["network"] == budget.network}
        if rates - {budget.learning_rate}:
            raise ValueError(
                f"{self.path} holds results of {budget.network} with learning rate {rates}, not "
                f"{budget.learning_rate}. Pass another --out, or move it away."
            )
        found = super().find(budget.network, method, allocation, sparsity)
        options = json.loads(json.dumps(METHODS[method].options))
        return found if found and found["options"] == options else None


def compare(
    results: Results,
    data: loop.Data,
    classes: int,
    budget: Budget,
    pairs: Sequence[tuple[str, str]],
    sparsities: Sequence[float],
    seeds: int,
    tickets: Path | None = None,
    on_start: Callable[[str], None] = lambda what: None,
    on_result: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """Runs what is not done yet.

    Args:
        results: where results go, and what is done.
        data: images and labels.
        classes: number of labels.
        budget: of the network.
        pairs: methods and their allocations.
        sparsities: in increasing order. Dense training ignores them.
        seeds: how many.
        tickets: folder in which lottery tickets are kept to go on from.
        on_start: told what is about to run.
        on_result: told each result, old ones too.
    """
    for method, name in pairs:
        if METHODS[method].recipe is None:
            continue
        for sparsity in [0.0] if method == "dense" else sparsities:
            if not (found := results.find(budget, method, name, sparsity)):
                on_start(f"{budget.network} {method} {name} {sparsity:g}")
                options = {}
                if method == "proximal-l1":
                    options["strength"] = strength_for(sparsity, budget, classes, data)
                outcome, seconds, compile_seconds = train_method(
                    method, name, sparsity, budget, classes, data, seeds, **options
                )
                found = record(budget, method, name, sparsity, outcome, data, classes, seconds)
                found |= {"compile_seconds": round(compile_seconds, 1), **options}
                results.add(found)
            on_result(found)
    for name in lotteries(budget.network, pairs):
        _draw_tickets(
            results,
            data,
            classes,
            budget,
            name,
            sparsities,
            seeds,
            tickets,
            on_start,
            on_result,
        )


def _draw_tickets(
    results: Results,
    data: loop.Data,
    classes: int,
    budget: Budget,
    allocation: str,
    sparsities: Sequence[float],
    seeds: int,
    folder: Path | None,
    on_start: Callable[[str], None],
    on_result: Callable[[dict[str, Any]], None],
) -> None:
    """Both lottery methods on one network, from the last sparsity that is done."""
    network, names = budget.network, ("imp", "imp-reinit")
    todo = list(sparsities)
    while todo and all(results.find(budget, name, allocation, todo[0]) for name in names):
        for name in names:
            on_result(results.find(budget, name, allocation, todo[0]))
        todo.pop(0)
    if not todo:
        return
    done = [s for s in sparsities if s < todo[0]]
    file = None if folder is None else folder / f"{network}-{allocation}.npz"
    label = {
        "settings": results.settings,
        "learning_rate": budget.learning_rate,
        "allocation": allocation,
        "options": dict(METHODS["imp"].options),
        "sparsities": list(sparsities),
    }
    tickets = None
    if done and file is not None:
        model = models.MODELS[network](classes)
        params = jax.eval_shape(
            lambda x: models.init(model, jax.random.key(0), x), data.train_images
        )
        loaded = _load_tickets(file, {**label, "sparsity": done[-1]}, params, seeds)
        tickets = {done[-1]: loaded} if loaded else None
    chain = todo if tickets or not done else list(sparsities)
    on_start(f"{network} imp {allocation} {chain[0]:g}")
    trainings = 1
    for sparsity, now, found, seconds in lottery(
        chain,
        budget,
        classes,
        data,
        seeds,
        rewind=METHODS["imp"].options["rewind"],
        allocation=recipes.ALLOCATIONS[allocation],
        tickets=tickets,
    ):
        trainings = _rounds_to(sparsities, sparsity)
        new = [
            record(
                budget,
                name,
                allocation,
                sparsity,
                outcome,
                data,
                classes,
                seconds,
                trainings + (name != "imp"),
            )
            for name, outcome in found.items()
        ]
        if file is not None:
            _save_tickets(file, {**label, "sparsity": sparsity}, now)
        results.add(*new)
        for one in new:
            if sparsity in todo:
                on_result(one)
        on_start(f"{network} imp {allocation}, after {sparsity:g}")


def _rounds_to(sparsities: Sequence[float], sparsity: float) -> int:
    """Trainings on the way to a ticket, the dense one included."""
    chain = [0.0, *(s for s in sparsities if s <= sparsity)]
    return 1 + sum(len(_fractions(a, b, dense_first=False)) for a, b in itertools.pairwise(chain))


def _save_tickets(file: Path, label: Mapping[str, Any], tickets: Sequence[Any]) -> None:
    arrays = {
        f"{seed}/{i}": np.asarray(leaf)
        for seed, ticket in enumerate(tickets)
        for i, leaf in enumerate(jax.tree.leaves((ticket.masks, ticket.params)))
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, label=json.dumps(label), **arrays)
    partial.replace(file)


def _load_tickets(
    file: Path, label: Mapping[str, Any], params: PyTree, seeds: int
) -> list[prunax.lottery.Ticket] | None:
    """The tickets of a file, if it is that of the label."""
    if not file.is_file():
        return None
    treedef = jax.tree.structure((params, params))
    with np.load(file) as stored:
        if json.loads(str(stored["label"])) != label:
            return None
        trees = [
            treedef.unflatten(jnp.asarray(stored[f"{seed}/{i}"]) for i in range(treedef.num_leaves))
            for seed in range(seeds)
        ]
    return [prunax.lottery.Ticket(0, label["sparsity"], masks, params) for masks, params in trees]


def main_allocation(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a method that there is, and has the allocation of all methods, or none."""
    method = METHODS.get(record["method"])
    return method is not None and record["allocation"] in ("", *method.allocations[:1])


def accuracy_table(records: Sequence[Mapping[str, Any]], network: str) -> harness.Table:
    """Test accuracy of each method at each sparsity, all with one allocation: in %, over the seeds."""
    of_network = [r for r in records if r["network"] == network and main_allocation(r)]
    sparsities = sorted({r["sparsity"] for r in of_network if r["method"] != "dense"}) or [0.0]
    rows = []
    for method in METHODS:
        found = {r["sparsity"]: r for r in of_network if r["method"] == method}
        if not found:
            continue
        if method == "dense":
            cells = [harness.spread(found[0.0]["test_accuracy"])] + [""] * (len(sparsities) - 1)
        else:
            cells = [_cell(found.get(sparsity)) for sparsity in sparsities]
        rows.append((method, *cells))
    return harness.Table(
        ("method", *(f"{s:.0%}" for s in sparsities)),
        rows,
        title=f"{NETWORKS[network]}: test accuracy, %",
    )


def allocations_table(records: Sequence[Mapping[str, Any]], network: str) -> harness.Table:
    """Test accuracy of the methods that were run with several allocations, in %."""
    found = {
        (r["method"], r["allocation"], r["sparsity"]): r
        for r in records
        if r["network"] == network and r["allocation"]
    }
    sparsities = sorted({sparsity for *_, sparsity in found})
    rows = [
        (method, name, *(_cell(found.get((method, name, s))) for s in sparsities))
        for method in METHODS
        for name in METHODS[method].allocations
        if len({n for m, n, _ in found if m == method}) > 1
        and any((method, name, s) in found for s in sparsities)
    ]
    columns = "method", "allocation", *(f"{s:.0%}" for s in sparsities)
    return harness.Table(columns, rows, text=2, title=f"{NETWORKS[network]}: allocations")


def rates_tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """Accuracy of dense training at each learning rate, in %: on held-out training images."""
    found = {(r["network"], r["learning_rate"]): r["held_out_accuracy"] for r in content["records"]}
    rates = sorted({rate for _, rate in found})
    rows = [
        (NETWORKS[n], *(harness.spread(found[n, r]) if (n, r) in found else "" for r in rates))
        for n in NETWORKS
        if any(network == n for network, _ in found)
    ]
    columns = "network", *(f"{rate:g}" for rate in rates)
    return {"methods-rates": harness.Table(columns, rows, title="Dense, learning rates")}


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    text = harness.spread(record["test_accuracy"])
    if record["method"] == "proximal-l1":
        text += f" at {statistics.mean(record['realised_sparsity']):.1%}"
    return text


def claims_table(records: Sequence[Mapping[str, Any]], network: str) -> harness.Table:
    """What one expects of the methods, and what was found: differences seed by seed, in points."""
    found = {
        (r["method"], r["sparsity"]): r
        for r in records
        if r["network"] == network and main_allocation(r)
    }
    pairs = [
        (("magnitude", 0.9), ("dense", 0.0), -0.2),
        (("magnitude", 0.98), ("dense", 0.0), -0.7),
        (("proximal-l1", 0.9), ("dense", 0.0), -1.0),
        *(((one, 0.98), (other, 0.98), 0.0) for one, other in ORDERS),
    ]
    rows = []
    for one, other, least in pairs:
        if one not in found or other not in found:
            continue
        a, b = found[one], found[other]
        sparsity = statistics.mean(a["realised_sparsity"])
        if abs(sparsity - a["sparsity"]) > 0.01:
            continue  # where a penalty decides, and missed
        differences = [x - y for x, y in zip(a["test_accuracy"], b["test_accuracy"], strict=True)]
        rows.append(
            (
                f"{one[0]} at {sparsity:.0%} against {other[0]}",
                f"{least:+.1f}",
                harness.spread(differences, "+.2f"),
                "yes" if 100 * statistics.mean(differences) >= least else "no",
            )
        )
    columns = "difference in points of test accuracy", "at least", "found", "met"
    return harness.Table(columns, rows, title=f"{NETWORKS[network]}: expectations")


def fan_in_table(records: Sequence[Mapping[str, Any]], network: str) -> harness.Table:
    """How unevenly connections are dealt out: the most that one output unit has, and the mean."""
    rows = []
    for r in records:
        if r["network"] == network and r["method"] in ("static", "set", "rigl", "rigl-published"):
            layer, largest = next(iter(sorted(r.get("largest_fan_in", {}).items())), (None, None))
            if layer is None:
                continue
            kept = 1 - statistics.mean(r["layer_sparsity"][layer])
            cells = f"{r['sparsity']:.0%}", f"{kept:.2%}", f"{statistics.mean(largest):.0f}"
            rows.append((f"{r['method']}, {layer}", *cells))
    columns = "method, layer", "sparsity", "connections left", "most at one unit"
    return harness.Table(columns, rows, title=f"{NETWORKS[network]}: where connections are")


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    records = content["records"]
    named = {}
    for network in NETWORKS:
        if any(r["network"] == network for r in records):
            named[f"methods/{network}"] = accuracy_table(records, network)
            more = {
                "allocations": allocations_table(records, network),
                "claims": claims_table(records, network),
                "fan-in": fan_in_table(records, network),
            }
            named |= {
                f"methods/{network}/{name}": table for name, table in more.items() if table.rows
            }
    return named


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 2 and one line on a bad argument."""
    parser = _parser()
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    console = rich.console.Console()
    begin = time.perf_counter()
    dataset = load(args.dataset, console)
    held_out = datasets.hold_out(dataset)
    evaluated = held_out if args.validation else dataset
    budgets, budgets_held_out = (
        {n: budget_for(n, d, args.epochs, args.quick) for n in NETWORKS}
        for d in (evaluated, held_out)
    )

    def settings(d: datasets.Dataset, each: Mapping[str, Budget]) -> dict[str, Any]:
        return {
            "dataset": d.name,
            "images": {"train": len(d.train_labels), "evaluated": len(d.test_labels)},
            "validation": args.validation,
            "epochs": {n: b.epochs for n, b in each.items()},
            "batch_size": each["mlp"].batch_size,
            "seeds": list(range(args.seeds)),
        }

    stem = "methods-quick" if args.quick else "methods"
    stem += "-validation" if args.validation else ""
    try:
        results = Results(args.out / f"{stem}.json", settings(evaluated, budgets))
        rates = harness.Results(
            args.out / f"{stem}-rates.json",
            settings(held_out, budgets_held_out),
            results.command,
            ("network", "learning_rate"),
        )
    except ValueError as error:
        parser.error(str(error))
    sparsities = sorted(args.sparsities)
    todo = with_allocations(args.methods, args.allocations)
    if not todo:
        parser.error(f"none of {', '.join(args.methods)} is run with {', '.join(args.allocations)}")
    once = [method for method, _ in todo if METHODS[method].recipe is not None]
    total = len(args.network) * sum(1 if m == "dense" else len(sparsities) for m in once)
    total += sum(2 * len(sparsities) * len(lotteries(n, todo)) for n in args.network)
    arrays, held_out_arrays = (loop.Data(*map(jnp.asarray, d[1:5])) for d in (evaluated, held_out))
    with harness.progress(console) as progress:
        task = progress.add_task("methods", total=total, note="")
        note = functools.partial(progress.update, task)
        for network in args.network:
            rate = args.learning_rate or choose_rate(
                rates,
                budgets_held_out[network],
                dataset.num_classes,
                held_out_arrays,
                args.seeds,
                lambda what: note(note=what),
            )
            try:
                compare(
                    results,
                    arrays,
                    dataset.num_classes,
                    budgets[network]._replace(learning_rate=rate),
                    todo,
                    sparsities,
                    args.seeds,
                    harness.OUT / "tickets",
                    on_start=lambda what: note(note=what),
                    on_result=lambda _: progress.update(task, advance=1),
                )
            except ValueError as error:
                parser.error(str(error))

    content = results.content
    kind = "held-out training" if args.validation else "test"
    head = (
        f"Methods on {dataset.name}\n\nWritten by `{content['command']}`: mean ± standard deviation of "
        f"{args.seeds} seeds on {len(evaluated.test_labels)} {kind} images, "
        f"{', '.join(f'{NETWORKS[n]} after {budgets[n].epochs} epochs' for n in args.network)}."
    )
    harness.publish(results.path, head, content, tables, console)
    if rates.records:
        console.print(*rates_tables(rates.content).values())
    figures.save_methods(results.path.with_suffix(".png"), content, recipes.FAMILIES)
    console.print(f"{time.perf_counter() - begin:.0f} s in all, compilation included.")


def budget_for(
    network: str, dataset: datasets.Dataset, epochs: int | None, quick: bool = False
) -> Budget:
    """As many epochs as see `IMAGES`, a fifth of it where quick, unless a number is given; no learning rate yet."""
    count = len(dataset.train_labels)
    batch_size = 128 if count > 10_000 else 32
    images = IMAGES[network] * (0.2 if quick else 1)
    epochs = epochs or max(round(images / count), 1)
    return Budget(network, epochs, loop.steps_per_epoch(count, batch_size), batch_size, math.nan)


def load(name: str, console: rich.console.Console) -> datasets.Dataset:
    """A data set, or digits where it cannot be had."""
    try:
        return datasets.load(name)
    except datasets.DatasetError as error:
        if name == "digits":
            raise
        console.print(f"[yellow]{error}\nGoing on with digits.")
        return datasets.load("digits")


def _parser() -> argparse.ArgumentParser:
    methods = "\n".join(f"  {name:<17}{method.about}" for name, method in METHODS.items())
    parser = harness.parser("methods", __doc__, f"{EXAMPLES}\nmethods:\n{methods}")
    add = parser.add_argument
    add("--quick", action="store_true", help="few methods and sparsities, short training")
    add("--dataset", default="fashion_mnist", help="(fashion_mnist; digits where it is not there)")
    add("--network", nargs="+", choices=NETWORKS, help="(all)")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help="(all)")
    add(
        "--allocations",
        nargs="+",
        choices=recipes.ALLOCATIONS,
        default=list(recipes.ALLOCATIONS),
        help="each method with those of them that it is compared at (all)",
    )
    add("--sparsities", nargs="+", type=float, help=f"({' '.join(map(str, SPARSITIES))})")
    add("--seeds", type=int, help="how many (5)")
    add("--epochs", type=int, help="of each run (what sees 600,000 images, less of convolutions)")
    add(
        "--learning-rate",
        type=float,
        help=f"of all runs (the best of {', '.join(map(str, RATES))} for dense training on held-out images)",
    )
    add("--validation", action="store_true", help="hold out training images and evaluate on them")
    return parser


if __name__ == "__main__":
    main()
