"""What a user writes: one of each choice, from public names alone. The pages of the stages show the same."""

import dataclasses

import jax
import jax.numpy as jnp

import prunax
from prunax.calibration import solver


def relative(params, grads=None):
    return jax.tree.map(lambda w: jnp.abs(w) / jnp.max(jnp.abs(w)), params)


@dataclasses.dataclass(frozen=True)
class Pairs(prunax.patterns.Pattern):
    def pool(self, scores):
        return (scores[..., ::2, :] + scores[..., 1::2, :]) / 2

    def expand(self, mask, shape):
        return jnp.repeat(mask, 2, axis=-2)


def largest_only(leaves, sparsity):
    largest = max(range(len(leaves)), key=lambda i: leaves[i].num_units)
    pool = prunax.allocation.Pool((largest,), sparsity)
    return prunax.allocation.Pools((pool,))


@dataclasses.dataclass(frozen=True)
class MeanContribution:
    def statistic(self, inputs):
        return jnp.abs(inputs).sum(axis=0)

    def prepare(self, statistic):
        return statistic[:, None]

    def solve(self, weights, prepared, budget, pattern):
        mask = solver.keep_largest(jnp.abs(weights) * prepared, budget, pattern)
        return jnp.where(mask, weights, 0), mask
