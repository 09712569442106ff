"""What a GPU or TPU makes of prunax, in one run of at most eight minutes: is it exact, and what does it cost?

Each row says first whether the device gives what the CPU gives, then how long it took. The most telling rows come
first, and the JSON file is whole after each of them, so that a run cut short keeps what it has. Needs what prunax
itself needs; PyTorch joins in where it is installed. Without a GPU or TPU it runs on the CPU on small arrays: a
rehearsal.
"""

import faulthandler
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import prunax
from benchmarks import harness, models, overhead, selection, smollm
from prunax import allocation, calibration, export, patterns, structured

PyTree = Any
STEM = "accelerator"
MARKER = "device_independent"
MEANS = {"Block((16, 16))", "Channel()"}  # of `selection.WAYS`, what ranks means of weights
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Sizes(NamedTuple):
    """How large the arrays are.

    Attributes:
        dtypes: of what is timed.
        exact: rows of the matrices whose masks are compared in every pattern.
        masks: numbers of weights whose masks are timed.
        mlp: widths of the plain network that is trained.
        vit: the vision transformer that is trained and made smaller, and the residual network that is.
        channels: of the residual network.
        image: side of its images.
        batch: images in a batch.
        packed: side of packed matrices.
        batches: rows that meet them.
        llama: the language model that is calibrated.
        tokens: sequences, and tokens in each.
        steps: training steps in a turn.
        repeats: of what is timed.
    """

    dtypes: tuple[str, ...]
    exact: int
    masks: tuple[int, ...]
    mlp: tuple[int, ...]
    vit: dict[str, int]
    channels: int
    image: int
    batch: int
    packed: int
    batches: tuple[int, ...]
    llama: smollm.Config
    tokens: tuple[int, int]
    steps: int
    repeats: int


FULL = Sizes(
    dtypes=("float32", "bfloat16"),
    exact=1000,
    masks=(10**7, 10**8, 10**9),
    mlp=(4096,) * 5,
    vit={"width": 384, "heads": 6, "depth": 6},
    channels=256,
    image=32,
    batch=256,
    packed=4096,
    batches=(1, 64, 512),
    llama=smollm.Config(12, 768, 2048, 12, 4, vocabulary=32_000),
    tokens=(16, 1024),
    steps=20,
    repeats=10,
)
QUICK = Sizes(
    dtypes=("float32",),
    exact=16,
    masks=(10**5,),
    mlp=(16, 16),
    vit={"width": 32, "heads": 2, "depth": 1},
    channels=16,
    image=8,
    batch=1,
    packed=256,
    batches=(8,),
    llama=smollm.Config(1, 32, 64, 4, 2, vocabulary=100),
    tokens=(2, 16),
    steps=2,
    repeats=2,
)


class Outcome(NamedTuple):
    """What a row found.

    Attributes:
        exact: what had to be so, and whether it is.
        figures: the rest, each name with its unit.
    """

    exact: dict[str, bool]
    figures: dict[str, Any]


class Skipped(Exception):
    """A row that cannot run here, and why."""


def reference_device() -> Any:
    """A CPU, beside whatever else there is."""
    try:
        return jax.devices("cpu")[-1]
    except RuntimeError as error:
        raise Skipped("JAX was told to leave the CPU out: unset JAX_PLATFORMS") from error


def same(tree: PyTree, other: PyTree) -> bool:
    """Whether two trees are the same bit for bit, wherever they are."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def distance(found: Any, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest number expected."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def weights(kind: str, rows: int, dtype: Any) -> PyTree:
    """Two kernels of one kind of numbers. Values that two backends could round differently are made by NumPy."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, int]) -> np.ndarray:
        x = rng.standard_normal(shape)
        tiny = float(jnp.finfo(dtype).tiny)
        return {
            "normal": x,
            "ties": np.round(2 * x),
            "denormal": x * tiny / 8,
            "infinite": np.where(np.abs(x) > 2, np.copysign(np.inf, x), x),
        }[kind]

    shapes = {"a": (rows, 2 * rows), "b": (3 * rows // 4 * 4, rows)}
    return {name: {"kernel": jnp.asarray(draw(s), dtype)} for name, s in shapes.items()}


def exact_masks(dtype: str, sizes: Sizes) -> Outcome:
    """Every pattern, uniform and global, on four kinds of numbers, beside the CPU's masks.

    Those that rank means are reported and need not agree: each backend adds in its own order, and a CPU takes denormal
    numbers for zeros where it adds.
    """
    cpu = reference_device()
    exact, means = {}, {}
    for kind in ("normal", "ties", "denormal", "infinite"):
        params = weights(kind, sizes.exact, DTYPES[dtype])
        there = jax.device_put(params, cpu)
        for name, options in selection.WAYS.items():
            masks = prunax.compute_masks(params, 0.5, **options)
            others = prunax.compute_masks(there, 0.5, **options)
            (means if name in MEANS else exact)[f"{name}, {kind}"] = same(masks, others)
    for n in (1, 2, 1001) if dtype == "float32" else ():
        params = {"kernel": jnp.asarray(np.linspace(-1, 1, n)[None], DTYPES[dtype])}
        here = prunax.compute_masks(params, 0.5)
        exact[f"{n} weights"] = same(here, prunax.compute_masks(jax.device_put(params, cpu), 0.5))
    other = ", ".join(name for name, alike in means.items() if not alike)
    figures = {"masks by means, as on the CPU": f"{sum(means.values())} of {len(means)}"}
    return Outcome(exact, figures | ({"not": other} if other else {}))


def exact_training(sizes: Sizes) -> Outcome:
    """Gradual pruning by the optax transform with gradients of zero, so that nothing but masks changes weights."""
    params = {name: weights("normal", sizes.exact, dtype)["a"] for name, dtype in DTYPES.items()}
    schedule = prunax.schedules.polynomial(0.9, 0, 20, every=2)

    def train(params: PyTree, packed: bool) -> list[PyTree]:
        tx = prunax.prune(optax.sgd(0.1), schedule, packed=packed)
        state, seen = tx.init(params), []
        step = jax.jit(tx.update)
        for _ in range(22):
            updates, state = step(jax.tree.map(jnp.zeros_like, params), state, params)
            params = optax.apply_updates(params, updates)
            seen.append(params)
        return seen

    cpu = train(jax.device_put(params, reference_device()), packed=False)
    exact, figures = {}, {}
    for name, packed in (("bool", False), ("packed", True)):
        here = train(params, packed)
        exact[f"final masks, {name}"] = same(here[-1], cpu[-1])
        equal = sum(map(same, here, cpu))
        figures[f"steps on the way equal to the CPU's, {name}"] = f"{equal} of {len(cpu)}"
    return Outcome(exact, figures)


def time_masks(dtype: str, n: int, sizes: Sizes, memory: float) -> Outcome:
    """A mask of n weights, beside other ways to one and beside what memory alone allows."""
    width = jnp.dtype(DTYPES[dtype]).itemsize
    if 4 * width * n > memory:
        raise Skipped(f"{n:,} weights do not fit")
    w = jax.random.normal(jax.random.key(0), (10**3, n // 10**3), DTYPES[dtype])
    k = n - round(0.9 * n)
    mask = jax.jit(lambda w: prunax.compute_masks({"kernel": w}, 0.9)["kernel"])
    kept = mask(w)
    exact = {"number kept": int(np.count_nonzero(kept)) == k}
    if 16 * n < _host_memory():
        exact["as on the CPU"] = same(kept, mask(jax.device_put(w, reference_device())))
    del kept
    calls: dict[str, Callable[[], Any]] = {
        "prunax": lambda: mask(w),
        "copy": functools.partial(jax.jit(lambda w: -w), w),
        "one read (max)": functools.partial(jax.jit(lambda w: jnp.max(jnp.abs(w))), w),
    }
    if (24 + 2 * width) * n < memory:
        top = jax.jit(lambda w: jax.lax.top_k(jnp.abs(w).reshape(-1), k)[0][-1])
        calls["lax.top_k"] = functools.partial(top, w)
        calls["argsort"] = lambda: selection.argsort_mask(w, jnp.uint32(n - k))
    calls |= _torch_rivals(w, k)
    seconds, failed = {}, {}
    for name, call in calls.items():
        try:
            seconds |= harness.median_seconds({name: call}, sizes.repeats)
        except Exception as error:  # a rival that runs out of memory must not take the row with it
            if name == "prunax":
                raise
            failed[f"{name} failed"] = type(error).__name__
    figures: dict[str, Any] = {f"{name} ms": 1e3 * s for name, s in seconds.items()}
    if "copy" in seconds:
        bandwidth = 2 * width * n / seconds["copy"]
        figures["copy GB/s"] = bandwidth / 1e9
        # One read of the weights and one write of the masks is the least that any way to a mask takes.
        least = (width + 1) * n / bandwidth
        figures["share of the copy's bandwidth"] = least / seconds["prunax"]
    return Outcome(exact, figures | failed)


def _torch_rivals(w: jax.Array, k: int) -> dict[str, Callable[[], Any]]:
    """What PyTorch has, on the same kind of device."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return {}
    t = torch.from_numpy(np.asarray(w, np.float32).reshape(-1)).abs()
    t = (t.cuda() if on_gpu else t).to(getattr(torch, str(w.dtype)))

    def waited(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            call()
            if on_gpu:
                torch.cuda.synchronize()

        return run

    return {
        "torch.topk": waited(lambda: t.topk(k)),
        "torch.kthvalue": waited(lambda: t >= t.kthvalue(t.numel() - k + 1).values),
    }


def _host_memory() -> float:
    """Bytes of the machine's main memory; some, where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 4e9


def train_step(network: overhead.Network, sizes: Sizes) -> Outcome:
    """A training step under masks beside a dense one."""
    adam = optax.adam(1e-3)
    run = functools.partial(overhead.Run, network=network, steps=sizes.steps)
    runs = {
        "dense": run(adam),
        "bool": run(prunax.prune(adam, 0.9)),
        "packed": run(prunax.prune(adam, 0.9, packed=True)),
        "straight-through": run(adam, forward=overhead.through),
    }
    result = overhead.compare(runs, sizes.repeats, lambda: None)
    exact = {}
    for name in ("bool", "packed"):
        masks = prunax.get_masks(runs[name].state, runs[name].params)
        pruned = prunax.apply_masks(runs[name].params, masks)
        exact[f"pruned weights are zero, {name}"] = same(runs[name].params, pruned)
        right = [
            int(m.sum()) == m.size - round(0.9 * m.size) for m in jax.tree.leaves(masks) if m.ndim
        ]
        exact[f"numbers kept, {name}"] = all(right)
    figures = {f"{name} ms": 1e3 * s / sizes.steps for name, s in result["seconds"].items()}
    return Outcome(
        exact, figures | {f"{n} / dense": r for n, r in result["ratio"].items() if n != "dense"}
    )


def vit(sizes: Sizes) -> overhead.Network:
    model = models.ViT(10, **sizes.vit)
    shape = (sizes.image, sizes.image, 3)
    params = model.init(jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    return overhead.Network(params, functools.partial(models.apply, model), shape, 10)


PACKED = {
    "NM(2, 4)": (patterns.NM(2, 4), None),
    "ConstantFanIn(), 95%": (patterns.ConstantFanIn(), 0.95),
    "Block((64, 64)), 90%": (patterns.Block((64, 64)), 0.9),
}


def multiply_packed(name: str, dtype: str, sizes: Sizes) -> Outcome:
    """A packed weight beside the dense product, and what `fastest` says."""
    pattern, sparsity = PACKED[name]
    rng, side = np.random.default_rng(0), sizes.packed
    w = jnp.asarray(rng.standard_normal((side, side)), DTYPES[dtype])
    mask = prunax.compute_masks({"kernel": w}, sparsity, pattern=pattern)["kernel"]
    masked = jnp.where(mask, w, jnp.zeros((), w.dtype))
    forms = {"dense": export.Dense(masked), "packed": export.pack(w, mask, pattern)}
    exact = {"dense again, bit for bit": same(forms["packed"].todense(), masked)}
    figures: dict[str, Any] = {}
    for batch in sizes.batches:
        x = jnp.asarray(rng.standard_normal((batch, side)), w.dtype)
        if batch == sizes.batches[0]:
            truth = np.asarray(x, np.float64) @ np.asarray(masked, np.float64)
            errors = {n: distance(x @ form, truth) for n, form in forms.items()}
            exact["product to rounding"] = max(errors.values()) < 2e-2
            figures |= {f"error, {n}": e for n, e in errors.items()}
        seconds = export.matmul_seconds(forms, x, repeats=sizes.repeats)
        figures |= {f"batch {batch}, {n} us": 1e6 * s for n, s in seconds.items()}
        kept = export.fastest(w, mask, x, pattern=pattern, repeats=sizes.repeats)
        figures[f"batch {batch}, fastest"] = "dense" if type(kept) is export.Dense else "packed"
    return Outcome(exact, figures)


def shrink(model: Any, sizes: Sizes) -> Outcome:
    """A network at half its operations beside the dense one."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(
        rng.standard_normal((sizes.batch, sizes.image, sizes.image, 3)), jnp.float32
    )
    variables = model.init(jax.random.key(0), images[:1])
    # Random weights with statistics of some data, or nothing would be left of the input after a few layers.
    fn = model.apply
    small = structured.prune_channels(
        fn, variables, images[:1], target=0.5, round_to=8, allocation=allocation.uniform
    )
    with jax.default_matmul_precision("highest"):
        there = jax.device_put((small.params, images[:1]), reference_device())
        far = distance(
            jax.jit(small.fn)(small.params, images[:1]), np.asarray(jax.jit(small.fn)(*there))
        )
    flops = [structured.count_flops(f, p, images[:1]) for f, p in ((fn, variables), small[:2])]
    figures: dict[str, Any] = {"FLOPs / dense": flops[1] / flops[0]}
    for name, x in (("one image", images[:1]), (f"batch {sizes.batch}", images)):
        dense = functools.partial(jax.jit(fn), variables, x)
        pruned = functools.partial(jax.jit(small.fn), small.params, x)
        seconds = harness.median_seconds({"dense": dense, "small": pruned}, 3 * sizes.repeats)
        speedup = seconds["dense"] / seconds["small"]
        figures |= {f"{name}, {n} ms": 1e3 * s for n, s in seconds.items()}
        figures[f"{name}, speed-up"] = speedup
        figures[f"{name}, speed-up / FLOP ratio"] = speedup * flops[1] / flops[0]
    return Outcome({"outputs as on the CPU, to 1e-3": far < 1e-3}, figures)


def product(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"]


def calibrate_layer(sizes: Sizes) -> Outcome:
    """One layer: its Gram matrix beside float64, and SparseGPT beside the CPU's."""
    rng, width = np.random.default_rng(0), sizes.llama.width
    mixed = rng.standard_normal((4 * width, width)) @ rng.standard_normal((width, width))
    x = jnp.asarray(mixed / width**0.5, jnp.float32)
    params = {"kernel": jnp.asarray(rng.standard_normal((width, width)), jnp.float32)}
    inputs = np.asarray(x, np.float64)
    gram = calibration.input_statistics(product, params, [x], kind="gram")["kernel"]
    far = distance(gram, inputs.T @ inputs)

    def lost(params: PyTree, x: jax.Array) -> tuple[float, jax.Array]:
        pruned, masks = calibration.sparsegpt(product, params, [x], 0.5)
        change = inputs @ np.asarray(pruned["kernel"] - params["kernel"], np.float64)
        return float(np.sum(change**2)), masks["kernel"]

    here, mask = lost(params, x)
    there, other = lost(*jax.device_put((params, x), reference_device()))
    agree = float(np.mean(np.asarray(mask) == np.asarray(other)))
    exact = {
        "Gram matrix in float32, not TF32 (error below 1e-5)": far < 1e-5,
        "number kept": int(mask.sum()) == mask.size - round(0.5 * mask.size),
        "SparseGPT loses what it loses on the CPU, to 1%": abs(here / there - 1) < 0.01,
    }
    return Outcome(exact, {"Gram matrix, error": far, "masks as on the CPU, share": agree})


def calibrate_model(method: str, sizes: Sizes) -> Outcome:
    """A Llama with random weights, pruned by half."""
    model = smollm.Llama(sizes.llama)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, sizes.llama.vocabulary, sizes.tokens), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:1, :8])
    batches = list(tokens[:, None])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        masks = jax.block_until_ready(
            getattr(calibration, method)(model.apply, params, batches, 0.5)
        )[1]
        seconds.append(time.perf_counter() - start)
    kept = [m for m in jax.tree.leaves(masks) if m.ndim]
    half = all(abs(int(m.sum()) - m.size / 2) <= m.shape[-1] for m in kept)
    figures = {"with compilation s": seconds[0], "again s": seconds[1], "matrices": len(kept)}
    return Outcome({"half of every matrix": half}, figures)


def run_tests() -> Outcome:
    """The tests marked as independent of the device, in a process of their own."""
    for package in ("pytest", "hypothesis"):
        if not importlib.util.find_spec(package):
            raise Skipped(f"{package} is not installed")
    root = Path(__file__).parents[1]
    # Other files import what a plain machine lacks.
    files = [f for f in sorted(root.glob("tests/test_*.py")) if MARKER in f.read_text()]
    processes = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *processes, "-m", MARKER]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    lines = (done.stdout or done.stderr).strip().splitlines() or ["no output"]
    failed = [line.partition(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return Outcome(
        {"all pass": done.returncode == 0}, {"pytest": lines[-1].strip("= "), "failed": failed}
    )


def rows(sizes: Sizes, memory: float) -> dict[str, Callable[[], Outcome]]:
    """All rows by name, the most telling first. Those that take a CPU longest are left out of the small sizes."""
    bind, full = functools.partial, sizes is FULL
    found: dict[str, Callable[[], Outcome]] = {}

    def time_all(counts: Sequence[int]) -> None:
        for n in counts:
            for dtype in sizes.dtypes:
                found[f"masks, {n:,} {dtype}"] = bind(time_masks, dtype, n, sizes, memory)

    for dtype in DTYPES if full else sizes.dtypes:
        found[f"exact masks, {dtype}"] = bind(exact_masks, dtype, sizes)
    found["calibration, one layer"] = bind(calibrate_layer, sizes)
    time_all(sizes.masks[:1])
    found["exact training"] = bind(exact_training, sizes)
    time_all(sizes.masks[1:2])
    mlp = " x ".join(map(str, sizes.mlp))
    found[f"training step, MLP {mlp}"] = lambda: train_step(overhead.mlp(sizes.mlp), sizes)
    for dtype in sizes.dtypes:
        for name in PACKED:
            found[f"packed, {name}, {dtype}"] = bind(multiply_packed, name, dtype, sizes)
    found["half the FLOPs, ViT"] = bind(shrink, models.ViT(10, **sizes.vit), sizes)
    time_all(sizes.masks[2:])
    llama = f"Llama {sizes.llama.layers} x {sizes.llama.width}"
    for name, method in (("SparseGPT", "sparsegpt"), ("Wanda", "wanda")):
        found[f"{name}, {llama}"] = bind(calibrate_model, method, sizes)
    if full:
        resnet = models.BatchNormResNet(10, sizes.channels)
        found["half the FLOPs, ResNet"] = bind(shrink, resnet, sizes)
        found["tests"] = run_tests
        found["training step, ViT"] = lambda: train_step(vit(sizes), sizes)
    return found


def run(
    found: Mapping[str, Callable[[], Outcome]],
    file: Path,
    content: dict[str, Any],
    deadline: float,
    progress: Callable[[str], None],
) -> None:
    """Runs rows and writes the file after each. What a row raises is its result."""
    for name, row in found.items():
        progress(name)
        start = time.perf_counter()
        result: dict[str, Any] = {"row": name}
        try:
            if time.monotonic() > deadline:
                raise Skipped("no time was left")
            result |= row()._asdict()
        except Skipped as reason:
            result["skipped"] = str(reason)
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            result["error"] = f"{type(error).__name__}: {text[:200]}"
        content["rows"].append(result | {"seconds": round(time.perf_counter() - start, 2)})
        harness.write_json(file, content)
    content["complete"] = True
    harness.write_json(file, content)


def earlier(
    file: Path, environment: Mapping[str, Any], names: Collection[str]
) -> list[dict[str, Any]]:
    """The rows that a file of the same machine and versions has already, without those that run again."""
    if not file.is_file():
        return []
    before = json.loads(file.read_text())
    if before["environment"] != environment:
        return []
    return [row for row in before["rows"] if row["row"] not in names]


def failures(content: Mapping[str, Any]) -> list[str]:
    """What is not as it has to be."""
    found = [f"{r['row']}: {r['error']}" for r in content["rows"] if "error" in r]
    return found + [
        f"{r['row']}: {what}"
        for r in content["rows"]
        for what, so in r.get("exact", {}).items()
        if not so
    ]


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """The table of a results file, by the name that `render.py` knows it by."""
    lines = []
    for row in content["rows"]:
        checks = row.get("exact", {})
        wrong = [what for what, so in checks.items() if not so]
        exact = f"no: {'; '.join(wrong)}" if wrong else f"yes ({len(checks)})" if checks else ""
        texts = [
            f"{name} {_text(value)}"
            for name, value in row.get("figures", {}).items()
            if value != []
        ]
        said = row.get("error") or (
            f"skipped: {row['skipped']}" if "skipped" in row else "; ".join(texts)
        )
        lines.append((row["row"], exact, said, f"{row['seconds']:.1f}"))
    environment = content["environment"]
    rehearsal = "" if content["accelerator"] else " (a rehearsal on a CPU, no accelerator)"
    title = f"{environment['devices'][0]}{rehearsal}, JAX {environment['packages']['jax']}"
    return {STEM: harness.Table(("row", "exact (checks)", "figures", "s"), lines, title=title)}


def published(contents: Sequence[Mapping[str, Any]]) -> str:
    """What the documentation says: the tables of all accelerators, or that there is none."""
    found = [tables(content)[STEM] for content in contents if content["accelerator"]]
    if not found:
        return "No figure from an accelerator exists yet."
    return "\n\n".join(f"**{table.title}**\n\n{table.markdown()}" for table in found)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 1 where something is not exact or failed."""
    parser = harness.parser("accelerator", __doc__)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="small arrays: does it run? What a CPU does in any case",
    )
    add(
        "--only",
        default="",
        help="rows whose name matches this; a file of the same machine keeps its others",
    )
    add("--minutes", type=float, default=8, help="then it ends, wherever it is (8)")
    args = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    # JAX would take most of the memory for itself, and PyTorch needs some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    accelerator = device.platform != "cpu"
    quick = args.quick or not accelerator
    memory = float((device.memory_stats() or {}).get("bytes_limit", 8e9)) if accelerator else 1e9
    name = re.sub(r"\W+", "-", device.device_kind.lower()).strip("-")
    file = args.out / f"{STEM}-{name}.json"
    command = f"python -m benchmarks.accelerator{' --quick' if quick else ''}"
    everything = rows(QUICK if quick else FULL, memory)
    chosen = {n: row for n, row in everything.items() if re.search(args.only, n)}
    content = harness.content(command, accelerator=accelerator, complete=False)
    content["rows"] = earlier(file, content["environment"], chosen)
    console = Console()
    # The last half minute is for a row that has begun; then nothing holds the process, in whatever call it is.
    deadline = time.monotonic() + 60 * args.minutes - 30
    faulthandler.dump_traceback_later(60 * args.minutes, exit=True)
    with harness.progress(console) as progress:
        task = progress.add_task(STEM, total=len(chosen), completed=-1, note="")
        run(
            chosen,
            file,
            content,
            deadline,
            lambda name: progress.update(task, advance=1, note=name),
        )
        progress.update(task, advance=1, note="")
    faulthandler.cancel_dump_traceback_later()
    content["rows"].sort(key=lambda row: list(everything).index(row["row"]))
    harness.publish(file, "prunax on an accelerator", content, tables, console)
    wrong = failures(content)
    for line in wrong:
        console.print(f"NOT AS IT SHOULD BE: {line}", soft_wrap=True, highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
