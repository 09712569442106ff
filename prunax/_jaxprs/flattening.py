"""Functions as flat lists of equations that know which values are views of which parameter.

`trace` turns ``fn(params, *args)`` into a `Program`: calls are inlined, a `scan` over a stack of weights is unrolled,
what no output needs is dropped, and every product of a weight with an activation is listed with the way from the
parameter leaf to the operand. Only JAX's public API is used.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from prunax import trees
from prunax._jaxprs import programs

__all__ = ["Equation", "Product", "Program", "View", "trace"]

PyTree = Any

# Calls that mean what their body means, as long as nobody differentiates. The parameter that holds the body.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
# Rearrange the elements of their one operand, or choose among them.
_REARRANGING = frozenset("transpose reshape squeeze expand_dims slice rev split".split())
# Change no element's place.
_NEUTRAL = frozenset(
    "convert_element_type copy copy_p reduce_precision sharding_constraint".split()
)
_PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))


class Pick:
    """The operation ``x[i]`` that unrolling a scan puts before each turn of its body."""

    key = ("pick",)

    def __call__(self, x: jax.Array, index: Any) -> list[jax.Array]:
        return [jax.lax.dynamic_index_in_dim(x, index, keepdims=False)]


class Stack:
    """The operation that gathers what each turn of an unrolled scan gave."""

    key = ("stack",)

    def __call__(self, *turns: jax.Array) -> list[jax.Array]:
        return [jnp.stack(turns)]


class Bound:
    """An equation of a jaxpr as a function of its operands.

    Attributes:
        eqn: The equation.
        owner: The jaxpr that it stands in.
        key: Hashable; equal for equations that compute the same from the same operands.
        variables: Its operands, each once, without literals.
        results: The variables it defines, without those that are dropped.
    """

    def __init__(self, eqn: JaxprEqn, owner: Jaxpr) -> None:
        self.eqn, self.owner = eqn, owner
        self.variables = tuple(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
        self.results = tuple(v for v in eqn.outvars if type(v) is Var)
        numbers: dict[Any, int] = {}
        self.key = _equation_key(eqn, numbers)

    def __call__(self, *operands: jax.Array) -> list[jax.Array]:
        # All but the source information of the owner is replaced. Evaluating a jaxpr of one equation, rather than
        # binding its primitive, leaves it to JAX what kinds of parameters the primitive takes.
        jaxpr = self.owner.replace(
            constvars=[],
            invars=list(self.variables),
            outvars=list(self.results),
            eqns=[self.eqn],
            effects=self.eqn.effects,
        )
        return jaxpr_as_fun(programs.ClosedJaxpr(jaxpr, ()))(*operands)


class Equation(NamedTuple):
    """One step of a program.

    Attributes:
        operation: `Bound`, `Pick` or `Stack`: a function of the operands with a `key`.
        inputs: Ids of its operands.
        outputs: Ids of its results.
        pick: The index that a `Pick` takes, else 0.
    """

    operation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    pick: int = 0


class View(NamedTuple):
    """A value that is made of the elements of one parameter leaf, each at most once, and nothing else.

    Attributes:
        leaf: Which of the selected leaves, an index.
        picks: Indices taken along leading axes first: the layer of a stack.
        steps: Rearrangements of what was picked, in order; conversions left out.
    """

    leaf: int
    picks: tuple[int, ...] = ()
    steps: tuple["Step", ...] = ()

    def rearrange(self, x: jax.Array) -> jax.Array:
        """Go the way of the view with any array of the shape that was picked."""
        for step in self.steps:
            x = step(x)
        return x


class Step:
    """One rearrangement on the way from a leaf to a view of it. Hashable, so that equal ways are compiled once."""

    def __init__(self, operation: Any, *arguments: int, output: int = 0) -> None:
        self.operation, self.arguments, self.output = operation, arguments, output
        self.key = (operation.key, arguments, output)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.operation(x, *self.arguments)[self.output]

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.key == other.key


class Product(NamedTuple):
    """A product of a view of a selected leaf with an activation.

    Attributes:
        equation: Its place in the program.
        operand: Which operand is the weight, 0 or 1.
        view: What the weight is a view of.
        name: ``path`` of the leaf, with what was picked: ``layers/kernel[3]``.
    """

    equation: int
    operand: int
    view: View
    name: str


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
        views: Values that are views of selected leaves, by id.
        products: Products of selected leaves, in order.
        selection: The selected leaves.
    """

    equations: list[Equation]
    params: list[int]
    args: list[int]
    constants: dict[int, Any]
    known: dict[int, Any]
    shapes: dict[int, jax.ShapeDtypeStruct]
    outputs: list[int]
    views: dict[int, View]
    products: list[Product]
    selection: trees.Selection


def trace(
    fn: Callable[..., Any], params: PyTree, *args: Any, where: trees.Where = trees.is_kernel
) -> Program:
    """Trace a function and find the products of its weights.

    Args:
        fn: ``fn(params, *args)``, of any framework, with no side effects that matter.
        params: Pytree of arrays; other leaves are passed on as they are.
        args: Pytrees of arrays, or of anything with a shape and a dtype.
        where: ``where(path, leaf) -> bool`` chooses the leaves whose products are wanted.

    Returns:
        The `Program`. Views are followed through transpose, reshape, slices, conversions, `jit`, custom derivatives,
        `jax.checkpoint`, the branch of a `cond` that is known, and `scan`. Lookups in a selected leaf (embeddings) are
        ignored: a leaf that is only looked up in has no products.

    Raises:
        ValueError: If nothing is selected, or a selected leaf is used in no product, or in a way that cannot be read.
            The message names the path.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
        >>> program = prunax._jaxprs.trace(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 4)))
        >>> [product.name for product in program.products]
        ['kernel']
    """
    selection = trees.select(params, where)
    if not selection.indices:
        raise ValueError(
            f"trace: `where` selects no leaf. The leaves are: {', '.join(trees.paths(params)) or 'none'}. "
            f"Pass where=lambda path, leaf: ... that is true for the ones to prune."
        )

    def on_arrays(params: PyTree, *args: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(fn(params, *args)) if trees.is_array(x)]

    closed, _, arrays, _ = programs.traced(on_arrays, params, args)
    count = len(jax.tree.leaves(params))
    flat = _Flattener(selection)
    inputs = [flat.value(v) for v in closed.jaxpr.invars]
    places = dict(zip(arrays, inputs, strict=True))
    for n, i in enumerate(selection.indices):
        flat.views[places[i]] = View(n)
    outputs = flat.inline(closed.jaxpr, inputs, [flat.constant(c) for c in closed.consts])
    return _finish(
        flat,
        [places[i] for i in arrays if i < count],
        [places[i] for i in arrays if i >= count],
        outputs,
    )


class _Use(NamedTuple):
    """A use of a view that is no product: a lookup, or one that cannot be read."""

    equation: int
    leaf: int
    primitive: str


class _Flattener:
    """Collects equations while walking a jaxpr and those inside it."""

    def __init__(self, selection: trees.Selection) -> None:
        self.selection = selection
        self.equations: list[Equation] = []
        self.shapes: dict[int, jax.ShapeDtypeStruct] = {}
        self.constants: dict[int, Any] = {}
        self.known: dict[int, Any] = {}
        self.views: dict[int, View] = {}
        self.products: list[Product] = []
        self.uses: list[_Use] = []
        self.bound: dict[int, Bound] = {}

    def value(self, like: Any) -> int:
        """A new id for a value of the shape of a variable or an array."""
        aval = getattr(like, "aval", like)
        self.shapes[len(self.shapes)] = jax.ShapeDtypeStruct(np.shape(aval), aval.dtype)
        return len(self.shapes) - 1

    def constant(self, array: Any) -> int:
        new = self.value(array if trees.is_array(array) else np.asarray(array))
        self.constants[new] = array
        return new

    def literal(self, literal: Literal) -> int:
        new = self.value(literal)
        self.known[new] = literal.val
        return new

    def inline(self, jaxpr: Jaxpr, inputs: Sequence[int], consts: Sequence[int]) -> list[int]:
        """Add the equations of a jaxpr. Returns the ids of its results."""
        ids: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        ids |= dict(zip(jaxpr.constvars, consts, strict=True))

        def read(v: Any) -> int:
            return self.literal(v) if isinstance(v, Literal) else ids[v]

        for eqn in jaxpr.eqns:
            results = self.add(eqn, [read(v) for v in eqn.invars], jaxpr)
            ids |= dict(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def add(self, eqn: JaxprEqn, inputs: list[int], owner: Jaxpr) -> list[int]:
        """Add one equation, or those inside it. Returns the ids of its results, one for each of its `outvars`."""
        name = eqn.primitive.name
        if name in _CALLS:
            return self.inline_closed(eqn.params[_CALLS[name]], inputs)
        viewed = [i for i in inputs if i in self.views]
        if name == "cond" and inputs[0] in self.known:
            branches = eqn.params["branches"]
            branch = min(max(int(self.known[inputs[0]]), 0), len(branches) - 1)
            return self.inline_closed(branches[branch], inputs[1:])
        if name == "scan" and viewed:
            return self.unroll(eqn, inputs)
        # A scan's body that is unrolled comes by here once a turn, with the same equations.
        if id(eqn) not in self.bound:
            self.bound[id(eqn)] = Bound(eqn, owner)
        operation = self.bound[id(eqn)]
        outputs = {v: self.value(v) for v in operation.results}
        variables = [n for n, v in enumerate(eqn.invars) if not isinstance(v, Literal)]
        operands = {eqn.invars[n]: inputs[n] for n in variables}
        ids = tuple(operands[v] for v in operation.variables)
        if _is_counting(eqn) and all(i in self.known for i in inputs):
            # Which branch of a switch is taken may take some arithmetic.
            results = operation(*(self.known[i] for i in ids))
            self.known |= zip(outputs.values(), map(np.asarray, results), strict=True)
            return list(outputs.values())
        if viewed:
            self.follow(operation, inputs, list(outputs.values()))
        self.equations.append(Equation(operation, ids, tuple(outputs.values())))
        return [outputs.get(v, -1) for v in eqn.outvars]

    def inline_closed(self, body: programs.ClosedJaxpr | Jaxpr, inputs: Sequence[int]) -> list[int]:
        closed = [self.constant(c) for c in programs.constants(body)]
        return self.inline(programs.opened(body), inputs, closed)

    def unroll(self, eqn: JaxprEqn, inputs: list[int]) -> list[int]:
        """Add the body of a scan once for each turn, each with its slice of the stacked weights."""
        constants, carries = scan_arity(eqn)
        body: programs.ClosedJaxpr = eqn.params["jaxpr"]
        length = eqn.params["length"]
        carry = inputs[constants : constants + carries]
        stacked = inputs[constants + carries :]
        closed = [self.constant(c) for c in body.consts]
        turns: dict[int, list[int]] = {}
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            slices = [self.pick(x, i) for x in stacked]
            results = self.inline(body.jaxpr, [*inputs[:constants], *carry, *slices], closed)
            carry, turns[i] = results[:carries], results[carries:]
        outputs = []
        for n, v in enumerate(eqn.outvars[carries:]):
            outputs.append(self.value(v))
            gathered = tuple(turns[i][n] for i in range(length))
            self.note_uses(gathered, "scan")
            self.equations.append(Equation(Stack(), gathered, (outputs[-1],)))
        return [*carry, *outputs]

    def pick(self, stacked: int, index: int) -> int:
        shape = self.shapes[stacked]
        new = self.value(jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype))
        self.equations.append(Equation(Pick(), (stacked,), (new,), index))
        view = self.views.get(stacked)
        if view is not None and not view.steps:
            self.views[new] = view._replace(picks=(*view.picks, index))
        elif view is not None:
            self.views[new] = view._replace(steps=(*view.steps, Step(Pick(), index)))
        return new

    def follow(self, operation: Bound, inputs: list[int], outputs: list[int]) -> None:
        """Note what an equation makes of the views among its operands."""
        eqn, name = operation.eqn, operation.eqn.primitive.name
        view = self.views.get(inputs[0])
        if view is not None and len(operation.variables) > 1:
            view = None  # other operands have a say
        if (
            view is not None
            and name in _NEUTRAL
            and jnp.issubdtype(_aval(eqn.outvars[0]).dtype, jnp.floating)
        ):
            self.views[outputs[0]] = view
        elif view is not None and _rearranges(eqn):
            results = [v for v in eqn.outvars if type(v) is Var]
            for output, v in zip(outputs, results, strict=True):
                step = Step(operation, output=operation.results.index(v))
                self.views[output] = view._replace(steps=(*view.steps, step))
        elif (
            name in _PRODUCTS
            and len(weights := [n for n in (0, 1) if inputs[n] in self.views]) == 1
        ):
            view = self.views[inputs[weights[0]]]
            picked = "".join(f"[{i}]" for i in view.picks)
            path = self.selection.paths[view.leaf] + picked
            self.products.append(Product(len(self.equations), weights[0], view, path))
        else:
            self.note_uses(inputs, name)

    def note_uses(self, inputs: Sequence[int], primitive: str) -> None:
        leaves = {self.views[i].leaf for i in inputs if i in self.views}
        self.uses += [_Use(len(self.equations), leaf, primitive) for leaf in sorted(leaves)]


def _is_counting(eqn: JaxprEqn) -> bool:
    """Whether an equation makes nothing but whole numbers and truth values."""
    return not eqn.effects and all(
        _aval(v).shape == () and _aval(v).dtype in (np.dtype(np.int32), np.dtype(bool))
        for v in eqn.outvars
    )


def _aval(v: Any) -> Any:
    return v.aval


def _rearranges(eqn: JaxprEqn) -> bool:
    name, size = eqn.primitive.name, _aval(eqn.invars[0]).size
    if name == "broadcast_in_dim":
        return _aval(eqn.outvars[0]).size == size  # only axes of length 1 come in
    if name == "dynamic_slice":
        return True  # the starts are literals: the operand is the only variable
    return name in _REARRANGING


def _finish(flat: _Flattener, params: list[int], args: list[int], outputs: list[int]) -> Program:
    """Drop what no output needs, then refuse what is left of views that cannot be read."""
    needed, kept = set(outputs), []
    for n in reversed(range(len(flat.equations))):
        if needed.intersection(flat.equations[n].outputs):
            needed.update(flat.equations[n].inputs)
            kept.append(n)
    kept.reverse()
    place = {n: i for i, n in enumerate(kept)}
    products = [
        p._replace(equation=place[p.equation]) for p in flat.products if p.equation in place
    ]
    paths = flat.selection.paths
    read = {p.view.leaf for p in products}
    uses = [use for use in flat.uses if use.equation in place]
    looked_up = {use.leaf for use in uses if use.primitive == "gather"}
    for use in uses:
        if use.primitive != "gather":
            raise ValueError(
                f"trace: {paths[use.leaf]!r} is used by `{use.primitive}`, where it cannot be seen which inputs meet "
                f"its weights. Leave the leaf out with `where`."
            )
    for leaf, path in enumerate(paths):
        if leaf not in read | looked_up:
            raise ValueError(
                f"trace: the function's outputs depend on no product of {path!r} with an activation. "
                f"Leave the leaf out with `where`, or calibrate a function that uses it."
            )
    equations = [flat.equations[n] for n in kept]
    return Program(
        equations,
        params,
        args,
        flat.constants,
        flat.known,
        flat.shapes,
        outputs,
        flat.views,
        products,
        flat.selection,
    )


class _Identity:
    """Equal to itself only, and keeps the object alive, so that its id is not given to another."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __hash__(self) -> int:
        return id(self.item)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.item is other.item


def _equation_key(eqn: JaxprEqn, numbers: dict[Any, int]) -> Any:
    """What an equation computes, as a hashable value. Variables count by the order in which they appear."""
    operands = tuple(
        _key(v) if isinstance(v, Literal) else numbers.setdefault(v, len(numbers))
        for v in eqn.invars
    )
    results = tuple(
        (
            numbers.setdefault(v, len(numbers)) if type(v) is Var else -1,
            _aval(v).shape,
            _aval(v).dtype,
        )
        for v in eqn.outvars
    )
    name = eqn.primitive.name
    if name in _CALLS:  # rules for derivatives, fresh functions in every trace, do not count
        params = _key(eqn.params[_CALLS[name]])
    else:
        params = tuple((k, _key(v)) for k, v in sorted(eqn.params.items()))
    return eqn.primitive, operands, results, params


def _key(item: Any) -> Any:
    if programs.is_program(item):
        closed = tuple(_Identity(c) for c in programs.constants(item))
        item = programs.opened(item)
        numbers: dict[Any, int] = {}
        inputs = [numbers.setdefault(v, len(numbers)) for v in (*item.constvars, *item.invars)]
        body = tuple(_equation_key(eqn, numbers) for eqn in item.eqns)
        outputs = tuple(_key(v) if isinstance(v, Literal) else numbers[v] for v in item.outvars)
        return "jaxpr", len(inputs), closed, body, outputs
    if isinstance(item, Literal):
        value = np.asarray(item.val)
        return "literal", value.dtype, value.shape, value.tobytes()
    if isinstance(item, tuple | list):
        return type(item), tuple(map(_key, item))
    if isinstance(item, dict):
        return "dict", tuple((k, _key(v)) for k, v in sorted(item.items(), key=repr))
    if isinstance(item, float):
        return "float", repr(item)  # 0.0 == -0.0
    try:
        hash(item)
    except TypeError:
        return _Identity(item)
    return type(item), item


def scan_arity(eqn: JaxprEqn) -> tuple[int, int]:
    """How many inputs of a `scan` equation are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    constants, carries, _ = eqn.params["ft_in"].unpack()  # JAX 0.12 and later
    return len(constants), len(carries)
