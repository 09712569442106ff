"""Smaller networks as ordinary modules of NNX and Equinox: parameters and attributes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import linen as nn
from flax import nnx

import prunax
from prunax import structured

pytestmark = pytest.mark.relaxed_promotion
IMAGES = zoo.normal(0, 2, 6, 6, 3)


def pruned(module, x, **options):
    """An NNX module made smaller."""
    graph, state = nnx.split(module)

    def fn(state, x):
        module = nnx.merge(graph, state)
        module.eval()
        return module(x)

    small = structured.prune_channels(fn, state, x, **options)
    new = structured.rebuild(module, small)
    new.eval()
    ours = nnx.jit(lambda module, x: module(x))(new, x)
    np.testing.assert_allclose(ours, small.fn(small.params, x), rtol=1e-4, atol=1e-5)
    return new, small


class MLP(nnx.Module):
    def __init__(self, rngs, width=12):
        # The hidden width is that of the input as well: sizes alone tell nothing.
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 3, rngs=rngs)
        self.steps = 12 if width != 12 else 1

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def sizes(layer):
    return layer.in_features, layer.out_features


def test_nnx_mlp_of_equal_widths():
    module = MLP(nnx.Rngs(0))
    new, _ = pruned(module, zoo.normal(1, 2, 12), sparsity=0.5)
    assert [sizes(layer) for layer in (*new.layers, new.head)] == [(12, 6), (6, 6), (6, 3)]
    # The module that was passed stays as it is.
    assert sizes(module.layers[0]) == (12, 12)
    assert module.layers[0].kernel.shape == (12, 12)


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.depth = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.point = nnx.Conv(8, 6, (1, 1), rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(self.point(self.depth(x)))
        return self.head(x.mean((1, 2)))


def test_nnx_cnn_with_batch_norm_is_trained_on():
    new, _ = pruned(CNN(nnx.Rngs(0)), IMAGES, sparsity=0.5)
    assert sizes(new.stem) == (3, 4)
    assert new.stem.kernel_shape == new.stem.kernel.shape == (3, 3, 3, 4)
    # The window has as many rows as the image has channels.
    assert new.stem.kernel_size == (3, 3)
    assert (new.norm.num_features, new.norm.mean.shape, new.norm.scale.shape) == (4, (4,), (4,))
    assert (*sizes(new.depth), new.depth.feature_group_count) == (4, 4, 4)
    assert (*sizes(new.point), *sizes(new.head)) == (4, 3, 3, 4)

    optimizer = nnx.Optimizer(new, optax.adam(1e-2), wrt=nnx.Param)
    new.train()

    @nnx.jit
    def step(module, optimizer):
        def loss_fn(module):
            return jnp.mean(module(IMAGES) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(module)
        optimizer.update(module, grads)
        return loss

    mean = np.asarray(new.norm.mean[...])
    losses = [step(new, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    assert not np.allclose(mean, new.norm.mean[...])
    graph, state = nnx.split(new)
    merged = nnx.merge(graph, state)
    merged.eval()
    new.eval()
    np.testing.assert_array_equal(merged(IMAGES), new(IMAGES))


def test_nnx_convolution_in_groups():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 12, (1, 1), rngs=rngs)
            self.grouped = nnx.Conv(12, 6, (3, 3), feature_group_count=3, rngs=rngs)
            self.head = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.grouped(nnx.relu(self.first(x)))).mean((1, 2)))

    module = Net(nnx.Rngs(0))
    graph, state = nnx.split(module)
    fn = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    groups = structured.axis_groups(fn, state, IMAGES)
    keep = {g: np.arange(g.size - 1) for g in groups if not g.frozen}
    small = structured.Shrunk(
        structured.shrink_function(fn, keep), structured.shrink(state, keep), keep, groups
    )
    new = structured.rebuild(module, small)
    # Three groups of 4 inputs and 2 outputs: two of 3 and 1.
    assert (*sizes(new.grouped), new.grouped.feature_group_count) == (6, 2, 2)
    assert (*sizes(new.first), *sizes(new.head)) == (3, 6, 2, 4)
    np.testing.assert_allclose(new(IMAGES), small.fn(small.params, IMAGES), rtol=1e-4, atol=1e-5)


class Statistics(nnx.Module):
    """Two normalisations of equal width, the second without parameters."""

    def __init__(self, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)
        self.bare = nnx.BatchNorm(8, use_scale=False, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.first(x))))
        return self.head(nnx.relu(self.bare(self.second(x))))


@pytest.mark.parametrize("trained", [True, False])
def test_nnx_statistics_that_the_function_closes_over(trained):
    module, x = Statistics(nnx.Rngs(0)), zoo.normal(1, 6, 5)
    if trained:
        module(x)
    module.eval()
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    small = structured.prune_channels(
        lambda params, x: nnx.merge(graph, params, rest)(x), params, x, sparsity=0.5
    )
    if not trained:  # all means are alike, and nothing tells which were which
        module = Statistics(nnx.Rngs(1))
        module.eval()
    new = structured.rebuild(module, small)
    assert new.norm.mean.shape == new.bare.var.shape == (4,)
    np.testing.assert_allclose(new(x), small.fn(small.params, x), rtol=1e-4, atol=1e-5)
    new.train()
    assert new(x).shape == (6, 4)


def test_statistics_that_cannot_be_told_are_named():
    module, x = Statistics(nnx.Rngs(0)), zoo.normal(1, 6, 5)
    module.eval()
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    small = structured.prune_channels(
        lambda params, x: nnx.merge(graph, params, rest)(x),
        params,
        x,
        allocation=prunax.allocation.by_path({"first*": 0.5, "second*": 0.25}),
    )
    new = structured.rebuild(module, small)  # the very arrays
    assert (new.norm.mean.shape, new.bare.mean.shape) == ((4,), (6,))
    other = Statistics(nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"'bare/mean' is closed over.*nnx.split\(model\)"):
        structured.rebuild(other, small)


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, 6, 8, 6, rngs=rngs, decode=False, normalize_qk=True)

    def __call__(self, x):
        return self.attend(x)


def test_attention_that_normalises_what_it_divides_is_refused():
    module, x = Normalised(nnx.Rngs(0)), zoo.normal(1, 7, 6)
    graph, state = nnx.split(module)
    small = keep_first(
        lambda state, x: nnx.merge(graph, state)(x), state, x, {"attend/key/kernel[2]"}
    )
    given = {"attend/head_dim": 4, "attend/qkv_features": 8}
    with pytest.raises(ValueError, match=r"went from 4 to 3 units, and the module divides"):
        structured.rebuild(module, small, attributes=given)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(5, 12, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(3, 12, rngs=rngs, decode=False)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        return self.head(x + self.attend(x))


def keep_first(fn, params, x, chosen):
    """Keeps all but the last unit of the groups of chosen sizes, or names."""
    groups = structured.axis_groups(fn, params, x)
    keep = {g: np.arange(g.size - 1) for g in groups if not g.frozen and chosen & {g.size, g.name}}
    assert keep
    return structured.Shrunk(
        structured.shrink_function(fn, keep), structured.shrink(params, keep), keep, groups
    )


@pytest.mark.parametrize("chosen", [{3}, {12}, {3, 12}, {4}, {3, 4, 12}])
def test_nnx_attention(chosen):
    """Heads 3, their width 4, and the stream 12, which is their product."""
    module, x = Attention(nnx.Rngs(0)), zoo.normal(1, 2, 7, 5)
    graph, state = nnx.split(module)
    small = keep_first(lambda state, x: nnx.merge(graph, state)(x), state, x, chosen)
    new = structured.rebuild(module, small)
    heads, width, stream = (n - (n in chosen) for n in (3, 4, 12))
    a = new.attend
    assert (a.num_heads, a.head_dim, a.qkv_features) == (heads, width, heads * width)
    assert (a.in_features, a.out_features) == (stream, stream)
    assert a.query.in_features == (stream,)
    assert a.query.out_features == a.out.in_features == (heads, width)
    assert sizes(new.embed) == (5, stream)
    # With narrower heads NNX divides the logits by another root, which the query makes up for.
    np.testing.assert_allclose(new(x), small.fn(small.params, x), rtol=1e-4, atol=1e-5)


def test_attribute_that_cannot_be_told():
    module, x = Attention(nnx.Rngs(0)), zoo.normal(1, 2, 7, 5)
    graph, state = nnx.split(module)
    fn = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    # Queries and keys are narrower now than values: which of them is head_dim?
    small = keep_first(fn, state, x, {"attend/key/kernel[2]"})
    with pytest.raises(ValueError, match=r"'attend/(head_dim|qkv_features)' of MultiHeadAttention"):
        structured.rebuild(module, small)
    new = structured.rebuild(
        module, small, attributes={"attend/head_dim": 4, "attend/qkv_features": 12}
    )
    assert new.attend.head_dim == 4
    assert new.attend.query.out_features == (3, 3)
    assert new.attend.value.out_features == (3, 4)


def test_number_whose_name_says_nothing():
    module, x = MLP(nnx.Rngs(0), width=12), zoo.normal(1, 2, 12)
    module.steps = 12
    graph, state = nnx.split(module)
    small = structured.prune_channels(
        lambda state, x: nnx.merge(graph, state)(x), state, x, sparsity=0.5
    )
    with pytest.raises(ValueError, match=r"'steps' of MLP is 12.*attributes=\{'steps': 12\}"):
        structured.rebuild(module, small)
    assert structured.rebuild(module, small, attributes={"steps": 12}).steps == 12
    with pytest.raises(ValueError, match="attributes names 'stepz'"):
        structured.rebuild(module, small, attributes={"steps": 12, "stepz": 3})


def test_params_of_another_module_are_named():
    module, x = MLP(nnx.Rngs(0)), zoo.normal(1, 2, 12)
    graph, state = nnx.split(module)
    small = structured.prune_channels(
        lambda p, x: nnx.merge(graph, p["net"])(x), {"net": state}, x, sparsity=0.5
    )
    with pytest.raises(ValueError, match=r"'net/head/bias' of the smaller params is not in"):
        structured.rebuild(module, small)
    with pytest.raises(ValueError, match="is not in the module, whose leaves are"):
        structured.rebuild(nn.Dense(3), small)


# Equinox.


class EqxMLP(eqx.Module):
    layers: tuple[eqx.nn.Linear, ...]

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        sizes = ((8, 8), (8, 8), (8, 3))
        self.layers = tuple(
            eqx.nn.Linear(*size, key=k) for size, k in zip(sizes, keys, strict=True)
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def test_equinox_mlp_of_equal_widths():
    module, x = EqxMLP(jax.random.key(0)), zoo.normal(1, 5, 8)
    small = structured.prune_channels(lambda m, x: jax.vmap(m)(x), module, x, sparsity=0.5)
    new = structured.rebuild(module, small)
    assert [sizes(layer) for layer in new.layers] == [(8, 4), (4, 4), (4, 3)]
    assert [sizes(layer) for layer in module.layers] == [(8, 8), (8, 8), (8, 3)]
    np.testing.assert_allclose(jax.vmap(new)(x), small.fn(small.params, x), rtol=1e-5, atol=1e-6)
    # Pruned again, as any other module.
    again = structured.prune_channels(lambda m, x: jax.vmap(m)(x), new, x, sparsity=0.5)
    assert sizes(structured.rebuild(new, again).layers[1]) == (2, 2)


class EqxCNN(eqx.Module):
    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    depth: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.stem = eqx.nn.Conv2d(3, 8, 3, padding=1, use_bias=False, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.depth = eqx.nn.Conv2d(8, 8, 3, groups=8, key=keys[1])
        self.head = eqx.nn.Linear(8, 4, key=keys[2])

    def __call__(self, x, state):
        x, state = self.norm(self.stem(x), state)
        x = jax.nn.relu(self.depth(jax.nn.relu(x)))
        return self.head(x.mean((1, 2))), state


def test_equinox_cnn_with_batch_norm_is_trained_on():
    module, state = eqx.nn.make_with_state(EqxCNN)(jax.random.key(0))
    x = IMAGES.transpose(0, 3, 1, 2)

    def fn(whole, x):
        module, state = eqx.nn.inference_mode(whole)
        return jax.vmap(lambda x: module(x, state)[0])(x)

    small = structured.prune_channels(fn, (module, state), x, sparsity=0.5)
    module, state = structured.rebuild((module, state), small)
    assert (module.stem.in_channels, module.stem.out_channels) == (3, 4)
    assert module.stem.kernel_size == (3, 3)
    assert module.norm.input_size == 4
    assert (module.depth.in_channels, module.depth.out_channels, module.depth.groups) == (4, 4, 4)
    assert sizes(module.head) == (4, 4)
    np.testing.assert_allclose(
        fn((module, state), x), small.fn(small.params, x), rtol=1e-4, atol=1e-5
    )

    optimizer = optax.adam(1e-2)

    @eqx.filter_jit
    def step(module, state, opt_state):
        def loss_fn(module, state):
            out, state = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
                x, state
            )
            return jnp.mean(out**2), state

        (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(module, state)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(module, updates), state, opt_state, loss

    opt_state = optimizer.init(eqx.filter(module, eqx.is_inexact_array))
    losses = []
    for _ in range(3):
        module, state, opt_state, loss = step(module, state, opt_state)
        losses.append(float(loss))
    assert losses[2] < losses[0]


def test_equinox_attention_of_fewer_heads():
    class Net(eqx.Module):
        attend: eqx.nn.MultiheadAttention

        def __call__(self, x):
            return self.attend(x, x, x)

    module = Net(eqx.nn.MultiheadAttention(3, 12, key=jax.random.key(0)))
    x = zoo.normal(1, 7, 12)
    small = keep_first(lambda m, x: m(x), module, x, {3})
    new = structured.rebuild(module, small)
    assert (new.attend.num_heads, new.attend.qk_size, new.attend.query_size) == (2, 4, 12)
    assert sizes(new.attend.query_proj) == (12, 8)
    assert sizes(new.attend.output_proj) == (8, 12)
    np.testing.assert_allclose(new(x), small.fn(small.params, x), rtol=1e-4, atol=1e-5)


# Flax Linen: a clone whose variables have the smaller shapes.


class LinenNet(nn.Module):
    features: tuple[int, ...] = (16, 16)
    heads: int = 4
    layers: int = 4
    classes: int = 4

    @nn.compact
    def __call__(self, x):
        for n in self.features:
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(n)(x)))
        x = x + nn.MultiHeadDotProductAttention(self.heads, qkv_features=8)(x)
        for _ in range(self.layers // 2):
            x = nn.relu(x)
        return nn.Dense(self.classes)(x)


def test_linen_module_is_cloned_with_the_smaller_attributes():
    x = zoo.normal(1, 2, 5, 6)
    module = LinenNet()
    variables = module.init(jax.random.key(0), x)
    named = {"params/Dense_0/kernel[[]1]": 0.5, "params/Dense_1/kernel[[]1]": 0.25}
    small = structured.prune_channels(
        module.apply, variables, x, allocation=prunax.allocation.by_path(named)
    )
    new = structured.rebuild(module, small)
    # Numbers whose name says nothing of sizes, and the classes, stay.
    assert (new.features, new.heads, new.layers, new.classes) == ((8, 12), 4, 4, 4)
    np.testing.assert_allclose(
        new.apply(small.params, x), small.fn(small.params, x), rtol=1e-5, atol=1e-6
    )
    assert module.features == (16, 16)
    with pytest.raises(ValueError, match="attributes names 'width'"):
        structured.rebuild(module, small, attributes={"width": 3})


def test_linen_sizes_in_the_code_are_named():
    class Fixed(nn.Module):
        width: int = 12

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(16)(nn.relu(nn.Dense(self.width)(x)))))

    x = zoo.normal(1, 2, 6)
    variables = Fixed().init(jax.random.key(0), x)
    small = structured.prune_channels(Fixed().apply, variables, x, sparsity=0.5)
    with pytest.raises(ValueError, match=r"(?s)Dense_0.*shape.*Not settled: width \(now 12\)"):
        structured.rebuild(Fixed(), small)


def test_haiku_needs_none():
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    x = zoo.normal(1, 2, 6)
    params = net.init(jax.random.key(0), x)
    small = structured.prune_channels(net.apply, params, x, sparsity=0.5)
    with pytest.raises(TypeError, match=r"needs no rebuilding.*small\.fn is the function"):
        structured.rebuild(net, small)
