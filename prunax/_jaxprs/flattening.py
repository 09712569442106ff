"""Functions as flat lists of equations that know which values are made of which parameter.

`trace` turns ``fn(params, *args)`` into a `Program`: calls are inlined, a `scan` over a stack of weights is unrolled,
what no output needs is dropped, and every product of a weight with an activation is listed with the way from the
parameter leaf to the operand. Only JAX's public API is used.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from prunax import trees
from prunax._jaxprs import operands, programs
from prunax._jaxprs.equations import Bound, Equation, Loop, Pick, Segment, Stack
from prunax._jaxprs.operands import Operand

__all__ = ["Product", "Program", "Reason", "trace"]

PyTree = Any

_PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
# A loop whose counter says which weights a turn uses is written out, up to so many turns.
_MAX_TURNS = 256


class Product(NamedTuple):
    """A product of a selected leaf, or of a part of it, with an activation.

    Attributes:
        equation: Its place in the program; the loop's, where it stands in one.
        eqn: The `dot_general` or `conv_general_dilated`.
        side: Which of its operands is the weight, 0 or 1.
        weight: What the weight is in terms of the leaf.
        activation: Id of the other operand.
        loops: How many leading axes of the activation are turns of loops around the product.
        name: ``path`` of the leaf, with what was picked: ``layers/kernel[3]``.
        is_lookup: Whether the activation is one-hot, so that the product looks rows up.
    """

    equation: int
    eqn: JaxprEqn
    side: int
    weight: Operand
    activation: int
    loops: int
    name: str
    is_lookup: bool


class Reason(NamedTuple):
    """Why a leaf has no products that say all about it.

    Attributes:
        kind: "recomputed" before its product, "looked up", or "no product".
        text: A sentence that names the leaf's path.
    """

    kind: str
    text: str


class Program(NamedTuple):
    """A function as a flat list of equations. Values have ids.

    Attributes:
        equations: In order of evaluation; only those that the outputs need.
        params: Ids of the array leaves of the params, in tree order.
        args: Ids of the array leaves of the other arguments, in tree order.
        constants: Arrays that the function closed over, by id.
        known: Scalars written into the program, by id.
        shapes: Shape and dtype of every value, by id.
        outputs: Ids of the results.
        products: Products of selected leaves, in order.
        selection: The selected leaves.
        reasons: For each selected leaf whose products do not tell all that it does, why.
        looked_up: Selected leaves that are looked up in, whatever else they do: tables.
        traced: The function's jaxpr.
    """

    equations: list[Equation]
    params: list[int]
    args: list[int]
    constants: dict[int, Any]
    known: dict[int, Any]
    shapes: dict[int, jax.ShapeDtypeStruct]
    outputs: list[int]
    products: list[Product]
    selection: trees.Selection
    reasons: dict[int, Reason]
    looked_up: set[int]
    traced: programs.Traced

    def only(self, which: Iterable[int]) -> "Program":
        """Read the function again with fewer leaves selected."""
        return _flatten(self.traced, self.selection.only(list(which)), programs.CALLS)

    @property
    def kernels(self) -> list[int]:
        """The selected leaves that multiply activations in a product or convolution, and do nothing else."""
        every = range(len(self.selection.indices))
        return [n for n in every if n not in self.reasons and n not in self.looked_up]


def trace(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    where: trees.Where | None = None,
    calls: frozenset[str] = programs.CALLS,
) -> Program:
    """Trace a function and find the products of its weights.

    Args:
        fn: ``fn(params, *args)``, of any framework, with no side effects that matter.
        params: Pytree of arrays; other leaves are passed on as they are.
        args: Pytrees of arrays, or of anything with a shape and a dtype.
        where: ``where(path, leaf) -> bool`` chooses the leaves whose products are wanted. Left out, all floating-point
            leaves of two or more axes.
        calls: Primitives whose programs are inlined. What is to be differentiated leaves out those with derivatives of
            their own (`programs.PLAIN_CALLS`).

    Returns:
        The `Program`. Weights are followed through transpose, reshape, slices, conversions, constant factors,
        concatenation, `jit`, custom derivatives, `jax.checkpoint`, the branch of a `cond` that is known, and `scan`.
        Leaves that are used otherwise, too, have a `Reason`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
        >>> program = prunax._jaxprs.trace(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 4)))
        >>> [product.name for product in program.products]
        ['kernel']
    """
    trees.check_function(fn)

    def on_arrays(params: PyTree, *args: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(fn(params, *args)) if trees.is_array(x)]

    traced = programs.traced(on_arrays, params, args)
    return _flatten(traced, trees.select(params, where or _could_be_a_kernel), calls)


def _could_be_a_kernel(path: str, leaf: Any) -> bool:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating) and trees.has_zero(leaf.dtype)
    return floating and len(leaf.shape) >= 2


class _Use(NamedTuple):
    """A use of a leaf that is no product: a lookup, or one that cannot be read."""

    equation: int
    leaf: int
    text: str  # none for a lookup


class _Flattener:
    """Collects equations while reading a jaxpr and those inside it.

    Attributes:
        operands: What a value is in terms of selected leaves; more than one where leaves were concatenated.
        makers: The equation of each value.
        varying: Values that depend on the function's arguments.
        fixed: Values that depend on neither params nor arguments.
        derived: The leaves of which a value that depends on params alone was computed.
        recomputed: Leaves that meet an activation only after such a computation.
    """

    def __init__(self, selection: trees.Selection, calls: frozenset[str]) -> None:
        self.selection, self.calls = selection, calls
        self.equations: list[Equation] = []
        self.shapes: dict[int, jax.ShapeDtypeStruct] = {}
        self.constants: dict[int, Any] = {}
        self.known: dict[int, Any] = {}
        self.operands: dict[int, tuple[Operand, ...]] = {}
        self.makers: dict[int, Equation] = {}
        self.varying: set[int] = set()
        self.fixed: set[int] = set()
        self.derived: dict[int, frozenset[int]] = {}
        self.recomputed: set[int] = set()
        self.products: list[Product] = []
        self.uses: list[_Use] = []
        self.bound: dict[int, Bound] = {}
        self.values: dict[int, Any] = {}

    def value(self, like: Any) -> int:
        """A new id for a value of the shape of a variable or an array."""
        aval = getattr(like, "aval", like)
        self.shapes[len(self.shapes)] = jax.ShapeDtypeStruct(np.shape(aval), aval.dtype)
        return len(self.shapes) - 1

    def constant(self, array: Any) -> int:
        new = self.value(array if trees.is_array(array) else np.asarray(array))
        self.constants[new] = array
        if not trees.is_traced(array):
            self.fixed.add(new)
        return new

    def literal(self, literal: Literal) -> int:
        new = self.value(literal)
        self.known[new] = literal.val
        self.fixed.add(new)
        return new

    def number(self, i: int) -> Any:
        """What a value is that depends on nothing."""
        if i in self.known or i in self.constants:
            return self.known.get(i, self.constants.get(i))
        if i not in self.values:
            maker = self.makers[i]
            given = [self.number(n) for n in maker.inputs]
            with jax.ensure_compile_time_eval():
                results = maker.operation(*given)
            self.values |= zip(maker.outputs, results, strict=True)
        return self.values[i]

    def inline(self, jaxpr: Jaxpr, inputs: Sequence[int], consts: Sequence[int]) -> list[int]:
        """Add the equations of a jaxpr. Returns the ids of its results."""
        ids: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        ids |= dict(zip(jaxpr.constvars, consts, strict=True))

        def read(v: Any) -> int:
            return self.literal(v) if isinstance(v, Literal) else ids[v]

        for eqn in jaxpr.eqns:
            results = self.add(eqn, [read(v) for v in eqn.invars])
            ids |= dict(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def inline_closed(self, body: programs.ClosedJaxpr | Jaxpr, inputs: Sequence[int]) -> list[int]:
        closed = [self.constant(c) for c in programs.constants(body)]
        return self.inline(programs.opened(body), inputs, closed)

    def add(self, eqn: JaxprEqn, inputs: list[int]) -> list[int]:
        """Add one equation, or those inside it. Returns the ids of its results, one for each of its `outvars`."""
        name = eqn.primitive.name
        if name in self.calls:
            return self.inline_closed(programs.called(eqn), inputs)
        if name == "cond" and inputs[0] in self.known:
            branches = eqn.params["branches"]
            branch = min(max(int(self.known[inputs[0]]), 0), len(branches) - 1)
            return self.inline_closed(branches[branch], inputs[1:])
        if name == "scan" and any(i in self.operands for i in inputs):
            return self.scan(eqn, inputs)
        # A scan's body that is unrolled comes by here once a turn, with the same equations.
        if id(eqn) not in self.bound:
            self.bound[id(eqn)] = Bound(eqn)
        operation = self.bound[id(eqn)]
        outputs = {v: self.value(v) for v in operation.results}
        given = {v: i for v, i in zip(eqn.invars, inputs, strict=True) if type(v) is Var}
        ids = tuple(given[v] for v in operation.variables)
        if _is_counting(eqn) and all(i in self.known for i in inputs):
            # Which branch of a switch is taken may take some arithmetic.
            results = operation(*(self.known[i] for i in ids))
            self.known |= zip(outputs.values(), map(np.asarray, results), strict=True)
            self.fixed.update(outputs.values())
            return list(outputs.values())
        results = [outputs.get(v, -1) for v in eqn.outvars]
        self.emit(Equation(operation, ids, tuple(outputs.values())))
        if any(i in self.operands for i in inputs):
            self.follow(eqn, inputs, results)
        elif name in _PRODUCTS and any(i in self.varying for i in inputs):
            self.recomputed.update(*(self.derived.get(i, ()) for i in inputs))
        return results

    def emit(self, equation: Equation) -> None:
        """Add an equation, and note of its results what they depend on."""
        self.equations.append(equation)
        self.makers |= dict.fromkeys(equation.outputs, equation)
        if not self.varying.isdisjoint(equation.inputs):
            self.varying.update(equation.outputs)
        elif self.fixed.issuperset(equation.inputs) and not _has_effects(equation):
            self.fixed.update(equation.outputs)
        else:
            leaves = frozenset(
                leaf
                for i in equation.inputs
                for leaf in (
                    *self.derived.get(i, ()),
                    *(own.leaf for own in self.operands.get(i, ())),
                )
            )
            if leaves:
                self.derived |= dict.fromkeys(equation.outputs, leaves)

    def scan(self, eqn: JaxprEqn, inputs: list[int]) -> list[int]:
        """Add a scan that meets weights: turn by turn where it has a layer for each, as a loop where it shares them."""
        constants, carries = programs.scan_arity(eqn)
        if any(i in self.operands for i in inputs[constants + carries :]):
            return self.unroll(eqn, inputs)
        equations, uses, products = len(self.equations), len(self.uses), len(self.products)
        outputs = self.roll(eqn, inputs)
        counts = any(i in self.known for i in inputs[constants : constants + carries])
        if len(self.uses) > uses and counts and eqn.params["length"] <= _MAX_TURNS:
            # Which weights a turn uses may hang on its number.
            del self.equations[equations:], self.uses[uses:], self.products[products:]
            return self.unroll(eqn, inputs)
        return outputs

    def roll(self, eqn: JaxprEqn, inputs: list[int]) -> list[int]:
        """Add a scan as it is, and before it one that gives the activations its weights meet, turn by turn."""
        constants, carries = programs.scan_arity(eqn)
        body: programs.ClosedJaxpr = eqn.params["jaxpr"]
        inner = [self.value(v) for v in body.jaxpr.invars]
        kept = [
            n
            for n in range(constants + carries)
            if n < constants or body.jaxpr.outvars[n - constants] is body.jaxpr.invars[n]
        ]
        self.varying.update(n for k, n in enumerate(inner) if k not in kept)
        for n in kept:
            self.same(inputs[n], inner[n])
        outer, self.equations = self.equations, []
        uses, products = len(self.uses), len(self.products)
        closed = [self.constant(c) for c in programs.constants(body)]
        results = self.inline(body.jaxpr, inner, closed)
        turn, self.equations = self.equations, outer
        needed = set(_needed(turn, results))
        found = [p for p in self.products[products:] if p.equation in needed]
        seen = list(dict.fromkeys(p.activation for p in found))
        stacked = dict(
            zip(seen, (self.stacked(i, eqn.params["length"]) for i in seen), strict=True)
        )
        if found:
            order = _needed(turn, [*results[:carries], *seen])
            made = {i for n in order for i in turn[n].outputs} | self.known.keys() | {*inner}
            more = [i for n in order for i in turn[n].inputs if i not in made]
            more = [*dict.fromkeys([*more, *(i for i in seen if i not in made)])]
            segment = Segment(
                [turn[n] for n in order],
                self.known,
                [*more, *inner],
                [*results[:carries], *seen],
            )
            loop = Loop(
                segment,
                (len(more) + constants, carries),
                eqn.params["length"],
                eqn.params["reverse"],
            )
            self.emit(Equation(loop, (*more, *inputs), tuple(stacked.values())))
        self.products[products:] = [
            p._replace(
                equation=len(self.equations),
                activation=stacked[p.activation],
                loops=p.loops + 1,
            )
            for p in found
        ]
        self.uses[uses:] = [
            use._replace(equation=len(self.equations))
            for use in self.uses[uses:]
            if use.equation in needed
        ]
        operation = Bound(eqn)
        outputs = {v: self.value(v) for v in operation.results}
        given = {v: i for v, i in zip(eqn.invars, inputs, strict=True) if type(v) is Var}
        ids = tuple(given[v] for v in operation.variables)
        self.emit(Equation(operation, ids, tuple(outputs.values())))
        lost = [i for n, i in enumerate(inputs) if n not in kept]
        returned = [i for n, i in enumerate(results) if constants + n not in kept]
        self.note_uses([*lost, *returned], "scan")
        for n in kept[constants:]:
            if (v := eqn.outvars[n - constants]) in outputs:
                self.same(inputs[n], outputs[v])
        return [outputs.get(v, -1) for v in eqn.outvars]

    def same(self, old: int, new: int) -> None:
        """Note that one value is another."""
        facts: Any
        for facts in (self.operands, self.known, self.derived):
            if old in facts:
                facts[new] = facts[old]
        for group in (self.varying, self.fixed):
            if old in group:
                group.add(new)
        if old in self.fixed:
            self.values[new] = self.number(old)

    def stacked(self, i: int, length: int) -> int:
        shape = self.shapes[i]
        return self.value(jax.ShapeDtypeStruct((length, *shape.shape), shape.dtype))

    def unroll(self, eqn: JaxprEqn, inputs: list[int]) -> list[int]:
        """Add the body of a scan once for each turn, each with its slice of the stacked weights."""
        constants, carries = programs.scan_arity(eqn)
        body: programs.ClosedJaxpr = eqn.params["jaxpr"]
        length = eqn.params["length"]
        carry = inputs[constants : constants + carries]
        stacked = inputs[constants + carries :]
        closed = [self.constant(c) for c in programs.constants(body)]
        turns: dict[int, list[int]] = {}
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            slices = [self.pick(x, i) for x in stacked]
            results = self.inline(body.jaxpr, [*inputs[:constants], *carry, *slices], closed)
            carry, turns[i] = results[:carries], results[carries:]
        outputs = []
        for n, v in enumerate(eqn.outvars[carries:]):
            outputs.append(self.value(v))
            gathered = tuple(turns[i][n] for i in range(length))
            self.emit(Equation(Stack(), gathered, (outputs[-1],)))
            self.note_uses(gathered, "scan")
        return [*carry, *outputs]

    def pick(self, stacked: int, index: int) -> int:
        shape = self.shapes[stacked]
        new = self.value(jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype))
        self.emit(Equation(Pick(), (stacked,), (new,), index))
        step = operands.pick(index)
        own = self.operands.get(stacked, ())
        self.make(
            new,
            [o.then(step) if o.maps else o._replace(picks=(*o.picks, index)) for o in own],
            chosen=True,
        )
        return new

    def make(self, output: int, made_of: Sequence[Operand], chosen: bool = False) -> None:
        """Note what a value is made of, without what has vanished from it."""
        if chosen:
            made_of = [o for o in made_of if not o.partial or self.places(o).any()]
        if made_of:
            self.operands[output] = tuple(made_of)

    def places(self, operand: Operand) -> np.ndarray:
        """As `places`, for a leaf that is selected."""
        shape = self.selection.leaves[operand.leaf].shape[len(operand.picks) :]
        return operands.places(operand, shape)

    def follow(self, eqn: JaxprEqn, inputs: list[int], outputs: list[int]) -> None:
        """Note what an equation makes of the weights among its operands."""
        name = eqn.primitive.name
        weights = [n for n, i in enumerate(inputs) if i in self.operands]
        if name in _PRODUCTS:
            self.multiply(eqn, inputs, weights)
            return
        if name in operands.JOINING and self.varying.isdisjoint(inputs):
            parts = zip(inputs, operands.joined(eqn), strict=True)
            self.make(outputs[0], [o.then(x) for i, x in parts for o in self.operands.get(i, ())])
            return
        others = [i for n, i in enumerate(inputs) if n != weights[0]]
        steps = None
        if len(weights) == 1 and self.fixed.issuperset(others):
            steps = operands.maps_of(eqn, weights[0], lambda: list(map(self.number, others)))
        if steps is None:
            self.note_uses(inputs, name)
            return
        for output, step in zip(outputs, steps, strict=True):
            own = self.operands[inputs[weights[0]]]
            if output >= 0:
                moved = [o.then(step) if step else o for o in own]
                self.make(output, moved, chosen=name in operands.CHOOSING)

    def multiply(self, eqn: JaxprEqn, inputs: list[int], weights: list[int]) -> None:
        """Note the product of weights with an activation."""
        if len(weights) == 2:
            # A matrix of learned inputs (latents, queries) meets a kernel: names tell them apart.
            named = [n for n in weights if all(map(self.is_kernel, self.operands[inputs[n]]))]
            if len(named) == 1 and inputs[0] != inputs[1]:
                self.note_uses([inputs[1 - named[0]]], eqn.primitive.name)
                weights = named
        side, other = weights[0], inputs[1 - weights[0]]
        if len(weights) > 1 or other in self.fixed:
            self.note_uses(inputs, eqn.primitive.name)
            return
        problem = _unlike_a_layer(eqn, side)
        if problem is not None:
            for own in self.operands[inputs[side]]:
                text = f"cannot be pruned by its inputs: {problem}"
                self.uses.append(_Use(len(self.equations) - 1, own.leaf, text))
            return
        for own in self.operands[inputs[side]]:
            picked = "".join(f"[{i}]" for i in own.picks)
            name = self.selection.paths[own.leaf] + picked
            product = Product(
                len(self.equations) - 1, eqn, side, own, other, 0, name, self.is_one_hot(other)
            )
            self.products.append(product)

    def is_kernel(self, operand: Operand) -> bool:
        path, leaf = (x[operand.leaf] for x in (self.selection.paths, self.selection.leaves))
        return trees.is_kernel(path, leaf)

    def is_one_hot(self, i: int) -> bool:
        """Whether a value is a comparison, made a number."""
        while i in self.makers and isinstance(self.makers[i].operation, Bound):
            maker = self.makers[i]
            name = maker.operation.eqn.primitive.name
            if name in ("eq", "jit") or len(maker.inputs) != 1:
                return name == "eq"
            if name not in operands.REARRANGING | operands.NEUTRAL | {"broadcast_in_dim"}:
                return False
            i = maker.inputs[0]
        return False

    def note_uses(self, inputs: Sequence[int], primitive: str) -> None:
        leaves = {own.leaf for i in inputs for own in self.operands.get(i, ())}
        text = f"is used by `{primitive}`, where it cannot be seen which inputs meet its weights"
        text = "" if primitive == "gather" else text
        self.uses += [_Use(len(self.equations) - 1, leaf, text) for leaf in sorted(leaves)]


def _unlike_a_layer(eqn: JaxprEqn, side: int) -> str | None:
    """What keeps a product from being rows of inputs times a matrix of weights."""
    if eqn.primitive.name == "dot_general":
        contracting, _ = eqn.params["dimension_numbers"]
        return None if contracting[side] else "no axis of it is contracted"
    if side == 0:
        return "it is the image of a convolution, not the kernel"
    return (
        "its convolution has a batch_group_count" if eqn.params["batch_group_count"] != 1 else None
    )


def _is_counting(eqn: JaxprEqn) -> bool:
    """Whether an equation makes nothing but whole numbers and truth values."""
    return not eqn.effects and all(
        programs.aval(v).shape == ()
        and programs.aval(v).dtype in (np.dtype(np.int32), np.dtype(bool))
        for v in eqn.outvars
    )


def _has_effects(equation: Equation) -> bool:
    return isinstance(equation.operation, Bound) and bool(equation.operation.eqn.effects)


def _needed(equations: Sequence[Equation], outputs: Sequence[int]) -> list[int]:
    """The equations that outputs hang on, in order."""
    needed, kept = set(outputs), []
    for n in reversed(range(len(equations))):
        if needed.intersection(equations[n].outputs):
            needed.update(equations[n].inputs)
            kept.append(n)
    return kept[::-1]


def _flatten(traced: programs.Traced, selection: trees.Selection, calls: frozenset[str]) -> Program:
    """Read a jaxpr, drop what no output needs, and say of each leaf whether its products are all that it does."""
    closed, _, arrays, _ = traced
    count = len(jax.tree.leaves(selection.params))
    flat = _Flattener(selection, calls)
    inputs = [flat.value(v) for v in closed.jaxpr.invars]
    places = dict(zip(arrays, inputs, strict=True))
    args = [places[i] for i in arrays if i >= count]
    flat.varying.update(args)
    for n, i in enumerate(selection.indices):
        flat.operands[places[i]] = (Operand(n),)
    outputs = flat.inline(closed.jaxpr, inputs, [flat.constant(c) for c in closed.consts])
    needed = set(_needed(flat.equations, outputs))
    uses = [use for use in flat.uses if use.equation in needed]
    found = [p for p in flat.products if p.equation in needed]
    # No output needs what is computed for the activations inside of a loop.
    kept = _needed(flat.equations, [*outputs, *(p.activation for p in found)])
    place = {n: i for i, n in enumerate(kept)}
    products = [p._replace(equation=place[p.equation]) for p in found]
    read = {p.weight.leaf for p in products}
    looked_up = {use.leaf for use in uses if not use.text}
    reasons: dict[int, Reason] = {}
    for leaf, path in enumerate(selection.paths):
        unreadable = [use.text for use in uses if use.leaf == leaf and use.text]
        if unreadable:
            kind = "recomputed" if leaf in flat.recomputed else "no product"
            reasons[leaf] = Reason(kind, f"{path!r} {unreadable[0]}")
        elif leaf in looked_up - read:
            reasons[leaf] = Reason("looked up", f"{path!r} is only looked up in")
        elif leaf not in read:
            text = f"the function's outputs depend on no product of {path!r} with an activation"
            reasons[leaf] = Reason("no product", text)
    return Program(
        [flat.equations[n] for n in kept],
        [places[i] for i in arrays if i < count],
        args,
        flat.constants,
        flat.known,
        flat.shapes,
        outputs,
        products,
        selection,
        reasons,
        looked_up | {p.weight.leaf for p in products if p.is_lookup},
        traced,
    )
