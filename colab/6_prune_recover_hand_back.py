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
# # 6. Prune, recover, hand back
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/6_prune_recover_hand_back.ipynb)
#
# Take a trained network, make it sparse or smaller, bring it back, and write it where other code loads it. The
# network here is a language model that reads characters, small enough to be trained in a minute; each step is the
# same for a large one (`benchmarks/recover.py` and `benchmarks/huggingface.py` do it with SmolLM2-135M).

# %%
# Installs prunax where it is missing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("prunax") is None:
    packages = ["git+https://github.com/prunax/prunax", "matplotlib"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import os
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import prunax
from prunax import calibration, export, patterns, penalties, structured, transforms

FAST = os.environ.get("PRUNAX_FAST") == "1"
STEPS, RECOVERY = (500, 60) if FAST else (4000, 600)

# %% [markdown]
# ## A trained network
#
# Python's own documentation is the text. Every tenth topic is held out.

# %%
names = sorted(topics)
train_text = "\n".join(topics[n] for i, n in enumerate(names) if i % 10)
test_text = "\n".join(topics[n] for i, n in enumerate(names) if not i % 10)
alphabet = sorted(set(train_text))
number = {character: i for i, character in enumerate(alphabet)}


def windows(text: str, length: int = 96) -> np.ndarray:
    ids = np.array([number[c] for c in text if c in number], np.int32)
    return ids[: len(ids) // length * length].reshape(-1, length)


train, test = windows(train_text), jnp.asarray(windows(test_text)[:128])
print(f"{len(alphabet)} characters, {train.size:,} to train on")

# %% [markdown]
# A transformer as a function of its params, four layers in a list. Nothing in it knows of pruning.

# %%
CONFIG = {"width": 96, "heads": 4, "hidden": 256, "layers": 4}


def make(key: jax.Array, width: int, heads: int, hidden: int, layers: int) -> dict:
    keys = iter(jax.random.split(key, 7 * layers + 2))

    def matrix(inputs: int, outputs: int) -> jax.Array:
        return jax.random.normal(next(keys), (inputs, outputs)) * inputs**-0.5

    def layer() -> dict:
        attention = {n: matrix(width, width) for n in ("query", "key", "value", "out")}
        ffn = {"gate": matrix(width, hidden), "up": matrix(width, hidden)}
        ffn["down"] = matrix(hidden, width)
        return {"norm1": jnp.ones(width), **attention, "norm2": jnp.ones(width), **ffn}

    return {
        "embedding": matrix(len(alphabet), width),
        "layers": [layer() for _ in range(layers)],
        "norm": jnp.ones(width),
        "head": matrix(width, len(alphabet)),
    }


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def attend(p: dict, x: jax.Array, heads: int = CONFIG["heads"]) -> jax.Array:
    length = x.shape[1]
    q, k, v = ((x @ p[n]).reshape(*x.shape[:2], heads, -1) for n in ("query", "key", "value"))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    # Each head looks back as far as its slope lets it: no table of positions is needed.
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    slopes = 2.0 ** -(1 + 2 * jnp.arange(heads))
    logits = logits - slopes[:, None, None] * distance
    shares = jax.nn.softmax(jnp.where(distance >= 0, logits, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(*x.shape[:2], -1) @ p["out"]


def model(params: dict, tokens: jax.Array) -> jax.Array:
    x = params["embedding"][tokens]
    for p in params["layers"]:
        x = x + attend(p, normed(x, p["norm1"]))
        h = normed(x, p["norm2"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return normed(x, params["norm"]) @ params["head"]


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(losses)


# %%
def fit(fn, params, tx, steps: int, objective, seed: int = 0) -> dict:
    """Train for some steps: `objective(fn, params, tokens)`."""

    @jax.jit
    def step(params, state, tokens):
        grads = jax.grad(lambda params: objective(fn, params, tokens))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        rows = train[rng.integers(0, len(train), 16)]
        params, state = step(params, state, jnp.asarray(rows))
    return params


def perplexity(fn, params) -> float:
    return float(jnp.exp(loss(jax.jit(fn)(params, test), test)))


start = time.perf_counter()
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, STEPS)
dense = fit(
    model,
    make(jax.random.key(0), **CONFIG),
    optax.adam(schedule),
    STEPS,
    lambda fn, params, tokens: loss(fn(params, tokens), tokens),
)
found = {"dense": perplexity(model, dense)}
print(f"perplexity {found['dense']:.2f} after {time.perf_counter() - start:.0f} s")

# %% [markdown]
# ## Half of the weights gone, two of every four
#
# 64 windows of text to calibrate on. Magnitude looks at no data. SparseGPT looks at the inputs of each layer;
# with a *correction* it also makes up for what the pruned layers before it have changed. `refine` then tunes what
# is left of each block to the outputs of the dense block.

# %%
batches = [jnp.asarray(train[i : i + 16]) for i in range(0, 64, 16)]
pattern = patterns.NM(2, 4)
kernels = prunax.kernels(model, dense, batches[0])


def where(path: str, leaf: jax.Array) -> bool:
    return path.startswith("layers") and kernels(path, leaf)


masks = prunax.compute_masks(dense, pattern=pattern, where=where)
found["magnitude"] = perplexity(model, prunax.apply_masks(dense, masks))
for name, correction in (("SparseGPT", 0.0), ("correction", 0.5)):
    method = calibration.SparseGPT(correction=correction)
    pruned = calibration.prune_layers(model, dense, batches, method, pattern=pattern, where=where)
    found[name] = perplexity(model, pruned.params)

refined = calibration.refine(
    model, pruned.params, pruned.masks, batches, blocks="layers/*", teacher=dense
)
found["refined"] = perplexity(model, refined.params)
print({name: round(value, 2) for name, value in found.items()})

# %% [markdown]
# What `refine` did, block by block: the error of a block's outputs beside the dense block's, before and after.

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
places = np.arange(len(refined.blocks))
axes.bar(places - 0.2, [b.before for b in refined.blocks], 0.4, label="before")
axes.bar(places + 0.2, [b.after for b in refined.blocks], 0.4, label="after")
axes.set_xticks(places, [b.name for b in refined.blocks])
axes.set_ylabel("relative error of the block's outputs")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A little training
#
# With more text than the calibration windows, train against the dense network: `penalties.distillation` is the
# loss, and `transforms.fixed_masks` keeps every zero a zero.


# %%
def against_dense(fn, params, tokens):
    return penalties.distillation(fn(params, tokens), model(dense, tokens))


rate = optax.cosine_decay_schedule(1e-3, RECOVERY)
tx = transforms.fixed_masks(optax.adam(rate), pruned.masks)
sparse = fit(model, refined.params, tx, RECOVERY, against_dense, seed=1)
found["distilled"] = perplexity(model, sparse)
export.verify_pattern(pruned.masks, pattern)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
bars = axes.bar(list(found), list(found.values()))
axes.bar_label(bars, [f"{value:.2f}" for value in found.values()])
axes.axhline(found["dense"], color="black", linestyle=":")
axes.set(ylabel="perplexity, held out", yscale="log")
plt.show()

# %% [markdown]
# ## A smaller network
#
# Zeros cost a plain product as much as other numbers; smaller shapes do not. Take 40% of each feed-forward layer,
# and recover it the same way. Beside it the same shape from random weights, trained as long: what the dense
# network's knowledge is worth.

# %%
small = structured.prune_channels(
    model,
    dense,
    batches[0],
    sparsity=0.4,
    where=lambda path, leaf: path.endswith(("gate", "up")),
)
hidden = small.params["layers"][0]["up"].shape[1]


def count(params: dict) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


print(f"{count(dense):,} parameters, then {count(small.params):,}; {hidden} features a layer")

smaller = {"pruned": perplexity(small.fn, small.params)}
tuned = calibration.refine(
    small.fn, small.params, None, batches, blocks="layers/*", teacher=(model, dense)
)
smaller["refined"] = perplexity(small.fn, tuned.params)
student = fit(small.fn, tuned.params, optax.adam(rate), RECOVERY, against_dense, seed=1)
smaller["distilled"] = perplexity(small.fn, student)
random = make(jax.random.key(1), **CONFIG | {"hidden": hidden})
twin = fit(model, random, optax.adam(rate), RECOVERY, against_dense, seed=1)
smaller["from random weights"] = perplexity(model, twin)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
bars = axes.bar(list(smaller), list(smaller.values()))
axes.bar_label(bars, [f"{value:.2f}" for value in smaller.values()])
axes.axhline(found["dense"], color="black", linestyle=":", label="dense")
axes.set(ylabel="perplexity, held out", yscale="log")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Hand it back
#
# A folder in the Hugging Face layout: weights by name, (out, in) as PyTorch has them, and a config that says the
# new sizes. The code that loads it makes the model of its config; it has never heard of pruning.

# %%
folder = Path(tempfile.mkdtemp()) / "smaller"
names = {path: f"model.{path.replace('/', '.')}.weight" for path in prunax.trees.paths(student)}
tensors = {names[path]: np.asarray(leaf).T for path, leaf in prunax.trees.named_leaves(student)}
export.save_checkpoint(folder, tensors, config=CONFIG | {"hidden": hidden})
print(sorted(file.name for file in folder.iterdir()))

# %%
with export.open_checkpoint(folder) as checkpoint:
    template = make(jax.random.key(2), **checkpoint.config)  # of the loading code
    loaded = prunax.trees.map_with_path(
        lambda path, leaf: jnp.asarray(checkpoint.read(names[path]).T), template
    )

same = jnp.allclose(model(loaded, test[:4]), small.fn(student, test[:4]), atol=1e-4)
print(f"the same logits: {same}; {checkpoint.nbytes / 1e6:.1f} MB on the disk")

# %% [markdown]
# ## What to take with you
#
# - `calibration.SparseGPT(correction=0.5)`, then `calibration.refine`: no training set, only some windows of text.
# - With text to train on, `penalties.distillation` and any optax loop bring most of the rest.
# - A smaller network begins far ahead of one of its shape from random weights.
# - `export.save_checkpoint` writes it, `export.shrink_checkpoint` cuts the stored tensors of a folder that
#   there is already.
