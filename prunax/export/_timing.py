"""Which form of a weight is the fastest here? Measured, since nothing else knows."""

import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from prunax import patterns
from prunax.export._packed import Dense, Packed, check_matrix, pack

__all__ = ["fastest", "matmul_seconds"]

# A packed weight must win by more than the clock's doubts.
_MARGIN = 0.9
# Short products take turns for so many seconds, however few repeats were asked for: a few of them say nothing.
_LEAST_SECONDS = 0.1


def matmul_seconds(
    weights: Mapping[str, Packed], x: npt.ArrayLike, *, repeats: int = 10
) -> dict[str, float]:
    """Time ``x @ packed`` for several weights side by side.

    Args:
        weights: What to time, by name: `Dense`, `BlockSparse`, `GatherSparse`.
        x: An input ``(..., in)``, or its `jax.ShapeDtypeStruct`.
        repeats: Timed calls of each, more where they are short. They take turns, so that a slow moment of the machine
            falls on all of them.

    Returns:
        The median of each, in seconds, compiled before.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> w = prunax.export.Dense(jnp.eye(8))
        >>> prunax.export.matmul_seconds({"dense": w}, jax.ShapeDtypeStruct((4, 8), jnp.float32))["dense"] > 0
        True
    """
    return {name: statistics.median(own) for name, own in _times(weights, x, repeats).items()}


def _times(weights: Mapping[str, Packed], x: npt.ArrayLike, repeats: int) -> dict[str, list[float]]:
    if isinstance(x, jax.ShapeDtypeStruct):
        x = np.random.default_rng(0).standard_normal(x.shape).astype(x.dtype)
    x = jnp.asarray(x)
    product = jax.jit(lambda packed, x: packed.matmul(x))
    times: dict[str, list[float]] = {name: [] for name in weights}
    for _ in range(2):  # the first compiles, the second warms the caches
        jax.block_until_ready([product(packed, x) for packed in weights.values()])
    begin, turns = time.perf_counter(), 0
    while turns < repeats or time.perf_counter() - begin < _LEAST_SECONDS:
        for name, packed in weights.items():
            start = time.perf_counter()
            product(packed, x).block_until_ready()
            times[name].append(time.perf_counter() - start)
        turns += 1
    return times


def fastest(
    w: jax.Array,
    mask: jax.Array,
    x: npt.ArrayLike,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    repeats: int = 10,
) -> Packed:
    """Measure the dense and the packed product on this machine and keep the faster form.

    Args:
        w: The matrix, ``(in, out)``.
        mask: Bool array of its shape, True = kept.
        x: An input of the shape and dtype to come, ``(..., in)``, or its `jax.ShapeDtypeStruct`. Which form wins
            depends on the batch size: measure with the one that matters.
        pattern: The pattern the mask was made with, see `pack`.
        repeats: Timed calls of each, as for `matmul_seconds`.

    Returns:
        A callable pytree: ``x @ result``, ``result(x)`` or ``result.matmul(x)``. It is the packed form only where both
        the median and the least of its times are at most nine tenths of the dense product's, so that other work on the
        machine does not decide, and a `Dense` of the masked matrix otherwise.

    Raises:
        ValueError: If w is no matrix, or the shapes differ.
        TypeError: If the mask is not boolean.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> w, mask = jnp.ones((64, 64)), jnp.ones((64, 64), bool)
        >>> type(prunax.export.fastest(w, mask, jnp.ones((8, 64)))).__name__
        'Dense'
    """
    check_matrix("fastest", w, mask)
    candidates: dict[str, Packed] = {
        "dense": Dense(jnp.where(mask, w, jnp.zeros((), w.dtype))),
        "packed": pack(w, mask, pattern),
    }
    times = _times(candidates, x, repeats)
    return candidates["packed" if wins(times["packed"], times["dense"]) else "dense"]


def wins(packed: Sequence[float], dense: Sequence[float]) -> bool:
    """Whether the packed times are below the dense ones by more than chance: in the median and in the minimum."""
    return all(of(packed) <= _MARGIN * of(dense) for of in (statistics.median, min))
