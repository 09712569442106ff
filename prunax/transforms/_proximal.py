"""Proximal steps: after any optimizer's update, the exact minimiser of a penalty near the new weights.

Where the gradient of a penalty only draws weights near zero, its proximal step puts them on exactly 0.0, and
``prunax.compute_masks(params, threshold=0.0)`` then reads the mask.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunax import _masks as mask_functions
from prunax import allocation as allocations
from prunax import patterns, schedules, trees
from prunax.transforms import _checks, _inner
from prunax.transforms._pruning import pruned

__all__ = ["ProximalState", "proximal_group_lasso", "proximal_l1"]

PyTree = Any
Threshold = float | Callable[[jax.Array], Any]
Shrink = Callable[[trees.Selection, jax.Array], list[jax.Array]]


class ProximalState(NamedTuple):
    """State of the proximal transformations.

    Attributes:
        count: int32 scalar, number of updates so far.
        inner_state: State of the wrapped optimizer.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] - as in optax's states
    inner_state: Any


def proximal_l1(
    inner: optax.GradientTransformation,
    threshold: Threshold | None = None,
    *,
    sparsity: float | None = None,
    end_step: int | None = None,
    where: trees.Where = trees.is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Soft-threshold the weights after each update of the inner optimizer.

    .. math:: w \leftarrow \mathrm{sign}(v) \max(|v| - \tau, 0), \quad v = w + u

    The shrinkage is given, or steered to a sparsity s that is reached at a step T. At step t it is

    .. math:: \tau_t = \frac{2\, q_s(|v|)}{T - t}

    where the quantile q is the largest of the weights to prune, those that are smallest in all leaves together. If
    nothing resisted, that weight would fall as the square of the steps left; what gradients resist raises the
    shrinkage. At T masks are chosen, for exactly as many weights as asked, and the others train on without shrinkage.

    Args:
        inner: Any optax transformation; u is its update.
        threshold: The shrinkage tau of one step, in units of weights: for plain gradient descent the learning rate
            times the strength of the L1 penalty. Or a function of the step, an optax schedule.
        sparsity: In place of a threshold: the fraction of the chosen weights that are zero at `end_step`, in [0, 1].
        end_step: With `sparsity`, the step T at which masks are fixed.
        where: ``where(path, leaf) -> bool`` chooses the leaves to shrink.

    Returns:
        A `optax.GradientTransformationExtraArgs`; after ``optax.apply_updates`` small weights are exactly 0.0. With
        `sparsity` its state is a `PruneState`, whose masks are True until `end_step`.

    Raises:
        ValueError: If not exactly one of threshold and sparsity is given, the threshold is negative or NaN, the
            sparsity outside [0, 1], or `end_step` missing; from `update`, if params is missing.

    Examples:
        >>> import jax.numpy as jnp, optax, prunax
        >>> params = {"kernel": jnp.array([[0.5, -0.05]])}
        >>> tx = prunax.transforms.proximal_l1(optax.sgd(0.1), 0.1)
        >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [[0.4..., 0.0]]
        >>> tx = prunax.transforms.proximal_l1(optax.adam(1e-3), sparsity=0.9, end_step=5000)

    References:
        Daubechies et al., An Iterative Thresholding Algorithm for Linear Inverse Problems with a Sparsity Constraint,
        2004, arXiv:math/0307152; Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2.
    """

    def shrink(moved: trees.Selection, tau: jax.Array) -> list[jax.Array]:
        return [
            jnp.sign(v) * jnp.maximum(jnp.abs(v) - tau.astype(v.dtype), 0) for v in moved.leaves
        ]

    pattern = patterns.Unstructured()
    return _thresholded("proximal_l1", inner, threshold, sparsity, end_step, shrink, pattern, where)


def proximal_group_lasso(
    inner: optax.GradientTransformation,
    threshold: Threshold | None = None,
    *,
    sparsity: float | None = None,
    end_step: int | None = None,
    pattern: patterns.Pattern = patterns.Channel(),
    where: trees.Where = trees.is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink whole groups after each update of the inner optimizer, small ones to zero.

    .. math:: w_g \leftarrow v_g \max\left(1 - \frac{\tau \sqrt{|g|}}{\lVert v_g \rVert_2}, 0\right), \quad v = w + u

    Args:
        inner: Any optax transformation; u is its update.
        threshold: The shrinkage tau of one step: a group whose root mean square is below it becomes zero. Or a function
            of the step, an optax schedule.
        sparsity: In place of a threshold: the fraction of all groups that are zero at `end_step`, in [0, 1], to which
            the shrinkage is steered as in `proximal_l1`.
        end_step: With `sparsity`, the step at which masks are fixed.
        pattern: What a group is: the units of `patterns.Channel` or `patterns.Block`.
        where: ``where(path, leaf) -> bool`` chooses the leaves to shrink.

    Returns:
        A `optax.GradientTransformationExtraArgs`; after ``optax.apply_updates`` small groups are exactly 0.0. With
        `sparsity` its state is a `PruneState`, whose masks are True until `end_step`.

    Raises:
        ValueError: If not exactly one of threshold and sparsity is given, the threshold is negative or NaN, the
            sparsity outside [0, 1], or `end_step` missing; from `update`, if params is missing, or the pattern does not
            fit a leaf, naming it.

    Examples:
        >>> import jax.numpy as jnp, optax, prunax
        >>> params = {"kernel": jnp.array([[1.0, 0.1], [1.0, -0.1]])}
        >>> tx = prunax.transforms.proximal_group_lasso(optax.sgd(0.1), 0.5)
        >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [[0.5, 0.0], [0.5, 0.0]]

    References:
        Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006, equation 2.3.
    """

    def shrunk(v: jax.Array, tau: jax.Array) -> jax.Array:
        rms = jnp.sqrt(pattern.pool(jnp.square(v)))
        tau = tau.astype(v.dtype).astype(rms.dtype)
        scale = jnp.maximum(1 - tau / jnp.where(rms > 0, rms, 1), 0)
        return v * pattern.expand(scale, v.shape).astype(v.dtype)

    def shrink(moved: trees.Selection, tau: jax.Array) -> list[jax.Array]:
        patterns.check_fit("proximal_group_lasso", pattern, moved.shapes)
        return [shrunk(v, tau) for v in moved.leaves]

    name = "proximal_group_lasso"
    return _thresholded(name, inner, threshold, sparsity, end_step, shrink, pattern, where)


def _thresholded(
    name: str,
    inner: optax.GradientTransformation,
    threshold: Threshold | None,
    sparsity: float | None,
    end_step: int | None,
    shrink: Shrink,
    pattern: patterns.Pattern,
    where: trees.Where,
) -> optax.GradientTransformationExtraArgs:
    """Shrink by a given threshold, or by one that is steered to a sparsity."""
    if (threshold is None) == (sparsity is None) or (sparsity is None) != (end_step is None):
        raise ValueError(
            f"{name}: pass either a threshold, or sparsity= and end_step=, got threshold={threshold}, "
            f"sparsity={sparsity}, end_step={end_step}."
        )
    if threshold is not None:
        return proximal(name, inner, threshold, shrink, where)
    assert sparsity is not None and end_step is not None
    schedules.check_sparsity(name, sparsity)
    schedules.check_steps(name, end_step=end_step)

    def steered(count: jax.Array, moved: trees.Selection) -> jax.Array:
        sizes = [_sizes(leaf, pattern) for leaf in moved.leaves]
        plan = mask_functions.plan(
            moved.shapes, sparsity, allocation=allocations.global_ranking, pattern=pattern
        )
        kept = mask_functions.select_masks(
            sizes, plan.budgets, pattern=pattern, structure=plan.structure
        )
        largest = jnp.zeros((), jnp.float32)
        for size, mask in zip(sizes, kept, strict=True):
            pruned = jnp.max(jnp.where(mask, 0, size), initial=0)
            largest = jnp.maximum(largest, pruned.astype(jnp.float32))
        left = jnp.maximum(end_step - count, 2).astype(jnp.float32)
        return jnp.where(count < end_step, 2 * largest / left, 0)

    def score(params: PyTree, grads: PyTree | None = None) -> PyTree:
        del grads
        chosen = trees.select(params, where)
        sizes = [_sizes(leaf, pattern) for leaf in chosen.leaves]
        return chosen.put(sizes, jax.tree.map(lambda _: jnp.zeros(()), params))

    return pruned(
        name,
        _stepped(name, inner, steered, shrink, where),
        schedules.one_shot(sparsity, end_step),
        score=score,
        allocation=allocations.global_ranking,
        pattern=pattern,
        where=where,
    )


def _sizes(leaf: jax.Array, pattern: patterns.Pattern) -> jax.Array:
    """What is compared with the threshold: the root mean square of each weight's group."""
    if pattern == patterns.Unstructured():
        return jnp.abs(leaf)
    return pattern.expand(jnp.sqrt(pattern.pool(jnp.square(leaf))), leaf.shape)


def proximal(
    name: str,
    inner: optax.GradientTransformation,
    threshold: Threshold,
    shrink: Shrink,
    where: trees.Where,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that `shrink` moves the chosen leaves after each of its updates.

    `shrink` is given the leaves where the update would put them, and the threshold of the step.
    """
    if not callable(threshold) and not float(threshold) >= 0:
        raise ValueError(f"{name}: threshold must be a number of at least 0, got {threshold}.")

    def given(count: jax.Array, moved: trees.Selection) -> jax.Array:
        del moved
        return jnp.asarray(threshold(count) if callable(threshold) else threshold)

    tx = _stepped(name, inner, given, shrink, where)

    def init(params: PyTree) -> PyTree:
        _checks.warn_of_nothing(name, params, trees.select(params, where), set())
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _stepped(
    name: str,
    inner: optax.GradientTransformation,
    threshold: Callable[[jax.Array, trees.Selection], jax.Array],
    shrink: Shrink,
    where: trees.Where,
) -> optax.GradientTransformationExtraArgs:
    """Shrink by ``threshold(count, selection of the moved leaves)``, but for leaves that `inner` never moves."""
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ProximalState:
        return ProximalState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ProximalState]:
        if params is None:
            raise ValueError(
                f"{name}: needs the current parameters. Call tx.update(grads, state, params)."
            )
        at_rest = _inner.frozen(
            lambda *args: inner.update(*args, **extra_args), state.inner_state, params
        )
        chosen = trees.select(params, lambda path, leaf: where(path, leaf) and path not in at_rest)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        leaves = [
            w + u.astype(w.dtype)
            for w, u in zip(chosen.leaves, chosen.take(name, "inner updates", updates), strict=True)
        ]
        moved = chosen._replace(params=chosen.put(leaves, params), leaves=leaves)
        shrunk = shrink(moved, threshold(state.count, moved))
        # In the parameter's dtype: in a narrower one -param would not cancel it exactly.
        steps = [new - w for w, new in zip(chosen.leaves, shrunk, strict=True)]
        count = jnp.asarray(optax.safe_increment(state.count))
        return chosen.put(steps, updates), ProximalState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
