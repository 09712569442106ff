"""Pruning during training, as a wrapper of any optax optimizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunax import allocation as allocations
from prunax import masks as mask_functions
from prunax import packing, patterns, schedules, trees
from prunax import scores as score_functions

__all__ = ["PruneState", "prune", "unpack_masks"]

PyTree = Any


class PruneState(NamedTuple):
    """State of `prune`. Arrays only, so that it checkpoints like any optax state.

    Attributes:
        count: int32 scalar, number of updates so far.
        masks: Mask tree of the params' structure, True = kept; uint8 leaves of bit planes where `packed`
            (see `unpack_masks`).
        inner_state: State of the wrapped optimizer.
        skipped_updates: int32 scalar, mask updates skipped because a score was NaN.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] - as in optax's states
    masks: PyTree
    inner_state: Any
    skipped_updates: jax.Array


def prune(
    inner: optax.GradientTransformation,
    sparsity: Any,
    *,
    score: Any = score_functions.magnitude,
    allocation: Any = allocations.uniform,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
    key: jax.Array | None = None,
    mask_gradients: bool = True,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it trains a pruned model.

    Nothing else in the training loop changes. After ``optax.apply_updates(params, updates)`` the pruned weights are
    exactly 0.0, whatever momentum, weight decay or adaptive step the inner optimizer has: its updates are replaced by
    ``-param`` where the mask is False. Use it as the outermost transformation of a chain.

    Args:
        inner: Any optax transformation. Extra arguments of `update` are forwarded to it.
        sparsity: A number in [0, 1]: masks are computed at the first step and then fixed; or a schedule from
            `prunax.schedules`; None for what the pattern fixes (`patterns.NM`).
        score: ``score(params, grads) -> scores``, from `prunax.scores`, called at mask updates with the dense
            gradients. With `key` it is called as ``score(params, grads, key=key)``, the same key each time.
        allocation: How the sparsity is shared out among leaves, from `prunax.allocation`.
        pattern: Which weights go together or compete, from `prunax.patterns`.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.
        key: A JAX random key for scores that need one (`scores.random`).
        mask_gradients: Hide pruned weights from the inner optimizer: it sees zero gradients and zero params there, so
            that global-norm clipping, moments and weight decay are those of the sparse model. False lets moments go on
            accumulating at pruned weights.
        packed: Keep masks in one bit a weight in place of one byte.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState`. ``init`` makes masks of True; it takes
        any tree, a tree with nothing to prune included.

    Raises:
        ValueError: If the sparsity is outside [0, 1]; from `update`, if params is missing, or the pattern does not
            fit a leaf, naming it. A NaN score is no error in the compiled step: the masks stay as they are and
            `skipped_updates` grows by one.
        TypeError: If the sparsity is neither a number nor a schedule.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prunax
        >>> params = {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]])}
        >>> tx = prunax.prune(optax.adam(0.1), 0.5)
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> (params["kernel"] == 0).tolist(), state.masks["kernel"].tolist()
        ([[False, True], [True, False]], [[True, False], [False, True]])

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878.
    """
    inner = optax.with_extra_args_support(inner)
    schedule = schedules.as_schedule(pattern.max_sparsity if sparsity is None else sparsity)
    if key is not None:
        score = functools.partial(score, key=key)

    def init(params: PyTree) -> PruneState:
        def mask(path: Any, leaf: Any) -> jax.Array:
            if not (trees.is_array(leaf) and where(trees.path_name(path), leaf)):
                return trees.keep_all()
            mask = jnp.ones_like(leaf, dtype=jnp.bool_)
            return packing.pack(mask) if packed else mask

        return PruneState(
            count=jnp.zeros((), jnp.int32),
            masks=jax.tree_util.tree_map_with_path(mask, params),
            inner_state=inner.init(params),
            skipped_updates=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError(
                "prune: needs the current parameters to zero the pruned ones. "
                "Call tx.update(grads, state, params)."
            )
        names, leaves, indices, treedef = trees.select(params, where)
        shapes = [(names[i], leaves[i].shape) for i in indices]
        mask_functions.check_pattern("prune", pattern, shapes)
        grads = trees.leaves_like("prune", "updates", updates, params)
        stored = trees.leaves_like("prune", "masks in the state", state.masks, params)

        def recompute(old: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
            scores = trees.leaves_like("prune", "scores", score(params, updates), params)
            scored = [n for n, i in enumerate(indices) if jnp.ndim(scores[i]) or not leaves[i].ndim]
            chosen = [scores[indices[n]] for n in scored]
            budgets, structure = _budgets(
                schedule, state.count, [shapes[n] for n in scored], allocation, pattern
            )
            kept = mask_functions.select_masks(
                chosen, budgets, pattern=pattern, structure=structure
            )
            has_nan = functools.reduce(
                jnp.logical_or, [jnp.any(jnp.isnan(s)) for s in chosen], jnp.bool_(False)
            )
            new = list(old)
            for n, mask in zip(scored, kept, strict=True):
                new[n] = jnp.where(has_nan, old[n], packing.pack(mask) if packed else mask)
            return new, has_nan.astype(jnp.int32)

        def keep(old: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
            return old, jnp.zeros((), jnp.int32)

        masks, skipped = jax.lax.cond(
            schedule.is_update_step(state.count), recompute, keep, [stored[i] for i in indices]
        )
        for i, mask in zip(indices, masks, strict=True):
            stored[i] = mask
        kept = {
            i: packing.unpack(stored[i], leaves[i].shape) if packed else stored[i] for i in indices
        }

        inner_updates, inner_params = updates, params
        if mask_gradients:
            inner_updates = treedef.unflatten(_zero(kept.get(i), g) for i, g in enumerate(grads))
            inner_params = treedef.unflatten(_zero(kept.get(i), p) for i, p in enumerate(leaves))
        new_updates, inner_state = inner.update(
            inner_updates, state.inner_state, inner_params, **extra_args
        )
        emitted = trees.leaves_like(
            "prune", "updates of the inner transformation", new_updates, params
        )
        for i, mask in kept.items():
            # In the parameter's dtype, since in a narrower one -param would not cancel it exactly.
            emitted[i] = jnp.where(mask, emitted[i].astype(leaves[i].dtype), -leaves[i])
        return treedef.unflatten(emitted), PruneState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            masks=treedef.unflatten(stored),
            inner_state=inner_state,
            skipped_updates=state.skipped_updates + skipped,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def unpack_masks(masks: PyTree, params: PyTree) -> PyTree:
    """Turn the masks of a packed `PruneState` into bool arrays.

    Args:
        masks: ``state.masks``, packed or not.
        params: The params, or arrays or abstract arrays of their shapes.

    Returns:
        A mask tree: bool arrays, True = kept.

    Raises:
        ValueError: If the structures differ, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, optax, prunax
        >>> params = {"kernel": jnp.ones((3, 2))}
        >>> state = prunax.prune(optax.sgd(0.1), 0.5, packed=True).init(params)
        >>> state.masks["kernel"].tolist()
        [[7, 7]]
        >>> prunax.transforms.unpack_masks(state.masks, params)["kernel"].shape
        (3, 2)
    """
    leaves, treedef = jax.tree.flatten(params)
    packed = trees.leaves_like("unpack_masks", "masks", masks, params)
    return treedef.unflatten(
        packing.unpack(m, leaf.shape) if m.dtype == jnp.uint8 else m
        for m, leaf in zip(packed, leaves, strict=True)
    )


def _budgets(
    schedule: Any, count: jax.Array, leaves: Any, allocation: Any, pattern: Any
) -> tuple[Any, Any]:
    """Budgets at a traced step; exact for the target, whose float32 value would be off in pools beyond 2**24."""
    sparsity = jnp.asarray(schedule(count), jnp.float32)
    now, structure = mask_functions.plan(leaves, sparsity, allocation=allocation, pattern=pattern)
    final, _ = mask_functions.plan(leaves, schedule.target, allocation=allocation, pattern=pattern)
    reached = sparsity == jnp.float32(schedule.target)
    return jax.tree.map(
        lambda f, n: jnp.where(reached, jnp.asarray(f, jnp.uint32), n), final, now
    ), structure


def _zero(mask: jax.Array | None, leaf: Any) -> Any:
    return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))
