"""One array as bytes: which elements are not zero, at one bit each, and then those elements.

Looked at are bit patterns, not values: -0.0 and every NaN are kept as they are, and only what is all zero bits is left
out. Arrays in which too few elements are zero to make up for the bits are stored whole.
"""

import math

import ml_dtypes
import numpy as np

from prunax.export._container import NAMES

__all__ = ["decode", "encode", "encoded_size", "pack_bits", "unpack_bits"]

Shape = tuple[int, ...]

# Names of the dtypes that arrays may have, for reading: no other text becomes a dtype.
DTYPES: dict[str, np.dtype] = {dtype.name: dtype for dtype in NAMES} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fnuz float8_e5m2fnuz float4_e2m1fn float6_e2m3fn "
        "float6_e3m2fn int2 int4 uint2 uint4 int1 uint1"
    ).split()
    if hasattr(ml_dtypes, name)
}
DTYPES["complex128"] = np.dtype(np.complex128)


def pack_bits(mask: np.ndarray) -> np.ndarray:
    """The elements in row-major order as bits of uint8, eight a byte, the first in the lowest."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack_bits(packed: np.ndarray, shape: Shape) -> np.ndarray:
    """Undo `pack_bits`; ValueError if the number of bytes is wrong, or a bit behind the last element is set."""
    size = math.prod(shape)
    if packed.shape != (-(-size // 8),):
        raise ValueError(f"{packed.size} bytes of bits, {-(-size // 8)} are needed for {shape}")
    if size % 8 and packed[-1] >> (size % 8):
        raise ValueError("bits are set behind the last element")
    return np.unpackbits(packed, count=size, bitorder="little").view(np.bool_).reshape(shape)


def encoded_size(array: np.ndarray) -> int:
    """How many bytes `encode` makes of an array."""
    return _size(array.size, int(np.count_nonzero(_patterns(array))), array.dtype.itemsize)


def encode(array: np.ndarray) -> list[np.ndarray]:
    """Turn an array of elements of 1, 2, 4, 8 or 16 bytes into bits and kept elements, each filled up to eight bytes.

    Examples:
        >>> import numpy as np
        >>> from prunax.export import _encoding
        >>> [piece.tolist() for piece in _encoding.encode(np.array([0, 7, 0, 9], np.uint8))]
        [[10], [0, 0, 0, 0, 0, 0, 0], [7, 9], [0, 0, 0, 0, 0, 0]]
    """
    patterns = _patterns(array)
    mask = patterns != 0
    bits = pack_bits(mask)
    values = _elements(array)[mask]
    return [bits, _filling(bits.nbytes), values.view(np.uint8), _filling(values.nbytes)]


def decode(data: np.ndarray, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Undo `encode`, bit for bit; ValueError if the bytes are not what it makes of an array of this shape and dtype."""
    size, itemsize = math.prod(shape), dtype.itemsize
    end = -(-size // 8)
    if data.size < end:
        raise ValueError(f"{data.size} bytes, the bits alone take {end}")
    mask = unpack_bits(data[:end], (size,))
    kept = int(np.count_nonzero(mask))
    if data.size != _size(size, kept, itemsize):
        raise ValueError(
            f"{data.size} bytes, the {kept} elements marked as kept take {_size(size, kept, itemsize)}"
        )
    first, last = _aligned(end), _aligned(end) + kept * itemsize
    if data[end:first].any() or data[last:].any():
        raise ValueError("the filling is not zero")
    array = np.zeros(size, _element(itemsize))
    array[mask] = data[first:last].view(array.dtype)
    if np.count_nonzero(_patterns(array)) != kept:
        raise ValueError("an element marked as kept is zero")
    if dtype == np.bool_ and np.any(array > 1):
        raise ValueError("bools other than 0 and 1")
    return array.view(dtype).reshape(shape)


def _element(itemsize: int) -> np.dtype:
    """A dtype whose elements are copied without being looked at."""
    return np.dtype(f"u{itemsize}" if itemsize <= 8 else np.complex128)


def _elements(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(_element(array.dtype.itemsize))


def _patterns(array: np.ndarray) -> np.ndarray:
    """Integers that are zero where all bits are."""
    elements = _elements(array)
    if elements.dtype.kind == "u":
        return elements
    halves = elements.view(np.uint64).reshape(-1, 2)
    return halves[:, 0] | halves[:, 1]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def _size(size: int, kept: int, itemsize: int) -> int:
    return _aligned(-(-size // 8)) + _aligned(kept * itemsize)


def _filling(nbytes: int) -> np.ndarray:
    return np.zeros(_aligned(nbytes) - nbytes, np.uint8)
