"""Numbers as unsigned integers that order the same way, so that a threshold can be searched for bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["absolute", "sort_keys"]

Array = jax.Array


def sort_keys(x: Array) -> Array:
    """Turn numbers into unsigned integers that order the same way.

    Args:
        x: Array of floats, integers or bools, of any shape.

    Returns:
        Unsigned keys of the same shape and width. All NaNs are the lowest key, below -inf; -0.0 and 0.0 are equal. Only
        bits are looked at, since a backend may flush denormal numbers to zero in comparisons of floats.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> keys = prunax._selection.sort_keys(jnp.array([1.0, -1.0, 0.0, -0.0, jnp.nan, jnp.inf]))
        >>> keys.argsort().tolist()
        [4, 1, 2, 3, 0, 5]
    """
    return ~rank_keys(x)


def absolute(x: Array) -> Array:
    """`jnp.abs`, of bfloat16 by its bits: XLA computes that in float32 on CPUs, which doubles the time of a read."""
    if x.dtype != jnp.bfloat16:
        return jnp.abs(x)
    return lax.bitcast_convert_type(unsigned_bits(x), x.dtype)


def unsigned_bits(x: Array) -> Array:
    """The bits of floats without their signs: more than `infinity(x.dtype)` where they are NaN."""
    unsigned = np.dtype(f"uint{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)


def rank_keys(x: Array) -> Array:
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
    # +inf becomes 0, zeros `inf`, -inf twice that. NaNs of both signs land above: the positive ones wrap around.
    inf = infinity(x.dtype)
    keys = jnp.where(bits < sign_bit, unsigned(inf) - bits, bits + unsigned(inf + int(sign_bit)))
    return jnp.minimum(keys, unsigned(largest_key(x.dtype)))


def infinity(dtype: np.dtype) -> int:
    """The bits of infinity."""
    return int(np.asarray(np.inf, dtype).view(f"uint{8 * dtype.itemsize}"))


def largest_key(dtype: np.dtype) -> int:
    """The key that ranks last: of NaN, or of the smallest integer."""
    return (
        2 * infinity(dtype) + 1
        if jnp.issubdtype(dtype, jnp.floating)
        else 2 ** (8 * dtype.itemsize) - 1
    )
