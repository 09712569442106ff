"""Named arrays in a container: plain, as bits and kept elements, or as the bits of a mask.

What each tensor of the container stands for is written in its metadata:

=================  ===================================================================================================
``prunax.format``  Version of this format, 1.
``prunax.kind``    ``params`` or ``masks``.
``prunax.version`` The prunax that wrote the file.
``prunax.leaves``  JSON: name -> encoding, dtype and shape, in tree order.
``prunax.sha256``  Checksum of the data and the header.
``format``         ``prunax``, where Hugging Face's loaders look for ``pt`` and refuse others.
=================  ===================================================================================================

A tensor has its array's name. Its encoding is ``plain``, or ``bits`` (see `prunax.export._encoding`), ``mask`` (one bit
an element) or ``bytes`` (a dtype that the container has no name for): these three are rows of U8.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prunax import __version__
from prunax.export import _encoding
from prunax.export._container import (
    DIGEST,
    DTYPES,
    NAMES,
    Entry,
    FormatError,
    Reader,
    Writer,
    header_room,
    is_shape,
    parse_json,
)

__all__ = ["ArrayReader", "ArrayWriter", "Stored"]

FORMAT = "1"
_ROWS = ("bits", "mask", "bytes")
LEAVES = "prunax.leaves"
FORMAT_BEFORE = "prunax.format_before"  # what `format` was in the file that was compressed
# What prunax writes into a header by itself, besides the pattern and the sparsity.
OWN = ("prunax.format", "prunax.kind", "prunax.version", LEAVES, DIGEST)


class Stored(NamedTuple):
    """How an array is stored.

    Attributes:
        encoding: ``plain``, ``bits``, ``mask`` or ``bytes``.
        dtype: NumPy's name of the dtype, ``bfloat16``; or the format's, ``F4``, where NumPy has none.
        shape: Shape of the array.
    """

    encoding: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return math.prod(self.shape) * _encoding.DTYPES[self.dtype].itemsize


class ArrayWriter:
    """Writes named arrays, one at a time and in any order, into a file that appears when all are there.

    Attributes:
        kind: ``params`` or ``masks``, or None for a plain safetensors file that any library reads.

    Raises:
        FileExistsError: If the file is there already, unless `overwrite`.
        ValueError: If a name cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        leaves: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        kind: str | None,
        metadata: Mapping[str, str],
        overwrite: bool = False,
    ) -> None:
        """Begin a file of arrays whose shapes and dtypes are known by name, with more texts for its header."""
        _check_names(path, leaves)
        self.kind = kind
        self._leaves = dict(leaves)
        self._metadata = dict(metadata)
        self._stored: dict[str, Stored] = {}
        if kind is not None:
            self._metadata |= {
                "prunax.format": FORMAT,
                "prunax.kind": kind,
                "prunax.version": __version__,
                "format": "prunax",  # so that nobody's loader takes packed bits for weights
            }
            if "format" in metadata:
                self._metadata[FORMAT_BEFORE] = metadata["format"]
        # No header can be longer than one with an axis more in each shape and only large numbers.
        total = sum(math.prod(shape) * 16 + 64 for shape, _ in leaves.values())
        longest = {n: Stored("plain", dtype, shape) for n, (shape, dtype) in leaves.items()}
        entries = {n: Entry("F8_E4M3", (*s.shape, total), total, total) for n, s in longest.items()}
        room = header_room(entries, self._described(longest), digest=kind is not None)
        self._writer = Writer(path, room=room, overwrite=overwrite, digest=kind is not None)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                ordered = {name: self._stored[name] for name in self._leaves}
                self._writer.finish(self._described(ordered))
        finally:  # which publishes a finished file, and removes any other
            self._writer.__exit__(kind, error, trace)

    def _described(self, stored: Mapping[str, Stored]) -> dict[str, str]:
        if self.kind is None:
            return self._metadata
        table = {name: [s.encoding, s.dtype, list(s.shape)] for name, s in stored.items()}
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":"))
        return self._metadata | {LEAVES: text}

    def add(self, name: str, array: np.ndarray) -> None:
        """Write an array, in the encoding that takes the fewest bytes."""
        shape = array.shape
        if self.kind == "masks" and shape:
            packed = _encoding.pack_bits(array)
            self._add(name, array, "mask", [packed])
        elif self.kind == "params" and _encoding.encoded_size(array) < array.nbytes:
            self._add(name, array, "bits", _encoding.encode(array))
        else:
            piece = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._add(name, array, "plain" if array.dtype in NAMES else "bytes", [piece])

    def _add(self, name: str, array: np.ndarray, how: str, pieces: Sequence[np.ndarray]) -> None:
        self._stored[name] = Stored(how, array.dtype.name, array.shape)
        size = sum(piece.nbytes for piece in pieces)
        dtype, shape = (NAMES[array.dtype], array.shape) if how == "plain" else ("U8", (size,))
        self._writer.add(name, dtype, shape, pieces)

    def copy(self, name: str, entry: Entry, chunks: Iterable[bytes]) -> None:
        """Write a tensor of another plain file as it is."""
        dtype = DTYPES[entry.dtype].name if entry.dtype in DTYPES else entry.dtype
        self._stored[name] = Stored("plain", dtype, entry.shape)
        self._writer.add(name, entry.dtype, entry.shape, chunks)


class ArrayReader:
    """An open file of named arrays: one that prunax wrote, checked against its checksum, or any safetensors file.

    Attributes:
        kind: ``params`` or ``masks``, or None for a file that carries no checksum by prunax.
        leaves: Name -> `Stored`, in tree order, or the order of the data.
        metadata: The header's texts.

    Raises:
        FormatError: If the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.reader = Reader(path)
        try:
            self.metadata = dict(self.reader.metadata)
            self.kind = self.metadata.get("prunax.kind")
            if self.kind is None:
                if DIGEST in self.metadata or LEAVES in self.metadata:
                    raise self._fail("the metadata lack prunax.kind")
                self.leaves = {
                    name: Stored("plain", _dtype_name(entry.dtype), entry.shape)
                    for name, entry in self.reader.entries.items()
                }
            else:
                self.reader.verify()
                self.leaves = self._stored_leaves()
                before = self.metadata.pop(FORMAT_BEFORE, None)
                self.metadata.pop("format", None)
                self.metadata |= {} if before is None else {"format": before}
        except BaseException:
            self.reader.__exit__()
            raise

    def __enter__(self) -> "ArrayReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.__exit__()

    def _fail(self, problem: str) -> FormatError:
        return FormatError(f"{self.reader.path} is not a valid prunax file: {problem}.")

    def _stored_leaves(self) -> dict[str, Stored]:
        version = self.metadata.get("prunax.format")
        if version != FORMAT:
            writer = self.metadata.get("prunax.version", "unknown")
            raise self._fail(
                f"its format is {version!r}, this prunax reads {FORMAT!r} (it was written by prunax {writer})"
            )
        if self.kind not in ("params", "masks"):
            raise self._fail(f"it holds {self.kind!r}, not params or masks")
        try:
            table = parse_json(self.metadata.get(LEAVES, ""))
        except ValueError as error:
            raise self._fail(f"prunax.leaves cannot be parsed ({error})") from None
        if not isinstance(table, dict) or table.keys() != self.reader.entries.keys():
            raise self._fail("prunax.leaves does not name the tensors that are there")
        return {name: self._stored(name, fields) for name, fields in table.items()}

    def _stored(self, name: str, fields: Any) -> Stored:
        if not isinstance(fields, list) or len(fields) != 3:
            raise self._fail(f"prunax.leaves says nothing sensible of {name!r}")
        how, dtype, shape = fields
        entry = self.reader.entries[name]
        fits = is_shape(shape) and (self.kind == "params" or dtype == "bool")
        if how == "plain":
            fits = fits and (_dtype_name(entry.dtype), entry.shape) == (dtype, tuple(shape))
        else:
            fits = fits and how in _ROWS and isinstance(dtype, str) and dtype in _encoding.DTYPES
            fits = fits and entry.dtype == "U8" and len(entry.shape) == 1
            # An element takes a bit at least, so that a short file cannot ask for endless memory.
            fits = fits and math.prod(shape) <= 8 * entry.nbytes
            fits = fits and (how != "mask" or dtype == "bool")
        if not fits:
            raise self._fail(
                f"{name!r} is stored as {entry.dtype} {entry.shape}, and should be {str(fields)[:80]}"
            )
        return Stored(how, dtype, tuple(shape))

    def read(self, name: str) -> np.ndarray:
        """Read an array, bit for bit as it was written; FormatError if its bytes make no such array."""
        stored = self.leaves[name]
        data = self.reader.read(name)
        if stored.encoding == "plain":
            return data
        dtype = _encoding.DTYPES[stored.dtype]
        try:
            if stored.encoding == "mask":
                return _encoding.unpack_bits(data, stored.shape)
            if stored.encoding == "bits":
                return _encoding.decode(data, stored.shape, dtype)
            return data.view(dtype).reshape(stored.shape)
        except ValueError as error:
            raise self._fail(f"{name!r} does not hold what it should ({error})") from None


def readable(metadata: Mapping[str, str]) -> dict[str, str]:
    """The texts of a header that say something to a reader: without the table of leaves and the checksum."""
    return {key: text for key, text in metadata.items() if key not in (LEAVES, DIGEST)}


def _dtype_name(dtype: str) -> str:
    return DTYPES[dtype].name if dtype in DTYPES else dtype


def _check_names(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    for name in names:
        if name == "__metadata__":
            raise ValueError(
                f"{path}: {name!r} is the name of the file's metadata. Rename the leaf."
            )
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{path}: {name!r} is no valid text. Rename the leaf.") from None
