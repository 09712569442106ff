"""Proximal steps: after any optimizer's update, the exact minimiser of a penalty near the new weights.

Where the gradient of a penalty only draws weights near zero, its proximal step puts them on exactly 0.0, and
``prunax.compute_masks(params, threshold=0.0)`` then reads the mask.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prunax import patterns, trees
from prunax.transforms import _checks

__all__ = ["ProximalState", "proximal_group_lasso", "proximal_l1"]

PyTree = Any


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
    threshold: float | Callable[[jax.Array], Any],
    *,
    where: trees.Where = trees.is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Soft-threshold the weights after each update of the inner optimizer.

    .. math:: w \leftarrow \mathrm{sign}(v) \max(|v| - \tau, 0), \quad v = w + u

    Args:
        inner: Any optax transformation; u is its update.
        threshold: The shrinkage tau of one step, in units of weights: for plain gradient descent the learning rate
            times the strength of the L1 penalty. Or a function of the step, an optax schedule.
        where: ``where(path, leaf) -> bool`` chooses the leaves to shrink.

    Returns:
        A `optax.GradientTransformationExtraArgs`; after ``optax.apply_updates`` small weights are exactly 0.0.

    Raises:
        ValueError: If the threshold is negative or NaN; from `update`, if params is missing.

    Examples:
        >>> import jax.numpy as jnp, optax, prunax
        >>> params = {"kernel": jnp.array([[0.5, -0.05]])}
        >>> tx = prunax.transforms.proximal_l1(optax.sgd(0.1), 0.1)
        >>> updates, _ = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [[0.4..., 0.0]]

    References:
        Daubechies et al., An Iterative Thresholding Algorithm for Linear Inverse Problems with a Sparsity Constraint,
        2004, arXiv:math/0307152; Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2.
    """

    def shrink(moved: trees.Selection, tau: jax.Array) -> list[jax.Array]:
        return [
            jnp.sign(v) * jnp.maximum(jnp.abs(v) - tau.astype(v.dtype), 0) for v in moved.leaves
        ]

    return proximal("proximal_l1", inner, threshold, shrink, where)


def proximal_group_lasso(
    inner: optax.GradientTransformation,
    threshold: float | Callable[[jax.Array], Any],
    *,
    pattern: patterns.Pattern = patterns.Channel(),
    where: trees.Where = trees.is_kernel,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink whole groups after each update of the inner optimizer, small ones to zero.

    .. math:: w_g \leftarrow v_g \max\left(1 - \frac{\tau \sqrt{|g|}}{\lVert v_g \rVert_2}, 0\right), \quad v = w + u

    Args:
        inner: Any optax transformation; u is its update.
        threshold: The shrinkage tau of one step: a group whose root mean square is below it becomes zero. Or a function
            of the step, an optax schedule.
        pattern: What a group is: the units of `patterns.Channel` or `patterns.Block`.
        where: ``where(path, leaf) -> bool`` chooses the leaves to shrink.

    Returns:
        A `optax.GradientTransformationExtraArgs`; after ``optax.apply_updates`` small groups are exactly 0.0.

    Raises:
        ValueError: If the threshold is negative or NaN; from `update`, if params is missing, or the pattern does not
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

    return proximal("proximal_group_lasso", inner, threshold, shrink, where)


def proximal(
    name: str,
    inner: optax.GradientTransformation,
    threshold: float | Callable[[jax.Array], Any],
    shrink: Callable[[trees.Selection, jax.Array], list[jax.Array]],
    where: trees.Where,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that `shrink` moves the chosen leaves after each of its updates.

    `shrink` is given the leaves where the update would put them, and the threshold of the step.
    """
    if not callable(threshold) and not float(threshold) >= 0:
        raise ValueError(f"{name}: threshold must be a number of at least 0, got {threshold}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> ProximalState:
        _checks.warn_of_nothing(name, params, trees.select(params, where), set())
        return ProximalState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ProximalState]:
        if params is None:
            raise ValueError(
                f"{name}: needs the current parameters. Call tx.update(grads, state, params)."
            )
        chosen = trees.select(params, where)
        tau = jnp.asarray(threshold(state.count) if callable(threshold) else threshold)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        moved = [
            w + u.astype(w.dtype)
            for w, u in zip(chosen.leaves, chosen.take(name, "inner updates", updates), strict=True)
        ]
        shrunk = shrink(chosen._replace(params=chosen.put(moved, params), leaves=moved), tau)
        # In the parameter's dtype: in a narrower one -param would not cancel it exactly.
        steps = [new - w for w, new in zip(chosen.leaves, shrunk, strict=True)]
        count = jnp.asarray(optax.safe_increment(state.count))
        return chosen.put(steps, updates), ProximalState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
