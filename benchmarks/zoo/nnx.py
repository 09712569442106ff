"""Networks in Flax NNX in the way of jax-ml/bonsai: written here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import zoo
from benchmarks.zoo.linen import rotated


class GroupedAttention(nnx.Module):
    """Queries in groups that share a key, normalised, with rotary positions (Qwen 3)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q_proj = nnx.Einsum("btd,dnh->btnh", (32, 4, 8), rngs=rngs)
        self.k_proj = nnx.Einsum("btd,dnh->btnh", (32, 2, 8), rngs=rngs)
        self.v_proj = nnx.Einsum("btd,dnh->btnh", (32, 2, 8), rngs=rngs)
        self.o_proj = nnx.Einsum("btnh,nhd->btd", (4, 8, 32), rngs=rngs)
        self.q_norm = nnx.RMSNorm(8, rngs=rngs)
        self.k_norm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q = rotated(self.q_norm(self.q_proj(x)))
        k = rotated(self.k_norm(self.k_proj(x)))
        v = self.v_proj(x)
        batch, length, heads, width = q.shape
        q = q.reshape(batch, length, 2, heads // 2, width)
        weights = jnp.einsum("bqkgh,bskh->bkgqs", q, k) / width**0.5
        weights = jnp.where(jnp.tril(jnp.ones((length, length), bool)), weights, -1e9)
        out = jnp.einsum("bkgqs,bskh->bqkgh", jax.nn.softmax(weights), v)
        return self.o_proj(out.reshape(batch, length, heads, width))


class GatedMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.gate_proj = nnx.Linear(32, 48, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(32, 48, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(48, 32, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.input_layernorm = nnx.RMSNorm(32, rngs=rngs)
        self.attn = GroupedAttention(rngs)
        self.post_attention_layernorm = nnx.RMSNorm(32, rngs=rngs)
        self.mlp = GatedMLP(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedder = nnx.Embed(50, 32, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(rngs) for _ in range(2)])
        self.final_norm = nnx.RMSNorm(32, rngs=rngs)
        self.lm_head = nnx.Linear(32, 50, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))


class EncoderLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(32, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(32, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(32, 64, rngs=rngs), nnx.gelu, nnx.Linear(64, 32, rngs=rngs)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patch_embeddings = nnx.Conv(3, 32, (4, 4), (4, 4), rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, 32)))
        self.pos_embeddings = nnx.Param(jnp.zeros((1, 17, 32)))
        self.layers = nnx.List([EncoderLayer(rngs) for _ in range(2)])
        self.ln = nnx.LayerNorm(32, rngs=rngs)
        self.classifier = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patch_embeddings(x).reshape(x.shape[0], -1, 32)
        token = jnp.tile(self.cls_token[...], (x.shape[0], 1, 1))
        x = jnp.concatenate([token, x], 1) + self.pos_embeddings[...]
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.ln(x[:, 0]))


class Bottleneck(nnx.Module):
    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv0 = nnx.Conv(inputs, width, (1, 1), use_bias=False, rngs=rngs)
        self.bn0 = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.conv1 = nnx.Conv(width, width, (3, 3), (stride, stride), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(width, 4 * width, (1, 1), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(4 * width, use_running_average=True, rngs=rngs)
        self.shortcut = nnx.Conv(inputs, 4 * width, (1, 1), (stride, stride), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn0(self.conv0(x)))
        y = nnx.relu(self.bn1(self.conv1(y)))
        return nnx.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs)
        self.blocks = nnx.List([Bottleneck(16, 8, 1, rngs), Bottleneck(32, 16, 2, rngs)])
        self.fc = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


class Whisper(nnx.Module):
    """An encoder of sound and a decoder that attends to it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(8, 32, (3,), rngs=rngs)
        self.conv2 = nnx.Conv(32, 32, (3,), strides=(2,), rngs=rngs)
        self.encoder = EncoderLayer(rngs)
        self.embedder = nnx.Embed(50, 32, rngs=rngs)
        self.decoder = EncoderLayer(rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.cross = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)

    def __call__(self, sound: jax.Array, tokens: jax.Array) -> jax.Array:
        sound = self.encoder(nnx.gelu(self.conv2(nnx.gelu(self.conv1(sound)))))
        x = self.decoder(self.embedder(tokens))
        x = x + self.cross(self.norm(x), sound)
        return self.embedder.attend(x)


def _network(make: Callable[[nnx.Rngs], nnx.Module], *args: Any) -> zoo.Network:
    model = make(nnx.Rngs(0))
    graph, state = nnx.split(model)

    def fn(state: Any, *args: Any) -> Any:
        return nnx.merge(graph, state)(*args)

    return zoo.Network(fn, zoo.random(state), args)


NETWORKS = zoo.table(
    _network,
    {
        "Decoder": (Decoder, zoo.tokens()),
        "VisionTransformer": (VisionTransformer, zoo.normal(2, 16, 16, 3)),
        "ResNet": (ResNet, zoo.normal(2, 16, 16, 3)),
        "Whisper": (Whisper, zoo.normal(2, 16, 8), zoo.tokens()),
    },
)
