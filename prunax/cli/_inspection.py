"""``prunax inspect``, ``report`` and ``diff``: numbers of one or two checkpoints, gathered tensor by tensor."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from prunax.export import _encoding
from prunax.export._checkpoints import Checkpoint, Tensor

__all__ = ["Difference", "Inspected"]

_GROUPS = (2, 4, 8, 16)


class Inspected(NamedTuple):
    """What a look at a tensor gave.

    Attributes:
        tensor: Its name, shape and dtype.
        zeros: Number of its elements that are zero; None where the dtype cannot be read.
        nm: The N:M patterns that it follows with at most half of the weights kept: ``2:4 axis 1``.
        compressed: Bytes it takes compressed.
    """

    tensor: Tensor
    zeros: int | None
    nm: tuple[str, ...]
    compressed: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return (self.zeros or 0) / self.tensor.size if self.tensor.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "name": self.tensor.name,
            "shape": list(self.tensor.shape),
            "dtype": self.tensor.dtype_name,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "nm": list(self.nm),
        }


class Difference(NamedTuple):
    """How a tensor differs between two files.

    Attributes:
        name: Its name.
        what: ``same``, ``only in the first``, ``only in the second``, ``shape``, ``dtype`` or ``values``.
        changed: Number of elements whose bits differ.
        largest: Largest absolute difference; NaN where values cannot be subtracted.
        sparsities: Fraction of zeros in the first and in the second.
        overlap: Elements nonzero in both, over those nonzero in either.
        revived: Number of elements that are zero in the first only.
        pruned: Number of elements that are zero in the second only.
    """

    name: str
    what: str
    changed: int = 0
    largest: float = 0.0
    sparsities: tuple[float, float] = (0.0, 0.0)
    overlap: float = 1.0
    revived: int = 0
    pruned: int = 0


def look(source: Checkpoint, step: Callable[[str], None]) -> Iterator[Inspected]:
    """Look at every tensor."""
    for tensor in source.tensors.values():
        step(tensor.name)
        if tensor.dtype_name not in _encoding.DTYPES:
            yield Inspected(tensor, None, (), 0)
            continue
        array = source.read(tensor.name)
        where = zero(array)
        zeros = int(np.count_nonzero(where))
        nm: tuple[str, ...] = ()
        if zeros and tensor.ndim >= 2 and "float" in tensor.dtype.name:
            nm = tuple(_groupings(np.logical_not(where, out=where)))
        size = _encoding.encoded_size(array)
        yield Inspected(tensor, zeros, nm, min(size, array.nbytes))


def follows(array: np.ndarray, pattern: Any, name: str) -> str | None:
    """Say how a tensor's zeros break a pattern, or None."""
    from prunax.export._verify import verify_pattern

    try:
        verify_pattern({name: np.logical_not(zero(array))}, pattern)
    except ValueError as error:
        return str(error).removeprefix("verify_pattern: ").split(" Make masks with")[0]
    return None


def compare(
    first: Checkpoint, second: Checkpoint, step: Callable[[str], None]
) -> Iterator[Difference]:
    """Compare two checkpoints tensor by tensor, matched by name or, across layouts, by path."""
    ours, theirs = _by_path(first), _by_path(second)
    for path in [*ours, *(path for path in theirs if path not in ours)]:
        a, b = ours.get(path), theirs.get(path)
        name = (a or b or Tensor("", "", (), "")).name
        step(name)
        if b is None:
            yield Difference(name, "only in the first")
        elif a is None:
            yield Difference(name, "only in the second")
        elif a.shape != b.shape:
            yield Difference(name, "shape")
        elif a.dtype_name != b.dtype_name:
            yield Difference(name, "dtype")
        else:
            yield _difference(name, first.read(a.name), second.read(b.name))


def _by_path(source: Checkpoint) -> dict[str, Tensor]:
    """Tensors by path, or by name where two have one path."""
    found = {t.path: t for t in source.tensors.values()}
    return found if len(found) == len(source.tensors) else dict(source.tensors)


def _difference(name: str, a: np.ndarray, b: np.ndarray) -> Difference:
    itemsize = a.dtype.itemsize
    bits_a, bits_b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    differs = (bits_a != bits_b).reshape(-1, itemsize).any(axis=1)
    changed = int(np.count_nonzero(differs))
    zero_a, zero_b = zero(a).reshape(-1), zero(b).reshape(-1)
    only_a, only_b = int(np.sum(zero_a & ~zero_b)), int(np.sum(zero_b & ~zero_a))
    both = int(np.sum(~zero_a & ~zero_b))
    either = both + only_a + only_b
    largest = 0.0
    if changed:
        with np.errstate(all="ignore"):
            x, y = (np.real(v.reshape(-1)[differs]).astype(np.float64) for v in (a, b))
            largest = float(np.max(np.abs(x - y)))
    return Difference(
        name,
        "values" if changed else "same",
        changed,
        largest,
        (float(np.mean(zero_a)), float(np.mean(zero_b))) if a.size else (0.0, 0.0),
        both / either if either else 1.0,
        only_a,
        only_b,
    )


def zero(array: np.ndarray) -> np.ndarray:
    """Where the value is zero, -0.0 included."""
    if array.dtype.kind in "fiubc":
        return array == 0
    # The narrow dtypes of ml_dtypes: exact in float32, and compared there in pieces.
    flat = array.reshape(-1)
    zero = np.empty(flat.shape, np.bool_)
    for start in range(0, flat.size, 1 << 20):
        zero[start : start + (1 << 20)] = flat[start : start + (1 << 20)].astype(np.float32) == 0
    return zero.reshape(array.shape)


def _groupings(kept: np.ndarray) -> Iterator[str]:
    """The N:M patterns with the fewest weights that hold along each axis which may be that of the inputs."""
    for axis in sorted({kept.ndim - 1, kept.ndim - 2, 1}):
        best = (0.5, 0, 0)
        for m in _GROUPS:
            if kept.shape[axis] % m or not kept.shape[axis]:
                continue
            n = _most_kept(kept, axis, m)
            if n and (n / m < best[0] or (n / m == best[0] and not best[2])):
                best = (n / m, n, m)
        if best[2]:
            yield f"{best[1]}:{best[2]} axis {axis}"


def _most_kept(kept: np.ndarray, axis: int, m: int) -> int:
    shape = (*kept.shape[:axis], kept.shape[axis] // m, m, *kept.shape[axis + 1 :])
    return int(kept.reshape(shape).sum(axis=axis + 1, dtype=np.uint8).max(initial=0))


def total_bytes(inspected: Sequence[Inspected]) -> int:
    """Bytes of all tensors, uncompressed."""
    return sum(math.prod(x.tensor.shape) * x.tensor.dtype.itemsize for x in inspected)
