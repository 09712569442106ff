"""Lottery tickets: train, prune, rewind, and again."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prunax import _masks as mask_functions
from prunax import allocation as allocations
from prunax import patterns, schedules, trees
from prunax import scores as score_functions

__all__ = ["Ticket", "iterative_magnitude_pruning"]

PyTree = Any


class Ticket(NamedTuple):
    """What one round of iterative magnitude pruning came to.

    A pytree: save it with Orbax, and hand it back as `resume` to go on.

    Attributes:
        round: The number of the round; round 0 is dense.
        sparsity: Fraction of prunable weights that the masks remove.
        masks: Mask tree with which the round was trained, True = kept.
        params: What `train` returned.
    """

    round: int
    sparsity: float
    masks: PyTree
    params: PyTree


def iterative_magnitude_pruning(
    train: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    *,
    rounds: int,
    fraction: float = 0.2,
    resume: Ticket | None = None,
    score: score_functions.Score = score_functions.magnitude,
    allocation: allocations.Allocation = allocations.uniform,
    pattern: patterns.Pattern = patterns.Unstructured(),
    where: trees.Where = trees.is_kernel,
) -> Iterator[Ticket]:
    r"""Find sparse networks that train well from an early point.

    Round 0 trains the dense network. Each further round prunes the fraction f of the weights that were left, those
    smallest after training, rewinds the others to `params` and trains again: after r rounds the sparsity is
    :math:`1 - (1 - f)^r`.

    Args:
        train: ``train(params, masks) -> trained params``: your training, from masked params, under fixed masks
            (`prunax.transforms.fixed_masks` wraps an optimizer so). What it returns is masked again here.
        params: The point to rewind to: the initial params, or those of an early step k, from which `train` then goes
            on.
        rounds: Number of prunings, so that ``rounds + 1`` tickets come in all.
        fraction: Fraction f of the remaining weights that each round prunes, in [0, 1].
        resume: The last ticket of an interrupted run: the next one is the first to come.
        score: ``score(trained params)`` that ranks weights.
        allocation: How each round's sparsity is shared out among leaves.
        pattern: Which weights go together or compete.
        where: ``where(path, leaf) -> bool`` chooses the prunable leaves.

    Returns:
        An iterator that yields a `Ticket` after each round, as soon as it is trained.

    Raises:
        ValueError: If the fraction is outside [0, 1] or rounds is negative; as `prunax.compute_masks`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
        >>> train = lambda params, masks: params
        >>> tickets = prunax.lottery.iterative_magnitude_pruning(train, params, rounds=2, fraction=0.5)
        >>> [(t.round, t.sparsity, int(t.masks["kernel"].sum())) for t in tickets]
        [(0, 0.0, 10), (1, 0.5, 5), (2, 0.75, 2)]

    References:
        Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, arXiv:1803.03635; Frankle et al., Linear Mode
        Connectivity and the Lottery Ticket Hypothesis, 2020, arXiv:1912.05671, algorithm 2 (rewinding to step k).
    """
    schedules.check_sparsity("iterative_magnitude_pruning", fraction, "fraction")
    schedules.check_steps("iterative_magnitude_pruning", rounds=rounds)
    return _tickets(train, params, rounds, fraction, resume, score, allocation, pattern, where)


def _tickets(
    train: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    rounds: int,
    fraction: float,
    ticket: Ticket | None,
    score: score_functions.Score,
    allocation: allocations.Allocation,
    pattern: patterns.Pattern,
    where: trees.Where,
) -> Iterator[Ticket]:
    options: dict[str, Any] = {"allocation": allocation, "pattern": pattern, "where": where}
    for r in range(0 if ticket is None else int(ticket.round) + 1, rounds + 1):
        sparsity = 1 - (1 - fraction) ** r
        if ticket is None:
            masks = mask_functions.compute_masks(params, 0.0, **options)
        else:
            # Pruned weights rank below any other, so that they stay pruned whatever training made of them.
            scores = jax.tree.map(
                lambda x, m: jnp.where(m, x, -jnp.inf), score(ticket.params), ticket.masks
            )
            masks = mask_functions.compute_masks(params, sparsity, scores=scores, **options)
        trained = train(mask_functions.apply_masks(params, masks), masks)
        ticket = Ticket(r, sparsity, masks, mask_functions.apply_masks(trained, masks))
        yield ticket
