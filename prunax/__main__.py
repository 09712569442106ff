"""``python -m prunax``, and the command ``prunax``: signals are handled before anything else is imported."""

import sys

from prunax import _signals

_signals.handle()

from prunax.cli import main  # noqa: E402

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
