"""What can be known of any optimizer, with nothing asked of its class.

Its state is read by paths: an array whose path ends like that of a parameter, and whose shape is the parameter's, holds
one number for each of its weights. Its functions are read as programs: a part of the state that `init` hands on
unchanged is a copy of the params, and a parameter whose update is zero whatever the gradients are is frozen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,
    JaxprEqn,
    Literal,
)

from prunax import trees
from prunax._jaxprs import programs

__all__: list[str] = []  # for the modules of prunax

PyTree = Any
Place = tuple[str, ...]

ZERO = "zero"  # what is known of a value: zeros, the number of the input that it is, or None for nothing
_MOVES = frozenset(
    "broadcast_in_dim convert_element_type copy copy_p device_put mesh_cast optimization_barrier pvary reshape reshard "
    "sharding_constraint".split()
)
_KEEPS_ZERO = frozenset(
    "abs concatenate dynamic_slice expand_dims neg pad reduce_sum rev sign slice squeeze transpose".split()
)


def model_of(params: PyTree) -> PyTree:
    """The part of an optimizer's params that gradients belong to: of Lookahead's two copies the fast one."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def map_copies(function: Callable[..., PyTree], params: PyTree, *rest: PyTree) -> PyTree:
    """Map over an optimizer's params, and trees like them, copy by copy."""
    if not isinstance(params, optax.LookaheadParams):
        return function(params, *rest)
    return optax.LookaheadParams(*map(function, params, *rest))


def weights_of(state: PyTree, model: PyTree) -> dict[Place, Place]:
    """Say whose weights the arrays of an optimizer's state have one number each for.

    A part of the state is like the model if each of its leaves has the path of a parameter in it. Parts without some
    of the parameters (`optax.MaskedNode`, None) are as good as whole ones.

    Returns:
        From a leaf's place in the state to the place of the parameter (`trees.places`). Arrays of other shapes,
        factored and per-layer statistics, are not in it: nothing in them belongs to one weight.
    """
    known, leaves = _placed(model), _placed(state)
    found: dict[Place, Place] = {}

    def visit(places: Sequence[Place], depth: int) -> None:
        if all(place[depth:] in known for place in places):
            for place in places:
                leaf = known[place[depth:]]
                if trees.is_array(leaf) and np.shape(leaves[place]) == leaf.shape:
                    found[place] = place[depth:]
            return
        parts: dict[str, list[Place]] = {}
        for place in places:
            if place[depth:]:
                parts.setdefault(place[depth], []).append(place)
        for part in parts.values():
            visit(part, depth + 1)

    visit(list(leaves), 0)
    return found


def copies(init: Callable[[PyTree], PyTree], params: PyTree) -> set[Place]:
    """Find the parts of the state that `init` makes which are the params themselves, and not statistics about them.

    Returns:
        Their places in the state.
    """
    program = programs.traced(lambda params: init(params), params, ())
    places = trees.places(model_of(params))
    weights = weights_of(program.out, model_of(params))
    return {
        place
        for place, value in zip(trees.places(program.out), _outputs(program.jaxpr), strict=True)
        if isinstance(value, int) and weights.get(place) in places[program.arrays[value] :][:1]
    }


def frozen(update: Callable[..., Any], state: PyTree, params: PyTree) -> set[str]:
    """Find the parameters that an optimizer never moves: their updates are zero for any gradients, or missing.

    Args:
        update: ``update(updates, state, params)`` of the optimizer.
        state: The optimizer's state.
        params: The params.

    Returns:
        Their paths. None are known of an optimizer whose `update` needs extra arguments.
    """

    def emitted(params: PyTree, updates: PyTree, state: PyTree) -> PyTree:
        new_updates = update(updates, state, params)[0]
        return model_of(new_updates)

    model = model_of(params)
    try:
        program = programs.traced(emitted, params, (model, state))
    except Exception:  # whatever the optimizer raises: it will say so itself when it is used
        return set()
    outputs = zip(trees.paths(program.out), _outputs(program.jaxpr), strict=True)
    return set(trees.paths(model)) - {path for path, value in outputs if value != ZERO}


def _placed(tree: PyTree) -> dict[Place, Any]:
    return dict(zip(trees.places(tree), jax.tree.leaves(tree), strict=True))


def _outputs(program: ClosedJaxpr | Jaxpr, inputs: Sequence[Any] | None = None) -> list[Any]:
    """What is known of each output: `ZERO`, the number of an input that it equals, or None."""
    jaxpr = programs.opened(program)
    known: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return ZERO if np.ndim(atom.val) == 0 and atom.val == 0 else None
        return known.get(atom)

    given = range(len(jaxpr.invars)) if inputs is None else inputs
    known.update(zip(jaxpr.invars, given, strict=True))
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _through(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _through(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    inside = [p for p in eqn.params.values() if programs.is_program(p)]
    nothing = [None] * len(eqn.outvars)
    if name == "cond":
        branches = [_outputs(branch, values[1:]) for branch in eqn.params["branches"]]
        return [_agreed(outs) for outs in zip(*branches, strict=True)]
    if inside:
        called = programs.opened(inside[0])
        fits = len(called.invars) == len(values) and len(called.outvars) == len(eqn.outvars)
        fits = fits and len(inside) == 1 and name not in ("scan", "while")
        return _outputs(inside[0], values) if fits else nothing
    if len(eqn.outvars) != 1:
        return nothing
    shape = eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if name == "select_n":
        return [_agreed(values[1:])]
    if name in _MOVES:
        same = getattr(eqn.invars[0].aval, "shape", None) == shape
        return [values[0] if same or values[0] == ZERO else None]
    if name in _KEEPS_ZERO or name in ("add", "sub"):
        return [ZERO if all(v == ZERO for v in values) else None]
    if name == "mul":
        # Zeros in place of gradients, not a rate of 0.0, which is an optimizer at rest and freezes nothing.
        zeros = [
            v == ZERO and not isinstance(a, Literal) and a.aval.shape == shape  # pyright: ignore[reportAttributeAccessIssue]
            for v, a in zip(values, eqn.invars, strict=True)
        ]
        return [ZERO if any(zeros) else None]
    return nothing


def _agreed(values: Sequence[Any]) -> Any:
    return values[0] if all(v == values[0] for v in values) else None
