"""Programs with some of their additions left out, and with whatever only those needed left out too.

An addition is named by its place: the number of its equation, after the numbers of the calls and loops that it is in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import (
    Jaxpr,
    JaxprEqn,
    Literal,
)

from prunax._jaxprs import programs

__all__: list[str] = []

Place = tuple[int, ...]
# Whether a value is needed; of a stack the rows that are.
Need = bool | np.ndarray


class Omission(NamedTuple):
    """An addition to leave out.

    Attributes:
        kept: Which operand stands for the sum.
        loop: Place of the loop of which only some turns leave it out; None for all turns of all loops.
        turns: Those turns.
    """

    kept: int
    loop: Place | None = None
    turns: frozenset[int] = frozenset()


Omissions = Mapping[Place, Omission]


class Part(NamedTuple):
    """What is left of a program.

    Attributes:
        program: The program.
        steps: The equations that are left, each with what is done in its place: None to evaluate it as it is, the
            number of an operand to take that, a `Part` of the program that it calls, or the turns of a loop.
        needs: Of each input, whether it is needed.
        wanted: Of each output, whether it is.
        same: Of each output, which input it is, where nothing is left but to hand it on.
    """

    program: programs.ClosedJaxpr
    steps: tuple[tuple[JaxprEqn, Any], ...]
    needs: tuple[Need, ...]
    wanted: tuple[bool, ...]
    same: tuple[int | None, ...]


class Turns(NamedTuple):
    """A loop whose turns differ: the part of the body that each runs, in the order of the stack."""

    parts: tuple[Part, ...]


class Rows(NamedTuple):
    """A stack of which only some rows are left."""

    array: Any
    rows: np.ndarray  # bool, of the whole stack's length

    def take(self, turns: Sequence[int]) -> Any:
        """The rows of some turns, all of them left."""
        return _rows(self.array, (np.cumsum(self.rows) - 1)[list(turns)])


def prefixes(places: Sequence[Place]) -> frozenset[Place]:
    """The calls and loops that some places are in."""
    return frozenset(place[:n] for place in places for n in range(1, len(place)))


def part(
    program: programs.ClosedJaxpr,
    omissions: Omissions,
    opened: frozenset[Place],
    wanted: Sequence[Need] | None = None,
    place: Place = (),
) -> Part:
    """Leave out additions and what only they needed.

    Args:
        program: A program.
        omissions: What to leave out.
        opened: The calls and loops to look into, from `prefixes`; others are needed as a whole, or not at all.
        wanted: Which outputs are wanted; all by default.
        place: Where the program is called.

    Returns:
        The `Part`.
    """
    inner = program.jaxpr
    wanted = [True] * len(inner.outvars) if wanted is None else wanted
    needs: dict[Any, Need] = {}

    def mark(var: Any, need: Need) -> None:
        if not isinstance(var, Literal):
            needs[var] = _either(needs.get(var, False), need)

    for var, need in zip(inner.outvars, wanted, strict=True):
        mark(var, need)
    steps: list[tuple[JaxprEqn, Any]] = []
    for n, eqn in reversed(list(enumerate(inner.eqns))):
        given = [needs.get(var, False) for var in eqn.outvars]
        if not any(map(_is_needed, given)) and not eqn.effects:
            continue
        here = (*place, n)
        action: Any = None
        wants: list[Need] = [True] * len(eqn.invars)
        if here in omissions:
            action = omissions[here].kept
            wants = [given[0] if i == action else False for i in range(2)]
        elif here in opened and eqn.primitive.name == "scan":
            action, wants = _turns(eqn, omissions, opened, given, here)
        elif here in opened and eqn.primitive.name in programs.CALLS:
            action = part(programs.called(eqn), omissions, opened, given, here)
            wants = list(action.needs)
        for var, need in zip(eqn.invars, wants, strict=True):
            mark(var, need)
        steps.append((eqn, action))
    steps.reverse()
    return Part(
        program,
        tuple(steps),
        tuple(needs.get(var, False) for var in inner.invars),
        tuple(map(_is_needed, wanted)),
        _handed_on(inner, steps),
    )


def _handed_on(inner: Jaxpr, steps: Sequence[tuple[JaxprEqn, Any]]) -> tuple[int | None, ...]:
    """Which input each output of a program is, where it is one untouched."""
    number: dict[Any, int | None] = {var: n for n, var in enumerate(inner.invars)}
    for eqn, action in steps:
        if isinstance(action, int):
            number[eqn.outvars[0]] = number.get(eqn.invars[action])
        elif isinstance(action, Part):
            for var, n in zip(eqn.outvars, action.same, strict=True):
                number[var] = None if n is None else number.get(eqn.invars[n])
    return tuple(None if isinstance(v, Literal) else number.get(v) for v in inner.outvars)


def _turns(
    eqn: JaxprEqn,
    omissions: Omissions,
    opened: frozenset[Place],
    given: Sequence[Need],
    here: Place,
) -> tuple[Turns, list[Need]]:
    n, m = programs.scan_arity(eqn)
    length: int = eqn.params["length"]
    carry, stacked = list(map(_is_needed, given[:m])), list(map(_is_needed, given[m:]))
    constants: list[Need] = [False] * n
    rows = np.zeros((len(eqn.invars) - n - m, length), bool)
    known: dict[Any, Part] = {}
    parts: dict[int, Part] = {}
    order = range(length) if eqn.params["reverse"] else reversed(range(length))  # last turn first
    for turn in order:
        active = {
            place: omission._replace(loop=None) if omission.loop == here else omission
            for place, omission in omissions.items()
            if omission.loop != here or turn in omission.turns
        }
        key = frozenset(active), tuple(carry)
        if key not in known:
            known[key] = part(eqn.params["jaxpr"], active, opened, [*carry, *stacked], here)
        found = parts[turn] = known[key]
        constants = list(map(_either, constants, found.needs[:n]))
        carry = list(map(_is_needed, found.needs[n : n + m]))
        rows[:, turn] = list(map(_is_needed, found.needs[n + m :]))
    of_stacks: list[Need] = [bool(r.all()) if r.all() or not r.any() else r for r in rows]
    return Turns(tuple(parts[i] for i in range(length))), [*constants, *carry, *of_stacks]


def _is_needed(need: Need) -> bool:
    return bool(np.any(need))


def _either(a: Need, b: Need) -> Need:
    if a is False or b is False:
        return b if a is False else a
    if isinstance(a, bool) or isinstance(b, bool):
        return True
    together = a | b
    return True if together.all() else together


def run(part: Part, args: Sequence[Any]) -> list[Any]:
    """Evaluate what is left of a program.

    Args:
        part: The part.
        args: Its inputs; None for those that are not needed, `Rows` where rows are missing.

    Returns:
        Its outputs; None for those that are not wanted.
    """
    inner = part.program.jaxpr
    env: dict[Any, Any] = dict(zip(inner.invars, args, strict=True))
    env.update(zip(inner.constvars, part.program.consts, strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env.get(var)

    for eqn, action in part.steps:
        operands = [read(var) for var in eqn.invars]
        if action is None:
            outs = programs.bind(eqn, operands)
        elif isinstance(action, Turns):
            outs = _run_turns(eqn, action, operands)
        elif isinstance(action, Part):
            outs = in_the_manner_of(eqn, lambda *xs, part=action: run(part, xs))(*operands)
        else:
            outs = [operands[action]]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) if w else None for v, w in zip(inner.outvars, part.wanted, strict=True)]


def in_the_manner_of(eqn: JaxprEqn, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function called as an equation calls its program: recomputed in the backward pass, if that is what it does."""
    if "policy" in eqn.params:
        again = eqn.params["prevent_cse"]
        return jax.checkpoint(function, policy=eqn.params["policy"], prevent_cse=again)
    return function


def _run_turns(eqn: JaxprEqn, turns: Turns, operands: Sequence[Any]) -> list[Any]:
    n, m = programs.scan_arity(eqn)
    constants, carry, stacks = operands[:n], list(operands[n : n + m]), operands[n + m :]
    reverse = eqn.params["reverse"]
    order = list(range(len(turns.parts)))
    if reverse:
        order.reverse()
    runs: list[tuple[Part, list[int]]] = []
    for turn in order:
        found = turns.parts[turn]
        if _passes_on(found, n, m):
            continue
        if runs and runs[-1][0] is found:
            runs[-1][1].append(turn)
        else:
            runs.append((found, [turn]))
    pieces: list[list[Any]] = []
    for found, mine in runs:
        needed = [
            _of_turns(x, sorted(mine)) if _is_needed(need) else None
            for x, need in zip(stacks, found.needs[n + m :], strict=True)
        ]
        carry = [x if need else None for x, need in zip(carry, found.needs[n:], strict=False)]
        if len(mine) == 1:
            outs = run(found, [*constants, *carry, *(None if x is None else x[0] for x in needed)])
            carry, ys = outs[:m], [None if y is None else y[None] for y in outs[m:]]
        else:

            def body(carry: Any, xs: Any, found: Part = found) -> Any:
                outs = run(found, [*constants, *carry, *xs])
                return tuple(outs[:m]), tuple(outs[m:])

            last, ys = lax.scan(
                body,
                tuple(carry),
                tuple(needed),
                length=len(mine),
                reverse=reverse,
                unroll=eqn.params["unroll"],
            )
            carry = list(last)
        pieces.append(list(ys))
    if reverse:
        pieces.reverse()
    ys = [_joined(piece) for piece in zip(*pieces, strict=True)] if pieces else []
    return [*carry, *(ys or [None] * (len(eqn.outvars) - m))]


def _passes_on(part: Part, constants: int, carries: int) -> bool:
    """Whether the turn of a loop hands on what it gets, and gives nothing else."""
    return not any(eqn.effects for eqn, _ in part.steps) and all(
        n < carries and part.same[n] == constants + n
        for n, wanted in enumerate(part.wanted)
        if wanted
    )


def _joined(pieces: Sequence[Any]) -> Any:
    if any(piece is None for piece in pieces):
        return None
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _of_turns(x: Any, turns: list[int]) -> Any:
    return x.take(turns) if isinstance(x, Rows) else _rows(x, np.array(turns))


def _rows(x: Any, rows: np.ndarray) -> Any:
    if len(rows) == x.shape[0]:
        return x
    if rows[-1] - rows[0] + 1 == len(rows):
        return lax.slice_in_dim(x, int(rows[0]), int(rows[-1]) + 1)
    return jnp.take(x, rows, axis=0)


class Seen(NamedTuple):
    """An addition as it went: the operand that stays if it is left out, and the sum; of a loop for each turn."""

    place: Place
    kept: Any
    sum: Any


def gated(
    program: programs.ClosedJaxpr,
    kept: Mapping[Place, int],
    opened: frozenset[Place],
    args: Sequence[Any],
    gates: Mapping[Place, Any],
    place: Place = (),
) -> tuple[list[Any], list[Seen]]:
    """Evaluate a program with switches at its additions.

    Args:
        program: The program.
        kept: For each addition which operand stands for the sum where its gate is shut.
        opened: From `prefixes`.
        args: Its inputs.
        gates: For each addition a boolean, which may be traced: ``()``, or one axis for each loop that it is in.
        place: Where the program is called.

    Returns:
        Its outputs, and the additions as they went.
    """
    inner = program.jaxpr
    env: dict[Any, Any] = dict(zip(inner.invars, args, strict=True))
    env.update(zip(inner.constvars, program.consts, strict=True))
    seen: list[Seen] = []

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    for n, eqn in enumerate(inner.eqns):
        here = (*place, n)
        operands = [read(var) for var in eqn.invars]
        if here in kept:
            (total,) = programs.bind(eqn, operands)
            stays = operands[kept[here]]
            seen.append(Seen(here, stays, total))
            outs: Sequence[Any] = [jnp.where(gates[here], total, stays)]
        elif here in opened and eqn.primitive.name == "scan":
            outs, inside = _gated_scan(eqn, kept, opened, operands, gates, here)
            seen += inside
        elif here in opened and eqn.primitive.name in programs.CALLS:
            outs, inside = gated(programs.called(eqn), kept, opened, operands, gates, here)
            seen += inside
        else:
            outs = programs.bind(eqn, operands)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in inner.outvars], seen


def _gated_scan(
    eqn: JaxprEqn,
    kept: Mapping[Place, int],
    opened: frozenset[Place],
    operands: Sequence[Any],
    gates: Mapping[Place, Any],
    here: Place,
) -> tuple[list[Any], list[Seen]]:
    n, m = programs.scan_arity(eqn)
    mine = {place: gate for place, gate in gates.items() if place[: len(here)] == here}
    places = list(mine)

    def body(carry: Any, xs: Any) -> Any:
        slices, own = xs
        found = dict(zip(places, own, strict=True))
        args = [*operands[:n], *carry, *slices]
        outs, seen = gated(eqn.params["jaxpr"], kept, opened, args, found, here)
        order.extend(s.place for s in seen if s.place not in order)
        return tuple(outs[:m]), (tuple(outs[m:]), [(s.kept, s.sum) for s in seen])

    order: list[Place] = []
    carry, (ys, seen) = lax.scan(
        body,
        tuple(operands[n : n + m]),
        (tuple(operands[n + m :]), [mine[place] for place in places]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    return [*carry, *ys], [Seen(p, *pair) for p, pair in zip(order, seen, strict=True)]
