"""Safetensors files, read tensor by tensor and written as a stream: the container of all that prunax saves.

A file is eight bytes with the length of a JSON header, the header, and the tensors' bytes one after another. Nothing in
it is ever executed, and names are keys, never file names. Reading checks the whole header before any tensor: offsets
must tile the data, sizes must be those of shape and dtype, names must be unique. Writing goes to a temporary file that
takes its name once it is complete and on the disk.

A file that prunax wrote for itself carries a SHA-256 of everything in it, so that a changed bit is found on reading.
"""

import collections
import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from prunax import _atomic

__all__ = ["Entry", "FormatError", "Reader", "Writer"]

# The reference reader takes headers of 100 MB. A hundred thousand tensors need about 10.
MAX_HEADER = 16 << 20
_POINTER = b"version "  # of Git LFS: "version https://git-lfs.github.com/spec/v1"
MAX_NDIM = 64  # NumPy's
CHUNK = 1 << 20
DIGEST = "prunax.sha256"
_NO_DIGEST = "0" * 64

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits of an element. Elements narrower than a byte can be copied, not looked at.
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class FormatError(ValueError):
    """A file is damaged, cut short, or not what it should be. The message names the file and what is wrong.

    Examples:
        >>> import prunax
        >>> issubclass(prunax.export.FormatError, ValueError)
        True
    """


class Entry(NamedTuple):
    """Where a tensor lies in a file: bytes are counted from the end of the header."""

    dtype: str  # as the format calls it: F32, BF16
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Reader:
    """An open safetensors file whose header has been checked.

    Attributes:
        path: The file.
        entries: Name -> `Entry`, in the order of the data.
        metadata: The header's ``__metadata__``, text to text.

    Raises:
        FormatError: If the file is not a valid safetensors file, saying why.
        OSError: If it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Asked before opening: opening a pipe would wait for its other end.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise FormatError(f"{self.path} is not a regular file.")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115, closed by __exit__
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._data_start + self._data_size

    def _fail(self, problem: str) -> FormatError:
        return FormatError(
            f"{self.path} is not a valid safetensors file: {problem}. It may be damaged or incomplete: write or copy "
            f"it again."
        )

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self._fail(f"it has {size} bytes, and the header's length takes 8")
        start = self._file.read(8)
        if start == _POINTER:
            raise FormatError(
                f"{self.path} is a pointer of Git LFS, not the file that it points to. Fetch that: git lfs pull."
            )
        length = int.from_bytes(start, "little")
        if length > max(size, MAX_HEADER):
            raise FormatError(
                f"{self.path} is not a safetensors file: such a file begins with the length of its header."
            )
        if length > size - 8:
            raise self._fail(
                f"the header should have {length} bytes, the file has {size - 8} after its length"
            )
        if length > MAX_HEADER:
            raise self._fail(f"the header has {length} bytes, more than {MAX_HEADER}")
        raw = self._file.read(length)
        if len(raw) != length:
            raise self._fail("the header ends early")
        self._header, self._data_start, self._data_size = raw, 8 + length, size - 8 - length
        header = self._parse(raw)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fail("__metadata__ must be texts by name")
        self.metadata: dict[str, str] = metadata
        entries = {name: self._entry(name, fields) for name, fields in header.items()}
        position = 0
        ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
        for name, entry in ordered:
            if entry.start != position:
                raise self._fail(
                    f"the bytes of {name!r} begin at {entry.start}, not at {position}: they overlap others or leave a "
                    f"gap"
                )
            position = entry.stop
        if position != self._data_size:
            raise self._fail(
                f"the tensors take {position} bytes, and {self._data_size} follow the header"
            )
        self.entries: dict[str, Entry] = dict(ordered)

    def _parse(self, raw: bytes) -> dict[str, Any]:
        if raw[:1] != b"{":
            raise self._fail("the header does not begin with '{'")
        try:
            return parse_json(raw.decode("utf-8"))
        except ValueError as error:
            raise self._fail(f"the header cannot be parsed ({error})") from None

    def _entry(self, name: str, fields: Any) -> Entry:
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise self._fail(f"{name!r} must have a dtype, a shape and data_offsets, nothing else")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._fail(f"{name!r} has the unknown dtype {dtype!r}")
        if not is_shape(shape):
            raise self._fail(f"{name!r} has the impossible shape {str(shape)[:80]}")
        if not _is_lengths(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._fail(f"{name!r} has the impossible offsets {str(offsets)[:80]}")
        start, stop = offsets
        if stop > self._data_size:
            raise self._fail(
                f"{name!r} ends at byte {stop}, and {self._data_size} follow the header"
            )
        if 8 * (stop - start) != math.prod(shape) * _BITS[dtype]:
            raise self._fail(
                f"{name!r} has {stop - start} bytes, which is not the size of {dtype} {shape}"
            )
        return Entry(dtype, tuple(shape), start, stop)

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read a tensor's bytes piece by piece."""
        entry = self.entries[name]
        return self._chunks(entry.start, entry.stop)

    def _chunks(self, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            self._file.seek(self._data_start + start)
            chunk = self._file.read(min(CHUNK, stop - start))
            if not chunk:
                raise self._fail("it became shorter while it was read")
            start += len(chunk)
            yield chunk

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into memory of its own; FormatError for a dtype that NumPy has not, narrower than a byte."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise FormatError(
                f"{self.path}: the values of {name!r} are {entry.dtype}, which cannot be read."
            )
        array = np.empty(entry.nbytes, np.uint8)
        view, position = array.data, 0
        self._file.seek(self._data_start + entry.start)
        while position < entry.nbytes:
            count = self._file.readinto(view[position : position + CHUNK])
            if not count:
                raise self._fail("it became shorter while it was read")
            position += count
        if entry.dtype == "BOOL" and np.any(array > 1):
            raise self._fail(f"{name!r} is BOOL and has bytes other than 0 and 1")
        return array.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def verify(self) -> None:
        """Compare the whole file with the SHA-256 that prunax put into it; FormatError if they differ."""
        digest = self.metadata.get(DIGEST, "")
        hidden = self._header.replace(_digest_field(digest), _digest_field(_NO_DIGEST))
        if len(digest) != 64 or self._header.count(_digest_field(digest)) != 1:
            raise FormatError(
                f"{self.path} has no checksum by prunax: prunax.export did not write it."
            )
        if digest != _sha256(self._chunks(0, self._data_size), hidden):
            raise FormatError(
                f"{self.path} is damaged: its content does not have the checksum written in it. Write or copy it again."
            )


class Writer:
    """A safetensors file in the making. Tensors are written as they come, and the header last.

    Used as a context manager: the file appears under its name when the block ends without an error and `finish` has
    been called; otherwise nothing is left behind.

    Attributes:
        path: The file to be.
        room: Bytes kept free for the header, see `header_room`.

    Raises:
        FileExistsError: If the file is there already, unless `overwrite`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        room: int,
        overwrite: bool = False,
        digest: bool = True,
    ) -> None:
        self.path = Path(path)
        self.room = _padded(room)
        self.entries: dict[str, Entry] = {}
        self._sha = hashlib.sha256() if digest else None
        self._position = 0
        self._complete = False
        self._place = _atomic.Place(self.path, overwrite=overwrite)
        try:
            self._file = open(self._place.temporary, "r+b")  # noqa: SIM115, closed by __exit__
            self._file.seek(8 + self.room)
        except BaseException:
            self._place.discard()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._complete:
                with _atomic.naming(self.path):
                    self._file.flush()
                    os.fsync(self._file.fileno())
                self._place.publish()
        finally:
            with contextlib.suppress(OSError):  # a full disk, once more
                self._file.close()
            self._place.discard()

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Iterable[Any]) -> None:
        """Write a tensor, whose bytes come in pieces: anything with the buffer protocol."""
        assert name not in self.entries
        start = self._position
        for piece in data:
            view = memoryview(piece).cast("B")
            with _atomic.naming(self.path):
                self._file.write(view)
            if self._sha:
                self._sha.update(view)
            self._position += view.nbytes
        assert 8 * (self._position - start) == math.prod(shape) * _BITS[dtype], name
        self.entries[name] = Entry(dtype, tuple(shape), start, self._position)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, with a checksum of the file in it if `digest` asked for one."""
        metadata = dict(metadata) | ({DIGEST: _NO_DIGEST} if self._sha else {})
        header = _header(self.entries, metadata).ljust(self.room)
        assert len(header) == self.room, (len(header), self.room)
        length = len(header).to_bytes(8, "little")
        if self._sha:
            self._sha.update(header + length)
            field = _digest_field(self._sha.hexdigest())
            header = header.replace(_digest_field(_NO_DIGEST), field)
        with _atomic.naming(self.path):
            self._file.seek(0)
            self._file.write(length + header)
        self._complete = True


def header_room(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], *, digest: bool = True
) -> int:
    """Count the bytes of a header. One whose numbers and texts are no longer than these fits in it."""
    extra = {DIGEST: _NO_DIGEST} if digest else {}
    return len(_header(entries, dict(metadata) | extra))


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, entry in entries.items():
        offsets = [entry.start, entry.stop]
        fields[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8")


def _padded(length: int) -> int:
    """Round up to a multiple of eight, so that the data begins aligned."""
    return -(-length // 8) * 8


def _digest_field(digest: str) -> bytes:
    return f'"{DIGEST}":"{digest}"'.encode()


def _sha256(data: Iterable[bytes], header: bytes) -> str:
    """The data first, which is written first, then the header and its length."""
    sha = hashlib.sha256()
    for chunk in data:
        sha.update(chunk)
    sha.update(header + len(header).to_bytes(8, "little"))
    return sha.hexdigest()


def parse_json(text: str) -> Any:
    """Parse JSON from a stranger; ValueError for a name twice, half characters, or depth that overflows the stack."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{twice!r} appears twice")
        return found

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def is_shape(value: Any) -> bool:
    """Say whether a value from JSON is a shape that NumPy can hold (which has none like (0, 2**62, 2**62))."""
    return (
        _is_lengths(value)
        and len(value) <= MAX_NDIM
        and math.prod(n for n in value if n) < 2**56  # 2**63 bits
    )


def _is_lengths(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
