"""Penalties: plain loss terms that pull weights towards zero, or a pruned model towards its dense teacher.

Add one to a loss, ``loss + 1e-4 * penalties.l1(params)``. A gradient step on a penalty brings weights near zero and not
onto it; `prunax.transforms.proximal_l1` and `proximal_group_lasso` land on exactly zero.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prunax import patterns, trees

__all__ = ["distillation", "group_lasso", "l1", "l2", "masked_l2"]

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
        ValueError: If the structures or shapes differ, naming the leaf.
        TypeError: If a mask is not boolean, naming the leaf.

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
    mask_leaves = trees.check_masks("masked_l2", params, masks)
    for leaf, mask in zip(jax.tree.leaves(params), mask_leaves, strict=True):
        if trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            total += jnp.sum(jnp.where(mask, 0, _half_square(leaf)), dtype=jnp.float32)
    return total


def distillation(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float = 1.0,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""How far a student's predictions are from a teacher's: the Kullback-Leibler divergence at a temperature.

    .. math:: \frac{T^2}{N} \sum_{n=1}^{N} \sum_c p_{nc} \log\frac{p_{nc}}{q_{nc}}, \quad
        p = \mathrm{softmax}(\text{teacher} / T), \quad q = \mathrm{softmax}(\text{student} / T)

    The factor :math:`T^2` keeps the size of the gradient, :math:`T (q - p) / N` by the student's logits, nearly the
    same at every temperature. Use it alone, or beside the task's own loss.

    Args:
        student: Logits, any shape, classes along the last axis.
        teacher: Logits of the same shape. No gradient flows to them.
        temperature: T > 0; larger compares the small probabilities too.
        mask: Bool, of the logits' shape without the last axis: True = counted, False for padding. The mean is over
            the N places that count, and 0 where there are none.

    Returns:
        Scalar, float32 (float64 for logits in it).

    Raises:
        ValueError: If the shapes do not fit, or the temperature is not positive.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> teacher, student = jnp.array([[0.0, jnp.log(3.0)]]), jnp.zeros((1, 2))
        >>> round(float(prunax.penalties.distillation(student, teacher)), 4)
        0.1308

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531, section 2.
    """
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(
            f"distillation: student and teacher must be logits of one shape, got {jnp.shape(student)} and "
            f"{jnp.shape(teacher)}. Give both models the same inputs and classes."
        )
    if mask is not None and jnp.shape(mask) != jnp.shape(student)[:-1]:
        raise ValueError(
            f"distillation: the mask must have the logits' shape without classes, {jnp.shape(student)[:-1]}, got "
            f"{jnp.shape(mask)}."
        )
    if not temperature > 0:
        raise ValueError(f"distillation: temperature must be positive, got {temperature}.")
    dtype = trees.wide_dtype(student.dtype, teacher.dtype)
    counted = jnp.ones(jnp.shape(student)[:-1], jnp.bool_) if mask is None else mask
    # Whatever stands in padding, NaN included, has no part in the gradient either.
    student, teacher = (
        jnp.where(counted[..., None], x, jnp.zeros((), x.dtype)) for x in (student, teacher)
    )
    log_q = jax.nn.log_softmax(student.astype(dtype) / temperature)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(dtype) / temperature)
    p = jnp.exp(log_p)
    # A class that the teacher rules out adds nothing, whatever the student makes of it.
    divergence = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1)
    total = jnp.sum(divergence)
    return temperature**2 * total / jnp.maximum(jnp.sum(counted), 1).astype(dtype)


def _total(
    function: Callable[[jax.Array], jax.Array], params: PyTree, where: trees.Where
) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for leaf in trees.select(params, where).leaves:
        total += jnp.sum(function(leaf), dtype=jnp.float32)
    return total


def _half_square(x: jax.Array) -> jax.Array:
    return jnp.square(x) / 2
