"""Indices of checkpoints as nobody should write them, and what is said of each."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from prunax import export


def load(folder: Path) -> dict[str, np.ndarray]:
    """All shards, by the reference library."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def last(index: dict[str, Any]) -> str:
    return max(index["weight_map"])


def renamed(index: dict[str, Any], shard: Any) -> None:
    index["weight_map"][last(index)] = shard


def first_shard(index: dict[str, Any]) -> str:
    return min(index["weight_map"].values())


INDICES: dict[str, tuple[Any, str]] = {
    "text": (lambda i, f: "hello", "cannot be parsed"),
    "nested": (lambda i, f: "[" * 100_000, "nested too deep"),
    "list": (lambda i, f: [], "must hold a JSON object"),
    "name twice": (lambda i, f: '{"weight_map": {"a": "x", "a": "y"}}', "'a' appears twice"),
    "no map": (lambda i, f: {"metadata": {}}, "must have a weight_map"),
    "empty map": (lambda i, f: {"weight_map": {}}, "must have a weight_map"),
    "map of lists": (lambda i, f: renamed(i, ["x"]), "which is no safetensors file"),
    "another suffix": (lambda i, f: renamed(i, "model.bin"), "which is no safetensors file"),
    "parent": (lambda i, f: renamed(i, "../x.safetensors"), "is not a file of this folder"),
    "absolute": (lambda i, f: renamed(i, "/x.safetensors"), "is not a file of this folder"),
    "windows": (lambda i, f: renamed(i, "c:\\x.safetensors"), "is not a file of this folder"),
    "dot": (lambda i, f: renamed(i, "./" + first_shard(i)), "is not a file of this folder"),
    "terminal": (lambda i, f: renamed(i, "\x1b[2J.safetensors"), "which is no safetensors file"),
    "missing shard": (lambda i, f: renamed(i, "x.safetensors"), "names the shard 'x.safetensors'"),
    "folder as shard": (
        lambda i, f: (renamed(i, "d.safetensors"), (f / "d.safetensors").mkdir())[0],
        "names the shard 'd.safetensors'",
    ),
    "shard under two names": (
        lambda i, f: (
            renamed(i, "y.safetensors"),
            os.link(f / first_shard(i), f / "y.safetensors"),
        )[0],
        "are one file",
    ),
    "tensor in two shards": (
        lambda i, f: safetensors.numpy.save_file(load(f), f / first_shard(i)),
        "is in two shards",
    ),
    "tensor elsewhere": (
        lambda i, f: renamed(
            i,
            next(x for x in i["weight_map"].values() if x != i["weight_map"][last(i)]),
        ),
        "where it is not",
    ),
    "tensor missing": (
        lambda i, f: i["weight_map"].update({"ghost": first_shard(i)}),
        "says that 'ghost' is in",
    ),
    "tensor not named": (
        lambda i, f: i["weight_map"].pop(last(i)) and None,
        "does not name",
    ),
    "size that lies": (lambda i, f: i["metadata"].update(total_size=7), "claims 7 bytes"),
    "size of another type": (lambda i, f: i["metadata"].update(total_size="7"), "claims '7' bytes"),
    "shard cut short": (
        lambda i, f: (
            (f / first_shard(i)).write_bytes((f / first_shard(i)).read_bytes()[:-1]) and None
        ),
        "is not a valid safetensors file",
    ),
    "compressed shard": (
        lambda i, f: (
            os.remove(f / first_shard(i)),
            export.save_params(f / first_shard(i), {"a": np.ones(2)}),
        )[1],
        "never one of several shards",
    ),
}


def change(model: Path, case: str) -> str:
    """Makes a folder of shards hostile; what will be said of it."""
    make, problem = INDICES[case]
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    changed = make(index, model)
    changed = index if changed is None else changed
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    return problem
