"""Checkpoints written in the Hugging Face layout: tensor by tensor, in shards, with what else belongs to the model."""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunax import _atomic, _signals
from prunax.export._checkpoints import (
    INDEX,
    OTHERS,
    WEIGHTS,
    Checkpoint,
    Folder,
    Orbax,
    import_orbax,
    in_order,
    open_checkpoint,
)
from prunax.export._container import NAMES, Entry, Writer, header_room
from prunax.export._store import OWN, ArrayWriter

__all__ = ["save_checkpoint", "shrink_checkpoint"]

FILES = (WEIGHTS, ".st", ".prunax")  # what such a name ends in is one file
SHARD_SIZE = 5 * 10**9  # of Hugging Face's libraries
_ROOM = 1 << 16  # for the header of a shard whose tensors are not known beforehand


def save_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    like: Checkpoint | str | os.PathLike[str] | None = None,
    shard_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder in the Hugging Face layout. It is there whole, or not at all.

    Args:
        folder: The folder to be.
        tensors: Arrays by name, or pairs of name and array, made one after the other: one is in memory at a time.
        like: A checkpoint, or where it is. Its metadata (``format: pt``) and, if it is a folder, all files that are no
            weights (``config.json``, the tokenizer) are taken along, and tensors go to the shards that they are in
            there.
        shard_size: Bytes at which a shard is full. By default the shards of `like`, else 5 GB. Tensors that fit into
            one file are in ``model.safetensors``, without an index.
        config: Entries of ``config.json`` that change.
        overwrite: Whether a checkpoint that is there already may be replaced.

    Raises:
        FileExistsError: If the folder is there already, unless `overwrite`; or holds something other than a checkpoint.
        ValueError: If a name comes twice, or a dtype is none of the format's, naming the tensor.
        OSError: If it cannot be written, naming the folder.

    Examples:
        >>> import os, tempfile, numpy as np, prunax
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     model = os.path.join(parent, "model")
        ...     tensors = ((f"{i}.weight", np.ones((8, 8), np.float32)) for i in range(3))
        ...     prunax.export.save_checkpoint(model, tensors, shard_size=600)
        ...     sorted(os.listdir(model))[:3]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
    """
    with contextlib.ExitStack() as stack:
        if like is not None and not isinstance(like, Checkpoint):
            like = stack.enter_context(open_checkpoint(like))
        writer = FolderWriter(
            folder, like=like, shard_size=shard_size, config=config, overwrite=overwrite
        )
        stack.enter_context(writer)
        pairs: Any = tensors.items() if isinstance(tensors, Mapping) else tensors
        for name, array in pairs:
            writer.add(name, np.asarray(array))


class FolderWriter:
    """Writes tensors, in any order, into a folder that appears when all are there."""

    kind = None  # tensors are stored plain

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        like: Checkpoint | None = None,
        shard_size: int | None = None,
        metadata: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(folder)
        check_replaceable(self.path, overwrite)
        self._like, self._config = like, dict(config or {})
        texts = {} if like is None else like.metadata
        texts = (
            {"format": "pt"}
            | {k: v for k, v in texts.items() if k not in OWN}
            | dict(metadata or {})
        )
        self._metadata = texts
        self._sharded = isinstance(like, Folder) and shard_size is None
        self._size = shard_size or SHARD_SIZE
        self._stem = like.stem if isinstance(like, Folder) else "model"
        self._place = _atomic.Place(self.path, overwrite=overwrite, folder=True)
        # By the name of the shard in `like`, or by number.
        self._shards: dict[str | int, _Shard] = {}
        self._last = 0
        self._place_of: dict[str, str | int] = {}

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                with _atomic.naming(self.path):
                    self._finish()
                self._place.publish()
        finally:
            for shard in self._shards.values():
                shard.writer.__exit__(RuntimeError)
            self._place.discard()

    def add(self, name: str, array: np.ndarray) -> None:
        """Write an array."""
        if array.dtype.newbyteorder("<") not in NAMES:
            raise ValueError(
                f"save_checkpoint: {name!r} is {array.dtype}, which the format has not. Convert it first."
            )
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        data = [array.reshape(-1).view(np.uint8)]
        self._add(name, Entry(NAMES[array.dtype], array.shape, 0, array.nbytes), data)

    def copy(self, name: str, entry: Entry, chunks: Iterable[bytes]) -> None:
        """Write a tensor of another file as it is."""
        self._add(name, entry, chunks)

    def _add(self, name: str, entry: Entry, data: Iterable[Any]) -> None:
        if name in self._place_of:
            raise ValueError(f"save_checkpoint: {name!r} comes twice.")
        key = self._key(name, entry)
        self._place_of[name] = key
        with _atomic.naming(self.path):
            self._shards[key].writer.add(name, entry.dtype, entry.shape, data)

    def _key(self, name: str, entry: Entry) -> str | int:
        """The shard that a tensor goes to, which is begun if need be."""
        room = header_room({name: entry._replace(start=10**15, stop=10**15)}, {}, digest=False)
        named = self._like.shards.get(name) if self._sharded and self._like else None
        last = self._shards.get(self._last)
        if named is None and last is not None and last.full(room, entry, self._size):
            self._last += 1
        key = self._last if named is None else named
        if key not in self._shards:
            taken = header_room({}, self._metadata, digest=False)
            known = max(_ROOM, room) if named is None else self._room_of(named)
            file = self._place.temporary / f"{len(self._shards)}.shard"
            self._shards[key] = _Shard(Writer(file, room=taken + known, digest=False), taken)
        self._shards[key].header += room
        self._shards[key].nbytes += entry.nbytes
        return key

    def _room_of(self, key: str) -> int:
        assert self._like is not None
        tensors = [t for n, t in self._like.tensors.items() if self._like.shards[n] == key]
        longest = {t.name: Entry("F8_E4M3", (*t.shape, 1), 10**15, 10**15) for t in tensors}
        return header_room(longest, {}, digest=False)

    def _finish(self) -> None:
        if not self._shards:  # a checkpoint of no tensors
            file = self._place.temporary / "0.shard"
            room = header_room({}, self._metadata, digest=False)
            self._shards[0] = _Shard(Writer(file, room=room, digest=False), room)
        keys = sorted(self._shards, key=str if self._sharded else int)
        names: dict[str | int, str] = {
            key: f"{self._stem}-{i:05d}-of-{len(keys):05d}{WEIGHTS}"
            for i, key in enumerate(keys, 1)
        }
        if len(keys) == 1:
            names = {keys[0]: f"{self._stem}{WEIGHTS}"}
        elif self._sharded and self._like and set(keys) == set(self._like.shards.values()):
            names = {key: str(key) for key in keys}
        total = sum(shard.nbytes for shard in self._shards.values())
        entries = [e for shard in self._shards.values() for e in shard.writer.entries.values()]
        for key in keys:
            shard = self._shards.pop(key)
            shard.writer.finish(self._metadata)
            shard.writer.__exit__(None)
            os.rename(shard.writer.path, self._place.temporary / names[key])
        if len(keys) > 1:
            where = {name: names[key] for name, key in sorted(self._place_of.items())}
            about = dict(self._like.about) if isinstance(self._like, Folder) else {}
            if "total_parameters" in about:
                about["total_parameters"] = sum(math.prod(entry.shape) for entry in entries)
            index = {"metadata": about | {"total_size": total}, "weight_map": where}
            _write_json(self._place.temporary / f"{self._stem}{INDEX}", index)
        if isinstance(self._like, Folder):
            _take_along(self._like.path, self._place.temporary)
        if self._config:
            config = {} if self._like is None else self._like.config
            _write_json(self._place.temporary / "config.json", config | self._config)


class _Shard:
    """A file in the making, and how full its header and its data are."""

    def __init__(self, writer: Writer, header: int) -> None:
        self.writer, self.header, self.nbytes = writer, header, 0

    def full(self, room: int, entry: Entry, size: int) -> bool:
        return self.header + room > self.writer.room or self.nbytes + entry.nbytes > size


class OrbaxWriter:
    """Holds tensors until all are there, and then writes an Orbax checkpoint."""

    kind = "orbax"

    def __init__(self, folder: Path, source: Orbax, *, overwrite: bool) -> None:
        check_replaceable(folder, overwrite)
        self.path, self._source = folder, source
        self._place = _atomic.Place(folder, overwrite=overwrite, folder=True)
        self._arrays: dict[str, np.ndarray] = {}

    def __enter__(self) -> "OrbaxWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                # Its threads print what they fail with, and go on writing for a while.
                with _signals.Quiet(), self._place.settled():
                    self._save()
                self._place.publish()
        finally:
            self._place.discard()

    def _save(self) -> None:
        tree = self._source.rebuild(self._arrays)
        # Within the temporary folder: Orbax makes others beside the one that it is given.
        whole = self._place.temporary.resolve() / "whole"
        try:
            with import_orbax().StandardCheckpointer() as checkpointer:
                checkpointer.save(whole, tree)
            for held in whole.iterdir():
                held.rename(whole.parent / held.name)
            whole.rmdir()
        except Exception as error:  # of many classes
            told = re.search(r"os_error_code='(\d+)'", str(error))
            code = int(told[1]) if told else getattr(error, "errno", None)
            if code is None:
                raise OSError(f"{self.path} cannot be written: {error}") from None
            raise OSError(code, os.strerror(code), str(self.path)) from None

    def add(self, name: str, array: np.ndarray) -> None:
        """Take an array."""
        self._arrays[name] = array


def open_writer(
    out: Path,
    source: Checkpoint,
    *,
    compress: bool = False,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Any:
    """Begin a checkpoint of the tensors of another.

    Args:
        out: The file to be, by its ending; or the folder, of the source's layout, or Hugging Face's for that of a file.
        source: What is read.
        compress: Whether a file stores kept weights only.
        metadata: More texts.
        overwrite: Whether it may be there already.

    Returns:
        A context manager with ``add(name, array)``.
    """
    if out.suffix not in FILES and isinstance(source, Orbax):
        return OrbaxWriter(out, source, overwrite=overwrite)
    if out.suffix not in FILES:
        return FolderWriter(out, like=source, metadata=metadata, overwrite=overwrite)
    texts = {k: v for k, v in source.metadata.items() if k not in OWN} | dict(metadata or {})
    leaves = {t.name: (t.shape, t.dtype_name) for t in source.tensors.values()}
    kind = "params" if compress else None
    return ArrayWriter(out, leaves, kind=kind, metadata=texts, overwrite=overwrite)


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a folder would take the place of something that is not a checkpoint."""
    _atomic.check_absent(folder, overwrite)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"{folder} is a file, and a folder is to be written. Choose another name."
        )
    known = (WEIGHTS, INDEX, "_METADATA", "_CHECKPOINT_METADATA")
    held = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    if held and not any(name.endswith(known) for name in held):
        raise FileExistsError(
            f"{folder} holds no checkpoint, and is not replaced. Choose another name."
        )


def belongings(folder: Path) -> list[Path]:
    """What belongs to a model and holds no weights: files within its folder."""
    weights = (WEIGHTS, INDEX, ".bin.index.json", *OTHERS)
    return [file for file in _files(folder) if not file.name.endswith(weights)]


def left_out(source: Folder) -> list[Path]:
    """Weights and states that lie in a folder beside the checkpoint: they would be those of another network."""
    own = set(source.shards.values())
    others = [file for file in _files(source.path) if file.name.endswith((WEIGHTS, *OTHERS))]
    return [file for file in others if str(file) not in own]


def _files(folder: Path) -> list[Path]:
    """Files within a folder that are not hidden."""
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def _take_along(source: Path, folder: Path) -> None:
    for file in belongings(source):
        place = folder / file
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, place)


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def shrink_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    keep: Mapping[Any, Any],
    *,
    names: Mapping[str, str | tuple[str, Sequence[int]]] | None = None,
    without: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the checkpoint of a smaller network, tensor by tensor, from that of the whole one.

    Args:
        source: The checkpoint: a file, or a folder in the Hugging Face layout.
        folder: The folder to be, in the Hugging Face layout.
        keep: For each `structured.AxisGroup` that shrinks the units that are left: `Shrunk.keep`.
        names: Path of a parameter -> its tensor's name in the checkpoint; or name and order of axes, where the tensor
            has them in another: ``("model.layers.0.mlp.up_proj.weight", (1, 0))`` is stored transposed. Axes that the
            parameter has apart (heads and their features) may be one in the file. By default the names are the paths,
            with dots.
        without: Beginnings of names that go as a whole, ``model.layers.3``: the blocks in `Shrunk.removed`, as the
            checkpoint calls them. What is numbered after them moves up.
        config: Entries of ``config.json`` that change, ``{"intermediate_size": 1024}``.
        shard_size: As for `save_checkpoint`.
        overwrite: Whether a checkpoint that is there already may be replaced.

    Raises:
        ValueError: If a parameter that shrinks has no tensor, a tensor another size than its parameter, or an entry of
            ``config.json``, changed or not, does not fit the smaller shapes.
        FormatError: If the source is damaged. A `ValueError`.
        OSError: If it cannot be written.

    Examples:
        >>> import os, tempfile, jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> small = prunax.structured.prune_channels(
        ...     lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((2, 4)), sparsity=0.5
        ... )
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     whole, folder = os.path.join(parent, "whole"), os.path.join(parent, "small")
        ...     prunax.export.save_checkpoint(whole, {"up.weight": params["up"].T, "down.weight": params["down"].T})
        ...     names = {"up": ("up.weight", (1, 0)), "down": ("down.weight", (1, 0))}
        ...     prunax.export.shrink_checkpoint(whole, folder, small.keep, names=names)
        ...     with prunax.export.open_checkpoint(folder) as checkpoint:
        ...         print({name: tensor.shape for name, tensor in checkpoint.tensors.items()})
        {'down.weight': (3, 8), 'up.weight': (8, 4)}
    """
    with open_checkpoint(source) as checkpoint:
        cuts = _cuts(checkpoint, keep, names)
        moved = _renumbered(checkpoint, without)
        shapes = {
            moved[name]: cuts[name].shape if name in cuts else tensor.shape
            for name, tensor in checkpoint.tensors.items()
            if name in moved
        }
        _check_config(checkpoint, shapes, without, dict(config or {}))
        options: dict[str, Any] = dict(shard_size=shard_size, config=config, overwrite=overwrite)
        with FolderWriter(folder, like=checkpoint, **options) as writer:
            for name in in_order(checkpoint):
                if name in moved:
                    array = checkpoint.read(name)
                    writer.add(moved[name], cuts[name](array) if name in cuts else array)


class _Cut:
    """Makes a smaller tensor of a checkpoint, by way of the layout of its parameter."""

    def __init__(
        self, tensor: Any, leaf: Any, axes: Sequence[int], keep: Mapping[Any, Any]
    ) -> None:
        self._path, self._keep, self._axes = leaf.path, keep, tuple(axes)
        if sorted(axes) != list(range(len(leaf.shape))):
            raise ValueError(
                f"shrink_checkpoint: the axes {tuple(axes)} of {tensor.name!r} are no order of those of {leaf.path!r}, "
                f"which has shape {leaf.shape}."
            )
        self._arranged = [leaf.shape[a] for a in axes]
        self._merged = _merges(self._arranged, tensor.shape)
        if self._merged is None:
            raise ValueError(
                f"shrink_checkpoint: {tensor.name!r} has shape {tensor.shape}, and {leaf.path!r} has "
                f"{leaf.shape}, of which "
                f"the axes {self._axes} make no such shape. Give its order of axes in `names`."
            )
        self.shape = self(np.broadcast_to(np.zeros((), np.bool_), tensor.shape)).shape

    def __call__(self, array: np.ndarray) -> np.ndarray:
        from prunax import structured

        parameter = array.reshape(self._arranged).transpose(np.argsort(self._axes))
        small = structured.shrink({self._path: parameter}, self._keep)[self._path]
        arranged = np.asarray(small).transpose(self._axes)
        assert self._merged is not None
        lengths = iter(arranged.shape)
        shape = [int(np.prod([next(lengths) for _ in range(n)])) for n in self._merged]
        return np.ascontiguousarray(arranged).reshape(shape)


def _merges(arranged: Sequence[int], shape: Sequence[int]) -> list[int] | None:
    """How many of the axes of one shape make each axis of the other; None where they do not."""
    counts, at = [], 0
    for i, length in enumerate(shape):
        start, product = at, 1
        last = i == len(shape) - 1
        while at < len(arranged) and (at == start or product < length or last):
            product, at = product * arranged[at], at + 1
        if product != length:
            return None
        counts.append(at - start)
    return counts if at == len(arranged) else None


def _cuts(
    checkpoint: Checkpoint, keep: Mapping[Any, Any], names: Mapping[str, Any] | None
) -> dict[str, _Cut]:
    leaves = {leaf.path: leaf for group in keep for leaf in group.leaves}
    touched = dict.fromkeys(member.path for group in keep for member in group.members)
    cuts = {}
    for path in touched:
        given = path.replace("/", ".") if names is None else names.get(path)
        name, axes = (given, None) if isinstance(given, str) or given is None else given
        name = checkpoint.tied.get(name, name) if name is not None else None
        if name not in checkpoint.tensors:
            raise ValueError(
                f"shrink_checkpoint: {path!r} shrinks, and {name!r} is no tensor of {checkpoint.path}. "
                f"Say in `names` which "
                f"one it is: {{{path!r}: ('its.name', (1, 0))}}, with the order of its axes."
            )
        leaf = leaves[path]
        cuts[name] = _Cut(
            checkpoint.tensors[name], leaf, range(len(leaf.shape)) if axes is None else axes, keep
        )
    return cuts


def _renumbered(checkpoint: Checkpoint, without: Sequence[str]) -> dict[str, str]:
    """Names of the tensors that stay -> their names in the smaller checkpoint."""
    gone = [prefix.rstrip(".") for prefix in without]
    moved = {}
    for prefix in gone:
        if not any(name.startswith(f"{prefix}.") for name in checkpoint.tensors):
            raise ValueError(f"shrink_checkpoint: no tensor's name begins with {prefix!r}.")
    for name in checkpoint.tensors:
        if any(name.startswith(f"{prefix}.") for prefix in gone):
            continue
        parts = name.split(".")
        new = list(parts)
        for i, part in enumerate(parts):
            if part.isdigit():
                base = ".".join(parts[:i])
                before = (p.rpartition(".") for p in gone)
                less = sum(b == base and n.isdigit() and int(n) < int(part) for b, _, n in before)
                new[i] = str(int(part) - less) if less else part
        moved[name] = ".".join(new)
    return moved


def _check_config(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    without: Sequence[str],
    changes: dict[str, Any],
) -> None:
    """Compare the numbers of a configuration with the lengths of axes that the smaller tensors have."""
    config = checkpoint.config
    before = {n for t in checkpoint.tensors.values() for n in t.shape}
    after = {n for shape in shapes.values() for n in shape}
    heads = config.get("num_attention_heads")
    width = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    width = changes.get("head_dim", width)
    blocks = {_blocks(checkpoint.tensors), _blocks(shapes)}

    def lengths(key: str, value: int) -> set[int]:
        return {value, value * width} if "heads" in key else {value}

    for key, value in (config | changes).items():
        if type(value) is not int or value < 2:
            continue
        if "layers" in key and without:
            if value not in blocks - {_blocks(checkpoint.tensors)}:
                raise ValueError(
                    f"shrink_checkpoint: {key} is {value} in config.json, and {_blocks(shapes)} blocks are left. Pass "
                    f"config={{{key!r}: {_blocks(shapes)}}}."
                )
        elif key not in changes:
            if lengths(key, value) & (before - after) and not lengths(key, value) & after:
                raise ValueError(
                    f"shrink_checkpoint: config.json says {key}: {value}, and no tensor has an axis of "
                    f"this length any more. "
                    f"Pass config={{{key!r}: ...}} with what it is now, or {value} if it is of something else."
                )
        elif value != config.get(key) and not lengths(key, value) & after:
            raise ValueError(
                f"shrink_checkpoint: {key}: {value} fits no axis of the smaller tensors. Their lengths are "
                f"{sorted(after)[:12]}."
            )


def _blocks(names: Iterable[str]) -> int:
    """The most members of one numbered list in the names."""
    found: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:i]), set()).add(part)
    return max(map(len, found.values()), default=0)
