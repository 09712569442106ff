"""`prunax.prune` around optimizers with a form of their own: labelled, masked, frozen, with copies of the params."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import prunax
from prunax import schedules, transforms

pytestmark = pytest.mark.relaxed_promotion  # optax's optimizers mix dtypes

PARAMS = {
    "body": {"kernel": jax.random.normal(jax.random.key(0), (6, 8)), "bias": jnp.ones(8)},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (8, 4)), "bias": jnp.ones(4)},
}
LABELS = {"body": "freeze", "head": "train"}
BACK_AND_FORTH = schedules.alternating(0.75, 0, 6, compressed_steps=2, dense_steps=3)


def loss(params):
    return sum(jnp.sum((p - 2.0) ** 2) for p in jax.tree.leaves(params))


GRADIENT = jax.grad(loss)


def run(tx, steps=8, params=PARAMS, gradient=GRADIENT):
    """Train in one compiled loop: params and states after each step."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    history = jax.jit(lambda params, state: jax.lax.scan(step, (params, state), length=steps)[1])(
        params, tx.init(params)
    )
    return [jax.tree.map(lambda x, t=t: np.asarray(x[t]), history) for t in range(steps)]


def labels(params):
    return {name: "a" if name == "body" else "b" for name in params}


INNER = {
    "label function": optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, labels),
    "masked": optax.chain(
        optax.sgd(0.05), optax.masked(optax.trace(0.5), lambda p: {"body": True, "head": False})
    ),
    "sm3": optax.sm3(0.1),
    "rprop": optax.rprop(0.1),
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),
    "dog": optax.contrib.dog(1.0),
    "flags": optax.inject_hyperparams(optax.adagrad)(learning_rate=0.1),
}


@pytest.mark.parametrize("name", INNER)
def test_zeros_are_exact_and_what_comes_back_moves(name):
    history = run(prunax.prune(INNER[name], BACK_AND_FORTH))
    for part in ("body", "head"):
        kernels = [params[part]["kernel"] for params, _ in history]
        masks = [state.masks[part]["kernel"] for _, state in history]
        for kernel, mask in zip(kernels, masks, strict=True):
            assert (kernel[~mask] == 0).all() and np.isfinite(kernel).all()
        assert [(~m).sum() / m.size for m in masks] == [0.75, 0.75, 0, 0, 0, 0.75, 0.75, 0.75]
        grown = masks[2] & ~masks[1]
        assert (kernels[2][grown] == 0).all()
        assert (kernels[4][grown] != 0).all()  # Rprop moves by what it found a step before


def test_weights_that_come_back_start_as_the_optimizer_starts():
    # By hand: a step size of rprop begins at the learning rate, an accumulator of Adagrad at its initial value.
    for inner, first in ((optax.rprop(0.3), 0.3), (optax.adagrad(0.1, 0.7), 0.7)):
        history = run(prunax.prune(inner, BACK_AND_FORTH), steps=3)
        (_, before), (_, after) = history[1:]
        grown = after.masks["head"]["kernel"] & ~before.masks["head"]["kernel"]
        state = after.inner_state[0]
        kept = state.step_sizes if hasattr(state, "step_sizes") else state.sum_of_squares
        assert grown.sum() == 24
        np.testing.assert_allclose(kept["head"]["kernel"][grown], first)
        assert not np.isclose(kept["head"]["kernel"][before.masks["head"]["kernel"]], first).all()


FROZEN = {
    "partition": optax.partition({"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, LABELS),
    "masked": optax.chain(
        optax.adam(0.1), optax.masked(optax.set_to_zero(), {"body": True, "head": False})
    ),
    "label function": optax.multi_transform(
        {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, lambda params: LABELS
    ),
    "in MultiSteps": optax.MultiSteps(
        optax.partition({"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, LABELS), 2
    ).gradient_transformation(),
    "under apply_if_finite": optax.apply_if_finite(
        optax.partition({"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, LABELS), 3
    ),
    "scaled": optax.chain(
        optax.masked(optax.set_to_zero(), {"body": True, "head": False}), optax.scale(-0.1)
    ),
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("allocation", ["uniform", "global_ranking"])
def test_frozen_leaves_stay_whole(name, allocation):
    tx = prunax.prune(FROZEN[name], 0.5, allocation=getattr(prunax.allocation, allocation))
    params, state = run(tx, 4)[-1]
    assert state.masks["body"]["kernel"].shape == ()
    np.testing.assert_array_equal(params["body"]["kernel"], PARAMS["body"]["kernel"])
    assert (params["head"]["kernel"] == 0).sum() == 16


def test_frozen_leaves_are_no_part_of_dynamic_training():
    tx = transforms.rigl(FROZEN["partition"], 0.5, key=jax.random.key(0), every=2)
    params, _ = run(tx, 4)[-1]
    np.testing.assert_array_equal(params["body"]["kernel"], PARAMS["body"]["kernel"])
    assert (params["head"]["kernel"] == 0).sum() == 16


def test_an_optimizer_at_rest_freezes_nothing():
    params, _ = run(prunax.prune(optax.sgd(0.0), 0.5), 1)[-1]
    assert (params["body"]["kernel"] == 0).sum() == 24


def test_given_masks_hold_for_frozen_leaves_too():
    masks = prunax.compute_masks(PARAMS, 0.5)
    params, _ = run(transforms.fixed_masks(FROZEN["partition"], masks), 1)[-1]
    assert (params["body"]["kernel"] == 0).sum() == 24


def test_copies_of_the_params_in_the_state_are_sparse():
    inner = optax.contrib.schedule_free_adamw(0.1)
    for tx in (
        prunax.prune(inner, schedules.one_shot(0.75, 3)),
        transforms.fixed_masks(inner, prunax.compute_masks(PARAMS, 0.75)),
    ):
        params, state = run(tx, 8)[-1]
        evaluated = optax.contrib.schedule_free_eval_params(state.inner_state, params)
        mask = state.masks["body"]["kernel"]
        assert (np.asarray(evaluated["body"]["kernel"])[~mask] == 0).all()
        assert (np.asarray(evaluated["body"]["kernel"])[mask] != 0).all()
        np.testing.assert_array_equal(state.inner_state.z["body"]["kernel"] != 0, mask)


def test_moments_that_begin_equal_to_params_are_no_copies():
    # All zeros, as Adam's moments are: only what init hands on counts.
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = prunax.prune(optax.adam(0.1), schedules.one_shot(0.75, 3), mask_gradients=False)
    _, state = run(tx, 5, zeros)[-1]
    assert (state.inner_state[0].mu["body"]["kernel"] != 0).all()


def test_lookahead():
    params = optax.LookaheadParams.init_synced(PARAMS)
    inner = optax.lookahead(optax.adam(0.1), sync_period=3, slow_step_size=0.5)
    tx = prunax.prune(inner, BACK_AND_FORTH, packed=True)
    history = run(tx, 8, params, lambda params: jax.grad(loss)(params.fast))
    for params, state in history:
        masks = prunax.get_masks(jax.tree.map(jnp.asarray, state), params)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        for copy, mask in zip(params, masks, strict=True):
            assert (copy["body"]["kernel"][~mask["body"]["kernel"]] == 0).all()
    assert (params.slow["head"]["kernel"] == 0).sum() == 24
    assert (params.fast["head"]["kernel"] == 0).sum() == 24


@pytest.mark.parametrize(
    "score", [prunax.scores.magnitude, prunax.scores.ema(prunax.scores.saliency, 0.5)]
)
@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_leaves_without_gradients_are_left_alone(hole, score):
    tx = prunax.prune(optax.sgd(0.1), 0.5, score=score)
    grads = jax.grad(loss)(PARAMS)
    for holed in ({**grads, "body": hole}, {**grads, "body": {"kernel": hole, "bias": hole}}):
        updates, state = jax.jit(tx.update)(holed, tx.init(PARAMS), PARAMS)
        assert not jax.tree.leaves(updates["body"])
        head = PARAMS["head"]["kernel"] + updates["head"]["kernel"]
        assert (head == 0).sum() == 16
        assert state.masks["body"]["kernel"].all() and state.masks["body"]["kernel"].ndim == 2
        _, state = jax.jit(tx.update)(grads, state, PARAMS)
        assert int(state.count) == 2


def test_what_the_inner_optimizer_cannot_update_is_named():
    grads = {**GRADIENT(PARAMS), "body": None}
    for inner in (optax.adam(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))):
        tx = prunax.prune(inner, 0.5)
        with pytest.raises(
            ValueError, match=r"^prune: .*'body/bias', which has no gradient.*masked"
        ):
            tx.update(grads, tx.init(PARAMS), PARAMS)
    tx = prunax.prune(optax.masked(optax.adam(0.1), {"body": False, "head": True}), 0.5)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert (PARAMS["head"]["kernel"] + updates["head"]["kernel"] == 0).sum() == 16

    quantised = {**PARAMS, "codes": {"kernel": jnp.ones((4, 4), jnp.int4)}}
    tx = prunax.prune(optax.adam(0.1), 0.5)
    with pytest.raises(ValueError, match=r"^prune: .*'codes/kernel' \(int4\).*set_to_zero"):
        tx.update(quantised, tx.init(quantised), quantised)
    labels = {"body": "train", "head": "train", "codes": "freeze"}
    tx = prunax.prune(
        optax.partition({"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, labels), 0.5
    )
    updates, _ = tx.update(quantised, tx.init(quantised), quantised)
    assert (PARAMS["head"]["kernel"] + updates["head"]["kernel"] == 0).sum() == 16


def test_moments_of_partial_states_are_found():
    # optax.masked leaves holes in the state; what stands beside them is still one number for each weight.
    tx = prunax.prune(INNER["masked"], BACK_AND_FORTH)
    (_, before), (_, after) = run(tx, 3)[1:]
    grown = after.masks["body"]["kernel"] & ~before.masks["body"]["kernel"]
    trace = after.inner_state[1].inner_state.trace["body"]["kernel"]
    assert (trace[grown] == 0).all() and (trace[before.masks["body"]["kernel"]] != 0).all()


# What is said


@pytest.mark.parametrize(
    ("params", "where", "reason"),
    [
        (
            PARAMS,
            lambda path, leaf: "kernal" in path,
            r"'body/kernel' .*float32.*left out by `where`",
        ),
        (
            {"kernel": jnp.ones((4, 4), jnp.int8)},
            None,
            r"'kernel' \(int8, \(4, 4\)\): not floating-point",
        ),
        ({"scale": jnp.ones(3)}, None, r"'scale' .* less than two axes"),
    ],
)
def test_nothing_to_prune_is_said(params, where, reason):
    options = {} if where is None else {"where": where}
    makers = (
        functools.partial(prunax.prune, sparsity=0.5),
        functools.partial(transforms.rigl, sparsity=0.5, key=jax.random.key(0)),
        functools.partial(transforms.admm, sparsity=0.5, penalty=0.1, end_step=3),
        functools.partial(transforms.proximal_l1, threshold=0.1),
    )
    for make in makers:
        with pytest.warns(UserWarning, match=rf"nothing will be pruned.*{reason}"):
            make(optax.sgd(0.1), **options).init(params)


def test_a_wholly_frozen_model_is_said():
    with pytest.warns(UserWarning, match=r"'body/kernel' .*the optimizer never moves it"):
        prunax.prune(optax.set_to_zero(), 0.5).init(PARAMS)


def test_placeholders_and_parts_are_silent():
    tx = prunax.prune(optax.adam(0.1), 0.5)
    optax.tree.map_params(tx, lambda leaf: leaf, tx.init(PARAMS))
    tx.init({})
    tx.init({"body": optax.MaskedNode(), "bias": jnp.ones(3)})
    optax.partition(
        {"sparse": tx, "dense": prunax.prune(optax.sgd(0.1), 0.5)},
        {"body": "sparse", "head": {"kernel": "sparse", "bias": "dense"}},
    ).init(PARAMS)


def test_weights_that_are_no_numbers_are_said():
    broken = jax.tree.map(jnp.array, PARAMS)
    broken["head"]["kernel"] = broken["head"]["kernel"].at[0, 1].set(jnp.inf).at[1, 1].set(jnp.nan)
    with pytest.warns(
        UserWarning, match=r"prune: weights of 'head/kernel' \(2 of 32\).*apply_masks"
    ):
        prunax.prune(optax.sgd(0.1), 0.5).init(broken)
    masks = jax.tree.map(lambda p: jnp.isfinite(p), broken)
    tx = transforms.fixed_masks(optax.sgd(0.1), masks)
    with pytest.warns(
        UserWarning, match=r"fixed_masks: pruned weights of 'head/kernel' \(2 of 32\)"
    ):
        tx.init(broken)
    mended = prunax.apply_masks(broken, masks)
    state = tx.init(mended)
    updates, _ = tx.update(mended, state, mended)
    assert (
        optax.apply_updates(mended, updates)["head"]["kernel"][~masks["head"]["kernel"]] == 0
    ).all()


# A scalar score means that a leaf is never pruned


def spare_the_body(score):
    def spared(params, grads):
        return {**score(params, grads), "body": {"kernel": jnp.zeros(()), "bias": jnp.zeros(())}}

    return spared


@pytest.mark.parametrize("allocation", ["uniform", "global_ranking"])
def test_scalar_scores_spare_a_leaf_wherever_scores_are_ranked(allocation):
    magnitude = spare_the_body(prunax.scores.magnitude)
    options = {"allocation": getattr(prunax.allocation, allocation)}
    for tx in (
        prunax.prune(optax.sgd(0.1), 0.5, score=magnitude, **options),
        transforms.rigl(
            optax.sgd(0.1), 0.5, key=jax.random.key(0), every=2, drop=magnitude, **options
        ),
        transforms.dynamic_sparse(
            optax.sgd(0.1),
            0.5,
            key=jax.random.key(0),
            every=2,
            grow=spare_the_body(prunax.scores.gradient),
            **options,
        ),
        transforms.admm(
            optax.sgd(0.1), 0.5, penalty=0.1, end_step=3, every=1, score=magnitude, **options
        ),
    ):
        history = run(tx, 5)
        for params, _ in history:
            assert (params["body"]["kernel"] != 0).all()
        assert (~history[-1][1].masks["head"]["kernel"]).sum() == 16
    sparse = history[0][1].inner_state[0].sparse  # ADMM's projection at the first step
    assert (sparse["body"]["kernel"] != 0).all() and (sparse["head"]["kernel"] == 0).sum() == 16
