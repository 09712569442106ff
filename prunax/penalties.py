"""Penalties: plain loss terms that pull weights towards zero.

Add one to a loss, ``loss + 1e-4 * penalties.l1(params)``. A gradient step on a penalty brings weights near zero and not
onto it; `prunax.transforms.proximal_l1` and `proximal_group_lasso` land on exactly zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prunax import patterns, trees

__all__ = ["group_lasso", "l1", "l2", "masked_l2"]

PyTree = Any


def l1(params: PyTree, *, where: trees.Where = trees.is_kernel) -> jax.Array:
    """Sum of absolute values.

    Args:
        params: Pytree of arrays.
        where: ``where(path, leaf) -> bool`` chooses the leaves to penalise.

    Returns:
        float32 scalar.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> float(prunax.penalties.l1({"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.ones(2)}))
        7.0

    References:
        Tibshirani, Regression Shrinkage and Selection via the Lasso, 1996.
    """
    return _total(jnp.abs, params, where)


def l2(params: PyTree, *, where: trees.Where = trees.is_kernel) -> jax.Array:
    """Half the sum of squares, so that the gradient of a weight is the weight.

    Args:
        params: Pytree of arrays.
        where: ``where(path, leaf) -> bool`` chooses the leaves to penalise.

    Returns:
        float32 scalar.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> float(prunax.penalties.l2({"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.ones(2)}))
        12.5

    References:
        Krogh and Hertz, A Simple Weight Decay Can Improve Generalization, 1991.
    """
    return _total(_half_square, params, where)


def group_lasso(
    params: PyTree,
    *,
    pattern: patterns.Pattern = patterns.Channel(),
    where: trees.Where = trees.is_kernel,
) -> jax.Array:
    r"""Sum over groups of the group's norm times the root of its size.

    .. math:: \sum_g \sqrt{|g|} \, \lVert w_g \rVert_2

    Args:
        params: Pytree of arrays.
        pattern: What a group is: the units of `patterns.Channel` or `patterns.Block`.
        where: ``where(path, leaf) -> bool`` chooses the leaves to penalise.

    Returns:
        float32 scalar. The gradient is zero at a group that is zero.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> round(float(prunax.penalties.group_lasso({"kernel": jnp.array([[3.0], [4.0]])})), 4)
        7.0711

    References:
        Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006; Wen et al., Learning
        Structured Sparsity in Deep Neural Networks, 2016, arXiv:1608.03665.
    """

    def norms(leaf: jax.Array) -> jax.Array:
        squares = pattern.pool(jnp.square(leaf))  # means over each group
        positive = squares > 0
        # The root has no derivative at zero: route around it.
        rms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
        # |g| times the root mean square is sqrt(|g|) times the norm: one for each weight of the group.
        return pattern.expand(rms, leaf.shape)

    return _total(norms, params, where)


def masked_l2(params: PyTree, masks: PyTree) -> jax.Array:
    """Half the sum of squares of the weights that the masks prune.

    With `prunax.straight_through` in the forward pass this makes SR-STE: pruned weights go on learning and are drawn
    towards zero, so that masks recomputed every step settle.

    Args:
        params: Pytree of arrays.
        masks: Mask tree of the same structure, True = kept.

    Returns:
        float32 scalar.

    Raises:
        ValueError: If the structures differ, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params, masks = {"kernel": jnp.array([3.0, 4.0])}, {"kernel": jnp.array([True, False])}
        >>> float(prunax.penalties.masked_l2(params, masks))
        8.0

    References:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021, arXiv:2102.04010,
        equation 9.
    """
    total = jnp.zeros((), jnp.float32)
    mask_leaves = trees.leaves_like("masked_l2", "masks", masks, params)
    for leaf, mask in zip(jax.tree.leaves(params), mask_leaves, strict=True):
        if trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            total += jnp.sum(jnp.where(mask, 0, _half_square(leaf)), dtype=jnp.float32)
    return total


def _total(
    function: Callable[[jax.Array], jax.Array], params: PyTree, where: trees.Where
) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for leaf in trees.select(params, where).leaves:
        total += jnp.sum(function(leaf), dtype=jnp.float32)
    return total


def _half_square(x: jax.Array) -> jax.Array:
    return jnp.square(x) / 2
