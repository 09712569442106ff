"""``prunax prune``: one tensor in memory at a time, wherever the allocation can do with that."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prunax import _masks as mask_trees
from prunax import _selection, patterns
from prunax.cli import _ranking
from prunax.cli._options import UsageError
from prunax.export import _encoding
from prunax.export._checkpoints import Checkpoint, Tensor, in_order

__all__ = ["Masks", "Request"]

_PIECE = 1 << 20  # elements looked at at once
_SLAB = 1 << 20  # elements ranked at once, where the pattern allows it
_PAIRWISE = 16  # groups up to this length are ranked without compiling anything


class Request(NamedTuple):
    """What to do.

    Attributes:
        chosen: The tensors to prune.
        pattern: The pattern.
        sparsity: Fraction to remove, or None where the pattern says it.
        allocation: How the sparsity is shared out.
    """

    chosen: Sequence[Tensor]
    pattern: patterns.Pattern
    sparsity: float | None
    allocation: Any


class Masks:
    """Masks of tensors, made when they are asked for, in the order of `in_order`.

    Only patterns and allocations that look at many tensors at once (blocks or LAMP scores ranked globally) hold them in
    memory: others are ranked within one tensor, or by reading the file more than once.
    """

    def __init__(self, source: Checkpoint, request: Request) -> None:
        # Ties go to those asked for first: whatever file they are in.
        wanted = {t.name for t in request.chosen}
        chosen = [source.tensors[name] for name in in_order(source) if name in wanted]
        request = request._replace(chosen=chosen)
        shapes = [(t.name, t.shape) for t in chosen]
        self._places = {t.name: i for i, t in enumerate(chosen)}
        patterns.check_fit("prune", request.pattern, shapes)
        self._source, self._request = source, request
        self._plan = mask_trees.plan(
            shapes, request.sparsity, allocation=request.allocation, pattern=request.pattern
        )
        self._pool_of = {i: p for p, pool in enumerate(self._plan.pools) for i in pool}
        self._cuts: dict[int, _ranking.Cut] = {}
        self._packed: dict[int, np.ndarray] = {}
        self.kept = 0

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def apply(self, name: str) -> np.ndarray:
        """Read a chosen tensor and set to zero what is pruned."""
        index = self._places[name]
        array = self._read(index)
        pool = self._pool_of.get(index)
        mask = np.ones(array.shape, np.bool_) if pool is None else self._mask(index, pool, array)
        self.kept += int(np.count_nonzero(mask))
        # As integers: whatever a pruned number was, all its bits become zero.
        bits = array.reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))
        np.logical_not(mask, out=mask)
        np.copyto(bits, 0, where=mask.reshape(-1))
        return array

    def _read(self, index: int) -> np.ndarray:
        name = self._request.chosen[index].name
        array = self._source.read(name)
        flat = array.reshape(-1)
        if any(np.isnan(flat[i : i + _PIECE]).any() for i in range(0, flat.size, _PIECE)):
            raise UsageError(
                f"{name!r} contains NaN, which cannot be ranked. Leave it out with --exclude, or mend the file."
            )
        return array

    def _mask(self, index: int, pool: int, array: np.ndarray) -> np.ndarray:
        members = self._plan.pools[pool]
        if self._request.pattern == patterns.Unstructured() and self._plan.rescale is None:
            if pool not in self._cuts:
                self._cuts[pool] = self._cut(pool, array)
            mask, self._cuts[pool] = _ranking.apply_cut(array, self._cuts[pool])
            return mask
        if self._request.pattern.compare_axis is not None:
            return self._mask_in_slabs(pool, array)
        if index not in self._packed:
            arrays = [array if i == index else self._read(i) for i in members]
            for i, mask in zip(members, self._select(pool, arrays), strict=True):
                self._packed[i] = _encoding.pack_bits(mask)
        return _encoding.unpack_bits(self._packed.pop(index), array.shape)

    def _cut(self, pool: int, array: np.ndarray) -> _ranking.Cut:
        members = self._plan.pools[pool]
        dtype = _ranking.common_dtype(self._request.chosen[i].dtype for i in members)
        read = (lambda: [array]) if len(members) == 1 else (lambda: map(self._read, members))
        return _ranking.find_cut(read, dtype, self._plan.budgets[pool])

    def _mask_in_slabs(self, pool: int, array: np.ndarray) -> np.ndarray:
        """Contests within slices do not meet, so that a slab of slices is ranked at a time."""
        pattern: Any = self._request.pattern
        inputs = pattern.axis % array.ndim
        axis = max((a for a in range(array.ndim) if a != inputs), key=lambda a: array.shape[a])
        length = max(1, _SLAB * array.shape[axis] // max(array.size, 1))
        mask = np.empty(array.shape, np.bool_)
        for start in range(0, array.shape[axis], length):
            slab = tuple(
                slice(start, start + length) if a == axis else slice(None)
                for a in range(array.ndim)
            )
            if isinstance(pattern, patterns.NM) and pattern.m <= _PAIRWISE:
                budget = self._plan.budgets[pool]
                mask[slab] = _ranking.largest_in_groups(array[slab], inputs, pattern.m, budget)
            else:
                (mask[slab],) = self._select(pool, [array[slab]])
        return mask

    def _select(self, pool: int, arrays: list[np.ndarray]) -> list[np.ndarray]:
        members = tuple(range(len(arrays)))
        wide = any(array.dtype == np.float64 for array in arrays)
        with _float64() if wide else contextlib.nullcontext():
            kept = mask_trees.select_masks(
                [Partial(_selection.absolute, jnp.asarray(array)) for array in arrays],
                [self._plan.budgets[pool]],
                pattern=self._request.pattern,
                structure=((members,), self._plan.rescale),
            )
            return [np.array(mask) for mask in kept]


def _float64() -> contextlib.AbstractContextManager[Any]:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    # Where JAX 0.7 has it.
    from jax.experimental import enable_x64  # pyright: ignore[reportAttributeAccessIssue]

    return enable_x64(True)
