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


class Bracket(NamedTuple):
    """Where the threshold of each of P pools (of L leaves) can be: `low <= threshold <= high`."""

    low: Array  # [P], or any other shape of pools
    high: Array
    below: Number  # [L], units of the leaf before `low`
    upto: Number  # [L], units of the leaf before `high + 1`
    is_open: Array  # the threshold is not found yet
    inside: Array  # units in the bracket, as a float
    stalls: Array  # reads in a row that did not halve them
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
        jnp.zeros_like(high), high, zeros, upto, high > 0, unknown, jnp.full(high.shape, 0), empty
    )
    return aim(_meshes.vary_like(bracket, target), owner, target)


def _column(x: Array) -> Array:
    return x[..., None]


def aim(bracket: Bracket, owner: Owner, target: Number) -> Bracket:
    """Tells which thresholds are found, and chooses pivots in (low, high] for the others.

    Pivots normally stand around the threshold to be expected if the units inside were evenly spread. A bracket that did
    not halve is not so: it spans many orders of magnitude, or holds lumps of equal scores. Then in turn come (a) the
    roundest number in the middle of the bracket, where a lump is most likely to be (zeros, integers, low precision),
    together with its successor, which isolates it; (b) equal steps.
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
    expected = _column(share) + _column(deviation) * _SPREAD.reshape(row)
    equal = (np.arange(1, PIVOTS + 1, dtype=np.float32) / (PIVOTS + 1)).reshape(row)
    evenly = _column((stalls % 2 == 0) & (stalls > 0) | (steps <= PIVOTS))
    # Just below one, or the product could round up to 2**32 and fall out of the integer type.
    asked = jnp.clip(jnp.where(evenly, equal, expected), 0, 1 - 2.0**-24)
    offsets = jnp.ceil(asked * _column(steps.astype(jnp.float32))).astype(dtype)

    quarter = steps >> 2
    first, last = low + quarter, high - quarter
    bits = np.array(np.iinfo(dtype).bits - 1, dtype)
    tail = (np.array(2, dtype) << (bits - jnp.minimum(lax.clz(first ^ last), bits))) - np.array(
        1, dtype
    )
    roundest = (last & ~(tail >> 1)) - low
    lump = jnp.stack([quarter, roundest, roundest + 1, steps - quarter], axis=-1)
    offsets = jnp.where(_column((stalls % 2 == 1) & (steps > PIVOTS)), lump, offsets)
    pivots = _column(low) + jnp.clip(offsets, np.array(1, dtype), _column(jnp.maximum(steps, 1)))
    return bracket._replace(is_open=is_open, inside=inside, stalls=stalls, pivots=pivots)


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
    bracket = bracket._replace(
        low=jnp.maximum(bracket.low, low),
        high=jnp.where(any_reaches, jnp.minimum(bracket.high, high), bracket.high),
        below=below,
        upto=upto,
    )
    return aim(bracket, owner, target)


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
