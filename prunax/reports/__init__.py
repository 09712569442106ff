"""What pruning came to: summaries, comparisons, what looks wrong, tables, pictures, and a page of all that."""

from typing import TYPE_CHECKING

from prunax import _modules

if TYPE_CHECKING:
    from prunax.reports import plots
    from prunax.reports._page import report_page
    from prunax.reports._screening import Finding, findings_table, screen_batch, screen_params
    from prunax.reports._summary import (
        Comparison,
        LeafComparison,
        LeafSummary,
        Summary,
    )
    from prunax.reports._tables import Table, Tabular

__all__ = [
    "Comparison",
    "Finding",
    "LeafComparison",
    "LeafSummary",
    "Summary",
    "Table",
    "Tabular",
    "findings_table",
    "plots",
    "report_page",
    "screen_batch",
    "screen_params",
]

__getattr__ = _modules.lazy(
    __name__,
    __all__,
    {
        "_page": "report_page",
        "_screening": "Finding findings_table screen_batch screen_params",
        "_summary": "Comparison LeafComparison LeafSummary Summary",
        "_tables": "Table Tabular",
    },
)
