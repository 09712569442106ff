"""Penalties over coupled groups, and what they leave: units of exactly zero that can be removed."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from sklearn.datasets import load_digits

import prunax
from prunax import structured

X = zoo.normal(9, 2, 6)
NETWORK = zoo.mlp()
GROUPS = structured.axis_groups(NETWORK.fn, NETWORK.params, X)


@pytest.fixture
def group():
    """The twelve units of the first hidden layer: w1:1 b1:0 w2:0."""
    return next(g for g in GROUPS if g.size == 12)


def all_leaves(path, leaf):
    return True


# Norms and penalties.


def test_norms_by_hand(group):
    p = NETWORK.params
    squares = (p["w1"] ** 2).sum(0) + (p["w2"] ** 2).sum(1)
    norms = structured.group_norms([group], p)[group]
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-6)
    norms = structured.group_norms([group], p, where=all_leaves)[group]
    np.testing.assert_allclose(norms, np.sqrt(squares + p["b1"] ** 2), rtol=1e-6)


def test_norms_of_units_with_many_copies():
    # The units of `point1` lie in `depth2` at every second place, two copies each.
    network = zoo.depthwise_separable()
    groups = structured.axis_groups(network.fn, network.params, *network.args)
    group = next(g for g in groups if g.name == "params/point1/kernel[3]")
    p = network.params["params"]
    by_hand = sum(
        [
            (p["point1"]["kernel"] ** 2).sum((0, 1, 2)),
            (p["depth2"]["kernel"] ** 2).reshape(-1, 8, 2).sum((0, 2)),
            (p["point2"]["kernel"] ** 2).reshape(8, 2, -1).sum((1, 2)),
        ]
    )
    norms = structured.group_norms([group], network.params)[group]
    np.testing.assert_allclose(norms, np.sqrt(by_hand), rtol=1e-5)


def test_lasso_weighs_each_unit_by_its_size(group):
    # 6 + 8 weights a unit.
    norms = structured.group_norms([group], NETWORK.params)[group]
    lasso = structured.unit_lasso([group], NETWORK.params)
    np.testing.assert_allclose(lasso, 14**0.5 * norms.sum(), rtol=1e-6)
    # What is frozen cannot go, and costs nothing.
    frozen = [g for g in GROUPS if g.frozen]
    assert frozen
    assert structured.unit_lasso(frozen, NETWORK.params) == 0


def test_gradients_are_finite_where_units_are_zero(group):
    params = jax.tree.map(jnp.zeros_like, NETWORK.params)
    gradient = jax.jit(jax.grad(lambda p: structured.unit_lasso(GROUPS, p)))(params)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)


def test_gradient_of_weighted_l2_is_strength_times_weight(group):
    strengths = {group: jnp.arange(12.0)}
    gradient = jax.grad(lambda p: structured.weighted_l2(strengths, p))(NETWORK.params)
    np.testing.assert_allclose(gradient["w1"], NETWORK.params["w1"] * np.arange(12), rtol=1e-5)
    np.testing.assert_array_equal(gradient["w3"], 0)
    np.testing.assert_array_equal(gradient["b1"], 0)


def test_strengths_grow_on_removed_units_only(group):
    strengths = jax.jit(
        lambda step: structured.growing_strengths({group: [0, 3]}, step, rate=0.1, every=5)[group]
    )
    removed = np.delete(np.arange(12), [0, 3])
    for step, strength in ((4, 0.0), (5, 0.1), (14, 0.2), (1000, 1.0)):
        np.testing.assert_allclose(strengths(step)[removed], strength, rtol=1e-6)
        np.testing.assert_array_equal(strengths(step)[np.array([0, 3])], 0)


def test_strengths_of_frozen_groups_are_refused():
    frozen = next(g for g in GROUPS if g.frozen)
    with pytest.raises(ValueError, match=r"growing_strengths: .* cannot shrink"):
        structured.growing_strengths({frozen: [0]}, 1)


# The proximal step.


def test_soft_threshold_minimises_the_lasso_nearby(group):
    """The proximal operator: no other point has a smaller 1/2 |w - v|^2 + tau * lasso(w)."""
    tau = 0.05

    def objective(p):
        distance = sum(jnp.sum((p[k] - v) ** 2) for k, v in NETWORK.params.items())
        return distance / 2 + tau * structured.unit_lasso([group], p)

    best = structured.soft_threshold_units([group], NETWORK.params, tau)
    gradient = jax.grad(objective)(best)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0, atol=1e-5), gradient)


def test_soft_threshold_at_zero_and_above_all():
    same = structured.soft_threshold_units(GROUPS, NETWORK.params, 0.0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), same, NETWORK.params)
    none = structured.soft_threshold_units(GROUPS, NETWORK.params, 1e3)
    assert all(not np.any(none[k]) for k in ("w1", "w2", "w3"))
    np.testing.assert_array_equal(none["b1"], NETWORK.params["b1"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_units_are_exactly_zero_in_every_dtype(group, dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), NETWORK.params)
    rms = structured.group_norms([group], params)[group] / 14**0.5
    tau = float(jnp.median(rms))
    tx = structured.proximal_unit_lasso(optax.sgd(0.0), [group], tau)
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.ones_like, params), tx.init(params), params
    )
    new = optax.apply_updates(params, updates)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, params)
    zero = ~np.any(np.asarray(new["w1"], np.float32), 0)
    np.testing.assert_array_equal(zero, np.asarray(rms) <= tau)
    np.testing.assert_array_equal(zero, ~np.any(np.asarray(new["w2"], np.float32), 1))
    assert state.count == 1


def test_proximal_group_lasso_refuses(group):
    with pytest.raises(ValueError, match="at least 0, got -1"):
        structured.proximal_unit_lasso(optax.sgd(0.1), [group], -1.0)
    tx = structured.proximal_unit_lasso(optax.sgd(0.1), [group], 0.1)
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx.update(NETWORK.params, tx.init(NETWORK.params))


# Training on digits.


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(12, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


MODEL = ConvNet()


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels.astype(np.int32)


@functools.cache
def prepared():
    variables = MODEL.init(jax.random.key(0), digits()[0][:1])
    groups = structured.axis_groups(MODEL.apply, variables, digits()[0][:1])
    return variables, structured.prunable_groups(groups, variables)


def train(variables, optimizer, steps=300, penalty=lambda variables, step: 0.0):
    """On all but the last 297 images."""
    images, labels = (x[:1500] for x in digits())

    # Not in `scan`, where XLA compiles gradients of convolutions to slow loops on the CPU.
    @jax.jit
    def step(variables, opt_state, i, x, y):
        def loss_fn(variables):
            logits, new = MODEL.apply(variables, x, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss + penalty(variables, i), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables)
        updates, opt_state = optimizer.update(grads, opt_state, variables)
        return {**optax.apply_updates(variables, updates), **new}, opt_state

    opt_state = optimizer.init(variables)
    rng = np.random.default_rng(0)
    for i in range(steps):
        rows = rng.integers(0, 1500, 64)
        variables, opt_state = step(variables, opt_state, i, images[rows], labels[rows])
    return variables


def accuracy(fn, variables):
    images, labels = (x[1500:] for x in digits())
    return float((fn(variables, images).argmax(-1) == labels).mean())


@pytest.mark.relaxed_promotion
def test_trained_to_zero_and_removed_without_a_trace():
    variables, groups = prepared()
    tx = structured.proximal_unit_lasso(optax.adam(5e-3), groups, 7e-4)
    variables = train(variables, tx)
    norms = structured.group_norms(groups, variables)
    zero = {g.name: int((n == 0).sum()) for g, n in norms.items()}
    assert sum(zero.values()) > 5, zero
    small = structured.prune_channels(MODEL.apply, variables, digits()[0][:1], threshold=0.0)
    # Just the units that are zero went.
    for group, units in small.keep.items():
        np.testing.assert_array_equal(units, np.flatnonzero(norms[group]))
    assert {g.name for g in small.keep} == {name for name, count in zero.items() if count}
    np.testing.assert_allclose(
        small.fn(small.params, digits()[0]), MODEL.apply(variables, digits()[0]), atol=1e-4
    )
    assert accuracy(small.fn, small.params) > 0.85


@pytest.mark.relaxed_promotion
def test_growing_regularisation_leaves_little_to_lose():
    """Pruned after its units were driven away, the network predicts better than pruned at once."""
    variables, _ = prepared()
    dense = train(variables, optax.adam(5e-3))
    small = structured.prune_channels(MODEL.apply, dense, digits()[0][:1], sparsity=0.6)
    at_once = accuracy(small.fn, small.params)

    def penalty(variables, step):
        strengths = structured.growing_strengths(small.keep, step, rate=0.02, every=5)
        return structured.weighted_l2(strengths, variables)

    driven = train(dense, optax.adam(2e-3), penalty=penalty)
    before, after = (
        np.mean([np.delete(n, small.keep[g]).max() for g, n in norms.items()])
        for norms in (structured.group_norms(list(small.keep), v) for v in (dense, driven))
    )
    assert after < 0.2 * before
    pruned = structured.shrink(driven, small.keep)
    assert accuracy(small.fn, pruned) > max(at_once, 0.9)
    assert accuracy(small.fn, pruned) > accuracy(MODEL.apply, driven) - 0.02


def test_threshold_is_no_way_to_lose_a_layer(group):
    params = {**NETWORK.params, "w1": np.zeros_like(NETWORK.params["w1"])}
    params["w2"] = np.zeros_like(params["w2"])
    small = structured.prune_channels(NETWORK.fn, params, X, threshold=0.0)
    assert len(small.keep[group]) == 1
    with pytest.raises(ValueError, match="at least 0"):
        structured.prune_channels(NETWORK.fn, params, X, threshold=-1.0)
    assert prunax.scores.magnitude(params)["w1"].shape == (6, 12)
