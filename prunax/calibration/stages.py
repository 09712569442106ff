"""Running a function stage by stage over calibration batches, with a stop wherever weights are to be solved.

The products of the selected leaves cut a program into stages. A stage advances every batch up to the inputs of its
products, adds up their statistics, hands them over, and goes on with the weights that it gets back. Each stage is one
compiled function, shared by stages of equal structure (the layers of a stack of equal layers); between stages only the
values live that later stages read, and what no product needs is never computed.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _jaxprs, trees
from prunax.calibration import layouts, plans

__all__ = ["Task"]

PyTree = Any
# Of inputs (matrices, rows, in); of the same inputs in the dense function too, where a walk follows both.
Statistic = Callable[..., Any]

# Gram matrices of so many inputs are put together from parts; below, one product is faster.
_SPLIT = 512


class Task(NamedTuple):
    """A problem with all that is needed to solve it.

    Attributes:
        problem: The problem.
        weights: (matrices, in, out), the leaf's dtype.
        statistic: Sum of the statistic over all inputs. Problems that share their inputs have the same object.
    """

    problem: plans.Problem
    weights: jax.Array
    statistic: Any


def squares(inputs: jax.Array) -> jax.Array:
    """Sum of squares of (matrices, rows, in) over the rows, (matrices, in)."""
    return jnp.sum(jnp.square(inputs), axis=1)


def gram(inputs: jax.Array) -> jax.Array:
    """Gram matrices of (matrices, rows, in), (matrices, in, in)."""
    length = inputs.shape[-1]
    if length < _SPLIT:
        return _cross(inputs, inputs)
    # What stands on one side of the diagonal stands on the other too: of two halves, three products do for four.
    first, second = inputs[..., : length // 2], inputs[..., length // 2 :]
    off = _cross(first, second)
    return jnp.block([[gram(first), off], [off.swapaxes(1, 2), gram(second)]])


def only_gram(inputs: jax.Array) -> tuple[jax.Array]:
    """Gram matrices, as the first of what might be more moments."""
    return (gram(inputs),)


def gram_and_drift(inputs: jax.Array, dense: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gram matrices, and the products of the inputs with what they lack to those of the dense function."""
    return gram(inputs), _cross(inputs, dense - inputs)


def _cross(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("pri,prj->pij", a, b, precision=jax.lax.Precision.HIGHEST)


def walk(
    function: str,
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    statistic: Statistic,
    solve: Callable[[list[Task]], Sequence[jax.Array | None]],
    *,
    where: trees.Where,
    sequential: bool = True,
    beside_dense: bool = False,
    donate: bool = False,
    progress: bool = False,
) -> PyTree:
    """Go through a function's products in the order of their dependence and solve each problem.

    Args:
        function: The public function that asks, named in errors.
        fn: ``fn(params, batch)``.
        params: Pytree of arrays.
        batches: What `fn` takes besides, any number; shapes may differ.
        statistic: `squares`, `gram`, `only_gram` or `gram_and_drift`.
        solve: Called with the tasks of each stage; returns new matrices, or None to leave them.
        where: Chooses the leaves.
        sequential: Compute what follows a problem with its new matrices rather than the old ones.
        beside_dense: Compute everything with the old ones besides, and hand the statistic both inputs.
        donate: Write new matrices into the leaves that were given, which are then gone.
        progress: Show a progress bar.

    Returns:
        The params with the new matrices.
    """
    batches = [jax.tree.map(_as_array, batch) for batch in batches]
    if not batches:
        raise ValueError(f"{function}: needs at least one batch of calibration data, got none.")
    if donate and (beside_dense or not sequential):
        raise ValueError(
            f"{function}: donate=True gives up each dense weight once it is pruned, but "
            f"{'a correction' if beside_dense else 'sequential=False'} needs them to the end. Leave donate out."
        )
    planner = _Plans(function, fn, params, where)
    leaves = [x for x in jax.tree.leaves(params) if trees.is_array(x)]
    models = [leaves, list(leaves)] if beside_dense else [leaves]
    runs = [_Run(planner.plan(batch), batch, len(models)) for batch in batches]
    plan = runs[0].plan
    place = {i: n for n, i in enumerate(plan.program.params)}
    selected = [place[i] for i in plan.selected]
    solved: dict[int, jax.Array] = {}
    totals: dict[int, Any] = {}

    with _progress(progress, len(plan.problems)) as advance:
        for stage in range(len(plan.stages)):
            sums = None
            for run in runs:
                # One batch after the other, or what several compute on the way would be in memory at once.
                sums = jax.block_until_ready(run.advance(stage, models, statistic, sums))
            shared = dict(zip(plan.stages[stage].reads, sums or (), strict=True))
            for problem, key in plan.stages[stage].collected:
                earlier = totals.get(problem)
                totals[problem] = shared[key] if earlier is None else _add(earlier, shared[key])
            del sums, shared
            ready = [plan.problems[n] for n in plan.stages[stage].solved]
            tasks = []
            for n, problem in zip(plan.stages[stage].solved, ready, strict=True):
                total = totals.pop(n)
                _check(function, problem, total)
                leaf = jnp.asarray(leaves[selected[problem.leaf]])
                tasks.append(Task(problem, problem.read(leaf), total))
            results = solve(tasks)
            del tasks
            for problem, matrices in zip(ready, results, strict=True):
                if matrices is not None:
                    n = selected[problem.leaf]
                    mine = solved[n] if n in solved else _own(leaves, n, donate)
                    solved[n] = problem.write(mine, matrices)
                    if sequential:
                        leaves[n] = solved[n]
                advance(problem.name)
    whole, treedef = jax.tree.flatten(params)
    arrays = [i for i, x in enumerate(whole) if trees.is_array(x)]
    for n, leaf in solved.items():
        whole[arrays[n]] = leaf
    return treedef.unflatten(whole)


def _own(leaves: Sequence[Any], n: int, donate: bool) -> jax.Array:
    """The leaf, for us to use up: a copy, but where the caller gives the array away and no other leaf is the same."""
    leaf = leaves[n]
    if donate and isinstance(leaf, jax.Array) and sum(other is leaf for other in leaves) == 1:
        return leaf
    return jnp.array(leaf, copy=True)


class _Plans:
    """The plans of a function, one for each set of shapes among its batches."""

    def __init__(self, function: str, fn: Any, params: PyTree, where: trees.Where) -> None:
        self.function, self.fn, self.params, self.where = function, fn, params, where
        self.known: dict[Any, plans.Plan] = {}

    def plan(self, batch: Any) -> plans.Plan:
        leaves, treedef = jax.tree.flatten(batch)
        key = (treedef, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self.known:
            self.known[key] = self._make(batch)
        return self.known[key]

    def _make(self, batch: Any) -> plans.Plan:
        program = _jaxprs.trace(self.fn, self.params, batch, where=self.where)
        made = plans.make_plan(self.function, program)
        for other in self.known.values():
            if [p.name for p in other.problems] != [p.name for p in made.problems]:
                raise ValueError(
                    f"{self.function}: batches of different shapes use the weights in different orders. "
                    f"Pass batches of one shape."
                )
            break
        return made


class _Run:
    """One batch on its way through the stages of each model: the one that is pruned, perhaps the dense one."""

    def __init__(self, plan: plans.Plan, batch: Any, models: int) -> None:
        self.plan = plan
        given = dict(zip(plan.program.args, jax.tree.leaves(batch), strict=True))
        self.values: list[dict[int, Any]] = [dict(given) for _ in range(models)]

    def advance(
        self,
        number: int,
        models: Sequence[list[Any]],
        statistic: Statistic,
        sums: Sequence[Any] | None,
    ) -> Sequence[Any]:
        """Compute a stage and add its statistics to those of the batches before."""
        stage, program = self.plan.stages[number], self.plan.program
        inputs = []
        for values, leaves in zip(self.values, models, strict=True):
            params = dict(zip(program.params, leaves, strict=True))
            sources = (values, params, program.constants)
            inputs.append([next(s[i] for s in sources if i in s) for i in stage.inputs])
        if sums is None:
            reads = zip(stage.reads, stage.layouts, strict=True)
            shapes = [(program.shapes[i], layout) for (i, _), layout in reads]
            sums = [_zeros(statistic, layout, [x] * len(models)) for x, layout in shapes]
        picks = list(map(np.int32, stage.picks))
        kept, added = _advance(stage.segment, stage.layouts, statistic, picks, inputs, sums)
        for values, new in zip(self.values, kept, strict=True):
            values |= dict(zip(stage.kept, new, strict=True))
            for i in stage.dropped:
                values.pop(i, None)
        return added


def _zeros(statistic: Statistic, layout: layouts.Layout, xs: Sequence[Any]) -> Any:
    out = jax.eval_shape(lambda xs: statistic(*(_precise(layout.inputs(x)) for x in xs)), xs)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _advance(
    segment: plans.Segment,
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


def _measure(statistic: Statistic, layout: layouts.Layout, xs: Sequence[jax.Array]) -> Any:
    def measure(*xs: jax.Array) -> Any:
        return statistic(*(_precise(layout.inputs(x)) for x in xs))

    mesh: Any = jax.typeof(xs[0]).sharding.mesh
    if not any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return measure(*xs)
    # Rows are flattened and summed over whatever axes they are sharded on. On a mesh with explicit axes one must leave
    # that to the compiler in so many words; each device gets the sum.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    everywhere: Any = jax.sharding.auto_axes(measure, out_sharding=whole)
    return everywhere(*xs)


def _precise(x: jax.Array) -> jax.Array:
    return x.astype(trees.wide_dtype(x.dtype))


def _as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _check(function: str, problem: plans.Problem, total: Any) -> None:
    finite, silent = jax.device_get(_health(jax.tree.leaves(total)[0]))
    if not finite.all():
        raise ValueError(
            f"{function}: the inputs of {problem.name!r} are not finite, or overflow when squared. Look for NaN or "
            f"infinity in the batches, or calibrate in a wider dtype."
        )
    if silent.any():
        which = "" if len(silent) == 1 else f" of {int(silent.sum())} of its {len(silent)} matrices"
        warnings.warn(
            f"{function}: the inputs{which} of {problem.name!r} are zero in every batch. Their weights are ranked by "
            f"magnitude alone. Calibrate on data that reaches the layer.",
            UserWarning,
            stacklevel=4,
        )


@jax.jit
def _health(total: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = total.reshape(total.shape[0], -1)
    return jnp.all(jnp.isfinite(flat), axis=1), jnp.all(flat == 0, axis=1)


class _progress:
    """A progress bar in a terminal, nothing elsewhere."""

    def __init__(self, show: bool, total: int) -> None:
        self.show, self.total, self.bar = show, total, nullcontext()

    def __enter__(self) -> Callable[[str], None]:
        if not self.show:
            return lambda name: None
        import rich.progress

        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        self.bar = bar
        bar.__enter__()
        task = bar.add_task("calibrating", total=self.total)
        return lambda name: bar.update(task, advance=1, description=name)

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)
