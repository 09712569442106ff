"""How far each job is from what the machine allows: bytes that must be read, or operations that must be done.

Runs nothing: limits and figures are taken from the results of the other scripts, from the same run each.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

Row = tuple[str, float, float, str]  # job, seconds of the limit, seconds found, peers
INDEX_BYTES = 4  # beside each kept weight of four bytes, where single weights are packed


def tables(results: Path) -> dict[str, harness.Table]:
    """The tables of all results that a folder has."""
    made = {}
    for name, job in JOBS.items():
        file = results / f"{name}.json"
        if file.is_file():
            made[f"limits/{name}"] = _table(job(json.loads(file.read_text())))
    selection = results / "selection.json"
    if selection.is_file():
        made["limits/size"] = _growth(json.loads(selection.read_text()))
    return made


def _table(rows: Sequence[Row]) -> harness.Table:
    """Peers stand where there are any."""
    peers = any(row[-1] for row in rows)
    columns = "job", *(["peers"] if peers else []), "at least", "found", "ratio"
    cells = [
        (what, *([others] if peers else []), _time(least), _time(found), f"{found / least:.2f}")
        for what, least, found, others in rows
    ]
    return harness.Table(columns, cells, text=2 if peers else 1)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _selection(content: Mapping[str, Any]) -> Sequence[Row]:
    rows = []
    for size in (10_000_000, 100_000_000):
        for sparsity in (0.5, 0.9, 0.99):
            seconds = _seconds(content, size, sparsity)
            peers = [
                f"{name} {_time(seconds[name])}"
                for name in ("numpy.partition", "torch.topk", "argsort")
                if name in seconds
            ]
            what = f"masks of {size // 1_000_000} M weights at {sparsity:.0%}"
            least = seconds["one read (max)"]
            rows.append((what, least, seconds["prunax"], ", ".join(peers)))
    return rows


def _seconds(content: Mapping[str, Any], size: int, sparsity: float) -> Mapping[str, float]:
    key = ("normal", size, sparsity)
    return next(
        r["seconds"] for r in content["results"] if (r["input"], r["size"], r["sparsity"]) == key
    )


def _growth(content: Mapping[str, Any]) -> harness.Table:
    sizes = sorted({r["size"] for r in content["results"] if r["input"] == "normal"})
    rows = []
    for size in sizes:
        found = {s: _seconds(content, size, s) for s in (0.5, 0.9, 0.99)}
        per_weight = [1e9 * found[s]["prunax"] / size for s in found]
        rows.append((f"{size:,}", *(f"{n:.2f}" for n in per_weight)))
    return harness.Table(("weights", "50%, ns a weight", "90%", "99%"), rows)


def _overhead(content: Mapping[str, Any]) -> Sequence[Row]:
    rows = []
    for kind, names in content["results"].items():
        for name, seconds in names["seconds"].items():
            if name != "dense":
                steps = names["steps"]
                dense = names["seconds"]["dense"] / steps
                rows.append((f"{kind}: {name}", dense, seconds / steps, ""))
    return rows


def _structured(content: Mapping[str, Any]) -> Sequence[Row]:
    rows = []
    for name in dict.fromkeys(r["network"] for r in content["rows"]):
        dense, *smaller = (r for r in content["rows"] if r["network"] == name)
        for r in smaller:
            share = r["flops"] / dense["flops"]
            for kind, batch in (("single", "one image"), ("batched", "a batch")):
                what = f"{name} at {share:.0%} of its operations, {batch}"
                rows.append((what, share * dense[kind], r[kind], ""))
    return rows


def _packed(content: Mapping[str, Any]) -> Sequence[Row]:
    rows = []
    for r in content["results"]:
        if (r["shape"], r["batch"], r["pattern"].endswith("even")) != ([4096, 4096], 1, False):
            continue
        blocks = r["pattern"].startswith("Block")
        share = (1 - r["sparsity"]) * (1 if blocks else 1 + INDEX_BYTES / 4)
        what = f"{r['pattern']} at {r['sparsity']:.0%}"
        rows.append((what, share * r["seconds"]["dense"], r["seconds"]["packed"], ""))
    return rows


JOBS = {
    "selection": _selection,
    "overhead": _overhead,
    "structured": _structured,
    "packed": _packed,
}
