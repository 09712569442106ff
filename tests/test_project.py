"""What stands about the project itself: its address, its version, its citation."""

import re
import tomllib
from pathlib import Path

import prunax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]
TEXTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("colab/*.md"),
    *ROOT.glob("colab/*.py"),
    *ROOT.glob("colab/*.ipynb"),
    ROOT / "mkdocs.yml",
    ROOT / "CITATION.cff",
]


def test_links_to_the_repository_are_those_of_pyproject():
    """The address stands in pyproject.toml; a link that names another owner's prunax is out of date."""
    owner = ADDRESS.removeprefix("https://github.com/").removesuffix("/prunax")
    found = 0
    for file in TEXTS:
        for link in re.findall(r"github(?:\.com)?/([\w.-]+)/prunax\b", file.read_text()):
            assert link == owner, (
                f"{file.relative_to(ROOT)} links to {link}/prunax, not to {ADDRESS}"
            )
            found += 1
    assert found > 3


def test_citation_names_the_project():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"repository-code: {ADDRESS}\n" in text
    assert f"license: {PROJECT['license']}\n" in text


def test_changelog_has_the_version():
    assert f"## [{prunax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
