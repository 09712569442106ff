"""Removes half the experts of a small mixture-of-experts language model: by REAP's score, by frequency, at random.

Trains a model of characters on one half of the topics of Python's documentation for some minutes, scores its experts on
a part of that half, and evaluates on the other half. What REAP's score keeps is compared with its formula worked out in
NumPy. Writes JSON and a table.
"""

import argparse
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console

from benchmarks import harness, llm, smollm
from benchmarks.shrink import loss
from prunax import structured

EXAMPLES = """\
examples:
  python -m benchmarks.mixture
  python -m benchmarks.mixture --steps 20 --draws 2
"""
STEM = "mixture"
PyTree = Any


class Config(NamedTuple):
    """The sizes of the model."""

    characters: int
    width: int = 128
    hidden: int = 64
    experts: int = 16
    taken: int = 2
    heads: int = 4
    layers: int = 2
    length: int = 128


def init(key: jax.Array, c: Config) -> PyTree:
    """Random params."""
    keys = iter(jax.random.split(key, 3 + 5 * c.layers))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    def layer() -> PyTree:
        return {
            "attention": {"qkv": normal(c.width, 3 * c.width), "out": normal(c.width, c.width)},
            "router": normal(c.width, c.experts),
            "up": normal(c.experts, c.width, c.hidden),
            "down": normal(c.experts, c.hidden, c.width),
        }

    embedding = normal(c.characters, c.width), normal(c.length, c.width)
    layers = [layer() for _ in range(c.layers)]
    return {"embed": embedding, "layers": layers, "head": normal(c.width, c.characters)}


def norm(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def attend(p: PyTree, x: jax.Array, heads: int) -> jax.Array:
    """Causal attention."""
    qkv = (x @ p["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
    mixed = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
    return mixed.reshape(x.shape) @ p["out"]


def mixture(p: PyTree, x: jax.Array, taken: int) -> jax.Array:
    """Each token's output of the experts that its router takes, weighted by a softmax over those."""
    scores, chosen = lax.top_k(x @ p["router"], taken)
    weights = jax.nn.softmax(scores)
    hot = jax.nn.one_hot(chosen, p["router"].shape[1], dtype=x.dtype)
    hidden = jax.nn.relu(jnp.einsum("btd,edf->btef", x, p["up"]))
    return jnp.einsum("btk,btke,btef,efd->btd", weights, hot, hidden, p["down"])


def apply(c: Config, params: PyTree, tokens: jax.Array) -> jax.Array:
    """Characters ``(batch, length)`` to logits ``(batch, length, characters)``."""
    return run(c, params, tokens)[0]


def run(c: Config, params: PyTree, tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """The logits, and what each mixture of experts gets ``(batch, length, width)``."""
    table, positions = params["embed"]
    x = table[tokens] + positions[: tokens.shape[1]]
    inputs = []
    for own in params["layers"]:
        x = x + attend(own["attention"], norm(x), c.heads)
        inputs.append(norm(x))
        x = x + mixture(own, inputs[-1], c.taken)
    return norm(x) @ params["head"], inputs


def balance(params: PyTree, inputs: Sequence[jax.Array], taken: int) -> jax.Array:
    """The auxiliary loss of Switch Transformers (arXiv:2101.03961, equation 4), 1 where experts are used alike."""
    found = []
    for own, x in zip(params["layers"], inputs, strict=True):
        chances = jax.nn.softmax(x @ own["router"])
        hot = jax.nn.one_hot(lax.top_k(chances, taken)[1], chances.shape[-1], dtype=x.dtype)
        share = hot.sum(2).mean((0, 1)) / taken
        found.append(chances.shape[-1] * jnp.sum(share * chances.mean((0, 1))))
    return jnp.mean(jnp.stack(found))


def train(c: Config, rows: np.ndarray, args: argparse.Namespace) -> PyTree:
    """Trains with Adam on windows drawn at random."""
    params = init(jax.random.key(args.seed), c)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, args.steps))

    def objective(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits, inputs = run(c, params, tokens)
        own = loss(lambda *_: logits, params, tokens)
        return own + args.balance * balance(params, inputs, c.taken)

    @jax.jit
    def step(params: PyTree, state: PyTree, tokens: jax.Array) -> Any:
        updates, state = optimizer.update(jax.grad(objective)(params, tokens), state)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(args.seed)
    for _ in range(args.steps):
        tokens = rows[rng.integers(0, len(rows), args.batch)]
        params, state = jax.block_until_ready(step(params, state, tokens))
    return params


def by_hand(c: Config, params: PyTree, batches: Sequence[Any]) -> list[tuple[Any, Any]]:
    """REAP's score in NumPy from its formula (arXiv:2510.13999, equation 9), and how often experts are taken.

    Returns:
        For each layer ``(experts,)`` and ``(experts,)``.
    """
    sums = np.zeros((2, c.layers, c.experts))
    for batch in batches:
        for layer, x in enumerate(run(c, params, batch)[1]):
            own = jax.tree.map(np.asarray, params["layers"][layer])
            x = np.asarray(x).reshape(-1, c.width)
            logits = x @ own["router"]
            taken = np.argsort(-logits, axis=1, kind="stable")[:, : c.taken]
            weights = np.exp(np.take_along_axis(logits, taken, axis=1))
            weights /= weights.sum(1, keepdims=True)
            for e in range(c.experts):
                token, place = np.nonzero(taken == e)
                outputs = np.maximum(x[token] @ own["up"][e], 0) @ own["down"][e]
                sums[0, layer, e] += weights[token, place] @ np.linalg.norm(outputs, axis=1)
                sums[1, layer, e] += len(token)
    return [(total / np.maximum(count, 1), count) for total, count in zip(*sums, strict=True)]


def perplexity(fn: Any, params: PyTree, rows: np.ndarray) -> float:
    """Of each character of each window but its first."""
    own = jax.jit(functools.partial(loss, fn))
    losses = [float(own(params, batch)) for batch in smollm.batches(rows, 16)]
    return float(np.exp(np.mean(losses)))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Trains the model and removes half its experts in every way."""
    texts = llm.documentation()
    known = sorted(set("".join(texts)))
    numbers = {character: i for i, character in enumerate(known)}
    c = Config(len(known))
    rows, held_out = (
        smollm.windows(np.array([numbers[x] for x in text]), c.length) for text in texts
    )
    held_out = held_out[: len(held_out) // 16 * 16]
    start = time.perf_counter()
    params = train(c, rows, args)
    seconds = time.perf_counter() - start
    fn = functools.partial(apply, c)
    calibrating = list(smollm.batches(rows[:: len(rows) // 128][:128], 16))
    groups = structured.axis_groups(fn, params, calibrating[0])
    experts = [group for group in groups if group.name.endswith("router[1]")]
    names = [group.name for group in experts]
    reap = structured.expert_importance(fn, params, calibrating, experts)
    hand = by_hand(c, params, calibrating)

    def kept(scores: Mapping[str, Any]) -> dict[str, Any]:
        small = structured.prune_channels(fn, params, rows[:1], sparsity=0.5, scores=scores)
        return {
            "kept": {group.name: units.tolist() for group, units in small.keep.items()},
            "params": int(structured.count_parameters(fn, small.params)),
            "perplexity": perplexity(small.fn, small.params, held_out),
        }

    records = [
        {
            "by": "dense",
            "params": int(structured.count_parameters(fn, params)),
            "perplexity": perplexity(fn, params, held_out),
        },
        {"by": "REAP", **kept(reap)},
        {"by": "frequency", **kept({n: own[1] for n, own in zip(names, hand, strict=True)})},
    ]
    rng = np.random.default_rng(args.seed)
    for _ in range(args.draws):
        records.append({"by": "random", **kept({n: rng.random(c.experts) for n in names})})
    formula = {
        name: np.sort(np.argsort(-scores, kind="stable")[: c.experts // 2]).tolist()
        for name, (scores, _) in zip(names, hand, strict=True)
    }
    differences = [
        float(np.max(np.abs(reap[n] - s) / s)) for n, (s, _) in zip(names, hand, strict=True)
    ]
    return {
        "model": c._asdict(),
        "settings": {k: getattr(args, k) for k in ("steps", "batch", "balance", "draws", "seed")},
        "training_seconds": seconds,
        "shares": {n: (own[1] / own[1].sum()).tolist() for n, own in zip(names, hand, strict=True)},
        "formula": {
            "kept": formula,
            "largest_difference": max(differences),
            "equal": formula == records[1]["kept"],
        },
        "records": records,
    }


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    model, settings = content["model"], content["settings"]
    lines = []
    for name in dict.fromkeys(r["by"] for r in content["records"]):
        own = [r for r in content["records"] if r["by"] == name]
        found = harness.spread([r["perplexity"] for r in own], scale=1)
        lines.append((name, f"{own[0]['params']:,}", found))
    title = (
        f"{model['layers']} layers of {model['experts']} experts, {model['taken']} for each character, "
        f"{settings['steps']} steps; half the experts removed, no tuning; random: {settings['draws']} draws"
    )
    columns = ("experts kept by", "params", "perplexity of a character")
    return {STEM: harness.Table(columns, lines, title=title)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    content = harness.content("python -m benchmarks.mixture", **compare(args))
    head = "Half the experts of a mixture"
    harness.publish(args.out / f"{STEM}.json", head, content, tables, Console())


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(STEM, __doc__, EXAMPLES)
    add = parser.add_argument
    add("--steps", type=int, default=1500, help="of training (1500)")
    add("--batch", type=int, default=16, help="windows of 128 characters a step (16)")
    add("--balance", type=float, default=0.01, help="weight of the auxiliary loss (0.01)")
    add("--draws", type=int, default=5, help="random choices (5)")
    add("--seed", type=int, default=0, help="(0)")
    return parser


if __name__ == "__main__":
    main()
