"""Writes tables of results into Markdown files, between markers:

    <!-- table: methods/mlp -->
    <!-- end table -->

The tables are made from the JSON files under `benchmarks/results/`, so that no figure is typed. `--check` changes
nothing, and fails where a table is out of date.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import (
    accelerator,
    adversarial,
    anomalies,
    budgets,
    calibrating,
    checkpoints,
    decoding,
    finetuning,
    formats,
    front,
    importance,
    large,
    limits,
    llm,
    methods,
    mixture,
    overhead,
    packed,
    recover,
    regrowth,
    robustness,
    selection,
    sharded,
    shrink,
    structured,
)
from benchmarks.zoo import __main__ as zoo

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SOURCES = {
    "methods": methods.tables,
    "methods-rates": methods.rates_tables,
    "regrowth": regrowth.tables,
    "finetuning": finetuning.tables,
    "adversarial": adversarial.tables,
    "anomalies": anomalies.tables,
    "robustness": robustness.tables,
    "budgets": budgets.tables,
    "selection": selection.tables,
    "overhead": overhead.tables,
    "sharded": sharded.tables,
    "large": large.tables,
    "structured": structured.tables,
    "importance": importance.tables,
    "mixture": mixture.tables,
    "shrink": shrink.tables,
    "packed": packed.tables,
    "formats": formats.tables,
    "recover": recover.tables,
    "decoding": decoding.tables,
    "checkpoints": checkpoints.tables,
    "llm": llm.tables,
    "calibrating": calibrating.tables,
    "zoo": zoo.tables,
}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end table -->)", re.DOTALL)


def all_tables(results: Path) -> dict[str, str]:
    """The Markdown of every table that a folder of results makes, by name."""
    named = {}
    for source, tables in SOURCES.items():
        file = results / f"{source}.json"
        if file.is_file():
            found = tables(json.loads(file.read_text()))
            named |= {name: table.markdown() for name, table in found.items()}
    named["front"] = front.table(results).markdown()
    named |= {name: table.markdown() for name, table in limits.tables(results).items()}
    devices = sorted(results.glob(f"{accelerator.STEM}-*.json"))
    named[accelerator.STEM] = accelerator.published([json.loads(f.read_text()) for f in devices])
    return named


def render(text: str, tables: Mapping[str, str]) -> str:
    """Puts tables between their markers.

    Args:
        text: Markdown.
        tables: as from `all_tables`.

    Returns:
        The text with every marked table replaced.

    Raises:
        ValueError: a marker names a table that there is none of, or has no end.
    """
    if text.count("<!-- table: ") != len(MARKED.findall(text)):
        raise ValueError("a `<!-- table: NAME -->` has no `<!-- end table -->`.")

    def replace(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in tables:
            known = ", ".join(tables) or "none: run the benchmarks first"
            raise ValueError(f"there is no table {name!r}. There are: {known}.")
        return f"{begin}\n{tables[name]}\n\n{end}"

    return MARKED.sub(replace, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with code 1 where `--check` finds a table out of date."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.render",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, help="(README.md, benchmarks/README.md and all of docs/)")
    add("--check", action="store_true", help="change nothing, fail where a table is out of date")
    add("--results", type=Path, default=RESULTS, help="folder of the JSON (benchmarks/results)")
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    tables = all_tables(args.results)
    pages = [ROOT / "README.md", Path(__file__).parent / "README.md", *ROOT.glob("docs/**/*.md")]
    stale = []
    for file in args.files or pages:
        text = file.read_text()
        try:
            new = render(text, tables)
        except ValueError as error:
            parser.error(f"{file}: {error}")
        if new != text:
            stale.append(str(file))
            if not args.check:
                file.write_text(new)
    if stale:
        print("Out of date:" if args.check else "Written:", *stale)
    if stale and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
