"""One kind of progress bar, for the library, the command line and the benchmarks."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["bars", "counted"]


def bars(console: Any = None, *, transient: bool = False) -> Any:
    """Make a `rich.progress.Progress` with the time that is left and room for a note.

    Args:
        console: Where to, standard output where left out.
        transient: Whether nothing is left behind.

    Returns:
        The bars, to be entered. Each task is added with ``note=""``.
    """
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=transient,
    )


@contextmanager
def counted(
    what: str, total: int | None, *, show: bool = True, console: Any = None, transient: bool = False
) -> Generator[Callable[..., None]]:
    """Show one bar, or nothing.

    Args:
        what: Stands before it.
        total: How much there is to do; None where that is not known.
        show: Whether it is shown at all.
        console: As for `bars`.
        transient: As for `bars`.

    Yields:
        ``advance(note="", by=1)``, to be called with what was done.

    Examples:
        >>> from prunax import _progress
        >>> with _progress.counted("counting", 2, show=False) as advance:
        ...     advance("one")
    """
    if not show:
        yield lambda note="", by=1: None
        return
    with bars(console, transient=transient) as shown:
        task = shown.add_task(what, total=total, note="")
        yield lambda note="", by=1: shown.update(task, advance=by, note=note)
