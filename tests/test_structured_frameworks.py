"""Axis groups and smaller functions wherever a network may run: frameworks, training, sharded, exported."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import prunax
from prunax import structured

pytestmark = pytest.mark.relaxed_promotion
TOKENS = zoo.normal(0, 2, 7, 5)
KEY = jax.random.key(0)


# The same attention network, written four times: width 8, two heads of 4.


def attention_in_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            return nn.Dense(3)(x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x))

    net = Net()
    return net.apply, jax.eval_shape(net.init, KEY, TOKENS)


def attention_in_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Linear(5, 8, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x)
            return self.head(x + self.attend(x))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    return lambda state, x: nnx.merge(graph, state)(x), state


def attention_in_equinox():
    class Net(eqx.Module):
        embed: eqx.nn.Linear
        attend: eqx.nn.MultiheadAttention
        head: eqx.nn.Linear

        def __call__(self, x):
            x = jax.vmap(self.embed)(x)
            return jax.vmap(self.head)(x + self.attend(x, x, x))

    bias = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
    net = eqx.filter_eval_shape(
        lambda: Net(
            eqx.nn.Linear(5, 8, key=KEY),
            eqx.nn.MultiheadAttention(2, 8, **bias, key=KEY),
            eqx.nn.Linear(8, 3, key=KEY),
        )
    )
    return lambda net, x: jax.vmap(net)(x), net


def attention_in_haiku():
    def forward(x):
        x = hk.Linear(8)(x)
        attend = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())
        return hk.Linear(3)(x + attend(x, x, x))

    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, jax.eval_shape(net.init, KEY, TOKENS)


def anatomy(group):
    """What is left without names, orders of axes and reshapes: for each leaf its role, and a unit's weights."""
    shapes = {leaf.path: leaf.shape for leaf in group.leaves}
    return group.size, sorted(
        (m.role, len(m.position.indices(1)[0]) * np.prod(shapes[m.path]) // shapes[m.path][m.axis])
        for m in group.members
    )


@pytest.mark.parametrize(
    "make", [attention_in_linen, attention_in_nnx, attention_in_equinox, attention_in_haiku]
)
def test_attention_has_the_same_groups_in_every_framework(make):
    fn, params = make()
    groups = [g for g in structured.axis_groups(fn, params, TOKENS) if not g.frozen]
    kernel, bias = ("produces", 8), ("elementwise", 1)
    assert sorted(map(anatomy, groups), key=str) == sorted(
        [
            # The stream: from the embedding and the attention's output, to three projections and the head.
            (8, [("consumes", 3), *([("consumes", 8)] * 3), bias, bias, ("produces", 5), kernel]),
            # Heads: 8 x 4 weights of each projection, 4 biases, and 4 x 8 weights of the output.
            (2, [("consumes", 32), *[("elementwise", 4)] * 3, *[("produces", 32)] * 3]),
            # Within a head: queries with keys, values with the output.
            (4, [*[("elementwise", 2)] * 2, *[("produces", 16)] * 2]),
            (4, [("consumes", 16), ("elementwise", 2), ("produces", 16)]),
        ],
        key=str,
    )


# In training.


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.Dense(6)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def trained():
    model, x = Trained(), zoo.normal(3, 4, 4, 4, 2)
    variables = jax.tree.map(np.asarray, model.init(KEY, x, False))

    def predict(variables, x):
        return model.apply(variables, x, False)

    def learn(variables, x, key):
        return model.apply(variables, x, True, mutable=["batch_stats"], rngs={"dropout": key})

    return model, variables, x, predict, learn


def test_batch_statistics_and_dropout():
    """The groups of the network as used serve the one that is trained: its new statistics are smaller too."""
    _, variables, x, predict, learn = trained()
    small = structured.prune_channels(predict, variables, x, sparsity=0.5)
    fit = jax.jit(structured.shrink_function(learn, small.keep))
    logits, changed = fit(small.params, x, KEY)
    assert logits.shape == (4, 3)
    # The mean over this batch of the channels that are left, mixed half and half with the old one.
    (units,) = (u for g, u in small.keep.items() if g.size == 8)
    kernel = variables["params"]["Conv_0"]["kernel"]
    means = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).mean((0, 1, 2))
    np.testing.assert_allclose(
        changed["batch_stats"]["BatchNorm_0"]["mean"], means[units] / 2, rtol=1e-4, atol=1e-6
    )
    # Dropout: other keys, other outputs; the same key, the same.
    np.testing.assert_array_equal(fit(small.params, x, KEY)[0], logits)
    assert not np.allclose(fit(small.params, x, jax.random.key(1))[0], logits)


def test_dropout_keeps_its_share():
    params = {"up": np.ones((4, 400), np.float32), "down": np.eye(400, dtype=np.float32)}

    def fn(p, x, key):
        return nn.Dropout(0.25, deterministic=False).apply({}, x @ p["up"], rngs={"dropout": key})

    def whole(p, x, key):
        return (fn(p, x, key) @ p["down"]).sum(-1)

    x = np.ones((50, 4), np.float32)
    small = structured.prune_channels(whole, params, x, KEY, sparsity=0.5)
    assert small.params["up"].shape == (4, 200)
    # 200 units of value 4, each there with chance 0.75 and scaled by its inverse: 800 on average.
    assert abs(float(small.fn(small.params, x, KEY).mean()) / 800 - 1) < 0.02


def test_groups_of_the_training_function_are_those_of_prediction():
    """Of the whole training step, when what it returns is smaller together with the params: a scalar, here."""
    _, variables, x, predict, learn = trained()

    def found(fn, *args):
        groups = structured.axis_groups(fn, variables, *args)
        return {(g.size, frozenset(m[:2] for m in g.members)) for g in groups if not g.frozen}

    assert found(predict, x) == found(lambda *args: learn(*args)[0], x, KEY)


def test_training_goes_on_with_the_same_optimizer_state():
    _, variables, x, predict, learn = trained()
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    def loss_fn(params, rest, fn):
        logits, changed = fn({"params": params, **rest}, x, KEY)
        return jnp.mean(logits**2), changed

    def step(params, rest, opt_state, fn):
        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, fn)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, loss

    dense = jax.jit(lambda *args: step(*args, learn))
    params, rest, opt_state, _ = dense(params, rest, opt_state)
    small = structured.prune_channels(predict, {"params": params, **rest}, x, sparsity=0.5)
    opt_state = structured.shrink(opt_state, small.keep)
    params, rest = small.params["params"], {"batch_stats": small.params["batch_stats"]}
    learn_small = structured.shrink_function(learn, small.keep)
    after = jax.jit(lambda *args: step(*args, learn_small))
    losses = []
    for _ in range(5):
        params, rest, opt_state, loss = after(params, rest, opt_state)
        losses.append(float(loss))
    assert int(opt_state[0].count) == 6
    assert losses[-1] < losses[0]


# Sharded, and exported.


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_sharded_params(kind):
    params = {"up": zoo.normal(0, 8, 32), "down": zoo.normal(1, 32, 4)}
    x = zoo.normal(2, 2, 8)

    def fn(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"]

    expected = structured.prune_channels(fn, params, x, sparsity=0.5)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"up": PartitionSpec(None, "x"), "down": PartitionSpec("x", None)}
    sharded = jax.tree.map(
        lambda p, spec: jax.device_put(p, NamedSharding(mesh, spec)), params, specs
    )
    with jax.set_mesh(mesh):
        groups = structured.axis_groups(fn, sharded, x)
        assert {anatomy(g)[0] for g in groups if not g.frozen} == {32}
        small = structured.prune_channels(fn, sharded, x, sparsity=0.5)
        for name, leaf in small.params.items():
            np.testing.assert_array_equal(leaf, expected.params[name])
            assert leaf.sharding.is_equivalent_to(sharded[name].sharding, 2), name
        if kind == AxisType.Auto:
            # On explicit axes the product over a sharded axis needs an out_sharding of the function's own.
            np.testing.assert_allclose(
                small.fn(small.params, x), expected.fn(expected.params, x), rtol=1e-5, atol=1e-5
            )
        masks = prunax.compute_masks(sharded, 0.5)
        assert structured.shrink(masks, small.keep)["up"].shape == (8, 16)
    # Seven of 32 units fill no four devices.
    (group,) = expected.keep
    with jax.set_mesh(mesh):
        odd = structured.shrink(sharded, {group: np.arange(7)})
    np.testing.assert_array_equal(odd["up"], params["up"][:, :7])
    np.testing.assert_array_equal(odd["down"], params["down"][:7])


def test_small_network_is_exported_for_other_platforms():
    _, variables, x, predict, _ = trained()
    small = structured.prune_channels(predict, variables, x, sparsity=0.5)
    exported = export.export(jax.jit(small.fn), platforms=["cpu", "cuda", "tpu"])(small.params, x)
    np.testing.assert_allclose(
        exported.call(small.params, x), small.fn(small.params, x), rtol=1e-5, atol=1e-6
    )
    assert "3x3x2x8xf32" not in exported.mlir_module()
    assert "3x3x2x4xf32" in exported.mlir_module()
