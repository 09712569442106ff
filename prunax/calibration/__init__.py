"""Calibrated one-shot pruning of any JAX function: Wanda, SparseGPT, ADMM, reconstruction.

Layer inputs come from interpreting the function's jaxpr: no hooks, no model changes.
"""

from prunax.calibration import layouts, solver
from prunax.calibration.outliers import outlier_allocation
from prunax.calibration.pruning import Pruned, admm, reconstruct, sparsegpt, wanda
from prunax.calibration.statistics import input_statistics

__all__ = [
    "Pruned",
    "admm",
    "input_statistics",
    "layouts",
    "outlier_allocation",
    "reconstruct",
    "solver",
    "sparsegpt",
    "wanda",
]
