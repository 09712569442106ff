"""Pictures of training runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np


def save_training(file: Path, runs: Sequence[Any], title: str, steps: int) -> None:
    """Draws accuracy and sparsity over the steps, and the sparsity of each layer at the end.

    Args:
        file: the PNG to write.
        runs: `train.Run`s. Curves and bars are means over the seeds of a method.
        title: above the picture.
        steps: steps in an epoch.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    colors = {method: f"C{i}" for i, method in enumerate(methods)}
    figure = matplotlib.figure.Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    curves = figure.add_subplot(grid[0, 0])
    sparsities = figure.add_subplot(grid[1, 0], sharex=curves)
    layers = figure.add_subplot(grid[:, 1])

    for i, method in enumerate(methods):
        of_method = [run for run in runs if run.method == method]
        accuracy = 100 * np.mean([run.metrics.accuracy for run in of_method], axis=0)
        sparsity = 100 * np.mean([run.metrics.sparsity for run in of_method], axis=0)
        step = steps * np.arange(1, len(accuracy) + 1)
        curves.plot(step, accuracy, color=colors[method], label=method)
        sparsities.plot(step, sparsity, color=colors[method])

        kernels = [leaf for leaf in of_method[0].summary.leaves if leaf.prunable]
        shares = [
            [leaf.sparsity for leaf in run.summary.leaves if leaf.prunable] for run in of_method
        ]
        height = 0.8 / len(methods)
        offset = (i - (len(methods) - 1) / 2) * height
        layers.barh(
            np.arange(len(kernels)) + offset,
            100 * np.mean(shares, axis=0),
            height,
            color=colors[method],
        )
        layers.set_yticks(
            range(len(kernels)), [f"{leaf.path}\n{leaf.weights:,} weights" for leaf in kernels]
        )

    best = max(max(run.metrics.accuracy) for run in runs)
    curves.set_ylim(max(0.0, 100 * best - 12), min(100.5, 100 * best + 1))
    curves.set_ylabel("accuracy, %")
    curves.grid(alpha=0.3)
    curves.legend(loc="lower right", ncols=2, fontsize="small")
    sparsities.set_ylabel("sparsity, %")
    sparsities.set_xlabel("training step")
    sparsities.set_ylim(-3, 103)
    sparsities.grid(alpha=0.3)
    layers.invert_yaxis()
    layers.set_xlim(0, 100)
    layers.set_xlabel("sparsity of each layer at the end, %")
    layers.grid(axis="x", alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
