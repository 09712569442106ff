"""Axes with as many units as another axis has, in another order: what `sort` and `rev` give.

Such an axis follows its source: it loses as many units as the source does. It may be sliced from one end on, as the
first k places of `argsort` are, where the removed units count as those that come last. Anything else that is done with
it fixes both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from prunax.structured import _axes
from prunax.structured._axes import Axis, Frozen, Incompatible

__all__: list[str] = []


@dataclass(eq=False)
class Follower:
    """An axis and what it follows.

    Attributes:
        axis: The axis.
        source: What it is made of.
        mirrored: Whether it is the source in reverse, or else sorted.
        why: The reason if it cannot follow.
        last: Of a sorted one: whether its last places are taken, and not its first; None until one is.
    """

    axis: Axis
    source: Axis
    mirrored: bool
    why: Frozen
    last: bool | None = None

    def kept(self, source: np.ndarray) -> np.ndarray:
        """Its places that are left, from those of the source."""
        size, count = self.source.size, len(source)
        if self.mirrored:
            return size - 1 - source[::-1]
        return np.arange(size - count, size) if self.last else np.arange(count)


def of(followers: Iterable[Follower], axis: Axis) -> Follower | None:
    """The follower that an axis is."""
    axis = _axes.find(axis)
    return next((f for f in followers if _axes.find(f.axis) is axis), None)


def unmirrored(followers: Sequence[Follower], axis: Axis) -> tuple[Axis, bool]:
    """What an axis is the reverse of, or itself, and whether it is reversed."""
    reverse = False
    while (found := of(followers, axis)) and found.mirrored:
        axis, reverse = found.source, not reverse
    return axis, reverse


def settle(followers: Sequence[Follower], fixed: Iterable[Axis]) -> None:
    """Fix those that cannot follow, and their sources.

    Args:
        followers: All of a program.
        fixed: Axes of parameters and constants, whose units have an order of their own.
    """
    owned = {atom for axis in fixed for atom in _axes.atoms(axis)}
    unsettled = True
    while unsettled:
        unsettled = False
        for f in followers:
            ends = [_axes.find(f.axis), _axes.find(f.source)]
            stuck = any(end.kind != "atom" or end.frozen for end in ends) or ends[0] in owned
            if stuck and not all(a.frozen for end in ends for a in _axes.atoms(end)):
                unsettled = True
                why = next((end.frozen for end in ends if end.frozen), f.why)
                for end in ends:
                    _axes.freeze(end, why)


def extend(followers: Sequence[Follower], keep: dict[Axis, np.ndarray]) -> None:
    """Add to the units that are left those of axes that follow.

    Raises:
        Incompatible: If a part of a source is removed, or a follower was taken apart.
    """
    for f in followers:
        axis, source = _axes.find(f.axis), _axes.find(f.source)
        if source in keep and axis.kind == "atom":
            keep[axis] = f.kept(keep[source])
        elif any(atom in keep for atom in _axes.atoms(source)):
            raise Incompatible
