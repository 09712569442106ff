"""Gates of units: exact when open, removal when shut, a gradient in between."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from test_structured import CHANGED, network

import prunax
from prunax import structured

pytestmark = pytest.mark.relaxed_promotion


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_open_gates_change_nothing_and_shut_ones_remove(name):
    fn, params, args, _, groups = network(name)
    free = [g for g in groups if not g.frozen and (g.preserved or name not in CHANGED)]
    gates = structured.gates(free)
    assert {n: gate.shape for n, gate in gates.items()} == {g.name: (g.size,) for g in free}
    chex.assert_trees_all_equal(structured.apply_gates(params, free, gates), params)
    if name in CHANGED:
        return
    keep = {g: np.arange(0, g.size, 2) for g in free}
    shut = {g.name: gates[g.name] * (np.arange(g.size) % 2 == 0) for g in free}
    gated = fn(structured.apply_gates(params, free, shut), *args)
    small = structured.shrink_function(fn, keep)(structured.shrink(params, keep), *args)
    chex.assert_trees_all_close(gated, small, rtol=2e-4, atol=2e-5)


PARAMS = {"up": zoo.normal(0, 5, 4), "bias": zoo.normal(1, 4), "down": zoo.normal(2, 4, 3)}
BATCHES = [(zoo.normal(3, 6, 5), zoo.normal(4, 6, 3)), (zoo.normal(5, 2, 5), zoo.normal(6, 2, 3))]


def network_of_gates(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def loss_fn(p, batch):
    x, y = batch
    return jnp.mean((network_of_gates(p, x) - y) ** 2)


def by_hand(batches):
    """The derivative of the loss by gates on the hidden activations, written out in numpy."""
    gradients = []
    for x, y in batches:
        hidden = np.tanh(x @ PARAMS["up"] + PARAMS["bias"])
        error = hidden @ PARAMS["down"] - y
        gradients.append((2 / y.size * (error @ PARAMS["down"].T) * hidden).sum(0))
    return np.array(gradients)


@pytest.mark.parametrize("measure", [jnp.square, jnp.abs])
@pytest.mark.parametrize("per_example", [False, True])
def test_importance_is_the_published_formula(measure, per_example):
    groups = structured.axis_groups(network_of_gates, PARAMS, BATCHES[0][0])
    found = structured.gate_importance(
        loss_fn, PARAMS, iter(BATCHES), groups, measure=measure, per_example=per_example
    )
    batches = BATCHES
    if per_example:
        batches = [(x[i : i + 1], y[i : i + 1]) for x, y in BATCHES for i in range(len(x))]
    want = np.asarray(measure(by_hand(batches))).mean(0)
    np.testing.assert_allclose(found["up[1]"], want, rtol=1e-4)
    small = structured.prune_channels(
        network_of_gates, PARAMS, BATCHES[0][0], sparsity=0.5, scores=found
    )
    (units,) = small.keep.values()
    np.testing.assert_array_equal(units, np.sort(np.argsort(-want)[:2]))


def test_widths_are_tried_without_compiling_again():
    groups = structured.axis_groups(network_of_gates, PARAMS, BATCHES[0][0])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(width, x):
        gate = (jnp.arange(4) < width).astype(jnp.float32)
        return network_of_gates(structured.apply_gates(PARAMS, groups, {"up[1]": gate}), x)

    x = BATCHES[0][0]
    for width in (1, 3):
        want = np.tanh(x @ PARAMS["up"] + PARAMS["bias"])[:, :width] @ PARAMS["down"][:width]
        np.testing.assert_allclose(run(width, x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"up": np.ones(4)}, r"'up' is no group. The groups are: .*up\[1\]"),
        ({"up[1]": np.ones(3)}, r"up\[1\] have shape \(3,\), expected \(4,\)"),
        ({"down[1]": np.ones(3)}, r"down\[1\] cannot shrink.*function's output"),
    ],
)
def test_wrong_gates_are_refused(gates, message):
    groups = structured.axis_groups(network_of_gates, PARAMS, BATCHES[0][0])
    with pytest.raises(ValueError, match=message):
        structured.apply_gates(PARAMS, groups, gates)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"up[1]": np.ones(3)}, r"scores of up\[1\] have shape \(3,\), expected \(4,\)"),
        ({"up[1]": np.ones(4), "up[2]": np.ones(4)}, r"names 'up\[2\]', which is no group"),
        ({"up[1]": np.full(4, np.nan)}, r"scores of up\[1\] contain NaN"),
    ],
)
def test_wrong_scores_of_units_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        structured.prune_channels(
            network_of_gates, PARAMS, BATCHES[0][0], sparsity=0.5, scores=scores
        )


def test_importance_without_data_or_gates():
    groups = structured.axis_groups(network_of_gates, PARAMS, BATCHES[0][0])
    with pytest.raises(ValueError, match="no batches"):
        structured.gate_importance(loss_fn, PARAMS, [], groups)
    frozen = [g for g in groups if g.frozen]
    with pytest.raises(ValueError, match="no gates"):
        structured.gate_importance(loss_fn, PARAMS, BATCHES, frozen)
    assert prunax.structured.gates(frozen) == {}
