"""Cutting a program at the ends of its blocks: which equations are a block's, what goes into it and comes out.

A block is named by a path or a glob; its weights are the leaves below, of a stack of layers their rows. It begins and
ends where the least is carried from one part of the program to the next: in a residual network at the stream.
"""

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prunax import _jaxprs, trees
from prunax._jaxprs import operands, programs
from prunax.calibration._stages import ancestors, depending

__all__: list[str] = []

PyTree = Any
Globs = str | Sequence[str]


class Weight(NamedTuple):
    """A leaf, or a row of a stack.

    Attributes:
        leaf: Which of the array leaves of the params.
        row: Indices of its leading axes; none for the whole leaf.
    """

    leaf: int
    row: tuple[int, ...] = ()


class Span(NamedTuple):
    """A stretch of a program as a function.

    Attributes:
        segment: Its equations.
        inputs: Ids of what it reads.
        outputs: Ids of what is carried on, of a block what it makes of its weights first.
    """

    segment: _jaxprs.Segment
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Block(NamedTuple):
    """A block of a program.

    Attributes:
        name: The path or glob that names it.
        weights: What lies below.
        picked: The ids that are rows of stacks, with the weight that each is.
        before: From the end of the block before it to its beginning.
        inside: The block.
        targets: How many of its outputs depend on its weights.
        kept: Ids of the values that are used after it.
    """

    name: str
    weights: tuple[Weight, ...]
    picked: dict[int, Weight]
    before: Span
    inside: Span
    targets: int
    kept: frozenset[int]


class Blocks(NamedTuple):
    """A program with its blocks, in order."""

    program: _jaxprs.Program
    blocks: list[Block]


def find_blocks(
    function: str, fn: Callable[..., Any], params: PyTree, batch: Any, globs: Globs
) -> Blocks:
    """Trace a function and find its blocks.

    Args:
        function: The public function that asks, named in errors.
        fn: ``fn(params, batch)``.
        params: Pytree of arrays.
        batch: One batch.
        globs: A glob each of whose matches is a block; or several, each of which is one block.

    Raises:
        ValueError: If a glob matches nothing, or what it matches is no block, with the paths.
    """
    floating = lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    calls = programs.PLAIN_CALLS
    program = _jaxprs.trace(fn, params, batch, where=floating, calls=calls)
    names = [
        path
        for path, leaf in zip(trees.paths(params), _leaves(params), strict=True)
        if trees.is_array(leaf)
    ]
    floats = {i for i, x in enumerate(filter(trees.is_array, _leaves(params))) if _floats(x)}
    uses, picks = _uses(program)
    used = [w for w in dict.fromkeys(w for own in uses.values() for w in own) if w.leaf in floats]
    home = {w: _home(function, globs, names[w.leaf], w.row) for w in used}
    found: dict[str, list[Weight]] = {}
    for weight in used:
        if (name := home[weight]) is not None:
            found.setdefault(name, []).append(weight)
    missing = [globs] if isinstance(globs, str) and not found else []
    if not isinstance(globs, str):
        missing = [glob for glob in globs if glob not in found]
    if missing or not found:
        spelled = dict.fromkeys(names[w.leaf] + "".join(f"[{i}]" for i in w.row) for w in used)
        raise ValueError(
            f"{function}: blocks={missing[0] if missing else globs!r} matches no weight that meets an activation. "
            f"They are: {', '.join(spelled)}."
        )
    places = {
        name: [n for n, own in uses.items() if not own.isdisjoint(weights)]
        for name, weights in found.items()
    }
    order = sorted(found, key=lambda name: places[name][0])
    for a, b in itertools.pairwise(order):
        if places[a][-1] >= places[b][0]:
            raise ValueError(
                f"{function}: the blocks {a!r} and {b!r} are not one after the other: the program goes back to "
                f"weights of the first once it has used the second's. Name them as one block, or give a glob of "
                f"paths that whole blocks lie under, such as 'layers/*'."
            )
    return Blocks(program, _cut(program, uses, picks, [(n, found[n], places[n]) for n in order]))


def _leaves(tree: PyTree) -> list[Any]:
    return [leaf for _, leaf in trees.named_leaves(tree)]


def _floats(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _home(function: str, globs: Globs, path: str, row: tuple[int, ...]) -> str | None:
    """The name of the block that a weight is in, if it is in one."""
    if isinstance(globs, str):
        return next((head for head in _heads(path, row) if _matches(globs, head)), None)
    heads = list(_heads(path, row))
    homes = [glob for glob in globs if any(_matches(glob, head) for head in heads)]
    if len(set(homes)) > 1:
        raise ValueError(
            f"{function}: {path!r} lies in two blocks, {homes[0]!r} and {homes[1]!r}. Name each weight once."
        )
    return homes[0] if homes else None


def _heads(path: str, row: tuple[int, ...]) -> Iterator[str]:
    """The paths that a weight lies under, the shortest first; a row of a stack is spelled as a part of any.

    Names of a checkpoint, ``model.layers.0.mlp.up_proj.weight``, count as paths.
    """
    parts = path.replace(".", "/").split("/")
    for n in range(1, len(parts) + 1):
        head = "/".join(parts[:n])
        yield head
        if row:
            yield "/".join([head, *map(str, row)])
            yield head + "".join(f"[{i}]" for i in row)


def _matches(glob: str, path: str) -> bool:
    # Part by part, so that `layers/*` stands for `layers/3` and not for all that lies below.
    glob = glob.replace(".", "/")
    ours, theirs = glob.split("/"), path.split("/")
    if glob == path:
        return True
    return len(ours) == len(theirs) and all(map(fnmatch.fnmatchcase, theirs, ours))


def _uses(program: _jaxprs.Program) -> tuple[dict[int, set[Weight]], dict[int, Weight]]:
    """The weights that meet activations in each equation, in order; and the ids that are rows of stacks."""
    varying = depending(program, program.args)
    of: dict[int, set[Weight]] = {i: {Weight(n)} for n, i in enumerate(program.params)}
    straight, direct = set(program.params), set(program.params)
    uses: dict[int, set[Weight]] = {}
    picks: dict[int, Weight] = {}
    for n, equation in enumerate(program.equations):
        own = {w for i in equation.inputs if i not in varying for w in of.get(i, ())}
        if not varying.isdisjoint(equation.outputs):
            if own:
                uses[n] = own
            continue
        if not own:
            continue
        operation = equation.operation
        if isinstance(operation, _jaxprs.Pick) and equation.inputs[0] in straight:
            own = {w._replace(row=(*w.row, equation.pick)) for w in own}
            straight.update(equation.outputs)
            if equation.inputs[0] in direct:
                direct.update(equation.outputs)
                picks[equation.outputs[0]] = next(iter(own))
        elif _is_neutral(equation) and equation.inputs[0] in straight:
            straight.update(equation.outputs)
        of |= dict.fromkeys(equation.outputs, own)
    return uses, picks


def _is_neutral(equation: _jaxprs.Equation) -> bool:
    eqn = getattr(equation.operation, "eqn", None)
    return eqn is not None and eqn.primitive.name in operands.NEUTRAL and len(equation.inputs) == 1


def _cut(
    program: _jaxprs.Program,
    uses: Mapping[int, set[Weight]],
    picks: Mapping[int, Weight],
    named: Sequence[tuple[str, list[Weight], list[int]]],
) -> list[Block]:
    """The blocks, of which each has weights and the places where they are used."""
    equations, count = program.equations, len(program.equations)
    varying = depending(program, program.args)
    made_by = {i: n for n, e in enumerate(equations) for i in e.outputs}
    made = {i: made_by.get(i, -1) for i in varying}
    last = {i: n for n, e in enumerate(equations) for i in e.inputs if i in varying}
    last |= {i: count for i in program.outputs if i in varying}
    # Bytes of what is there before an equation, and used from it on.
    sizes = np.zeros(count + 2, np.int64)
    for i, stop in last.items():
        nbytes = program.shapes[i].size * program.shapes[i].dtype.itemsize
        sizes[[made[i] + 1, stop + 1]] += nbytes, -nbytes
    sizes = np.cumsum(sizes)

    def alive(cut: int) -> list[int]:
        return sorted(i for i, stop in last.items() if made[i] < cut <= stop)

    def span(start: int, stop: int, first: Sequence[int] = (), known: Iterable[int] = ()) -> Span:
        computed = dict.fromkeys([*(i for i, n in made.items() if n < start), *known], 0)
        rest = [i for i in alive(stop) if made[i] >= start and i not in first]
        order, inputs = ancestors(program, made_by, computed, outputs := [*first, *rest])
        chosen = [equations[n] for n in order]
        segment = _jaxprs.Segment(chosen, program.known, inputs, outputs)
        return Span(segment, tuple(inputs), tuple(outputs))

    blocks, end = list[Block](), 0
    for name, weights, places in named:
        before = max((n for n in uses if n < places[0]), default=-1)
        after = min((n for n in uses if n > places[-1]), default=count)
        start = min(range(places[0], max(before + 1, end) - 1, -1), key=sizes.__getitem__)
        stop = min(range(places[-1] + 1, after + 1), key=sizes.__getitem__)
        picked = {i: w for i, w in picks.items() if w in weights}
        whole = {program.params[w.leaf] for w in weights if w not in picked.values()}
        reached = depending(program, [*whole, *picked])
        targets = [i for i in alive(stop) if made[i] >= start and i in reached]
        targets = [i for i in targets if _floats(program.shapes[i])]
        inside = span(start, stop, targets, picked)
        blocks.append(
            Block(
                name,
                tuple(weights),
                picked,
                span(end, start),
                inside,
                len(targets),
                frozenset(alive(stop)),
            )
        )
        end = stop
    return blocks
