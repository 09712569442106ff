"""The notebooks are what their scripts say, executed without an error. `make notebooks` executes them."""

import ast
import base64
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import render

FOLDER = Path(__file__).parents[1] / "colab"
SCRIPTS = sorted(FOLDER.glob("[0-9]_*.py"))
LIMIT = 500_000  # bytes: a picture too many makes a repository slow for everyone
# Absolute paths of Unix and of Windows, as far as they are not part of an address.
PATH = re.compile(r"(?<![\w.<])/(?:home|root|work|tmp|usr|opt|var|Users|content)/|\b[A-Z]:\\")

EXECUTED = [script for script in SCRIPTS if script.with_suffix(".ipynb").exists()]

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
each_executed = pytest.mark.parametrize("script", EXECUTED, ids=lambda script: script.stem)


def test_they_are_numbered():
    assert [script.stem[0] for script in SCRIPTS] == list("1234567")


def test_the_list_says_which_are_not_executed_yet():
    (line,) = re.findall(
        r"^Not executed yet: (.*)\.$", (FOLDER / "README.md").read_text(), re.M
    ) or [""]
    assert re.findall(r"`(\w+)`", line) == [s.stem for s in SCRIPTS if s not in EXECUTED]


def cells_of(script):
    """Kind and source of each cell of a percent script."""
    text = script.read_text().split("\n# ---\n", 1)[1]
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        heading, source = part.split("\n", 1)
        source = source.strip("\n")
        if "[markdown]" in heading:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
            found.append(("markdown", source))
        else:
            found.append(("code", source))
    return found


def notebook_of(script):
    return json.loads(script.with_suffix(".ipynb").read_text())


def outputs_of(notebook):
    for cell in notebook["cells"]:
        yield from cell.get("outputs", ())


def texts_of(output):
    """All text of an output: streams, and everything shown that is no picture."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(v for kind, v in data.items() if "image" not in kind)]
    return "".join("".join(part) for part in parts)


@each_executed
def test_notebook_has_the_cells_of_its_script(script):
    cells = notebook_of(script)["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == cells_of(script)


@each
def test_code_parses(script):
    code = [source for kind, source in cells_of(script) if kind == "code"]
    assert len(code) > 5
    for source in code:
        ast.parse(source)


@each
def test_notebook_begins_with_a_badge_and_an_installation(script):
    (kind, text), (_, code) = cells_of(script)[:2]
    assert kind == "markdown"
    assert f"/colab/{script.stem}.ipynb" in text
    assert "colab-badge.svg" in text
    assert '"prunax": "prunax @ git+' in code
    # What the others import is installed as well.
    imported = set()
    for kind, source in cells_of(script):
        if kind == "code":
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = (
                        [node.module]
                        if isinstance(node, ast.ImportFrom)
                        else [a.name for a in node.names]
                    )
                    imported |= {name.split(".")[0] for name in names}
    ours = {"prunax", "jax", "flax", "optax", "numpy"}
    ours |= {"torch", "transformers"}  # the judges of notebook 6, which does without them
    for name in imported - set(sys.stdlib_module_names) - ours:
        assert f'"{name}": ' in code, name


@each_executed
def test_notebook_was_executed_from_top_to_bottom_without_an_error(script):
    notebook = notebook_of(script)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = list(outputs_of(notebook))
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [texts_of(o) for o in outputs if o.get("name") == "stderr"]
    assert "Fast mode" in "".join(map(texts_of, outputs))


@each_executed
def test_notebook_keeps_its_pictures(script):
    pictures = [
        base64.b64decode(output["data"]["image/png"])
        for output in outputs_of(notebook_of(script))
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert script.with_suffix(".ipynb").stat().st_size < LIMIT


@each_executed
def test_outputs_name_no_path_of_a_machine(script):
    for output in outputs_of(notebook_of(script)):
        assert not PATH.search(texts_of(output))


@pytest.mark.parametrize("text", ["in /root/x.py", "'/tmp/a'", "file:///opt/x", r"C:\Users"])
def test_paths_of_a_machine_are_recognised(text):
    assert PATH.search(text)
    assert not PATH.search("https://example.org/var/x, params/work/kernel, 1/2")


@each
def test_links_lead_to_files(script):
    for kind, text in cells_of(script):
        if kind == "markdown":
            for target in re.findall(r"\]\((?!https:)([^)]+)\)", text):
                file = FOLDER / target
                assert file.exists() or file.with_suffix(".py") in SCRIPTS, target


def table_of(lines):
    """Of a table in Markdown the cells, by row and column."""
    cells = [[c.strip() for c in line.strip().strip("|").split("|")] for line in lines]
    heads, _, *rows = cells
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


def test_the_last_table_has_the_figures_of_its_benchmark():
    text = (FOLDER / "7_robustness_and_tickets.py").read_text()
    typed = table_of([line[2:] for line in text.splitlines() if line.startswith("# |")])
    made = render.all_tables(render.RESULTS)["adversarial"]
    measured = table_of([line for line in made.splitlines() if line.startswith("|")])
    assert len(typed) == 6
    for row, cells in typed.items():
        assert cells.items() <= measured[row].items(), row
