"""Loss-aware search: measured curves, budgets, and the sparsest masks within a limit of the loss."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import prunax
from prunax import _counts, _masks, allocation, patterns, search, structured
from prunax.search import _budgets
from prunax.search._structures import as_counts

# A network whose loss is known by hand: every weight that goes costs its own price.
PRICES = {"a": 0.0, "b": 1.0, "c": 5.0}
SIZES = {"a": (4, 5), "b": (8, 10), "c": (2, 50)}
PLAIN = {
    name: {"kernel": 1 + zoo.normal(i, *shape) ** 2, "bias": np.zeros(3, np.float32)}
    for i, (name, shape) in enumerate(SIZES.items())
}


def priced(params):
    """The sum of prices of the weights that are zero."""
    gone = {name: jnp.sum(params[name]["kernel"] == 0).astype(jnp.float32) for name in PRICES}
    return sum(price * gone[name] for name, price in PRICES.items()) / 100


def pruned_numbers(tree):
    return {name: int((~np.asarray(tree[name]["kernel"])).sum()) for name in PRICES}


# A trained network.


class _MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x))
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def trained():
    """``(fn, params, loss_fn)`` of an MLP on 512 digits."""
    digits = load_digits()
    x = jnp.asarray(digits.data[:512] / 16, jnp.float32)
    y = jnp.asarray(digits.target[:512])
    fn, params = _MLP().apply, _MLP().init(jax.random.key(0), x)
    optimizer = optax.adam(1e-2)

    def loss_fn(params):
        return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    params = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 150)[0][0])(start)
    return fn, params, loss_fn, x


def loss_under(loss_fn, params, tree):
    return float(jax.jit(loss_fn)(prunax.apply_masks(params, tree)))


# Sensitivity.


def test_curves_of_known_prices():
    found = search.sensitivity(priced, PLAIN, [0.0, 0.25, 1.0])
    assert found.names == ("a/kernel", "b/kernel", "c/kernel")
    assert found.dense_loss == 0
    np.testing.assert_array_equal(found.num_pruned, [[0, 5, 20], [0, 20, 80], [0, 25, 100]])
    np.testing.assert_allclose(found.losses, [[0, 0, 0], [0, 0.2, 0.8], [0, 1.25, 5]], rtol=1e-6)
    assert "a/kernel" in str(found) and "0.8" in str(found)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_curves_are_the_losses_of_masks(trained, batch_size):
    _, params, loss_fn, _ = trained
    grid = [0.5, 0.9]
    found = search.sensitivity(loss_fn, params, grid, batch_size=batch_size)
    for (i, name), (j, sparsity) in itertools.product(enumerate(found.names), enumerate(grid)):
        tree = _masks.compute_masks(params, allocation=allocation.by_path({name: sparsity}))
        np.testing.assert_allclose(found.losses[i, j], loss_under(loss_fn, params, tree), rtol=1e-5)


def test_one_compilation():
    # Once for the shape of the result, once for the program.
    loss_fn = chex.assert_max_traces(priced, n=2)
    search.allocate(loss_fn, PLAIN, 0.5, key=jax.random.key(0), generations=3, batch_size=2)


def test_progress_is_shown(capsys):
    search.sensitivity(priced, PLAIN, [0.5], progress=True)
    assert "4/4" in capsys.readouterr().out


# Structures.


def test_masks_are_those_of_compute_masks(trained):
    _, params, *_ = trained
    sparsities = {"params/Dense_0/kernel": 0.37, "params/Dense_1/kernel": 0.91}
    structures = search.leaves(params)
    numbers = [
        round(sparsities.get(n, 0) * s)
        for n, s in zip(structures.names, structures.sizes, strict=True)
    ]
    expected = _masks.compute_masks(params, allocation=allocation.by_path(sparsities))
    # A leaf without a sparsity has a mask of True here, and the scalar there.
    expected = jax.tree.map(
        jnp.broadcast_to, expected, jax.tree.map(jnp.shape, structures.masks(numbers))
    )
    chex.assert_trees_all_equal(structures.masks(numbers), expected)


def test_leaves_without_a_say_are_left_out():
    params = {
        "a": jnp.ones((2, 3)),
        "b": jnp.ones((4, 5)),
        "empty": jnp.ones((0, 5)),
        "bias": jnp.ones(3),
    }
    scores = {
        "a": jnp.ones((2, 3)),
        "b": jnp.float32(0),
        "empty": jnp.ones((0, 5)),
        "bias": jnp.float32(0),
    }
    structures = search.leaves(params, scores=scores)
    assert structures.names == ("a",)
    assert jax.tree.map(jnp.shape, structures.masks([3])) == {
        "a": (2, 3),
        "b": (),
        "empty": (),
        "bias": (),
    }


def test_numbers_beyond_32_bits_travel_in_two_words():
    assert [int(w[0]) for w in as_counts(np.array([2**33 + 5]))] == [2, 5]


def test_cost_in_bytes_and_operations():
    params = {
        "wide": jnp.ones((4, 6), jnp.bfloat16),
        "conv": jnp.ones((3, 3, 2, 5)),
        "bias": jnp.ones(5),
    }

    def fn(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.mean((1, 2))[:, :4] @ params["wide"].astype(jnp.float32)

    x = jnp.ones((7, 8, 8, 2))
    of_bytes = search.leaves(params, cost=search.bytes_per_weight)
    assert dict(zip(of_bytes.names, of_bytes.unit_costs, strict=True)) == {"wide": 2.0, "conv": 4.0}
    flops = search.leaves(params, cost=search.flops_per_weight(fn, params, x))
    # Two for each image, and each of 64 positions where the weight is one of a convolution.
    assert dict(zip(flops.names, flops.unit_costs, strict=True)) == {
        "wide": 14.0,
        "conv": 14.0 * 64,
    }
    assert flops.cost == structured.count_flops(fn, params, x)


def test_free_weights_are_refused():
    with pytest.raises(ValueError, match=r"'a/kernel' costs 0.*`where`"):
        search.leaves(PLAIN, cost=lambda path, leaf: float(not path.startswith("a")))


def test_numbers_out_of_range_are_refused():
    structures = search.leaves(PLAIN)
    with pytest.raises(ValueError, match=r"'b/kernel' loses 0 to 80 units, got 81"):
        structures.masks([0, 81, 0])
    with pytest.raises(ValueError, match="3 numbers"):
        structures.masks([1])


# Budgets.


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.05, {"a": 10, "b": 0, "c": 0}),
        (0.1, {"a": 20, "b": 0, "c": 0}),
        (0.3, {"a": 20, "b": 40, "c": 0}),
        (0.505, {"a": 20, "b": 80, "c": 1}),
        (1.0, {"a": 20, "b": 80, "c": 100}),
    ],
)
def test_cheapest_weights_go_first(sparsity, expected):
    found = search.allocate(priced, PLAIN, sparsity)
    assert pruned_numbers(found.masks) == expected
    assert found.loss == pytest.approx(found.start_losses["greedy"])
    assert found.sparsity == pytest.approx(sparsity)


def test_cost_decides_what_is_cheap():
    # A weight of c is worth ten of the others, so c goes before b, and a is still free.
    structures = search.leaves(PLAIN, cost=lambda path, leaf: 10.0 if path[0] == "c" else 1.0)
    found = search.allocate(priced, PLAIN, 0.1, structures=structures)
    # 10% of 20 + 80 + 1000 is 110: a's 20, and 9 weights of c.
    assert pruned_numbers(found.masks) == {"a": 20, "b": 0, "c": 9}
    assert found.sparsity == pytest.approx(0.1)


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0.1, 50)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.data(),
)
def test_fitted_numbers_reach_the_target(structures, sparsity, data):
    sizes, unit_costs = zip(*structures, strict=True)
    steps = tuple(data.draw(st.sampled_from([1, n])) for n in sizes)
    many = search.Structures(
        tuple(map(str, range(len(sizes)))), sizes, sizes, steps, unit_costs, None, None, {}
    )
    wished = np.array([data.draw(st.floats(0, n)) for n in sizes])
    target = sparsity * many.cost
    fitted = _budgets._fitted(many, wished, target)
    assert all(0 <= k <= n and k % s == 0 for k, n, s in zip(fitted, sizes, steps, strict=True))
    over = np.dot(unit_costs, fitted) - target
    assert -1e-6 <= over <= max(np.multiply(unit_costs, steps)) + 1e-6


@given(st.floats(0, 1), st.integers(0, 10))
def test_total_is_exact_where_weights_cost_the_same(sparsity, seed):
    structures = search.leaves(PLAIN)
    target = _budgets._target(structures, sparsity)
    rng = np.random.default_rng(seed)
    pruned = _budgets._fitted(structures, rng.uniform(0, structures.sizes), target)
    for _ in range(5):
        assert pruned.sum() == _counts.num_pruned(sparsity, 200)
        pruned = _budgets._mutated(structures, pruned, target, rng)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_hull_lies_below_and_is_convex(values):
    x, y = np.arange(len(values), dtype=float), np.array(values)
    corners = _budgets._lower_hull(x, y)
    assert corners[0] == 0 and corners[-1] == len(values) - 1
    assert np.all(np.interp(x, x[corners], y[corners]) <= y + 1e-9)
    assert np.all(np.diff(np.diff(y[corners]) / np.diff(x[corners])) >= -1e-9)


def test_search_is_never_worse_than_plain_allocations(trained):
    _, params, loss_fn, _ = trained
    found = search.allocate(loss_fn, params, 0.9, key=jax.random.key(1), generations=15)
    plain = (
        allocation.uniform,
        allocation.erdos_renyi,
        allocation.lamp,
        allocation.global_ranking,
    )
    for a in plain:
        tree = _masks.compute_masks(params, 0.9, allocation=a)
        measured = loss_under(loss_fn, params, tree)
        assert found.start_losses[a.__name__] == pytest.approx(measured, rel=0.05)
        assert found.loss <= measured
    assert list(found.history) == sorted(found.history, reverse=True)
    assert len(found.history) == 16 and found.history[-1] == found.loss
    assert found.loss < min(found.start_losses.values())
    assert prunax.summarize(params, found.masks).kept == 2720 - round(0.9 * 2720)


def test_result_is_an_allocation(trained):
    _, params, loss_fn, _ = trained
    key = jax.random.key(2)
    found = search.allocate(loss_fn, params, 0.8, key=key, generations=3)
    ours = _masks.compute_masks(params, allocation=allocation.by_path(found.sparsities))
    chex.assert_trees_all_equal(ours, found.masks)
    assert loss_under(loss_fn, params, found.masks) == pytest.approx(found.loss, rel=1e-5)
    again = search.allocate(loss_fn, params, 0.8, key=key, generations=3)
    assert again.sparsities == found.sparsities and again.history == found.history
    assert "params/Dense_0/kernel" in str(found)


def test_measured_curves_serve_again(trained):
    _, params, loss_fn, _ = trained
    measured = search.sensitivity(loss_fn, params, [0.5, 0.9])
    ours = search.allocate(loss_fn, params, 0.7, measured=measured)
    assert (
        ours.sparsities == search.allocate(loss_fn, params, 0.7, sparsities=[0.5, 0.9]).sparsities
    )
    with pytest.raises(ValueError, match="`measured` is of other structures"):
        search.allocate(priced, PLAIN, 0.7, measured=measured)


@pytest.mark.parametrize("pattern", [patterns.Block((2, 3)), patterns.ConstantFanIn()], ids=str)
def test_other_patterns(trained, pattern):
    _, params, loss_fn, _ = trained
    structures = search.leaves(params, pattern=pattern)
    found = search.allocate(
        loss_fn, params, 0.75, structures=structures, key=jax.random.key(0), generations=3
    )
    assert found.sparsity == pytest.approx(0.75, abs=0.02)
    ours = _masks.compute_masks(
        params, pattern=pattern, allocation=allocation.by_path(found.sparsities)
    )
    chex.assert_trees_all_equal(ours, found.masks)


def test_diverging_structures_are_left_alone():
    """A structure whose loss is NaN once anything of it goes."""

    def loss_fn(params):
        whole = jnp.all(params["b"]["kernel"] != 0)
        return jnp.where(whole, priced(params), jnp.nan)

    found = search.allocate(loss_fn, PLAIN, 0.5)
    assert pruned_numbers(found.masks) == {"a": 20, "b": 0, "c": 80}
    assert np.isnan(found.start_losses["uniform"])


# The sparsest within a limit.


def check_decisions(found):
    """Only accepted proposals change anything, each within the limit, and the network only gets sparser."""
    assert found.loss <= found.limit
    assert all(found.sparsity >= sparsity for sparsity in found.start_sparsities.values())
    state = {}
    total, loss = max(found.start_sparsities.values()), None
    proposals = [(d.name, d.proposed, d.sparsity) for d in found.decisions]
    assert len(set(proposals)) == len(proposals)  # nothing is asked twice
    for d in found.decisions:
        assert d.before == state.setdefault(d.name, d.before) and d.proposed > d.before
        assert d.accepted == (d.loss <= found.limit)
        assert d.sparsity > total
        if d.accepted:
            state[d.name], total, loss = d.proposed, d.sparsity, d.loss
    assert found.sparsities == {**found.sparsities, **state}
    assert found.sparsity == total and loss in (None, found.loss)


def test_limit_is_used_up_by_the_cheapest():
    found = search.max_sparsity(priced, PLAIN, max_increase=0.6)
    check_decisions(found)
    # All of a for nothing, then 60 weights of b at 0.01 each; one more, or one of c, is too much.
    assert pruned_numbers(found.masks) == {"a": 20, "b": 60, "c": 0}
    assert found.loss == pytest.approx(0.6)
    assert found.start_sparsities["uniform"] < 0.39 <= found.start_sparsities["greedy"] <= 0.4
    assert {d.name for d in found.decisions if not d.accepted} == {"b/kernel", "c/kernel"}
    assert "rejected" in str(found)


def test_nothing_may_be_lost():
    found = search.max_sparsity(priced, PLAIN, max_increase=0.0)
    check_decisions(found)
    assert found.sparsities == {"a/kernel": 1.0, "b/kernel": 0.0, "c/kernel": 0.0}


def test_limit_holds_on_a_trained_network(trained):
    _, params, loss_fn, _ = trained
    sparsities = []
    for limit in (0.001, 0.01, 0.1):
        found = search.max_sparsity(loss_fn, params, max_increase=limit)
        check_decisions(found)
        assert loss_under(loss_fn, params, found.masks) <= found.dense_loss + limit + 1e-6
        ours = _masks.compute_masks(params, allocation=allocation.by_path(found.sparsities))
        chex.assert_trees_all_equal(ours, found.masks)
        sparsities.append(prunax.summarize(params, found.masks).sparsity)
    assert 0.2 < sparsities[0] < sparsities[1] < sparsities[2]


def test_n_m_or_dense(trained):
    _, params, loss_fn, _ = trained
    pattern = patterns.NM(1, 4)
    structures = search.leaves(params, pattern=pattern)
    assert structures.limits == structures.steps == (3, 3, 3)
    alone = search.sensitivity(loss_fn, params, [0.75], structures=structures)
    least = float(alone.losses.min() - alone.dense_loss)
    found = search.max_sparsity(loss_fn, params, structures=structures, max_increase=least + 1e-3)
    check_decisions(found)
    assert sorted(found.sparsities.values()) == [0.0, 0.0, 0.75]
    assert len(found.decisions) <= 3
    ours = _masks.compute_masks(
        params, pattern=pattern, allocation=allocation.by_path(found.sparsities)
    )
    chex.assert_trees_all_equal(ours, found.masks)

    # Of 2720 weights 2048 are in the first layer, which brings 56%.
    budget = search.allocate(
        loss_fn, params, 0.2, structures=structures, key=jax.random.key(0), generations=2
    )
    assert 0.2 <= budget.sparsity <= 0.565
    with pytest.raises(ValueError, match=r"sparsity=0\.8 is out of reach.*at most 0\.75"):
        search.allocate(loss_fn, params, 0.8, structures=structures)


# Channel groups.


def test_masks_of_channels_make_the_network_that_shrinks(trained):
    fn, params, loss_fn, x = trained
    groups = structured.axis_groups(fn, params, x)
    structures = search.channels(groups, params)
    assert structures.sizes == (32, 16)
    assert structures.unit_costs == (64 + 1 + 16, 32 + 1 + 10)
    found = search.allocate(
        loss_fn, params, 0.5, structures=structures, key=jax.random.key(0), generations=4
    )
    assert found.sparsity == pytest.approx(0.5, abs=0.03)
    assert found.loss <= found.start_losses["uniform"]
    small = structured.prune_channels(
        fn, params, x, allocation=allocation.by_path(found.sparsities)
    )
    ours, theirs = fn(prunax.apply_masks(params, found.masks), x), small.fn(small.params, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_channels_within_a_limit(trained):
    fn, params, loss_fn, x = trained
    structures = search.channels(structured.axis_groups(fn, params, x), params)
    found = search.max_sparsity(loss_fn, params, structures=structures, max_increase=0.1)
    check_decisions(found)
    assert found.sparsity > 0.1
    small = structured.prune_channels(
        fn, params, x, allocation=allocation.by_path(found.sparsities)
    )
    assert structured.count_parameters(small.fn, small.params) < structured.count_parameters(
        fn, params
    )


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("network", [zoo.cnn, zoo.gpt], ids=lambda f: f.__name__)
def test_masks_of_any_groups(network):
    """Coupled through flattening, and heads: masking is removing, where nothing of the units remains."""
    net = network()
    groups = [g for g in structured.axis_groups(net.fn, net.params, *net.args) if g.preserved]
    structures = search.channels(groups, net.params)
    numbers = [size // 2 for size in structures.sizes]
    small = structured.prune_channels(
        net.fn,
        net.params,
        *net.args,
        allocation=allocation.by_path(structures.sparsities(numbers)),
    )
    ours = net.fn(prunax.apply_masks(net.params, structures.masks(numbers)), *net.args)
    theirs = small.fn(small.params, *net.args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), ours, theirs)


def test_no_group_may_shrink():
    groups = structured.axis_groups(lambda p, x: x @ p, jnp.ones((3, 4)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"no group may shrink: .*input"):
        search.channels(groups, jnp.ones((3, 4)))


# Requests that make no sense, refused before anything runs.


def never(params):
    raise AssertionError("the loss was asked for")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: search.sensitivity(never, PLAIN, [0.5, 1.5]), r"each of sparsities must lie in"),
        (lambda: search.sensitivity(never, PLAIN, []), "sparsities is empty"),
        (lambda: search.sensitivity(never, PLAIN, [0.5], batch_size=0), "batch_size must be"),
        (lambda: search.allocate(never, PLAIN, 95), r"sparsity must lie in \[0, 1\], got 95"),
        (lambda: search.allocate(never, PLAIN, 0.5, generations=-1), "generations must be"),
        (lambda: search.max_sparsity(never, PLAIN, max_increase=-0.1), "at least 0.*got -0.1"),
        (lambda: search.max_sparsity(never, PLAIN, max_increase=np.nan), "got nan"),
        (lambda: search.max_sparsity(never, PLAIN, first_step=0.0), "first_step"),
        (lambda: search.sensitivity(lambda p: p["a"]["kernel"], PLAIN), "one floating-point"),
        (lambda: search.sensitivity(lambda p: (priced(p), 1.0), PLAIN), "auxiliary"),
        (lambda: search.max_sparsity(lambda p: priced(p) / 0.0, PLAIN), "nothing pruned is nan"),
    ],
)
def test_wrong_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()
