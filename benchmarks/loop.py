"""The training loop: pure functions to compile, scan over, or map over seeds.

`train_epoch` is one pass over the training images, on the device and inside `lax.scan`; `epoch` evaluates after it. A
whole run is `lax.scan` over either, or a loop in Python that tells a progress bar after each epoch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import prunax

PyTree = Any


class Data(NamedTuple):
    """What training and evaluation read, on the device."""

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class State(NamedTuple):
    """What one epoch hands to the next."""

    params: PyTree
    opt_state: Any
    key: jax.Array


class Metrics(NamedTuple):
    """Scalars after an epoch; arrays over epochs once stacked."""

    loss: jax.Array  # mean over the epoch
    accuracy: jax.Array  # on the test images, in [0, 1]
    sparsity: jax.Array  # fraction of the prunable weights that are exactly zero


def epoch(
    apply: Callable[[PyTree, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    data: Data,
    state: State,
    *,
    batch_size: int,
) -> tuple[State, Metrics]:
    """Trains for one epoch and evaluates.

    Args:
        apply: `apply(params, images) -> logits`.
        optimizer: any optax transformation: nothing here knows of pruning.
        data: images and labels. The last images of an epoch that fill no batch are left out of it.
        state: parameters, optimizer state, and the key that shuffles.
        batch_size: images a step.

    Returns:
        The next state, and the metrics after this epoch.
    """
    state, loss = train_epoch(apply, optimizer, data, state, batch_size=batch_size)
    accuracy = evaluate(apply, state.params, data.test_images, data.test_labels)
    return state, Metrics(loss, accuracy, sparsity(state.params))


def train_epoch(
    apply: Callable[[PyTree, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    data: Data,
    state: State,
    *,
    batch_size: int,
) -> tuple[State, jax.Array]:
    """`epoch` without the evaluation. Returns the next state and the mean loss."""
    key, shuffle = jax.random.split(state.key)
    count = data.train_labels.shape[0]
    steps = steps_per_epoch(count, batch_size)
    order = jax.random.permutation(shuffle, count)[: steps * batch_size]

    def loss_fn(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: tuple[PyTree, Any], rows: jax.Array) -> tuple[tuple[PyTree, Any], jax.Array]:
        params, opt_state = carry
        batch = data.train_images[rows], data.train_labels[rows]
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    carry = state.params, state.opt_state
    (params, opt_state), losses = jax.lax.scan(step, carry, order.reshape(steps, batch_size))
    return State(params, opt_state, key), losses.mean()


def evaluate(
    apply: Callable[[PyTree, jax.Array], jax.Array],
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    batch_size: int = 1000,
) -> jax.Array:
    """The fraction of the images that are classified right."""

    def right(image: jax.Array) -> jax.Array:
        return jnp.argmax(apply(params, image[None])[0])

    return jnp.mean(jax.lax.map(right, images, batch_size=batch_size) == labels)


def kernels(params: PyTree) -> list[jax.Array]:
    """The leaves that prunax prunes by default."""
    named = zip(prunax.trees.paths(params), jax.tree.leaves(params), strict=True)
    return [leaf for name, leaf in named if prunax.trees.is_kernel(name, leaf)]


def sparsity(params: PyTree) -> jax.Array:
    """The fraction of the prunable weights that are exactly zero, counted from the weights."""
    leaves = kernels(params)
    zeros = sum(jnp.sum(leaf == 0) for leaf in leaves)
    return zeros / sum(leaf.size for leaf in leaves)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Full batches in an epoch."""
    return count // batch_size
