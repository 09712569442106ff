"""Structural pruning of any JAX function: coupled axes found from its jaxpr, and the network really smaller."""

from prunax.structured.groups import AxisGroup, Member, axis_groups, explain
from prunax.structured.shrink import shrink, shrink_function

__all__ = ["AxisGroup", "Member", "axis_groups", "explain", "shrink", "shrink_function"]
