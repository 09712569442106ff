"""A smaller network goes back into the code that it came from: an NNX model with a config object, a Keras model."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prunax import allocation, export, structured, trees


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8
    hidden: int = 16
    layers: int = 2
    heads: int = 4


class Layer(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.up = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.out = nnx.Linear(config.width, 5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


@pytest.mark.relaxed_promotion
def test_nnx_model_with_a_config_object(tmp_path):
    model, x = Model(Config(), nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (3, 8))
    graph, params = nnx.split(model)

    def fn(params, x):
        return nnx.merge(graph, params)(x)

    half = allocation.by_path({"*up/kernel*": 0.5})
    small = structured.prune_channels(fn, params, x, allocation=half)
    config = dataclasses.replace(Config(), hidden=8)
    smaller = structured.rebuild(model, small)
    assert smaller.layers[0].up.out_features == 8
    np.testing.assert_allclose(smaller(x), small.fn(small.params, x), rtol=1e-5)

    # The way of a model zoo: weights by name in a folder, and a model that is made of the config.
    named = dict(trees.named_leaves(small.params))
    export.save_checkpoint(tmp_path / "model", named, config=vars(config))
    with export.open_checkpoint(tmp_path / "model") as checkpoint:
        fresh = Model(Config(**checkpoint.config), nnx.Rngs(1))
        read = jax.tree.structure(nnx.state(fresh)).unflatten(
            jnp.asarray(checkpoint.read(path)) for path in trees.paths(nnx.state(fresh))
        )
    nnx.update(fresh, read)
    np.testing.assert_array_equal(fresh(x), smaller(x))


KERAS = """
    import keras, numpy as np, prunax

    inputs = keras.Input((8, 8, 3))
    h = keras.layers.Conv2D(16, 3, padding="same")(inputs)
    h = keras.layers.ReLU()(keras.layers.BatchNormalization()(h))
    h = keras.layers.GlobalAveragePooling2D()(h)
    model = keras.Model(inputs, keras.layers.Dense(5)(h))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")

    number = {id(v): i for i, v in enumerate(model.variables)}
    trained = [number[id(v)] for v in model.trainable_variables]
    others = [number[id(v)] for v in model.non_trainable_variables]

    def predict(values, x):
        own, rest = [values[i] for i in trained], [values[i] for i in others]
        return model.stateless_call(own, rest, x, training=False)[0]

    values = [v.value for v in model.variables]
    small = prunax.structured.prune_channels(predict, values, x, sparsity=0.5)
    smaller = prunax.structured.rebuild(model, small)
    smaller.save("smaller.keras")
    again = keras.models.load_model("smaller.keras")
    assert again.count_params() < 0.6 * model.count_params()
    np.testing.assert_allclose(again(x), small.fn(small.params, x), atol=1e-5)
"""


def test_keras_model_is_saved_and_loaded(tmp_path):
    pytest.importorskip("keras", reason="pip install 'prunax[zoo]'")
    env = os.environ | {"KERAS_BACKEND": "jax"}
    script = [sys.executable, "-c", textwrap.dedent(KERAS)]
    subprocess.run(script, cwd=tmp_path, env=env, check=True)
