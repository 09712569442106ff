"""The sparsest network within a limit of the loss, one structure at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from prunax.reports._tables import Table, Tabular
from prunax.search._budgets import starting_points
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

__all__ = ["Accepted", "Decision", "max_sparsity"]

PyTree = Any
_BISECTIONS = 10  # a thousandth of the whole


class Decision(NamedTuple):
    """One proposal to prune more of one structure.

    Attributes:
        name: The structure.
        before: Fraction of its units pruned so far.
        proposed: Fraction of its units that the proposal prunes.
        sparsity: What would be removed then of all structures, as a fraction of the whole cost.
        loss: The loss then, with everything accepted so far.
        accepted: Whether it was accepted.
    """

    name: str
    before: float
    proposed: float
    sparsity: float
    loss: float
    accepted: bool


@dataclass(frozen=True, eq=False)
class Accepted(Tabular):
    """The sparsest masks that a loss accepted. Prints as a table of decisions.

    Attributes:
        masks: A mask tree of the params' structure, True = kept.
        sparsities: Fraction of the units that each structure loses, by name.
            ``prunax.allocation.by_path(found.sparsities)`` is the allocation.
        sparsity: What is removed, as a fraction of the whole cost.
        loss: The loss under the masks, as measured; at most `limit`.
        dense_loss: The loss with nothing pruned.
        start_sparsities: How much of the cost the greedy and the plain allocations remove within the limit, by name.
        limit: ``dense_loss + max_increase``.
        decisions: Every proposal to go on from the best start, in order.
    """

    masks: PyTree
    sparsities: dict[str, float]
    sparsity: float
    loss: float
    dense_loss: float
    start_sparsities: dict[str, float]
    limit: float
    decisions: tuple[Decision, ...]

    def table(self) -> Table:
        """Arrange the decisions as a `tables.Table`."""
        rows = [
            (
                d.name,
                f"{d.before:.2%}",
                f"{d.proposed:.2%}",
                f"{d.sparsity:.2%}",
                f"{d.loss:.6g}",
                "accepted" if d.accepted else "rejected",
            )
            for d in self.decisions
        ]
        title = f"{self.sparsity:.2%} removed, loss {self.loss:.6g} within {self.limit:.6g}"
        columns = ("structure", "from", "to", "in all", "loss", "verdict")
        return Table(columns, rows, title=title)


def max_sparsity(
    loss_fn: LossFn,
    params: PyTree,
    *,
    max_increase: float = 0.01,
    structures: Structures | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    measured: Sensitivity | None = None,
    first_step: float = 1 / 8,
    last_step: float = 1 / 256,
    batch_size: int = 1,
    progress: bool = False,
) -> Accepted:
    """Prune as much as the loss accepts, structure by structure.

    The start is the best of several allocations (the greedy one of `allocate`, uniform, Erdos-Renyi, LAMP, global
    magnitude), each at the largest total that the loss accepts, found by bisection. Then, again and again, the
    structure that promises to remove the most cost per increase of the loss (from the curves of each pruned alone)
    proposes to lose one step more. The loss of the network is computed, with everything accepted so far, and the
    proposal is accepted if it is within the limit. A structure that is rejected halves its step, until its steps are
    exhausted.

    Args:
        loss_fn: ``loss_fn(params) -> scalar``, a pure JAX function: the mean loss over some data. Compiled once. The
            limit holds on the data that it looks at; look at other data to know what it is worth.
        params: Pytree of arrays.
        max_increase: By how much the loss may grow, at least 0, in units of the loss.
        structures: What to prune and at what cost, from `leaves` or `channels`; ``leaves(params)`` when left out.
        sparsities: Where to measure each structure's curve, as for `sensitivity`.
        measured: A `Sensitivity` of the same structures, measured before, in place of `sparsities`.
        first_step: What a structure proposes to lose at first, as a fraction of its units, in (0, 1].
        last_step: The smallest step that is tried; a structure's smallest step where that is larger.
        batch_size: How many pruned networks to compute at once while curves are measured, with `jax.vmap`.
        progress: Show a progress bar.

    Returns:
        What was accepted, `Accepted`: masks whose loss is at most ``dense loss + max_increase``, and every decision.

    Raises:
        ValueError: If max_increase is negative or not finite, a sparsity or step is out of range, the loss is no
            scalar, or it is not finite with nothing pruned.

    Examples:
        A weight of "a" costs the loss 0.01 where one of "b" costs 0.05:

        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}
        >>> loss_fn = lambda p: 0.01 * (16 - p["a"]["kernel"].sum()) + 0.05 * (16 - p["b"]["kernel"].sum())
        >>> found = prunax.search.max_sparsity(loss_fn, params, max_increase=0.375)
        >>> found.sparsities, round(found.loss, 6)
        ({'a/kernel': 1.0, 'b/kernel': 0.25}, 0.36)
    """
    if not (max_increase >= 0 and math.isfinite(max_increase)):
        raise ValueError(
            f"max_sparsity: max_increase must be a number of at least 0, in units of the loss, got {max_increase}."
        )
    if not 0 < last_step <= first_step <= 1:
        raise ValueError(
            f"max_sparsity: needs 0 < last_step <= first_step <= 1, got {last_step} and {first_step}."
        )
    check_grid("max_sparsity", sparsities)
    structures = leaves(params) if structures is None else structures
    check_measured("max_sparsity", measured, structures)
    losses = Losses("max_sparsity", loss_fn, params, structures, batch_size, progress)
    with losses.counting(None):
        measured = measured or measure(losses, sparsities)
        limit = losses.dense + max_increase
        starts = {
            name: _bisected(losses, way, limit)
            for name, way in starting_points(structures, measured).items()
        }
        removed = {name: structures.removed(pruned) for name, pruned in starts.items()}
        start = starts[max(removed, key=lambda name: removed[name])]
        pruned, decisions = _search(losses, measured, start, limit, (first_step, last_step))
        loss = float(losses([pruned])[0])
    return Accepted(
        structures.masks(pruned),
        structures.sparsities(pruned),
        structures.removed(pruned),
        loss,
        losses.dense,
        removed,
        limit,
        tuple(decisions),
    )


def _bisected(losses: Losses, way: Callable[[float], np.ndarray], limit: float) -> np.ndarray:
    """The numbers of pruned units of the largest total whose loss is within the limit, as far as bisection finds it."""
    structures = losses.structures
    low, high = 0.0, structures.removed(structures.limits)
    best = np.zeros(len(structures.names), np.int64)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        proposal = way(middle)
        if losses([proposal])[0] <= limit:
            low, best = middle, proposal
        else:
            high = middle
    return best


def _search(
    losses: Losses,
    measured: Sensitivity,
    start: np.ndarray,
    limit: float,
    fractions: tuple[float, float],
) -> tuple[np.ndarray, list[Decision]]:
    structures = losses.structures
    number = range(len(structures.names))
    pruned = start
    first_step, last_step = fractions
    curves = [curve(structures, measured, i) for i in number]
    smallest = [
        max(structures.nearest(i, last_step * n), structures.steps[i])
        for i, n in enumerate(structures.sizes)
    ]
    steps = [
        max(structures.nearest(i, first_step * n), structures.steps[i])
        for i, n in enumerate(structures.sizes)
    ]

    def after(i: int) -> int:
        return min(int(pruned[i]) + steps[i], structures.limits[i])

    def promise(i: int) -> float:
        """Cost removed per predicted increase of the loss."""
        units, values = curves[i]
        # Beyond what has a finite loss, nothing is promised.
        before, then = np.interp([pruned[i], after(i)], units, values, right=np.inf)
        cost = (after(i) - pruned[i]) * structures.unit_costs[i]
        return cost / max(then - before, 1e-12) if np.isfinite(before) else 0.0

    def narrow(i: int) -> None:
        """Halve the step, to nothing below the smallest."""
        smaller = structures.nearest(i, steps[i] / 2)
        steps[i] = smaller if smallest[i] <= smaller < steps[i] else 0

    decisions: list[Decision] = []
    refused: set[tuple[int, ...]] = set()
    while open_ := [i for i in number if after(i) > pruned[i]]:
        i = max(open_, key=promise)
        proposal = pruned.copy()
        proposal[i] = after(i)
        known = tuple(map(int, proposal))
        if known in refused:  # by a longer step, from a point before this one
            narrow(i)
            continue
        loss = float(losses([proposal])[0])
        accepted = loss <= limit  # not so for NaN
        size = structures.sizes[i]
        decisions.append(
            Decision(
                structures.names[i],
                int(pruned[i]) / size,
                int(proposal[i]) / size,
                structures.removed(proposal),
                loss,
                accepted,
            )
        )
        if accepted:
            pruned = proposal
        else:
            refused.add(known)
            narrow(i)
    return pruned, decisions
