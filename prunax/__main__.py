"""``python -m prunax``: the command line."""

import sys

from prunax.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
