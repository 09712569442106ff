"""Pictures of training runs."""

from collections.abc import Mapping, Sequence
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


def _line(
    panel: Any, i: int, name: str, sparsity: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> None:
    """Draws the i-th method: means and deviations by sparsity."""
    style: dict[str, Any] = {"markersize": 4, "linewidth": 1.4, "capsize": 2}
    style |= {"color": f"C{i}", "marker": "osD^vPX"[i % 7], "label": name}
    panel.errorbar(1 / (1 - sparsity), mean, deviation, **style)


def _sparsity_axis(panel: Any) -> None:
    """Spreads the x axis by what is left of the weights, labelled by what is gone."""
    panel.set_xlim(8.5, 58)
    panel.set_xscale("log")
    ticks = (0.9, 0.95, 0.98)
    panel.set_xticks([1 / (1 - s) for s in ticks], [f"{s:.0%}" for s in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def save_methods(file: Path, content: Mapping[str, Any], families: Mapping[str, str]) -> None:
    """Draws accuracy against sparsity: a row of panels a network, a panel a family, a line a method.

    All with one allocation; the last panel has magnitude with others.

    Args:
        file: the PNG to write.
        content: the results of `methods.py`.
        families: name and title of each panel.
    """
    from benchmarks.methods import NETWORKS, main_allocation
    from benchmarks.recipes import METHODS

    networks = list(dict.fromkeys(r["network"] for r in content["records"]))
    figure = matplotlib.figure.Figure(
        figsize=(5 * len(families) + 5, 4.2 * len(networks)), layout="constrained"
    )
    axes = figure.subplots(len(networks), len(families) + 1, squeeze=False, sharey="row")
    for network, row in zip(networks, axes, strict=True):
        of_network = [r for r in content["records"] if r["network"] == network]
        dense = [np.mean(r["test_accuracy"]) for r in of_network if r["method"] == "dense"]
        panels = {
            title: {
                name: [r for r in of_network if r["method"] == name and main_allocation(r)]
                for name, method in METHODS.items()
                if method.family == family
            }
            for family, title in families.items()
        }
        panels["Magnitude, allocations"] = {
            name: [r for r in of_network if (r["method"], r["allocation"]) == ("magnitude", name)]
            for name in METHODS["magnitude"].allocations
        }
        for (title, lines), panel in zip(panels.items(), row, strict=True):
            for level in dense:
                panel.axhline(100 * level, color="0.4", linestyle="--", linewidth=1, label="dense")
            for i, (name, records) in enumerate(lines.items()):
                points = sorted(
                    (
                        np.mean(r["realised_sparsity"]),
                        100 * np.mean(r["test_accuracy"]),
                        100 * np.std(r["test_accuracy"], ddof=len(r["test_accuracy"]) > 1),
                    )
                    for r in records
                )
                if not points:
                    continue
                _line(panel, i, name, *np.array(points).T)
            panel.set_title(f"{NETWORKS[network]}: {title}", fontsize="medium")
            _sparsity_axis(panel)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize="small", loc="lower left")
        means = [100 * np.mean(r["test_accuracy"]) for r in of_network]
        top = max(means)
        row[0].set_ylim(max(min(means) - 1, top - 16), top + 1)
        row[0].set_ylabel("test accuracy, %")
    for panel in axes[-1]:
        panel.set_xlabel("weights that are zero")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def save_robustness(file: Path, content: Mapping[str, Any]) -> None:
    """Draws accuracy against sparsity, a panel a perturbation, a line a method; dense is the dashed line.

    Args:
        file: the PNG to write.
        content: the results of `robustness.py`.
    """
    from benchmarks.robustness import label

    records = content["records"]
    kinds = list(records[0]["accuracy"])
    names = list(dict.fromkeys(label(r) for r in records if r["method"] != "dense"))
    figure = matplotlib.figure.Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, (len(kinds) + 1) // 2, squeeze=False)
    for kind, panel in zip(kinds, axes.flat, strict=False):
        _sparsity_axis(panel)
        for r in records:
            if r["method"] == "dense":
                level = 100 * np.mean(r["accuracy"][kind])
                panel.axhline(level, color="0.4", linestyle="--", linewidth=1, label="dense")
        for i, name in enumerate(names):
            of_method = sorted(
                (r for r in records if label(r) == name), key=lambda r: r["sparsity"]
            )
            points = [
                (r["sparsity"], 100 * np.mean(v := r["accuracy"][kind]), 100 * np.std(v))
                for r in of_method
            ]
            _line(panel, i, name, *np.array(points).T)
        panel.set_title(kind, fontsize="medium")
    axes[0, 0].legend(fontsize="small", loc="lower left")
    for panel in axes[:, 0]:
        panel.set_ylabel("accuracy, %")
    for panel in axes[-1]:
        panel.set_xlabel("weights that are zero")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
