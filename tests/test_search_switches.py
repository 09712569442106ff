"""Branches and experts in a search: losses under switches are those of the networks without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_structured_depth import PLAIN, STACKED, X, block, plain
from test_structured_experts import E, P, one_hot
from test_structured_experts import X as TOKENS

import prunax
from prunax import search, structured

pytestmark = pytest.mark.relaxed_promotion

WANT = plain(PLAIN, X)


def scanned(p, x):
    return jax.lax.scan(lambda x, own: (block(own, x), None), x, p["layers"])[0] @ p["head"]


@pytest.mark.parametrize(("fn", "params"), [(plain, PLAIN), (scanned, STACKED)])
def test_losses_without_blocks(fn, params):
    glob = "layers/*" if fn is plain else "layers[[]*"
    loss_fn = lambda p: jnp.mean((fn(p, X) - WANT - 1) ** 2)  # noqa: E731
    structures = search.branches(fn, params, X, blocks=glob)
    assert structures.sizes == structures.limits == (1, 1, 1)
    size = structured.count_parameters(None, PLAIN["layers"][0])
    assert structures.unit_costs == (size,) * 3
    found = search.sensitivity(loss_fn, params, [1.0], structures=structures)
    for name, (loss,) in zip(found.names, found.losses, strict=True):
        small = structured.prune_depth(fn, params, X, remove=[name])
        want = jnp.mean((small.fn(small.params, X) - WANT - 1) ** 2)
        np.testing.assert_allclose(loss, want, rtol=1e-4)
    # Masks of what only a block uses: its leaves, or its rows.
    masked = prunax.apply_masks(params, structures.masks([0, 1, 0]))
    small = structured.prune_depth(fn, params, X, remove=[structures.names[1]])
    np.testing.assert_allclose(fn(masked, X), small.fn(small.params, X), rtol=1e-4, atol=1e-4)


def test_losses_without_experts():
    fn = lambda p, x: one_hot(p, x, 0.0)  # noqa: E731
    want = fn(P, TOKENS)
    loss_fn = lambda p: jnp.mean((fn(p, TOKENS) - want - 1) ** 2)  # noqa: E731
    groups = structured.axis_groups(fn, P, TOKENS)
    structures = search.experts(fn, P, TOKENS, groups=groups)
    assert (structures.names, structures.sizes, structures.limits) == (("router[1]",), (E,), (2,))
    assert structures.unit_costs == (structured.count_parameters(None, P) / E,)
    assert "router[1]" not in search.channels(groups, P).names
    found = search.sensitivity(loss_fn, P, [0.25, 0.5], structures=structures)
    for sparsity, loss in zip(found.sparsities, found.losses[0], strict=True):
        named = prunax.allocation.by_path({"router[1]": sparsity})
        small = structured.prune_channels(fn, P, TOKENS, allocation=named)
        exact = jnp.mean((small.fn(small.params, TOKENS) - want - 1) ** 2)
        np.testing.assert_allclose(loss, exact, rtol=1e-4)


def test_one_search_over_widths_experts_and_branches():
    params = {**PLAIN, "moe": P}

    def fn(p, x):
        x = plain({**p, "head": jnp.eye(x.shape[-1])}, x)
        tokens = x.reshape(-1, x.shape[-1])
        return (tokens + one_hot(p["moe"], tokens, 0.0)) @ p["head"]

    want = fn(params, X)
    loss_fn = lambda p: jnp.mean((fn(p, X) - want) ** 2)  # noqa: E731
    groups = structured.axis_groups(fn, params, X)
    widths = search.channels(groups, params)
    mixtures = search.experts(fn, params, X, groups=groups)
    depth = search.branches(fn, params, X, blocks="layers/*")
    structures = search.together(widths, mixtures, depth)
    found = search.allocate(loss_fn, params, 0.3, structures=structures, sparsities=[0.5, 1.0])
    assert found.sparsity >= 0.3
    assert {"greedy", "uniform", "global_ranking of part 0"} < set(found.start_losses)
    assert found.loss <= min(found.start_losses.values())
    shares = found.sparsities
    assert set(shares) == {*widths.names, *mixtures.names, *depth.names}
    named = {name: shares[name] for name in (*widths.names, *mixtures.names)}
    small = structured.prune_channels(fn, params, X, allocation=prunax.allocation.by_path(named))
    gone = [name for name in depth.names if shares[name]]
    if gone:
        small = structured.prune_depth(small.fn, small.params, X, remove=gone)
    exact = jnp.mean((small.fn(small.params, X) - want) ** 2)
    np.testing.assert_allclose(found.loss, exact, rtol=1e-3)
    with pytest.raises(ValueError, match="different names"):
        search.together(depth, depth)


def test_wrong_requests():
    with pytest.raises(ValueError, match=r"branches: blocks='\*/scale' matches a part"):
        search.branches(plain, PLAIN, X, blocks="*/scale")
    with pytest.raises(ValueError, match=r"saves 0\.0 of the cost"):
        search.branches(plain, PLAIN, X, cost=lambda fn, p, *args: 1.0)
    groups = structured.axis_groups(plain, PLAIN, X)
    with pytest.raises(ValueError, match="experts: no group is one of experts"):
        search.experts(plain, PLAIN, X, groups=groups)
    structures = search.branches(plain, PLAIN, X)
    with pytest.raises(ValueError, match="the loss has no residual branch 'layers/0/"):
        search.sensitivity(lambda p: p["head"].sum(), PLAIN, [1.0], structures=structures)
