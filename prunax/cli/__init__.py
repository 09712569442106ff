"""The command line: ``prunax inspect``, ``prune``, ``diff``, ``report`` and ``convert``."""

import argparse
import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunax import __version__, _signals

__all__ = ["main"]

DONE, DIFFERENT, FAILED = 0, 1, 2
PATTERNS = "unstructured, N:M (2:4), fan-in, block:HxW (block:32x32), channel"
EPILOG = """\
A checkpoint is a .safetensors file, plain or compressed by prunax; a folder in the Hugging Face layout
(model.safetensors, or its shards and model.safetensors.index.json); or a folder of an Orbax checkpoint (one item, such
as 100/default). Tensors are read one at a time.

exit codes:
  0    done; diff: no difference; inspect --pattern: all follow it
  1    diff: a difference; inspect --pattern: a tensor does not follow it
  2    a wrong option, an unreadable or damaged file, or a file in the way (see --overwrite)
  130  interrupted (143: terminated); nothing is left behind
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, those of the process by default. Only then signals are handled.

    Returns:
        The exit code: 0 done, 1 a difference or a pattern that does not hold, 2 an error.

    Examples:
        >>> from prunax.cli import main
        >>> main(["inspect", "missing.safetensors"])
        2
    """
    if argv is None:
        _signals.handle()
    args = _parser().parse_args(argv)
    # Imported here: whoever only asks for help does not wait for it, and an interrupt finds the handlers in place.
    from prunax.cli import _commands
    from prunax.cli._output import in_flags, say, terminal
    from prunax.export._checkpoints import open_checkpoint

    out, err = terminal(sys.stdout), terminal(sys.stderr)
    try:
        _commands.check(args)
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(open_checkpoint(file)) for file in args.files]
            return getattr(_commands, args.command)(args, *sources, out, err)
    except BrokenPipeError:  # `prunax inspect FILE | head`
        sys.stderr.close()
        return DONE
    except (ValueError, TypeError, OSError, MemoryError, ImportError) as error:
        say(err, f"prunax {args.command}: {in_flags(error)}")
        return FAILED
    finally:
        if argv is None:
            _signals.ignore()


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        "prunax",
        description="Prune, inspect and compare checkpoints.",
        epilog=EPILOG,
        **shape,
    )
    parser.add_argument("--version", action="version", version=f"prunax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, files: Sequence[str], summary: str, description: str, *examples: str
    ) -> argparse.ArgumentParser:
        epilog = "examples:\n" + "\n".join(f"  prunax {name} {example}" for example in examples)
        command = commands.add_parser(
            name, help=summary, description=description, epilog=epilog, **shape
        )
        command.add_argument("files", type=Path, nargs=len(files), metavar=files[0])
        if files == ["IN"]:
            command.add_argument(
                "out",
                type=Path,
                metavar="OUT",
                help="OUT.safetensors, or a new folder of the layout that IN has (Hugging Face's, if IN is a file)",
            )
        return command

    inspect = add(
        "inspect",
        ["FILE"],
        "shapes, sparsity and N:M patterns of each tensor",
        "Print shape, dtype, sparsity and N:M conformance of each tensor.",
        "model.safetensors",
        "pruned.safetensors --pattern 2:4 && echo ready",
    )
    inspect.add_argument(
        "--json", action="store_const", dest="format", const="json", help="print JSON"
    )
    inspect.set_defaults(out=None)
    inspect.add_argument(
        "--pattern",
        type=pattern,
        metavar="P",
        help=f"exit with 1 unless the chosen tensors follow it: {PATTERNS}",
    )
    report = add(
        "report",
        ["FILE"],
        "the same as a table, Markdown, JSON or a page with pictures",
        "Summarise what is pruned, and what it saves. A page holds the chosen tensors in memory.",
        "pruned.safetensors",
        "pruned.safetensors --format markdown --out report.md",
    )
    report.add_argument("--format", choices=["table", "markdown", "html", "json"], default="table")
    report.add_argument("--out", type=Path, metavar="OUT", help="write it there")
    report.set_defaults(pattern=None)
    prune = add(
        "prune",
        ["IN"],
        "set the smallest weights to zero and write a new checkpoint",
        "Set the weights of smallest magnitude to zero. IN stays as it is.",
        "model.safetensors half.safetensors --sparsity 0.5",
        "Llama-3.2-1B Llama-3.2-1B-half --sparsity 0.5 --allocation global",
        "model.safetensors nm.safetensors --pattern 2:4 --layout out-in",
        "model.safetensors mlp.safetensors --sparsity 0.8 --where '*.mlp.*' --dry-run",
        "model.safetensors small.safetensors --sparsity 0.9 --compress",
        "checkpoints/100/default pruned --sparsity 0.5",
    )
    prune.add_argument(
        "--sparsity", type=fraction, metavar="S", help="fraction to remove, from 0 to 1"
    )
    prune.add_argument(
        "--pattern",
        type=pattern,
        default="unstructured",
        metavar="P",
        help=f"{PATTERNS}. N:M keeps N of every M. Default: unstructured",
    )
    prune.add_argument(
        "--allocation",
        choices=["uniform", "global", "erdos-renyi", "lamp"],
        default="uniform",
        help="how the sparsity is shared out among tensors. Only lamp, and global with blocks or channels, hold all "
        "chosen tensors in memory at once. Default: uniform",
    )
    prune.add_argument(
        "--dry-run", action="store_true", help="list what would be pruned and what not, and why"
    )
    convert = add(
        "convert",
        ["IN"],
        "compress a checkpoint, or make a plain one of it",
        "Write the same tensors as a plain checkpoint, or compressed.",
        "small.safetensors plain.safetensors",
        "plain.safetensors small.safetensors --compress",
    )
    diff = add(
        "diff",
        ["FILE", "FILE"],
        "compare two checkpoints",
        "List the tensors that differ, and how many weights went to zero or came back. Exits with 1 if any does.",
        "model.safetensors pruned.safetensors",
    )
    diff.add_argument("--json", action="store_true", help="print JSON")
    for command in (inspect, report, prune):
        _add_choice(command)
    for command in (report, prune, convert):
        command.add_argument(
            "--overwrite", "--force", action="store_true", help="replace OUT if it is there"
        )
    for command in (prune, convert):
        command.add_argument(
            "--compress",
            action="store_true",
            help="one file of the kept weights only, which says so in its format: read by "
            "prunax.export.load_params, and `prunax convert` makes a plain checkpoint of it",
        )
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, help: str) -> None:
        parser.add_argument(flag, action="append", default=[], metavar="GLOB", help=help)

    add("--where", "of the weights that are safe to prune those with such a name; may be repeated")
    add("--exclude", "leave these out; may be repeated")
    add("--select", "exactly these, whatever they are: embeddings, say; may be repeated")
    parser.add_argument(
        "--layout",
        choices=["auto", "in-out", "out-in"],
        default="auto",
        help="how weights are stored, where the pattern asks (N:M, fan-in, channel): in-out as in Flax, out-in as in "
        "PyTorch and Hugging Face. Default: auto, by names, and an error where these do not tell",
    )


def fraction(text: str) -> float:
    """Parse a sparsity."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1 (0.8 for 80%)")
    return value


def pattern(text: str) -> str:
    """Check the spelling of a pattern."""
    numbers = re.fullmatch(r"(\d+):(\d+)|block:(\d+)x(\d+)", text)
    if numbers is None and text not in ("unstructured", "fan-in", "channel"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of: {PATTERNS}")
    if numbers and numbers[1] and not 0 <= int(numbers[1]) <= int(numbers[2]) > 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} keeps more than there are: N:M keeps N of every M"
        )
    if numbers and numbers[3] and not (int(numbers[3]) and int(numbers[4])):
        raise argparse.ArgumentTypeError(f"{text!r} has blocks of no weights")
    return text
