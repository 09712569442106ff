"""How each sparse training method trains: for `methods.py`, and for its short view `train.py`.

A recipe says what is wrapped around one and the same Adam, so that every method gets the same steps, batches and
learning rates. Every method takes an allocation, but for those that leave it to a penalty: `Method.allocations` are
the ones it is compared at, the first of them that of all methods.

Numbers under `options` are first values, or were chosen on held-out training images (`methods.py --validation
--learning-rate 0.004`, gradual methods).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
        allocations: names in `ALLOCATIONS` that it is run with; none where it has no say in it.
    """

    family: str
    about: str
    recipe: Callable[..., Recipe] | None
    options: Mapping[str, Any]
    allocations: Sequence[str] = ("erk",)


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


def one_shot(b: Budget, sparsity: float, *, at: float, allocation: Any) -> Recipe:
    """Trains dense, prunes all at once, fine-tunes."""
    schedule = schedules.one_shot(sparsity, b.at(at))
    return Recipe(lambda key, masks: prunax.prune(adam(b), schedule, allocation=allocation))


def ac_dc(
    b: Budget, sparsity: float, *, begin: float, end: float, phase: float, allocation: Any
) -> Recipe:
    """Compressed and dense phases in turn, compressed at the end."""
    schedule = schedules.alternating(
        sparsity, b.at(begin), b.at(end), compressed_steps=b.at(phase), dense_steps=b.at(phase)
    )
    return Recipe(lambda key, masks: prunax.prune(adam(b), schedule, allocation=allocation))


def straight_through(b: Budget, sparsity: float, *, allocation: Any) -> Recipe:
    """Dense weights under masks that are computed anew in every step; the gradient reaches all weights.

    Not to be ranked globally: of untrained weights that empties the first layer, and no gradient fills it again.
    """

    def masks(params: PyTree, state: Any = None) -> PyTree:
        return prunax.compute_masks(params, sparsity, allocation=allocation)

    return Recipe(
        lambda key, _: adam(b),
        forward=lambda params: prunax.straight_through(params, masks(params)),
        masks=masks,
    )


def proximal_l1(b: Budget, sparsity: float, *, end: float, strength: float | jax.Array) -> Recipe:
    """Soft thresholding after every step up to a fraction `end` of the training, then fine-tuning without it.

    The penalty alone sets the sparsity, whatever was asked for: what is exactly zero at `end` stays so. Its strength is
    relative to the learning rate.
    """
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


def admm(
    b: Budget, sparsity: float, *, penalty: float, end: float, every: int, allocation: Any
) -> Recipe:
    """Dense weights that are drawn to the nearest sparse ones, pruned late."""
    return Recipe(
        lambda key, masks: transforms.admm(
            adam(b),
            sparsity,
            penalty=optax.linear_schedule(0.0, penalty, b.at(end)),
            end_step=b.at(end),
            every=every,
            allocation=allocation,
        )
    )


def static(b: Budget, sparsity: float, *, allocation: Any) -> Recipe:
    """Random masks from the first step on."""
    return Recipe(
        lambda key, masks: transforms.static_sparse(
            adam(b), sparsity, key=key, allocation=allocation
        )
    )


def dynamic(
    b: Budget,
    sparsity: float,
    *,
    grow: Any,
    every: int,
    end: float,
    drop: float,
    allocation: Any,
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
            allocation=allocation,
        )
    )


def at_initialisation(b: Budget, sparsity: float, *, score: Any, allocation: Any) -> Recipe:
    """Masks of the untrained network, by a score of a loss."""

    def start(loss: Any, logits: Any, params: PyTree, images: jax.Array) -> PyTree:
        ranked = score(loss, params)
        return prunax.compute_masks(params, sparsity, scores=ranked, allocation=allocation)

    return Recipe(under_masks(b), start)


def synflow(b: Budget, sparsity: float, *, rounds: int, allocation: Any) -> Recipe:
    """Masks of the untrained network, without data."""

    def start(loss: Any, logits: Any, params: PyTree, images: jax.Array) -> PyTree:
        def score(params: PyTree) -> PyTree:
            return initialization.synflow(logits, params, images[:1])

        return initialization.iterative_masks(
            score, params, sparsity, rounds=rounds, allocation=allocation
        )

    return Recipe(under_masks(b), start)


def under_masks(b: Budget) -> Callable[[jax.Array, PyTree], optax.GradientTransformation]:
    """Training under masks that are there from the start."""
    return lambda key, masks: transforms.fixed_masks(adam(b), masks)


GRADUAL = {"begin": 0.05, "end": 0.5, "updates": 50}
DYNAMIC = {"every": 100, "end": 0.75, "drop": 0.3}
ALLOCATIONS = {
    "erk": allocation.erdos_renyi,
    "uniform": allocation.uniform,
    "global": allocation.global_ranking,
    "lamp": allocation.lamp,
}
FAMILIES = {
    "gradual": "Pruned gradually",
    "late": "Dense, then sparse",
    "early": "Sparse from the start",
}
AS_PUBLISHED = "erk", "global"


def _gradual(about: str, score: Any, allocations: Sequence[str] = ("erk",), **more: Any) -> Method:
    return Method(
        "gradual",
        about,
        functools.partial(gradual, score=score),
        GRADUAL | more,
        allocations,
    )


def _dynamic(about: str, grow: Any) -> Method:
    return Method("early", about, functools.partial(dynamic, grow=grow), DYNAMIC)


def _initial(about: str, score: Any) -> Method:
    recipe = functools.partial(at_initialisation, score=score)
    return Method("early", about, recipe, {}, AS_PUBLISHED)


METHODS: dict[str, Method] = {
    "dense": Method("", "no pruning", dense, {}, ()),
    "magnitude": _gradual("|w|", scores.magnitude, tuple(ALLOCATIONS)),
    "saliency": _gradual("|w g| averaged over steps", scores.saliency, decay=0.99),
    "random": _gradual("at random", scores.random),
    "one-shot": Method(
        "late", "|w|, at once, then fine-tuned", one_shot, {"at": 0.5}, AS_PUBLISHED
    ),
    "ac/dc": Method(
        "late",
        "compressed and dense phases in turn",
        ac_dc,
        {"begin": 0.1, "end": 0.7, "phase": 0.06},
        AS_PUBLISHED,
    ),
    "straight-through": Method("late", "|w|, masks anew in every step", straight_through, {}),
    "proximal-l1": Method(
        "late", "soft thresholding; the penalty sets the sparsity", proximal_l1, {"end": 0.3}, ()
    ),
    "admm": Method(
        "late",
        "drawn to the nearest sparse weights",
        admm,
        {"penalty": 0.003, "end": 0.7, "every": 32},
    ),
    "imp": Method(
        "late", "lottery ticket: rewound and trained again", None, {"rewind": 0.1}, AS_PUBLISHED
    ),
    "imp-reinit": Method(
        "late", "its masks with fresh weights", None, {"rewind": 0.1}, AS_PUBLISHED
    ),
    "static": Method("early", "random masks", static, {}),
    "set": _dynamic("weakest go, random ones grow", scores.random),
    "rigl": _dynamic(
        "weakest go, largest mean gradients grow, less their part of rank one",
        scores.ema_gradients(scores.deflated_gradient, 0.99),
    ),
    "rigl-published": _dynamic("weakest go, largest gradients of one batch grow", scores.gradient),
    "snip": _initial("|w g| at initialisation", initialization.snip),
    "grasp": _initial("w H g at initialisation", initialization.grasp),
    "synflow": Method(
        "early", "synaptic flow at initialisation", synflow, {"rounds": 100}, AS_PUBLISHED
    ),
}
