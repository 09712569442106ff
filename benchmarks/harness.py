"""What every benchmark shares: its command line, where it ran, files, progress, and fair timing."""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console

import prunax
from prunax import _progress
from prunax.reports import Table

OUT = Path(__file__).parent / "out"
progress = _progress.bars
PACKAGES = "jax jaxlib flax optax numpy torch scikit-learn tensorflow-datasets grain".split()


def environment() -> dict[str, Any]:
    """The versions and the hardware that figures depend on, without names of machines or folders."""
    versions = {"prunax": prunax.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "devices": [f"{devices[0].platform}: {devices[0].device_kind}"] * len(devices),
    }


def parser(name: str, about: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a benchmark: its name, its module's text, examples, and where results go."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--out", type=Path, default=OUT, help="folder of the results (benchmarks/out)"
    )
    return made


def content(command: str, **figures: Any) -> dict[str, Any]:
    """What a results file holds: the command that made it, the machine, and the figures."""
    return {"command": command, "environment": environment(), **figures}


def spread(values: Sequence[float], form: str = ".2f", scale: float = 100) -> str:
    """Mean, and standard deviation where there are several, of shares in percent."""
    points = [scale * v for v in values]
    mean = format(statistics.mean(points), form)
    if len(points) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(points), form.lstrip('+'))}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, and its folder where needed. The file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".part")
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(path)


class Results:
    """A results file of records: what is done, and settings that must stay the same for it to go on.

    Args:
        path: the file, read where it is there.
        settings: what all records have in common.
        command: that makes it.
        key: which of a record's values tell it from the others.

    Raises:
        ValueError: the file holds results of other settings.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], command: str, key: Sequence[str]
    ) -> None:
        self.path, self.command, self.key = path, command, tuple(key)
        self.settings = json.loads(json.dumps(settings))
        self.records: list[dict[str, Any]] = []
        if path.is_file():
            before = json.loads(path.read_text())
            if before["settings"] != self.settings:
                different = [k for k, v in self.settings.items() if before["settings"].get(k) != v]
                raise ValueError(
                    f"{path} holds results of other settings ({', '.join(different)}). "
                    "Pass another --out, or move it away."
                )
            self.records = before["records"]

    def _of(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in self.key)

    def find(self, *key: Any) -> dict[str, Any] | None:
        """The record of a key."""
        return next((r for r in self.records if self._of(r) == key), None)

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return content(self.command, settings=self.settings, records=self.records)

    def add(self, *records: dict[str, Any]) -> None:
        """Takes in records, in the place of those of the same key, and writes the file."""
        for new in records:
            self.records = [r for r in self.records if self._of(r) != self._of(new)] + [new]
        write_json(self.path, self.content)


def write_markdown(file: Path, head: str, tables: Iterable[Table]) -> None:
    """Writes tables under a heading, and what more `head` says, into the Markdown file beside a JSON file."""
    texts = [f"## {table.title}\n\n{table.markdown()}\n" for table in tables]
    file.with_suffix(".md").write_text("\n".join([f"# {head}\n", *texts]))


def publish(
    file: Path,
    head: str,
    content: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], Mapping[str, Table]],
    console: rich.console.Console,
) -> None:
    """Writes a JSON file and, beside it, what `make` makes of it as Markdown under a heading; prints the tables."""
    write_json(file, content)
    tables = list(make(content).values())
    write_markdown(file, head, tables)
    console.print(*tables)
    console.print(f"Figures: {file.with_suffix('.*')}", soft_wrap=True, highlight=False)


def median_seconds(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 20
) -> dict[str, float]:
    """Times functions side by side.

    They take turns, so that a slow moment of the machine falls on all of them.

    Args:
        functions: what to time, by name. Each is called once before, to compile.
        repeats: timed calls of each.

    Returns:
        The median of each, in seconds, results ready on the device.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int | None]]:
    """Measures the most memory used inside the block, above that at its start. Linux only."""
    gc.collect()
    before, peak = _resident("VmRSS"), [None]
    if before is not None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    yield peak
    after = _resident("VmHWM")
    peak[0] = None if before is None or after is None else after - before


@contextlib.contextmanager
def compile_seconds() -> Iterator[list[float]]:
    """Measures the seconds that XLA compiles inside the block, all programs together."""
    seconds = [0.0]

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds[0] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(sizes[0]) * 1024 if sizes else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
