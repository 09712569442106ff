"""What is to be solved: the matrices that a program's products make of its weights."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _jaxprs, _meshes, trees
from prunax.calibration._experts import Experts
from prunax.calibration.layouts import Layout, layout_of

__all__: list[str] = []

Shape = tuple[int, ...]


class Part(NamedTuple):
    """The inputs and outputs of a matrix that a leaf holds, where others are concatenated with it.

    Attributes:
        inputs: Their indices.
        outputs: Their indices.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Problem(NamedTuple):
    """Matrices to be solved side by side: one layer, one slice of a stack, the experts of one layer.

    Attributes:
        name: The path of the leaf, with the index in a stack: ``layers/kernel[3]``.
        weight: The way from the leaf to the operand of its products.
        part: The part of the matrices that is the leaf's; None for all.
        products: Its products, more than one where weights are shared.
        layouts: A layout for each of them, the way from the operand to matrices, and from the activation to inputs.
    """

    name: str
    weight: _jaxprs.Operand
    part: Part | None
    products: tuple[int, ...]
    layouts: tuple[Layout, ...]

    @property
    def layout(self) -> Layout:
        """The way from the operand to matrices."""
        return self.layouts[0]

    @property
    def leaf(self) -> int:
        """Which of the selected leaves."""
        return self.weight.leaf

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(matrices, in, out)``."""
        matrices, length, width = self.layout.shape
        if self.part is None:
            return matrices, length, width
        return matrices, len(self.part.inputs), len(self.part.outputs)

    @property
    def run(self) -> int:
        """Length of the runs of inputs within which neighbours are neighbours in the weight."""
        if self.part is None:
            return self.layout.group_length
        inputs = np.asarray(self.part.inputs)
        ends = (np.diff(inputs) != 1) | (inputs[1:] % self.layout.group_length == 0)
        return math.gcd(*np.diff(np.flatnonzero([True, *ends, True])).tolist())

    def read(self, leaf: jax.Array) -> jax.Array:
        """Take the matrices out of the leaf."""
        return _read(leaf, self.weight.picks, self._way)

    def write(self, leaf: jax.Array, matrices: jax.Array) -> jax.Array:
        """Put matrices in their places in the leaf, whose buffer is used up."""
        return _write(leaf, self.weight.picks, matrices, self._way)

    def scale(self, leaf: jax.Array) -> jax.Array | None:
        """The constants that the function multiplies the matrices by, None where it does not, or by one number."""
        if not self.weight.scales:
            return None
        picked = jnp.ones(leaf.shape[len(self.weight.picks) :], trees.wide_dtype(leaf.dtype))
        return _own_part(self.layout.matrices(self.weight.apply(picked, scaled=True)), self.part)

    def of_inputs(self, statistic: Any) -> Any:
        """What a statistic of all inputs of the product says of the leaf's own."""
        if self.part is None or len(self.part.inputs) == self.layout.shape[1]:
            return statistic
        own = np.asarray(self.part.inputs)

        def take(x: jax.Array) -> jax.Array:
            for axis in range(1, x.ndim):
                x = x.take(own, axis=axis)
            return x

        return jax.tree.map(take, statistic)

    def places(self, shape: Shape) -> np.ndarray:
        """The flat index in a leaf of this shape of each element of the matrices."""
        picks = len(self.weight.picks)
        base = shape[picks:]
        start = int(np.ravel_multi_index(self.weight.picks, shape[:picks])) if picks else 0
        order = np.asarray(_order(base, self._way), np.int64) - 1
        return order + start * math.prod(base)

    @property
    def _way(self) -> "_Way":
        return _Way(self.weight.maps, self.layout, self.part)


class _Way(NamedTuple):
    """The way from what was picked of a leaf to matrices, hashable."""

    maps: tuple[_jaxprs.LinearMap, ...]
    layout: Layout
    part: Part | None

    def operand(self, x: jax.Array) -> jax.Array:
        return _jaxprs.Operand(0, (), self.maps).apply(x)

    def matrices(self, x: jax.Array) -> jax.Array:
        return _own_part(self.layout.matrices(self.operand(x)), self.part)

    def weight(self, matrices: jax.Array) -> jax.Array:
        """The operand that has these matrices, and zeros outside of the part."""
        if self.part is not None:
            whole = jnp.zeros(self.layout.shape, matrices.dtype)
            rows, columns = map(np.asarray, self.part)
            matrices = whole.at[:, rows[:, None], columns].set(matrices)
        return self.layout.weight(matrices)


def find_problems(program: _jaxprs.Program) -> tuple[list[Problem], dict[int, str]]:
    """Join products of the same weights to one problem.

    Args:
        program: The program.

    Returns:
        The problems of its products, and for each leaf of which no one set of inputs decides, why.
    """
    experts = Experts(program)
    problems: list[Problem] = []
    shapes = [shape for _, shape in program.selection.shapes]
    refused = {leaf: reason.text for leaf, reason in program.reasons.items()}
    by_leaf: dict[int, list[int]] = {}
    for s, product in enumerate(program.products):
        leaf = product.weight.leaf
        layout = layout_of(product, experts.axes(product))
        path = program.selection.paths[leaf]
        part = None
        if product.weight.partial:
            part = _part(product.weight, layout, shapes[leaf])
            if part is None:
                refused.setdefault(leaf, f"{path!r} is rearranged so that it makes no matrix")
                continue
            if len(part.inputs) * len(part.outputs) == math.prod(layout.shape[1:]):
                part = None
        new = Problem(product.name, product.weight, part, (s,), (layout,))
        own = by_leaf.setdefault(leaf, [])
        for n in own:
            same = problems[n]
            if _same(same, new, shapes[leaf]):
                products, read = (*same.products, s), (*same.layouts, layout)
                problems[n] = same._replace(products=products, layouts=read)
                break
        else:
            own.append(len(problems))
            problems.append(new)
    for leaf, own in by_leaf.items():
        if leaf not in refused:
            mine = [problems[n] for n in own]
            problem = _uncovered(program.selection.paths[leaf], shapes[leaf], mine)
            if problem is not None:
                refused[leaf] = problem
    return _numbered(problems, by_leaf), refused


def _numbered(problems: list[Problem], by_leaf: dict[int, list[int]]) -> list[Problem]:
    """Tell problems of one leaf apart where the index in a stack does not."""
    for own in by_leaf.values():
        names = [problems[n].name for n in own]
        for part, n in enumerate(own):
            if names.count(problems[n].name) > 1:
                problems[n] = problems[n]._replace(name=f"{problems[n].name} (part {part})")
    return problems


def _same(a: Problem, b: Problem, shape: Shape) -> bool:
    if a.weight == b.weight and a.layout == b.layout:
        return True
    if len(a.weight.picks) == len(b.weight.picks) and a.weight.picks != b.weight.picks:
        return False
    if a.shape != b.shape or a.part != b.part:
        return False
    return np.array_equal(a.places(shape), b.places(shape))


def _part(weight: _jaxprs.Operand, layout: Layout, shape: Shape) -> Part | None:
    """The inputs and outputs that hold elements of the leaf; None unless all of them do, each element once."""
    found = _jaxprs.places(weight, shape[len(weight.picks) :])
    with jax.ensure_compile_time_eval():
        matrices = np.asarray(layout.matrices(jnp.asarray(found)))
    inputs, outputs = (np.flatnonzero((matrices > 0).any((0, axis))) for axis in (2, 1))
    own = matrices[:, inputs[:, None], outputs]
    if not own.all() or len(np.unique(own)) < own.size:
        return None
    return Part(tuple(inputs.tolist()), tuple(outputs.tolist()))


def _uncovered(path: str, shape: Shape, problems: Sequence[Problem]) -> str | None:
    """Why problems are not all of a leaf, each element once."""
    size = sum(math.prod(p.shape) for p in problems)
    picks = {p.weight.picks for p in problems}
    partial = any(p.weight.partial for p in problems)
    whole = len(picks) == len(problems) and size == math.prod(shape)
    if whole and len({*map(len, picks)}) == 1 and not partial:
        return None  # each slice of a stack once
    seen = np.zeros(math.prod(shape), bool)
    for problem in problems:
        places = problem.places(shape).reshape(-1)
        if seen[places].any():
            return (
                f"{path!r} is used in products whose inputs meet the same weights along different axes or in "
                f"different slices, so that no one set of inputs decides"
            )
        seen[places] = True
    return None if seen.all() else f"only a part of {path!r} is used in products"


def _own_part(matrices: jax.Array, part: Part | None) -> jax.Array:
    if part is None:
        return matrices
    rows, columns = map(np.asarray, part)
    return matrices[:, rows[:, None], columns]


def _pick(leaf: jax.Array, picks: Sequence[Any]) -> jax.Array:
    for i in picks:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return leaf


@functools.partial(jax.jit, static_argnums=2)
def _read(leaf: jax.Array, picks: Sequence[Any], way: _Way) -> jax.Array:
    # Methods see whole matrices, of one layer at a time: on explicit meshes every device gets them.
    return way.matrices(_meshes.gather(_pick(_of_stack(leaf, picks), picks)))


def _of_stack(leaf: jax.Array, picks: Sequence[Any]) -> jax.Array:
    """Not divided along the axes to be indexed, in which explicit meshes allow no single slice."""
    return _meshes.gather(leaf, range(len(picks)))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write(leaf: jax.Array, picks: Sequence[Any], matrices: jax.Array, way: _Way) -> jax.Array:
    dtype = trees.wide_dtype(leaf.dtype)
    stack = _of_stack(leaf, picks)
    base = _meshes.gather(_pick(stack, picks)).astype(dtype)
    # The way takes elements from places; its transpose puts elements in those places, and zeros elsewhere.
    put = jax.linear_transpose(way.operand, base)
    weight = way.weight(matrices.astype(dtype))
    (values,), (covered,) = put(weight), put(jnp.ones_like(weight))
    base = jnp.where(covered > 0, values, base).astype(leaf.dtype)
    if not picks:
        return _meshes.shard_like(base, leaf)
    update = base.reshape((1,) * len(picks) + base.shape)
    update = _meshes.divide(update, stack, range(update.ndim))
    new = jax.lax.dynamic_update_slice(stack, update, (*picks, *(0 for _ in base.shape)))
    return _meshes.shard_like(new, leaf)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _order(shape: Shape, way: _Way) -> jax.Array:
    return way.matrices(jnp.arange(1, math.prod(shape) + 1, dtype=jnp.int32).reshape(shape))
