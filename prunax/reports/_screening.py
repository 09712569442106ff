"""Screening: what looks wrong in batches and in pruned params, as data. Nothing is changed and nothing is raised."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import trees
from prunax.reports._tables import Table

__all__ = ["Finding", "findings_table", "screen_batch", "screen_params"]

# Were the errors normal, one good batch in hundreds of millions would lie beyond.
_STANDARD_ERRORS = 6.0
# As the furthest good example.
_TIMES_AS_FAR = 2.0

PyTree = Any


class Finding(NamedTuple):
    """Something that someone should look at.

    Attributes:
        path: Of the leaf: ``encoder/0/kernel``.
        kind: "not finite", "out of range", "constant", "repeated", "shifted", "unlike the others", "empty", "outliers"
            or "units without weights".
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
    batch: PyTree,
    *,
    low: float | None = None,
    high: float | None = None,
    like: PyTree | None = None,
) -> tuple[Finding, ...]:
    """Look for values in a batch that training or calibration should not see.

    Args:
        batch: Pytree of arrays: images, labels, tokens. Leaves that are not arrays are left out.
        low: The least value that a floating-point leaf may hold; None for no limit.
        high: The largest.
        like: A good batch of the same structure, with examples along the first axis, some hundred of them. None for no
            comparison.

    Returns:
        Findings in tree order: NaN or infinite values; values below `low` or above `high`; floating-point leaves
        of more than one element that are all equal, or whose examples are. Compared with `like`: means or standard
        deviations of the examples that lie more than six standard errors off; examples more than twice as far from the
        mean as any good one, in standard deviations of each element; frequencies of integers, labels say, that are
        as unlikely. Without it integer leaves are not looked at: a batch may be of one label. Labels that are wrong in
        the same proportions are found by neither.

    Raises:
        ValueError: If the structures of the batch and `like` differ, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> batch = {"image": jnp.array([[0.5, jnp.nan], [300.0, 0.1]]), "label": jnp.array([3, 3])}
        >>> [(f.path, f.kind, f.number) for f in prunax.reports.screen_batch(batch, low=0.0, high=1.0)]
        [('image', 'not finite', 1), ('image', 'out of range', 1)]
    """
    found = []
    good: dict[str, Any] = {}
    if like is not None:
        leaves = trees.leaves_like("screen_batch", "like", like, batch)
        good = dict(zip(trees.paths(batch), leaves, strict=True))
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
        elif x.ndim > 1 and len(x) > 1 and not broken and bool(jnp.all(x == x[:1])):
            found.append(Finding(path, "repeated", len(x), len(x), "All examples are equal."))
        if path in good and x.ndim and not broken:
            found.extend(_compared(path, x, jnp.asarray(good[path])))
    for path, x in zip(trees.paths(batch), jax.tree.leaves(batch), strict=True):
        if path in good and trees.is_array(x) and jnp.issubdtype(x.dtype, jnp.integer):
            found.extend(_counted(path, np.asarray(x).ravel(), np.asarray(good[path]).ravel()))
    return tuple(found)


def _compared(path: str, x: jax.Array, good: jax.Array) -> Iterator[Finding]:
    """Compare the examples of a leaf with good ones."""
    rows, known = (a.reshape(len(a), -1).astype(jnp.float32) for a in (x, good))
    for name, of in (("mean", jnp.mean), ("standard deviation", jnp.std)):
        here, there = of(rows, axis=1), of(known, axis=1)
        error = jnp.std(there) * (1 / len(here) + 1 / len(there)) ** 0.5 + 1e-12
        off = float(jnp.abs(jnp.mean(here) - jnp.mean(there)) / error)
        if off > _STANDARD_ERRORS:
            seen = f"The {name} of an example is {float(here.mean()):.3g}, of a good one {float(there.mean()):.3g}."
            yield Finding(path, "shifted", len(x), len(x), seen)
            break
    center, spread = jnp.mean(known, axis=0, keepdims=True), jnp.var(known, axis=0, keepdims=True)
    spread = spread + 0.01 * jnp.mean(spread) + 1e-12
    here, there = (jnp.mean((a - center) ** 2 / spread, axis=1) for a in (rows, known))
    far = int(jnp.sum(here > _TIMES_AS_FAR * jnp.max(there)))
    if far:
        seen = (
            "They lie further from the mean than any good example, by far. Where do they come from?"
        )
        yield Finding(path, "unlike the others", far, len(x), seen)


def _counted(path: str, x: Any, good: Any) -> Iterator[Finding]:
    """Compare the frequencies of integers, by the chi-square of two samples."""
    values, where = np.unique(np.concatenate([x, good]), return_inverse=True)
    a, b = (np.bincount(w, minlength=len(values)) for w in np.split(where, [len(x)]))
    if len(values) < 2 or not x.size or not good.size:
        return
    ratio = np.sqrt(good.size / x.size)
    chi, freedom = np.sum((ratio * a - b / ratio) ** 2 / (a + b)), len(values) - 1
    if (chi - freedom) / np.sqrt(2 * freedom) > _STANDARD_ERRORS:
        worst = int(np.argmax(np.abs(a / x.size - b / good.size)))
        seen = (
            f"{a[worst] / x.size:.0%} are {values[worst]}, of good ones {b[worst] / good.size:.0%}."
        )
        yield Finding(path, "shifted", int(x.size), int(x.size), seen)


def screen_params(
    params: PyTree, masks: PyTree | None = None, *, outlier: float = 30.0
) -> tuple[Finding, ...]:
    """Look for what may have gone wrong in pruning or training.

    Args:
        params: Pytree of arrays.
        masks: Mask tree of the same structure, True = kept. Without it weights that are zero count as pruned.
        outlier: A kept weight is an outlier beyond so many standard deviations of its leaf's kept weights, as their
            median tells it.

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
        sizes = jnp.abs(x).astype(trees.wide_dtype(x.dtype))
        counted = kept & finite & (sizes > 0)
        # The median, which an outlier does not move; of normal weights it is 0.6745 standard deviations.
        limit = outlier * jnp.nanmedian(jnp.where(counted, sizes, jnp.nan)) / 0.6745
        beyond = int(jnp.sum(counted & (sizes > limit)))
        if beyond:
            largest = float(jnp.max(jnp.where(counted, sizes, 0)))
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
