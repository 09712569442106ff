"""Dynamic sparse training, proximal steps, ADMM, averaged scores and fixed masks, on real optimizers."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import prunax
from prunax import _counts, _masks, allocation, patterns, schedules, scores, transforms
from prunax.transforms._masked import plan_at

pytestmark = pytest.mark.relaxed_promotion  # optax's optimizers mix dtypes


def make_params():
    k1, k2 = jax.random.split(jax.random.key(0))
    return {
        "hidden": {"kernel": jax.random.normal(k1, (24, 32)), "bias": jnp.zeros(32)},
        "head": {"kernel": jax.random.normal(k2, (32, 8)), "bias": jnp.zeros(8)},
    }


X = jax.random.normal(jax.random.key(1), (64, 24))
Y = jnp.tanh(X[:, :8] - X[:, 8:16])


def loss_fn(params):
    hidden = jax.nn.relu(jnp.dot(X, params["hidden"]["kernel"]) + params["hidden"]["bias"][None])
    outputs = jnp.dot(hidden, params["head"]["kernel"]) + params["head"]["bias"][None]
    return jnp.mean((outputs - Y) ** 2)


def run(tx, steps, params=None):
    """Train, and yield params and state after each step."""
    params = make_params() if params is None else params
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        yield params, state
    assert step._cache_size() == 1


def masks_of(state):
    return optax.tree.get(state, "masks")


def kernels(tree):
    return [np.asarray(tree["hidden"]["kernel"]), np.asarray(tree["head"]["kernel"])]


METHODS = {
    "rigl": functools.partial(transforms.rigl, key=jax.random.key(2), every=3, end_step=20),
    "set": functools.partial(transforms.sparse_evolutionary, key=jax.random.key(2), every=3),
    "static": functools.partial(transforms.static_sparse, key=jax.random.key(2)),
}
OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lion": lambda: optax.lion(1e-3),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_number_of_active_weights_is_constant(method, optimizer):
    tx = METHODS[method](OPTIMIZERS[optimizer](), 0.8)
    leaves = [allocation.Leaf("hidden", (24, 32), 768), allocation.Leaf("head", (32, 8), 256)]
    pools = allocation.erdos_renyi(leaves, 0.8).pools
    expected = _counts.nums_pruned([p.sparsity for p in pools], [768, 256])
    assert abs(sum(expected) - 0.8 * 1024) <= 1
    seen = []
    for params, state in run(tx, 12):
        for kernel, mask, pruned in zip(
            kernels(params), kernels(masks_of(state)), expected, strict=True
        ):
            assert np.sum(~mask) == pruned
            assert np.all(kernel[~mask] == 0)
        seen.append(kernels(masks_of(state))[0])
    moved = any((a != b).any() for a, b in itertools.pairwise(seen))
    assert moved == (method != "static")


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_moments_at_grown_weights_are_zero(method):
    tx = METHODS[method](optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 0.8)
    before, grown_in_all = None, 0
    for params, state in run(tx, 12):
        after = kernels(masks_of(state))
        if before is not None:
            adam = optax.tree.get(state.inner_state, "mu"), optax.tree.get(state.inner_state, "nu")
            for i, (a, b) in enumerate(zip(after, before, strict=True)):
                grown = a & ~b
                grown_in_all += grown.sum()
                assert np.all(kernels(params)[i][grown] == 0)
                for moment in adam:
                    assert np.all(kernels(moment)[i][grown] == 0)
                    assert np.any(kernels(moment)[i][a & b] != 0)
        before = after
    assert grown_in_all > 0


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]])}
    grads = {"kernel": jnp.array([[9.0, 9.0, 9.0, 9.0, 1.0, 3.0, 2.0, 0.0]])}
    initial = {"kernel": jnp.array([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])}
    tx = transforms.rigl(
        optax.sgd(0.0),
        0.5,
        key=jax.random.key(0),
        grow=scores.gradient,
        initial=lambda p, g: initial,
        every=1,
        drop_fraction=lambda count: 0.5,
    )
    _, state = tx.update(grads, tx.init(params), params)
    assert state.masks["kernel"].tolist() == [[True] * 4 + [False] * 4]
    # Two of four go, 1 and 2; of what is inactive then, the dropped ones have the largest gradients and come back.
    _, again = tx.update(grads, state, params)
    assert again.masks["kernel"].tolist() == [[True] * 4 + [False] * 4]
    quiet = {"kernel": jnp.array([[0.0, 0.0, 9.0, 9.0, 1.0, 3.0, 2.0, 0.0]])}
    _, moved = tx.update(quiet, state, params)
    assert moved.masks["kernel"].tolist() == [[False, False, True, True, False, True, True, False]]


def test_rigl_grows_by_the_mean_gradient():
    # The batches disagree about the fifth weight, whose gradients are the largest, and agree about the sixth.
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]])}
    initial = {"kernel": jnp.array([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])}
    options = {"key": jax.random.key(0), "initial": lambda p, g: initial, "every": 2}
    options["drop_fraction"] = lambda count: 0.25

    def masks_after(tx):
        state = tx.init(params)
        for sign in (1.0, -1.0, 1.0):
            grads = {"kernel": jnp.array([[0.0, 0.0, 0.0, 0.0, 8.0 * sign, 5.0, 1.0, 0.0]])}
            _, state = tx.update(grads, state, params)
        return state

    of_mean = scores.ema_gradients(scores.deflated_gradient, 0.75)
    mean = masks_after(transforms.rigl(optax.sgd(0.0), 0.5, grow=of_mean, **options))
    batch = masks_after(transforms.rigl(optax.sgd(0.0), 0.5, grow=scores.gradient, **options))
    of_scores = scores.ema(scores.gradient, 0.75)
    sizes = masks_after(transforms.dynamic_sparse(optax.sgd(0.0), 0.5, grow=of_scores, **options))
    assert mean.averaged_scores["kernel"][0, 4:6].tolist() == [1.625, 2.890625]
    assert np.flatnonzero(mean.masks["kernel"]).tolist() == [1, 2, 3, 5]
    assert np.flatnonzero(batch.masks["kernel"]).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(sizes.masks["kernel"]).tolist() == [1, 2, 3, 4]
    assert batch.averaged_scores is None


def test_rigl_grows_pairs_that_belong_together():
    # One input and one unit have large gradients everywhere; a small one is all their own.
    large = jnp.ones((6, 5)).at[2].set(9.0).at[:, 3].multiply(9.0)
    grads = {"kernel": large.at[5, 0].add(20.0)}
    params = {"kernel": jnp.ones((6, 5))}
    first = {"kernel": jnp.zeros((6, 5)).at[0, 0].set(1.0)}
    options = {"key": jax.random.key(0), "initial": lambda p, g: first, "every": 1}
    options["drop_fraction"] = lambda count: 1.0
    grown = {}
    for name, more in {"ours": {}, "published": {"grow": scores.gradient}}.items():
        tx = transforms.rigl(optax.sgd(0.0), 29 / 30, **options, **more)
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params)
        grown[name] = np.argwhere(state.masks["kernel"]).tolist()
    assert grown == {"ours": [[5, 0]], "published": [[2, 3]]}


def test_a_mean_leaves_out_gradients_that_are_not_finite():
    score = scores.ema_gradients(scores.gradient, 0.5)
    tree = {"kernel": jnp.zeros(3), "steps": jnp.zeros((), jnp.int32)}
    memory = score.init(tree)
    for row in ([4.0, -4.0, 4.0], [-jnp.inf, jnp.nan, 2.0]):
        memory = score.update(memory, tree, {**tree, "kernel": jnp.array(row)})
    assert memory["kernel"].tolist() == [2.0, -2.0, 2.0]
    assert score.read(memory, tree)["kernel"].tolist() == [2.0, 2.0, 2.0]


def test_a_score_of_the_mean_may_call_others():
    def of_kernels(params, grads):
        found = scores.deflated_gradient(params, grads)
        return jax.tree.map(lambda s: s if s.ndim > 1 else jnp.zeros(()), found)

    score = scores.ema_gradients(of_kernels, 0.5)
    tree = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}
    memory = score.update(score.init(tree), tree, tree)
    assert memory["bias"].shape == ()
    halved = {"kernel": tree["kernel"] / 2, "bias": tree["bias"]}
    assert (score.read(memory, tree)["kernel"] == of_kernels(tree, halved)["kernel"]).all()


def test_only_growth_remembers():
    with pytest.raises(ValueError, match="only grow"):
        transforms.rigl(
            optax.sgd(0.1), 0.5, key=jax.random.key(0), drop=scores.ema(scores.magnitude, 0.9)
        )


def test_cosine_drop_fraction_ends():
    tx = transforms.sparse_evolutionary(
        optax.sgd(1e-2), 0.5, key=jax.random.key(0), every=2, end_step=6, drop_fraction=1.0
    )
    seen = [kernels(state.masks)[0] for _, state in run(tx, 10)]
    moved = [int((a != b).any()) for a, b in itertools.pairwise(seen)]
    assert moved == [0, 1, 0, 1, 0, 0, 0, 0, 0]  # at steps 2 and 4, not at 6 or later


@pytest.mark.parametrize(
    "pattern", [patterns.ConstantFanIn(), patterns.NM(1, 4), patterns.Block((4, 4))], ids=str
)
def test_dynamic_training_under_a_pattern(pattern):
    tx = transforms.rigl(
        optax.adam(1e-2),
        0.75,
        key=jax.random.key(3),
        every=2,
        drop_fraction=lambda count: (
            0.6
        ),  # of a lone active weight in a group, 0.3 would round to none
        pattern=pattern,
        allocation=allocation.uniform,
    )
    seen = []
    for params, state in run(tx, 7):
        seen.append(kernels(state.masks)[0])
        for kernel, mask in zip(kernels(params), kernels(state.masks), strict=True):
            assert np.all(kernel[~mask] == 0)
            if isinstance(pattern, patterns.ConstantFanIn):
                assert np.all(mask.sum(0) == mask.shape[0] // 4)
            elif isinstance(pattern, patterns.NM):
                assert np.all(mask.reshape(-1, 4, mask.shape[1]).sum(1) == 1)
            else:
                blocks = mask.reshape(mask.shape[0] // 4, 4, mask.shape[1] // 4, 4)
                assert np.all(blocks.all((1, 3)) == blocks.any((1, 3)))
                assert mask.mean() == 0.25
    assert any((a != b).any() for a, b in itertools.pairwise(seen))


def test_dynamic_training_over_all_leaves_at_once():
    tx = transforms.rigl(
        optax.adam(1e-2), 0.9, key=jax.random.key(3), every=2, allocation=allocation.global_ranking
    )
    for _, state in run(tx, 7):
        assert sum(mask.sum() for mask in kernels(state.masks)) == 1024 - round(0.9 * 1024)


def test_dynamic_training_refuses_rescaled_scores():
    tx = transforms.rigl(optax.adam(1e-2), 0.9, key=jax.random.key(3), allocation=allocation.lamp)
    with pytest.raises(ValueError, match=r"rescales scores.*erdos_renyi"):
        next(run(tx, 1))


def test_nan_gradient_keeps_the_masks_and_is_counted():
    tx = transforms.rigl(
        optax.adam(1e-2), 0.8, key=jax.random.key(2), every=1, grow=scores.gradient
    )
    params = make_params()
    _, state = tx.update(params, tx.init(params), params)
    bad = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), params)
    _, after = tx.update(bad, state, params)
    assert int(after.skipped_updates) == int(state.skipped_updates) + 1
    for a, b in zip(kernels(after.masks), kernels(state.masks), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("argument", [{"every": 0}, {"end_step": -1}, {"drop_fraction": 1.5}])
def test_bad_dynamic_arguments_are_named(argument):
    (name,) = argument
    for made in (transforms.rigl, transforms.sparse_evolutionary):
        with pytest.raises(ValueError, match=f"{made.__name__}: {name}"):
            made(optax.adam(1e-2), 0.9, key=jax.random.key(0), **argument)


@pytest.mark.parametrize("name", ["rigl", "sparse_evolutionary", "static_sparse"])
def test_errors_name_the_function_that_was_called(name):
    made, key = getattr(transforms, name), jax.random.key(0)
    with pytest.raises(ValueError, match=f"^{name}: sparsity must lie in"):
        made(optax.adam(1e-2), 1.9, key=key)
    with pytest.raises(TypeError, match=f"^{name}: got an unexpected keyword argument 'evry'"):
        made(optax.adam(1e-2), 0.9, key=key, evry=3)
    with pytest.raises(TypeError, match=rf"The optimizer comes first: {name}\(optax"):
        made(0.9, optax.adam(1e-2), key=key)


def test_proximal_l1_matches_iterated_soft_thresholding():
    tx = transforms.proximal_l1(optax.sgd(0.1), 0.02)
    before = make_params()
    for params, _ in run(tx, 5):
        grads = jax.grad(loss_fn)(before)

        def ista(path, w, g):
            v = w - 0.1 * g
            return v if path[-1].key == "bias" else np.sign(v) * np.maximum(np.abs(v) - 0.02, 0)

        expected = jax.tree_util.tree_map_with_path(ista, before, grads)
        for a, b in zip(kernels(params), kernels(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        before = params


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
def test_proximal_l1_lands_on_zero_and_threshold_reads_it(optimizer):
    tx = transforms.proximal_l1(OPTIMIZERS[optimizer](), 0.05)
    *_, (params, _) = run(tx, 40)
    masks = prunax.compute_masks(params, threshold=0.0)
    for kernel, mask in zip(kernels(params), kernels(masks), strict=True):
        assert np.array_equal(mask, kernel != 0)
        assert 0.2 < np.mean(kernel == 0) < 1.0


def test_proximal_group_lasso_zeros_whole_columns():
    tx = transforms.proximal_group_lasso(optax.adam(1e-2), optax.linear_schedule(0.0, 0.006, 20))
    start = make_params()
    start["hidden"]["kernel"] *= jnp.linspace(0.05, 1.0, 32)[None]
    *_, (params, _) = run(tx, 60, start)
    zero = kernels(params)[0] == 0
    assert np.array_equal(zero.all(0), zero.any(0))
    assert 0 < zero.all(0).sum() < zero.shape[1]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_proximal_l1_reaches_a_sparsity(optimizer):
    tx = transforms.proximal_l1(
        {"adam": optax.adam(1e-2), "sgd": optax.sgd(0.01)}[optimizer], sparsity=0.7, end_step=60
    )
    history = list(run(tx, 70))
    zeros = [sum((k == 0).sum() for k in kernels(params)) for params, _ in history]
    assert zeros[9] < zeros[29] < zeros[49] < zeros[59]
    assert zeros[59] == round(0.7 * 1024)
    assert 0.3 * 1024 < zeros[49] <= round(0.7 * 1024)  # on the way, and not at the last moment
    for params, state in history[60:]:
        expected = prunax.compute_masks(params, 0.7, allocation=allocation.global_ranking)
        assert sum((k == 0).sum() for k in kernels(params)) == round(0.7 * 1024)
        for mask, wanted in zip(kernels(state.masks), kernels(expected), strict=True):
            np.testing.assert_array_equal(mask, wanted)


def test_steered_shrinkage_by_hand():
    # 2 q / (T - t) with q = 2, T = 4: 1, then 2 (2 - 1) / 3, ... and q itself two steps before the end.
    params = {"kernel": jnp.array([[8.0, 2.0, 1.0, 8.0]])}
    tx = transforms.proximal_l1(optax.sgd(0.0), sparsity=0.5, end_step=4)
    state, seen = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params["kernel"][0, 1])
    np.testing.assert_allclose(seen, [1.0, 1 / 3, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(params["kernel"][0], [6.0, 0.0, 0.0, 6.0], atol=1e-6)
    assert state.masks["kernel"].tolist() == [[True, False, False, True]]


def test_proximal_group_lasso_reaches_a_sparsity():
    tx = transforms.proximal_group_lasso(optax.adam(1e-2), sparsity=0.5, end_step=40)
    *_, (params, state) = run(tx, 50)
    zero = [(k == 0) for k in kernels(params)]
    assert all((z.all(0) == z.any(0)).all() for z in zero)
    assert sum(z.all(0).sum() for z in zero) == 20  # of 32 and 8 columns
    assert int(state.count) == 50


def test_digits_are_read_after_shrinkage_to_a_sparsity():
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    k1, k2 = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"kernel": jax.random.normal(k1, (64, 64)) / 8},
        "head": {"kernel": jax.random.normal(k2, (64, 10)) / 8},
    }
    tx = transforms.proximal_l1(optax.adam(5e-3), sparsity=0.8, end_step=300)

    def logits(params, x):
        return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]

    def loss(params, rows):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x[rows]), y[rows])
        return losses.mean()

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, 1200)
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        params = optax.apply_updates(params, updates)
        zeros = sum(jnp.sum(k == 0) for k in jax.tree.leaves(params))
        return (params, state), zeros

    train = jax.jit(lambda *carry: jax.lax.scan(step, carry, jax.random.split(k1, 400)))
    (params, _), zeros = train(params, tx.init(params))
    wanted = round(0.8 * 74 * 64)
    assert 0.2 * wanted < zeros[100] < zeros[200] < zeros[298] <= wanted
    assert (zeros[299:] == wanted).all()
    assert (logits(params, x[1200:]).argmax(-1) == y[1200:]).mean() > 0.88


def test_a_run_to_a_sparsity_goes_on_from_its_state():
    tx = transforms.proximal_l1(optax.adam(1e-2), sparsity=0.7, end_step=20)
    *_, (params, state) = run(tx, 12)
    # As a checkpoint would: nothing but arrays.
    leaves, treedef = jax.tree.flatten((params, state))
    params, state = treedef.unflatten([jnp.asarray(np.asarray(x)) for x in leaves])
    for _ in range(9):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert sum((k == 0).sum() for k in kernels(params)) == round(0.7 * 1024)


@pytest.mark.parametrize(
    "arguments", [{}, {"threshold": 0.1, "sparsity": 0.5, "end_step": 5}, {"sparsity": 0.5}]
)
def test_proximal_takes_a_threshold_or_a_sparsity(arguments):
    with pytest.raises(ValueError, match=r"proximal_l1: pass either a threshold, or sparsity="):
        transforms.proximal_l1(optax.sgd(0.1), **arguments)


def test_proximal_steps_leave_frozen_leaves_alone():
    labels = {"hidden": "freeze", "head": "train"}
    inner = optax.partition({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)
    for tx, zeros in (
        (transforms.proximal_l1(inner, 0.5), None),
        (transforms.proximal_l1(inner, sparsity=0.5, end_step=3), 128),
        (transforms.admm(inner, 0.5, penalty=0.1, end_step=3, every=1), 128),
    ):
        *_, (params, _) = run(tx, 5)
        np.testing.assert_array_equal(kernels(params)[0], kernels(make_params())[0])
        assert zeros is None or (kernels(params)[1] == 0).sum() == zeros


def test_proximal_refuses_a_negative_threshold():
    with pytest.raises(ValueError, match=r"threshold.*-1"):
        transforms.proximal_l1(optax.sgd(0.1), -1.0)


def test_penalty_gradients():
    params = make_params()
    w = kernels(params)[0]
    l1 = jax.grad(prunax.penalties.l1)(params)
    l2 = jax.grad(prunax.penalties.l2)(params)
    np.testing.assert_array_equal(kernels(l1)[0], np.sign(w))
    np.testing.assert_allclose(kernels(l2)[0], w)
    assert not np.asarray(l1["hidden"]["bias"]).any()
    group = jax.grad(prunax.penalties.group_lasso)(params)
    np.testing.assert_allclose(
        kernels(group)[0], np.sqrt(24) * w / np.linalg.norm(w, axis=0), rtol=1e-5
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    assert all(np.isfinite(g).all() for g in kernels(jax.grad(prunax.penalties.group_lasso)(zero)))


def test_sr_ste_gradient_is_the_dense_one_plus_decay_of_pruned_weights():
    params = make_params()
    masks = prunax.compute_masks(params, pattern=patterns.NM(2, 4))

    def sr_ste(params):
        pruned = prunax.straight_through(params, masks)
        return loss_fn(pruned) + 0.1 * prunax.penalties.masked_l2(params, masks)

    dense_at_masked = jax.grad(loss_fn)(prunax.apply_masks(params, masks))
    for g, d, w, m in zip(
        *map(kernels, (jax.grad(sr_ste)(params), dense_at_masked, params, masks)), strict=True
    ):
        np.testing.assert_allclose(g, d + 0.1 * np.where(m, 0, w), atol=1e-6)


def test_admm_draws_weights_to_the_sparse_set_and_then_prunes():
    start = jax.tree.map(lambda p: 0.2 * p, make_params())
    tx = transforms.admm(optax.adam(1e-2), 0.8, penalty=0.3, end_step=200, every=5)
    history = list(run(tx, 210, start))

    def tail(params):
        """How much of the squared norm the smallest 80% of all weights hold."""
        w = np.sort(np.concatenate([k.ravel() for k in kernels(params)]) ** 2)
        return w[: round(0.8 * w.size)].sum() / w.sum()

    assert tail(history[198][0]) < 0.02 < tail(start)
    params, state = history[-1]
    assert sum((k == 0).sum() for k in kernels(params)) == round(0.8 * 1024)
    assert sum((~m).sum() for m in kernels(state.masks)) == round(0.8 * 1024)


def test_admm_projection_and_dual_by_hand():
    params = {"kernel": jnp.array([[4.0, 1.0]])}
    tx = transforms.admm(optax.sgd(1.0), 0.5, penalty=0.5, end_step=10, every=1)
    updates, state = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
    augmented = state.inner_state[0]
    assert augmented.sparse["kernel"].tolist() == [[4.0, 0.0]]
    assert augmented.dual["kernel"].tolist() == [[0.0, 1.0]]
    # x - z + u = [0, 1 - 0 + 1]; sgd steps by minus half of it.
    assert updates["kernel"].tolist() == [[0.0, -1.0]]


def test_averaged_scores_rank_by_the_average():
    params = {"kernel": jnp.array([[1.0, 1.0]])}
    schedule = schedules.one_shot(0.5, step=2)
    score = scores.ema(scores.saliency, 0.5)
    tx = prunax.prune(optax.sgd(0.0), schedule, score=score)
    state = tx.init(params)
    for g in ([8.0, 1.0], [8.0, 1.0], [0.0, 1.0]):  # the last step alone would keep the second
        _, state = tx.update({"kernel": jnp.array([g])}, state, params)
    assert state.averaged_scores["kernel"].tolist() == [[3.0, 0.875]]
    assert state.masks["kernel"].tolist() == [[True, False]]


def test_averaged_scores_leave_out_steps_that_are_not_finite():
    params = {"kernel": jnp.array([[1.0, 1.0]])}
    tx = prunax.prune(optax.sgd(0.0), 0.5, score=scores.ema(scores.saliency, 0.5))
    _, state = tx.update({"kernel": jnp.array([[jnp.nan, 1.0]])}, tx.init(params), params)
    assert state.averaged_scores["kernel"].tolist() == [[0.0, 0.5]]
    assert int(state.skipped_updates) == 0


def test_movement_keeps_what_moves_away_from_zero():
    score = scores.ema(scores.movement, 0.9)
    tx = prunax.prune(optax.adam(1e-2), schedules.one_shot(0.5, 20), score=score)
    *_, (params, state) = run(tx, 25)
    assert kernels(params)[0].size / 2 == (kernels(params)[0] == 0).sum()
    for mask, average in zip(kernels(state.masks), kernels(state.averaged_scores), strict=True):
        assert np.isfinite(average[mask]).all() and np.isneginf(average[~mask]).all()


def test_movement_lets_pruned_weights_stay_pruned():
    # A pruned weight is zero, and so would be its product with the gradient: above all that moves towards zero.
    score = scores.ema(scores.movement, 0.9)
    tx = prunax.prune(optax.adam(1e-2), schedules.polynomial(0.8, 5, 30, every=5), score=score)
    before = None
    for _, state in run(tx, 35):
        masks = kernels(state.masks)
        if before is not None:
            assert all(not (m & ~b).any() for m, b in zip(masks, before, strict=True))
        before = masks
    assert (before[0] == 0).sum() == round(0.8 * before[0].size)


def test_an_average_forgets_what_ranked_last():
    average = scores.ema(lambda params, grads: grads, 0.5)
    tree = {"kernel": jnp.zeros(3)}
    state = average.init(tree)
    for step in ([4.0, 4.0, 4.0], [-jnp.inf, jnp.inf, jnp.nan], [2.0, 2.0, 2.0]):
        state = average.update(state, tree, {"kernel": jnp.array(step)})
        if step[1] == jnp.inf:
            assert state["kernel"].tolist() == [-jnp.inf, 2.0, 2.0]
    assert state["kernel"].tolist() == [1.0, 2.0, 2.0]


def test_a_scalar_under_an_average_is_no_score_either():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    average = scores.ema(lambda params, grads: {"a": grads["a"], "b": jnp.zeros(())}, 0.5)
    tx = prunax.prune(optax.sgd(0.0), 0.5, score=average)
    _, state = tx.update(params, tx.init(params), params)
    assert state.masks["a"].sum() == 2 and state.masks["b"].all()


@pytest.mark.parametrize("packed", [False, True])
def test_fixed_masks(packed):
    params = make_params()
    masks = prunax.compute_masks(params, 0.7, scores=scores.random(params, key=jax.random.key(5)))
    tx = transforms.fixed_masks(optax.adamw(1e-2), masks, packed=packed)
    for trained, state in run(tx, 5, params):
        held = prunax.get_masks(state, jax.eval_shape(lambda: params))
        for kernel, mask, given in zip(*map(kernels, (trained, held, masks)), strict=True):
            assert np.array_equal(mask, given)
            assert np.array_equal(kernel == 0, ~given)


def test_fixed_masks_that_do_not_fit_are_refused():
    params = make_params()
    masks = prunax.compute_masks(params, 0.5)
    masks["head"]["kernel"] = jnp.ones((3, 3), bool)
    with pytest.raises(ValueError, match="head/kernel"):
        transforms.fixed_masks(optax.adam(1e-2), masks).init(params)
    with pytest.raises(ValueError, match="head"):
        transforms.fixed_masks(optax.adam(1e-2), {"hidden": masks["hidden"]}).init(params)


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(m, sparsity=0.8) for m in METHODS.values()),
        functools.partial(transforms.proximal_l1, threshold=0.01),
        functools.partial(transforms.proximal_group_lasso, threshold=0.01),
        functools.partial(transforms.admm, sparsity=0.8, penalty=0.1, end_step=5),
    ],
    ids=["rigl", "set", "static", "proximal_l1", "proximal_group_lasso", "admm"],
)
def test_every_transformation_keeps_optax_contracts(make):
    params = make_params()
    tx = make(optax.adam(1e-2))
    state = tx.init(params)
    grads = jax.grad(loss_fn)(params)
    updates, after = tx.update(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    doubled = optax.tree.map_params(tx, lambda x: x, after)
    assert jax.tree.structure(doubled) == jax.tree.structure(after)
    jitted, _ = jax.jit(tx.update)(grads, state, params)
    for a, b in zip(kernels(jitted), kernels(updates), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="params"):
        tx.update(grads, state)


@pytest.mark.parametrize("packed", [False, True])
def test_steps_without_an_update_copy_no_mask(packed):
    # Read off the compiled loop: neither its body nor the branch of the other steps copies an array of their shape.
    tx = prunax.prune(optax.adam(1e-2), schedules.polynomial(0.9, 2, 8, every=3), packed=packed)
    params = {"kernel": jax.random.normal(jax.random.key(0), (256, 192))}

    @jax.jit
    def train(params, state):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 10, step, (params, state))

    text = train.lower(params, tx.init(params)).compile().as_text()
    parts = re.split(r"\n\}\n", text)  # one computation each
    (body,) = [part for part in parts if " conditional(" in part]
    (branches,) = re.findall(r"branch_computations=\{(.*?)\}", body)
    keep = branches.split(",")[0].strip()  # of the predicate False
    (kept,) = [part for part in parts if re.search(rf"^{keep} ", part, re.MULTILINE)]
    shape = "u8[32,192]" if packed else "pred[256,192]"
    assert shape in body
    copies = [line for line in (body + kept).splitlines() if re.search(r"\bcopy\(", line)]
    assert not [line for line in copies if f"= {shape}" in line]


@pytest.mark.parametrize("choose", [allocation.uniform, allocation.erdos_renyi])
@pytest.mark.parametrize("target", [0.9, 1 / 3])
def test_the_target_is_exact_in_pools_beyond_float32(choose, target):
    leaves = [("a", (20_000, 10_000)), ("b", (3_000, 9_000))]  # shapes alone
    schedule = schedules.polynomial(target, 0, 10, every=5)
    pattern = patterns.Unstructured()
    budgets = jax.jit(lambda n: plan_at(schedule, n, leaves, choose, pattern).budgets)(10)
    wanted = _masks.plan(leaves, target, allocation=choose, pattern=pattern).budgets
    assert [(int(b.high) << 32) + int(b.low) for b in budgets] == wanted


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_not_kept_until_the_masks_are_known(packed):
    """One after the other is made and used up, as in a dense step: temporary memory is no copy of the params."""
    params = {f"layer_{i}": {"kernel": jnp.zeros((128, 128))} for i in range(24)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def temporary(tx):
        def loss(params):
            y = jnp.ones((8, 128))
            for layer in params.values():
                y = jnp.tanh(y @ layer["kernel"])
            return jnp.mean(y)

        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        given = params, jax.eval_shape(tx.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes / size

    adam = optax.adam(1e-3)
    masks = 0.25 * (1 / 8 if packed else 1)  # of four bytes a weight
    assert temporary(prunax.prune(adam, 0.9, packed=packed)) < temporary(adam) + masks + 0.1
