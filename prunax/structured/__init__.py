"""Structural pruning of any JAX function: coupled axes found from its jaxpr, and the network really smaller."""

from prunax.structured._axes import Frozen, Position
from prunax.structured._cost import (
    count_bytes,
    count_cache_bytes,
    count_flops,
    count_parameters,
    latency,
)
from prunax.structured._depth import prune_depth
from prunax.structured._gating import apply_gates, gate_importance, gates
from prunax.structured._groups import AxisGroup, Explanation, Member, axis_groups, explain_groups
from prunax.structured._mixtures import expert_importance
from prunax.structured._prune import Shrunk, prunable_groups, prune_channels
from prunax.structured._ranking import group_scores
from prunax.structured._rebuild import rebuild
from prunax.structured._regularization import (
    group_norms,
    growing_strengths,
    proximal_unit_lasso,
    soft_threshold_units,
    unit_lasso,
    weighted_l2,
)
from prunax.structured._residuals import Branch, branches
from prunax.structured._shrink import shrink, shrink_function

__all__ = [
    "AxisGroup",
    "Branch",
    "Explanation",
    "Frozen",
    "Member",
    "Position",
    "Shrunk",
    "apply_gates",
    "axis_groups",
    "branches",
    "count_bytes",
    "count_cache_bytes",
    "count_flops",
    "count_parameters",
    "expert_importance",
    "explain_groups",
    "gate_importance",
    "gates",
    "group_norms",
    "group_scores",
    "growing_strengths",
    "latency",
    "proximal_unit_lasso",
    "prunable_groups",
    "prune_channels",
    "prune_depth",
    "rebuild",
    "shrink",
    "shrink_function",
    "soft_threshold_units",
    "unit_lasso",
    "weighted_l2",
]
