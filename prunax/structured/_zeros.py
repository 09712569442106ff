"""Follow the removed units through the program: is what they leave behind zero wherever it is added up?

With all weights of some units at zero, their activations are zero until something adds to them (a sigmoid, an
exponential). Where a product with weights, or a sum, then runs over the units, a zero adds nothing, and removing the
units changes nothing. Anything else that is left of them does.

What isn't known to be zero counts as not zero, so that a group may be called changed that isn't, never the other way.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from prunax._jaxprs import programs
from prunax.structured import _axes
from prunax.structured._axes import Axis
from prunax.structured._rules import (
    ALONG_AXIS,
    COLLECTIVES,
    REDUCTIONS,
    SCATTERS,
    WINDOWS,
    choosing_axis,
    solve_operands,
    while_operands,
)
from prunax.structured._walk import Step, Trace, source_line

__all__: list[str] = []

# f(0) = 0, and what only moves elements about. Where the rule is of the first operand, others are indices and the like.
KEEPS = frozenset(
    """
    abs asin asinh atan atanh broadcast_in_dim ceil conj convert_element_type copy copy_p cumsum cumprod cummax cummin
    device_put dynamic_slice erf expand_dims expm1 fft floor gather imag integer_pow layout_constraint log1p name neg
    pvary real reduce_precision reshape reshard rev round select_and_gather_add select_and_scatter_add
    sharding_constraint sign sin sinh slice split sqrt square squeeze stop_gradient tan tanh tile transpose
    optimization_barrier with_memory_space_constraint all_gather all_gather_invariant
    """.split()
)
# Zero where all operands are.
ADDS = frozenset(
    "add add_any sub max min or xor concatenate stack dynamic_update_slice select_n".split()
) | frozenset(SCATTERS.split())
# Zero where any operand is.
MULTIPLIES = frozenset({"mul", "and", "dot_general", "conv_general_dilated", "ragged_dot_general"})

Zero = frozenset[Axis]


class Remains(NamedTuple):
    """What became of removed units.

    Attributes:
        remains: The atoms of which something other than zero remains when they are reduced over.
        crosses: For each atom the reductions over it that are no products with weights.
    """

    remains: set[Axis]
    crosses: dict[Axis, dict[str, None]]


def follow(trace: Trace, live: Zero) -> Remains:
    """Find out for which atoms removing a unit is the same as masking it.

    Args:
        trace: A walked program, whose first inputs are its parameters.
        live: The atoms that may shrink.

    Returns:
        The `Remains`.
    """
    found, of = Remains(set(), {}), _Live(live)
    _run(trace, [_atoms(axis, of) for axis in trace.ins], of, found)
    return found


class _Live(frozenset[Axis]):
    """The atoms that may shrink, and which of them lie on an axis; axes are final by now."""

    def __init__(self, atoms: Iterable[Axis]) -> None:
        del atoms  # taken by frozenset itself
        self.known: dict[Axis, Zero] = {}

    def on(self, axis: Axis) -> Zero:
        if axis not in self.known:
            self.known[axis] = self.intersection(_axes.atoms(axis))
        return self.known[axis]


def _atoms(value: Sequence[Axis], live: _Live) -> Zero:
    found = [here for axis in value if (here := live.on(axis))]
    return found[0] if len(found) == 1 else frozenset().union(*found)


def _run(trace: Trace, ins: Sequence[Zero], live: _Live, found: Remains) -> list[Zero]:
    # A literal zero is zero in every unit.
    env: dict[Any, Zero] = dict(zip(trace.jaxpr.jaxpr.invars, ins, strict=True))

    def read(var: Any) -> Zero:
        if isinstance(var, Literal):
            return live if np.all(np.asarray(var.val) == 0) else frozenset()
        return env.get(var, frozenset())

    for step in trace.steps:
        zero = [read(var) for var in step.eqn.invars]
        for var, result in zip(step.eqn.outvars, _step(step, zero, live, found), strict=True):
            env[var] = result
    return [read(var) for var in trace.jaxpr.jaxpr.outvars]


def _step(step: Step, zero: list[Zero], live: _Live, found: Remains) -> list[Zero]:
    eqn, name = step.eqn, step.eqn.primitive.name
    if name in programs.CALLS or name == "shard_map":
        return _run(step.inner[0], zero, live, found)
    if name == "scan":
        return _scan(step, zero, live, found)
    if name == "while":
        return _while(step, zero, live, found)
    if name == "custom_linear_solve":
        _, _, solver, _, right = solve_operands(eqn, zero)
        return _run(step.inner[0], [*solver, *right], live, found)
    if name == "cond":
        branches = [_run(branch, zero[1:], live, found) for branch in step.inner]
        return [frozenset.intersection(*results) for results in zip(*branches, strict=True)]
    present = [_atoms(axis, live) for axis in step.ins]
    _check(step, zero, present, live, found)
    if name == "optimization_barrier" or name in COLLECTIVES:
        return zero
    result = _result(eqn, name, zero, present)
    if all(z is live for z in zero) and name in KEEPS | ADDS:
        return [live] * len(step.outs)  # a literal zero, broadcast
    return [result & _atoms(axis, live) - _unsure(step, axis, zero) for axis in step.outs]


def _unsure(step: Step, out: Sequence[Axis], zero: list[Zero]) -> Zero:
    """Atoms that lie on several axes of a result, and are perhaps zero along one of them alone."""
    counts = _count(out)
    operands = [(_count(axis), z) for axis, z in zip(step.ins, zero, strict=True) if axis]
    return frozenset(
        atom
        for atom, n in counts.items()
        if n > 1 and not all(atom in z and has[atom] >= n for has, z in operands)
    )


def _count(value: Sequence[Axis]) -> Counter[Axis]:
    """On how many axes each atom lies; parts of one concatenation are zero together."""
    return Counter(atom for axis in value for atom in set(_axes.atoms(axis)))


def _result(eqn: JaxprEqn, name: str, zero: list[Zero], present: list[Zero]) -> Zero:
    none: Zero = frozenset()
    if name == "integer_pow" and eqn.params["y"] <= 0:
        return none
    if name in KEEPS or name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"):
        return zero[0]
    if name in WINDOWS and name != "reduce_window":
        return zero[0]
    if name == "pad":
        # Zeros on both sides: units of their own that hold nothing.
        return frozenset.union(*zero) - (present[0] - zero[0]) if zero[1] else none
    if name in MULTIPLIES:
        return zero[0] | zero[1]
    if name == "triangular_solve":
        return zero[1]
    if name in ("div", "rem"):
        return zero[0] - zero[1]
    if name == "clamp":
        low, _, high = eqn.invars
        if not isinstance(low, Literal) or not isinstance(high, Literal):
            return none
        return zero[1] if low.val <= 0 <= high.val else none
    if name in ADDS:
        if name == "select_n":
            zero, present = zero[1:], present[1:]
        elif name == "dynamic_update_slice":
            zero, present = zero[:2], present[:2]
        elif name in SCATTERS.split():
            zero, present = [zero[0], zero[2]], [present[0], present[2]]
        everywhere = frozenset.union(*present, *zero)
        if name in ("concatenate", "stack"):
            # A part without the unit holds nothing of it.
            return everywhere - frozenset().union(
                *(p - z for p, z in zip(present, zero, strict=True))
            )
        return frozenset.intersection(*zero) if zero else none
    return none


def _check(step: Step, zero: list[Zero], present: list[Zero], live: _Live, found: Remains) -> None:
    """Note the atoms that this equation reduces over."""
    eqn, name = step.eqn, step.eqn.primitive.name
    if name in MULTIPLIES:
        gone = frozenset.union(*present) - _atoms(step.outs[0], live)
        found.remains.update(gone - (zero[0] | zero[1]))
        found.remains.update(_contracted_twice(step, live) - (zero[0] | zero[1]))
        return
    if (axis := choosing_axis(eqn)) is not None:
        # A unit that gives zero may still be the largest.
        found.remains.update(_atoms([step.ins[0][axis]], live))
        return
    if name in ALONG_AXIS or name not in REDUCTIONS:
        return
    where = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    gone = _atoms([step.ins[0][i] for i in where], live)
    source = source_line(eqn)
    crossing = f"`{name}`{f' at {source}' if source else ''}"
    for atom in gone:
        found.crosses.setdefault(atom, {})[crossing] = None
    found.remains.update(gone if name != "reduce_sum" else gone - zero[0])


def _contracted_twice(step: Step, live: _Live) -> Zero:
    """Atoms contracted by a product although they stay on another axis of its result."""
    if step.eqn.primitive.name != "dot_general":
        return frozenset()
    (contracted, _), _ = step.eqn.params["dimension_numbers"]
    return _atoms([step.ins[0][i] for i in contracted], live)


def _scan(step: Step, zero: list[Zero], live: _Live, found: Remains) -> list[Zero]:
    n, m = programs.scan_arity(step.eqn)

    def turn(carry: list[Zero], found: Remains) -> list[Zero]:
        return _run(step.inner[0], [*zero[:n], *carry, *zero[n + m :]], live, found)

    carry, outs = _until_it_stays(turn, zero[n : n + m], found)
    return [*carry, *outs[m:]]


def _while(step: Step, zero: list[Zero], live: _Live, found: Remains) -> list[Zero]:
    test, body, carry = while_operands(step.eqn, zero)

    def turn(carry: list[Zero], found: Remains) -> list[Zero]:
        _run(step.inner[0], [*test, *carry], live, found)
        return _run(step.inner[1], [*body, *carry], live, found)

    return _until_it_stays(turn, carry, found)[0]


def _until_it_stays(
    turn: Callable[[list[Zero], Remains], list[Zero]], carry: list[Zero], found: Remains
) -> tuple[list[Zero], list[Zero]]:
    """What of a loop's carry is zero before every turn, and what a turn gives then."""
    while True:
        trial = Remains(set(), {})
        outs = turn(carry, trial)
        after = [a & b for a, b in zip(carry, outs, strict=False)]
        if after == carry:
            break
        carry = after
    found.remains.update(trial.remains)
    for atom, names in trial.crosses.items():
        found.crosses.setdefault(atom, {}).update(names)
    return carry, outs
