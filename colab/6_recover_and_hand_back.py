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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/prunax/prunax/blob/main/colab/6_recover_and_hand_back.ipynb)
#
# The outputs kept here are those of the fast mode. In Colab it runs in full, unless the first cell begins with
# `%env PRUNAX_FAST=1`.
#
# Pruning takes a model to a place near the dense one, and not near enough. Two things bring it back: the calibration
# data again, block by block (`calibration.refine`), and training against the dense model (`penalties.distillation`).
# Then the result goes where the model came from: into a folder that other tools read. This notebook goes the whole
# way with a small Llama that it trains itself, so that nothing is downloaded.

# %%
# Installs what is missing: everything in Colab, nothing where it is there already.
import importlib.util
import subprocess
import sys

needed = {
    "prunax": "prunax @ git+https://github.com/prunax/prunax",
    "matplotlib": "matplotlib",
}
missing = [needed[name] for name in needed if importlib.util.find_spec(name) is None]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

# %%
import functools
import os
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import prunax
from prunax import calibration, export, structured

plt.rcParams["font.size"] = 12
FAST = os.environ.get("PRUNAX_FAST") == "1"
STEPS, RECOVERY = (500, 150) if FAST else (5000, 1500)
print("Fast mode: a small model, short training." if FAST else "Full mode.", f"{STEPS} steps.")

# %% [markdown]
# ## A model with the names of its folder
#
# The params are a dict from the names that Hugging Face's Llamas have to arrays in the order that PyTorch stores,
# `(out, in)`. No translation is needed later: calibration and structural pruning read the axes from the function.

# %%
LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY, LENGTH = 4, 96, 256, 4, 256, 64
HEAD = WIDTH // HEADS
SHAPES = {
    "input_layernorm": (WIDTH,),
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "post_attention_layernorm": (WIDTH,),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}


def init(key):
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jnp.ones(shape) if len(shape) == 1 else 0.05 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def norm(x, scale):
    return scale * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def rotate(x):
    half = HEAD // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def llama(params, tokens):
    """Token ids (batch, length) to logits (batch, length, VOCABULARY)."""
    embedding = params["model.embed_tokens.weight"]
    x = embedding[tokens]
    for i in range(LAYERS):

        def weight(name, i=i):
            return params[f"model.layers.{i}.{name}.weight"]

        h = norm(x, weight("input_layernorm"))
        q, k, v = (
            (h @ weight(f"self_attn.{name}_proj").T).reshape(*x.shape[:2], -1, HEAD)
            for name in "qkv"
        )
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + mixed.reshape(*x.shape[:2], -1) @ weight("self_attn.o_proj").T
        h = norm(x, weight("post_attention_layernorm"))
        hidden = jax.nn.silu(h @ weight("mlp.gate_proj").T) * (h @ weight("mlp.up_proj").T)
        x = x + hidden @ weight("mlp.down_proj").T
    return norm(x, params["model.norm.weight"]) @ embedding.T


# %% [markdown]
# It learns the documentation of Python, which comes with Python, byte by byte. Every second topic is held out, without
# the lines that the others have, too.

# %%
halves = ["\n\n".join(topics[name] for name in sorted(topics)[half::2]) for half in (0, 1)]
known = {line.strip() for line in halves[0].splitlines() if line.strip()}
halves[1] = "\n".join(line for line in halves[1].splitlines() if line.strip() not in known)
seen, unseen = (np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in halves)


def windows(text, count, seed):
    starts = np.random.default_rng(seed).integers(len(text) - LENGTH, size=count)
    return jnp.asarray(text[starts[:, None] + np.arange(LENGTH)])


def next_byte_loss(fn, params, tokens):
    logits = fn(params, tokens)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


held_out = windows(unseen, 128, seed=0)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(fn, params):
    return next_byte_loss(fn, params, held_out)


def train(tx, params, loss, steps, seed):
    @jax.jit
    def step(params, state, tokens):
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, windows(seen, 16, seed=(seed, i)))
    return params


rate = optax.cosine_decay_schedule(4e-3, STEPS)
dense = train(
    optax.adam(rate), init(jax.random.key(0)), functools.partial(next_byte_loss, llama), STEPS, 1
)
print(f"dense: {loss_of(llama, dense):.3f} nats a byte; knowing nothing is {np.log(256):.3f}")

# %% [markdown]
# ## Prune
#
# SparseGPT, seven weights in ten, one layer after the other, from 64 windows of text.

# %%
batches = [windows(seen, 16, seed=(2, i)) for i in range(4)]
pruned = calibration.sparsegpt(llama, dense, batches, 0.7)
found = {"dense": loss_of(llama, dense), "pruned": loss_of(llama, pruned.params)}
print(f"pruned: {found['pruned']:.3f} nats a byte")

# %% [markdown]
# ## Recover, block by block
#
# SparseGPT solves one matrix at a time. `refine` takes a whole block, norms included, and tunes what was kept to the
# outputs that the dense block gives, on the same windows of text. No label is needed, and only one block's optimizer
# is in memory.

# %%
refined = calibration.refine(
    llama, pruned.params, pruned.masks, batches, blocks="model.layers.*", teacher=dense
)
found["refined"] = loss_of(llama, refined.params)
rows = [(block.name, f"{block.before:.4f}", f"{block.after:.4f}") for block in refined.blocks]
prunax.reports.Table(("block", "error before", "after"), rows)

# %% [markdown]
# ## Recover, against the dense model
#
# Where there is data to train on, the dense model is a better teacher than the next byte alone: it says how likely
# every byte was. `fixed_masks` keeps the pruned weights at zero.


# %%
def distilled(params, masks):
    def loss(params, tokens):
        return prunax.penalties.distillation(llama(params, tokens), llama(dense, tokens))

    tx = prunax.transforms.fixed_masks(
        optax.adam(optax.cosine_decay_schedule(1e-3, RECOVERY)), masks
    )
    return train(tx, params, loss, RECOVERY, seed=3)


from_pruned = distilled(pruned.params, pruned.masks)
both = distilled(refined.params, pruned.masks)
found["distilled"] = loss_of(llama, from_pruned)
found["refined, distilled"] = loss_of(llama, both)

rows = [
    (name, f"{loss:.3f}", f"{(found['pruned'] - loss) / (found['pruned'] - found['dense']):.0%}")
    for name, loss in found.items()
]
prunax.reports.Table(("model", "nats a byte", "of the loss made up for"), rows)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
bars = axes.barh(list(found), [float(loss) for loss in found.values()], color="C0")
axes.bar_label(bars, [f" {loss:.3f}" for loss in found.values()])
axes.axvline(float(found["dense"]), color="0.4", linestyle="--", linewidth=1)
axes.set(xlabel="nats a byte on held-out topics (dashed: dense)")
axes.set_xlim(0, 1.15 * max(float(loss) for loss in found.values()))
axes.invert_yaxis()

# %% [markdown]
# The zeros are where they were, which is checked, and each layer has as many of them.

# %%
for path, mask in pruned.masks.items():
    assert mask.ndim == 0 or not bool((both[path][~mask] != 0).any()), path
prunax.reports.plots.layers(both, pruned.masks)

# %% [markdown]
# ## Smaller instead of sparse
#
# The same recovery holds for a network that lost units instead of weights. Its function is another, and the teacher
# is the dense pair of function and params.

# %%
small = structured.prune_channels(
    llama,
    dense,
    batches[0],
    sparsity=0.5,
    where=lambda path, leaf: "gate_proj" in path or "up_proj" in path,
)
tuned = calibration.refine(
    small.fn, small.params, None, batches, blocks="model.layers.*", teacher=(llama, dense)
)
sizes = {
    name: sum(x.size for x in tree.values())
    for name, tree in (("dense", dense), ("small", small.params))
}
print(f"{sizes['dense']:,} parameters become {sizes['small']:,}")
print(f"cut: {loss_of(small.fn, small.params):.3f}, refined: {loss_of(small.fn, tuned.params):.3f}")

# %% [markdown]
# ## Hand back
#
# A folder in the Hugging Face layout: `config.json` and safetensors, in shards if you like. The names are those of the
# params.

# %%
folder = Path(tempfile.mkdtemp())
config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
export.save_checkpoint(folder / "sparse", both, config=config, shard_size=1_000_000)
half = config | {"intermediate_size": HIDDEN // 2}
export.save_checkpoint(folder / "small", tuned.params, config=half)
for name in ("sparse", "small"):
    with export.open_checkpoint(folder / name) as checkpoint:
        files = sorted(set(checkpoint.shards.values()))
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    print(f"{name}: {len(tensors)} tensors in {', '.join(files)}")
    expected = both if name == "sparse" else tuned.params
    assert all((tensors[key] == np.asarray(value)).all() for key, value in expected.items())

# %% [markdown]
# Where transformers and PyTorch are installed, they load both folders, and compute the same but for rounding.

# %%
if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name, fn, params in (("sparse", llama, both), ("small", small.fn, tuned.params)):
        judge = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            theirs = judge(torch.tensor(np.asarray(held_out[:2]))).logits.numpy()
        difference = float(jnp.abs(fn(params, held_out[:2]) - theirs).max())
        print(f"{name}: largest difference of a logit {difference:.1e}")
else:
    print("transformers or PyTorch is not installed here.")

# %% [markdown]
# ## Next
#
# - `prunax prune FOLDER OUT --sparsity 0.5` does without a function, by magnitude.
# - [Hugging Face folders](https://github.com/prunax/prunax/blob/main/docs/howto/hugging-face.md) and
#   [recovery](https://github.com/prunax/prunax/blob/main/docs/stages/recovery.md) say more.
# - [7. Robustness and lottery tickets](7_robustness_and_tickets.ipynb): what pruning does besides.
