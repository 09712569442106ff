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
# Test accuracy is not all that pruning changes. Does a sparse network overfit less? Does it stand noise, blur and
# attacks as well as the dense one? And could it have been trained sparse to begin with? Three experiments, with the
# dense network and with random masks beside them.

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
from benchmarks import datasets, loop, models, robustness

FAST = os.environ.get("PRUNAX_FAST") == "1"
TRAIN, TEST = (10_000, 1_000) if FAST else (60_000, 10_000)  # images
EPOCHS, SEEDS, ROUNDS = (4, 2, 6) if FAST else (10, 5, 12)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
print("Fast mode: few images and seeds." if FAST else "Full mode.")

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
data = jax.tree.map(
    jnp.asarray,
    loop.Data(
        data_set.train_images[:TRAIN],
        data_set.train_labels[:TRAIN],
        data_set.test_images[:TEST],
        data_set.test_labels[:TEST],
    ),
)
BATCH = 100
STEPS = EPOCHS * loop.steps_per_epoch(len(data.train_labels), BATCH)
model = models.MLP(data_set.num_classes)
apply = functools.partial(models.apply, model)
print(
    f"{data_set.name}: {len(data.train_labels):,} images to train on, {len(data.test_labels):,} to test on"
)

# %% [markdown]
# One training function serves all three experiments. Masks go in as an argument, so that other masks compile nothing
# anew; a schedule prunes globally, by magnitude, while training.


# %%
def adam():
    return optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def scan_epochs(tx, params, key, data):
    def epoch(state, _):
        state, _ = loop.train_epoch(apply, tx, data, state, batch_size=BATCH)
        return state, None

    # The same number of steps, however many images there are.
    epochs = STEPS // loop.steps_per_epoch(len(data.train_labels), BATCH)
    return jax.lax.scan(epoch, loop.State(params, tx.init(params), key), length=epochs)[0].params


@jax.jit
def initial_params(key):
    return models.init(model, key, data.train_images)


@functools.partial(jax.jit, static_argnums=0)
def train_pruned(sparsity, key, data):
    """From a fresh start to a pruned network; 0.0 trains the dense one."""
    init_key, order_key = jax.random.split(key)
    tx = adam()
    if sparsity:
        schedule = prunax.schedules.polynomial(
            sparsity, STEPS // 5, STEPS * 7 // 10, every=max(STEPS // 50, 1)
        )
        tx = prunax.prune(tx, schedule, allocation=prunax.allocation.global_ranking)
    return scan_epochs(tx, models.init(model, init_key, data.train_images), order_key, data)


@jax.jit
def train_masked(params, masks, key):
    """From given params, under given masks."""
    return scan_epochs(prunax.transforms.fixed_masks(adam(), masks), params, key, data)


@jax.jit
def accuracy(params, images, labels):
    return loop.evaluate(apply, params, images, labels)


# %% [markdown]
# ## Generalisation
#
# Take few images, and give a fifth of them a wrong label. What a network learns of those is learnt by heart: nothing
# about other images follows from it. Does a network with fewer weights learn less of it?

# %%
FEW = 1_000
few = data._replace(train_images=data.train_images[:FEW], train_labels=data.train_labels[:FEW])
wrong = jax.random.bernoulli(jax.random.key(0), 0.2, (FEW,))
shift = jax.random.randint(jax.random.key(1), (FEW,), 1, data_set.num_classes)
wrong_labels = (few.train_labels + shift) % data_set.num_classes
noisy = few._replace(train_labels=jnp.where(wrong, wrong_labels, few.train_labels))

keys = [jax.random.key(seed) for seed in range(SEEDS)]
levels = (0.0, *SPARSITIES)
names = ["dense", *(f"{s:.0%}" for s in SPARSITIES)]
right_runs = {s: [train_pruned(s, key, few) for key in keys] for s in levels}
noisy_runs = {s: [train_pruned(s, key, noisy) for key in keys] for s in levels}


def percent(runs, images, labels):
    return np.array([100 * float(accuracy(params, images, labels)) for params in runs])


rows, curves = [], {"right labels": [], "a fifth wrong": []}
by_heart = []
for s, name in zip(levels, names, strict=True):
    learnt = percent(noisy_runs[s], noisy.train_images[wrong], noisy.train_labels[wrong])
    by_heart.append(learnt.mean())
    cells = []
    for points, runs in zip(curves.values(), (right_runs[s], noisy_runs[s]), strict=True):
        test = percent(runs, data.test_images, data.test_labels)
        points.append(test.mean())
        cells.append(f"{test.mean():.1f} ± {test.std(ddof=1):.1f}")
    rows.append((name, f"{loop.sparsity(noisy_runs[s][0]):.1%}", f"{learnt.mean():.1f}", *cells))
columns = (
    "network",
    "zeros, counted",
    "wrong labels learnt, %",
    "test, learnt from right labels, %",
    "test, a fifth wrong, %",
)
prunax.reports.Table(columns, rows)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
at = [1 / (1 - s) for s in levels]
left.plot(at, by_heart, "o-", color="C3")
left.axhline(100 / data_set.num_classes, color="0.4", linestyle="--", linewidth=1)
left.set(ylabel="wrong labels learnt, %", ylim=(0, None))
for name, points in curves.items():
    right.plot(at, points, "o-", label=name)
right.set(ylabel="test accuracy, %")
right.legend()
for axes in (left, right):
    axes.set_xscale("log")
    axes.set_xticks(at, names)
    axes.minorticks_off()
    axes.set(xlabel="sparsity")
    axes.grid(alpha=0.3)

# %% [markdown]
# The dashed line is chance. Where the two curves on the right come together, what pruning takes is mostly what was
# learnt by heart. Where both fall, the network has become too small for the task itself.
#
# ## Robustness
#
# `benchmarks/robustness.py` measures the accuracy on images with noise, blur, more brightness or a hidden patch, and
# under two attacks that follow the gradient, FGSM and PGD. This is what they do to one image:

# %%
clean_runs = {s: [train_pruned(s, key, data) for key in keys] for s in levels}
one, label = data.test_images[:1], data.test_labels[:1]
params = clean_runs[0.0][0]
shown = {"clean": one}
for name, perturb in robustness.PERTURBATIONS.items():
    shown[name] = perturb(apply, params, one, label, jax.random.key(0))
figure, panels = plt.subplots(1, len(shown), figsize=(10, 1.9), layout="constrained")
for axes, (name, image) in zip(panels, shown.items(), strict=True):
    axes.imshow(np.asarray(image[0, ..., 0]), cmap="gray", vmin=0, vmax=1)
    axes.set_title(f"{name}\nseen as {int(apply(params, image)[0].argmax())}", fontsize="small")
    axes.set(xticks=[], yticks=[])
print(f"The true class is {int(label[0])}. Attacks change a pixel by at most {robustness.EPSILON}.")

# %%
found = {
    s: [
        robustness.measure("mlp", data_set.num_classes, p, data.test_images, data.test_labels)
        for p in clean_runs[s]
    ]
    for s in levels
}
kinds = list(robustness.PERTURBATIONS)
clean = {s: percent(clean_runs[s], data.test_images, data.test_labels).mean() for s in levels}
means = {s: [100 * np.mean([float(f[kind]) for f in found[s]]) for kind in kinds] for s in levels}
rows = [
    (name, f"{clean[s]:.1f}", *(f"{value:.1f}" for value in means[s]))
    for s, name in zip(levels, names, strict=True)
]
prunax.reports.Table(("accuracy, %", "clean", *kinds), rows)

# %%
figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
height = 0.8 / len(levels)
for i, (s, name) in enumerate(zip(levels, names, strict=True)):
    axes.bar(
        np.arange(len(kinds)) + (i - 2) * height,
        clean[s] - np.array(means[s]),
        height,
        color=plt.cm.viridis(i / len(levels)),
        label=name,
    )
axes.set_xticks(range(len(kinds)), kinds)
axes.set(ylabel="accuracy lost, in points")
axes.grid(axis="y", alpha=0.3)
_ = axes.legend(title="sparsity", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))

# %% [markdown]
# The bars are what a perturbation takes from each network's own clean accuracy. Where they grow from left to right,
# pruning has cost robustness besides; where they shrink, the sparse network bears the perturbation better.
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
    return float(accuracy(params, data.test_images, data.test_labels))


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
# One start and one order of images: a difference of less than a point says little here. The full mode and `python -m
# benchmarks.methods` train longer and repeat.
#
# What has the ticket kept? Inputs of the first layer are pixels.

# %%
side = data.train_images.shape[1]
figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
last = tickets[-1].masks
pictures = {
    "mean of the images": np.asarray(data.train_images).mean(axis=0)[..., 0],
    "ticket: weights a pixel": np.asarray(last["Dense_0"]["kernel"])
    .sum(axis=1)
    .reshape(side, side),
    "random: weights a pixel": np.asarray(others["Dense_0"]["kernel"])
    .sum(axis=1)
    .reshape(side, side),
}
for axes, (title, values) in zip(panels, pictures.items(), strict=True):
    figure.colorbar(axes.imshow(values, cmap="Blues", vmin=0), ax=axes)
    axes.set(title=title, xticks=[], yticks=[])

# %%
prunax.compare_masks(tickets[1].masks, tickets[-1].masks)

# %% [markdown]
# Masks only ever shrink from round to round: nothing is in the last that was not in the first.
#
# `Ticket` is a pytree. Save the last one with Orbax, hand it back as `resume=`, and an interrupted search goes on.
