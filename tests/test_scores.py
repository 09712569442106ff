"""Scores: formulas by hand, dtypes, and the scalar score of what cannot be pruned."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from prunax import scores

PARAMS = {
    "kernel": jnp.array([[2.0, -3.0, 0.0]]),
    "bias": jnp.array([-1.0]),
    "step": jnp.int32(7),
    "name": "x",
}
GRADS = {
    "kernel": jnp.array([[-0.5, 2.0, 4.0]]),
    "bias": jnp.array([2.0]),
    "step": jnp.int32(0),
    "name": "x",
}


@pytest.mark.parametrize(
    ("score", "kernel", "bias"),
    [
        (scores.magnitude, [[2.0, 3.0, 0.0]], [1.0]),
        (scores.gradient, [[0.5, 2.0, 4.0]], [2.0]),
        (scores.deflated_gradient, [[0.5, 2.0, 4.0]], [2.0]),  # vectors
        (scores.saliency, [[1.0, 6.0, 0.0]], [2.0]),
        (scores.fisher, [[1.0, 36.0, 0.0]], [4.0]),
    ],
)
def test_formulas(score, kernel, bias):
    result = score(PARAMS, GRADS)
    assert jax.tree.structure(result) == jax.tree.structure(PARAMS)
    assert (result["kernel"].tolist(), result["bias"].tolist()) == (kernel, bias)
    for leaf in (result["step"], result["name"]):
        assert leaf.shape == () and leaf.dtype == jnp.float32 and float(leaf) == 0


def test_fisher_of_a_second_moment():
    moment = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
    result = scores.fisher({"kernel": PARAMS["kernel"]}, second_moment=moment)
    assert result["kernel"].tolist() == [[4.0, 18.0, 0.0]]


@pytest.mark.parametrize("params_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("grads_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "score", [scores.magnitude, scores.gradient, scores.saliency, scores.fisher]
)
def test_mixed_dtypes(score, params_dtype, grads_dtype):
    params = {"kernel": PARAMS["kernel"].astype(params_dtype)}
    grads = {"kernel": GRADS["kernel"].astype(grads_dtype)}
    result = score(params, grads)["kernel"]
    expected = score({"kernel": PARAMS["kernel"]}, {"kernel": GRADS["kernel"]})["kernel"]
    assert result.astype(jnp.float32).tolist() == expected.tolist()


@pytest.mark.parametrize("score", [scores.saliency, scores.fisher])
def test_half_precision_products_do_not_underflow_to_ties(score):
    params = {"kernel": jnp.array([[1e-4, 2e-4, 3e-4, 4e-4]], jnp.float16)}
    grads = {"kernel": jnp.full((1, 4), 1e-4, jnp.float16)}
    values = score(params, grads)["kernel"][0].tolist()
    assert values == sorted(set(values)) and values[0] > 0


def test_random_is_uniform_repeatable_and_of_each_leaf_its_own():
    params = {"a": jnp.zeros((50, 40)), "b": jnp.zeros((50, 40), jnp.bfloat16), "n": jnp.arange(3)}
    one, same = (scores.random(params, key=jax.random.key(1)) for _ in range(2))
    other = scores.random(params, key=jax.random.key(2))
    assert jnp.array_equal(one["a"], same["a"]) and not jnp.array_equal(one["a"], other["a"])
    assert not jnp.array_equal(one["a"], one["b"])
    assert one["a"].min() >= 0 and one["a"].max() < 1 and abs(float(one["a"].mean()) - 0.5) < 0.03
    assert one["b"].dtype == jnp.float32 and one["n"].shape == ()


def gradients_of_a_layer(shape=(12, 8), dtype=np.float32):
    """Noise on a part of rank one that is ten times as large."""
    rng = np.random.default_rng(0)
    parts = np.ix_(*(rng.normal(size=n) + 2 for n in shape))
    noise = rng.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        noise = noise + 1j * rng.normal(size=shape)
    return (10 * np.prod(np.broadcast_arrays(*parts), axis=0) + noise).astype(dtype)


def deflated(g):
    return np.asarray(scores.deflated_gradient({"k": jnp.asarray(g)}, {"k": jnp.asarray(g)})["k"])


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_deflation_takes_out_the_first_singular_value(dtype, scale):
    g = gradients_of_a_layer(dtype=dtype)
    u, s, v = np.linalg.svd(g)
    expected = np.abs(g - s[0] * np.outer(u[:, 0], v[0]))
    found = deflated((g * scale).astype(dtype)) / scale
    np.testing.assert_allclose(found, expected, atol=1e-4 * s[0])
    assert s[0] > 50 * expected.max()


@pytest.mark.parametrize(
    ("shape", "cut"),
    [((3, 3, 4, 6), 3), ((5, 5, 6, 16), 3), ((16, 6, 5, 5), 1), ((16, 4, 8), 1), ((4, 8, 16), 2)],
    ids=["HWIO", "LeNet-5", "OIHW", "to heads", "from heads"],
)
def test_deflation_knows_inputs_and_outputs(shape, cut):
    inputs, outputs = math.prod(shape[:cut]), math.prod(shape[cut:])
    g = gradients_of_a_layer((inputs, outputs))
    np.testing.assert_allclose(
        deflated(g.reshape(shape)), deflated(g).reshape(shape), atol=1e-4 * np.abs(g).max()
    )


def test_deflation_asks_for_no_transposition():
    g = gradients_of_a_layer((5, 9))
    np.testing.assert_allclose(deflated(g.T), deflated(g).T, atol=1e-4 * np.abs(g).max())


@pytest.mark.parametrize("shape", [(8, 2), (1, 1, 8, 2), (1, 8, 2), (3, 3, 8, 4)])
def test_deflation_of_what_adds_up_to_zero(shape):
    *inputs, outputs = shape
    signs = np.resize([1.0, -1.0], outputs).astype("f4")
    g = np.random.default_rng(0).normal(size=inputs).astype("f4")[..., None] * signs
    assert deflated(g).max() < 1e-5 * np.abs(g).max()


def test_deflation_of_a_softmax_layer():
    # What comes back adds up to zero over the classes, along whichever axis they lie.
    g = gradients_of_a_layer() - gradients_of_a_layer().mean(1, keepdims=True)
    for layout in (g, g.T):
        first = np.linalg.svd(layout, compute_uv=False)[1]
        assert np.linalg.norm(deflated(layout), 2) < 2 * first


@pytest.mark.parametrize("shape", [(4, 3), (1, 5), (5,), (), (2, 0), (0, 3, 4)])
def test_deflation_of_nothing(shape):
    assert deflated(np.zeros(shape, np.float32)).tolist() == np.zeros(shape).tolist()


def test_deflation_in_half_precision():
    g = jnp.asarray(gradients_of_a_layer()).astype(jnp.float16) * jnp.float16(2.0**-18)
    found = deflated(g)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, deflated(g.astype(jnp.float32)), rtol=1e-5)


def test_scores_go_into_compute_masks():
    params, grads = ({"kernel": tree["kernel"], "bias": tree["bias"]} for tree in (PARAMS, GRADS))
    masks = prunax.compute_masks(params, 2 / 3, scores=scores.gradient(params, grads))
    assert masks["kernel"].tolist() == [[False, False, True]]


@pytest.mark.parametrize("name", ["gradient", "saliency", "fisher", "deflated_gradient"])
def test_missing_gradients(name):
    with pytest.raises(ValueError, match=rf"scores.{name}: needs gradients, got None"):
        getattr(scores, name)(PARAMS, None)


@pytest.mark.parametrize("name", ["gradient", "saliency", "fisher", "deflated_gradient"])
def test_gradients_that_do_not_fit(name):
    score, params = getattr(scores, name), {"a": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=rf"scores.{name}: .*'a/kernel' is missing"):
        score(params, {"a": {}})
    with pytest.raises(
        ValueError, match=rf"scores.{name}: the gradient of 'a/kernel' has shape \(3,\).*\(2, 3\)"
    ):
        score(params, {"a": {"kernel": jnp.ones(3)}})


def test_nan_stays_nan_for_others_to_refuse():
    assert np.isnan(
        scores.saliency({"k": jnp.ones((1, 1))}, {"k": jnp.full((1, 1), jnp.nan)})["k"]
    ).all()
