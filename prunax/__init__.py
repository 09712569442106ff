"""prunax: a functional pruning toolkit for JAX.

Pure functions map parameter pytrees to mask pytrees, and an optax transformation keeps pruned weights at zero:

    params -> scores -> pools (allocation) -> masks (pattern + selection) -> apply / train (optax)
"""

from prunax import (
    allocation,
    calibration,
    counts,
    export,
    guard,
    initialization,
    lottery,
    packing,
    pages,
    patterns,
    penalties,
    plots,
    schedules,
    scores,
    search,
    selection,
    structured,
    tables,
    transforms,
    trees,
)
from prunax.masks import apply_masks, compute_masks, straight_through
from prunax.report import Comparison, Summary, compare_masks, summarize
from prunax.transforms import prune

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Summary",
    "allocation",
    "apply_masks",
    "calibration",
    "compare_masks",
    "compute_masks",
    "counts",
    "export",
    "guard",
    "initialization",
    "lottery",
    "packing",
    "pages",
    "patterns",
    "penalties",
    "plots",
    "prune",
    "schedules",
    "scores",
    "search",
    "selection",
    "straight_through",
    "structured",
    "summarize",
    "tables",
    "transforms",
    "trees",
]
