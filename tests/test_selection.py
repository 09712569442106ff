"""The selection kernel, against a stable sort in NumPy, on hard inputs and on sharded arrays."""

import contextlib
import os
import subprocess
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from prunax import _counts, _selection


def reference(scores, pools, pruned):
    """Masks by sorting, NaN lowest, lower index kept first."""
    masks = [np.ones(s.shape, bool) for s in scores]
    for pool, k in zip(pools, pruned, strict=True):
        flat = np.concatenate([np.asarray(scores[i], np.float64).ravel() for i in pool])
        order = np.lexsort((np.arange(flat.size), -np.nan_to_num(flat, nan=0.0), np.isnan(flat)))
        kept = np.zeros(flat.size, bool)
        kept[order[: flat.size - k]] = True
        ends = np.cumsum([scores[i].size for i in pool])
        for i, part in zip(pool, np.split(kept, ends[:-1]), strict=True):
            masks[i] = part.reshape(scores[i].shape)
    return masks


def check(scores, pools, pruned):
    got = _selection.keep_largest(scores, pools, pruned)
    for g, expected in zip(got, reference(scores, pools, pruned), strict=True):
        assert np.array_equal(g, expected)


N = 3000
RNG = np.random.default_rng(0)
HARD = {
    "equal": np.ones(N),
    "two values": RNG.integers(0, 2, N).astype(float),
    "ascending": np.linspace(-3, 5, N),
    "descending": np.linspace(5, -3, N),
    "denormal": RNG.standard_normal(N) * 1e-40,
    "outlier": np.where(np.arange(N) == 7, 3e38, RNG.standard_normal(N) * 1e-6),
    "cauchy": RNG.standard_cauchy(N),
    "integers": RNG.integers(-20, 20, N).astype(float),
    "last bits": 1 + RNG.integers(0, 5, N) * 2.0**-23,
    "half zeros": np.maximum(RNG.standard_normal(N), 0),
    "signed zeros": np.where(RNG.random(N) < 0.5, 0.0, -0.0),
    "not numbers": np.where(RNG.random(N) < 0.3, np.nan, RNG.standard_normal(N)),
    "infinities": np.where(RNG.random(N) < 0.3, RNG.choice([-np.inf, np.inf], N), 1.0),
}


@pytest.mark.device_independent
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs(name):
    x = jnp.asarray(HARD[name].reshape(60, 50), jnp.float32)
    select = jax.jit(lambda x, k: _selection.keep_largest([x], [(0,)], [k])[0])
    for k in (0, 1, 700, N // 2, 2999, N):
        expected = reference([x], [(0,)], [k])[0]
        assert np.array_equal(select(x, _counts.as_count(k)), expected), k


@pytest.mark.device_independent
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "uint8", "bool"])
def test_dtypes(dtype):
    x = jnp.asarray(RNG.integers(0, 2 if dtype == "bool" else 40, (23, 31)), dtype)
    check([x], [(0,)], [400])
    for axis in (0, 1):
        got = _selection.keep_largest_along(x, axis, 9)
        slices = np.moveaxis(np.asarray(x, np.float64), axis, 0).reshape(x.shape[axis], -1)
        masks = np.moveaxis(np.asarray(got), axis, 0).reshape(x.shape[axis], -1)
        for column, mask in zip(slices.T, masks.T, strict=True):
            assert np.array_equal(mask, reference([column], [(0,)], [9])[0])


SLICES = {
    "normal": RNG.standard_normal((50, 3, 40)),
    "equal": np.ones((50, 3, 40)),
    "lumps": RNG.integers(-1, 2, (50, 3, 40)),
    "heavy tails": RNG.standard_cauchy((50, 3, 40)) * 1e20,
    "not numbers": np.where(
        RNG.random((50, 3, 40)) < 0.5, np.nan, RNG.standard_normal((50, 3, 40))
    ),
    "infinite": np.where(RNG.random((50, 3, 40)) < 0.7, -np.inf, np.inf),
}


@pytest.mark.device_independent
@pytest.mark.parametrize("axis", [0, 2, -2])
@pytest.mark.parametrize("name", SLICES)
def test_slices_are_contests_of_their_own(name, axis):
    x = jnp.asarray(SLICES[name], jnp.float32)
    select = jax.jit(lambda x, k: _selection.keep_largest_along(x, axis, k))
    n = x.shape[axis]
    order = np.where(np.isnan(x), np.float32(-1e30), x)  # below every number here
    ranks = np.argsort(np.argsort(-order, axis=axis, kind="stable"), axis=axis, kind="stable")
    for k in (0, 1, n // 2, n - 1, n):
        assert np.array_equal(select(x, jnp.int32(k)), ranks < n - k), k
        lazy = _selection.keep_largest_along(Partial(jnp.negative, -x), axis, k)
        assert np.array_equal(lazy, ranks < n - k), k


@settings(max_examples=8)  # each compiles its own pools
@given(st.integers(0, 2**32 - 1))
def test_pools_of_many_arrays(seed):
    rng = np.random.default_rng(seed)
    shapes = [(4, 3), (5,), (), (2, 2, 2), (0, 3), (1, 1)]
    scores = [jnp.asarray(rng.integers(-2, 3, s), jnp.float32) for s in shapes]
    order = [int(i) for i in rng.permutation(len(shapes))]
    cut = int(rng.integers(1, len(shapes)))
    pools = (tuple(order[:cut]), tuple(order[cut:]))
    pruned = [int(rng.integers(0, sum(scores[i].size for i in p) + 1)) for p in pools]
    check(scores, pools, pruned)


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "pruned"), [("float32", 3, 5, 333), ("bfloat16", 30, 11, 3333)]
)
def test_many_arrays_at_once(dtype, rows, columns, pruned):
    # More arrays than one compiled loop is given: they are read shape by shape from Python.
    scores = [jnp.asarray(RNG.integers(0, 9, (rows + i % 2, columns)), dtype) for i in range(40)]
    check(scores, [tuple(range(40))], [pruned])
    check(scores, [(i,) for i in range(40)], [i % 9 for i in range(40)])


@pytest.mark.device_independent
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (0, 4), (131_101,), (2, 65_537), (3, 5, 7, 64), (700, 311)]
)
def test_scores_of_few_values(dtype, shape):
    # Nearly all tie, also where the number of units is a prime.
    size = int(np.prod(shape))
    x = jnp.asarray(RNG.choice([-1.0, 0.0, 1.0, 3.0], shape, p=[0.1, 0.5, 0.3, 0.1]), dtype)
    select = jax.jit(lambda x, k: _selection.keep_largest([x], [(0,)], [k])[0])
    for k in {0, 1, size // 3, size // 2, size - 1, size} & set(range(size + 1)):
        assert np.array_equal(select(x, _counts.as_count(k)), reference([x], [(0,)], [k])[0]), k


def test_scores_of_few_values_share_what_ties():
    shapes = [(40, 30), (7,), (0,), (13, 11, 3)]
    scores = [jnp.asarray(RNG.integers(0, 3, s), jnp.bfloat16) for s in shapes]
    for k in (0, 5, 600, 1200, 1635, 1636):
        check(scores, [(3, 0, 2, 1)], [k])


@pytest.mark.parametrize("count", [2, 18])  # in one program, and read from Python
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pool_over_two_meshes(dtype, count):
    meshes = [jax.make_mesh((1,), (name,), axis_types=(AxisType.Explicit,)) for name in ("x", "y")]
    scores = [
        jax.device_put(
            jnp.asarray(RNG.integers(0, 3, (40, 30)), dtype),
            NamedSharding(meshes[i % 2], PartitionSpec()),
        )
        for i in range(count)
    ]
    check(scores, [tuple(range(count))], [500 * count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_functions_stand_for_their_values(dtype):
    w = jnp.asarray(RNG.standard_normal((20, 30)), dtype)
    (lazy,) = _selection.keep_largest([Partial(jnp.abs, w)], [(0,)], [450])
    (direct,) = _selection.keep_largest([jnp.abs(w)], [(0,)], [450])
    assert np.array_equal(lazy, direct)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_absolute_values_are_those_of_jax(dtype):
    x = jnp.asarray([1.5, -2.0, np.nan, -np.nan, -0.0, -np.inf, -3e4, 1e-5], dtype)
    found, expected = _selection.absolute(x), jnp.abs(x)
    assert found.dtype == expected.dtype and not jnp.signbit(found).any()
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
@pytest.mark.parametrize("shape", [(), (7,), (40, 3), (2, 400, 300)])
def test_a_nan_is_found_wherever_it_is(dtype, shape):
    x = jnp.full(shape, -3.0, dtype)
    if dtype != "float8_e4m3fn":  # which has no infinity
        x = x.reshape(-1).at[-1].set(-jnp.inf).reshape(shape)
    assert not _selection.has_nan(x)
    for nan in (jnp.nan, -jnp.nan):
        for place in {0, x.size // 2, x.size - 1}:
            with_nan = x.reshape(-1).at[place].set(jnp.asarray(nan, dtype)).reshape(shape)
            assert _selection.has_nan(with_nan)
            assert _selection.has_nan(Partial(_selection.absolute, with_nan))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_as_large_as_the_scores_is_stored(dtype):
    w = jax.ShapeDtypeStruct((1024, 1024), dtype)
    compiled = (
        jax.jit(lambda w: _selection.keep_largest([Partial(jnp.abs, w)], [(0,)], [900_000])[0])
        .lower(w)
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes <= 1024 * 1024 + 64
    # On eight devices the test process cannot take the array for local; alone it stores still less.
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 1.3 * 4 * 1024 * 1024
    if jax.device_count() == 1:
        assert memory.temp_size_in_bytes <= 2**18


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vmap_over_the_number_pruned(dtype):
    x = jnp.asarray(RNG.standard_normal((24, 11)), dtype)
    ks = jnp.arange(0, 265, 24, dtype=jnp.uint32)
    masks = jax.vmap(
        lambda k: _selection.keep_largest([x], [(0,)], [_counts.Count(jnp.uint32(0), k)])[0]
    )(ks)
    for mask, k in zip(masks, ks, strict=True):
        assert np.array_equal(mask, reference([x], [(0,)], [int(k)])[0])


@pytest.mark.device_independent
@pytest.mark.parametrize(
    "n", [1, 5, 35, 999_983, 2**24 + 1, 100_000_000, 2**31 + 7, 2**33 + 5, 2**37 + 1]
)
def test_traced_number_pruned_is_exact_at_any_size(n):
    values = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 1.0, 1 / 3, 2 / 7, 1e-9]
    got = jax.jit(lambda s: _counts.num_pruned(s, n))(jnp.asarray(values, jnp.float32))
    for s, high, low in zip(values, got.high, got.low, strict=True):
        # What has up to six decimals is meant as such; anything else is the float32 that it is.
        meant = Fraction(str(s)) if round(s, 6) == s else Fraction(float(np.float32(s)))
        assert (int(high) << 32) + int(low) == round(meant * n), s


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_two_word_arithmetic(a, b):
    def value(c):
        return (int(c.high) << 32) + int(c.low)

    x, y = (_counts.Count(*map(jnp.asarray, _counts.as_count(n))) for n in (a, b))
    assert value(_counts.add(x, y)) == a + b
    assert bool(_counts.less(x, y)) == (a < b)
    if a >= b:
        assert value(_counts.subtract(x, y)) == a - b
    assert value(_counts.minimum(x, y)) == min(a, b)
    total = _counts.exact_sum(
        _counts.Count(jnp.stack([x.high, y.high]), jnp.stack([x.low, y.low])), jnp.sum, True
    )
    assert value(total) == (a + b) % 2**64


MESHES = [
    pytest.param(kind, spec, id=f"{kind.name}-{spec}")
    for kind in (AxisType.Explicit, AxisType.Auto)
    for spec in (
        PartitionSpec("x", "y"),
        PartitionSpec(None, "x"),
        PartitionSpec(("x", "y"), None),
    )
]


def sharded(array, kind, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    return jax.device_put(array, NamedSharding(mesh, spec)), mesh


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(("kind", "spec"), MESHES)
def test_sharded_selection_moves_counts_only(kind, spec):
    values = [RNG.integers(0, 50, (64, 32)).astype(np.float32) for _ in range(2)]
    arrays, meshes = zip(*(sharded(v, kind, spec) for v in values), strict=True)
    # An explicit mesh is in the arrays' types, and needs no context.
    context = contextlib.nullcontext() if kind == AxisType.Explicit else jax.set_mesh(meshes[0])
    with context:
        for pools, pruned in (([(0, 1)], [3500]), ([(0,), (1,)], [1500, 777])):

            @jax.jit
            def select(arrays, pools=pools, pruned=pruned):
                return _selection.keep_largest(list(arrays), pools, pruned)

            text = select.lower(arrays).compile().as_text()
            for collective in ("all-gather", "all-to-all", "collective-permute"):
                assert collective not in text, collective
            assert "all-reduce" in text
            got = select(arrays)
            for mask, array, expected in zip(
                got, arrays, reference(values, pools, pruned), strict=True
            ):
                assert mask.sharding.is_equivalent_to(array.sharding, 2)
                assert np.array_equal(mask, expected)


@pytest.mark.skipif(jax.device_count() == 1, reason="is what this test runs")
def test_all_of_this_on_one_device():
    # There arrays are seen as rows, first pivots come from samples, and ties are cut at once.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            __file__,
        ],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
