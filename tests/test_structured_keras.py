"""Keras models made smaller, and Keras models again: run where Keras is installed."""

import os

import jax
import numpy as np
import pytest

from prunax import structured

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras")

pytestmark = [
    pytest.mark.relaxed_promotion,
    pytest.mark.filterwarnings("ignore"),  # those of another library
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras runs on another backend"),
]
X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def convolutional():
    inputs = keras.Input((8, 8, 3))
    h = keras.layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
    h = keras.layers.ReLU()(keras.layers.BatchNormalization()(h))
    skip = h
    h = keras.layers.DepthwiseConv2D(3, padding="same")(h)
    h = keras.layers.Conv2D(16, 1)(h) + skip
    h = keras.layers.GlobalAveragePooling2D()(h)
    return keras.Model(inputs, keras.layers.Dense(5)(h)), X


def sequential():
    layers = [keras.layers.Dense(12, activation="relu"), keras.layers.Dense(5)]
    return keras.Sequential([keras.Input((3,)), *layers]), X[:, 0, 0]


def attention():
    inputs = keras.Input((8, 12))
    h = keras.layers.MultiHeadAttention(num_heads=4, key_dim=3)(inputs, inputs)
    h = keras.layers.LayerNormalization()(h + inputs)
    h = h + keras.layers.Dense(12)(keras.layers.Dense(24, activation="gelu")(h))
    return keras.Model(inputs, keras.layers.Dense(5)(h)), X.reshape(2, 16, 12)[:, :8]


def function_of_variables(model):
    """The model as a function of the values of its variables, and these."""
    number = {id(v): i for i, v in enumerate(model.variables)}
    trained = [number[id(v)] for v in model.trainable_variables]
    others = [number[id(v)] for v in model.non_trainable_variables]

    def fn(values, x):
        own, rest = [values[i] for i in trained], [values[i] for i in others]
        return model.stateless_call(own, rest, x, training=False)[0]

    return fn, [v.value for v in model.variables]


@pytest.mark.parametrize("make", [convolutional, sequential, attention])
def test_the_smaller_model_computes_what_the_smaller_function_does(make):
    keras.utils.set_random_seed(0)
    model, x = make()
    fn, values = function_of_variables(model)
    where = lambda path, leaf: np.ndim(leaf) >= 2  # noqa: E731 - variables have numbers, no names
    small = structured.prune_channels(fn, values, x, sparsity=0.5, where=where)
    smaller = structured.rebuild(model, small)
    assert isinstance(smaller, type(model))
    assert smaller.count_params() == structured.count_parameters(small.fn, small.params)
    assert smaller.count_params() < 0.7 * model.count_params()
    # Through the model's own call, and with its statistics.
    np.testing.assert_allclose(smaller(x), small.fn(small.params, x), rtol=1e-4, atol=1e-5)
    again, values = function_of_variables(smaller)
    grads = jax.grad(lambda v: again(v, x).sum())(values)
    assert all(np.isfinite(g).all() for g in grads)


def test_params_that_are_not_the_variables_are_refused():
    model, x = sequential()
    fn, values = function_of_variables(model)
    small = structured.prune_channels(
        lambda p, x: fn(p["all"][::-1], x),
        {"all": values[::-1]},
        x,
        sparsity=0.5,
        where=lambda path, leaf: np.ndim(leaf) >= 2,
    )
    with pytest.raises(ValueError, match="not the model's variables in their order"):
        structured.rebuild(model, small)
