"""Small networks of many kinds, each as ``fn(params, *args)``, with the axis groups that it has, written by hand.

A line of groups is a size and the places of the units: ``12: up:1 up_bias:0 down:0``, leaf and axis. Units that do not
fill the axis have the index of the first one and the distance to the next: ``qkv:1@8+4``. ``BN(x)`` stands for scale,
bias, mean and variance, ``LN(x)`` for scale and bias.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import prunax


class Network(NamedTuple):
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    groups: str


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def expected(text: str) -> set[tuple[int, frozenset[str]]]:
    """Parses the lines of groups."""
    text = re.sub(r"BN\((.*?)\)(\S*)", _batch_norm, text)
    text = re.sub(r"LN\((.*?)\)(\S*)", r"\1/scale:0\2 \1/bias:0\2", text)
    lines = (line.split() for line in text.strip().splitlines())
    return {(int(size.rstrip(":")), frozenset(places)) for size, *places in lines}


def _batch_norm(match: re.Match) -> str:
    name, place = match.groups()
    head = "" if name.startswith("params/") else "params/"
    name = name.removeprefix("params/")
    return " ".join(
        [f"{head or 'params/'}{name}/{x}:0{place}" for x in ("scale", "bias")]
        + [f"batch_stats/{name}/{x}:0{place}" for x in ("mean", "var")]
    )


def found(groups: Any) -> set[tuple[int, frozenset[str]]]:
    """Unfrozen groups in the same form."""
    result = set()
    for group in groups:
        if group.frozen:
            continue
        shapes = {leaf.path: leaf.shape for leaf in group.leaves}
        places = []
        for path, axis, (offset, stride, _), _ in group.members:
            whole = shapes[path][axis] == group.size
            places.append(f"{path}:{axis}" + ("" if whole else f"@{offset}+{stride}"))
        assert len(set(places)) == len(places)
        result.add((group.size, frozenset(places)))
    return result


def _linen(module: nn.Module, x: np.ndarray, groups: str) -> Network:
    # Filled in NumPy, which compiles nothing. Variances are positive.
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, treedef = jax.tree.flatten(shapes)
    values = [0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    paths = prunax.trees.paths(shapes)
    values = [1 + np.abs(v) if p.endswith("var") else v for p, v in zip(paths, values, strict=True)]
    return Network(module.apply, treedef.unflatten(values), (x,), groups)


def _params(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: 0.4 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def mlp() -> Network:
    params = _params(w1=(6, 12), b1=(12,), w2=(12, 8), b2=(8,), w3=(8, 3), b3=(3,))

    def fn(p, x):
        x = jax.nn.relu(x @ p["w1"] + p["b1"][None])
        x = jax.nn.sigmoid(x @ p["w2"] + p["b2"][None])
        return x @ p["w3"] + p["b3"][None]

    return Network(
        fn,
        params,
        (normal(9, 2, 6),),
        """
        12: w1:1 b1:0 w2:0
        8: w2:1 b2:0 w3:0
        """,
    )


class _CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="c1")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), name="c2")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(10, name="d1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(4, name="d2")(x)


def cnn() -> Network:
    return _linen(
        _CNN(),
        normal(9, 2, 8, 8, 3),
        """
        6: params/c1/kernel:3 params/c1/bias:0 params/c2/kernel:2
        8: params/c2/kernel:3 params/c2/bias:0 params/d1/kernel:0@0+1
        10: params/d1/kernel:1 params/d1/bias:0 params/d2/kernel:0
        """,
    )


class _Block(nn.Module):
    widths: tuple[int, ...]
    stride: int = 1
    project: bool = False

    @nn.compact
    def __call__(self, x):
        y = x
        *inner, last = self.widths
        kernels = [(3, 3)] * 2 if len(self.widths) == 2 else [(1, 1), (3, 3), (1, 1)]
        for i, width in enumerate(self.widths):
            stride = self.stride if i == len(self.widths) - 2 else 1
            conv = nn.Conv(width, kernels[i], stride, use_bias=False, name=f"conv{i + 1}")
            y = nn.BatchNorm(use_running_average=True, name=f"bn{i + 1}")(conv(y))
            y = nn.relu(y) if i < len(inner) else y
        if self.project:
            x = nn.Conv(last, (1, 1), self.stride, use_bias=False, name="proj")(x)
            x = nn.BatchNorm(use_running_average=True, name="bnp")(x)
        return nn.relu(x + y)


class _ResNet(nn.Module):
    blocks: tuple[tuple[tuple[int, ...], int, bool], ...]

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
        for i, block in enumerate(self.blocks):
            x = _Block(*block, name=f"b{i + 1}")(x)
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


def resnet_basic() -> Network:
    return _linen(
        _ResNet((((8, 8), 1, False), ((12, 12), 2, True))),
        normal(9, 2, 8, 8, 3),
        """
        8: params/stem/kernel:3 BN(bn) params/b1/conv1/kernel:2 params/b1/conv2/kernel:3 BN(b1/bn2) \
params/b2/conv1/kernel:2 params/b2/proj/kernel:2
        8: params/b1/conv1/kernel:3 BN(b1/bn1) params/b1/conv2/kernel:2
        12: params/b2/conv1/kernel:3 BN(b2/bn1) params/b2/conv2/kernel:2
        12: params/b2/conv2/kernel:3 BN(b2/bn2) params/b2/proj/kernel:3 BN(b2/bnp) params/head/kernel:0
        """,
    )


def resnet_bottleneck() -> Network:
    return _linen(
        _ResNet((((4, 4, 16), 1, True), ((6, 6, 16), 1, False))),
        normal(9, 2, 8, 8, 3),
        """
        8: params/stem/kernel:3 BN(bn) params/b1/conv1/kernel:2 params/b1/proj/kernel:2
        4: params/b1/conv1/kernel:3 BN(b1/bn1) params/b1/conv2/kernel:2
        4: params/b1/conv2/kernel:3 BN(b1/bn2) params/b1/conv3/kernel:2
        16: params/b1/conv3/kernel:3 BN(b1/bn3) params/b1/proj/kernel:3 BN(b1/bnp) params/b2/conv1/kernel:2 \
params/b2/conv3/kernel:3 BN(b2/bn3) params/head/kernel:0
        6: params/b2/conv1/kernel:3 BN(b2/bn1) params/b2/conv2/kernel:2
        6: params/b2/conv2/kernel:3 BN(b2/bn2) params/b2/conv3/kernel:2
        """,
    )


class _DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="c0")(x)
        for i in (1, 2):
            y = nn.Conv(4, (3, 3), name=f"c{i}")(nn.relu(x))
            x = jnp.concatenate([x, y], axis=-1)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def densenet() -> Network:
    return _linen(
        _DenseNet(),
        normal(9, 2, 6, 6, 3),
        """
        6: params/c0/kernel:3 params/c0/bias:0 params/c1/kernel:2 params/c2/kernel:2@0+1 BN(bn)@0+1 \
params/head/kernel:0@0+1
        4: params/c1/kernel:3 params/c1/bias:0 params/c2/kernel:2@6+1 BN(bn)@6+1 params/head/kernel:0@6+1
        4: params/c2/kernel:3 params/c2/bias:0 BN(bn)@10+1 params/head/kernel:0@10+1
        """,
    )


class _Separable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depth1")(x)
        x = nn.relu(nn.Conv(8, (1, 1), name="point1")(x))
        # Two outputs for each channel, then a convolution in groups of four channels.
        x = nn.Conv(16, (3, 3), feature_group_count=8, name="depth2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn")(x))
        x = nn.relu(nn.Conv(12, (1, 1), name="point2")(x))
        x = nn.relu(nn.Conv(6, (1, 1), feature_group_count=3, name="grouped")(x))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def depthwise_separable() -> Network:
    return _linen(
        _Separable(),
        normal(9, 2, 6, 6, 3),
        """
        6: params/stem/kernel:3 params/stem/bias:0 params/depth1/kernel:3 params/depth1/bias:0 params/point1/kernel:2
        8: params/point1/kernel:3 params/point1/bias:0 params/depth2/kernel:3@0+2 params/depth2/bias:0@0+2 BN(bn)@0+2 \
params/point2/kernel:2@0+2
        2: params/depth2/kernel:3@0+1 params/depth2/bias:0@0+1 BN(bn)@0+1 params/point2/kernel:2@0+1
        3: params/point2/kernel:3@0+4 params/point2/bias:0@0+4 params/grouped/kernel:3@0+2 params/grouped/bias:0@0+2 \
params/head/kernel:0@0+2
        4: params/point2/kernel:3@0+1 params/point2/bias:0@0+1 params/grouped/kernel:2
        2: params/grouped/kernel:3@0+1 params/grouped/bias:0@0+1 params/head/kernel:0@0+1
        """,
    )


class _UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(6, (3, 3), name="enc")(x))
        x = nn.max_pool(skip, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2, name="mid")(x))
        x = nn.ConvTranspose(5, (2, 2), (2, 2), name="up")(x)
        x = jnp.concatenate([x, skip], axis=-1)
        x = nn.relu(nn.Conv(7, (3, 3), name="dec")(x))
        return nn.Conv(2, (1, 1), name="out")(x)


def unet() -> Network:
    return _linen(
        _UNet(),
        normal(9, 2, 8, 8, 3),
        """
        6: params/enc/kernel:3 params/enc/bias:0 params/mid/kernel:2 params/dec/kernel:2@5+1
        8: params/mid/kernel:3 params/mid/bias:0 params/up/kernel:2
        5: params/up/kernel:3 params/up/bias:0 params/dec/kernel:2@0+1
        7: params/dec/kernel:3 params/dec/bias:0 params/out/kernel:2
        """,
    )


def _layer_norm(x, scale):
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-6) * jnp.expand_dims(scale, range(x.ndim - 1))


def _rms_norm(x, scale):
    var = jnp.square(x).mean(-1, keepdims=True)
    return x * lax.rsqrt(var + 1e-6) * jnp.expand_dims(scale, range(x.ndim - 1))


def patches() -> Network:
    """A 3x3 convolution as one matrix product over shifted images."""
    params = _params(stem=(3, 6), kernel=(3, 3, 6, 8), head=(8, 2))

    def fn(p, x):
        x = jax.nn.relu(x @ p["stem"])
        shifted = [x[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
        x = jnp.concatenate(shifted, axis=-1) @ p["kernel"].reshape(54, 8)
        return jax.nn.relu(x).mean((1, 2)) @ p["head"]

    return Network(
        fn,
        params,
        (normal(9, 2, 6, 6, 3),),
        """
        6: stem:1 kernel:2
        8: kernel:3 head:0
        """,
    )


def mixer() -> Network:
    params = _params(
        embed=(6, 8), n1=(8,), t1=(9, 5), t2=(5, 9), n2=(8,), c1=(8, 12), c2=(12, 8), head=(8, 3)
    )

    def fn(p, x):
        x = x @ p["embed"]
        y = _layer_norm(x, p["n1"]).swapaxes(1, 2)
        x = x + (jax.nn.gelu(y @ p["t1"]) @ p["t2"]).swapaxes(1, 2)
        x = x + jax.nn.gelu(_layer_norm(x, p["n2"]) @ p["c1"]) @ p["c2"]
        return x.mean(1) @ p["head"]

    return Network(
        fn,
        params,
        (normal(9, 2, 9, 6),),
        """
        8: embed:1 n1:0 n2:0 c1:0 c2:1 head:0
        5: t1:1 t2:0
        12: c1:1 c2:0
        """,
    )


class _ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4), padding="VALID", name="patch")(x)
        x = x.reshape(x.shape[0], -1, 8)
        cls = self.param("cls", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("pos", nn.initializers.normal(), (1, 5, 8))
        y = nn.LayerNorm(name="n1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(y, y)
        y = nn.Dense(12, name="fc1")(nn.LayerNorm(name="n2")(x))
        x = x + nn.Dense(8, name="fc2")(nn.gelu(y))
        return nn.Dense(3, name="head")(nn.LayerNorm(name="n3")(x)[:, 0])


def vit() -> Network:
    return _linen(
        _ViT(),
        normal(9, 2, 8, 8, 3),
        """
        8: params/patch/kernel:3 params/patch/bias:0 params/cls:2 params/pos:2 \
LN(params/n1) LN(params/n2) LN(params/n3) \
params/attn/query/kernel:0 params/attn/key/kernel:0 params/attn/value/kernel:0 params/attn/out/kernel:2 \
params/attn/out/bias:0 params/fc1/kernel:0 params/fc2/kernel:1 params/fc2/bias:0 params/head/kernel:0
        2: params/attn/query/kernel:1 params/attn/query/bias:0 params/attn/key/kernel:1 params/attn/key/bias:0 \
params/attn/value/kernel:1 params/attn/value/bias:0 params/attn/out/kernel:0
        4: params/attn/query/kernel:2 params/attn/query/bias:1 params/attn/key/kernel:2 params/attn/key/bias:1
        4: params/attn/value/kernel:2 params/attn/value/bias:1 params/attn/out/kernel:1
        12: params/fc1/kernel:1 params/fc1/bias:0 params/fc2/kernel:0
        """,
    )


def _attention(q, k, v):
    """Causal; (batch, time, heads, size)."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def _gpt_block(p, x):
    y = _layer_norm(x, p["n1"]) @ p["qkv"] + p["qkv_b"][None, None]
    q, k, v = (part.reshape(*part.shape[:2], 2, 4) for part in jnp.split(y, 3, axis=-1))
    y = _attention(q, k, v)
    x = x + y.reshape(*y.shape[:2], 8) @ p["proj"]
    return x + jax.nn.gelu(_layer_norm(x, p["n2"]) @ p["fc"]) @ p["out"]


GPT_BLOCK = {"n1": (8,), "qkv": (8, 24), "qkv_b": (24,), "proj": (8, 8), "n2": (8,)}
GPT_BLOCK |= {"fc": (8, 12), "out": (12, 8)}


def gpt() -> Network:
    params = _params(wte=(11, 8), wpe=(6, 8), **GPT_BLOCK, nf=(8,), head=(8, 11))

    def fn(p, tokens):
        x = p["wte"][tokens] + p["wpe"][None]
        return _layer_norm(_gpt_block(p, x), p["nf"]) @ p["head"]

    return Network(
        fn,
        params,
        (np.arange(12).reshape(2, 6) % 11,),
        """
        8: wte:1 wpe:1 n1:0 qkv:0 proj:1 n2:0 fc:0 out:1 nf:0 head:0
        2: qkv:1@0+4 qkv:1@8+4 qkv:1@16+4 qkv_b:0@0+4 qkv_b:0@8+4 qkv_b:0@16+4 proj:0@0+4
        4: qkv:1@0+1 qkv:1@8+1 qkv_b:0@0+1 qkv_b:0@8+1
        4: qkv:1@16+1 qkv_b:0@16+1 proj:0@0+1
        12: fc:1 out:0
        """,
    )


def scanned() -> Network:
    """The same block three times, by `scan` over stacked parameters."""
    layers = _params(**{name: (3, *shape) for name, shape in GPT_BLOCK.items()})
    params = {"embed": normal(20, 5, 8), "layers": layers, "head": normal(21, 8, 3)}

    def fn(p, x):
        x, norms = lax.scan(
            lambda x, layer: (jax.checkpoint(_gpt_block)(layer, x), jnp.square(x).sum()),
            x @ p["embed"],
            p["layers"],
        )
        return x @ p["head"], norms

    return Network(
        fn,
        params,
        (normal(9, 2, 6, 5),),
        """
        8: embed:1 layers/n1:1 layers/qkv:1 layers/proj:2 layers/n2:1 layers/fc:1 layers/out:2 head:0
        2: layers/qkv:2@0+4 layers/qkv:2@8+4 layers/qkv:2@16+4 layers/qkv_b:1@0+4 layers/qkv_b:1@8+4 \
layers/qkv_b:1@16+4 layers/proj:1@0+4
        4: layers/qkv:2@0+1 layers/qkv:2@8+1 layers/qkv_b:1@0+1 layers/qkv_b:1@8+1
        4: layers/qkv:2@16+1 layers/qkv_b:1@16+1 layers/proj:1@0+1
        12: layers/fc:2 layers/out:1
        """,
    )


def _rotary(x):
    """Halves of each head turned together; (batch, time, heads, size)."""
    size = x.shape[-1]
    frequency = 10.0 ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency[None]
    angle = jnp.concatenate([angle, angle], axis=-1)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return x * jnp.cos(angle) + jnp.concatenate([-b, a], axis=-1) * jnp.sin(angle)


def llama() -> Network:
    params = _params(
        embed=(11, 12),
        n1=(12,),
        wq=(12, 32),
        wk=(12, 16),
        wv=(12, 16),
        wo=(32, 12),
        n2=(12,),
        gate_up=(12, 32),
        down=(16, 12),
        nf=(12,),
    )

    def fn(p, tokens):
        x = p["embed"][tokens]
        y = _rms_norm(x, p["n1"])
        q, k, v = ((y @ p[w]).reshape(*y.shape[:2], -1, 8) for w in ("wq", "wk", "wv"))
        q, k = _rotary(q), _rotary(k)
        k, v = (jnp.repeat(z, 2, axis=2) for z in (k, v))
        x = x + _attention(q, k, v).reshape(*y.shape[:2], 32) @ p["wo"]
        gate, up = jnp.split(_rms_norm(x, p["n2"]) @ p["gate_up"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ p["down"]
        return _rms_norm(x, p["nf"]) @ p["embed"].T

    return Network(
        fn,
        params,
        (np.arange(10).reshape(2, 5) % 11,),
        """
        12: embed:1 n1:0 wq:0 wk:0 wv:0 wo:1 n2:0 gate_up:0 down:1 nf:0
        2: wq:1@0+16 wk:1@0+8 wv:1@0+8 wo:0@0+16
        2: wq:1@0+8 wo:0@0+8
        4: wq:1@0+1 wq:1@4+1 wk:1@0+1 wk:1@4+1
        8: wv:1@0+1 wo:0@0+1
        16: gate_up:1@0+1 gate_up:1@16+1 down:0
        """,
    )


def moe() -> Network:
    """Two of four experts for each token.

    The experts go with their columns of the router, which ranks those that are left.
    """
    params = _params(
        embed=(6, 8), router=(8, 4), w1=(4, 8, 10), b1=(4, 10), w2=(4, 10, 8), head=(8, 3)
    )

    def fn(p, x):
        x = x @ p["embed"]
        chances = jax.nn.softmax(x @ p["router"], axis=-1)
        values, experts = lax.top_k(chances, 2)
        gates = jnp.sum(jax.nn.one_hot(experts, 4) * values[..., None], axis=-2)
        y = jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["w1"]) + p["b1"][None, None])
        x = x + jnp.einsum("btef,efd,bte->btd", y, p["w2"], gates)
        return x @ p["head"]

    return Network(
        fn,
        params,
        (normal(9, 2, 5, 6),),
        """
        8: embed:1 router:0 w1:1 w2:2 head:0
        10: w1:2 b1:1 w2:1
        4: router:1 w1:0 b1:0 w2:0
        """,
    )


def soft_moe() -> Network:
    """All experts for each token, by softmax: removing one changes the shares of the others."""
    params = _params(router=(6, 4), w1=(4, 6, 10), w2=(4, 10, 3))

    def fn(p, x):
        gates = jax.nn.softmax(x @ p["router"], axis=-1)
        y = jax.nn.gelu(jnp.einsum("bd,edf->bef", x, p["w1"]))
        return jnp.einsum("bef,efd,be->bd", y, p["w2"], gates)

    return Network(
        fn,
        params,
        (normal(9, 5, 6),),
        """
        4: router:1 w1:0 w2:0
        10: w1:2 w2:1
        """,
    )


def lstm() -> Network:
    params = _params(w=(9, 24), b=(24,), head=(6, 2))

    def fn(p, xs):
        def step(state, x):
            h, c = state
            gates = jnp.concatenate([x, h], axis=-1) @ p["w"] + p["b"][None]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((xs.shape[0], 6))
        _, hs = lax.scan(step, (zero, zero), xs.swapaxes(0, 1))
        return hs.swapaxes(0, 1) @ p["head"]

    return Network(
        fn,
        params,
        (normal(9, 2, 5, 3),),
        """
        6: w:0@3+1 w:1@0+1 w:1@6+1 w:1@12+1 w:1@18+1 b:0@0+1 b:0@6+1 b:0@12+1 b:0@18+1 head:0
        """,
    )


class _LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.RNN(nn.OptimizedLSTMCell(6), name="rnn")(x))


def linen_lstm() -> Network:
    cell = "params/OptimizedLSTMCell_0"
    gates = [f"{cell}/{kind}{gate}" for gate in "ifgo" for kind in "ih"]
    places = [f"{gate}/kernel:1" for gate in gates]
    places += [f"{gate}/{x}:0" for gate in gates[1::2] for x in ("kernel", "bias")]
    return _linen(_LinenLSTM(), normal(9, 2, 5, 3), f"6: {' '.join(places)} params/head/kernel:0")


NETWORKS = {
    make.__name__: make
    for make in (
        mlp,
        cnn,
        resnet_basic,
        resnet_bottleneck,
        densenet,
        depthwise_separable,
        unet,
        patches,
        mixer,
        vit,
        gpt,
        scanned,
        llama,
        moe,
        soft_moe,
        lstm,
        linen_lstm,
    )
}
