"""Reading one array: how many of its units rank before some pivots, and its mask once the threshold is known.

Each is one fused pass over the array, which stays where it is: not flattened, not gathered.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.tree_util import Partial

from prunax import _meshes
from prunax._counts import WIDE, Number, exact_sum
from prunax._selection.keys import infinity, rank_keys, unsigned_bits

__all__ = ["Score", "has_nan", "value_of"]

Array = jax.Array
Score = Array | Partial

PIVOTS = 4  # counted in one read: on a CPU four cost about what one costs, eight cost twice that
_ROWS, _ROW = 2**12, 2**17  # ties are counted in rows: this many at most, of at most this length


def value_of(score: Score) -> Array:
    """Evaluate a score that is not evaluated yet.

    Args:
        score: An array, or ``Partial(f, *arrays)``.

    Returns:
        The array itself, or ``f(*arrays)``.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> from jax.tree_util import Partial
        >>> prunax._selection.value_of(Partial(jnp.abs, jnp.array([-2.0, 1.0]))).tolist()
        [2.0, 1.0]
    """
    return score() if isinstance(score, Partial) else score


class Reader(NamedTuple):
    """What is static about one score array, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of its pool: one of several float types is ranked in the widest
    sharding: (
        NamedSharding | None
    )  # that the array's type tells (explicit sharding), if it is divided
    shards: tuple[int, ...]  # by axis, in how many parts the type says it is
    local: bool  # surely on one device, so that reshaping moves nothing

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def wide(self) -> bool:
        return self.size >= WIDE

    def values(self, score: Score) -> Array:
        x = value_of(score)
        return x if x.dtype == self.dtype else lax.convert_element_type(x, self.dtype)

    def keys(self, score: Score) -> Array:
        return rank_keys(self.values(score))

    def reshape(self, score: Score, shape: tuple[int, ...]) -> Score:
        """View the array, or the operands of its function, in a shape of its `grid`."""
        sharding = self.grid_sharding

        def viewed(x: Array) -> Array:
            if x.shape != self.shape:
                return x
            return lax.reshape(_meshes.gather(x) if self.local else x, shape, out_sharding=sharding)

        return jax.tree.map(viewed, score)

    @property
    def grid_sharding(self) -> NamedSharding | None:
        """How an array of the `grid`'s shape is divided: each axis of two in its outer part."""
        if self.local:
            return None
        axes = [part for a in range(len(self.shape)) for part in (a, -1)]
        return _meshes.split(self.sharding, axes)

    def grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A shape to read the array in, and the axes of it to reduce before devices talk to each other.

        An array on one device becomes a few long rows, which XLA gives to different cores. Otherwise each axis is split
        in two, such that whatever the axis is divided into divides the outer part. The type of the array tells that, or
        else (auto meshes) it is taken to be a power of two up to 16. Then reducing the inner parts stays on the device,
        and reducing the outer ones is an all-reduce. (Were the guess wrong, more would travel, with the same result.)
        """
        if self.local and not self.wide:
            rows = max(d for d in range(1, 65) if self.size % d == 0) if self.size > 2**17 else 1
            return (rows, self.size // rows), (1,)
        outer = [
            n * math.gcd(size // n, 16) for size, n in zip(self.shape, self.shards, strict=True)
        ]
        shape = tuple(
            n for size, o in zip(self.shape, outer, strict=True) for n in (o, size // max(o, 1))
        )
        return shape, tuple(range(1, len(shape), 2))

    @property
    def crowded(self) -> bool:
        """Whether it has so many units for so few bits that many tie."""
        return self.size >= 2 ** (8 * self.dtype.itemsize - 8)

    @property
    def tie_rows(self) -> int:
        """How many rows of equal length the units can be counted in to cut ties at once; 0 where they cannot."""
        if not self.local:
            return 0
        most = max(min(_ROWS, math.isqrt(self.size)), 1)
        rows = max(d for d in range(1, most + 1) if self.size % d == 0)
        return rows if self.size // rows <= _ROW else 0


def describe(score: Score, dtype: np.dtype | None = None) -> Reader:
    """The static facts about a score array, to be ranked as `dtype` if given."""
    aval = jax.eval_shape(value_of, score)
    shape = tuple(aval.shape)
    if dtype is None:
        dtype = np.dtype(aval.dtype)
        if dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating):
            # Exact for all of eight bits and fewer, which differ in what infinity and NaN are.
            dtype = np.dtype(jnp.bfloat16)
    # Functions are elementwise. (What `eval_shape` gives has lost the sharding on meshes that are partly automatic.)
    operand = next((x for x in jax.tree.leaves(score) if jnp.shape(x) == shape), aval)
    sharding, shards = _meshes.sharding_of(operand), _meshes.shards(operand)
    return Reader(shape, dtype, sharding, shards, jax.device_count() == 1)


def lies_before(
    shape: tuple[int, ...], sharding: NamedSharding | None, cut: Array, zero: Array
) -> Array:
    """Whether each position in an array of this shape and sharding comes before the flat index `cut`.

    Compares within the last axis, against a cut for each row: one operation a unit.
    """
    if not shape:
        return cut > 0
    minor = len(shape) - 1
    # Shardings are said, or what is made here would be stored whole on every device.
    rows, of_rows = shape[:-1], _meshes.split(sharding, range(minor))
    start, stride = zero, shape[-1]
    for axis in reversed(range(minor)):
        index = lax.broadcasted_iota(jnp.uint32, rows, axis, out_sharding=of_rows) + zero
        start = start + index * np.uint32(stride)
        stride *= shape[axis]
    row_cut = jnp.where(start < cut, cut - start, np.uint32(0))
    return lax.broadcasted_iota(
        jnp.uint32, shape, minor, out_sharding=sharding
    ) < lax.broadcast_in_dim(row_cut, shape, range(minor), out_sharding=sharding)


def _row(table: Array, row: np.ndarray) -> Array:
    """The flat positions `row` of a table.

    As a gather with an index array, so that XLA sees the same computation for all leaves of a shape and compiles it
    once. Static slices would be fused into it and make each one different.
    """
    return table.reshape(-1).at[row].get(mode="promise_in_bounds")


def count_hits(hits: Sequence[Array], axes: Sequence[int]) -> list[Array]:
    """For each bool array how often it is true, along axes.

    One variadic reduction, because XLA fuses it with what makes the arrays into a single read. (On a CPU it rewrites a
    plain sum into a tree of sums and stores the comparison in between.)
    """
    ones = tuple(hit.astype(jnp.int32) for hit in hits)
    zeros = (np.int32(0),) * len(hits)
    counts = lax.reduce(ones, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes)
    return [count.astype(jnp.uint32) for count in counts]


def _one_of(score: Score) -> Array:
    """An array of a score: they all lie on one mesh."""
    return jax.tree.leaves(score)[0]


@functools.partial(jax.jit, static_argnums=0)
def count_before(leaf: Reader, score: Score, table: Array, row: np.ndarray) -> Number:
    """For each pivot in the row, how many units of the leaf come before it.

    The row holds the pivots, and for ties the key that they cut. Whatever is read is tied to the row by a barrier: it
    changes from pass to pass, so XLA cannot compute keys or positions before the loop and store them.
    """
    shape, axes = leaf.grid()
    # Reshaped before the barrier: fused into the read it would cost a division a unit.
    score = leaf.reshape(score, shape)
    values = _meshes.move_to(_row(table, row), _one_of(score))
    score, values, zero = lax.optimization_barrier((score, values, jnp.zeros((), jnp.uint32)))
    keys = leaf.keys(score)
    if len(row) == PIVOTS:
        pivots = values.astype(keys.dtype)
        hits = [keys < pivots[j] for j in range(PIVOTS)]
    else:
        tied = keys == values[PIVOTS].astype(keys.dtype)
        cuts = [values[j].astype(jnp.uint32) for j in range(PIVOTS)]
        hits = [tied & lies_before(shape, leaf.grid_sharding, cut, zero) for cut in cuts]
    counts = jnp.stack(count_hits(hits, axes))
    inner = tuple(range(1, counts.ndim))
    return exact_sum(counts, lambda c: jnp.sum(c, axis=inner, dtype=jnp.uint32), leaf.wide)


@functools.partial(jax.jit, static_argnums=0)
def cut_ties(leaf: Reader, score: Score, table: Array, row: np.ndarray) -> Array:
    """The flat index before which as many units equal a threshold as are to be kept.

    The row of the table holds the threshold and that number. The array is read once for the row of units that the last
    of them lies in, and then that row. Where all are to be kept, the index may be past the end.
    """
    shape = leaf.tie_rows, leaf.size // leaf.tie_rows
    score = leaf.reshape(score, shape)
    asked = _meshes.move_to(_row(table, row), _one_of(score))
    # Barriers keep XLA from storing keys of all units for this read, that of the one row, and the mask.
    score, (threshold, wanted) = lax.optimization_barrier((score, asked))
    wanted = wanted.astype(jnp.uint32)

    keys = leaf.keys(score)
    pivot = threshold.astype(keys.dtype)
    # Ties are a difference of two counts, since XLA does not vectorise a single one on CPUs.
    before, upto = count_hits([keys < pivot, keys <= pivot], (1,))
    running = jnp.cumsum(upto - before, dtype=jnp.uint32)
    number = jnp.sum(running < wanted, dtype=jnp.uint32)  # of the row
    earlier = jnp.max(jnp.where(running < wanted, running, np.uint32(0)))
    score, number = lax.optimization_barrier((score, number))
    units = jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, number, 0) if jnp.shape(x) == shape else x, score
    )
    running = jnp.cumsum(leaf.keys(units)[0] == pivot, dtype=jnp.uint32)
    index = jnp.sum(running < wanted - earlier, dtype=jnp.uint32)
    return number * np.uint32(shape[1]) + index + (wanted > 0).astype(jnp.uint32)


@jax.jit
def has_nan(score: Score) -> Array:
    """Whether any of the scores is NaN, in one read.

    Args:
        score: An array of floats, or ``Partial(f, *arrays)`` of an elementwise f that makes it.

    Returns:
        A bool scalar, or one that varies over the devices of a `jax.shard_map` as the scores do.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> bool(prunax._selection.has_nan(jnp.array([1.0, jnp.nan])))
        True
    """
    leaf = describe(score)
    shape, axes = leaf.grid()
    bits = unsigned_bits(leaf.values(leaf.reshape(score, shape)))
    inf = np.asarray(infinity(leaf.dtype), bits.dtype)
    # By rows, since XLA reduces to a scalar on one core, and two counts, since on CPUs it does not vectorise one.
    nans, not_finite = count_hits([bits > inf, bits >= inf], axes)
    return jnp.any((nans > 0) & (not_finite > 0))


@functools.partial(jax.jit, static_argnums=0)
def write_mask(leaf: Reader, score: Score, table: Array, row: np.ndarray) -> Array:
    """Keeps keys before the threshold, and those equal to it at flat indices before the cut."""
    keys = leaf.keys(score)
    threshold, cut = _meshes.move_to(_row(table, row), _one_of(score))
    threshold, cut = threshold.astype(keys.dtype), cut.astype(jnp.uint32)
    tied = (keys == threshold) & lies_before(
        leaf.shape, leaf.sharding, cut, jnp.zeros((), jnp.uint32)
    )
    return (keys < threshold) | tied
