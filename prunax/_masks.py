"""Masks from parameters, and parameters under masks.

A mask tree has exactly the structure of the params. A prunable leaf has a bool array of its shape, True = the weight
is kept; every other leaf has the scalar True. So ``jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, masks)``
works with no special case.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prunax import _counts, _meshes, _selection, patterns, schedules, trees
from prunax import allocation as allocations

__all__ = ["apply_masks", "compute_masks", "straight_through"]

PyTree = Any
Tree = TypeVar("Tree")  # of which a mask tree has the structure
Score = jax.Array | Partial
Structure = tuple[tuple[tuple[int, ...], ...], Callable[[jax.Array], jax.Array] | None]


def compute_masks(
    params: Tree,
    sparsity: chex.Numeric | None = None,
    *,
    scores: PyTree | None = None,
    threshold: chex.Numeric | None = None,
    allocation: allocations.Allocation = allocations.uniform,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
) -> Tree:
    """Choose which weights to keep.

    Args:
        params: Pytree of arrays: dicts, Flax, NNX, Equinox, Haiku, anything that JAX flattens. Any floating dtype.
        sparsity: Fraction of the prunable weights to remove, in [0, 1]. May be traced: a new value never recompiles.
            A pool of n units loses exactly ``round(sparsity * n)``, halves rounded to even. Leave it out with
            `threshold`, with a pattern that fixes it (`patterns.NM`), or with `allocation.by_path`.
        scores: Tree of the params' structure, larger = keep; |w| where left out. A leaf's score has the leaf's shape,
            or is a scalar, which means that the leaf is never pruned.
        threshold: Keep the units with |score| > threshold instead of a given number: what an L1 penalty drove to zero
            has |w| <= 0.
        allocation: How the sparsity is shared out among leaves, from `prunax.allocation`.
        pattern: Which weights go together or compete, from `prunax.patterns`.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.

    Returns:
        A mask tree of the params' structure: bool arrays, True = kept, for prunable leaves; the scalar True for
        others. Ties go to the lower flat index (kept first), leaves in tree order; the result is the same eager,
        jitted, vmapped and sharded. Masks have the params' sharding.

    Raises:
        ValueError: If the sparsity is outside [0, 1], nothing is selected, the scores do not fit the params, a score
            is NaN (when its value is known: under tracing NaN ranks lowest), or the pattern does not fit a leaf. The
            message names the leaf.
        TypeError: If an argument is of the wrong kind.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"dense": {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]]), "bias": jnp.ones(2)}}
        >>> masks = prunax.compute_masks(params, 0.5)
        >>> masks["dense"]["kernel"].tolist(), masks["dense"]["bias"].tolist()
        ([[True, False], [False, True]], True)

    References:
        Exact selection, ties and rounding are defined in the documentation of `prunax._selection`.
    """
    trees.check_params("compute_masks", params)
    trees.check_where("compute_masks", where)
    _check_request(sparsity, threshold, allocation, pattern)
    chosen = trees.select(params, where)
    if not chosen.indices:
        raise ValueError(
            f"compute_masks: `where` selects no leaf. The leaves are: {', '.join(trees.paths(params)) or 'none'}. "
            f"Pass where=lambda path, leaf: ... that is true for the ones to prune.{_integers(params)}"
        )
    if scores is None:
        _check_dtypes(chosen)
        score_leaves = [_real(leaf) for leaf in chosen.leaves]
    else:
        chosen, score_leaves = _given_scores(scores, chosen)
    patterns.check_fit("compute_masks", pattern, chosen.shapes)
    patterns.check_shards("compute_masks", pattern, chosen)

    if threshold is not None:
        kept = [_above_threshold(score, threshold, pattern=pattern) for score in score_leaves]
    else:
        pools = plan(chosen.shapes, sparsity, allocation=allocation, pattern=pattern)
        if scores is None:  # absolute values are taken within each read, and not stored
            score_leaves = [Partial(_selection.absolute, leaf) for leaf in chosen.leaves]
        kept = select_masks(score_leaves, pools.budgets, pattern=pattern, structure=pools.structure)
    has_nan = [_selection.has_nan(s) for s in score_leaves]
    if not trees.is_traced(*has_nan):
        flags = jax.device_get(has_nan)
        bad = [path for path, flag in zip(chosen.paths, flags, strict=True) if flag]
        if bad:
            raise ValueError(
                f"compute_masks: the scores of {', '.join(map(repr, bad))} contain NaN, which cannot be ranked. "
                f"Look for the step that made them, or replace them with jnp.nan_to_num."
            )
    kept = [_meshes.shard_like(mask, leaf) for mask, leaf in zip(kept, chosen.leaves, strict=True)]
    # A buffer for each scalar, so that the tree can be donated.
    return chosen.put(kept, jax.tree.map(lambda _: trees.keep_all(), params))


def apply_masks(params: Tree, masks: PyTree) -> Tree:
    """Set pruned weights to zero.

    Args:
        params: Pytree of arrays. Leaves that are not arrays pass through.
        masks: A mask tree of the same structure: bool, True = kept; each mask has its leaf's shape or is a scalar.

    Returns:
        The params with exactly 0.0 where the mask is False, dtypes kept. Weights are replaced, not multiplied: a
        pruned NaN or infinity becomes zero as well.

    Raises:
        ValueError: If the structures or shapes differ, naming the leaf.
        TypeError: If a mask is not boolean, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.apply_masks({"kernel": jnp.array([1.0, jnp.nan])}, {"kernel": jnp.array([True, False])})
        {'kernel': Array([1., 0.], dtype=float32)}
    """
    return _map_masked("apply_masks", _zero, params, masks)


def straight_through(params: Tree, masks: PyTree) -> Tree:
    """Mask in the forward pass, and let the gradient through to every weight.

    Args:
        params: Pytree of arrays. Leaves that are not arrays pass through.
        masks: A mask tree of the same structure, True = kept.

    Returns:
        The masked params. Differentiated, the function is the identity: pruned weights get the gradient that they
        would have had at zero, so that they can come back.

    Raises:
        ValueError: If the structures or shapes differ, naming the leaf.
        TypeError: If a mask is not boolean, naming the leaf.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> w, mask = jnp.array([2.0, 3.0]), jnp.array([True, False])
        >>> prunax.straight_through(w, mask).tolist()
        [2.0, 0.0]
        >>> jax.grad(lambda w: jnp.sum(5.0 * prunax.straight_through(w, mask)))(w).tolist()
        [5.0, 5.0]

    References:
        Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013, arXiv:1308.3432.
    """
    return _map_masked("straight_through", _zero_straight_through, params, masks)


class Plan(NamedTuple):
    """What an allocation and a pattern make of a sparsity.

    Attributes:
        budgets: For each pool the number of units that it loses (each slice of it, where the pattern compares along an
            axis): an int or a `_counts.Count`. Values that jit may trace.
        sizes: For each pool the number of its units (of each slice's), static.
        pools: For each pool the indices of its leaves.
        rescale: What the allocation does to unit scores before they are ranked, or None.
    """

    budgets: list[Any]
    sizes: list[int]
    pools: tuple[tuple[int, ...], ...]
    rescale: Callable[[jax.Array], jax.Array] | None

    @property
    def structure(self) -> Structure:
        """The hashable part, for a static argument of jit."""
        return self.pools, self.rescale


def plan(
    leaves: Sequence[tuple[str, tuple[int, ...]]],
    sparsity: chex.Numeric | None,
    *,
    allocation: allocations.Allocation,
    pattern: patterns.Pattern,
) -> Plan:
    """Ask the allocation for pools and turn their sparsities into numbers of units.

    Args:
        leaves: ``(path, shape)`` of each prunable leaf.
        sparsity: None, a number, or a traced scalar.
        allocation: The allocation.
        pattern: The pattern.

    Returns:
        The `Plan`.

    Raises:
        ValueError: If the pattern compares along an axis and the allocation ranks across leaves.
    """
    if sparsity is None:
        sparsity = pattern.implied_sparsity
    infos = [
        allocations.Leaf(path, shape, math.prod(pattern.unit_shape(shape)))
        for path, shape in leaves
    ]
    pools, rescale = allocation(infos, sparsity)
    members, sparsities = tuple(pool.leaves for pool in pools), [pool.sparsity for pool in pools]
    if pattern.compare_axis is None:
        sizes = [sum(infos[i].num_units for i in pool) for pool in members]
        return Plan(_counts.nums_pruned(sparsities, sizes), sizes, members, rescale)
    if rescale is not None or any(len(pool) != 1 for pool in members):
        raise ValueError(
            f"{pattern} compares weights within each slice of a leaf, so there is nothing to rank across leaves. "
            f"Use allocation.uniform, allocation.erdos_renyi or allocation.by_path with it."
        )
    sizes = [pattern.unit_shape(infos[i].shape)[pattern.compare_axis] for (i,) in members]
    budgets = _counts.nums_pruned(sparsities, sizes)
    if pattern.implied_sparsity is not None:
        paths = [infos[i].path for (i,) in members]
        budgets = list(map(functools.partial(_at_most, pattern), budgets, sparsities, sizes, paths))
    return Plan(budgets, sizes, members, rescale)


def select_masks(
    scores: Sequence[Score],
    budgets: Sequence[Any],
    *,
    pattern: patterns.Pattern,
    structure: Structure,
) -> list[jax.Array]:
    """Rank the scores of the prunable leaves within budgets.

    Args:
        scores: Floating-point arrays, one a prunable leaf, or ``Partial(f, *arrays)`` of an elementwise f that makes
            them (see `_selection.keep_largest`).
        budgets: For each pool how many units it loses, like `Plan.budgets`.
        pattern: The pattern.
        structure: `Plan.structure`, static.

    Returns:
        One bool mask a leaf, of its shape, True = kept.
    """
    pools, rescale = structure
    budgets = [_counts.as_count(budget) for budget in budgets]
    if pattern == patterns.Unstructured() and rescale is None:
        return _selection.keep_largest(scores, pools, budgets)
    # Leaf by leaf, since leaves may be bound to different devices.
    if pattern.compare_axis is None:
        units = [_unit_scores(score, pattern=pattern, rescale=rescale) for score in scores]
        kept = _selection.keep_largest(units, pools, budgets)
        return [_expanded(k, score, pattern=pattern) for k, score in zip(kept, scores, strict=True)]
    pruned: dict[int, Any] = {i: budget for (i,), budget in zip(pools, budgets, strict=True)}
    return [_slices_kept(score, pruned.get(i), pattern=pattern) for i, score in enumerate(scores)]


@functools.partial(jax.jit, static_argnames=("pattern", "rescale"))
def _unit_scores(score: Score, *, pattern: patterns.Pattern, rescale: Any) -> jax.Array:
    units = pattern.pool(_selection.value_of(score))
    return units if rescale is None else rescale(units)


def _shaped(score: Score) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(_selection.value_of, score)


@functools.partial(jax.jit, static_argnames="pattern")
def _slices_kept(
    score: Score, pruned: _counts.Count | None, *, pattern: patterns.Pattern
) -> jax.Array:
    """The mask of a leaf under a pattern that compares slices: of each, that many units are pruned."""
    shape = _shaped(score).shape
    if pruned is None:
        return _expanded(jnp.ones(pattern.unit_shape(shape), jnp.bool_), score, pattern=pattern)
    # Such a pattern only rearranges, so that what the score is computed of can be.
    units = jax.tree.map(lambda x: pattern.pool(x) if jnp.shape(x) == shape else x, score)
    # A slice is shorter than 2**32.
    kept = _selection.keep_largest_along(units, pattern.compare_axis, pruned.low)
    return _expanded(kept, score, pattern=pattern)


@functools.partial(jax.jit, static_argnames="pattern")
def _expanded(kept: jax.Array, score: Score, *, pattern: patterns.Pattern) -> jax.Array:
    leaf = _selection.value_of(score)
    return _meshes.shard_like(pattern.expand(kept, leaf.shape), leaf)


def _at_most(pattern: patterns.Pattern, budget: Any, sparsity: Any, length: int, path: str) -> Any:
    """The budget, or what the pattern prunes at most where that is traced; an error where it is not."""
    most = _counts.num_pruned(pattern.implied_sparsity, length)
    if isinstance(budget, _counts.Count):
        return _counts.Count(budget.high, jnp.minimum(budget.low, jnp.uint32(most)))
    assert isinstance(most, int)
    if budget > most:
        raise ValueError(
            f"{pattern} prunes at most {pattern.implied_sparsity:g} of {path!r}, got sparsity {sparsity:g}. "
            f"Leave the sparsity out, or choose another pattern."
        )
    return budget


@functools.partial(jax.jit, static_argnames="pattern")
def _above_threshold(
    score: jax.Array, threshold: jax.Array, *, pattern: patterns.Pattern
) -> jax.Array:
    units = pattern.pool(jnp.abs(score))
    # At least in float32: rounded to a narrow dtype the threshold would swallow scores next to it.
    dtype = trees.wide_dtype(units.dtype)
    # By their bits, as everywhere: compared as floats, a backend may take denormal numbers for zeros.
    kept = _selection.sort_keys(units.astype(dtype)) > _selection.sort_keys(
        jnp.asarray(threshold, dtype)
    )
    return _meshes.shard_like(pattern.expand(kept, score.shape), score)


def _check_request(
    sparsity: chex.Numeric | None,
    threshold: chex.Numeric | None,
    allocation: allocations.Allocation,
    pattern: patterns.Pattern,
) -> None:
    patterns.check_pattern("compute_masks", pattern)
    allocations.check_allocation("compute_masks", allocation)
    fixed = pattern.implied_sparsity is not None or not allocations.needs_sparsity(allocation)
    if threshold is not None:
        if sparsity is not None:
            raise ValueError("compute_masks: got both sparsity and threshold. Pass one of them.")
        if pattern.compare_axis is not None:
            raise ValueError(
                f"compute_masks: {pattern} keeps a given number of weights and takes no threshold."
            )
        if not isinstance(threshold, int | float) and not (
            trees.is_array(threshold) and threshold.ndim == 0
        ):
            raise TypeError(f"compute_masks: threshold must be one number, got {threshold!r}.")
        if not trees.is_traced(threshold) and not float(threshold) >= 0:
            raise ValueError(
                f"compute_masks: threshold must be a number of at least 0, got {threshold}."
            )
    elif sparsity is None:
        if not fixed:
            raise ValueError("compute_masks: pass a sparsity in [0, 1], or threshold=.")
    elif not trees.is_traced(sparsity):
        schedules.check_sparsity("compute_masks", sparsity)
    elif jnp.ndim(sparsity):
        raise TypeError(
            f"compute_masks: sparsity must be a scalar, got shape {jnp.shape(sparsity)}. Use jax.vmap for several."
        )


def _integers(params: PyTree) -> str:
    """Say which leaves hold whole numbers, where nothing could be pruned."""
    kinds = [
        f"{path!r} is {leaf.dtype}"
        for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True)
        if trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.integer)
    ]
    if not kinds:
        return ""
    return f" Integers are never pruned: {', '.join(kinds)}. Prune the weights before they are quantised."


def _real(leaf: Any) -> Any:
    """A leaf whose numbers can be compared: the modulus of complex ones."""
    return jnp.abs(leaf) if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else leaf


def _check_dtypes(chosen: trees.Selection) -> None:
    for path, leaf in zip(chosen.paths, chosen.leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"compute_masks: `where` selects {path!r}, which is {leaf.dtype} and has no magnitude to rank. "
                f"Leave it out with `where`, or pass floating-point scores=."
            )
        if not trees.has_zero(leaf.dtype):
            raise TypeError(
                f"compute_masks: `where` selects {path!r}, which is {leaf.dtype}: a dtype of scales without a zero to "
                f"set weights to. Leave it out with `where`."
            )


def _given_scores(scores: PyTree, chosen: trees.Selection) -> tuple[trees.Selection, list[Any]]:
    if callable(scores) and not any(map(trees.is_array, jax.tree.leaves(scores))):
        raise TypeError(
            f"compute_masks: scores must be a tree, got {scores!r}. Call it: scores=score(params, grads)."
        )
    ranked, score_leaves = scored("compute_masks", "scores", scores, chosen)
    if not ranked.indices:
        raise ValueError(
            f"compute_masks: every selected leaf has a scalar score, which means never pruned: "
            f"{', '.join(chosen.paths)}. Score at least one of them by weight."
        )
    return ranked, score_leaves


def scored(
    function: str, noun: str, scores: PyTree, chosen: trees.Selection
) -> tuple[trees.Selection, list[Any]]:
    """Leave out the leaves whose score is a scalar, which means that they are never pruned.

    Args:
        function: The public function that ranks, named in errors.
        noun: What the scores are, named in errors.
        scores: Tree of the params' structure.
        chosen: The prunable leaves.

    Returns:
        The leaves that are left, and a score of the leaf's shape for each of them.

    Raises:
        ValueError: Naming the leaf, if its score has another shape.
        TypeError: Naming the leaf, if its score is not floating-point.
    """
    score_leaves = chosen.take(function, noun, scores)
    ranked = [
        n for n, leaf in enumerate(chosen.leaves) if np.shape(score_leaves[n]) or not leaf.ndim
    ]
    for n in ranked:
        path, leaf, score = chosen.paths[n], chosen.leaves[n], score_leaves[n]
        if np.shape(score) != leaf.shape:
            raise ValueError(
                f"{function}: the {noun} of {path!r} have shape {np.shape(score)}, the leaf has {leaf.shape}. "
                f"Score every weight, or give the leaf a scalar score to leave it whole."
            )
        if not (trees.is_array(score) and jnp.issubdtype(score.dtype, jnp.floating)):
            raise TypeError(
                f"{function}: the {noun} of {path!r} must be floating-point, got "
                f"{getattr(score, 'dtype', type(score))}. Convert them with .astype(jnp.float32)."
            )
    return chosen.only(ranked), [score_leaves[n] for n in ranked]


def _map_masked(
    function: str, mask_leaf: Callable[[Any, Any], Any], params: PyTree, masks: PyTree
) -> PyTree:
    mask_leaves = trees.check_masks(function, params, masks)
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        mask_leaf(leaf, mask) if _is_number(leaf) else leaf
        for leaf, mask in zip(leaves, mask_leaves, strict=True)
    )


def _is_number(leaf: Any) -> bool:
    return trees.is_array(leaf) and (
        jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
    )


def _zero(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _pass_tangent(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return _zero(*primals), tangents[0]


_zero_straight_through = jax.custom_jvp(_zero)
_zero_straight_through.defjvp(_pass_tangent)
