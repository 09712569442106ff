"""prunax: a functional pruning toolkit for JAX.

Pure functions map parameter pytrees to mask pytrees, and an optax transformation keeps pruned weights at zero:

    params -> scores -> pools (allocation) -> masks (pattern + selection) -> apply / train (optax)
"""

from prunax import _modules

TYPE_CHECKING = (
    False  # as type checkers know it: importing `typing` takes longer than all that is here
)

if TYPE_CHECKING:
    from prunax import (
        allocation,
        calibration,
        export,
        initialization,
        learned,
        lottery,
        patterns,
        penalties,
        reports,
        schedules,
        scores,
        search,
        structured,
        transforms,
        trees,
    )
    from prunax._jaxprs import kernels
    from prunax._masks import apply_masks, compute_masks, straight_through
    from prunax._states import get_masks
    from prunax.reports._summary import compare_masks, summarize
    from prunax.transforms._pruning import prune

__version__ = "0.2.0"

__all__ = [
    "allocation",
    "apply_masks",
    "calibration",
    "compare_masks",
    "compute_masks",
    "export",
    "get_masks",
    "initialization",
    "kernels",
    "learned",
    "lottery",
    "patterns",
    "penalties",
    "prune",
    "reports",
    "schedules",
    "scores",
    "search",
    "straight_through",
    "structured",
    "summarize",
    "transforms",
    "trees",
]

__getattr__ = _modules.lazy(
    __name__,
    __all__,
    {
        "_jaxprs": "kernels",
        "_states": "get_masks",
        "_masks": "apply_masks compute_masks straight_through",
        "reports._summary": "compare_masks summarize",
        "transforms._pruning": "prune",
    },
)

_modules.show_public_names(__name__)
