"""What an operand of a product is in terms of a parameter leaf: linear maps that move elements, and may scale them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from prunax._jaxprs import hashing, programs

__all__ = ["LinearMap", "Operand", "places"]

# Rearrange the elements of their first operand, or choose among them; what else they take says how.
REARRANGING = frozenset(
    "transpose reshape squeeze expand_dims slice rev split unstack dynamic_slice gather".split()
)
CHOOSING = frozenset("slice split unstack dynamic_slice gather".split())
# Change no element's place.
NEUTRAL = frozenset(
    """
    convert_element_type copy copy_p reduce_precision sharding_constraint reshard mesh_cast layout_constraint
    device_put optimization_barrier pvary pcast neg
    """.split()
)
JOINING = frozenset(("concatenate", "stack"))


class LinearMap:
    """One step on the way from a leaf to an operand. Hashable, so that equal ways are compiled once.

    Attributes:
        key: Hashable; equal for equal maps.
        partial: Whether elements may be lost, repeated, or have zeros put among them.
        scales: Whether it moves nothing, but multiplies elements by constants.
    """

    def __init__(
        self,
        key: Any,
        function: Callable[[Any], Any],
        *,
        partial: bool = False,
        scales: bool = False,
    ) -> None:
        self.key, self.function, self.partial, self.scales = key, function, partial, scales
        self._hash = hash(key)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinearMap) and self.key == other.key


class Operand(NamedTuple):
    """What a value is in terms of one parameter leaf: a linear map of it that moves elements, and may scale them.

    Attributes:
        leaf: Which of the selected leaves, an index.
        picks: Indices taken along leading axes first: the layer of a stack.
        maps: What was done with what was picked, in order. Conversions and scalar factors are left out.
    """

    leaf: int
    picks: tuple[int, ...] = ()
    maps: tuple[LinearMap, ...] = ()

    def apply(self, x: jax.Array, *, scaled: bool = False) -> jax.Array:
        """Go the way with any array of the shape that was picked; zeros stand where other values do."""
        for step in self.maps:
            x = step(x) if scaled or not step.scales else x
        return x

    @property
    def scales(self) -> bool:
        """Whether elements are multiplied by constants that differ."""
        return any(step.scales for step in self.maps)

    @property
    def partial(self) -> bool:
        """Whether the value may hold other things than the leaf's elements, or not all that was picked."""
        return any(step.partial for step in self.maps)

    def then(self, step: LinearMap) -> "Operand":
        return self._replace(maps=(*self.maps, step))


def maps_of(
    eqn: JaxprEqn, place: int, others: Callable[[], Sequence[Any]]
) -> Sequence[LinearMap | None] | None:
    """What an equation does to the operand in one place, where the other operands are constants.

    Args:
        eqn: The equation.
        place: Which operand.
        others: Gives the values of the other operands, in order.

    Returns:
        A map for each result, None where elements stay as they are, but for a common factor. Nothing at all, if the
        equation is no linear map that can be followed.
    """
    name = eqn.primitive.name
    out, weight = programs.aval(eqn.outvars[0]), programs.aval(eqn.invars[place])
    if name in ("mul", "div") and out.shape == weight.shape and not (name == "div" and place):
        factor = np.asarray(others()[0])
        if not np.all(np.isfinite(factor)) or (name == "div" and not np.all(factor)):
            return None
        factor = 1 / factor if name == "div" else factor
        return [None if _is_uniform(factor) else _scale(factor, out.shape)]
    if name == "select_n" and place and out.shape == weight.shape and weight.size:
        which, *rest = map(np.asarray, others())
        if len(rest) != 1 or rest[0].any():
            return None
        return [_scale((which == place - 1).astype(np.float32), out.shape)]
    if place:
        return None
    if name in NEUTRAL:
        one = len(eqn.outvars) == 1 and jnp.issubdtype(out.dtype, jnp.floating)
        return [None] if one else None
    if name == "pad":
        return [_pad(tuple(eqn.params["padding_config"]))]
    expands = name == "broadcast_in_dim" and out.size == weight.size
    if not expands and name not in REARRANGING:
        return None
    numbers = others()
    key = (hashing.equation_key(eqn), *map(hashing.array_key, numbers))

    def moved(x: jax.Array, n: int) -> jax.Array:
        return programs.bind(eqn, [x, *numbers])[n]

    return [
        LinearMap((key, n), lambda x, n=n: moved(x, n), partial=name == "gather")
        for n in range(len(eqn.outvars))
    ]


def joined(eqn: JaxprEqn) -> list[LinearMap]:
    """What becomes of each operand of an equation that puts several side by side: zeros stand in the others' places."""
    stacks = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if stacks else "dimension"]
    whole, maps, start = programs.aval(eqn.outvars[0]).shape, list[LinearMap](), 0
    for v in eqn.invars:
        stop = start + (1 if stacks else programs.aval(v).shape[axis])
        config = [(0, 0, 0)] * len(whole)
        config[axis] = (start, whole[axis] - stop, 0)
        maps.append(_pad(tuple(config), axis if stacks else None))
        start = stop
    return maps


def pick(index: int) -> LinearMap:
    """One index of the leading axis."""
    return LinearMap(("pick", index), lambda x: x[index])


def places(operand: Operand, shape: tuple[int, ...]) -> np.ndarray:
    """Where the elements of an operand come from, counted from 1 in what was picked of the leaf, 0 for elsewhere."""
    with jax.ensure_compile_time_eval():
        index = jnp.arange(1, math.prod(shape) + 1, dtype=jnp.int32).reshape(shape)
        return np.asarray(operand.apply(index))


def _pad(config: tuple[tuple[int, int, int], ...], new_axis: int | None = None) -> LinearMap:
    """The map that puts zeros around, perhaps along a new axis."""

    def padded(x: jax.Array) -> jax.Array:
        x = x if new_axis is None else jnp.expand_dims(x, new_axis)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), config)

    return LinearMap(("pad", config, new_axis), padded, partial=True)


def _scale(factor: np.ndarray, shape: tuple[int, ...]) -> LinearMap:
    factor = np.broadcast_to(factor, shape)
    key = ("scale", hashing.array_key(factor))
    return LinearMap(key, lambda x: x * factor.astype(x.dtype), scales=True)


def _is_uniform(factor: np.ndarray) -> bool:
    return factor.size > 0 and factor.flat[0] != 0 and bool(np.all(factor == factor.flat[0]))
