"""What equations compute, as hashable values: equal structure, equal key."""

from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from prunax._jaxprs import programs

__all__: list[str] = []  # for the modules of prunax


class Identity:
    """Equal to itself only, and keeps the object alive, so that its id is not given to another."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __hash__(self) -> int:
        return id(self.item)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.item is other.item


def equation_key(eqn: JaxprEqn) -> Any:
    """What an equation computes, whatever its variables are called."""
    return _equation_key(eqn, {})


def array_key(value: Any) -> Any:
    """What an array holds."""
    array = np.asarray(value)
    return array.dtype, array.shape, array.tobytes()


def _equation_key(eqn: JaxprEqn, numbers: dict[Any, int]) -> Any:
    """Variables count by the order in which they appear."""
    operands = tuple(
        _key(v) if isinstance(v, Literal) else numbers.setdefault(v, len(numbers))
        for v in eqn.invars
    )
    results = tuple(
        (
            numbers.setdefault(v, len(numbers)) if type(v) is Var else -1,
            programs.aval(v).shape,
            programs.aval(v).dtype,
        )
        for v in eqn.outvars
    )
    if eqn.primitive.name in programs.CALLS:
        # Rules for derivatives, fresh functions in every trace, do not count.
        params = _key(programs.called(eqn))
    else:
        params = tuple((k, _key(v)) for k, v in sorted(eqn.params.items()))
    return eqn.primitive, operands, results, params


def _key(item: Any) -> Any:
    if programs.is_program(item):
        closed = tuple(Identity(c) for c in programs.constants(item))
        item = programs.opened(item)
        numbers: dict[Any, int] = {}
        inputs = [numbers.setdefault(v, len(numbers)) for v in (*item.constvars, *item.invars)]
        body = tuple(_equation_key(eqn, numbers) for eqn in item.eqns)
        outputs = tuple(_key(v) if isinstance(v, Literal) else numbers[v] for v in item.outvars)
        return "jaxpr", len(inputs), closed, body, outputs
    if isinstance(item, Literal):
        return "literal", array_key(item.val)
    if isinstance(item, tuple | list):
        return type(item), tuple(map(_key, item))
    if isinstance(item, dict):
        return "dict", tuple((k, _key(v)) for k, v in sorted(item.items(), key=repr))
    if isinstance(item, float):
        return "float", repr(item)  # 0.0 == -0.0
    try:
        hash(item)
    except TypeError:
        return Identity(item)
    return type(item), item
