"""Draws the pictures of the documentation: `python docs/pictures.py`. Those of results are the benchmarks'."""

import re
from pathlib import Path

import jax
import numpy as np

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


def main() -> None:
    """Writes all of them."""
    IMAGES.mkdir(exist_ok=True)
    tour()
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
