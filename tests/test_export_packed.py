"""Packed weights multiply like the masked matrix, for every shape, batch, dtype and mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prunax
from prunax import export
from prunax.export import _packed as forms
from prunax.export import _timing
from prunax.patterns import NM, Block, ConstantFanIn, Unstructured


def masked(w, mask):
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


def random_matrix(seed: int, shape, pattern, density: float):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if isinstance(pattern, Block):
        units = rng.random(pattern.unit_shape(shape)) < density
        return w, pattern.expand(jnp.asarray(units), shape)
    return w, jnp.asarray(rng.random(shape) < density)


@settings(max_examples=15)
@given(
    shape=st.sampled_from([(1, 1), (7, 5), (33, 20)]),
    pattern=st.sampled_from(
        [Block((1, 1)), Block((4, 8)), Block((5, 3)), Block((64, 64)), Unstructured()]
    ),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (100,), (0,)]),
    seed=st.integers(0, 10**6),
)
def test_product(shape, pattern, density, batch, seed):
    w, mask = random_matrix(seed, shape, pattern, density)
    packed = export.pack(w, mask, pattern)
    assert jnp.array_equal(packed.todense(), masked(w, mask))
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((*batch, shape[0])), jnp.float32)
    np.testing.assert_allclose(packed.matmul(x), x @ masked(w, mask), atol=1e-4)


def test_block_form_by_hand():
    w = jnp.arange(24.0).reshape(4, 6)
    units = jnp.array([[True, False, False], [True, False, True]])
    packed = export.pack(w, Block((2, 2)).expand(units, (4, 6)), Block((2, 2)))
    # One block is cheaper to fill up than a group of its own would be.
    assert packed.padded and [g.columns.tolist() for g in packed.groups] == [[0, 2]]
    assert packed.groups[0].rows.tolist() == [[0, 1], [1, 2]]
    assert packed.groups[0].blocks[1, 0].tolist() == [[16.0, 17.0], [22.0, 23.0]]
    assert not packed.groups[0].blocks[1, 1].any()


@pytest.mark.device_independent
def test_dense_again_bit_for_bit():
    # Multiplied by the identity, an infinity would become NaN elsewhere, and a GPU would round to TF32.
    w = jnp.array([[jnp.inf, 1 + 2.0**-23], [-0.0, 1e-40]])
    for pattern in (Block((2, 2)), Block((1, 2)), Unstructured()):
        dense = export.pack(w, jnp.ones((2, 2), bool), pattern).todense()
        assert np.asarray(dense).tobytes() == np.asarray(w).tobytes()


def test_gather_form_by_hand():
    w = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    packed = export.pack(w, jnp.array([[True, False, False], [True, True, False]]))
    assert packed.rows.tolist() == [[0, 1, 2], [1, 2, 2]]  # 2 is one behind the last
    assert packed.values.tolist() == [[1.0, 5.0, 0.0], [4.0, 0.0, 0.0]]
    assert (jnp.array([[1.0, 10.0]]) @ packed).tolist() == [[41.0, 50.0, 0.0]]


def test_columns_are_grouped_where_that_saves_blocks():
    assert [g.tolist() for g in forms._similar(np.array([3, 3, 3]))] == [[0, 1, 2]]
    assert [g.tolist() for g in forms._similar(np.array([0, 0]))] == []
    counts = np.array([40, 2, 2, 2, 0, 40, 2, 3])
    assert sorted(g.tolist() for g in forms._similar(counts)) == [[0, 5], [1, 2, 3, 6, 7]]
    counts = np.random.default_rng(0).binomial(64, 0.1, 64)
    groups = forms._similar(counts)
    assert np.array_equal(np.sort(np.concatenate(groups)), np.flatnonzero(counts))
    stored = sum(len(g) * counts[g].max() for g in groups)
    assert stored < 1.25 * counts.sum() < 64 * counts.max()


@pytest.mark.parametrize("pattern", [ConstantFanIn(), NM(1, 4), NM(2, 4)], ids=str)
def test_patterns_with_equal_columns_are_not_filled_up(pattern):
    params = {"kernel": jax.random.normal(jax.random.key(0), (32, 12))}
    mask = prunax.compute_masks(
        params, 0.5 if pattern == ConstantFanIn() else None, pattern=pattern
    )["kernel"]
    packed = export.pack(params["kernel"], mask, pattern)
    assert isinstance(packed, export.GatherSparse) and not packed.padded
    assert packed.values.size == int(mask.sum())


@pytest.mark.parametrize("pattern", [Block((4, 4)), Unstructured()], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_the_dense_product(pattern, dtype):
    w, mask = random_matrix(0, (16, 8), pattern, 0.5)
    w = w.astype(dtype)
    packed = export.pack(w, mask, pattern)
    x = jax.random.normal(jax.random.key(0), (3, 16)).astype(dtype)
    y = x @ packed
    assert y.dtype == dtype and packed.dtype == dtype and packed.shape == (16, 8)
    wanted = x.astype(jnp.float32) @ masked(w, mask).astype(jnp.float32)
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted, atol=0.05 if dtype != "float32" else 1e-5
    )


@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize("pattern", [Block((4, 4)), Unstructured()], ids=str)
def test_gradients(pattern, batch):
    w, mask = random_matrix(1, (18, 10), pattern, 0.4)
    packed = export.pack(w, mask, pattern)
    x = jax.random.normal(jax.random.key(0), (batch, 18))

    def loss(packed, x):
        return jnp.sum(jnp.sin(packed.matmul(x)))

    def dense_loss(w, x):
        return jnp.sum(jnp.sin(x @ masked(w, mask)))

    of_packed, of_x = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(packed, x)
    of_w, wanted = jax.grad(dense_loss, argnums=(0, 1))(w, x)
    np.testing.assert_allclose(of_x, wanted, atol=1e-4)
    # The gradient of each stored weight is that of its weight in the matrix.
    fields = ["values"] if isinstance(packed, export.GatherSparse) else ["groups"]
    if fields == ["values"]:
        rows, columns = np.nonzero(np.asarray(packed.rows) < 18)
        found = np.asarray(of_packed.values)[rows, columns]
        np.testing.assert_allclose(
            found, of_w[np.asarray(packed.rows)[rows, columns], columns], atol=1e-4
        )
    else:
        total = sum(
            float(jnp.sum(g.blocks * p.blocks))
            for g, p in zip(of_packed.groups, packed.groups, strict=True)
        )
        np.testing.assert_allclose(total, jnp.sum(of_w * w), rtol=1e-4)


@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize("pattern", [Block((4, 4)), Unstructured()], ids=str)
def test_infinities_meet_stored_weights_only(pattern, batch):
    w = jnp.ones((8, 8))
    units = jnp.array([[True, False], [True, True]])  # uneven, so that something is filled up
    mask = Block((4, 4)).expand(units, (8, 8))
    x = jnp.ones((batch, 8)).at[:, 0].set(jnp.inf)
    y = x @ export.pack(w, mask, pattern)
    assert jnp.all(jnp.isinf(y[:, :4])) and jnp.array_equal(y[:, 4:], jnp.full((batch, 4), 4.0))


def test_stands_in_for_a_matrix():
    w, mask = random_matrix(0, (16, 8), Block((4, 4)), 0.5)
    x = np.ones((2, 3, 16), np.float32)
    wanted = x @ np.asarray(masked(w, mask))
    for packed in (
        export.pack(w, mask, Block((4, 4))),
        export.pack(w, mask),
        export.Dense(masked(w, mask)),
    ):
        np.testing.assert_allclose(x @ packed, wanted, atol=1e-5)  # NumPy on the left
        np.testing.assert_allclose(jax.jit(lambda p, x: x @ p)(packed, x), wanted, atol=1e-5)
        np.testing.assert_allclose(packed(jnp.asarray(x)), wanted, atol=1e-5)
        np.testing.assert_allclose(jax.vmap(packed)(jnp.asarray(x)), wanted, atol=1e-5)
        leaves, treedef = jax.tree.flatten(packed)
        assert jnp.array_equal(treedef.unflatten(leaves).todense(), packed.todense())
        with pytest.raises(ValueError, match="its last axis must have length 16"):
            packed.matmul(jnp.ones((2, 15)))


def test_packed_weights_in_a_file(tmp_path):
    w, mask = random_matrix(0, (16, 8), Block((4, 4)), 0.5)
    layers = {"a": export.pack(w, mask, Block((4, 4))), "b": export.pack(w, mask)}
    export.save_params(tmp_path / "x", layers)
    loaded = export.load_params(tmp_path / "x", layers)
    assert jnp.array_equal(jnp.ones((1, 16)) @ loaded["a"], jnp.ones((1, 16)) @ layers["a"])
    assert jnp.array_equal(loaded["b"].todense(), layers["b"].todense())


@pytest.mark.parametrize(
    ("w", "mask", "error", "match"),
    [
        (
            jnp.ones((2, 3, 4)),
            jnp.ones((2, 3, 4), bool),
            ValueError,
            "Pack the layers of a stacked kernel",
        ),
        (jnp.ones((3, 4)), jnp.ones((4, 3), bool), ValueError, "needs a matrix"),
        (jnp.ones((3, 4)), jnp.ones((3, 4)), TypeError, "must be bool"),
    ],
)
def test_pack_refuses(w, mask, error, match):
    with pytest.raises(error, match=match):
        export.pack(w, mask)
    with pytest.raises(error, match=match):
        export.fastest(w, mask, jnp.ones((1, 3)))


@pytest.mark.parametrize("sparsity", [0.0, 0.98])
def test_fastest_computes_the_masked_product(sparsity):
    w = jax.random.normal(jax.random.key(0), (256, 256))
    x = jax.random.normal(jax.random.key(1), (16, 256))
    pattern = Block((32, 32))
    mask = prunax.compute_masks({"kernel": w}, sparsity, pattern=pattern)["kernel"]
    best = export.fastest(w, mask, x, pattern=pattern, repeats=3)
    assert isinstance(best, export.Dense | export.BlockSparse)
    np.testing.assert_allclose(x @ best, x @ masked(w, mask), atol=1e-3)


def test_the_packed_form_wins_by_median_and_minimum():
    assert _timing.wins([0.4, 0.5, 3.0], [1.0, 1.1, 0.9])
    assert not _timing.wins([0.95, 0.95, 0.95], [1.0, 1.0, 1.0])  # not by enough
    assert not _timing.wins([0.2, 1.0, 1.0], [1.0, 1.0, 1.0])  # one lucky turn
    assert not _timing.wins([0.8, 0.8, 0.8], [0.8, 2.0, 2.0])  # dense had bad luck
