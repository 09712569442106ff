"""Masks of slices: every one-dimensional slice along an axis of one array is a contest of its own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from prunax import _meshes
from prunax._selection.keys import largest_key
from prunax._selection.reading import PIVOTS, Reader, Score, count_hits, describe
from prunax._selection.search import Bracket, cut, narrow, settle, start

__all__ = ["keep_largest_along"]

Array = jax.Array

_PAIRWISE = 32  # slices up to this length are ranked by comparing all pairs


@functools.partial(jax.jit, static_argnums=1)
def keep_largest_along(scores: Score, axis: int, num_pruned: Any) -> Array:
    """Mask the smallest scores of every slice along an axis.

    Args:
        scores: Array of floats, integers or bools with at least one axis; or ``Partial(f, *arrays)`` for
            ``f(*arrays)``, as for `keep_largest`.
        axis: Every one-dimensional slice along it is a pool of its own, shorter than 2**32. It should not be sharded
            where it is short.
        num_pruned: How many elements each slice loses: an int, or a traced integer scalar.

    Returns:
        A bool array of the scores' shape: True = kept. Of equal scores the lower index is kept first.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax._selection.keep_largest_along(jnp.array([[1.0, 4.0], [2.0, 3.0]]), 0, 1)
        Array([[False,  True],
               [ True, False]], dtype=bool)
    """
    leaf = describe(scores)
    axis %= len(leaf.shape)
    kept = jnp.uint32(leaf.shape[axis]) - jnp.asarray(num_pruned).astype(jnp.uint32)
    kept = _meshes.vary_like(kept, scores)
    if leaf.shape[axis] <= _PAIRWISE and leaf.shards[axis] == 1:
        return _rank_pairs(leaf.keys(scores), axis) < kept
    return _search_slices(leaf, scores, axis, kept)


def _rank_pairs(keys: Array, axis: int) -> Array:
    """The rank of each element in its slice, from all comparisons within the slice."""
    ours, theirs = jnp.expand_dims(keys, axis + 1), jnp.expand_dims(keys, axis)
    shape = jnp.broadcast_shapes(ours.shape, theirs.shape)
    ours, theirs = jnp.broadcast_to(ours, shape), jnp.broadcast_to(theirs, shape)
    i, j = (lax.broadcasted_iota(jnp.uint32, shape, a) for a in (axis, axis + 1))
    return jnp.sum((theirs < ours) | ((theirs == ours) & (j < i)), axis=axis + 1, dtype=jnp.uint32)


def _search_slices(leaf: Reader, scores: Score, axis: int, kept: Array) -> Array:
    """Search for all thresholds at once, then for the cuts among ties.

    Slices are read along the minor axis, where a CPU counts an order of magnitude faster: the scores are transposed
    once, if need be, and that copy is all that is stored.
    """
    n = leaf.shape[axis]
    by_slice = jax.tree.map(
        lambda x: jnp.moveaxis(x, axis, -1) if jnp.shape(x) == leaf.shape else x, scores
    )
    moved = describe(by_slice)
    shape, sharding = _split_minor(moved)

    def split(x: Array) -> Array:
        return lax.reshape(x, shape, out_sharding=sharding) if x.shape == moved.shape else x

    def over(x: Array) -> Array:
        return lax.broadcast_in_dim(x, shape, range(x.ndim), out_sharding=sharding)

    def total(hits: list[Array]) -> Array:
        return jnp.sum(jnp.stack(count_hits(hits, (len(shape) - 1,)), axis=-1), axis=-2)

    def search(target: Array, bracket: Bracket, threshold: Array | None = None) -> Bracket:
        def step(bracket: Bracket) -> Bracket:
            # The barrier keeps XLA from computing and storing keys or positions before the loop.
            source, pivots, zero, tie = lax.optimization_barrier(
                (
                    jax.tree.map(split, by_slice),
                    bracket.pivots,
                    jnp.zeros((), jnp.uint32),
                    threshold,
                )
            )
            keys = leaf.keys(source)
            row = [pivots[..., j] for j in range(PIVOTS)]
            if tie is None:
                counts = total([keys < over(pivot.astype(keys.dtype)) for pivot in row])
            else:
                index = _position(shape, zero, sharding)
                counts = total([(keys == over(tie)) & (index < over(pivot)) for pivot in row])
            return narrow(None, target, bracket, counts)

        return lax.while_loop(lambda bracket: jnp.any(bracket.is_open), step, bracket)

    keys = leaf.keys(scores)
    a_slice = jnp.max(keys, axis=axis)  # for its shape and sharding
    wide = np.dtype("uint64" if leaf.dtype.itemsize == 8 else "uint32")
    highest = jnp.full_like(a_slice, largest_key(leaf.dtype), dtype=wide)
    target = jnp.zeros_like(a_slice, dtype=jnp.uint32) + kept
    everything = jnp.full_like(target, n)
    found = search(target, start(None, target, highest, everything))

    exact, threshold = settle(found, found.below, target)
    threshold = threshold.astype(keys.dtype)
    ties = jnp.where(exact, jnp.zeros_like(target), found.upto - found.below)
    share = jnp.minimum(ties, target - found.below)

    last = jnp.full_like(target, n - 1)
    end = cut(search(share, start(None, share, last, ties), threshold), share)

    # Said for each array: with sharding in types, what is broadcast without it is stored whole on every device.
    whole = leaf.sharding
    others = [a for a in range(len(leaf.shape)) if a != axis]
    threshold, end = (
        lax.broadcast_in_dim(x, leaf.shape, others, out_sharding=whole) for x in (threshold, end)
    )
    here = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis, out_sharding=whole)
    return (keys < threshold) | ((keys == threshold) & (here < end))


def _position(shape: tuple[int, ...], zero: Array, sharding: NamedSharding | None) -> Array:
    """The flat index within the last two axes."""
    outer, inner = (
        lax.broadcasted_iota(jnp.uint32, shape, len(shape) - a, out_sharding=sharding)
        for a in (2, 1)
    )
    return outer * np.uint32(shape[-1]) + inner + zero


def _split_minor(leaf: Reader) -> tuple[tuple[int, ...], NamedSharding | None]:
    """A shape whose last axis lies on one device each, the one before it not, and its sharding.

    Where the type does not tell how the minor axis is divided, a power of two up to 16 is assumed, as in `Reader.grid`.
    """
    *lead, n = leaf.shape
    if leaf.local or leaf.sharding is not None:
        outer = leaf.shards[-1]
    else:
        outer = math.gcd(n, 16)
    axes = (*range(len(leaf.shape)), -1)
    return (*lead, outer, n // outer), _meshes.split(leaf.sharding, axes)
