"""What each command does.

A command takes the parsed options, the open files, and consoles for output and errors. It returns the exit code.
"""

import argparse
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from prunax.cli import choices, looking, pruning
from prunax.cli.sources import (
    OrbaxSource,
    SafetensorsSource,
    UsageError,
    is_orbax,
    printable,
)
from prunax.export.store import readable
from prunax.reports._summary import LeafSummary, Summary
from prunax.reports._tables import Table

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
            json.dumps(
                {"metadata": readable(source.metadata), "tensors": [x.to_dict() for x in looked]}
            )
        )
    else:
        rows = [
            (
                printable(x.tensor.name),
                printable(x.tensor.dtype_name),
                " x ".join(map(str, x.tensor.shape)) or "scalar",
                "?" if x.zeros is None else f"{x.sparsity:.2%}" if x.zeros else "-",
                ", ".join(x.nm),
            )
            for x in looked
        ]
        out.print(Table(("tensor", "dtype", "shape", "sparsity", "N:M"), rows, text=3))
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
        numbers = ("changed", "largest", "sparsity", "now zero", "was zero", "overlap")
        rows = [(printable(d.name), d.what, *_numbers(d)) for d in differences]
        out.print(Table(("tensor", "differs in", *numbers), rows, text=2))
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
    summary = Summary(
        tuple(
            LeafSummary(
                x.tensor.name if args.format == "json" else printable(x.tensor.name),
                x.tensor.shape,
                x.tensor.dtype_name,
                x.tensor.size,
                x.tensor.size - (x.zeros or 0 if x.tensor.name in chosen else 0),
                x.tensor.name in chosen,
            )
            for x in looked
        )
    )
    title, facts = printable(source.path.name), _totals(source, looked)
    match args.format:
        case "json":
            text = json.dumps(summary.to_dict() | {"metadata": readable(source.metadata)}, indent=1)
        case "markdown":
            lines = "\n".join(f"- {fact}" for fact in facts)
            text = f"# {title}\n\n{lines}\n\n{summary.to_markdown()}"
        case "html":
            lines = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
            title = html.escape(title)
            text = (
                f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
                f"<body><h1>{title}</h1><ul>{lines}</ul>{summary.table().html()}</body></html>"
            )
        case _:
            text = str(summary.table()) if args.out else None
    if text is None:
        out.print(summary)
        _print_totals(out, source, looked)
    elif args.out is None:
        say(out, text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
        say(err, f"written   {args.out}")
    return OK


# --- what they share ------------------------------------------------------------------------------------------------


def _check_out(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.overwrite:
        raise UsageError(f"{args.out} exists already. Choose another name, or pass --overwrite.")
    if not args.out.absolute().parent.is_dir():
        raise UsageError(f"the folder {args.out.absolute().parent} does not exist.")


def _totals(source: Source, looked: Sequence[looking.Looked]) -> list[str]:
    size = sum(x.tensor.size for x in looked)
    zeros = sum(x.zeros or 0 for x in looked)
    compressed = sum(x.compressed for x in looked)
    plain = looking.total_bytes(looked)
    return [
        f"{len(looked)} tensors, {size:,} numbers, {zeros / max(size, 1):.2%} of them zero",
        f"{source.nbytes:,} bytes on the disk; {plain:,} plain, {compressed:,} compressed "
        f"({compressed / max(plain, 1):.2f}x)",
        *(
            f"{printable(key)}: {printable(text)}"
            for key, text in readable(source.metadata).items()
        ),
    ]


def _print_totals(out: Console, source: Source, looked: Sequence[looking.Looked]) -> None:
    for line in _totals(source, looked):
        say(out, line)


def _numbers(d: looking.Difference) -> tuple[str, ...]:
    if d.what != "values":
        return ("",) * 6
    sparsity = f"{d.sparsities[0]:.2%} -> {d.sparsities[1]:.2%}"
    zeros = (f"{d.pruned:,}", f"{d.revived:,}", f"{d.overlap:.2%}")
    return (f"{d.changed:,}", f"{d.largest:.3g}", sparsity, *zeros)


def _say_written(out: Console, source: Source, path: Path) -> None:
    size = (
        sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
    ratio = size / max(source.nbytes, 1)
    say(out, f"written   {path}, {size:,} bytes, {ratio:.3f} times the input's {source.nbytes:,}")


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
        return lambda name: self._bar.update(
            self._task, advance=1, description=escape(printable(name))
        )

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
