"""Dynamic sparse training: drop the weakest connections, grow as many new ones, keep the number constant."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prunax import _counts, _meshes, patterns, schedules, trees
from prunax import _masks as mask_functions
from prunax import allocation as allocations
from prunax import scores as score_functions
from prunax.transforms._checks import arguments_of
from prunax.transforms._masked import Ranking, any_nan, train_masked
from prunax.transforms._pruning import pruned

__all__ = ["dynamic_sparse", "rigl", "sparse_evolutionary", "static_sparse"]

PyTree = Any


def dynamic_sparse(
    inner: optax.GradientTransformation,
    sparsity: float | None,
    *,
    grow: score_functions.Score,
    key: jax.Array,
    every: int = 100,
    end_step: int | None = None,
    drop_fraction: float | Callable[[jax.Array], jax.Array] = 0.3,
    drop: score_functions.Score = score_functions.magnitude,
    initial: score_functions.Score = score_functions.random,
    allocation: allocations.Allocation = allocations.erdos_renyi,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
    mask_gradients: bool = True,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Train a sparse model from scratch whose connections move.

    Masks begin with the connections that score highest under `initial`. Then every `every` steps each pool (of a leaf,
    or of a slice where the pattern compares slices) drops the fraction f_t of its active units with the lowest `drop`
    scores, and grows as many of the units that are then inactive, those with the highest `grow` scores, among them
    perhaps ones just dropped. Grown weights begin at zero, with what the optimizer's `init` gives a weight (mostly zero
    moments), and the number of active weights is the same at every step. A leaf whose `initial`, `drop` or `grow` score
    is a scalar is never pruned.

    .. math:: f_t = \frac{f_0}{2} \left(1 + \cos \frac{t \pi}{T_{end}}\right)

    Args:
        inner: Any optax transformation.
        sparsity: Fraction of weights that are zero throughout, in [0, 1]; None for what the pattern fixes.
        grow: Which connections to grow: ``score(params, grads)`` of the dense gradients. `scores.gradient` makes RigL
            as published, `scores.random` SET. A score that takes a ``key`` gets a fresh one at every update.
        key: A JAX random key, for the first masks and for random growth.
        every: Steps from one mask update to the next.
        end_step: No mask update from here on; None for no end, with a constant drop fraction.
        drop_fraction: The fraction f_0, annealed to zero at `end_step` along a cosine; or a function of the step, an
            optax schedule, that gives f_t itself.
        drop: Which active connections to keep, as a score.
        initial: The score of the first masks.
        allocation: How the sparsity is shared out among leaves. Erdos-Renyi by default, as published, where `prune` is
            uniform: give both the same to compare them.
        pattern: `patterns.ConstantFanIn()` makes SRigL's constant fan-in, `patterns.NM(n, m)` dynamic N:M.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.
        mask_gradients: As in `prune`.
        packed: As in `prune`.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState`.

    Raises:
        ValueError: If the sparsity or drop fraction is outside [0, 1], or a step is not positive; from `update`, if
            params is missing or the pattern does not fit a leaf, naming it.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prunax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
        >>> tx = prunax.transforms.dynamic_sparse(
        ...     optax.adam(0.1), 0.75, grow=prunax.scores.gradient, key=jax.random.key(1), every=2
        ... )
        >>> state = tx.init(params)
        >>> for _ in range(5):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int(state.masks["kernel"].sum())
        16

    References:
        Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134, section 3; Mocanu et al., 2018, arXiv:1707.04780;
        Lasby et al. (SRigL), 2024, arXiv:2305.02299.
    """
    return _moving("dynamic_sparse", **locals())


def moving(name: str, *args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
    """`dynamic_sparse` under the name of the function that the user called."""
    return _moving(name, **arguments_of(name, dynamic_sparse, *args, **options))


def _moving(
    name: str,
    inner: optax.GradientTransformation,
    sparsity: float | None,
    grow: score_functions.Score,
    key: jax.Array,
    every: int,
    end_step: int | None,
    drop_fraction: float | Callable[[jax.Array], jax.Array],
    drop: score_functions.Score,
    initial: score_functions.Score,
    allocation: allocations.Allocation,
    pattern: patterns.Pattern,
    where: trees.Where,
    mask_gradients: bool,
    packed: bool,
) -> optax.GradientTransformationExtraArgs:
    patterns.check_pattern(name, pattern)
    allocations.check_allocation(name, allocation)
    for score in (grow, drop, initial):
        score_functions.check_score(name, score)
    trees.check_where(name, where)
    schedule = schedules.as_schedule(
        name, pattern.implied_sparsity if sparsity is None else sparsity
    )
    schedules.check_steps(name, every=every)
    if end_step is not None:
        schedules.check_steps(name, end_step=end_step)
    average = score_functions.memory_of(grow)
    if any(score_functions.memory_of(score) for score in (drop, initial)):
        raise ValueError(
            f"{name}: only grow may be a score with a memory, such as scores.ema. Pass drop and initial scores "
            "of one step."
        )
    if not callable(drop_fraction):
        schedules.check_sparsity(name, drop_fraction, "drop_fraction")

    def fraction(count: jax.Array) -> jax.Array:
        if callable(drop_fraction):
            return jnp.clip(jnp.asarray(drop_fraction(count), jnp.float32), 0.0, 1.0)
        if end_step is None:
            return jnp.full((), drop_fraction, jnp.float32)
        progress = jnp.minimum(count.astype(jnp.float32) / end_step, 1.0)
        return drop_fraction / 2 * (1 + jnp.cos(jnp.pi * progress))

    def is_update_step(count: jax.Array) -> jax.Array:
        due = count % every == 0
        return due if end_step is None else due & ((count < end_step) | (count == 0))

    def next_masks(
        count: jax.Array,
        grads: PyTree,
        averaged: PyTree,
        chosen: trees.Selection,
        masks: list[jax.Array],
    ) -> Ranking:
        score_of = {"initial scores": initial, "drop scores": drop, "grow scores": grow}
        scores: dict[str, dict[int, jax.Array]] = {}
        for noun, function in score_of.items():
            step_key = jax.random.fold_in(key, count)
            fresh = {"key": step_key} if score_functions.needs_key(function) else {}
            if average is not None and function is grow:
                tree = average.read(averaged, chosen.params)
            else:
                tree = function(chosen.params, grads, **fresh)
            ranked, arrays = mask_functions.scored(name, noun, tree, chosen)
            scores[noun] = dict(zip(ranked.indices, arrays, strict=True))
        # A leaf that lacks one of the scores is never pruned.
        moving = chosen.only(
            [
                n
                for n, i in enumerate(chosen.indices)
                if all(i in found for found in scores.values())
            ]
        )
        initials, drops, grows = ([found[i] for i in moving.indices] for found in scores.values())
        plan = mask_functions.plan(
            moving.shapes, schedule.target, allocation=allocation, pattern=pattern
        )
        if plan.rescale is not None:
            raise ValueError(
                f"{name}: the allocation rescales scores, which connections that stay or go in any case have "
                "none of. Use allocation.erdos_renyi, uniform, global_ranking or by_path."
            )

        def choose(scores: list[jax.Array], budgets: list[Any]) -> list[jax.Array]:
            chosen_masks = mask_functions.select_masks(
                scores, budgets, pattern=pattern, structure=plan.structure
            )
            # Random scores are alike in all of a shard_map, where the masks of weights need not be.
            return [
                _meshes.vary_like(m, leaf)
                for m, leaf in zip(chosen_masks, moving.leaves, strict=True)
            ]

        def start(masks: list[jax.Array]) -> Ranking:
            del masks
            return Ranking(choose(initials, plan.budgets), any_nan(initials))

        def move(masks: list[jax.Array]) -> Ranking:
            f = fraction(count)
            lowered = [
                _counts.add(budget, _counts.num_pruned(f, size - budget))
                for budget, size in zip(plan.budgets, plan.sizes, strict=True)
            ]
            active = [jnp.where(m, s, -jnp.inf) for m, s in zip(masks, drops, strict=True)]
            left = choose(active, lowered)
            wanted = [jnp.where(m, jnp.inf, s) for m, s in zip(left, grows, strict=True)]
            return Ranking(choose(wanted, plan.budgets), any_nan(drops) | any_nan(grows))

        taken = [m for m, i in zip(masks, chosen.indices, strict=True) if i in moving.indices]
        new = jax.lax.cond(count == 0, start, move, taken)
        return Ranking(chosen.merge(moving, new.masks, masks), new.has_nan)

    return train_masked(
        name,
        inner,
        is_update_step,
        next_masks,
        pattern=pattern,
        where=where,
        mask_gradients=mask_gradients,
        packed=packed,
        average=average,
    )


def rigl(
    inner: optax.GradientTransformation,
    sparsity: float,
    *,
    key: jax.Array,
    grow: score_functions.Score | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """RigL: `dynamic_sparse` that grows the connections with the largest gradients.

    Published RigL takes the gradient of one batch as it is. Two things in it say nothing of a connection: the noise of
    a small batch, and the part that each input and each unit has in all of its connections. All that grows ends at the
    few units and inputs where these are large, and growth at random does better. Here the gradient is the mean of about
    a hundred steps, less its part of rank one (`scores.deflated_gradient`).

    Args:
        inner: Any optax transformation.
        sparsity: Fraction of weights that are zero throughout, in [0, 1].
        key: A JAX random key for the first masks.
        grow: Which connections to grow; None for ``scores.ema_gradients(scores.deflated_gradient, 0.99)``, which takes
            a float32 number of memory for each weight. `scores.gradient` for that of the one batch, as published.
        **options: Any other argument of `dynamic_sparse`. RigL as published has ``every=100, drop_fraction=0.3`` and
            ``end_step`` at three quarters of the training.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState`.

    Raises:
        ValueError: As `dynamic_sparse`.

    Examples:
        >>> import jax, optax, prunax
        >>> tx = prunax.transforms.rigl(optax.adam(1e-3), 0.9, key=jax.random.key(0), every=100, end_step=7500)

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, 2020, arXiv:1911.11134, algorithm 1.
    """
    if grow is None:
        grow = score_functions.ema_gradients(score_functions.deflated_gradient, 0.99)
    return moving("rigl", inner, sparsity, grow=grow, key=key, **options)


def sparse_evolutionary(
    inner: optax.GradientTransformation, sparsity: float, *, key: jax.Array, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """SET, sparse evolutionary training: `dynamic_sparse` that grows connections at random.

    Args:
        inner: Any optax transformation.
        sparsity: Fraction of weights that are zero throughout, in [0, 1].
        key: A JAX random key for the first masks and the growth.
        **options: Any other argument of `dynamic_sparse`. SET as published has a constant drop fraction of 0.3, as here
            without ``end_step``.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState`.

    Raises:
        ValueError: As `dynamic_sparse`.

    Examples:
        >>> import jax, optax, prunax
        >>> tx = prunax.transforms.sparse_evolutionary(optax.adam(1e-3), 0.9, key=jax.random.key(0))

    References:
        Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity, 2018,
        arXiv:1707.04780, algorithm 1 (dropping by magnitude, without regard to sign).
    """
    grow = score_functions.random
    return moving("sparse_evolutionary", inner, sparsity, grow=grow, key=key, **options)


def static_sparse(
    inner: optax.GradientTransformation, sparsity: float, *, key: jax.Array, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Train random masks, fixed from the first step on: the baseline of dynamic sparse training.

    Args:
        inner: Any optax transformation.
        sparsity: Fraction of weights that are zero throughout, in [0, 1].
        key: A JAX random key for the masks.
        **options: Any other argument of `prune`. The allocation is `allocation.erdos_renyi` where none is given.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `PruneState`.

    Raises:
        ValueError: As `prune`.

    Examples:
        >>> import jax, optax, prunax
        >>> tx = prunax.transforms.static_sparse(optax.adam(1e-3), 0.9, key=jax.random.key(0))

    References:
        The static baseline of Evci et al., 2020, arXiv:1911.11134, section 4.
    """
    options = {"allocation": allocations.erdos_renyi} | options
    return pruned(
        "static_sparse", inner, sparsity, score=score_functions.random, key=key, **options
    )
