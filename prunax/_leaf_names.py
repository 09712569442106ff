"""What a leaf is, as far as its path, its shape and its neighbours tell: a kernel, or something to leave whole.

Flax calls its matrices ``kernel``, Haiku ``w``, and PyTorch, Equinox and Hugging Face call everything ``weight``, gains
of normalisations and tables of embeddings included. So the whole path is read word by word, then the shape, then the
leaves in the same folder. A kernel left whole costs some sparsity; anything else that is pruned ruins a model without a
word: where the three do not tell, a leaf stays whole.
"""

import functools
import math
import re
from collections.abc import Mapping

__all__ = ["Folders", "folders", "why_whole"]

Shape = tuple[int, ...]
Folders = dict[str, dict[str, Shape]]
"""Folder of a path -> names in it -> their shapes."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# The name's words, and what a leaf is that has one of them in its name.
_WORDS = {
    "a bias": _set("bias biases beta betas offset offsets shift shifts"),
    "a table of embeddings, positions or tokens": _set(
        "emb embs embed embeds embedder embedding embeddings posemb posembed wte wpe pos position positions "
        "positional pe "
        "rel relative cls token tokens queries latents prompt prompts prefix probe table tables codebook codebooks "
        "codevectors codewords centroid centroids prototype prototypes anchors register registers seeds slots "
        "sink sinks "
        "null vocab"
    ),
    "a scale, gain or zero point": _set(
        "scale scales gain gains gamma gammas alpha alphas temperature tau absmax amax zero zeros zp scb "
        "qzeros qscales "
        "magnitude lut"
    ),
    "a statistic": _set(
        "mean means var vars variance std stddev running moving ema average averages avg stats counter sigma"
    ),
    "a constant of a recurrence": _set("log lambda lambdas dt decay timescale time"),
    "a buffer": _set(
        "freq freqs frequencies cos sin sincos cached cache mask masks window fbank mel queue buffer grid "
        "coords index indices "
        "tril triu state states carry rope rotary cis"
    ),
}
_NAMES = {"b": "a bias", "g": "a scale, gain or zero point", "s": "a scale, gain or zero point"}
# What ends in one of these is a product's whatever stands before: `pos_proj`.
_PRODUCTS = _set(
    "kernel kernels proj project projection projector matrix linear lin dense fc mlp ffn conv head layer "
    "modulation mixing "
    "mixer router out unembed"
)
_HEADS = _set("q k v qkv kv key value query")  # of folders: `pos_q/weight`
_WEIGHTS = _set("w weight weights")
# Folders in which a `weight` is a table, or a gain.
_TABLES = _set(
    "emb embs embed embeds embedder embedding embeddings posemb posembed wte wpe pos position positions "
    "positional rel relative "
    "table tables codebook codebooks codevectors lookup bias token tokens tok shared"
)
_NORMS = _set("norm norms ln bn gn rms prelu normalization scale scales gain")
_COLLECTIONS = _set("batch_stats opt_state opt optimizer optimizer_state ema ema_params")
_ADAPTERS = _set("lora dora loha lokr hada")
_STATISTICS = _set("running_mean running_var moving_mean moving_variance num_batches_tracked")


def folders(shapes: Mapping[str, Shape]) -> Folders:
    """Sort paths into folders, in which `why_whole` finds a leaf's neighbours.

    Args:
        shapes: Path -> shape, of all leaves.

    Returns:
        Folder -> name -> shape.
    """
    found: Folders = {}
    for path, shape in shapes.items():
        folder, _, name = path.rpartition("/")
        found.setdefault(folder, {})[name] = shape
    return found


def why_whole(path: str, shape: Shape, known: Folders | None = None) -> str:
    """Say why a leaf of real numbers is no kernel.

    Args:
        path: ``encoder/0/kernel``.
        shape: Its shape.
        known: All leaves, in folders; None where only the one leaf is known.

    Returns:
        What it is instead, in some words; empty for a kernel.
    """
    if len(shape) < 2:
        return "fewer than two axes"
    beside = {} if known is None else known.get(path.rpartition("/")[0], {})
    parts = _parts(path, beside)
    folder = parts[-2] if len(parts) > 1 else ""
    name = parts[-1] if parts else ""
    words, around = _words(name), _words(folder)
    return (
        _of_a_collection(path, parts, known)
        or _of_its_name(name, words, folder)
        or _of_its_neighbours(name, words, shape, beside)
        or _of_its_folder(words, around, shape, beside)
        or _of_its_shape(words, shape, beside)
    )


def _of_a_collection(path: str, parts: tuple[str, ...], known: Folders | None) -> str:
    if _COLLECTIONS.intersection(parts):
        return "in a collection of statistics or optimizer state"
    if any(_ADAPTERS.intersection(_words(part)) for part in parts[-3:]):
        return "a low-rank adapter"
    # `mu/dense/kernel` is Adam's where `nu/dense/kernel` is there too, and else a layer called so.
    for one, other in (("mu", "nu"), ("nu", "mu")):
        if known and one in parts:
            twin, _, name = "/".join(other if p == one else p for p in path.split("/")).rpartition(
                "/"
            )
            if name in known.get(twin, {}):
                return "in a collection of statistics or optimizer state"
    return ""


def _of_its_name(name: str, words: tuple[str, ...], folder: str) -> str:
    if words and words[-1] in _PRODUCTS:
        return ""
    if folder in ("kernel", "weight") and words != ("original",):
        return f"an attribute of a {folder}, by its place"
    if name in _NAMES:
        return _NAMES[name]
    return next((what for what, all_words in _WORDS.items() if all_words.intersection(words)), "")


def _of_its_neighbours(
    name: str, words: tuple[str, ...], shape: Shape, beside: Mapping[str, Shape]
) -> str:
    if words and words[-1] in _PRODUCTS:
        return ""
    for other in ("weight", "kernel", "qweight"):
        if other in beside and name.startswith(f"{other}_"):
            return f"an attribute of the {other} beside it"
    if "average" in beside and name == "hidden":
        return "a statistic"
    if len(name) == 1 and any({"log", "lambda", "dt"}.intersection(_words(n)) for n in beside):
        return "a constant of a recurrence"
    if words and words[-1] in _WEIGHTS:
        if _STATISTICS.intersection(beside):
            return "the gain of a normalisation, by the statistics beside it"
        if any(beside.get(bias) == shape for bias in ("bias", "b")):
            return "the gain of a normalisation, by the bias of its shape"
        if any(_words(n)[-1:] in (("zp",), ("zeros",)) or "zero" in _words(n) for n in beside):
            return "quantised with a zero point, so that a stored zero is no zero"
    return ""


def _of_its_folder(
    words: tuple[str, ...], around: tuple[str, ...], shape: Shape, beside: Mapping[str, Shape]
) -> str:
    if words == ("hidden",) and ("ema" in around or {"moving", "average"} <= set(around)):
        return "a statistic"
    if not words or words[-1] not in _WEIGHTS or len(shape) > 3:
        return ""
    if _has_output_bias(shape, beside):
        return ""
    last = set(around[-1:])
    normalises = _NORMS.intersection(around) or any(word.endswith("norm") for word in around)
    if normalises and not last & (_PRODUCTS - {"out", "layer"}):
        return "the gain of a normalisation, by its folder"
    if _TABLES.intersection(around) and not last & (_PRODUCTS | _HEADS) and "output" not in around:
        return "a table of embeddings, positions or tokens, by its folder"
    return ""


def _of_its_shape(words: tuple[str, ...], shape: Shape, beside: Mapping[str, Shape]) -> str:
    vector = math.prod(shape) == max(shape, default=0)
    if not words or words[-1] in _PRODUCTS:
        return ""
    if words[-1] in _WEIGHTS:
        if vector and len(shape) > 2 and not _has_output_bias(shape, beside):
            return "a vector, by its shape"
        return ""
    if vector or shape[0] == 1:
        return "broadcast and not multiplied, by its axes of length one"
    return ""


def _has_output_bias(shape: Shape, beside: Mapping[str, Shape]) -> bool:
    """Whether there is a bias of fewer axes, one for each unit: only products have such."""
    return any(len(beside.get(bias, shape)) < len(shape) for bias in ("bias", "b"))


def _parts(path: str, beside: Mapping[str, Shape]) -> tuple[str, ...]:
    """The parts of a path that say something: no numbers, and no box around an array."""
    parts = [p for p in path.split("/") if p and p != "~" and not p.isdigit()]
    # A checkpoint of an `nnx.State` has the array in a box, alone: `dense/kernel/value`.
    if (
        len(parts) > 1
        and parts[-1] == "value"
        and len(beside) < 2
        and parts[-2] in ("kernel", "bias", "scale", "embedding")
    ):
        del parts[-1]
    return tuple(parts)


@functools.lru_cache(1 << 16)
def _words(name: str) -> tuple[str, ...]:
    """``LayerNorm_0`` -> layer, norm."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))
