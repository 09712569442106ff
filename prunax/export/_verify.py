"""Do masks follow a pattern? Asked before a kernel relies on it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prunax import patterns, trees

__all__ = ["PatternReport", "verify_pattern"]

PyTree = Any


class PatternReport(NamedTuple):
    """What `verify_pattern` looked at. All of it follows the pattern.

    Attributes:
        pattern: The pattern.
        paths: Paths of the leaves with masks of their own.
        weights: Number of their weights.
        kept: Number of those kept.
    """

    pattern: patterns.Pattern
    paths: tuple[str, ...]
    weights: int
    kept: int


def verify_pattern(masks: PyTree, pattern: patterns.Pattern) -> PatternReport:
    """Check that every mask of a tree follows a pattern.

    `NM(n, m)` wants at most n kept in each group of m, `ConstantFanIn` the same number in each slice of a leaf, `Block`
    and `Channel` units kept or removed whole. Scalar masks, of leaves that are not prunable, are passed over.

    Args:
        masks: A mask tree, True = kept.
        pattern: The pattern, from `prunax.patterns` or one of your own.

    Returns:
        A `PatternReport`, if all is well.

    Raises:
        ValueError: If a mask does not follow the pattern, naming the first such leaf and the first such unit of it.
        TypeError: If a mask is not boolean, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> masks = {"kernel": jnp.array([[True], [True], [False], [True]])}
        >>> prunax.export.verify_pattern(masks, prunax.patterns.NM(3, 4)).kept
        3
        >>> prunax.export.verify_pattern(masks, prunax.patterns.NM(2, 4))
        Traceback (most recent call last):
        ...
        ValueError: verify_pattern: 'kernel' does not follow NM(n=2, m=4, axis=-2): unit (0, 0) keeps 3 of its 4
        weights, and 2 are allowed. Make masks with compute_masks(..., pattern=NM(n=2, m=4, axis=-2)).
    """
    leaves = trees.check_masks("verify_pattern", masks, masks)
    named = [(path, m) for path, m in zip(trees.paths(masks), leaves, strict=True) if np.shape(m)]
    patterns.check_fit("verify_pattern", pattern, [(path, m.shape) for path, m in named])
    weights = kept = 0
    for path, mask in named:
        problem = _violation(jnp.asarray(mask), pattern)
        if problem is not None:
            raise ValueError(
                f"verify_pattern: {path!r} does not follow {pattern}: {problem}. "
                f"Make masks with compute_masks(..., pattern={pattern})."
            )
        weights, kept = weights + mask.size, kept + int(np.count_nonzero(mask))
    return PatternReport(pattern, tuple(path for path, _ in named), weights, kept)


def _violation(mask: Any, pattern: patterns.Pattern) -> str | None:
    """Say what is wrong with the first unit that breaks the pattern, or None."""
    if not mask.size:
        return None
    if pattern.compare_axis is None:  # units go together
        whole = pattern.expand(pattern.pool(mask.astype(jnp.float32)) > 0, mask.shape)
        broken = pattern.pool((whole != mask).astype(jnp.float32)) > 0
        if not jnp.any(broken):
            return None
        return f"unit {_first(broken)} is removed in part. Units are kept or removed whole"
    # The units are the weights, moved so that those which compete lie along one axis.
    units = np.asarray(pattern.pool(mask.astype(jnp.float32)) > 0)
    length = units.shape[pattern.compare_axis]
    counts = np.count_nonzero(units, axis=pattern.compare_axis)
    if pattern.implied_sparsity is None:
        allowed = counts.reshape(-1)[0]
        broken = counts != allowed
        rule = f"the first keeps {allowed}. Every unit keeps the same number"
    else:
        allowed = length - round(pattern.implied_sparsity * length)
        broken = counts > allowed
        rule = f"{allowed} are allowed"
    if not broken.any():
        return None
    index = _first(broken)
    return f"unit {index} keeps {counts[index]} of its {length} weights, and {rule}"


def _first(broken: Any) -> tuple[int, ...]:
    index = np.unravel_index(int(np.argmax(np.asarray(broken))), broken.shape)
    return tuple(int(i) for i in index)
