"""What can be pruned: leaves under a pattern, or channel groups, as structures that lose units one by one."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prunax import _counts, _masks, _selection, patterns, trees
from prunax import allocation as allocations
from prunax.search._costs import Cost
from prunax.structured import AxisGroup, prunable_groups
from prunax.structured._gating import along_axis
from prunax.structured._ranking import numbers_left, scores_of_units

__all__ = ["Structures", "channels", "leaves", "together"]

PyTree = Any


@dataclass(frozen=True, eq=False)
class Structures:
    """The parts of a network among which a search shares out a budget. Each consists of units of equal cost.

    Which units go first is settled by their scores; a search chooses how many go.

    Attributes:
        names: Paths of leaves, or `AxisGroup.name`.
        sizes: Units of each structure.
        limits: Of these, how many may go at most.
        steps: How many go together at the least.
        unit_costs: What one unit costs: weights, or what `cost` counts.
        scores: What ranks the units; arguments of `build`.
        build: ``build(scores, num_pruned) -> masks``, pure; `num_pruned` is a `_counts.Count` of arrays that may be
            traced, one element a structure.
        starts: Plain allocations by name: ``start(sparsity)`` gives numbers of pruned units, about.
        switch: ``switch(loss_fn, scores, num_pruned) -> loss_fn``, where masks do not say what is gone: a loss of the
            params in which those units are. By default the loss under the masks of `build`.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    limits: tuple[int, ...]
    steps: tuple[int, ...]
    unit_costs: tuple[float, ...]
    scores: Any
    build: Callable[[Any, _counts.Count], PyTree]
    starts: Mapping[str, Callable[[float], np.ndarray]]
    switch: Callable[[Any, Any, _counts.Count], Callable[[PyTree], Any]] | None = None

    def pruned(self, loss_fn: Callable[[PyTree], Any], scores: Any, num_pruned: Any) -> Any:
        """A loss of the params in which units are gone; pure.

        Args:
            loss_fn: ``loss_fn(params) -> scalar``.
            scores: The structures' `scores`, which may be traced.
            num_pruned: A `_counts.Count` of arrays, one element a structure, which may be traced.
        """
        if self.switch is not None:
            return self.switch(loss_fn, scores, num_pruned)
        return lambda params: loss_fn(_masks.apply_masks(params, self.build(scores, num_pruned)))

    @property
    def cost(self) -> float:
        """What all units cost."""
        return float(np.dot(self.unit_costs, self.sizes))

    def removed(self, num_pruned: Any) -> float:
        """What the pruned units cost, as a fraction of what all cost.

        Args:
            num_pruned: Numbers of pruned units, one a structure.
        """
        return float(np.dot(self.unit_costs, num_pruned)) / self.cost

    def sparsities(self, num_pruned: Any) -> dict[str, float]:
        """Fraction of each structure's units that go, by name: what `allocation.by_path` takes.

        Args:
            num_pruned: Numbers of pruned units, one a structure.
        """
        pairs = zip(self.names, num_pruned, self.sizes, strict=True)
        return {name: int(k) / size for name, k, size in pairs}

    def masks(self, num_pruned: Any) -> PyTree:
        """Prune.

        Args:
            num_pruned: Numbers of pruned units, one a structure, each at most its limit.

        Returns:
            A mask tree of the params' structure, True = kept: bool arrays for leaves that may lose weights, the scalar
            True for others.
        """
        num_pruned = np.asarray(num_pruned)
        if num_pruned.shape != (len(self.names),):
            raise ValueError(
                f"masks: needs {len(self.names)} numbers of pruned units, got shape {num_pruned.shape}."
            )
        for name, k, most in zip(self.names, num_pruned, self.limits, strict=True):
            if not 0 <= k <= most:
                raise ValueError(f"masks: {name!r} loses 0 to {most} units, got {k}.")
        return self.build(self.scores, as_counts(num_pruned))

    def nearest(self, structure: int, units: float) -> int:
        """The number of units nearest to the given that a structure may lose.

        Args:
            structure: Index.
            units: Any number.
        """
        step = self.steps[structure]
        return min(max(round(units / step), 0), self.limits[structure] // step) * step

    def grid(self, sparsities: Sequence[float]) -> np.ndarray:
        """Numbers of pruned units ``(structures, sparsities)`` nearest to the given sparsities.

        Args:
            sparsities: Fractions of the units.
        """
        rows = [[self.nearest(i, s * n) for s in sparsities] for i, n in enumerate(self.sizes)]
        return np.array(rows, np.int64)


def leaves(
    params: PyTree,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    scores: PyTree | None = None,
    where: trees.Where = trees.is_kernel,
    cost: Cost | None = None,
) -> Structures:
    """Let a search choose the sparsity of each leaf.

    Args:
        params: Pytree of arrays, as for `prunax.compute_masks`.
        pattern: Which weights go together or compete. Under `patterns.NM` a leaf is N:M sparse, or dense.
        scores: Tree of the params' structure, larger = keep; |w| where left out. Scalars for leaves never pruned.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.
        cost: ``cost(path, leaf) -> float``, of one weight: `bytes_per_weight`, `flops_per_weight(fn, params, x)` or
            any other; 1 where left out, so that budgets count weights.

    Returns:
        The `Structures`, named by path: weights, blocks or channels of a leaf are its units; where the pattern compares
        along an axis, the weights of one slice (each slice loses the same number).

    Raises:
        ValueError: As `prunax.compute_masks`; or if a weight's cost is not a positive number, naming the leaf.
        TypeError: As `prunax.compute_masks`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": {"kernel": jnp.arange(8.0).reshape(4, 2)}, "b": {"kernel": jnp.ones((4, 3))}}
        >>> structures = prunax.search.leaves(params)
        >>> structures.names, structures.sizes
        (('a/kernel', 'b/kernel'), (8, 12))
        >>> structures.masks([6, 0])["a"]["kernel"].tolist()
        [[False, False], [False, False], [False, False], [True, True]]
    """
    # Refuses whatever does not fit, and knows the leaves that scores leave out.
    known = _masks.compute_masks(params, 0.0, scores=scores, pattern=pattern, where=where)
    chosen = trees.select(params, where)
    own = zip(chosen.take("leaves", "masks", known), chosen.leaves, strict=True)
    chosen = chosen.only(
        [n for n, (mask, leaf) in enumerate(own) if trees.is_prunable(mask, leaf) and leaf.size]
    )
    ranked = (
        [Partial(_selection.absolute, leaf) for leaf in chosen.leaves]
        if scores is None
        else chosen.take("leaves", "scores", scores)
    )
    infos = [
        allocations.Leaf(path, shape, math.prod(pattern.unit_shape(shape)))
        for path, shape in chosen.shapes
    ]
    axis = pattern.compare_axis
    sizes = [
        info.num_units if axis is None else pattern.unit_shape(info.shape)[axis] for info in infos
    ]
    most = pattern.implied_sparsity
    limits = [size if most is None else _counts.num_pruned(most, size) for size in sizes]
    unit_costs = [
        _checked(cost(path, leaf) if cost else 1.0, path) * math.prod(leaf.shape) / size
        for path, leaf, size in zip(chosen.paths, chosen.leaves, sizes, strict=True)
    ]
    pools = tuple((i,) for i in range(len(infos)))
    treedef, indices = jax.tree.structure(params), chosen.indices

    def build(scores: Any, num_pruned: _counts.Count) -> PyTree:
        kept = _masks.select_masks(
            scores, _each(num_pruned, len(infos)), pattern=pattern, structure=(pools, None)
        )
        return _put(treedef, dict(zip(indices, kept, strict=True)))

    plain: list[Any] = [allocations.uniform, allocations.erdos_renyi]
    if axis is None:
        plain += [allocations.lamp, allocations.global_ranking]
    return Structures(
        names=tuple(chosen.paths),
        sizes=tuple(sizes),
        limits=tuple(limits),
        # N:M or dense.
        steps=tuple(1 if most is None else max(limit, 1) for limit in limits),
        unit_costs=tuple(unit_costs),
        scores=ranked,
        build=build,
        starts={
            a.__name__: functools.partial(_shared_out, a, infos, sizes, ranked, pattern)
            for a in plain
        },
    )


def channels(
    groups: Sequence[AxisGroup],
    params: PyTree,
    *,
    scores: PyTree | None = None,
    where: trees.Where = trees.is_kernel,
    cost: Cost | None = None,
) -> Structures:
    """Let a search choose the sparsity of each channel group.

    The masks zero all weights of the removed channels, heads and features, in every leaf where they lie. To make the
    network smaller, give the result to `structured.prune_channels` through `allocation.by_path`.

    Args:
        groups: From `structured.axis_groups`. Those that `structured.prune_channels` would not shrink are left out, and
            experts, for which there is `experts`.
        params: The parameters that they were found in.
        scores: Tree of the params' structure, larger = keep, summed over each unit as by `structured.group_scores`; |w|
            of the leaves that `where` selects when left out.
        where: ``where(path, leaf) -> bool`` selects the leaves whose produced axes may shrink.
        cost: ``cost(path, leaf) -> float``, of one weight, as for `leaves`.

    Returns:
        The `Structures`, named by `AxisGroup.name`. A unit costs what its weights cost, those in biases and in the
        layers that consume it included. At least one unit of a group stays.

        The cost of several groups is the sum, in which a weight between two of them counts for both. So the budget of a
        search is a fraction of the units, weighted by their size; of the weights more go: a matrix that loses half its
        rows and half its columns keeps a quarter.

    Raises:
        ValueError: If no group may shrink, the scores do not fit or are NaN, or a unit's cost is not a positive number.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.arange(1.0, 9.0).reshape(2, 4), "down": jnp.ones((4, 3))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((5, 2)))
        >>> structures = prunax.search.channels(groups, params)
        >>> structures.names, structures.sizes, structures.unit_costs
        (('up[1]',), (4,), (5.0,))
        >>> structures.masks([3])["up"].tolist()
        [[False, False, False, True], [False, False, False, True]]
    """
    chosen = [g for g in prunable_groups(groups, params, where=where) if not g.numbered]
    if not chosen:
        reasons = "; ".join(
            f"{g.name} is {g.frozen or ('chosen by number' if g.numbered else 'not selected')}"
            for g in groups
        )
        raise ValueError(f"channels: no group may shrink: {reasons or 'there are none'}.")
    unit_scores = scores_of_units("channels", chosen, params, scores, where)
    ranked = [jnp.asarray(unit_scores[group], jnp.float32) for group in chosen]
    names, sizes = tuple(g.name for g in chosen), tuple(g.size for g in chosen)
    tree_leaves = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    unit_costs = [
        _checked(
            sum(
                (cost(m.path, tree_leaves[m.path]) if cost else 1.0)
                * math.prod(tree_leaves[m.path].shape)
                / tree_leaves[m.path].shape[m.axis]
                * m.position.indices(group.size).shape[1]
                for m in group.members
            ),
            group.name,
        )
        for group in chosen
    ]
    pools = tuple((i,) for i in range(len(chosen)))

    def build(scores: Any, num_pruned: _counts.Count) -> PyTree:
        kept = _selection.keep_largest(scores, pools, _each(num_pruned, len(chosen)))
        return unit_masks(chosen, params, kept)

    by_unit = isinstance(scores, Mapping) and set(names) & set(scores)
    # Scores of units are of one kind; sums over weights grow with their number.
    ranking = functools.partial(allocations.global_ranking, normalize=not by_unit)
    plain = {"uniform": allocations.uniform, "global_ranking": ranking}
    return Structures(
        names=names,
        sizes=sizes,
        limits=tuple(size - 1 for size in sizes),
        steps=(1,) * len(chosen),
        unit_costs=tuple(unit_costs),
        scores=ranked,
        build=build,
        starts={
            name: functools.partial(shared_out_units, a, unit_scores) for name, a in plain.items()
        },
    )


def together(*structures: Structures) -> Structures:
    """Let one search share out a budget among structures of several kinds.

    Args:
        *structures: From `channels`, `branches`, `experts`, `leaves`, of the same params, their costs in one unit.

    Returns:
        The `Structures`, names and all one after the other. What two of them remove counts for both. Searches also try
        what each of them alone would start from.

    Raises:
        ValueError: If a name occurs twice, or there is nothing.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = [{"up": jnp.ones((2, 4)), "down": jnp.ones((4, 2))} for _ in range(2)]
        >>> def fn(params, x):
        ...     for p in params:
        ...         x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        ...     return x
        >>> x = jnp.ones((1, 2))
        >>> widths = prunax.search.channels(prunax.structured.axis_groups(fn, params, x), params)
        >>> prunax.search.together(widths, prunax.search.branches(fn, params, x)).names
        ('0/up[1]', '1/up[1]', '0', '1')
    """
    names = tuple(name for s in structures for name in s.names)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"together: needs structures of different names, got {', '.join(names) or 'none'}."
        )
    ends = np.cumsum([0] + [len(s.names) for s in structures])
    own = [slice(a, b) for a, b in itertools.pairwise(ends)]

    def of_each(scores: Any, num_pruned: _counts.Count) -> list[tuple[Structures, Any, Any]]:
        return [
            (s, score, _counts.Count(num_pruned.high[part], num_pruned.low[part]))
            for s, score, part in zip(structures, scores, own, strict=True)
        ]

    def build(scores: Any, num_pruned: _counts.Count) -> PyTree:
        trees_ = [s.build(score, count) for s, score, count in of_each(scores, num_pruned)]
        return jax.tree.map(lambda *m: functools.reduce(jnp.logical_and, m), *trees_)

    def switch(loss_fn: Any, scores: Any, num_pruned: _counts.Count) -> Callable[[PyTree], Any]:
        # What reads the program of the loss comes first, so that it reads that of the loss itself.
        parts = of_each(scores, num_pruned)
        for s, score, count in sorted(parts, key=lambda part: part[0].switch is None):
            loss_fn = s.pruned(loss_fn, score, count)
        return loss_fn

    whole = sum(s.cost for s in structures)

    def start(sparsity: float) -> np.ndarray:
        found = [s.starts.get("uniform", next(iter(s.starts.values()))) for s in structures]
        return np.concatenate([way(sparsity) for way in found])

    def alone(part: Structures, way: str, sparsity: float) -> np.ndarray:
        share = min(sparsity * whole / part.cost, 1.0)
        found = [
            part.starts[way](share) if s is part else np.zeros(len(s.names), np.int64)
            for s in structures
        ]
        return np.concatenate(found)

    starts: dict[str, Callable[[float], np.ndarray]] = {"uniform": start}
    if len(structures) > 1:
        for n, part in enumerate(structures):
            starts |= {
                f"{way} of part {n}": functools.partial(alone, part, way) for way in part.starts
            }
    return Structures(
        names=names,
        sizes=tuple(n for s in structures for n in s.sizes),
        limits=tuple(n for s in structures for n in s.limits),
        steps=tuple(n for s in structures for n in s.steps),
        unit_costs=tuple(c for s in structures for c in s.unit_costs),
        scores=[s.scores for s in structures],
        build=build,
        starts=starts,
        switch=switch if any(s.switch for s in structures) else None,
    )


def shared_out_units(
    allocation: allocations.Allocation, unit_scores: Mapping[AxisGroup, np.ndarray], sparsity: float
) -> np.ndarray:
    left = numbers_left(unit_scores, min(max(sparsity, 0.0), 1.0), allocation)
    return np.array([group.size - count for group, count in left.items()], np.int64)


def unit_masks(groups: Sequence[AxisGroup], params: PyTree, kept: Sequence[Any]) -> PyTree:
    """A mask tree in which the weights of removed units are gone, wherever they lie.

    Args:
        groups: Groups of units.
        params: The parameters that they were found in.
        kept: For each group a boolean ``(units,)``, True = kept.
    """
    paths, leaves = trees.paths(params), jax.tree.leaves(params)
    found: dict[int, Any] = {}
    for group, units in zip(groups, kept, strict=True):
        for member in group.members:
            n = paths.index(member.path)
            own = along_axis(group, member, leaves[n].shape, units, other=True)
            found[n] = jnp.broadcast_to(found.get(n, True) & own, leaves[n].shape)
    return _put(jax.tree.structure(params), found)


def as_counts(num_pruned: np.ndarray) -> _counts.Count:
    """Integers as two words, for numbers that 32 bits do not hold."""
    return _counts.number(num_pruned.astype(np.uint64), wide=True)


def _each(num_pruned: _counts.Count, length: int) -> list[_counts.Count]:
    return [_counts.Count(num_pruned.high[i], num_pruned.low[i]) for i in range(length)]


def _put(treedef: Any, own: Mapping[int, jax.Array]) -> PyTree:
    return treedef.unflatten(own.get(i, trees.keep_all()) for i in range(treedef.num_leaves))


def _shared_out(
    allocation: allocations.Allocation,
    infos: Sequence[allocations.Leaf],
    sizes: Sequence[int],
    scores: Sequence[Any],
    pattern: patterns.Pattern,
    sparsity: float,
) -> np.ndarray:
    """How many units each structure loses by an allocation."""
    pools, rescale = allocation(infos, sparsity)
    pruned = np.zeros(len(infos), np.int64)
    if all(len(pool.leaves) == 1 for pool in pools) and rescale is None:
        for pool in pools:
            (i,) = pool.leaves
            pruned[i] = _counts.num_pruned(min(max(float(pool.sparsity), 0.0), 1.0), sizes[i])
        return pruned
    units = list(scores)
    if pattern != patterns.Unstructured() or rescale is not None:
        units = [pattern.pool(_selection.value_of(s)) for s in scores]
    if rescale is not None:
        units = [rescale(u) for u in units]
    members = [pool.leaves for pool in pools]
    totals = [sum(infos[i].num_units for i in pool) for pool in members]
    budgets = _counts.nums_pruned([pool.sparsity for pool in pools], totals)
    kept = _selection.keep_largest(units, members, budgets)
    return np.array([mask.size - int(jnp.count_nonzero(mask)) for mask in kept], np.int64)


def _checked(cost: float, name: str) -> float:
    if not (cost > 0 and math.isfinite(cost)):
        raise ValueError(
            f"cost: a weight of {name!r} costs {cost}, which must be a positive number. "
            f"Leave the leaf out with `where`, since pruning it gains nothing, or mend the cost function."
        )
    return float(cost)
