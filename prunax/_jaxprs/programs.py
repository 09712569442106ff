"""Jaxprs, whichever JAX release they come from.

A `ClosedJaxpr` holds a `Jaxpr` and its constants. In later releases (0.12) one type is both, by either name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,
)

from prunax import trees

__all__: list[str] = []  # for the modules of prunax


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
    leaves, treedef = jax.tree.flatten((params, args))
    arrays = [i for i, leaf in enumerate(leaves) if trees.is_array(leaf)]

    def flat(*values: Any) -> Any:
        whole = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            whole[i] = value
        params, args = treedef.unflatten(whole)
        return fn(params, *args)

    shapes = [abstract(leaves[i]) for i in arrays]
    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*shapes)
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
