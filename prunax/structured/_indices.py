"""Whole numbers that stand for units of an axis: from where they come, and what may be done with them.

Units keep their numbers when others are removed (see `evaluate`): `top_k` and `argmax` over a shorter axis give the
numbers that the units had, `iota` counts those that are left, and an index is translated where it is used. So an axis
may shrink although its units are chosen by number, as the experts of a mixture are, as long as everything that the
numbers meet shrinks along: the weights that they index, the axis of a one-hot code. Any other use, arithmetic for
instance, fixes the axis.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from prunax.structured import _axes
from prunax.structured._axes import Axis
from prunax.structured._walk import Numbers, Value, View, Walk, shape_of

__all__: list[str] = []

# Move elements about, or choose among them, and change none.
_MOVES = frozenset(
    """
    broadcast_in_dim convert_element_type copy copy_p dynamic_slice expand_dims gather optimization_barrier pvary
    reduce_precision reshape rev sharding_constraint slice squeeze stop_gradient transpose
    """.split()
)
_COMPARISONS = frozenset("eq ne lt le gt ge".split())


def numbers(
    walk: Walk, eqn: JaxprEqn, ins: Sequence[Value], outs: Sequence[Value], calls: frozenset[str]
) -> list[Numbers | None]:
    """What the results of an equation are numbers of.

    Args:
        walk: The reading, in which axes are made one or fixed.
        eqn: The equation.
        ins: Its operands.
        outs: Its results, of which only the axes are known yet.
        calls: Primitives that call a program, whose own equations decide.

    Returns:
        One for each result; None for what is no number of a unit.
    """
    name = eqn.primitive.name
    nothing: list[Numbers | None] = [None] * len(outs)
    if name == "iota":
        return [Numbers((outs[0].views[eqn.params["dimension"]].axis,), chosen=False)]
    if name in ("argmax", "argmin"):
        where = eqn.params["axes"]
        return (
            [Numbers((ins[0].views[where[0]].axis,), chosen=True)] if len(where) == 1 else nothing
        )
    if name in ("top_k", "approx_top_k"):
        p, views = eqn.params, ins[0].views
        axis = views[p.get("axis", p.get("reduction_dimension", -1))].axis
        return [None, Numbers((axis,), chosen=True)]
    if name in calls:
        return [out.numbers for out in outs]
    if not any(value.numbers for value in ins):
        return nothing
    if name == "sort":
        return [v.numbers and v.numbers._replace(chosen=True) for v in ins]
    if name in _MOVES or name.startswith("scatter"):
        # An index was looked at where the axes are; what is indexed may be numbers itself.
        kept = ins[0].numbers
        passes = (
            kept is None
            or len(kept.axes) == 1
            or len(shape_of(eqn.outvars[0])) == len(ins[0].views)
        )
        if kept is None or passes:
            return [kept if name in _MOVES else None] * len(outs)
    if name == "concatenate":
        known = _side_by_side(eqn, ins)
        if known:
            return [known]
    if name == "select_n":
        first, *others = (value.numbers for value in ins[1:])
        if first and all(_same(first, other) for other in others):
            return [first]
    if name in ("max", "min", "clamp") and (found := _of_one(ins)):
        return [found]
    if name == "add" and (found := _of_one(ins)) and _adds_the_size(eqn, found):
        return [found]  # a negative index counts from the end
    if name in _COMPARISONS:
        found = [value.numbers for value in ins]
        if name not in ("eq", "ne") and _of_one(ins):
            return nothing  # whether an index is in range
        if name == "eq" and None not in found and _tied(walk, *found):
            return nothing
    for value in ins:
        freeze_chosen(walk, value)
    return nothing


def freeze_chosen(walk: Walk, value: Value) -> None:
    """Fix the axes of which units were chosen by number."""
    if value.numbers and value.numbers.chosen:
        views = [View(axis) for axis in value.numbers.axes if axis is not None]
        walk.freeze(views, "its units are chosen by number, and the number is used")


def of_component(value: Value, component: int, depth: int) -> Axis | None:
    """The axis whose units a component of an index vector stands for."""
    if value.numbers is None:
        return None
    known = value.numbers.axes
    if len(known) == depth:
        return known[component]
    return known[0] if len(known) == depth == 1 else None


def _of_one(ins: Sequence[Value]) -> Numbers | None:
    """The numbers among operands of which all others are single values."""
    known = [value.numbers for value in ins if value.numbers]
    others = [value for value in ins if not value.numbers]
    return known[0] if len(known) == 1 and not any(value.views for value in others) else None


def _same(a: Numbers, b: Numbers | None) -> bool:
    return (
        b is not None
        and len(a.axes) == len(b.axes)
        and all(
            x is y or (x is not None and y is not None and _axes.find(x) is _axes.find(y))
            for x, y in zip(a.axes, b.axes, strict=True)
        )
    )


def _adds_the_size(eqn: JaxprEqn, found: Numbers) -> bool:
    added = [np.asarray(var.val) for var in eqn.invars if isinstance(var, Literal)]
    sizes = {axis.size for axis in found.axes if axis is not None}
    return len(added) == 1 and added[0].ndim == 0 and {int(added[0])} == sizes


def _tied(walk: Walk, a: Any, b: Any) -> bool:
    """Make the axes one of which two arrays of numbers were found equal: a one-hot code."""
    if len(a.axes) != 1 or len(b.axes) != 1 or not (a.chosen or b.chosen):
        return not (a.chosen or b.chosen)
    x, y = a.axes[0], b.axes[0]
    if x is None or y is None or x.size != y.size:
        return False
    walk.unify(View(x), View(y))
    return True


def _side_by_side(eqn: JaxprEqn, ins: Sequence[Value]) -> Numbers | None:
    """Index vectors made of single numbers."""
    last = len(shape_of(eqn.outvars[0])) - 1
    if eqn.params["dimension"] != last or any(v.views[last].axis.size != 1 for v in ins):
        return None
    known = [value.numbers for value in ins]
    if any(n is not None and len(n.axes) != 1 for n in known):
        return None
    chosen = any(n.chosen for n in known if n)
    return Numbers(tuple(n.axes[0] if n else None for n in known), chosen)
