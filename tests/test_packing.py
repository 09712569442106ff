"""One bit a weight: a round trip for every shape, and the layout by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunax import _packing


@pytest.mark.device_independent
def test_layout():
    # Ten rows: two bytes a column, row r in bit r % 8 of byte r // 8.
    mask = np.zeros((10, 1), bool)
    mask[[0, 3, 8]] = True
    assert _packing.pack_bits(jnp.asarray(mask))[:, 0].tolist() == [0b00001001, 0b00000001]


@pytest.mark.device_independent
@given(shape=st.lists(st.integers(0, 19), max_size=4).map(tuple), seed=st.integers(0, 10**6))
def test_round_trip(shape, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.5
    packed = _packing.pack_bits(jnp.asarray(mask))
    assert packed.dtype == (jnp.uint8 if shape else jnp.bool_)
    assert packed.shape == _packing.packed_shape(shape)
    np.testing.assert_array_equal(np.asarray(_packing.unpack_bits(packed, shape)), mask)


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        ((784, 300), (98, 300)),
        ((16,), (2,)),
        ((1, 1), (1, 1)),
        ((3, 3, 64, 128), (3, 3, 8, 128)),
        ((), ()),
    ],
)
def test_an_eighth_of_the_bytes(shape, packed):
    assert _packing.packed_shape(shape) == packed


def test_under_vmap_and_jit():
    masks = jax.random.bernoulli(jax.random.key(0), 0.5, (3, 20, 6))
    packed = jax.jit(jax.vmap(_packing.pack_bits))(masks)
    assert packed.dtype == jnp.uint8
    assert jnp.array_equal(jax.vmap(lambda p: _packing.unpack_bits(p, (20, 6)))(packed), masks)
