"""Every method over every layout and pattern; and what calibration prunes, leaves whole, and says of it."""

import warnings

import chex
import extensions
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from prunax import calibration, patterns


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


METHODS = {
    "Wanda": calibration.Wanda(),
    "SparseGPT": calibration.SparseGPT(block_size=8),
    "SparseGPT, corrected": calibration.SparseGPT(block_size=8, correction=0.5),
    "Alps": calibration.Alps(iterations=6),
    "of a user": extensions.MeanContribution(),
}
PATTERNS = [
    patterns.Unstructured(),
    patterns.ConstantFanIn(),
    patterns.NM(2, 4),
    patterns.Block((2, 2)),
    patterns.Channel(),
]


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def recurrent(p, x):
    step = lambda h, row: (jnp.tanh(row[None] + h @ p["w"]), None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros((1, 8)), x)[0]


def mixture(p, x):
    gates = jax.nn.softmax(x[:, :3])
    hidden = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"])) * gates[:, :, None]
    return jnp.einsum("tef,efd->td", hidden, p["w"])


def mean_over_time(p, x):
    return jnp.einsum("bsi,io->bo", x.reshape(4, 8, 8), p["w"])


# The function, and its params; "w" is the leaf to look at, whose matrices are given as (matrices, in, out).
LAYOUTS = {
    "dense": (lambda p, x: x @ p["w"], {"w": normal(0, 8, 12)}, lambda w: w[None]),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": normal(0, 12, 8)}, lambda w: w.T[None]),
    "two inputs": (
        lambda p, x: jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 4), p["w"]),
        {"w": normal(0, 2, 4, 6)},
        lambda w: w.reshape(1, 8, 6),
    ),
    "convolution": (
        lambda p, x: conv(x.reshape(2, 4, 4, 8), p["w"]),
        {"w": normal(0, 3, 3, 8, 4)},
        lambda w: w.reshape(1, 72, 4),
    ),
    "grouped": (
        lambda p, x: conv(x.reshape(2, 4, 4, 8), p["w"], 2),
        {"w": normal(0, 1, 2, 4, 8)},
        lambda w: w.reshape(8, 2, 4).swapaxes(0, 1),
    ),
    "batched": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", x.reshape(4, 8, 8), p["w"]),
        {"w": normal(0, 4, 8, 6)},
        lambda w: w,
    ),
    "stacked": (scanned, {"w": normal(0, 3, 8, 8)}, lambda w: w),
    "recurrent": (recurrent, {"w": normal(0, 8, 8)}, lambda w: w[None]),
    "experts": (mixture, {"w": normal(0, 3, 8, 6), "up": normal(1, 3, 8, 8)}, lambda w: w),
    "concatenated": (
        lambda p, x: x @ jnp.concatenate([p["v"], 0.5 * p["w"]], axis=1),
        {"w": normal(0, 8, 6), "v": normal(1, 8, 4)},
        lambda w: w[None],
    ),
    "reduced over time": (mean_over_time, {"w": normal(0, 8, 6)}, lambda w: w[None]),
}
BATCHES = [normal(9, 32, 8) * jnp.linspace(0.1, 3.0, 32)[:, None]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name, layout):
    """Exact counts of every pattern, in every matrix; zeros where the mask says so; the same again."""
    fn, params, matrices = LAYOUTS[layout]
    # Those that solve for weights take three patterns; the slow ones are asked for the extremes of them.
    own = {"Wanda": PATTERNS, "of a user": PATTERNS, "SparseGPT": PATTERNS[:3]}
    own = own.get(name, PATTERNS[:3:2])
    for pattern in own:
        if isinstance(pattern, patterns.NM) and layout == "grouped":
            continue  # groups of two inputs
        sparsity = None if isinstance(pattern, patterns.NM) else 0.5
        options = {"pattern": pattern}
        pruned = calibration.prune_layers(fn, params, BATCHES, METHODS[name], sparsity, **options)
        mask, kernel = np.asarray(pruned.masks["w"]), np.asarray(pruned.params["w"])
        assert kernel.dtype == params["w"].dtype and np.all(np.isfinite(kernel))
        assert np.all(kernel[~mask] == 0)
        if name in ("Wanda", "of a user"):
            np.testing.assert_array_equal(kernel, np.where(mask, params["w"], 0))
        for one in np.asarray(matrices(mask)):
            if isinstance(pattern, patterns.NM):
                assert np.all(one.reshape(-1, 4, one.shape[1]).sum(1) == 2)
            elif isinstance(pattern, patterns.ConstantFanIn):
                assert np.all(one.sum(0) == len(one) // 2)
            elif isinstance(pattern, patterns.Channel):
                assert np.all(one == one[:1]) and one[0].sum() == one.shape[1] // 2
            else:
                assert one.sum() == one.size // 2
            if isinstance(pattern, patterns.Block):
                blocks = one.reshape(len(one) // 2, 2, -1, 2)
                assert np.all(blocks == blocks[:, :1, :, :1])
    again = calibration.prune_layers(fn, params, BATCHES, METHODS[name], sparsity, **options)
    chex.assert_trees_all_equal(pruned, again)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refit_over_every_layout(layout):
    """Refitted weights are where no small change makes the outputs on the data better."""
    fn, params, _ = LAYOUTS[layout]
    masks = prunax.compute_masks(params, 0.5, where=lambda path, leaf: path == "w")
    method = calibration.Refit(masks, iterations=200, damping=0.0)
    pruned = calibration.prune_layers(fn, params, BATCHES, method)
    chex.assert_trees_all_equal(pruned.masks, masks)
    assert np.all(np.asarray(pruned.params["w"])[~np.asarray(masks["w"])] == 0)

    def error(p):
        return float(jnp.sum((fn(p, BATCHES[0]) - fn(params, BATCHES[0])) ** 2))

    if layout not in (
        "stacked",
        "recurrent",
        "reduced over time",
    ):  # whose outputs are not the layers'
        assert error(pruned.params) < error(prunax.apply_masks(params, masks))


def test_numbers_of_a_method_do_not_recompile():
    from prunax.calibration import _layers

    fn, params, _ = LAYOUTS["dense"]
    for damping in (0.01, 0.02):
        calibration.sparsegpt(fn, params, BATCHES, 0.5, damping=damping, correction=damping)
        size = _layers._solved._cache_size()
        calibration.sparsegpt(fn, params, BATCHES, 0.5, damping=0.5, correction=0.5)
        assert _layers._solved._cache_size() == size


def test_a_method_is_a_value():
    with pytest.raises(TypeError, match=r"prune_layers: method must be a method .*Wanda\(\)"):
        calibration.prune_layers(*LAYOUTS["dense"][:2], BATCHES, calibration.Wanda, 0.5)
    block = patterns.Block((2, 2))
    with pytest.raises(TypeError, match=r"prune_layers: pattern must be Unstructured"):
        calibration.prune_layers(
            *LAYOUTS["dense"][:2], BATCHES, calibration.Alps(), 0.5, pattern=block
        )


# What is pruned, by the jaxpr.


def network(p, x):
    hidden = jax.nn.relu(x @ p["up"] + p["position"])
    return hidden @ p["down"]


NETWORK = {
    "up": normal(0, 8, 16),
    "down": normal(1, 16, 4),
    "position": normal(2, 32, 16),
    "old_head": normal(3, 16, 16),
}


def test_what_no_product_reads_is_left_whole_and_listed_once():
    with pytest.warns(UserWarning, match=r"^wanda: .*: old_head") as said:
        pruned = calibration.wanda(network, NETWORK, BATCHES, 0.5)
    assert len(said) == 1 and said[0].filename == __file__
    assert pruned.masks["up"].mean() == pruned.masks["down"].mean() == 0.5
    assert pruned.masks["position"].shape == pruned.masks["old_head"].shape == ()
    where = prunax.kernels(network, NETWORK, BATCHES[0])
    again = calibration.wanda(network, NETWORK, BATCHES, 0.5, where=where)
    chex.assert_trees_all_equal(pruned, again)


def test_all_leaves_that_cannot_be_pruned_are_named_at_once():
    with pytest.raises(ValueError, match=r"^sparsegpt: .*'old_head'.*'position'") as error:
        calibration.sparsegpt(network, NETWORK, BATCHES, 0.5, where=lambda path, leaf: True)
    assert "trace:" not in str(error.value)
    with pytest.raises(ValueError, match=r"^input_statistics: .*'old_head'.*'position'"):
        calibration.input_statistics(network, NETWORK, BATCHES, where=lambda path, leaf: True)
    with pytest.raises(ValueError, match=r"^flops_per_weight: .*'old_head'.*'position'"):
        prunax.search.flops_per_weight(network, NETWORK, BATCHES[0], where=lambda path, leaf: True)
    cost = prunax.search.flops_per_weight(network, NETWORK, BATCHES[0])
    assert cost("up", NETWORK["up"]) == 64 and cost("position", NETWORK["position"]) == 0


def test_recomputed_kernels_are_left_whole_with_their_share():
    def fn(p, x):
        w = p["up"] - p["up"].mean(0, keepdims=True)
        return jax.nn.relu(x @ w) @ p["down"]

    params = {"up": NETWORK["up"], "down": NETWORK["down"]}
    with pytest.warns(UserWarning, match=r"recomputed .* \(66\.7% of the parameters\): up"):
        pruned = calibration.wanda(fn, params, BATCHES, 0.5)
    assert pruned.masks["up"].shape == () and pruned.masks["down"].mean() == 0.5


def test_kernels_that_inputs_meet_along_two_axes_are_left_whole():
    def autoencoder(p, x):
        return jnp.tanh(x @ p["up"]) @ p["up"].T @ p["last"]

    params = {"up": NETWORK["up"], "last": normal(4, 8, 8)}
    with pytest.warns(UserWarning, match=r"cannot prune are left whole: .*: up"):
        pruned = calibration.wanda(autoencoder, params, BATCHES, 0.5)
    assert pruned.masks["up"].shape == () and pruned.masks["last"].mean() == 0.5


def test_leaves_that_are_only_looked_up_in():
    def gathered(p, x):
        return jnp.einsum("td,tdf->tf", x, p["experts"][jnp.argmax(x[:, :4], -1)]) @ p["last"]

    params = {"experts": normal(0, 4, 8, 6), "last": normal(1, 6, 4)}
    with pytest.warns(UserWarning, match=r"looked up in .*: experts"):
        pruned = calibration.wanda(gathered, params, BATCHES, 0.5)
    assert pruned.masks["experts"].shape == () and pruned.masks["last"].mean() == 0.5
    with pytest.warns(UserWarning, match="looked up in"):
        pruned = calibration.sparsegpt(
            gathered, params, BATCHES, 0.5, where=lambda path, leaf: path == "experts"
        )
    chex.assert_trees_all_equal(pruned.params, params)


def test_a_function_without_kernels():
    with pytest.raises(ValueError, match=r"wanda: no leaf is a kernel.*The leaves are: bias\."):
        calibration.wanda(lambda p, x: x + p["bias"][None], {"bias": jnp.ones(8)}, BATCHES, 0.5)
    with pytest.raises(ValueError, match=r"wanda: `where` selects no leaf.*down, old_head"):
        calibration.wanda(network, NETWORK, BATCHES, 0.5, where=lambda path, leaf: False)


def test_constants_that_multiply_weights_count():
    """A masked kernel loses what the mask hides first, and a scaled one what the scale makes small."""
    scale = np.where(np.arange(8)[:, None] < 3, 0.0, np.linspace(1, 2, 8)[:, None]).astype("f4")
    w = normal(0, 8, 6)

    def fn(p, x):
        return x @ (p["w"] * scale)

    inputs = np.linalg.norm(BATCHES[0], axis=0)[:, None]
    scores = np.abs(w) * scale * inputs
    expected = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0) < 4
    pruned = calibration.wanda(fn, {"w": w}, BATCHES, 0.5)
    np.testing.assert_array_equal(pruned.masks["w"], expected)
    np.testing.assert_array_equal(pruned.params["w"], np.where(expected, w, 0))
    # Corrected weights are those of the product, divided by the constants.
    seen = calibration.sparsegpt(fn, {"w": w}, BATCHES, 0.5).params["w"] * scale
    plain = calibration.sparsegpt(lambda p, x: x @ p["w"], {"w": w * scale}, BATCHES, 0.5)
    np.testing.assert_allclose(seen, plain.params["w"], rtol=1e-3, atol=1e-4)


# Recurrent networks and mixtures.


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell])
def test_recurrent_statistics_are_those_of_the_unrolled_network(cell):
    """As with the loop written out, however long it is and however its kernels are put together."""
    model, x = nn.RNN(cell(6)), normal(0, 2, 5, 4)
    params = model.init(jax.random.key(1), x)
    grams = calibration.input_statistics(model.apply, params, [x], kind="gram")
    carries, carry = [], cell(6).initialize_carry(jax.random.key(0), (2, 4))
    own = {"params": params["params"]["cell"]}
    for t in range(5):
        carries.append(carry)
        carry, _ = cell(6).apply(own, carry, x[:, t])
    hidden = np.concatenate([c[1] if isinstance(c, tuple) else c for c in carries])
    rows = np.asarray(x).reshape(-1, 4)
    for name, gram in grams["params"]["cell"].items():
        inputs = rows if name.startswith("i") else hidden
        if name != "hn" or cell is nn.GRUCell:
            np.testing.assert_allclose(gram["kernel"], inputs.T @ inputs, rtol=1e-4, atol=1e-5)


def test_layers_after_a_recurrence_see_what_it_gives_once_it_is_pruned():
    def fn(p, x):
        step = lambda h, row: (jnp.tanh(row[None] @ p["in"] + h @ p["w"]),) * 2  # noqa: E731
        return jax.lax.scan(step, jnp.zeros((1, 8)), x)[1][:, 0] @ p["out"]

    params = {"in": normal(0, 8, 8), "w": normal(1, 8, 8), "out": normal(2, 8, 4)}
    pruned = calibration.wanda(fn, params, BATCHES, 0.5)

    def hidden(p):
        return np.asarray(fn(p | {"out": jnp.eye(8)}, BATCHES[0]))

    scores = np.abs(params["out"]) * np.linalg.norm(hidden(pruned.params), axis=0)[:, None]
    expected = np.argsort(np.argsort(-scores, axis=0), axis=0) < 4
    np.testing.assert_array_equal(pruned.masks["out"], expected)
    x = np.concatenate([np.zeros((1, 8)), hidden(params)[:-1]])
    scores = np.abs(params["w"]) * np.linalg.norm(x, axis=0)[:, None]
    np.testing.assert_array_equal(
        pruned.masks["w"], np.argsort(np.argsort(-scores, axis=0), axis=0) < 4
    )


ROUTED = jax.nn.one_hot(jnp.asarray([0] * 27 + [1] * 4 + [2]), 3)
COMBINED = {
    "routed before": lambda p, x: jnp.einsum(
        "etf,efd->td",
        jax.nn.relu(jnp.einsum("te,td,edf->etf", jnp.where(x[:, :1] > -9, ROUTED, 0), x, p["up"])),
        p["w"],
    ),
    "gated": mixture,
    "gated by einsum": lambda p, x: jnp.einsum(
        "te,tef,efd->td",
        jax.nn.softmax(x[:, :3]),
        jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"])),
        p["w"],
    ),
    "chosen": lambda p, x: jnp.einsum(
        "tef,efd->td",
        jnp.where(x[:, :3, None] > 0, jnp.einsum("td,edf->tef", x, p["up"]), 0.0),
        p["w"],
    ),
    "vmapped": lambda p, x: jnp.einsum(
        "te,etd->td",
        jax.nn.softmax(x[:, :3]),
        jax.vmap(lambda u, w: jax.nn.relu(x @ u) @ w)(p["up"], p["w"]),
    ),
}


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("pattern", [patterns.Unstructured(), patterns.ConstantFanIn()])
def test_each_expert_has_its_own_budget(name, pattern):
    params = LAYOUTS["experts"][1]
    pruned = calibration.wanda(COMBINED[name], params, BATCHES, 0.5, pattern=pattern)
    for mask in pruned.masks["w"]:
        assert int(mask.sum()) == mask.size // 2


def test_heads_are_no_experts():
    def attention(p, x):
        q, k, v = (jnp.einsum("td,ndh->tnh", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k))
        return jnp.einsum("tnh,nhd->td", jnp.einsum("nts,snh->tnh", weights, v), p["o"])

    params = {name: normal(i, 2, 8, 4) for i, name in enumerate("qkv")} | {"o": normal(4, 2, 4, 8)}
    grams = calibration.input_statistics(attention, params, BATCHES, kind="gram")
    assert grams["o"].shape == (8, 8)

    def wide(p, x):  # a sum of networks that nothing routes is one wide network
        return jnp.einsum("tef,efd->td", jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"])), p["w"])

    grams = calibration.input_statistics(wide, LAYOUTS["experts"][1], BATCHES, kind="gram")
    assert grams["w"].shape == (24, 24)


def test_nothing_is_said_of_an_ordinary_network():
    params = {"embed": {"embedding": normal(0, 9, 8)}, "kernel": normal(1, 8, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration.wanda(
            lambda p, t: p["embed"]["embedding"][t] @ p["kernel"], params, [jnp.arange(5)], 0.5
        )
