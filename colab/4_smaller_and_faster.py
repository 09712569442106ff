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
# # 4. Smaller and faster
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/4_smaller_and_faster.ipynb)
#
# The outputs kept here are those of the fast mode. In Colab it runs in full, unless the first cell begins with
# `%env PRUNAX_FAST=1`.
#
# A zero costs a processor as much as any other number, and a file four bytes. To gain from pruning, the zeros have to
# go: whole channels, so that the arrays shrink (*structural pruning*); or single weights and blocks, with the rest
# *packed* so that products skip what is not there. Both pay in some places and not in others, so everything here is
# measured. The times that are kept with this notebook are those of one core of a busy machine: measure on yours.

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
import os
import tempfile
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
from prunax import export, patterns, structured

plt.rcParams["font.size"] = 12
FAST = os.environ.get("PRUNAX_FAST") == "1"
TRAIN, TEST = (6_400, 2_000) if FAST else (60_000, 10_000)  # images
print(
    "Fast mode: few images." if FAST else "Full mode.", "Times are of this machine:", jax.devices()
)

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
    return images / np.float32(255), np.array([e["label"] for e in examples])


if builder.is_prepared():
    (train_images, train_labels), (test_images, test_labels) = (
        read("train", TRAIN),
        read("test", TEST),
    )
else:
    print("Fashion-MNIST is not to be had here. Going on with scikit-learn's digits.")
    digits = load_digits()
    images, labels = np.float32(digits.images[..., None] / 16), digits.target
    train_images, test_images = images[:1400], images[1400:]
    train_labels, test_labels = labels[:1400], labels[1400:]
CLASSES = 10
print(f"{len(train_labels):,} images to train on, {len(test_labels):,} to test on")


# %% [markdown]
# ## Structural pruning
#
# A convolutional network with a residual block. To remove a channel means to cut it out of everything that touches
# it: the kernel and bias that make it, and the kernels that read it. And the two ends of a residual connection are
# added, so they have to lose the *same* channels.


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(32, (3, 3), 2, name="stem")(images))
        y = nn.relu(nn.Conv(64, (3, 3), name="widen")(x))
        x = x + nn.Conv(32, (3, 3), name="narrow")(y)
        x = nn.relu(nn.Conv(64, (3, 3), 2, name="down")(x))
        return nn.Dense(CLASSES, name="classes")(x.mean((1, 2)))


def apply(params, images):
    return Network().apply(params, images)


initial = Network().init(jax.random.key(0), test_images[:1])
groups = structured.axis_groups(apply, initial, test_images[:1])
print(structured.explain_groups([group for group in groups if not group.frozen]))

# %% [markdown]
# Nobody told `axis_groups` how the network is built: it reads the function's jaxpr and finds which axes of which
# leaves go together. `stem` and `narrow` share one group, through the sum. Inputs and outputs are *frozen*: pixels
# and classes have to stay.
#
# Train first, with a loop that takes any function.


# %%
def train(fn, params, rate, epochs, opt_state=None, seed=0):
    size, count = 64, len(train_labels)
    tx = optax.adam(rate)

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            logits = fn(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if opt_state is None else opt_state
    shuffle = np.random.default_rng(seed)
    for _ in range(epochs):
        order = shuffle.permutation(count)
        for rows in order[: count // size * size].reshape(-1, size):
            params, state = step(params, state, train_images[rows], train_labels[rows])
    return params, state


def accuracy(fn, params):
    predict = jax.jit(lambda params, x: fn(params, x).argmax(-1))
    size = 500 if len(test_labels) % 500 == 0 else len(test_labels)
    parts = [predict(params, test_images[i : i + size]) for i in range(0, len(test_labels), size)]
    return float(np.mean(np.concatenate(parts) == test_labels))


EPOCHS = 2 if FAST else 5
dense, opt_state = train(apply, initial, 2e-3, EPOCHS)
print(f"dense: {accuracy(apply, dense):.1%}")

# %% [markdown]
# Now cut. `target` asks for a fraction of the operations, and `prune_channels` finds the sparsity that gets there.
# Channels with the least weight go first, counted over every leaf of their group. Widths stay multiples of 8, which
# processors like.
#
# The new function fits the new params, and `shrink` cuts the optimizer's state to the same size: Adam's moments are
# not lost, and training goes on as if the network had always been small.

# %%
networks = {"dense": (apply, dense)}
trained = {"dense": accuracy(apply, dense)}
before = {}
for target in (0.5, 0.2):
    small = structured.prune_channels(apply, dense, test_images[:1], target=target, round_to=8)
    name = f"{target:.0%} of the operations"
    before[name] = accuracy(small.fn, small.params)
    smaller_state = structured.shrink(opt_state, small.keep)
    params, _ = train(small.fn, small.params, 1e-3, EPOCHS, smaller_state, seed=1)
    networks[name] = (small.fn, params)
    trained[name] = accuracy(small.fn, params)
    print(name, "keeps", {group.name: len(units) for group, units in small.keep.items()})

# %% [markdown]
# To be fair to the dense network, let it train on for as long.

# %%
longer, _ = train(apply, dense, 1e-3, EPOCHS, opt_state, seed=1)
networks["dense"] = (apply, longer)
trained["dense"] = accuracy(apply, longer)

# %% [markdown]
# Compare it with zeros that stay where they are: the dense network with 90% of its weights set to zero at once, without
# training on. That ruins its accuracy; what matters here is its time.

# %%
masks = prunax.compute_masks(longer, 0.9)
networks["90% zeros, not cut"] = (apply, prunax.apply_masks(longer, masks))
trained["90% zeros, not cut"] = accuracy(*networks["90% zeros, not cut"])

batch = test_images[:256]
rows, times = [], {}
for name, (fn, params) in networks.items():
    one = structured.latency(fn, params, batch[:1])
    many = structured.latency(fn, params, batch)
    times[name] = one, many
    rows.append(
        (
            name,
            f"{structured.count_parameters(fn, params):,.0f}",
            f"{structured.count_flops(fn, params, batch[:1]) / 1e6:.2f}",
            f"{1e3 * one:.2f}",
            f"{1e3 * many:.1f}",
            f"{before[name]:.1%}" if name in before else "",
            f"{trained[name]:.1%}",
        )
    )
columns = "network, parameters, Mflop, ms an image, ms for 256, right when cut, right in the end"
prunax.reports.Table(columns.split(", "), rows)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
names = list(times)
for i, label in enumerate(("one image", "256 images")):
    ratio = [times[name][i] / times["dense"][i] for name in names]
    bars = axes.barh(np.arange(len(names)) + (i - 0.5) * 0.38, ratio, 0.36, label=label)
    axes.bar_label(bars, [f" {r:.2f}" for r in ratio], fontsize="small")
axes.axvline(1, color="0.4", linestyle="--", linewidth=1)
axes.set_yticks(range(len(names)), names)
axes.set(xlabel="time of a call, of the dense network's")
axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
axes.invert_yaxis()
_ = figure.legend(loc="outside upper center", ncols=2, fontsize="small")

# %% [markdown]
# Operations are not time: a call has costs that do not shrink. And the zeros that stay where they are save nothing.
#
# ## Packed weights
#
# Where single weights or blocks are pruned, `export.pack` keeps what is left in a form that a product can run
# through: for each output the inputs that it has, or whole blocks. The price is that reading is scattered. Below a
# certain sparsity a dense product is faster, and where that is depends on the pattern, the shape, the batch and the
# machine. So `export.fastest` measures, anew for each cell below, and gives back a dense weight unless the packed one
# takes at most nine tenths of its time.

# %%
SIZE = 1024 if FAST else 4096
w = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / np.sqrt(SIZE)
cases = {
    "single weights, 90%": (patterns.Unstructured(), 0.9),
    "single weights, 98%": (patterns.Unstructured(), 0.98),
    "constant fan-in, 90%": (patterns.ConstantFanIn(), 0.9),
    "constant fan-in, 98%": (patterns.ConstantFanIn(), 0.98),
    "2 of 4, 50%": (patterns.NM(2, 4), None),
    "64 x 64 blocks, 75%": (patterns.Block((64, 64)), 0.75),
    "64 x 64 blocks, 90%": (patterns.Block((64, 64)), 0.9),
}
BATCHES = (1, 16, 128)
speedups, rows = {}, []
for name, (pattern, sparsity) in cases.items():
    mask = prunax.compute_masks({"w": w}, sparsity, pattern=pattern)["w"]
    forms = {"dense": export.Dense(jnp.where(mask, w, 0)), "packed": export.pack(w, mask, pattern)}
    chosen, ratios = [], []
    for size in BATCHES:
        x = jax.random.normal(jax.random.key(1), (size, SIZE))
        np.testing.assert_allclose(x @ forms["packed"], x @ forms["dense"], atol=1e-3)
        seconds = export.matmul_seconds(forms, x)
        ratios.append(seconds["dense"] / seconds["packed"])
        chosen.append(type(export.fastest(w, mask, x, pattern=pattern)).__name__)
    speedups[name] = ratios
    rows.append((name, *(f"{r:.2f}: {c}" for r, c in zip(ratios, chosen, strict=True))))
columns = (f"{SIZE} x {SIZE}: dense time / packed time", *(f"batch {size}" for size in BATCHES))
prunax.reports.Table(columns, rows)

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for i, size in enumerate(BATCHES):
    ratio = [r[i] for r in speedups.values()]
    axes.barh(np.arange(len(cases)) + (i - 1) * 0.27, ratio, 0.25, label=f"batch {size}")
axes.axvline(1, color="0.3", linestyle="--", linewidth=1)
axes.set_yticks(range(len(cases)), list(cases))
axes.set(xlabel="times as fast as the dense product (dashed: equal)")
axes.invert_yaxis()
axes.grid(axis="x", alpha=0.3)
_ = figure.legend(loc="outside upper center", ncols=3, fontsize="small")

# %% [markdown]
# ## A whole network, packed
#
# Train under the pattern that will run fast, here blocks, then put packed weights where the matrices stood. A packed
# weight is a pytree that understands `x @ w`, so the function stays as it is.

# %%
WIDTH = 1024
BLOCK = patterns.Block((64, 64))


def mlp(params, images):
    x = images.reshape(len(images), -1)
    for name in ("first", "hidden"):
        x = nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["classes"]["kernel"] + params["classes"]["bias"]


def layer(key, inputs, outputs):
    kernel = jax.random.normal(key, (inputs, outputs)) * np.sqrt(2 / inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


keys = jax.random.split(jax.random.key(0), 3)
sizes = (int(np.prod(test_images.shape[1:])), WIDTH, WIDTH, CLASSES)
wide = {
    name: layer(*options)
    for name, *options in zip(
        ("first", "hidden", "classes"), keys, sizes[:-1], sizes[1:], strict=True
    )
}


def train_blocks(params, epochs):
    size, count = 100, len(train_labels)
    steps = epochs * (count // size)
    schedule = prunax.schedules.polynomial(0.9, steps // 5, steps * 7 // 10, every=5)
    # The last layer is small and stays whole.
    tx = prunax.prune(
        optax.adam(5e-4), schedule, pattern=BLOCK, where=lambda path, leaf: path in PRUNED
    )

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            logits = mlp(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, shuffle = tx.init(params), np.random.default_rng(0)
    for _ in range(epochs):
        order = shuffle.permutation(count)
        for rows in order[: count // size * size].reshape(-1, size):
            params, state = step(params, state, train_images[rows], train_labels[rows])
    return params, state.masks


PRUNED = ("first/kernel", "hidden/kernel")
blocky, block_masks = train_blocks(wide, 2 * EPOCHS)
print(export.verify_pattern(block_masks, BLOCK))
print(f"{accuracy(mlp, blocky):.1%} right at {prunax.summarize(blocky, block_masks).sparsity:.1%}")

# %%
prunax.reports.plots.masks(block_masks)

# %%
rows = []
for size in (1, 256):
    x = jnp.asarray(test_images[:size].reshape(size, -1))
    hidden = jnp.ones((size, WIDTH))
    packed = {name: dict(leaves) for name, leaves in blocky.items()}
    for name, inputs in (("first", x), ("hidden", hidden)):
        packed[name]["kernel"] = export.fastest(
            blocky[name]["kernel"], block_masks[name]["kernel"], inputs, pattern=BLOCK
        )
    np.testing.assert_allclose(mlp(packed, x), mlp(blocky, x), atol=1e-3)
    slow, fast = (structured.latency(mlp, params, x) for params in (blocky, packed))
    forms = ", ".join(type(packed[name]["kernel"]).__name__ for name in ("first", "hidden"))
    rows.append((str(size), forms, f"{1e3 * slow:.2f}", f"{1e3 * fast:.2f}", f"{slow / fast:.2f}"))
prunax.reports.Table(("images", "chosen", "dense, ms", "chosen, ms", "times as fast"), rows, text=2)

# %% [markdown]
# ## Files
#
# `save_params` writes safetensors in which zeros take one bit, and `save_masks` one bit a weight. They come back bit
# for bit, and nothing in them is ever run, unlike in a pickle. Any reader of safetensors sees what the header says.

# %%
folder = Path(tempfile.mkdtemp())
saved = {"dense": longer, "90% zeros": prunax.apply_masks(longer, masks)}
saved |= {name: networks[name][1] for name in before}
rows = []
for i, (name, params) in enumerate(saved.items()):
    file = folder / f"{i}.safetensors"
    export.save_params(file, params)
    back = export.load_params(file, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, back))
    rows.append((name, f"{file.stat().st_size / 1000:.0f}"))
export.save_masks(folder / "masks.safetensors", block_masks, pattern=BLOCK, sparsity=0.9)
kilobytes = (folder / "masks.safetensors").stat().st_size / 1000
rows.append(
    (f"masks of {prunax.summarize(blocky, block_masks).weights:,} weights", f"{kilobytes:.0f}")
)
print(export.read_metadata(folder / "masks.safetensors"))
prunax.reports.Table(("file", "kB"), rows)

# %% [markdown]
# The command line reads the same files: `prunax inspect masks.safetensors`. Tables at length, with seeds and larger
# networks, are in [the documentation](https://github.com/prunax/prunax/blob/main/docs/benchmarks.md).
#
# ## Next
#
# - [5. A language model](5_language_model.ipynb), pruned in one shot.
# - [When pruning does not pay](https://github.com/prunax/prunax/blob/main/docs/when-not.md):
#   the cases above, measured on more shapes.
