"""Exact top-k masks over many arrays, without sorting, flattening or gathering them.

The k-th best score is searched for. Floats order like integers made from their bits, so the threshold is one unsigned
integer, and how many scores rank before an integer is one fused read of the arrays. A few pivots are counted in each
read and the next ones are interpolated from the counts: about five reads settle ten million scores. Ties at the
threshold are cut by a second search of the same kind, over flat indices. Last comes one fused write of the masks.

Nothing of the size of a score array is stored but the masks, and only counts travel between devices.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from prunax import trees
from prunax.counts import (
    WIDE,
    Count,
    Number,
    as_count,
    exact_sum,
    less,
    minimum,
    number,
    subtract,
    to_float,
    where,
)

__all__ = ["keep_largest", "keep_largest_along", "sort_keys"]

Array = jax.Array
Score = Array | Partial
Owner = tuple[int, ...]  # of each leaf, the pool it belongs to; ascending

_PIVOTS = 4  # counted in one read: on a CPU four cost about what one costs, eight cost twice that
_SPREAD = (
    -2.2,
    -0.6,
    0.6,
    2.2,
)  # where they go around the expected threshold, in its standard deviations
_SAMPLE = 4096  # scores a pool, at most, to take the first pivots from
_PAIRWISE = 32  # slices up to this length are ranked by comparing all pairs
_HOST_LOOP = (
    16  # more arrays than this, when concrete, are read by one small compiled function a shape
)


# --- keys -----------------------------------------------------------------------------------------------------------


def sort_keys(x: Array) -> Array:
    """Turn numbers into unsigned integers that order the same way.

    Args:
        x: Array of floats, integers or bools, of any shape.

    Returns:
        Unsigned keys of the same shape and width. All NaNs are the lowest key, below -inf; -0.0 and 0.0 are equal. Only
        bits are looked at, since a backend may flush denormal numbers to zero in comparisons of floats.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> keys = prunax.selection.sort_keys(jnp.array([1.0, -1.0, 0.0, -0.0, jnp.nan, jnp.inf]))
        >>> keys.argsort().tolist()
        [4, 1, 2, 3, 0, 5]
    """
    return ~_rank_keys(x)


def _rank_keys(x: Array) -> Array:
    """The complement of `sort_keys`: the best score has the smallest key, so what is kept is `key < threshold`."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = 8 * x.dtype.itemsize
    unsigned = np.dtype(f"uint{width}").type
    sign_bit = unsigned(1 << (width - 1))
    bits = lax.bitcast_convert_type(x, unsigned)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return ~bits
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        return bits ^ (sign_bit - unsigned(1))
    # +inf becomes 0, zeros `infinity`, -inf twice that. NaNs of both signs land above: the positive ones wrap around.
    infinity = _infinity(x.dtype)
    keys = jnp.where(
        bits < sign_bit, unsigned(infinity) - bits, bits + unsigned(infinity + int(sign_bit))
    )
    return jnp.minimum(keys, unsigned(_largest_key(x.dtype)))


def _infinity(dtype) -> int:
    return int(np.asarray(np.inf, dtype).view(f"uint{8 * dtype.itemsize}"))


def _largest_key(dtype) -> int:
    return (
        2 * _infinity(dtype) + 1
        if jnp.issubdtype(dtype, jnp.floating)
        else 2 ** (8 * dtype.itemsize) - 1
    )


# --- reading one array ----------------------------------------------------------------------------------------------


def value_of(score: Score) -> Array:
    """The array that a score is or makes."""
    return score() if isinstance(score, Partial) else score


class _Leaf(NamedTuple):
    """What is static about one score array, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of its pool: one of several float types is ranked in the widest
    spec: tuple  # partitioning that the array's type tells (explicit sharding), else empty
    shards: tuple[int, ...]  # by axis, in how many parts the type says it is
    local: bool  # surely on one device, so that reshaping moves nothing

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def wide(self) -> bool:
        return self.size >= WIDE

    def keys(self, score: Score) -> Array:
        x = value_of(score)
        return _rank_keys(x if x.dtype == self.dtype else lax.convert_element_type(x, self.dtype))

    def reshape(self, score: Score, shape: tuple[int, ...]) -> Score:
        """View the array, or the operands of its function, in a shape of its `grid`."""
        names = tuple(part for axis in self.spec for part in (axis, None))
        sharding = PartitionSpec(*names) if any(self.spec) else None
        return jax.tree.map(
            lambda x: lax.reshape(x, shape, out_sharding=sharding) if x.shape == self.shape else x,
            score,
        )

    def grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A shape to read the array in, and the axes of it to reduce before devices talk to each other.

        An array on one device becomes a few long rows, which XLA gives to different cores. Otherwise each axis is split
        in two, such that whatever the axis is divided into divides the outer part. The type of the array tells that, or
        else (auto meshes) it is taken to be a power of two up to 16. Then reducing the inner parts stays on the device,
        and reducing the outer ones is an all-reduce. (Were the guess wrong, more would travel, with the same result.)
        """
        if self.local and not self.wide:
            rows = max(d for d in range(1, 65) if self.size % d == 0) if self.size > 2**20 else 1
            return (rows, self.size // rows), (1,)
        outer = [
            n * math.gcd(size // n, 16) for size, n in zip(self.shape, self.shards, strict=True)
        ]
        shape = tuple(
            n for size, o in zip(self.shape, outer, strict=True) for n in (o, size // max(o, 1))
        )
        return shape, tuple(range(1, len(shape), 2))


def _leaf(score: Score, dtype=None) -> _Leaf:
    aval = jax.eval_shape(value_of, score)
    shards = trees.shards(aval)
    spec = tuple(aval.sharding.spec) if math.prod(shards) > 1 else ()
    return _Leaf(
        tuple(aval.shape), np.dtype(dtype or aval.dtype), spec, shards, jax.device_count() == 1
    )


def _lies_before(shape: tuple[int, ...], cut: Array, zero: Array) -> Array:
    """Whether each position in an array of this shape comes before the flat index `cut`.

    Compares within the last axis, against a cut for each row: one operation a unit.
    """
    if not shape:
        return cut > 0
    rows, stride = (*shape[:-1], 1), shape[-1]
    start = jnp.zeros(rows, jnp.uint32)
    for axis in reversed(range(len(shape) - 1)):
        start = start + (lax.broadcasted_iota(jnp.uint32, rows, axis) + zero) * np.uint32(stride)
        stride *= shape[axis]
    row_cut = jnp.where(start < cut, cut - start, np.uint32(0))
    return lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) < jnp.broadcast_to(
        row_cut, shape
    )


def _row(table: Array, row: np.ndarray) -> Array:
    """The flat positions `row` of a table.

    As a gather with an index array, so that XLA sees the same computation for all leaves of a shape and compiles it
    once. Static slices would be fused into it and make each one different.
    """
    return table.reshape(-1).at[row].get(mode="promise_in_bounds")


@functools.partial(jax.jit, static_argnums=0)
def _count(leaf: _Leaf, score: Score, table: Array, row: np.ndarray) -> Number:
    """For each pivot in the row, how many units of the leaf come before it.

    The row holds the pivots, and for ties the key that they cut. Whatever is read is tied to the row by a barrier: it
    changes from pass to pass, so XLA cannot compute keys or positions before the loop and store them.
    """
    shape, axes = leaf.grid()
    score = leaf.reshape(
        score, shape
    )  # before the barrier: fused into the read it would cost a division a unit
    score, values, zero = lax.optimization_barrier(
        (score, _row(table, row), jnp.zeros((), jnp.uint32))
    )
    keys = leaf.keys(score)
    if len(row) == _PIVOTS:
        pivots = values.astype(keys.dtype)
        hits = [keys < pivots[j] for j in range(_PIVOTS)]
    else:
        tied = keys == values[_PIVOTS].astype(keys.dtype)
        hits = [
            tied & _lies_before(shape, values[j].astype(jnp.uint32), zero) for j in range(_PIVOTS)
        ]
    # One variadic reduction, because XLA fuses it with the comparisons into a single read. (On a CPU it rewrites a
    # plain sum into a tree of sums and stores the comparison in between.)
    ones = tuple(hit.astype(jnp.int32) for hit in hits)
    zeros = (np.int32(0),) * _PIVOTS
    counts = lax.reduce(ones, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes)
    counts = jnp.stack(counts).astype(jnp.uint32)
    inner = tuple(range(1, counts.ndim))
    return exact_sum(counts, lambda c: jnp.sum(c, axis=inner, dtype=jnp.uint32), leaf.wide)


@functools.partial(jax.jit, static_argnums=0)
def _mask(leaf: _Leaf, score: Score, table: Array, row: np.ndarray) -> Array:
    """Keeps keys before the threshold, and those equal to it at flat indices before the cut."""
    keys = leaf.keys(score)
    threshold, cut = _row(table, row)
    threshold = threshold.astype(keys.dtype)
    tied = (keys == threshold) & _lies_before(
        keys.shape, cut.astype(jnp.uint32), jnp.zeros((), jnp.uint32)
    )
    return (keys < threshold) | tied


# --- the search -----------------------------------------------------------------------------------------------------


class _Bracket(NamedTuple):
    """Where the threshold of each of P pools (of L leaves) can be: `low <= threshold <= high`."""

    low: Array
    high: Array
    below: Number  # [L], units of the leaf before `low`
    upto: Number  # [L], units of the leaf before `high + 1`
    is_open: Array  # the threshold is not found yet
    inside: Array  # units in the bracket, as a float
    stalls: Array  # reads in a row that did not halve them
    pivots: Array  # [P, _PIVOTS], to be counted next


def _pool_totals(counts: Number, owner: Owner, target: Number) -> Number:
    pools = owner[-1] + 1
    if pools == len(owner):
        return counts
    if pools == 1:
        return exact_sum(
            counts,
            lambda c: jnp.sum(c, axis=0, keepdims=True, dtype=jnp.uint32),
            isinstance(target, Count),
        )
    return exact_sum(
        counts,
        lambda c: jax.ops.segment_sum(c, np.asarray(owner), pools, indices_are_sorted=True),
        isinstance(target, Count),
    )


def _column(x: Array) -> Array:
    return x[:, None]


def _aim(bracket: _Bracket, owner: Owner, target: Number) -> _Bracket:
    """Tells which thresholds are found, and chooses pivots in (low, high] for the others.

    Pivots normally stand around the threshold to be expected if the units inside were evenly spread. A bracket that did
    not halve is not so: it spans many orders of magnitude, or holds lumps of equal scores. Then in turn come (a) the
    roundest number in the middle of the bracket, where a lump is most likely to be (zeros, integers, low precision),
    together with its successor, which isolates it; (b) equal steps.
    """
    low, high, dtype = bracket.low, bracket.high, bracket.low.dtype
    below, upto = (_pool_totals(c, owner, target) for c in (bracket.below, bracket.upto))
    is_open = less(below, target) & less(target, upto) & (low < high)
    inside = to_float(subtract(upto, below))
    stalls = jnp.where(inside * 2 > bracket.inside, bracket.stalls + 1, 0)

    steps = high - low
    share = to_float(subtract(target, below)) / jnp.maximum(inside, 1)
    deviation = jnp.sqrt(jnp.maximum(share * (1 - share), 0) / jnp.maximum(inside, 1))
    expected = _column(share) + _column(deviation) * np.asarray([_SPREAD], np.float32)
    equal = np.arange(1, _PIVOTS + 1, dtype=np.float32)[None] / (_PIVOTS + 1)
    evenly = _column((stalls % 2 == 0) & (stalls > 0) | (steps <= _PIVOTS))
    # Just below one, or the product could round up to 2**32 and fall out of the integer type.
    asked = jnp.clip(jnp.where(evenly, equal, expected), 0, 1 - 2.0**-24)
    offsets = jnp.ceil(asked * _column(steps.astype(jnp.float32))).astype(dtype)

    quarter = steps >> 2
    first, last = low + quarter, high - quarter
    bits = np.array(np.iinfo(dtype).bits - 1, dtype)
    tail = (np.array(2, dtype) << (bits - jnp.minimum(lax.clz(first ^ last), bits))) - np.array(
        1, dtype
    )
    roundest = (last & ~(tail >> 1)) - low
    lump = jnp.stack([quarter, roundest, roundest + 1, steps - quarter], axis=1)
    offsets = jnp.where(_column((stalls % 2 == 1) & (steps > _PIVOTS)), lump, offsets)
    pivots = _column(low) + jnp.clip(offsets, np.array(1, dtype), _column(jnp.maximum(steps, 1)))
    return bracket._replace(is_open=is_open, inside=inside, stalls=stalls, pivots=pivots)


@functools.partial(jax.jit, static_argnums=(0,))
def _narrow(owner: Owner, target: Number, bracket: _Bracket, counts: Sequence[Number]) -> _Bracket:
    """The bracket after counting its pivots."""
    # The barrier keeps XLA from turning the sum of a stack into a chain of sums, one rewrite of the module at a time.
    counts = lax.optimization_barrier(jax.tree.map(lambda *c: jnp.stack(c), *counts))
    totals = _pool_totals(counts, owner, target)
    goal = jax.tree.map(lambda t: jnp.broadcast_to(t[:, None], bracket.pivots.shape), target)
    is_open = bracket.is_open[:, None]
    fits, reaches = is_open & ~less(goal, totals), is_open & ~less(totals, goal)
    low = jnp.max(jnp.where(fits, bracket.pivots, np.array(0, bracket.low.dtype)), axis=1)
    high = (
        jnp.min(
            jnp.where(
                reaches,
                bracket.pivots,
                np.array(np.iinfo(bracket.low.dtype).max, bracket.low.dtype),
            ),
            axis=1,
        )
        - 1
    )
    # Counts grow with the pivots, so the count at the highest pivot that fits is the highest count of one that fits.
    below, upto = bracket.below, bracket.upto
    for j in range(_PIVOTS):
        count = jax.tree.map(operator.itemgetter((slice(None), j)), counts)
        fit, reach = (_of_leaves(hit[:, j], owner) for hit in (fits, reaches))
        below = where(fit & less(below, count), count, below)
        upto = where(reach & less(count, upto), count, upto)
    any_reaches = jnp.any(reaches, axis=1)
    bracket = bracket._replace(
        low=jnp.maximum(bracket.low, low),
        high=jnp.where(any_reaches, jnp.minimum(bracket.high, high), bracket.high),
        below=below,
        upto=upto,
    )
    return _aim(bracket, owner, target)


def _of_leaves(of_pools: Array, owner: Owner) -> Array:
    if owner[-1] == 0:
        return jnp.broadcast_to(of_pools, (len(owner), *of_pools.shape[1:]))
    return of_pools if owner[-1] + 1 == len(owner) else of_pools[np.asarray(owner)]


def _search(
    owner: Owner, target: Number, bracket: _Bracket, count: Callable, on_host: bool
) -> _Bracket:
    """Narrows brackets until `target` units come before `low` or `high + 1`, or `low == high`."""
    if not on_host:

        def step(bracket: _Bracket) -> _Bracket:
            return _narrow(owner, target, bracket, count(bracket.pivots, range(len(owner))))

        return lax.while_loop(lambda bracket: jnp.any(bracket.is_open), step, bracket)
    counts = [
        jax.tree.map(lambda c: np.zeros(_PIVOTS, np.uint32), t)
        for t in [_one(bracket.below)] * len(owner)
    ]
    while (is_open := np.asarray(bracket.is_open)).any():
        asked = [n for n, p in enumerate(owner) if is_open[p]]
        for n, c in zip(asked, count(bracket.pivots, asked), strict=True):
            counts[n] = c
        bracket = _narrow(owner, target, bracket, counts)
    return bracket


def _one(number: Number) -> Number:
    return jax.tree.map(lambda x: x[:1], number)


# --- pools ----------------------------------------------------------------------------------------------------------


def keep_largest(
    scores: Sequence[Score], pools: Sequence[tuple[int, ...]], num_pruned: Sequence[Any]
) -> list[Array]:
    """Mask the smallest scores of each pool.

    Args:
        scores: Arrays of any shape and sharding, larger = keep; NaNs rank lowest. ``Partial(f, *arrays)`` stands for
            ``f(*arrays)`` where f is elementwise: it is then evaluated within each read, while an array computed in the
            same jit has to be stored.
        pools: Disjoint tuples of indices into `scores`; each pool is ranked as one set. Arrays in none are kept whole.
        num_pruned: How many elements each pool loses: an int or a `counts.Count`, which may be traced.

    Returns:
        One bool array for each array of `scores`, of its shape and sharding: True = kept. Exactly the asked number is
        False in each pool. Of equal scores the lower flat index is kept first, arrays in the order that the pool lists
        them.

    Raises:
        TypeError: If a pool mixes integers of several types, or integers and floats.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> a, b = jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])
        >>> prunax.selection.keep_largest([a, b], [(0, 1)], [1])
        [Array([ True,  True], dtype=bool), Array([False,  True], dtype=bool)]
    """
    num_pruned = [as_count(k) for k in num_pruned]
    scores = [s if isinstance(s, Partial) else jnp.asarray(s) for s in scores]
    pools = tuple(tuple(map(int, pool)) for pool in pools)
    order = [i for pool in pools for i in pool]
    concrete = not trees.is_traced(*jax.tree.leaves((scores, num_pruned)))
    if concrete and len(order) > _HOST_LOOP:
        return _keep_largest(scores, pools, num_pruned, on_host=True)
    return _keep_largest_jit(scores, pools, num_pruned, False)


def _keep_largest(scores, pools, num_pruned, on_host) -> list[Array]:
    order = [i for pool in pools for i in pool]
    masks: list[Any] = [
        None if i in order else jnp.ones(_leaf(s).shape, bool) for i, s in enumerate(scores)
    ]
    nonempty = [p for p, pool in enumerate(pools) if pool]
    if not nonempty:
        return masks
    leaves = []
    for pool in pools:
        found = [_leaf(scores[i]) for i in pool]
        leaves += [
            leaf._replace(dtype=_pool_dtype([leaf.dtype for leaf in found])) for leaf in found
        ]
    owner = tuple(nonempty.index(p) for p in nonempty for _ in pools[p])
    num_pruned = [num_pruned[p] for p in nonempty]
    scores = [scores[i] for i in order]
    table = _thresholds(tuple(leaves), owner, scores, num_pruned, on_host)
    for n, i in enumerate(order):
        masks[i] = _mask(leaves[n], scores[n], table, np.arange(2 * n, 2 * n + 2))
    return masks


_keep_largest_jit = jax.jit(_keep_largest, static_argnums=(1, 3))


def _pool_dtype(dtypes: list[np.dtype]) -> np.dtype:
    if len(set(dtypes)) == 1:
        return dtypes[0]
    if not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
        raise TypeError(
            f"keep_largest: a pool must hold floats or one integer type, got {sorted({str(d) for d in dtypes})}."
        )
    return np.dtype("float64") if np.dtype("float64") in dtypes else np.dtype("float32")


def _thresholds(leaves, owner, scores, num_pruned, on_host) -> Array:
    """`[L, 2]`: of each leaf the threshold key, and the flat index before which keys equal to it are kept."""

    def count(row_of: Callable[[int], int], table: Array, asked: Sequence[int]) -> list[Number]:
        width = table.shape[1]
        return [
            _count(leaves[n], scores[n], table, np.arange(width) + width * row_of(n)) for n in asked
        ]

    of_pool = functools.partial(count, lambda n: owner[n])
    target, bracket = _first_bracket(leaves, owner, num_pruned)
    stride = _sample_stride(leaves, owner)
    if stride is not None:
        samples = [
            _sample(leaf, stride[p], score)
            for leaf, p, score in zip(leaves, owner, scores, strict=True)
        ]
        bracket = bracket._replace(pivots=_sampled_pivots(owner, samples, target, bracket))
    bracket = _search(owner, target, bracket, of_pool, on_host)
    threshold, share, bracket = _tie_bracket(leaves, owner, target, bracket)

    def of_ties(pivots: Array, asked: Sequence[int]) -> list[Number]:
        return count(lambda n: n, _append(pivots, threshold), asked)

    bracket = _search(tuple(range(len(leaves))), share, bracket, of_ties, on_host)
    return _cuts(threshold, share, bracket)


@jax.jit
def _append(pivots: Array, threshold: Array) -> Array:
    return jnp.concatenate([pivots.astype(threshold.dtype), threshold[:, None]], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_bracket(leaves, owner, num_pruned):
    pools = owner[-1] + 1
    sizes = np.zeros(pools, np.uint64)
    largest = np.zeros(pools, np.uint64)
    for leaf, p in zip(leaves, owner, strict=True):
        sizes[p] += np.uint64(leaf.size)
        largest[p] = _largest_key(leaf.dtype)
    dtype = np.dtype("uint64" if any(leaf.dtype.itemsize == 8 for leaf in leaves) else "uint32")
    wide_leaf = any(leaf.wide for leaf in leaves)
    wide = wide_leaf or bool((sizes >= WIDE).any())
    num_pruned = jax.tree.map(lambda *k: jnp.stack(k), *[number(k, wide) for k in num_pruned])
    target = subtract(number(sizes, wide), num_pruned)
    size = number(np.asarray([leaf.size for leaf in leaves], np.uint64), wide_leaf)
    return target, _start(owner, target, jnp.asarray(largest.astype(dtype)), size)


def _start(owner, target, high, upto) -> _Bracket:
    zeros = jax.tree.map(jnp.zeros_like, upto)
    empty = jnp.zeros((high.size, _PIVOTS), high.dtype)
    unknown = jnp.full(high.shape, jnp.inf, jnp.float32)
    bracket = _Bracket(
        jnp.zeros_like(high), high, zeros, upto, high > 0, unknown, jnp.full(high.shape, 0), empty
    )
    return _aim(bracket, owner, target)


def _sample_stride(leaves, owner) -> list[int] | None:
    """Of every how many units of each pool one should be looked at for a start; None where that does not pay.

    It does not pay for small pools, and may move data where arrays are spread over devices.
    """
    pools = owner[-1] + 1
    size = min(_SAMPLE, sum(leaf.size for leaf in leaves) // (1024 * pools))
    if size < 64 or any(leaf.wide or not leaf.local for leaf in leaves):
        return None
    totals = [
        sum(leaf.size for leaf, p in zip(leaves, owner, strict=True) if p == q)
        for q in range(pools)
    ]
    return [-(-total // size) or 1 for total in totals]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(leaf: _Leaf, stride: int, score: Score) -> Array:
    keys = leaf.keys(leaf.reshape(score, (leaf.size,)))
    return keys[min(stride // 2, leaf.size // 2) :: stride]


@functools.partial(jax.jit, static_argnums=0)
def _sampled_pivots(owner: Owner, samples: list[Array], target: Number, bracket: _Bracket) -> Array:
    """First pivots: the expected threshold, with its successor should it be a lump, and 2.5 deviations to each side."""
    dtype = bracket.low.dtype
    largest = np.array(np.iinfo(dtype).max, dtype)
    rows = [
        jnp.concatenate([s.astype(dtype) for s, o in zip(samples, owner, strict=True) if o == p])
        for p in range(owner[-1] + 1)
    ]
    length = np.asarray([row.size for row in rows], np.float32)
    longest = max(row.size for row in rows)
    sample = jnp.sort(
        jnp.stack([jnp.pad(row, (0, longest - row.size), constant_values=largest) for row in rows]),
        axis=1,
    )

    def at(rank):
        index = jnp.clip(rank, 0, np.maximum(length - 1, 0)).astype(jnp.int32)
        return jnp.take_along_axis(sample, index[:, None], axis=1)[:, 0]

    size = to_float(_pool_totals(bracket.upto, owner, target))
    share = to_float(target) / jnp.maximum(size, 1)
    rank, margin = share * length, 2.5 * jnp.sqrt(share * (1 - share) * length) + 1
    first, last, middle = at(np.zeros_like(length)), at(length), at(rank)
    # Beyond the sample's ends the threshold may be anywhere.
    lower = jnp.where(rank < margin, first >> 1, at(rank - margin))
    upper = jnp.where(
        rank + margin >= length, last + ((largest - last) >> 1), at(rank + margin) + 1
    )
    pivots = jnp.stack([lower, middle, middle + 1, upper], axis=1)
    return jnp.clip(pivots, np.array(1, dtype), jnp.maximum(bracket.high, 1)[:, None])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tie_bracket(leaves, owner, target, bracket):
    below = _pool_totals(bracket.below, owner, target)
    found = ~less(below, target)  # without any unit equal to the threshold
    threshold = _of_leaves(jnp.where(found, bracket.low, bracket.high), owner)
    ties = subtract(bracket.upto, bracket.below)
    zeros = jax.tree.map(jnp.zeros_like, ties)
    ties = where(_of_leaves(found, owner), zeros, ties)
    share = _deal(ties, owner, subtract(target, below))
    last = jnp.asarray(np.asarray([max(leaf.size, 1) - 1 for leaf in leaves], np.uint32))
    return threshold, share, _start(tuple(range(len(leaves))), share, last, ties)


def _deal(ties: Number, owner: Owner, wanted: Number) -> Number:
    """Gives the leaves of a pool, in order, as many of their ties as are still wanted."""
    if owner[-1] + 1 == len(owner):
        return minimum(ties, wanted)
    wide = isinstance(wanted, Count)
    running = exact_sum(ties, lambda c: jnp.cumsum(c, dtype=jnp.uint32), wide)
    ties_ = exact_sum(ties, lambda c: c, wide)
    before = subtract(running, ties_)
    first = np.searchsorted(owner, np.arange(owner[-1] + 1))[np.asarray(owner)]
    before = subtract(before, jax.tree.map(lambda b: b[first], before))
    wanted = jax.tree.map(lambda w: _of_leaves(w, owner), wanted)
    left = where(
        less(wanted, before), jax.tree.map(jnp.zeros_like, wanted), subtract(wanted, before)
    )
    share = minimum(ties_, left)
    return share if isinstance(ties, Count) == wide else share.low


@jax.jit
def _cuts(threshold: Array, share: Number, bracket: _Bracket) -> Array:
    at_low = ~less(bracket.below, share)
    cut = jnp.where(at_low, bracket.low, bracket.high + 1)
    return jnp.stack([threshold, cut.astype(threshold.dtype)], axis=1)


# --- slices of one array ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def keep_largest_along(scores: Array, axis: int, num_pruned: Any) -> Array:
    """Mask the smallest scores of every slice along an axis.

    Args:
        scores: Array of floats, integers or bools with at least one axis.
        axis: Every one-dimensional slice along it is a pool of its own. It should not be sharded where it is short.
        num_pruned: How many elements each slice loses: an int, or a traced integer scalar.

    Returns:
        A bool array of the scores' shape: True = kept. Of equal scores the lower index is kept first.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.selection.keep_largest_along(jnp.array([[1.0, 4.0], [2.0, 3.0]]), 0, 1)
        Array([[False,  True],
               [ True, False]], dtype=bool)
    """
    axis %= scores.ndim
    n = scores.shape[axis]
    keys = _rank_keys(scores)
    kept = jnp.uint32(n) - jnp.asarray(num_pruned).astype(jnp.uint32)
    if n <= _PAIRWISE:
        ours, theirs = jnp.expand_dims(keys, axis + 1), jnp.expand_dims(keys, axis)
        shape = jnp.broadcast_shapes(ours.shape, theirs.shape)
        ours, theirs = jnp.broadcast_to(ours, shape), jnp.broadcast_to(theirs, shape)
        i, j = (lax.broadcasted_iota(jnp.uint32, shape, a) for a in (axis, axis + 1))
        rank = jnp.sum(
            (theirs < ours) | ((theirs == ours) & (j < i)), axis=axis + 1, dtype=jnp.uint32
        )
        return rank < kept

    def largest(dtype: Any, counted: Callable[[Array], Array], target: Array) -> Array:
        """The largest pivot of each slice with at most `target` elements before it, bit by bit from the top."""
        bits = 8 * np.dtype(dtype).itemsize
        one_each = jnp.sum(keys, axis=axis, keepdims=True)  # for its shape and sharding

        def refine(step: Array, pivot: Array) -> Array:
            bit = jnp.ones((), dtype) << (bits - 1 - step).astype(dtype)
            before = jnp.sum(counted(pivot | bit), axis=axis, keepdims=True, dtype=jnp.uint32)
            return jnp.where(before <= target, pivot | bit, pivot)

        return lax.fori_loop(0, bits, refine, jnp.zeros_like(one_each, dtype=dtype))

    def over(pivot: Array) -> Array:
        return jnp.broadcast_to(pivot, keys.shape)

    threshold = over(largest(keys.dtype, lambda pivot: keys < over(pivot), kept))
    before, tied = keys < threshold, keys == threshold
    index = lax.broadcasted_iota(jnp.uint32, keys.shape, axis)
    left = kept - jnp.sum(before, axis=axis, keepdims=True, dtype=jnp.uint32)
    cut = largest(jnp.uint32, lambda pivot: tied & (index < over(pivot)), left)
    return before | (tied & (index < over(cut)))
