"""The search for thresholds: brackets around them, narrowed by counts at a few pivots a read."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunax import _meshes
from prunax._counts import Count, Number, exact_sum, less, subtract, to_float, where
from prunax._selection.reading import PIVOTS

__all__ = ["Bracket"]

Array = jax.Array
# Of each leaf the pool it belongs to, ascending; None where each is a pool of its own.
Owner = tuple[int, ...] | None

# Where pivots go around the expected threshold, in its standard deviations.
_SPREAD = np.asarray([-2.2, -0.6, 0.6, 2.2], np.float32)
_DOUBT = 0.2  # of what the bend moves them by, a standard deviation


class Bracket(NamedTuple):
    """Where the threshold of each of P pools (of L leaves) can be: `low <= threshold <= high`."""

    low: Array  # [P], or any other shape of pools
    high: Array
    below: Number  # [L], units of the leaf before `low`
    upto: Number  # [L], units of the leaf before `high + 1`
    is_open: Array  # the threshold is not found yet
    inside: Array  # units in the bracket, as a float
    stalls: Array  # reads in a row that did not halve them
    bend: Array  # b, where the share of the units before a part x of the bracket is about x + b x (1 - x)
    pivots: Array  # [P, PIVOTS], to be counted next


def pool_totals(counts: Number, owner: Owner, target: Number) -> Number:
    """What the leaves of each pool come to, in words as wide as the target's."""
    if owner is None or owner[-1] + 1 == len(owner):
        return counts
    pools = owner[-1] + 1
    if pools == 1:
        return exact_sum(
            counts,
            lambda c: jnp.sum(c, axis=0, keepdims=True, dtype=jnp.uint32),
            isinstance(target, Count),
        )
    return exact_sum(
        counts,
        lambda c: jax.ops.segment_sum(c, np.asarray(owner), pools, indices_are_sorted=True),
        isinstance(target, Count),
    )


def start(owner: Owner, target: Number, high: Array, upto: Number) -> Bracket:
    """The bracket before anything is counted: all keys up to `high`, `upto` units of each leaf."""
    zeros = jax.tree.map(jnp.zeros_like, upto)
    empty = jnp.zeros((*high.shape, PIVOTS), high.dtype)
    unknown = jnp.full(high.shape, jnp.inf, jnp.float32)
    bracket = Bracket(
        low=jnp.zeros_like(high),
        high=high,
        below=zeros,
        upto=upto,
        is_open=high > 0,
        inside=unknown,
        stalls=jnp.full(high.shape, 0),
        bend=jnp.zeros(high.shape, jnp.float32),
        pivots=empty,
    )
    return aim(_meshes.vary_like(bracket, target), owner, target)


def _column(x: Array) -> Array:
    return x[..., None]


def aim(bracket: Bracket, owner: Owner, target: Number) -> Bracket:
    """Tells which thresholds are found, and chooses pivots in (low, high] for the others.

    Pivots normally stand around the threshold to be expected if the units inside were spread evenly, or denser towards
    one end as their neighbours tell (`_bend`). A bracket that did not halve is not so. Either it holds lumps of equal
    scores (zeros, integers, low precision): then come the roundest number in it and the roundest near the expected
    threshold, where lumps are most likely to be, each with its successor, which isolates it. Or it spans many orders of
    magnitude, or only a few units: then come equal steps. Where many units are left both are tried in turn.
    """
    low, high, dtype = bracket.low, bracket.high, bracket.low.dtype
    below, upto = (pool_totals(c, owner, target) for c in (bracket.below, bracket.upto))
    is_open = less(below, target) & less(target, upto) & (low < high)
    inside = to_float(subtract(upto, below))
    stalls = jnp.where(inside * 2 > bracket.inside, bracket.stalls + 1, 0)

    steps = high - low
    share = to_float(subtract(target, below)) / jnp.maximum(inside, 1)
    deviation = jnp.sqrt(jnp.maximum(share * (1 - share), 0) / jnp.maximum(inside, 1))
    row = (1,) * share.ndim + (PIVOTS,)
    bend = bracket.bend
    place = share - bend * share * (1 - share)
    slope = 1 + bend * (1 - 2 * place)
    place -= (place + bend * place * (1 - place) - share) / slope  # one step of Newton's
    deviation = jnp.sqrt(
        jnp.square(deviation / slope) + jnp.square(_DOUBT * bend * share * (1 - share))
    )
    deviation = jnp.maximum(deviation, 1 / jnp.maximum(steps.astype(jnp.float32), 1))
    expected = _column(place) + _column(deviation) * _SPREAD.reshape(row)
    equal = (np.arange(1, PIVOTS + 1, dtype=np.float32) / (PIVOTS + 1)).reshape(row)
    lumps = (stalls % 2 == 1) & (steps > PIVOTS) & (inside > 2 * PIVOTS)
    evenly = _column((stalls > 0) & ~lumps | (steps <= PIVOTS))
    # Just below one, or the product could round up to 2**32 and fall out of the integer type.
    asked = jnp.clip(jnp.where(evenly, equal, expected), 0, 1 - 2.0**-24)
    offsets = jnp.ceil(asked * _column(steps.astype(jnp.float32))).astype(dtype)

    quarter = steps >> 2
    near = jnp.ceil(jnp.clip(place, 0.25, 0.75) * steps.astype(jnp.float32)).astype(dtype)
    one = np.array(1, dtype)
    of_all = _roundest(low + one, high) - low
    of_near = _roundest(low + near - quarter, low + near + quarter) - low
    first = jnp.minimum(of_all, of_near)
    second = jnp.maximum(jnp.maximum(of_all, of_near), first + one)
    lump = jnp.stack([first, first + one, second, second + one], axis=-1)
    offsets = jnp.where(_column(lumps), lump, offsets)
    pivots = _column(low) + jnp.clip(offsets, one, _column(jnp.maximum(steps, one)))
    return bracket._replace(is_open=is_open, inside=inside, stalls=stalls, pivots=pivots)


def _roundest(first: Array, last: Array) -> Array:
    """The number in [first, last] with the most zeros at its end."""
    one, bits = np.array(1, first.dtype), np.array(np.iinfo(first.dtype).bits - 1, first.dtype)
    differ = (first - one) ^ last
    tail = (np.array(2, first.dtype) << (bits - jnp.minimum(lax.clz(differ), bits))) - one
    return last & ~(tail >> 1)


def narrow(owner: Owner, target: Number, bracket: Bracket, counts: Number) -> Bracket:
    """The bracket after counting its pivots, of each leaf along the last axis."""
    totals = pool_totals(counts, owner, target)
    goal = jax.tree.map(lambda t: jnp.broadcast_to(_column(t), bracket.pivots.shape), target)
    is_open = _column(bracket.is_open)
    fits, reaches = is_open & ~less(goal, totals), is_open & ~less(totals, goal)
    low = jnp.max(jnp.where(fits, bracket.pivots, np.array(0, bracket.low.dtype)), axis=-1)
    high = (
        jnp.min(
            jnp.where(
                reaches,
                bracket.pivots,
                np.array(np.iinfo(bracket.low.dtype).max, bracket.low.dtype),
            ),
            axis=-1,
        )
        - 1
    )
    # Counts grow with the pivots, so the count at the highest pivot that fits is the highest count of one that fits.
    below, upto = bracket.below, bracket.upto
    for j in range(PIVOTS):
        count = jax.tree.map(operator.itemgetter((..., j)), counts)
        fit, reach = (of_leaves(hit[..., j], owner) for hit in (fits, reaches))
        below = where(fit & less(below, count), count, below)
        upto = where(reach & less(count, upto), count, upto)
    any_reaches = jnp.any(reaches, axis=-1)
    bend = bracket.bend if owner is None else _bend(bracket, owner, target, fits, reaches, totals)
    bracket = bracket._replace(
        bend=bend,
        low=jnp.maximum(bracket.low, low),
        high=jnp.where(any_reaches, jnp.minimum(bracket.high, high), bracket.high),
        below=below,
        upto=upto,
    )
    return aim(bracket, owner, target)


def _bend(
    bracket: Bracket, owner: Owner, target: Number, fits: Array, reaches: Array, totals: Number
) -> Array:
    """How units crowd in the bracket to come: from the density in it, and in the parts to its left and right.

    Pivots ascend, so the bracket lies between the last that fits and the first that reaches.
    """
    first, last = (pool_totals(c, owner, target) for c in (bracket.below, bracket.upto))
    # Units between neighbours, and how far those lie apart: the bracket's ends are pivots like the others.
    ends = jax.tree.map(
        lambda a, t, b: jnp.concatenate([_column(a), t, _column(b)], -1), first, totals, last
    )
    counts = to_float(
        subtract(
            jax.tree.map(operator.itemgetter((..., slice(1, None))), ends),
            jax.tree.map(operator.itemgetter((..., slice(None, -1))), ends),
        )
    )
    places = jnp.concatenate([_column(bracket.low), bracket.pivots, _column(bracket.high)], axis=-1)
    steps = (places[..., 1:] - places[..., :-1]).astype(jnp.float32)
    here = jnp.sum(fits, axis=-1)  # the part in which the threshold is

    def part(offset: int) -> list[Array]:
        number = lax.broadcasted_iota(here.dtype, steps.shape, steps.ndim - 1)
        is_it = number == _column(here + offset)
        return [jnp.sum(jnp.where(is_it, x, 0), axis=-1) for x in (counts, steps)]

    (count, step), *others = part(0), part(-1), part(1)
    bend, weight, noise = 0.0, 0.0, 0.0
    for sign, (beside, apart) in zip((1, -1), others, strict=True):
        far = apart / jnp.maximum(step, 1)
        ratio = beside * jnp.maximum(step, 1) / (jnp.maximum(count, 1) * jnp.maximum(apart, 1))
        trust = jnp.where((apart > 0) & (beside > 0), 1 / jnp.square(1 + far), 0)
        bend += sign * (ratio - 1) * trust
        weight += trust * (1 + far)
        noise += jnp.square(trust * ratio) * (
            1 / jnp.maximum(beside, 1) + 1 / jnp.maximum(count, 1)
        )
    square = jnp.square(bend)
    bend = bend / jnp.maximum(weight, 1e-6) * square / jnp.maximum(square + 4 * noise, 1e-12)
    return jnp.clip(bend, -0.8, 0.8)


def of_leaves(of_pools: Array, owner: Owner) -> Array:
    """For each leaf what its pool has."""
    if owner is None:
        return of_pools
    if owner[-1] == 0:
        return jnp.broadcast_to(of_pools, (len(owner), *of_pools.shape[1:]))
    return of_pools if owner[-1] + 1 == len(owner) else of_pools[np.asarray(owner)]


def settle(bracket: Bracket, below: Number, target: Number) -> tuple[Array, Array]:
    """Of a bracket that is searched: whether `low` has exactly the units before it, and the threshold key."""
    exact = ~less(below, target)
    return exact, jnp.where(exact, bracket.low, bracket.high)


def cut(bracket: Bracket, share: Number) -> Array:
    """The index before which as many ties lie as are to be kept."""
    return jnp.where(less(bracket.below, share), bracket.high + 1, bracket.low)


@functools.partial(jax.jit, static_argnums=(0,))
def _narrow_leaves(
    owner: Owner, target: Number, bracket: Bracket, counts: Sequence[Number]
) -> Bracket:
    # The barrier keeps XLA from turning the sum of a stack into a chain of sums, one rewrite of the module at a time.
    counts = lax.optimization_barrier(jax.tree.map(lambda *c: jnp.stack(c), *counts))
    return narrow(owner, target, bracket, counts)


def search(
    owner: tuple[int, ...],
    target: Number,
    bracket: Bracket,
    count: Callable[[Array, Sequence[int]], list[Number]],
    on_host: bool,
) -> Bracket:
    """Narrows brackets until `target` units come before `low` or `high + 1`, or `low == high`."""
    if not on_host:

        def step(bracket: Bracket) -> Bracket:
            return _narrow_leaves(owner, target, bracket, count(bracket.pivots, range(len(owner))))

        return lax.while_loop(lambda bracket: jnp.any(bracket.is_open), step, bracket)
    unread = jax.tree.map(lambda c: np.zeros(PIVOTS, np.uint32), bracket.below)
    counts = [unread] * len(owner)
    while True:
        is_open, pivots = jax.device_get((bracket.is_open, bracket.pivots))
        if not is_open.any():
            return bracket
        asked = [n for n, p in enumerate(owner) if is_open[p]]
        # By way of the host, since the arrays may be bound to different devices.
        for n, c in zip(asked, jax.device_get(count(pivots, asked)), strict=True):
            counts[n] = c
        bracket = _narrow_leaves(owner, target, bracket, counts)
