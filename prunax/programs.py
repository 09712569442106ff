"""Jaxprs, whichever JAX release they come from.

A `ClosedJaxpr` holds a `Jaxpr` and its constants. In later releases (0.12) one type is both, by either name.
"""

from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,
)

__all__: list[str] = []  # for the modules of prunax


def is_program(item: Any) -> TypeGuard[ClosedJaxpr | Jaxpr]:
    """Whether an equation's parameter is a jaxpr, closed or not."""
    return isinstance(item, ClosedJaxpr | Jaxpr)


def abstract(array: Any) -> jax.ShapeDtypeStruct:
    """What an array is to a trace: an int64 one of numpy counts as int32 where 64 bits are off."""
    dtype = array.dtype
    if not jnp.issubdtype(dtype, jax.dtypes.extended):  # keys of random numbers are
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(array.shape, dtype)


def opened(program: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The jaxpr without its constants' values."""
    return program if isinstance(program, Jaxpr) else program.jaxpr


def constants(program: ClosedJaxpr | Jaxpr) -> tuple[Any, ...]:
    """The constants' values, in the order of `constvars`; none of a jaxpr that is not closed."""
    return tuple(getattr(program, "consts", ()))
