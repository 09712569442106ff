"""Optax gradient transformations that train sparse models."""

from prunax.transforms.pruning import PruneState, prune, unpack_masks

__all__ = ["PruneState", "prune", "unpack_masks"]
