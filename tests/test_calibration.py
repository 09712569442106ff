"""Statistics equal those of captured inputs, in every framework; pruning does to whole models what it says."""

import warnings

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import prunax
from prunax import allocation, calibration, patterns
from prunax.calibration import _running
from tests.test_calibration_solver import sparsegpt_by_column, unstructured

KEY = jax.random.key(0)


def alps(fn, params, batches, sparsity=None, *, correction=0.0, **options):
    method = calibration.Alps(correction=correction)
    return calibration.prune_layers(fn, params, batches, method, sparsity, **options)


def refit(fn, params, masks, batches, *, damping=0.01, correction=0.0, iterations=32, **options):
    method = calibration.Refit(masks, iterations, damping, correction)
    return calibration.prune_layers(fn, params, batches, method, **options).params


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def gram_of(*inputs):
    """Gram matrix of the rows of all inputs, in float64."""
    rows = np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in inputs])
    return rows.T @ rows


def check(found, expected):
    scale = np.abs(expected).max()
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=2e-5)


def captured(module, variables, batches):
    """What each layer of a Flax model was called with: path -> inputs, one for each batch."""
    seen = {}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__":
            seen.setdefault("/".join(context.module.path), []).append(args)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        for batch in batches:
            module.apply(variables, batch)
    return seen


def statistics(fn, params, batches, **options):
    return tuple(
        calibration.input_statistics(fn, params, batches, kind=kind, **options)
        for kind in ("norm", "gram")
    )


class Network(nn.Module):
    """Dense, DenseGeneral over two axes, attention, Dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="dense")(x))
        split = nn.DenseGeneral((2, 3), name="heads")(x)
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="merge")(jnp.tanh(split))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(x)
        return nn.Dense(3, name="head")(x)


def test_dense_dense_general_and_attention():
    model, batches = Network(), [normal(i, 4, 5, 6) for i in range(3)]
    variables = model.init(KEY, batches[0])
    params = variables["params"]
    norms, grams = statistics(lambda p, x: model.apply({"params": p}, x), params, batches)
    seen = captured(model, variables, batches)
    inputs = {path: [call[0] for call in calls] for path, calls in seen.items()}
    inputs["merge"] = [x.reshape(4, 5, 6) for x in inputs["merge"]]
    out = [x.reshape(4, 5, 8) for x in inputs.pop("attention/out")]
    for path in ("dense", "heads", "merge", "head"):
        check(grams[path]["kernel"], gram_of(*inputs[path]))
        expected = np.sqrt(np.diag(gram_of(*inputs[path])))
        check(norms[path]["kernel"].reshape(-1), expected)
    for path in ("query", "key", "value"):
        check(grams["attention"][path]["kernel"], gram_of(*inputs[f"attention/{path}"]))
    check(grams["attention"]["out"]["kernel"], gram_of(*out))
    assert norms["heads"]["kernel"].shape == (8, 1, 1)
    assert norms["merge"]["kernel"].shape == (2, 3, 1)
    assert norms["attention"]["query"]["kernel"].shape == (8, 1, 1)
    assert norms["dense"]["bias"].shape == grams["dense"]["bias"].shape == ()


CONVOLUTIONS = {
    "plain": {"features": 6, "kernel_size": (3, 3)},
    "valid": {"features": 6, "kernel_size": (3, 2), "padding": "VALID"},
    "strided": {
        "features": 6,
        "kernel_size": (3, 3),
        "strides": (2, 1),
        "padding": ((1, 0), (2, 1)),
    },
    "dilated": {"features": 6, "kernel_size": (2, 3), "kernel_dilation": (2, 1)},
    "input dilated": {
        "features": 6,
        "kernel_size": (2, 3),
        "input_dilation": (2, 2),
        "padding": ((1, 0), (1, 2)),
    },
    "grouped": {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2},
    "depthwise": {"features": 8, "kernel_size": (3, 3), "feature_group_count": 4},
    "one axis": {"features": 6, "kernel_size": (3,)},
    "pointwise": {"features": 6, "kernel_size": (1, 1)},
}


def windows_by_hand(layer, params, image, features):
    """Every window that a convolution meets, found with kernels of a single one. (rows, window..., channels)"""
    shape = params["kernel"].shape
    found = []
    for place in np.ndindex(*shape[:-2]):
        for channel in range(features):
            # The layer itself moves a single pixel of a single channel: no code of ours is asked.
            one = jnp.zeros((*shape[:-2], 1, 1)).at[(*place, 0, 0)].set(1.0)
            moved = layer.apply({"params": {"kernel": one}}, image[..., channel : channel + 1])
            found.append(np.asarray(moved).reshape(-1))
    return np.stack(found, -1).reshape(-1, *shape[:-2], features)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    options = CONVOLUTIONS[name]
    axes = len(options["kernel_size"])
    batches = [normal(i, 2, *(7, 6)[:axes], 4) for i in range(2)]
    layer = nn.Conv(**options, use_bias=False)
    params = layer.init(KEY, batches[0])["params"]
    norms, grams = statistics(lambda p, x: layer.apply({"params": p}, x), params, batches)
    single = nn.Conv(**(options | {"features": 1, "feature_group_count": 1}), use_bias=False)
    rows = np.concatenate([windows_by_hand(single, params, x, 4) for x in batches])
    groups = options.get("feature_group_count", 1)
    expected = [gram_of(part.reshape(len(rows), -1)) for part in np.split(rows, groups, axis=-1)]
    check(grams["kernel"], np.stack(expected) if groups > 1 else expected[0])
    kernel = params["kernel"]
    full = np.broadcast_to(norms["kernel"], kernel.shape)
    for out in range(kernel.shape[-1]):
        group = out // (kernel.shape[-1] // groups)
        check(full[..., out].reshape(-1), np.sqrt(np.diag(expected[group])))
    assert norms["kernel"].shape[-1] == (1 if groups == 1 else kernel.shape[-1])


def test_a_batched_layer_of_experts():
    params = {"experts": {"kernel": normal(0, 3, 6, 5)}, "router": {"kernel": normal(1, 6, 3)}}
    batches = [normal(i, 7, 6) for i in range(2, 4)]

    def dispatched(p, x):
        gate = jax.nn.one_hot(jnp.argmax(x @ p["router"]["kernel"], axis=-1), 3)
        return gate[:, :, None] * x[:, None, :]

    def fn(p, x):
        return jnp.einsum("bei,eio->beo", dispatched(p, x), p["experts"]["kernel"]).sum(1)

    norms, grams = statistics(fn, params, batches)
    for e in range(3):
        rows = [dispatched(params, x)[:, e] for x in batches]
        check(grams["experts"]["kernel"][e], gram_of(*rows))
        check(norms["experts"]["kernel"][e, :, 0], np.sqrt(np.diag(gram_of(*rows))))
    check(grams["router"]["kernel"], gram_of(*batches))
    assert norms["experts"]["kernel"].shape == (3, 6, 1)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.relu(nn.Dense(12, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
        )
        return scan(name="layers")(x, None)[0]


def test_a_scanned_stack():
    model, batches = Stack(), [normal(i, 5, 6) for i in range(2)]
    params = model.init(KEY, batches[0])["params"]
    norms, grams = statistics(lambda p, x: model.apply({"params": p}, x), params, batches)
    layers = params["layers"]
    xs = batches
    for i in range(4):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        hidden = [nn.relu(x @ own["up"]["kernel"] + own["up"]["bias"][None]) for x in xs]
        check(grams["layers"]["up"]["kernel"][i], gram_of(*xs))
        check(grams["layers"]["down"]["kernel"][i], gram_of(*hidden))
        check(norms["layers"]["down"]["kernel"][i, :, 0], np.sqrt(np.diag(gram_of(*hidden))))
        xs = [Layer().apply({"params": own}, x, None)[0] for x in xs]
    assert grams["layers"]["up"]["kernel"].shape == (4, 6, 6)
    assert norms["layers"]["up"]["kernel"].shape == (4, 6, 1)


def test_layers_of_equal_structure_are_compiled_once():
    """Of a stack of 12 layers, the 11 after the first run the code of the second."""
    params = {
        "up": {"kernel": normal(0, 12, 6, 9)},
        "down": {"kernel": normal(1, 12, 9, 6)},
        "scale": jnp.ones((12, 6)),
    }

    def fn(p, x):
        def layer(x, own):
            hidden = jax.nn.silu(x @ own["up"]["kernel"])
            return x + own["scale"][None] * jnp.sin(hidden @ own["down"]["kernel"]), None

        return jax.lax.scan(layer, x, p)[0]

    before = _running._advance._cache_size()
    calibration.wanda(fn, params, [normal(2, 5, 6)], 0.5)
    assert _running._advance._cache_size() - before <= 4


@pytest.mark.relaxed_promotion
def test_equinox():
    model = eqx.nn.MLP(6, 3, 8, 1, activation=jax.nn.tanh, key=KEY)
    batches = [normal(i, 5, 6) for i in range(2)]
    norms, grams = statistics(lambda m, x: jax.vmap(m)(x), model, batches)
    xs = batches
    for n, layer in enumerate(model.layers):
        check(grams.layers[n].weight, gram_of(*xs))
        check(norms.layers[n].weight, np.sqrt(np.diag(gram_of(*xs)))[None])
        xs = [jax.nn.tanh(jax.vmap(layer)(x)) for x in xs]
    pruned = calibration.wanda(lambda m, x: jax.vmap(m)(x), model, batches, 0.5)
    assert isinstance(pruned.params, eqx.nn.MLP)
    assert pruned.masks.layers[0].weight.sum() == model.layers[0].weight.size // 2
    assert jax.vmap(pruned.params)(batches[0]).shape == (5, 3)


@pytest.mark.relaxed_promotion
def test_haiku():
    def forward(x):
        x = hk.Linear(8)(x)
        x = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(x, x, x)
        return hk.Linear(3)(jax.nn.relu(x))

    model = hk.without_apply_rng(hk.transform(forward))
    batches = [normal(i, 5, 6) for i in range(2)]
    params = model.init(KEY, batches[0])
    norms, grams = statistics(model.apply, params, batches)
    seen = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, hk.Linear) and context.method_name == "__call__":
            seen.setdefault(context.module.module_name, []).append(np.asarray(args[0]))
        return call(*args, **kwargs)

    def intercepted(x):
        with hk.intercept_methods(note):
            return forward(x)

    for batch in batches:
        hk.without_apply_rng(hk.transform(intercepted)).apply(params, batch)
    assert len(seen) == len(grams) == 6
    for name, inputs in seen.items():
        check(grams[name]["w"], gram_of(*inputs))
        check(norms[name]["w"][:, 0], np.sqrt(np.diag(gram_of(*inputs))))


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 8, rngs=rngs)
            self.second = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    batches = [normal(i, 5, 6) for i in range(2)]
    pruned = calibration.wanda(lambda s, x: nnx.merge(graph, s)(x), state, batches, 0.5)
    model = nnx.merge(graph, pruned.params)
    hidden = [nnx.relu(model.first(x)) for x in batches]
    kernel = state["second"]["kernel"]
    kernel = np.asarray(kernel[...] if hasattr(kernel, "get_value") else kernel)
    scores = np.abs(kernel) * np.sqrt(np.diag(gram_of(*hidden)))[:, None]
    expected = np.argsort(np.argsort(scores, axis=0), axis=0) >= 4
    np.testing.assert_array_equal(np.asarray(model.second.kernel[...]) != 0, expected)


def mlp(p, x):
    return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"]["kernel"]


def mlp_params(seed=0, sizes=(16, 24, 8)):
    return {
        "a": {"kernel": normal(seed, *sizes[:2]), "bias": normal(seed + 1, sizes[1])},
        "b": {"kernel": normal(seed + 2, *sizes[1:])},
    }


BATCHES = [normal(10 + i, 64, 16) for i in range(3)]


def test_sparsegpt_is_the_algorithm_on_each_layer_in_turn():
    params = mlp_params()
    pruned = calibration.sparsegpt(mlp, params, BATCHES, 0.5, block_size=8)
    xs = np.concatenate(BATCHES).astype(np.float64)
    for name, width in (("a", 24), ("b", 8)):
        kernel = np.asarray(params[name]["kernel"], np.float64)
        expected, mask = sparsegpt_by_column(
            kernel, xs.T @ xs, unstructured(8, [4 * width] * (len(kernel) // 8))
        )
        np.testing.assert_array_equal(pruned.masks[name]["kernel"], mask)
        np.testing.assert_allclose(pruned.params[name]["kernel"], expected, rtol=1e-2, atol=2e-3)
        xs = np.tanh(xs @ expected + np.asarray(params["a"]["bias"])[None]) if name == "a" else xs
    assert pruned.masks["a"]["bias"].shape == ()
    np.testing.assert_array_equal(pruned.params["a"]["bias"], params["a"]["bias"])


def test_parallel_scores_see_dense_layers():
    params = mlp_params()
    xs = np.concatenate(BATCHES)
    hidden = np.tanh(xs @ params["a"]["kernel"] + np.asarray(params["a"]["bias"])[None])
    scores = np.abs(params["b"]["kernel"]) * np.linalg.norm(hidden, axis=0)[:, None]
    expected = np.argsort(np.argsort(scores, axis=0), axis=0) >= 18
    pruned = calibration.wanda(mlp, params, BATCHES, 0.75, sequential=False)
    np.testing.assert_array_equal(pruned.masks["b"]["kernel"], expected)
    sequential = calibration.wanda(mlp, params, BATCHES, 0.75)
    assert not np.array_equal(sequential.masks["b"]["kernel"], expected)
    np.testing.assert_array_equal(sequential.masks["a"]["kernel"], pruned.masks["a"]["kernel"])


def test_scores_of_statistics_choose_the_weights_that_wanda_keeps():
    params = mlp_params()
    norms = calibration.input_statistics(mlp, params, BATCHES)
    scores = calibration.wanda_scores(params, norms)
    xs = np.linalg.norm(np.concatenate(BATCHES), axis=0)
    expected = np.abs(params["a"]["kernel"]) * xs[:, None]
    np.testing.assert_allclose(scores["a"]["kernel"], expected, rtol=1e-5)
    assert scores["a"]["bias"].shape == ()
    pattern = patterns.ConstantFanIn()
    masks = prunax.compute_masks(params, 0.5, scores=scores, pattern=pattern)
    parallel = calibration.wanda(mlp, params, BATCHES, 0.5, sequential=False)
    chex.assert_trees_all_equal(masks, parallel.masks)
    grams = calibration.input_statistics(mlp, params, BATCHES, kind="gram")
    with pytest.raises(ValueError, match=r"'a/kernel' have shape \(16, 16\).*kind=\"norm\""):
        calibration.wanda_scores(params, grams)


def refitted(fn, params, batches, sparsity, **options):
    masks = prunax.compute_masks(params, sparsity)
    return refit(fn, params, masks, batches, **options)


@pytest.mark.parametrize("method", [calibration.wanda, calibration.sparsegpt, alps, refitted])
def test_donated_params_are_pruned_in_their_own_memory(method):
    given, kept = mlp_params(), mlp_params()
    place = given["b"]["kernel"].unsafe_buffer_pointer()
    pruned = method(mlp, given, BATCHES, 0.5, donate=True)
    expected = method(mlp, kept, BATCHES, 0.5)
    chex.assert_trees_all_equal(pruned, expected)
    params = pruned if method is refitted else pruned.params
    assert params["b"]["kernel"].unsafe_buffer_pointer() == place
    assert given["a"]["kernel"].is_deleted() and given["b"]["kernel"].is_deleted()
    # What is not pruned stays the caller's, and so does a model that is not given away.
    assert params["a"]["bias"] is given["a"]["bias"]
    chex.assert_trees_all_equal(kept, mlp_params())


def test_what_cannot_be_given_away_is_copied():
    square = normal(0, 16, 16)
    params = {"a": {"kernel": square}, "b": {"kernel": square}}  # one array, two leaves

    def fn(p, x):
        return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]

    expected = calibration.wanda(fn, params, BATCHES, 0.5)
    host = jax.tree.map(np.array, params)
    pruned = calibration.wanda(fn, host, BATCHES, 0.5, donate=True)
    chex.assert_trees_all_equal(pruned, expected)
    np.testing.assert_array_equal(host["a"]["kernel"], square)
    pruned = calibration.wanda(fn, params, BATCHES, 0.5, donate=True)
    chex.assert_trees_all_equal(pruned, expected)


def test_dense_weights_that_are_needed_to_the_end_are_not_given_away():
    params = mlp_params()
    with pytest.raises(ValueError, match=r"wanda: donate=True .* sequential=False needs them"):
        calibration.wanda(mlp, params, BATCHES, 0.5, sequential=False, donate=True)
    with pytest.raises(ValueError, match=r"sparsegpt: donate=True .* a correction needs them"):
        calibration.sparsegpt(mlp, params, BATCHES, 0.5, correction=0.5, donate=True)
    assert not params["a"]["kernel"].is_deleted()


METHODS = {
    "wanda": calibration.wanda,
    "sparsegpt": calibration.sparsegpt,
    "alps": alps,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        (patterns.Unstructured(), 0.37),
        (patterns.ConstantFanIn(), 0.37),
        (patterns.NM(1, 4), None),
        (patterns.NM(2, 4), 0.25),
    ],
)
def test_contract(method, pattern, sparsity):
    """Exact counts, zeros where the mask says so, the caller's arrays untouched, the same again."""
    params = mlp_params()
    copy = jax.tree.map(np.array, params)
    options = {"pattern": pattern}
    first = METHODS[method](mlp, params, BATCHES, sparsity, **options)
    again = METHODS[method](mlp, params, iter(BATCHES), sparsity, **options)
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal(params, copy)
    for name in ("a", "b"):
        mask = np.asarray(first.masks[name]["kernel"])
        kernel = np.asarray(first.params[name]["kernel"])
        assert np.all(kernel[~mask] == 0) and np.all(np.isfinite(kernel))
        if isinstance(pattern, patterns.NM):
            kept = pattern.n if sparsity is None else 3
            assert np.all(mask.reshape(-1, 4, mask.shape[1]).sum(1) == kept)
        elif isinstance(pattern, patterns.ConstantFanIn):
            assert np.all((~mask).sum(0) == round(0.37 * len(mask)))
        else:
            assert (~mask).sum() == round(0.37 * mask.size)
    if method == "wanda":
        jax.tree.map(
            lambda p, m, q: np.testing.assert_array_equal(np.where(m, p, 0), q),
            params,
            first.masks,
            first.params,
        )


def test_extremes():
    params = mlp_params()
    for method in METHODS.values():
        dense = method(mlp, params, BATCHES, 0.0)
        np.testing.assert_allclose(dense.params["a"]["kernel"], params["a"]["kernel"], rtol=1e-4)
        assert all(m.all() for m in jax.tree.leaves(dense.masks))
        empty = method(mlp, params, BATCHES, 1.0)
        assert not empty.params["b"]["kernel"].any()


@pytest.mark.parametrize("pattern", [patterns.Unstructured(), patterns.NM(2, 4)])
def test_stacks_lose_exactly_their_share(pattern):
    params = {"kernel": normal(0, 3, 4, 8, 8)[:, 0]}
    params["kernel"] = params["kernel"].at[1].multiply(5.0)

    def fn(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["kernel"])[0]

    sparsity = 0.51 if isinstance(pattern, patterns.Unstructured) else None
    pruned = calibration.sparsegpt(fn, params, [normal(1, 32, 8)], sparsity, pattern=pattern)
    lost = (~pruned.masks["kernel"]).sum(axis=(1, 2))
    assert lost.sum() == (round(0.51 * 192) if sparsity else 96)
    assert lost.max() - lost.min() <= 1


def test_shared_weights_pool_their_inputs():
    params = {"kernel": normal(0, 6, 6), "last": {"kernel": normal(1, 6, 4)}}

    def fn(p, x):
        for _ in range(3):
            x = jnp.tanh(x @ p["kernel"])
        return x @ p["last"]["kernel"]

    batches = [normal(2, 20, 6)]
    _, grams = statistics(fn, params, batches)
    xs = [batches[0]]
    for _ in range(2):
        xs.append(np.tanh(xs[-1] @ params["kernel"]))
    check(grams["kernel"], gram_of(*xs))
    pruned = calibration.sparsegpt(fn, params, batches, 0.5)
    mask = sparsegpt_by_column(
        np.asarray(params["kernel"], np.float64), gram_of(*xs), unstructured(128, [18])
    )[1]
    np.testing.assert_array_equal(pruned.masks["kernel"], mask)


def test_tied_with_an_embedding():
    params = {"table": normal(0, 10, 6), "kernel": normal(1, 6, 6)}

    def fn(p, tokens):
        return jnp.tanh(p["table"][tokens] @ p["kernel"]) @ p["table"].T

    tokens = jnp.array([[0, 3, 5, 9]])
    norms, grams = statistics(fn, params, [tokens], where=lambda path, leaf: True)
    check(grams["table"], gram_of(jnp.tanh(params["table"][tokens] @ params["kernel"])))
    assert norms["table"].shape == (1, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether its name is a table's is no matter here
        assert statistics(fn, params, [tokens])[0]["table"].shape == ()
    with pytest.warns(UserWarning, match=r"looked up in .*: table"):
        looked_up = calibration.wanda(
            lambda p, t: p["table"][t] @ p["kernel"],
            params,
            [tokens],
            0.5,
            where=lambda path, leaf: True,
        )
    assert looked_up.masks["table"].shape == ()


def test_outlier_allocation():
    params = mlp_params()
    params["b"]["kernel"] = params["b"]["kernel"].at[::3, ::3].multiply(30.0)
    norms = calibration.input_statistics(mlp, params, BATCHES)
    scores = np.abs(params["b"]["kernel"]) * norms["b"]["kernel"]
    share = float((scores > 5 * scores.mean()).mean())
    shares = calibration.outlier_allocation(params, norms, spread=0.1)
    assert dict(shares.shares)["b/kernel"] == pytest.approx(share, rel=1e-5)
    for method in METHODS.values():
        masks = method(
            mlp, params, BATCHES, 0.5, allocation=shares, pattern=patterns.Unstructured()
        ).masks
        density = {name: float(masks[name]["kernel"].mean()) for name in ("a", "b")}
        assert density["b"] - density["a"] == pytest.approx(0.2, abs=0.01)
        kept = sum(int(masks[name]["kernel"].sum()) for name in ("a", "b"))
        assert kept == pytest.approx((16 * 24 + 24 * 8) / 2, abs=2)
    one = calibration.outlier_allocation(params, norms, group=lambda path: "all")
    masks = calibration.wanda(mlp, params, BATCHES, 0.5, allocation=one).masks
    assert masks["a"]["kernel"].mean() == masks["b"]["kernel"].mean() == 0.5
    with pytest.raises(ValueError, match=r"'a/kernel' have shape .*kind=\"norm\""):
        calibration.outlier_allocation(params, jax.tree.map(lambda p: p.sum(-1), params))


def test_fused_projections_are_problems_of_their_own():
    params = {"kernel": normal(0, 8, 24), "out": {"kernel": normal(1, 8, 4)}}

    def fn(p, x):
        q, k, v = jnp.split(p["kernel"], 3, axis=1)
        return (jnp.tanh(x @ q) * (x @ k) + x @ v) @ p["out"]["kernel"]

    x = normal(2, 30, 8)
    norms, grams = statistics(fn, params, [x])
    check(grams["kernel"], np.stack([gram_of(x)] * 3))
    assert norms["kernel"].shape == (8, 1)
    pruned = calibration.wanda(fn, params, [x], 0.5)
    assert (~pruned.masks["kernel"]).sum() == 96


REFUSED = {
    "two orientations": (lambda p, x: (x @ p["kernel"]) @ p["kernel"].T, "different axes"),
    "overlapping slices": (
        lambda p, x: x @ p["kernel"][:, :4] + x @ p["kernel"][:, 2:],
        "different slices",
    ),
    "a part": (lambda p, x: x @ p["kernel"][:, :4], "only a part"),
    "an outer product": (
        lambda p, x: jax.lax.dot_general(x, p["kernel"], (((), ()), ((), ()))),
        "no axis of it is contracted",
    ),
    "elementwise": (lambda p, x: x @ jnp.abs(p["kernel"]), "used by `abs`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_path(name):
    fn, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"'layer/kernel'.*{reason}|{reason}.*'layer/kernel'"):
        calibration.wanda(
            lambda p, x: fn(p["layer"], x),
            {"layer": {"kernel": normal(0, 6, 6)}},
            [normal(1, 3, 6)],
            0.5,
        )


def test_patterns_are_read_on_the_inputs_wherever_they_lie():
    kernel, x = normal(0, 8, 12), normal(1, 30, 8)
    flax = calibration.wanda(lambda p, x: x @ p, kernel, [x], pattern=patterns.NM(2, 4))
    for axis in (-2, -1, 1):
        torch = calibration.wanda(
            lambda p, x: x @ p.T, kernel.T, [x], pattern=patterns.NM(2, 4, axis=axis)
        )
        np.testing.assert_array_equal(torch.masks.T, flax.masks)
    with pytest.raises(
        ValueError, match=r"axis 0 is not the input axis of '' of shape \(12, 8\), which is 1"
    ):
        calibration.wanda(lambda p, x: x @ p.T, kernel.T, [x], pattern=patterns.NM(2, 4, axis=0))
    conv = {"kernel": normal(2, 3, 3, 4, 5)}

    def convolve(p, x):
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    image = normal(3, 2, 6, 6, 4)
    pruned = calibration.wanda(convolve, conv, [image], pattern=patterns.NM(2, 4))
    assert np.all(pruned.masks["kernel"].sum(axis=-2) == 2)
    window = patterns.ConstantFanIn((-4, -3, -2))
    for pattern in (window, patterns.ConstantFanIn()):
        pruned = calibration.wanda(convolve, conv, [image], 0.5, pattern=pattern)
        assert np.all(pruned.masks["kernel"].sum(axis=(0, 1, 2)) == 18)
    with pytest.raises(
        ValueError, match=r"'kernel': its input axis has length 4, which 8 does not"
    ):
        calibration.wanda(convolve, conv, [image], pattern=patterns.NM(4, 8))


def test_leaves_can_have_sparsities_of_their_own():
    shares = allocation.by_path({"a/*": 0.25})
    for method in METHODS.values():
        pruned = method(mlp, mlp_params(), BATCHES, 0.75, allocation=shares)
        lost = {name: 1 - float(pruned.masks[name]["kernel"].mean()) for name in ("a", "b")}
        assert lost == {"a": 0.25, "b": 0.75}
        only = method(mlp, mlp_params(), BATCHES, allocation=shares)
        assert only.masks["b"]["kernel"].all()
        np.testing.assert_array_equal(only.params["b"]["kernel"], mlp_params()["b"]["kernel"])
    with pytest.raises(ValueError, match="nothing to rank across"):
        calibration.wanda(mlp, mlp_params(), BATCHES, 0.5, allocation=allocation.global_ranking)


def test_inputs_that_are_not_finite_are_reported_by_layer():
    bad = [BATCHES[0], BATCHES[1].at[3, 4].set(jnp.nan)]
    for method in METHODS.values():
        with pytest.raises(ValueError, match=r"inputs of 'a/kernel' are not finite"):
            method(mlp, mlp_params(), bad, 0.5)

    def overflowing(p, x):
        return jnp.exp(200 + x @ p["a"]["kernel"] * 0) @ p["b"]["kernel"]

    with pytest.raises(ValueError, match=r"inputs of 'b/kernel' are not finite"):
        calibration.input_statistics(overflowing, mlp_params(), BATCHES)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_zero_are_reported_by_layer(method):
    params = mlp_params()
    params["a"] = {"kernel": params["a"]["kernel"], "bias": jnp.full(24, -1e3)}

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"]["kernel"]

    with pytest.warns(UserWarning, match=r"inputs of 'b/kernel' are zero"):
        pruned = METHODS[method](fn, params, BATCHES, 0.5, pattern=patterns.ConstantFanIn())
    kernel, mask = params["b"]["kernel"], pruned.masks["b"]["kernel"]
    np.testing.assert_allclose(pruned.params["b"]["kernel"], np.where(mask, kernel, 0), rtol=1e-5)
    if method != "sparsegpt":  # which has one contest for each block
        best = np.argsort(np.argsort(np.abs(kernel), axis=0), axis=0) >= 12
        np.testing.assert_array_equal(mask, best)


def test_experts_without_inputs_are_counted():
    params = {"kernel": normal(0, 3, 6, 5)}

    def fn(p, x):
        return jnp.einsum("ebi,eio->ebo", x, p["kernel"])

    x = normal(1, 3, 10, 6).at[1].set(0.0)
    with pytest.warns(UserWarning, match=r"inputs of 1 of its 3 matrices of 'kernel' are zero"):
        pruned = calibration.sparsegpt(fn, params, [x], 0.5)
    assert np.all(np.isfinite(pruned.params["kernel"]))


def test_refit_refits_the_kept_weights():
    params = mlp_params()
    masks = prunax.compute_masks(params, 0.5)
    refitted = refit(mlp, params, masks, BATCHES, damping=0.0, iterations=200)
    x, kernel, mask = np.concatenate(BATCHES), *(t["a"]["kernel"] for t in (params, masks))
    for j in range(24):
        kept = np.asarray(mask[:, j])
        expected = np.linalg.lstsq(x[:, kept], x @ kernel[:, j], rcond=None)[0]
        np.testing.assert_allclose(refitted["a"]["kernel"][kept, j], expected, rtol=1e-2, atol=1e-3)
    outputs = [
        np.concatenate([mlp(p, x) for x in BATCHES])
        for p in (params, refitted, prunax.apply_masks(params, masks))
    ]
    error = [np.square(out - outputs[0]).sum() for out in outputs[1:]]
    assert error[0] < 0.9 * error[1]
    only = masks | {"a": {"kernel": jnp.ones((), bool), "bias": jnp.ones((), bool)}}
    refitted = refit(mlp, params, only, BATCHES)
    np.testing.assert_array_equal(refitted["a"]["kernel"], params["a"]["kernel"])


def test_a_correction_of_one_fits_the_outputs_of_the_dense_model():
    params = mlp_params()
    masks = prunax.compute_masks(params, 0.5)
    fitted = refit(mlp, params, masks, BATCHES, damping=0.0, correction=1.0, iterations=200)
    plain = refit(mlp, params, masks, BATCHES, damping=0.0, iterations=200)
    np.testing.assert_allclose(fitted["a"]["kernel"], plain["a"]["kernel"], rtol=1e-3, atol=1e-4)
    x = np.concatenate(BATCHES)
    dense, hidden = (
        np.tanh(x @ np.asarray(p["a"]["kernel"]) + np.asarray(p["a"]["bias"])[None])
        for p in (params, fitted)
    )
    kernel, mask = (np.asarray(t["b"]["kernel"]) for t in (params, masks))
    for j in range(8):
        expected = np.linalg.lstsq(hidden[:, mask[:, j]], dense @ kernel[:, j], rcond=None)[0]
        found = fitted["b"]["kernel"][mask[:, j], j]
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)

    def error(pruned):
        outs = [np.concatenate([mlp(p, x) for x in BATCHES]) for p in (params, pruned)]
        return np.square(outs[0] - outs[1]).sum()

    assert error(fitted) < 0.9 * error(plain)
    for method in (calibration.sparsegpt, alps):
        pruned = [method(mlp, params, BATCHES, 0.5, correction=c).params for c in (0.0, 0.5)]
        assert error(pruned[1]) < error(pruned[0])
    # There is nothing to make good where every layer sees the dense inputs.
    pruned = [
        calibration.sparsegpt(mlp, params, BATCHES, 0.5, sequential=False, correction=c)
        for c in (0.0, 1.0)
    ]
    chex.assert_trees_all_equal(*pruned)
    with pytest.raises(ValueError, match=r"correction must lie in \[0, 1\], got 2"):
        calibration.sparsegpt(mlp, params, BATCHES, 0.5, correction=2)


def test_batches_of_different_shapes():
    whole = calibration.sparsegpt(mlp, mlp_params(), [np.concatenate(BATCHES)], 0.5)
    parts = [*BATCHES[:2], BATCHES[2][:10], BATCHES[2][10:]]
    apart = calibration.sparsegpt(mlp, mlp_params(), parts, 0.5)
    chex.assert_trees_all_equal(whole.masks, apart.masks)
    np.testing.assert_allclose(
        whole.params["b"]["kernel"], apart.params["b"]["kernel"], rtol=1e-2, atol=1e-3
    )


def test_narrow_weights():
    kernel = normal(0, 16, 8).astype(jnp.bfloat16)
    batches = [x.astype(jnp.bfloat16) for x in BATCHES]

    def fn(p, x):
        return x @ p

    for method in METHODS.values():
        pruned = method(fn, kernel, batches, 0.5)
        assert pruned.params.dtype == jnp.bfloat16
        assert pruned.masks.mean() == 0.5
    assert calibration.input_statistics(fn, kernel, batches).dtype == jnp.float32


def test_progress_shows_layers(capsys):
    calibration.wanda(mlp, mlp_params(), BATCHES, 0.5, progress=True)
    assert "2/2" in capsys.readouterr().out


def test_arguments():
    params = mlp_params()
    with pytest.raises(ValueError, match=r"sparsegpt: sparsity must lie in \[0, 1\].*0\.5 for 50%"):
        calibration.sparsegpt(mlp, params, BATCHES, 50)
    with pytest.raises(ValueError, match="wanda: needs a sparsity"):
        calibration.wanda(mlp, params, BATCHES)
    with pytest.raises(ValueError, match="at least one batch"):
        calibration.wanda(mlp, params, [], 0.5)
    with pytest.raises(TypeError, match=r"Unstructured, ConstantFanIn or NM"):
        calibration.sparsegpt(mlp, params, BATCHES, 0.5, pattern=patterns.Block((2, 2)))
    with pytest.raises(ValueError, match="block_size"):
        calibration.sparsegpt(mlp, params, BATCHES, 0.5, block_size=0)
    with pytest.raises(ValueError, match='"norm" or "gram"'):
        calibration.input_statistics(mlp, params, BATCHES, kind="mean")
    with pytest.raises(ValueError, match="nothing to refit"):
        refit(mlp, params, jax.tree.map(lambda _: jnp.ones((), bool), params), BATCHES)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv0")(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv1")(x))
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def digits():
    """A CNN trained on digits, with training and test images."""
    import optax

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    labels = jnp.asarray(labels)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    model, tx = Convolutional(), optax.adam(3e-3)
    params = model.init(KEY, images[:1])["params"]

    def loss(params, x, y):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, opt, rows):
        grads = jax.grad(loss)(params, images[rows], labels[rows])
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    opt = tx.init(params)
    for epoch in range(8):
        for rows in np.random.default_rng(epoch).permutation(1280).reshape(-1, 64):
            params, opt = step(params, opt, rows)

    def accuracy(params):
        logits = model.apply({"params": params}, images[1280:])
        return float((logits.argmax(-1) == labels[1280:]).mean())

    return lambda p, x: model.apply({"params": p}, x), params, images[:1280], accuracy


def test_sparsegpt_beats_magnitude_on_a_cnn(digits):
    fn, params, images, accuracy = digits
    batches = [images[:256], images[256:512]]
    sparsity = 0.7
    magnitude = prunax.apply_masks(params, prunax.compute_masks(params, sparsity))
    obs = calibration.sparsegpt(fn, params, batches, sparsity)
    best = alps(fn, params, batches, sparsity)
    assert accuracy(params) > 0.95
    assert accuracy(obs.params) > accuracy(magnitude) + 0.005
    assert prunax.summarize(params, obs.masks).sparsity == pytest.approx(sparsity, abs=1e-3)

    def change(pruned):
        return float(jnp.square(fn(pruned, images[512:]) - fn(params, images[512:])).sum())

    assert change(best.params) < change(obs.params) < 0.5 * change(magnitude)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharded_batches_give_the_same(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    put = jax.sharding.NamedSharding
    spec = jax.sharding.PartitionSpec
    batches = [jax.device_put(x, put(mesh, spec("data"))) for x in BATCHES]
    params = jax.device_put(mlp_params(), put(mesh, spec()))
    with jax.set_mesh(mesh):
        pruned = calibration.sparsegpt(mlp, params, batches, 0.5)
    alone = calibration.sparsegpt(mlp, mlp_params(), BATCHES, 0.5)
    chex.assert_trees_all_equal(pruned.masks, alone.masks)
    np.testing.assert_allclose(
        pruned.params["b"]["kernel"], alone.params["b"]["kernel"], rtol=1e-3, atol=1e-4
    )
