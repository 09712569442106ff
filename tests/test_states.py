"""Masks out of every kind of optimizer state, values counted by hand."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import prunax

pytestmark = pytest.mark.relaxed_promotion  # optax.adam needs it

PARAMS = {
    "d": {"kernel": jnp.arange(1.0, 65.0).reshape(8, 8), "bias": jnp.ones(8)},
    "e": {"kernel": jnp.arange(1.0, 33.0).reshape(8, 4)},
}
LABELS = {"d": "sparse", "e": "dense"}


def half(packed: bool = False) -> optax.GradientTransformationExtraArgs:
    return prunax.prune(optax.adam(1e-2), 0.5, packed=packed)


def trained(tx, params, steps: int = 2):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def zeros(masks) -> dict[str, int]:
    named = zip(prunax.trees.paths(masks), jax.tree.leaves(masks), strict=True)
    return {path: int((~np.asarray(m)).sum()) for path, m in named if m.ndim}


BOTH = {"d/kernel": 32, "e/kernel": 16}
STATES = {
    "prune": (half(), BOTH),
    "packed": (half(packed=True), BOTH),
    "chain": (optax.chain(optax.clip(1.0), half()), BOTH),
    "MultiSteps": (optax.MultiSteps(half(packed=True), 2), BOTH),
    "apply_if_finite": (optax.apply_if_finite(half(), 3), BOTH),
    "inject_hyperparams": (
        optax.inject_hyperparams(lambda lr: prunax.prune(optax.sgd(lr), 0.5))(lr=0.1),
        BOTH,
    ),
    "multi_transform": (
        optax.multi_transform({"sparse": half(), "dense": optax.sgd(0.1)}, LABELS),
        {"d/kernel": 32},
    ),
    "several": (
        optax.multi_transform(
            {"sparse": half(), "dense": prunax.prune(optax.sgd(0.1), 0.25, packed=True)}, LABELS
        ),
        {"d/kernel": 32, "e/kernel": 8},
    ),
    "masked": (optax.masked(half(), {"d": False, "e": True}), {"e/kernel": 16}),
    "admm": (
        prunax.transforms.admm(optax.sgd(0.1), 0.5, penalty=0.1, end_step=1),
        {"d/kernel": 24, "e/kernel": 24},
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_masks_are_found(kind):
    tx, expected = STATES[kind]
    params, state = trained(tx, PARAMS)
    masks = prunax.get_masks(state, params)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert zeros(masks) == expected
    assert masks["d"]["bias"].shape == () and masks["d"]["bias"]
    summary = prunax.summarize(params, masks)
    assert summary.weights - summary.kept == sum(expected.values()) and not summary.warnings


def test_lookahead_has_masks_for_both_copies():
    params = optax.LookaheadParams.init_synced(PARAMS)
    tx = prunax.prune(optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5), 0.5)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, params)
    params = optax.apply_updates(params, updates)
    assert zeros(prunax.get_masks(state, params.fast)) == BOTH
    both = prunax.get_masks(state, params)
    assert zeros(both.fast) == BOTH and zeros(both.slow) == BOTH


def test_abstract_and_traced_params():
    params, state = trained(half(packed=True), PARAMS)
    shapes = jax.eval_shape(lambda: params)
    assert zeros(prunax.get_masks(state, shapes)) == BOTH
    assert zeros(jax.jit(prunax.get_masks)(state, params)) == BOTH


def test_states_without_their_types():
    """As a checkpoint restores them without a target."""
    params, state = trained(half(), PARAMS)
    plain = {"count": state.count, "masks": state.masks, "skipped_updates": state.skipped_updates}
    assert zeros(prunax.get_masks({"opt_state": [plain]}, flax.core.freeze(params))) == BOTH


@pytest.mark.parametrize("packed", [False, True])
def test_nnx_optimizer_and_train_state(packed):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, half(packed), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    params = nnx.state(model, nnx.Param)
    for state in (optimizer, optimizer.opt_state, nnx.state(optimizer)):
        masks = prunax.get_masks(state, params)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        assert zeros(masks) == {"kernel": 16}
    plain = nnx.to_pure_dict(params)
    assert zeros(prunax.get_masks(optimizer.opt_state, plain)) == {"kernel": 16}
    if not packed:
        assert prunax.summarize(params, optimizer.opt_state.masks).kept == 16

    state = TrainState.create(apply_fn=None, params=PARAMS, tx=half(packed))
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, PARAMS))
    assert zeros(prunax.get_masks(state, state.params)) == BOTH


def test_a_weight_is_kept_that_all_keep():
    tx = optax.chain(
        prunax.transforms.fixed_masks(optax.sgd(0.0), {"kernel": jnp.array([[True, False, True]])}),
        prunax.transforms.fixed_masks(optax.sgd(0.0), {"kernel": jnp.array([[True, True, False]])}),
    )
    params = {"kernel": jnp.zeros((1, 3))}
    masks = prunax.get_masks(tx.init(params), params)
    assert masks["kernel"].tolist() == [[True, False, False]]


def test_what_comes_after_prune_is_noticed():
    tx = optax.chain(half(), optax.add_decayed_weights(0.1))
    params, state = trained(tx, PARAMS)
    with pytest.warns(
        UserWarning, match=r"get_masks: 48 pruned weights are not zero: is prune the outermost"
    ):
        masks = prunax.get_masks(state, params)
    summary = prunax.summarize(params, masks)
    assert summary.not_zero == 48 and summary.to_dict()["not_zero"] == 48
    for text in (str(summary), summary._repr_html_()):
        assert "48 pruned weights are not zero: is prune the outermost transformation?" in text
    clean = prunax.summarize(prunax.apply_masks(params, masks), masks)
    assert clean.not_zero == 0 and clean.warnings == () and "outermost" not in str(clean)


def test_errors_say_what_was_found():
    params, state = trained(half(), PARAMS)
    with pytest.raises(ValueError, match=r"no masks in the state, .* ScaleByAdamState, EmptyState"):
        prunax.get_masks(optax.adam(1e-3).init(params), params)
    with pytest.raises(ValueError, match=r"no masks in the state, which holds a dict"):
        prunax.get_masks(params, params)
    with pytest.raises(ValueError, match=r"a mask for 'd/bias', which is not in the params"):
        prunax.get_masks(state, {"params": params})
    with pytest.raises(ValueError, match=r"'e/kernel' in the state has shape \(8, 4\), expected"):
        prunax.get_masks(state, params | {"e": {"kernel": jnp.ones((3, 4))}})
    with pytest.raises(TypeError, match=r"got bools only, as masks are"):
        prunax.get_masks(state, state.masks)
