"""The README's Python blocks run as written: each section, top to bottom, in its own namespace."""

import itertools
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, list[tuple[int, str]]]:
    """The blocks of each `##` section, with the line each begins at."""
    text = README.read_text()
    starts = [0, *(m.start() for m in re.finditer(r"^## ", text, re.MULTILINE)), len(text)]
    found = {}
    for begin, end in itertools.pairwise(starts):
        title = text[begin:end].partition("\n")[0].lstrip("# ")
        blocks = [
            (text.count("\n", 0, match.start(1)) + 1, match[1])
            for match in FENCE.finditer(text, begin, end)
        ]
        if blocks:
            found[title] = blocks
    return found


def test_readme_has_python_blocks():
    assert sections()


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("title", sections())
def test_section_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for line, code in sections()[title]:
        # Blank lines in front: a traceback names the README's own line.
        exec(compile("\n" * (line - 1) + code, README, "exec"), namespace)
