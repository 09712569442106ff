"""Tables as values: the same rows for a terminal, for Markdown and for a page."""

import html
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Table", "Tabular"]


class Table(NamedTuple):
    """Rows of text under columns. Prints as a table; a notebook shows it as HTML.

    Attributes:
        columns: The headings. Columns of `text` are aligned left, the others right.
        rows: One text for each column.
        footer: Rows below a line: totals.
        text: How many of the first columns hold words rather than numbers.
        title: Above the table, or empty.
        notes: Sentences below the table, in a terminal and in HTML.

    Examples:
        >>> import prunax
        >>> table = prunax.reports.Table(("leaf", "weights"), [("kernel", "20")], [("total", "26")])
        >>> print(table.markdown())
        | leaf | weights |
        | --- | ---: |
        | kernel | 20 |
        | **total** | **26** |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: Sequence[Sequence[str]] = ()
    text: int = 1
    title: str = ""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Render as a Markdown table; the footer is bold."""
        rule = ["---"] * self.text + ["---:"] * (len(self.columns) - self.text)
        bold = [[f"**{cell}**" if cell else "" for cell in row] for row in self.footer]
        rows = [self.columns, rule, *self.rows, *bold]
        return "\n".join(
            f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |" for row in rows
        )

    def html(self) -> str:
        """Render as an HTML table, everything in it escaped."""

        def cells(row: Sequence[str], tag: str) -> str:
            return "".join(
                f'<{tag} style="text-align: {"left" if i < self.text else "right"}">{html.escape(cell)}</{tag}>'
                for i, cell in enumerate(row)
            )

        def lines(rows: Sequence[Sequence[str]], tag: str) -> str:
            return "".join(f"<tr>{cells(row, tag)}</tr>" for row in rows)

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        foot = f"<tfoot>{lines(self.footer, 'th')}</tfoot>" if self.footer else ""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<table>{caption}<thead>{lines([self.columns], 'th')}</thead>"
            f"<tbody>{lines(self.rows, 'td')}</tbody>{foot}</table>{notes}"
        )

    def _repr_html_(self) -> str:
        return self.html()

    def __rich__(self) -> Any:
        """Render for rich: a `rich.table.Table`, and the notes below it."""
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        # As Text: brackets are brackets, and no markup.
        table = RichTable(title=Text(self.title) if self.title else None)
        for i, column in enumerate(self.columns):
            table.add_column(Text(column), justify="left" if i < self.text else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        if self.footer:
            table.add_section()
        for row in self.footer:
            table.add_row(*map(Text, row))
        if not self.notes:
            return table
        return Group(table, *(Text(note, no_wrap=True, overflow="ignore") for note in self.notes))

    def __str__(self) -> str:
        return rendered(self)


class Tabular:
    """What prints as the table that its `table()` makes, in a terminal, in a notebook and as Markdown.

    Examples:
        >>> import prunax
        >>> class Shelf(prunax.reports.Tabular):
        ...     def table(self):
        ...         return prunax.reports.Table(("fruit", "number"), [("apples", "3")])
        >>> print(Shelf().to_markdown().splitlines()[-1])
        | apples | 3 |
    """

    def table(self) -> Table:
        """Arrange it as a `Table`."""
        raise NotImplementedError

    def to_markdown(self) -> str:
        """Turn it into a Markdown table."""
        return self.table().markdown()

    def _repr_html_(self) -> str:
        return self.table().html()

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def __str__(self) -> str:
        return str(self.table())


def rendered(value: Any) -> str:
    """Print something that rich can render, without markup, into a string."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    console.print(value, markup=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
