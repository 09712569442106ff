"""Trees, functions and whole networks made smaller: shapes, derivatives, choices, errors."""

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
import zoo
from flax import nnx
from jax import export

import prunax
from prunax import structured

X = zoo.normal(9, 2, 6)
NETWORK = zoo.mlp()


@pytest.fixture
def group():
    """The twelve units of the first hidden layer: w1:1 b1:0 w2:0."""
    groups = structured.axis_groups(NETWORK.fn, NETWORK.params, X)
    return next(g for g in groups if g.size == 12)


# Trees like the params.


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
        optax.MultiSteps(optax.lion(1e-3), 4),
        prunax.prune(optax.adam(1e-3), 0.5),
    ],
    ids=["adamw", "chain", "multi_steps", "prune"],
)
def test_shrunk_optimizer_state_is_that_of_the_smaller_params(group, optimizer):
    optimizer = getattr(optimizer, "gradient_transformation", lambda: optimizer)()
    keep = {group: [1, 5, 7]}
    state = structured.shrink(optimizer.init(NETWORK.params), keep)
    like = jax.eval_shape(optimizer.init, structured.shrink(NETWORK.params, keep))
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, like)


def test_shrunk_factored_state(group):
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    params = {**NETWORK.params}
    keep = {group: [1, 5, 7, 8]}
    state = structured.shrink(optimizer.init(params), keep)
    assert state.v_row["w1"].shape == (6,)
    assert state.v_col["w1"].shape == (4,)


def test_state_of_one_branch_of_the_params():
    params = {name: {"layer": p} for name, p in (("a", NETWORK.params), ("b", NETWORK.params))}

    def fn(p, x):
        return NETWORK.fn(p["a"]["layer"], x) + NETWORK.fn(p["b"]["layer"], x)

    groups = structured.axis_groups(fn, params, X)
    keep = {g: [1, 2] for g in groups if g.size == 12}
    state = optax.adam(1e-3).init(params["a"])
    # Both branches have a layer/w1.
    with pytest.raises(
        ValueError, match=r"'0/mu/layer/b1' may belong to 'a/layer/b1' or 'b/layer/b1'"
    ):
        structured.shrink(state, keep)
    only = {"params": params["a"], "other": np.ones(3, np.float32)}
    groups = structured.axis_groups(lambda p, x: NETWORK.fn(p["params"]["layer"], x), only, X)
    keep = {next(g for g in groups if g.size == 12): [1, 2]}
    assert structured.shrink(state, keep)[0].mu["layer"]["w1"].shape == (6, 2)


def test_values_stay_with_their_units(group):
    small = structured.shrink(NETWORK.params, {group: [7, 1]})
    np.testing.assert_array_equal(small["w1"], NETWORK.params["w1"][:, [1, 7]])
    np.testing.assert_array_equal(small["w2"], NETWORK.params["w2"][[1, 7]])
    np.testing.assert_array_equal(small["b2"], NETWORK.params["b2"])


def test_boolean_mask_names_the_same_units(group):
    mask = np.isin(np.arange(12), [1, 7])
    ours, theirs = (structured.shrink(NETWORK.params, {group: u}) for u in (mask, [1, 7]))
    chex.assert_trees_all_equal(ours, theirs)


def test_leaf_of_another_shape_is_named(group):
    with pytest.raises(ValueError, match=r"'w1' has shape \(7, 5\)"):
        structured.shrink({**NETWORK.params, "w1": np.ones((7, 5))}, {group: [0]})


@pytest.mark.parametrize(
    ("units", "message"),
    [([], "at least one"), ([0, 0], "distinct"), ([12], "0 to 11"), ([0.5], "float64")],
)
def test_wrong_units_are_refused(group, units, message):
    with pytest.raises(ValueError, match=message):
        structured.shrink(NETWORK.params, {group: units})


def test_frozen_group_is_refused_with_the_reason():
    groups = structured.axis_groups(NETWORK.fn, NETWORK.params, X)
    output = next(g for g in groups if g.size == 3)
    with pytest.raises(ValueError, match=r"w3\[1\] cannot shrink.*function's output"):
        structured.shrink(NETWORK.params, {output: [0]})


# Functions.


def shrunk(group, units=(0, 3, 5)):
    keep = {group: list(units)}
    return structured.shrink_function(NETWORK.fn, keep), structured.shrink(NETWORK.params, keep)


def test_small_function_under_transformations(group):
    fn, params = shrunk(group)
    out = fn(params, X)
    np.testing.assert_allclose(jax.jit(fn)(params, X), out, rtol=1e-6)
    rows = jax.vmap(fn, (None, 0))(params, X[:, None])[:, 0]
    np.testing.assert_allclose(rows, out, rtol=1e-5)
    # Another batch size is traced anew.
    assert fn(params, np.tile(X, (4, 1))).shape == (8, 3)


def test_small_function_is_exported(group):
    fn, params = shrunk(group)
    exported = export.export(jax.jit(fn))(params, X)
    np.testing.assert_allclose(exported.call(params, X), fn(params, X), rtol=1e-6)
    assert (6, 3) in [aval.shape for aval in exported.in_avals]
    assert "12x" not in exported.mlir_module()


def test_gradient_is_that_of_the_masked_network(group):
    fn, params = shrunk(group)
    units = [0, 3, 5]
    gone = np.setdiff1d(np.arange(12), units)
    whole = {k: v.copy() for k, v in NETWORK.params.items()}
    whole["w1"][:, gone] = whole["b1"][gone] = whole["w2"][gone] = 0
    ours = jax.grad(lambda p: jnp.sum(fn(p, X) ** 2))(params)
    theirs = jax.grad(lambda p: jnp.sum(NETWORK.fn(p, X) ** 2))(whole)
    theirs = structured.shrink(theirs, {group: units})
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), ours, theirs)


def one_layer(activation):
    params = {"up": zoo.normal(0, 4, 8), "down": zoo.normal(1, 8, 3)}

    def fn(p, x):
        return activation(x @ p["up"]) @ p["down"]

    x = np.zeros((2, 4), np.float32)
    (group,) = (g for g in structured.axis_groups(fn, params, x) if not g.frozen)
    keep = {group: [1, 2]}
    return structured.shrink_function(fn, keep), structured.shrink(params, keep), x


def test_derivative_rule_of_relu_survives():
    # jax.nn.relu has derivative 0 at 0, by a rule of its own; max(x, 0) would have 1/2.
    fn, params, x = one_layer(jax.nn.relu)
    gradient = jax.grad(lambda x: fn(params, x).sum())(x)
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(jax.jvp(lambda x: fn(params, x), (x,), (x + 1,))[1], 0)


def test_backward_rule_of_a_straight_through_estimator_survives():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))
    fn, params, x = one_layer(rounded)
    gradient = jax.grad(lambda x: fn(params, x).sum())(x)
    expected = (params["up"] @ params["down"]).sum(1)
    np.testing.assert_allclose(gradient, np.tile(expected, (2, 1)), rtol=1e-5)


def test_wrong_params_are_named(group):
    fn, _ = shrunk(group)
    with pytest.raises(ValueError, match=r"'b1' has shape \(12,\), expected \(3,\)"):
        fn(NETWORK.params, X)


def test_function_with_more_ties_is_refused(group):
    # Units 0 and 6 are added together here, 1 and 7, and so on: they cannot go apart.
    keep = {group: [0, 3, 7]}
    fn = structured.shrink_function(lambda p, x: p["w1"].reshape(6, 2, 6).sum(1), keep)
    with pytest.raises(ValueError, match="ties units together"):
        fn(structured.shrink(NETWORK.params, keep), X)


# What is frozen, and why.


def test_unknown_primitive_freezes_and_is_named():
    params = {"up": zoo.normal(0, 4, 8), "down": zoo.normal(1, 8, 3)}

    def fn(p, x):
        y = x @ p["up"]
        return jax.pure_callback(np.tanh, y, y) @ p["down"]

    groups = structured.axis_groups(fn, params, np.ones((2, 4), np.float32))
    middle = next(g for g in groups if g.name == "up[1]")
    assert middle.frozen.primitive == "pure_callback"
    assert "test_structured_prune.py" in middle.frozen.source
    with pytest.raises(
        ValueError, match=r"(?s)up\[1\]: used in a way.*`pure_callback` at .*structured_prune"
    ):
        structured.prune_channels(fn, params, np.ones((2, 4), np.float32), sparsity=0.5)


@pytest.mark.parametrize(
    ("use", "primitive"),
    [
        (lambda y: jnp.sort(y, axis=-1), "sort"),
        (lambda y: jnp.cumsum(y, axis=-1), "cumsum"),
        (lambda y: y[:, ::-1], "rev"),
        (lambda y: jnp.where(y.argmax(-1, keepdims=True) == 0, y, 0), "eq"),
        (lambda y: jnp.fft.fft(y).real, "fft"),
        (lambda y: y.at[:, 2].set(0.0), "scatter"),
        (lambda y: (y.reshape(-1, 3) * 2).reshape(y.shape), "reshape"),
    ],
)
def test_what_depends_on_the_place_freezes(use, primitive):
    params = {"up": np.ones((4, 8), np.float32), "down": np.ones((8, 3), np.float32)}
    groups = structured.axis_groups(
        lambda p, x: use(x @ p["up"]) @ p["down"], params, np.ones((3, 4), np.float32)
    )
    up = [g for g in groups if g.name.startswith("up[1]")]
    assert {g.frozen and g.frozen.primitive for g in up} == {primitive}


def test_explain_shows_places_and_reasons():
    network = zoo.gpt()
    groups = structured.axis_groups(network.fn, network.params, *network.args)
    text = str(structured.explain_groups(groups))
    assert "16 + 4 u + 1 i[4]" in text  # the value heads within the fused projection
    assert "removal changes the rest" in text
    assert "frozen: an axis of the function's output" in text


# Choosing.


def test_uniform_sparsity_removes_the_smallest():
    params = {k: v.copy() for k, v in NETWORK.params.items()}
    small_units = [2, 5, 11]
    for name, axis in (("w1", 1), ("w2", 0)):
        index = (slice(None),) * axis + (small_units,)
        params[name][index] = 1e-3
    result = structured.prune_channels(NETWORK.fn, params, X, sparsity=0.25)
    assert [len(units) for units in result.keep.values()] == [9, 6]
    first = next(units for group, units in result.keep.items() if group.size == 12)
    assert first.tolist() == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    assert result.params["w2"].shape == (9, 6)
    assert result.fn(result.params, X).shape == (2, 3)


def test_group_score_sums_all_members(group):
    p = NETWORK.params
    scores = structured.group_scores([group], p, prunax.scores.magnitude(p))[group]
    by_hand = np.abs(p["w1"]).sum(0) + np.abs(p["b1"]) + np.abs(p["w2"]).sum(1)
    np.testing.assert_allclose(scores, by_hand, rtol=1e-6)


def widths(**options):
    result = structured.prune_channels(NETWORK.fn, NETWORK.params, X, **options)
    return {g.size: len(units) for g, units in result.keep.items()}


def test_widths():
    assert widths(sparsity=0.6, round_to=4) == {12: 4, 8: 4}
    assert widths(sparsity=1.0) == {12: 1, 8: 1}
    assert widths(sparsity=1.0, min_width=3) == {12: 3, 8: 3}
    assert widths(sparsity=0.0) == {}
    assert widths(sparsity=0.5, where=lambda path, leaf: path == "w1") == {12: 6}
    by_path = prunax.allocation.by_path({"w2*": 0.25})
    assert widths(allocation=by_path) == {8: 6}
    ranked = widths(sparsity=0.5, allocation=prunax.allocation.global_ranking)
    assert sum(ranked.values()) + sum({12, 8} - set(ranked)) == 10


@pytest.mark.relaxed_promotion
def test_each_kind_at_a_sparsity_of_its_own():
    network = zoo.llama()
    kinds = prunax.allocation.by_path({"gate_up*": 0.5, "wk[[]1]@0+8": 0.5, "w[vo]*": 0.25})
    result = structured.prune_channels(network.fn, network.params, *network.args, allocation=kinds)
    # Units of the feed-forward layer, key-value heads, value widths; query heads and the rest stay whole.
    kept = {group.name: (group.size, len(units)) for group, units in result.keep.items()}
    assert kept == {"gate_up[1]@0+1": (16, 8), "wk[1]@0+8": (2, 1), "wv[1]@0+1": (8, 6)}
    unknown = prunax.allocation.by_path({"mlp*": 0.5})
    with pytest.raises(ValueError, match=r"'mlp\*' matches no .* gate_up\[1\]@0\+1"):
        structured.prune_channels(network.fn, network.params, *network.args, allocation=unknown)


def test_protected_units_stay(group):
    result = structured.prune_channels(
        NETWORK.fn, NETWORK.params, X, sparsity=0.9, protect={group: [0, 4, 9]}
    )
    assert result.keep[group].tolist() == [0, 4, 9]


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("cost", [structured.count_flops, structured.count_parameters])
@pytest.mark.parametrize("target", [0.7, 0.4])
def test_target_is_met_and_no_more_than_met(cost, target):
    network = zoo.cnn()
    result = structured.prune_channels(
        network.fn, network.params, *network.args, target=target, cost=cost
    )
    whole = cost(network.fn, network.params, *network.args)
    fraction = cost(result.fn, result.params, *network.args) / whole
    assert target - 0.2 < fraction <= target


def test_flops_by_hand():
    assert structured.count_flops(NETWORK.fn, NETWORK.params, X) == 2 * 2 * (
        6 * 12 + 12 * 8 + 8 * 3
    )
    conv = nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False)
    x = np.ones((2, 5, 5, 4), np.float32)
    params = jax.eval_shape(conv.init, jax.random.key(0), x)
    assert structured.count_flops(conv.apply, params, x) == 2 * 2 * 25 * 6 * 2 * 9
    looped = zoo.scanned()
    once = {**looped.params, "layers": {k: v[:1] for k, v in looped.params["layers"].items()}}
    count = functools.partial(structured.count_flops, looped.fn)
    ends = 2 * 2 * 6 * 8 * (5 + 3)
    whole, single = (count(p, *looped.args) for p in (looped.params, once))
    assert whole - ends == 3 * (single - ends)


def test_pruned_twice():
    once = structured.prune_channels(NETWORK.fn, NETWORK.params, X, sparsity=0.5)
    twice = structured.prune_channels(once.fn, once.params, X, sparsity=0.5)
    assert twice.params["w2"].shape == (3, 2)
    both = {k: v.copy() for k, v in once.params.items()}
    for group, units in twice.keep.items():
        gone = np.setdiff1d(np.arange(group.size), units)
        for path, axis, _, _ in group.members:
            both[path][(slice(None),) * axis + (gone,)] = 0
    np.testing.assert_allclose(twice.fn(twice.params, X), once.fn(both, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 80}, "Pass 0.5 for one half"),
        ({"sparsity": 0.5, "target": 0.5}, "only one of"),
        ({"target": 0.001}, "out of reach"),
        ({"sparsity": 0.5, "round_to": 0}, "round_to must be at least 1"),
        ({"sparsity": 0.5, "where": lambda path, leaf: False}, "selects no leaf"),
        ({"sparsity": 0.5, "where": lambda path, leaf: path == "w3"}, r"w3\[1\]: an axis of the"),
    ],
)
def test_prune_channels_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        structured.prune_channels(NETWORK.fn, NETWORK.params, X, **options)


def test_nan_scores_are_named():
    params = {**NETWORK.params, "w1": NETWORK.params["w1"] * np.float32(np.nan)}
    with pytest.raises(ValueError, match=r"w1\[1\] contain NaN"):
        structured.prune_channels(NETWORK.fn, params, X, sparsity=0.5)


# Frameworks.


def in_linen(x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3))(x))
            x = nn.Dense(10)(x.reshape(x.shape[0], -1))
            return nn.Dense(3)(nn.relu(x))

    net = Net()
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), x)


def in_nnx(x):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.c = nnx.Conv(2, 6, (3, 3), rngs=rngs)
            self.d1 = nnx.Linear(96, 10, rngs=rngs)
            self.d2 = nnx.Linear(10, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.c(x))
            return self.d2(nnx.relu(self.d1(x.reshape(x.shape[0], -1))))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    return lambda state, x: nnx.merge(graph, state)(x), state


def in_equinox(x):
    class Net(eqx.Module):
        c: eqx.nn.Conv2d
        d1: eqx.nn.Linear
        d2: eqx.nn.Linear

        def __call__(self, x):
            x = jax.nn.relu(self.c(x.transpose(2, 0, 1))).transpose(1, 2, 0)
            return self.d2(jax.nn.relu(self.d1(x.reshape(-1))))

    keys = jax.random.split(jax.random.key(0), 3)
    net = eqx.filter_eval_shape(
        lambda: Net(
            eqx.nn.Conv2d(2, 6, 3, padding=1, key=keys[0]),
            eqx.nn.Linear(96, 10, key=keys[1]),
            eqx.nn.Linear(10, 3, key=keys[2]),
        )
    )
    return lambda net, x: jax.vmap(net)(x), net


def in_haiku(x):
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(6, 3)(x))
        x = hk.Linear(10)(x.reshape(x.shape[0], -1))
        return hk.Linear(3)(jax.nn.relu(x))

    net = hk.without_apply_rng(hk.transform(forward))
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), x)


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("make", [in_linen, in_nnx, in_equinox, in_haiku])
def test_same_groups_in_every_framework(make):
    x = zoo.normal(0, 2, 4, 4, 2)
    fn, params = make(x)
    groups = [g for g in structured.axis_groups(fn, params, x) if not g.frozen]

    def anatomy(group):
        # What is left without names and orders of axes: the role, and copies of each unit.
        return group.size, sorted(
            (m.role, m.position.indices(group.size).shape[1]) for m in group.members
        )

    assert sorted(map(anatomy, groups)) == [
        (6, [("consumes", 16), ("elementwise", 1), ("produces", 1)]),
        (10, [("consumes", 1), ("elementwise", 1), ("produces", 1)]),
    ]


def test_native_modules_run_on_the_smaller_params():
    """A plain layer of NNX or Equinox checks no shapes: the smaller params fit it as they are."""
    x = zoo.normal(0, 2, 6)
    net = nnx.Sequential(
        nnx.Linear(6, 12, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(12, 3, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(net)
    result = structured.prune_channels(
        lambda state, x: nnx.merge(graph, state)(x), state, x, sparsity=0.5
    )
    native = nnx.merge(graph, result.params)(x)
    assert native.shape == (2, 3)
    np.testing.assert_allclose(native, result.fn(result.params, x), rtol=1e-6)


def test_kernels_that_no_name_tells_of_come_from_the_jaxpr():
    # What wrappers of weights (paramax) look like: an attribute by its place.
    params = {"weight": {"args": [jnp.arange(1.0, 25).reshape(4, 6), jnp.ones((6, 3))]}}

    def fn(p, x):
        up, down = p["weight"]["args"]
        return jnp.tanh(x @ up) @ down

    x = jnp.ones((2, 4))
    assert not prunax.trees.select(params, prunax.trees.is_kernel).paths
    small = structured.prune_channels(fn, params, x, sparsity=0.5)
    assert [w.shape for w in small.params["weight"]["args"]] == [(4, 3), (3, 3)]
    assert [units.tolist() for units in small.keep.values()] == [[3, 4, 5]]
