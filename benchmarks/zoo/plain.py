"""Networks in plain JAX, on dicts of arrays: written here, after what people write."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import zoo

Params = Any


def _shapes(**shapes: tuple[int, ...]) -> Params:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of (..., length, heads, width)."""
    weights = jnp.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5
    weights = jnp.where(jnp.tril(jnp.ones(weights.shape[-2:], bool)), weights, -1e9)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(weights), v)


def _block_shapes(layers: int = 0) -> Params:
    shapes = _shapes(
        scale_attention=(32,),
        qkv=(32, 96),
        out=(32, 32),
        scale_mlp=(32,),
        up=(32, 64),
        down=(64, 32),
    )
    stacked = (layers,) if layers else ()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*stacked, *x.shape), x.dtype), shapes)


def _block(p: Params, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(_norm(x, p["scale_attention"]) @ p["qkv"], 3, -1)
    heads = [a.reshape(*a.shape[:-1], 4, 8) for a in (q, k, v)]
    x = x + _attend(*heads).reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(_norm(x, p["scale_mlp"]) @ p["up"]) @ p["down"]


def gpt() -> zoo.Network:
    """A list of blocks, the embedding tied to the head."""
    params = _shapes(embedding=(50, 32), positions=(8, 32), scale=(32,))
    params |= {"blocks": [_block_shapes(), _block_shapes()]}

    def fn(p: Params, tokens: jax.Array) -> jax.Array:
        x = jnp.take(p["embedding"], tokens, axis=0) + p["positions"]
        for block in p["blocks"]:
            x = _block(block, x)
        return _norm(x, p["scale"]) @ p["embedding"].T

    return zoo.Network(fn, zoo.random(params), (zoo.tokens(),))


def scanned() -> zoo.Network:
    """Stacked blocks under `scan` with rematerialisation, as MaxText runs its decoders."""
    params = _shapes(embedding=(50, 32), scale=(32,), head=(32, 50)) | {"layers": _block_shapes(3)}

    def fn(p: Params, tokens: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda x, block: (_block(block, x), None))
        x, _ = jax.lax.scan(step, p["embedding"][tokens], p["layers"])
        return _norm(x, p["scale"]) @ p["head"]

    return zoo.Network(fn, zoo.random(params), (zoo.tokens(),))


def mamba() -> zoo.Network:
    """Two selective state spaces with gates and causal convolutions."""
    inner, states, rank = 48, 4, 3
    layer = _shapes(
        scale=(32,),
        in_proj=(32, 2 * inner),
        conv=(4, 1, inner),
        conv_bias=(inner,),
        x_proj=(inner, rank + 2 * states),
        dt_proj=(rank, inner),
        dt_bias=(inner,),
        a_log=(inner, states),
        skip=(inner,),
        out_proj=(inner, 32),
    )
    params = _shapes(embedding=(50, 32), head=(32, 50)) | {"layers": [layer, layer]}

    def mix(p: Params, x: jax.Array) -> jax.Array:
        x, gate = jnp.split(_norm(x, p["scale"]) @ p["in_proj"], 2, -1)
        numbers = jax.lax.conv_dimension_numbers(x.shape, p["conv"].shape, ("NTC", "TIO", "NTC"))
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (1,), [(3, 0)], dimension_numbers=numbers, feature_group_count=inner
        )
        x = jax.nn.silu(x + p["conv_bias"])
        delta, b, c = jnp.split(x @ p["x_proj"], [rank, rank + states], -1)
        delta = jax.nn.softplus(delta @ p["dt_proj"] + p["dt_bias"])
        decay = jnp.exp(delta[..., None] * -jnp.exp(p["a_log"]))
        entered = (delta * x)[..., None] * b[..., None, :]

        def step(state: jax.Array, inputs: Any) -> Any:
            decay, entered, c = inputs
            state = decay * state + entered
            return state, jnp.einsum("bds,bs->bd", state, c)

        inputs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (decay, entered, c))
        _, y = jax.lax.scan(step, jnp.zeros((x.shape[0], inner, states)), inputs)
        y = jnp.moveaxis(y, 0, 1) + p["skip"] * x
        return (y * jax.nn.silu(gate)) @ p["out_proj"]

    def fn(p: Params, tokens: jax.Array) -> jax.Array:
        x = p["embedding"][tokens]
        for layer in p["layers"]:
            x = x + mix(layer, x)
        return x @ p["head"]

    return zoo.Network(fn, zoo.random(params), (zoo.tokens(),))


def associative_scan() -> zoo.Network:
    """A gated linear recurrence, in parallel."""
    layer = _shapes(gate=(32, 48), value=(32, 48), out=(48, 32))
    params = _shapes(embedding=(50, 32), head=(32, 50)) | {"layers": [layer, layer]}

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def fn(p: Params, tokens: jax.Array) -> jax.Array:
        x = p["embedding"][tokens]
        for layer in p["layers"]:
            gate = jax.nn.sigmoid(x @ layer["gate"])
            value = (1 - gate) * (x @ layer["value"])
            _, state = jax.lax.associative_scan(combine, (gate, value), axis=1)
            x = x + jnp.tanh(state) @ layer["out"]
        return x @ p["head"]

    return zoo.Network(fn, zoo.random(params), (zoo.tokens(),))


def siren() -> zoo.Network:
    """A field of coordinates, its Fourier features and sines."""
    params = _shapes(frequencies=(2, 16), w1=(32, 32), b1=(32,), w2=(32, 32), b2=(32,), w3=(32, 3))

    def fn(p: Params, x: jax.Array) -> jax.Array:
        phases = x @ p["frequencies"]
        x = jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], -1)
        x = jnp.sin(30 * (x @ p["w1"] + p["b1"]))
        return jnp.sin(x @ p["w2"] + p["b2"]) @ p["w3"]

    return zoo.Network(fn, zoo.random(params), (zoo.normal(8, 2),))


def physics() -> zoo.Network:
    """What a physics-informed network is trained on: its own derivatives."""
    params = _shapes(w1=(2, 24), b1=(24,), w2=(24, 24), b2=(24,), w3=(24, 1))

    def fn(p: Params, points: jax.Array) -> jax.Array:
        def field(x: jax.Array) -> jax.Array:
            x = jnp.tanh(x @ p["w1"] + p["b1"])
            return (jnp.tanh(x @ p["w2"] + p["b2"]) @ p["w3"])[0]

        heat = jax.vmap(lambda x: jax.grad(field)(x)[0] - jax.hessian(field)(x)[1, 1])
        return jnp.stack([heat(points), jax.vmap(field)(points)])

    return zoo.Network(fn, zoo.random(params), (zoo.normal(6, 2),))


def recommender() -> zoo.Network:
    """Tables of categories and dense features, which meet in dot products (DLRM)."""
    params = _shapes(bottom1=(6, 32), bottom2=(32, 16), top1=(19, 32), top2=(32, 1))
    params |= {"tables": [jax.ShapeDtypeStruct((50, 16), jnp.float32)] * 2}

    def fn(p: Params, dense: jax.Array, categories: jax.Array) -> jax.Array:
        x = jax.nn.relu(jax.nn.relu(dense @ p["bottom1"]) @ p["bottom2"])
        looked = [table[categories[:, i]] for i, table in enumerate(p["tables"])]
        vectors = jnp.stack([x, *looked], 1)
        met = jnp.einsum("bid,bjd->bij", vectors, vectors)[:, *jnp.triu_indices(3, 1)]
        return jax.nn.relu(jnp.concatenate([x, met], -1) @ p["top1"]) @ p["top2"]

    return zoo.Network(fn, zoo.random(params), (zoo.normal(2, 6), zoo.tokens(length=2)))


def policy() -> zoo.Network:
    """An actor and a critic with continuous actions, on one trunk."""
    params = _shapes(
        trunk=(8, 32),
        trunk_bias=(32,),
        actor=(32, 24),
        mean=(24, 3),
        log_std=(3,),
        critic=(32, 24),
        value=(24, 1),
    )

    def fn(p: Params, x: jax.Array) -> Any:
        x = jnp.tanh(x @ p["trunk"] + p["trunk_bias"])
        mean = jnp.tanh(x @ p["actor"]) @ p["mean"]
        std = jnp.broadcast_to(jnp.exp(p["log_std"]), mean.shape)
        return mean, std, jnp.tanh(x @ p["critic"]) @ p["value"]

    return zoo.Network(fn, zoo.random(params), (zoo.normal(4, 8),))


BUILDERS: list[Callable[[], zoo.Network]] = [
    gpt,
    scanned,
    mamba,
    associative_scan,
    siren,
    physics,
    recommender,
    policy,
]
NETWORKS = {build.__name__: build for build in BUILDERS}
