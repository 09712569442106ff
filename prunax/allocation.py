"""Allocations: how an overall sparsity becomes pools of leaves with budgets.

An allocation is a function ``allocation(leaves, sparsity) -> Pools``. It sees what is static about each prunable
leaf, and a sparsity that may be a number or traced, and says which leaves compete in one pool, the sparsity of each
pool, and whether scores are rescaled first. Any function with that signature will do.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from prunax import _meshes, schedules, trees

__all__ = [
    "Allocation",
    "Leaf",
    "Pool",
    "Pools",
    "by_path",
    "erdos_renyi",
    "global_ranking",
    "lamp",
    "uniform",
]


class Leaf(NamedTuple):
    """What an allocation knows of a prunable leaf. All static.

    Attributes:
        path: ``encoder/0/kernel``.
        shape: Shape of the leaf.
        num_units: How many units (weights, blocks, channels) the pattern makes of it.
    """

    path: str
    shape: tuple[int, ...]
    num_units: int


class Pool(NamedTuple):
    """Leaves that compete for one budget.

    Attributes:
        leaves: Indices into the leaves given to the allocation.
        sparsity: Fraction of the pool's units to prune: a number, or a traced float32 scalar. Of n units
            ``round(sparsity * n)`` go, halves rounded to even.
    """

    leaves: tuple[int, ...]
    sparsity: Any


class Pools(NamedTuple):
    """What an allocation makes of a sparsity.

    Attributes:
        pools: Disjoint pools. Leaves in none of them are kept whole.
        rescale: A function applied to the unit scores of each leaf before they are ranked, or None. It must be the
            same object in every call, since it is a static argument of the compiled selection.
    """

    pools: tuple[Pool, ...]
    rescale: Callable[[jax.Array], jax.Array] | None = None


Allocation = Callable[[Sequence[Leaf], Any], Pools]
"""An allocation: from the prunable leaves and an overall sparsity, pools with sparsities."""


def uniform(leaves: Sequence[Leaf], sparsity: chex.Numeric) -> Pools:
    """Give every leaf the same sparsity: one pool a leaf.

    Args:
        leaves: The prunable leaves.
        sparsity: Fraction in [0, 1], may be traced.

    Returns:
        One pool a leaf, each losing ``round(sparsity * num_units)`` units.

    Examples:
        >>> import prunax
        >>> leaf = prunax.allocation.Leaf("kernel", (10, 10), 100)
        >>> prunax.allocation.uniform([leaf], 0.25).pools
        (Pool(leaves=(0,), sparsity=0.25),)
    """
    return Pools(_one_each([sparsity] * len(leaves)))


def global_ranking(
    leaves: Sequence[Leaf], sparsity: chex.Numeric, *, normalize: bool = False
) -> Pools:
    """Rank the units of all leaves together: one pool.

    Args:
        leaves: The prunable leaves.
        sparsity: Fraction in [0, 1] of all units, may be traced.
        normalize: Divide each leaf's scores by their root mean square first. Off by default: raw scores are ranked.
            ``functools.partial(global_ranking, normalize=True)`` is an allocation.

    Returns:
        One pool with every leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": {"kernel": jnp.array([[1.0, 2.0]])}, "b": {"kernel": jnp.array([[3.0, 4.0]])}}
        >>> masks = prunax.compute_masks(params, 0.5, allocation=prunax.allocation.global_ranking)
        >>> masks["a"]["kernel"].tolist(), masks["b"]["kernel"].tolist()
        ([[False, False]], [[True, True]])

    References:
        Blalock et al., What is the State of Neural Network Pruning?, 2020, arXiv:2003.03033: global magnitude.
    """
    return Pools(_one_pool(leaves, sparsity), _unit_rms if normalize else None)


def lamp(leaves: Sequence[Leaf], sparsity: chex.Numeric) -> Pools:
    r"""Layer-adaptive magnitude: rank all leaves together by LAMP scores.

    .. math:: \mathrm{lamp}(u) = \frac{w_u^2}{\sum_{v : |w_v| \ge |w_u|} w_v^2}

    A leaf's largest unit scores 1, so at least one weight a leaf is kept as long as there is one to keep for each. The
    given scores stand in for |w|. Rescaling sorts each leaf, and so needs it whole: a sharded one is gathered on every
    device, one leaf after the other where the call is not compiled, and the scores are sharded again.

    Args:
        leaves: The prunable leaves.
        sparsity: Fraction in [0, 1] of all units, may be traced.

    Returns:
        One pool with every leaf, and the rescaling.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": {"kernel": jnp.array([[1.0, 1.0]])}, "b": {"kernel": jnp.array([[3.0, 40.0]])}}
        >>> masks = prunax.compute_masks(params, 0.5, allocation=prunax.allocation.lamp)
        >>> masks["a"]["kernel"].tolist(), masks["b"]["kernel"].tolist()
        ([[True, False]], [[False, True]])

    References:
        Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, 2021, arXiv:2010.07611, equation 3.
    """
    return Pools(_one_pool(leaves, sparsity), _lamp_scores)


def erdos_renyi(leaves: Sequence[Leaf], sparsity: chex.Numeric) -> Pools:
    r"""Erdos-Renyi-kernel: a leaf's density is proportional to the sum of its dimensions over their product.

    Small leaves stay denser than large ones. A leaf whose density would exceed 1 is kept whole and the others bear the
    rest, so that the overall sparsity holds up to the rounding of each leaf's budget.

    Args:
        leaves: The prunable leaves.
        sparsity: Fraction in [0, 1] of all weights, may be traced.

    Returns:
        One pool a leaf, each with its own sparsity.

    Examples:
        >>> import prunax
        >>> leaves = [prunax.allocation.Leaf("a", (10, 10), 100), prunax.allocation.Leaf("b", (100, 100), 10_000)]
        >>> [round(float(pool.sparsity), 4) for pool in prunax.allocation.erdos_renyi(leaves, 0.9).pools]
        [0.0818, 0.9082]

    References:
        Evci et al., Rigging the Lottery, 2020, arXiv:1911.11134, section 3; Mocanu et al., Scalable Training of
        Artificial Neural Networks with Adaptive Sparse Connectivity, 2018, arXiv:1707.04780, equation 3.
    """
    if not leaves:
        return Pools(())
    if trees.is_traced(sparsity):
        sparsity = jnp.asarray(sparsity, jnp.float32)
    sizes = np.array([np.prod(leaf.shape, dtype=np.float64) for leaf in leaves])
    share = sizes / max(sizes.sum(), 1.0)
    # A leaf without axes counts as one of a single axis, of length 1.
    raw = np.array(
        [sum(leaf.shape or (1,)) / max(size, 1.0) for leaf, size in zip(leaves, sizes, strict=True)]
    )
    # Fill the leaves with the largest raw densities first. With the first j of them kept whole, the others get
    # scale_j * raw; the right j is the first whose densities all stay within 1.
    order = np.argsort(-raw, kind="stable")
    weight = (share * raw)[order]
    filled = np.concatenate([[0.0], np.cumsum(share[order])[:-1]])
    rest = np.cumsum(weight[::-1])[::-1]
    xp = jnp if trees.is_traced(sparsity) else np
    cast = (lambda x: jnp.asarray(x, jnp.float32)) if xp is jnp else np.asarray
    scale = xp.maximum((1 - sparsity) - cast(filled), 0) / cast(
        np.maximum(rest, 1e-300 if xp is np else 1e-30)
    )
    fits = scale * cast(raw[order]) <= 1
    scale = xp.where(xp.any(fits), scale[xp.argmax(fits)], cast(np.inf))
    density = xp.where(sparsity <= 0, cast(1.0), xp.minimum(scale * cast(raw), cast(1.0)))
    return Pools(_one_each([1 - density[i] for i in range(len(leaves))]))


def by_path(sparsities: Mapping[str, float]) -> Allocation:
    """Give leaves their sparsities by name.

    The sparsities are constants: under a schedule, which moves the overall sparsity, a named leaf has its own from the
    first update on.

    Args:
        sparsities: A path or a glob to a sparsity, as in ``{"encoder/*": 0.9, "head/kernel": 0.5}``; the first that
            matches a leaf counts. Leaves that none matches get the overall sparsity of the call, and are kept whole
            where that is None.

    Returns:
        The allocation. It needs no overall sparsity.

    Raises:
        ValueError: If a sparsity is not in [0, 1]; when applied, if a pattern matches no prunable leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"body": {"kernel": jnp.ones((4, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
        >>> allocation = prunax.allocation.by_path({"head/*": 0.5})
        >>> masks = prunax.compute_masks(params, 0.75, allocation=allocation)
        >>> int(masks["body"]["kernel"].sum()), int(masks["head"]["kernel"].sum())
        (4, 4)
    """
    for pattern, sparsity in sparsities.items():
        schedules.check_sparsity("by_path", sparsity, f"the sparsity of {pattern!r}")
    return _ByPath(tuple(sparsities.items()))


def needs_sparsity(allocation: Allocation) -> bool:
    """Say whether an allocation asks for an overall sparsity: one with a false `needs_sparsity` does not."""
    return getattr(allocation, "needs_sparsity", True)


@dataclass(frozen=True)
class _ByPath:
    sparsities: tuple[tuple[str, float], ...]

    needs_sparsity = False

    def __call__(self, leaves: Sequence[Leaf], sparsity: chex.Numeric | None) -> Pools:
        for pattern, _ in self.sparsities:
            if not any(_matches(leaf.path, pattern) for leaf in leaves):
                known = ", ".join(leaf.path for leaf in leaves)
                raise ValueError(
                    f"by_path: {pattern!r} matches no prunable leaf. Prunable are: {known}. "
                    f"Correct the path, use a glob such as '*/kernel', or choose the leaf with `where`."
                )
        pools = []
        for i, leaf in enumerate(leaves):
            own = [s for pattern, s in self.sparsities if _matches(leaf.path, pattern)]
            if own or sparsity is not None:
                pools.append(Pool((i,), own[0] if own else sparsity))
        return Pools(tuple(pools))


def check_allocation(function: str, allocation: object) -> None:
    """Raise TypeError, saying what to pass, unless it can be called as an allocation."""
    if isinstance(allocation, type):
        raise TypeError(
            f"{function}: allocation must be an allocation, got a class. Call it: {allocation.__name__}(...)."
        )
    if callable(allocation):
        return
    mend = "such as allocation.global_ranking, allocation.erdos_renyi or allocation.by_path({...})"
    if isinstance(allocation, dict):
        mend = "allocation.by_path({...})"
    elif isinstance(allocation, str):
        word = allocation.replace("-", "_").lower()
        near = [name for name in __all__ if name.startswith(word) and name.islower()]
        mend = f"allocation.{near[0]}" if near else mend
    raise TypeError(
        f"{function}: allocation must be a function, got {allocation!r}. Pass one of prunax.allocation: {mend}."
    )


def _matches(path: str, pattern: str) -> bool:
    # A path itself as well, since brackets in it would be read as a set of characters.
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


def _one_pool(leaves: Sequence[Leaf], sparsity: Any) -> tuple[Pool, ...]:
    return (Pool(tuple(range(len(leaves))), sparsity),)


def _one_each(sparsities: Sequence[Any]) -> tuple[Pool, ...]:
    return tuple(Pool((i,), sparsity) for i, sparsity in enumerate(sparsities))


def _unit_rms(scores: jax.Array) -> jax.Array:
    xp = np if isinstance(scores, np.ndarray) else jnp  # on the host where the scores are
    x = scores.astype(trees.wide_dtype(scores.dtype))
    # An infinite score stays what it is, and takes no other's place from it.
    finite = xp.isfinite(x)
    count = xp.maximum(xp.sum(finite), 1).astype(x.dtype)
    rms = xp.sqrt(xp.sum(xp.square(xp.where(finite, x, 0))) / count)
    return x / xp.where(rms > 0, rms, 1)


def _lamp_scores(scores: jax.Array) -> jax.Array:
    return _meshes.shard_like(_divided_by_larger(scores), scores)


@jax.jit  # one program: op by op, collectives of several processes may meet in another order in each
def _divided_by_larger(scores: jax.Array) -> jax.Array:
    whole = _meshes.gather(scores)
    x = jnp.abs(whole.astype(trees.wide_dtype(scores.dtype))).reshape(-1)
    # NaN counts as nothing here and ranks lowest in the end. Next to an infinite score finite ones are as nothing too.
    # Divided by a power of two near the largest, no square overflows and no score changes by rounding.
    numbers = jnp.where(jnp.isnan(x), 0, x)
    largest = jnp.max(numbers, initial=0)
    _, exponent = jnp.frexp(largest)
    infinite = jnp.isinf(numbers).astype(x.dtype)
    square = jnp.square(jnp.where(jnp.isinf(largest), infinite, jnp.ldexp(numbers, -exponent)))
    # Stable, so that of equal magnitudes the lower index has the smaller sum behind it and the larger score.
    order = jnp.argsort(square, descending=True, stable=True)
    ranked = square[order]
    total = jnp.cumsum(ranked)
    ranked = jnp.where(total > 0, ranked / jnp.where(total > 0, total, 1), 0)
    lamp_scores = jnp.zeros_like(square).at[order].set(ranked)
    return jnp.where(jnp.isnan(x), jnp.nan, lamp_scores).reshape(scores.shape)
