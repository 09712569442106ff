"""Draws the pictures of the documentation: `python docs/pictures.py`. Those of results are the benchmarks'."""

import contextlib
import json
import re
import statistics
from pathlib import Path

import jax
import numpy as np
import PIL.Image

import prunax
from prunax.patterns import NM, Block, Channel, ConstantFanIn

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"


def tour() -> None:
    """The picture that the tour makes: its blocks are run."""
    namespace: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "tour.md").read_text(), re.M | re.S)
    for block in blocks:
        if "save_params" not in block:
            exec(block.replace('"layers.png"', f"{str(IMAGES / 'layers.png')!r}"), namespace)


def gallery() -> None:
    """The pictures that the gallery makes, in few colours: a fifth of the bytes."""
    folder = IMAGES / "gallery"
    folder.mkdir(exist_ok=True)
    namespace: dict = {}
    text = (DOCS / "gallery.md").read_text()
    with contextlib.chdir(folder):
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            exec(block, namespace)
        for file in folder.glob("*.png"):
            PIL.Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


def methods() -> None:
    """Accuracy against sparsity of five methods, from the results of `python -m benchmarks.methods`."""
    names = {
        "imp": "lottery tickets",
        "straight-through": "straight-through",
        "magnitude": "gradual",
        "rigl": "RigL",
        "static": "random masks",
    }
    results = DOCS.parent / "benchmarks" / "results" / "methods.json"
    records = [
        r
        for r in json.loads(results.read_text())["records"]
        if r["network"] == "lenet5" and r["allocation"] in ("erk", "")
    ]
    curves: dict[str, list] = {label: [] for label in names.values()}
    for record in sorted(records, key=lambda r: r["sparsity"]):
        accuracy = [100 * a for a in record["test_accuracy"]]
        if record["method"] == "dense":
            dense = statistics.mean(accuracy)
        elif record["method"] in names:
            mean, deviation = statistics.mean(accuracy), statistics.stdev(accuracy)
            curves[names[record["method"]]].append((record["sparsity"], mean, deviation))
    figure = prunax.reports.plots.fronts(
        curves, dense=dense, ylabel="test accuracy, %", title="LeNet-5 on Fashion-MNIST"
    )
    figure.axes[0].set_ylim(78, 91)
    figure.savefig(IMAGES / "methods.png")


def main() -> None:
    """Writes all of them."""
    IMAGES.mkdir(exist_ok=True)
    tour()
    gallery()
    methods()
    schedule = prunax.schedules.polynomial(0.9, begin_step=100, end_step=200, every=30)
    prunax.reports.plots.schedule(schedule, 300).savefig(IMAGES / "schedule.png")

    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, 64))},
        "head": {"kernel": jax.random.normal(keys[1], (64, 10))},
    }
    masks = prunax.compute_masks(params, 0.9, allocation=prunax.allocation.erdos_renyi)
    prunax.reports.plots.weights(params, masks, title="Weights").savefig(IMAGES / "weights.png")

    kernel = {"kernel": np.asarray(jax.random.normal(jax.random.key(0), (32, 32)))}
    by_pattern = {
        str(pattern): prunax.compute_masks(kernel, 0.5, pattern=pattern)["kernel"]
        for pattern in (NM(2, 4), ConstantFanIn(), Block((8, 8)), Channel())
    }
    prunax.reports.plots.masks(by_pattern).savefig(IMAGES / "patterns.png")


if __name__ == "__main__":
    main()
