"""Read a jaxpr once, giving every value its axes.

The rules, one for each kind of primitive, stand in `prunax.structured._rules`; this module goes from equation to
equation and into inner jaxprs, and writes down what it found for those who evaluate or ask later.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal
from jax.extend.source_info_util import summarize

from prunax._jaxprs import programs
from prunax.structured import _axes
from prunax.structured._axes import Axis, Frozen
from prunax.structured._followers import Follower

__all__: list[str] = []

_NOT_THE_USERS = ("site-packages", "dist-packages", str(Path(__file__).parent))

Origins = frozenset[tuple[int, int]]


class View(NamedTuple):
    """One axis of one value.

    Attributes:
        axis: The node it belongs to.
        origins: ``(leaf, axis)`` of the parameters it is a view of; empty once inputs of the function are mixed in.
    """

    axis: Axis
    origins: Origins = frozenset()


class Numbers(NamedTuple):
    """That an array's elements are numbers of units.

    Attributes:
        axes: Of which axis; or of which for each element of an index vector, the last axis; None for other numbers.
        chosen: Whether they were chosen (by `top_k`, say), and not counted.
    """

    axes: tuple[Axis | None, ...]
    chosen: bool


class Value(NamedTuple):
    """What is known of an array in the program.

    Attributes:
        views: One for each axis.
        data: Whether it depends on the function's inputs, and not on parameters and constants alone.
        numbers: What its elements are numbers of, see `prunax.structured._indices`.
    """

    views: tuple[View, ...]
    data: bool = False
    numbers: Numbers | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The nodes alone."""
        return tuple(view.axis for view in self.views)


class Step(NamedTuple):
    """An equation, with the axes of its inputs and outputs.

    Attributes:
        eqn: The equation.
        ins: Axes of each input.
        outs: Axes of each output.
        inner: The jaxprs that it calls, walked with these inputs.
    """

    eqn: JaxprEqn
    ins: tuple[tuple[Axis, ...], ...]
    outs: tuple[tuple[Axis, ...], ...]
    inner: tuple["Trace", ...] = ()


class Trace(NamedTuple):
    """A walked jaxpr.

    Attributes:
        jaxpr: The jaxpr.
        consts: Axes of its constants.
        ins: Axes of its inputs.
        outs: Its outputs.
        steps: Its equations, walked.
    """

    jaxpr: programs.ClosedJaxpr
    consts: tuple[tuple[Axis, ...], ...]
    ins: tuple[tuple[Axis, ...], ...]
    outs: tuple[Value, ...]
    steps: tuple[Step, ...]


# A rule gives the axes of each output; a whole value where it knows what the output depends on.
Rule = Callable[["Walk", JaxprEqn, Sequence[Value]], Sequence[Any]]
# What outputs are numbers of, when their axes are known.
Numbering = Callable[["Walk", JaxprEqn, Sequence[Value], Sequence[Value]], Sequence[Numbers | None]]


class Walk:
    """One reading of a program.

    Attributes:
        roles: For each ``(leaf, axis)`` of the parameters what it does where it meets data: "produces", "consumes".
        contracted: Axes over which two activations are multiplied.
        least: Axes of which so many units are taken, and by what.
        followers: Axes that are others in another order.
        eqn: The equation being read.
        inner: Jaxprs walked on its account.
        callers: The equations that call the jaxpr being read, outermost first: a library's function that was traced
            before doesn't know the line that calls it this time.
    """

    def __init__(self, rules: dict[str, Rule], numbering: Numbering) -> None:
        self.rules = rules
        self.numbering = numbering
        self.least: list[tuple[Axis, int, Frozen]] = []
        self.followers: list[Follower] = []
        self.roles: dict[tuple[int, int], set[str]] = {}
        self.contracted: list[Axis] = []
        self.eqn: JaxprEqn | None = None
        self.inner: list[Trace] = []
        self.callers: list[JaxprEqn] = []

    def reason(self, why: str) -> Frozen:
        """The equation being read as the reason to freeze something."""
        assert self.eqn is not None
        lines = (source_line(eqn) for eqn in (self.eqn, *reversed(self.callers)))
        return Frozen(why, self.eqn.primitive.name, next(filter(None, lines), ""))

    def unify(self, a: View, b: View) -> View:
        """Make two axes one."""
        if a.axis is not b.axis:
            _axes.unify(a.axis, b.axis, lambda: self.reason("axes that don't line up are combined"))
        longer = b if a.axis.size == 1 else a
        return View(longer.axis, a.origins | b.origins)

    def freeze(self, views: Sequence[View], why: str) -> None:
        """Fix the sizes of axes."""
        for view in views:
            _axes.freeze(view.axis, self.reason(why))

    def frozen(self, size: int, why: str) -> View:
        """A new axis of fixed size."""
        return View(Axis(size, self.reason(why)))

    def follower(self, source: Axis, why: str, *, mirrored: bool) -> View:
        """An axis of the same units in another order."""
        axis = Axis(source.size)
        if source.size > 1:
            self.followers.append(Follower(axis, source, mirrored, self.reason(why)))
        return View(axis)

    def role(self, views: Sequence[View], role: str) -> None:
        """Note what the parameters behind some axes do."""
        for view in views:
            for origin in view.origins:
                self.roles.setdefault(origin, set()).add(role)

    def call(self, jaxpr: programs.ClosedJaxpr, ins: Sequence[Value]) -> Trace:
        """Walk an inner jaxpr, with the inputs' axes for its own."""
        outer = self.eqn, self.inner
        assert self.eqn is not None
        self.callers.append(self.eqn)
        trace = walk(self, jaxpr, ins)
        self.callers.pop()
        self.eqn, self.inner = outer
        self.inner.append(trace)
        return trace


def source_line(eqn: JaxprEqn) -> str:
    """``folder/file.py:line`` of the user's code that an equation comes from: the innermost that is in no library."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not any(folder in frame.file_name for folder in _NOT_THE_USERS):
            line = getattr(frame, "start_line", None) or frame.line_num
            return f"{'/'.join(Path(frame.file_name).parts[-2:])}:{line}"
    known = summarize(eqn.source_info) if traceback else ""
    return "" if known.startswith("<unknown>") else known


def walk(state: Walk, jaxpr: programs.ClosedJaxpr, ins: Sequence[Value]) -> Trace:
    """Give every value of a jaxpr its axes.

    Args:
        state: What is known so far; added to.
        jaxpr: The program.
        ins: What its inputs are.

    Returns:
        The program with its axes. They are final once the whole program is read.
    """
    env: dict[Any, Value] = {}
    consts = [Value(tuple(View(Axis(n)) for n in jax.numpy.shape(x))) for x in jaxpr.consts]
    env.update(zip(jaxpr.jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, ins, strict=True))

    def read(var: Any) -> Value:
        if isinstance(var, Literal):
            return Value(tuple(View(Axis(n)) for n in shape_of(var)))
        return env[var]

    steps = []
    for eqn in jaxpr.jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        state.eqn, state.inner = eqn, []
        rule = state.rules.get(eqn.primitive.name, unknown)
        outs = rule(state, eqn, values)
        data = any(value.data for value in values)
        outs = [out if isinstance(out, Value) else Value(tuple(out), data) for out in outs]
        known = state.numbering(state, eqn, values, outs)
        for var, out, numbers in zip(eqn.outvars, outs, known, strict=True):
            views = tuple(View(v.axis) for v in out.views) if out.data else out.views
            env[var] = Value(views, out.data, numbers)
        taken, given = [value.axes for value in values], [env[var].axes for var in eqn.outvars]
        steps.append(Step(eqn, tuple(taken), tuple(given), tuple(state.inner)))
    outs = tuple(read(var) for var in jaxpr.jaxpr.outvars)
    const_axes, in_axes = (tuple(value.axes for value in values) for values in (consts, ins))
    return Trace(jaxpr, const_axes, in_axes, outs, tuple(steps))


def unknown(state: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[tuple[View, ...]]:
    """A primitive without a rule: nothing that it touches may shrink."""
    why = "used in a way that is not known to allow fewer units"
    for value in ins:
        state.freeze(value.views, why)
    return [tuple(state.frozen(n, why) for n in shape_of(var)) for var in eqn.outvars]


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable; () for a token or the like."""
    return getattr(var.aval, "shape", ())
