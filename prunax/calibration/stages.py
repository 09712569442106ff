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

from prunax import jaxprs, trees
from prunax.calibration import layouts

__all__ = ["Problem", "Task"]

PyTree = Any
Statistic = Callable[[jax.Array], jax.Array]


class Problem(NamedTuple):
    """Matrices to be solved together: one layer, one slice of a stack, the experts of one layer.

    Attributes:
        name: The path of the leaf, with the index in a stack: ``layers/kernel[3]``.
        leaf: Which of the selected leaves.
        view: The way from the leaf to the weight.
        layout: The way from the weight to the matrices.
        products: Its products, more than one where weights are shared.
    """

    name: str
    leaf: int
    view: jaxprs.View
    layout: layouts.Layout
    products: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(matrices, in, out)``."""
        return self.layout.shape

    def read(self, leaf: jax.Array) -> jax.Array:
        """Take the matrices out of the leaf."""
        return _read(leaf, self.view.picks, steps=self.view.steps, layout=self.layout)

    def write(self, leaf: jax.Array, matrices: jax.Array) -> jax.Array:
        """Put matrices in their places in the leaf, whose buffer is used up."""
        return _write(leaf, self.view.picks, matrices, steps=self.view.steps, layout=self.layout)

    def places(self, shape: tuple[int, ...]) -> np.ndarray:
        """The flat index in a leaf of this shape of each element of the matrices."""
        picks = len(self.view.picks)
        base = shape[picks:]
        start = int(np.ravel_multi_index(self.view.picks, shape[:picks])) if picks else 0
        order = _order(base, steps=self.view.steps, layout=self.layout)
        return np.asarray(order, np.int64) + start * int(np.prod(base))


class Task(NamedTuple):
    """A problem with all that is needed to solve it.

    Attributes:
        problem: The problem.
        weights: (matrices, in, out), the leaf's dtype.
        statistic: Sum of the statistic over all inputs. Problems that share their inputs have the same object.
    """

    problem: Problem
    weights: jax.Array
    statistic: jax.Array


def squares(inputs: jax.Array) -> jax.Array:
    """Sum of squares of (matrices, rows, in) over the rows, (matrices, in)."""
    return jnp.sum(jnp.square(inputs), axis=1)


def gram(inputs: jax.Array) -> jax.Array:
    """Gram matrices of (matrices, rows, in), (matrices, in, in)."""
    return jnp.einsum("pri,prj->pij", inputs, inputs, precision=jax.lax.Precision.HIGHEST)


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
    progress: bool = False,
) -> PyTree:
    """Go through a function's products in the order of their dependence and solve each problem.

    Args:
        function: The public function that asks, named in errors.
        fn: ``fn(params, batch)``.
        params: Pytree of arrays.
        batches: What `fn` takes besides, any number; shapes may differ.
        statistic: `squares` or `gram`.
        solve: Called with the tasks of each stage; returns new matrices, or None to leave them.
        where: Chooses the leaves.
        sequential: Compute what follows a problem with its new matrices rather than the old ones.
        progress: Show a progress bar.

    Returns:
        The params with the new matrices.
    """
    batches = [jax.tree.map(_as_array, batch) for batch in batches]
    if not batches:
        raise ValueError(f"{function}: needs at least one batch of calibration data, got none.")
    plans = _Plans(function, fn, params, where)
    runs = [_Run(plans.plan(batch), batch) for batch in batches]
    plan = runs[0].plan
    leaves = [x for x in jax.tree.leaves(params) if trees.is_array(x)]
    place = {i: n for n, i in enumerate(plan.program.params)}
    selected = [place[i] for i in plan.selected]
    solved: dict[int, jax.Array] = {}
    totals: dict[int, jax.Array] = {}

    with _progress(progress, len(plan.problems)) as advance:
        for stage in range(len(plan.stages)):
            sums = None
            for run in runs:
                sums = run.advance(stage, leaves, statistic, sums)
            shared = dict(zip(plan.stages[stage].reads, sums or (), strict=True))
            for problem, key in plan.stages[stage].collected:
                earlier = totals.get(problem)
                totals[problem] = shared[key] if earlier is None else earlier + shared[key]
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
                    # A copy first: the caller's arrays are not ours to use up.
                    mine = solved[n] if n in solved else jnp.array(leaves[n], copy=True)
                    solved[n] = problem.write(mine, matrices)
                    if sequential:
                        leaves[n] = solved[n]
                advance(problem.name)
    whole, treedef = jax.tree.flatten(params)
    arrays = [i for i, x in enumerate(whole) if trees.is_array(x)]
    for n, leaf in solved.items():
        whole[arrays[n]] = leaf
    return treedef.unflatten(whole)


class Segment:
    """Equations of a program as a function of slots: hashable, equal where the structure is equal.

    Attributes:
        equations: ``(operation, input slots, output slots)``.
        known: ``(slot, scalar)`` written into the program.
        size: How many inputs it has; they take the first slots.
        outputs: The slots that it returns.
    """

    def __init__(
        self,
        program: jaxprs.Program,
        equations: Sequence[int],
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        slots = {value: n for n, value in enumerate(inputs)}
        chosen = [program.equations[n] for n in equations]
        known = {}
        self.equations = []
        for equation in chosen:
            for value in equation.inputs:
                if value in program.known and value not in slots:
                    known[value] = slots[value] = len(slots)
            before = tuple(slots[value] for value in equation.inputs)
            after = tuple(slots.setdefault(value, len(slots)) for value in equation.outputs)
            self.equations.append((equation.operation, before, after))
        for value in outputs:
            if value in program.known and value not in slots:
                known[value] = slots[value] = len(slots)
        self.known = [(slot, program.known[value]) for value, slot in known.items()]
        self.size = len(inputs)
        self.outputs = tuple(slots[value] for value in outputs)
        self.key = (
            self.size,
            self.outputs,
            tuple((operation.key, *where) for operation, *where in self.equations),
            tuple((slot, _scalar_key(value)) for slot, value in self.known),
        )
        self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self.key == other.key

    def __call__(self, inputs: Sequence[jax.Array], picks: Sequence[Any]) -> list[jax.Array]:
        values: dict[int, Any] = dict(enumerate(inputs)) | dict(self.known)
        picked = iter(picks)
        for operation, before, after in self.equations:
            operands = [values[n] for n in before]
            if isinstance(operation, jaxprs.Pick):
                operands.append(next(picked))
            results = operation(*operands)
            values |= dict(zip(after, results, strict=True))
        return [jnp.asarray(values[n]) for n in self.outputs]


class _Stage(NamedTuple):
    """What is done between two stops.

    Attributes:
        segment: The equations.
        inputs: Ids of what it reads.
        kept: Ids of the values that later stages read.
        picks: Indices of its `Pick` equations, in order.
        reads: ``(activation id, reading)`` of each statistic, no two alike.
        layouts: A layout for each of them.
        collected: ``(problem, read)`` for each product whose inputs are read here.
        solved: Problems whose last inputs are read here.
        dropped: Ids of values that no later stage reads.
    """

    segment: Segment
    inputs: tuple[int, ...]
    kept: tuple[int, ...]
    picks: tuple[int, ...]
    reads: tuple[Any, ...]
    layouts: tuple[layouts.Layout, ...]
    collected: tuple[tuple[int, Any], ...]
    solved: tuple[int, ...]
    dropped: tuple[int, ...]


class _Plan(NamedTuple):
    program: jaxprs.Program
    problems: list[Problem]
    stages: list[_Stage]
    selected: list[int]


class _Plans:
    """The plans of a function, one for each set of shapes among its batches."""

    def __init__(self, function: str, fn: Any, params: PyTree, where: trees.Where) -> None:
        self.function, self.fn, self.params, self.where = function, fn, params, where
        self.known: dict[Any, _Plan] = {}

    def plan(self, batch: Any) -> _Plan:
        leaves, treedef = jax.tree.flatten(batch)
        key = (treedef, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self.known:
            self.known[key] = self._make(batch)
        return self.known[key]

    def _make(self, batch: Any) -> _Plan:
        program = jaxprs.trace(self.fn, self.params, batch, where=self.where)
        made = _plan(self.function, program)
        for other in self.known.values():
            if [p.name for p in other.problems] != [p.name for p in made.problems]:
                raise ValueError(
                    f"{self.function}: batches of different shapes use the weights in different orders. "
                    f"Pass batches of one shape."
                )
            break
        return made


class _Run:
    """One batch on its way through the stages."""

    def __init__(self, plan: _Plan, batch: Any) -> None:
        self.plan = plan
        arrays = jax.tree.leaves(batch)
        self.values: dict[int, Any] = dict(zip(plan.program.args, arrays, strict=True))

    def advance(
        self, number: int, leaves: list[Any], statistic: Statistic, sums: Sequence[Any] | None
    ) -> Sequence[jax.Array]:
        """Compute a stage and add its statistics to those of the batches before."""
        stage, program = self.plan.stages[number], self.plan.program
        params = dict(zip(program.params, leaves, strict=True))
        sources = (self.values, params, program.constants)
        inputs = [next(s[i] for s in sources if i in s) for i in stage.inputs]
        if sums is None:
            sums = [_zeros(statistic, layout, program, r) for r, layout in _reads(stage)]
        picks = list(map(np.int32, stage.picks))
        kept, added = _advance(stage.segment, stage.layouts, statistic, picks, inputs, sums)
        self.values |= dict(zip(stage.kept, kept, strict=True))
        for i in stage.dropped:
            self.values.pop(i, None)
        return added


def _reads(stage: _Stage) -> Iterable[tuple[Any, layouts.Layout]]:
    return zip(stage.reads, stage.layouts, strict=True)


def _zeros(statistic: Statistic, layout: layouts.Layout, program: Any, read: Any) -> jax.Array:
    x = program.shapes[read[0]]
    out = jax.eval_shape(lambda x: statistic(_precise(layout.inputs(x))), x)
    return jnp.zeros(out.shape, out.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _advance(
    segment: Segment,
    reads: tuple[layouts.Layout, ...],
    statistic: Statistic,
    picks: list[Any],
    inputs: list[Any],
    sums: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    outputs = segment(inputs, picks)
    kept = outputs[len(reads) :]
    news = [_measure(statistic, layout, x) for layout, x in zip(reads, outputs, strict=False)]
    return kept, [total + new for total, new in zip(sums, news, strict=True)]


def _measure(statistic: Statistic, layout: layouts.Layout, x: jax.Array) -> jax.Array:
    def measure(x: jax.Array) -> jax.Array:
        return statistic(_precise(layout.inputs(x)))

    mesh: Any = jax.typeof(x).sharding.mesh
    if not any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return measure(x)
    # Rows are flattened and summed over whatever axes they are sharded on. On a mesh with explicit axes one must leave
    # that to the compiler in so many words; each device gets the sum.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    everywhere: Any = jax.sharding.auto_axes(measure, out_sharding=whole)
    return everywhere(x)


def _precise(x: jax.Array) -> jax.Array:
    return x.astype(trees.wide_dtype(x.dtype))


def _as_array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _scalar_key(value: Any) -> Any:
    array = np.asarray(value)
    return type(value), array.dtype, array.shape, array.tobytes()


def _plan(function: str, program: jaxprs.Program) -> _Plan:
    read = [layouts.layout_of(program, product) for product in program.products]
    problems = _problems(function, program, read)
    problem_of = {s: n for n, problem in enumerate(problems) for s in problem.products}
    at = _stage_of_products(program, [x for _, x in read], problems, problem_of)
    varying = _varying(program)
    made_by = {i: n for n, equation in enumerate(program.equations) for i in equation.outputs}
    computed: dict[int, int] = {}  # id of a value of the batch -> the stage that computes it
    needed: list[tuple[list[int], list[int]]] = []
    last_use: dict[int, int] = {}
    kept: list[list[int]] = []
    for stage in range(max(at) + 1):
        targets = [read[s][1] for s in range(len(at)) if at[s] == stage]
        equations, inputs = _ancestors(program, made_by, computed, targets)
        for i in inputs:
            if i in varying:
                last_use[i] = stage
                if i in computed and i not in kept[computed[i]]:
                    kept[computed[i]].append(i)
        for n in equations:
            computed |= {i: stage for i in program.equations[n].outputs if i in varying}
        needed.append((equations, inputs))
        kept.append([])

    stages = []
    for stage, (equations, inputs) in enumerate(needed):
        own = [s for s in range(len(at)) if at[s] == stage]
        reads: dict[Any, layouts.Layout] = {}
        for s in own:
            reads.setdefault((read[s][1], read[s][0].reading), read[s][0])
        outputs = [x for x, _ in reads] + kept[stage]
        chosen = [program.equations[n] for n in equations]
        stages.append(
            _Stage(
                Segment(program, equations, inputs, outputs),
                tuple(inputs),
                tuple(kept[stage]),
                tuple(e.pick for e in chosen if isinstance(e.operation, jaxprs.Pick)),
                tuple(reads),
                tuple(reads.values()),
                tuple((problem_of[s], (read[s][1], read[s][0].reading)) for s in own),
                tuple(
                    n
                    for n, problem in enumerate(problems)
                    if max(at[s] for s in problem.products) == stage
                ),
                tuple(i for i, last in last_use.items() if last == stage),
            )
        )
    places = {i: n for n, i in enumerate(_array_places(program))}
    selected = [program.params[places[i]] for i in program.selection.indices]
    return _Plan(program, problems, stages, selected)


def _array_places(program: jaxprs.Program) -> list[int]:
    """Places of the array leaves among all leaves of the params."""
    leaves = jax.tree.leaves(program.selection.params)
    return [i for i, leaf in enumerate(leaves) if trees.is_array(leaf)]


def _varying(program: jaxprs.Program) -> set[int]:
    """Values that depend on the batch. Others are computed where they are used, and never kept."""
    varying = set(program.args)
    for equation in program.equations:
        if varying.intersection(equation.inputs):
            varying.update(equation.outputs)
    return varying


def _ancestors(
    program: jaxprs.Program, made_by: dict[int, int], computed: dict[int, int], targets: list[int]
) -> tuple[list[int], list[int]]:
    """The equations that targets still need, in order, and the values that these read from outside."""
    equations: set[int] = set()
    stack, seen = list(targets), set()
    while stack:
        i = stack.pop()
        if i in seen or i in computed or i not in made_by:
            continue
        seen.add(i)
        if made_by[i] not in equations:
            equations.add(made_by[i])
            stack.extend(program.equations[made_by[i]].inputs)
    order = sorted(equations)
    inside = {i for n in order for i in program.equations[n].outputs}
    reads = [i for n in order for i in program.equations[n].inputs] + targets
    outside = [i for i in dict.fromkeys(reads) if i not in inside and i not in program.known]
    return order, outside


def _stage_of_products(
    program: jaxprs.Program, inputs: list[int], problems: list[Problem], problem_of: dict[int, int]
) -> list[int]:
    """The stage at which each product's inputs are read: after the problems that they depend on are solved.

    A problem is solved after its last product. Weights that are used again later (shared layers) cannot wait for
    themselves: until its problem is solved a product computes with the weights as they are.
    """
    product_at = {product.equation: s for s, product in enumerate(program.products)}
    before: dict[int, int] = {}  # value -> the products that it depends on, as bits
    at: list[int] = [0] * len(inputs)
    for n, equation in enumerate(program.equations):
        bits = 0
        for i in equation.inputs:
            bits |= before.get(i, 0)
        s = product_at.get(n)
        if s is not None:
            behind = before.get(inputs[s], 0)
            for t in range(s):
                if behind >> t & 1:
                    products = problems[problem_of[t]].products
                    done = max(products) < s
                    at[s] = max(at[s], max(at[p] for p in products) + 1 if done else at[t])
            bits |= 1 << s
        if bits:
            before |= dict.fromkeys(equation.outputs, bits)
    return at


def _problems(
    function: str, program: jaxprs.Program, read: list[tuple[layouts.Layout, int]]
) -> list[Problem]:
    """Join products of the same weights to one problem, and refuse those that share a part of theirs."""
    problems: list[Problem] = []
    shapes = [shape for _, shape in program.selection.shapes]
    by_leaf: dict[int, list[int]] = {}
    for s, product in enumerate(program.products):
        new = Problem(product.name, product.view.leaf, product.view, read[s][0], (s,))
        own = by_leaf.setdefault(new.leaf, [])
        for n in own:
            if _same(problems[n], new, shapes[new.leaf]):
                problems[n] = problems[n]._replace(products=(*problems[n].products, s))
                break
        else:
            own.append(len(problems))
            problems.append(new)
    for leaf, own in by_leaf.items():
        _check_cover(
            function, program.selection.paths[leaf], shapes[leaf], [problems[n] for n in own]
        )
    return _numbered(problems, by_leaf)


def _numbered(problems: list[Problem], by_leaf: dict[int, list[int]]) -> list[Problem]:
    """Tell problems of one leaf apart where the index in a stack does not."""
    for own in by_leaf.values():
        names = [problems[n].name for n in own]
        for part, n in enumerate(own):
            if names.count(problems[n].name) > 1:
                problems[n] = problems[n]._replace(name=f"{problems[n].name} (part {part})")
    return problems


def _same(a: Problem, b: Problem, shape: tuple[int, ...]) -> bool:
    if a.view == b.view and a.layout == b.layout:
        return True
    if len(a.view.picks) == len(b.view.picks) and a.view.picks != b.view.picks:
        return False
    return a.shape == b.shape and np.array_equal(a.places(shape), b.places(shape))


def _check_cover(function: str, path: str, shape: tuple[int, ...], problems: list[Problem]) -> None:
    size = sum(int(np.prod(p.shape)) for p in problems)
    picks = {p.view.picks for p in problems}
    if len(picks) == len(problems) and size == np.prod(shape) and len({*map(len, picks)}) == 1:
        return  # each slice of a stack once
    seen = np.zeros(int(np.prod(shape)), bool)
    for problem in problems:
        places = problem.places(shape).reshape(-1)
        if seen[places].any():
            raise ValueError(
                f"{function}: {path!r} is used in products whose inputs meet the same weights along different axes "
                f"or in different slices, so that no one set of inputs decides. Leave the leaf out with `where`."
            )
        seen[places] = True
    if not seen.all():
        raise ValueError(
            f"{function}: only a part of {path!r} is used in products. Leave the leaf out with `where`, or slice it "
            f"outside of the function."
        )


def _check(function: str, problem: Problem, total: jax.Array) -> None:
    finite, silent = jax.device_get(_health(total))
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


def _pick(leaf: jax.Array, picks: Sequence[Any]) -> jax.Array:
    for i in picks:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return leaf


@functools.partial(jax.jit, static_argnames=("steps", "layout"))
def _read(leaf: jax.Array, picks: Sequence[Any], *, steps: Any, layout: Any) -> jax.Array:
    return layout.matrices(jaxprs.View(0, (), steps).rearrange(_pick(leaf, picks)))


@functools.partial(jax.jit, static_argnames=("steps", "layout"), donate_argnums=0)
def _write(
    leaf: jax.Array, picks: Sequence[Any], matrices: jax.Array, *, steps: Any, layout: Any
) -> jax.Array:
    dtype = trees.wide_dtype(leaf.dtype)
    base = _pick(leaf, picks).astype(dtype)
    # A view takes elements from places; its transpose puts elements in those places, and zeros elsewhere.
    put = jax.linear_transpose(jaxprs.View(0, (), steps).rearrange, base)
    weight = layout.weight(matrices.astype(dtype))
    (values,), (covered,) = put(weight), put(jnp.ones_like(weight))
    base = jnp.where(covered > 0, values, base).astype(leaf.dtype)
    if not picks:
        return base
    update = base.reshape((1,) * len(picks) + base.shape)
    return jax.lax.dynamic_update_slice(leaf, update, (*picks, *(0 for _ in base.shape)))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("steps", "layout"))
def _order(shape: tuple[int, ...], *, steps: Any, layout: Any) -> jax.Array:
    index = jnp.arange(int(np.prod(shape)), dtype=jnp.int32).reshape(shape)
    return layout.matrices(jaxprs.View(0, (), steps).rearrange(index))


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
