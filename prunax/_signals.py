"""Signals of a command: it ends at once, leaves nothing behind, and says so in one line.

Imported before anything that takes time, so that it imports almost nothing itself.
"""

import os
import signal
import sys

__all__ = ["Quiet", "handle", "ignore"]

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_errors = 2


def handle() -> None:
    """From now on, end at an interrupt or a termination."""
    for number in _NUMBERS:
        signal.signal(number, _end)


def ignore() -> None:
    """What is done is done: while Python tidies up, a signal changes nothing."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


class Quiet:
    """Nothing appears on the error stream meanwhile, whoever writes there, but what is said of a signal."""

    def __enter__(self) -> None:
        global _errors
        _errors = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        global _errors
        os.dup2(_errors, 2)
        os.close(_errors)
        _errors = 2


def _end(number: int, frame: object) -> None:
    """End the process, wherever it is: an exception could come in the midst of tidying up, or be swallowed."""
    atomic = sys.modules.get("prunax._atomic")
    unfinished = [] if atomic is None else getattr(atomic, "unfinished", list)()
    if unfinished is None:  # the output has taken its name, or is just taking it
        return
    os.write(_errors, b"prunax: interrupted, nothing was written\n")
    if unfinished:
        atomic.remove_and_exit(unfinished, 128 + number)  # pyright: ignore[reportOptionalMemberAccess]
    os._exit(128 + number)
