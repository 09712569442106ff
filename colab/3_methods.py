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
# The outputs kept here are those of the fast mode. In Colab it runs in full, unless the first cell begins with
# `%env PRUNAX_FAST=1`.
#
# A way to prune is four independent choices: which weights matter (*criterion*), when to remove them (*schedule*),
# how many from which layer (*allocation*), and whether removed ones may come back (*dynamic sparse training*). In
# `prunax` each is a value that you pass, so they can be compared one at a time: the same network, the same data, the
# same number of steps, the same seeds, and, but for the section about it, the same allocation.

# %%
# Installs what is missing: everything in Colab, nothing where it is there already.
import importlib.util
import subprocess
import sys

needed = {
    "prunax": "prunax @ git+https://github.com/prunax/prunax",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
    "importlib_resources": "importlib_resources",
    "array_record": "array_record",
}
missing = [needed[name] for name in needed if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

# %%
import functools
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

import prunax

plt.rcParams["font.size"] = 12
FAST = os.environ.get("PRUNAX_FAST") == "1"
TRAIN, TEST = (10_000, 2_000) if FAST else (60_000, 10_000)  # images
EPOCHS, SEEDS = (4, 3) if FAST else (10, 5)
SPARSITIES = (0.9, 0.98) if FAST else (0.8, 0.9, 0.95, 0.98, 0.99)
print("Fast mode: few images, sparsities and seeds." if FAST else "Full mode.")

# %%
# Fashion-MNIST by TensorFlow Datasets, which does without TensorFlow here. The fast mode downloads nothing.
FOLDER = Path(os.environ.get("PRUNAX_DATA_DIR") or "~/.cache/prunax").expanduser()
builder = tfds.builder("fashion_mnist", data_dir=FOLDER, file_format="array_record")
if not FAST:
    try:
        builder.download_and_prepare()
    except (ImportError, OSError) as error:
        print(error)


def read(split, count):
    examples = list(builder.as_data_source(split=f"{split}[:{count}]"))
    images = np.stack([example["image"] for example in examples])
    return jnp.asarray(images / np.float32(255)), jnp.array([e["label"] for e in examples])


if builder.is_prepared():
    (train_images, train_labels), (test_images, test_labels) = (
        read("train", TRAIN),
        read("test", TEST),
    )
else:
    print("Fashion-MNIST is not to be had here. Going on with scikit-learn's digits.")
    digits = load_digits()
    images, labels = (
        jnp.asarray(digits.images[..., None] / 16, jnp.float32),
        jnp.array(digits.target),
    )
    train_images, test_images = images[:1400], images[1400:]
    train_labels, test_labels = labels[:1400], labels[1400:]
BATCH = 100
STEPS = EPOCHS * (len(train_labels) // BATCH)
print(f"{len(train_labels):,} images to train on, {len(test_labels):,} to test on")

# %% [markdown]
# The network is LeNet-300-100, the optimizer Adam, its rate decaying to zero. Everything below differs only in what
# is wrapped around that optimizer.


# %%
class LeNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


model = LeNet()


def loss_fn(params, rows):
    logits = model.apply(params, train_images[rows])
    return optax.softmax_cross_entropy_with_integer_labels(logits, train_labels[rows]).mean()


def accuracy(params):
    return 100 * jnp.mean(model.apply(params, test_images).argmax(-1) == test_labels)


def adam():
    return optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(method, sparsity, keys):
    """A run for each key, in one compiled call: `method(sparsity, key)` gives the optimizer.

    Returns the params after the last epoch, and accuracy and masks after each.
    """

    def one(key):
        init_key, mask_key, order_key = jax.random.split(key, 3)
        tx = method(sparsity, mask_key)

        def step(carry, rows):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            order = jax.random.permutation(key, len(train_labels))
            rows = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
            params, state = jax.lax.scan(step, carry, rows)[0]
            return (params, state), (accuracy(params), getattr(state, "masks", None))

        params = model.init(init_key, train_images[:1])
        carry = params, tx.init(params)
        (params, _), seen = jax.lax.scan(epoch, carry, jax.random.split(order_key, EPOCHS))
        return params, *seen

    # One after the other: under `vmap` masks would be chosen anew in every step, not only where the schedule says.
    return jax.lax.map(one, keys)


RUNS = {}  # (name, sparsity) -> params, accuracy and masks, a leading axis of seeds


def run(name, method, sparsity):
    if (name, sparsity) not in RUNS:
        RUNS[name, sparsity] = train(method, sparsity, jax.random.split(jax.random.key(0), SEEDS))
    return RUNS[name, sparsity]


def first_seed(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


dense = np.asarray(run("dense", lambda sparsity, key: adam(), 0.0)[1][:, -1])
print(
    f"dense: {dense.mean():.2f}% of the test images are right. Seeds:", *(f"{a:.2f}" for a in dense)
)


# %% [markdown]
# Differences smaller than the spread over seeds mean nothing. So the tables show it: hold it against every comparison
# below.


# %%
def compare(methods):
    """Trains every method at every sparsity. Returns a table, and means with deviations for `plots.fronts`."""
    rows, curves = [], {}
    for name, method in methods.items():
        found = [np.asarray(run(name, method, s)[1][:, -1]) for s in SPARSITIES]
        cells = [f"{a.mean():.2f} ± {a.std(ddof=1):.2f}" for a in found]
        # Counted from the weights, not taken from the request.
        zeros = prunax.summarize(first_seed(RUNS[name, SPARSITIES[-1]][0])).sparsity
        rows.append((name, *cells, f"{zeros:.2%}"))
        curves[name] = [
            (s, a.mean(), a.std(ddof=1)) for s, a in zip(SPARSITIES, found, strict=True)
        ]
    columns = ("test accuracy, %", *(f"{s:.0%}" for s in SPARSITIES), "zeros, counted")
    return prunax.reports.Table(columns, rows), curves


def front(curves):
    return prunax.reports.plots.fronts(curves, dense=dense.mean(), ylabel="test accuracy, %")


# %% [markdown]
# ## Criteria: which weights matter?
#
# - *magnitude* $|w|$: needs nothing but the weights;
# - *saliency* $|w\,\partial L/\partial w|$: what the loss would change, to first order, averaged over steps, since the
#   gradient of one batch is noisy;
# - *movement* $-w\,\partial L/\partial w$: weights that training pushes away from zero stay (Sanh et al., 2020);
# - *random*: the baseline. A criterion that does not beat it knows nothing.
#
# All follow one schedule, shown first, and one allocation: Erdős-Rényi, by which small layers keep more.


# %%
ERK = prunax.allocation.erdos_renyi


def pruned(schedule, allocation=ERK, **options):
    return prunax.prune(adam(), schedule, allocation=allocation, **options)


def gradual(sparsity):
    return prunax.schedules.polynomial(
        sparsity, STEPS // 5, STEPS * 7 // 10, every=max(STEPS // 50, 1)
    )


prunax.reports.plots.schedule(gradual(0.9), STEPS)

# %%
scores = prunax.scores
saliency, movement = scores.ema(scores.saliency, 0.99), scores.ema(scores.movement, 0.99)
criteria = {
    "magnitude": lambda s, key: pruned(gradual(s)),
    "saliency": lambda s, key: pruned(gradual(s), score=saliency),
    "movement": lambda s, key: pruned(gradual(s), score=movement),
    "random": lambda s, key: pruned(gradual(s), score=scores.random, key=key),
}
table, curves = compare(criteria)
table

# %%
front(curves)

# %% [markdown]
# In theory a criterion that sees the loss should win. Saliency does, at 98% and by little; at 90% it and magnitude are
# one. Movement was made for fine-tuning a trained network: from scratch, a weight that shrinks for a while is not one
# that does not matter, and the criterion falls behind and spreads. All of them are far above chance.
#
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
    "at the start": lambda s, key: pruned(s),
    "halfway": lambda s, key: pruned(prunax.schedules.one_shot(s, STEPS // 2)),
    "magnitude": criteria["magnitude"],
    "AC/DC": lambda s, key: pruned(alternating(s)),
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
    seen = np.asarray(RUNS[name, SPARSITIES[-1]][1])
    label = "gradual" if name == "magnitude" else name
    axes.errorbar(
        range(1, EPOCHS + 1), seen.mean(0), seen.std(0, ddof=1), fmt="o-", capsize=3, label=label
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
allocations = {
    "uniform": lambda s, key: pruned(gradual(s), prunax.allocation.uniform),
    "magnitude": criteria["magnitude"],
    "LAMP": lambda s, key: pruned(gradual(s), prunax.allocation.lamp),
    "global": lambda s, key: pruned(gradual(s), prunax.allocation.global_ranking),
}
table, curves = compare(allocations)
table

# %%
front({"Erdős-Rényi" if name == "magnitude" else name: points for name, points in curves.items()})

# %% [markdown]
# The total is the same for all, the layers are not. The last layer has the fewest weights and can spare the fewest.

# %%
layers = {}
for name in allocations:
    summary = prunax.summarize(first_seed(RUNS[name, SPARSITIES[-1]][0]))
    layers[name] = [leaf for leaf in summary.leaves if leaf.prunable]

figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
height = 0.8 / len(layers)
for i, (name, leaves) in enumerate(layers.items()):
    axes.barh(
        np.arange(len(leaves)) + (i - 1.5) * height,
        [100 * leaf.sparsity for leaf in leaves],
        height,
        label="Erdős-Rényi" if name == "magnitude" else name,
    )
names = [leaf.path.split("/")[1] for leaf in leaves]
axes.set_yticks(
    range(len(leaves)),
    [f"{name}\n{leaf.weights:,}" for name, leaf in zip(names, leaves, strict=True)],
)
axes.set(
    xlim=(0, 100), xlabel=f"sparsity, % ({SPARSITIES[-1]:.0%} in all)", ylabel="layer, weights"
)
axes.invert_yaxis()
axes.grid(axis="x", alpha=0.3)
_ = figure.legend(loc="outside upper center", ncols=4, fontsize="small")

# %% [markdown]
# A criterion or an allocation can go wrong in one way that the accuracy shows too late: a layer that is emptied lets
# nothing through. `screen_params` looks for it, and for units that have lost all their inputs.

# %%
params = first_seed(RUNS["global", SPARSITIES[-1]][0])
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
# All of them share weights out to the layers by Erdős-Rényi, and so does gradual pruning of a dense network by
# magnitude, which stands beside them.

# %%
moving = {"every": max(STEPS // 40, 1), "end_step": STEPS * 3 // 4}
transforms = prunax.transforms
dynamic = {
    "static": lambda s, key: transforms.static_sparse(adam(), s, key=key),
    "SET": lambda s, key: transforms.sparse_evolutionary(adam(), s, key=key, **moving),
    "RigL": lambda s, key: transforms.rigl(adam(), s, key=key, **moving),
    "magnitude": criteria["magnitude"],
}
table, curves = compare(dynamic)
table

# %%
front({"gradual, from dense" if n == "magnitude" else n: points for n, points in curves.items()})

# %% [markdown]
# How far do connections move? Compare the masks after the first epoch with the last ones. The overlap is what both
# keep, of all that either keeps.

# %%
masks = first_seed(RUNS["RigL", SPARSITIES[-1]][2])
first, last = (jax.tree.map(lambda m, at=at: m[at], masks) for at in (0, -1))
prunax.compare_masks(first, last)

# %% [markdown]
# And where do they go? An input of the first layer is a pixel. Random masks spread over all pixels alike; RigL
# gathers where the pictures differ.

# %%
side = train_images.shape[1]
figure, panels = plt.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
kept = {"mean image": train_images.mean(axis=0)[..., 0]}
for name in ("static", "RigL"):
    mask = RUNS[name, SPARSITIES[-1]][2]["params"]["Dense_0"]["kernel"][0, -1]
    kept[f"{name}: weights a pixel"] = mask.sum(axis=1).reshape(side, side)
for axes, (title, values) in zip(panels, kept.items(), strict=True):
    figure.colorbar(axes.imshow(values, cmap="Blues", vmin=0), ax=axes, shrink=0.7)
    axes.set_title(title, fontsize="medium")
    axes.set(xticks=[], yticks=[])

# %% [markdown]
# ## Everything in one table

# %%
table, _ = compare(criteria | schedules | allocations | dynamic)
rows = sorted(table.rows, key=lambda row: -RUNS[row[0], SPARSITIES[-1]][1][:, -1].mean())
prunax.reports.Table(
    table.columns, rows, [("dense", f"{dense.mean():.2f}") + ("",) * len(SPARSITIES)]
)

# %% [markdown]
# Where theory and result differ, here and in the [recorded
# runs](https://github.com/prunax/prunax/blob/main/docs/benchmarks.md), which are longer:
#
# - Criteria are what papers are about, and *where* weights go matters more: uniform pruning leaves the last layer 20 of
#   its 1,000 weights at 98%. The three other allocations are one.
# - AC/DC should profit from undoing early choices. In runs this short it and gradual pruning are one, within
#   deviations.
# - RigL should beat SET, since it grows where the loss asks for it, and here it does. As published it grows by the
#   gradient of one small batch (`grow=scores.gradient`), which is in large part noise and what all connections of an
#   input or a unit have in common: in the recorded runs RigL then falls behind SET. `rigl` takes the mean of about a
#   hundred steps, and leaves out the common part.
#
# Differences within the deviations mean nothing.
#
# Next: [4. Smaller and faster](4_smaller_and_faster.ipynb).
