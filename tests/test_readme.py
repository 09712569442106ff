"""The README's Python blocks run as written, top to bottom, in one namespace."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.relaxed_promotion
def test_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 2
    namespace = {"__name__": "readme"}
    for block in blocks:
        # Blank lines in front: a traceback names the README's own line.
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(code, README, "exec"), namespace)
