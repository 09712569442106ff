"""What the command line reads and writes: safetensors files, and Orbax checkpoint folders. One tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from prunax import trees
from prunax.export.encoding import DTYPES as DTYPES_BY_NAME
from prunax.export.store import ArrayReader, ArrayWriter

__all__ = ["Source", "Tensor", "UsageError"]


class UsageError(ValueError):
    """Something that the user asked for and cannot have. The message says what to do instead."""


class Tensor(NamedTuple):
    """What is known of a tensor before it is read.

    Attributes:
        name: Its name in the file: ``encoder.layer.0.attention.self.query.weight``.
        path: The name as prunax spells paths: ``encoder/layer/0/attention/self/query/weight``.
        shape: Shape.
        dtype_name: Name of the dtype.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> np.dtype:
        """The dtype; void for one that NumPy has not."""
        return DTYPES_BY_NAME.get(self.dtype_name, np.dtype("V1"))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


class Source(Protocol):
    """An open file or folder.

    Attributes:
        path: Where it is.
        tensors: Name -> `Tensor`, in the order of the file.
        metadata: Texts by name.
        nbytes: Its size on the disk.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    nbytes: int

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into memory of its own."""
        ...

    def write_to(self, writer: ArrayWriter, name: str) -> None:
        """Hand a tensor on as it is."""
        ...


class SafetensorsSource:
    """A safetensors file, compressed by prunax or plain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays = ArrayReader(path)
        self.metadata = self._arrays.metadata
        self.kind = self._arrays.kind
        self.nbytes = self._arrays.reader.nbytes
        self.tensors = {
            name: Tensor(name, name.replace(".", "/"), stored.shape, stored.dtype)
            for name, stored in self._arrays.leaves.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._arrays.read(name)

    def write_to(self, writer: ArrayWriter, name: str) -> None:
        readable = self.tensors[name].dtype_name in DTYPES_BY_NAME
        plain = self._arrays.leaves[name].encoding == "plain"
        if plain and (writer.kind is None or not readable):
            reader = self._arrays.reader
            writer.copy(name, reader.entries[name], reader.chunks(name))
        else:
            writer.add(name, self.read(name))

    def __enter__(self) -> "SafetensorsSource":
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.__exit__()


class OrbaxSource:
    """An Orbax checkpoint of one tree."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        ocp = import_orbax()
        self.path = path.resolve()
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.metadata(self.path).item_metadata
        except Exception as error:  # of many classes, whatever the folder is
            raise UsageError(f"{path} is no Orbax checkpoint that can be read: {error}") from None
        if found is None:
            raise UsageError(
                f"{path} holds no tree of arrays. Name the folder of one checkpoint item, such as 100/default."
            )
        described, self._treedef = jax.tree.flatten(found.tree)
        names = trees.paths(found.tree)
        self._index = {name: i for i, name in enumerate(names)}
        self._shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in described]
        # A Python number has no layout of its own in the checkpoint.
        self._numbers = [type(x).__name__ == "ScalarMetadata" for x in described]
        self.tensors = {
            name: Tensor(name, name, tuple(x.shape), np.dtype(x.dtype).name)
            for name, x in zip(names, described, strict=True)
        }
        self.nbytes = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    def read(self, name: str) -> np.ndarray:
        ocp = import_orbax()
        index = self._index[name]
        wanted = [
            self._shapes[i] if i == index else ocp.PLACEHOLDER for i in range(len(self._shapes))
        ]
        as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(wanted)
        args = ocp.args.PyTreeRestore(
            item=self._treedef.unflatten(wanted), restore_args=self._treedef.unflatten(as_numpy)
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(self.path, args=args)
        leaf = self._treedef.flatten_up_to(restored)[index]
        return np.array(leaf, dtype=self._shapes[index].dtype)

    def write_to(self, writer: ArrayWriter, name: str) -> None:
        writer.add(name, self.read(name))

    def rebuild(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """Make the checkpoint's tree of other arrays."""
        leaves = [
            arrays[name].item() if number else arrays[name]
            for name, number in zip(self._index, self._numbers, strict=True)
        ]
        return self._treedef.unflatten(leaves)

    def __enter__(self) -> "OrbaxSource":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_source(path: Path) -> SafetensorsSource | OrbaxSource:
    """Open a file or folder by what it is, not by what it is called."""
    return OrbaxSource(path) if path.is_dir() else SafetensorsSource(path)


def is_orbax(path: Path) -> bool:
    """Say whether a name is that of a checkpoint folder to be: one without an ending."""
    return path.is_dir() or not path.suffix


def save_orbax(path: Path, tree: Any, *, overwrite: bool) -> None:
    """Write a tree as an Orbax checkpoint."""
    ocp = import_orbax()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), tree, force=overwrite)


def import_orbax() -> Any:
    """Import Orbax, or say how to install it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise UsageError(
            "checkpoint folders need Orbax. Install it: pip install 'prunax[export]'."
        ) from None
    return ocp


def printable(text: str) -> str:
    """Spell a text from a file so that it can do nothing to a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
