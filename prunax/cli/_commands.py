"""What each command does.

A command takes the parsed options, the open checkpoints, and consoles for output and errors. It returns the exit code.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from prunax._atomic import write_text
from prunax.cli import _inspection, _options
from prunax.cli._options import Choice, UsageError
from prunax.cli._output import printable, progress, say
from prunax.export._checkpoints import OTHERS, Checkpoint, Folder, in_order, texts
from prunax.export._saving import FILES, belongings, check_replaceable, left_out, open_writer
from prunax.reports._tables import Table

__all__: list[str] = []

DONE, DIFFERENT = 0, 1


def check(args: argparse.Namespace) -> None:
    """Look at OUT before any work is done.

    Raises:
        UsageError: If nothing can be written there, or something would be lost.
    """
    if args.command == "prune" and args.sparsity is None and ":" not in args.pattern:
        raise UsageError(
            "how much? Pass --sparsity 0.5, or a pattern that says it (--pattern 2:4)."
        )
    out: Path | None = getattr(args, "out", None)
    if out is None:
        return
    if str(out) == "-":
        raise UsageError("OUT is a file or a folder: nothing is written to the output stream.")
    is_file = args.command == "report" or out.suffix in FILES
    if args.command != "report":
        if out.suffix.lower() in OTHERS or out.suffix.lower() in (".json", ".txt"):
            raise UsageError(
                f"{out}: {out.suffix} is not written. Name OUT.safetensors, or a folder."
            )
        if args.compress and not is_file:
            raise UsageError(
                "--compress writes one file. Name the output so: OUT.prunax or OUT.safetensors."
            )
        if not is_file and any(out.resolve().is_relative_to(f.resolve()) for f in args.files):
            raise UsageError(
                "a checkpoint folder cannot be written over itself, or within. Name another one."
            )
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist.")
    if is_file and out.is_dir():
        raise UsageError(f"{out} is a folder, and a file is to be written. Choose another name.")
    if is_file and out.exists() and not args.overwrite:
        raise UsageError(f"{out} exists already. Choose another name, or pass --overwrite.")
    if not is_file:
        check_replaceable(out, args.overwrite)


def inspect(args: argparse.Namespace, source: Checkpoint, out: Console, err: Console) -> int:
    choice = _options.choose(list(source.tensors.values()), args)
    with progress(err, "reading", len(source.tensors)) as step:
        inspected = list(_inspection.look(source, step))
    facts, table = _facts(source, inspected), _table(inspected, choice)
    match args.format:
        case "json":
            text = json.dumps(_document(source, inspected, choice), indent=1)
        case "markdown":
            lines = "\n".join(f"- {fact}" for fact in facts)
            text = f"# {printable(source.path.name)}\n\n{lines}\n\n{table.markdown()}"
        case "html":
            text = _page(source, choice, facts, table)
        case _:
            text = "\n".join([str(table), *facts]) if args.out else ""
    if args.out is not None:
        write_text(args.out, text + "\n", overwrite=args.overwrite)
        say(err, f"written   {args.out}")
    elif text:
        say(out, text)
    else:
        out.print(table)
        for fact in facts:
            say(out, fact)
    return DONE if args.pattern is None else _follow(args, source, choice, err)


report = inspect


def prune(args: argparse.Namespace, source: Checkpoint, out: Console, err: Console) -> int:
    from prunax.cli import _pruning

    _refuse_masks(source)
    everything = list(source.tensors.values())
    choice = _options.choose(everything, args)
    _list_whole(out, choice, everything=args.dry_run)
    if not choice.tensors:
        raise UsageError("no tensor is chosen. Name some with --select 'GLOB'.")
    make = _options.pattern(args.pattern)
    pattern, layout = _options.fit(make, args.layout, choice.tensors, everything)
    allocation = _options.allocation(args.allocation)
    request = _pruning.Request(choice.tensors, pattern, args.sparsity, allocation)
    masks = _pruning.Masks(source, request)
    weights, total = (sum(t.size for t in some) for some in (choice.tensors, everything))
    what = _options.describe(pattern, layout, args.sparsity)
    say(out, f"prunes    {what}; allocation: {args.allocation}")
    number = (
        f"{len(choice.tensors)} of {len(source.tensors)} tensors, {weights:,} of {total:,} numbers"
    )
    say(out, f"chosen    {number}: {choice.rule}")
    for what, names in _options.delicate(choice.tensors).items():
        glob = printable("*" + "/".join(names[0].replace(".", "/").split("/")[-2:]))
        said = f"{_some(names, 1)} {what}, and is often left whole: --exclude '{glob}'"
        say(out, f"note      {said}")
    if args.dry_run:
        for t in choice.tensors:
            say(out, f"  {printable(t.name)}  {' x '.join(map(str, t.shape))}")
        return DONE
    texts_of = {"prunax.pattern": repr(pattern)}
    if args.sparsity is not None:
        texts_of["prunax.sparsity"] = repr(args.sparsity)
    with (
        progress(err, "pruning", len(source.tensors)) as step,
        _writer(args, source, texts_of) as writer,
    ):
        for name in in_order(source):
            if name in masks:
                writer.add(name, masks.apply(name))
            else:
                source.write_to(writer, name)
            step(name)
    sparsity = 1 - masks.kept / max(weights, 1)
    say(out, f"kept      {masks.kept:,} of {weights:,} weights: sparsity {sparsity:.4%}")
    return _written(args, source, out)


def convert(args: argparse.Namespace, source: Checkpoint, out: Console, err: Console) -> int:
    _refuse_masks(source)
    with (
        progress(err, "writing", len(source.tensors)) as step,
        _writer(args, source, {}) as writer,
    ):
        for name in in_order(source):
            source.write_to(writer, name)
            step(name)
    return _written(args, source, out)


def diff(
    args: argparse.Namespace, first: Checkpoint, second: Checkpoint, out: Console, err: Console
) -> int:
    with progress(err, "comparing", len(first.tensors)) as step:
        found = list(_inspection.compare(first, second, step))
    differences = [d for d in found if d.what != "same"]
    if args.json:
        say(out, json.dumps([d._asdict() for d in differences], indent=1))
        return DIFFERENT if differences else DONE
    if differences:
        numbers = ("changed", "largest", "sparsity", "now zero", "was zero", "overlap")
        rows = [(printable(d.name), d.what, *_numbers(d)) for d in differences]
        out.print(Table(("tensor", "differs in", *numbers), rows, text=2))
    say(out, f"{len(differences)} of {len(found)} tensors differ")
    return DIFFERENT if differences else DONE


# --- what they share ------------------------------------------------------------------------------------------------


def _follow(args: argparse.Namespace, source: Checkpoint, choice: Choice, err: Console) -> int:
    if not choice.tensors:
        raise UsageError("no tensor is chosen. Name some with --select 'GLOB'.")
    make, everything = _options.pattern(args.pattern), list(source.tensors.values())
    pattern, _ = _options.fit(make, args.layout, choice.tensors, everything)
    problems = [_inspection.follows(source.read(t.name), pattern, t.name) for t in choice.tensors]
    broken = [problem for problem in problems if problem]
    for problem in broken:
        say(err, printable(problem))
    number = f"{len(problems) - len(broken)} of {len(problems)}"
    say(err, f"{number} tensors follow {pattern} ({choice.rule}).")
    return DIFFERENT if broken else DONE


def _refuse_masks(source: Checkpoint) -> None:
    if source.kind == "masks":
        raise UsageError(f"{source.path} holds masks, which stay as they are.")


def _list_whole(out: Console, choice: Choice, *, everything: bool) -> None:
    """Say what is left whole and why, reason by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in choice.whole.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = _some(names, len(names) if everything else 3)
        say(out, f"whole     {len(names)}, {reason}: {shown}")


def _some(names: Sequence[Any], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(str(name)) for name in names[:most]) + more


def _writer(args: argparse.Namespace, source: Checkpoint, metadata: dict[str, str]) -> Any:
    options: dict[str, Any] = dict(metadata=metadata, overwrite=args.overwrite)
    return open_writer(args.out, source, compress=args.compress, **options)


def _written(args: argparse.Namespace, source: Checkpoint, out: Console) -> int:
    rest = belongings(source.path) if source.layout == "folder" and args.out.is_file() else []
    if rest:
        say(out, f"apart     {_some(rest)}: a file holds tensors, and no more")
    others = left_out(source) if isinstance(source, Folder) else []
    if others:
        say(out, f"left out  {_some(others)}: states and weights that are not the checkpoint's")
    files = args.out.rglob("*") if args.out.is_dir() else [args.out]
    size = sum(f.stat().st_size for f in files if f.is_file())
    ratio = size / max(source.nbytes, 1)
    say(
        out,
        f"written   {args.out}, {size:,} bytes, {ratio:.3f} times the input's {source.nbytes:,}",
    )
    return DONE


class _Total(NamedTuple):
    """What tensors come to."""

    weights: int
    kept: int

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.weights if self.weights else 0.0

    def row(self) -> tuple[str, ...]:
        return f"{self.weights:,}", f"{self.kept:,}", f"{self.sparsity:.2%}"


def _total(inspected: Sequence[_inspection.Inspected]) -> _Total:
    size = sum(x.tensor.size for x in inspected)
    return _Total(size, size - sum(x.zeros or 0 for x in inspected))


def _prunable(
    inspected: Sequence[_inspection.Inspected], choice: Choice
) -> list[_inspection.Inspected]:
    return [x for x in inspected if x.tensor.name not in choice.whole]


def _table(inspected: Sequence[_inspection.Inspected], choice: Choice) -> Table:
    """Every tensor, and what they come to."""
    rows = []
    for x in inspected:
        weights, kept, sparsity = _total([x]).row()
        dense = not x.zeros and x.tensor.name in choice.whole
        shape = " x ".join(map(str, x.tensor.shape)) or "scalar"
        name, dtype = printable(x.tensor.name), printable(x.tensor.dtype_name)
        kept = "?" if x.zeros is None else kept
        rows.append(
            (name, shape, dtype, weights, kept, "-" if dense else sparsity, ", ".join(x.nm))
        )
    footer = [
        (name, "", "", *_total(some).row(), "")
        for name, some in (("prunable", _prunable(inspected, choice)), ("all", inspected))
    ]
    columns = ("tensor", "shape", "dtype", "weights", "kept", "sparsity", "N:M")
    return Table(columns, rows, footer, text=3)


def _document(
    source: Checkpoint, inspected: Sequence[_inspection.Inspected], choice: Choice
) -> dict[str, Any]:
    """The same as plain values."""
    totals = {"prunable": _total(_prunable(inspected, choice)), "total": _total(inspected)}
    return {
        "metadata": texts(source),
        "tied": source.tied,
        "tensors": [
            x.to_dict() | {"whole": choice.whole.get(x.tensor.name, "")} for x in inspected
        ],
        **{name: t._asdict() | {"sparsity": t.sparsity} for name, t in totals.items()},
    }


def _facts(source: Checkpoint, inspected: Sequence[_inspection.Inspected]) -> list[str]:
    size, zeros = sum(x.tensor.size for x in inspected), sum(x.zeros or 0 for x in inspected)
    plain, compressed = _inspection.total_bytes(inspected), sum(x.compressed for x in inspected)
    return [
        f"{len(inspected)} tensors, {size:,} numbers, {zeros / max(size, 1):.2%} of them zero",
        f"{source.nbytes:,} bytes on the disk; {plain:,} plain, {compressed:,} compressed "
        f"({compressed / max(plain, 1):.2f}x)",
        *(f"{printable(name)} is {printable(other)}" for name, other in source.tied.items()),
        *(f"{printable(key)}: {printable(text)}" for key, text in texts(source).items()),
    ]


def _page(source: Checkpoint, choice: Choice, facts: Sequence[str], table: Table) -> str:
    """The page of `reports.report_page`, of the chosen tensors and their zeros."""
    from prunax.reports import report_page

    params = {printable(t.name): source.read(t.name) for t in choice.tensors}
    masks = {name: _inspection.zero(array) for name, array in params.items()}
    for mask in masks.values():
        np.logical_not(mask, out=mask)
    sections = {"The checkpoint": "\n".join(facts), "Every tensor": table}
    return report_page(params, masks, title=printable(source.path.name), sections=sections)


def _numbers(d: _inspection.Difference) -> tuple[str, ...]:
    if d.what != "values":
        return ("",) * 6
    sparsity = f"{d.sparsities[0]:.2%} -> {d.sparsities[1]:.2%}"
    zeros = (f"{d.pruned:,}", f"{d.revived:,}", f"{d.overlap:.2%}")
    return (f"{d.changed:,}", f"{d.largest:.3g}", sparsity, *zeros)
