"""Pruning at initialisation: scores that need a loss or a model, and no training.

Each score function takes a function of params and gives a score tree for `prunax.compute_masks`, with
`allocation.global_ranking` as published. `iterative_masks` prunes in many small steps, which is what keeps SynFlow from
emptying a layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prunax import _masks as mask_functions
from prunax import _meshes, patterns, schedules, trees
from prunax import allocation as allocations
from prunax import scores as score_functions

__all__ = ["grasp", "iterative_masks", "snip", "synflow"]

PyTree = Any


def snip(loss_fn: Callable[..., jax.Array], params: PyTree, *args: Any) -> PyTree:
    """Connection sensitivity |w * dL/dw|.

    Args:
        loss_fn: ``loss_fn(params, *args)``, a scalar.
        params: Pytree of floating-point arrays.
        *args: Passed to `loss_fn`: a batch.

    Returns:
        Scores of the params' structure and shapes, larger = keep.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.initialization.snip(lambda p: jnp.sum(p["kernel"] ** 2), {"kernel": jnp.array([[1.0, 2.0]])})
        {'kernel': Array([[2., 8.]], dtype=float32)}

    References:
        Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, 2019, arXiv:1810.02340,
        equation 6 (the normalisation, which changes no ranking, left out).
    """
    with _meshes.own_mesh(params, args):
        return score_functions.saliency(params, jax.grad(loss_fn)(params, *args))


def grasp(loss_fn: Callable[..., jax.Array], params: PyTree, *args: Any) -> PyTree:
    """Gradient signal preservation, w * Hg: how much the gradient's norm falls when the weight is removed.

    Args:
        loss_fn: ``loss_fn(params, *args)``, a scalar.
        params: Pytree of floating-point arrays.
        *args: Passed to `loss_fn`: a batch.

    Returns:
        Scores of the params' structure and shapes, of both signs, larger = keep (the paper's score is the negative, and
        prunes the largest).

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.initialization.grasp(lambda p: jnp.sum(p["kernel"] ** 2), {"kernel": jnp.array([[1.0, 2.0]])})
        {'kernel': Array([[ 4., 16.]], dtype=float32)}

    References:
        Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020, arXiv:2002.07376,
        equation 8.
    """
    gradient = jax.grad(lambda p: loss_fn(p, *args))
    with _meshes.own_mesh(params, args):
        _, product = jax.jvp(gradient, (params,), (gradient(params),))
        return jax.tree.map(jnp.multiply, params, product)


def synflow(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> PyTree:
    """Synaptic flow |w| * dR/d|w|, where R sums the outputs for inputs of ones under the absolute weights.

    It needs no data. Use it with `iterative_masks`; once is not enough.

    Args:
        apply_fn: ``apply_fn(params, *args)``, the model; the outputs may be any pytree. Only linear layers and
            activations that keep positive inputs positive give the flow its meaning.
        params: Pytree of floating-point arrays.
        *args: Example inputs. Floating-point arrays among them are replaced by ones: only shapes and dtypes count. One
            example is enough.

    Returns:
        Scores of the params' structure and shapes, not negative. Where the flow of a deep, wide network overflows, all
        params are scaled down by one factor first, the largest found that keeps it finite. Without biases and
        normalisation that divides all scores by one number, and so changes no ranking. NaN where no factor does it.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [4.0]])}
        >>> scores = prunax.initialization.synflow(lambda p, x: x @ p["a"] @ p["b"], params, jnp.zeros((1, 1)))
        >>> scores["a"].tolist(), scores["b"].tolist()
        ([[3.0, 8.0]], [[3.0], [8.0]])

    References:
        Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
        arXiv:2006.05467, equation 2 and algorithm 1.
    """

    def ones(x: Any) -> Any:
        is_float = trees.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.ones_like(x) if is_float else x

    def flow(absolute: PyTree) -> jax.Array:
        outputs = apply_fn(absolute, *jax.tree.map(ones, args))
        return sum((jnp.sum(o) for o in jax.tree.leaves(outputs)), jnp.zeros(()))

    absolute = jax.tree.map(jnp.abs, params)

    def scale(carry: _Scaled) -> _Scaled:
        scaled = jax.tree.map(lambda w: w * jnp.exp2(-carry.exponent).astype(w.dtype), absolute)
        scores = score_functions.saliency(scaled, jax.grad(flow)(scaled))
        finite = jnp.stack([jnp.all(jnp.isfinite(s)) for s in jax.tree.leaves(scores)]).all()
        low = jnp.where(finite, carry.low, carry.exponent)
        high = jnp.where(finite, carry.exponent, carry.high)
        best = jax.tree.map(lambda new, old: jnp.where(finite, new, old), scores, carry.scores)
        return _Scaled(carry.tries + 1, low, high, (low + high) / 2, best)

    def goes_on(carry: _Scaled) -> jax.Array:
        return (carry.tries < _TRIES) & (carry.high > 0)

    with _meshes.own_mesh(params, args):
        nothing = jax.tree.map(
            lambda s: jnp.full_like(s, jnp.nan), score_functions.saliency(absolute, absolute)
        )
        low, high = jnp.zeros(()), jnp.full((), _MOST)
        start = _Scaled(jnp.zeros((), jnp.int32), low, high, low, nothing)
        if trees.is_traced(*jax.tree.leaves((params, args))):
            start = _meshes.vary_like(start, params, args)
            return jax.lax.while_loop(goes_on, scale, start).scores
        while goes_on(start):
            start = scale(start)
        return start.scores


_MOST = 64.0  # halvings of the params at most
_TRIES = 13  # the last bisection settles a 64th of a halving


class _Scaled(NamedTuple):
    """Bisection for how often to halve the params: `low` times is too few, `high` times is enough."""

    tries: jax.Array
    low: jax.Array
    high: jax.Array
    exponent: jax.Array  # to be tried next
    scores: PyTree  # of `high`


def iterative_masks(
    score: Callable[[PyTree], PyTree],
    params: PyTree,
    sparsity: float,
    *,
    rounds: int = 100,
    allocation: allocations.Allocation = allocations.global_ranking,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
) -> PyTree:
    r"""Prune in rounds, scoring what is left anew each time.

    .. math:: s_r = 1 - (1 - s)^{r / R}, \quad r = 1, \ldots, R

    Args:
        score: ``score(params) -> scores`` of masked params; bind the rest, as in
            ``lambda p: prunax.initialization.synflow(model.apply, p, x)``.
        params: Pytree of floating-point arrays.
        sparsity: Fraction to prune in the end, in [0, 1].
        rounds: Number of rounds R.
        allocation: How each round's sparsity is shared out among leaves.
        pattern: Which weights go together or compete.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.

    Returns:
        A mask tree, True = kept, of exactly the sparsity. Pruned weights stay pruned from round to round.

    Raises:
        ValueError: As `prunax.compute_masks`, or if rounds is not positive.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> k1, k2 = jax.random.split(jax.random.key(0))
        >>> params = {"in": jax.random.normal(k1, (8, 16)), "out": jax.random.normal(k2, (16, 4))}
        >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
        >>> score = lambda p: prunax.initialization.synflow(apply_fn, p, jnp.ones((1, 8)))
        >>> masks = prunax.initialization.iterative_masks(score, params, 0.9, rounds=10)
        >>> prunax.summarize(params, masks).kept
        19

    References:
        Tanaka et al., 2020, arXiv:2006.05467, algorithm 1.
    """
    if rounds < 1:
        raise ValueError(f"iterative_masks: rounds must be at least 1, got {rounds}.")
    schedules.check_sparsity("iterative_masks", sparsity)

    def prune_to(s: Any, masks: PyTree) -> PyTree:
        scores = score(mask_functions.apply_masks(params, masks))
        # Pruned weights rank below any other, so that they stay pruned whatever the score says of a zero.
        scores = jax.tree.map(lambda x, m: jnp.where(m, x, -jnp.inf), scores, masks)
        return mask_functions.compute_masks(
            params, s, scores=scores, allocation=allocation, pattern=pattern, where=where
        )

    masks = mask_functions.compute_masks(
        params, 0.0, allocation=allocation, pattern=pattern, where=where
    )
    steps = 1 - (1 - sparsity) ** (jnp.arange(1, rounds) / rounds)
    masks, _ = jax.jit(lambda m: jax.lax.scan(lambda m, s: (prune_to(s, m), None), m, steps))(masks)
    return prune_to(
        sparsity, masks
    )  # outside of jit: exact at any size, and NaN scores are refused
