"""Scores (saliencies): how much each weight matters. Larger means keep.

A score is a function ``score(params, grads) -> scores``, so that any of them can be handed to `prunax.prune`, and a
score tree has the structure of the params. Leaves that are not floating-point (or complex) arrays get the scalar 0: no
score, never pruned. Scores are real. A new score is a new function with that signature.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from prunax import _meshes, _selection, trees

__all__ = [
    "Score",
    "ScoreWithMemory",
    "deflated_gradient",
    "ema",
    "ema_gradients",
    "fisher",
    "gradient",
    "magnitude",
    "movement",
    "random",
    "saliency",
]

PyTree = Any

_SWEEPS = 4
"""Of power iterations, over both sides: more change no score that would matter."""

Score = Callable[..., Any]
"""A score: ``score(params, grads)`` gives a tree of the params' structure, larger = keep."""


def magnitude(params: PyTree, grads: PyTree | None = None) -> PyTree:
    """Score each weight by its absolute value, |w|.

    Args:
        params: Pytree of arrays, any shapes.
        grads: Not used; there so that every score is called alike.

    Returns:
        Scores of the params' structure, shapes and dtypes.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.scores.magnitude({"kernel": jnp.array([[-3.0, 2.0]])})
        {'kernel': Array([[3., 2.]], dtype=float32)}

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015, arXiv:1506.02626.
    """
    del grads
    return _score("magnitude", _selection.absolute, params)


def gradient(params: PyTree, grads: PyTree) -> PyTree:
    """Score each weight by the absolute value of its gradient, |g|.

    Args:
        params: Pytree of arrays, any shapes.
        grads: Gradients of the loss, the params' structure and shapes.

    Returns:
        Scores of the params' structure and shapes, in the gradients' dtypes.

    Raises:
        ValueError: If grads is missing or its structure is not that of the params.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.scores.gradient({"kernel": jnp.array([[1.0, 1.0]])}, {"kernel": jnp.array([[-3.0, 2.0]])})
        {'kernel': Array([[3., 2.]], dtype=float32)}

    References:
        The growth criterion of Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134, section 3.
    """
    return _score("gradient", lambda w, g: jnp.abs(g), params, grads)


def deflated_gradient(params: PyTree, grads: PyTree) -> PyTree:
    r"""Score each weight by the absolute value of its gradient beyond the leading rank-one part of its leaf's.

    The gradient of the weight between input i and unit j is the mean of ``x_i * d_j`` over a batch, d being what comes
    back to the unit:

    .. math:: g_{ij} = \overline{x}_i \, \overline{d}_j + \mathrm{cov}(x_i, d_j)

    Where inputs do not have mean zero, images in [0, 1] or what a ReLU lets through, the first term is most of it. It
    says which inputs and which units are large, not which belong together, and the unit's bias learns it anyway. It has
    rank one, and is taken out as such: the nearest ``u v^T``, found by power iterations in float32. A leaf of more axes
    is the matrix of its last axis and all others, ``(height, width, in, out)``, or of its first and all others, ``(out,
    in, height, width)`` and ``(in, heads, width)``, whichever is nearer to a square. For layers in one leaf it is one
    part for all of them, inside `jax.shard_map` one of each shard.

    Args:
        params: Pytree of arrays, any shapes.
        grads: Gradients of the loss, the params' structure and shapes.

    Returns:
        Scores of the params' structure and shapes, float32 or wider; those of vectors are ``|g|``.

    Raises:
        ValueError: If grads is missing or its structure is not that of the params.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> row = jnp.arange(1.0, 6)
        >>> grads = {"kernel": jnp.outer(row, row).at[0, 0].add(3.0)}  # of rank one, but for one weight
        >>> scores = prunax.scores.gradient(grads, grads)
        >>> int(scores["kernel"].argmax())
        24
        >>> scores = prunax.scores.deflated_gradient(grads, grads)
        >>> int(scores["kernel"].argmax())
        0

    References:
        Golub and Van Loan, Matrix Computations, 2013, section 8.2 (power iterations, deflation).
    """
    return _score("deflated_gradient", lambda w, g: _deflated(g), params, grads, wide=True)


def _deflated(g: jax.Array) -> jax.Array:
    """|g| less its leading rank-one part. Products and sums only: they keep any sharding."""
    cuts = {k: min(math.prod(g.shape[:k]), math.prod(g.shape[k:])) for k in (g.ndim - 1, 1)}
    cut = max(cuts, key=lambda k: cuts[k])
    if g.ndim < 2 or cuts[cut] < 2:  # a vector is of rank one
        return jnp.abs(g)
    first, second = tuple(range(cut)), tuple(range(cut, g.ndim))
    scale = jnp.max(jnp.abs(g))
    unit = g / jnp.where(scale > 0, scale, 1).astype(g.dtype)

    def direction(x: jax.Array, over: tuple[int, ...]) -> jax.Array:
        total = x.sum(over, keepdims=True)
        norm = jnp.sqrt(jnp.sum(jnp.abs(total) ** 2))
        return total / jnp.where(norm > 0, norm, 1).astype(g.dtype)

    # Signed squares, and a bit of no symmetry: what a softmax sends back adds up to zero.
    v = direction(unit * jnp.abs(unit).astype(g.dtype), first)
    v += jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape).astype(g.dtype) / 100
    for _ in range(_SWEEPS):
        u = direction(unit * jnp.conj(v), second)
        v = direction(unit * jnp.conj(u), first)
    u = jnp.sum(unit * jnp.conj(v), second, keepdims=True)
    return scale * jnp.abs(unit - u * v)


def saliency(params: PyTree, grads: PyTree) -> PyTree:
    """Score each weight by |w * g|, the first-order change of the loss when it is removed.

    Args:
        params: Pytree of arrays, any shapes.
        grads: Gradients of the loss, the params' structure and shapes.

    Returns:
        Scores of the params' structure and shapes.

    Raises:
        ValueError: If grads is missing or its structure is not that of the params.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.scores.saliency({"kernel": jnp.array([[2.0, 1.0]])}, {"kernel": jnp.array([[-3.0, 2.0]])})
        {'kernel': Array([[6., 2.]], dtype=float32)}

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017,
        arXiv:1611.06440, equation 8.
    """
    return _score("saliency", lambda w, g: jnp.abs(w * g), params, grads, wide=True)


def fisher(
    params: PyTree, grads: PyTree | None = None, *, second_moment: PyTree | None = None
) -> PyTree:
    """Score each weight by w^2 E[g^2], the second-order change of the loss under the empirical Fisher diagonal.

    Args:
        params: Pytree of arrays, any shapes.
        grads: Gradients of the loss, the params' structure and shapes. Their square stands in for the second moment
            where none is given.
        second_moment: A running mean of squared gradients, the params' structure and shapes: Adam's `nu`, say.

    Returns:
        Scores of the params' structure and shapes.

    Raises:
        ValueError: If neither grads nor second_moment is given, or its structure is not that of the params.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.scores.fisher({"kernel": jnp.array([[2.0, 1.0]])}, {"kernel": jnp.array([[-3.0, 2.0]])})
        {'kernel': Array([[36.,  4.]], dtype=float32)}

    References:
        LeCun et al., Optimal Brain Damage, 1989, equation 5, with the Fisher diagonal of Theis et al., Faster Gaze
        Prediction with Dense Networks and Fisher Pruning, 2018, arXiv:1801.05787, equation 6 (constant factor left
        out).
    """
    if second_moment is not None:
        return _score(
            "fisher",
            lambda w, f: jnp.square(jnp.abs(w)) * jnp.abs(f),
            params,
            second_moment,
            wide=True,
        )
    return _score("fisher", lambda w, g: jnp.square(jnp.abs(w * g)), params, grads, wide=True)


def movement(params: PyTree, grads: PyTree) -> PyTree:
    """Score each weight by -w * g: positive where a step against the gradient moves it away from zero.

    One step says little. Averaged over many, ``scores.ema(scores.movement, 0.99)``, it is movement pruning. A weight
    that is exactly zero scores -inf: a pruned weight stays pruned, where the product, which is then zero, would rank it
    above every weight that moves towards zero. (In the paper pruned weights keep their values.)

    Args:
        params: Pytree of arrays, any shapes.
        grads: Gradients of the loss, the params' structure and shapes.

    Returns:
        Scores of the params' structure and shapes, of both signs.

    Raises:
        ValueError: If grads is missing or its structure is not that of the params.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.scores.movement({"kernel": jnp.array([[2.0, 1.0]])}, {"kernel": jnp.array([[-3.0, 2.0]])})
        {'kernel': Array([[ 6., -2.]], dtype=float32)}

    References:
        Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020, arXiv:2005.07683, equation 4 (up to the
        learning rate, and with a decaying average for the sum).
    """
    return _score(
        "movement",
        # Of complex ones the real part: what the loss changes by, since JAX gives the conjugate gradient.
        lambda w, g: jnp.where(w == 0, -jnp.inf, -jnp.real(w * g)),
        params,
        grads,
        wide=True,
    )


def random(params: PyTree, grads: PyTree | None = None, *, key: jax.Array) -> PyTree:
    """Score each weight by an independent uniform number in [0, 1): the baseline for any other score.

    Args:
        params: Pytree of arrays, any shapes.
        grads: Not used; there so that every score is called alike.
        key: A JAX random key. The same key gives the same scores, so that masks of growing sparsity are nested.

    Returns:
        float32 scores of the params' structure and shapes.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> prunax.scores.random({"kernel": jnp.ones((2, 3))}, key=jax.random.key(0))["kernel"].shape
        (2, 3)
    """
    del grads
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten(
        _uniform_like(k, leaf) if _is_float(leaf) else _no_score()
        for k, leaf in zip(keys, leaves, strict=False)
    )


@jax.jit
def _uniform_like(key: jax.Array, leaf: jax.Array) -> jax.Array:
    """Where the leaf lies; which numbers does not depend on that."""
    drawn = jax.random.uniform(key, leaf.shape)
    if _meshes.sharding_of(leaf) is None:
        return drawn
    # jit has to see that the leaf is used, or it would not know the mesh's devices.
    return _meshes.shard_like(jax.lax.optimization_barrier((drawn, leaf))[0], leaf)


class ScoreWithMemory(Protocol):
    """A score that `prunax.prune` advances at every step: it is recognised by `init` and `update`."""

    def init(self, params: Any) -> Any:
        """What is remembered before the first step."""
        ...

    def update(self, memory: Any, params: Any, grads: Any) -> Any:
        """Take in one step."""
        ...

    def read(self, memory: Any, params: Any) -> Any:
        """The scores that leaves are ranked by."""
        ...


def ema(score: Score, decay: float) -> Score:
    """Score by an exponential moving average of another score, over every training step.

    Scores of one minibatch are noisy. `prunax.prune` keeps the average in its state and ranks by it. Steps at which a
    score is not finite do not enter the average of that weight, except that -inf, the score of what is to go before all
    else, is the average for as long as it is the score; after it the average starts anew.

    Args:
        score: ``score(params, grads)``.
        decay: Weight of the past, in [0, 1): about ``1 / (1 - decay)`` steps are remembered.

    Returns:
        The score, a `ScoreWithMemory`. Called as a function it is the score of one step alone.

    Raises:
        ValueError: If the decay is not in [0, 1).

    Examples:
        >>> import optax, prunax
        >>> score = prunax.scores.ema(prunax.scores.saliency, 0.99)
        >>> tx = prunax.prune(optax.adam(1e-3), prunax.schedules.polynomial(0.9, 0, 1000, every=50), score=score)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"scores.ema: decay must lie in [0, 1), got {decay}.")
    return _Average(score, decay)


def ema_gradients(score: Score, decay: float) -> Score:
    """Score by an exponential moving average of the gradients, over every training step.

    What gradients of single batches have in common stays in their mean, and what differs cancels out; `ema` of a score
    that takes absolute values adds the noise up instead. It costs a float32 number for each weight.

    Args:
        score: ``score(params, grads)``, which is given the mean in place of the gradients.
        decay: As for `ema`. Steps at which a gradient is not finite do not enter the mean.

    Returns:
        The score, a `ScoreWithMemory`. Called as a function it is the score of one step alone.

    Raises:
        ValueError: If the decay is not in [0, 1).

    Examples:
        >>> import jax, optax, prunax
        >>> grow = prunax.scores.ema_gradients(prunax.scores.gradient, 0.99)
        >>> tx = prunax.transforms.dynamic_sparse(optax.adam(1e-3), 0.9, grow=grow, key=jax.random.key(0))
    """
    if not 0 <= decay < 1:
        raise ValueError(f"scores.ema_gradients: decay must lie in [0, 1), got {decay}.")
    return _GradientAverage(score, decay)


@dataclass(frozen=True)
class _Average:
    score: Score
    decay: float

    def __call__(self, params: PyTree, grads: PyTree) -> PyTree:
        return self.score(params, grads)

    def init(self, params: PyTree) -> PyTree:
        """An average of nothing: float32 zeros, a scalar under a leaf whose score is one."""
        shapes = jax.eval_shape(self.score, params, params)
        leaves, treedef = jax.tree.flatten(params)
        return treedef.unflatten(
            jnp.zeros_like(leaf, jnp.float32) if score.shape == leaf.shape else _no_score()
            for leaf, score in zip(
                leaves, trees.leaves_like("scores.ema", "scores", shapes, params), strict=True
            )
        )

    def update(self, memory: PyTree, params: PyTree, grads: PyTree) -> PyTree:
        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            if new.shape != old.shape:  # a gradient of a leaf that is never pruned
                return old
            past = jnp.where(jnp.isneginf(old), jnp.float32(0), old)
            mixed = self.decay * past + (1 - self.decay) * new.astype(jnp.float32)
            kept = jnp.where(jnp.isneginf(new), jnp.float32(-jnp.inf), old)
            return jnp.where(jnp.isfinite(new), mixed, kept)

        leaves, treedef = jax.tree.flatten(memory)
        seen = trees.leaves_like("scores.ema", "scores", self.seen(params, grads), memory)
        return treedef.unflatten(map(mix, leaves, seen))

    def seen(self, params: PyTree, grads: PyTree) -> PyTree:
        """What is averaged."""
        return self.score(params, grads)

    def read(self, memory: PyTree, params: PyTree) -> PyTree:
        """The average itself."""
        del params
        return memory


@dataclass(frozen=True)
class _GradientAverage(_Average):
    def seen(self, params: PyTree, grads: PyTree) -> PyTree:
        """The gradients; -inf, which would mean something as a score, is as good as NaN."""
        del params
        return jax.tree.map(
            lambda g: (
                jnp.where(jnp.isfinite(g), g, jnp.nan)
                if jnp.issubdtype(g.dtype, jnp.floating)
                else g
            ),
            grads,
        )

    def read(self, memory: PyTree, params: PyTree) -> PyTree:
        """The score of the mean gradients; nothing is remembered under a leaf whose score is a scalar."""

        def mean(remembered: jax.Array, leaf: Any) -> Any:
            there = not trees.is_array(leaf) or remembered.shape == leaf.shape
            return remembered if there else jnp.zeros_like(leaf)

        return self.score(params, jax.tree.map(mean, memory, params))


def check_score(function: str, score: object) -> None:
    """Raise TypeError, saying what to pass, unless it can be called as a score."""
    if callable(score) and not isinstance(score, type):
        return
    known = isinstance(score, str) and score in __all__
    mend = f"prunax.scores.{score}" if known else "one of prunax.scores, such as scores.saliency"
    raise TypeError(
        f"{function}: score must be a function of params and grads, got {score!r}. Pass {mend}."
    )


def memory_of(score: Score) -> ScoreWithMemory | None:
    """The score itself where it has memory."""
    memory: Any = score
    return memory if hasattr(score, "init") and hasattr(score, "update") else None


def needs_key(score: Score) -> bool:
    """Say whether a score has a `key` argument that nothing is bound to."""
    parameter = inspect.signature(score).parameters.get("key")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _score(
    name: str, function: Any, params: PyTree, other: PyTree | None = ..., *, wide: bool = False
) -> PyTree:
    """Map a formula over the floating-point leaves of the params and of a tree like them.

    A `wide` formula multiplies, and is given at least float32: float16 products would underflow to ties.
    """
    leaves, treedef = jax.tree.flatten(params)
    if other is ...:
        return treedef.unflatten(
            function(leaf) if _is_float(leaf) else _no_score() for leaf in leaves
        )
    if other is None:
        raise ValueError(
            f"scores.{name}: needs gradients, got None. Call scores.{name}(params, grads)."
        )
    others = trees.leaves_like(f"scores.{name}", "gradients", other, params)
    scores = []
    for path, leaf, o in zip(trees.paths(params), leaves, others, strict=True):
        if not _is_float(leaf):
            scores.append(_no_score())
            continue
        if jnp.shape(o) != leaf.shape:
            raise ValueError(
                f"scores.{name}: the gradient of {path!r} has shape {jnp.shape(o)}, the leaf has {leaf.shape}. "
                f"Differentiate with respect to these params."
            )
        dtype = trees.wide_dtype(leaf.dtype, o.dtype)
        scores.append(function(leaf.astype(dtype), o.astype(dtype)) if wide else function(leaf, o))
    return treedef.unflatten(scores)


def _is_float(leaf: Any) -> bool:
    return trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _no_score() -> jax.Array:
    return jnp.zeros((), jnp.float32)
