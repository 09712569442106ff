"""Optax gradient transformations that train sparse models."""

from prunax.transforms.dynamic import dynamic_sparse, rigl, sparse_evolutionary, static_sparse
from prunax.transforms.masked import PruneState, unpack_masks
from prunax.transforms.pruning import prune

__all__ = [
    "PruneState",
    "dynamic_sparse",
    "prune",
    "rigl",
    "sparse_evolutionary",
    "static_sparse",
    "unpack_masks",
]
