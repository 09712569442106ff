"""Sparse weights that multiply faster than dense ones: blocks, and a fixed number of inputs for each output.

A packed weight is a pytree that stands where the matrix stood: ``x @ packed``. It can be jitted over, differentiated,
sharded by replication and trained, its positions staying as they are. Which form pays, and from which sparsity on,
depends on shapes and on the machine: `fastest` measures it, and falls back to the dense product.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunax import patterns, trees

__all__ = ["BlockSparse", "Dense", "GatherSparse", "pack"]

Array = jax.Array

# From this batch size on, a CPU multiplies one block column after another faster than all of them in one batched
# product (measured at 4096 x 4096 with 64 x 64 blocks; between 64 and 128 they are equal).
_SCAN_BATCH = 96
# Inputs added in one step from this batch size on: the totals are then read and written less often. For small batches
# the fused loop is slower (4096 x 4096 at 90%: 3.3 ms for 1.6 ms at batch 1, 4.6 ms for 5.6 ms at 16, 7 for 11 at 128).
_UNROLL, _UNROLL_BATCH = 4, 16
_MAX_GROUPS = 4
_GROUP_COST = 8  # what one more group costs, in blocks


class _Packed:
    """What the forms share: ``x @ packed`` for JAX and NumPy arrays with any number of leading axes."""

    shape: tuple[int, int]
    __array_ufunc__ = None  # so that NumPy leaves `x @ packed` to us

    @property
    def dtype(self) -> Any:
        raise NotImplementedError

    def _product(self, x: Array) -> Array:
        raise NotImplementedError

    def matmul(self, x: Any) -> Array:
        """Multiply.

        Args:
            x: Array of shape ``(..., in)``.

        Returns:
            ``x @ w``, of shape ``(..., out)`` and of the dtype of that product. Weights that are not stored take no
            part: nothing comes of an infinity or NaN in x that meets them.

        Raises:
            ValueError: If the last axis of x is not as long as the first of the matrix.
        """
        x = jnp.asarray(x)
        if not x.ndim or x.shape[-1] != self.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: x has the shape {x.shape}, and its last axis must have length {self.shape[0]}."
            )
        dtype = jnp.result_type(x, self.dtype)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(dtype)
        return self._product(rows).astype(dtype).reshape(*x.shape[:-1], self.shape[1])

    def __rmatmul__(self, x: Any) -> Array:
        return self.matmul(x)

    __call__ = matmul


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=[])
@dataclass(frozen=True)
class Dense(_Packed):
    """A dense matrix with the interface of packed ones, for where nothing is faster.

    Attributes:
        w: The masked matrix, ``(in, out)``.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> (jnp.ones((1, 2)) @ prunax.export.Dense(jnp.eye(2))).tolist()
        [[1.0, 1.0]]
    """

    w: Array

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        inputs, outputs = self.w.shape
        return inputs, outputs

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    def todense(self) -> Array:
        """The matrix."""
        return self.w

    def _product(self, x: Array) -> Array:
        return x @ self.w.astype(x.dtype)


class BlockColumns(NamedTuple):
    """Block columns with the same number of stored blocks.

    Attributes:
        columns: Which block columns they are, ``(c,)`` int32.
        rows: For each of them the block rows of its blocks, ``(c, n)`` int32. One behind the last stands for no block.
        blocks: The blocks, ``(c, n, height, width)``.
    """

    columns: Array
    rows: Array
    blocks: Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["shape", "padded"]
)
@dataclass(frozen=True)
class BlockSparse(_Packed):
    """A matrix of which only some blocks are stored. Made by `pack`.

    Block columns are grouped by how many blocks they have, so that an uneven pattern wastes little.

    Attributes:
        groups: `BlockColumns`, four at most. Block columns without blocks are in none of them.
        shape: ``(in, out)``.
        padded: Whether some columns of a group have fewer blocks than the others.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> w = jnp.arange(1.0, 17.0).reshape(4, 4)
        >>> mask = jnp.kron(jnp.eye(2), jnp.ones((2, 2))) > 0
        >>> packed = prunax.export.pack(w, mask, prunax.patterns.Block((2, 2)))
        >>> packed.groups[0].blocks.shape, (jnp.ones((1, 4)) @ packed).tolist()
        ((2, 1, 2, 2), [[6.0, 8.0, 26.0, 28.0]])

    References:
        Gray et al., GPU Kernels for Block-Sparse Weights, 2017.
    """

    groups: tuple[BlockColumns, ...]
    shape: tuple[int, int]
    padded: bool

    @property
    def dtype(self) -> Any:
        return self.groups[0].blocks.dtype if self.groups else jnp.dtype(jnp.float32)

    def todense(self) -> Array:
        """The masked matrix, ``(in, out)``."""
        # Put together and not multiplied out: a product rounds in TF32 or bfloat16, and spreads infinities.
        inputs, outputs = self.shape
        if not self.groups:
            return jnp.zeros(self.shape, self.dtype)
        height, width = self.groups[0].blocks.shape[2:]
        rows, columns = -(-inputs // height), -(-outputs // width)
        tiles = jnp.zeros((rows + 1, columns, height, width), self.dtype)
        for g in self.groups:
            tiles = tiles.at[g.rows, g.columns[:, None]].set(g.blocks)
        dense = tiles[:rows].swapaxes(1, 2).reshape(rows * height, columns * width)
        return dense[:inputs, :outputs]

    def _product(self, x: Array) -> Array:
        scan = x.shape[0] >= _SCAN_BATCH and jax.default_backend() == "cpu"
        return assemble(self, x, _scanned if scan else _batched)


def assemble(
    packed: BlockSparse, x: Array, product: Callable[[Array, Array, Array], Array]
) -> Array:
    """Multiply group by group and put the block columns where they belong.

    Args:
        packed: The weights.
        x: Inputs ``(batch, in)``.
        product: ``product(x, rows, blocks)`` multiplies one group: x with its inputs filled up to whole blocks (and one
            block of zeros more where `packed.padded`), rows and blocks as in `BlockColumns`. Returns
            ``(columns, batch, width)``.

    Returns:
        The outputs ``(batch, out)``.
    """
    batch, (inputs, outputs) = x.shape[0], packed.shape
    if not packed.groups:
        return jnp.zeros((batch, outputs), x.dtype)
    height, width = packed.groups[0].blocks.shape[2:]
    rows, columns = -(-inputs // height), -(-outputs // width)
    # A zero block behind the last, for columns that have fewer than their group: a stored block of zeros would not do,
    # since it would make NaN of an infinity in x.
    missing = (rows + packed.padded) * height - inputs
    x = jnp.pad(x, ((0, 0), (0, missing))) if missing else x
    parts = [product(x, g.rows, g.blocks.astype(x.dtype)) for g in packed.groups]
    y = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    stored = jnp.concatenate([g.columns for g in packed.groups])
    if len(packed.groups) > 1 or stored.size < columns:
        y = jnp.zeros((columns, *y.shape[1:]), y.dtype).at[stored].set(y, unique_indices=True)
    return y.transpose(1, 0, 2).reshape(batch, columns * width)[:, :outputs]


def _batched(x: Array, rows: Array, blocks: Array) -> Array:
    """All block columns in one batched product."""
    columns, n, height, width = blocks.shape
    tiles = x.reshape(x.shape[0], x.shape[1] // height, height)
    met = tiles.at[:, rows.reshape(-1)].get(mode="promise_in_bounds")
    met = met.reshape(x.shape[0], columns, n * height)
    weights = blocks.reshape(columns, n * height, width)
    return lax.dot_general(met, weights, (((2,), (1,)), ((1,), (0,))))


def _scanned(x: Array, rows: Array, blocks: Array) -> Array:
    """One block column after another. With inputs in rows, tiles are copied whole."""
    _, n, height, width = blocks.shape
    tiles = x.T.reshape(x.shape[1] // height, height, x.shape[0])

    def column(_: None, one: tuple[Array, Array]) -> tuple[None, Array]:
        rows, weights = one
        met = tiles.at[rows].get(mode="promise_in_bounds").reshape(n * height, x.shape[0])
        weights = weights.reshape(n * height, width)
        return None, lax.dot_general(weights, met, (((0,), (0,)), ((), ())))

    return lax.scan(column, None, (rows, blocks))[1].transpose(0, 2, 1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "values"],
    meta_fields=["shape", "padded"],
)
@dataclass(frozen=True)
class GatherSparse(_Packed):
    """A matrix stored as the inputs of each output, the same number for all. Made by `pack`.

    What `patterns.ConstantFanIn` and `patterns.NM` leave; other masks fit too, each output filled up to the largest
    number of inputs.

    Attributes:
        rows: Which inputs each output has, ``(n, out)`` int32, ascending. One behind the last stands for none.
        values: Their weights, ``(n, out)``.
        shape: ``(in, out)``.
        padded: Whether some outputs have fewer inputs than n.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> w, mask = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True, False], [False, True]])
        >>> packed = prunax.export.pack(w, mask, prunax.patterns.ConstantFanIn())
        >>> packed.rows.tolist(), packed.values.tolist()
        ([[0, 1]], [[1.0, 4.0]])

    References:
        Lasby et al., Dynamic Sparse Training with Structured Sparsity (SRigL), 2024, arXiv:2305.02299, section 4.3: the
        condensed representation.
    """

    rows: Array
    values: Array
    shape: tuple[int, int]
    padded: bool

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def todense(self) -> Array:
        """The masked matrix, ``(in, out)``."""
        columns = jnp.arange(self.shape[1])
        dense = jnp.zeros((self.shape[0] + 1, self.shape[1]), self.dtype)
        return dense.at[self.rows, columns[None]].set(self.values)[:-1]

    def _product(self, x: Array) -> Array:
        inputs = x.T
        if self.padded:  # an input that is zero, for outputs with fewer than the others
            inputs = jnp.pad(inputs, ((0, 1), (0, 0)))
        dtype = trees.wide_dtype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype

        def add(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
            rows, values = one
            met = inputs.at[rows].get(mode="promise_in_bounds")
            return total + met.astype(dtype) * values.astype(dtype)[:, None], None

        start = jnp.zeros((self.shape[1], x.shape[0]), dtype)
        unroll = _UNROLL if x.shape[0] >= _UNROLL_BATCH else 1
        return lax.scan(add, start, (self.rows, self.values), unroll=unroll)[0].T


Packed = Dense | BlockSparse | GatherSparse


def pack(
    w: Array, mask: Array, pattern: patterns.Pattern = patterns.Unstructured()
) -> BlockSparse | GatherSparse:
    """Pack a masked matrix into a form that multiplies without its pruned weights.

    Args:
        w: The matrix, ``(in, out)``: a Flax kernel. Transpose one that is stored as ``(out, in)``.
        mask: Bool array of its shape, True = kept. Its values must be known: pack outside jit.
        pattern: The pattern the mask was made with. `Block` gives a `BlockSparse` with the blocks of which any weight
            is kept, every other pattern a `GatherSparse` with as many inputs for each output as the one with most has.

    Returns:
        The packed weight. ``x @ packed`` equals ``x @ jnp.where(mask, w, 0)`` up to rounding, whatever the mask.

    Raises:
        ValueError: If w is no matrix, or the shapes differ.
        TypeError: If the mask is not boolean.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> w = jax.random.normal(jax.random.key(0), (256, 128))
        >>> pattern = prunax.patterns.Block((32, 32))
        >>> mask = prunax.compute_masks({"kernel": w}, 0.75, pattern=pattern)["kernel"]
        >>> packed = prunax.export.pack(w, mask, pattern)
        >>> x = jnp.ones((4, 256))
        >>> bool(jnp.allclose(x @ packed, x @ jnp.where(mask, w, 0), atol=1e-3))
        True
    """
    check_matrix("pack", w, mask)
    kept: np.ndarray = np.asarray(mask)
    weights = np.asarray(jnp.where(mask, w, jnp.zeros((), w.dtype)))
    if isinstance(pattern, patterns.Block):
        return _pack_blocks(kept, weights, pattern.shape)
    return _pack_inputs(kept, weights)


def check_matrix(function: str, w: Any, mask: Any) -> None:
    if np.ndim(w) != 2 or np.shape(mask) != np.shape(w):
        raise ValueError(
            f"{function}: needs a matrix (in, out) and a mask of its shape, got {np.shape(w)} and {np.shape(mask)}. "
            f"Pack the layers of a stacked kernel one by one; reshape a convolution's to (window * in, out)."
        )
    if getattr(mask, "dtype", None) != np.bool_:
        raise TypeError(
            f"{function}: the mask must be bool, got {getattr(mask, 'dtype', type(mask))}."
        )


def _pack_blocks(kept: np.ndarray, weights: np.ndarray, block: tuple[int, int]) -> BlockSparse:
    (height, width), (inputs, outputs) = block, kept.shape
    margins = ((0, -inputs % height), (0, -outputs % width))
    tiles = np.pad(weights, margins).reshape(
        -(-inputs // height), height, -(-outputs // width), width
    )
    # Of the shape (block rows, block columns).
    stored = np.count_nonzero(np.pad(kept, margins).reshape(tiles.shape), axis=(1, 3)) > 0
    counts: np.ndarray = np.count_nonzero(stored, axis=0)
    groups, padded = [], False
    for columns in _similar(counts):
        n = int(counts[columns].max())
        # A stable sort puts the rows of stored blocks first, in order.
        rows = np.argsort(~stored[:, columns], axis=0, kind="stable")[:n].T
        empty: np.ndarray = np.arange(n)[None, :] >= counts[columns][:, None]
        blocks = tiles[rows, :, columns[:, None]]
        blocks[empty] = 0
        padded |= bool(empty.any())
        rows = np.where(empty, tiles.shape[0], rows)
        groups.append(
            BlockColumns(
                jnp.asarray(columns, jnp.int32), jnp.asarray(rows, jnp.int32), jnp.asarray(blocks)
            )
        )
    return BlockSparse(tuple(groups), (inputs, outputs), padded)


def _similar(counts: np.ndarray) -> list[np.ndarray]:
    """Group columns by their numbers of blocks so that filling each group up to its largest number costs least."""
    sizes, columns = np.unique(counts[counts > 0], return_counts=True)
    # best[g][j]: the least number of blocks with which the first j sizes fit into g groups, and where the last begins.
    best = [[(0, 0)] + [(np.inf, 0)] * len(sizes)]
    for _ in range(min(_MAX_GROUPS, len(sizes))):
        last = best[-1]
        row = [(np.inf, 0)]
        for j in range(1, len(sizes) + 1):
            costs = [last[i][0] + int(sizes[j - 1]) * int(columns[i:j].sum()) for i in range(j)]
            i = int(np.argmin(costs))
            row.append((costs[i], i))
        best.append(row)
    end, groups = len(sizes), []
    number = min(range(len(best)), key=lambda g: best[g][end][0] + g * _GROUP_COST)
    for g in range(number, 0, -1):
        begin = best[g][end][1]
        members = np.isin(counts, sizes[begin:end])
        groups.append(np.flatnonzero(members))
        end = begin
    return groups


def _pack_inputs(kept: np.ndarray, weights: np.ndarray) -> GatherSparse:
    counts: np.ndarray = np.count_nonzero(kept, axis=0)
    n = int(counts.max(initial=0))
    rows = np.argsort(~kept, axis=0, kind="stable")[:n]
    empty: np.ndarray = np.arange(n)[:, None] >= counts[None, :]
    values = np.take_along_axis(weights, rows, axis=0)
    values[empty] = 0
    return GatherSparse(
        jnp.asarray(np.where(empty, kept.shape[0], rows), jnp.int32),
        jnp.asarray(values),
        kept.shape,
        bool(empty.any()),
    )
