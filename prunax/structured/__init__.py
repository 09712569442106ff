"""Structural pruning of any JAX function: coupled axes found from its jaxpr, and the network really smaller."""

from prunax.structured.axes import Frozen, Position
from prunax.structured.cost import (
    count_bytes,
    count_cache_bytes,
    count_flops,
    count_parameters,
    latency,
)
from prunax.structured.depth import prune_depth
from prunax.structured.gating import apply_gates, gate_importance, gates
from prunax.structured.groups import AxisGroup, Explanation, Member, axis_groups, explain
from prunax.structured.mixtures import expert_importance
from prunax.structured.prune import Shrunk, prunable_groups, prune_channels
from prunax.structured.ranking import group_scores
from prunax.structured.rebuild import rebuild
from prunax.structured.regularization import (
    group_lasso,
    group_norms,
    growing_strengths,
    proximal_group_lasso,
    soft_threshold,
    weighted_l2,
)
from prunax.structured.residuals import Branch, branches
from prunax.structured.shrink import shrink, shrink_function

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
    "explain",
    "gate_importance",
    "gates",
    "group_lasso",
    "group_norms",
    "group_scores",
    "growing_strengths",
    "latency",
    "proximal_group_lasso",
    "prunable_groups",
    "prune_channels",
    "prune_depth",
    "rebuild",
    "shrink",
    "shrink_function",
    "soft_threshold",
    "weighted_l2",
]
