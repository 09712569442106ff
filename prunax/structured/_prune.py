"""Choose which units of which groups to remove, and remove them."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _meshes, trees
from prunax import allocation as allocations
from prunax._counts import num_pruned
from prunax._jaxprs import programs
from prunax._jaxprs.choosing import kernels
from prunax.structured import _cost as costs
from prunax.structured._groups import AxisGroup, analyse, checked_units, found_groups
from prunax.structured._ranking import (
    best_units,
    numbers_left,
    one_factor_an_axis,
    rounded,
    scores_of_units,
)
from prunax.structured._shrink import functions, shrink

__all__ = ["Shrunk", "prunable_groups", "prune_channels"]

PyTree = Any
Kept = dict[AxisGroup, np.ndarray]
Cost = Callable[..., float]


class Shrunk(NamedTuple):
    """A smaller network.

    Attributes:
        fn: ``fn(params, *args)``, the function for the smaller parameters.
        params: The smaller parameters.
        keep: For each group that shrank the units that are left, increasing: what `shrink` and `shrink_function` take,
            for the optimizer state and for the function used in training.
        groups: All groups of the original function.
        whole: For each group that did not shrink why: frozen by what, produced by a leaf that was not selected, another
            factor of the same axis shrank, or nothing was to go.
        removed: Names of the branches that `prune_depth` left out.
        inputs: The example inputs, abstract.
    """

    fn: Callable[..., Any]
    params: PyTree
    keep: Mapping[AxisGroup, np.ndarray]
    groups: tuple[AxisGroup, ...]
    whole: Mapping[AxisGroup, str] = MappingProxyType({})
    removed: tuple[str, ...] = ()
    inputs: tuple[Any, ...] = ()


def prune_channels(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    sparsity: float | None = None,
    scores: PyTree | None = None,
    threshold: float | None = None,
    allocation: allocations.Allocation = allocations.uniform,
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
            left out with `allocation.by_path`. Where an axis is a product of groups (heads times their width, groups of
            a normalisation times the channels of each) one of them shrinks, so that half means half of the axis: the
            one that comes nearest to the sparsity, of equals the slowest, which is heads.
        scores: Larger = keep. Of weights: a tree of the params' structure, from `prunax.scores` or any other, with a
            scalar for a leaf that has no say; see `group_scores`. Or of units: a dict from `AxisGroup.name` to
            ``(units,)``, from `gate_importance` for instance; groups without an entry stay whole. |w| of the leaves
            that `where` selects when left out.
        threshold: In place of a sparsity: keep the units whose score is above it. 0.0 removes just the units that are
            zero, as `proximal_unit_lasso` leaves them, and the output stays what it is.
        allocation: How the sparsity is shared out among groups, from `prunax.allocation`: `uniform` by default;
            `global_ranking` ranks the units of all groups, best as ``partial(global_ranking, normalize=True)``, since
            groups differ in their numbers of weights; `by_path` goes by `AxisGroup.name`, each kind of group at a
            sparsity of its own, the others left whole: ``by_path({"*gate/kernel*": 0.5, "*key/kernel[[]1]": 1 / 3})``
            takes half of each feed-forward layer and one of three heads (in a glob ``[[]`` is a bracket).
        round_to: Keep a multiple of this many units of a group (the nearest, but at least one), for hardware that
            works in lanes. A group that is not as wide as that is left alone.
        min_width: Keep at least this many units of every group.
        where: ``where(path, leaf) -> bool`` selects the leaves whose produced axes may shrink: kernels by default
            (`trees.is_kernel`; where no name tells of one, those that `prunax.kernels` finds). A group shrinks if all
            kernels that produce it are selected, and one at least. What else produces it shrinks along, such as the
            embedding that a residual stream starts at; to shrink what an embedding alone produces, select it:
            ``lambda path, leaf: trees.is_kernel(path, leaf) or "embed" in path``.
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
    analysis = analyse(fn, params, *args)
    groups, shrunk = found_groups(analysis), functions(fn, (analysis, params, args))
    if where is trees.is_kernel and not trees.select(params, where).paths:
        where = kernels(fn, params, *args)
    whole = left_whole(groups, params, where)
    chosen = [group for group in groups if group not in whole]
    if not chosen:
        raise ValueError(_nothing_to_prune(whole, params, where))
    unit_scores = scores_of_units("prune_channels", chosen, params, scores, where)
    for group, units in (protect or {}).items():
        if group in unit_scores:
            unit_scores[group][checked_units("prune_channels", group, units)] = np.inf

    def choose(sparsity: float | None) -> tuple[Kept, dict[AxisGroup, AxisGroup]]:
        return _choose(
            unit_scores, sparsity, threshold, allocation, (round_to, min_width), target is None
        )

    if target is not None:
        # On the host, where cutting arrays to a dozen different sizes compiles nothing.
        host = jax.tree.map(lambda x: _meshes.to_host(x) if _is_host_readable(x) else x, params)
        dense = cost(fn, host, *args)

        def fraction(sparsity: float) -> float:
            kept = choose(sparsity)[0]
            return cost(shrunk(kept), shrink(host, kept), *args) / dense

        sparsity = _reach(target, fraction)
    keep, other_factors = choose(sparsity)
    for group in chosen:
        if group in other_factors:
            whole[group] = f"{other_factors[group].name} shrinks along the same axis"
        elif group not in keep:
            whole[group] = (
                "none of its units was to go" if group in unit_scores else "without scores"
            )
    small, inputs = shrink(params, keep), abstract_inputs(args)
    return Shrunk(shrunk(keep), small, keep, groups, whole, inputs=inputs)


def abstract_inputs(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes and dtypes of inputs; what is no array stays."""
    return jax.tree.map(lambda x: programs.abstract(x) if trees.is_array(x) else x, args)


def prunable_groups(
    groups: Sequence[AxisGroup], params: PyTree, *, where: trees.Where = trees.is_kernel
) -> tuple[AxisGroup, ...]:
    """The groups that may shrink.

    Args:
        groups: From `axis_groups`.
        params: The parameters that they were found in.
        where: ``where(path, leaf) -> bool``.

    Returns:
        Those that are not frozen, and whose kernels among the leaves that produce them are all selected, one at least.
        Other leaves that produce the same units (an embedding table that starts a residual stream, a mask on a kernel)
        have no say unless they are selected.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)))
        >>> [group.name for group in prunax.structured.prunable_groups(groups, params)]
        ['up[1]']
    """
    whole = left_whole(groups, params, where)
    return tuple(group for group in groups if group not in whole)


def left_whole(
    groups: Sequence[AxisGroup], params: PyTree, where: trees.Where
) -> dict[AxisGroup, str]:
    """Why groups may not shrink, for those that may not."""
    selected = set(trees.select(params, where).paths)
    kernels = set(trees.select(params, trees.is_kernel).paths)
    reasons = {}
    for group in groups:
        producers = {member.path for member in group.members if member.role == "produces"}
        if group.frozen:
            reasons[group] = str(group.frozen)
        elif others := sorted((producers & kernels) - selected):
            reasons[group] = f"produced by {', '.join(others)}, which `where` leaves out"
        elif not producers & selected:
            reasons[group] = (
                f"produced by {', '.join(sorted(producers))} alone, which `where` leaves out"
                if producers
                else "produced by no parameter"
            )
    return reasons


def _choose(
    unit_scores: Mapping[AxisGroup, np.ndarray],
    sparsity: float | None,
    threshold: float | None,
    allocation: allocations.Allocation,
    limits: tuple[int, int],
    strict: bool,
) -> tuple[Kept, dict[AxisGroup, AxisGroup]]:
    """The units to keep of each group that shrinks, and for groups that leave it to another factor, that one.

    Raises:
        ValueError: If so much was asked for that fewer units would be left than a group needs, and `strict`.
    """
    other_factors: dict[AxisGroup, AxisGroup] = {}
    if threshold is not None:
        left = {
            group: max(int(np.sum(score > threshold)), 1) for group, score in unit_scores.items()
        }
    else:
        if sparsity is not None:  # an allocation that needs none names groups, each as it is to be
            asked = sparsity

            def removed(group: AxisGroup) -> float:
                count = group.size - num_pruned(asked, group.size)
                return 1 - rounded(count, group, *limits) / group.size

            other_factors = one_factor_an_axis(list(unit_scores), removed, sparsity)
        unit_scores = {g: score for g, score in unit_scores.items() if g not in other_factors}
        left = numbers_left(unit_scores, sparsity, allocation)
    for group, count in left.items():
        if strict and count < group.least and group.least > 1:
            raise ValueError(
                f"prune_channels: {group.name} would keep {count} of {group.size} units, and `top_k` takes "
                f"{group.least} of them: {', '.join(dict.fromkeys(m.path for m in group.members))}. "
                f"Ask for less, or give the group a sparsity of its own with allocation.by_path."
            )
    keep = {}
    for group, score in unit_scores.items():
        # Protected units stay, whatever the budget.
        count = max(rounded(left[group], group, *limits), int(np.isinf(score).sum()))
        if count < group.size:
            keep[group] = best_units(score, count)
    return keep, other_factors


def _reach(target: float, fraction: Callable[[float], float]) -> float:
    """The least sparsity at which the fraction of the cost that is left is within the target."""
    low, high, best = 0.0, 1.0, 1.0
    least = fraction(best)
    if least > target:
        raise ValueError(
            f"prune_channels: target={target} is out of reach. With the fewest units allowed the cost is "
            f"{least:.3f} of the whole. Lower round_to or min_width, or let `where` select more."
        )
    for _ in range(10):
        middle = (low + high) / 2
        if fraction(middle) <= target:
            high = best = middle
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


def _nothing_to_prune(whole: Mapping[AxisGroup, str], params: PyTree, where: trees.Where) -> str:
    """Say of each selected leaf why none of its produced axes may shrink."""
    selected = set(trees.select(params, where).paths)
    if not selected:
        return f"prune_channels: `where` selects no leaf. The leaves are: {', '.join(trees.paths(params)) or 'none'}."
    of_theirs = [group for group in whole if {m.path for m in group.members} & selected]
    made = [
        group
        for group in of_theirs
        if {m.path for m in group.members if m.role == "produces"} & selected
    ]
    reasons = [f"  {group.name}: {whole[group]}" for group in made or of_theirs]
    return (
        "prune_channels: none of the selected leaves produces an axis that may shrink:\n"
        + "\n".join(reasons or ["  they have no axis of two units or more"])
    )
