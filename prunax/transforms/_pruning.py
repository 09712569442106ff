"""Pruning during training, as a wrapper of any optax optimizer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from prunax import _masks as mask_functions
from prunax import _selection, patterns, schedules, trees
from prunax import allocation as allocations
from prunax import scores as score_functions
from prunax.transforms._checks import arguments_of
from prunax.transforms._masked import Ranking, any_nan, plan_at, train_masked

__all__ = ["fixed_masks", "prune"]


def prune(
    inner: optax.GradientTransformation,
    sparsity: schedules.Sparsity,
    *,
    score: score_functions.Score = score_functions.magnitude,
    allocation: allocations.Allocation = allocations.uniform,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
    key: jax.Array | None = None,
    mask_gradients: bool = True,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it trains a pruned model.

    Nothing else in the training loop changes. After ``optax.apply_updates(params, updates)`` the pruned weights are
    exactly 0.0, whatever momentum, weight decay or adaptive step the inner optimizer has: its updates are replaced by
    ``-param`` where the mask is False. Use it as the outermost transformation: what follows it in a chain (a learning
    rate, weight decay) changes its updates, and pruned weights are no longer zero. `prunax.get_masks` and
    ``prunax.summarize(params, masks)`` say so where it has happened.

    Leaves that the inner optimizer never moves (`optax.set_to_zero` for a label of `optax.partition`), and leaves
    without gradients (None), are left whole. An infinite or NaN weight cannot be brought to zero by an update; `init`
    warns of it, and `prunax.apply_masks` mends it.

    Args:
        inner: Any optax transformation. Extra arguments of `update` are forwarded to it.
        sparsity: A number in [0, 1]: masks are computed at the first step and then fixed; or a schedule from
            `prunax.schedules`; None for what the pattern fixes (`patterns.NM`).
        score: ``score(params, grads) -> scores``, from `prunax.scores`, called at mask updates with the dense
            gradients. With `key` it is called as ``score(params, grads, key=key)``, the same key each time.
        allocation: How the sparsity is shared out among leaves, from `prunax.allocation`. Uniform by default, where
            `transforms.rigl` and its kin share out by Erdos-Renyi: give both the same to compare them. At high sparsity
            uniform leaves little of small first layers (`Summary.starved`).
        pattern: Which weights go together or compete, from `prunax.patterns`.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.
        key: A JAX random key for scores that need one (`scores.random`).
        mask_gradients: Hide pruned weights from the inner optimizer: it sees zero gradients and zero params there, so
            that global-norm clipping, moments and weight decay are those of the sparse model; copies of the params in
            its state (schedule-free's) are pruned too; and a weight that comes back begins as the optimizer's `init`
            begins. False lets moments go on accumulating at pruned weights.
        packed: Keep masks in one bit a weight in place of one byte.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState`. ``init`` makes masks of True.

    Raises:
        ValueError: If the sparsity is outside [0, 1]; from `update`, if params is missing, or the pattern does not
            fit a leaf, naming it. A NaN score is no error in the compiled step: the masks stay as they are and
            `skipped_updates` grows by one.
        TypeError: If the sparsity is neither a number nor a schedule.

    Warns:
        UserWarning: From ``init``, if there is nothing to prune in the params, saying of each leaf why, or if weights
            are not finite.

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
    return _pruned("prune", **locals())


def pruned(name: str, *args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
    """`prune` under the name of the function that the user called."""
    return _pruned(name, **arguments_of(name, prune, *args, **options))


def _pruned(
    name: str,
    inner: optax.GradientTransformation,
    sparsity: schedules.Sparsity,
    score: score_functions.Score,
    allocation: allocations.Allocation,
    pattern: patterns.Pattern,
    where: trees.Where,
    key: jax.Array | None,
    mask_gradients: bool,
    packed: bool,
) -> optax.GradientTransformationExtraArgs:
    patterns.check_pattern(name, pattern)
    allocations.check_allocation(name, allocation)
    score_functions.check_score(name, score)
    trees.check_where(name, where)
    schedule = schedules.as_schedule(
        name, pattern.implied_sparsity if sparsity is None else sparsity
    )
    average = score_functions.memory_of(score)
    if key is not None and average is not None:
        raise ValueError(
            f"{name}: a score under scores.ema takes no key. Bind it: ema(functools.partial(score, key=key), decay)."
        )
    if key is None and score_functions.needs_key(score):
        raise ValueError(f"{name}: {score!r} needs a random key. Pass key=jax.random.key(0).")
    if key is not None:
        score = functools.partial(score, key=key)

    def next_masks(
        count: jax.Array,
        grads: Any,
        averaged: Any,
        chosen: trees.Selection,
        masks: list[jax.Array],
    ) -> Ranking:
        if average is None:
            tree = score(chosen.params, grads)
        else:
            tree = average.read(averaged, chosen.params)
        ranked, scores = mask_functions.scored(name, "scores", tree, chosen)
        plan = plan_at(schedule, count, ranked.shapes, allocation, pattern)
        has_nan = any_nan(scores)
        if score is score_functions.magnitude:
            # Taken within each read of the selection, absolute values need no memory.
            scores = [Partial(_selection.absolute, leaf) for leaf in ranked.leaves]
        kept = mask_functions.select_masks(
            scores, plan.budgets, pattern=pattern, structure=plan.structure
        )
        return Ranking(chosen.merge(ranked, kept, masks), has_nan)

    return train_masked(
        name,
        inner,
        schedule.is_update_step,
        next_masks,
        pattern=pattern,
        where=where,
        mask_gradients=mask_gradients,
        packed=packed,
        average=average,
    )


def fixed_masks(
    inner: optax.GradientTransformation,
    masks: Any,
    *,
    mask_gradients: bool = True,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it trains under masks that you already have.

    Args:
        inner: Any optax transformation.
        masks: Mask tree of the params' structure, True = kept: from `compute_masks`, a lottery ticket, a file.
        mask_gradients: As in `prune`.
        packed: As in `prune`.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState` that holds the masks. After the first
        ``optax.apply_updates`` the pruned weights are exactly 0.0.

    Raises:
        ValueError: From `init`, if the masks do not fit the params, naming the leaf.
        TypeError: From `init`, if a mask is not boolean, naming the leaf.

    Warns:
        UserWarning: From ``init``, if a pruned weight is infinite or NaN: no update brings it to zero, and
            `prunax.apply_masks` does.

    Examples:
        >>> import jax.numpy as jnp, optax, prunax
        >>> params = {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]])}
        >>> tx = prunax.transforms.fixed_masks(optax.sgd(0.1), prunax.compute_masks(params, 0.5))
        >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
        >>> (optax.apply_updates(params, updates)["kernel"] == 0).tolist()
        [[False, True], [True, False]]
    """
    chosen = trees.select(masks, lambda path, mask: mask.ndim > 0)

    def next_masks(*args: Any) -> Ranking:
        return Ranking(args[-1], jnp.zeros((), jnp.bool_))

    return train_masked(
        "fixed_masks",
        inner,
        lambda count: jnp.zeros((), jnp.bool_),
        next_masks,
        pattern=patterns.Unstructured(),
        where=lambda path, leaf: path in chosen.paths,
        mask_gradients=mask_gradients,
        packed=packed,
        given=masks,
    )
