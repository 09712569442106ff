"""What the command line says: lines, tables, a bar; nothing in them can speak to the terminal."""

import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console

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


class progress:
    """A bar on the error stream, where that is a terminal. Entered, it is the function that advances it."""

    def __init__(self, err: Console, verb: str, total: int) -> None:
        self._bar: Any = None
        if err.is_terminal and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            done, note = MofNCompleteColumn(), TextColumn("{task.description}")
            self._bar = Progress(
                TextColumn(verb), BarColumn(), done, note, console=err, transient=True
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Callable[[str], None]:
        if self._bar is None:
            return lambda name: None
        from rich.markup import escape

        self._bar.start()
        return lambda name: self._bar.update(
            self._task, advance=1, description=escape(printable(name))
        )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
