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
# # 2. Decide by the loss
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/2_decide_by_the_loss.ipynb)
#
# The outputs kept here are those of the fast mode. In Colab it runs in full, unless the first cell begins with
# `%env PRUNAX_FAST=1`.
#
# Pruning is three steps, again and again:
#
# 1. **choose** parameters, or whole filters, that might go;
# 2. **compute the loss** without them;
# 3. **accept or reject** by that loss.
#
# Methods differ in how they choose: by magnitude, by gradient, by what a penalty drew to zero. What decides is the
# loss, on images that the network was not trained on. This notebook goes through the three steps by hand, then lets
# `prunax.search` do it, for single weights and for filters of a convolutional network, and in the end looks at images
# that decided nothing.

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
STEPS = 400 if FAST else 3000
print("Fast mode: short training." if FAST else "Full mode.", f"{STEPS} steps a run.")

# %% [markdown]
# ## Three parts of the data
#
# Handwritten digits of 8 x 8 pixels, which come with scikit-learn. One part trains, one part *decides* what to prune,
# and one part says at the end what the decisions were worth. Who decides on training images prunes what the network
# has learned by heart.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.asarray(digits.images[order, ..., None] / 16, jnp.float32)
labels = jnp.asarray(digits.target[order])
cuts = (1000, 1400)
train_images, decide_images, test_images = jnp.split(images, cuts)
train_labels, decide_labels, test_labels = jnp.split(labels, cuts)
print(len(train_labels), "to train,", len(decide_labels), "to decide,", len(test_labels), "to test")


# %%
class Net(nn.Module):
    """A small convolutional network. Nothing in it knows of pruning."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), 2, name="conv1")(x))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = nn.relu(nn.Dense(64, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="out")(x)


net = Net()
initial = net.init(jax.random.key(0), images[:1])


def cross_entropy(params, images, labels):
    logits = net.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, params, penalty=lambda params: 0.0):
    """Any optax optimizer, and perhaps a penalty in the loss."""

    def loss(params, rows):
        return cross_entropy(params, train_images[rows], train_labels[rows]) + penalty(params)

    @jax.jit
    def step(params, state, rows):
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    state, batches = tx.init(params), np.random.default_rng(1)
    for _ in range(STEPS):
        params, state = step(params, state, batches.integers(len(train_labels), size=64))
    return params, state


def adam():
    return optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


@jax.jit
def deciding_loss(params):
    return cross_entropy(params, decide_images, decide_labels)


@jax.jit
def test(params):
    guesses = net.apply(params, test_images).argmax(-1)
    return cross_entropy(params, test_images, test_labels), 100 * jnp.mean(guesses == test_labels)


dense, _ = train(adam(), initial)
print(f"dense: deciding loss {deciding_loss(dense):.3f}, test accuracy {test(dense)[1]:.1f}%")

# %% [markdown]
# ## Step 1 and 2: choose, and compute the loss
#
# A *score* says how much a weight matters. By magnitude: $|w|$. By gradient: $|w\,g|$, how much the loss would change
# to first order if the weight went. By curvature: $w^2 g^2$, averaged over small batches. And at random, so that one
# knows what choosing is worth. Nothing is trained after pruning here: this is the loss at once.

# %%
gradient = jax.jit(jax.grad(cross_entropy))
grads = gradient(dense, train_images, train_labels)
batches = [
    gradient(dense, train_images[i : i + 20], train_labels[i : i + 20]) for i in range(0, 1000, 20)
]
squares = jax.tree.map(lambda *g: jnp.mean(jnp.stack(g) ** 2, 0), *batches)
scores = {
    "magnitude |w|": prunax.scores.magnitude(dense),
    "gradient |w g|": prunax.scores.saliency(dense, grads),
    "curvature w²g²": prunax.scores.fisher(dense, squares),
    "random": prunax.scores.random(dense, key=jax.random.key(2)),
}
SPARSITIES = (0.5, 0.7, 0.8, 0.9)


def pruned_by(score, sparsity):
    masks = prunax.compute_masks(
        dense, sparsity, scores=score, allocation=prunax.allocation.global_ranking
    )
    return prunax.apply_masks(dense, masks)


curves = {
    name: [(s, float(deciding_loss(pruned_by(score, s)))) for s in SPARSITIES]
    for name, score in scores.items()
}
rows = [(name, *(f"{loss:.3f}" for _, loss in curve)) for name, curve in curves.items()]
prunax.reports.Table(("deciding loss", *(f"{s:.0%}" for s in SPARSITIES)), rows)

# %%
prunax.reports.plots.fronts(curves, dense=float(deciding_loss(dense)), ylabel="deciding loss")

# %% [markdown]
# In theory the gradient knows more than the weight does. Here it is the worst of the three, and from 80% on worse than
# chance: training has ended, so that what is left of the gradient is small and of accidental sign. Squares do not
# cancel, and curvature does better. Magnitude, which has not seen one image, is the best of all.
#
# ### Which layer can bear it?
#
# `sensitivity` prunes one layer at a time and measures. A row that stays dark has weights to give.

# %%
measured = prunax.search.sensitivity(deciding_loss, dense, [0.5, 0.7, 0.8, 0.9, 0.95])
prunax.reports.plots.heat_map(
    measured.names, measured.sparsities, measured.losses - measured.dense_loss
)

# %% [markdown]
# ## Step 3: accept or reject
#
# By hand it is a loop. Propose to prune one layer further, with all that was accepted before; measure; keep it if the
# loss has grown by no more than we allow.

# %%
ALLOWED = 0.02
limit = float(deciding_loss(dense)) + ALLOWED
accepted = dict.fromkeys(measured.names, 0.0)
for name in measured.names:
    for proposed in (0.5, 0.7, 0.8, 0.9, 0.95):
        attempt = prunax.allocation.by_path(accepted | {name: proposed})
        masks = prunax.compute_masks(dense, allocation=attempt)
        loss = float(deciding_loss(prunax.apply_masks(dense, masks)))
        verdict = "accept" if loss <= limit else "reject"
        print(f"{name:24} {proposed:4.0%}  loss {loss:.4f}  {verdict}")
        if verdict == "reject":
            break
        accepted[name] = proposed
by_hand = prunax.compute_masks(dense, allocation=prunax.allocation.by_path(accepted))
print(
    f"limit {limit:.4f}: {prunax.summarize(prunax.apply_masks(dense, by_hand)).sparsity:.1%} may go"
)

# %% [markdown]
# The layers that come first take the whole allowance. `max_sparsity` begins with the best plain allocation that the
# limit accepts, and proposes in smaller and smaller steps. Its table lists every decision.

# %%
found = prunax.search.max_sparsity(deciding_loss, dense, max_increase=ALLOWED, measured=measured)
print(f"{found.sparsity:.1%} of the weights may go: loss {found.loss:.4f}, limit {found.limit:.4f}")
found

# %%
by_loss = prunax.apply_masks(dense, found.masks)

# %% [markdown]
# ## Let a penalty choose: L1 and L2
#
# L2 makes all weights small, L1 makes some of them zero. With a proximal step after each update they are *exactly*
# zero, and `threshold=0` takes what has arrived there. How many that are is an outcome: the strength decides.

# %%
l2, _ = train(adam(), initial, penalty=lambda params: 1e-3 * prunax.penalties.l2(params))
l1, _ = train(prunax.transforms.proximal_l1(adam(), 1e-4), initial)
l1_masks = prunax.compute_masks(l1, threshold=0.0)
reached = prunax.summarize(l1, l1_masks).sparsity
print(f"L1 drew {reached:.1%} of the weights to zero")

rows = []
for name, params in {"no penalty": dense, "L2": l2, "L1": l1}.items():
    masks = prunax.compute_masks(params, reached, allocation=prunax.allocation.global_ranking)
    losses = (deciding_loss(params), deciding_loss(prunax.apply_masks(params, masks)))
    rows.append((name, *(f"{loss:.3f}" for loss in losses)))
prunax.reports.Table(("trained with", "loss before", f"loss at {reached:.0%} pruned"), rows)

# %%
prunax.reports.plots.weights(l1, l1_masks, title="After training with L1")

# %% [markdown]
# What L1 has drawn to zero costs nothing more to remove. But the loss was higher before: the penalty shrinks the
# weights that stay as well. L2 makes no weight zero, and what it has made small costs a little less to remove. Pruned
# as far by magnitude, the network without a penalty is ahead of both, as long as little goes.

# %% [markdown]
# ## Whole filters
#
# Zeros make no convolution faster: filters that are gone do. A filter goes together with its bias and with what reads
# it in the next layer; `axis_groups` finds these from the function itself. The same three steps decide how many of
# each layer: the filters of `conv1` and `conv2`, and the units of the dense layer behind them.

# %%
groups = prunax.structured.axis_groups(net.apply, dense, images[:1])
channels = prunax.search.channels(groups, dense)
wide = prunax.search.max_sparsity(
    deciding_loss,
    dense,
    max_increase=ALLOWED,
    structures=channels,
    sparsities=[0.25, 0.5, 0.75],
)
small = prunax.structured.prune_channels(
    net.apply, dense, images[:1], allocation=prunax.allocation.by_path(wide.sparsities)
)


def size(params):
    return sum(x.size for x in jax.tree.leaves(params))


print(f"loss {wide.loss:.4f}, limit {wide.limit:.4f}")
print(f"{size(dense):,} parameters become {size(small.params):,}")


@jax.jit
def small_test(params):
    logits = small.fn(params, test_images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, test_labels).mean()
    return loss, 100 * jnp.mean(logits.argmax(-1) == test_labels)


wide

# %% [markdown]
# Nothing says that magnitude has to choose the filters. `prune_channels` takes any scores; here as many go of each
# layer as were accepted, whoever chooses:

# %%
rows = []
for name, score in scores.items():
    cut = prunax.structured.prune_channels(
        net.apply,
        dense,
        images[:1],
        scores=score,
        allocation=prunax.allocation.by_path(wide.sparsities),
    )
    logits = cut.fn(cut.params, decide_images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, decide_labels).mean()
    verdict = "accept" if loss <= wide.limit else "reject"
    right = 100 * jnp.mean(logits.argmax(-1) == decide_labels)
    rows.append((name, f"{loss:.3f}", f"{right:.1f}", verdict))
prunax.reports.Table(("filters chosen by", "deciding loss", "right, %", "verdict"), rows)

# %% [markdown]
# ## Train on, and look at the images that decided nothing
#
# What pruning cost, training makes up for. `fixed_masks` keeps the pruned weights at zero meanwhile. And `prune` with a
# schedule removes nineteen weights in twenty on the way: far beyond the limit, and with most of the accuracy.

# %%
tuned, _ = train(prunax.transforms.fixed_masks(adam(), found.masks), by_loss)
schedule = prunax.schedules.polynomial(0.95, STEPS // 10, 3 * STEPS // 4, every=10)
gradual, _ = train(
    prunax.prune(adam(), schedule, allocation=prunax.allocation.global_ranking), initial
)


def zeros(params):
    return f"{prunax.summarize(params).sparsity:.1%}"


def row(name, result, removed):
    loss, accuracy = result
    return name, removed, f"{loss:.3f}", f"{accuracy:.1f}"


rows = [
    row("dense", test(dense), "0.0%"),
    row("weights, accepted by the loss", test(by_loss), zeros(by_loss)),
    row("the same, trained on", test(tuned), zeros(tuned)),
    row("L1", test(l1), zeros(l1)),
    row("L2, nothing removed", test(l2), "0.0%"),
    row("90% by gradient, at once", test(pruned_by(scores["gradient |w g|"], 0.9)), "90.0%"),
    row(
        "filters, accepted by the loss",
        small_test(small.params),
        f"{1 - size(small.params) / size(dense):.1%}",
    ),
    row("pruned while training", test(gradual), zeros(gradual)),
    row("90% by magnitude, at once", test(pruned_by(scores["magnitude |w|"], 0.9)), "90.0%"),
    row("90% at random, at once", test(pruned_by(scores["random"], 0.9)), "90.0%"),
]
prunax.reports.Table(("network", "removed", "test loss", "test accuracy, %"), rows, text=1)

# %% [markdown]
# The limit held on the images that decided; on others it holds only about. That is why the last two columns come from a
# third part.
#
# - Give the decision data of its own, as much as you can.
# - A limit on the loss is safer than a target sparsity: it stops by itself.
# - If you can train on, do: what pruning cost comes back, or most of it.
#
# Next: [3. Methods compared](3_methods.ipynb), [4. Smaller and faster](4_smaller_and_faster.ipynb).
