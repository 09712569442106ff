"""Patterns: values by hand, structure of the masks for dense kernels and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from prunax import patterns


def normal(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def mask_of(kernel, sparsity=None, **options):
    return np.asarray(
        prunax.compute_masks({"kernel": jnp.asarray(kernel)}, sparsity, **options)["kernel"]
    )


def test_nm_keeps_n_of_every_m_inputs():
    kernel = jnp.array(
        [
            [1.0, 8.0],
            [2.0, 7.0],
            [3.0, 6.0],
            [4.0, 5.0],
            [9.0, 1.0],
            [8.0, 2.0],
            [7.0, 3.0],
            [6.0, 4.0],
        ]
    )
    mask = mask_of(kernel, pattern=patterns.NM(1, 4))
    assert mask[:, 0].tolist() == [False, False, False, True, True, False, False, False]
    assert mask[:, 1].tolist() == [True, False, False, False, False, False, False, True]


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 4), (0, 2), (2, 2), (1, 3)]
)
def test_nm_of_a_dense_kernel_runs_along_axis_minus_2(n, m):
    mask = mask_of(normal((24, 5)), pattern=patterns.NM(n, m))
    assert (mask.reshape(24 // m, m, 5).sum(axis=1) == n).all()


def test_nm_of_a_convolution_runs_along_its_inputs():
    mask = mask_of(normal((3, 3, 8, 5)), pattern=patterns.NM(2, 4))  # height, width, in, out
    assert (mask.reshape(3, 3, 2, 4, 5).sum(axis=3) == 2).all()


@pytest.mark.parametrize("axis", [-1, 1])
def test_nm_of_a_transposed_weight(axis):
    mask = mask_of(normal((5, 8)), pattern=patterns.NM(2, 4, axis=axis))  # out, in
    assert (mask.reshape(5, 2, 4).sum(axis=2) == 2).all()


def test_nm_by_positive_axis_equals_negative_axis():
    kernel = normal((2, 3, 8, 4))
    for axis in range(4):
        if kernel.shape[axis] % 2 == 0:
            one, other = (
                mask_of(kernel, pattern=patterns.NM(1, 2, axis=a)) for a in (axis, axis - 4)
            )
            assert (one == other).all()


def test_nm_below_its_sparsity_prunes_less_of_each_group():
    mask = mask_of(normal((8, 6)), 0.25, pattern=patterns.NM(2, 4))
    assert (mask.reshape(2, 4, 6).sum(axis=1) == 3).all()


def test_nm_ties_keep_the_lower_index():
    mask = mask_of(jnp.ones((4, 1)), pattern=patterns.NM(1, 4))
    assert mask[:, 0].tolist() == [True, False, False, False]


def test_constant_fan_in_keeps_the_same_number_for_every_output():
    mask = mask_of(normal((10, 7)), 0.7, pattern=patterns.ConstantFanIn())
    assert (mask.sum(axis=0) == 3).all()


def test_constant_fan_in_of_an_out_in_weight():
    mask = mask_of(normal((7, 10)), 0.7, pattern=patterns.ConstantFanIn(axis=-1))
    assert (mask.sum(axis=1) == 3).all()


def test_constant_fan_in_over_the_window_of_a_convolution():
    kernel = normal((3, 3, 4, 5))
    mask = mask_of(kernel, 0.75, pattern=patterns.ConstantFanIn(axis=(-4, -3, -2)))
    assert (mask.sum(axis=(0, 1, 2)) == 9).all()
    for channel in range(5):
        size = np.abs(np.asarray(kernel[..., channel]))
        assert size[mask[..., channel]].min() > size[~mask[..., channel]].max()


def test_constant_fan_in_over_scattered_axes_keeps_the_layout():
    kernel = normal((3, 4, 5))
    mask = mask_of(kernel, 0.6, pattern=patterns.ConstantFanIn(axis=(0, 2)))
    assert (mask.sum(axis=(0, 2)) == 6).all()
    for middle in range(4):
        size = np.abs(np.asarray(kernel[:, middle]))
        assert size[mask[:, middle]].min() > size[~mask[:, middle]].max()


def test_blocks_with_partial_edges():
    kernel = np.array(
        [
            [1.0, 1.0, 5.0, 5.0, 2.0],
            [1.0, 1.0, 5.0, 5.0, 2.0],
            [4.0, 4.0, 3.0, 3.0, 9.0],
        ]
    )
    # Means of the six blocks: 1 5 2 / 4 3 9.
    blocks = patterns.Block((2, 2))
    assert mask_of(kernel, 1 / 6, pattern=blocks).astype(int).tolist() == [[0, 0, 1, 1, 1]] * 2 + [
        [1] * 5
    ]
    assert mask_of(kernel, 3 / 6, pattern=blocks).astype(int).tolist() == [[0, 0, 1, 1, 0]] * 2 + [
        [1, 1, 0, 0, 1]
    ]
    assert mask_of(kernel, 5 / 6, pattern=blocks).astype(int).tolist() == [[0] * 5] * 2 + [
        [0, 0, 0, 0, 1]
    ]


@pytest.mark.parametrize("shape", [(7, 9), (8, 8), (1, 5), (2, 7, 9)])
@pytest.mark.parametrize("block", [(2, 2), (3, 4), (16, 16), (1, 5)])
def test_blocks_are_kept_or_removed_whole_and_counted(shape, block):
    pattern = patterns.Block(block)
    mask = mask_of(normal(shape), 0.5, pattern=pattern)
    lead, (rows, columns) = shape[:-2], shape[-2:]
    units = []
    for matrix in mask.reshape((-1, rows, columns)):
        for top in range(0, rows, block[0]):
            for left in range(0, columns, block[1]):
                part = matrix[top : top + block[0], left : left + block[1]]
                assert part.all() or not part.any()
                units.append(part.all())
    assert (*lead, -(-rows // block[0]), -(-columns // block[1])) == pattern.unit_shape(shape)
    assert len(units) - sum(units) == round(0.5 * len(units))


def test_block_score_is_the_mean_and_not_the_sum():
    # The edge block has the larger mean and the smaller sum.
    assert mask_of([[2.0, 2.0, 3.0]], 0.5, pattern=patterns.Block((1, 2))).tolist() == [
        [False, False, True]
    ]


def test_blocks_of_half_precision_do_not_overflow():
    kernel = jnp.full((64, 64), 60000.0, jnp.float16).at[:32].set(59000.0)
    mask = mask_of(kernel, 0.5, pattern=patterns.Block((32, 64)))
    assert not mask[:32].any() and mask[32:].all()


@pytest.mark.parametrize(
    ("axis", "expected"), [(-1, [[0, 1], [0, 1]]), (-2, [[0, 0], [1, 1]]), (0, [[0, 0], [1, 1]])]
)
def test_channels(axis, expected):
    mask = mask_of([[1.0, 2.5], [2.0, 3.0]], 0.5, pattern=patterns.Channel(axis))
    assert mask.astype(int).tolist() == expected


def test_channels_of_a_convolution():
    mask = mask_of(normal((3, 3, 4, 10)), 0.3, pattern=patterns.Channel())
    kept = mask.all(axis=(0, 1, 2))
    assert (mask == kept).all() and kept.sum() == 7


@pytest.mark.parametrize(
    "pattern",
    [
        patterns.Block((2, 3)),
        patterns.Channel(),
        patterns.ConstantFanIn(),
        patterns.NM(2, 4),
        patterns.Unstructured(),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_patterns_take_every_dtype_and_empty_leaves(pattern, dtype):
    assert (~mask_of(normal((8, 6)).astype(dtype), 0.5, pattern=pattern)).sum() > 0
    assert mask_of(jnp.zeros((0, 4), dtype), 0.5, pattern=pattern).shape == (0, 4)
    assert mask_of(jnp.zeros((4, 0), dtype), 0.5, pattern=pattern).shape == (4, 0)


def test_patterns_are_values():
    assert patterns.Block([2, 2]) == patterns.Block((2, 2))
    assert hash(patterns.ConstantFanIn([0, 1])) == hash(patterns.ConstantFanIn((0, 1)))
    assert patterns.NM(2, 4) == patterns.NM(n=2, m=4)
    assert patterns.NM(2, 4).implied_sparsity == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: patterns.NM(4, 2),
            r"NM: keeps n of every m.*got n=4, m=2. Did you mean NM\(2, 4\)",
        ),
        (lambda: patterns.NM(-1, 4), r"NM: .*n=-1, m=4"),
        (lambda: patterns.NM(0, 0), r"NM: .*m >= 1"),
        (lambda: patterns.Block((0, 4)), r"Block: needs two positive lengths"),
        (lambda: patterns.Block((4,)), r"Block: needs two positive lengths"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (patterns.NM(2, 4), (6, 8), r"axis -2 has length 6, which 4 does not divide"),
        (patterns.NM(2, 4, axis=2), (8, 8), r"axis 2 does not exist in the shape \(8, 8\)"),
        (patterns.Block((2, 2)), (8,), r"blocks tile the last two axes"),
        (patterns.Channel(axis=2), (8, 8), r"axis 2 does not exist"),
        (patterns.ConstantFanIn(axis=-3), (8, 8), r"axis -3 does not exist"),
    ],
)
def test_a_pattern_that_does_not_fit_names_the_leaf(pattern, shape, message):
    params = {"good": {"kernel": jnp.ones((8, 8, 8))}, "odd": {"kernel": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=rf"does not fit 'odd/kernel' of shape .*{message}"):
        prunax.compute_masks(params, 0.5, pattern=pattern, where=lambda path, leaf: True)
