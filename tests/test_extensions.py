"""Choices that a user writes: how many lines each takes, and that it does what it says."""

import inspect

import chex
import extensions
import jax.numpy as jnp
import optax
import pytest

import prunax


@pytest.mark.parametrize(
    ("choice", "most"),
    [
        (extensions.relative, 2),
        (extensions.Pairs, 6),
        (extensions.largest_only, 4),
        (extensions.MeanContribution, 11),
    ],
)
def test_lines(choice, most):
    assert sum(bool(line.strip()) for line in inspect.getsource(choice).splitlines()) <= most


def test_score():
    params = {"a": {"kernel": jnp.array([[4.0, 1.0]])}, "b": {"kernel": jnp.array([[30.0, 20.0]])}}
    masks = {
        "a": {"kernel": jnp.array([[True, False]])},
        "b": {"kernel": jnp.array([[True, True]])},
    }
    options = dict(allocation=prunax.allocation.global_ranking)
    found = prunax.compute_masks(params, 0.25, scores=extensions.relative(params), **options)
    chex.assert_trees_all_equal(found, masks)
    tx = prunax.prune(optax.sgd(0.0), 0.25, score=extensions.relative, **options)
    chex.assert_trees_all_equal(tx.update(params, tx.init(params), params)[1].masks, masks)


def test_pattern():
    assert extensions.Pairs().unit_shape((4, 3)) == (2, 3)
    params = {"kernel": jnp.array([[1.0, 9.0], [2.0, 9.0], [3.0, 1.0], [4.0, 1.0]])}
    mask = prunax.compute_masks(params, 0.5, pattern=extensions.Pairs())["kernel"]
    assert mask.tolist() == [[False, True], [False, True], [True, False], [True, False]]


def test_allocation():
    params = {"a": {"kernel": jnp.ones((2, 6))}, "b": {"kernel": jnp.ones((2, 5))}}
    masks = prunax.compute_masks(params, 0.5, allocation=extensions.largest_only)
    assert int(masks["a"]["kernel"].sum()) == 6 and masks["b"]["kernel"].all()


def test_calibrated_method():
    """Of 4 inputs the second is always zero and the third ten times the others: the large weights at it stay."""
    inputs = jnp.array([[1.0, 0.0, 10.0, -1.0], [-1.0, 0.0, 10.0, 1.0]])
    params = {"kernel": jnp.array([[2.0], [9.0], [1.0], [3.0]])}
    found = prunax.calibration.prune_layers(
        lambda p, x: x @ p["kernel"], params, [inputs], extensions.MeanContribution(), 0.5
    )
    assert found.masks["kernel"].tolist() == [[False], [False], [True], [True]]
