"""One contract for `prunax.prune` around every optimizer of optax that has a place there.

The loss pulls every weight away from zero, so that whatever could revive a pruned weight would.
"""

import dataclasses
import functools

import chex
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import prunax
from prunax import schedules
from prunax.transforms import PruneState

# optax's own arithmetic does not hold out under strict promotion (Adam's bias correction, for one).
pytestmark = pytest.mark.relaxed_promotion

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.05),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "lion": optax.lion(0.02, weight_decay=0.1),
    "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=4),
    "rmsprop": optax.rmsprop(0.02, momentum=0.9),
    "adagrad": optax.adagrad(0.1),
    "lamb": optax.lamb(0.05, weight_decay=0.1),
    "muon": optax.contrib.muon(0.05, weight_decay=0.1),
    "clip and adam": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05)),
    "MultiSteps inside": optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
    "inject_hyperparams inside": optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(0.1, 0.01, 10), weight_decay=0.1
    ),
    "partition inside": optax.partition(
        {"decay": optax.adamw(0.05, weight_decay=0.1), "plain": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda p: "decay" if p.ndim > 1 else "plain", params),
    ),
    "apply_if_finite inside": optax.apply_if_finite(optax.adam(0.05), 3),
}


def around(inner):
    return lambda sparsity, **options: prunax.prune(inner, sparsity, **options)


def in_multi_steps(sparsity, **options):
    return optax.MultiSteps(
        prunax.prune(optax.adam(0.05), sparsity, **options), 2
    ).gradient_transformation()


def in_partition(sparsity, **options):
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                "dense" if prunax.trees.path_name(path).startswith("head") else "pruned"
            ),
            params,
        )

    pruned = prunax.prune(optax.adam(0.05), sparsity, **options)
    return optax.partition({"pruned": pruned, "dense": optax.sgd(0.1)}, labels)


def in_inject_hyperparams(sparsity, **options):
    make = optax.inject_hyperparams(
        lambda rate: prunax.prune(optax.adam(rate), sparsity, **options)
    )
    return make(rate=optax.linear_schedule(0.1, 0.01, 10))


def in_chain(sparsity, **options):
    return optax.chain(
        optax.clip_by_global_norm(0.5), prunax.prune(optax.adamw(0.05), sparsity, **options)
    )


TRANSFORMS = {name: around(inner) for name, inner in OPTIMIZERS.items()} | {
    "in MultiSteps": in_multi_steps,
    "in partition": in_partition,
    "in inject_hyperparams": in_inject_hyperparams,
    "in chain": in_chain,
}
PLAIN = {"packed": False, "mask_gradients": True}
STORAGE = [
    (name, {"packed": packed, "mask_gradients": mask_gradients})
    for name in TRANSFORMS
    for packed in (False, True)
    for mask_gradients in (True, False)
    # Both options for every optimizer; all four combinations for one.
    if packed != mask_gradients or name == "adamw"
]


@dataclasses.dataclass(frozen=True)
class ByStep:
    """A user's schedule: the sparsity that each step changes to, None where masks stay."""

    sparsities: tuple[float | None, ...]

    @property
    def target(self):
        return self.sparsities[-1]

    def __call__(self, step):
        return jnp.array([s or 0.0 for s in self.sparsities])[step]

    def is_update_step(self, step):
        return jnp.array([s is not None for s in self.sparsities])[step]


# Rises, falls to dense, rises again and stays.
UP_AND_DOWN = ByStep((None, 0.25, None, 0.6, 0.75, None, 0.0, None, None, 0.5, None, 0.75))
GRADUAL = schedules.polynomial(0.75, begin_step=1, end_step=6, every=2)
STEPS = len(UP_AND_DOWN.sparsities)


def make_params(dtype=jnp.float32):
    shapes = {
        "conv": {"kernel": (2, 2, 3, 4), "bias": (4,)},
        "dense": {"kernel": (7, 5), "bias": (5,)},
        "head": {"kernel": (5, 9), "bias": (9,)},
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(
        jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, leaves, strict=True)
    )


def loss(params, step):
    """Quadratic with its minimum away from zero, at a place that moves with the step."""
    target = 2.0 + jnp.sin(jnp.asarray(step, jnp.float32))
    return sum(jnp.sum(jnp.square(p.astype(jnp.float32) - target)) for p in jax.tree.leaves(params))


gradients = jax.jit(jax.grad(loss))


def take_step(tx, params, state, step):
    grads = jax.grad(loss)(params, step)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def trajectory(name, packed=False, mask_gradients=True):
    """Params and states after each step of UP_AND_DOWN, from one scan."""
    tx = TRANSFORMS[name](UP_AND_DOWN, packed=packed, mask_gradients=mask_gradients)
    params = make_params()

    def body(carry, step):
        carry = take_step(tx, *carry, step)
        return carry, carry

    scan = jax.jit(lambda p, s: jax.lax.scan(body, (p, s), jnp.arange(STEPS))[1])
    history = jax.tree.map(np.asarray, scan(params, tx.init(params)))
    return [jax.tree.map(lambda x, t=t: x[t], history) for t in range(STEPS)]


def prune_state(state):
    (found,) = [
        s
        for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, PruneState))
        if isinstance(s, PruneState)
    ]
    return found


def masked_kernels(params, state):
    """path -> (kernel, mask) of every leaf with a mask of its own."""
    paths, leaves = prunax.trees.paths(params), jax.tree.leaves(params)
    masks = jax.tree.leaves(masks_in(state, params))
    return {
        path: (np.asarray(leaf), np.asarray(mask))
        for path, leaf, mask in zip(paths, leaves, masks, strict=True)
        if np.ndim(mask)
    }


def masks_in(state, params):
    """The masks, unpacked; of shapes alone, so that nothing is said about pruned weights."""
    shapes = jax.eval_shape(lambda: params)
    return prunax.get_masks(jax.tree.map(jnp.asarray, state), shapes)


def expected_pruned(schedule, count, n):
    """What the schedule asks of a leaf of n weights after `count` updates, by its last mask update."""
    updates = [t for t in range(count) if schedule.is_update_step(t)]
    return round(round(float(schedule(updates[-1])), 6) * n) if updates else 0


@pytest.mark.parametrize(("name", "storage"), STORAGE)
def test_pruned_weights_are_exactly_zero_at_every_step(name, storage):
    largest = 0
    for params, state in trajectory(name, **storage):
        count = int(prune_state(state).count)
        kernels = masked_kernels(params, state)
        assert {"conv/kernel", "dense/kernel"} <= set(kernels)
        for path, (kernel, mask) in kernels.items():
            assert (kernel[~mask] == 0).all(), (path, count)
            assert not np.signbit(kernel[~mask]).any()
            assert (~mask).sum() == expected_pruned(UP_AND_DOWN, count, mask.size), (path, count)
            largest = max(largest, (~mask).sum() / mask.size)
    assert largest > 0.7
    if storage == PLAIN and "MultiSteps" not in name:
        check_that_what_is_kept_trains(trajectory(name))


def check_that_what_is_kept_trains(steps):
    for t in (4, STEPS - 1):
        before = masked_kernels(*steps[t - 1])
        for path, (kernel, mask) in masked_kernels(*steps[t]).items():
            assert (kernel == 0).sum() == round(0.75 * kernel.size)
            assert (kernel[mask] != before[path][0][mask]).all()
    for path, (kernel, mask) in masked_kernels(*steps[5]).items():
        dense, everything = masked_kernels(*steps[8])[path]
        assert everything.all()
        assert (kernel[~mask] == 0).all()
        assert (dense[~mask] != 0).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_compilation_stable_state_and_donation(name):
    tx = TRANSFORMS[name](GRADUAL, packed=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, t):
        return take_step(tx, params, state, t)

    params = make_params()
    state = tx.init(params)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    donated = jax.tree.leaves(state)
    for t in range(4):
        params, state = step(params, state, jnp.int32(t))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == described
    assert any(x.is_deleted() for x in donated)
    for path, (kernel, mask) in masked_kernels(params, state).items():
        assert (kernel[~mask] == 0).all(), path


@pytest.mark.parametrize("name", TRANSFORMS)
def test_jitted_init_has_what_init_has(name):
    tx = TRANSFORMS[name](0.5, packed=True)
    params = make_params()
    state, jitted = tx.init(params), jax.jit(tx.init)(params)
    chex.assert_trees_all_equal(state, jitted)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
    # Nothing in it is one buffer twice, so that it can be donated.
    jax.jit(lambda s: jax.tree.map(jnp.array, s), donate_argnums=0)(jitted)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparsity_zero_is_the_inner_optimizer_bit_for_bit(name):
    # Operation by operation: compiled, XLA rounds a product and a sum once or twice, as it happens to fuse them.
    def run(tx):
        params = make_params()
        state = tx.init(params)
        for t in range(3):
            updates, state = tx.update(gradients(params, t), state, params)
            params = optax.apply_updates(params, updates)
        return params

    chex.assert_trees_all_equal(run(OPTIMIZERS[name]), run(prunax.prune(OPTIMIZERS[name], 0.0)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_map_params_sees_what_it_sees_of_the_inner_optimizer(name):
    tx = TRANSFORMS[name](0.5)
    params = make_params()
    marked = optax.tree.map_params(
        tx, lambda leaf: "param", tx.init(params), transform_non_params=lambda leaf: "other"
    )
    state = prune_state(marked)
    assert (state.count, state.skipped_updates) == ("other", "other")
    masks = set(jax.tree.leaves(state.masks))
    assert masks == {"param"}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_missing_params(name):
    tx = TRANSFORMS[name](0.5)
    params = make_params()
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))


def test_missing_params_says_what_optax_says():
    params = make_params()

    def message(tx):
        with pytest.raises(ValueError, match="params") as error:
            tx.update(params, tx.init(params))
        return str(error.value)

    of_optax = message(optax.with_extra_args_support(optax.add_decayed_weights(0.1)))
    assert of_optax in message(prunax.prune(optax.sgd(0.1), 0.5))


@pytest.mark.parametrize("name", ["momentum", "adamw", "muon", "clip and adam"])
def test_jit_equals_eager(name):
    tx = TRANSFORMS[name](GRADUAL)
    eager, jitted = ((make_params(), tx.init(make_params())) for _ in range(2))
    step = jax.jit(functools.partial(take_step, tx))
    for t in range(3):
        eager, jitted = take_step(tx, *eager, t), step(*jitted, t)
        assert_same_masks(eager[1], jitted[1])
        chex.assert_trees_all_close(eager[0], jitted[0], rtol=1e-5, atol=1e-6)


def assert_same_masks(one, other):
    chex.assert_trees_all_equal(prune_state(one).masks, prune_state(other).masks)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "in MultiSteps"])
def test_vmap_over_seeds(name):
    tx = TRANSFORMS[name](0.7, packed=True)
    scales = jnp.array([1.0, 2.0, 3.0])
    many = jax.vmap(lambda s: jax.tree.map(lambda p: p + s * jnp.cos(s * p), make_params()))(scales)

    def run(params):
        def body(carry, step):
            return take_step(tx, *carry, step), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(3))[0]

    params, state = jax.jit(jax.vmap(run))(many)
    masks = []
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], (params, state))
        for path, (kernel, mask) in masked_kernels(*one).items():
            assert (kernel[~mask] == 0).all()
            assert (~mask).sum() == round(0.7 * mask.size)
            masks += [mask] if path == "dense/kernel" else []
    assert (masks[0] != masks[1]).any()


# Extra arguments


def test_extra_arguments_reach_the_inner_optimizer():
    tx = prunax.prune(optax.polyak_sgd(max_learning_rate=0.1), 0.5)
    params = make_params()
    state = tx.init(params)
    step = jax.jit(lambda p, s, value: tx.update(jax.grad(loss)(p, 0), s, p, value=value))
    for _ in range(3):
        updates, state = step(params, state, loss(params, 0))
        params = optax.apply_updates(params, updates)
    for kernel, mask in masked_kernels(params, state).values():
        assert (kernel[~mask] == 0).all()
    small, _ = step(params, state, 1e-6)
    large, _ = step(params, state, 1e6)
    assert optax.tree.norm(small) < optax.tree.norm(large)


def test_extra_arguments_reach_a_member_of_a_chain():
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    tx = prunax.prune(inner, 0.5)
    params = make_params()
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(6):
        _, state = tx.update(grads, state, params, value=jnp.float32(1.0))
    assert float(state.inner_state[1].scale) < 1.0


def test_inner_without_extra_arguments_ignores_them():
    tx = prunax.prune(optax.sgd(0.1), 0.5)
    params = make_params()
    tx.update(params, tx.init(params), params, value=1.0, batch=None)


# What the inner optimizer sees


def spy():
    """A transformation that passes updates on, with what it was given last as its state."""

    def update(updates, state, params=None):
        return updates, (updates, params)

    return optax.GradientTransformation(lambda params: (params, params), update)


@pytest.mark.parametrize("packed", [False, True])
def test_inner_sees_the_sparse_model(packed):
    tx = prunax.prune(spy(), 0.75, packed=packed)
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    masks = masks_in(state, params)
    seen_grads, seen_params = state.inner_state
    chex.assert_trees_all_equal(seen_grads, prunax.apply_masks(grads, masks))
    chex.assert_trees_all_equal(seen_params, prunax.apply_masks(params, masks))


def test_inner_sees_the_dense_model_on_request():
    tx = prunax.prune(spy(), 0.75, mask_gradients=False)
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(state.inner_state, (grads, params))


def test_global_norm_clipping_measures_the_sparse_gradients():
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    grads = {"kernel": jnp.array([[1000.0, 1000.0, 3.0, 4.0]])}
    tx = prunax.prune(optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(1.0)), 0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["kernel"].tolist() == [[-1.0, -2.0, -3.0, -4.0]]


def test_score_gets_the_dense_gradients():
    params = {"kernel": jnp.ones((1, 4))}
    grads = {"kernel": jnp.array([[4.0, 1.0, 3.0, 2.0]])}
    tx = prunax.prune(
        optax.sgd(0.0), schedules.constant(0.5, every=1), score=prunax.scores.gradient
    )
    _, state = tx.update(grads, tx.init(params), params)
    assert state.masks["kernel"].tolist() == [[True, False, True, False]]
    _, state = tx.update({"kernel": jnp.array([[1.0, 4.0, 2.0, 3.0]])}, state, params)
    assert state.masks["kernel"].tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    "name", ["adam", "momentum", "adafactor", "clip and adam", "muon", "partition inside"]
)
def test_moments_of_regrown_weights_start_anew(name):
    # Pruned at step 1 with moments from step 0, back at step 3: nothing of step 0 is left in them.
    tx = prunax.prune(
        OPTIMIZERS[name], schedules.alternating(0.8, 1, 7, compressed_steps=2, dense_steps=2)
    )
    params, state = make_params(), tx.init(make_params())
    step = jax.jit(functools.partial(take_step, tx))
    for t in range(3):
        params, state = step(params, state, t)
    mask = np.asarray(state.masks["dense"]["kernel"])
    zero_grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zero_grads, state, params)
    assert np.asarray(state.masks["dense"]["kernel"]).all()
    if name in ("muon", "adafactor"):  # whole-matrix updates: only the state itself tells
        moments = [x for x in jax.tree.leaves(state.inner_state) if x.shape == mask.shape]
        for moment in moments:
            assert (np.asarray(moment)[~mask] == 0).all()
    else:
        assert (np.asarray(updates["dense"]["kernel"])[~mask] == 0).all()
        assert (np.asarray(updates["dense"]["kernel"])[mask] != 0).all()


def test_random_scores_with_a_key_give_nested_masks():
    tx = prunax.prune(optax.sgd(0.1), GRADUAL, score=prunax.scores.random, key=jax.random.key(3))
    params, state = make_params(), tx.init(make_params())
    step = jax.jit(functools.partial(take_step, tx))
    before = None
    for t in range(STEPS):
        params, state = step(params, state, t)
        mask = np.asarray(state.masks["dense"]["kernel"])
        assert before is None or not (mask & ~before).any()
        before = mask
    assert (~before).sum() == round(0.75 * before.size)


@pytest.mark.parametrize(
    "score", [prunax.scores.gradient, prunax.scores.saliency, prunax.scores.fisher]
)
@pytest.mark.parametrize(
    "allocation",
    [
        prunax.allocation.uniform,
        prunax.allocation.global_ranking,
        prunax.allocation.erdos_renyi,
        prunax.allocation.lamp,
    ],
)
def test_scores_and_allocations_reach_the_overall_sparsity(score, allocation):
    tx = prunax.prune(optax.adam(0.05), 0.75, score=score, allocation=allocation)
    params, state = jax.jit(functools.partial(take_step, tx))(
        make_params(), tx.init(make_params()), 0
    )
    kernels = masked_kernels(params, state)
    pruned, total = (
        sum(f(m) for _, m in kernels.values()) for f in (lambda m: (~m).sum(), np.size)
    )
    slack = (
        0
        if allocation in (prunax.allocation.global_ranking, prunax.allocation.lamp)
        else len(kernels) / 2
    )
    assert abs(pruned - 0.75 * total) <= slack
    for kernel, mask in kernels.values():
        assert (kernel[~mask] == 0).all()


@pytest.mark.parametrize(
    "pattern",
    [
        prunax.patterns.NM(1, 2),
        prunax.patterns.NM(1, 3),
        prunax.patterns.ConstantFanIn(),
        prunax.patterns.Block((2, 2)),
        prunax.patterns.Channel(),
    ],
)
def test_patterns(pattern):
    where = lambda path, leaf: leaf.ndim == 2 and leaf.shape[0] == 6  # noqa: E731
    params = {
        "a": {"kernel": make_params()["dense"]["kernel"][:6]},
        "b": make_params()["head"]["kernel"],
    }
    target = pattern.implied_sparsity or 0.5
    schedule = schedules.polynomial(target, 0, 4, every=2)
    tx = prunax.prune(optax.adam(0.05), schedule, pattern=pattern, where=where, packed=True)
    state = tx.init(params)
    step = jax.jit(functools.partial(take_step, tx))
    for t in range(6):
        params, state = step(params, state, t)
    masks = masks_in(state, params)
    assert masks["b"].shape == ()
    kernel, mask = params["a"]["kernel"], masks["a"]["kernel"]
    assert (kernel[~mask] == 0).all()
    expected = prunax.compute_masks({"k": kernel}, target, pattern=pattern)["k"]
    assert int(mask.sum()) == int(expected.sum())


def test_none_is_what_the_pattern_fixes():
    tx = prunax.prune(optax.sgd(0.1), None, pattern=prunax.patterns.NM(1, 4))
    params = {"kernel": make_params()["head"]["kernel"][:4]}
    _, state = tx.update(params, tx.init(params), params)
    assert (state.masks["kernel"].sum(axis=0) == 1).all()


# Numbers


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.float16),
        (jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_exact_zeros_in_mixed_precision(name, params_dtype, grads_dtype):
    tx = prunax.prune(OPTIMIZERS[name], GRADUAL, score=prunax.scores.saliency)
    params = make_params(params_dtype)
    state = tx.init(params)

    @jax.jit
    def step(params, state, t):
        grads = jax.tree.map(lambda g: g.astype(grads_dtype), jax.grad(loss)(params, t))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(8):
        params, state = step(params, state, t)
    for path, (kernel, mask) in masked_kernels(params, state).items():
        assert kernel.dtype == params_dtype, path
        assert (kernel[~mask] == 0).all()
        assert (~mask).sum() == round(0.75 * mask.size)


@pytest.mark.parametrize("packed", [False, True])
def test_nan_scores_skip_the_update_and_are_counted(packed):
    schedule = schedules.constant(0.5, every=1)
    tx = prunax.prune(optax.sgd(0.1), schedule, score=prunax.scores.gradient, packed=packed)
    params = make_params()
    state = tx.init(params)
    grads = jax.tree.map(lambda p: p + 1, params)
    broken = jax.tree.map(lambda p: p - 1, params)
    broken["dense"]["kernel"] = broken["dense"]["kernel"].at[0, 0].set(jnp.nan)
    update = jax.jit(tx.update)
    _, state = update(grads, state, params)
    before = state.masks
    assert int(state.skipped_updates) == 0
    for times in (1, 2):
        _, state = update(broken, state, params)
        assert int(state.skipped_updates) == times
        chex.assert_trees_all_equal(state.masks, before)
    _, state = update(jax.tree.map(lambda p: p - 1, params), state, params)
    assert int(state.skipped_updates) == 2
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, state.masks, before))


def test_nan_gradients_do_not_matter_where_masks_do_not_change():
    tx = prunax.prune(optax.sgd(0.1), 0.5)
    params = make_params()
    _, state = tx.update(params, tx.init(params), params)
    nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, state = tx.update(nan, state, params)
    assert int(state.skipped_updates) == 0
    for layer in params:
        mask = state.masks[layer]["kernel"]
        new = optax.apply_updates(params, updates)[layer]["kernel"]
        assert (new[~mask] == 0).all()


def test_target_is_exact_beyond_float32():
    n = 2**24 + 2**20 + 7
    params = {"kernel": jax.random.normal(jax.random.key(0), (1, n)).astype(jnp.bfloat16)}
    tx = prunax.prune(optax.sgd(0.1), schedules.polynomial(0.9, 0, 1, every=1), packed=True)
    state = tx.init(params)
    update = jax.jit(lambda p, s: tx.update(p, s, p)[1], donate_argnums=1)
    for _ in range(2):
        state = update(params, state)
    mask = masks_in(state, params)["kernel"]
    assert int(mask.sum()) == n - round(0.9 * n)


def test_nothing_to_prune():
    params = {"bias": jnp.ones(3), "scale": jnp.ones(())}
    for allocation in (
        prunax.allocation.uniform,
        prunax.allocation.erdos_renyi,
        prunax.allocation.lamp,
    ):
        tx = prunax.prune(optax.sgd(0.5), 0.5, allocation=allocation)
        with pytest.warns(UserWarning, match="nothing will be pruned"):
            state = tx.init(params)
        updates, state = tx.update(params, state, params)
        assert updates["bias"].tolist() == [-0.5, -0.5, -0.5]
        assert int(state.count) == 1


def test_leaves_without_gradients_and_arrays_of_other_kinds():
    params = {"kernel": make_params()["dense"]["kernel"], "nothing": None}
    tx = prunax.prune(optax.adam(0.1), 0.5)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["nothing"] is None
    assert int(state.masks["kernel"].sum()) == 35 - 18


def test_a_step_needs_one_selection_only_when_masks_change():
    # A user's schedule that never updates must leave everything dense.
    tx = prunax.prune(optax.sgd(0.1), schedules.one_shot(0.9, step=1000))
    params, state = make_params(), tx.init(make_params())
    for t in range(3):
        params, state = take_step(tx, params, state, t)
    assert all(mask.all() for _, mask in masked_kernels(params, state).values())


# Other homes


def test_in_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(6, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.out = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(self.norm(nnx.relu(self.hidden(x)))))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, prunax.prune(optax.adamw(0.01), GRADUAL), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
        optimizer.update(model, grads)

    for t in range(STEPS):
        step(model, optimizer, jax.random.normal(jax.random.key(t), (16, 6)))
        kernel = model.hidden.kernel[...]
        assert int((kernel == 0).sum()) == expected_pruned(GRADUAL, t + 1, kernel.size)
    assert int((model.out.kernel[...] == 0).sum()) == round(0.75 * 32)
    assert (model.norm.scale[...] != 0).all()


def test_in_flax_train_state():
    params = make_params()
    state = flax.training.train_state.TrainState.create(
        apply_fn=None, params=params, tx=prunax.prune(optax.adam(0.05), 0.5)
    )
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params, s.step)))
    for _ in range(3):
        state = step(state)
    for kernel, mask in masked_kernels(state.params, state.opt_state).values():
        assert (kernel[~mask] == 0).all()
        assert (kernel == 0).sum() == round(0.5 * kernel.size)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("adamw", False),
        ("adamw", True),
        ("muon", True),
        ("MultiSteps inside", False),
        ("in inject_hyperparams", True),
    ],
)
def test_checkpoint_restores_bit_for_bit_and_training_goes_on(name, packed, tmp_path):
    tx = TRANSFORMS[name](GRADUAL, packed=packed)
    step = jax.jit(functools.partial(take_step, tx))
    params, state = make_params(), tx.init(make_params())
    for t in range(4):
        params, state = step(params, state, t)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
        restored = checkpointer.restore(tmp_path / "state", like)
    chex.assert_trees_all_equal_structs(restored, (params, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, (params, state))
    chex.assert_trees_all_equal(restored, (params, state))
    for t in range(4, 8):
        params, state = step(params, state, t)
        restored = step(*restored, t)
    chex.assert_trees_all_equal(restored, (params, state))


def test_masks_of_packed_and_bool_states_agree():
    pairs = zip(trajectory("adamw"), trajectory("adamw", packed=True), strict=True)
    for (_, plain), (_, packed) in pairs:
        params = make_params()
        chex.assert_trees_all_equal(
            jax.tree.map(np.asarray, plain.masks),
            jax.tree.map(np.asarray, masks_in(packed, params)),
        )


# Bad input


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (80, ValueError, r"prune: sparsity must lie in \[0, 1\], got 80. Pass 0.8 for 80%"),
        (-0.1, ValueError, r"prune: sparsity must lie in \[0, 1\], got -0.1"),
        (float("nan"), ValueError, r"prune: sparsity must lie in \[0, 1\], got nan"),
        (None, TypeError, r"prune: sparsity must be a number in \[0, 1\], got None"),
        ("0.5", TypeError, r"prune: sparsity must be a number"),
        (optax.constant_schedule(0.5), TypeError, r"is_update_step.*See prunax.schedules"),
        (schedules.constant, TypeError, r"a schedule with `is_update_step`"),
    ],
)
def test_bad_sparsity(sparsity, error, message):
    with pytest.raises(error, match=message):
        prunax.prune(optax.sgd(0.1), sparsity)


def test_injected_sparsity_says_what_to_do():
    # A traced sparsity would lose the schedule's update steps: inject_hyperparams calls what is callable with the
    # count, and hands on a mere number.
    make = optax.inject_hyperparams(lambda rate, sparsity: prunax.prune(optax.sgd(rate), sparsity))
    tx = make(rate=0.1, sparsity=0.5)
    params = make_params()
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"prune: sparsity must be known.*static_args"):
        jax.jit(tx.update)(params, state, params)
    make = optax.inject_hyperparams(
        lambda rate, sparsity: prunax.prune(optax.sgd(rate), sparsity), static_args="sparsity"
    )
    tx = make(rate=0.1, sparsity=GRADUAL)
    params, state = jax.jit(functools.partial(take_step, tx))(params, tx.init(params), 0)
    assert int(prune_state(state).count) == 1


def test_pattern_that_does_not_fit_names_the_leaf():
    tx = prunax.prune(optax.sgd(0.1), None, pattern=prunax.patterns.NM(2, 4))
    params = make_params()
    with pytest.raises(
        ValueError, match=r"prune: NM.* does not fit 'conv/kernel' of shape \(2, 2, 3, 4\).*Leave"
    ):
        tx.update(params, tx.init(params), params)


def test_scores_of_another_shape_name_the_leaf():
    tx = prunax.prune(optax.sgd(0.1), 0.5, score=lambda params, grads: {"kernel": jnp.ones((3, 3))})
    params = {"kernel": jnp.ones((5, 7))}
    with pytest.raises(
        ValueError,
        match=r"prune: the scores of 'kernel' have shape \(3, 3\), the leaf has \(5, 7\)",
    ):
        tx.update(params, tx.init(params), params)


def test_scores_of_another_tree_name_the_leaf():
    tx = prunax.prune(optax.sgd(0.1), 0.5, score=lambda params, grads: {})
    params = {"kernel": jnp.ones((5, 7))}
    with pytest.raises(ValueError, match=r"prune: the scores must have .* 'kernel' is missing"):
        tx.update(params, tx.init(params), params)


def test_updates_of_another_tree_name_the_leaf():
    tx = prunax.prune(optax.sgd(0.1), 0.5)
    params = {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)}
    with pytest.raises(ValueError, match=r"prune: the updates must have .* 'bias' is missing"):
        tx.update({"kernel": jnp.ones((5, 7))}, tx.init(params), params)


def test_unknown_path_is_named():
    tx = prunax.prune(
        optax.sgd(0.1), 0.5, allocation=prunax.allocation.by_path({"dense/weight": 0.5})
    )
    params = make_params()
    with pytest.raises(ValueError, match=r"by_path: 'dense/weight' matches no prunable leaf"):
        tx.update(params, tx.init(params), params)


def test_an_optimizer_is_asked_for():
    with pytest.raises(
        TypeError, match=r"prune: inner must be an optax transformation, got <function sgd"
    ):
        prunax.prune(optax.sgd, 0.9)
