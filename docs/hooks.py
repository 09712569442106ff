"""What building the site needs besides Markdown: formulas, and the pictures of benchmark results.

Formulas become MathML when the site is built, so that nothing is fetched and no script runs. They are written
``$...$`` and ``$$...$$`` in pages, ``:math:`` and ``.. math::`` in docstrings.
"""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
DISPLAYED = re.compile(
    r"^\$\$(?P<dollars>.+?)\$\$[ \t]*$"
    r"|^\.\. math::(?P<directive>[^\n]*(?:\n[ \t]+[^\n]+|\n(?=\n[ \t]))*)",
    re.MULTILINE | re.DOTALL,
)


class Displayed(Preprocessor):
    """Formulas on lines of their own."""

    def run(self, lines: list[str]) -> list[str]:
        def replace(match: re.Match[str]) -> str:
            latex = " ".join((match["dollars"] or match["directive"]).split())
            return f"\n{self.md.htmlStash.store(convert(latex, display='block'))}\n"

        return DISPLAYED.sub(replace, "\n".join(lines)).split("\n")


class Inline(InlineProcessor):
    """Formulas within a line."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class Formulas(Extension):
    """Formulas in Markdown."""

    def extendMarkdown(self, md: Any) -> None:
        # After fenced code is taken out (25), and before and after inline code (190).
        md.preprocessors.register(Displayed(md), "displayed formulas", 24)
        md.inlinePatterns.register(Inline(r":math:`([^`]+)`", md), "formulas of docstrings", 195)
        md.inlinePatterns.register(
            Inline(r"(?<![\\$\w])\$([^$\n]+)\$(?![\w$])", md), "formulas", 188
        )


def on_config(config: Any) -> Any:
    """Add the extension: Markdown takes an instance as well as a name."""
    config.markdown_extensions.append(Formulas())
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Publish the pictures of benchmark results as `results/NAME.png`."""
    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files
