"""The solver on one matrix against NumPy written column by column in float64, as the papers have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunax import calibration, patterns
from prunax.calibration import solver


def layer(seed, rows=400, length=48, width=20, rank=None):
    """Correlated inputs and a matrix, float64."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(length, rank or length)) @ rng.normal(size=(rank or length, length))
    inputs = rng.normal(size=(rows, length)) @ (mixing / np.sqrt(length) + 0.5 * np.eye(length))
    if rank:
        inputs = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, length))
    return rng.normal(size=(length, width)), inputs.T @ inputs


def sparsegpt_by_column(weights, gram, choose, damping=0.01):
    """Algorithm 1 of SparseGPT, one column of the transposed matrix after the other, no blocking of the updates.

    `choose(i, w, diagonal)` gives the mask of the columns from i on, or None where it was given before.
    """
    w, h = weights.T.copy(), gram.copy()  # (out, in), as in the paper
    dead = np.diag(h) == 0
    mean = np.diag(h).mean()
    h[dead, dead] = mean
    w[:, dead] = 0
    inverse = np.linalg.inv(h + damping * mean * np.eye(len(h)))
    upper = np.linalg.cholesky(inverse).T
    mask = np.ones(w.shape, bool)
    for i in range(w.shape[1]):
        chosen = choose(i, w, np.diag(upper))
        if chosen is not None:
            mask[:, i : i + chosen.shape[1]] = chosen
        error = np.where(mask[:, i], 0.0, w[:, i]) / upper[i, i]
        for j in range(i, w.shape[1]):
            w[:, j] -= error * upper[i, j]
        w[~mask[:, i], i] = 0.0
    return w.T, mask.T


def unstructured(block, counts):
    def choose(i, w, diagonal):
        if i % block:
            return None
        scores = (w[:, i : i + block] / diagonal[i : i + block]) ** 2
        mask = np.ones(scores.size, bool)
        mask[np.argsort(scores, axis=None, kind="stable")[: counts[i // block]]] = False
        return mask.reshape(scores.shape)

    return choose


def by_output(block, counts):
    def choose(i, w, diagonal):
        if i % block:
            return None
        scores = (w[:, i : i + block] / diagonal[i : i + block]) ** 2
        mask = np.ones(scores.shape, bool)
        worst = np.argsort(scores, axis=1, kind="stable")[:, : counts[i // block]]
        np.put_along_axis(mask, worst, False, axis=1)
        return mask

    return choose


def close(sparse, expected, mask):
    np.testing.assert_array_equal(np.asarray(sparse.mask), mask)
    np.testing.assert_allclose(np.asarray(sparse.weights), expected, rtol=2e-3, atol=2e-3)
    assert np.all(np.asarray(sparse.weights)[~mask] == 0.0)


def blocks(*args):
    """What each block loses, checked against what the whole does."""
    budget, pattern, length, size = args
    counts = np.asarray(solver.block_budgets(*args))
    assert isinstance(pattern, patterns.NM) or counts.sum() == budget
    ends = np.minimum(np.arange(1, len(counts) + 1) * size, length)
    if not isinstance(pattern, patterns.NM):
        rounded = [(2 * budget * int(end) + length) // (2 * length) for end in ends]
        np.testing.assert_array_equal(np.cumsum(counts), rounded)
    return counts


@pytest.mark.parametrize("budget", [0, 1, 2**31 - 1, 123_456_789])
def test_budgets_of_blocks_are_exact_however_large(budget):
    blocks(budget, patterns.Unstructured(), 45_000, 128)
    blocks(budget, patterns.Unstructured(), 1_000_003, 1_000)


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.device_independent
@pytest.mark.parametrize(("length", "block"), [(48, 16), (48, 128), (50, 16), (33, 12), (48, 48)])
def test_obs_unstructured_is_the_published_algorithm(length, block):
    weights, gram = layer(0, length=length)
    total = round(0.6 * weights.size)
    counts = blocks(total, patterns.Unstructured(), length, block)
    assert counts.sum() == total
    expected, mask = sparsegpt_by_column(weights, gram, unstructured(block, counts))
    factor = solver.factorize(f32(gram))
    sparse = solver.obs(f32(weights), factor, total, block_size=block)
    close(sparse, expected, mask)


@pytest.mark.parametrize(("n", "m", "block"), [(2, 4, 16), (4, 8, 128), (1, 4, 20), (3, 4, 48)])
def test_obs_with_groups_is_the_published_algorithm(n, m, block):
    weights, gram = layer(1)
    pattern = patterns.NM(n, m)
    expected, mask = sparsegpt_by_column(weights, gram, by_output(m, [m - n] * (48 // m)))
    factor = solver.factorize(f32(gram))
    args = (f32(weights), factor, m - n)
    close(solver.obs(*args, pattern=pattern, block_size=block), expected, mask)
    assert np.all(mask.reshape(-1, m, 20).sum(1) == n)


def test_obs_with_constant_fan_in():
    weights, gram = layer(2, length=50)
    pattern = patterns.ConstantFanIn()
    counts = blocks(27, pattern, 50, 16)
    expected, mask = sparsegpt_by_column(weights, gram, by_output(16, counts))
    factor = solver.factorize(f32(gram))
    args = (f32(weights), factor, 27)
    close(solver.obs(*args, pattern=pattern, block_size=16), expected, mask)
    assert np.all((~mask).sum(0) == 27)


@pytest.mark.parametrize("dead", [[3], [0, 1, 2, 3, 17], list(range(0, 48, 2)), list(range(40))])
@pytest.mark.parametrize("pattern", [patterns.Unstructured(), patterns.NM(2, 4)])
def test_obs_with_dead_inputs(dead, pattern):
    weights, gram = layer(3)
    gram[dead] = 0
    gram[:, dead] = 0
    structured = isinstance(pattern, patterns.NM)
    budget = 2 if structured else 480
    counts = blocks(budget, pattern, 48, 16)
    choose = by_output(4, [2] * 12) if structured else unstructured(16, counts)
    expected, mask = sparsegpt_by_column(weights, gram, choose)
    sparse = solver.obs(
        f32(weights),
        solver.factorize(f32(gram)),
        budget,
        pattern=pattern,
        block_size=16,
    )
    weights = np.asarray(sparse.weights)
    assert np.all(np.isfinite(weights))
    assert np.all(weights[dead] == 0.0)
    np.testing.assert_allclose(weights, expected, rtol=2e-3, atol=2e-3)
    alive = np.setdiff1d(np.arange(48), dead)
    # Among dead inputs all scores are 0 and only their order decides: ours keeps the first, NumPy's sort the last.
    np.testing.assert_array_equal(np.asarray(sparse.mask)[alive], mask[alive])
    assert np.asarray(sparse.mask).sum() == mask.sum()


@pytest.mark.parametrize("pattern", [patterns.Unstructured(), patterns.NM(2, 4)])
def test_obs_of_a_stack_is_obs_of_each(pattern):
    layers = [layer(seed) for seed in range(3)]
    weights, grams = (f32(np.stack(x)) for x in zip(*layers, strict=True))
    structured = isinstance(pattern, patterns.NM)
    counts = [2, 2, 2] if structured else [480, 480, 481]

    def one(w, g, c):
        return solver.obs(w, solver.factorize(g), c, pattern=pattern, block_size=16)

    together = jax.vmap(one)(weights, grams, jnp.asarray(counts))
    for i in range(3):
        alone = one(weights[i], grams[i], counts[i])
        np.testing.assert_array_equal(together.mask[i], alone.mask)
        np.testing.assert_allclose(together.weights[i], alone.weights, rtol=1e-4, atol=1e-4)


@pytest.mark.device_independent
def test_factorize_inverts():
    _, gram = layer(4)
    factor = solver.factorize(f32(gram), 0.01)
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(48)
    upper = np.asarray(factor.upper, np.float64)
    assert np.all(np.tril(upper, -1) == 0)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(48), atol=1e-3)
    assert float(factor.damping) == pytest.approx(0.01)


def test_factorize_adds_damping_where_it_fails():
    rng = np.random.default_rng(0)
    gram = np.outer(*[rng.normal(size=64)] * 2)  # rank 1, and not quite positive in float32
    gram -= 1e-3 * np.eye(64) * np.diag(gram).mean()
    factor = solver.factorize(f32(gram), 0.0)
    assert np.all(np.isfinite(factor.upper))
    assert 1e-3 <= float(factor.damping) < 1e-1


@pytest.mark.parametrize("gram", [np.zeros((8, 8)), -np.eye(8)])
def test_factorize_is_finite_for_any_finite_matrix(gram):
    assert np.all(np.isfinite(solver.factorize(f32(gram)).upper))


@pytest.mark.device_independent
def test_refit_is_least_squares():
    weights, gram = layer(5)
    mask = np.random.default_rng(5).random(weights.shape) < 0.5
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(48)
    fitted = np.asarray(solver.refit(f32(weights), jnp.asarray(mask), f32(gram), iterations=200))
    for j in range(weights.shape[1]):
        kept = mask[:, j]
        expected = np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ weights[:, j])
        np.testing.assert_allclose(fitted[kept, j], expected, rtol=2e-3, atol=2e-3)
        assert np.all(fitted[~kept, j] == 0.0)


def test_refit_keeps_what_is_dense_or_dead():
    weights, gram = layer(6)
    gram[5] = gram[:, 5] = 0
    mask = np.ones(weights.shape, bool)
    np.testing.assert_array_equal(
        solver.refit(f32(weights), jnp.asarray(mask), f32(gram)), f32(weights)
    )
    mask[::3] = False
    fitted = np.asarray(solver.refit(f32(weights), jnp.asarray(mask), f32(gram)))
    np.testing.assert_allclose(fitted[5], weights[5], rtol=1e-5)
    zero = solver.refit(f32(weights), jnp.asarray(mask), jnp.zeros((48, 48)))
    np.testing.assert_array_equal(zero, np.where(mask, f32(weights), 0))


def change(weights, sparse, gram):
    difference = np.asarray(sparse, np.float64) - weights
    return np.einsum("io,ij,jo->", difference, gram, difference)


@pytest.mark.parametrize(
    "pattern", [patterns.Unstructured(), patterns.NM(2, 4), patterns.ConstantFanIn()]
)
def test_each_method_changes_the_outputs_less_than_the_one_before(pattern):
    weights, gram = layer(7, length=96, width=64)
    k = {patterns.NM: 2, patterns.ConstantFanIn: 48}.get(type(pattern), weights.size // 2)
    norms = np.sqrt(np.diag(gram))
    magnitude = solver.keep_largest(f32(np.abs(weights)), jnp.int32(k), pattern)
    scores = calibration.wanda_scores(f32(weights), f32(norms)[:, None])
    wanda = solver.keep_largest(scores, jnp.int32(k), pattern)
    obs = solver.obs(f32(weights), solver.factorize(f32(gram)), k, pattern=pattern)
    best = solver.alps(f32(weights), f32(gram), jnp.int32(k), pattern=pattern)
    refitted = solver.refit(f32(weights), wanda, f32(gram))
    assert best.mask.sum() == wanda.sum() == obs.mask.sum() == weights.size // 2
    assert np.all(np.asarray(best.weights)[~np.asarray(best.mask)] == 0.0)
    errors = [
        change(weights, np.where(magnitude, weights, 0), gram),
        change(weights, np.where(wanda, weights, 0), gram),
        change(weights, refitted, gram),
        change(weights, best.weights, gram),
    ]
    assert errors == sorted(errors, reverse=True)
    assert change(weights, best.weights, gram) < 0.95 * change(weights, obs.weights, gram)
    assert change(weights, obs.weights, gram) < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(dtype):
    weights, gram = layer(8)
    factor = solver.factorize(f32(gram))
    w = jnp.asarray(weights, dtype)
    assert solver.obs(w, factor, 480).weights.dtype == dtype
    assert solver.refit(w, jnp.ones(w.shape, bool), f32(gram)).dtype == dtype
    assert solver.alps(w, f32(gram), jnp.int32(480)).weights.dtype == dtype


def test_scores_are_magnitude_times_norm():
    weights, gram = layer(9)
    norms = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(
        calibration.wanda_scores(f32(weights), f32(norms)[:, None]),
        np.abs(weights) * norms[:, None],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(
        calibration.wanda_scores(f32(weights), jnp.zeros((48, 1))), np.abs(f32(weights))
    )


def test_groups_must_fit_the_block():
    weights, gram = layer(0)
    with pytest.raises(ValueError, match=r"multiple of the groups.*block_size=12"):
        solver.obs(
            f32(weights),
            solver.factorize(f32(gram)),
            jnp.zeros(5, jnp.int32),
            pattern=patterns.NM(2, 4),
            block_size=10,
        )
