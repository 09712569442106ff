"""What every benchmark shares: where it ran, tables, progress, files, and fair timing."""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import rich.console
import rich.progress
import rich.table

import prunax

OUT = Path(__file__).parent / "out"
PACKAGES = "jax jaxlib flax optax numpy torch scikit-learn tensorflow-datasets grain".split()


class Table(NamedTuple):
    """Rows of text under columns: prints as a rich table, and turns into Markdown.

    Attributes:
        title: above the table.
        columns: the headings. The first column is aligned left, the others right.
        rows: one text for each column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, and its folder where needed. The file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".part")
    written.write_text(json.dumps(content, indent=1) + "\n")
    written.replace(path)


def write_markdown(file: Path, head: str, tables: Iterable[Table]) -> None:
    """Writes tables under a heading, and what more `head` says, into the Markdown file beside a JSON file."""
    texts = [f"## {table.title}\n\n{table.markdown()}\n" for table in tables]
    file.with_suffix(".md").write_text("\n".join([f"# {head}\n", *texts]))


def publish(file: Path, head: str, tables: Iterable[Table], console: rich.console.Console) -> None:
    """Prints tables, and writes them as Markdown beside the JSON file that they are made of."""
    tables = list(tables)
    write_markdown(file, head, tables)
    console.print(*tables)
    console.print(f"Figures: {file.with_suffix('.*')}", soft_wrap=True, highlight=False)


def progress(console: rich.console.Console) -> rich.progress.Progress:
    """A progress bar with the time that is left, and room for a note (`note=""`)."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[note]}"),
        console=console,
    )


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


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
