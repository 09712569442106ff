"""Calibrated one-shot pruning of any JAX function: Wanda, SparseGPT, reconstruction.

Layer inputs come from interpreting the function's jaxpr: no hooks, no model changes.
"""

from prunax.calibration import solver

__all__ = ["solver"]
