"""Experts in a product that sums over them: contracted axes that stand for matrices of their own.

A mixture may end in one product over experts and features, ``etf,efd->td``. To the product it is one matrix of
``experts * features`` inputs, of which those of rare experts look small. That an axis counts experts is seen from where
the activation comes from.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from prunax import _jaxprs

__all__: list[str] = []

_GATES = frozenset("mul select_n and div".split())
# Mix the elements of an axis, be the shapes the same.
_MIXING = frozenset(
    """
    dot_general conv_general_dilated gather scatter scatter-add scatter_add sort scan while cond rev concatenate pad
    slice dynamic_slice dynamic_update_slice cumsum cumprod cummax cummin cumlogsumexp fft custom_call
    """.split()
)
_FREE, _BATCH = 1, 2


class _Origin(NamedTuple):
    """Where an axis of an activation comes from.

    Attributes:
        stacked: Whether it is an axis of a weight: a free one of it (1), or a batch axis of it and its inputs (2).
        routed: Whether inputs of the function scaled each of its indices as a whole on the way.
    """

    stacked: int = 0
    routed: bool = False


class Experts:
    """Looks for axes of experts in one program."""

    def __init__(self, program: _jaxprs.Program) -> None:
        self.shapes = program.shapes
        self.weights = {p.equation: p.side for p in program.products}
        self.makers: dict[int, tuple[int, Any]] = {}
        self.varying = set(program.args)
        for n, equation in enumerate(program.equations):
            self.makers |= dict.fromkeys(equation.outputs, (n, equation))
            if self.varying.intersection(equation.inputs):
                self.varying.update(equation.outputs)

    def axes(self, product: _jaxprs.Product) -> tuple[int, ...]:
        """Contracted axes of a product's weight that count experts; of several contracted axes all but one at most.

        They are those that are a batch axis of the product before with a weight, or an axis of that weight whose
        outputs were scaled by the function's inputs, expert by expert, on the way (the routing).
        """
        if product.eqn.primitive.name != "dot_general" or product.loops:
            return ()
        contracted, _ = product.eqn.params["dimension_numbers"]
        pairs = list(zip(contracted[product.side], contracted[1 - product.side], strict=True))
        found: list[int] = []
        for weight_axis, axis in pairs:
            features = frozenset(a for w, a in pairs if w != weight_axis and w not in found)
            if features and self.shapes[product.activation].shape[axis] > 1:
                origin = self.origin(product.activation, axis, features)
                if origin.stacked == _BATCH or (origin.stacked and origin.routed):
                    found.append(weight_axis)
        return tuple(found)

    def origin(self, value: int, axis: int, features: frozenset[int]) -> _Origin:
        """Go back from an axis of a value, through what keeps it, to the weight that it is an axis of."""
        if value not in self.makers:
            return _Origin()
        n, equation = self.makers[value]
        if not hasattr(equation.operation, "eqn"):
            return _Origin()
        if equation.operation.eqn.primitive.name == "dot_general":
            return self.through_product(n, equation, axis, features)
        best, routed = _Origin(), False
        for source, moved in self.sources(equation):
            if axis in moved:
                kept = frozenset(moved[f] for f in features if f in moved)
                constant = len(kept) < len(features) or self.is_constant(source, kept)
                if constant and features:
                    routed |= self.is_gate(equation, source, moved[axis])
                best = max(best, self.origin(source, moved[axis], kept))
        return best._replace(routed=best.routed or routed) if best.stacked else best

    def through_product(
        self, n: int, equation: Any, axis: int, features: frozenset[int]
    ) -> _Origin:
        eqn = equation.operation.eqn
        contracting, batch = eqn.params["dimension_numbers"]
        places: list[
            list[int]
        ] = []  # for each operand, which axis of it each axis of the result is
        count = len(batch[0])
        start = count
        for side in (0, 1):
            ndim = eqn.invars[side].aval.ndim
            free = [a for a in range(ndim) if a not in (*contracting[side], *batch[side])]
            moved = [*batch[side], *[-1] * (eqn.outvars[0].aval.ndim - count)]
            moved[start : start + len(free)] = free
            start += len(free)
            places.append(moved)
        if n in self.weights:
            side = self.weights[n]
            if axis < count:
                return _Origin(_BATCH)
            if places[side][axis] >= 0:
                return _Origin(_FREE)
        elif contracting[0] and axis < count:
            return _Origin()
        best, routed = _Origin(), False
        operands = dict(zip(equation.operation.variables, equation.inputs, strict=True))
        for side, moved in enumerate(places):
            source = operands.get(eqn.invars[side])
            if source is None or moved[axis] < 0:
                continue
            kept = frozenset(moved[f] for f in features if moved[f] >= 0)
            if not contracting[0] and len(kept) < len(features):
                routed |= source in self.varying
            best = max(best, self.origin(source, moved[axis], kept))
        return best._replace(routed=best.routed or routed) if best.stacked else best

    def is_gate(self, equation: Any, source: int, axis: int) -> bool:
        """Whether a factor differs from index to index of an axis, and from input to input."""
        name = equation.operation.eqn.primitive.name
        return name in _GATES and source in self.varying and not self.is_constant(source, {axis})

    def is_constant(self, value: int, axes: Any) -> bool:
        """Whether a value was repeated along axes, and not computed for each index."""
        shape = self.shapes[value].shape
        axes = {a for a in axes if shape[a] > 1}
        if not axes:
            return True
        if value not in self.makers or not hasattr(self.makers[value][1].operation, "eqn"):
            return False
        equation = self.makers[value][1]
        sources = list(self.sources(equation))
        if not sources:
            return equation.operation.eqn.primitive.name == "broadcast_in_dim"  # of a number
        return all(
            self.is_constant(source, {moved[a] for a in axes if a in moved})
            for source, moved in sources
        )

    def sources(self, equation: Any) -> Iterator[tuple[int, dict[int, int]]]:
        """The operands of an equation whose axes can be told, with the axis of each that an axis of the result is."""
        eqn = equation.operation.eqn
        name, params, out = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
        for value, var in zip(equation.inputs, equation.operation.variables, strict=True):
            shape = var.aval.shape
            if name == "transpose":
                yield value, dict(enumerate(params["permutation"]))
            elif name == "broadcast_in_dim":
                yield value, {a: j for j, a in enumerate(params["broadcast_dimensions"])}
            elif name == "squeeze":
                left = [a for a in range(len(shape)) if a not in params["dimensions"]]
                yield value, dict(enumerate(left))
            elif name == "reshape":
                yield value, _kept_axes(shape, out)
            elif name.startswith("reduce_") and "axes" in params:
                left = [a for a in range(len(shape)) if a not in params["axes"]]
                yield value, dict(enumerate(left))
            elif name not in _MIXING and len(shape) == len(out) and _fits(shape, out):
                yield value, {a: a for a in range(len(out))}  # element by element


def _fits(shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    return all(n in (1, m) for n, m in zip(shape, out, strict=True))


def _kept_axes(before: tuple[int, ...], after: tuple[int, ...]) -> dict[int, int]:
    """Axes that a reshape leaves as they are."""
    starts = {(math.prod(before[:j]), n): j for j, n in enumerate(before) if n > 1}
    return {
        a: starts[math.prod(after[:a]), n]
        for a, n in enumerate(after)
        if (math.prod(after[:a]), n) in starts
    }
