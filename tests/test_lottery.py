"""Iterative magnitude pruning with a real training, interrupted and resumed."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from prunax import lottery, transforms

X = jax.random.normal(jax.random.key(0), (64, 16))
Y = jnp.sin(X[:, :4])
PARAMS = {"kernel": jax.random.normal(jax.random.key(1), (16, 4)), "bias": jnp.zeros(4)}


def loss_fn(params):
    return jnp.mean((jnp.dot(X, params["kernel"]) + params["bias"][None] - Y) ** 2)


def train(params, masks):
    tx = transforms.fixed_masks(optax.sgd(0.1, momentum=0.9), masks)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, 50)[0][0]


def test_rounds_prune_the_smallest_of_what_was_left():
    tickets = list(lottery.iterative_magnitude_pruning(train, PARAMS, rounds=3, fraction=0.5))
    assert [t.round for t in tickets] == [0, 1, 2, 3]
    assert [t.sparsity for t in tickets] == [0.0, 0.5, 0.75, 0.875]
    for earlier, later in itertools.pairwise(tickets):
        a, b = np.asarray(earlier.masks["kernel"]), np.asarray(later.masks["kernel"])
        assert b.sum() == 64 - round(later.sparsity * 64)
        assert not np.any(b & ~a)
        trained = np.abs(earlier.params["kernel"])
        assert trained[b].min() >= trained[a & ~b].max()
        assert np.array_equal(np.asarray(later.params["kernel"]) != 0, b)


def test_every_round_starts_from_the_same_point():
    starts = []

    def spy(params, masks):
        starts.append(params)
        return train(params, masks)

    tickets = list(lottery.iterative_magnitude_pruning(spy, PARAMS, rounds=2))
    for start, ticket in zip(starts, tickets, strict=True):
        expected = np.where(ticket.masks["kernel"], PARAMS["kernel"], 0)
        assert np.array_equal(start["kernel"], expected)


def test_an_interrupted_run_goes_on_from_a_checkpoint(tmp_path):
    whole = list(lottery.iterative_magnitude_pruning(train, PARAMS, rounds=4))
    for ticket in lottery.iterative_magnitude_pruning(train, PARAMS, rounds=4):
        if ticket.round == 2:
            break
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ticket", ticket)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "ticket", ticket)
    rest = list(lottery.iterative_magnitude_pruning(train, PARAMS, rounds=4, resume=restored))
    assert [t.round for t in rest] == [3, 4]
    chex.assert_trees_all_equal(whole[3:], rest)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"fraction.*20.*0\.2"):
        lottery.iterative_magnitude_pruning(train, PARAMS, rounds=1, fraction=20)
    with pytest.raises(ValueError, match="rounds"):
        lottery.iterative_magnitude_pruning(train, PARAMS, rounds=-1)
