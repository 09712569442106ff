"""Running a function stage by stage over calibration batches, with a stop wherever weights are to be solved.

A stage advances every batch up to the inputs of its products, adds up their statistics, hands them over, and goes on
with the weights that it gets back. Each stage is one compiled function, shared by stages of equal structure; between
stages only the values live that later stages read, and what no product needs is never computed.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _jaxprs, _progress, trees
from prunax.calibration import layouts
from prunax.calibration._problems import Problem
from prunax.calibration._reading import read, warn
from prunax.calibration._stages import Staged

__all__: list[str] = []

PyTree = Any
# Of the inputs of one matrix (rows, in); of the same inputs in the dense function too, where both are run.
Statistic = Callable[..., Any]


class Task(NamedTuple):
    """A problem with all that is needed to solve it.

    Attributes:
        problem: Its number.
        weights: (matrices, in, out), the leaf's dtype.
        statistic: Sum of the statistic over all inputs of its products, for each matrix. Problems that share their
            inputs have the same object.
    """

    problem: int
    weights: jax.Array
    statistic: Any


# New matrices for each task, or None to leave them as they are; and whatever else is wanted in the end.
Solve = Callable[[list[Task]], Iterable[tuple[jax.Array | None, Any]]]


class Layers(NamedTuple):
    """A function's layers, with the batches to go through them.

    Attributes:
        function: The public function that asks, named in errors.
        params: Pytree of arrays.
        staged: The function's program, one for each batch. Their problems are the same.
        batches: The batches.
    """

    function: str
    params: PyTree
    staged: list[Staged]
    batches: list[Any]

    @property
    def problems(self) -> list[Problem]:
        """What is to be solved."""
        return self.staged[0].problems

    @property
    def selection(self) -> trees.Selection:
        """The leaves that the problems are in."""
        return self.staged[0].program.selection


def layers_of(
    function: str,
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    where: trees.Where | None,
) -> Layers:
    """Read a function's layers for each shape of batch."""
    batches = [jax.tree.map(_as_array, batch) for batch in batches]
    if not batches:
        raise ValueError(f"{function}: needs at least one batch of calibration data, got none.")
    known: dict[Any, Staged] = {}
    staged: list[Staged] = []
    for batch in batches:
        leaves, treedef = jax.tree.flatten(batch)
        key = (treedef, tuple((x.shape, x.dtype) for x in leaves))
        if key not in known:
            known[key] = read(function, fn, params, batch, where)
            paths = known[key].program.selection.paths
            where = lambda path, leaf, paths=frozenset(paths): path in paths  # noqa: E731
        staged.append(known[key])
        if [p.name for p in staged[-1].problems] != [p.name for p in staged[0].problems]:
            raise ValueError(
                f"{function}: batches of different shapes use the weights in different orders. "
                f"Pass batches of one shape."
            )
    return Layers(function, params, staged, batches)


def run(
    layers: Layers,
    statistic: Statistic,
    solve: Solve,
    *,
    sequential: bool = True,
    beside_dense: bool = False,
    donate: bool = False,
    progress: bool = False,
) -> tuple[PyTree, list[Any]]:
    """Go through a function's problems in the order of their dependence and solve each.

    Args:
        layers: The function's layers.
        statistic: Of the inputs of one matrix; summed over all batches.
        solve: Called with the tasks of each stage.
        sequential: Compute what follows a problem with its new matrices rather than the old ones.
        beside_dense: Compute everything with the old ones besides, and hand the statistic both inputs.
        donate: Write new matrices into the leaves that were given, which are then gone.
        progress: Show a progress bar.

    Returns:
        The params with the new matrices, and what else `solve` gave for each problem.
    """
    if donate and (beside_dense or not sequential):
        raise ValueError(
            f"{layers.function}: donate=True gives up each dense weight once it is pruned, but "
            f"{'a correction' if beside_dense else 'sequential=False'} needs them to the end. Leave donate out."
        )
    whole, treedef = jax.tree.flatten(layers.params)
    arrays = [i for i, x in enumerate(whole) if trees.is_array(x)]
    leaves = [whole[i] for i in arrays]
    place = {i: n for n, i in enumerate(arrays)}
    selected = [place[i] for i in layers.selection.indices]
    models = [leaves, list(leaves)] if beside_dense else [leaves]
    problems, stages = layers.problems, layers.staged[0].stages
    values = [[_given(s, batch)] * len(models) for s, batch in zip(*layers[2:], strict=True)]
    solved: dict[int, jax.Array] = {}
    totals: dict[int, Any] = {}
    outcomes: list[Any] = [None] * len(problems)

    with _progress.counted("calibrating", len(problems), show=progress) as advance:
        for number, stage in enumerate(stages):
            sums = None
            for n, staged in enumerate(layers.staged):
                # One batch after the other, or what several compute on the way would be in memory at once.
                values[n], sums = jax.block_until_ready(
                    _advanced(staged, number, models, values[n], statistic, sums)
                )
            shared = dict(zip(stage.reads, sums or (), strict=True))
            for n, key in stage.collected:
                totals[n] = shared[key] if n not in totals else _add(totals[n], shared[key])
            del sums, shared
            tasks = []
            for n in stage.solved:
                leaf = jnp.asarray(leaves[selected[problems[n].leaf]])
                own = problems[n].of_inputs(totals.pop(n))
                tasks.append(Task(n, problems[n].read(leaf), own))
                _check(layers.function, problems[n], tasks[-1].statistic)
            results = solve(tasks)
            order = stage.solved
            del tasks
            for n, (matrices, outcomes[n]) in zip(order, results, strict=True):
                if matrices is not None:
                    i = selected[problems[n].leaf]
                    mine = solved[i] if i in solved else _to_use_up(leaves, i, donate)
                    solved[i] = problems[n].write(mine, matrices)
                    if sequential:
                        leaves[i] = solved[i]
                advance(problems[n].name)
    for i, leaf in solved.items():
        whole[arrays[i]] = leaf
    return treedef.unflatten(whole), outcomes


def _to_use_up(leaves: Sequence[Any], n: int, donate: bool) -> jax.Array:
    """The leaf: a copy, but where the caller gives the array away and no other leaf is the same."""
    leaf = leaves[n]
    if donate and isinstance(leaf, jax.Array) and sum(other is leaf for other in leaves) == 1:
        return leaf
    return jnp.array(leaf, copy=True)


def _given(staged: Staged, batch: Any) -> dict[int, Any]:
    return dict(zip(staged.program.args, jax.tree.leaves(batch), strict=True))


def _advanced(
    staged: Staged,
    number: int,
    models: Sequence[list[Any]],
    values: Sequence[dict[int, Any]],
    statistic: Statistic,
    sums: Sequence[Any] | None,
) -> tuple[list[dict[int, Any]], Sequence[Any]]:
    """Compute a stage of one batch, in each model: the one that is pruned, perhaps the dense one.

    Returns:
        The values that are known after it, in each model, and the statistics added to those of the batches before.
    """
    stage, program = staged.stages[number], staged.program
    inputs = []
    for own, leaves in zip(values, models, strict=True):
        params = dict(zip(program.params, leaves, strict=True))
        sources = (own, params, program.constants)
        inputs.append([next(s[i] for s in sources if i in s) for i in stage.inputs])
    if sums is None:
        shapes = [program.shapes[i] for i, _ in stage.reads]
        read = zip(shapes, stage.layouts, strict=True)
        like = (_statistic_like(statistic, layout, (x,) * len(models)) for x, layout in read)
        sums = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree) for tree in like]
    picks = list(map(np.int32, stage.segment.picks))
    kept, added = _advance(stage.segment, stage.layouts, statistic, picks, inputs, sums)
    after = [
        {i: x for i, x in own.items() if i not in stage.dropped}
        | {i: x for i, x in zip(stage.kept, new, strict=True) if i not in stage.dropped}
        for own, new in zip(values, kept, strict=True)
    ]
    return after, added


@functools.lru_cache(maxsize=256)  # layers are alike, and tracing is most of what a small one costs
def _statistic_like(
    statistic: Statistic, layout: layouts.Layout, xs: tuple[jax.ShapeDtypeStruct, ...]
) -> Any:
    return jax.eval_shape(functools.partial(_of_matrices, statistic, layout), *xs)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _advance(
    segment: _jaxprs.Segment,
    reads: tuple[layouts.Layout, ...],
    statistic: Statistic,
    picks: list[Any],
    inputs: list[list[Any]],
    sums: Sequence[Any],
) -> tuple[list[list[jax.Array]], list[Any]]:
    outputs = [segment(own, picks) for own in inputs]
    kept = [own[len(reads) :] for own in outputs]
    news = [_measure(statistic, reads[n], [own[n] for own in outputs]) for n in range(len(reads))]
    return kept, _add(list(sums), news)


def _of_matrices(statistic: Statistic, layout: layouts.Layout, *xs: jax.Array) -> Any:
    inputs = [layout.inputs(x.astype(trees.wide_dtype(x.dtype))) for x in xs]
    if inputs[0].shape[0] > 1:
        return jax.vmap(statistic)(*inputs)
    # A product under `vmap` is a batched one, which XLA does not run as fast on a CPU.
    return jax.tree.map(lambda x: x[None], statistic(*(x[0] for x in inputs)))


def _measure(statistic: Statistic, layout: layouts.Layout, xs: Sequence[jax.Array]) -> Any:
    measure = functools.partial(_of_matrices, statistic, layout)
    mesh: Any = jax.typeof(xs[0]).sharding.mesh
    if not any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return measure(*xs)
    # Rows are flattened and summed over whatever axes they are sharded on. On a mesh with explicit axes one must leave
    # that to the compiler in so many words; each device gets the sum.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    everywhere: Any = jax.sharding.auto_axes(measure, out_sharding=whole)
    return everywhere(*xs)


def _as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _check(function: str, problem: Problem, total: Any) -> None:
    finite, silent = jax.device_get(_health(jax.tree.leaves(total)[0]))
    if not finite.all():
        raise ValueError(
            f"{function}: the inputs of {problem.name!r} are not finite, or overflow when squared. Look for NaN or "
            f"infinity in the batches, or calibrate in a wider dtype."
        )
    if silent.any():
        which = "" if len(silent) == 1 else f" of {int(silent.sum())} of its {len(silent)} matrices"
        warn(
            f"{function}: the inputs{which} of {problem.name!r} are zero in every batch. Their weights are ranked by "
            f"magnitude alone. Calibrate on data that reaches the layer."
        )


@jax.jit
def _health(total: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = total.reshape(total.shape[0], -1)
    return jnp.all(jnp.isfinite(flat), axis=1), jnp.all(flat == 0, axis=1)
