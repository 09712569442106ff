"""Groups of units that can only be removed together, found from a function's jaxpr."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from prunax import trees
from prunax._jaxprs import programs
from prunax.reports._tables import rendered
from prunax.structured import _axes, _followers, _scalars, _zeros
from prunax.structured._axes import Axis, Frozen, Position
from prunax.structured._followers import Follower
from prunax.structured._rules import reading
from prunax.structured._walk import Trace, Value, View, walk

__all__ = ["AxisGroup", "Explanation", "Member", "Parameter", "axis_groups", "explain_groups"]

PyTree = Any


class Parameter(NamedTuple):
    """A parameter array of the analysed function."""

    path: str
    shape: tuple[int, ...]
    dtype: Any


class Member(NamedTuple):
    """One place where a group's units lie.

    Attributes:
        path: Path of the leaf.
        axis: Axis of the leaf.
        position: Where on that axis, see `Position`: all of it, a part of a product, or a stretch of a concatenation.
        role: What the leaf does on that axis: "produces" the units (output features of a kernel), "consumes" them
            (input features), or meets them "elementwise" (biases, scales, statistics). A leaf that both produces and
            consumes, as a tied embedding does, produces.
    """

    path: str
    axis: int
    position: Position
    role: str


class Constant(NamedTuple):
    """An array that the function closes over, where a group's units lie on an axis of it."""

    array: Any
    axis: int
    position: Position


@dataclass(frozen=True)
class AxisGroup:
    """Units that can be removed one by one, each from every member at once.

    Attributes:
        size: Number of units.
        members: All places in the parameters where they lie, leaves in tree order.
        frozen: Why the units cannot be removed, or None if they can.
        preserved: Whether the function made smaller (`shrink_function`) equals the whole function with the removed
            units' weights at zero. Not so where something of the removed units remains: `softmax` over them, say.
        crosses: The reductions over the units other than products with weights, with their source lines: statistics
            of a normalisation, mostly. There, code that counts units for itself, run on the smaller parameters,
            divides by the smaller count, where `shrink_function` keeps to the number that was traced.
        root: Whether the program multiplies two activations over the units, and divides by a root of their number, as
            attention does with the width of its heads. Code that counts for itself divides by another root afterwards.
        least: The fewest units that may be left: as many as `top_k` takes, the experts of a token.
        numbered: Whether units are chosen by number, as the experts of a mixture are: one that is removed is one that
            is never chosen, which weights of zero do not say.
        constants: Where the units lie in arrays that the function closes over; `shrink_function` makes them smaller.
        leaves: All parameters of the function.
    """

    size: int
    members: tuple[Member, ...]
    frozen: Frozen | None = None
    preserved: bool = True
    crosses: tuple[str, ...] = ()
    root: bool = False
    least: int = 1
    numbered: bool = False
    constants: tuple[Constant, ...] = field(default=(), repr=False, compare=False)
    leaves: tuple[Parameter, ...] = field(default=(), repr=False, compare=False)

    @property
    def name(self) -> str:
        """``path[axis]`` of the first leaf that produces the units (else of the first member).

        Where several groups share the axis, with the position of this one: ``qkv/kernel[1]@64+16``.
        """
        first = next((m for m in self.members if m.role == "produces"), self.members[0])
        length = next(leaf.shape for leaf in self.leaves if leaf.path == first.path)[first.axis]
        offset, stride, _ = first.position
        part = "" if length == self.size else f"@{offset}+{stride}"
        return f"{first.path}[{first.axis}]{part}"

    def __str__(self) -> str:
        return str(explain_groups([self]))


@dataclass(frozen=True)
class Explanation:
    """Groups as a table: print it.

    Attributes:
        groups: The groups shown.
    """

    groups: tuple[AxisGroup, ...]

    def __rich__(self) -> Any:
        """Render as a `rich.table.Table`."""
        from rich.table import Table

        table = Table("group", "units", "leaf", "axis", "where", "role")
        for group in self.groups:
            notes = _notes(group)
            for i, member in enumerate(group.members):
                first = (f"{group.name}{notes}", str(group.size)) if i == 0 else ("", "")
                place = _place(member.position, group.size)
                table.add_row(*first, member.path, str(member.axis), place, member.role)
            table.add_section()
        return table

    def __str__(self) -> str:
        return rendered(self)


def _notes(group: AxisGroup) -> str:
    notes = [f"frozen: {group.frozen}"] if group.frozen else []
    if not group.frozen and not group.preserved:
        notes.append("removal changes the rest")
    if not group.frozen and group.crosses:
        notes.append(f"crosses {', '.join(group.crosses)}")
    return "".join(f"\n{note}" for note in notes)


def _place(position: Position, size: int) -> str:
    offset, stride, loops = position
    start = f"{offset} + " if offset else ""
    unit = "u" if stride == 1 else f"{stride} u"
    copies = "".join(f" + {step} i[{count}]" for count, step in loops)
    return f"{start}{unit}{copies}"


class Analysis(NamedTuple):
    """A function's program with its axes.

    Attributes:
        trace: The program.
        leaves: The parameters.
        axes: Axes of each of them.
        roles: What each ``(leaf, axis)`` does.
        outputs: Structure of the function's result.
        names: Path of each array of it.
        contracted: Axes over which two activations are multiplied.
        least: For atoms of which `top_k` or `argmax` takes some, how many.
        followers: Axes that are others in another order.
    """

    trace: Trace
    leaves: tuple[Parameter, ...]
    axes: tuple[tuple[Axis, ...], ...]
    roles: dict[tuple[int, int], set[str]]
    outputs: Any
    names: tuple[str, ...]
    contracted: tuple[Axis, ...]
    least: dict[Axis, int]
    followers: tuple[Follower, ...]


def axis_groups(fn: Callable[..., Any], params: PyTree, *args: Any) -> tuple[AxisGroup, ...]:
    """Find the sets of units (channels, heads, features) that a function's parameters have in common.

    The function is traced once and its jaxpr read equation by equation: what is added together has the same axes, what
    is contracted shares one, a reshape makes heads, a concatenation puts parts side by side. No layer is known by name.

    Args:
        fn: ``fn(params, *args)``, any JAX function. For a network with batch statistics let `params` hold them too,
            and give the function as used for prediction: what it returns has a fixed size.
        params: Pytree of arrays, or of `jax.ShapeDtypeStruct`. Leaves that are not arrays are constants.
        *args: Example inputs, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are looked at. What isn't an
            array (a flag) is a constant.

    Returns:
        Every group of two or more units, in tree order of the first member, those that are frozen included.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> def fn(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> group, = [g for g in prunax.structured.axis_groups(fn, params, jnp.ones((2, 4))) if not g.frozen]
        >>> group.size, [(m.path, m.axis, m.role) for m in group.members]
        (16, [('down', 0, 'consumes'), ('up', 1, 'produces')])
    """
    return found_groups(analyse(fn, params, *args))


def found_groups(analysis: Analysis) -> tuple[AxisGroup, ...]:
    """The groups of a function whose outputs keep their sizes."""
    freeze_outputs(analysis)
    if analysis.followers:
        _followers.settle(analysis.followers, _own_axes(analysis.trace, analysis.axes))
    return groups_of(analysis)


def explain_groups(groups: Sequence[AxisGroup]) -> Explanation:
    """Show groups as a table.

    Args:
        groups: The groups to show, for instance ``[group for group in groups if not group.frozen]``.

    Returns:
        A value that prints as a table, with rich colours where rich prints it. "where" says at which indices of the
        leaf's axis unit u lies, ``i[n]`` running over 0 to n - 1.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)))
        >>> "up[1]" in str(prunax.structured.explain_groups(groups))
        True
    """
    return Explanation(tuple(groups))


def analyse(fn: Callable[..., Any], params: PyTree, *args: Any) -> Analysis:
    """Trace a function and walk its jaxpr, its inputs frozen and its outputs not yet."""
    jaxpr, out, arrays, shapes = programs.traced(fn, params, args)
    paths = trees.paths(params)
    known = tuple(
        Parameter(paths[i], tuple(s.shape), s.dtype)
        for i, s in zip(arrays, shapes, strict=True)
        if i < len(paths)
    )
    names = trees.paths(args)
    values = []
    for leaf, (i, shape) in enumerate(zip(arrays, shapes, strict=True)):
        if i < len(paths):
            views = [View(Axis(n), frozenset([(leaf, d)])) for d, n in enumerate(shape.shape)]
            values.append(Value(tuple(views)))
        else:
            why = Frozen(f"an axis of the function's input {names[i - len(paths)]}")
            values.append(Value(tuple(View(Axis(n, why)) for n in shape.shape), data=True))
    state = reading()
    trace = walk(state, jaxpr, values)
    least: dict[Axis, int] = {}
    for axis, count, why in state.least:
        atom = _axes.find(axis)
        if atom.kind == "atom":
            least[atom] = max(count, least.get(atom, 1))
        else:
            _axes.freeze(atom, why)
    return Analysis(
        trace,
        known,
        trace.ins[: len(known)],
        state.roles,
        jax.tree.structure(out),
        tuple(trees.paths(out)),
        tuple(state.contracted),
        least,
        tuple(state.followers),
    )


def freeze_outputs(analysis: Analysis) -> None:
    """Fix the size of what the function returns."""
    several = len(analysis.trace.outs) > 1
    for name, value in zip(analysis.names, analysis.trace.outs, strict=True):
        why = "an axis of the function's output"
        if several:
            # A cache, mostly, or statistics.
            why += (
                f" {name}: to let it shrink, prune a function that does not return it, and give "
                f"`shrink_function` this one"
            )
        for view in value.views:
            _axes.freeze(view.axis, Frozen(why))
        if value.numbers and value.numbers.chosen:
            for axis in filter(None, value.numbers.axes):
                _axes.freeze(axis, Frozen(f"numbered in {why.removeprefix('an axis of ')}"))


def groups_of(analysis: Analysis) -> tuple[AxisGroup, ...]:
    """Collect the atoms that lie in parameters."""
    members: dict[Axis, list[Member]] = {}
    for i, leaf in enumerate(analysis.leaves):
        for d, axis in enumerate(analysis.axes[i]):
            did = analysis.roles.get((i, d), ())
            role = next((r for r in ("produces", "consumes") if r in did), "elementwise")
            for atom, position in _axes.locate(axis):
                members.setdefault(atom, []).append(Member(leaf.path, d, position, role))
    live = frozenset(atom for atom in members if not atom.frozen and atom.size > 1)
    followed = _zeros.follow(analysis.trace, live)
    # Units that are in another order somewhere are not followed there.
    followed.remains.update(_axes.find(f.source) for f in analysis.followers)
    constants = _constants(analysis.trace, live)
    contracted = {atom for axis in analysis.contracted for atom in _axes.atoms(axis)} & live
    scales = _scalars.multipliers(analysis.trace) if contracted else set[float]()
    return tuple(
        AxisGroup(
            atom.size,
            tuple(places),
            atom.frozen,
            atom not in followed.remains,
            tuple(followed.crosses.get(atom, {})),
            atom in contracted and _scalars.has_root(scales, atom.size),
            analysis.least.get(atom, 1),
            atom in analysis.least,
            tuple(constants.get(atom, ())),
            analysis.leaves,
        )
        for atom, places in members.items()
        if atom.size > 1
    )


def _own_axes(trace: Trace, params: Sequence[tuple[Axis, ...]] = ()) -> list[Axis]:
    """Axes of parameters, and of the constants of a program and of those within."""
    found = [axis for axes in (*params, *trace.consts) for axis in axes]
    for step in trace.steps:
        for inner in step.inner:
            found += _own_axes(inner)
    return found


def _constants(trace: Trace, live: frozenset[Axis]) -> dict[Axis, list[Constant]]:
    """Where live atoms lie in the constants of a program and of those within."""
    found: dict[Axis, list[Constant]] = {}
    for array, where in zip(trace.jaxpr.consts, trace.consts, strict=True):
        for d, axis in enumerate(where):
            for atom, position in _axes.locate(axis):
                if atom in live:
                    found.setdefault(atom, []).append(Constant(array, d, position))
    for step in trace.steps:
        for inner in step.inner:
            for atom, places in _constants(inner, live).items():
                found.setdefault(atom, []).extend(places)
    return found


Keep = Mapping[AxisGroup, Any]


def kept_positions(
    function: str, keep: Keep, leaves: Sequence[Parameter]
) -> dict[str, list[np.ndarray | None]]:
    """For each parameter and each of its axes the indices that are left, None where all are.

    Args:
        function: The public function that asks, named in errors.
        keep: For each group that shrinks the units to keep.
        leaves: The parameters.

    Returns:
        A list for each path that has an axis which shrinks.

    Raises:
        ValueError: If a group is frozen, or the units are not its own.
    """
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    gone: dict[str, list[np.ndarray | None]] = {}
    for group, units in keep.items():
        removed = np.setdiff1d(np.arange(group.size), checked_units(function, group, units))
        for member in group.members:
            shape = shapes[member.path]
            marks = gone.setdefault(member.path, [None] * len(shape))
            mark = marks[member.axis]
            if mark is None:
                mark = marks[member.axis] = np.zeros(shape[member.axis], bool)
            mark[member.position.indices(group.size)[removed]] = True
    return {
        path: [None if mark is None else np.flatnonzero(~mark) for mark in marks]
        for path, marks in gone.items()
    }


def checked_units(function: str, group: AxisGroup, units: Any) -> np.ndarray:
    """The units to keep, increasing, given as indices or as a boolean mask."""
    if group.frozen:
        raise ValueError(
            f"{function}: {group.name} cannot shrink. It is {group.frozen}. "
            f"Leave it out of `keep`, or change the function there."
        )
    units = np.asarray(units)
    if units.dtype == bool and units.shape == (group.size,):
        units = np.flatnonzero(units)
    whole = np.issubdtype(units.dtype, np.integer) or not units.size
    if units.ndim != 1 or not whole or len(np.unique(units)) != len(units):
        raise ValueError(
            f"{function}: the units to keep of {group.name} must be distinct indices, or a boolean mask of length "
            f"{group.size}; got an array of {units.dtype} and shape {units.shape}."
        )
    if not units.size:
        raise ValueError(f"{function}: {group.name} must keep at least one unit.")
    if units.size < group.least:
        raise ValueError(
            f"{function}: {group.name} must keep at least {group.least} units, as many as `top_k` takes; "
            f"asked to keep {units.size}."
        )
    if not 0 <= units.min() <= units.max() < group.size:
        raise ValueError(
            f"{function}: {group.name} has units 0 to {group.size - 1}; asked to keep {units.min()} to {units.max()}."
        )
    return np.sort(units).astype(np.int64)
