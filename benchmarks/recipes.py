"""How each method trains: an optax transformation, and what its masks should come to.

Every method gets the same network, number of steps, learning rate and schedule of it. Gradual methods
prune along `schedules.polynomial` in the middle of training; one-shot and L1 prune once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import prunax

PyTree = Any
Optimizer = Callable[[jax.Array, PyTree], optax.GradientTransformation]


class Settings(NamedTuple):
    """What the methods have in common.

    Attributes:
        sparsity: the target, in [0, 1].
        epochs: in all, over all phases of a method.
        steps: steps in one epoch.
        learning_rate: Adam's, decaying to zero along a cosine.
        l1: weight of the L1 penalty, for the method of that name.
        threshold: the L1 method prunes weights of at most this magnitude.
    """

    sparsity: float
    epochs: int
    steps: int
    learning_rate: float
    l1: float
    threshold: float


class Phase(NamedTuple):
    """A stretch of training with one optimizer.

    Attributes:
        epochs: its length.
        optimizer: `optimizer(key, masks) -> transformation`; the key is for random scores, the masks
            are those found at the end of the phase before.
        l1: weight of the L1 penalty.
        threshold: prune weights of at most this magnitude at the end; None prunes nothing then.
    """

    epochs: int
    optimizer: Optimizer
    l1: float = 0.0
    threshold: float | None = None


class Recipe(NamedTuple):
    """A method.

    Attributes:
        phases: one after the other.
        pools: which weights share a budget, so that the number pruned is known: `"leaf"`, `"model"`,
            or None where it comes out as it may.
    """

    phases: tuple[Phase, ...]
    pools: str | None


def dense(s: Settings) -> Recipe:
    """No pruning: the baseline."""
    return Recipe((Phase(s.epochs, lambda key, masks: _adam(s, s.epochs)),), None)


def gradual(
    score: Any,
    s: Settings,
    *,
    pools: str = "leaf",
    allocation: Any = prunax.allocation.uniform,
) -> Recipe:
    """Prunes step by step, from a fifth of the training on to seven tenths of it."""
    total = s.epochs * s.steps
    begin, end = total // 5, max(total * 7 // 10, total // 5 + 1)
    schedule = prunax.schedules.polynomial(s.sparsity, begin, end, every=max(total // 100, 1))

    def optimizer(key: jax.Array, masks: PyTree) -> optax.GradientTransformation:
        random = {"key": key} if score is prunax.scores.random else {}
        adam = _adam(s, s.epochs)
        return prunax.prune(adam, schedule, score=score, allocation=allocation, **random)

    return Recipe((Phase(s.epochs, optimizer),), pools)


def one_shot(s: Settings) -> Recipe:
    """Trains dense for half the time, prunes by magnitude at once, and fine-tunes."""
    schedule = prunax.schedules.one_shot(s.sparsity, step=s.epochs * s.steps // 2)
    return Recipe(
        (Phase(s.epochs, lambda key, masks: prunax.prune(_adam(s, s.epochs), schedule)),), "leaf"
    )


def l1(s: Settings) -> Recipe:
    """Trains with an L1 penalty, prunes what it drove to (nearly) zero, and fine-tunes without it.

    The penalty sets the sparsity, not the target.
    """
    first = max(s.epochs * 7 // 10, 1)
    last = max(s.epochs - first, 1)
    return Recipe(
        (
            Phase(first, lambda key, masks: _adam(s, first), s.l1, s.threshold),
            Phase(last, lambda key, masks: prunax.transforms.fixed_masks(_adam(s, last), masks)),
        ),
        None,
    )


_gradual = functools.partial(functools.partial, gradual)
RECIPES: dict[str, tuple[Callable[[Settings], Recipe], str]] = {
    "dense": (dense, "no pruning"),
    "magnitude": (_gradual(prunax.scores.magnitude), "|w|, gradually, within each layer"),
    "saliency": (_gradual(prunax.scores.saliency), "|w g| of one batch, likewise"),
    "gradient": (_gradual(prunax.scores.gradient), "|g| of one batch, likewise"),
    "random": (_gradual(prunax.scores.random), "at random, likewise"),
    "global": (
        _gradual(
            prunax.scores.magnitude,
            pools="model",
            allocation=prunax.allocation.global_ranking,
        ),
        "|w|, gradually, layers ranked together",
    ),
    "l1": (l1, "an L1 penalty, then a threshold, then fine-tuning"),
    "one-shot": (one_shot, "|w|, all at once, then fine-tuning"),
}


def _adam(s: Settings, epochs: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(s.learning_rate, epochs * s.steps))
