"""Learned masks: scores, gates and thresholds that are trained like any other parameter.

Each function maps trees to trees and is differentiable by what is learned. What it ends with becomes masks, by which
`prunax.transforms.fixed_masks` trains on and `prunax.export` saves.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from prunax import _masks as mask_functions
from prunax import allocation as allocations
from prunax import patterns, trees

__all__ = [
    "expected_l0",
    "hard_concrete",
    "nm_categorical",
    "nm_logits",
    "soft_threshold",
    "straight_through",
]

PyTree = Any


def straight_through(
    params: PyTree,
    scores: PyTree,
    sparsity: chex.Numeric | None = None,
    *,
    allocation: allocations.Allocation = allocations.uniform,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
) -> PyTree:
    r"""Mask params by trained scores, whose gradient is what turning a weight on would do.

    .. math:: w' = w \odot M(s), \qquad
        \frac{\partial L}{\partial s} = \frac{\partial L}{\partial w'} \odot w, \qquad
        \frac{\partial L}{\partial w} = \frac{\partial L}{\partial w'} \odot M(s)

    where the mask M keeps the weights with the largest scores. By what is trained this is

    - edge-popup: the scores alone, over random weights that stay as they are;
    - movement pruning: scores that begin at zero, and the weights, under a sparsity that grows;
    - HYDRA: the scores alone, over trained weights and in proportion to them at first, with a robust loss.

    Scores rank as they are. Rank ``jax.tree.map(jnp.abs, scores)``, as edge-popup's and HYDRA's programs do, and a
    score counts on both sides of zero.

    Args:
        params: Pytree of arrays.
        scores: Tree of the params' structure, larger = keep; a scalar under a leaf means that it is never pruned. In
            the dtype that they train well in, float32 under bfloat16 params say.
        sparsity: As for `prunax.compute_masks`: a number, or traced, as a schedule's is.
        allocation: As for `prunax.compute_masks`.
        pattern: As for `prunax.compute_masks`.
        where: As for `prunax.compute_masks`.

    Returns:
        The masked params, in the params' dtypes. The masks themselves are
        ``prunax.compute_masks(params, sparsity, scores=scores, ...)``.

    Raises:
        ValueError: As `prunax.compute_masks`.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[2.0, 3.0]])}
        >>> scores = {"kernel": jnp.array([[0.1, 0.7]])}
        >>> masked = lambda scores: prunax.learned.straight_through(params, scores, 0.5)
        >>> masked(scores)["kernel"].tolist()
        [[0.0, 3.0]]
        >>> jax.grad(lambda scores: jnp.sum(5.0 * masked(scores)["kernel"]))(scores)["kernel"].tolist()
        [[10.0, 15.0]]

    References:
        Ramanujan et al., What's Hidden in a Randomly Weighted Neural Network?, 2020, arXiv:1911.13299, section 3; Sanh
        et al., Movement Pruning, 2020, arXiv:2005.07683, equations 2-3; Sehwag et al., HYDRA: Pruning Adversarially
        Robust Neural Networks, 2020, arXiv:2002.10509, section 3.
    """
    fixed = jax.lax.stop_gradient
    masks = mask_functions.compute_masks(
        jax.tree.map(lambda leaf: fixed(leaf) if trees.is_array(leaf) else leaf, params),
        sparsity,
        scores=jax.tree.map(fixed, scores),
        allocation=allocation,
        pattern=pattern,
        where=where,
    )
    leaves, treedef = jax.tree.flatten(params)
    score_leaves = trees.leaves_like("learned.straight_through", "scores", scores, params)
    return treedef.unflatten(
        _masked(leaf, score, mask) if trees.is_prunable(mask, leaf) else leaf
        for leaf, score, mask in zip(leaves, score_leaves, jax.tree.leaves(masks), strict=True)
    )


def hard_concrete(
    logits: PyTree,
    key: jax.Array | None = None,
    *,
    temperature: float = 2 / 3,
    low: float = -0.1,
    high: float = 1.1,
) -> PyTree:
    r"""Draw gates in [0, 1] that are exactly 0 or 1 with a probability, and differentiable by it.

    .. math:: \bar z = \sigma\left(\frac{\log u - \log(1 - u) + \log\alpha}{\beta}\right) (\zeta - \gamma) + \gamma,
        \qquad z = \min(1, \max(0, \bar z)), \qquad u \sim U(0, 1)

    Multiply them with weights, or with units (`prunax.structured.apply_gates`), and add `expected_l0` times a strength
    to the loss.

    Args:
        logits: Pytree of arrays of any shapes, log alpha: one for each gate.
        key: A JAX random key; the same key draws the same gates. None for those of a model in use,
            :math:`\min(1, \max(0, \sigma(\log\alpha)(\zeta - \gamma) + \gamma))`.
        temperature: beta, in (0, 1]: near 0 gates are nearly always 0 or 1.
        low: gamma < 0, to which the distribution is stretched.
        high: zeta > 1, likewise.

    Returns:
        Gates of the logits' structure, shapes and dtypes. ``gate > 0`` of gates drawn without a key makes masks.

    Raises:
        ValueError: If the temperature is not positive, or not ``low < 0`` and ``high > 1``.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> logits = jnp.array([-5.0, 0.0, 5.0])
        >>> prunax.learned.hard_concrete(logits).tolist()
        [0.0, 0.5, 1.0]
        >>> prunax.learned.hard_concrete(logits, jax.random.key(0)).shape
        (3,)

    References:
        Louizos et al., Learning Sparse Neural Networks through L0 Regularization, 2018, arXiv:1712.01312, equations
        10, 11 and 13.
    """
    _check_stretch("learned.hard_concrete", temperature, low, high)
    leaves, treedef = jax.tree.flatten(logits)
    keys = [None] * len(leaves) if key is None else jax.random.split(key, max(len(leaves), 1))

    def gate(leaf: jax.Array, key: Any) -> jax.Array:
        wide = leaf.astype(trees.wide_dtype(leaf.dtype))
        if key is not None:
            wide = (wide + jax.random.logistic(key, leaf.shape, wide.dtype)) / temperature
        return jnp.clip(jax.nn.sigmoid(wide) * (high - low) + low, 0, 1).astype(leaf.dtype)

    return treedef.unflatten(gate(*pair) for pair in zip(leaves, keys, strict=False))


def expected_l0(
    logits: PyTree, *, temperature: float = 2 / 3, low: float = -0.1, high: float = 1.1
) -> jax.Array:
    r"""The expected number of gates of `hard_concrete` that are not zero.

    .. math:: \sum_j P(z_j \neq 0) = \sum_j \sigma\left(\log\alpha_j - \beta \log\frac{-\gamma}{\zeta}\right)

    Args:
        logits: As for `hard_concrete`.
        temperature: As for `hard_concrete`.
        low: As for `hard_concrete`.
        high: As for `hard_concrete`.

    Returns:
        float32 scalar.

    Raises:
        ValueError: As `hard_concrete`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> round(float(prunax.learned.expected_l0(jnp.zeros(2))), 4)
        1.6636

    References:
        Louizos et al., 2018, arXiv:1712.01312, equation 12.
    """
    _check_stretch("learned.expected_l0", temperature, low, high)
    shift = temperature * math.log(-low / high)
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(logits):
        total += jnp.sum(jax.nn.sigmoid(leaf.astype(jnp.float32) - shift))
    return total


def nm_logits(
    params: PyTree,
    pattern: patterns.NM,
    *,
    masks: PyTree | None = None,
    strength: float = 3.0,
    where: trees.Where = trees.is_kernel,
) -> PyTree:
    r"""Make the logits of `nm_categorical`: one for each way of keeping n of a group of m weights.

    Args:
        params: Pytree of arrays.
        pattern: Which n of m.
        masks: A mask tree to begin near, of magnitude or Wanda scores say, True = kept; None for no preference.
        strength: With `masks`, what a pattern's logit gains for each weight that it keeps as they do.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.

    Returns:
        A tree of the params' structure. A prunable leaf's logits are float32, of its shape but with m times fewer along
        the pattern's axis, and a last axis for the ``comb(m, n)`` patterns, in the order of `itertools.combinations`;
        every other leaf has the scalar 0.

    Raises:
        ValueError: If the pattern does not fit a leaf, or the masks do not, naming it.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
        >>> logits = prunax.learned.nm_logits(params, prunax.patterns.NM(2, 4))
        >>> logits["kernel"].shape, logits["bias"].shape
        ((2, 3, 6), ())

    References:
        Fang et al., MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models, 2024, arXiv:2409.17481,
        equation 10 (the prior, with one scale for all groups).
    """
    chosen = trees.select(params, where)
    patterns.check_fit("learned.nm_logits", pattern, chosen.shapes)
    axis, n, m = pattern.axis, pattern.n, pattern.m
    made = []
    kept = [None] * len(chosen.leaves)
    if masks is not None:
        trees.check_masks("learned.nm_logits", params, masks)
        kept = chosen.take("learned.nm_logits", "masks", masks)
    for leaf, mask in zip(chosen.leaves, kept, strict=True):
        shape = list(leaf.shape)
        shape[axis] //= m
        logits = jnp.zeros((*shape, math.comb(m, n)), jnp.float32)
        if mask is not None:
            units = pattern.pool(jnp.broadcast_to(mask, leaf.shape).astype(jnp.float32))
            groups = jnp.moveaxis(units, pattern.compare_axis, -1)
            alike = jnp.einsum("...m,cm->...c", groups, _candidates(n, m), precision="highest")
            logits += strength * (alike - jnp.mean(alike, axis=-1, keepdims=True))
        made.append(logits)
    return chosen.put(made, jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params))


def nm_categorical(
    logits: PyTree,
    pattern: patterns.NM,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
) -> PyTree:
    r"""Draw N:M masks from learned distributions over the patterns of each group, differentiably.

    .. math:: y = \mathrm{softmax}\left(\frac{\pi + g}{\tau}\right), \qquad m = \sum_i y_i S_i,
        \qquad g_i = -\log(-\log u_i)

    where the S_i are the ``comb(m, n)`` ways to keep n of m. Multiply weights with m. Lower the temperature towards
    zero, or scale the logits up, and the soft masks become the patterns themselves.

    Args:
        logits: pi, from `nm_logits`; a scalar under a leaf means that it is never pruned.
        pattern: Which n of m.
        key: A JAX random key for the Gumbel noise. None for the most probable pattern of each group, as masks.
        temperature: tau > 0, perhaps traced: one that falls never recompiles.

    Returns:
        With a key, soft masks: reals in [0, 1] in the logits' dtypes, of the leaves' shapes, n in sum over each group,
        and the scalar 1 where nothing is pruned. Without one, a mask tree: bool, True = kept, and the scalar True.

    Raises:
        ValueError: If the temperature is not positive, or the logits are not those of the pattern.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> pattern = prunax.patterns.NM(1, 2)
        >>> logits = {"kernel": jnp.array([[[0.0, 2.0]], [[1.0, 0.0]]])}
        >>> prunax.learned.nm_categorical(logits, pattern)["kernel"].tolist()
        [[False], [True], [True], [False]]
        >>> soft = prunax.learned.nm_categorical(logits, pattern, jax.random.key(0))["kernel"]
        >>> soft.reshape(2, 2).sum(1).tolist()
        [1.0, 1.0]

    References:
        Fang et al., MaskLLM, 2024, arXiv:2409.17481, equations 4-7; Jang et al., Categorical Reparameterization with
        Gumbel-Softmax, 2017, arXiv:1611.01144.
    """
    if not (trees.is_traced(temperature) or temperature > 0):
        raise ValueError(
            f"learned.nm_categorical: temperature must be positive, got {temperature}."
        )
    leaves, treedef = jax.tree.flatten(logits)
    keys = [None] * len(leaves) if key is None else jax.random.split(key, max(len(leaves), 1))
    candidates = _candidates(pattern.n, pattern.m)

    def mask(path: str, leaf: jax.Array, key: Any) -> jax.Array:
        if jnp.ndim(leaf) == 0:
            return trees.keep_all() if key is None else jnp.ones((), leaf.dtype)
        if leaf.shape[-1] != len(candidates):
            raise ValueError(
                f"learned.nm_categorical: the logits of {path!r} are {leaf.shape[-1]} for each group, and {pattern} "
                f"has {len(candidates)} patterns. Make them with learned.nm_logits(params, pattern)."
            )
        if key is None:
            groups = jnp.take(candidates, jnp.argmax(leaf, axis=-1), axis=0) > 0
        else:
            wide = leaf.astype(trees.wide_dtype(leaf.dtype))
            noisy = (wide + jax.random.gumbel(key, wide.shape, wide.dtype)) / temperature
            groups = jnp.einsum(
                # In TF32 or bfloat16 a group would no longer add up to n.
                "...c,cm->...m",
                jax.nn.softmax(noisy),
                candidates.astype(wide.dtype),
                precision="highest",
            ).astype(leaf.dtype)
        return _ungrouped(groups, pattern.axis)

    named = zip(trees.paths(logits), leaves, keys, strict=False)
    return treedef.unflatten(mask(*each) for each in named)


def soft_threshold(
    params: PyTree,
    thresholds: PyTree,
    *,
    gate: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
    where: trees.Where = trees.is_kernel,
) -> PyTree:
    r"""Shrink weights by a learned threshold, small ones to zero: soft threshold weight reparameterization.

    .. math:: w' = \mathrm{sign}(w) \max(|w| - g(s), 0), \qquad
        \frac{\partial L}{\partial s} = -g'(s) \sum_{|w| > g(s)} \mathrm{sign}(w) \frac{\partial L}{\partial w'}

    Sparsity comes from weight decay on s, which begins far below zero and is drawn towards it, and from the loss.

    Args:
        params: Pytree of arrays.
        thresholds: Tree of the params' structure: s for each leaf, a scalar, or an array that broadcasts against it,
            one for each output say. Those of leaves that are not chosen are not used.
        gate: g, from any real to a threshold of at least zero.
        where: ``where(path, leaf) -> bool`` chooses the leaves.

    Returns:
        The params, small weights exactly 0.0. ``prunax.compute_masks(result, threshold=0.0)`` are their masks.

    Raises:
        ValueError: If the structures differ, or a threshold does not broadcast, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params, s = {"kernel": jnp.array([[2.0, -0.2]])}, {"kernel": jnp.array(0.0)}
        >>> prunax.learned.soft_threshold(params, s)["kernel"].tolist()
        [[1.5, 0.0]]

    References:
        Kusupati et al., Soft Threshold Weight Reparameterization for Learnable Sparsity, 2020, arXiv:2002.03231,
        equations 3-6.
    """
    chosen = trees.select(params, where)
    given = chosen.take("learned.soft_threshold", "thresholds", thresholds)
    shrunk = []
    for path, w, s in zip(chosen.paths, chosen.leaves, given, strict=True):
        try:
            fits = np.broadcast_shapes(np.shape(s), w.shape) == w.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"learned.soft_threshold: the threshold of {path!r} has shape {np.shape(s)}, which does not broadcast "
                f"against {w.shape}. Pass a scalar, or one for each output."
            )
        tau = jnp.broadcast_to(gate(jnp.asarray(s)).astype(w.dtype), w.shape)
        shrunk.append(jnp.where(jnp.abs(w) > tau, w - jnp.sign(w) * tau, jnp.zeros((), w.dtype)))
    return chosen.put(shrunk, params)


@jax.custom_jvp
def _masked(weight: jax.Array, score: jax.Array, mask: jax.Array) -> jax.Array:
    del score
    return jnp.where(mask, weight, jnp.zeros((), weight.dtype))


@_masked.defjvp
def _masked_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    weight, score, mask = primals
    by_score = (weight.astype(score.dtype) * tangents[1]).astype(weight.dtype)
    return _masked(*primals), _masked(tangents[0], score, mask) + by_score


def _check_stretch(function: str, temperature: float, low: float, high: float) -> None:
    fits = trees.is_traced(temperature) or temperature > 0
    if not (fits and low < 0 and high > 1):
        raise ValueError(
            f"{function}: expected a positive temperature, low below 0 and high above 1, got "
            f"temperature={temperature}, low={low}, high={high}."
        )


def _candidates(n: int, m: int) -> jax.Array:
    """All ways to keep n of m: one row of ones and zeros for each."""
    rows = [[float(i in kept) for i in range(m)] for kept in itertools.combinations(range(m), n)]
    return jnp.array(rows, jnp.float32)


def _ungrouped(groups: jax.Array, axis: int) -> jax.Array:
    """Lay the members of groups, the last axis, side by side along an axis of the leaf."""
    axis %= groups.ndim - 1
    split = jnp.moveaxis(groups, -1, axis + 1)
    shape = split.shape
    return split.reshape((*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))
