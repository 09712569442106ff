"""One self-contained HTML page about a pruning run: tables and pictures in a single file."""

import base64
import html
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from prunax import reports, trees
from prunax.reports import plots
from prunax.reports._summary import summarize

__all__ = ["report_page"]

PyTree = Any

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; }
tfoot th { border-top: 2px solid #888; }
img { max-width: 100%; height: auto; } pre { white-space: pre-wrap; background: #f6f6f6; padding: .8rem; }
"""


def report_page(
    params: PyTree,
    masks: PyTree,
    *,
    title: str = "Pruning report",
    sections: Mapping[str, Any] | None = None,
) -> str:
    """Write the page of a pruning run.

    Args:
        params: Pytree of arrays: the weights before the masks were applied show where the threshold fell.
        masks: Mask tree of the same structure, True = kept.
        title: Of the page.
        sections: More of it, by heading: a table (whatever has a ``_repr_html_``, such as `Summary`, `Comparison` or
            `tables.Table`), a matplotlib figure, or text.

    Returns:
        The HTML: what `reports.screen_params` finds, sizes leaf by leaf, sparsity of each layer,
        weights kept and pruned, pictures of the masks, then the sections. Nothing is loaded from elsewhere. Write it
        with ``Path(file).write_text(page)``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the structures or shapes differ, naming the leaf.
        TypeError: If a mask is not boolean, naming the leaf; or a section is of no such kind.

    Examples:
        >>> import jax, prunax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
        >>> page = prunax.reports.report_page(params, prunax.compute_masks(params, 0.75), title="A run")
        >>> page[:15], "75.00%" in page
        ('<!doctype html>', True)
    """
    summary = summarize(params, masks)
    parts: dict[str, Any] = {"What was found": _findings(params, masks), "Leaf by leaf": summary}
    chosen = {
        path
        for path, mask in zip(trees.paths(masks), jax.tree.leaves(masks), strict=True)
        if np.ndim(mask)
    }
    if any(leaf.prunable for leaf in summary.leaves):
        parts["Layers"] = plots.layers(params, masks)
    if chosen:
        parts["Weights"] = plots.weights(params, masks, where=lambda path, leaf: path in chosen)
    if any(np.ndim(mask) >= 2 for mask in jax.tree.leaves(masks)):
        parts["Masks"] = plots.masks(masks)
    body = "\n".join(
        f"<h2>{html.escape(heading)}</h2>\n{_section(heading, content)}"
        for heading, content in (parts | dict(sections or {})).items()
    )
    head = f'<head><meta charset="utf-8"><title>{html.escape(title)}</title><style>\n{_STYLE}</style></head>'
    return (
        f'<!doctype html>\n<html lang="en">{head}\n<body>\n<h1>{html.escape(title)}</h1>\n'
        f"<p>{summary.kept:,} of {summary.weights:,} prunable weights are kept, a sparsity of {summary.sparsity:.2%}; "
        f"{summary.parameters_kept:,} of all {summary.parameters:,} parameters.</p>\n{body}\n</body></html>\n"
    )


def _findings(params: PyTree, masks: PyTree) -> Any:
    found = reports.screen_params(params, masks)
    return reports.findings_table(found) if found else "Nothing unusual."


def _section(heading: str, content: Any) -> str:
    if isinstance(content, str):
        return f"<pre>{html.escape(content)}</pre>"
    if hasattr(content, "savefig"):
        buffer = io.BytesIO()
        content.savefig(buffer, format="png", dpi=110)
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
    if hasattr(content, "_repr_html_"):
        return content._repr_html_()
    raise TypeError(
        f"report_page: the section {heading!r} must be text, a matplotlib figure or something with a _repr_html_, "
        f"got {type(content).__name__}."
    )
