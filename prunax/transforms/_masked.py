"""Training under masks: the part that every sparse-training transformation shares.

A method says when masks change and how the next ones come from params, gradients and the masks
before. The rest is here: hide pruned weights from the inner optimizer, emit updates that leave exact
zeros, start weights that come back anew, keep the old masks when a score is NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunax import _counts, _meshes, _packing, _selection, patterns, schedules, trees
from prunax import _masks as mask_functions
from prunax import allocation as allocations
from prunax import scores as score_functions
from prunax.transforms import _checks, _inner

__all__ = ["PruneState"]

PyTree = Any
Arrays = list[jax.Array]
Place = tuple[str, ...]


class PruneState(NamedTuple):
    """State of `prune` and the other sparse-training transformations.

    Arrays only, so that it checkpoints like any optax state.

    Attributes:
        count: int32 scalar, number of updates so far.
        masks: Mask tree of the params' structure, True = kept; uint8 leaves where packed (`prunax.get_masks` gives
            bool ones).
        inner_state: State of the wrapped optimizer.
        skipped_updates: int32 scalar, mask updates skipped because a score was NaN.
        averaged_scores: float32 tree of the params' structure, what a score with a memory (`scores.ema`,
            `scores.ema_gradients`) remembers, else None.
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
    name: str,
    inner: optax.GradientTransformation,
    is_update_step: Callable[[jax.Array], Any],
    next_masks: NextMasks,
    *,
    pattern: patterns.Pattern,
    where: trees.Where,
    mask_gradients: bool,
    packed: bool,
    average: score_functions.ScoreWithMemory | None = None,
    given: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it trains under masks that `next_masks` renews at `is_update_step`.

    Masks begin as those `given`, or as True. In the latter case leaves that the optimizer never moves get no masks of
    their own.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"{name}: inner must be an optax transformation, got {trees.shown(inner)}. "
            f"The optimizer comes first: {name}(optax.adam(1e-3), ...)."
        )
    inner = optax.with_extra_args_support(inner)

    def pack(mask: jax.Array) -> jax.Array:
        return _packing.pack_bits(mask) if packed else mask

    def unpack(stored: jax.Array, leaf: jax.Array) -> jax.Array:
        return _unpacked(stored, leaf) if packed else stored

    def init(params: PyTree) -> PruneState:
        trees.check_params(name, params, trained=True)
        model = _inner.model_of(params)
        inner_state = inner.init(params)
        chosen, fixed, at_rest = trees.select(model, where), None, set[str]()
        if given is not None and jax.tree.leaves(model):  # optax asks with placeholders as well
            trees.check_masks(name, model, given)
            fixed = chosen.take(name, "masks", given)
        elif chosen.indices:
            at_rest = _inner.frozen(inner.update, inner_state, params)
            chosen = chosen.only([n for n, path in enumerate(chosen.paths) if path not in at_rest])
        _checks.warn_of_nothing(name, model, chosen, at_rest)
        _checks.warn_of_no_numbers(name, chosen, fixed)

        def masks(part: PyTree) -> PyTree:
            full = fixed or [jnp.ones_like(leaf, dtype=jnp.bool_) for leaf in chosen.leaves]
            return chosen.put(
                [pack(jnp.array(m)) for m in full], jax.tree.map(lambda _: trees.keep_all(), part)
            )

        return PruneState(
            count=jnp.zeros((), jnp.int32),
            masks=_inner.map_copies(masks, params),
            inner_state=inner_state,
            skipped_updates=jnp.zeros((), jnp.int32),
            averaged_scores=None if average is None else average.init(model),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError(
                f"{name}: You are using a transformation that requires the current value of parameters, but you are "
                f"not passing `params` when calling `update`. Call tx.update(grads, state, params)."
            )
        if not (hasattr(state, "masks") and hasattr(state, "inner_state")):
            raise TypeError(
                f"{name}: the state is a {type(state).__name__}, which `init` of this one does not give. Begin with "
                f"state = tx.init(params), or a new nnx.Optimizer, and restore checkpoints into that."
            )
        # Leaves without gradients are left out of all that follows, as if they were not there.
        trained = _Trained(name, _inner.model_of(params), updates)
        model, updates = trained.only(_inner.model_of(params)), trained.updates
        old_masks = trained.only(_inner.model_of(state.masks))
        chosen = trees.select(model, where)
        patterns.check_fit(name, pattern, chosen.shapes)
        patterns.check_shards(name, pattern, chosen)
        stored = chosen.take(name, "masks in the state", old_masks)
        own = [n for n, m in enumerate(stored) if jnp.ndim(m) or not chosen.leaves[n].ndim]
        chosen, stored = chosen.only(own), [stored[n] for n in own]
        leaves, gradients = chosen.leaves, chosen.take(name, "updates", updates)
        _checks.check_shapes(name, chosen, stored, gradients, packed)

        averaged = trained.only(state.averaged_scores)
        if average is not None:
            averaged = average.update(averaged, model, updates)

        due = is_update_step(state.count)
        weights = _inner.weights_of(state.inner_state, _inner.model_of(params))
        copied = _inner.copies(inner.init, params) if mask_gradients else set()
        places = trees.places(model)

        def at(arrays: Arrays) -> dict[Place, jax.Array]:
            return {places[i]: array for i, array in zip(chosen.indices, arrays, strict=True)}

        def of_weights(arrays: Arrays) -> dict[Place, jax.Array]:
            known = at(arrays)
            return {place: known[weight] for place, weight in weights.items() if weight in known}

        def rank(old: Arrays, inner_state: Any) -> tuple[Arrays, Arrays, Any, Any]:
            before = [unpack(m, leaf) for m, leaf in zip(old, leaves, strict=True)]
            ranked, has_nan = next_masks(state.count, updates, averaged, chosen, before)
            # In a shard_map, random masks are alike on all devices, and masks that were given may be.
            new = [
                _meshes.vary_like(jnp.where(has_nan, b, m), b)
                for b, m in zip(before, ranked, strict=True)
            ]
            grown = []
            if mask_gradients:
                grown = [
                    _meshes.vary_like(m & ~b, leaf)
                    for m, b, leaf in zip(new, before, leaves, strict=True)
                ]
                # A weight that comes back begins at zero without a past, and with the gradient of the next step.
                inner_state = begin_anew(inner_state, grown)
                grown = list(map(_packing.pack_bits, grown))
            return [pack(m) for m in new], grown, inner_state, has_nan.astype(jnp.int32)

        def renew(old: Arrays, inner_state: Any) -> tuple[Arrays, Arrays, Any, Any]:
            # A loop of one turn: what is new takes the place of the old in it. Without it both are alive at the end
            # of this branch, and XLA copies them in every step, those without an update included.
            return jax.lax.while_loop(
                lambda carry: carry[0],
                lambda carry: (jnp.zeros_like(due), *rank(carry[1], carry[3])),
                (due, *keep(old, inner_state)),
            )[1:]

        def keep(old: Arrays, inner_state: Any) -> tuple[Arrays, Arrays, Any, Any]:
            return old, none_grown(), inner_state, jnp.zeros((), jnp.int32)

        def none_grown() -> Arrays:
            if not mask_gradients:
                return []
            # Zeros like the packed ones, which are then not computed.
            bits = [_packing.pack_bits(jnp.zeros_like(leaf, dtype=jnp.bool_)) for leaf in leaves]
            return [
                _meshes.vary_like(jnp.zeros_like(b), leaf)
                for b, leaf in zip(bits, leaves, strict=True)
            ]

        def begin_anew(inner_state: Any, grown: Arrays) -> Any:
            fresh = inner.init(params)
            first = dict(zip(trees.places(fresh), jax.tree.leaves(fresh), strict=True))
            return _map_at(jnp.where, of_weights(grown), inner_state, first)

        # All that a mask update touches goes through: nothing of the old state is read afterwards, so that in other
        # steps XLA passes buffers on instead of copying them. Gradients do not, or all of them would be alive at once:
        # what they need to know of the update, which weights are back, comes out in bits.
        stored, grown, inner_state, skipped = jax.lax.cond(
            due, renew, keep, stored, state.inner_state
        )
        masks = [unpack(m, leaf) for m, leaf in zip(stored, leaves, strict=True)]

        def masked_copies(inner_state: Any) -> Any:
            at = of_weights(masks)
            return _map_at(_masked, {place: at[place] for place in copied & set(at)}, inner_state)

        inner_updates, inner_params = updates, params
        if mask_gradients:
            back = map(_unpacked, grown, leaves)
            learning = [m & ~b for m, b in zip(masks, back, strict=True)]
            inner_updates = chosen.put(_zero(gradients, learning), updates)
            inner_params = _inner.map_copies(lambda copy: _map_at(_masked, at(masks), copy), params)
        with _checks.explained(name, model, trained.missing):
            new_updates, inner_state = inner.update(
                inner_updates, masked_copies(inner_state), inner_params, **extra_args
            )

        def emit(copy: PyTree, new_updates: PyTree) -> PyTree:
            missing = set(at(masks)) - set(trees.places(new_updates))
            if missing:
                raise ValueError(
                    f"{name}: the inner optimizer gives no update of {'/'.join(min(missing))!r}, so that it cannot be "
                    f"pruned. Leave it out with `where`."
                )
            weight_at = dict(zip(trees.places(copy), jax.tree.leaves(copy), strict=True))
            return _map_at(_emitted, at(masks), new_updates, weight_at)

        return _inner.map_copies(emit, params, new_updates), PruneState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            masks=_inner.map_copies(
                lambda masks: trained.put(chosen.put(stored, old_masks), masks), state.masks
            ),
            inner_state=masked_copies(inner_state),
            skipped_updates=state.skipped_updates + skipped,
            averaged_scores=trained.put(averaged, state.averaged_scores),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def plan_at(
    schedule: schedules.Schedule,
    count: jax.Array,
    leaves: list[tuple[str, tuple[int, ...]]],
    allocation: allocations.Allocation,
    pattern: patterns.Pattern,
) -> mask_functions.Plan:
    """Make the plan of a traced step, exact at the schedule's target.

    A traced sparsity is a float32, which `_counts` takes for the decimal that it is nearest to: that is enough for 0.9.
    It is not for 1/3, nor for the sparsities that an allocation works out of 0.9 for each leaf (Erdos-Renyi), which are
    off by some units in pools beyond 2**24. So the target is planned as the number that it is.
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
    """Say whether any array holds a NaN, on any device of a `jax.shard_map`."""
    found = jnp.zeros((), jnp.bool_)
    for x in arrays:
        found = found | _meshes.agree(_selection.has_nan(x))
    return found


def _unpacked(bits: jax.Array, leaf: jax.Array) -> jax.Array:
    return _meshes.shard_like(_packing.unpack_bits(bits, leaf.shape), leaf)


def _zero(leaves: Arrays, masks: Arrays) -> Arrays:
    return [_masked(mask, leaf) for leaf, mask in zip(leaves, masks, strict=True)]


def _masked(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _emitted(mask: jax.Array, weight: jax.Array, update: jax.Array) -> jax.Array:
    # In the parameter's dtype: in a narrower one -param would not cancel it exactly.
    return jnp.where(mask, update.astype(weight.dtype), -weight)


def _map_at(
    function: Callable[..., jax.Array],
    arrays: dict[Place, jax.Array],
    tree: PyTree,
    *others: dict[Place, jax.Array],
) -> PyTree:
    """Map ``function(array, *others, leaf)`` over the leaves of a tree in whose places there are arrays."""
    if not arrays:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        function(arrays[place], *(other[place] for other in others), leaf)
        if place in arrays
        else leaf
        for place, leaf in zip(trees.places(tree), leaves, strict=True)
    )


class _Trained:
    """The leaves of a model that have gradients, and trees cut down to them: None stands for each of the others."""

    def __init__(self, name: str, model: PyTree, updates: PyTree) -> None:
        gradients = _checks.gradients_of(name, model, updates)
        self.which = [g is not None for g in gradients]
        paths = zip(trees.paths(model), self.which, strict=True)
        self.missing = [path for path, has in paths if not has]
        self.updates = (
            updates if all(self.which) else jax.tree.unflatten(jax.tree.structure(model), gradients)
        )

    def only(self, tree: PyTree) -> PyTree:
        """Leave out what has no gradient."""
        if all(self.which) or tree is None:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten(
            leaf if has else None for leaf, has in zip(leaves, self.which, strict=True)
        )

    def put(self, part: PyTree, tree: PyTree) -> PyTree:
        """Put what `only` took, changed perhaps, back into the whole tree."""
        if all(self.which) or tree is None:
            return part
        new = iter(jax.tree.leaves(part))
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten(
            next(new) if has else leaf for leaf, has in zip(leaves, self.which, strict=True)
        )
