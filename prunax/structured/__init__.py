"""Structural pruning of any JAX function: coupled axes found from its jaxpr, and the network really smaller."""

from prunax.structured.axes import Frozen, Position
from prunax.structured.cost import count_flops, count_parameters, latency
from prunax.structured.groups import AxisGroup, Explanation, Member, axis_groups, explain
from prunax.structured.prune import Shrunk, group_scores, prunable_groups, prune_channels
from prunax.structured.shrink import shrink, shrink_function

__all__ = [
    "AxisGroup",
    "Explanation",
    "Frozen",
    "Member",
    "Position",
    "Shrunk",
    "axis_groups",
    "count_flops",
    "count_parameters",
    "explain",
    "group_scores",
    "latency",
    "prunable_groups",
    "prune_channels",
    "shrink",
    "shrink_function",
]
