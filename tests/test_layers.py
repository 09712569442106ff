"""Each module of prunax imports lower layers only, and `import prunax` stays light."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prunax"
LAYERS = [
    {"_atomic", "_leaf_names", "_modules", "_progress", "_signals"},
    {"trees"},
    {
        "_meshes",
        "_counts",
        "scores",
        "patterns",
        "penalties",
        "_selection",
        "schedules",
        "_packing",
        "_jaxprs",
    },
    {"allocation"},
    {"_masks", "reports"},
    {"transforms", "learned", "_states"},
    {"initialization", "lottery", "calibration", "structured"},
    {"search", "export"},
    {"cli"},
    {"__main__"},
]
LAYER = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}


def imported_parts(path: Path) -> set[str]:
    """The parts of prunax that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import, write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert "prunax" not in names, f"{path.name} imports the root: import the module it needs"
    names.discard("prunax.__version__")
    return {name.split(".")[1] for name in names if name.startswith("prunax.")}


# Part -> what it imports; a part is a top-level module, or a folder with all in it.
USES: dict[str, set[str]] = {}
for file in PACKAGE.rglob("*.py"):
    part = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if part != "__init__":
        USES.setdefault(part, set()).update(imported_parts(file) - {part})


@pytest.mark.parametrize("part", sorted(USES))
def test_imports_lower_layers(part):
    assert part in LAYER, f"{part} has no layer: add it to LAYERS"
    for other in USES[part]:
        assert other in LAYER, f"{part} imports prunax.{other}, which is no module"
        # Modules of the layer of scores may use each other; never in a circle, says the next test.
        assert LAYER[other] < LAYER[part] or LAYER[other] == LAYER[part] == LAYER["scores"], (
            f"{part} (layer {LAYER[part]}) imports {other} (layer {LAYER[other]})"
        )


def test_contributing_shows_these_layers():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, re.MULTILINE)
    assert [(int(depth), set(re.findall(r"`(\w+)`", parts))) for depth, parts in rows] == list(
        enumerate(LAYERS)
    )


def test_no_circular_imports():
    TopologicalSorter(USES).prepare()


def test_import_leaves_out_what_few_functions_need():
    code = "import sys, prunax; print(*{'flax', 'matplotlib', 'rich'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
