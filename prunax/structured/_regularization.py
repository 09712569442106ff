"""Draw whole units of axis groups towards zero before they are removed.

Norms and penalties are plain differentiable functions of the parameters, to be added to a loss. A gradient step brings
units near zero. `proximal_unit_lasso` lands them on exactly zero, and `prune_channels(..., threshold=0.0)` removes
just those, the network's output unchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prunax import _meshes, trees
from prunax.structured._groups import AxisGroup, Keep, checked_units
from prunax.transforms._proximal import proximal

__all__ = [
    "group_norms",
    "growing_strengths",
    "proximal_unit_lasso",
    "soft_threshold_units",
    "unit_lasso",
    "weighted_l2",
]

PyTree = Any
Strengths = Mapping[AxisGroup, Any]


def group_norms(
    groups: Sequence[AxisGroup], params: PyTree, *, where: trees.Where = trees.is_kernel
) -> dict[AxisGroup, jax.Array]:
    """Norm of each unit: of all weights that go when the unit goes, what it is made from and what reads it.

    Args:
        groups: From `axis_groups`, or `prunable_groups` of them.
        params: The parameters that they were found in.
        where: ``where(path, leaf) -> bool`` chooses the leaves that count. By default kernels: a unit whose kernels are
            zero is read by nobody, whatever its bias.

    Returns:
        ``(units,)`` L2 norms for each group with weights among the chosen ones; float32, float64 for float64. The
        derivative is zero at a unit that is zero.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"fc": jnp.array([[2.0, 0.0]]), "out": jnp.array([[1.0], [2.0]])}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["fc"] @ p["out"], params, jnp.ones((2, 1)))
        >>> norms, = prunax.structured.group_norms(groups, params).values()
        >>> [round(norm, 3) for norm in norms.tolist()]
        [2.236, 2.0]

    References:
        Fang et al., DepGraph: Towards Any Structural Pruning, 2023, arXiv:2301.12900, section 3.3.
    """
    return {group: _root(s) for group, s in _squares(groups, params, where).items()}


def unit_lasso(
    groups: Sequence[AxisGroup], params: PyTree, *, where: trees.Where = trees.is_kernel
) -> jax.Array:
    r"""Sum over units of the unit's norm times the root of its number of weights.

    .. math:: \sum_u \sqrt{|u|} \, \lVert w_u \rVert_2

    Args:
        groups: From `axis_groups`, or `prunable_groups` of them. Frozen groups do not count: nothing of them can go.
        params: The parameters that they were found in.
        where: As for `group_norms`.

    Returns:
        Scalar.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"fc": jnp.array([[3.0, 0.0]]), "out": jnp.array([[4.0], [0.0]])}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["fc"] @ p["out"], params, jnp.ones((2, 1)))
        >>> round(float(prunax.structured.unit_lasso(groups, params)), 4)
        7.0711

    References:
        Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006; Wen et al., Learning
        Structured Sparsity in Deep Neural Networks, 2016, arXiv:1608.03665.
    """
    free = [group for group in groups if not group.frozen]
    sizes = _weights(free, params, where)
    norms = group_norms(free, params, where=where)
    return sum(
        (np.sqrt(sizes[group]).astype(n.dtype) * jnp.sum(n) for group, n in norms.items()),
        start=jnp.zeros((), jnp.float32),
    )


def weighted_l2(
    strengths: Strengths, params: PyTree, *, where: trees.Where = trees.is_kernel
) -> jax.Array:
    r"""Half the sum of squares of each unit's weights, each unit with a strength of its own.

    .. math:: \frac{1}{2} \sum_u \lambda_u \lVert w_u \rVert_2^2

    Args:
        strengths: For each group ``(units,)`` numbers, from `growing_strengths` or any other.
        params: The parameters that the groups were found in.
        where: As for `group_norms`.

    Returns:
        Scalar.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"fc": jnp.array([[3.0, 1.0]]), "out": jnp.array([[4.0], [1.0]])}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["fc"] @ p["out"], params, jnp.ones((2, 1)))
        >>> float(prunax.structured.weighted_l2({groups[0]: jnp.array([1.0, 0.0])}, params))
        12.5
    """
    total = jnp.zeros((), jnp.float32)
    for group, squares in _squares(list(strengths), params, where).items():
        total += jnp.sum(jnp.asarray(strengths[group], squares.dtype) * squares) / 2
    return total


def growing_strengths(
    keep: Keep, step: chex.Numeric, *, rate: float = 1e-4, every: int = 1, ceiling: float = 1.0
) -> dict[AxisGroup, jax.Array]:
    r"""Strengths that grow with the steps on the units to be removed, and are zero on the others.

    .. math:: \lambda_u = \min(\text{rate} \cdot \lfloor \text{step} / \text{every} \rfloor, \text{ceiling})

    With `weighted_l2` this is growing regularisation: ``loss + weighted_l2(growing_strengths(keep, step), params)``.
    The network gets used to doing without the units before they go, so that little is left to lose when they do.

    Args:
        keep: For each group that will shrink the units to keep, as `prune_channels` returns and `shrink` takes.
        step: Number of the training step, may be traced.
        rate: By how much the strength grows at a time.
        every: After how many steps it grows.
        ceiling: Where it stops.

    Returns:
        ``(units,)`` float32 for each group.

    Raises:
        ValueError: If a group is frozen or the units are not its own.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"fc": jnp.ones((4, 3)), "out": jnp.ones((3, 2))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["fc"] @ p["out"], params, jnp.ones((5, 4)))
        >>> keep = {next(g for g in groups if not g.frozen): [0, 2]}
        >>> strengths, = prunax.structured.growing_strengths(keep, 250, rate=0.25, every=100).values()
        >>> strengths.tolist()
        [0.0, 0.5, 0.0]

    References:
        Wang et al., Neural Pruning via Growing Regularization, 2021, arXiv:2012.09243, algorithm 1 (GReg-1).
    """
    strength = jnp.minimum(rate * (jnp.asarray(step) // every).astype(jnp.float32), ceiling)
    result = {}
    for group, units in keep.items():
        removed = np.ones(group.size, np.float32)
        removed[checked_units("growing_strengths", group, units)] = 0
        result[group] = strength * removed
    return result


def soft_threshold_units(
    groups: Sequence[AxisGroup],
    params: PyTree,
    threshold: chex.Numeric,
    *,
    where: trees.Where = trees.is_kernel,
) -> PyTree:
    r"""Scale units down, those with small weights to exactly zero.

    .. math:: w_u \leftarrow w_u \max\left(1 - \frac{\tau \sqrt{|u|}}{\lVert w_u \rVert_2}, 0\right)

    For groups that have no weight in common this is the proximal operator of `unit_lasso`. A weight that lies in units
    of two groups, an output of one and an input of the other, is scaled by both factors.

    Args:
        groups: As for `unit_lasso`.
        params: The parameters that they were found in.
        threshold: tau, in units of weights: a unit whose root mean square is at most this becomes zero. May be traced.
        where: As for `group_norms`.

    Returns:
        The params, dtypes kept.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"fc": jnp.array([[1.0, 0.1]]), "out": jnp.array([[1.0], [0.1]])}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["fc"] @ p["out"], params, jnp.ones((2, 1)))
        >>> prunax.structured.soft_threshold_units(groups, params, 0.5)["fc"].tolist()
        [[0.5, 0.0]]

    References:
        Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006, equation 2.3.
    """
    free = [group for group in groups if not group.frozen]
    sizes = _weights(free, params, where)
    chosen = trees.select(params, where)
    leaves = dict(zip(chosen.paths, chosen.leaves, strict=True))
    for group, squares in _squares(free, params, where).items():
        rms = _root(squares / sizes[group])
        scale = jnp.maximum(1 - jnp.asarray(threshold, rms.dtype) / jnp.where(rms > 0, rms, 1), 0)
        for path, axis, position, _ in group.members:
            if path in leaves:
                leaf = leaves[path]
                factor = jnp.ones(leaf.shape[axis], leaf.dtype)
                places = position.indices(group.size)
                factor = factor.at[places].set(scale[:, None].astype(leaf.dtype))
                leaves[path] = leaf * jnp.expand_dims(factor, _others(leaf, axis))
    return chosen.put([leaves[path] for path in chosen.paths], params)


def proximal_unit_lasso(
    inner: optax.GradientTransformation,
    groups: Sequence[AxisGroup],
    threshold: float | Callable[[jax.Array], chex.Numeric],
    *,
    where: trees.Where = trees.is_kernel,
) -> optax.GradientTransformationExtraArgs:
    """Scale whole units down after each update of the inner optimizer, small ones to zero.

    `soft_threshold_units` as an optax transformation. `prunax.transforms.proximal_group_lasso` does so for the channels
    of each leaf alone; here a unit is zero in every leaf at once, and can be removed.

    Args:
        inner: Any optax transformation.
        groups: As for `unit_lasso`: mostly ``prunable_groups(groups, params)``.
        threshold: tau of one step, or a function of the step, an optax schedule.
        where: As for `group_norms`.

    Returns:
        A `optax.GradientTransformationExtraArgs` whose state is a `prunax.transforms.ProximalState`; after
        ``optax.apply_updates`` small units are exactly 0.0 in the chosen leaves.

    Raises:
        ValueError: If the threshold is negative or NaN; from `update`, if params is missing.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, prunax
        >>> params = {"fc": jnp.array([[1.0, 0.1]]), "out": jnp.array([[1.0], [0.1]])}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["fc"] @ p["out"], params, jnp.ones((2, 1)))
        >>> tx = prunax.structured.proximal_unit_lasso(optax.sgd(0.1), groups, 0.5)
        >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        >>> optax.apply_updates(params, updates)["out"].tolist()
        [[0.5], [0.0]]
    """

    def shrink(moved: trees.Selection, tau: jax.Array) -> list[jax.Array]:
        shrunk = soft_threshold_units(groups, moved.params, tau, where=where)
        return moved.take("proximal_unit_lasso", "params", shrunk)

    return proximal("proximal_unit_lasso", inner, threshold, shrink, where)


def _squares(
    groups: Sequence[AxisGroup], params: PyTree, where: trees.Where
) -> dict[AxisGroup, jax.Array]:
    """``(units,)`` sums of squares for each group with weights among the chosen leaves."""
    chosen = trees.select(params, where)
    leaves = dict(zip(chosen.paths, chosen.leaves, strict=True))
    result: dict[AxisGroup, jax.Array] = {}
    for group in groups:
        for path, axis, position, _ in group.members:
            if path in leaves:
                leaf = jnp.asarray(leaves[path])
                wide = leaf.astype(trees.wide_dtype(leaf.dtype))
                sums = _meshes.gather(jnp.sum(jnp.square(wide), axis=_others(leaf, axis)))
                own = jnp.sum(sums[position.indices(group.size)], axis=1)
                result[group] = result[group] + own if group in result else own
    return result


def _weights(
    groups: Sequence[AxisGroup], params: PyTree, where: trees.Where
) -> dict[AxisGroup, int]:
    """How many weights of the chosen leaves one unit of each group has."""
    chosen = trees.select(params, where)
    shapes = dict(chosen.shapes)
    return {
        group: sum(
            len(position.indices(1)[0]) * int(np.prod(shapes[path])) // shapes[path][axis]
            for path, axis, position, _ in group.members
            if path in shapes
        )
        for group in groups
    }


def _others(leaf: Any, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(leaf.ndim) if i != axis)


def _root(squares: jax.Array) -> jax.Array:
    # The root has no derivative at zero: route around it.
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
