"""Allocations: against direct NumPy versions, and the traps of other libraries."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import prunax
from prunax import _counts, allocation
from prunax.allocation import Leaf


def leaves_of(*shapes):
    return [Leaf(f"layer{i}/kernel", shape, int(np.prod(shape))) for i, shape in enumerate(shapes)]


def nums_pruned(pools, leaves):
    sizes = [sum(leaves[i].num_units for i in pool.leaves) for pool in pools]
    return _counts.nums_pruned([pool.sparsity for pool in pools], sizes)


def params_of(**kernels):
    return {name: {"kernel": jnp.asarray(kernel, jnp.float32)} for name, kernel in kernels.items()}


def kept(masks):
    return {name: np.asarray(layer["kernel"]).astype(int).tolist() for name, layer in masks.items()}


def test_uniform_gives_each_leaf_its_own_budget():
    leaves = leaves_of((10, 10), (3, 5))
    pools = allocation.uniform(leaves, 0.9).pools
    assert [pool.leaves for pool in pools] == [(0,), (1,)]
    assert nums_pruned(pools, leaves) == [90, 14]


def test_global_ranking_has_one_budget():
    leaves = leaves_of((10, 10), (3, 5))
    (pool,) = allocation.global_ranking(leaves, 0.9).pools
    assert (pool.leaves, nums_pruned([pool], leaves)) == ((0, 1), [104])


def test_global_ranking_ranks_raw_scores():
    params = params_of(a=[[1.0, 2.0]], b=[[30.0, 40.0]])
    masks = prunax.compute_masks(params, 0.5, allocation=allocation.global_ranking)
    assert kept(masks) == {"a": [[0, 0]], "b": [[1, 1]]}


def test_normalisation_is_an_option():
    params = params_of(a=[[1.0, 2.0]], b=[[30.0, 40.0]])
    normalized = functools.partial(allocation.global_ranking, normalize=True)
    # In units of the root mean square: 0.63 1.26 and 0.85 1.13.
    assert kept(prunax.compute_masks(params, 0.25, allocation=normalized)) == {
        "a": [[0, 1]],
        "b": [[1, 1]],
    }
    assert kept(prunax.compute_masks(params, 0.75, allocation=normalized)) == {
        "a": [[0, 1]],
        "b": [[0, 0]],
    }


def test_normalisation_of_zeros_and_infinities():
    params = params_of(a=[[0.0, 0.0]], b=[[np.inf, 1.0]])
    normalized = functools.partial(allocation.global_ranking, normalize=True)
    assert kept(prunax.compute_masks(params, 0.5, allocation=normalized)) == {
        "a": [[0, 0]],
        "b": [[1, 1]],
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(
    "shapes",
    [
        [(784, 300), (300, 100), (100, 10)],
        [(3, 3, 1, 32), (3, 3, 32, 64), (1600, 10)],
        [(2, 2), (3, 3), (4, 4), (100, 100)],
        [(5, 1), (1, 1), (50, 50)],
        [(7, 7)],
    ],
)
def test_erdos_renyi_against_its_definition(shapes, sparsity):
    leaves = leaves_of(*shapes)
    pools = allocation.erdos_renyi(leaves, sparsity).pools
    budgets = nums_pruned(pools, leaves)
    expected = reference.erdos_renyi_sparsities(shapes, sparsity)
    assert [pool.leaves for pool in pools] == [(i,) for i in range(len(shapes))]
    for pool, k, s, shape in zip(pools, budgets, expected, shapes, strict=True):
        assert pool.sparsity == pytest.approx(float(s), abs=1e-9)
        assert abs(k - s * int(np.prod(shape))) <= Fraction(1, 2) + Fraction(1, 10**6)


def test_erdos_renyi_caps_small_layers_and_keeps_the_overall_sparsity():
    shapes = [(3, 3, 1, 32), (3, 3, 32, 64), (1600, 10)]
    leaves = leaves_of(*shapes)
    budgets = nums_pruned(allocation.erdos_renyi(leaves, 0.6).pools, leaves)
    assert budgets[0] == 0
    assert abs(sum(budgets) - 0.6 * sum(leaf.num_units for leaf in leaves)) <= 1.5
    densities = [1 - k / np.prod(s) for k, s in zip(budgets, shapes, strict=True)]
    raw = [sum(s) / np.prod(s) for s in shapes]
    assert densities[1] / densities[2] == pytest.approx(raw[1] / raw[2], rel=1e-2)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_erdos_renyi_of_a_traced_sparsity(sparsity):
    leaves = leaves_of((3, 3, 1, 32), (3, 3, 32, 64), (1600, 10))
    traced = jax.jit(lambda s: [p.sparsity for p in allocation.erdos_renyi(leaves, s).pools])(
        sparsity
    )
    concrete = [p.sparsity for p in allocation.erdos_renyi(leaves, sparsity).pools]
    np.testing.assert_allclose(np.array(traced), concrete, atol=1e-5)


def test_erdos_renyi_of_odd_leaves():
    assert allocation.erdos_renyi([], 0.5).pools == ()
    leaves = leaves_of((), (0, 4), (100, 100))
    scalar, empty, full = nums_pruned(allocation.erdos_renyi(leaves, 0.9).pools, leaves)
    assert (scalar, empty) == (0, 0)
    assert full == pytest.approx(9001, abs=1)


@given(
    shapes=st.lists(
        st.lists(st.integers(1, 30), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5
    ),
    sparsity=st.floats(0.01, 0.99),
)
def test_erdos_renyi_holds_the_overall_sparsity(shapes, sparsity):
    pools = allocation.erdos_renyi(leaves_of(*shapes), sparsity).pools
    total = sum(int(np.prod(shape)) for shape in shapes)
    assert (
        abs(
            sum(p.sparsity * np.prod(s) for p, s in zip(pools, shapes, strict=True)) / total
            - sparsity
        )
        < 1e-9
    )
    assert all(0 <= p.sparsity <= 1 for p in pools)


@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.1, 0.5, 0.8, 0.95]))
def test_lamp_against_its_definition(seed, sparsity):
    rng = np.random.default_rng(seed)
    values = {
        "a": rng.normal(size=(4, 5)),
        "b": 100 * rng.normal(size=(3, 6)),
        "c": 0.01 * rng.normal(size=(8, 2)),
    }
    values = {name: v.astype(np.float32) for name, v in values.items()}
    masks = prunax.compute_masks(params_of(**values), sparsity, allocation=allocation.lamp)
    expected = reference.masks([np.abs(v) for v in values.values()], sparsity, allocation="lamp")
    for name, mask in zip(values, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(masks[name]["kernel"]), mask)


def test_lamp_by_hand():
    # a: 1/14, 4/13, 1; b: 1/3, 1/2, 1 (ties: the last is summed alone).
    params = params_of(a=[[1.0, 2.0, 3.0]], b=[[5.0, 5.0, 5.0]])
    masks = [
        kept(prunax.compute_masks(params, k / 6, allocation=allocation.lamp)) for k in range(1, 5)
    ]
    assert masks[0] == {"a": [[0, 1, 1]], "b": [[1, 1, 1]]}
    assert masks[1] == {"a": [[0, 0, 1]], "b": [[1, 1, 1]]}
    assert masks[2] == {"a": [[0, 0, 1]], "b": [[1, 1, 0]]}
    assert masks[3] == {"a": [[0, 0, 1]], "b": [[1, 0, 0]]}


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_lamp_does_not_depend_on_the_scale_of_a_leaf(scale):
    base = np.array([[1.0, -2.0, 3.0, 4.0, 5.0, 6.0]], np.float32)
    params = params_of(a=base * np.float32(scale), b=np.array([[1.0, 1.5, 2.0, 2.5]]))
    masks = prunax.compute_masks(params, 0.6, allocation=allocation.lamp)
    plain = prunax.compute_masks(
        params_of(a=base, b=params["b"]["kernel"]), 0.6, allocation=allocation.lamp
    )
    assert kept(masks) == kept(plain)


def test_lamp_keeps_a_weight_of_every_leaf():
    params = params_of(a=np.full((1, 9), 1e-3), b=np.full((1, 9), 1e3), c=np.arange(9.0)[None])
    masks = kept(prunax.compute_masks(params, 24 / 27, allocation=allocation.lamp))
    assert {name: sum(mask[0]) for name, mask in masks.items()} == {"a": 1, "b": 1, "c": 1}


def test_by_path_takes_paths_and_globs_the_first_counts():
    params = params_of(body=np.ones((4, 5)), head=np.ones((2, 5)), other=np.ones((2, 5)))
    chosen = allocation.by_path({"head/kernel": 0.5, "*ead/*": 0.1, "b*": 0.25})
    masks = kept(prunax.compute_masks(params, 0.9, allocation=chosen))
    assert {name: np.sum(mask) for name, mask in masks.items()} == {
        "body": 15,
        "head": 5,
        "other": 1,
    }


def test_by_path_without_a_sparsity_keeps_the_others_whole():
    params = params_of(body=np.ones((4, 5)), head=np.ones((2, 5)))
    masks = kept(prunax.compute_masks(params, allocation=allocation.by_path({"head/*": 0.5})))
    assert {name: np.sum(mask) for name, mask in masks.items()} == {"body": 20, "head": 5}


@pytest.mark.parametrize(
    ("sparsities", "error", "message"),
    [
        (
            {"a": 80},
            ValueError,
            r"by_path: the sparsity of 'a' must lie in \[0, 1\], got 80. Pass 0.8",
        ),
        ({"a": float("nan")}, ValueError, r"by_path: the sparsity of 'a'"),
        ({"a": None}, TypeError, r"by_path: the sparsity of 'a' must be a number"),
    ],
)
def test_bad_sparsities_by_path(sparsities, error, message):
    with pytest.raises(error, match=message):
        allocation.by_path(sparsities)


def test_unknown_path():
    with pytest.raises(
        ValueError, match=r"'c/kernel' matches no prunable leaf. Prunable are: a/kernel.*`where`"
    ):
        prunax.compute_masks(
            params_of(a=np.ones((2, 2))), 0.5, allocation=allocation.by_path({"c/kernel": 0.5})
        )
