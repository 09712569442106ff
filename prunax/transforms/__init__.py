"""Optax gradient transformations that train sparse models."""

from prunax.transforms._admm import AdmmState, admm
from prunax.transforms._dynamic import dynamic_sparse, rigl, sparse_evolutionary, static_sparse
from prunax.transforms._masked import PruneState
from prunax.transforms._proximal import ProximalState, proximal_group_lasso, proximal_l1
from prunax.transforms._pruning import fixed_masks

__all__ = [
    "AdmmState",
    "ProximalState",
    "PruneState",
    "admm",
    "dynamic_sparse",
    "fixed_masks",
    "proximal_group_lasso",
    "proximal_l1",
    "rigl",
    "sparse_evolutionary",
    "static_sparse",
]
