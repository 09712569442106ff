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
# # 7. Robustness, generalisation and lottery tickets
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/7_robustness_and_tickets.ipynb)
#
# The outputs kept here are those of the fast mode. In Colab it runs in full, unless the first cell begins with
# `%env PRUNAX_FAST=1`.
#
# Test accuracy is not all that pruning changes. Does a sparse network overfit less? Does it stand noise, blur and
# attacks as well as the dense one? And could it have been trained sparse to begin with? Three experiments, with the
# dense network and with random masks beside them.

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
TRAIN, TEST = (10_000, 1_000) if FAST else (60_000, 10_000)  # images
EPOCHS, SEEDS, ROUNDS = (4, 2, 6) if FAST else (10, 5, 12)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
print("Fast mode: few images and seeds." if FAST else "Full mode.")

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
CLASSES, BATCH = 10, 100
STEPS = EPOCHS * (len(train_labels) // BATCH)
train, test = (train_images, train_labels), (test_images, test_labels)
print(f"{len(train_labels):,} images to train on, {len(test_labels):,} to test on")


# %%
class LeNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        for width in (300, 100):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


def apply(params, images):
    return LeNet().apply({"params": params}, images)


def cross_entropy(params, images, labels):
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def initial_params(key):
    return LeNet().init(key, test_images[:1])["params"]


@jax.jit
def accuracy(params, images, labels):
    return jnp.mean(apply(params, images).argmax(-1) == labels)


# %% [markdown]
# One training function serves all three experiments. Masks go in as an argument, so that other masks compile nothing
# anew; a schedule prunes globally, by magnitude, while training.


# %%
def adam():
    return optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def descend(tx, params, key, images, labels):
    """STEPS steps, however many images there are."""

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(cross_entropy)(params, images[rows], labels[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(labels))
        rows = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        return jax.lax.scan(step, carry, rows)

    keys = jax.random.split(key, STEPS // (len(labels) // BATCH))
    return jax.lax.scan(epoch, (params, tx.init(params)), keys)[0][0]


@functools.partial(jax.jit, static_argnums=0)
def train_pruned(sparsity, key, images, labels):
    """From a fresh start to a pruned network; 0.0 trains the dense one."""
    init_key, order_key = jax.random.split(key)
    tx = adam()
    if sparsity:
        schedule = prunax.schedules.polynomial(
            sparsity, STEPS // 5, STEPS * 7 // 10, every=max(STEPS // 50, 1)
        )
        tx = prunax.prune(tx, schedule, allocation=prunax.allocation.global_ranking)
    return descend(tx, initial_params(init_key), order_key, images, labels)


@jax.jit
def train_masked(params, masks, key):
    """From given params, under given masks."""
    return descend(prunax.transforms.fixed_masks(adam(), masks), params, key, *train)


# %% [markdown]
# ## Generalisation
#
# Take few images, and give a fifth of them a wrong label. What a network learns of those is learnt by heart: nothing
# about other images follows from it. Does a network with fewer weights learn less of it?

# %%
FEW = 1_000
few_images, few_labels = train_images[:FEW], train_labels[:FEW]
wrong = jax.random.bernoulli(jax.random.key(0), 0.2, (FEW,))
shift = jax.random.randint(jax.random.key(1), (FEW,), 1, CLASSES)
noisy_labels = jnp.where(wrong, (few_labels + shift) % CLASSES, few_labels)

keys = [jax.random.key(seed) for seed in range(SEEDS)]
levels = (0.0, *SPARSITIES)
names = ["dense", *(f"{s:.0%}" for s in SPARSITIES)]
right_runs = {s: [train_pruned(s, key, few_images, few_labels) for key in keys] for s in levels}
noisy_runs = {s: [train_pruned(s, key, few_images, noisy_labels) for key in keys] for s in levels}


def percent(runs, images, labels):
    return np.array([100 * float(accuracy(params, images, labels)) for params in runs])


rows, curves = [], {"right labels": [], "a fifth wrong": []}
by_heart = []
for s, name in zip(levels, names, strict=True):
    learnt = percent(noisy_runs[s], few_images[wrong], noisy_labels[wrong])
    by_heart.append(learnt.mean())
    cells = []
    for points, runs in zip(curves.values(), (right_runs[s], noisy_runs[s]), strict=True):
        found = percent(runs, *test)
        points.append(found.mean())
        cells.append(f"{found.mean():.1f} ± {found.std(ddof=1):.1f}")
    rows.append(
        (name, f"{prunax.summarize(noisy_runs[s][0]).sparsity:.1%}", f"{learnt.mean():.1f}", *cells)
    )
columns = (
    "network",
    "zeros, counted",
    "wrong labels learnt, %",
    "test, right labels, %",
    "test, a fifth wrong, %",
)
prunax.reports.Table(columns, rows)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
at = [1 / (1 - s) for s in levels]
left.plot(at, by_heart, "o-", color="C3")
left.axhline(100 / CLASSES, color="0.4", linestyle="--", linewidth=1)
left.set(ylabel="wrong labels learnt, %", ylim=(0, None))
for name, points in curves.items():
    right.plot(at, points, "o-", label=name)
right.set(ylabel="test accuracy, %")
right.legend(fontsize="small")
for axes in (left, right):
    axes.set_xscale("log")
    axes.set_xticks(at, names, rotation=45)
    axes.minorticks_off()
    axes.set(xlabel="sparsity")
    axes.grid(alpha=0.3)

# %% [markdown]
# The dashed line is chance. The dense network has learnt most wrong labels by heart, and a network of a tenth of the
# weights none beyond chance; that helps it on other images, where labels were wrong: the curves on the right come
# together. Below chance is who sees the right class and not the wrong label. Where both curves fall, the network has
# become too small for the task itself.
#
# ## Robustness
#
# Accuracy on images with noise, blur, more brightness or a hidden patch, and under two attacks that follow the
# gradient: FGSM takes one step (Goodfellow et al., 2015), PGD ten from a random start (Madry et al., 2018).

# %%
EPSILON = 0.02  # what an attack may change a pixel by


def noise(params, images, labels, key):
    return jnp.clip(images + 0.1 * jax.random.normal(key, images.shape), 0, 1)


def blur(params, images, labels, key):
    weights = jax.nn.softmax(-(jnp.arange(-2.0, 3.0) ** 2) / 2)
    for axis in (1, 2):
        size = images.shape[axis]
        padded = jnp.pad(images, [(2, 2) if i == axis else (0, 0) for i in range(4)], mode="edge")
        shifted = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(5)]
        images = sum(w * x for w, x in zip(weights, shifted, strict=True))
    return images


def brightness(params, images, labels, key):
    return jnp.clip(images + 0.2, 0, 1)


def occlusion(params, images, labels, key):
    """A black square of a quarter of the width, at a random place in each image."""
    side = images.shape[1]
    corner = jax.random.randint(key, (2, len(images), 1), 0, side - side // 4 + 1)
    row, column = (jnp.arange(side) >= corner) & (jnp.arange(side) < corner + side // 4)
    return jnp.where((row[:, :, None] & column[:, None, :])[..., None], 0.0, images)


def ascend(params, x, images, labels, size):
    x = x + size * jnp.sign(jax.grad(cross_entropy, argnums=1)(params, x, labels))
    return jnp.clip(jnp.clip(x, images - EPSILON, images + EPSILON), 0, 1)


def fgsm(params, images, labels, key):
    return ascend(params, images, images, labels, EPSILON)


def pgd(params, images, labels, key):
    start = images + jax.random.uniform(key, images.shape, minval=-EPSILON, maxval=EPSILON)
    return jax.lax.fori_loop(
        0, 10, lambda _, x: ascend(params, x, images, labels, EPSILON / 4), jnp.clip(start, 0, 1)
    )


PERTURBATIONS = (noise, blur, brightness, occlusion, fgsm, pgd)
kinds = [perturb.__name__ for perturb in PERTURBATIONS]

# %% [markdown]
# This is what they do to one image:

# %%
clean_runs = {s: [train_pruned(s, key, *train) for key in keys] for s in levels}
one, label = test_images[:1], test_labels[:1]
params = clean_runs[0.0][0]
shown = {"clean": one}
for perturb in PERTURBATIONS:
    shown[perturb.__name__] = perturb(params, one, label, jax.random.key(0))
figure, panels = plt.subplots(2, 4, figsize=(6.5, 4), layout="constrained")
panels[-1, -1].axis("off")
for axes, (name, image) in zip(panels.flat, shown.items(), strict=False):
    axes.imshow(np.asarray(image[0, ..., 0]), cmap="gray", vmin=0, vmax=1)
    axes.set_title(f"{name}\nseen as {int(apply(params, image)[0].argmax())}", fontsize="medium")
    axes.set(xticks=[], yticks=[])
print(f"The true class is {int(label[0])}. Attacks change a pixel by at most {EPSILON}.")


# %%
@jax.jit
def perturbed_accuracies(params):
    keys = jax.random.split(jax.random.key(1), len(PERTURBATIONS))
    attacked = [f(params, *test, key) for f, key in zip(PERTURBATIONS, keys, strict=True)]
    return jnp.array([accuracy(params, images, test_labels) for images in attacked])


clean = {s: percent(clean_runs[s], *test).mean() for s in levels}
means = {
    s: 100 * np.mean([perturbed_accuracies(params) for params in clean_runs[s]], axis=0)
    for s in levels
}
rows = [
    (name, f"{clean[s]:.1f}", *(f"{value:.1f}" for value in means[s]))
    for s, name in zip(levels, names, strict=True)
]
prunax.reports.Table(("accuracy, %", "clean", *kinds), rows)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
height = 0.8 / len(levels)
for i, (s, name) in enumerate(zip(levels, names, strict=True)):
    axes.bar(
        np.arange(len(kinds)) + (i - 2) * height,
        clean[s] - means[s],
        height,
        color=plt.cm.viridis(i / len(levels)),
        label=name,
    )
axes.set_xticks(range(len(kinds)), kinds, rotation=30)
axes.set(ylabel="accuracy lost, in points")
axes.grid(axis="y", alpha=0.3)
_ = figure.legend(title="sparsity", loc="outside upper center", ncols=5, fontsize="small")

# %% [markdown]
# The bars are what a perturbation takes from each network's own clean accuracy, which pruning has lowered (the table):
# where they shrink from left to right by less than that, the sparse network is right less often all the same. So it is
# with noise, blur and occlusion. Under more brightness and the two attacks it is right as often as the dense one or
# more, until too little is left.
#
# ## Lottery tickets
#
# Frankle and Carbin (2019): inside a dense network at its random start is a sparse one, a *winning ticket*, that
# trains as well on its own. To find it, train, prune the smallest weights, put the others back to their *initial*
# values, and again.
#
# `lottery.iterative_magnitude_pruning` does the rounds. You hand it your training as a function of params and masks;
# it yields a ticket after each round.

# %%
start, order = initial_params(jax.random.key(7)), jax.random.key(8)
FRACTION = 0.4 if FAST else 0.25
tickets = list(
    prunax.lottery.iterative_magnitude_pruning(
        lambda params, masks: train_masked(params, masks, order),
        start,
        rounds=ROUNDS,
        fraction=FRACTION,
    )
)
print("sparsities:", ", ".join(f"{ticket.sparsity:.1%}" for ticket in tickets))

# %% [markdown]
# Is it the masks, or the start that they were found with? Two controls train in the same way, at the same sparsity of
# each layer:
#
# - *the ticket's masks on another start*;
# - *random masks on the ticket's start*.

# %%
another = initial_params(jax.random.key(9))


def random_masks(key, like):
    """As many weights of each layer as `like` has, at random."""
    kept = {
        leaf.path: leaf.sparsity for leaf in prunax.summarize(start, like).leaves if leaf.prunable
    }
    return prunax.compute_masks(
        start,
        scores=prunax.scores.random(start, key=key),
        allocation=prunax.allocation.by_path(kept),
    )


def test_accuracy(params):
    return float(accuracy(params, *test))


curves = {"winning ticket": [], "its masks, another start": [], "random masks, its start": []}
for ticket in tickets:
    masks = ticket.masks
    others = random_masks(jax.random.key(10 + ticket.round), masks)
    trained = (
        ticket.params,
        train_masked(prunax.apply_masks(another, masks), masks, order),
        train_masked(prunax.apply_masks(start, others), others, order),
    )
    for points, params in zip(curves.values(), trained, strict=True):
        points.append((float(ticket.sparsity), 100 * test_accuracy(params)))

rows = [
    (f"{ticket.sparsity:.1%}", *(f"{points[i][1]:.1f}" for points in curves.values()))
    for i, ticket in enumerate(tickets)
]
prunax.reports.Table(("sparsity", *(f"{name}, %" for name in curves)), rows)

# %%
prunax.reports.plots.fronts(curves, dense=curves["winning ticket"][0][1], ylabel="test accuracy, %")

# %% [markdown]
# It takes both: the same masks on another start fall behind by points, and random masks on the ticket's start by more,
# the sparser the more. One start and one order of images: a difference of less than a point says little here.
#
# What has the ticket kept? Inputs of the first layer are pixels. It keeps weights around the outlines of the garments,
# where pictures differ, and some at pixels that are nearly always blank: their weights have stayed what chance made
# them, and nothing made them smaller.

# %%
side = train_images.shape[1]
figure, panels = plt.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
pictures = {"mean image": train_images.mean(axis=0)[..., 0]}
for name, tree in (("ticket", tickets[-1].masks), ("random", others)):
    pictures[f"{name}: weights a pixel"] = tree["Dense_0"]["kernel"].sum(axis=1).reshape(side, side)
for axes, (title, values) in zip(panels, pictures.items(), strict=True):
    figure.colorbar(axes.imshow(values, cmap="Blues", vmin=0), ax=axes, shrink=0.7)
    axes.set_title(title, fontsize="medium")
    axes.set(xticks=[], yticks=[])

# %%
prunax.compare_masks(tickets[1].masks, tickets[-1].masks)

# %% [markdown]
# Masks only ever shrink from round to round: nothing is in the last that was not in the first.
#
# `Ticket` is a pytree. Save the last one with Orbax, hand it back as `resume=`, and an interrupted search goes on.

# %% [markdown]
# ## Robustness as a goal
#
# Nothing above was trained to be robust. `python -m benchmarks.adversarial`, a script of [the
# repository](https://github.com/prunax/prunax), trains against PGD, and prunes to 95% by magnitude, at once or
# gradually, and by HYDRA, scores that are learned under the same loss (100 hidden units, 10,000 images, three seeds,
# %):
#
# | method, sparsity | clean | PGD, 0.05 | PGD, 0.1 | occlusion | calibration error |
# | --- | ---: | ---: | ---: | ---: | ---: |
# | dense | 83.6 ± 0.0 | 39.5 ± 0.5 | 11.4 ± 0.6 | 70.8 | 2.0 |
# | dense, adversarial | 73.7 ± 0.9 | 66.9 ± 1.2 | 55.1 ± 0.6 | 65.9 | 10.6 |
# | magnitude, 95% | 79.9 ± 0.8 | 48.6 ± 1.4 | 18.2 ± 0.8 | 72.5 | 17.1 |
# | magnitude at once, adversarial, 95% | 68.8 ± 1.5 | 59.3 ± 2.1 | 45.5 ± 0.6 | 61.4 | 14.8 |
# | magnitude, adversarial, 95% | 69.8 ± 1.4 | 61.9 ± 2.0 | 50.5 ± 1.5 | 62.6 | 15.3 |
# | hydra, 95% | 69.0 ± 0.9 | 61.8 ± 0.5 | 49.3 ± 0.8 | 62.9 | 11.7 |
#
# Pruning by magnitude closes the gap and resists attacks better than the dense network, at the price of clean accuracy
# and calibration. Training against attacks does far more, most of it in the dense network. HYDRA is well above
# magnitude at once, to which its paper compares it; gradual pruning under the same loss is as good or better.
#
# Back to [1. Quickstart](1_quickstart.ipynb), or on to [which method
# when](https://github.com/prunax/prunax/blob/main/docs/methods.md).
