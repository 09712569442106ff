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
# # 1. Quickstart: prune a network while it trains
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/1_quickstart.ipynb)
#
# The outputs kept here are those of the fast mode. In Colab it runs in full, unless the first cell begins with
# `%env PRUNAX_FAST=1`.
#
# A trained network needs only a part of its weights. `prunax` finds out which: parameters go in, *masks* come out, and
# a wrapped [optax](https://github.com/google-deepmind/optax) optimizer keeps the pruned weights at exactly zero. You
# will prune a network in one shot, then while it trains, and see why the second is better.

# %%
# Installs what is missing: everything in Colab, nothing where it is there already.
import importlib.util
import subprocess
import sys

needed = {
    "prunax": "prunax @ git+https://github.com/prunax/prunax",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}
missing = [needed[name] for name in needed if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

# %%
import os
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import prunax

plt.rcParams["font.size"] = 12
FAST = os.environ.get("PRUNAX_FAST") == "1"
STEPS = 400 if FAST else 2000
print("Fast mode: short training." if FAST else "Full mode.", f"{STEPS} steps a run.")

# %% [markdown]
# ## Data and model
#
# Handwritten digits of 8 x 8 pixels, from scikit-learn. Before data goes into anything, let `screen_batch` look at it:
# it changes nothing, and says what is not as declared.

# %%
digits = load_digits()
found = prunax.reports.screen_batch({"images": digits.images}, low=0.0, high=1.0)
prunax.reports.findings_table(found)

# %% [markdown]
# The pixels have 17 levels, from 0 to 16. Scaled, nothing is found any more.

# %%
order = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.asarray(digits.images[order] / 16, jnp.float32)
labels = jnp.asarray(digits.target[order])
train_images, test_images = images[:1400], images[1400:]
train_labels, test_labels = labels[:1400], labels[1400:]
found = prunax.reports.screen_batch({"images": images}, low=0.0, high=1.0)
print(len(found), "findings")


# %%
class MLP(nn.Module):
    """A plain Flax module. Nothing in it knows of pruning."""

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


model = MLP()
initial = model.init(jax.random.key(0), images[:1])


def loss_fn(params, images, labels):
    logits = model.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def accuracy(params):
    return jnp.mean(model.apply(params, test_images).argmax(-1) == test_labels)


# %% [markdown]
# The training loop is the usual one, too.


# %%
def train(tx, params):
    """Any optax optimizer: the loop is the same, whether it prunes or not."""

    @jax.jit
    def step(params, state, rows):
        grads = jax.grad(loss_fn)(params, train_images[rows], train_labels[rows])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    batches = np.random.default_rng(1)
    for _ in range(STEPS):
        params, state = step(params, state, batches.integers(len(train_labels), size=64))
    return params, state


dense, _ = train(optax.adam(1e-3), initial)
print(f"dense: {accuracy(dense):.1%} of the test images are right")

# %% [markdown]
# ## One shot: `compute_masks`
#
# A mask is a boolean array, and `True` means that the weight *stays*. `compute_masks` gives a tree of the structure of
# the params. By default it removes the weights of smallest magnitude, the same fraction in each kernel; biases are left
# alone, and have the scalar `True`.

# %%
masks = prunax.compute_masks(dense, 0.9)
prunax.summarize(prunax.apply_masks(dense, masks), masks)

# %%
prunax.reports.plots.weights(dense, masks, title="Weights of the dense network, 90% to be pruned")

# %% [markdown]
# Everything between the dashed lines goes. How much does the network suffer? The sparsity is an ordinary argument of a
# pure function: `vmap` over it, and one compiled call answers for all sparsities at once.

# %%
sparsities = jnp.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98])


@jax.jit
@jax.vmap
def pruned_accuracy(sparsity):
    masks = prunax.compute_masks(dense, sparsity)
    return accuracy(prunax.apply_masks(dense, masks))


one_shot = pruned_accuracy(sparsities)
for s, a in zip(sparsities, one_shot, strict=True):
    print(f"{s:.0%} pruned: {a:.1%} right")

# %% [markdown]
# ## While it trains: wrap the optimizer
#
# Pruned at once, the network cannot adapt to what it lost. So prune little by little and let training repair each loss:
# fast at first, when much is superfluous, slowly towards the end (Zhu and Gupta, 2017).

# %%
schedule = prunax.schedules.polynomial(0.9, STEPS // 5, STEPS * 7 // 10, every=STEPS // 40)
prunax.reports.plots.schedule(schedule, STEPS)

# %% [markdown]
# One line changes: `optax.adam(1e-3)` becomes `prunax.prune(optax.adam(1e-3), schedule)`.

# %%
sparse, state = train(prunax.prune(optax.adam(1e-3), schedule), initial)
print(f"90% pruned in one shot:     {one_shot[4]:.1%}")
print(f"90% pruned during training: {accuracy(sparse):.1%}")
print(f"dense:                      {accuracy(dense):.1%}")

# %% [markdown]
# The pruned weights are zeros in the params themselves, not hidden behind a mask: whatever Adam's moments say, the
# wrapper's last word is an update of `-weight`. The masks live in the optimizer's state, so a checkpoint of the state
# has them.

# %%
kernel = sparse["params"]["Dense_0"]["kernel"]
print(
    f"{int((kernel == 0).sum()):,} of the {kernel.size:,} weights of the first layer are exactly 0.0"
)
prunax.summarize(sparse, state.masks)

# %%
prunax.reports.plots.layers(sparse, state.masks)

# %% [markdown]
# Is it the same tenth that stays? Training with the masks moved the weights, and with them the choice. The overlap is
# what both keep, of all that either keeps.

# %%
prunax.compare_masks(masks, state.masks)

# %% [markdown]
# Masks are easy to look at: dark is kept, inputs go down and outputs across.

# %%
prunax.reports.plots.masks(state.masks)

# %% [markdown]
# Inputs of the first layer are pixels, so its mask says, a little, where the network looks. Pixels at the left and
# right border are nearly always blank. Their weights get no gradient and stay what chance made them, while the
# threshold rises.

# %%
kept_per_pixel = np.asarray(state.masks["params"]["Dense_0"]["kernel"]).mean(axis=1).reshape(8, 8)
ink = np.asarray(train_images).mean(axis=0)

figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3), layout="constrained")
for axes, values, title in (
    (left, ink, "mean of the images"),
    (right, kept_per_pixel, "fraction of weights kept"),
):
    figure.colorbar(axes.imshow(values, cmap="Blues", vmin=0), ax=axes, shrink=0.8)
    axes.set(title=title, xticks=[], yticks=[])

blank = ink < 0.01
print(f"kept at pixels that are nearly always blank: {kept_per_pixel[blank].mean():.1%}")
print(f"kept at the others:                          {kept_per_pixel[~blank].mean():.1%}")

# %% [markdown]
# ## How far can it go?
#
# The same at other sparsities. The axis is logarithmic in what is *kept*: each halving is equally wide.

# %%
gradual = []
for sparsity in (0.8, 0.9, 0.95, 0.98):
    schedule = prunax.schedules.polynomial(sparsity, STEPS // 5, STEPS * 7 // 10, every=STEPS // 40)
    params, _ = train(prunax.prune(optax.adam(1e-3), schedule), initial)
    gradual.append((sparsity, float(accuracy(params))))

curves = {
    "in one shot": [(float(s), float(a)) for s, a in zip(sparsities, one_shot, strict=True)],
    "while training": gradual,
}
prunax.reports.plots.fronts(curves, dense=float(accuracy(dense)), ylabel="test accuracy")

# %% [markdown]
# ## A page to keep
#
# `report_page` writes all of this into one HTML file: sizes, pictures, and what `screen_params` found, such as
# units that have no weight left, which structural pruning (notebook 4) can remove altogether.

# %%
for finding in prunax.reports.screen_params(sparse, state.masks):
    print(finding)

page = prunax.reports.report_page(
    sparse,
    state.masks,
    title="Digits at 90%",
    sections={"Against one shot": prunax.compare_masks(masks, state.masks)},
)
file = Path(tempfile.mkdtemp()) / "report.html"
file.write_text(page)
print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")

# %% [markdown]
# ## Next
#
# - [2. Decide by the loss](2_decide_by_the_loss.ipynb): choose, compute the loss, accept or reject.
# - [3. Methods compared](3_methods.ipynb): other criteria, schedules, allocations, and training sparse from the start.
# - [4. Smaller and faster](4_smaller_and_faster.ipynb): zeros alone save no time. This one shows what does.
# - [5. A language model](5_language_model.ipynb): pruned in one shot, without training.
# - [6. Prune, recover, hand back](6_recover_and_hand_back.ipynb): what brings accuracy back, and a folder for others.
# - [7. Robustness and lottery tickets](7_robustness_and_tickets.ipynb): what pruning does besides.
