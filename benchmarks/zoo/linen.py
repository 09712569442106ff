"""Networks in Flax Linen of kinds that have no package: written here, after what people write."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import zoo


class MixerBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(24)(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        return x + nn.Dense(x.shape[2])(nn.gelu(nn.Dense(48)(nn.LayerNorm()(x))))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(32, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(2):
            x = MixerBlock()(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class ConvBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        y = nn.Conv(self.features, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))
        y = y + nn.Dense(self.features)(time)[:, None, None]
        y = nn.Conv(self.features, (3, 3))(nn.silu(nn.GroupNorm(4)(y)))
        return y + (x if x.shape == y.shape else nn.Conv(self.features, (1, 1))(x))


class UNet(nn.Module):
    """Of a diffusion model: time enters every block, attention in the middle."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        angles = time[:, None] * jnp.exp(-jnp.arange(8.0))
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        time = nn.silu(nn.Dense(32)(nn.silu(nn.Dense(32)(time))))
        x = nn.Conv(16, (3, 3))(x)
        seen = []
        for features in (16, 32):
            x = ConvBlock(features)(x, time)
            seen.append(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = ConvBlock(32)(x, time)
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(flat)).reshape(x.shape)
        for features in (32, 16):
            x = jax.image.resize(
                x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "nearest"
            )
            x = ConvBlock(features)(jnp.concatenate([x, seen.pop()], -1), time)
        return nn.Conv(3, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))


class DecoderLayer(nn.Module):
    """With one key for two queries, rotary positions and a gated feed-forward layer."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.RMSNorm()(x)
        q = nn.DenseGeneral((4, 8), use_bias=False, name="query")(h)
        k = nn.DenseGeneral((2, 8), use_bias=False, name="key")(h)
        v = nn.DenseGeneral((2, 8), use_bias=False, name="value")(h)
        k, v = jnp.repeat(rotated(k), 2, -2), jnp.repeat(v, 2, -2)
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.dot_product_attention(rotated(q), k, v, mask=mask)
        x = x + nn.DenseGeneral(32, (-2, -1), use_bias=False, name="out")(y)
        h = nn.RMSNorm()(x)
        y = nn.silu(nn.Dense(48, use_bias=False)(h)) * nn.Dense(48, use_bias=False)(h)
        return x + nn.Dense(32, use_bias=False)(y), None


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions along axis -3."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[-3])[:, None] * 10.0 ** -jnp.arange(half)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class ScannedDecoder(nn.Module):
    """`nn.scan` over rematerialised layers with a tied head, as MaxText builds its decoders."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(50, 32)
        layers = nn.scan(
            nn.remat(DecoderLayer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(embed(tokens), None)
        return embed.attend(nn.RMSNorm()(x))


class Mixture(nn.Module):
    """Every expert sees every token; the router weighs them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up = self.param("up", nn.initializers.lecun_normal(), (4, x.shape[-1], 24))
        down = self.param("down", nn.initializers.lecun_normal(), (4, 24, x.shape[-1]))
        weights, chosen = jax.lax.top_k(jax.nn.softmax(nn.Dense(4, name="router")(x)), 2)
        gates = jnp.sum(jax.nn.one_hot(chosen, 4) * weights[..., None], -2)
        hidden = nn.relu(jnp.einsum("btd,edf->btef", x, up))
        return jnp.einsum("btef,efd,bte->btd", hidden, down, gates)


class MixtureDecoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(50, 32)(tokens)
        for _ in range(2):
            x = x + nn.SelfAttention(4)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
            x = x + Mixture()(nn.LayerNorm()(x))
        return nn.Dense(50)(nn.LayerNorm()(x))


class Tagger(nn.Module):
    """LSTMs in both directions."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(50, 16)(tokens)
        forward = nn.RNN(nn.OptimizedLSTMCell(16))
        backward = nn.RNN(nn.GRUCell(16))
        x = nn.Bidirectional(forward, backward)(x)
        return nn.Dense(5)(nn.relu(nn.Dense(24)(x)))


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array) -> Any:
        hidden = nn.relu(nn.Dense(48)(x))
        mean, log_variance = nn.Dense(8)(hidden), nn.Dense(8)(hidden)
        z = mean + jnp.exp(log_variance / 2) * noise
        return nn.Dense(x.shape[-1])(nn.relu(nn.Dense(48)(z))), mean, log_variance


class WideResNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def act(x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=True)(x))

        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            y = act(x)
            x = (
                x
                if x.shape[-1] == features
                else nn.Conv(features, (1, 1), stride, use_bias=False)(y)
            )
            y = act(nn.Conv(features, (3, 3), stride, use_bias=False)(y))
            x = x + nn.Conv(features, (3, 3), use_bias=False)(y)
        return nn.Dense(10)(act(x).mean((1, 2)))


class GraphNet(nn.Module):
    """Messages between the nodes of a dense graph, and a gated update."""

    @nn.compact
    def __call__(self, nodes: jax.Array, adjacency: jax.Array) -> jax.Array:
        x = nn.Dense(24)(nodes)
        update = nn.GRUCell(24)
        for _ in range(3):
            pairs = nn.Dense(24)(x)[:, None] + nn.Dense(24)(x)[None]
            messages = nn.Dense(16)(nn.relu(pairs)) * adjacency[..., None]
            x, _ = update(x, messages.sum(1))
        return nn.Dense(3)(x)


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates and skips."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, skips = nn.Conv(16, (1,))(x), []
        for dilation in (1, 2, 4):
            y = nn.Conv(32, (2,), kernel_dilation=dilation, padding=[(dilation, 0)])(x)
            gate, value = jnp.split(y, 2, -1)
            y = nn.sigmoid(gate) * jnp.tanh(value)
            skips.append(nn.Conv(24, (1,))(y))
            x = x + nn.Conv(16, (1,))(y)
        return nn.Conv(8, (1,))(nn.relu(sum(skips)))


IMAGE = (2, 16, 16, 3)
NETWORKS = {
    "Mixer": lambda: zoo.linen_network(Mixer(), zoo.normal(*IMAGE)),
    "UNet": lambda: zoo.linen_network(UNet(), zoo.normal(*IMAGE), zoo.normal(2)),
    "ScannedDecoder": lambda: zoo.linen_network(ScannedDecoder(), zoo.tokens()),
    "MixtureDecoder": lambda: zoo.linen_network(MixtureDecoder(), zoo.tokens()),
    "Tagger": lambda: zoo.linen_network(Tagger(), zoo.tokens()),
    "VAE": lambda: zoo.linen_network(VAE(), zoo.normal(4, 32), zoo.normal(4, 8)),
    "WideResNet": lambda: zoo.linen_network(WideResNet(), zoo.normal(*IMAGE)),
    "GraphNet": lambda: zoo.linen_network(GraphNet(), zoo.normal(6, 5), zoo.normal(6, 6)),
    "WaveNet": lambda: zoo.linen_network(WaveNet(), zoo.normal(2, 16, 4)),
}
