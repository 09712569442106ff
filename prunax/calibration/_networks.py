"""Running a network block by block: what each batch is at some point between two blocks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _jaxprs, trees
from prunax.calibration._blocks import Blocks, Globs, Span, find_blocks

__all__: list[str] = []

PyTree = Any
Function = Callable[[PyTree, Any], Any]


class How(NamedTuple):
    """A block as a function of its weights. Hashable: blocks of equal structure are compiled once.

    Attributes:
        segment: Its equations.
        places: For each weight where it is among the segment's inputs.
        stacks: For each weight where the stack is that it is a row of; -1 where the row itself is an input.
        dtypes: Of each weight.
        targets: How many of the outputs are compared.
    """

    segment: _jaxprs.Segment
    places: tuple[tuple[int, ...], ...]
    stacks: tuple[int, ...]
    dtypes: tuple[Any, ...]
    targets: int


class Network:
    """A network, and what it makes of each batch up to some point between two blocks.

    Attributes:
        blocked: Its program with its blocks, for each batch.
        names: Of the blocks.
    """

    def __init__(
        self,
        fn: Function,
        params: PyTree,
        batches: Sequence[Any],
        globs: Globs,
        blocked: list[Blocks] | None = None,
    ) -> None:
        self.batches = batches
        self.whole, self.treedef = jax.tree.flatten(params)
        self.arrays = [i for i, x in enumerate(self.whole) if trees.is_array(x)]
        self.paths = [trees.paths(params)[i] for i in self.arrays]
        self.blocked = blocked or _blocked(fn, params, batches, globs)
        self.names = [block.name for block in self.blocked[0].blocks]
        self.restart()

    def restart(self) -> None:
        """Go back to the batches."""
        pairs = zip(self.blocked, self.batches, strict=True)
        self.values = [dict(zip(b.program.args, jax.tree.leaves(x), strict=True)) for b, x in pairs]

    def tree(self) -> PyTree:
        return self.treedef.unflatten(self.whole)

    def weights(self, k: int) -> list[jax.Array]:
        """The weights of a block."""
        rows = self.blocked[0].blocks[k].weights
        leaves = [jnp.asarray(self.whole[self.arrays[w.leaf]]) for w in rows]
        return [x[w.row] if w.row else x for x, w in zip(leaves, rows, strict=True)]

    def put(self, k: int, new: Sequence[jax.Array]) -> None:
        """Change them."""
        for weight, x in zip(self.blocked[0].blocks[k].weights, new, strict=True):
            i = self.arrays[weight.leaf]
            self.whole[i] = jnp.asarray(self.whole[i]).at[weight.row].set(x) if weight.row else x

    def given(self, n: int, span: Span) -> tuple[list[Any], list[Any]]:
        """What a stretch reads of one batch, and the indices of its rows; None stands for rows that are put in."""
        program = self.blocked[n].program
        leaves = (self.whole[i] for i in self.arrays)
        params = dict(zip(program.params, leaves, strict=True))
        sources = (self.values[n], params, program.constants)
        inputs = [next((s[i] for s in sources if i in s), None) for i in span.inputs]
        return inputs, list(map(np.int32, span.segment.picks))

    def enter(self, k: int) -> None:
        """Go on to the beginning of a block."""
        for n, (_, blocks) in enumerate(self.blocked):
            span = blocks[k].before
            if span.outputs:
                new = jax.block_until_ready(_run(span.segment, *self.given(n, span)))
                self.values[n] |= zip(span.outputs, new, strict=True)

    def block(self, n: int, k: int) -> tuple[How, list[Any]]:
        """A block of one batch, and all it takes besides its weights."""
        program, blocks = self.blocked[n]
        block, inputs = blocks[k], blocks[k].inside.inputs
        leaves = [self.whole[self.arrays[w.leaf]] for w in block.weights]
        places, stacks = [], []
        for weight in block.weights:
            whole = program.params[weight.leaf]
            own = {i for i, w in block.picked.items() if w == weight} | (
                {whole} if not weight.row else set()
            )
            places.append(tuple(p for p, i in enumerate(inputs) if i in own))
            # A row that is taken after a conversion of the whole stack is put back into the stack.
            stacks.append(inputs.index(whole) if weight.row and not places[-1] else -1)
        dtypes = tuple(jnp.asarray(x).dtype for x in leaves)
        how = How(block.inside.segment, tuple(places), tuple(stacks), dtypes, block.targets)
        rows = [tuple(map(np.int32, w.row)) for w in block.weights]
        return how, [rows, *self.given(n, block.inside)]

    def leave(self, k: int, weights: Sequence[jax.Array]) -> list[list[jax.Array]]:
        """Go on to the end of a block. Returns of each batch what the block makes of its weights."""
        made = []
        for n, (_, blocks) in enumerate(self.blocked):
            how, rest = self.block(n, k)
            new = jax.block_until_ready(_outputs(how, weights, *rest))
            values = self.values[n] | dict(zip(blocks[k].inside.outputs, new, strict=True))
            self.values[n] = {i: x for i, x in values.items() if i in blocks[k].kept}
            made.append(new[: how.targets])
        return made


def _blocked(fn: Function, params: PyTree, batches: Sequence[Any], globs: Globs) -> list[Blocks]:
    """The blocks for each shape of batch."""
    known: dict[Any, Blocks] = {}
    found = []
    for batch in batches:
        key = shapes_of(batch)
        if key not in known:
            known[key] = find_blocks("refine", fn, params, batch, globs)
        found.append(known[key])
    return found


def shapes_of(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((x.shape, x.dtype) if trees.is_array(x) else x for x in leaves)


@functools.partial(jax.jit, static_argnums=0)
def _run(segment: _jaxprs.Segment, inputs: Sequence[Any], picks: Sequence[Any]) -> list[jax.Array]:
    return segment(inputs, picks)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(
    how: How, weights: Sequence[Any], rows: Sequence[Any], inputs: Sequence[Any], picks: Any
) -> list[jax.Array]:
    return outputs_of(how, weights, rows, inputs, picks)


def outputs_of(
    how: How, weights: Sequence[Any], rows: Sequence[Any], inputs: Sequence[Any], picks: Any
) -> list[jax.Array]:
    inputs = list(inputs)
    for x, row, own, stack, dtype in zip(
        weights, rows, how.places, how.stacks, how.dtypes, strict=True
    ):
        for place in own:
            inputs[place] = x.astype(dtype)
        if stack >= 0:
            inputs[stack] = inputs[stack].at[row].set(x.astype(dtype))
    return how.segment(inputs, picks)
