"""Times what pruning adds to training, side by side with dense training.

Three questions: a training step in which the masks stay as they are, with bool and with packed masks; a whole run with
gradual pruning, a new mask every 100 steps; a whole run with straight-through masks, new in every step. Dense and
pruned calls take turns; each ratio is the median over the turns of the ratio within a turn, so that a slow moment of
the machine falls on both.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import prunax
from benchmarks import harness

PyTree = Any
SIZES = {
    "4 x 1024 x 1024": (1024, 1024, 1024, 1024, 1024),
    "LeNet-300-100": (784, 300, 100, 10),
}
BATCH = 128


class Network(NamedTuple):
    """What is trained, on random inputs.

    Attributes:
        params: where training starts.
        apply: `apply(params, x)` gives logits.
        shape: of one input.
        classes: how many.
    """

    params: PyTree
    apply: Callable[[PyTree, jax.Array], jax.Array]
    shape: tuple[int, ...]
    classes: int


def mlp(sizes: tuple[int, ...]) -> Network:
    """A plain network with ReLU, of `sizes[0]` inputs and `sizes[-1]` outputs."""
    keys = jax.random.split(jax.random.key(0), len(sizes))
    he = jax.nn.initializers.he_normal()
    params = {
        f"dense_{i}": {"kernel": he(key, (a, b)), "bias": jnp.zeros(b)}
        for i, (key, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=False))
    }

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(params.values()):
            x = x @ layer["kernel"] + layer["bias"]
            x = jax.nn.relu(x) if i + 1 < len(params) else x
        return x

    return Network(params, apply, sizes[:1], sizes[-1])


class Run:
    """Training from fresh params: `run()` goes on by some steps, and returns when they are done."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        network: Network,
        steps: int,
        forward: Callable[[PyTree], PyTree] = lambda params: params,
        restart: bool = False,
    ) -> None:
        self.params = network.params
        self.state = optimizer.init(self.params)
        self.restart = restart
        x = jax.random.normal(jax.random.key(1), (16, BATCH, *network.shape))
        y = jax.random.randint(jax.random.key(2), (16, BATCH), 0, network.classes)

        def loss(params: PyTree, i: jax.Array) -> jax.Array:
            logits = network.apply(forward(params), x[i % 16])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[i % 16]).mean()

        def step(i: jax.Array, carry: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, i), state, params)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def many(params: PyTree, state: Any) -> tuple[PyTree, Any]:
            return jax.lax.fori_loop(0, steps, step, (params, state))

        self.many = many.lower(self.params, self.state).compile()

    def __call__(self) -> float:
        """The seconds that it took."""
        begin = time.perf_counter()
        params, state = jax.block_until_ready(self.many(self.params, self.state))
        seconds = time.perf_counter() - begin
        if not self.restart:
            self.params, self.state = params, state
        return seconds


def compare(runs: Mapping[str, Run], repeats: int, on_turn: Callable[[], None]) -> dict[str, Any]:
    """Seconds of each run, and the ratio of each to the first."""
    for run in runs.values():
        run()
    turns: list[dict[str, float]] = []
    for _ in range(repeats):
        turns.append({name: run() for name, run in runs.items()})
        on_turn()
    first = next(iter(runs))
    return {
        "seconds": {n: statistics.median(t[n] for t in turns) for n in runs},
        "ratio": {n: statistics.median(t[n] / t[first] for t in turns) for n in runs},
    }


def through(params: PyTree) -> PyTree:
    """Straight-through masks of the largest tenth, new in every step."""
    return prunax.straight_through(params, prunax.compute_masks(params, 0.9))


def under_fixed_masks(network: Network) -> Callable[[PyTree], PyTree]:
    """`through` without the choice of masks."""
    masks = prunax.compute_masks(network.params, 0.9)
    return lambda params: prunax.straight_through(params, masks)


def mask_bytes(run: Run) -> float:
    """Bytes of the masks relative to those of the params."""
    masks = optax.tree.get(run.state, "masks")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(masks))
    return size / sum(leaf.nbytes for leaf in jax.tree.leaves(run.params))


def cases(
    adam: optax.GradientTransformation,
) -> dict[str, tuple[int, Callable[[], dict[str, Run]]]]:
    """What is compared: steps in a turn, and the runs, the dense one first."""
    wide, lenet = map(mlp, SIZES.values())
    gradual = prunax.schedules.polynomial(0.9, 100, 1900, every=100)

    def beside(run: Callable[..., Run], sparsity: Any) -> Callable[[], dict[str, Run]]:
        """Dense; pruned with bool and with packed masks; with bool masks of which Adam's moments are not told."""
        return lambda: {
            "dense": run(adam),
            "bool": run(prunax.prune(adam, sparsity)),
            "packed": run(prunax.prune(adam, sparsity, packed=True)),
            "bool, updates alone": run(prunax.prune(adam, sparsity, mask_gradients=False)),
        }

    step = functools.partial(Run, network=wide, steps=10)
    small_step = functools.partial(Run, network=lenet, steps=200)
    whole = functools.partial(Run, network=wide, steps=200, restart=True)
    small = functools.partial(Run, network=lenet, steps=2000, restart=True)
    short = prunax.schedules.polynomial(0.9, 100, 200, every=100)
    return {
        "a step without mask update, 4 x 1024 x 1024": (10, beside(step, 0.9)),
        "gradual, masks every 100 steps, 4 x 1024 x 1024": (200, beside(whole, short)),
        "a step without mask update, LeNet-300-100": (200, beside(small_step, 0.9)),
        "gradual, masks every 100 steps, LeNet-300-100": (2000, beside(small, gradual)),
        "straight-through, masks every step, LeNet-300-100": (
            2000,
            lambda: {
                "dense": small(adam),
                "straight-through": small(adam, forward=through),
                "straight-through, masks that stay": small(adam, forward=under_fixed_masks(lenet)),
            },
        ),
    }


def tables(content: Mapping[str, Any]) -> dict[str, harness.Table]:
    """The table of a results file, by the name that `render.py` knows it by."""
    rows = [
        (
            f"{name}: {kind}",
            f"{1e3 * result['seconds'][kind] / result['steps']:.3f}",
            f"{result['ratio'][kind]:.3f}",
            f"{share:.4f}" if (share := result["mask bytes / params bytes"].get(kind)) else "",
        )
        for name, result in content["results"].items()
        for kind in result["seconds"]
    ]
    columns = "training: masks", "ms a step", "against dense", "mask bytes / params bytes"
    title = f"Adam, batch {BATCH}, float32, 90% pruned; medians"
    return {"overhead": harness.Table(columns, rows, title=title)}


def main() -> None:
    parser = harness.parser("overhead", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--only", help="cases whose name holds this")
    args = parser.parse_args()
    console = Console()
    chosen = {n: c for n, c in cases(optax.adam(1e-3)).items() if (args.only or "") in n}
    repeats = {n: 5 if args.quick else (60 if n.startswith("a step") else 7) for n in chosen}
    results: dict[str, Any] = {}
    with harness.progress(console) as progress:
        task = progress.add_task("overhead", total=sum(repeats.values()), note="")
        for name, (steps, make) in chosen.items():
            progress.update(task, note=f"{name}: compiling")
            runs = make()
            progress.update(task, note=name)
            results[name] = {"steps": steps, "turns": repeats[name]} | compare(
                runs, repeats[name], lambda: progress.update(task, advance=1)
            )
            pruned = {n: run for n, run in runs.items() if n in ("bool", "packed")}
            results[name]["mask bytes / params bytes"] = {
                n: round(mask_bytes(run), 5) for n, run in pruned.items()
            }
    content = harness.content("python -m benchmarks.overhead", results=results)
    file = args.out / "overhead.json"
    harness.publish(file, "What pruning adds to training", content, tables, console)


if __name__ == "__main__":
    main()
