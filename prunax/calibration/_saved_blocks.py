"""Finished blocks of a refinement, a file each, so that a run that was killed goes on."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _atomic, trees

__all__: list[str] = []

PyTree = Any


class RefinedBlock(NamedTuple):
    """What became of a block.

    Attributes:
        name: Its path, or the glob that names it.
        before: Mean loss over the batches with the weights that it came with.
        after: And in the end; never more.
        skipped: How many steps were left out, since the loss, a gradient or a new weight was not finite.
    """

    name: str
    before: float
    after: float
    skipped: int


class Saved:
    """Finished blocks, a file each in a folder."""

    def __init__(self, folder: Any, inputs: PyTree, settings: Any) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        digest = zlib.crc32(repr(settings).encode())
        for x in jax.tree.leaves(inputs):
            if trees.is_array(x):
                digest = zlib.crc32(np.asarray(x).tobytes(), digest)
        self.digest = digest
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, k: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{k:05d}.npz"

    def read(
        self, k: int, like: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], RefinedBlock] | None:
        if self.folder is None or not self.file(k).exists():
            return None
        with np.load(self.file(k), allow_pickle=False) as held:
            if int(held["digest"]) != self.digest:
                raise ValueError(
                    f"refine: {self.file(k)} is of another run: other params, masks, batches or settings. Pass those "
                    f"that it began with, or another checkpoint folder."
                )
            new = [
                jnp.asarray(held[f"{n}"].view(x.dtype).reshape(x.shape)) for n, x in enumerate(like)
            ]
            before, after = held["losses"].tolist()
            return new, RefinedBlock(str(held["name"]), before, after, int(held["skipped"]))

    def write(self, k: int, new: Sequence[jax.Array], result: RefinedBlock) -> None:
        if self.folder is None:
            return
        arrays: dict[str, Any] = {
            f"{n}": np.asarray(x).reshape(-1).view(np.uint8) for n, x in enumerate(new)
        }
        arrays |= {
            "name": result.name,
            "losses": [result.before, result.after],
            "skipped": result.skipped,
            "digest": self.digest,
        }
        place = _atomic.Place(self.file(k), overwrite=True)
        try:
            with _atomic.naming(place.path), open(place.temporary, "wb") as file:
                np.savez(file, **arrays)
            place.publish()
        finally:
            place.discard()
