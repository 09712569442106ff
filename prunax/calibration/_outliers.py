"""Layerwise sparsities from outliers: layers with more weights that matter far above the average are pruned less."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import allocation as allocations
from prunax import trees
from prunax.calibration._scores import wanda_scores

__all__ = ["outlier_allocation"]

PyTree = Any


def outlier_allocation(
    params: PyTree,
    statistics: PyTree,
    *,
    threshold: float = 5.0,
    spread: float = 0.08,
    group: Callable[[str], str] = str,
    where: trees.Where | None = None,
) -> "Outliers":
    r"""Share out the sparsity so that layers with more outliers stay denser.

    A layer's outliers are its weights whose Wanda score exceeds the layer's mean score by a factor. Densities lie
    within a band around the overall one, as the layers' shares of outliers lie between the lowest and the highest.

    Args:
        params: Pytree of arrays, dense.
        statistics: ``input_statistics(..., kind="norm")`` of the same params.
        threshold: The factor M of the mean.
        spread: Densities differ by at most twice this.
        group: Maps a path to the name of a group whose leaves get one sparsity: the blocks of a transformer, in the
            paper. Each leaf is a group of its own where left out.
        where: ``where(path, leaf) -> bool`` chooses the leaves; left out, all that have statistics.

    Returns:
        An allocation, for `prune_layers` with any method, or `prunax.compute_masks`.

    Raises:
        ValueError: If the statistics are not like the params, or there are none.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4)).at[0, 0].set(100.0)}}
        >>> fn = lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"]
        >>> norms = prunax.calibration.input_statistics(fn, params, [jnp.eye(4)])
        >>> shares = prunax.calibration.outlier_allocation(params, norms, spread=0.125)
        >>> masks = prunax.compute_masks(params, 0.5, allocation=shares)
        >>> int(masks["a"]["kernel"].sum()), int(masks["b"]["kernel"].sum())
        (6, 10)

    References:
        Yin et al., Outlier Weighed Layerwise Sparsity (OWL), 2024, arXiv:2310.05175, section 3. Here the overall
        sparsity is that of all weights, not the mean of the layers'.
    """
    chosen = trees.select(params, where or (lambda path, leaf: True))
    norms = chosen.take("outlier_allocation", "statistics", statistics)
    shares: dict[str, list[float]] = {}
    for path, leaf, norm in zip(chosen.paths, chosen.leaves, norms, strict=True):
        if np.ndim(norm) == 0:
            continue
        if np.ndim(norm) != leaf.ndim:
            raise ValueError(
                f"outlier_allocation: the statistics of {path!r} have shape {np.shape(norm)}, which does not broadcast "
                f'against {leaf.shape}. Pass input_statistics(..., kind="norm").'
            )
        shares.setdefault(group(path), []).append(float(_share(leaf, norm, threshold)))
    if not shares:
        raise ValueError("outlier_allocation: no leaf that `where` selects has statistics.")
    means = {name: float(np.mean(values)) for name, values in shares.items()}
    return Outliers(tuple((p, means[group(p)]) for p in chosen.paths if group(p) in means), spread)


@jax.jit
def _share(leaf: jax.Array, norm: jax.Array, threshold: Any) -> jax.Array:
    scores = wanda_scores(leaf, norm)
    # Counted in integers: a float32 holds no more than 2**24 of them exactly.
    outliers = jnp.sum(scores > threshold * jnp.mean(scores), dtype=jnp.uint32)
    return outliers.astype(scores.dtype) / leaf.size


@dataclass(frozen=True)
class Outliers:
    """An allocation from each leaf's share of outliers. `outlier_allocation` makes one.

    Attributes:
        shares: ``(path, share)``.
        spread: Half the width of the band of densities.
    """

    shares: tuple[tuple[str, float], ...]
    spread: float

    def __call__(self, leaves: Sequence[allocations.Leaf], sparsity: Any) -> allocations.Pools:
        """Pools of one leaf each. Leaves without a share get the mean of the others."""
        known: Mapping[str, float] = dict(self.shares)
        mean = float(np.mean(list(known.values())))
        share = np.array([known.get(leaf.path, mean) for leaf in leaves])
        sizes = np.array([float(leaf.num_units) for leaf in leaves])
        width = np.ptp(share)
        shift = 2 * self.spread * (share - share.min()) / width if width > 0 else 0 * share
        shift = shift - np.sum(shift * sizes) / np.sum(sizes)
        # Near 0 and 1 the band narrows, so that no layer leaves them and the overall sparsity holds.
        room = min(sparsity, 1 - sparsity)
        shift *= min(1.0, room / max(np.abs(shift).max(), 1e-12))
        own = [float(np.clip(sparsity - s, 0, 1)) for s in shift]
        pools = tuple(allocations.Pool((n,), s) for n, s in enumerate(own))
        return allocations.Pools(pools)
