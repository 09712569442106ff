"""Scores at initialisation, against their definitions and against each other on a deep network."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prunax
from prunax import allocation, initialization


class Deep(nn.Module):
    widths: tuple[int, ...] = (200, 100, 50, 20, 10)

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


MODEL = Deep()
X = jax.random.normal(jax.random.key(0), (32, 64))
Y = jnp.arange(32) % 10


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(1), X)


def loss_fn(params, x, y):
    logits = MODEL.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def test_snip_is_the_change_of_the_loss_to_first_order(params):
    scores = initialization.snip(loss_fn, params, X, Y)
    kernel = params["params"]["Dense_1"]["kernel"]
    i = np.unravel_index(np.argmax(scores["params"]["Dense_1"]["kernel"]), kernel.shape)

    def scaled(c):  # the loss as a function of a gate on that weight
        new = kernel.at[i].multiply(c)
        inner = params["params"] | {"Dense_1": params["params"]["Dense_1"] | {"kernel": new}}
        return loss_fn({"params": inner}, X, Y)

    slope = (scaled(1.01) - scaled(0.99)) / 0.02
    np.testing.assert_allclose(
        scores["params"]["Dense_1"]["kernel"][i], abs(slope), rtol=0.05, atol=1e-6
    )


def test_grasp_is_weight_times_hessian_gradient():
    h = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    params = {"kernel": jnp.array([[1.0], [-2.0]])}

    def quadratic(p):
        return 0.5 * jnp.sum(p["kernel"] * jnp.dot(h, p["kernel"]))

    scores = initialization.grasp(quadratic, params)
    w = np.array([[1.0], [-2.0]])
    hessian = np.array([[2.0, 1.0], [1.0, 3.0]])
    np.testing.assert_allclose(scores["kernel"], w * (hessian @ (hessian @ w)), rtol=1e-6)


def test_synflow_is_conserved_from_layer_to_layer(params):
    kernels_only = jax.tree.map(lambda p: p if p.ndim > 1 else 0 * p, params)
    scores = initialization.synflow(MODEL.apply, kernels_only, X[:1])["params"]
    sums = [float(layer["kernel"].sum()) for layer in scores.values()]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-4)


def test_synflow_leaves_no_layer_empty_where_global_magnitude_does(params):
    def empty(masks):
        return sum(
            leaf.kept == 0 for leaf in prunax.summarize(params, masks).leaves if leaf.prunable
        )

    synflow = initialization.iterative_masks(
        lambda p: initialization.synflow(MODEL.apply, p, X[:1]), params, 0.995
    )
    # Kernels of a narrow layer are initialised larger; here the widest layer is the one that is lost.
    magnitude = prunax.compute_masks(params, 0.995, allocation=allocation.global_ranking)
    once = prunax.compute_masks(
        params,
        0.995,
        scores=initialization.snip(loss_fn, params, X, Y),
        allocation=allocation.global_ranking,
    )
    n = prunax.summarize(params, synflow).weights
    for masks in (synflow, magnitude, once):
        assert prunax.summarize(params, masks).kept == n - round(0.995 * n)
    assert empty(synflow) == 0
    assert empty(magnitude) > 0


def test_iterative_masks_are_nested_and_trainable(params):
    def score(p):
        return initialization.synflow(MODEL.apply, p, X[:1])

    few = initialization.iterative_masks(score, params, 0.5, rounds=5)
    one = initialization.iterative_masks(score, params, 0.5, rounds=1)
    direct = prunax.compute_masks(
        params, 0.5, scores=score(params), allocation=allocation.global_ranking
    )
    chex.assert_trees_all_equal(one, direct)
    assert prunax.summarize(params, few).sparsity == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("sparsity", "rounds", "message"), [(1.5, 3, "sparsity"), (0.5, 0, "rounds")]
)
def test_bad_arguments_are_named(params, sparsity, rounds, message):
    with pytest.raises(ValueError, match=message):
        initialization.iterative_masks(lambda p: p, params, sparsity, rounds=rounds)


def test_synflow_of_a_deep_network_ranks_as_in_exact_arithmetic():
    keys = jax.random.split(jax.random.key(0), 40)
    params = {f"{i:02}": jax.random.normal(key, (32, 32)) for i, key in enumerate(keys)}

    def deep(params, x):
        for kernel in params.values():
            x = jax.nn.relu(x @ kernel)
        return x

    x = jnp.ones((1, 32))
    assert not bool(jnp.isfinite(deep(jax.tree.map(jnp.abs, params), x)).any())
    scores = initialization.synflow(deep, params, x)
    jitted = jax.jit(lambda p: initialization.synflow(deep, p, x))(params)
    exact = [np.abs(np.asarray(kernel, np.float64)) for kernel in params.values()]
    forward, backward = [np.ones((1, 32))], [np.ones((1, 32))]
    for kernel in exact:
        forward.append(forward[-1] @ kernel)
    for kernel in reversed(exact):
        backward.insert(0, backward[0] @ kernel.T)
    expected = np.stack([w * forward[i].T * backward[i + 1] for i, w in enumerate(exact)])
    for got in (scores, jitted):
        ratio = np.stack(list(got.values())) / expected
        np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-4)
