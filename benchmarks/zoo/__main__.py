"""Prunes networks that others wrote: half of every group of channels, and half of every layer by Wanda.

Each network is built and pruned in a process of its own, for at most so many seconds of CPU. Each result is written as
soon as it is there, and the same command goes on where it stopped; `--again` repeats the failed ones.
"""

import argparse
import collections
import contextlib
import fnmatch
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console

from benchmarks import harness, zoo
from benchmarks.zoo.examine import SPARSITY, TOLERANCE, Record

EXAMPLES = """\
examples:
  python -m benchmarks.zoo --only "haiku/*" "keras/VGG*"
  python -m benchmarks.zoo --out benchmarks/results
"""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "jax",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    # Only correctness counts, and compilation is most of the time.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
ROOT = Path(__file__).parents[2]
PACKAGES = """
    keras transformers dm-haiku equimo eqxvision flowjax jraph flaxmodels equinox gemma google-tunix
""".split()
PATIENCE = 20  # so many seconds on the clock for each of CPU, where the machine has other work


def run(name: str, limit: int) -> Record:
    """Examines one network in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.zoo.examine", name, str(limit)]
    record: Record = {"name": name}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE * limit,
            env=os.environ | ENVIRONMENT,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired:
        return record | {"failed": f"took more than {PATIENCE * limit} s"}
    if done.returncode == -signal.SIGXCPU:
        return record | {"failed": f"took more than {limit} s of CPU"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-20:]
        named = [line for line in last if re.match(r"\w[\w.]*(Error|Exception)\b", line)]
        return record | {"failed": f"cannot be built: {(named or last)[-1][:300]}"}
    return record | json.loads(done.stdout.splitlines()[-1])


def is_right(record: Record) -> bool:
    """Whether the network is half as wide, and equals the whole one with the removed units at zero."""
    return (
        record.get("pruned") == "passed"
        and record["finite"]
        and record["difference"] <= TOLERANCE
        and record["left"] < 1
    )


def is_calibrated(record: Record) -> bool:
    """Whether Wanda came to half of every layer."""
    return record.get("wanda") == "passed"


def is_wrong(record: Record) -> bool:
    """Whether something came out that is not what it should be, which is worse than an error."""
    return record.get("pruned") == "passed" and not is_right(record)


def left_whole(record: Record) -> list[tuple[str, str]]:
    """What Wanda left whole, as its warning says: the kind of leaves, and their share of the parameters."""
    return re.findall(r"(?:: |; )([\w ]+) \(([\d.]+%) of the parameters", " ".join(record["whole"]))


def reasons(record: Record) -> list[tuple[str, str]]:
    """What failed and why, in one line each."""
    if "failed" in record:
        return [("all", record["failed"])]
    found = []
    if record["pruned"] != "passed":
        found.append(("channels", record["pruned"]))
    elif is_wrong(record):
        what = "differs by" if record["finite"] else "is not finite, and differs by"
        found.append(("channels", f"the output {what} {record['difference']:.1e}"))
    if not is_calibrated(record):
        found.append(("Wanda", record["wanda"]))
    return found


def models_table(content: Mapping[str, Any]) -> harness.Table:
    """A row a network."""
    columns = (
        "network",
        "parameters",
        "may shrink",
        "left",
        "seconds",
        "difference",
        "equal",
        "Wanda",
        "left whole",
    )
    rows = []
    for r in content["records"]:
        if "failed" in r:
            rows.append((r["name"], *[""] * 5, "failed", "failed", ""))
            continue
        pruned = r["pruned"] == "passed"
        rows.append(
            (
                r["name"],
                f"{r['parameters']:,}",
                f"{r['prunable']:.0%}" if pruned else "",
                f"{r['left']:.0%}" if pruned else "",
                f"{r['seconds to prune']:.1f}" if pruned else "",
                f"{r['difference']:.0e}" if pruned else "",
                "yes" if is_right(r) else "no" if pruned else "refused",
                "passed" if is_calibrated(r) else "refused",
                "; ".join(f"{share} {kind}" for kind, share in left_whole(r)),
            )
        )
    title = f"Half of every group and layer removed: {len(rows)} networks"
    return harness.Table(columns, rows, title=title)


def sources_table(content: Mapping[str, Any]) -> harness.Table:
    """A row a source."""
    by_source: dict[str, list[Record]] = collections.defaultdict(list)
    for record in content["records"]:
        by_source[record["name"].partition("/")[0]].append(record)
    by_source["all"] = content["records"]
    rows = []
    for source, records in by_source.items():
        seconds = sorted(r["seconds to prune"] for r in records if "seconds to prune" in r)
        rows.append(
            (
                source,
                str(len(records)),
                str(sum(map(is_right, records))),
                str(sum(map(is_wrong, records))),
                f"{seconds[len(seconds) // 2]:.1f}" if seconds else "",
                str(sum(map(is_calibrated, records))),
                str(sum(is_calibrated(r) and bool(r["whole"]) for r in records)),
            )
        )
    columns = (
        "source",
        "networks",
        "pruned, equal",
        "wrong",
        "seconds",
        "Wanda",
        "with leaves left whole",
    )
    return harness.Table(columns, rows, title="Networks by source")


def failures_table(content: Mapping[str, Any]) -> harness.Table:
    """Failures by cause: the first clause of what was said, without the leaf's name."""
    causes: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for record in content["records"]:
        for what, why in reasons(record):
            clause = re.split(r"; |\. |:?\n", why)[0]
            causes[what, re.sub(r"'[^']+' is", "a leaf is", clause)].append(record["name"])
    rows = [
        (why.replace("|", "/"), what, str(len(names)), ", ".join(names))
        for (what, why), names in sorted(causes.items(), key=lambda item: -len(item[1]))
    ]
    return harness.Table(("cause", "of", "networks", "which"), rows, title="Failures by cause")


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    return {
        "zoo": sources_table(content),
        "zoo/networks": models_table(content),
        "zoo/failures": failures_table(content),
    }


def versions() -> dict[str, str]:
    """The versions of the sources that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class Results(harness.Results):
    """The results file, networks in the order of the sources."""

    def __init__(self, file: Path, order: Sequence[str]) -> None:
        settings = {"sparsity": SPARSITY, "tolerance": TOLERANCE}
        super().__init__(file, settings, "python -m benchmarks.zoo", ["name"])
        self.order = order
        before = json.loads(file.read_text())["environment"] if file.is_file() else {}
        self.packages: dict[str, str] = before.get("packages", {})

    @property
    def content(self) -> dict[str, Any]:
        self.records.sort(key=lambda record: self.order.index(record["name"]))
        content = super().content
        environment = content["environment"]
        # Sources may be installed in several environments, whose runs go on in one file.
        environment["packages"] = self.packages | versions() | environment["packages"]
        return content


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 2 and one line on a bad argument."""
    parser = _parser()
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    sources = dict.fromkeys([*zoo.SOURCES, *args.sources])
    order = [f"{source}/{name}" for source in sources for name in zoo.networks(source)]
    chosen = [
        name
        for name in order
        if name.partition("/")[0] in args.sources
        and any(fnmatch.fnmatchcase(name, glob) for glob in args.only)
    ]
    if not chosen:
        parser.error(f"no network is named like {' or '.join(args.only)}.")
    if args.list:
        print(*chosen, sep="\n")
        return
    console = rich.console.Console()
    file = args.out / "zoo.json"
    results = Results(file, order)
    missing: dict[str, str] = {}
    with harness.progress(console) as progress:
        task = progress.add_task("zoo", total=len(chosen), note="")
        for name in chosen:
            progress.update(task, note=name)
            old = results.find(name)
            if old is None or args.all or (args.again and reasons(old)):
                record = run(name, args.limit_seconds)
                if "missing" in record:
                    missing[name.partition("/")[0]] = record["missing"]
                else:
                    results.add(record)
            progress.advance(task)
    for source, why in missing.items():
        console.print(f"Left out {source}, which the extra zoo brings: {why}", markup=False)
    if not results.records:
        parser.error("no network was pruned.")
    head = f"Networks that others wrote\n\nWritten by `{results.command}`."
    harness.publish(file, head, results.content, tables, console)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("zoo", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], metavar="GLOB", help='of names: "keras/*" (all)')
    add("--sources", nargs="+", default=zoo.SOURCES, help="also my.module with NETWORKS (all here)")
    add("--limit-seconds", type=int, default=60, help="of CPU for each network, once built (60)")
    add("--again", action="store_true", help="repeat those that failed")
    add("--all", action="store_true", help="repeat all")
    add("--list", action="store_true", help="name the networks and stop")
    return parser


if __name__ == "__main__":
    main()
