"""Cutting a program into stages at the products of its weights.

A stage is what can be computed with the weights that are solved so far: it ends where the inputs of the next weights
are known. Stages of equal structure (the layers of a stack of equal layers) are equal values, and share compiled code.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _jaxprs, trees
from prunax.calibration import layouts

__all__ = ["Plan", "Problem", "Segment", "Stage"]


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
    view: _jaxprs.View
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
        program: _jaxprs.Program,
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
            if isinstance(operation, _jaxprs.Pick):
                operands.append(next(picked))
            results = operation(*operands)
            values |= dict(zip(after, results, strict=True))
        return [jnp.asarray(values[n]) for n in self.outputs]


class Stage(NamedTuple):
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


class Plan(NamedTuple):
    """A program cut into stages.

    Attributes:
        program: The program.
        problems: What is to be solved.
        stages: In order.
        selected: Ids of the selected leaves.
    """

    program: _jaxprs.Program
    problems: list[Problem]
    stages: list[Stage]
    selected: list[int]


def make_plan(function: str, program: _jaxprs.Program) -> Plan:
    """Find the problems of a program and the stages between them.

    Args:
        function: The public function that asks, named in errors.
        program: The program.

    Returns:
        The `Plan`.

    Raises:
        ValueError: Naming the leaf, if its products do not agree on what its inputs are.
    """
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
            Stage(
                Segment(program, equations, inputs, outputs),
                tuple(inputs),
                tuple(kept[stage]),
                tuple(e.pick for e in chosen if isinstance(e.operation, _jaxprs.Pick)),
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
    return Plan(program, problems, stages, selected)


def _varying(program: _jaxprs.Program) -> set[int]:
    """Values that depend on the batch. Others are computed where they are used, and never kept."""
    varying = set(program.args)
    for equation in program.equations:
        if varying.intersection(equation.inputs):
            varying.update(equation.outputs)
    return varying


def _ancestors(
    program: _jaxprs.Program, made_by: dict[int, int], computed: dict[int, int], targets: list[int]
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
    program: _jaxprs.Program, inputs: list[int], problems: list[Problem], problem_of: dict[int, int]
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
    function: str, program: _jaxprs.Program, read: list[tuple[layouts.Layout, int]]
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


def _array_places(program: _jaxprs.Program) -> list[int]:
    """Places of the array leaves among all leaves of the params."""
    leaves = jax.tree.leaves(program.selection.params)
    return [i for i, leaf in enumerate(leaves) if trees.is_array(leaf)]


def _scalar_key(value: Any) -> Any:
    array = np.asarray(value)
    return type(value), array.dtype, array.shape, array.tobytes()


def _pick(leaf: jax.Array, picks: Sequence[Any]) -> jax.Array:
    for i in picks:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return leaf


@functools.partial(jax.jit, static_argnames=("steps", "layout"))
def _read(leaf: jax.Array, picks: Sequence[Any], *, steps: Any, layout: Any) -> jax.Array:
    return layout.matrices(_jaxprs.View(0, (), steps).rearrange(_pick(leaf, picks)))


@functools.partial(jax.jit, static_argnames=("steps", "layout"), donate_argnums=0)
def _write(
    leaf: jax.Array, picks: Sequence[Any], matrices: jax.Array, *, steps: Any, layout: Any
) -> jax.Array:
    dtype = trees.wide_dtype(leaf.dtype)
    base = _pick(leaf, picks).astype(dtype)
    # A view takes elements from places; its transpose puts elements in those places, and zeros elsewhere.
    put = jax.linear_transpose(_jaxprs.View(0, (), steps).rearrange, base)
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
    return layout.matrices(_jaxprs.View(0, (), steps).rearrange(index))
