"""Optax gradient transformations that train sparse models."""

from prunax.transforms.masked import PruneState, unpack_masks
from prunax.transforms.pruning import prune

__all__ = ["PruneState", "prune", "unpack_masks"]
