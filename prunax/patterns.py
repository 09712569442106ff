"""Patterns: which weights are removed together, and which are compared with each other.

A pattern pools the scores of one leaf into the scores of *units*, and expands the mask of the units back to the leaf.
`compare_axis` says which units compete: None for all units of a pool (across leaves, as the allocation says), or an
axis of the unit scores along which every slice is a contest of its own. A new pattern is a frozen dataclass of the
class `Pattern` with two functions, `pool` and `expand`.

prunax counts axes as Flax does: a kernel is ``(..., in, out)``, a convolution ``(height, width, in, out)``.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _meshes, trees

__all__ = ["NM", "Block", "Channel", "ConstantFanIn", "Pattern", "Unstructured"]

Shape = tuple[int, ...]


class Pattern:
    """Base of all patterns: `pool` and `expand` say everything, and the rest has defaults.

    A pattern is a frozen dataclass, since it is static under `jit`. What it says depends on static shapes only.

    Attributes:
        compare_axis: None, or the axis of the unit scores along which units compete.
        implied_sparsity: The most that the pattern prunes, and what it prunes where no sparsity is given; None for any.

    Examples:
        >>> import dataclasses, jax.numpy as jnp, prunax
        >>> @dataclasses.dataclass(frozen=True)
        ... class Rows(prunax.patterns.Pattern):
        ...     def pool(self, scores):
        ...         return scores.mean(axis=-1)
        ...     def expand(self, mask, shape):
        ...         return jnp.broadcast_to(mask[..., None], shape)
        >>> kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> prunax.compute_masks({"kernel": kernel}, 0.5, pattern=Rows())["kernel"].tolist()
        [[False, False], [True, True]]
    """

    @property
    def compare_axis(self) -> int | None:
        return None

    @property
    def implied_sparsity(self) -> float | None:
        return None

    def pool(self, scores: jax.Array) -> jax.Array:
        """Turn the scores of a leaf's weights into the scores of its units."""
        raise NotImplementedError

    def expand(self, mask: jax.Array, shape: Shape) -> jax.Array:
        """Turn a mask of units (True = kept) into a mask of weights, one that broadcasts to `shape` at least."""
        raise NotImplementedError

    def check(self, shape: Shape) -> str | None:
        """Say what keeps the pattern from fitting a leaf of this shape, or None."""
        del shape
        return None

    def tile(self, ndim: int) -> Shape:
        """Say for each axis of a leaf how many neighbours must lie on one device where the axis is sharded."""
        return (1,) * ndim

    def unit_shape(self, shape: Shape) -> Shape:
        """Shape of the unit scores of a leaf."""
        return _pooled_shape(self, shape)


@functools.lru_cache(maxsize=4096)
def _pooled_shape(pattern: Pattern, shape: Shape) -> Shape:
    return jax.eval_shape(pattern.pool, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight on its own.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.compute_masks({"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}, 0.5)
        {'kernel': Array([[ True, False],
               [False,  True]], dtype=bool)}
    """

    def unit_shape(self, shape: Shape) -> Shape:
        return shape

    def pool(self, scores: jax.Array) -> jax.Array:
        return scores

    def expand(self, mask: jax.Array, shape: Shape) -> jax.Array:
        return mask


@dataclass(frozen=True)
class ConstantFanIn(Pattern):
    """The same number of weights kept for every output unit: every slice along the axis is a contest of its own.

    Attributes:
        axis: The reduction axis: -2 for a Flax kernel ``(..., in, out)``, -1 for one stored as ``(out, in)`` (PyTorch,
            Equinox). Each slice of length n along it loses ``round(sparsity * n)`` weights. For a convolution
            ``(height, width, in, out)`` pass ``(-4, -3, -2)``: one contest for each output channel over its whole
            window. Where several are given and the array's type says that one after the first is sharded, scores are
            gathered along it.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> kernel = jnp.array([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])
        >>> prunax.compute_masks({"kernel": kernel}, 0.75, pattern=prunax.patterns.ConstantFanIn())
        {'kernel': Array([[False,  True],
               [False, False],
               [False, False],
               [ True, False]], dtype=bool)}

    References:
        Lasby et al., Dynamic Sparse Training with Structured Sparsity (SRigL), 2024, arXiv:2305.02299, section 3.
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), 2024, arXiv:2306.11695,
        section 3: comparison groups by output.
    """

    axis: int | tuple[int, ...] = -2

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int):
            object.__setattr__(self, "axis", tuple(self.axis))  # hashable, whatever was given

    @property
    def compare_axis(self) -> int:
        return self.axis if isinstance(self.axis, int) else -1

    def _axes(self, ndim: int) -> tuple[int, ...]:
        """The axes that become one, the last; none where one axis is compared where it stands."""
        return () if isinstance(self.axis, int) else tuple(sorted(a % ndim for a in self.axis))

    def check(self, shape: Shape) -> str | None:
        return _check_axes(self.axis, shape)

    def unit_shape(self, shape: Shape) -> Shape:
        axes = self._axes(len(shape))
        if not axes:
            return shape
        length = math.prod(shape[a] for a in axes)
        return (*(n for a, n in enumerate(shape) if a not in axes), length)

    def pool(self, scores: jax.Array) -> jax.Array:
        axes = self._axes(scores.ndim)
        scores = _meshes.gather(scores, axes[1:])  # merged, only the first axis could stay divided
        moved = jnp.moveaxis(scores, axes, range(scores.ndim - len(axes), scores.ndim))
        return moved.reshape(self.unit_shape(scores.shape)) if len(axes) > 1 else moved

    def expand(self, mask: jax.Array, shape: Shape) -> jax.Array:
        axes = self._axes(len(shape))
        if len(axes) > 1:
            mask = mask.reshape((*mask.shape[:-1], *(shape[a] for a in axes)))
        return jnp.moveaxis(mask, range(len(shape) - len(axes), len(shape)), axes)


@dataclass(frozen=True)
class NM(Pattern):
    """N:M sparsity: **keep** n of every m consecutive weights along the reduction axis.

    ``NM(2, 4)`` is what sparse tensor cores run. Beware of libraries in which "1:4" means one
    weight zeroed, or which group along the output axis.

    Attributes:
        n: Weights kept in each group, 0 <= n <= m.
        m: Length of a group. The axis must be a multiple of it.
        axis: The reduction axis, along which groups run: -2 for a Flax kernel ``(..., in, out)`` and for a convolution
            ``(height, width, in, out)``; -1 for a weight stored as ``(out, in)`` (PyTorch, Equinox).

    Under a schedule, sparsities below ``1 - n/m`` prune ``round(sparsity * m)`` weights of each group, so that NM(2,
    4) goes through 4:4 and 3:4.

    Raises:
        ValueError: If not 0 <= n <= m.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> kernel = jnp.array([[1.0], [4.0], [3.0], [2.0]])
        >>> prunax.compute_masks({"kernel": kernel}, pattern=prunax.patterns.NM(2, 4))["kernel"][:, 0].tolist()
        [False, True, True, False]

    References:
        Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, arXiv:2104.08378, section 3.
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self) -> None:
        if not 0 <= self.n <= self.m or self.m < 1:
            raise ValueError(
                f"NM: keeps n of every m weights and needs 0 <= n <= m, m >= 1, got n={self.n}, m={self.m}. "
                f"Did you mean NM({self.m}, {self.n})?"
            )

    @property
    def compare_axis(self) -> int:
        return self.axis if self.axis < 0 else self.axis + 1

    @property
    def implied_sparsity(self) -> float:
        return 1 - self.n / self.m

    def check(self, shape: Shape) -> str | None:
        problem = _check_axes(self.axis, shape)
        if problem is None and shape[self.axis] % self.m:
            return (
                f"axis {self.axis} has length {shape[self.axis]}, which {self.m} does not divide. "
                f"Leave the leaf out with `where`, or choose another axis"
            )
        return problem

    def tile(self, ndim: int) -> Shape:
        return tuple(self.m if a == self.axis % ndim else 1 for a in range(ndim))

    def unit_shape(self, shape: Shape) -> Shape:
        a = self.axis % len(shape)
        return (*shape[:a], shape[a] // self.m, self.m, *shape[a + 1 :])

    def pool(self, scores: jax.Array) -> jax.Array:
        return scores.reshape(self.unit_shape(scores.shape))

    def expand(self, mask: jax.Array, shape: Shape) -> jax.Array:
        return mask.reshape(shape)


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of neighbouring weights, kept or removed whole. A block's score is the mean of its weights' scores.

    Attributes:
        shape: ``(height, width)``: blocks tile the last two axes, ``(in, out)`` of a Flax kernel, from index 0 on. The
            blocks at the far edges are smaller where the lengths are not multiples; each counts as one block.

    Raises:
        ValueError: If the shape is not two positive integers.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> kernel = jnp.array([[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]])
        >>> prunax.compute_masks({"kernel": kernel}, 0.5, pattern=prunax.patterns.Block((2, 2)))
        {'kernel': Array([[False, False,  True],
               [False, False,  True]], dtype=bool)}

    References:
        Narang et al., Block-Sparse Recurrent Neural Networks, 2017, arXiv:1711.02782.
    """

    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(
                f"Block: needs two positive lengths (height, width), got {self.shape}."
            )
        object.__setattr__(self, "shape", tuple(self.shape))  # hashable, whatever was given

    def check(self, shape: Shape) -> str | None:
        return (
            None
            if len(shape) >= 2
            else f"blocks tile the last two axes, and the shape {shape} has fewer"
        )

    def tile(self, ndim: int) -> Shape:
        return (1,) * (ndim - 2) + self.shape

    def pool(self, scores: jax.Array) -> jax.Array:
        window = (1,) * (scores.ndim - 2) + self.shape
        padding = [(0, 0)] * (scores.ndim - 2) + [
            (0, -n % b) for n, b in zip(scores.shape[-2:], self.shape, strict=True)
        ]
        x = scores.astype(trees.wide_dtype(scores.dtype))
        total = jax.lax.reduce_window(
            x, jnp.zeros((), x.dtype), jax.lax.add, window, window, padding
        )
        # Blocks at the far edges hold fewer weights.
        height, width = (
            np.minimum(b, n - np.arange(0, n, b))
            for n, b in zip(scores.shape[-2:], self.shape, strict=True)
        )
        sizes = (height[:, None] * width).reshape((1,) * (scores.ndim - 2) + total.shape[-2:])
        return total / sizes.astype(x.dtype)

    def expand(self, mask: jax.Array, shape: Shape) -> jax.Array:
        for axis, block in zip((-2, -1), self.shape, strict=True):
            # As jnp.repeat, which wants to be told the sharding: broadcasting and merging keep it.
            n, at = mask.shape[axis], mask.ndim + axis
            tiles = jnp.broadcast_to(
                jnp.expand_dims(mask, at + 1), (*mask.shape[: at + 1], block, *mask.shape[at + 1 :])
            )
            mask = tiles.reshape((*mask.shape[:at], n * block, *mask.shape[at + 1 :]))
        return mask[..., : shape[-2], : shape[-1]]


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole slices of a leaf at one index of an axis: filters, channels, neurons.

    The score of a slice is the mean of its weights' scores.

    Attributes:
        axis: The axis whose indices are kept or removed: -1 for the output channels of a Flax
            kernel, -2 for the inputs.

    This masks one leaf. To make the network physically smaller, following the channel through every layer that shares
    it, is the task of structural pruning.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> kernel = jnp.array([[1.0, 2.0], [1.0, 2.0]])
        >>> prunax.compute_masks({"kernel": kernel}, 0.5, pattern=prunax.patterns.Channel())
        {'kernel': Array([[False,  True],
               [False,  True]], dtype=bool)}

    References:
        Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710, section 3.1.
    """

    axis: int = -1

    def check(self, shape: Shape) -> str | None:
        return _check_axes(self.axis, shape)

    def pool(self, scores: jax.Array) -> jax.Array:
        others = tuple(a for a in range(scores.ndim) if a != self.axis % scores.ndim)
        return jnp.mean(scores.astype(trees.wide_dtype(scores.dtype)), axis=others)

    def expand(self, mask: jax.Array, shape: Shape) -> jax.Array:
        others = tuple(a for a in range(len(shape)) if a != self.axis % len(shape))
        return jnp.broadcast_to(jnp.expand_dims(mask, others), shape)


def check_fit(function: str, pattern: Pattern, leaves: Sequence[tuple[str, Shape]]) -> None:
    """Raise ValueError, naming the leaf and its path, unless the pattern fits every ``(path, shape)``."""
    check_pattern(function, pattern)
    for path, shape in leaves:
        problem = pattern.check(shape)
        if problem is not None:
            raise ValueError(
                f"{function}: {pattern} does not fit {path!r} of shape {shape}: {problem}."
            )


def check_pattern(function: str, pattern: object) -> None:
    """Raise TypeError, saying what to pass, unless it is a pattern."""
    if isinstance(pattern, type):
        raise TypeError(
            f"{function}: pattern must be a pattern, got its class. Call it: {pattern.__name__}(...)."
        )
    if hasattr(pattern, "pool") and hasattr(pattern, "expand"):
        return
    mend = "such as patterns.NM(2, 4), patterns.Block((4, 4)) or patterns.Channel()"
    if isinstance(pattern, str) and (numbers := re.fullmatch(r"(\d+):(\d+)", pattern)):
        mend = f"patterns.NM({numbers[1]}, {numbers[2]}), which keeps {numbers[1]} of every {numbers[2]}"
    raise TypeError(
        f"{function}: pattern must be a pattern, got {pattern!r}. Pass one of prunax.patterns: {mend}."
    )


def check_shards(function: str, pattern: Pattern, chosen: trees.Selection) -> None:
    """Raise ValueError, naming leaf and axis, where an array's type (explicit sharding) cuts a unit in two.

    On a mesh whose axes are automatic nothing is known of the sharding here, and XLA moves what it needs to.
    """
    for path, leaf in zip(chosen.paths, chosen.leaves, strict=True):
        shape, tile = jnp.shape(leaf), pattern.tile(jnp.ndim(leaf))
        for axis, (n, parts) in enumerate(zip(shape, _meshes.shards(leaf), strict=True)):
            if parts > 1 and n // parts % tile[axis]:
                raise ValueError(
                    f"{function}: {pattern} takes {tile[axis]} neighbours along axis {axis} together, and the sharding "
                    f"of {path!r} ({jax.typeof(leaf).sharding.spec}) leaves {n // parts} of {n} on each device. Do not "
                    f"shard axis {axis}, or only so that {tile[axis]} divides what a device holds; or use a mesh "
                    f"whose axes are AxisType.Auto."
                )


def _check_axes(axis: int | tuple[int, ...], shape: Shape) -> str | None:
    axes = (axis,) if isinstance(axis, int) else axis
    for a in axes:
        if not -len(shape) <= a < len(shape):
            return f"axis {a} does not exist in the shape {shape}"
    if len({a % len(shape) for a in axes}) < len(axes):
        return f"the axes {axes} name one axis of the shape {shape} twice"
    return None
