"""One bit a weight: bool arrays packed into bytes.

Eight neighbours along the packing axis share a byte, the first in the lowest bit. The packing axis is not the minor one
where that can be helped: the other axes stay contiguous, so that XLA vectorises the shifts and fuses them into whatever
reads the mask. Where the array is sharded along the packing axis, so are the bytes, and nothing moves, if what a device
holds is a multiple of eight; else bytes are whole along that axis.
"""

import jax
import jax.numpy as jnp

from prunax import _meshes

__all__ = ["pack_bits", "packed_shape", "unpack_bits"]

Shape = tuple[int, ...]


def packed_shape(shape: Shape) -> Shape:
    """Shape of the bytes that hold a bool array: the packing axis is divided by eight, rounded up.

    It is the axis that wastes the fewest bytes, and the minor one only where that is the better by far.

    Examples:
        >>> import prunax
        >>> prunax._packing.packed_shape((784, 300)), prunax._packing.packed_shape((3, 3, 1, 64))
        ((98, 300), (3, 3, 1, 8))
    """
    if not shape:
        return ()
    axis = _axis(shape)
    return (*shape[:axis], -(-shape[axis] // 8), *shape[axis + 1 :])


def pack_bits(mask: jax.Array) -> jax.Array:
    """Pack a bool array into uint8 of shape ``packed_shape(mask.shape)``. A 0-d one is returned as it is.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax._packing.pack_bits(jnp.array([[True], [False], [True]])).tolist()
        [[5]]
    """
    if not mask.shape:
        return mask
    axis = _axis(mask.shape)
    if mask.shape[axis] % (8 * _meshes.shards(mask)[axis]):
        mask = _meshes.gather(mask, [axis])
    rows = packed_shape(mask.shape)[axis]
    if rows * 8 != mask.shape[axis]:
        widths = [(0, 8 * rows - n if a == axis else 0) for a, n in enumerate(mask.shape)]
        mask = jnp.pad(mask, widths)
    shape = (*mask.shape[:axis], rows, 8, *mask.shape[axis + 1 :])
    axes = (*range(axis + 1), -1, *range(axis + 1, mask.ndim))
    divided = _meshes.split(_meshes.sharding_of(mask), axes)
    groups = jax.lax.reshape(mask, shape, out_sharding=divided)
    bits = groups.astype(jnp.uint8) << _bits(groups.ndim, axis + 1)
    return jnp.sum(bits, axis=axis + 1, dtype=jnp.uint8)


def unpack_bits(packed: jax.Array, shape: Shape) -> jax.Array:
    """Unpack what `pack_bits` made of a bool array of a shape.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> mask = jnp.array([[True], [False], [True]])
        >>> bool((prunax._packing.unpack_bits(prunax._packing.pack_bits(mask), mask.shape) == mask).all())
        True
    """
    if not packed.shape:
        return packed
    axis = _axis(shape)
    groups = jnp.expand_dims(packed, axis + 1)
    groups = (groups >> _bits(groups.ndim, axis + 1)) & jnp.uint8(1)
    merged = jax.lax.reshape(
        groups,
        (*shape[:axis], 8 * packed.shape[axis], *shape[axis + 1 :]),
        out_sharding=_meshes.sharding_of(packed),
    )
    return jax.lax.slice_in_dim(merged, 0, shape[axis], axis=axis).astype(jnp.bool_)


def _axis(shape: Shape) -> int:
    waste = [-(-n // 8) * 8 / max(n, 1) for n in shape]
    minor = len(shape) - 1
    return min(range(len(shape)), key=lambda a: (round(waste[a], 1), a == minor, waste[a]))


def _bits(ndim: int, axis: int) -> jax.Array:
    return jnp.arange(8, dtype=jnp.uint8).reshape([8 if a == axis else 1 for a in range(ndim)])
