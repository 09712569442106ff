"""Executes the notebooks: sources are the percent scripts, results go into the .ipynb files beside them.

    PRUNAX_FAST=1 python colab/execute.py               # all of them
    PRUNAX_FAST=1 python colab/execute.py 1_quickstart  # one

Without PRUNAX_FAST=1 they train longer. Needs the extra `notebooks`.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent


def execute(source: Path) -> float:
    """Runs one notebook top to bottom in a fresh kernel and writes it with its outputs. Returns the seconds."""
    notebook = jupytext.read(source)
    start = time.perf_counter()
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
    ).execute()
    seconds = time.perf_counter() - start
    # TensorFlow Datasets hints at a faster decoder of images, where it is not installed: not in the outputs.
    for cell in notebook.cells:
        kept = [
            o for o in cell.get("outputs", []) if "OpenCV is not installed" not in o.get("text", "")
        ]
        if len(kept) < len(cell.get("outputs", [])):
            cell["outputs"] = kept
    # What differs from run to run says nothing.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return seconds


def main(names: Sequence[str]) -> None:
    for source in sorted(FOLDER.glob("[0-9]_*.py")):
        if names and source.stem not in names:
            continue
        seconds = execute(source)
        size = source.with_suffix(".ipynb").stat().st_size
        print(f"{source.stem}: {seconds:.0f} s, {size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
