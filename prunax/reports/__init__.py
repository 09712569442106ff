"""What pruning came to: summaries, comparisons, what looks wrong, tables, pictures, and a page of all that."""

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
