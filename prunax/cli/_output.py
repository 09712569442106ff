"""What the command line says: lines, tables, a bar; nothing in them can speak to the terminal."""

import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from prunax import _progress

__all__: list[str] = []

# The library speaks of arguments; whoever sits at a terminal has flags.
_FLAGS = (
    (r" or pass overwrite=True", " or pass --overwrite"),
    (
        r"Use allocation\.uniform, allocation\.erdos_renyi or allocation\.by_path with it",
        "Use --allocation uniform or erdos-renyi with it",
    ),
    (
        r"Leave the sparsity out, or choose another pattern",
        "Leave --sparsity out, or choose another --pattern",
    ),
    (r"^(prune|save_checkpoint|compute_masks): ", ""),
)


def terminal(stream: TextIO) -> Console:
    """A console for a stream. Output for programs and files has the width that its lines need."""
    tty = stream.isatty()
    return Console(file=stream, soft_wrap=not tty, width=None if tty else 160)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, and no break where the window ends."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def in_flags(error: Exception) -> str:
    """One line for an error, which speaks of flags."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or ''}: {error.strerror}".removeprefix(": ")
    for argument, flag in _FLAGS:
        text = re.sub(argument, flag, text)
    return printable(text)


def printable(text: str) -> str:
    """Spell a text from a file so that it can do nothing to a terminal."""
    text = " ".join(text.split("\n"))
    return text if text.isprintable() else text.encode("unicode_escape").decode()


@contextmanager
def progress(err: Console, verb: str, total: int) -> Generator[Callable[[str], None]]:
    """A bar on the error stream, where that is a terminal. Entered, it is the function that advances it."""
    show = err.is_terminal and sys.stderr.isatty()
    with _progress.counted(verb, total, show=show, console=err, transient=True) as advance:
        yield lambda name: advance(printable(name))
