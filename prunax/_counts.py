"""Numbers of units beyond 32 bits, in arithmetic that JAX has everywhere.

JAX has no 64-bit integers by default and float32 holds integers to 2**24 only. A `Count` is two 32-bit words.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunax import trees

__all__ = ["Count", "num_pruned"]

Array = jax.Array


class Count(NamedTuple):
    """A non-negative integer below 2**64, or an array of them.

    Attributes:
        high: uint32, the upper word.
        low: uint32, the lower word.
    """

    high: Any
    low: Any


Number = Any  # a Count, or a uint32 array where everything counted is known to be below 2**32
WIDE = 2**32  # sizes from here on are counted in two words


def as_count(value: int | Count) -> Count:
    """Turn an int into a `Count`, and pass a `Count` through."""
    if isinstance(value, Count):
        return value
    return Count(np.uint32(value >> 32), np.uint32(value & 0xFFFFFFFF))


def number(value: Any, wide: bool) -> Number:
    """Turn Counts, or NumPy integers of 64 bits, into one kind of number: a Count where `wide`, else a uint32 array."""
    if isinstance(value, np.ndarray):
        value = Count((value >> np.uint64(32)).astype(np.uint32), value.astype(np.uint32))
    return (
        Count(jnp.asarray(value.high), jnp.asarray(value.low)) if wide else jnp.asarray(value.low)
    )


def add(a: int | Count, b: int | Count) -> Count:
    """Add two numbers, each an int or a `Count`."""
    a, b = (Count(*map(jnp.asarray, as_count(x))) for x in (a, b))
    low = a.low + b.low
    return Count(a.high + b.high + (low < a.low).astype(jnp.uint32), low)


def less(a: Number, b: Number) -> Array:
    """Whether a < b."""
    if not isinstance(a, Count):
        return a < b
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def subtract(a: Number, b: Number) -> Number:
    """A - b, for a >= b."""
    if not isinstance(a, Count):
        return a - b
    return Count(a.high - b.high - (a.low < b.low).astype(jnp.uint32), a.low - b.low)


def to_float(a: Number) -> Array:
    """The nearest float32, about."""
    if not isinstance(a, Count):
        return a.astype(jnp.float32)
    return a.high.astype(jnp.float32) * np.float32(2**32) + a.low.astype(jnp.float32)


def where(condition: Array, a: Number, b: Number) -> Number:
    """Choose between two numbers."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def minimum(a: Number, b: Number) -> Number:
    """The smaller of two numbers."""
    return where(less(b, a), b, a)


def exact_sum(a: Number, total: Callable[[Array], Array], wide: bool) -> Number:
    """Apply `total`, a sum or running sum of fewer than 2**16 terms, exactly: 16 bits of a word at a time."""
    if not wide:
        return total(a)
    high, low = a if isinstance(a, Count) else (jnp.zeros_like(a), a)
    small = total(low & np.uint32(0xFFFF))
    large = total(low >> 16) + (small >> 16)
    return Count(total(high) + (large >> 16), (large << 16) | (small & np.uint32(0xFFFF)))


def num_pruned(sparsity: Any, n: Any) -> Any:
    """How many of n units a sparsity prunes: sparsity * n, halves rounded to even.

    Args:
        sparsity: Fraction in [0, 1]: a number, or traced, a scalar or array, which is taken as float32.
        n: Number of units, static, below 2**38. For a traced sparsity also a sequence of numbers, of the sparsity's
            shape or for a scalar one.

    Returns:
        For a concrete sparsity the int ``round(float(sparsity) * n)``. For a traced one a `Count`, worked out in
        integers (float32 arithmetic would be off by several units beyond 2**24). A float32 that is nearest to a number
        of up to six decimals stands for that number, so that a traced 0.9 prunes as many as a concrete one.

    Examples:
        >>> import prunax
        >>> prunax._counts.num_pruned(0.5, 5), prunax._counts.num_pruned(0.5, 7)
        (2, 4)
    """
    if not trees.is_traced(sparsity):
        return round(float(sparsity) * n)
    sparsity = jnp.clip(lax.convert_element_type(sparsity, jnp.float32), 0.0, 1.0)
    mantissa, exponent = jnp.frexp(sparsity)
    m = (mantissa * np.float32(2**24)).astype(jnp.uint32)  # sparsity == m * 2**-shift, m <= 2**24
    shift = (24 - exponent).astype(jnp.uint32)
    decimal = jnp.round(sparsity * np.float32(_DECIMALS)).astype(jnp.uint32)
    # Is |m * 2**-shift - decimal / _DECIMALS| at most half a unit of the last place?
    ours, theirs = _times(m, _DECIMALS), _shift_left(_count(decimal), shift)
    distance = where(less(ours, theirs), subtract(theirs, ours), subtract(ours, theirs))
    is_decimal = ~less(_count(jnp.full_like(m, _DECIMALS // 2)), distance)
    return where(is_decimal, _divided(_times(decimal, n)), _shifted(_times(m, n), shift))


def nums_pruned(sparsities: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """Count the units that pools lose: `num_pruned` of each, all traced ones at once, which compiles much faster."""
    budgets: list[Any] = [
        None if trees.is_traced(s) else num_pruned(s, n)
        for s, n in zip(sparsities, sizes, strict=True)
    ]
    traced = [p for p, budget in enumerate(budgets) if budget is None]
    if traced:
        together = jnp.stack([jnp.asarray(sparsities[p], jnp.float32) for p in traced])
        numbers = num_pruned(together, [sizes[p] for p in traced])
        for k, p in enumerate(traced):
            budgets[p] = Count(numbers.high[k], numbers.low[k])
    return budgets


_DECIMALS = 10**6


def _count(low: Array) -> Count:
    return Count(jnp.zeros_like(low), low)


def _times(m: Array, n: Any) -> Count:
    """Multiply numbers of up to 24 bits by static ones."""
    n = np.asarray(n, np.uint64)
    product = _count(jnp.zeros(np.broadcast_shapes(m.shape, n.shape), jnp.uint32))
    for j in range(0, max(int(n.max(initial=0)).bit_length(), 1), 8):
        limb = m * ((n >> np.uint64(j)) & np.uint64(0xFF)).astype(np.uint32)
        product = add(product, _shift_left(_count(limb), np.uint32(j)))
    return product


def _divided(a: Count) -> Count:
    """Divide by _DECIMALS, halves rounded to even: long division, eight bits at a time."""
    rest, words = jnp.zeros_like(a.low), []
    for word in a:
        quotient = jnp.zeros_like(word)
        for j in (24, 16, 8, 0):
            rest = (rest << 8) | ((word >> j) & np.uint32(0xFF))
            quotient = quotient | ((rest // np.uint32(_DECIMALS)) << j)
            rest = rest % np.uint32(_DECIMALS)
        words.append(quotient)
    up = (rest > _DECIMALS // 2) | ((rest == _DECIMALS // 2) & (words[1] & 1 == 1))
    return add(Count(*words), _count(up.astype(jnp.uint32)))


def _shifted(a: Count, shift: Array) -> Count:
    """Divide by 2**shift, halves rounded to even."""
    middle = add(a, _shift_left(_count(jnp.ones_like(shift)), shift - 1))
    half_down = _shift_right(subtract(middle, _count(jnp.ones_like(middle.low))), shift)
    half_up = _shift_right(middle, shift)
    return where(half_down.low & 1 == 1, half_up, half_down)


def _shift_left(a: Count, by: Any) -> Count:
    # XLA defines a shift by 32 or more as 0, and `32 - by` wraps around to such a shift where it is negative.
    by = jnp.broadcast_to(by, a.low.shape)
    left, right, w = lax.shift_left, lax.shift_right_logical, np.uint32(32)
    return Count(left(a.high, by) | right(a.low, w - by) | left(a.low, by - w), left(a.low, by))


def _shift_right(a: Count, by: Any) -> Count:
    by = jnp.broadcast_to(by, a.low.shape)
    left, right, w = lax.shift_left, lax.shift_right_logical, np.uint32(32)
    low = right(a.low, by) | left(a.high, w - by) | right(a.high, by - w)
    return Count(right(a.high, by), low)
