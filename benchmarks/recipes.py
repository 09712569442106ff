"""How each sparse training method trains: for `methods.py`, and for its short view `train.py`.

A recipe says what is wrapped around one and the same Adam, so that every method gets the same steps, batches and
learning rates. Methods that differ in their allocation (`magnitude`, `global`, `erk`, `lamp`) share everything else,
and so do those that differ in their score; the others take the allocation with which they were published.

Numbers under `options` were chosen on held-out training images (`methods.py --validation`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import prunax
from prunax import allocation, initialization, schedules, scores, transforms

PyTree = Any


class Budget(NamedTuple):
    """What every method gets alike.

    Attributes:
        network: its name, for the few numbers that depend on it.
        epochs: passes over the training images.
        steps: steps in one epoch.
        batch_size: images a step.
        learning_rate: Adam's, decaying to zero along a cosine.
        begin: epochs that lie behind already, where a run goes on from the middle.
    """

    network: str
    epochs: int
    steps: int
    batch_size: int
    learning_rate: float
    begin: int = 0

    def at(self, fraction: float) -> int:
        """The step at a fraction of the training."""
        return round(fraction * self.epochs * self.steps)


class Recipe(NamedTuple):
    """What one method is at one sparsity.

    Attributes:
        optimizer: `optimizer(key, masks) -> transformation`; the key is for random scores.
        start: `start(loss, logits, params, images) -> masks` before training: `loss(params)` is that of a batch,
            `logits(params, images)` the network. None where there are none.
        forward: what the loss sees in place of the params.
        masks: `masks(params, optimizer state) -> masks` after training.
    """

    optimizer: Callable[[jax.Array, PyTree], optax.GradientTransformation]
    start: Callable[[Any, Any, PyTree, jax.Array], PyTree] | None = None
    forward: Callable[[PyTree], PyTree] = lambda params: params
    masks: Callable[[PyTree, Any], PyTree] = lambda params, state: state.masks


class Method(NamedTuple):
    """A method: `recipe(budget, sparsity, **options)`.

    Attributes:
        family: the panel of the figure it is drawn in.
        about: one line.
        recipe: makes its `Recipe`; None for lottery tickets, which train many times.
        options: the numbers that were chosen.
    """

    family: str
    about: str
    recipe: Callable[..., Recipe] | None
    options: Mapping[str, Any]


def adam(b: Budget) -> optax.GradientTransformation:
    """The optimizer of every method."""
    return optax.adam(learning_rate(b))


def learning_rate(b: Budget) -> optax.Schedule:
    """The learning rate at each step of a run."""
    whole = optax.cosine_decay_schedule(b.learning_rate, b.epochs * b.steps)
    return lambda step: whole(step + b.begin * b.steps)


def dense(b: Budget, sparsity: float) -> Recipe:
    """No pruning, whatever the sparsity."""
    return Recipe(
        lambda key, masks: adam(b), masks=lambda params, state: prunax.compute_masks(params, 0.0)
    )


def gradual(
    b: Budget,
    sparsity: float,
    *,
    score: Any = scores.magnitude,
    allocation: Any = allocation.uniform,
    begin: float,
    end: float,
    updates: int,
    decay: float = 0.0,
) -> Recipe:
    """Prunes along a cubic schedule, from a fraction `begin` of the training to `end`.

    Scores are averaged over steps with the given decay, unless that is 0.
    """
    every = max((b.at(end) - b.at(begin)) // updates, 1)
    schedule = schedules.polynomial(sparsity, b.at(begin), b.at(end), every=every)
    averaged = scores.ema(score, decay) if decay else score

    def optimizer(key: jax.Array, masks: PyTree) -> optax.GradientTransformation:
        random = {"key": key} if score is scores.random else {}
        return prunax.prune(adam(b), schedule, score=averaged, allocation=allocation, **random)

    return Recipe(optimizer)


def one_shot(
    b: Budget, sparsity: float, *, at: float, allocation: Any = allocation.global_ranking
) -> Recipe:
    """Trains dense, prunes all at once, fine-tunes."""
    schedule = schedules.one_shot(sparsity, b.at(at))
    return Recipe(lambda key, masks: prunax.prune(adam(b), schedule, allocation=allocation))


def ac_dc(b: Budget, sparsity: float, *, begin: float, end: float, phase: float) -> Recipe:
    """Compressed and dense phases in turn, compressed at the end."""
    schedule = schedules.alternating(
        sparsity, b.at(begin), b.at(end), compressed_steps=b.at(phase), dense_steps=b.at(phase)
    )
    return Recipe(
        lambda key, masks: prunax.prune(adam(b), schedule, allocation=allocation.global_ranking)
    )


def straight_through(b: Budget, sparsity: float) -> Recipe:
    """Dense weights under masks that are computed anew in every step; the gradient reaches all weights.

    Not ranked globally: of untrained weights that would empty the first layer, and no gradient would fill it again.
    """

    def masks(params: PyTree, state: Any = None) -> PyTree:
        return prunax.compute_masks(params, sparsity, allocation=allocation.erdos_renyi)

    return Recipe(
        lambda key, _: adam(b),
        forward=lambda params: prunax.straight_through(params, masks(params)),
        masks=masks,
    )


def proximal_l1(
    b: Budget, sparsity: float, *, strengths: Mapping[str, Mapping[str, float]], end: float
) -> Recipe:
    """Soft thresholding after every step up to a fraction `end` of the training, then fine-tuning without it.

    The penalty alone sets the sparsity: what is exactly zero at `end` stays so.

    Args:
        b: the budget.
        sparsity: interpolated among those that strengths are known for.
        strengths: for each network, the strength that came near a sparsity on held-out images, relative to the
            learning rate.
        end: when the penalty ends.
    """
    known = sorted((float(s), strength) for s, strength in strengths[b.network].items())
    density, strength = np.log(1 - np.array(known)[::-1, 0]), np.log(np.array(known)[::-1, 1])
    return penalised(b, float(np.exp(np.interp(np.log(1 - sparsity), density, strength))), end)


def penalised(b: Budget, strength: float | jax.Array, end: float) -> Recipe:
    """`proximal_l1` of a strength."""
    rate = learning_rate(b)
    proximal = transforms.proximal_l1(
        adam(b), lambda step: jnp.where(step < b.at(end), strength * rate(step), 0.0)
    )
    return _held_at_zero(proximal, b.at(end), 0.0)


def l1(b: Budget, sparsity: float, *, strength: float, threshold: float, end: float) -> Recipe:
    """Trains with an L1 penalty, prunes what it drove near zero, and fine-tunes without it.

    The penalty sets the sparsity, not the target. The learning rate falls to zero in both parts.
    """
    first, whole = b.at(end), b.epochs * b.steps
    parts = [optax.cosine_decay_schedule(b.learning_rate, n) for n in (first, whole - first)]

    def penalise(step: jax.Array, params: PyTree) -> PyTree:
        weight = jnp.where(step < first, strength, 0.0)
        return jax.grad(lambda params: weight * prunax.penalties.l1(params))(params)

    inner = optax.adam(optax.join_schedules(parts, [first]))
    return _held_at_zero(inner, first, threshold, penalise)


class _Held(NamedTuple):
    """The state of a transformation after which zeros stay zero."""

    count: jax.Array
    inner: Any


def _held_at_zero(
    inner: optax.GradientTransformation, end: int, threshold: float, penalise: Any = None
) -> Recipe:
    """At a step kernels of at most a magnitude become zero, and what is zero stays so from there on."""

    def update(grads: PyTree, state: _Held, params: PyTree) -> tuple[PyTree, _Held]:
        if penalise is not None:
            grads = jax.tree.map(jnp.add, grads, penalise(state.count, params))
        updates, inner_state = inner.update(grads, state.inner, params)
        chosen = prunax.trees.select(params, prunax.trees.is_kernel)
        limit = jnp.where(state.count == end, threshold, 0.0)
        held = [
            jnp.where((state.count >= end) & (jnp.abs(w) <= limit), -w, u)
            for w, u in zip(chosen.leaves, chosen.take("l1", "updates", updates), strict=True)
        ]
        return chosen.put(held, updates), _Held(state.count + 1, inner_state)

    def init(params: PyTree) -> _Held:
        return _Held(jnp.zeros((), jnp.int32), inner.init(params))

    return Recipe(
        lambda key, masks: optax.GradientTransformation(init, update),
        masks=lambda params, state: prunax.compute_masks(params, threshold=0.0),
    )


def admm(b: Budget, sparsity: float, *, penalty: float, end: float, every: int) -> Recipe:
    """Dense weights that are drawn to the nearest sparse ones, pruned late."""
    return Recipe(
        lambda key, masks: transforms.admm(
            adam(b),
            sparsity,
            penalty=optax.linear_schedule(0.0, penalty, b.at(end)),
            end_step=b.at(end),
            every=every,
        )
    )


def static(b: Budget, sparsity: float) -> Recipe:
    """Random masks from the first step on."""
    return Recipe(lambda key, masks: transforms.static_sparse(adam(b), sparsity, key=key))


def dynamic(
    b: Budget, sparsity: float, *, grow: Any, every: int, end: float, drop: float
) -> Recipe:
    """RigL, by two gradients, and SET, which differ in what they grow."""
    return Recipe(
        lambda key, masks: transforms.dynamic_sparse(
            adam(b),
            sparsity,
            grow=grow,
            key=key,
            every=every,
            end_step=b.at(end),
            drop_fraction=drop,
        )
    )


def at_initialisation(b: Budget, sparsity: float, *, score: Any) -> Recipe:
    """Masks of the untrained network, by a score of a loss."""

    def start(loss: Any, logits: Any, params: PyTree, images: jax.Array) -> PyTree:
        ranked = score(loss, params)
        return prunax.compute_masks(
            params, sparsity, scores=ranked, allocation=allocation.global_ranking
        )

    return Recipe(under_masks(b), start)


def synflow(b: Budget, sparsity: float, *, rounds: int) -> Recipe:
    """Masks of the untrained network, without data."""

    def start(loss: Any, logits: Any, params: PyTree, images: jax.Array) -> PyTree:
        def score(params: PyTree) -> PyTree:
            return initialization.synflow(logits, params, images[:1])

        return initialization.iterative_masks(score, params, sparsity, rounds=rounds)

    return Recipe(under_masks(b), start)


def under_masks(b: Budget) -> Callable[[jax.Array, PyTree], optax.GradientTransformation]:
    """Training under masks that are there from the start."""
    return lambda key, masks: transforms.fixed_masks(adam(b), masks)


GRADUAL = {"begin": 0.05, "end": 0.5, "updates": 50}
DYNAMIC = {"every": 100, "end": 0.75, "drop": 0.3}
# Strengths of the L1 penalty, relative to the learning rate, that come near each sparsity.
STRENGTHS = {
    "mlp": {"0.8": 0.1, "0.9": 0.155, "0.95": 0.22, "0.98": 0.39, "0.99": 0.55},
    "lenet5": {"0.8": 0.12, "0.9": 0.157, "0.95": 0.21, "0.98": 0.3, "0.99": 0.37},
}
FAMILIES = {
    "gradual": "Pruned gradually",
    "late": "Dense, then sparse",
    "early": "Sparse from the start",
}


def _vary(**fixed: Any) -> Callable[..., Recipe]:
    return functools.partial(gradual, **fixed)


METHODS: dict[str, Method] = {
    "dense": Method("", "no pruning", dense, {}),
    "magnitude": Method("gradual", "|w|, each layer alike", _vary(), GRADUAL),
    "global": Method(
        "gradual",
        "|w|, layers ranked together",
        _vary(allocation=allocation.global_ranking),
        GRADUAL,
    ),
    "erk": Method(
        "gradual",
        "|w|, Erdős-Rényi layer sparsities",
        _vary(allocation=allocation.erdos_renyi),
        GRADUAL,
    ),
    "lamp": Method(
        "gradual", "|w|, layers ranked by LAMP", _vary(allocation=allocation.lamp), GRADUAL
    ),
    "saliency": Method(
        "gradual",
        "|w g| averaged over steps, each layer alike",
        _vary(score=scores.saliency),
        GRADUAL | {"decay": 0.99},
    ),
    "random": Method("gradual", "at random, each layer alike", _vary(score=scores.random), GRADUAL),
    "one-shot": Method("late", "|w| globally, at once, then fine-tuned", one_shot, {"at": 0.5}),
    "ac/dc": Method(
        "late",
        "compressed and dense phases in turn, |w| globally",
        ac_dc,
        {"begin": 0.1, "end": 0.7, "phase": 0.06},
    ),
    "straight-through": Method(
        "late", "|w| in ERK layer sparsities, masks anew in every step", straight_through, {}
    ),
    "proximal-l1": Method(
        "late",
        "soft thresholding; the penalty sets the sparsity",
        proximal_l1,
        {"strengths": STRENGTHS, "end": 0.3},
    ),
    "admm": Method(
        "late",
        "drawn to the nearest sparse weights",
        admm,
        {"penalty": 0.003, "end": 0.7, "every": 32},
    ),
    "imp": Method("late", "lottery ticket: rewound and trained again", None, {"rewind": 0.1}),
    "imp-reinit": Method("late", "its masks with fresh weights", None, {"rewind": 0.1}),
    "static": Method("early", "random masks", static, {}),
    "set": Method(
        "early",
        "weakest go, random ones grow",
        functools.partial(dynamic, grow=scores.random),
        DYNAMIC,
    ),
    "rigl": Method(
        "early",
        "weakest go, largest gradients of one batch grow, as published",
        functools.partial(dynamic, grow=scores.gradient),
        DYNAMIC,
    ),
    "rigl-deflated": Method(
        "early",
        "weakest go, largest mean gradients grow, less their part of rank one",
        functools.partial(dynamic, grow=scores.ema_gradients(scores.deflated_gradient, 0.99)),
        DYNAMIC,
    ),
    "snip": Method(
        "early",
        "|w g| at initialisation",
        functools.partial(at_initialisation, score=initialization.snip),
        {},
    ),
    "grasp": Method(
        "early",
        "w H g at initialisation",
        functools.partial(at_initialisation, score=initialization.grasp),
        {},
    ),
    "synflow": Method("early", "synaptic flow at initialisation", synflow, {"rounds": 100}),
}
