"""Jaxprs, whichever JAX release they come from.

A `ClosedJaxpr` holds a `Jaxpr` and its constants. In later releases (0.12) one type is both, by either name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxpr_as_fun,
)

from prunax import trees

__all__: list[str] = []  # for the modules of prunax


# Equations that mean what the program in one of their parameters means, as long as nobody differentiates.
CALLS = frozenset(
    """
    jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    custom_vmap_call composite
    """.split()
)
# Those among them that mean it under differentiation as well.
PLAIN_CALLS = frozenset(name for name in CALLS if not name.startswith("custom_"))


def aval(var: Any) -> Any:
    """Shape and dtype of a variable or literal."""
    return var.aval


def called(eqn: JaxprEqn) -> ClosedJaxpr:
    """The program that an equation of `CALLS` calls."""
    names = (name for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if name in eqn.params)
    jaxpr = eqn.params[next(names)]
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluate one equation, as it stands, on its operands. A result for each of its `outvars`."""
    inner = [p for p in jax.tree.leaves(list(eqn.params.values())) if is_program(p)]
    if not inner:
        out = eqn.primitive.bind(*operands, **eqn.params)
        return out if eqn.primitive.multiple_results else [out]
    # What has programs inside is bound by JAX itself, as the one equation of a program.
    given = list(zip(eqn.invars, operands, strict=True))
    values = {var: x for var, x in given if not isinstance(var, Literal)}
    outvars = [Var(var.aval) for var in eqn.outvars]  # a result that is not used has no name
    program = opened(inner[0]).replace(
        constvars=[],
        invars=list(values),
        outvars=outvars,
        eqns=[eqn.replace(outvars=outvars)],
        effects=eqn.effects,
    )
    return jaxpr_as_fun(ClosedJaxpr(program, ()))(*values.values())


def scan_arity(eqn: JaxprEqn) -> tuple[int, int]:
    """How many inputs of a `scan` equation are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    constants, carries, _ = eqn.params["ft_in"].unpack()  # JAX 0.12 and later
    return len(constants), len(carries)


def is_program(item: Any) -> TypeGuard[ClosedJaxpr | Jaxpr]:
    """Whether an equation's parameter is a jaxpr, closed or not."""
    return isinstance(item, ClosedJaxpr | Jaxpr)


class Traced(NamedTuple):
    """A function of params and other arguments as a jaxpr of the arrays among them.

    Attributes:
        jaxpr: Its inputs are the arrays, in order.
        out: What the function returns, abstract.
        arrays: Where the arrays are among the leaves of ``(params, args)``.
        shapes: Of each array.
    """

    jaxpr: ClosedJaxpr
    out: Any
    arrays: list[int]
    shapes: list[jax.ShapeDtypeStruct]


def traced(fn: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Traced:
    """Trace ``fn(params, *args)``. Leaves that are not arrays are taken as they are."""
    trees.check_function(fn)
    leaves, treedef = jax.tree.flatten((params, args))
    arrays = [i for i, leaf in enumerate(leaves) if trees.is_array(leaf)]

    def flat(*values: Any) -> Any:
        whole = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            whole[i] = value
        params, args = treedef.unflatten(whole)
        return fn(params, *args)

    shapes = [abstract(leaves[i]) for i in arrays]
    try:
        jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*shapes)
    except Exception as error:
        if type(error).__name__ == "TraceContextError":  # of Flax, which need not be installed
            error.add_note(
                "prunax: the function changes a module that was made outside of it, as batch statistics and dropout's "
                "keys are changed in training. Call model.eval() before nnx.split, and nnx.merge inside the function."
            )
        raise
    return Traced(jaxpr, out, arrays, shapes)


def abstract(array: Any) -> jax.ShapeDtypeStruct:
    """What an array is to a trace: an int64 one of numpy counts as int32 where 64 bits are off."""
    dtype = array.dtype
    if not jnp.issubdtype(dtype, jax.dtypes.extended):  # keys of random numbers are
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(array.shape, dtype)


def opened(program: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The jaxpr without its constants' values."""
    if isinstance(program, Jaxpr):  # pyright: ignore[reportUnnecessaryIsInstance] - not always, before 0.12
        return program
    return program.jaxpr


def constants(program: ClosedJaxpr | Jaxpr) -> tuple[Any, ...]:
    """The constants' values, in the order of `constvars`; none of a jaxpr that is not closed."""
    return tuple(getattr(program, "consts", ()))
