"""The command line: ``prunax inspect``, ``prune``, ``diff``, ``report`` and ``convert``."""

import argparse
import contextlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prunax.cli import choices, commands
from prunax.cli.sources import open_source, printable

__all__ = ["main"]

FAILED, INTERRUPTED = 2, 130
EPILOG = """\
Files are .safetensors, plain or compressed by prunax, or folders of Orbax checkpoints (one item each, such as
100/default). Tensors are read one at a time.

exit codes:
  0    done; diff: no difference; inspect --pattern: all follow it
  1    diff: a difference; inspect --pattern: a tensor does not follow it
  2    a wrong option, an unreadable or damaged file, or a file in the way (see --overwrite)
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, those of the process by default.

    Returns:
        The exit code: 0 done, 1 a difference or a pattern that does not hold, 2 an error, 130 interrupted.

    Examples:
        >>> from prunax.cli import main
        >>> main(["inspect", "missing.safetensors"])
        2
    """
    args = _parser().parse_args(argv)
    # Output for programs and files has the width that its lines need.
    out = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    err = Console(stderr=True)
    try:
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(open_source(file)) for file in args.files]
            return args.run(args, *sources, out, err)
    except KeyboardInterrupt:
        err.print("prunax: interrupted, nothing was written")
        return INTERRUPTED
    except BrokenPipeError:  # `prunax inspect FILE | head`
        sys.stderr.close()
        return commands.OK
    except (ValueError, TypeError, OSError, MemoryError) as error:
        commands.say(err, f"prunax {args.command}: {printable(str(error))}")
        return FAILED


# --- options --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        "prunax",
        description="Prune, inspect and compare files of model weights.",
        epilog=EPILOG,
        **shape,
    )
    version = f"prunax {importlib.metadata.version('prunax')}"
    parser.add_argument("--version", action="version", version=version)
    add = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser

    inspect = add(
        "inspect",
        help="shapes, sparsity and N:M patterns of each tensor",
        description="Print shape, dtype, sparsity and N:M conformance of each tensor.",
        epilog=(
            "examples:\n"
            "  prunax inspect model.safetensors\n"
            "  prunax inspect pruned.safetensors --pattern 2:4 && echo ready"
        ),
        **shape,
    )
    inspect.add_argument("files", type=Path, nargs=1, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument(
        "--pattern",
        type=choices.pattern,
        metavar="P",
        help="exit with 1 unless the chosen tensors follow it",
    )
    _add_choice(inspect)
    _add_layout(inspect)
    inspect.set_defaults(run=commands.inspect)

    prune = add(
        "prune",
        help="set the smallest weights to zero and write a new file",
        description="Set the weights of smallest magnitude to zero. IN stays as it is.",
        epilog=(
            "examples:\n"
            "  prunax prune model.safetensors half.safetensors --sparsity 0.5\n"
            "  prunax prune model.safetensors nm.safetensors --pattern 2:4 --layout out-in\n"
            "  prunax prune model.safetensors small.safetensors --sparsity 0.9 --allocation global --compress\n"
            "  prunax prune model.safetensors mlp.safetensors --sparsity 0.8 --where '*.mlp.*.weight' --dry-run\n"
            "  prunax prune checkpoints/100/default pruned --sparsity 0.5\n"
            "\n"
            "One tensor is in memory at a time. Only the allocation lamp, and global with blocks or channels, hold\n"
            "all chosen tensors at once."
        ),
        **shape,
    )
    prune.add_argument("files", type=Path, nargs=1, metavar="IN")
    prune.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="OUT.safetensors, or a new folder for an Orbax checkpoint",
    )
    prune.add_argument(
        "--sparsity", type=choices.fraction, metavar="S", help="fraction to remove, from 0 to 1"
    )
    prune.add_argument(
        "--pattern",
        type=choices.pattern,
        default="unstructured",
        metavar="P",
        help=f"{choices.PATTERNS}. N:M keeps N of every M. Default: unstructured",
    )
    prune.add_argument(
        "--allocation",
        choices=choices.ALLOCATIONS,
        default="uniform",
        help="how the sparsity is shared out among tensors. Default: uniform",
    )
    _add_choice(prune)
    _add_layout(prune)
    prune.add_argument(
        "--compress",
        action="store_true",
        help="store kept weights only: smaller, read by prunax.export.load_params and `prunax convert`",
    )
    prune.add_argument(
        "--dry-run", action="store_true", help="say what would be pruned, and write nothing"
    )
    _add_overwrite(prune)
    prune.set_defaults(run=commands.prune)

    convert = add(
        "convert",
        help="compress a file, or make a plain one of it",
        description="Write the same tensors as a plain safetensors file, or compressed.",
        epilog=(
            "examples:\n"
            "  prunax convert small.safetensors plain.safetensors\n"
            "  prunax convert plain.safetensors small.safetensors --compress"
        ),
        **shape,
    )
    convert.add_argument("files", type=Path, nargs=1, metavar="IN")
    convert.add_argument("out", type=Path, metavar="OUT")
    convert.add_argument("--compress", action="store_true", help="store zeros at one bit each")
    _add_overwrite(convert)
    convert.set_defaults(run=commands.convert)

    diff = add(
        "diff",
        help="compare two files",
        description=(
            "List the tensors that differ, and how many weights went to zero or came back. "
            "Exits with 1 if any does."
        ),
        epilog="examples:\n  prunax diff model.safetensors pruned.safetensors",
        **shape,
    )
    diff.add_argument("files", type=Path, nargs=2, metavar="FILE")
    diff.add_argument("--json", action="store_true", help="print JSON")
    diff.set_defaults(run=commands.diff)

    report = add(
        "report",
        help="a summary of a pruned file, as a table, Markdown, HTML or JSON",
        description="Summarise what is pruned, and what it saves.",
        epilog=(
            "examples:\n"
            "  prunax report pruned.safetensors\n"
            "  prunax report pruned.safetensors --format markdown --out report.md"
        ),
        **shape,
    )
    report.add_argument("files", type=Path, nargs=1, metavar="FILE")
    report.add_argument("--format", choices=["table", "markdown", "html", "json"], default="table")
    report.add_argument("--out", type=Path, metavar="OUT", help="write it there")
    _add_choice(report)
    _add_overwrite(report)
    report.set_defaults(run=commands.report)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    add: Any = parser.add_argument
    add(
        "--where",
        action="append",
        default=[],
        metavar="GLOB",
        help="tensors by name, may be repeated",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave these out, may be repeated",
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        choices=["auto", "in-out", "out-in"],
        default="auto",
        help="how weights are stored, where the pattern asks (N:M, fan-in, channel): in-out as in Flax, out-in as in "
        "PyTorch and Hugging Face. Default: auto, by names, and an error where these do not tell",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", "--force", action="store_true", help="replace OUT if it is there"
    )
