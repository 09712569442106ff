# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Methods compared
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/3_methods.ipynb)
#
# A way to prune is four independent choices: which weights matter (*criterion*), when to remove them (*schedule*),
# how many from which layer (*allocation*), and whether removed ones may come back (*dynamic sparse training*). In
# `prunax` each is a value that you pass, so they can be compared one at a time: the same network, the same data, the
# same number of steps, the same seeds.

# %%
# Installs what is missing: everything in Colab, nothing where prunax is there already. `benchmarks` comes from the
# repository: here from the folder above, in Colab from a clone.
import importlib.util
import subprocess
import sys

SOURCE = "prunax-source"
if importlib.util.find_spec("prunax") is None:
    url = "https://github.com/prunax/prunax"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", url, SOURCE], check=True)
    packages = [f"./{SOURCE}[bench]"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
sys.path += ["..", SOURCE]

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import prunax
from benchmarks import datasets, loop, models

FAST = os.environ.get("PRUNAX_FAST") == "1"
TRAIN, TEST = (10_000, 2_000) if FAST else (60_000, 10_000)  # images
EPOCHS, SEEDS = (4, 2) if FAST else (10, 5)
SPARSITIES = (0.9, 0.98) if FAST else (0.8, 0.9, 0.95, 0.98, 0.99)
print("Fast mode: few images, sparsities and seeds." if FAST else "Full mode.")

# %%
# Where the internet may not be asked, the data set must be there already.
prepared = (datasets.data_folder() / "fashion_mnist").is_dir()
available = prepared or datasets.FASHION_MNIST_FILES.is_dir() or not FAST
try:
    data_set = datasets.load("fashion_mnist" if available else "digits")
except datasets.DatasetError:
    data_set = datasets.load("digits")
if data_set.name != "fashion_mnist":
    print("Fashion-MNIST is not to be had here. Going on with scikit-learn's digits.")
data = loop.Data(
    data_set.train_images[:TRAIN],
    data_set.train_labels[:TRAIN],
    data_set.test_images[:TEST],
    data_set.test_labels[:TEST],
)
BATCH = 100
STEPS = EPOCHS * loop.steps_per_epoch(len(data.train_labels), BATCH)
print(
    f"{data_set.name}: {len(data.train_labels):,} images to train on, {len(data.test_labels):,} to test on"
)

# %% [markdown]
# The network is LeNet-300-100, the optimizer Adam, its rate decaying to zero. Everything below differs only in what
# is wrapped around that optimizer.

# %%
apply = functools.partial(models.apply, models.MLP(data_set.num_classes))


def adam():
    return optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(method, sparsity, key, data):
    """A whole run, compiled: `method(sparsity, key)` gives the optimizer. Masks are returned after each epoch."""
    init_key, mask_key, order_key = jax.random.split(key, 3)
    params = models.init(models.MLP(data_set.num_classes), init_key, data.train_images)
    tx = method(sparsity, mask_key)

    def epoch(state, _):
        state, metrics = loop.epoch(apply, tx, data, state, batch_size=BATCH)
        return state, (metrics, getattr(state.opt_state, "masks", None))

    state = loop.State(params, tx.init(params), order_key)
    state, (metrics, masks) = jax.lax.scan(epoch, state, length=EPOCHS)
    return state.params, metrics, masks


device_data = jax.tree.map(jnp.asarray, data)
RUNS = {}  # (name, sparsity) -> one run a seed


def run(name, method, sparsity):
    if (name, sparsity) not in RUNS:
        keys = [jax.random.key(seed) for seed in range(SEEDS)]
        RUNS[name, sparsity] = [train(method, sparsity, key, device_data) for key in keys]
    return RUNS[name, sparsity]


def accuracies(runs):
    return np.array([float(metrics.accuracy[-1]) for _, metrics, _ in runs])


dense = accuracies(run("dense", lambda sparsity, key: adam(), 0.0))
print(f"dense: {100 * dense.mean():.2f}% of the test images are right, seeds: {100 * dense}")


# %% [markdown]
# Differences smaller than the spread over seeds mean nothing. So the tables show it: hold it against every comparison
# below.


# %%
def compare(methods):
    """Trains every method at every sparsity; returns a table and the means, for `plots.fronts`."""
    rows, curves = [], {}
    for name, method in methods.items():
        found = [accuracies(run(name, method, s)) for s in SPARSITIES]
        cells = [f"{100 * a.mean():.2f} ± {100 * a.std(ddof=1):.2f}" for a in found]
        # Counted from the weights, not taken from the request.
        _, metrics, _ = RUNS[name, SPARSITIES[-1]][0]
        rows.append((name, *cells, f"{float(metrics.sparsity[-1]):.2%}"))
        curves[name] = [(s, 100 * a.mean()) for s, a in zip(SPARSITIES, found, strict=True)]
    columns = ("test accuracy, %", *(f"{s:.0%}" for s in SPARSITIES), "zeros, counted")
    return prunax.reports.Table(columns, rows), curves


def front(curves):
    return prunax.reports.plots.fronts(curves, dense=100 * dense.mean(), ylabel="test accuracy, %")


# %% [markdown]
# ## Criteria: which weights matter?
#
# - *magnitude* $|w|$: needs nothing but the weights;
# - *saliency* $|w\,\partial L/\partial w|$: what the loss would change, to first order, averaged over steps, since the
#   gradient of one batch is noisy;
# - *movement* $-w\,\partial L/\partial w$: weights that training pushes away from zero stay (Sanh et al., 2020);
# - *random*: the baseline. A criterion that does not beat it knows nothing.
#
# All follow one schedule, shown first.


# %%
def gradual(sparsity):
    return prunax.schedules.polynomial(
        sparsity, STEPS // 5, STEPS * 7 // 10, every=max(STEPS // 50, 1)
    )


prunax.reports.plots.schedule(gradual(0.9), STEPS)

# %%
scores = prunax.scores
criteria = {
    "magnitude": lambda s, key: prunax.prune(adam(), gradual(s)),
    "saliency": lambda s, key: prunax.prune(
        adam(), gradual(s), score=scores.ema(scores.saliency, 0.99)
    ),
    "movement": lambda s, key: prunax.prune(
        adam(), gradual(s), score=scores.ema(scores.movement, 0.99)
    ),
    "random": lambda s, key: prunax.prune(adam(), gradual(s), score=scores.random, key=key),
}
table, curves = compare(criteria)
table

# %%
front(curves)

# %% [markdown]
# ## Schedules: when?
#
# - *at the start*: masks of the untrained network, from then on fixed. Which of its weights will matter it cannot know;
# - *halfway*: train, prune at once, train on;
# - *gradual*: little by little (as above);
# - *AC/DC*: compressed and dense phases alternate, so that early choices can be undone (Peste et al., 2021).


# %%
def alternating(sparsity):
    phase = max(STEPS // 10, 1)
    return prunax.schedules.alternating(
        sparsity, STEPS // 5, STEPS * 7 // 10, compressed_steps=phase, dense_steps=phase
    )


schedules = {
    "at the start": lambda s, key: prunax.prune(adam(), s),
    "halfway": lambda s, key: prunax.prune(adam(), prunax.schedules.one_shot(s, STEPS // 2)),
    "magnitude": criteria["magnitude"],
    "AC/DC": lambda s, key: prunax.prune(adam(), alternating(s)),
}
table, curves = compare(schedules)
table

# %%
front({"gradual" if name == "magnitude" else name: points for name, points in curves.items()})

# %% [markdown]
# What happens on the way: accuracy after each epoch. A schedule that prunes late has little time to repair.

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for name in schedules:
    curve = np.mean([metrics.accuracy for _, metrics, _ in RUNS[name, SPARSITIES[-1]]], axis=0)
    axes.plot(
        range(1, EPOCHS + 1), 100 * curve, "o-", label="gradual" if name == "magnitude" else name
    )
axes.set(xlabel="epoch", ylabel="test accuracy, %", title=f"{SPARSITIES[-1]:.0%} in the end")
axes.set_xticks(range(1, EPOCHS + 1))
axes.grid(alpha=0.3)
_ = axes.legend(fontsize="small")

# %% [markdown]
# ## Allocations: how many from which layer?
#
# - *uniform*: the same fraction of each;
# - *Erdős-Rényi*: small layers keep more, by their shapes alone;
# - *LAMP*: magnitudes, each as a share of what is left in its layer, ranked together (Lee et al., 2021);
# - *global*: plain magnitudes of all layers ranked together.

# %%
allocation = prunax.allocation
allocations = {
    "magnitude": criteria["magnitude"],
    "Erdős-Rényi": lambda s, key: prunax.prune(
        adam(), gradual(s), allocation=allocation.erdos_renyi
    ),
    "LAMP": lambda s, key: prunax.prune(adam(), gradual(s), allocation=allocation.lamp),
    "global": lambda s, key: prunax.prune(adam(), gradual(s), allocation=allocation.global_ranking),
}
table, curves = compare(allocations)
table

# %%
front({"uniform" if name == "magnitude" else name: points for name, points in curves.items()})

# %% [markdown]
# The total is the same for all, the layers are not. The last layer has the fewest weights and can spare the fewest.

# %%
layers = {}
for name in allocations:
    params, _, _ = RUNS[name, SPARSITIES[-1]][0]
    summary = prunax.summarize(params)
    layers[name] = [leaf for leaf in summary.leaves if leaf.prunable]

figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
height = 0.8 / len(layers)
for i, (name, leaves) in enumerate(layers.items()):
    axes.barh(
        np.arange(len(leaves)) + (i - 1.5) * height,
        [100 * leaf.sparsity for leaf in leaves],
        height,
        label="uniform" if name == "magnitude" else name,
    )
axes.set_yticks(range(len(leaves)), [f"{leaf.path}\n{leaf.weights:,} weights" for leaf in leaves])
axes.set(xlim=(0, 100), xlabel=f"sparsity, % ({SPARSITIES[-1]:.0%} in all)")
axes.invert_yaxis()
axes.grid(axis="x", alpha=0.3)
_ = axes.legend(fontsize="small", loc="center left")

# %% [markdown]
# A criterion or an allocation can go wrong in one way that the accuracy shows too late: a layer that is emptied lets
# nothing through. `guard` looks for it, and for units that have lost all their inputs.

# %%
params, _, _ = RUNS["global", SPARSITIES[-1]][0]
prunax.reports.findings_table(prunax.reports.screen_params(params))

# %% [markdown]
# ## Sparse from the first step to the last
#
# All of the above trains a dense network first. *Dynamic sparse training* never has more weights than in the end, and
# moves them instead: every few steps it drops the smallest and grows as many others.
#
# - *static*: random masks that never move. The baseline;
# - *SET* grows at random (Mocanu et al., 2018);
# - *RigL* grows where the gradient is largest (Evci et al., 2020).
#
# All of them, and gradual pruning beside them, share weights out to the layers by Erdős-Rényi.

# %%
moving = {"every": max(STEPS // 40, 1), "end_step": STEPS * 3 // 4}
transforms = prunax.transforms
dynamic = {
    "static": lambda s, key: transforms.static_sparse(adam(), s, key=key),
    "SET": lambda s, key: transforms.sparse_evolutionary(adam(), s, key=key, **moving),
    "RigL": lambda s, key: transforms.rigl(adam(), s, key=key, **moving),
    "Erdős-Rényi": allocations["Erdős-Rényi"],
}
table, curves = compare(dynamic)
table

# %%
front({"gradual, from dense" if n == "Erdős-Rényi" else n: points for n, points in curves.items()})

# %% [markdown]
# How far do connections move? Compare the masks after the first epoch with the last ones. What stays is the overlap.

# %%
_, _, masks = RUNS["RigL", SPARSITIES[-1]][0]
first, last = (jax.tree.map(lambda m, at=at: m[at], masks) for at in (0, -1))
prunax.compare_masks(first, last)

# %% [markdown]
# And where do they go? An input of the first layer is a pixel. Random masks spread over all pixels alike; RigL
# gathers where the pictures differ.

# %%
side = data_set.train_images.shape[1]
figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
kept = {"mean of the images": data.train_images.mean(axis=0)[..., 0]}
for name in ("static", "RigL"):
    _, _, masks = RUNS[name, SPARSITIES[-1]][0]
    kept[f"{name}: weights a pixel"] = (
        np.asarray(masks["Dense_0"]["kernel"][-1]).sum(axis=1).reshape(side, side)
    )
for axes, (title, values) in zip(panels, kept.items(), strict=True):
    figure.colorbar(axes.imshow(values, cmap="Blues", vmin=0), ax=axes)
    axes.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# ## Everything in one table

# %%
everything = criteria | schedules | allocations | dynamic
table, _ = compare(everything)
rows = sorted(table.rows, key=lambda row: -accuracies(RUNS[row[0], SPARSITIES[-1]]).mean())
prunax.reports.Table(
    table.columns, rows, [("dense", f"{100 * dense.mean():.2f}") + ("",) * len(SPARSITIES)]
)

# %% [markdown]
# These runs are short. `python -m benchmarks.methods` does the same at length, on two networks and with more
# methods.
