"""Budgets by measured loss: which structure loses how much, for a given total."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from prunax import schedules
from prunax.reports._tables import Table, Tabular
from prunax.search._curves import (
    SPARSITIES,
    Sensitivity,
    check_grid,
    check_measured,
    curve,
    measure,
)
from prunax.search._losses import Losses, LossFn
from prunax.search._structures import Structures, leaves

__all__ = ["Allocated", "allocate"]

PyTree = Any


@dataclass(frozen=True, eq=False)
class Allocated(Tabular):
    """Budgets that a search found. Prints as a table.

    Attributes:
        masks: A mask tree of the params' structure, True = kept.
        sparsities: Fraction of the units that each structure loses, by name.
            ``prunax.allocation.by_path(found.sparsities)`` is the allocation.
        sparsity: What is removed, as a fraction of the whole cost.
        loss: The loss under the masks, as measured.
        dense_loss: The loss with nothing pruned.
        start_losses: The losses of what the search started from: "greedy" and plain allocations, by name.
        history: The best loss of the starts, and after each generation of the evolutionary search.
    """

    masks: PyTree
    sparsities: dict[str, float]
    sparsity: float
    loss: float
    dense_loss: float
    start_losses: dict[str, float]
    history: tuple[float, ...]

    def table(self) -> Table:
        """Arrange the budgets as a `tables.Table`."""
        rows = [(name, f"{sparsity:.2%}") for name, sparsity in self.sparsities.items()]
        footer = [("of the cost", f"{self.sparsity:.2%}")]
        title = f"loss {self.loss:.4g}, {self.dense_loss:.4g} when dense"
        return Table(("structure", "sparsity"), rows, footer, title=title)


def allocate(
    loss_fn: LossFn,
    params: PyTree,
    sparsity: float,
    *,
    structures: Structures | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    measured: Sensitivity | None = None,
    key: jax.Array | None = None,
    generations: int = 64,
    offspring: int = 8,
    batch_size: int = 1,
    progress: bool = False,
) -> Allocated:
    """Share out a total budget among structures so that the measured loss is low.

    Each structure's loss is measured when it alone is pruned. The greedy start spends the budget where the loss grows
    least per unit of cost, along the lower convex hull of each curve. It is compared with plain allocations of the same
    total (uniform, Erdos-Renyi, LAMP, global magnitude), by the loss of all structures pruned together, and the best
    one wins; so the result is never worse than any of them on the data that `loss_fn` looks at.

    With a `key` the best start is then improved by an evolutionary search: each generation moves random parts of the
    budget from some structures to others, and the best child replaces its parent if its loss is lower.

    Args:
        loss_fn: ``loss_fn(params) -> scalar``, a pure JAX function: the mean loss over some data. Compiled once.
        params: Pytree of arrays.
        sparsity: Fraction of the whole cost to remove, in [0, 1]: of the prunable weights, where each costs the same.
        structures: What to prune and at what cost, from `leaves` or `channels`; ``leaves(params)`` when left out.
        sparsities: Where to measure each structure's curve, as for `sensitivity`.
        measured: A `Sensitivity` of the same structures, measured before, in place of `sparsities`.
        key: A JAX random key, for the evolutionary search; none without.
        generations: Of the evolutionary search.
        offspring: Children in each generation, each measured once.
        batch_size: How many pruned networks to compute at once, with `jax.vmap`: more takes more memory.
        progress: Show a progress bar.

    Returns:
        The `Allocated` budgets. Where weights cost the same, ``round(sparsity * weights)`` go, exactly; otherwise the
        sparsity is reached, and passed by less than the dearest unit.

    Raises:
        ValueError: If a sparsity is outside [0, 1] or the structures cannot reach it, the loss is no scalar, or it is
            not finite with nothing pruned.

    Examples:
        The kernel "b" does not matter:

        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> loss_fn = lambda p: jnp.sum((1 - p["a"]["kernel"]) ** 2)
        >>> found = prunax.search.allocate(loss_fn, params, 0.5)
        >>> found.sparsities, found.loss
        ({'a/kernel': 0.0, 'b/kernel': 1.0}, 0.0)

    References:
        Sieberling et al., EvoPress: Accurate Dynamic Model Compression via Evolutionary Search, 2024, arXiv:2410.14649,
        algorithm 1 and the level-switch mutation. There each switch moves one fixed amount, and children are chosen in
        rounds on growing data; here the amount is random on a logarithmic scale, since networks of few layers need
        coarse and fine moves, and `loss_fn` is one function.
    """
    schedules.check_sparsity("allocate", sparsity)
    schedules.check_steps("allocate", generations=generations, offspring=offspring)
    check_grid("allocate", sparsities)
    structures = leaves(params) if structures is None else structures
    check_measured("allocate", measured, structures)
    target = _target(structures, sparsity)
    losses = Losses("allocate", loss_fn, params, structures, batch_size, progress)
    evolving = key is not None and offspring > 0 and len(structures.names) > 1
    total = 2 + len(structures.starts) + (generations * offspring if evolving else 0)
    total += 0 if measured else len(structures.names) * len(sparsities)
    with losses.counting(total):
        measured = measured or measure(losses, sparsities)
        starts = starting_points(structures, measured)
        fitted = [way(sparsity) for way in starts.values()]
        found = losses(fitted)
        best = min(range(len(fitted)), key=lambda i: _rank(found[i]))
        history = [found[best]]
        pruned = fitted[best]
        if key is not None and evolving:
            seed = np.asarray(jax.device_get(jax.random.bits(key, (4,))))
            rng = np.random.default_rng(seed)
            for _ in range(generations):
                pruned = _next_generation(losses, pruned, target, offspring, rng)
                history.append(losses([pruned])[0])
    return Allocated(
        structures.masks(pruned),
        structures.sparsities(pruned),
        structures.removed(pruned),
        float(history[-1]),
        losses.dense,
        dict(zip(starts, map(float, found), strict=True)),
        tuple(map(float, history)),
    )


def starting_points(
    structures: Structures, measured: Sensitivity
) -> dict[str, Callable[[float], np.ndarray]]:
    """By name, ways to come from a sparsity to numbers of pruned units of that total."""

    def greedy(sparsity: float) -> np.ndarray:
        return _greedy(structures, measured, _target(structures, sparsity))

    def fitted(way: Callable[[float], np.ndarray], sparsity: float) -> np.ndarray:
        return _fitted(structures, way(sparsity), _target(structures, sparsity))

    known = {"greedy": greedy, **structures.starts}
    return {name: functools.partial(fitted, way) for name, way in known.items()}


def _target(structures: Structures, sparsity: float) -> float:
    """The cost to remove. A whole number where all costs are, rounded as `compute_masks` rounds."""
    target, whole = sparsity * structures.cost, np.array(structures.unit_costs)
    if np.all(whole == np.round(whole)):
        target = float(round(target))
    most = float(np.dot(structures.unit_costs, structures.limits))
    if target > most * (1 + 1e-12):
        raise ValueError(
            f"allocate: sparsity={sparsity:g} is out of reach: the structures can lose at most "
            f"{most / structures.cost:g} of the cost. Ask for less, or let `where` select more."
        )
    return target


def _greedy(structures: Structures, measured: Sensitivity, target: float) -> np.ndarray:
    """Real numbers of units to prune, by the slopes of the curves' lower convex hulls."""
    segments = []
    for i, unit_cost in enumerate(structures.unit_costs):
        units, losses = curve(structures, measured, i)
        corners = _lower_hull(units * unit_cost, losses)
        for a, b in itertools.pairwise(corners):
            cost = (units[b] - units[a]) * unit_cost
            segments.append(((losses[b] - losses[a]) / cost, i, cost))
    pruned, left = np.zeros(len(structures.names)), target
    for _, i, cost in sorted(segments):
        part = min(cost, left)
        pruned[i] += part / structures.unit_costs[i]
        left -= part
    return pruned


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the corners of the lower convex hull of points with increasing x."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _fitted(structures: Structures, pruned: np.ndarray, target: float) -> np.ndarray:
    """Numbers that the structures allow, near the given ones, whose cost is the target or the least above it."""
    unit_costs, limits = np.array(structures.unit_costs), np.array(structures.limits)
    pruned = np.minimum(pruned.astype(np.float64), limits)
    missing = target - np.dot(unit_costs, pruned)
    if missing > 0:
        room = limits - pruned
        pruned = pruned + room * min(missing / max(np.dot(unit_costs, room), 1e-300), 1)
    elif missing < 0:
        pruned = pruned * (target / np.dot(unit_costs, pruned))
    whole = np.array([structures.nearest(i, k) for i, k in enumerate(pruned)], np.int64)

    # Rounding left something over: add, then take back what is too much, the dearest units first.
    steps = np.array(structures.steps)
    costs = unit_costs * steps
    near = 1e-9 * max(target, 1.0)
    missing = target - np.dot(unit_costs, whole)
    order = np.argsort(-costs, kind="stable")
    for i in order:
        if missing > near:
            moves = min((limits[i] - whole[i]) // steps[i], int((missing + near) // costs[i]))
            whole[i] += moves * steps[i]
            missing -= moves * costs[i]
    if missing > near:
        i = next(i for i in order[::-1] if whole[i] + steps[i] <= limits[i])
        whole[i] += steps[i]
        missing -= costs[i]
    for i in order:
        if missing < -near:
            moves = min(whole[i] // steps[i], int((near - missing) // costs[i]))
            whole[i] -= moves * steps[i]
            missing += moves * costs[i]
    return whole


def _next_generation(
    losses: Losses, parent: np.ndarray, target: float, offspring: int, rng: np.random.Generator
) -> np.ndarray:
    """The best of a number of mutated children, or the parent where none is better."""
    family = [parent]
    family += [_mutated(losses.structures, parent, target, rng) for _ in range(offspring)]
    ranks = [_rank(loss) for loss in losses(family)]
    return family[ranks.index(min(ranks))]


def _mutated(
    structures: Structures, parent: np.ndarray, target: float, rng: np.random.Generator
) -> np.ndarray:
    """Move random parts of the budget between pairs of structures, few more often than many."""
    unit_costs, limits = structures.unit_costs, structures.limits
    child = parent.copy()
    for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
        i, j = rng.choice(len(child), 2, replace=False)
        most = min((limits[i] - child[i]) * unit_costs[i], child[j] * unit_costs[j])
        cost = most * 2.0 ** -rng.uniform(0, 10)
        child[i] = structures.nearest(i, child[i] + cost / unit_costs[i])
        child[j] = structures.nearest(j, child[j] - cost / unit_costs[j])
    return _fitted(structures, child, target)


def _rank(loss: float) -> float:
    return loss if np.isfinite(loss) else np.inf
