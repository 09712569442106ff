"""What each command does.

A command takes the parsed options, the open files, and consoles for output and errors. It returns the exit code.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from prunax.cli import choices, looking, pruning
from prunax.cli.sources import (
    OrbaxSource,
    SafetensorsSource,
    UsageError,
    is_orbax,
    printable,
)
from prunax.report import LeafSummary, Summary

__all__: list[str] = []

Source = SafetensorsSource | OrbaxSource
OK, DIFFERENT = 0, 1


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, and no break where the window ends."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def inspect(args: argparse.Namespace, source: Source, out: Console, err: Console) -> int:
    with _progress(err, "reading", source) as step:
        looked = list(looking.look(source, step))
    if args.json:
        out.print_json(
            json.dumps({"metadata": _shown(source), "tensors": [x.to_dict() for x in looked]})
        )
    else:
        table = Table("tensor", "dtype", "shape", box=None, pad_edge=False)
        table.columns[0].overflow = "fold"
        for heading in ("sparsity", "N:M"):
            table.add_column(heading, justify="right")
        for x in looked:
            t = x.tensor
            sparsity = "?" if x.zeros is None else f"{x.sparsity:.2%}" if x.zeros else "-"
            shape = " x ".join(map(str, t.shape)) or "scalar"
            table.add_row(_cell(t.name), _cell(t.dtype_name), shape, sparsity, ", ".join(x.nm))
        out.print(table)
        _print_totals(out, source, looked)
    if args.pattern is None:
        return OK
    chosen, rule = choices.select(list(source.tensors.values()), args.where, args.exclude)
    pattern, _ = choices.fit(args.pattern, args.layout, chosen)
    problems = [looking.follows(source.read(t.name), pattern, t.name) for t in chosen]
    broken = [problem for problem in problems if problem]
    for problem in broken:
        say(err, printable(problem))
    say(err, f"{len(chosen) - len(broken)} of {len(chosen)} tensors follow {pattern} ({rule}).")
    return DIFFERENT if broken else OK


def prune(args: argparse.Namespace, source: Source, out: Console, err: Console) -> int:
    _check_out(args)
    to_orbax = is_orbax(args.out)
    if to_orbax and args.compress:
        raise UsageError(
            "--compress writes safetensors files. Name the output so: OUT.safetensors."
        )
    if isinstance(source, SafetensorsSource) and source.kind == "masks":
        raise UsageError(f"{source.path} holds masks, which cannot be pruned.")
    if to_orbax and args.out.exists() and args.out.samefile(source.path):
        raise UsageError("a checkpoint folder cannot be written over itself. Name another one.")
    chosen, rule = choices.select(list(source.tensors.values()), args.where, args.exclude)
    pattern, layout = choices.fit(args.pattern, args.layout, chosen)
    if args.sparsity is None and pattern.max_sparsity is None:
        raise UsageError(
            "how much? Pass --sparsity 0.5, or a pattern that says it (--pattern 2:4)."
        )
    allocation = choices.ALLOCATIONS[args.allocation]
    request = pruning.Request(chosen, pattern, args.sparsity, allocation)
    weights, total = sum(t.size for t in chosen), sum(t.size for t in source.tensors.values())
    number = f"{len(chosen)} of {len(source.tensors)} tensors, {weights:,} of {total:,} numbers"
    what = choices.describe(pattern, layout, args.sparsity)
    say(out, f"prunes    {what}; allocation: {args.allocation}")
    say(out, f"chosen    {number}: {rule}")
    if args.dry_run:
        for t in chosen:
            say(out, f"  {printable(t.name)}  {' x '.join(map(str, t.shape))}")
        return OK
    with _progress(err, "pruning", source) as step:
        result = pruning.prune(
            source,
            args.out,
            request,
            compress=args.compress,
            to_orbax=to_orbax,
            overwrite=args.overwrite,
            step=step,
        )
    say(
        out,
        f"kept      {result.kept:,} of {result.weights:,} weights: "
        f"sparsity {1 - result.kept / max(result.weights, 1):.4%}",
    )
    _say_written(out, source, args.out)
    return OK


def convert(args: argparse.Namespace, source: Source, out: Console, err: Console) -> int:
    _check_out(args)
    if isinstance(source, SafetensorsSource) and source.kind == "masks":
        raise UsageError(f"{source.path} holds masks, which stay as they are.")
    with _progress(err, "writing", source) as step:
        pruning.convert(
            source, args.out, compress=args.compress, overwrite=args.overwrite, step=step
        )
    _say_written(out, source, args.out)
    return OK


def diff(
    args: argparse.Namespace, first: Source, second: Source, out: Console, err: Console
) -> int:
    with _progress(err, "comparing", first) as step:
        found = list(looking.compare(first, second, step))
    differences = [d for d in found if d.what != "same"]
    if args.json:
        out.print_json(json.dumps([d._asdict() for d in differences], default=str))
        return DIFFERENT if differences else OK
    if differences:
        table = Table("tensor", "differs in", box=None, pad_edge=False)
        table.columns[0].overflow = "fold"
        for heading in ("changed", "largest", "sparsity", "now zero", "was zero", "overlap"):
            table.add_column(heading, justify="right")
        for d in differences:
            cells = [""] * 6
            if d.what == "values":
                a, b = d.sparsities
                cells = [f"{d.changed:,}", f"{d.largest:.3g}", f"{a:.2%} -> {b:.2%}"]
                cells += [f"{d.pruned:,}", f"{d.revived:,}", f"{d.overlap:.2%}"]
            table.add_row(_cell(d.name), d.what, *cells)
        out.print(table)
    say(out, f"{len(differences)} of {len(found)} tensors differ")
    return DIFFERENT if differences else OK


def report(args: argparse.Namespace, source: Source, out: Console, err: Console) -> int:
    if args.out is not None:
        _check_out(args)
    with _progress(err, "reading", source) as step:
        looked = list(looking.look(source, step))
    chosen = {
        t.name for t in choices.select(list(source.tensors.values()), args.where, args.exclude)[0]
    }
    leaves = [
        LeafSummary(
            x.tensor.name if args.format == "json" else _cell(x.tensor.name),
            x.tensor.shape,
            x.tensor.dtype_name,
            x.tensor.size,
            x.tensor.size - (x.zeros or 0 if x.tensor.name in chosen else 0),
            x.tensor.name in chosen,
        )
        for x in looked
    ]
    summary = Summary(tuple(leaves))
    if args.format == "json":
        text = json.dumps(summary.to_dict() | {"metadata": _shown(source)}, indent=1)
    else:
        text = _markdown(source, summary, looked) if args.format == "markdown" else None
    if args.out is not None:
        if text is None:
            raise UsageError("--out wants --format markdown or json.")
        args.out.write_text(text + "\n", encoding="utf-8")
        say(err, f"written   {args.out}")
    elif text is not None:
        say(out, text)
    else:
        out.print(summary)
        _print_totals(out, source, looked)
    return OK


# --- what they share ------------------------------------------------------------------------------------------------


def _check_out(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.overwrite:
        raise UsageError(f"{args.out} exists already. Choose another name, or pass --overwrite.")
    if not args.out.absolute().parent.is_dir():
        raise UsageError(f"the folder {args.out.absolute().parent} does not exist.")


def _cell(text: str) -> str:
    """A text from a file for a table, where brackets would be markup."""
    return escape(printable(text))


def _shown(source: Source) -> dict[str, str]:
    hidden = ("prunax.leaves", "prunax.sha256")
    return {key: text for key, text in source.metadata.items() if key not in hidden}


def _print_totals(out: Console, source: Source, looked: Sequence[looking.Looked]) -> None:
    size = sum(x.tensor.size for x in looked)
    zeros = sum(x.zeros or 0 for x in looked)
    compressed = sum(x.compressed for x in looked)
    plain = looking.total_bytes(looked)
    lines = [
        f"{len(looked)} tensors, {size:,} numbers, {zeros / max(size, 1):.2%} of them zero",
        f"{source.nbytes:,} bytes on the disk; {plain:,} plain, {compressed:,} compressed "
        f"({compressed / max(plain, 1):.2f}x)",
        *(f"{printable(key)}: {printable(text)}" for key, text in _shown(source).items()),
    ]
    for line in lines:
        say(out, line)


def _say_written(out: Console, source: Source, path: Path) -> None:
    size = (
        sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
    ratio = size / max(source.nbytes, 1)
    say(out, f"written   {path}, {size:,} bytes, {ratio:.3f} times the input's {source.nbytes:,}")


def _markdown(source: Source, summary: Summary, looked: Sequence[looking.Looked]) -> str:
    plain, compressed = looking.total_bytes(looked), sum(x.compressed for x in looked)
    rows = [
        f"| {leaf.path} | {' x '.join(map(str, leaf.shape)) or 'scalar'} | {leaf.dtype} | "
        f"{leaf.weights:,} | {leaf.kept:,} | {f'{leaf.sparsity:.2%}' if leaf.prunable else '-'} | {', '.join(x.nm)} |"
        for leaf, x in zip(summary.leaves, looked, strict=True)
    ]
    return "\n".join(
        [
            f"# {source.path.name}",
            "",
            f"- Prunable: {summary.kept:,} of {summary.weights:,} weights kept, sparsity {summary.sparsity:.2%}.",
            f"- All: {summary.parameters_kept:,} of {summary.parameters:,}.",
            f"- {plain:,} bytes plain, {compressed:,} compressed ({compressed / max(plain, 1):.2f}x).",
            *(f"- `{key}`: {text}" for key, text in _shown(source).items()),
            "",
            "| tensor | shape | dtype | weights | kept | sparsity | N:M |",
            "| --- | --- | --- | ---: | ---: | ---: | --- |",
            *rows,
        ]
    )


class _progress:
    """A bar on the error stream, where that is a terminal. Entered, it is the function that advances it."""

    def __init__(self, err: Console, verb: str, source: Source) -> None:
        columns = [
            TextColumn(verb),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        ]
        self._bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._task = self._bar.add_task("", total=len(source.tensors))

    def __enter__(self) -> Callable[[str], None]:
        self._bar.start()
        return lambda name: self._bar.update(self._task, advance=1, description=_cell(name))

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
