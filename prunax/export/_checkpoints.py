"""Checkpoints as people have them: a safetensors file, a folder of the Hugging Face layout, or one of Orbax.

The three are read alike, tensor by tensor. A folder in the Hugging Face layout has ``model.safetensors``, or several
shards and ``model.safetensors.index.json``, which says in which of them each tensor is. Like the header of a file, an
index is a stranger's text: it is checked against the shards before any tensor is read, and names nothing outside its
folder.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prunax.export import _encoding
from prunax.export._container import MAX_HEADER, FormatError, parse_json
from prunax.export._store import ArrayReader, ArrayWriter, readable

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]

INDEX = ".safetensors.index.json"
WEIGHTS = ".safetensors"
# Files that hold weights in another format: they are told apart from those that belong to any checkpoint.
OTHERS = {
    suffix: kind
    for kind, suffixes in {
        "a PyTorch pickle": ".bin .pt .pth .ckpt",
        "a pickle": ".pkl .pickle",
        "a GGUF file": ".gguf .ggml",
        "an HDF5 file": ".h5",
        "a Keras archive": ".keras",
        "a Flax msgpack file": ".msgpack",
        "a NumPy file": ".npz .npy",
        "an ONNX file": ".onnx",
        "a TensorFlow Lite file": ".tflite",
        "an archive": ".zip .tar .gz",
    }.items()
    for suffix in suffixes.split()
}
_BEGINNINGS = {
    b"GGUF": ".gguf",
    b"PK\3\4": ".pt",
    b"\x80\2": ".pkl",
    b"\x80\4": ".pkl",
    b"\x89HDF": ".h5",
}
_MEND = {
    ".gguf": "Convert it with llama.cpp's or Transformers' tools",
    ".h5": "Load it with Keras and write the weights with prunax.export.save_params",
    ".keras": "Load it with Keras and write the weights with prunax.export.save_params",
}


class Tensor(NamedTuple):
    """What is known of a tensor before it is read.

    Attributes:
        name: Its name in the file: ``encoder.layer.0.attention.self.query.weight``.
        path: The name as prunax spells paths: ``encoder/layer/0/attention/self/query/weight``.
        shape: Shape.
        dtype_name: Name of the dtype: NumPy's, or the format's where NumPy has none (``F4``).
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> np.dtype:
        """The dtype; void for one that NumPy has not."""
        return _encoding.DTYPES.get(self.dtype_name, np.dtype("V1"))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


class Checkpoint:
    """An open checkpoint: see `open_checkpoint`. To be closed, as a context manager or with `close`.

    Attributes:
        path: The file or folder.
        layout: ``file``, ``folder`` (Hugging Face's) or ``orbax``.
        tensors: Name -> `Tensor`.
        metadata: Texts by name: the files' own, ``format`` mostly.
        tied: Name that is not stored -> the tensor that stands for it, where the checkpoint says so.
        shards: Name -> the file that holds it, within the folder.
        nbytes: Bytes of the weights on the disk.
        config: What ``config.json`` says, of a folder; else empty.

    Examples:
        >>> import os, tempfile, jax.numpy as jnp, prunax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "params.safetensors")
        ...     prunax.export.save_params(file, {"dense": {"kernel": jnp.ones((2, 3))}})
        ...     with prunax.export.open_checkpoint(file) as checkpoint:
        ...         print(checkpoint.layout, checkpoint.tensors["dense/kernel"].shape)
        file (2, 3)
    """

    layout = "file"
    kind: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self.shards: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        self.nbytes = 0

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: One of `tensors`.

        Returns:
            A NumPy array in memory of its own.

        Raises:
            FormatError: If the file is damaged, or its dtype is one that NumPy has not.
        """
        raise NotImplementedError

    def write_to(self, writer: Any, name: str) -> None:
        """Hand a tensor on as it is."""
        writer.add(name, self.read(name))

    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Safetensors(Checkpoint):
    """One safetensors file, compressed by prunax or plain, or several with an index."""

    def __init__(self, path: Path, files: dict[str, Path]) -> None:
        super().__init__(path)
        self._open = contextlib.ExitStack()
        self._readers: dict[str, ArrayReader] = {}
        with contextlib.ExitStack() as opened:
            for shard, file in files.items():
                reader = opened.enter_context(ArrayReader(file))
                if len(files) > 1 and reader.kind is not None:
                    raise FormatError(
                        f"{file} is compressed by prunax, which is never one of several shards."
                    )
                self.kind = reader.kind
                self.nbytes += reader.reader.nbytes
                self.metadata = dict(reader.metadata) | self.metadata
                for name, stored in reader.leaves.items():
                    if name in self.tensors:
                        raise FormatError(
                            f"{path}: {name!r} is in two shards, {self.shards[name]!r} and {shard!r}. "
                            f"Download or write the "
                            f"checkpoint again."
                        )
                    self.shards[name] = shard
                    self._readers[name] = reader
                    spelled = name.replace(".", "/")
                    self.tensors[name] = Tensor(name, spelled, stored.shape, stored.dtype)
            self._open = opened.pop_all()
        self.tied = {
            a: b for a, b in self.metadata.items() if b in self.tensors and a not in self.tensors
        }

    def read(self, name: str) -> np.ndarray:
        return self._readers[name].read(name)

    def write_to(self, writer: ArrayWriter, name: str) -> None:
        arrays = self._readers[name]
        readable_dtype = self.tensors[name].dtype_name in _encoding.DTYPES
        if arrays.leaves[name].encoding == "plain" and (writer.kind is None or not readable_dtype):
            writer.copy(name, arrays.reader.entries[name], arrays.reader.chunks(name))
        else:
            writer.add(name, self.read(name))

    def close(self) -> None:
        self._open.close()


class Folder(Safetensors):
    """A folder in the Hugging Face layout."""

    layout = "folder"

    def __init__(self, path: Path, weights: str) -> None:
        index: dict[str, Any] | None = None
        self.about: dict[str, Any] = {}
        if weights.endswith(INDEX):
            index = _read_index(path / weights)
            self.about = index.get("metadata", {})
            files = dict.fromkeys(index["weight_map"].values())
        else:
            files = {weights: None}
        self.stem = weights.removesuffix(INDEX).removesuffix(WEIGHTS)
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise FormatError(
                f"{path / weights} names the shard {missing[0]!r}, which is not there ({len(missing)} of "
                f"{len(files)} are "
                f"missing). Download the checkpoint again."
            )
        seen: dict[tuple[int, int], str] = {}
        for name in files:
            status = os.stat(path / name)
            if (other := seen.setdefault((status.st_dev, status.st_ino), name)) != name:
                raise FormatError(
                    f"{path / weights}: the shards {other!r} and {name!r} are one file."
                )
        super().__init__(path, {name: path / name for name in files})
        try:
            if index is not None:
                self._check(path / weights, index)
            if (path / "config.json").is_file():
                self.config = _read_json(path / "config.json")
        except BaseException:
            self.close()
            raise
        tables = [n for n in self.tensors if n.endswith(("embed_tokens.weight", "wte.weight"))]
        if (
            self.config.get("tie_word_embeddings")
            and "lm_head.weight" not in self.tensors
            and tables
        ):
            self.tied.setdefault("lm_head.weight", tables[0])

    def _check(self, file: Path, index: dict[str, Any]) -> None:
        named = index["weight_map"]
        for name, shard in named.items():
            if self.shards.get(name) != shard:
                raise FormatError(
                    f"{file} says that {name!r} is in {shard!r}, where it is not. Download both again, or mend the "
                    f"index."
                )
        extra = [name for name in self.tensors if name not in named]
        if extra:
            raise FormatError(
                f"{file} does not name {extra[0]!r}, which is in {self.shards[extra[0]]!r}. Download both again, or "
                f"mend the index."
            )
        claimed = self.about.get("total_size")
        held = sum(r.reader.entries[n].nbytes for n, r in self._readers.items())
        if claimed is not None and claimed != held:
            raise FormatError(
                f"{file} claims {claimed!r} bytes of tensors, and the shards hold {held}. Download the checkpoint "
                f"again, or correct total_size."
            )


class Orbax(Checkpoint):
    """An Orbax checkpoint of one tree."""

    layout = "orbax"

    def __init__(self, path: Path) -> None:
        import jax

        from prunax import trees

        super().__init__(path.resolve())
        ocp = import_orbax()
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.metadata(self.path).item_metadata
        except Exception as error:  # of many classes, whatever the folder is
            raise FormatError(
                f"{path} holds no safetensors file, and is no Orbax checkpoint that can be read: {error}"
            ) from None
        if found is None:
            raise FormatError(
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
        wanted = [s if i == index else ocp.PLACEHOLDER for i, s in enumerate(self._shapes)]
        as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(wanted)
        args = ocp.args.PyTreeRestore(
            item=self._treedef.unflatten(wanted), restore_args=self._treedef.unflatten(as_numpy)
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(self.path, args=args)
        leaf = self._treedef.flatten_up_to(restored)[index]
        return np.array(leaf, dtype=self._shapes[index].dtype)

    def rebuild(self, arrays: dict[str, np.ndarray]) -> Any:
        """Make the checkpoint's tree of other arrays."""
        leaves = [
            arrays[name].item() if number else arrays[name]
            for name, number in zip(self._index, self._numbers, strict=True)
        ]
        return self._treedef.unflatten(leaves)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: names, shapes and dtypes at once, tensors one at a time when they are asked for.

    Args:
        path: A safetensors file, plain or compressed by prunax; a folder in the Hugging Face layout
            (``model.safetensors``, or ``model.safetensors.index.json`` and its shards); or a folder of an Orbax
            checkpoint of one tree.

    Returns:
        A `Checkpoint`, to be used as a context manager: ``checkpoint.tensors``, ``checkpoint.read(name)``.

    Raises:
        FormatError: If it is damaged, an index and its shards do not fit, or it is of another format, which is named
            and never opened. A `ValueError`.
        OSError: If it cannot be read.

    Examples:
        >>> import os, tempfile, jax.numpy as jnp, prunax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = os.path.join(folder, "model")
        ...     prunax.export.save_checkpoint(model, {"a.weight": jnp.ones((2, 3)), "b.weight": jnp.zeros(2)})
        ...     with prunax.export.open_checkpoint(model) as checkpoint:
        ...         print(checkpoint.layout, checkpoint.read("a.weight").sum())
        folder 6.0
    """
    path = Path(path)
    if not path.is_dir():
        _refuse_others(path)
        return Safetensors(path, {path.name: path})
    weights = find_weights(path)
    if weights is not None:
        return Folder(path, weights)
    others = [f.name for f in sorted(path.iterdir()) if f.suffix in OTHERS]
    if others:
        raise _other(path / others[0], Path(others[0]).suffix)
    if not any(any(path.glob(place)) for place in ("_*", "*/_*", "*/*/_*")):  # Orbax's own files
        files = sorted(file.name for file in path.glob(f"*{WEIGHTS}"))
        mend = f" If {files[0]!r} is meant, name the file." if files else ""
        raise FormatError(
            f"{path} holds no checkpoint: neither model.safetensors, nor an index to shards, nor what Orbax "
            f"writes.{mend}"
        )
    return Orbax(path)


def find_weights(folder: Path) -> str | None:
    """The name of the file that holds a folder's weights, or of the index to several; None if there is neither."""
    held = sorted(f.name for f in folder.iterdir() if f.is_file())
    names = [name for name in held if name.endswith((WEIGHTS, INDEX))]
    for preferred in ("model" + WEIGHTS, "model" + INDEX):
        if preferred in names:
            return preferred
    if not any(name.endswith((INDEX, "config.json")) for name in held):
        return None  # files that happen to lie here
    indices = [name for name in names if name.endswith(INDEX)]
    found = indices or names
    if len(found) > 1:
        raise FormatError(
            f"{folder} holds {', '.join(found[:4])}: which is the model? Name one file, or the folder of "
            f"one model with its "
            f"index."
        )
    return found[0] if found else None


def import_orbax() -> Any:
    """Import Orbax, or say how to install it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise FormatError(
            "checkpoint folders need Orbax. Install it: pip install 'prunax[export]'."
        ) from None
    return ocp


def texts(checkpoint: Checkpoint) -> dict[str, str]:
    """What a checkpoint's metadata say to a reader."""
    return readable(checkpoint.metadata)


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_HEADER:
        raise FormatError(f"{file} has {file.stat().st_size} bytes, more than {MAX_HEADER}.")
    try:
        value = parse_json(file.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{file} cannot be parsed ({error}).") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file} must hold a JSON object.")
    return value


def _read_index(file: Path) -> dict[str, Any]:
    index = _read_json(file)
    named, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(named, dict) or not named or not isinstance(metadata, dict):
        raise FormatError(
            f"{file} must have a weight_map from tensors to shards, and metadata by name."
        )
    for name, shard in named.items():
        if not isinstance(shard, str) or not shard.endswith(WEIGHTS) or not shard.isprintable():
            raise FormatError(
                f"{file}: the shard of {name!r} is {str(shard)[:80]!r}, which is no safetensors file."
            )
        if (
            shard != os.path.basename(shard)
            or "\\" in shard
            or ":" in shard
            or shard.startswith(".")
        ):
            raise FormatError(
                f"{file}: the shard {shard!r} of {name!r} is not a file of this folder."
            )
    return index


def _refuse_others(path: Path) -> None:
    if path.suffix.lower() in OTHERS:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        raise _other(path, path.suffix.lower())
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(9)
        for beginning, suffix in _BEGINNINGS.items():
            if start.startswith(beginning) and not start.endswith(b"{"):  # of a safetensors header
                raise _other(path, suffix)


def _other(path: Path, suffix: str) -> FormatError:
    mend = _MEND.get(suffix, "Load it with the library that wrote it, and save it as safetensors")
    return FormatError(f"{path} is {OTHERS[suffix]}, which is not read here. {mend}.")


def in_order(checkpoint: Checkpoint) -> list[str]:
    """Names in the one order in which tensors are ranked and written, whatever file they are in.

    Wide elements first, so that each is aligned in its file; then by name.
    """
    tensors = checkpoint.tensors
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
