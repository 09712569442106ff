"""A billion weights in bfloat16 on one machine, and a decoder's masks on meshes of up to 64 devices.

Each row runs in a process of its own, so that memory is counted from nothing and each has as many devices as it needs.
The first table holds a billion weights: seconds and peak memory of masks and of training steps that use up their
arguments, beside one read and one copy of the same weights, with malloc as it comes and with huge pages. The second
compiles masks of a Llama's params divided over rows and columns of a mesh of host devices, from shapes alone: what the
compiled program sends.
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

import prunax
from benchmarks import harness, sharded
from prunax import allocation, patterns

PyTree = Any
EXAMPLES = """\
examples:
  python -m benchmarks.large --layers 2 --width 1024 --devices 1 8
  python -m benchmarks.large --out benchmarks/results
"""
MASKS: dict[str, Callable[[PyTree], PyTree]] = {
    "masks, uniform 90%": lambda p: prunax.compute_masks(p, 0.9),
    "masks, global 90%": lambda p: prunax.compute_masks(
        p, 0.9, allocation=allocation.global_ranking
    ),
    "masks, 2:4": lambda p: prunax.compute_masks(p, pattern=patterns.NM(2, 4)),
}
STEPS: dict[str, Callable[[Any], Any]] = {
    "step, dense": lambda tx: tx,
    "step, masks of one bit": functools.partial(prunax.prune, sparsity=0.9, packed=True),
    "step, masks of one byte": functools.partial(prunax.prune, sparsity=0.9),
}
# glibc asks for large pages: what a process writes to new memory, it otherwise asks for in pages of 4 kB.
HUGE = "glibc.malloc.hugetlb=1"
BARE: dict[str, Callable[[PyTree], PyTree]] = {
    "one read": jax.jit(lambda p: [jnp.max(x) for x in jax.tree.leaves(p)]),
    "one copy": lambda p: jax.tree.map(jnp.copy, p),
}


# A billion weights.


def billion(layers: int, width: int) -> PyTree:
    """Square matrices in bfloat16, each from a key of its own."""

    @jax.jit
    def matrix(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (width, width), jnp.bfloat16)

    keys = jax.random.split(jax.random.key(0), layers)
    return {f"layer_{i}": {"kernel": matrix(key)} for i, key in enumerate(keys)}


def timed(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of the first call and of the later ones, and the most memory above that at the start."""
    with harness.peak_memory() as peak:
        start = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - start
        seconds = harness.median_seconds({"it": run}, repeats)["it"]
    return {"first": first, "seconds": seconds, "peak": peak[0]}


def measured(what: str, tunables: str, layers: int, width: int, repeats: int) -> dict[str, Any]:
    """One row of the first table, in a process that has these tunables of glibc."""
    params = jax.block_until_ready(billion(layers, width))
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    if what in STEPS:
        found = _step(STEPS[what], params, repeats)
    else:
        function = (BARE | MASKS)[what]
        found = timed(lambda: function(params), repeats)
    return {"what": what, "tunables": tunables, "bytes": held, **found}


def _step(wrap: Callable[[Any], Any], params: PyTree, repeats: int) -> dict[str, Any]:
    """SGD with momentum on eight examples, masks there from the first step on; arguments are given away."""
    tx = wrap(optax.sgd(1e-3, momentum=0.9))
    x = jnp.ones((8, next(iter(params.values()))["kernel"].shape[0]), jnp.bfloat16)

    def loss(params: PyTree) -> jax.Array:
        y = x
        for layer in params.values():
            y = jnp.tanh(y @ layer["kernel"] / math.sqrt(x.shape[1]))
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    carry = params, jax.jit(tx.init)(params)

    def once() -> Any:
        nonlocal carry
        carry = step(*carry)
        return carry

    return timed(once, repeats)


# A decoder on a mesh.


def decoder(layers: int, width: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Shapes of a Llama's params in bfloat16, and how each is divided over a mesh of two axes."""
    rows, columns = PartitionSpec("data", "model"), PartitionSpec("model", "data")
    kernels = {
        **dict.fromkeys(("query", "key", "value"), ((width, width), rows)),
        "output": ((width, width), columns),
        **dict.fromkeys(("gate", "up"), ((width, hidden), rows)),
        "down": ((hidden, width), columns),
    }
    norms = {n: ((width,), PartitionSpec()) for n in ("attention_norm", "feed_forward_norm")}
    tree: dict[str, Any] = {"embed": {"embedding": ((vocabulary, width), columns)}}
    for i in range(layers):
        tree[f"layer_{i}"] = {n: {"kernel": k} for n, k in kernels.items()}
        tree[f"layer_{i}"] |= {n: {"scale": k} for n, k in norms.items()}
    return tree | {"head": {"kernel": ((width, vocabulary), rows)}}


def compiled(way: str, kind: str, devices: int, layers: int) -> dict[str, Any]:
    """One row of the second table."""
    axes = 2 ** (int(math.log2(devices)) // 2)
    types = (getattr(AxisType, kind),) * 2
    mesh = jax.make_mesh((devices // axes, axes), ("data", "model"), axis_types=types)

    def shape(given: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(given[0], jnp.bfloat16, sharding=NamedSharding(mesh, given[1]))

    def is_shape(node: Any) -> bool:
        return isinstance(node, tuple)

    params = jax.tree.map(shape, decoder(layers, 2048, 8192, 32768), is_leaf=is_shape)
    leaves = jax.tree.leaves(params)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(MASKS[way]).lower(params)
        tracing = time.perf_counter() - start
        program = lowered.compile()
    text = program.as_text()
    sent = re.findall(rf"= (.*?) ({'|'.join(sharded.COLLECTIVES)})(?:-start)?\(", text)
    return {
        "what": way,
        "kind": kind,
        "devices": devices,
        "leaves": len(leaves),
        "weights": sum(x.size for x in leaves),
        "held": held,
        "tracing": tracing,
        "compiling": time.perf_counter() - start - tracing,
        "collectives": {
            name: sum(n == name for _, n in sent) for name in sorted({n for _, n in sent})
        },
        "bytes": sum(_bytes(result) for result, _ in sent),
        "temporary": program.memory_analysis().temp_size_in_bytes,
    }


def _bytes(result: str) -> int:
    """Of the arrays in the text of an instruction's type."""
    sizes = {"pred": 1, "u32": 4, "s32": 4, "f32": 4, "bf16": 2, "u16": 2, "s16": 2}
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(sizes[t] * math.prod(map(int, filter(None, s.split(",")))) for t, s in shapes)


# The run.


def alone(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row, measured in a process of its own with as many devices as it says."""
    flag = f"--xla_force_host_platform_device_count={row.get('devices', 1)}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.large", "--row", json.dumps(dict(row))],
        env=os.environ
        | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": row.get("tunables", "")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The row {dict(row)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """Both tables of a results file, by the names that `render.py` knows them by."""
    memory = [r for r in content["records"] if r["part"] == "memory"]
    mesh = [r for r in content["records"] if r["part"] == "mesh"]
    made = {}
    if memory:
        by = {(r["what"], r["tunables"]): r for r in memory}
        names = [what for what, tunables in by if not tunables]
        rows = [
            (
                what,
                f"{by[what, '']['seconds']:.2f}",
                f"{by[what, HUGE]['seconds']:.2f}",
                f"{by[what, HUGE]['seconds'] / by['one read', HUGE]['seconds']:.1f}",
                f"{by[what, '']['peak'] / 1e9:.2f}",
                f"{by[what, '']['peak'] / by[what, '']['bytes']:.2f}",
            )
            for what in names
        ]
        count = memory[0]["bytes"] / 2e9
        columns = (
            "what",
            "seconds",
            "with huge pages",
            "reads, with huge pages",
            "peak, GB",
            "peak / params",
        )
        title = f"{count:.2f} billion weights in bfloat16, {memory[0]['bytes'] / 1e9:.2f} GB"
        made["large/memory"] = harness.Table(columns, rows, title=title)
    if mesh:
        rows = [
            (
                f"{r['what']}, {r['kind']}, {r['devices']}",
                f"{r['tracing']:.1f}",
                f"{r['compiling']:.1f}",
                ", ".join(f"{n} {k}" for k, n in r["collectives"].items()) or "none",
                f"{r['bytes'] / 1e3:.1f}",
                f"{r['held'] / 1e6:.0f}",
                f"{r['temporary'] / r['held']:.2f}",
            )
            for r in mesh
        ]
        columns = (
            "masks, mesh, devices",
            "tracing, s",
            "compiling, s",
            "collectives",
            "they send, kB",
            "params of a device, MB",
            "temporary / params",
        )
        title = f"A decoder of {mesh[0]['weights'] / 1e9:.2f} billion weights in {mesh[0]['leaves']} leaves"
        made["large/mesh"] = harness.Table(columns, rows, title=title)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    args = _parser().parse_args(sys.argv[1:] if arguments is None else list(arguments))
    if args.row:
        row = json.loads(args.row)
        part = row.pop("part")
        print(json.dumps({"part": part} | (measured if part == "memory" else compiled)(**row)))
        return
    console = Console()
    sizes = {"layers": args.layers, "width": args.width, "repeats": args.repeats}
    rows = [
        {"part": "memory", "what": what, "tunables": tunables, **sizes}
        for what in (*BARE, *MASKS, *STEPS)
        for tunables in ("", HUGE)
    ]
    rows += [
        {"part": "mesh", "way": way, "kind": kind, "devices": n, "layers": args.decoder_layers}
        for way in MASKS
        for kind in ("Auto", "Explicit")
        for n in args.devices
    ]
    records = []
    with harness.progress(console) as progress:
        task = progress.add_task("large", total=len(rows), note="")
        for row in rows:
            progress.update(task, note=" ".join(str(v) for v in list(row.values())[1:4]))
            records.append(alone(row))
            progress.update(task, advance=1)
    content = harness.content("python -m benchmarks.large", settings=sizes, records=records)
    harness.publish(args.out / "large.json", "Large", content, tables, console)


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser("large", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--layers", type=int, default=16, help="square matrices of the first table (16)")
    add("--width", type=int, default=8192, help="their rows and columns (8192)")
    add("--repeats", type=int, default=3, help="timed calls of each (3)")
    add("--decoder-layers", type=int, default=24, help="of the second table's decoder (24)")
    add("--devices", type=int, nargs="+", default=[1, 8, 64], help="of its meshes (1 8 64)")
    add("--row", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
