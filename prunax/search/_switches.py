"""Parts that masks do not remove: residual branches and experts, as structures of a search."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _counts, _selection, trees
from prunax import allocation as allocations
from prunax.search._structures import Structures, shared_out_units, unit_masks
from prunax.structured import (
    AxisGroup,
    count_parameters,
    prunable_groups,
    prune_depth,
    shrink,
    shrink_function,
)
from prunax.structured._depth import Switches, candidates
from prunax.structured._mixtures import never_chosen
from prunax.structured._ranking import best_units, scores_of_units
from prunax.structured._residuals import Branch, residuals

__all__ = ["branches", "experts"]

PyTree = Any
NetworkCost = Callable[..., float]


def branches(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    blocks: str | None = None,
    cost: NetworkCost = count_parameters,
) -> Structures:
    """Let a search leave out residual branches, or whole blocks.

    Under the search's loss an addition that is gone is not computed with zeros, but switched: ``x`` passes. The result
    goes to `structured.prune_depth`: ``remove=[name for name, gone in found.sparsities.items() if gone]``.

    Args:
        fn: ``fn(params, *args)``, as for `structured.branches`.
        params: Pytree of arrays.
        *args: Example inputs.
        blocks: A glob of paths, as for `structured.prune_depth`: what lies under each goes together.
        cost: ``cost(fn, params, *args) -> float``: `structured.count_parameters`, `count_flops`, `count_bytes`,
            `count_cache_bytes`, `latency`, or any other. A branch costs what the network costs more with it.

    Returns:
        The `Structures`, one unit each, named like the branches or blocks.

    Raises:
        ValueError: If there is no branch, a glob matches parts of one, or one costs nothing.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = [{"up": jnp.full((2, 4), s), "down": jnp.ones((4, 2))} for s in (0.1, 2.0)]
        >>> def fn(params, x):
        ...     for p in params:
        ...         x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        ...     return x
        >>> x = jnp.ones((1, 2))
        >>> structures = prunax.search.branches(fn, params, x)
        >>> loss_fn = lambda params: jnp.mean((fn(params, x) - 9) ** 2)
        >>> prunax.search.allocate(loss_fn, params, 0.5, structures=structures).sparsities
        {'0': 1.0, '1': 0.0}
    """
    known = residuals(fn, params, args)
    found = candidates("branches", known, blocks)
    if not found:
        raise ValueError("branches: the function has no residual branch.")
    dense = cost(fn, params, *args)
    unit_costs = []
    for name, inside in found.items():
        small = prune_depth(fn, params, *args, remove=[branch.name for branch in inside])
        saved = dense - cost(small.fn, small.params, *args)
        unit_costs.append(_positive("branches", name, saved))
    names = tuple(found)
    block_of = {b.name: i for i, inside in enumerate(found.values()) for b in inside}
    treedef, paths = jax.tree.structure(params), trees.paths(params)
    shapes = [np.shape(x) for x in jax.tree.leaves(params)]

    def build(scores: Any, num_pruned: _counts.Count) -> PyTree:
        gone = num_pruned.low > 0
        leaves = [trees.keep_all()] * len(paths)
        for i, inside in enumerate(found.values()):
            for path, rows in _own_rows(inside):
                n = paths.index(path)
                whole = jnp.broadcast_to(leaves[n], shapes[n])
                here = np.zeros(shapes[n], bool)
                here[rows] = True
                leaves[n] = whole & ~(jnp.asarray(here) & gone[i])
        return treedef.unflatten(leaves)

    def switch(loss_fn: Any, scores: Any, num_pruned: _counts.Count) -> Callable[[PyTree], Any]:
        def loss(params: PyTree) -> Any:
            mine = residuals(loss_fn, params, ())
            switches = Switches(mine)
            open_ = [
                num_pruned.low[block_of[b.name]] == 0 if b.name in block_of else True
                for b in mine.branches
            ]
            missing = sorted(set(block_of) - {b.name for b in mine.branches})
            if missing:
                raise ValueError(
                    f"branches: the loss has no residual branch {missing[0]!r}. Its branches are: "
                    f"{', '.join(b.name for b in mine.branches) or 'none'}."
                )
            leaves = jax.tree.leaves(params)
            return switches.run(
                jnp.stack(list(map(jnp.asarray, open_))), [leaves[i] for i in mine.traced.arrays]
            )[0]

        return loss

    def first(sparsity: float) -> np.ndarray:
        return np.arange(len(names)) < round(sparsity * len(names))

    return Structures(
        names=names,
        sizes=(1,) * len(names),
        limits=(1,) * len(names),
        steps=(1,) * len(names),
        unit_costs=tuple(unit_costs),
        scores=(),
        build=build,
        starts={"uniform": lambda sparsity: first(sparsity).astype(np.int64)},
        switch=switch,
    )


def _own_rows(inside: Sequence[Branch]) -> list[tuple[str, Any]]:
    """Path of each leaf that branches own, and which rows of it."""
    found = []
    for leaf in (leaf for branch in inside for leaf in branch.leaves):
        path, bracket, row = leaf.partition("[")
        found.append((path, int(row[:-1]) if bracket else slice(None)))
    return found


def experts(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    groups: Sequence[AxisGroup],
    scores: PyTree | None = None,
    where: trees.Where = trees.is_kernel,
    cost: NetworkCost = count_parameters,
) -> Structures:
    """Let a search choose how many experts each mixture keeps.

    Under the search's loss an expert that is gone is never chosen: its logit is minus infinity. The result goes to
    `structured.prune_channels` through `allocation.by_path`, with the same scores.

    Args:
        fn: ``fn(params, *args)``, in which the groups were found.
        params: Pytree of arrays.
        *args: Example inputs.
        groups: From `structured.axis_groups`; those of experts (`AxisGroup.numbered`) count.
        scores: What ranks the experts of a mixture, larger = keep, as for `structured.prune_channels`: a dict by name,
            mostly from `structured.expert_importance`.
        where: ``where(path, leaf) -> bool`` selects the leaves whose produced axes may shrink.
        cost: ``cost(fn, params, *args) -> float``, as for `branches`. An expert costs the mean of what the network
            costs less without those that may go.

    Returns:
        The `Structures`, named by `AxisGroup.name`. As many experts stay as a token takes.

    Raises:
        ValueError: If there are no experts that may go, scores do not fit, or an expert costs nothing.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> params = {"router": jnp.eye(4), "up": jnp.ones((4, 4, 2))}
        >>> def fn(params, x):
        ...     chosen = jnp.argmax(x @ params["router"], -1)
        ...     return jnp.einsum("td,tdf->tf", x, params["up"][chosen])
        >>> x = jnp.ones((3, 4))
        >>> groups = prunax.structured.axis_groups(fn, params, x)
        >>> structures = prunax.search.experts(fn, params, x, groups=groups)
        >>> structures.names, structures.limits, structures.unit_costs
        (('router[1]',), (3,), (12.0,))
    """
    chosen = [g for g in prunable_groups(groups, params, where=where) if g.numbered]
    chosen = [g for g in chosen if g.size > g.least]
    if not chosen:
        raise ValueError(
            f"experts: no group is one of experts that may go. The groups are: {', '.join(g.name for g in groups)}."
        )
    unit_scores = scores_of_units("experts", chosen, params, scores, where)
    chosen = [g for g in chosen if g in unit_scores]
    unit_scores = {g: unit_scores[g] for g in chosen}
    ranked = [jnp.asarray(unit_scores[g], jnp.float32) for g in chosen]
    dense = cost(fn, params, *args)
    unit_costs = []
    for group in chosen:
        keep = {group: best_units(unit_scores[group], group.least)}
        saved = dense - cost(shrink_function(fn, keep), shrink(params, keep), *args)
        unit_costs.append(_positive("experts", group.name, saved / (group.size - group.least)))
    pools = tuple((i,) for i in range(len(chosen)))

    def kept(scores: Any, num_pruned: _counts.Count) -> dict[str, Any]:
        counts = [_counts.Count(num_pruned.high[i], num_pruned.low[i]) for i in range(len(chosen))]
        found = _selection.keep_largest(scores, pools, counts)
        return {group.name: mask for group, mask in zip(chosen, found, strict=True)}

    def build(scores: Any, num_pruned: _counts.Count) -> PyTree:
        return unit_masks(chosen, params, list(kept(scores, num_pruned).values()))

    def switch(loss_fn: Any, scores: Any, num_pruned: _counts.Count) -> Callable[[PyTree], Any]:
        open_ = kept(scores, num_pruned)
        return lambda params: never_chosen(loss_fn, params, chosen, open_)

    return Structures(
        names=tuple(g.name for g in chosen),
        sizes=tuple(g.size for g in chosen),
        limits=tuple(g.size - g.least for g in chosen),
        steps=(1,) * len(chosen),
        unit_costs=tuple(unit_costs),
        scores=ranked,
        build=build,
        starts={"uniform": functools.partial(shared_out_units, allocations.uniform, unit_scores)},
        switch=switch,
    )


def _positive(function: str, name: str, saved: float) -> float:
    if not (saved > 0 and np.isfinite(saved)):
        raise ValueError(
            f"{function}: leaving out {name!r} saves {saved} of the cost, so that a budget cannot count it. "
            f"Choose a cost that it has a part in, or measure again, where it is a time."
        )
    return float(saved)
