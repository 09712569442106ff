"""How the loss grows when one structure alone is pruned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunax import schedules
from prunax.reports._tables import Table, Tabular
from prunax.search._losses import Losses, LossFn
from prunax.search._structures import Structures, leaves

__all__ = ["SPARSITIES", "Sensitivity", "sensitivity"]

PyTree = Any

# Where curves are measured by default: densely where networks begin to suffer.
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0)


@dataclass(frozen=True, eq=False)
class Sensitivity(Tabular):
    """The loss when one structure alone is pruned. Prints as a table.

    Attributes:
        names: Structures, in their order.
        sparsities: The sparsities asked for.
        num_pruned: ``(structures, sparsities)``: how many units went, the nearest number that the structure allows.
        losses: ``(structures, sparsities)``, float64: the loss then. NaN and infinity are kept as measured.
        dense_loss: The loss with nothing pruned.
    """

    names: tuple[str, ...]
    sparsities: tuple[float, ...]
    num_pruned: np.ndarray
    losses: np.ndarray
    dense_loss: float

    def table(self) -> Table:
        """Arrange the losses as a `tables.Table`."""
        columns = ("structure", *(f"{sparsity:.4g}" for sparsity in self.sparsities))
        rows = [
            (name, *(f"{loss:.4g}" for loss in row))
            for name, row in zip(self.names, self.losses, strict=True)
        ]
        return Table(columns, rows, title=f"loss, {self.dense_loss:.4g} when dense")


def sensitivity(
    loss_fn: LossFn,
    params: PyTree,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    structures: Structures | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Sensitivity:
    """Measure the loss of pruning each structure alone at each sparsity.

    Args:
        loss_fn: ``loss_fn(params) -> scalar``, a pure JAX function: the mean loss over some data. It is compiled once,
            with the choice of the masks, for all structures and sparsities.
        params: Pytree of arrays.
        sparsities: Fractions of each structure's units to prune, in [0, 1]. Each structure loses the nearest number
            that it allows: its most, if it may not lose all; nothing or all of N:M.
        structures: What to prune, from `leaves` or `channels`; ``leaves(params)`` when left out.
        batch_size: How many pruned networks to compute at once, with `jax.vmap`: more takes more memory.
        progress: Show a progress bar.

    Returns:
        The `Sensitivity`.

    Raises:
        ValueError: If a sparsity is outside [0, 1], the loss is no scalar, or it is not finite with nothing pruned.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
        >>> loss_fn = lambda p: jnp.sum((1 - p["a"]["kernel"]) ** 2) + 3 * jnp.sum((1 - p["b"]["kernel"]) ** 2)
        >>> prunax.search.sensitivity(loss_fn, params, [0.5, 1.0]).losses.tolist()
        [[2.0, 4.0], [6.0, 12.0]]

    References:
        Li et al., Pruning Filters for Efficient ConvNets, 2017, arXiv:1608.08710, section 3.2.
    """
    check_grid("sensitivity", sparsities)
    structures = leaves(params) if structures is None else structures
    losses = Losses("sensitivity", loss_fn, params, structures, batch_size, progress)
    with losses.counting(1 + len(structures.names) * len(sparsities)):
        return measure(losses, sparsities)


def measure(losses: Losses, sparsities: Sequence[float]) -> Sensitivity:
    """The sensitivity from a measure that is already at hand."""
    structures = losses.structures
    num_pruned = structures.grid(sparsities)
    rows = np.zeros((*num_pruned.shape, len(num_pruned)), np.int64)
    for i, row in enumerate(num_pruned):
        rows[i, :, i] = row
    found = losses(list(rows.reshape(-1, len(num_pruned)))).reshape(num_pruned.shape)
    return Sensitivity(
        structures.names, tuple(map(float, sparsities)), num_pruned, found, losses.dense
    )


def curve(structures: Structures, measured: Sensitivity, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of pruned units, increasing from 0, and the finite losses measured there."""
    known = dict(zip(measured.num_pruned[i], measured.losses[i], strict=True)) | {
        0: measured.dense_loss
    }
    units = sorted(k for k, loss in known.items() if np.isfinite(loss))
    return np.array(units, np.float64), np.array([known[k] for k in units])


def check_grid(function: str, sparsities: Sequence[float]) -> None:
    """Raise ValueError unless there are sparsities, each in [0, 1]."""
    if not len(sparsities):
        raise ValueError(f"{function}: sparsities is empty. Leave it out for the default ones.")
    for sparsity in sparsities:
        schedules.check_sparsity(function, sparsity, "each of sparsities")


def check_measured(function: str, measured: Sensitivity | None, structures: Structures) -> None:
    """Raise ValueError if what was measured before belongs to other structures."""
    if measured is not None and measured.names != structures.names:
        raise ValueError(
            f"{function}: `measured` is of other structures: {', '.join(measured.names)}, where "
            f"{', '.join(structures.names)} are to be pruned. Measure those, or leave it out."
        )
