"""What users type: the README under pyright's basic mode, and signatures that say what they take."""

import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import prunax

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CHOICES = {"sparsity", "allocation", "score", "schedule", "pattern", "where", "threshold"}


def test_readme_passes_pyright(tmp_path):
    pytest.importorskip("pyright")
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    config = {"typeCheckingMode": "basic", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "0 errors" in result.stdout, result.stdout + result.stderr


def functions():
    modules = [prunax, *filter(inspect.ismodule, (getattr(prunax, n) for n in prunax.__all__))]
    for module in modules:
        for name in module.__all__:
            if inspect.isfunction(item := getattr(module, name)):
                yield f"{module.__name__}.{name}", item


def test_choices_have_types():
    untyped = [
        f"{name}({parameter})"
        for name, item in functions()
        for parameter, annotation in item.__annotations__.items()
        if parameter in CHOICES and annotation is typing.Any
    ]
    assert not untyped
