"""Training under masks: the part that every sparse-training transformation shares.

A method says when masks change and how the next ones come from params, gradients and the masks
before. The rest is here: hide pruned weights from the inner optimizer, emit updates that leave exact
zeros, forget the moments of weights that come back, keep the old masks when a score is NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunax import _counts, _packing, patterns, schedules, trees
from prunax import allocation as allocations
from prunax import masks as mask_functions
from prunax import scores as score_functions

__all__ = ["PruneState", "unpack_masks"]

PyTree = Any
Arrays = list[jax.Array]


class PruneState(NamedTuple):
    """State of `prune` and the other sparse-training transformations.

    Arrays only, so that it checkpoints like any optax state.

    Attributes:
        count: int32 scalar, number of updates so far.
        masks: Mask tree of the params' structure, True = kept; uint8 leaves where `packed` (see `unpack_masks`).
        inner_state: State of the wrapped optimizer.
        skipped_updates: int32 scalar, mask updates skipped because a score was NaN.
        averaged_scores: float32 scores of the params' structure where the score is a `scores.ema`, else None.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] - as in optax's states
    masks: PyTree
    inner_state: Any
    skipped_updates: jax.Array
    averaged_scores: PyTree = None


class Ranking(NamedTuple):
    """What a mask update comes to.

    Attributes:
        masks: One bool array for each prunable leaf, True = kept.
        has_nan: bool scalar: a score was NaN and the masks are not to be used.
    """

    masks: Arrays
    has_nan: jax.Array


# next_masks(count, grads, averaged scores, selection of the params, masks of its leaves before) -> Ranking
NextMasks = Callable[[jax.Array, PyTree, PyTree, trees.Selection, Arrays], Ranking]


def train_masked(
    inner: optax.GradientTransformation,
    is_update_step: Callable[[jax.Array], Any],
    next_masks: NextMasks,
    *,
    pattern: patterns.Pattern,
    where: trees.Where,
    mask_gradients: bool,
    packed: bool,
    average: score_functions.ema | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it trains under masks that `next_masks` renews at `is_update_step`."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"prune: inner must be an optax transformation, got {inner!r}. "
            f"The optimizer comes first: prune(optax.adam(1e-3), 0.9)."
        )
    inner = optax.with_extra_args_support(inner)

    def pack(mask: jax.Array) -> jax.Array:
        return _packing.pack(mask) if packed else mask

    def unpack(stored: jax.Array, leaf: jax.Array) -> jax.Array:
        return _packing.unpack(stored, leaf.shape) if packed else stored

    def init(params: PyTree) -> PruneState:
        trees.check_params("prune", params, trained=True)

        def mask(path: str, leaf: Any) -> jax.Array:
            if trees.is_array(leaf) and where(path, leaf):
                return pack(jnp.ones_like(leaf, dtype=jnp.bool_))
            return trees.keep_all()

        return PruneState(
            count=jnp.zeros((), jnp.int32),
            masks=trees.map_with_path(mask, params),
            inner_state=inner.init(params),
            skipped_updates=jnp.zeros((), jnp.int32),
            averaged_scores=None if average is None else average.init(params),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError(
                "prune: You are using a transformation that requires the current value of parameters, but you are "
                "not passing `params` when calling `update`. Call tx.update(grads, state, params)."
            )
        chosen = trees.select(params, where)
        leaves = chosen.leaves
        patterns.check_fit("prune", pattern, chosen.shapes)
        patterns.check_shards("prune", pattern, chosen)
        stored = chosen.take("prune", "masks in the state", state.masks)
        gradients = chosen.take("prune", "updates", updates)
        _check_shapes(chosen, stored, gradients, packed)

        averaged = state.averaged_scores
        if average is not None:
            averaged = average.update(averaged, params, updates)

        due = is_update_step(state.count)

        def rank(old: Arrays) -> tuple[Arrays, Arrays, jax.Array]:
            before = [unpack(m, leaf) for m, leaf in zip(old, leaves, strict=True)]
            ranked, has_nan = next_masks(state.count, updates, averaged, chosen, before)
            new = [jnp.where(has_nan, b, m) for b, m in zip(before, ranked, strict=True)]
            grown = [m & ~b for m, b in zip(new, before, strict=True)]
            return [pack(m) for m in new], grown, has_nan.astype(jnp.int32)

        def renew(old: Arrays, grads: Arrays, inner_state: Any) -> tuple[Arrays, Arrays, Any, Any]:
            none = [jnp.zeros_like(leaf, dtype=jnp.bool_) for leaf in leaves]
            # A loop of one turn: the new masks take the old ones' place in it. Without it both are alive at the end
            # of this branch, and XLA copies masks in every step, those without an update included.
            _, new, grown, skipped = jax.lax.while_loop(
                lambda carry: carry[0],
                lambda carry: (jnp.zeros_like(due), *rank(carry[1])),
                (due, old, none, jnp.zeros((), jnp.int32)),
            )
            if mask_gradients:
                # A weight that comes back begins at zero without a past, and with the gradient of the next step.
                inner_state = optax.tree.map_params(
                    inner,
                    _forget,
                    inner_state,
                    chosen.put(grown, jax.tree.map(lambda _: jnp.zeros((), jnp.bool_), params)),
                    is_leaf=lambda node: isinstance(node, optax.MaskedNode),
                )
                grads = _zero(grads, [~g for g in grown])
            return new, grads, inner_state, skipped

        def keep(old: Arrays, grads: Arrays, inner_state: Any) -> tuple[Arrays, Arrays, Any, Any]:
            return old, grads, inner_state, jnp.zeros((), jnp.int32)

        # All that a mask update touches goes through: nothing of the old state is read afterwards, so that in other
        # steps XLA passes buffers on instead of copying them.
        stored, grads, inner_state, skipped = jax.lax.cond(
            due,
            renew,
            keep,
            stored,
            gradients,
            state.inner_state,
        )
        masks = [unpack(m, leaf) for m, leaf in zip(stored, leaves, strict=True)]

        inner_updates, inner_params = updates, params
        if mask_gradients:
            inner_updates = chosen.put(_zero(grads, masks), updates)
            inner_params = chosen.put(_zero(leaves, masks), params)
        new_updates, inner_state = inner.update(
            inner_updates, inner_state, inner_params, **extra_args
        )
        emitted = [
            # In the parameter's dtype: in a narrower one -param would not cancel it exactly.
            jnp.where(mask, u.astype(leaf.dtype), -leaf)
            for mask, u, leaf in zip(
                masks, chosen.take("prune", "inner updates", new_updates), leaves, strict=True
            )
        ]
        return chosen.put(emitted, new_updates), PruneState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            masks=chosen.put(stored, state.masks),
            inner_state=inner_state,
            skipped_updates=state.skipped_updates + skipped,
            averaged_scores=averaged,
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
        _packing.unpack(m, leaf.shape) if m.dtype == jnp.uint8 else m
        for m, leaf in zip(packed, leaves, strict=True)
    )


def plan_at(
    schedule: schedules.Schedule,
    count: jax.Array,
    leaves: list[tuple[str, tuple[int, ...]]],
    allocation: allocations.Allocator,
    pattern: patterns.Pattern,
) -> mask_functions.Plan:
    """Make the plan of a traced step.

    Exact at the schedule's target, whose float32 value would be off in pools beyond 2**24 units.
    """
    sparsity = jnp.asarray(schedule(count), jnp.float32)
    now = mask_functions.plan(leaves, sparsity, allocation=allocation, pattern=pattern)
    final = mask_functions.plan(leaves, schedule.target, allocation=allocation, pattern=pattern)
    reached = sparsity == jnp.float32(schedule.target)
    budgets = [
        jax.tree.map(
            lambda f, n: jnp.where(reached, f, n), _counts.as_count(f), _counts.as_count(n)
        )
        for f, n in zip(final.budgets, now.budgets, strict=True)
    ]
    return now._replace(budgets=budgets)


def any_nan(arrays: Arrays) -> jax.Array:
    """Say whether any array holds a NaN."""
    found = jnp.zeros((), jnp.bool_)
    for x in arrays:
        found = found | jnp.any(jnp.isnan(x))
    return found


def _check_shapes(chosen: trees.Selection, stored: Arrays, gradients: Arrays, packed: bool) -> None:
    """Raise ValueError, naming the leaf, where the state or the updates are those of other params."""
    for path, leaf, mask, gradient in zip(
        chosen.paths, chosen.leaves, stored, gradients, strict=True
    ):
        wanted = _packing.packed_shape(leaf.shape) if packed else leaf.shape
        if jnp.shape(mask) != wanted:
            raise ValueError(
                f"prune: {path!r} has shape {leaf.shape}, and the mask in the state has shape {jnp.shape(mask)} where "
                f"it should have {wanted}. The state was made for other params (or with another `packed`, or another "
                f"`where`): make a new one with tx.init(params)."
            )
        if jnp.shape(gradient) != leaf.shape:
            raise ValueError(
                f"prune: {path!r} has shape {leaf.shape}, and its update has shape {jnp.shape(gradient)}. Pass the "
                f"gradients of these params."
            )


def _zero(leaves: Arrays, masks: Arrays) -> Arrays:
    return [
        jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))
        for leaf, mask in zip(leaves, masks, strict=True)
    ]


def _forget(moment: Any, grown: jax.Array) -> Any:
    # Factored and per-layer statistics have shapes of their own, and nothing in them belongs to one weight.
    if not trees.is_array(moment) or moment.shape != grown.shape:
        return moment
    return jnp.where(grown, jnp.zeros((), moment.dtype), moment)
