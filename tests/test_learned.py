"""Learned masks: gradients by hand, the same result however it is compiled, and training on digits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import prunax
from prunax import learned, patterns, schedules, transforms

KEY = jax.random.key(0)


def tree(key, dtype=jnp.float32):
    k1, k2 = jax.random.split(key)
    return {
        "a": {"kernel": jax.random.normal(k1, (8, 6)).astype(dtype), "bias": jnp.ones(6, dtype)},
        "b": {"kernel": jax.random.normal(k2, (2, 4, 8)).astype(dtype)},
    }


# Scores


def test_straight_through_gradients_by_hand():
    params, scores = tree(KEY), tree(jax.random.key(1))
    coefficients = tree(jax.random.key(2))

    def loss(params, scores):
        masked = learned.straight_through(params, scores, 0.5)
        return sum(map(jnp.vdot, jax.tree.leaves(masked), jax.tree.leaves(coefficients)))

    by_params, by_scores = jax.grad(loss, (0, 1))(params, scores)
    masks = prunax.compute_masks(params, 0.5, scores=scores)
    for path in (("a", "kernel"), ("b", "kernel")):
        w, g, m, dw, ds = (
            t[path[0]][path[1]] for t in (params, coefficients, masks, by_params, by_scores)
        )
        np.testing.assert_array_equal(dw, jnp.where(m, g, 0))
        np.testing.assert_array_equal(ds, g * w)
    np.testing.assert_array_equal(by_params["a"]["bias"], coefficients["a"]["bias"])
    assert not by_scores["a"]["bias"].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.75},
        {"sparsity": 0.75, "allocation": prunax.allocation.global_ranking},
        {"pattern": patterns.NM(1, 4)},
    ],
    ids=["uniform", "global", "nm"],
)
def test_straight_through_is_the_masked_params_however_it_is_compiled(dtype, options):
    params, scores = tree(KEY, dtype), tree(jax.random.key(1))
    function = functools.partial(learned.straight_through, **options)
    expected = prunax.apply_masks(params, prunax.compute_masks(params, scores=scores, **options))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (params, scores))
    mapped = jax.vmap(function)(*stacked)
    _, scanned = jax.lax.scan(lambda c, x: (c, function(*x)), None, stacked)
    for result in (
        function(params, scores),
        jax.jit(function)(params, scores),
        *(jax.tree.map(lambda x, i=i: x[i], t) for t in (mapped, scanned) for i in (0, 1)),
    ):
        chex.assert_trees_all_equal(result, expected)
        assert jax.tree.map(lambda x: x.dtype, result) == jax.tree.map(lambda x: x.dtype, expected)


def test_straight_through_leaves_what_has_no_scores():
    params = tree(KEY)
    scores = {**tree(jax.random.key(1)), "b": {"kernel": jnp.zeros(())}}
    masked = learned.straight_through(params, scores, 0.5)
    np.testing.assert_array_equal(masked["b"]["kernel"], params["b"]["kernel"])
    assert (masked["a"]["kernel"] == 0).sum() == 24
    with pytest.raises(ValueError, match=r"'b/kernel' is missing"):
        learned.straight_through(params, {"a": scores["a"]}, 0.5)


def test_in_shard_map_each_device_learns_its_own():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w, s = (jax.random.normal(jax.random.key(i), (2, 8, 4)) for i in (0, 1))
    logits = {"kernel": jax.random.normal(KEY, (2, 2, 4, 6))}

    def one(w, s, logits):
        masked = learned.straight_through({"kernel": w[0]}, {"kernel": s[0]}, 0.5)["kernel"]
        gate = learned.hard_concrete(s[0], KEY)
        soft = learned.nm_categorical({"kernel": logits["kernel"][0]}, patterns.NM(2, 4), KEY)
        thin = learned.soft_threshold({"kernel": w[0]}, {"kernel": s[0, :1]})["kernel"]
        return (masked * gate * soft["kernel"] + thin)[None]

    together = jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=(P("x"), P("x"), P("x")), out_specs=P("x"))
    )(w, s, logits)
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i : i + 1], (w, s, logits))
        np.testing.assert_allclose(together[i], one(*part)[0], rtol=1e-6)


def test_top_kast_is_a_composition():
    # Forward with the largest weights, gradients for a superset of them: no function of its own.
    params = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    forward, backward = (prunax.compute_masks(params, s) for s in (0.75, 0.25))

    def used(params):
        return prunax.straight_through(prunax.apply_masks(params, backward), forward)

    assert used(params)["kernel"].tolist() == [[4.0, 0.0, 0.0, 0.0]]
    grads = jax.grad(lambda p: 5.0 * jnp.sum(used(p)["kernel"]))(params)
    assert grads["kernel"].tolist() == [[5.0, 5.0, 5.0, 0.0]]


# Gates


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hard_concrete_is_the_published_formula(dtype):
    logits = {"g": jnp.linspace(-4, 4, 401).astype(dtype)}
    beta, low, high = 0.5, -0.2, 1.3
    draw = functools.partial(learned.hard_concrete, temperature=beta, low=low, high=high)
    gates = draw(logits, KEY)["g"]
    u = jax.nn.sigmoid(jax.random.logistic(jax.random.split(KEY, 1)[0], (401,), jnp.float32))
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log(1 - u) + logits["g"].astype(jnp.float32)) / beta)
    stretched = s * (high - low) + low
    assert gates.dtype == dtype
    np.testing.assert_allclose(
        gates.astype(jnp.float32),
        jnp.clip(stretched, 0, 1),
        atol=1e-4 if dtype == jnp.float32 else 5e-3,
    )
    assert 0 < (gates == 0).sum() < (gates < 1).sum() < 401
    if dtype == jnp.float32:
        slope = jax.grad(lambda logits: jnp.sum(draw(logits, KEY)["g"]))(logits)["g"]
        inside = (stretched > 0) & (stretched < 1)
        expected = jnp.where(inside, (high - low) * s * (1 - s) / beta, 0)
        np.testing.assert_allclose(slope, expected, atol=1e-3)


def test_expected_l0_counts_the_gates_that_are_drawn_open():
    logits = jnp.array([-3.0, -1.0, 0.0, 1.0])
    keys = jax.random.split(KEY, 20_000)
    opened = jnp.mean(jax.vmap(lambda k: learned.hard_concrete(logits, k) != 0)(keys), 0)
    each = jax.grad(learned.expected_l0)(logits)
    probability = jax.nn.sigmoid(logits - 2 / 3 * jnp.log(0.1 / 1.1))
    np.testing.assert_allclose(opened, probability, atol=0.015)
    np.testing.assert_allclose(learned.expected_l0({"a": logits}), probability.sum(), rtol=1e-6)
    np.testing.assert_allclose(each, probability * (1 - probability), rtol=1e-5)


def test_bad_gates_are_refused():
    with pytest.raises(ValueError, match=r"hard_concrete.*low below 0.*low=0.1"):
        learned.hard_concrete(jnp.zeros(2), low=0.1)
    with pytest.raises(ValueError, match=r"expected_l0.*temperature=0"):
        learned.expected_l0(jnp.zeros(2), temperature=0)


# N:M


@pytest.mark.parametrize("axis", [-2, -1, 0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nm_masks_keep_n_of_m(axis, dtype):
    pattern = patterns.NM(2, 4, axis=axis)
    params = {"kernel": jax.random.normal(KEY, (4, 8, 12)), "bias": jnp.ones(3)}
    prior = prunax.compute_masks(params, pattern=pattern)
    logits = learned.nm_logits(params, pattern, masks=prior)
    hard = learned.nm_categorical(logits, pattern)
    chex.assert_trees_all_equal(hard, prior)
    logits = jax.tree.map(lambda x: x.astype(dtype), logits)
    draw = jax.jit(functools.partial(learned.nm_categorical, pattern=pattern))
    soft = draw(logits, key=KEY)
    assert soft["bias"].shape == () and soft["kernel"].dtype == dtype
    sums = pattern.pool(soft["kernel"].astype(jnp.float32)).sum(pattern.compare_axis)
    np.testing.assert_allclose(sums, 2, atol=2e-2)
    cold = draw(logits, key=KEY, temperature=1e-4)["kernel"].astype(jnp.float32)
    np.testing.assert_allclose(cold * (1 - cold), 0, atol=1e-2)


def test_nm_categorical_by_hand():
    # 1:2 with logits a, b and noise g, h: the first weight's share is sigmoid((a + g - b - h) / T).
    pattern, logits = patterns.NM(1, 2), jnp.array([[[0.3, -0.5]]])
    noise = jax.random.gumbel(jax.random.split(KEY, 1)[0], (1, 1, 2))
    share = jax.nn.sigmoid((0.8 + noise[0, 0, 0] - noise[0, 0, 1]) / 0.5)

    def first(logits):
        return learned.nm_categorical(logits, pattern, KEY, temperature=0.5)[0, 0]

    np.testing.assert_allclose(first(logits), share, rtol=1e-5)
    slope = share * (1 - share) / 0.5
    np.testing.assert_allclose(jax.grad(first)(logits)[0, 0], [slope, -slope], rtol=1e-4)


def test_logits_of_another_pattern_are_refused():
    params = {"kernel": jnp.ones((8, 3))}
    logits = learned.nm_logits(params, patterns.NM(2, 4))
    with pytest.raises(ValueError, match=r"'kernel' are 6 for each group, and NM.*has 4 patterns"):
        learned.nm_categorical(logits, patterns.NM(1, 4))
    with pytest.raises(ValueError, match=r"nm_logits.*'kernel'"):
        learned.nm_logits(params, patterns.NM(2, 5))


# Thresholds


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_soft_threshold_by_hand(dtype):
    params = {"kernel": jnp.array([[2.0, -0.25], [-1.5, 0.5]], dtype), "bias": jnp.ones(2, dtype)}
    s = {"kernel": jnp.zeros((), jnp.float32), "bias": jnp.zeros(())}  # a threshold of one half

    def loss(params, s):
        weights = jnp.array([[1.0, 10.0], [100.0, 1000.0]], dtype)
        return jnp.sum(learned.soft_threshold(params, s)["kernel"] * weights).astype(jnp.float32)

    thin = jax.jit(learned.soft_threshold)(params, s)
    assert thin["kernel"].tolist() == [[1.5, 0.0], [-1.0, 0.0]]
    assert thin["kernel"].dtype == dtype and thin["bias"].tolist() == [1.0, 1.0]
    by_params, by_s = jax.grad(loss, (0, 1))(params, s)
    assert by_params["kernel"].tolist() == [[1.0, 0.0], [100.0, 0.0]]
    # -g'(0) (1 - 100), g' = 1/4
    np.testing.assert_allclose(by_s["kernel"], 0.25 * 99, rtol=1e-2)


def test_thresholds_for_each_output():
    params = {"kernel": jnp.full((2, 3), 0.6)}
    s = {"kernel": jnp.array([[-10.0, 0.0, 10.0]])}
    thin = learned.soft_threshold(params, s)["kernel"]
    np.testing.assert_allclose(thin, [[0.6, 0.1, 0.0]] * 2, atol=1e-4)
    with pytest.raises(ValueError, match=r"threshold of 'kernel' has shape \(2,\)"):
        learned.soft_threshold(params, {"kernel": jnp.zeros(2)})


# Training

DIGITS = load_digits()
X = jnp.asarray(DIGITS.data / 16, jnp.float32)
Y = jnp.asarray(DIGITS.target)
TRAIN, TEST = slice(0, 1200), slice(1200, None)


def network(key, width):
    k1, k2 = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(k1, (64, width)) * (2 / 64) ** 0.5},
        "out": {"kernel": jax.random.normal(k2, (width, 10)) * (2 / width) ** 0.5},
    }


def logits_of(params, x):
    return jnp.dot(jax.nn.relu(jnp.dot(x, params["hidden"]["kernel"])), params["out"]["kernel"])


def accuracy(params):
    return float(jnp.mean(logits_of(params, X[TEST]).argmax(-1) == Y[TEST]))


def task(params, rows):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_of(params, X[rows]), Y[rows]
    ).mean()


def fit(loss, variables, steps, rate=3e-2):
    """Minimise ``loss(variables, rows, key, step)``."""
    tx = optax.adam(rate)

    def step(carry, t):
        variables, state = carry
        key = jax.random.fold_in(jax.random.key(5), t)
        rows = jax.random.randint(key, (128,), 0, 1200)
        grads = jax.grad(loss)(variables, rows, key, t)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(variables, updates), state), None

    @jax.jit
    def train(variables):
        return jax.lax.scan(step, (variables, tx.init(variables)), jnp.arange(steps))[0][0]

    return train(variables)


@pytest.fixture(scope="module")
def trained():
    with jax.numpy_dtype_promotion("standard"):
        return fit(lambda p, rows, key, t: task(p, rows), network(KEY, 48), 300, 1e-2)


@pytest.mark.relaxed_promotion
def test_edge_popup_finds_a_network_in_random_weights():
    random = network(KEY, 128)
    scores = network(jax.random.key(1), 128)

    def masked(scores):
        return learned.straight_through(random, jax.tree.map(jnp.abs, scores), 0.5)

    found = fit(lambda s, rows, key, t: task(masked(s), rows), scores, 300)
    assert accuracy(masked(scores)) < 0.4
    assert accuracy(masked(found)) > 0.88
    assert (masked(found)["hidden"]["kernel"] == 0).sum() == 64 * 64


@pytest.mark.relaxed_promotion
def test_movement_pruning_of_a_trained_network(trained):
    schedule = schedules.polynomial(0.9, 0, 200, every=1)

    def loss(both, rows, key, t):
        params, scores = both
        return task(learned.straight_through(params, scores, schedule(t)), rows)

    zeros = jax.tree.map(jnp.zeros_like, trained)
    params, scores = fit(loss, (trained, zeros), 300, 1e-2)
    final = learned.straight_through(params, scores, 0.9)
    magnitude = prunax.apply_masks(trained, prunax.compute_masks(trained, 0.9))
    assert accuracy(final) > max(0.85, accuracy(magnitude))


@pytest.mark.relaxed_promotion
def test_hard_concrete_gates_close(trained):
    logits = jax.tree.map(lambda p: jnp.full_like(p, 2.0), trained)

    def loss(both, rows, key, t):
        params, logits = both
        gated = jax.tree.map(jnp.multiply, params, learned.hard_concrete(logits, key))
        return task(gated, rows) + 1e-3 * learned.expected_l0(logits)

    params, logits = fit(loss, (trained, logits), 400)
    masks = jax.tree.map(lambda g: g > 0, learned.hard_concrete(logits))
    pruned = prunax.summarize(prunax.apply_masks(params, masks), masks)
    gated = jax.tree.map(jnp.multiply, params, learned.hard_concrete(logits))
    assert pruned.sparsity > 0.5
    assert accuracy(gated) > 0.85


@pytest.mark.relaxed_promotion
def test_nm_patterns_are_learned(trained):
    pattern = patterns.NM(1, 4)
    start = learned.nm_logits(
        trained, pattern, masks=prunax.compute_masks(trained, pattern=pattern), strength=1.0
    )

    def loss(logits, rows, key, t):
        soft = learned.nm_categorical(logits, pattern, key, temperature=0.5)
        return task(jax.tree.map(jnp.multiply, trained, soft), rows)

    found = fit(loss, start, 300, 5e-2)
    before, after = (
        prunax.apply_masks(trained, learned.nm_categorical(s, pattern)) for s in (start, found)
    )
    assert accuracy(after) > accuracy(before) + 0.02
    assert (after["hidden"]["kernel"] == 0).mean() == 0.75


@pytest.mark.relaxed_promotion
def test_soft_thresholds_rise(trained):
    s = jax.tree.map(lambda p: jnp.full((), -6.0), trained)

    def loss(both, rows, key, t):
        params, s = both
        decay = sum(jnp.square(x) for x in jax.tree.leaves(s))
        return task(learned.soft_threshold(params, s), rows) + 3e-2 * decay

    params, s = fit(loss, (trained, s), 300)
    sparse = learned.soft_threshold(params, s)
    masks = prunax.compute_masks(sparse, threshold=0.0)
    assert prunax.summarize(sparse, masks).sparsity > 0.5
    assert accuracy(sparse) > 0.85


@pytest.mark.relaxed_promotion
def test_learned_masks_are_fixed_and_trained_under(trained):
    masks = prunax.compute_masks(trained, 0.8, scores=network(KEY, 48))
    tx = transforms.fixed_masks(optax.adam(1e-2), masks)
    updates, _ = tx.update(trained, tx.init(trained), trained)
    params = optax.apply_updates(trained, updates)
    assert (params["hidden"]["kernel"] == 0).sum() == round(0.8 * 64 * 48)


# Distillation


def test_distillation_by_hand():
    teacher = jnp.array([[[0.0, 2.0, -1.0]], [[5.0, 0.0, 1.0]]])
    student = jnp.array([[[0.5, 1.0, 0.0]], [[0.0, 0.0, jnp.nan]]])
    mask, t = jnp.array([[True], [False]]), 3.0

    def loss(student):
        return prunax.penalties.distillation(student, teacher, t, mask=mask)

    p, q = jax.nn.softmax(teacher[0, 0] / t), jax.nn.softmax(student[0, 0] / t)
    np.testing.assert_allclose(loss(student), t**2 * jnp.sum(p * jnp.log(p / q)), rtol=1e-5)
    slopes = jax.grad(loss)(student)
    np.testing.assert_allclose(slopes[0, 0], t * (q - p), rtol=1e-4)
    assert not slopes[1].any()
    assert float(loss(teacher)) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distillation_of_classes_that_are_ruled_out(dtype):
    teacher = jnp.array([[0.0, 1.0, -jnp.inf]], dtype)
    value, slopes = jax.value_and_grad(prunax.penalties.distillation)(
        jnp.array([[0.0, 1.0, 2.0]], dtype), teacher
    )
    assert value.dtype == jnp.float32 and np.isfinite(value) and value > 0
    assert np.isfinite(slopes).all()
    assert float(prunax.penalties.distillation(teacher, teacher)) == 0
    none = prunax.penalties.distillation(teacher, teacher, mask=jnp.array([False]))
    assert float(none) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 3)), jnp.ones((2, 4))), r"one shape, got \(2, 3\) and \(2, 4\)"),
        ((jnp.ones((2, 3)), jnp.ones((2, 3)), 0.0), "temperature must be positive"),
    ],
)
def test_bad_distillation(arguments, message):
    with pytest.raises(ValueError, match=message):
        prunax.penalties.distillation(*arguments)
    with pytest.raises(ValueError, match="mask must have"):
        prunax.penalties.distillation(jnp.ones((2, 3)), jnp.ones((2, 3)), mask=jnp.ones((3,), bool))
