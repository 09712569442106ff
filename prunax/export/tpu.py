"""A TPU kernel for block-sparse weights, in Pallas.

It fetches the blocks that are stored and the inputs they meet, no others. Not measured on a TPU so far, so
`BlockSparse.matmul` does not use it. Tested in the interpreter, and by lowering for TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from prunax.export.packed import BlockSparse, assemble

__all__ = ["block_matmul"]


def block_matmul(
    packed: BlockSparse, x: jax.Array, *, tile: int = 128, interpret: bool = False
) -> jax.Array:
    """Multiply by block-sparse weights with a TPU kernel.

    Args:
        packed: The weights, from `prunax.export.pack` with a `patterns.Block`, such as ``Block((128, 128))``.
        x: Inputs ``(batch, in)``, float32 or bfloat16. Sums are float32.
        tile: Rows of x in one step of the kernel.
        interpret: Run in Pallas's interpreter, on any backend.

    Returns:
        ``x @ packed``, ``(batch, out)``, in the dtype of x. Not differentiable: `BlockSparse.matmul` is.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> from prunax.export import tpu
        >>> mask = jnp.kron(jnp.eye(2), jnp.ones((8, 8))) > 0
        >>> packed = prunax.export.pack(jnp.ones((16, 16)), mask, prunax.patterns.Block((8, 8)))
        >>> tpu.block_matmul(packed, jnp.ones((4, 16)), tile=8, interpret=True)[0, 0]
        Array(8., dtype=float32)
    """
    batch = x.shape[0]
    x = jnp.pad(x, ((0, -batch % tile), (0, 0)))
    product = functools.partial(_product, tile=tile, interpret=interpret)
    return assemble(packed, x, product)[:batch]


def _product(
    x: jax.Array, rows: jax.Array, blocks: jax.Array, *, tile: int, interpret: bool
) -> jax.Array:
    # Imported here, since few programs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    columns, n, height, width = blocks.shape

    def kernel(_: Any, x: Any, block: Any, y: Any, total: Any) -> None:
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += jnp.dot(x[...], block[0, 0], preferred_element_type=jnp.float32)

        @pl.when(step == n - 1)
        def _() -> None:
            y[0] = total[...].astype(y.dtype)

    # The rows are in scalar memory before a step begins, and say which tile of x to fetch for it.
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(x.shape[0] // tile, columns, n),
        in_specs=[
            pl.BlockSpec((tile, height), lambda b, c, j, rows: (b, rows[c, j])),
            pl.BlockSpec((1, 1, height, width), lambda b, c, j, rows: (c, j, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, tile, width), lambda b, c, j, rows: (c, b, 0)),
        scratch_shapes=[pltpu.VMEM((tile, width), jnp.float32)],
    )
    shape = jax.ShapeDtypeStruct((columns, x.shape[0], width), x.dtype)
    call = pl.pallas_call(kernel, grid_spec=grid, out_shape=shape, interpret=interpret)
    return call(rows, x, blocks)
