"""The steps of a flat program: functions of arrays with a hashable key, equal where they compute the same."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

from prunax._jaxprs import hashing, programs

__all__ = ["Bound", "Equation", "Loop", "Pick", "Segment", "Stack"]


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
        key: Hashable; equal for equations that compute the same from the same operands.
        variables: Its operands, each once, without literals.
        results: The variables it defines, without those that are dropped.
    """

    def __init__(self, eqn: JaxprEqn) -> None:
        self.eqn = eqn
        self.variables = tuple(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
        self.results = tuple(v for v in eqn.outvars if type(v) is Var)
        self.key = hashing.equation_key(eqn)

    def __call__(self, *operands: jax.Array) -> list[jax.Array]:
        values = dict(zip(self.variables, operands, strict=True))
        given = [v.val if isinstance(v, Literal) else values[v] for v in self.eqn.invars]
        outs = zip(self.eqn.outvars, programs.bind(self.eqn, given), strict=True)
        return [out for v, out in outs if type(v) is Var]


class Equation(NamedTuple):
    """One step of a program.

    Attributes:
        operation: `Bound`, `Pick`, `Stack` or `Loop`: a function of the operands with a `key`.
        inputs: Ids of its operands.
        outputs: Ids of its results.
        pick: The index that a `Pick` takes, else 0.
    """

    operation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    pick: int = 0


class Segment:
    """Equations as a function of their inputs: hashable, equal where the structure is equal.

    Attributes:
        equations: ``(operation, input slots, output slots)``.
        known: ``(slot, scalar)`` written into the program.
        size: How many inputs it has; they take the first slots.
        outputs: The slots that it returns.
        picks: Indices of its `Pick` equations, in order. Not part of the structure.
    """

    def __init__(
        self,
        equations: Sequence[Equation],
        known: Mapping[int, Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> None:
        slots = {value: n for n, value in enumerate(inputs)}
        own: dict[int, int] = {}

        def read(value: int) -> int:
            if value not in slots and value in known:
                own[value] = slots[value] = len(slots)
            return slots[value]

        self.equations = []
        for equation in equations:
            before = tuple(map(read, equation.inputs))
            after = tuple(slots.setdefault(value, len(slots)) for value in equation.outputs)
            self.equations.append((equation.operation, before, after))
        self.outputs = tuple(map(read, outputs))
        self.known = [(slot, known[value]) for value, slot in own.items()]
        self.size = len(inputs)
        self.picks = tuple(e.pick for e in equations if isinstance(e.operation, Pick))
        self.key = (
            self.size,
            self.outputs,
            tuple((operation.key, *where) for operation, *where in self.equations),
            tuple((slot, type(value), hashing.array_key(value)) for slot, value in self.known),
        )
        self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self.key == other.key

    def __call__(self, inputs: Sequence[Any], picks: Sequence[Any]) -> list[jax.Array]:
        values: dict[int, Any] = dict(enumerate(inputs)) | dict(self.known)
        picked = iter(picks)
        for operation, before, after in self.equations:
            operands = [values[n] for n in before]
            if isinstance(operation, Pick):
                operands.append(next(picked))
            values |= dict(zip(after, operation(*operands), strict=True))
        return [jnp.asarray(values[n]) for n in self.outputs]


class Loop:
    """A scan, run for what some values of its body are in each turn.

    Attributes:
        body: What one turn computes of ``(constants, carry, slices)``: the carry after it, then the values.
        arity: How many inputs are constants, and how many are carried.
        length: How many turns.
        reverse: Whether the last slice comes first.
    """

    def __init__(self, body: Segment, arity: tuple[int, int], length: int, reverse: bool) -> None:
        self.body, self.arity, self.length, self.reverse = body, arity, length, reverse
        self.key = ("loop", body.key, body.picks, arity, length, reverse)

    def __call__(self, *operands: Any) -> list[jax.Array]:
        constants, carries = self.arity
        fixed, moving = operands[:constants], operands[constants:]

        def turn(carry: tuple[Any, ...], slices: tuple[Any, ...]) -> Any:
            out = self.body([*fixed, *carry, *slices], self.body.picks)
            return tuple(out[:carries]), tuple(out[carries:])

        start, stacked = tuple(map(jnp.asarray, moving[:carries])), tuple(moving[carries:])
        seen = jax.lax.scan(turn, start, stacked, self.length, self.reverse)[1]
        return list(seen)
