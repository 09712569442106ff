"""Screening: what looks wrong in batches and in pruned params, as data. Nothing is changed and nothing is raised."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import trees
from prunax.reports._tables import Table

__all__ = ["Finding", "findings_table", "screen_batch", "screen_params"]

PyTree = Any


class Finding(NamedTuple):
    """Something that someone should look at.

    Attributes:
        path: Of the leaf: ``encoder/0/kernel``.
        kind: "not finite", "out of range", "constant", "empty", "outliers" or "units without weights".
        number: How many elements (or units).
        size: Of how many.
        detail: What was found and what it may mean.
    """

    path: str
    kind: str
    number: int
    size: int
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}, {self.number:,} of {self.size:,}. {self.detail}"


def screen_batch(
    batch: PyTree, *, low: float | None = None, high: float | None = None
) -> tuple[Finding, ...]:
    """Look for values in a batch that training or calibration should not see.

    Args:
        batch: Pytree of arrays: images, labels, tokens. Leaves that are not arrays are left out.
        low: The least value that a floating-point leaf may hold; None for no limit.
        high: The largest.

    Returns:
        Findings in tree order: NaN or infinite values; values below `low` or above `high`; floating-point leaves
        of more than one element that are all equal. Integer leaves are not looked at: a batch may be of one label.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> batch = {"image": jnp.array([[0.5, jnp.nan], [300.0, 0.1]]), "label": jnp.array([3, 3])}
        >>> [(f.path, f.kind, f.number) for f in prunax.reports.screen_batch(batch, low=0.0, high=1.0)]
        [('image', 'not finite', 1), ('image', 'out of range', 1)]
    """
    found = []
    for path, x in _floating(batch):
        finite = jnp.isfinite(x)
        broken = int(jnp.sum(~finite))
        if broken:
            found.append(
                Finding(
                    path,
                    "not finite",
                    broken,
                    x.size,
                    "NaN or infinite values spread to every gradient.",
                )
            )
        outside = jnp.zeros((), bool)
        if low is not None:
            outside = outside | (x < low)
        if high is not None:
            outside = outside | (x > high)
        count = int(jnp.sum(outside & finite))
        if count:
            seen = f"Values go from {_least(x, finite):g} to {-_least(-x, finite):g}. Were they scaled?"
            found.append(Finding(path, "out of range", count, x.size, seen))
        if x.size > 1 and not broken and bool(jnp.all(x == x.reshape(-1)[0])):
            found.append(
                Finding(
                    path,
                    "constant",
                    x.size,
                    x.size,
                    "All values are equal: there is nothing to learn from it.",
                )
            )
    return tuple(found)


def screen_params(
    params: PyTree, masks: PyTree | None = None, *, outlier: float = 30.0
) -> tuple[Finding, ...]:
    """Look for what may have gone wrong in pruning or training.

    Args:
        params: Pytree of arrays.
        masks: Mask tree of the same structure, True = kept. Without it weights that are zero count as pruned.
        outlier: A kept weight is an outlier beyond so many times the root mean square of its leaf's kept weights.

    Returns:
        Findings in tree order: weights that are not finite; prunable leaves that are empty, through which nothing
        passes; output units (last axis) of matrices and kernels that have no weight left, which structural pruning can
        remove; outliers, which a reconstruction on too little data leaves behind.

    Raises:
        ValueError: If the structures differ, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[1.0, 0.0], [2.0, 0.0]])}
        >>> for finding in prunax.reports.screen_params(params):
        ...     print(finding)
        kernel: units without weights, 1 of 2. Their outputs are constant; structural pruning can remove them.
    """
    kept_leaves = (
        [None] * len(jax.tree.leaves(params))
        if masks is None
        else trees.check_masks("screen_params", params, masks)
    )
    masked = dict(zip(trees.paths(params), kept_leaves, strict=True))
    kernels = set(trees.select(params, trees.is_kernel).paths)
    found = []
    for path, x in _floating(params):
        mask = masked[path]
        finite = jnp.isfinite(x)
        broken = int(jnp.sum(~finite))
        if broken:
            found.append(
                Finding(path, "not finite", broken, x.size, "Look for the step that made them.")
            )
        if mask is None:
            if path not in kernels:
                continue
            kept = x != 0
        elif np.shape(mask) == x.shape and x.ndim:
            kept = mask
        else:
            continue
        number = int(jnp.sum(kept))
        if x.size and number == 0:
            found.append(
                Finding(
                    path,
                    "empty",
                    x.size,
                    x.size,
                    "Every weight is pruned: nothing passes through the layer.",
                )
            )
            continue
        if x.ndim >= 2 and x.size:
            idle = int(jnp.sum(~jnp.any(kept, axis=tuple(range(x.ndim - 1)))))
            if idle:
                found.append(
                    Finding(
                        path,
                        "units without weights",
                        idle,
                        x.shape[-1],
                        "Their outputs are constant; structural pruning can remove them.",
                    )
                )
        values = jnp.where(kept & finite, x, 0).astype(trees.wide_dtype(x.dtype))
        limit = outlier * jnp.sqrt(jnp.sum(jnp.square(values)) / max(number, 1))
        beyond = int(jnp.sum(jnp.abs(values) > limit))
        if beyond:
            largest = float(jnp.max(jnp.abs(values)))
            seen = f"The largest is {largest:.3g}, {outlier:g} times the usual size is {float(limit):.3g}."
            found.append(Finding(path, "outliers", beyond, x.size, seen))
    return tuple(found)


def findings_table(findings: tuple[Finding, ...]) -> Table:
    """Arrange findings as a table, for a terminal, Markdown, or `pages.report_page`.

    Args:
        findings: From `screen_batch` or `screen_params`, or both together.

    Returns:
        A `tables.Table`, one row a finding.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> found = prunax.reports.screen_batch({"x": jnp.zeros((2, 2))})
        >>> print(prunax.reports.findings_table(found).markdown().splitlines()[-1])
        | x | constant | All values are equal: there is nothing to learn from it. | 4 | 4 |
    """
    rows = [(f.path, f.kind, f.detail, f"{f.number:,}", f"{f.size:,}") for f in findings]
    return Table(("leaf", "finding", "what it means", "elements", "of"), rows, text=3)


def _floating(tree: PyTree) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True):
        if trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            yield path, jnp.asarray(leaf)


def _least(x: jax.Array, finite: jax.Array) -> float:
    return float(jnp.min(jnp.where(finite, x, jnp.inf)))
