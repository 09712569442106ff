"""Take pruned models away: files, sparse formats that run, and a check that a pattern holds.

===========================================  =========================================================================
`save_masks`, `load_masks`                   masks in a safetensors file, one bit a weight
`save_params`, `load_params`                 params in one, pruned weights compressed away, bit for bit
`open_checkpoint`, `save_checkpoint`         models of any size as people have them: files, folders of shards, Orbax
`shrink_checkpoint`                          the checkpoint of a smaller network, tensor by tensor
`pack`, `fastest`                            weights that multiply faster than dense ones, where that is measured
`to_bcoo`                                    `jax.experimental.sparse.BCOO` leaves
`verify_pattern`                             do the masks follow N:M, blocks, a constant fan-in?
===========================================  =========================================================================

Files of masks and params are whole or not there, carry a checksum, and are checked when read: no text in them names a
class or runs. For a training run that goes on later, use Orbax: everything that pruning keeps lives in the optax state,
an ordinary pytree of arrays, packed masks and counters included::

    import orbax.checkpoint as ocp

    tx = prunax.prune(optax.adamw(1e-3), schedule)
    saved = {"params": params, "opt_state": tx.init(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "step_100", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "step_100", jax.eval_shape(lambda: saved))

Training goes on from `restored` as if it had not stopped, bit for bit.
"""

from typing import TYPE_CHECKING

from prunax import _modules

if TYPE_CHECKING:
    from prunax.export._bcoo import to_bcoo
    from prunax.export._checkpoints import Checkpoint, Tensor, open_checkpoint
    from prunax.export._container import FormatError
    from prunax.export._files import load_masks, load_params, read_metadata, save_masks, save_params
    from prunax.export._packed import BlockSparse, Dense, GatherSparse, pack
    from prunax.export._saving import save_checkpoint, shrink_checkpoint
    from prunax.export._timing import fastest, matmul_seconds
    from prunax.export._verify import PatternReport, verify_pattern

__all__ = [
    "BlockSparse",
    "Checkpoint",
    "Dense",
    "FormatError",
    "GatherSparse",
    "PatternReport",
    "Tensor",
    "fastest",
    "load_masks",
    "load_params",
    "matmul_seconds",
    "open_checkpoint",
    "pack",
    "read_metadata",
    "save_checkpoint",
    "save_masks",
    "save_params",
    "shrink_checkpoint",
    "to_bcoo",
    "verify_pattern",
]

__getattr__ = _modules.lazy(
    __name__,
    __all__,
    {
        "_bcoo": "to_bcoo",
        "_checkpoints": "Checkpoint Tensor open_checkpoint",
        "_container": "FormatError",
        "_files": "load_masks load_params read_metadata save_masks save_params",
        "_packed": "BlockSparse Dense GatherSparse pack",
        "_saving": "save_checkpoint shrink_checkpoint",
        "_timing": "fastest matmul_seconds",
        "_verify": "PatternReport verify_pattern",
    },
)
