"""Every Python block of the documentation runs as written, and every public name is in its API reference."""

import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import prunax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.glob("**/*.md"))}
BLOCK = re.compile(r"(?:^<!-- not run: (.+) -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.MULTILINE)


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text()))


WITH_CODE = [name for name, page in PAGES.items() if any(not b[1] for b in blocks(page))]


def documented() -> dict[str, object]:
    """Dotted name -> object, of all that the reference shows."""
    names = []
    for page in DOCS.glob("api/*.md"):
        for target, options in DIRECTIVE.findall(page.read_text()):
            members = re.search(r"members: \[(.*?)\]", options)
            names += [f"{target}.{m}" for m in members[1].split(", ")] if members else [target]
    assert len(names) == len(set(names)), "a name is shown twice"
    found = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert attribute in importlib.import_module(module).__all__, f"{name} is not public"
        # The site's builder reads files, and would take the module for the function.
        assert name not in sys.modules, f"{name} is a module too: write {name}.{attribute}"
        found[name] = getattr(importlib.import_module(module), attribute)
    return found


def public(module: types.ModuleType) -> Iterator[tuple[str, object]]:
    """Dotted names and objects in the `__all__` of a module, and of modules that it names there."""
    for name in module.__all__:
        item = getattr(module, name)
        if isinstance(item, types.ModuleType):
            yield from public(item)
        else:
            yield f"{module.__name__}.{name}", item


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("name", WITH_CODE)
def test_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGES[name].read_text()
    namespace = {"__name__": "docs"}
    for block in blocks(PAGES[name]):
        if not block[1]:
            # Blank lines in front: a traceback names the page's own line.
            code = "\n" * text.count("\n", 0, block.start(2)) + block[2]
            exec(compile(code, PAGES[name], "exec"), namespace)


def test_every_block_is_found_and_few_are_not_run():
    skipped = []
    for name, page in PAGES.items():
        found = blocks(page)
        assert len(found) == page.read_text().count("```python"), f"{name}: an indented block"
        skipped += [name for block in found if block[1]]
    assert len(WITH_CODE) > 20
    assert len(skipped) <= 3, skipped


def test_every_public_name_is_in_the_reference():
    shown = documented()
    missing = [name for name, _ in public(prunax) if name not in shown]
    assert not missing, f"not in docs/api: {', '.join(missing)}"


def test_every_page_is_in_the_navigation():
    nav = re.findall(r"- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(PAGES)
