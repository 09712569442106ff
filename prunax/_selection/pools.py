"""Masks of pools of whole arrays: one threshold a pool, and a cut among the units that tie with it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from prunax import _meshes, trees
from prunax._counts import (
    WIDE,
    Count,
    Number,
    as_count,
    exact_sum,
    less,
    minimum,
    number,
    subtract,
    to_float,
    where,
)
from prunax._selection.keys import largest_key
from prunax._selection.reading import (
    Reader,
    Score,
    count_before,
    cut_ties,
    describe,
    value_of,
    write_mask,
)
from prunax._selection.search import Bracket, cut, of_leaves, pool_totals, search, settle, start

__all__ = ["keep_largest"]

Array = jax.Array
Pools = tuple[tuple[int, ...], ...]  # indices of the leaves of each
Leaves = tuple[Reader, ...]
Owner = tuple[int, ...]  # of each leaf, the pool it belongs to; ascending

_SAMPLE = 4096  # scores a pool, at most, to take the first pivots from
# More arrays than this, when concrete, are read by one small compiled function a shape.
_HOST_LOOP = 16


def keep_largest(
    scores: Sequence[Score], pools: Sequence[tuple[int, ...]], num_pruned: Sequence[Any]
) -> list[Array]:
    """Mask the smallest scores of each pool.

    Args:
        scores: Arrays of any shape and sharding, larger = keep; NaNs rank lowest. ``Partial(f, *arrays)`` stands for
            ``f(*arrays)`` where f is elementwise: it is then evaluated within each read, while an array computed in the
            same jit has to be stored.
        pools: Disjoint tuples of indices into `scores`; each pool is ranked as one set. Arrays in none are kept whole.
        num_pruned: How many elements each pool loses: an int or a `counts.Count`, which may be traced.

    Returns:
        One bool array for each array of `scores`, of its shape and sharding: True = kept. Exactly the asked number is
        False in each pool. Of equal scores the lower flat index is kept first, arrays in the order that the pool lists
        them.

    Raises:
        TypeError: If a pool mixes integers of several types, or integers and floats.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> a, b = jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])
        >>> prunax._selection.keep_largest([a, b], [(0, 1)], [1])
        [Array([ True,  True], dtype=bool), Array([False,  True], dtype=bool)]
    """
    num_pruned = [as_count(k) for k in num_pruned]
    scores = [s if isinstance(s, Partial) else jnp.asarray(s) for s in scores]
    pools = tuple(tuple(map(int, pool)) for pool in pools)
    order = [i for pool in pools for i in pool]
    arrays = jax.tree.leaves((scores, num_pruned))
    if not trees.is_traced(*arrays):
        # Arrays bound to different devices cannot meet in one compiled function; only their counts do, on the host.
        apart = len({_meshes.devices(x) for x in arrays} - {()}) > 1
        if apart or len(order) > _HOST_LOOP:
            return _keep_largest(scores, pools, num_pruned, on_host=True)
    return _keep_largest_jit(scores, pools, num_pruned, False)


def _keep_largest(
    scores: Sequence[Score], pools: Pools, num_pruned: Sequence[Count], on_host: bool
) -> list[Array]:
    order = [i for pool in pools for i in pool]
    masks: list[Any] = [None if i in order else _all_kept(s) for i, s in enumerate(scores)]
    groups: dict[Any, list[int]] = {}
    for p, pool in enumerate(pools):
        if pool:
            groups.setdefault(_kinds([scores[i] for i in pool]), []).append(p)
    for members in groups.values():
        leaves = []
        for p in members:
            found = [describe(scores[i]) for i in pools[p]]
            dtype = _pool_dtype([leaf.dtype for leaf in found])
            leaves += [leaf._replace(dtype=dtype) for leaf in found]
        order = [i for p in members for i in pools[p]]
        owner = tuple(n for n, p in enumerate(members) for _ in pools[p])
        ranked, budgets = [scores[i] for i in order], [num_pruned[p] for p in members]
        table = _thresholds(tuple(leaves), owner, ranked, budgets, on_host)
        for n, i in enumerate(order):
            masks[i] = write_mask(leaves[n], ranked[n], table, _pair(n))
    return masks


@jax.jit
def _all_kept(score: Score) -> Array:
    return jnp.ones_like(value_of(score), dtype=jnp.bool_)


def _kinds(scores: Sequence[Score]) -> Any:
    """What pools must have in common to be searched together, in loops that carry thresholds of all.

    In `jax.shard_map` the mask of an array that all devices share would otherwise vary like the others' thresholds.
    """
    if not trees.is_traced(*jax.tree.leaves(scores)):
        return None
    return frozenset(_meshes.kind(x) for x in jax.tree.leaves(scores))


_keep_largest_jit = jax.jit(_keep_largest, static_argnums=(1, 3))


def _pool_dtype(dtypes: list[np.dtype]) -> np.dtype:
    if len(set(dtypes)) == 1:
        return dtypes[0]
    if not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
        raise TypeError(
            f"keep_largest: a pool must hold floats or one integer type, got {sorted({str(d) for d in dtypes})}."
        )
    return np.dtype("float64") if np.dtype("float64") in dtypes else np.dtype("float32")


def _thresholds(
    leaves: Leaves,
    owner: Owner,
    scores: Sequence[Score],
    num_pruned: Sequence[Count],
    on_host: bool,
) -> Any:
    """`[L, 2]`: of each leaf the threshold key, and the flat index before which keys equal to it are kept."""

    def count(row_of: Callable[[int], int], table: Array, asked: Sequence[int]) -> list[Number]:
        width = table.shape[1]
        counts = [
            count_before(leaves[n], scores[n], table, np.arange(width) + width * row_of(n))
            for n in asked
        ]
        # Counts of arrays on several explicit meshes meet on the first array's.
        return [
            jax.tree.map(lambda c: _meshes.move_to(c, home), c) if not on_host else c
            for c in counts
        ]

    home = jax.tree.leaves(scores)[0]
    of_pool = functools.partial(count, lambda n: owner[n])
    num_pruned = _meshes.vary_like(num_pruned, scores, num_pruned)
    target, bracket = _first_bracket(leaves, owner, num_pruned)
    stride = _sample_stride(leaves, owner)
    if stride is not None:
        samples = [
            _meshes.move_to(_sample(leaf, stride[p], score), home)
            for leaf, p, score in zip(leaves, owner, scores, strict=True)
        ]
        bracket = bracket._replace(pivots=_sampled_pivots(owner, samples, target, bracket))
    bracket = search(owner, target, bracket, of_pool, on_host)
    threshold, share, bracket = _tie_bracket(leaves, owner, target, bracket)
    xp, fetch = (np, jax.device_get) if on_host else (jnp, lambda x: x)
    crowded = sum(leaf.size for leaf in leaves if leaf.crowded)
    if 2 * crowded > sum(leaf.size for leaf in leaves) and all(leaf.tie_rows for leaf in leaves):
        asked = fetch(_table(threshold, share))
        cuts = [
            cut_ties(leaf, score, asked, _pair(n))
            for n, (leaf, score) in enumerate(zip(leaves, scores, strict=True))
        ]
        cuts = jax.device_get(cuts) if on_host else [_meshes.move_to(c, home) for c in cuts]
        return fetch(_table(threshold, xp.stack(cuts)))
    column = fetch(threshold)

    def of_ties(pivots: Array, asked: Sequence[int]) -> list[Number]:
        table = xp.concatenate([pivots.astype(column.dtype), column[:, None]], axis=1)
        return count(lambda n: n, table, asked)

    bracket = search(tuple(range(len(leaves))), share, bracket, of_ties, on_host)
    return fetch(_cuts(threshold, share, bracket))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_bracket(
    leaves: Leaves, owner: Owner, num_pruned: Sequence[Count]
) -> tuple[Number, Bracket]:
    pools = owner[-1] + 1
    sizes = np.zeros(pools, np.uint64)
    largest = np.zeros(pools, np.uint64)
    for leaf, p in zip(leaves, owner, strict=True):
        sizes[p] += np.uint64(leaf.size)
        largest[p] = largest_key(leaf.dtype)
    dtype = np.dtype("uint64" if any(leaf.dtype.itemsize == 8 for leaf in leaves) else "uint32")
    wide_leaf = any(leaf.wide for leaf in leaves)
    wide = wide_leaf or bool((sizes >= WIDE).any())
    num_pruned = jax.tree.map(lambda *k: jnp.stack(k), *[number(k, wide) for k in num_pruned])
    target = subtract(number(sizes, wide), num_pruned)
    size = number(np.asarray([leaf.size for leaf in leaves], np.uint64), wide_leaf)
    return target, start(owner, target, jnp.asarray(largest.astype(dtype)), size)


def _sample_stride(leaves: Leaves, owner: Owner) -> list[int] | None:
    """Of every how many units of each pool one should be looked at for a start; None where that does not pay.

    It does not pay for many small pools, and may move data where arrays are spread over devices.
    """
    pools = owner[-1] + 1
    each = sum(leaf.size for leaf in leaves) // pools
    # For many small pools it would take longer to compile than it saves.
    size = min(_SAMPLE, max(math.isqrt(each), 128) if pools <= _HOST_LOOP else each // 1024)
    if size < 32 or any(leaf.wide or not leaf.local for leaf in leaves):
        return None
    totals = [
        sum(leaf.size for leaf, p in zip(leaves, owner, strict=True) if p == q)
        for q in range(pools)
    ]
    return [-(-total // size) or 1 for total in totals]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(leaf: Reader, stride: int, score: Score) -> Array:
    first = min(stride // 2, leaf.size // 2)
    # Before the score is evaluated: XLA would store that of all units where it computes in a wider type.
    flat = leaf.reshape(score, (leaf.size,))
    return leaf.keys(
        jax.tree.map(lambda x: x[first::stride] if x.shape == (leaf.size,) else x, flat)
    )


@functools.partial(jax.jit, static_argnums=0)
def _sampled_pivots(owner: Owner, samples: list[Array], target: Number, bracket: Bracket) -> Array:
    """First pivots: 0.6 and 2.5 deviations to each side of the expected threshold.

    Where the sample shows a lump of equal scores there, the inner two are the lump and its successor.
    """
    dtype = bracket.low.dtype
    largest = np.array(np.iinfo(dtype).max, dtype)
    rows = [
        jnp.concatenate([s.astype(dtype) for s, o in zip(samples, owner, strict=True) if o == p])
        for p in range(owner[-1] + 1)
    ]
    length = np.asarray([row.size for row in rows], np.float32)
    longest = max(row.size for row in rows)
    sample = jnp.sort(
        jnp.stack([jnp.pad(row, (0, longest - row.size), constant_values=largest) for row in rows]),
        axis=1,
    )

    def at(rank: Any) -> Array:
        index = jnp.clip(rank, 0, np.maximum(length - 1, 0)).astype(jnp.int32)
        return jnp.take_along_axis(sample, index[:, None], axis=1)[:, 0]

    size = to_float(pool_totals(bracket.upto, owner, target))
    share = to_float(target) / jnp.maximum(size, 1)
    rank, deviation = share * length, jnp.sqrt(share * (1 - share) * length)
    margin, first, last = 2.5 * deviation + 1, at(np.zeros_like(length)), at(length)
    # Beyond the sample's ends the threshold may be anywhere: as far again, and twice, as the margin goes inside.
    below, above = at(rank - margin), at(rank + margin)
    lower = jnp.where(rank < margin, first - jnp.minimum(first, (above - first) << 1), below)
    upper = jnp.where(
        rank + margin >= length,
        last + jnp.minimum(largest - last, (last - below) << 1),
        above + 1,
    )
    middle, is_lump = at(rank), at(rank - 1) == at(rank + 1)
    inner = [
        jnp.where(is_lump, middle + j, at(rank + d * deviation)) for j, d in ((0, -0.6), (1, 0.6))
    ]
    pivots = jnp.stack([lower, *inner, upper], axis=1)
    return jnp.clip(pivots, np.array(1, dtype), jnp.maximum(bracket.high, 1)[:, None])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tie_bracket(
    leaves: Leaves, owner: Owner, target: Number, bracket: Bracket
) -> tuple[Array, Number, Bracket]:
    below = pool_totals(bracket.below, owner, target)
    found, threshold = settle(bracket, below, target)
    threshold = of_leaves(threshold, owner)
    ties = subtract(bracket.upto, bracket.below)
    zeros = jax.tree.map(jnp.zeros_like, ties)
    ties = where(of_leaves(found, owner), zeros, ties)
    share = _share_ties(ties, owner, subtract(target, below))
    last = jnp.asarray(np.asarray([max(leaf.size, 1) - 1 for leaf in leaves], np.uint32))
    return threshold, share, start(tuple(range(len(leaves))), share, last, ties)


def _share_ties(ties: Number, owner: Owner, wanted: Number) -> Number:
    """Gives the leaves of a pool, in order, as many of their ties as are still wanted."""
    if owner[-1] + 1 == len(owner):
        return minimum(ties, wanted)
    wide = isinstance(wanted, Count)
    running = exact_sum(ties, lambda c: jnp.cumsum(c, dtype=jnp.uint32), wide)
    ties_ = exact_sum(ties, lambda c: c, wide)
    before = subtract(running, ties_)
    first = np.searchsorted(owner, np.arange(owner[-1] + 1))[np.asarray(owner)]
    before = subtract(before, jax.tree.map(lambda b: b[first], before))
    wanted = jax.tree.map(lambda w: of_leaves(w, owner), wanted)
    left = where(
        less(wanted, before), jax.tree.map(jnp.zeros_like, wanted), subtract(wanted, before)
    )
    share = minimum(ties_, left)
    return share if isinstance(ties, Count) == wide else share.low


def _pair(n: int) -> np.ndarray:
    """The flat positions in a table of two columns that its row n has."""
    return np.arange(2 * n, 2 * n + 2)


@jax.jit
def _table(threshold: Array, other: Array) -> Array:
    return jnp.stack([threshold, other.astype(threshold.dtype)], axis=1)


@jax.jit
def _cuts(threshold: Array, share: Number, bracket: Bracket) -> Array:
    return _table(threshold, cut(bracket, share))
