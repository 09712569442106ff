"""Numbers that a program multiplies arrays by, as far as they are known when it is traced."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from prunax import trees
from prunax._jaxprs import programs
from prunax.structured._walk import Trace, shape_of

__all__: list[str] = []

_SCALAR: dict[str, Callable[..., Any]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "mul": np.multiply,
    "div": np.divide,
    "convert_element_type": lambda x: x,
    "broadcast_in_dim": lambda x: x,
    "copy": lambda x: x,
    "neg": np.negative,
}


def multipliers(trace: Trace) -> set[float]:
    """The numbers by which a program multiplies or divides arrays."""
    found: set[float] = set()
    _run(trace, [None] * len(trace.jaxpr.jaxpr.invars), found)
    return found


def has_root(numbers: Iterable[float], size: int) -> bool:
    """Whether a square root of a size is among numbers, or its own root (once for each factor), or the inverse."""
    roots = [size**power for power in (0.5, -0.5, 0.25, -0.25)]
    return any(math.isclose(abs(x), root, rel_tol=1e-3) for x in numbers for root in roots)


def _run(trace: Trace, ins: Sequence[float | None], found: set[float]) -> list[float | None]:
    known: dict[Any, float | None] = dict(zip(trace.jaxpr.jaxpr.invars, ins, strict=True))
    for var, x in zip(trace.jaxpr.jaxpr.constvars, trace.jaxpr.consts, strict=True):
        known[var] = float(x) if _is_number(x) and np.isrealobj(x) else None

    def read(var: Any) -> float | None:
        if isinstance(var, Literal):
            return float(var.val) if _is_number(var.val) else None
        return known.get(var)

    for step in trace.steps:
        eqn, name = step.eqn, step.eqn.primitive.name
        values = [read(var) for var in eqn.invars]
        if name in programs.CALLS:
            known.update(zip(eqn.outvars, _run(step.inner[0], values, found), strict=True))
            continue
        for inner in step.inner:
            # Operands of a loop may change from turn to turn.
            _run(inner, [None] * len(inner.jaxpr.jaxpr.invars), found)
        if name in _SCALAR and None not in values:
            with np.errstate(all="ignore"):
                known[eqn.outvars[0]] = float(_SCALAR[name](*values))
        elif name in ("mul", "div") and shape_of(eqn.outvars[0]):
            found.update(x for x in values if x is not None)
    return [read(var) for var in trace.jaxpr.jaxpr.outvars]


def _is_number(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return isinstance(x, int | float) or (
        not trees.is_traced(x)
        and np.ndim(x) == 0
        and dtype is not None
        and np.issubdtype(np.dtype(dtype), np.number)
    )
