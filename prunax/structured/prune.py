"""Choose which units of which groups to remove, and remove them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import allocation as allocations
from prunax import masks, trees
from prunax.structured import cost as costs
from prunax.structured.groups import AxisGroup, axis_groups, checked_units
from prunax.structured.shrink import shrink, shrink_function

__all__ = ["Shrunk", "group_scores", "prunable_groups", "prune_channels"]

PyTree = Any
Cost = Callable[..., float]


class Shrunk(NamedTuple):
    """A smaller network.

    Attributes:
        fn: ``fn(params, *args)``, the function for the smaller parameters.
        params: The smaller parameters.
        keep: For each group that shrank the units that are left, increasing: what `shrink` and `shrink_function` take,
            for the optimizer state and for the function used in training.
        groups: All groups of the original function.
    """

    fn: Callable[..., Any]
    params: PyTree
    keep: Mapping[AxisGroup, np.ndarray]
    groups: tuple[AxisGroup, ...]


def prune_channels(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    sparsity: float | None = None,
    scores: PyTree | None = None,
    threshold: float | None = None,
    allocation: Any = allocations.uniform,
    round_to: int = 1,
    min_width: int = 1,
    where: trees.Where = trees.is_kernel,
    protect: Mapping[AxisGroup, Any] | None = None,
    target: float | None = None,
    cost: Cost = costs.count_flops,
) -> Shrunk:
    """Make a network smaller by removing its least important channels, heads and features.

    Args:
        fn: ``fn(params, *args)``, as for `axis_groups`.
        params: Pytree of arrays.
        *args: Example inputs.
        sparsity: Fraction of the units to remove, in [0, 1]: of each group or of all, as the allocation says. May be
            left out with `allocation.by_path`.
        scores: Tree of the params' structure, larger = keep, from `prunax.scores` or any other; a scalar for a leaf
            that has no say. |w| of the leaves that `where` selects when left out. See `group_scores`.
        threshold: In place of a sparsity: keep the units whose score is above it. 0.0 removes just the units that are
            zero, as `proximal_group_lasso` leaves them, and the output stays what it is.
        allocation: How the sparsity is shared out among groups, from `prunax.allocation`: `uniform` by default;
            `global_ranking` ranks the units of all groups, best as ``partial(global_ranking, normalize=True)``, since
            groups differ in their numbers of weights; `by_path` goes by `AxisGroup.name`, each kind of group at a
            sparsity of its own, the others left whole: ``by_path({"*gate/kernel*": 0.5, "*key/kernel[[]1]": 1 / 3})``
            takes half of each feed-forward layer and one of three heads (in a glob ``[[]`` is a bracket).
        round_to: Keep a multiple of this many units of a group (the nearest, but at least one), for hardware that
            works in lanes. A group that is not as wide as that is left alone.
        min_width: Keep at least this many units of every group.
        where: ``where(path, leaf) -> bool`` selects the leaves whose produced axes may shrink. A group shrinks if all
            leaves that produce it are selected. By default those are kernels (`trees.is_kernel`), so that a residual
            stream that starts at an embedding stays as wide as it is.
        protect: Units that are kept whatever their scores, for some groups: indices or a boolean mask, True = kept.
        target: In place of a sparsity: remove units until the cost is at most this fraction of the whole network's.
            The least sparsity that does is found by bisection.
        cost: What `target` counts, ``cost(fn, params, *args) -> float``: `count_flops`, `count_parameters`, `latency`.

    Returns:
        The `Shrunk` network.

    Raises:
        ValueError: If more than one of sparsity, threshold and target is given, or none where one is needed; if one is
            out of range or out of reach; if no group may shrink, saying which are frozen by what; if the scores do not
            fit or are NaN.

    Examples:
        >>> import jax.numpy as jnp, numpy as np, prunax
        >>> params = {"up": jnp.arange(1.0, 65).reshape(4, 16), "down": jnp.ones((16, 3))}
        >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> small = prunax.structured.prune_channels(fn, params, jnp.ones((2, 4)), sparsity=0.75)
        >>> small.params["up"].shape, [units.tolist() for units in small.keep.values()]
        ((4, 4), [[12, 13, 14, 15]])
        >>> small.fn(small.params, jnp.ones((2, 4))).shape
        (2, 3)

    References:
        Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710; Fang et al., DepGraph: Towards Any
        Structural Pruning, 2023, arXiv:2301.12900 (scores summed over a group).
    """
    _check_request(sparsity, threshold, target, round_to, min_width)
    groups = axis_groups(fn, params, *args)
    chosen = prunable_groups(groups, params, where=where)
    if not chosen:
        raise ValueError(_nothing_to_prune(groups, params, where))
    unit_scores = ranked_units("prune_channels", chosen, params, scores, where)
    for group, units in (protect or {}).items():
        if group in unit_scores:
            unit_scores[group][checked_units("prune_channels", group, units)] = np.inf

    def choose(sparsity: float | None) -> dict[AxisGroup, np.ndarray]:
        limits = (round_to, min_width)
        return _choose(unit_scores, sparsity, threshold, allocation, limits)

    if target is not None:
        keep = _reach(target, cost, fn, params, args, choose)
    else:
        keep = choose(sparsity)
    return Shrunk(shrink_function(fn, keep), shrink(params, keep), keep, groups)


def prunable_groups(
    groups: Sequence[AxisGroup], params: PyTree, *, where: trees.Where = trees.is_kernel
) -> tuple[AxisGroup, ...]:
    """The groups that may shrink.

    Args:
        groups: From `axis_groups`.
        params: The parameters that they were found in.
        where: ``where(path, leaf) -> bool``.

    Returns:
        Those that are not frozen and that are produced by selected leaves, and by no others.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)))
        >>> [group.name for group in prunax.structured.prunable_groups(groups, params)]
        ['up[1]']
    """
    selected = set(trees.select(params, where).paths)
    return tuple(group for group in groups if not group.frozen and _is_produced_by(group, selected))


def _is_produced_by(group: AxisGroup, selected: set[str]) -> bool:
    producers = {member.path for member in group.members if member.role == "produces"}
    return bool(producers) and producers <= selected


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
            arrays[path] = np.asarray(jax.device_get(score)).astype(np.float64)
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


def ranked_units(
    function: str,
    groups: Sequence[AxisGroup],
    params: PyTree,
    scores: PyTree | None,
    where: trees.Where,
) -> dict[AxisGroup, np.ndarray]:
    """The scores of units: of the given scores, or |w| of the selected leaves. NaN is refused."""
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
    return chosen.put([np.abs(np.asarray(jax.device_get(x))) for x in chosen.leaves], nothing)


def _choose(
    unit_scores: Mapping[AxisGroup, np.ndarray],
    sparsity: float | None,
    threshold: float | None,
    allocation: Any,
    limits: tuple[int, int],
) -> dict[AxisGroup, np.ndarray]:
    """The units to keep of each group that shrinks."""
    names = {group.name: jnp.asarray(s, jnp.float32) for group, s in unit_scores.items()}
    kept = masks.compute_masks(
        names,
        sparsity,
        scores=names,
        threshold=threshold,
        allocation=allocation,
        where=lambda path, leaf: True,
    )
    keep = {}
    for group, score in unit_scores.items():
        mask = np.broadcast_to(jax.device_get(kept[group.name]), (group.size,))
        count = _rounded(int(mask.sum()), group.size, *limits)
        # Protected units stay, whatever the budget.
        count = max(count, int(np.isinf(score).sum()))
        if count < group.size:
            # Equal scores: the lower index stays, as everywhere.
            keep[group] = np.sort(np.argsort(-score, kind="stable")[:count])
    return keep


def _rounded(count: int, size: int, round_to: int, min_width: int) -> int:
    floor = min(min_width, size)
    if round_to > 1:
        count = max(round_to, round(count / round_to) * round_to)
        floor = -(-floor // round_to) * round_to
    return min(max(count, floor), size)


def _reach(
    target: float,
    cost: Cost,
    fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    choose: Callable[[float], dict[AxisGroup, np.ndarray]],
) -> dict[AxisGroup, np.ndarray]:
    """The choice of least sparsity whose cost is within the target."""
    # On the host, where cutting arrays to a dozen different sizes compiles nothing.
    params = jax.tree.map(lambda x: np.asarray(x) if _is_host_readable(x) else x, params)
    whole = cost(fn, params, *args)

    def fraction(keep: dict[AxisGroup, np.ndarray]) -> float:
        return cost(shrink_function(fn, keep), shrink(params, keep), *args) / whole

    low, high, best = 0.0, 1.0, choose(1.0)
    least = fraction(best)
    if least > target:
        raise ValueError(
            f"prune_channels: target={target} is out of reach. With the fewest units allowed the cost is "
            f"{least:.3f} of the whole. Lower round_to or min_width, or let `where` select more."
        )
    for _ in range(10):
        middle = (low + high) / 2
        keep = choose(middle)
        if fraction(keep) <= target:
            high, best = middle, keep
        else:
            low = middle
    return best


def _is_host_readable(x: Any) -> bool:
    return trees.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _check_request(
    sparsity: float | None,
    threshold: float | None,
    target: float | None,
    round_to: int,
    min_width: int,
) -> None:
    if sum(value is not None for value in (sparsity, threshold, target)) > 1:
        raise ValueError(
            "prune_channels: pass only one of sparsity=, threshold= and target=. "
            "The target finds the sparsity."
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(
            f"prune_channels: threshold must be a number of at least 0, got {threshold}."
        )
    for name, value in (("sparsity", sparsity), ("target", target)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(
                f"prune_channels: {name} must lie in [0, 1], got {value}. Pass 0.5 for one half."
            )
    for name, value in (("round_to", round_to), ("min_width", min_width)):
        if value < 1:
            raise ValueError(f"prune_channels: {name} must be at least 1, got {value}.")


def _nothing_to_prune(groups: Sequence[AxisGroup], params: PyTree, where: trees.Where) -> str:
    """Say of each selected leaf why none of its produced axes may shrink."""
    selected = set(trees.select(params, where).paths)
    if not selected:
        return f"prune_channels: `where` selects no leaf. The leaves are: {', '.join(trees.paths(params)) or 'none'}."
    reasons = []
    for group in groups:
        produced = {m.path for m in group.members if m.role == "produces"}
        if produced & selected:
            others = ", ".join(sorted(produced - selected))
            why = group.frozen or f"produced as well by {others}, which `where` leaves out"
            reasons.append(f"  {group.name}: {why}")
    return (
        "prune_channels: none of the selected leaves produces an axis that may shrink:\n"
        + "\n".join(reasons or ["  they produce no axis at all"])
    )
