"""Rank the units of groups, and say which stay: on the host, where nothing is compiled for a few dozen numbers."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prunax import _masks, _meshes, patterns, trees
from prunax import allocation as allocations
from prunax.structured._groups import AxisGroup

__all__ = ["group_scores"]

PyTree = Any
UnitScores = Mapping[AxisGroup, np.ndarray]


def group_scores(
    groups: Sequence[AxisGroup], params: PyTree, scores: PyTree
) -> dict[AxisGroup, np.ndarray]:
    """Score units: the sum of all scores that go when a unit goes.

    Args:
        groups: From `axis_groups`.
        params: The parameters that they were found in.
        scores: Tree of their structure, larger = keep: arrays of the leaves' shapes, or scalars for leaves that have no
            say. ``prunax.scores.magnitude`` gives L1 norms, ``jnp.square`` of the weights squared L2 norms,
            ``prunax.scores.saliency`` Taylor scores; for batch normalisation scales, |scale| and scalars elsewhere.

    Returns:
        ``(units,)`` float64 for each group.

    Raises:
        ValueError: If the scores do not fit the params, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)))
        >>> groups = prunax.structured.prunable_groups(groups, params)
        >>> prunax.structured.group_scores(groups, params, prunax.scores.magnitude(params))[groups[0]].max()
        np.float64(7.0)
    """
    leaves = trees.leaves_like("group_scores", "scores", scores, params)
    by_path = dict(zip(trees.paths(params), leaves, strict=True))
    shapes = {leaf.path: leaf.shape for group in groups for leaf in group.leaves}
    arrays: dict[str, np.ndarray] = {}
    for path, shape in shapes.items():
        score = by_path[path]
        if np.shape(score) == shape and shape:
            arrays[path] = _meshes.to_host(score).astype(np.float64)
        elif np.shape(score) != ():
            raise ValueError(
                f"group_scores: the score of {path!r} has shape {np.shape(score)}, the leaf has {shape}. "
                f"Pass a score for each weight, or a scalar for a leaf without a say."
            )
    sums = functools.cache(
        lambda path, axis: arrays[path].sum(tuple(i for i in range(arrays[path].ndim) if i != axis))
    )
    result = {}
    for group in groups:
        result[group] = np.zeros(group.size)
        for path, axis, position, _ in group.members:
            if path in arrays:
                result[group] += sums(path, axis)[position.indices(group.size)].sum(1)
    return result


def scores_of_units(
    function: str,
    groups: Sequence[AxisGroup],
    params: PyTree,
    scores: PyTree | None,
    where: trees.Where,
) -> dict[AxisGroup, np.ndarray]:
    """Scores of units: given by group, summed over given scores of weights, or over |w| of the selected leaves.

    Args:
        function: The public function that asks, named in errors.
        groups: The groups that may shrink.
        params: The parameters that they were found in.
        scores: A dict from `AxisGroup.name` to ``(units,)``, a tree like the params, or None.
        where: ``where(path, leaf) -> bool``.

    Returns:
        ``(units,)`` float64 for each group; groups without an entry in a dict by name are left out.

    Raises:
        ValueError: If scores do not fit, or are NaN.
    """
    names = {group.name: group for group in groups}
    if isinstance(scores, Mapping) and names.keys() & scores.keys():
        unit_scores = {}
        for name, given in scores.items():
            if name not in names:
                raise ValueError(
                    f"{function}: scores names {name!r}, which is no group that may shrink. "
                    f"Those are: {', '.join(names)}."
                )
            score = _meshes.to_host(given).astype(np.float64)
            if score.shape != (names[name].size,):
                raise ValueError(
                    f"{function}: the scores of {name} have shape {score.shape}, expected {(names[name].size,)}: "
                    f"one for each unit."
                )
            unit_scores[names[name]] = score
    else:
        if scores is None:
            scores = _magnitudes(params, where)
        unit_scores = group_scores(groups, params, scores)
    for group, score in unit_scores.items():
        if np.isnan(score).any():
            raise ValueError(
                f"{function}: the scores of {group.name} contain NaN, which cannot be ranked. "
                f"Look for the step that made them in its members: "
                f"{', '.join(dict.fromkeys(member.path for member in group.members))}."
            )
    return unit_scores


def _magnitudes(params: PyTree, where: trees.Where) -> PyTree:
    chosen = trees.select(params, where)
    nothing = jax.tree.map(lambda _: np.float32(0), params)
    return chosen.put([np.abs(_meshes.to_host(x)) for x in chosen.leaves], nothing)


def numbers_left(
    unit_scores: UnitScores, sparsity: float | None, allocation: allocations.Allocation
) -> dict[AxisGroup, int]:
    """How many units each group keeps when an allocation shares out a sparsity.

    Args:
        unit_scores: ``(units,)`` for each group.
        sparsity: Fraction of units to remove; None where the allocation knows.
        allocation: From `prunax.allocation`; it sees groups as leaves named `AxisGroup.name`.

    Returns:
        A number for each group. Which units they are, `best_units` says.
    """
    groups = list(unit_scores)
    shapes = [(group.name, (group.size,)) for group in groups]
    plan = _masks.plan(shapes, sparsity, allocation=allocation, pattern=patterns.Unstructured())
    left = {group: group.size for group in groups}
    for pool, budget in zip(plan.pools, plan.budgets, strict=True):
        ranked = [unit_scores[groups[i]] for i in pool]
        if plan.rescale is not None:
            rescale: Callable[[Any], Any] = plan.rescale
            ranked = [np.asarray(rescale(score)) for score in ranked]
        owner = np.repeat(pool, [len(score) for score in ranked])
        # Stable: of equal scores the lower index stays, as everywhere.
        kept = best_units(np.concatenate(ranked), len(owner) - int(budget))
        for i, count in zip(
            pool, np.bincount(owner[kept], minlength=len(groups))[list(pool)], strict=True
        ):
            left[groups[i]] = int(count)
    return left


def best_units(score: np.ndarray, count: int) -> np.ndarray:
    """The units with the largest scores, increasing; of equal scores the lower index."""
    return np.sort(np.argsort(-score, kind="stable")[:count])


def one_factor_an_axis(
    groups: Sequence[AxisGroup], removed: Callable[[AxisGroup], float], sparsity: float
) -> dict[AxisGroup, AxisGroup]:
    """Where an axis is a product of groups (heads times their width), which of them leave the shrinking to another.

    Half of the heads and half of their width would leave a quarter. The factor that comes nearest to the sparsity
    shrinks; of equals one that nothing is averaged over (the members of an ensemble are), and the slowest of those, so
    that whole heads go.

    Args:
        groups: Those that may shrink.
        removed: The fraction of units that a group would lose.
        sparsity: The fraction that is to go.

    Returns:
        For each group that stays as it is the one that shrinks along the same axis.
    """
    conflicts = _factors(groups)
    if not conflicts:
        return {}

    def preference(group: AxisGroup) -> tuple[float, bool, float]:
        shapes = {leaf.path: leaf.shape for leaf in group.leaves}
        slowness = max(
            m.position.stride * math.prod(shapes[m.path][m.axis + 1 :]) for m in group.members
        )
        return (round(abs(removed(group) - sparsity), 9), bool(group.crosses), -slowness)

    left: dict[AxisGroup, AxisGroup] = {}
    for group in sorted(conflicts, key=preference):
        if group not in left:
            left.update((other, group) for other in conflicts[group] if other not in left)
    return left


def _factors(groups: Sequence[AxisGroup]) -> dict[AxisGroup, list[AxisGroup]]:
    """For each group those that are other factors of an axis that it lies on, or of what a leaf produces.

    Experts are no factor of the width of each.
    """
    places: dict[tuple[str, int], list[tuple[AxisGroup, np.ndarray]]] = {}
    made: dict[str, dict[int, list[AxisGroup]]] = {}
    for group in groups:
        for member in group.members:
            where = places.setdefault((member.path, member.axis), [])
            where.append((group, member.position.indices(group.size)))
            if member.role == "produces" and not group.numbered:
                made.setdefault(member.path, {}).setdefault(member.axis, []).append(group)
    found: dict[AxisGroup, dict[AxisGroup, None]] = {}
    for here in places.values():
        for n, (group, indices) in enumerate(here):
            for other, theirs in here[:n]:
                if other is not group and np.isin(indices, theirs).any():
                    found.setdefault(group, {})[other] = None
                    found.setdefault(other, {})[group] = None
    for along in made.values():
        for ours, theirs in itertools.permutations(along.values(), 2):
            for group in ours:
                found.setdefault(group, {}).update((g, None) for g in theirs if g is not group)
    return {group: list(others) for group, others in found.items()}


def rounded(count: int, group: AxisGroup, round_to: int, min_width: int) -> int:
    """A number of units to keep, as a multiple and within the width that was asked for, no fewer than are needed."""
    floor = max(min(min_width, group.size), group.least)
    if round_to > 1:
        count = max(round_to, round(count / round_to) * round_to)
        floor = math.ceil(floor / round_to) * round_to
    return min(max(count, floor), group.size)
