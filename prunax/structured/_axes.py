"""Axes whose sizes are unknown until everything that must agree with them is known.

An `Axis` is a node of a union-find. It is an *atom* (units in a row, nothing known of them), a *product* (heads times
head size, major part first) or a *concatenation* (query, key and value side by side). Atoms are refined as a program is
read: a reshape makes products, a slice makes concatenations, an addition makes two axes one. What is left as an atom in
the end is a set of units that can be removed one by one, wherever they occur.

An axis of length 1 is broadcast against anything: it is never made one with another, and never shrinks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Axis", "Frozen", "Position"]


class Frozen(NamedTuple):
    """Why an axis must keep its length.

    Attributes:
        why: What asks for it, in words.
        primitive: The JAX primitive, or "" for inputs and outputs of the function.
        source: ``file:line`` of the user's code, or "" where the jaxpr doesn't know it.
    """

    why: str
    primitive: str = ""
    source: str = ""

    def __str__(self) -> str:
        by = f" by `{self.primitive}`" if self.primitive else ""
        return f"{self.why}{by}{f' at {self.source}' if self.source else ''}"


class Position(NamedTuple):
    """Where the units of an atom lie along an axis of an array.

    Unit u has a copy at ``offset + stride * u + i_1 * step_1 + ...`` for all ``0 <= i_n < count_n``.

    Attributes:
        offset: Index of the first copy of the first unit.
        stride: From one unit to the next.
        loops: ``(count, step)`` for each other factor of a product that the atom is part of.
    """

    offset: int = 0
    stride: int = 1
    loops: tuple[tuple[int, int], ...] = ()

    def indices(self, size: int) -> np.ndarray:
        """Index along the array's axis of every copy of every unit, ``(size, copies)``.

        Args:
            size: Number of units.
        """
        places = self.offset + self.stride * np.arange(size)[:, None]
        for count, step in self.loops:
            places = (places[:, :, None] + step * np.arange(count)).reshape(size, -1)
        return places


class Incompatible(Exception):
    """Two ways of taking an axis apart that have no common refinement."""


class Axis:
    """A node of the union-find; see the module's documentation.

    Attributes:
        size: Number of units.
        kind: "atom", "product" or "concatenation".
        parts: The axes that a product or a concatenation consists of.
        frozen: Of an atom: why its size is fixed, or None.
    """

    __slots__ = ("frozen", "kind", "parent", "parts", "size")

    def __init__(self, size: int, frozen: Frozen | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.kind = "atom"
        self.parts: tuple[Axis, ...] = ()
        self.parent: Axis | None = None

    def become(self, kind: str, parts: Sequence["Axis"]) -> None:
        """Refine an atom; its parts are frozen if it is."""
        self.kind, self.parts = kind, tuple(parts)
        if self.frozen:
            freeze(self, self.frozen)


def find(axis: Axis) -> Axis:
    """The node that stands for all that were made one with this one."""
    root = axis
    while root.parent is not None:
        root = root.parent
    while axis.parent is not None:
        axis.parent, axis = root, axis.parent
    return root


def atoms(axis: Axis) -> Iterator[Axis]:
    """The atoms of an axis, first to last; some may occur twice."""
    axis = find(axis)
    if axis.kind == "atom":
        yield axis
    for part in axis.parts:
        yield from atoms(part)


def freeze(axis: Axis, why: Frozen) -> None:
    """Fix the size of an axis, unless it is fixed already."""
    for atom in atoms(axis):
        atom.frozen = atom.frozen or why


def product(parts: Sequence[Axis]) -> Axis:
    """An axis that runs over all combinations of its parts, the first part slowest."""
    parts = [part for part in parts if part.size != 1]
    if len(parts) == 1:
        return parts[0]
    axis = Axis(math.prod(part.size for part in parts))
    if parts:
        axis.become("product", parts)
    return axis


def concatenation(parts: Sequence[Axis]) -> Axis:
    """An axis that runs over one part after the other."""
    parts = [part for part in parts if part.size]
    if len(parts) == 1:
        return parts[0]
    axis = Axis(sum(part.size for part in parts))
    if parts:
        axis.become("concatenation", parts)
    return axis


def unify(a: Axis, b: Axis, why: Callable[[], Frozen]) -> None:
    """Make two axes one: unit for unit they are removed together.

    Args:
        a: An axis.
        b: An axis of the same size; nothing happens where either has size 1 and is broadcast.
        why: Gives the reason if they cannot be made one and are frozen.
    """
    a, b = find(a), find(b)
    if a is b or 1 in (a.size, b.size):
        return
    try:
        if a.size != b.size:
            raise Incompatible
        if a.parts and b.parts:
            _align(a, b, why)
    except Incompatible:
        freeze(a, why())
        freeze(b, why())
        return
    a, b = find(a), find(b)
    if a is b:
        return
    if a.kind == "atom":
        a, b = b, a
    if b.frozen:
        freeze(a, b.frozen)
    b.parent = a


def _align(a: Axis, b: Axis, why: Callable[[], Frozen]) -> None:
    """Refine two axes that have parts until the parts match, and make those one."""
    if a.kind == b.kind == "concatenation":
        start = 0
        for part in b.parts:
            unify(cut(a, start, start + part.size), part, why)
            start += part.size
        return
    if b.kind == "concatenation":
        a, b = b, a
    theirs = _factors(b)
    for ours, part in zip(factor(a, [part.size for part in theirs]), theirs, strict=True):
        unify(ours, part, why)


def factor(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Take an axis apart into a product.

    Args:
        axis: The axis.
        sizes: Sizes of the parts wanted, slowest first; their product is the axis's size.

    Returns:
        An axis for each size.

    Raises:
        Incompatible: If what is known of the axis doesn't allow it.
    """
    wanted = [size for size in sizes if size != 1]
    parts = iter(_factor(find(axis), wanted) if len(wanted) > 1 else [find(axis)] * len(wanted))
    return [Axis(1) if size == 1 else next(parts) for size in sizes]


def _factor(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    if axis.kind == "atom":
        axis.become("product", [Axis(size) for size in sizes])
    if axis.kind == "concatenation":
        _concatenation_to_product(axis, sizes)
    pending, result = _factors(axis), []
    for size in sizes:
        taken = []
        while size > 1:
            head = pending.pop(0)
            if size % head.size == 0:
                size //= head.size
            elif head.size % size == 0:
                head, rest = factor(head, [size, head.size // size])
                pending.insert(0, rest)
                size = 1
            else:
                raise Incompatible
            taken.append(head)
        result.append(product(taken))
    return result


def _factors(axis: Axis) -> list[Axis]:
    """The parts of a product, with those that are products themselves taken apart."""
    axis = find(axis)
    if axis.kind != "product":
        return [axis]
    return [factor for part in axis.parts for factor in _factors(part)]


def _concatenation_to_product(axis: Axis, sizes: Sequence[int]) -> None:
    """Read parts side by side as a product.

    Heads for queries and heads for keys are all heads times head size; nine shifted images for a convolution written as
    a matrix product are a 3x3 window times channels.
    """
    if all(part.size == 1 for part in axis.parts):
        why = Frozen("the program writes out its units one by one")
        axis.become("product", [Axis(size, why) for size in sizes])
        return
    minors = [math.prod(sizes[k:]) for k in range(len(sizes))]
    fits = (
        k for k in range(1, len(sizes)) if not any(part.size % minors[k] for part in axis.parts)
    )
    k = next(fits, None)
    if k is None:
        raise Incompatible
    heads, tails = [], []
    for part in axis.parts:
        head, *tail = factor(part, [part.size // minors[k], *sizes[k:]])
        heads.append(head)
        tails.append(tail)

    def why_not() -> Frozen:
        return Frozen("parts of one axis are taken apart in different ways", "reshape")

    for tail in tails[1:]:
        for a, b in zip(tails[0], tail, strict=True):
            unify(a, b, why_not)
    axis.become("product", [*factor(concatenation(heads), sizes[:k]), *tails[0]])


def cut(axis: Axis, start: int, stop: int) -> Axis:
    """Take a range out of an axis.

    Raises:
        Incompatible: If a product would be cut elsewhere than between units of its slowest part.
    """
    axis = find(axis)
    if (start, stop) == (0, axis.size):
        return axis
    if start >= stop:
        return Axis(0)
    if axis.kind == "product":
        major, *minor = axis.parts
        inner = axis.size // major.size
        if start % inner or stop % inner:
            raise Incompatible
        return product([cut(major, start // inner, stop // inner), *minor])
    if axis.kind == "atom":
        sizes = [start, stop - start, axis.size - stop]
        axis.become("concatenation", [Axis(size) for size in sizes if size])
    pieces, at = [], 0
    for part in axis.parts:
        low, high = max(start - at, 0), min(stop - at, part.size)
        if low < high:
            pieces.append(cut(part, low, high))
        at += part.size
    return concatenation(pieces)


def strided(axis: Axis, start: int, stop: int, stride: int) -> Axis:
    """Take every `stride`-th unit out of an axis: the even ones of rotary embeddings, say.

    Raises:
        Incompatible: If they are not one unit of each of the `size / stride` stretches.
    """
    if stride == 1:
        return cut(axis, start, stop)
    count, rest = divmod(find(axis).size, stride)
    if rest or start >= stride or len(range(start, stop, stride)) != count:
        raise Incompatible
    outer, phase = factor(axis, [count, stride])
    return product([outer, cut(phase, start, start + 1)])


def locate(axis: Axis, position: Position = Position()) -> Iterator[tuple[Axis, Position]]:  # noqa: B008
    """Each atom of an axis and where its units lie."""
    axis = find(axis)
    offset, stride, loops = position
    if axis.kind == "atom":
        yield axis, position
    elif axis.kind == "concatenation":
        for part in axis.parts:
            yield from locate(part, Position(offset, stride, loops))
            offset += stride * part.size
    else:
        steps, step = [], stride
        for part in reversed(axis.parts):
            steps.append((part.size, step))
            step *= part.size
        steps.reverse()
        for i, part in enumerate(axis.parts):
            others = (*loops, *steps[:i], *steps[i + 1 :])
            yield from locate(part, Position(offset, steps[i][1], others))


def kept_indices(axis: Axis, keep: Mapping[Axis, np.ndarray]) -> np.ndarray | None:
    """Which indices along an axis are left.

    Args:
        axis: The axis.
        keep: For each atom that shrinks the indices of the units kept, increasing.

    Returns:
        Increasing indices; None where all are kept.
    """
    if not any(atom in keep for atom in atoms(axis)):
        return None
    return _kept(find(axis), keep)


def _kept(axis: Axis, keep: Mapping[Axis, np.ndarray]) -> np.ndarray:
    axis = find(axis)
    if axis.kind == "atom":
        return keep[axis] if axis in keep else np.arange(axis.size)
    if axis.kind == "concatenation":
        starts = np.cumsum([0] + [part.size for part in axis.parts])
        pieces = [_kept(part, keep) + at for part, at in zip(axis.parts, starts[:-1], strict=True)]
        return np.concatenate(pieces)
    indices = np.zeros(1, np.int64)
    for part in axis.parts:
        indices = (indices[:, None] * part.size + _kept(part, keep)).reshape(-1)
    return indices
