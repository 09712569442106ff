"""What a pruned model looks like: sizes and sparsities, leaf by leaf, and how one mask tree differs from another."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import trees
from prunax.reports._tables import Table, Tabular

__all__ = ["Comparison", "LeafComparison", "LeafSummary", "Summary", "compare_masks", "summarize"]

PyTree = Any
_FEW = 0.05  # of a leaf's weights, below which little passes through it


@dataclass(frozen=True)
class LeafSummary:
    """One line of a `Summary`.

    Attributes:
        path: ``encoder/0/kernel``.
        shape: Shape of the leaf.
        dtype: Name of its dtype.
        weights: Number of elements.
        kept: Number of elements kept.
        prunable: Whether the leaf has a mask of its own.
        not_zero: Number of elements that the mask prunes and that are not zero.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    weights: int
    kept: int
    prunable: bool
    not_zero: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed, in [0, 1]; 0 for an empty leaf."""
        return _sparsity(self.weights, self.kept)


@dataclass(frozen=True)
class Summary(Tabular):
    """Sizes and sparsities of a tree. Prints as a table.

    Attributes:
        leaves: One `LeafSummary` for each array of the tree.
    """

    leaves: tuple[LeafSummary, ...]

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(leaf.weights for leaf in self.leaves if leaf.prunable)

    @property
    def kept(self) -> int:
        """Number of prunable weights kept."""
        return sum(leaf.kept for leaf in self.leaves if leaf.prunable)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights removed, in [0, 1]."""
        return _sparsity(self.weights, self.kept)

    @property
    def parameters(self) -> int:
        """Number of all parameters, those that cannot be pruned included."""
        return sum(leaf.weights for leaf in self.leaves)

    @property
    def parameters_kept(self) -> int:
        """Number of all parameters that are left."""
        return sum(leaf.kept for leaf in self.leaves)

    @property
    def not_zero(self) -> int:
        """Number of weights that the masks prune and that are not zero."""
        return sum(leaf.not_zero for leaf in self.leaves)

    @property
    def starved(self) -> tuple[str, ...]:
        """Paths of the prunable leaves that keep fewer than 5% of their weights while all together keep more."""
        if self.kept <= _FEW * self.weights:
            return ()
        return tuple(x.path for x in self.leaves if x.prunable and x.kept < _FEW * x.weights)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What looks wrong, one sentence each; printed below the table (not in Markdown)."""
        found = []
        if self.not_zero:
            first = next(leaf.path for leaf in self.leaves if leaf.not_zero)
            found.append(
                f"{self.not_zero:,} pruned weights are not zero: is prune the outermost transformation? "
                f"The first are in {first!r}; prunax.apply_masks sets them to zero."
            )
        if self.starved:
            more = f" and {len(self.starved) - 3} more" if len(self.starved) > 3 else ""
            found.append(
                f"{', '.join(self.starved[:3])}{more}: fewer than {_FEW:.0%} of the weights are left, while all "
                f"together keep {1 - self.sparsity:.1%}. allocation.erdos_renyi leaves more of small leaves."
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Turn the summary into plain Python values, ready for JSON.

        Returns:
            ``{"leaves": [{"path", "shape", "dtype", "weights", "kept", "prunable", "sparsity"}, ...],
            "prunable": {"weights", "kept", "sparsity"}, "total": {"weights", "kept", "sparsity"}, "not_zero",
            "starved", "warnings"}``.
        """

        def line(leaf: LeafSummary) -> dict[str, Any]:
            values = asdict(leaf) | {"shape": list(leaf.shape), "sparsity": leaf.sparsity}
            del values["not_zero"]
            return values

        return {
            "leaves": [line(leaf) for leaf in self.leaves],
            "not_zero": self.not_zero,
            "starved": list(self.starved),
            "warnings": list(self.warnings),
            "prunable": {"weights": self.weights, "kept": self.kept, "sparsity": self.sparsity},
            "total": {
                "weights": self.parameters,
                "kept": self.parameters_kept,
                "sparsity": _sparsity(self.parameters, self.parameters_kept),
            },
        }

    def table(self) -> Table:
        """Arrange the summary as a `tables.Table`, to print, or to turn into Markdown or HTML."""
        rows = [
            (
                leaf.path,
                " x ".join(map(str, leaf.shape)) or "scalar",
                leaf.dtype,
                f"{leaf.weights:,}",
                f"{leaf.kept:,}",
                f"{leaf.sparsity:.2%}" if leaf.prunable else "-",
            )
            for leaf in self.leaves
        ]
        total = _sparsity(self.parameters, self.parameters_kept)
        footer = [
            ("prunable", "", "", f"{self.weights:,}", f"{self.kept:,}", f"{self.sparsity:.2%}"),
            ("total", "", "", f"{self.parameters:,}", f"{self.parameters_kept:,}", f"{total:.2%}"),
        ]
        columns = ("leaf", "shape", "dtype", "weights", "kept", "sparsity")
        return Table(columns, rows, footer, text=3, notes=self.warnings)


@dataclass(frozen=True)
class LeafComparison:
    """One line of a `Comparison`, of a leaf that has a mask of its own.

    Attributes:
        path: ``encoder/0/kernel``.
        weights: Number of elements.
        both: Kept before and after.
        removed: Kept before only.
        added: Kept after only.
    """

    path: str
    weights: int
    both: int
    removed: int
    added: int

    @property
    def overlap(self) -> float:
        """Those kept in both as a fraction of those kept in either (Jaccard), in [0, 1]; 1 where nothing is kept."""
        either = self.both + self.removed + self.added
        return self.both / either if either else 1.0


@dataclass(frozen=True)
class Comparison(Tabular):
    """How one mask tree differs from another. Prints as a table.

    Attributes:
        leaves: One `LeafComparison` for each leaf that either tree masks.
    """

    leaves: tuple[LeafComparison, ...]

    @property
    def total(self) -> LeafComparison:
        """All leaves together."""
        sums = (sum(getattr(leaf, n) for leaf in self.leaves) for n in _COUNTED)
        return LeafComparison("total", *sums)

    def to_dict(self) -> dict[str, Any]:
        """Turn the comparison into plain Python values, ready for JSON.

        Returns:
            ``{"leaves": [{"path", "weights", "both", "removed", "added", "overlap"}, ...], "total": {...}}``.
        """
        return {
            "leaves": [asdict(leaf) | {"overlap": leaf.overlap} for leaf in self.leaves],
            "total": asdict(self.total) | {"overlap": self.total.overlap},
        }

    def table(self) -> Table:
        """Arrange the comparison as a `tables.Table`."""

        def row(leaf: LeafComparison) -> tuple[str, ...]:
            return leaf.path, *(f"{getattr(leaf, n):,}" for n in _COUNTED), f"{leaf.overlap:.2%}"

        columns = ("leaf", "weights", "kept in both", "removed", "added", "overlap")
        return Table(columns, [row(leaf) for leaf in self.leaves], [row(self.total)])


_COUNTED = ("weights", "both", "removed", "added")


def compare_masks(before: PyTree, after: PyTree) -> Comparison:
    """Count, leaf by leaf, what two mask trees keep in common and what moved.

    Args:
        before: Mask tree, True = kept.
        after: Mask tree of the same structure. A scalar stands for all weights of its leaf.

    Returns:
        A `Comparison`: ``print(comparison)`` shows a table, ``comparison.total.overlap`` the Jaccard index of the kept
        weights. Leaves that are scalars in both trees are left out.

    Raises:
        ValueError: If the structures or shapes differ, naming the leaf.
        TypeError: If a mask is not boolean, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> before = {"kernel": jnp.array([[True, True], [False, False]])}
        >>> after = {"kernel": jnp.array([[True, False], [True, False]])}
        >>> leaf = prunax.compare_masks(before, after).total
        >>> leaf.both, leaf.removed, leaf.added
        (1, 1, 1)
    """
    names, ours = trees.paths(before), trees.check_masks("compare_masks", before, before)
    trees.check_masks("compare_masks", after, after)
    theirs = trees.leaves_like("compare_masks", "masks after", after, before)
    rows = []
    for name, a, b in zip(names, ours, theirs, strict=True):
        shapes = [np.shape(mask) for mask in (a, b) if np.shape(mask)]
        if not shapes:
            continue
        if len(set(shapes)) > 1:
            raise ValueError(
                f"compare_masks: the masks of {name!r} have shapes {shapes[0]} and {shapes[1]}."
            )
        a, b = (jnp.broadcast_to(jnp.asarray(mask), shapes[0]) for mask in (a, b))
        counts = (_count(a & b), _count(a & ~b), _count(b & ~a))
        rows.append(LeafComparison(name, int(np.prod(shapes[0], dtype=np.int64)), *counts))
    return Comparison(tuple(rows))


def summarize(params: PyTree, masks: PyTree | None = None) -> Summary:
    """Count weights and kept weights, leaf by leaf.

    Args:
        params: Pytree of arrays; leaves that are not arrays are left out.
        masks: Mask tree of the params' structure, True = kept. Without it a weight counts as kept where it is not
            zero, and the kernels (`trees.is_kernel`) count as prunable.

    Returns:
        A `Summary`: ``print(summary)`` shows a table, ``summary.sparsity`` the realised sparsity, and
        ``summary.to_dict()`` plain values. ``summary.starved`` names leaves that keep fewer than 5% of their weights
        while all together keep more, and ``summary.warnings`` says so.

    Raises:
        ValueError: If the structures or shapes differ, naming the leaf.
        TypeError: If a mask is not boolean, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}
        >>> summary = prunax.summarize(params, prunax.compute_masks(params, 0.7))
        >>> summary.kept, summary.sparsity
        (6, 0.7)
    """
    names, leaves = trees.paths(params), jax.tree.leaves(params)
    mask_leaves: list[Any] = [None] * len(leaves)
    if masks is not None:
        trees.check_params("summarize", params)
        mask_leaves = trees.check_masks("summarize", params, masks)
    kernels = set(trees.select(params, trees.is_kernel).paths) if masks is None else set()
    rows = []
    for name, leaf, mask in zip(names, leaves, mask_leaves, strict=True):
        if not trees.is_array(leaf):
            continue
        size = int(np.prod(leaf.shape, dtype=np.int64))
        not_zero = 0
        if mask is None:
            prunable = name in kernels
            kept = _count(leaf) if prunable else size
        elif np.shape(mask) == ():
            # A leaf without axes has a 0-d mask in any case; it shows as prunable once it is pruned.
            prunable, kept = not leaf.shape and not mask, size if mask else 0
        else:
            prunable, kept = True, _count(mask)
            not_zero = _count(_left(leaf, mask))
        rows.append(
            LeafSummary(name, tuple(leaf.shape), str(leaf.dtype), size, kept, prunable, not_zero)
        )
    return Summary(tuple(rows))


@jax.jit
def _left(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    return ~mask & (leaf != jnp.zeros((), leaf.dtype))


def _count(x: jax.Array) -> int:
    """Count nonzero elements of an array, exactly beyond 2**31 as well."""
    rows = jnp.count_nonzero(x, axis=-1) if jnp.ndim(x) else jnp.count_nonzero(x)
    return int(np.sum(jax.device_get(rows), dtype=np.int64))


def _sparsity(weights: int, kept: int) -> float:
    return 1 - kept / weights if weights else 0.0
