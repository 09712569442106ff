"""Optax gradient transformations that train sparse models."""

from prunax.transforms.admm import AdmmState, admm
from prunax.transforms.dynamic import dynamic_sparse, rigl, sparse_evolutionary, static_sparse
from prunax.transforms.masked import PruneState, unpack_masks
from prunax.transforms.proximal import ProximalState, proximal_group_lasso, proximal_l1
from prunax.transforms.pruning import fixed_masks, prune

__all__ = [
    "AdmmState",
    "ProximalState",
    "PruneState",
    "admm",
    "dynamic_sparse",
    "fixed_masks",
    "proximal_group_lasso",
    "proximal_l1",
    "prune",
    "rigl",
    "sparse_evolutionary",
    "static_sparse",
    "unpack_masks",
]
