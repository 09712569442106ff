"""Flax Linen, Flax NNX, Equinox and Haiku: each trained for real on scikit-learn's digits through `prunax.prune`."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets
from flax import nnx

import prunax
from prunax import schedules

pytestmark = pytest.mark.relaxed_promotion

SPARSITY = 0.85
STEPS = 300
SCHEDULE = schedules.polynomial(SPARSITY, begin_step=60, end_step=200, every=30)


@functools.cache
def digits():
    """(train images, train labels, test images, test labels), images in [0, 1] of 64 pixels."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def optimizer():
    return prunax.prune(optax.adamw(3e-3, weight_decay=1e-3), SCHEDULE)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(params, apply):
    """Train a plain function `apply(params, images) -> logits` in one scan."""
    tx = optimizer()
    images, labels = (jnp.asarray(a) for a in digits()[:2])

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (128,), 0, len(labels))
        grads = jax.grad(lambda p: cross_entropy(apply(p, images[batch]), labels[batch]))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, tx.init(params)))
    return params, state


def check(params, masks, logits, kernels):
    """Exact zeros under the masks, exact counts, and a network that has learned to read digits."""
    assert float((logits.argmax(-1) == digits()[3]).mean()) > 0.9
    masks = dict(zip(prunax.trees.paths(masks), jax.tree.leaves(masks), strict=True))
    leaves = dict(zip(prunax.trees.paths(params), jax.tree.leaves(params), strict=True))
    assert {path for path, mask in masks.items() if mask.ndim} == set(kernels)
    for path in kernels:
        leaf, mask = np.asarray(leaves[path]), np.asarray(masks[path])
        assert (leaf[~mask] == 0).all()
        assert (leaf == 0).sum() == (~mask).sum() == round(SPARSITY * leaf.size), path
    summary = prunax.summarize(params)
    assert summary.weights - summary.kept == sum(round(SPARSITY * leaves[p].size) for p in kernels)


def test_flax_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.reshape((-1, 8, 8, 1))
            x = nn.relu(nn.Conv(12, (3, 3), strides=2)(x))
            x = nn.LayerNorm()(x.reshape((len(x), -1)))
            return nn.Dense(10)(nn.relu(nn.Dense(48)(x)))

    model = Model()
    variables = model.init(jax.random.key(0), digits()[0][:1])
    variables, state = train(variables, model.apply)
    kernels = [f"params/{name}/kernel" for name in ("Conv_0", "Dense_0", "Dense_1")]
    check(variables, state.masks, model.apply(variables, digits()[2]), kernels)


def test_flax_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(64, 96, rngs=rngs)
            self.norm = nnx.BatchNorm(96, momentum=0.9, rngs=rngs)
            self.out = nnx.Linear(96, 10, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.hidden(x))))

    model = Model(nnx.Rngs(0))
    trainer = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, trainer, images, labels):
        grads = nnx.grad(lambda m: cross_entropy(m(images), labels))(model)
        trainer.update(model, grads)

    images, labels = digits()[:2]
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        batch = rng.integers(0, len(labels), 128)
        step(model, trainer, images[batch], labels[batch])
    model.eval()
    params = nnx.state(model, nnx.Param)
    masks = prunax.compute_masks(params, SPARSITY)  # what is pruned already is pruned again
    check(params, masks, model(digits()[2]), ["hidden/kernel", "out/kernel"])


def test_equinox():
    model = eqx.nn.MLP(64, 10, width_size=96, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params, state = train(params, lambda p, x: jax.vmap(eqx.combine(p, static))(x))
    logits = jax.vmap(eqx.combine(params, static))(digits()[2])
    check(params, state.masks, logits, ["layers/0/weight", "layers/1/weight"])


def test_haiku():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([96, 10])(x)))
    params = network.init(jax.random.key(0), digits()[0][:1])
    params, state = train(params, network.apply)
    kernels = ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    check(params, state.masks, network.apply(params, digits()[2]), kernels)


def test_a_whole_equinox_module_with_its_functions():
    model = eqx.nn.MLP(6, 4, width_size=8, depth=1, activation=jax.nn.gelu, key=jax.random.key(0))
    masks = prunax.compute_masks(model, 0.5)
    pruned = prunax.apply_masks(model, masks)
    assert pruned.activation is model.activation
    assert int((pruned.layers[0].weight == 0).sum()) == 24
    assert pruned(jnp.ones(6)).shape == (4,)
    assert prunax.summarize(model, masks).sparsity == 0.5


def test_an_nnx_state_with_statistics_and_random_keys():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(6, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.hidden(x)))

    model = Model(nnx.Rngs(0))
    state = nnx.state(model)
    masks = prunax.compute_masks(state, 0.75)
    nnx.update(model, prunax.apply_masks(state, masks))
    assert int((model.hidden.kernel[...] == 0).sum()) == 36
    assert model(jnp.ones((2, 6))).shape == (2, 8)
    assert prunax.summarize(nnx.state(model), masks).sparsity == 0.75


def test_linen_scan_over_layers_prunes_kernels_and_not_stacked_biases():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(nn.Dense(6)(x)), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = stack.init(jax.random.key(0), jnp.ones((2, 6)), None)
    masks = prunax.compute_masks(variables, 0.5)["params"]
    assert masks["Dense_0"]["kernel"].shape == (3, 6, 6)
    assert masks["Dense_0"]["bias"].shape == masks["LayerNorm_0"]["scale"].shape == ()
