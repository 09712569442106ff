"""Damaged and hostile files: an error that says what is wrong, and never a crash, a hang or a wrong array.

`PRUNAX_FUZZ=10000 pytest tests/test_export_hostile.py` looks at that many mutations of real files.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import prunax
from prunax import export
from prunax.export import _container, _store

MUTATIONS = int(os.environ.get("PRUNAX_FUZZ", "400"))


def params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random((24, 16)) < 0.9, 0, rng.standard_normal((24, 16)))
    return {
        "dense": {"kernel": sparse.astype(np.float32), "bias": rng.standard_normal(16)},
        "half": sparse.astype(ml_dtypes.bfloat16),
        "small": sparse[:3, :3].astype(ml_dtypes.float8_e3m4),
        "on": np.array([True, False, True]),
        "steps": np.array(7),
    }


def masks() -> dict[str, Any]:
    kernel = {"kernel": jnp.asarray(params()["dense"]["kernel"]), "bias": jnp.ones(16)}
    return {"dense": prunax.compute_masks(kernel, 0.7), "steps": jnp.array(True)}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    export.save_params(folder / "params", params())
    export.save_masks(folder / "masks", masks(), pattern=prunax.patterns.Unstructured())
    return {name: (folder / name).read_bytes() for name in ("params", "masks")}


def load(kind: str, file: Path) -> dict[str, bytes]:
    """Everything that a file says, as bytes."""
    if kind == "masks":
        like = masks()
        loaded = export.load_masks(file, like)
        flat = dict(zip(prunax.trees.paths(like), _leaves(loaded), strict=True))
    else:
        flat = export.load_params(file)
    arrays = {
        name: a.dtype.name.encode() + str(a.shape).encode() + a.tobytes()
        for name, a in flat.items()
    }
    metadata = json.dumps(export.read_metadata(file), sort_keys=True).encode()
    return arrays | {"metadata": metadata}


def _leaves(tree: Any) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: Any, data: bytes, *, sign: bool = True) -> bytes:
    """Put a file together, with the checksum that it ought to have, as an attacker would."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    if sign and isinstance(header, dict) and "prunax.sha256" in header.get("__metadata__", {}):
        header["__metadata__"]["prunax.sha256"] = "0" * 64
        text = json.dumps(header, separators=(",", ":")).encode()
        digest = hashlib.sha256(data + text + len(text).to_bytes(8, "little")).hexdigest()
        text = text.replace(b"0" * 64, digest.encode())
    return len(text).to_bytes(8, "little") + text + data


# --- each kind of damage by hand ------------------------------------------------------------------------------------


def resize(header: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    return header | {name: header[name] | fields}


def plain(name: str, dtype: str, shape: Any, offsets: Any) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


F32 = plain("a", "F32", [2], [0, 8])
HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "text": (b"hello", b"", "does not begin with"),
    "list": (b"[]", b"", "does not begin with"),
    "cut": (b'{"a":', b"", "cannot be parsed"),
    "not UTF-8": (b'{"\xff":{}}', b"", "cannot be parsed"),
    "half a character": (b'{"\\ud800":{}}', b"", "cannot be parsed"),
    "nested": (b'{"a":' + b"[" * 200_000, b"", "nested too deep"),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", b"", "cannot be parsed"),
    "infinity": (b'{"a":Infinity}', b"", "Infinity is no JSON"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 2,
        b"",
        "cannot be parsed",
    ),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        "'a' appears twice",
    ),
    "no fields": ({"a": 1}, b"", "'a' must have"),
    "more fields": ({"a": F32["a"] | {"run": "me"}}, bytes(8), "nothing else"),
    "unknown dtype": (plain("a", "PICKLE", [2], [0, 8]), bytes(8), "unknown dtype"),
    "dtype of another type": (plain("a", ["F32"], [2], [0, 8]), bytes(8), "unknown dtype"),
    "negative shape": (plain("a", "F32", [-2], [0, 8]), bytes(8), "impossible shape"),
    "fraction": (plain("a", "F32", [2.0], [0, 8]), bytes(8), "impossible shape"),
    "bool as length": (plain("a", "F32", [True, 2], [0, 8]), bytes(8), "impossible shape"),
    "endless shape": (plain("a", "F32", [2**62, 2**62], [0, 8]), bytes(8), "impossible shape"),
    "empty endless shape": (plain("a", "F32", [0, 2**62], [0, 0]), b"", "impossible shape"),
    "many axes": (plain("a", "F32", [1] * 65, [0, 4]), bytes(4), "impossible shape"),
    "wrong shape": (plain("a", "F32", [3], [0, 8]), bytes(8), "not the size"),
    "backwards": (plain("a", "F32", [2], [8, 0]), bytes(8), "impossible offsets"),
    "three offsets": (plain("a", "F32", [2], [0, 8, 8]), bytes(8), "impossible offsets"),
    "beyond the end": (plain("a", "F32", [2], [8, 16]), bytes(8), "ends at byte 16"),
    "overlap": (F32 | plain("b", "F32", [2], [4, 12]), bytes(12), "overlap"),
    "same bytes twice": (F32 | plain("b", "F32", [2], [0, 8]), bytes(8), "overlap"),
    "gap": (F32 | plain("b", "F32", [2], [12, 20]), bytes(20), "leave a gap"),
    "left over": (F32, bytes(9), "9 follow the header"),
    "metadata of another type": (F32 | {"__metadata__": {"a": 1}}, bytes(8), "must be texts"),
    "metadata as list": (F32 | {"__metadata__": ["a"]}, bytes(8), "must be texts"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_header(tmp_path, case):
    header, data, problem = HEADERS[case]
    (tmp_path / "x").write_bytes(join(header, data))
    with pytest.raises(export.FormatError, match=problem):
        export.load_params(tmp_path / "x")


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
        ((10).to_bytes(8, "little") + b"{}", "should have 10 bytes, the file has 2"),
    ],
)
def test_hostile_length(tmp_path, raw, problem):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(export.FormatError, match=problem):
        export.load_params(tmp_path / "x")


def test_huge_header_is_not_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:  # a file with a hole takes no room
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**40 + 8)
    with pytest.raises(export.FormatError, match="more than"):
        export.load_params(tmp_path / "x")


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(export.FormatError, match="not a regular file"):
            export.load_params(path)
    with pytest.raises(FileNotFoundError):
        export.load_params(tmp_path / "missing")


def test_names_are_keys_and_no_files(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    tree = {
        "../../outside": np.ones(2),
        "/etc/passwd": np.ones(2),
        "a\x00b\n\x1b[31m": np.ones(2),
        "": np.ones(2),
    }
    export.save_params("x", tree)
    loaded = export.load_params("x")
    assert set(loaded) == set(tree)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "x"]


TABLES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "kind missing": (lambda m: m.pop("prunax.kind"), "lack prunax.kind"),
    "kind unknown": (lambda m: m.update({"prunax.kind": "pickle"}), "holds 'pickle'"),
    "format missing": (lambda m: m.pop("prunax.format"), "its format is None"),
    "table missing": (lambda m: m.pop("prunax.leaves"), "cannot be parsed"),
    "table empty": (lambda m: m.update({"prunax.leaves": "{}"}), "does not name the tensors"),
    "table a list": (lambda m: m.update({"prunax.leaves": "[]"}), "does not name the tensors"),
    "table nested": (lambda m: m.update({"prunax.leaves": "[" * 100_000}), "nested too deep"),
}


@pytest.mark.parametrize("case", TABLES)
def test_hostile_metadata(tmp_path, originals, case):
    change, problem = TABLES[case]
    header, data = split(originals["params"])
    change(header["__metadata__"])
    (tmp_path / "x").write_bytes(join(header, data))
    with pytest.raises(export.FormatError, match=problem):
        export.load_params(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        ("dense/kernel", ["bits", "float32", [24, 17]], "the bits alone|elements marked"),
        ("dense/kernel", ["bits", "float32", [24, 8]], "elements marked"),
        ("dense/kernel", ["bits", "float64", [24, 16]], "elements marked"),
        ("dense/kernel", ["bits", "object", [24, 16]], "is stored as"),
        ("dense/kernel", ["bits", ["float32"], [24, 16]], "is stored as"),
        ("dense/kernel", [["bits"], "float32", [24, 16]], "is stored as"),
        ("dense/kernel", ["exec", "float32", [24, 16]], "is stored as"),
        ("dense/kernel", ["plain", "float32", [24, 16]], "is stored as"),
        ("dense/kernel", ["mask", "float32", [24, 16]], "is stored as"),
        ("dense/kernel", ["bits", "float32", [2**40, 16]], "is stored as"),
        ("dense/kernel", ["bits", "float32", [0, 2**62]], "is stored as"),
        ("dense/kernel", ["bits", "float32", None], "is stored as"),
        ("dense/kernel", ["bytes", "float32", [24, 16]], "does not hold"),
        ("dense/kernel", ["bits", "float32"], "nothing sensible"),
        ("dense/kernel", {}, "nothing sensible"),
        ("dense/bias", ["plain", "int64", [16]], "is stored as"),
        ("dense/bias", ["bits", "float64", [16]], "is stored as"),
    ],
)
def test_hostile_table(tmp_path, originals, name, fields, problem):
    header, data = split(originals["params"])
    table = json.loads(header["__metadata__"]["prunax.leaves"])
    table[name] = fields
    header["__metadata__"]["prunax.leaves"] = json.dumps(table)
    (tmp_path / "x").write_bytes(join(header, data))
    with pytest.raises(export.FormatError, match=problem):
        export.load_params(tmp_path / "x")


def test_bools_of_other_bytes(tmp_path, originals):
    header, data = split(originals["params"])
    start = header["on"]["data_offsets"][0]
    (tmp_path / "x").write_bytes(join(header, data[:start] + b"\x02" + data[start + 1 :]))
    with pytest.raises(export.FormatError, match="bytes other than 0 and 1"):
        export.load_params(tmp_path / "x")


def test_signing_again_is_what_the_other_tests_take_it_for(tmp_path, originals):
    (tmp_path / "x").write_bytes(join(*split(originals["params"])))
    assert load("params", tmp_path / "x")["dense/kernel"].endswith(
        params()["dense"]["kernel"].tobytes()
    )


# --- mutations ------------------------------------------------------------------------------------------------------


def damage(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes of the kinds that disks, networks and people make."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        n = len(raw)
        at, length = rng.randrange(n + 1), rng.choice([1, 1, 2, 8, 64, 512])
        # Half of the time within the header, which is where a change can be subtle.
        at = (
            rng.randrange(min(n, 8 + int.from_bytes(raw[:8], "little") % (n + 1)) + 1)
            if rng.random() < 0.5
            else at
        )
        piece = raw[at : at + length]
        match rng.randrange(8):
            case 0 if at < n:
                raw = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
            case 1:
                raw = raw[:at]
            case 2:
                raw = raw[:at] + raw[at + length :]
            case 3:
                raw = raw[:at] + piece + raw[at:]
            case 4:
                raw = raw[:at] + rng.randbytes(len(piece)) + raw[at + length :]
            case 5:
                raw = raw[:at] + bytes(len(piece)) + raw[at + length :]
            case 6:
                other = rng.randrange(n + 1)
                raw = raw[:at] + raw[other : other + length] + raw[at + length :]
            case 7:
                raw = (
                    raw[:at]
                    + rng.choice([b"0", b"9", b'"', b"{", b"[", b",", b"-", b"e9"])
                    + raw[at:]
                )
    return raw


def tamper(raw: bytes, rng: random.Random) -> bytes:
    """A change by someone who knows the format, and signs it again."""
    header, data = split(raw)
    metadata = header["__metadata__"]
    table = json.loads(metadata["prunax.leaves"])
    names = list(table)
    numbers = [0, 1, -1, 2, 3, 8, 2**31, 2**63, 2**64, 1.5, None, True, "1", [], rng.randrange(100)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        name, other, number = rng.choice(names), rng.choice(names), rng.choice(numbers)
        entry = header.get(name)
        match rng.randrange(9):
            case 0:
                table[name][rng.randrange(3)] = rng.choice(table[other])
            case 1:
                table[name][2] = [*table[name][2][1:], number]
            case 2:
                table[name][1] = rng.choice(
                    ["float64", "int4", "object", "O", "bool", "V8", "complex128"]
                )
            case 3 if entry:
                entry["shape"] = [*entry["shape"][1:], number]
            case 4 if entry:
                entry["data_offsets"] = rng.choice(
                    [entry["data_offsets"][::-1], [0, number], [number, len(data)]]
                )
            case 5 if entry:
                entry["dtype"] = rng.choice([*_container.DTYPES, "F4", "X", None])
            case 6 if entry and other in header:
                header[name], header[other] = header[other], header[name]
            case 7:
                at = rng.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 8:
                key = rng.choice([k for k in metadata if k != "prunax.sha256"])
                metadata[key] = rng.choice(["", "params", "masks", "{}", "[]", "null", "2", "\x00"])
                if key == "prunax.leaves":
                    return join(header, data)
    metadata["prunax.leaves"] = json.dumps(table)
    return join(header, data)


def test_mutations(tmp_path, originals):
    """Damage is found; tampering makes an error or another valid file, and nothing but a `FormatError` comes out."""
    file = tmp_path / "x"
    true = {}
    for kind, raw in originals.items():
        file.write_bytes(raw)
        true[kind] = load(kind, file)
    found = {"same": 0, "refused": 0, "another": 0}
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        kind = rng.choice(["params", "masks"])
        signed = rng.random() < 0.3
        raw = (tamper if signed else damage)(originals[kind], rng)
        file.write_bytes(raw)
        try:
            loaded = load(kind, file)
        except export.FormatError as error:
            assert str(file) in str(error)  # noqa: PT017, most files raise, some do not
            found["refused"] += 1
        except ValueError as error:
            # A valid file, of another tree than the one that is asked for.
            assert signed and str(error).startswith("load_masks"), seed  # noqa: PT017
            found["refused"] += 1
        else:
            assert loaded == true[kind] or signed, (
                f"seed {seed}: a damaged file was read as if it were whole"
            )
            found["same" if loaded == true[kind] else "another"] += 1
    print(found)
    assert found["refused"] > 0.8 * MUTATIONS
    assert os.listdir(tmp_path) == ["x"]


def test_mutations_of_plain_files(tmp_path):
    """Files without a checksum: their structure is checked, so that whatever is read has the size that it claims."""
    flat = {"a": np.ones((3, 4), np.float32), "b": np.arange(5), "c": np.array([True])}
    raw = safetensors.numpy.save(flat, {"format": "pt"})
    for seed in range(MUTATIONS // 4):
        rng = random.Random(seed)
        (tmp_path / "x").write_bytes(damage(raw, rng))
        try:
            with _store.ArrayReader(tmp_path / "x") as reader:
                for name, stored in reader.leaves.items():
                    array = reader.read(name)
                    assert (array.dtype.name, array.shape) == (stored.dtype, stored.shape)
        except export.FormatError:
            continue
