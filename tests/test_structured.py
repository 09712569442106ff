"""Axis groups of many kinds of networks, and the functions made smaller by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import prunax
from prunax import structured
from prunax.reports import plots

# The groups whose removal is more than their absence, for each network.
CHANGED = {
    # The variance subtracts the mean from the removed features as well.
    "mixer": {8},
    "gpt": {8},
    "scanned": {8},
    # Without its logit the other experts' shares grow.
    "soft_moe": {4},
    # Nor would the router send tokens elsewhere.
    "moe": {4},
}

pytestmark = pytest.mark.relaxed_promotion


@functools.cache
def network(name: str):
    fn, params, args, text = zoo.NETWORKS[name]()
    return jax.jit(fn), params, args, text, structured.axis_groups(fn, params, *args)


def masked(params, keep):
    """The params at full size, with zeros wherever removed units lie."""
    leaves = dict(zip(prunax.trees.paths(params), jax.tree.leaves(params), strict=True))
    for group, units in keep.items():
        gone = np.setdiff1d(np.arange(group.size), units)
        for path, axis, position, _ in group.members:
            at = (slice(None),) * axis + (position.indices(group.size)[gone].ravel(),)
            leaves[path] = leaves[path].copy()
            leaves[path][at] = 0.0
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def some_units(groups, seed):
    """Random units of every group, at least one of each."""
    rng = np.random.default_rng(seed)
    counts = [rng.integers(1, group.size + 1) for group in groups]
    return {g: rng.permutation(g.size)[:n] for g, n in zip(groups, counts, strict=True)}


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_groups_are_those_written_by_hand(name):
    *_, text, groups = network(name)
    assert zoo.found(groups) == zoo.expected(text)


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_says_which_groups_change_the_rest(name):
    *_, groups = network(name)
    changed = {g.size for g in groups if not g.frozen and not g.preserved}
    assert changed == CHANGED.get(name, set())


@pytest.mark.parametrize("name", zoo.NETWORKS)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_smaller_function_equals_masked_one(name, seed):
    fn, params, args, _, groups = network(name)
    keep = some_units([g for g in groups if not g.frozen and g.preserved], seed)
    small = structured.shrink_function(fn, keep)(structured.shrink(params, keep), *args)
    for ours, whole in zip(
        jax.tree.leaves(small), jax.tree.leaves(fn(masked(params, keep), *args)), strict=True
    ):
        assert ours.dtype == whole.dtype
        np.testing.assert_allclose(ours, whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CHANGED)
def test_smaller_function_of_other_groups(name):
    fn, params, args, _, groups = network(name)
    keep = some_units([g for g in groups if not g.frozen and not g.preserved], 0)
    keep = {g: units[: g.size // 2] for g, units in keep.items()}
    small = structured.shrink_function(fn, keep)(structured.shrink(params, keep), *args)
    whole = fn(masked(params, keep), *args)
    different = False
    for ours, theirs in zip(jax.tree.leaves(small), jax.tree.leaves(whole), strict=True):
        assert ours.shape == theirs.shape
        assert jnp.isfinite(ours).all()
        different |= not np.allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    assert different, "these groups are preserved, contrary to what they say"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own
def test_picture_of_groups():
    *_, groups = network("gpt")
    figure = plots.groups(groups)
    (axes,) = figure.axes
    rows = [text.get_text() for text in axes.get_yticklabels()]
    assert rows[:3] == ["fc[0]", "fc[1]", "head[0]"]
    # A square for each leaf axis of each group; three more, of no width, are the legend's.
    squares = {(m.path, m.axis, i) for i, group in enumerate(groups) for m in group.members}
    assert sum(patch.get_width() > 0 for patch in axes.patches) == len(squares)
    # The value heads start at 16 of the fused projection.
    assert "16" in [text.get_text() for text in axes.texts]
    with pytest.raises(ValueError, match="no groups to draw"):
        plots.groups([])
