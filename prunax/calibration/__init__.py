"""Calibrated one-shot pruning of any JAX function, layer by layer, on the inputs that each layer gets.

`prune_layers` goes through the layers, a method solves each: `Wanda`, `SparseGPT`, `Alps`, `Refit`, or one of your own.
Layer inputs come from interpreting the function's jaxpr: no hooks, no model changes.
"""

from prunax.calibration import layouts, solver
from prunax.calibration._layers import Pruned, prune_layers, sparsegpt, wanda
from prunax.calibration._methods import Alps, Method, Refit, SparseGPT, Wanda
from prunax.calibration._outliers import outlier_allocation
from prunax.calibration._refining import Refined, refine, relative_error
from prunax.calibration._saved_blocks import RefinedBlock
from prunax.calibration._scores import wanda_scores
from prunax.calibration._statistics import input_statistics

__all__ = [
    "Alps",
    "Method",
    "Pruned",
    "Refined",
    "RefinedBlock",
    "Refit",
    "SparseGPT",
    "Wanda",
    "input_statistics",
    "layouts",
    "outlier_allocation",
    "prune_layers",
    "refine",
    "relative_error",
    "solver",
    "sparsegpt",
    "wanda",
    "wanda_scores",
]
