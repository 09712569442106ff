"""Exact top-k masks over lists of arrays, without sorting.

Floating-point numbers order like their bit patterns, so the k-th smallest score of a pool is found by a search over
bit patterns that only counts: how many keys lie below a pivot? Counting needs no copy of the scores, no flattening and
no concatenation, and on sharded arrays it is one all-reduce of a scalar.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import trees

__all__ = ["Count", "keep_largest", "keep_largest_along", "num_pruned", "sort_keys"]


class Count(NamedTuple):
    """A non-negative integer below 2**64 in two 32-bit words, since JAX has no 64-bit integers by default.

    Attributes:
        hi: uint32 scalar, the upper word.
        lo: uint32 scalar, the lower word.
    """

    hi: Any
    lo: Any

    @classmethod
    def of(cls, value: int) -> "Count":
        """Split a Python integer."""
        return cls(np.uint32(value >> 32), np.uint32(value & 0xFFFFFFFF))


def as_count(value: Any) -> Count:
    """Turn an int into a `Count`, and pass a `Count` through."""
    return value if isinstance(value, Count) else Count.of(value)


def add(a: Any, b: Any) -> Count:
    """Add two numbers, each an int or a `Count`."""
    return _add(as_count(a), as_count(b))


def _add(a: Count, b: Count) -> Count:
    lo = a.lo + b.lo
    return Count(a.hi + b.hi + (lo < a.lo).astype(jnp.uint32), lo)


def _sub(a: Count, b: Count) -> Count:
    return Count(a.hi - b.hi - (a.lo < b.lo).astype(jnp.uint32), a.lo - b.lo)


def _le(a: Count, b: Count) -> jax.Array:
    return (a.hi < b.hi) | ((a.hi == b.hi) & (a.lo <= b.lo))


def num_pruned(sparsity: Any, n: int) -> Any:
    """How many of n units a sparsity prunes: sparsity * n, halves rounded to even.

    Args:
        sparsity: Fraction in [0, 1]; a number, or a traced float32 scalar.
        n: The number of units, static; may exceed 2**32.

    Returns:
        An int for a concrete sparsity. For a traced one a `Count`, the exact product of the float32 value and n
        rounded once (float32 arithmetic would be off by several units beyond 2**24).

    Examples:
        >>> import prunax
        >>> prunax.selection.num_pruned(0.5, 5), prunax.selection.num_pruned(0.5, 7)
        (2, 4)
    """
    if not trees.is_traced(sparsity):
        return round(float(sparsity) * n)
    mantissa, exponent = jnp.frexp(jnp.clip(jnp.float32(sparsity), 0.0, 1.0))
    m = (mantissa * jnp.float32(2**24)).astype(jnp.uint32)  # sparsity == m * 2**-shift, m <= 2**24
    shift = (24 - exponent).astype(jnp.uint32)
    product = Count(jnp.uint32(0), jnp.uint32(0))
    for j in range(0, max(n.bit_length(), 1), 8):
        limb = m * jnp.uint32((n >> j) & 0xFF)
        product = _add(product, _shift_left(Count(jnp.uint32(0), limb), jnp.uint32(j)))
    # Adding just below half, and one more where the quotient is odd, rounds to nearest even on the shift that follows.
    odd = _shift_right(product, shift).lo & jnp.uint32(1)
    half = _sub(
        _shift_left(Count(jnp.uint32(0), jnp.uint32(1)), shift - jnp.uint32(1)), Count.of(1)
    )
    return _shift_right(_add(_add(product, half), Count(jnp.uint32(0), odd)), shift)


def _shift_left(a: Count, by: jax.Array) -> Count:
    # XLA defines a shift by 32 or more as 0, and `32 - by` wraps to such a shift where it is negative.
    left, right = jax.lax.shift_left, jax.lax.shift_right_logical
    w = jnp.uint32(32)
    return Count(left(a.hi, by) | right(a.lo, w - by) | left(a.lo, by - w), left(a.lo, by))


def _shift_right(a: Count, by: jax.Array) -> Count:
    left, right = jax.lax.shift_left, jax.lax.shift_right_logical
    w = jnp.uint32(32)
    return Count(right(a.hi, by), right(a.lo, by) | left(a.hi, w - by) | right(a.hi, by - w))


def sort_keys(x: jax.Array) -> jax.Array:
    """Turn numbers into unsigned integers that order the same way.

    Args:
        x: float16, bfloat16, float32 or float64 array of any shape.

    Returns:
        Unsigned keys of the same shape and width. NaN is lowest of all; -0.0 and 0.0 are equal. Only bits are looked
        at, so that backends that flush denormal numbers order them all the same.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> keys = prunax.selection.sort_keys(jnp.array([1.0, -1.0, 0.0, -0.0, jnp.nan, jnp.inf]))
        >>> keys.argsort().tolist()
        [4, 1, 2, 3, 0, 5]
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{x.dtype.itemsize * 8}"))
    one = jnp.ones((), bits.dtype)
    sign = one << (x.dtype.itemsize * 8 - 1)
    magnitude = bits & ~sign
    infinity = jax.lax.bitcast_convert_type(jnp.full((), jnp.inf, x.dtype), bits.dtype)
    negative = (bits & sign) != 0
    key = jnp.where(negative & (magnitude != 0), sign - magnitude, sign + magnitude)
    return jnp.where(magnitude > infinity, jnp.zeros((), bits.dtype), key)


def keep_largest(
    scores: Sequence[jax.Array], pools: Sequence[tuple[int, ...]], num_pruned: Sequence[Any]
) -> list[jax.Array]:
    """Mask the smallest scores of each pool.

    Args:
        scores: Floating-point arrays of any shapes.
        pools: Disjoint tuples of indices into `scores`; each pool is ranked as one set.
        num_pruned: How many elements each pool loses: an int or a `Count` that may be traced.

    Returns:
        One bool array for each array of `scores`, of its shape: True = kept. Exactly the asked number is False in each
        pool. Of equal scores the lower flat index is kept first, arrays in the order that the pool lists them. Arrays
        in no pool are kept whole.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> a, b = jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])
        >>> prunax.selection.keep_largest([a, b], [(0, 1)], [1])
        [Array([ True,  True], dtype=bool), Array([False,  True], dtype=bool)]
    """
    masks = [jnp.ones(s.shape, jnp.bool_) for s in scores]
    for pool, k in zip(pools, num_pruned, strict=True):
        kept = _keep_largest_of_pool([scores[i] for i in pool], as_count(k))
        for i, mask in zip(pool, kept, strict=True):
            masks[i] = mask
    return masks


def _keep_largest_of_pool(scores: Sequence[jax.Array], k: Count) -> list[jax.Array]:
    keys = [sort_keys(s).astype(jnp.uint32) for s in scores]

    def count_below(pivot: jax.Array) -> Count:
        total = Count(jnp.uint32(0), jnp.uint32(0))
        for key in keys:
            total = _add(total, Count(jnp.uint32(0), jnp.sum(key < pivot, dtype=jnp.uint32)))
        return total

    def refine(i: jax.Array, pivot: jax.Array) -> jax.Array:
        candidate = pivot | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(_le(count_below(candidate), k), candidate, pivot)

    # The largest pivot with at most k keys below it: the key of the first weight kept.
    pivot = jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
    surplus = _sub(k, count_below(pivot)).lo  # how many of the keys equal to the pivot go as well
    ties = [jnp.sum(key == pivot, dtype=jnp.uint32) for key in keys]
    masks = []
    for key, n, later in zip(keys, ties, _sums_after(ties), strict=True):
        kept_ties = n - jnp.minimum(n, surplus - jnp.minimum(surplus, later))
        masks.append((key > pivot) | _first(key == pivot, kept_ties))
    return masks


def _sums_after(values: list[jax.Array]) -> list[jax.Array]:
    sums, total = [], jnp.uint32(0)
    for v in reversed(values):
        sums.append(total)
        total = total + v
    return sums[::-1]


def _first(chosen: jax.Array, n: jax.Array) -> jax.Array:
    """Keep the first n True elements of a mask in flat order."""
    index = jnp.zeros(chosen.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(chosen.ndim)):
        index = index + jnp.uint32(stride) * jax.lax.broadcasted_iota(
            jnp.uint32, chosen.shape, axis
        )
        stride *= chosen.shape[axis]

    def refine(i: jax.Array, end: jax.Array) -> jax.Array:
        candidate = end | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(
            jnp.sum(chosen & (index < candidate), dtype=jnp.uint32) <= n, candidate, end
        )

    end = jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
    return chosen & (index < end)


def keep_largest_along(scores: jax.Array, axis: int, num_pruned: Any) -> jax.Array:
    """Mask the smallest scores of every slice along an axis.

    Args:
        scores: Floating-point array with at least one axis.
        axis: Every one-dimensional slice along it is a pool of its own.
        num_pruned: How many elements each slice loses: an int, or a traced integer scalar.

    Returns:
        A bool array of the scores' shape: True = kept. Of equal scores the lower index is kept first.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.selection.keep_largest_along(jnp.array([[1.0, 4.0], [2.0, 3.0]]), 0, 1)
        Array([[False,  True],
               [ True, False]], dtype=bool)
    """
    order = jnp.argsort(sort_keys(scores), axis=axis, descending=True, stable=True)
    rank = jnp.argsort(order, axis=axis)
    return rank < scores.shape[axis] - num_pruned
