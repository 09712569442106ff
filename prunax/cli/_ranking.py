"""Exact magnitude ranking of tensors that are read again and again instead of held: no memory but a histogram.

Magnitudes order like their bits without the sign, read as integers. The histogram of their upper sixteen bits says in
which bin the last pruned weight lies; a second read looks at the next sixteen bits within that bin, and so on. Ties go
to the lower index, as everywhere in prunax: those read first are kept first.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["Cut"]

Read = Callable[[], Iterable[np.ndarray]]

_PIECE = 1 << 19  # elements looked at at once
_BINS = 1 << 16


class Cut(NamedTuple):
    """Where a ranking is cut.

    Attributes:
        dtype: The dtype in which magnitudes are compared.
        key: Weights with a smaller key are pruned, those with a larger one kept.
        kept_ties: How many of those with this key are kept, the first ones.
    """

    dtype: np.dtype
    key: int
    kept_ties: int


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """A dtype that holds every value of the given floating ones and has sixteen bits or more."""
    found = set(dtypes)
    if len(found) == 1 and (only := found.pop()).itemsize >= 2:
        return only
    return np.dtype(np.float64 if np.dtype(np.float64) in found else np.float32)


def find_cut(read: Read, dtype: np.dtype, num_pruned: int) -> Cut:
    """Find the cut that prunes a given number of weights; `read` gives the pool's tensors in order, for each pass."""
    if num_pruned == 0:
        return Cut(dtype, -1, 0)
    prefix, rank, ties = 0, num_pruned, 0
    for shift in range(8 * dtype.itemsize - 16, -1, -16):
        histogram = np.zeros(_BINS, np.int64)
        for array in read():
            for keys in _keys(array, dtype):
                if shift + 16 < 8 * dtype.itemsize:
                    keys = keys[keys >> (shift + 16) == prefix]
                digits = ((keys >> shift) & (_BINS - 1)).astype(np.int64)
                histogram += np.bincount(digits, minlength=_BINS)
        before = np.cumsum(histogram)
        digit = int(np.searchsorted(before, rank))
        ties = int(histogram[digit])
        rank -= int(before[digit]) - ties
        prefix = prefix << 16 | digit
    return Cut(dtype, prefix, ties - rank)


def apply_cut(array: np.ndarray, cut: Cut) -> tuple[np.ndarray, Cut]:
    """Say which weights of a pool's next tensor are kept (True), and the cut for the one after it."""
    mask = np.empty(array.size, np.bool_)
    position, left = 0, cut.kept_ties
    for keys in _keys(array, cut.dtype):
        piece = mask[position : position + keys.size]
        if cut.key < 0:
            piece[:] = True
        else:
            np.greater(keys, keys.dtype.type(cut.key), out=piece)
        if left:
            ties = np.flatnonzero(keys == cut.key)[:left]
            piece[ties] = True
            left -= ties.size
        position += keys.size
    return mask.reshape(array.shape), cut._replace(kept_ties=left)


def largest_in_groups(array: np.ndarray, axis: int, group: int, num_pruned: int) -> np.ndarray:
    """Rank within groups of neighbours along an axis, by comparing all pairs; the mask, True = kept."""
    dtype = common_dtype([array.dtype])
    keys = np.concatenate([*_keys(np.ascontiguousarray(array), dtype)] or [array]).reshape(
        *array.shape[:axis], -1, group, *array.shape[axis + 1 :]
    )
    keys = np.moveaxis(keys, axis + 1, 0)
    mask = np.empty(keys.shape, np.bool_)
    for i in range(group):
        ahead = np.zeros(keys.shape[1:], np.uint8 if group < 256 else np.int64)
        for j in range(group):
            if j != i:
                ahead += keys[j] >= keys[i] if j < i else keys[j] > keys[i]
        np.less(ahead, group - num_pruned, out=mask[i])
    return np.moveaxis(mask, 0, axis + 1).reshape(array.shape)


def _keys(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(dtype, copy=False)
        yield piece.view(unsigned) & unsigned.type(2 ** (8 * dtype.itemsize - 1) - 1)
