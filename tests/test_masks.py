"""compute_masks, apply_masks, straight_through: values by hand, then properties, then the NumPy reference."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import reference
from compilation import compilations
from hypothesis import given, settings
from hypothesis import strategies as st

import prunax
from prunax import allocation, patterns

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
ALLOCATIONS = {
    name: getattr(allocation, name) for name in ("uniform", "global_ranking", "erdos_renyi", "lamp")
}


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def mask_of(kernel, sparsity=None, **options):
    return prunax.compute_masks({"kernel": kernel}, sparsity, **options)["kernel"]


# Values by hand


def test_keeps_the_largest_magnitudes():
    kernel = jnp.array([[4.0, -1.0], [-2.0, 3.0]])
    assert mask_of(kernel, 0.5).tolist() == [[True, False], [False, True]]


def test_leaves_that_are_not_kernels_get_the_scalar_true():
    params = {"dense": {"kernel": normal((4, 5)), "bias": jnp.zeros(5)}, "step": jnp.int32(3)}
    masks = prunax.compute_masks(params, 0.5)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    for mask in (masks["dense"]["bias"], masks["step"]):
        assert mask.shape == ()
        assert mask.dtype == jnp.bool_
        assert bool(mask)


def test_ties_keep_the_lower_flat_index():
    assert mask_of(jnp.ones((2, 3)), 0.5).tolist() == [[True, True, True], [False, False, False]]


@pytest.mark.device_independent
def test_ties_across_leaves_keep_the_earlier_leaf():
    params = {"b": {"kernel": jnp.ones((1, 3))}, "a": {"kernel": jnp.ones((1, 3))}}
    masks = prunax.compute_masks(params, 0.5, allocation=allocation.global_ranking)
    assert masks["a"]["kernel"].tolist() == [[True, True, True]]  # dicts are in order of their keys
    assert masks["b"]["kernel"].tolist() == [[False, False, False]]


def test_ties_at_the_boundary_do_not_go_together():
    kernel = jnp.array([[1.0, 1.0, 1.0, 2.0]])
    assert mask_of(kernel, 0.25).tolist() == [[True, True, False, True]]


@pytest.mark.parametrize(
    ("n", "sparsity", "pruned"),
    [
        (2, 0.25, 0),
        (6, 0.25, 2),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (10, 0.9, 9),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (35, 0.9, 32),
    ],
)
def test_rounds_half_to_even(n, sparsity, pruned):
    assert int((~mask_of(normal((1, n)), sparsity)).sum()) == pruned


@pytest.mark.device_independent
@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_ties_with_zero(dtype):
    scores = jnp.array([[-0.0, 0.0, -0.0, 0.0]], dtype)
    assert mask_of(scores, 0.5).tolist() == [[True, True, False, False]]
    assert mask_of(scores, 0.5, scores={"kernel": scores}).tolist() == [[True, True, False, False]]


@pytest.mark.device_independent
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_scores_rank_at_the_ends(dtype):
    scores = jnp.array([[1.0, jnp.inf, -jnp.inf, -1.0]], dtype)
    assert mask_of(scores, 0.25, scores={"kernel": scores}).tolist() == [[True, True, False, True]]
    assert mask_of(scores, 0.75, scores={"kernel": scores}).tolist() == [
        [False, True, False, False]
    ]


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_infinite_scores_rank_highest_in_every_allocation(name):
    params = {"a": {"kernel": jnp.array([[1.0, jnp.inf, 2.0, 3.0]])}}
    mask = prunax.compute_masks(params, 0.75, allocation=ALLOCATIONS[name])["a"]["kernel"]
    assert mask.tolist() == [[False, True, False, False]]


def test_given_scores_decide_and_not_the_weights():
    scores = {"kernel": jnp.array([[-5.0, 1.0, 0.0]])}
    assert mask_of(jnp.array([[9.0, 1.0, 2.0]]), 1 / 3, scores=scores).tolist() == [
        [False, True, True]
    ]


def test_scalar_score_leaves_a_leaf_whole():
    params = {"a": {"kernel": normal((4, 4))}, "b": {"kernel": normal((4, 4))}}
    scores = {"a": {"kernel": jnp.abs(params["a"]["kernel"])}, "b": {"kernel": jnp.zeros(())}}
    masks = prunax.compute_masks(params, 0.5, scores=scores)
    assert masks["b"]["kernel"].shape == ()
    assert bool(masks["b"]["kernel"])
    assert int(masks["a"]["kernel"].sum()) == 8


@pytest.mark.device_independent
def test_threshold_keeps_what_exceeds_it():
    kernel = jnp.array([[0.0, -0.5, 1.0, -2.0]])
    assert mask_of(kernel, threshold=0.5).tolist() == [[False, False, True, True]]
    assert mask_of(kernel, threshold=0).tolist() == [[False, True, True, True]]
    # A CPU takes denormal numbers for zeros where it compares floats, a GPU does not: bits decide.
    tiny = jnp.array([[0.0, -0.0, 1e-40, -1e-45]])
    assert mask_of(tiny, threshold=0).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_is_not_rounded_to_the_dtype_of_the_weights(dtype):
    weight = jnp.asarray(0.1, dtype)
    for threshold in (0.1, jnp.float32(0.1)):
        kept = bool(mask_of(jnp.full((1, 1), weight), threshold=threshold)[0, 0])
        assert kept == (float(weight) > float(np.float32(0.1)))


def test_threshold_takes_patterns():
    kernel = jnp.array([[1.0, 1.0, 3.0, 3.0], [1.0, 1.0, 3.0, 3.0]])
    mask = mask_of(kernel, threshold=2.0, pattern=patterns.Block((2, 2)))
    assert mask.tolist() == [[False, False, True, True]] * 2


def test_pools_rank_leaves_of_different_dtypes_by_value():
    values = {"a": [1.0, 4.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 6.0, 9.0]}
    params = {
        name: {"kernel": jnp.array([values[name]], dtype)}
        for name, dtype in zip("abc", DTYPES, strict=True)
    }
    masks = prunax.compute_masks(params, 5 / 9, allocation=allocation.global_ranking)
    kept = {name: masks[name]["kernel"][0].tolist() for name in "abc"}
    assert kept == {"a": [False, False, True], "b": [False, False, True], "c": [False, True, True]}


def test_where_sees_paths_and_leaves():
    seen = []

    def where(path, leaf):
        seen.append((path, leaf.shape))
        return path == "body/0/w"

    params = {"body": [{"w": normal((2, 2))}, {"w": normal((2, 2))}], "activation": jnp.tanh}
    masks = prunax.compute_masks({k: params[k] for k in ("body",)}, 0.5, where=where)
    assert seen == [("body/0/w", (2, 2)), ("body/1/w", (2, 2))]
    assert masks["body"][0]["w"].shape == (2, 2)
    assert masks["body"][1]["w"].shape == ()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (0,), (1,), ()])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.51, 1.0])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_tiny_leaves(shape, sparsity, name):
    where = lambda path, leaf: True  # noqa: E731
    mask = mask_of(jnp.ones(shape), sparsity, where=where, allocation=ALLOCATIONS[name])
    assert mask.shape == shape
    assert mask.dtype == jnp.bool_
    n = math.prod(shape)
    # Erdos-Renyi keeps a leaf of one weight or one axis whole until its budget forces it.
    if name != "erdos_renyi" or sparsity in (0.0, 1.0):
        assert int((~mask).sum()) == round(sparsity * n)


def test_an_empty_leaf_beside_a_full_one():
    params = {"a": {"kernel": jnp.ones((0, 3))}, "b": {"kernel": normal((3, 3))}}
    for name, choice in ALLOCATIONS.items():
        masks = prunax.compute_masks(params, 5 / 9, allocation=choice)
        assert masks["a"]["kernel"].shape == (0, 3)
        assert int((~masks["b"]["kernel"]).sum()) == 5, name


def test_masks_can_be_donated():
    masks = prunax.compute_masks(
        {"kernel": normal((4, 4)), "a": jnp.ones(2), "b": jnp.ones(2)}, 0.5
    )
    flipped = jax.jit(lambda m: jax.tree.map(jnp.logical_not, m), donate_argnums=0)(masks)
    assert not bool(flipped["a"])


def test_apply_masks_replaces_and_does_not_multiply():
    params = {
        "kernel": jnp.array([[jnp.nan, jnp.inf, -3.0, 2.0]]),
        "count": jnp.arange(3),
        "flag": jnp.array([True, True]),
        "name": "model",
        "function": jnp.tanh,
        "nothing": None,
    }
    masks = {
        "kernel": jnp.array([[False, False, False, True]]),
        "count": jnp.array([True, False, False]),
        "flag": jnp.array([True, False]),
        "name": True,
        "function": np.bool_(True),
        "nothing": None,
    }
    pruned = prunax.apply_masks(params, masks)
    assert pruned["kernel"].tolist() == [[0.0, 0.0, 0.0, 2.0]]
    assert not np.signbit(np.asarray(pruned["kernel"])).any()
    assert pruned["count"].tolist() == [0, 0, 0]
    assert pruned["count"].dtype == jnp.int32
    assert pruned["flag"].tolist() == [True, False]
    assert pruned["flag"].dtype == jnp.bool_
    assert (pruned["name"], pruned["function"], pruned["nothing"]) == ("model", jnp.tanh, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_masks_preserves_the_dtype(dtype):
    kernel = normal((3, 4), dtype=dtype)
    pruned = prunax.apply_masks({"k": kernel}, {"k": jnp.eye(3, 4, dtype=jnp.bool_)})["k"]
    assert pruned.dtype == dtype
    assert jnp.array_equal(pruned, kernel * jnp.eye(3, 4, dtype=dtype))


def test_apply_masks_takes_numpy_arrays():
    pruned = prunax.apply_masks({"k": np.ones((1, 2))}, {"k": np.array([[True, False]])})
    assert pruned["k"].tolist() == [[1.0, 0.0]]


def test_scalar_mask_false_zeroes_the_leaf():
    assert (
        prunax.apply_masks({"k": jnp.ones(3)}, {"k": jnp.array(False)})["k"].tolist() == [0.0] * 3
    )


def test_straight_through_masks_forward_and_not_backward():
    w, mask = jnp.array([2.0, 3.0, jnp.nan]), jnp.array([True, False, False])
    assert prunax.straight_through(w, mask).tolist() == [2.0, 0.0, 0.0]
    gradient = jax.grad(
        lambda w: jnp.sum(jnp.array([5.0, 6.0, 7.0]) * prunax.straight_through(w, mask))
    )(w)
    assert gradient.tolist() == [5.0, 6.0, 7.0]


def test_straight_through_is_evaluated_at_the_masked_weights():
    w, mask = jnp.array([2.0, 3.0]), jnp.array([True, False])
    gradient = jax.grad(lambda w: jnp.sum(prunax.straight_through(w, mask) ** 2))(w)
    assert gradient.tolist() == [4.0, 0.0]


def test_straight_through_under_jit_vmap_and_with_other_leaves():
    params = {"kernel": normal((2, 3)), "step": jnp.int32(1), "name": "x"}
    masks = {"kernel": jnp.eye(2, 3, dtype=jnp.bool_), "step": jnp.array(True), "name": True}

    @jax.jit
    def loss(kernel):
        return prunax.straight_through(params | {"kernel": kernel}, masks)["kernel"].sum()

    kernels = normal((5, 2, 3), 1)
    assert jnp.array_equal(jax.vmap(jax.grad(loss))(kernels), jnp.ones((5, 2, 3)))


# Properties


@pytest.mark.device_independent
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.9, 0.999, 1.0])
def test_prunes_exactly_round_of_s_times_n(dtype, sparsity):
    kernel = normal((37, 53), dtype=dtype)
    mask = mask_of(kernel, sparsity)
    assert int((~mask).sum()) == round(sparsity * kernel.size)
    kept, pruned = jnp.abs(kernel)[mask], jnp.abs(kernel)[~mask]
    if kept.size and pruned.size:
        assert kept.min() >= pruned.max()


@given(
    values=st.lists(
        st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, math.inf]), min_size=12, max_size=12
    )
)
def test_masks_are_nested_as_sparsity_grows(values):
    scores = jnp.array(values).reshape(3, 4)
    masks = [np.asarray(mask_of(scores, k / 12, scores={"kernel": scores})) for k in range(13)]
    for k, (denser, sparser) in enumerate(itertools.pairwise(masks)):
        assert (~denser).sum() == k
        assert (denser | ~sparser).all()


@given(seed=st.integers(0, 10**6))
def test_permutation_equivariance_without_ties(seed):
    rng = np.random.default_rng(seed)
    values = rng.permutation(24).reshape(4, 6).astype(np.float32) + 1
    order = rng.permutation(24)
    mask = np.asarray(mask_of(jnp.asarray(values), 0.7)).reshape(-1)
    permuted = np.asarray(mask_of(jnp.asarray(values.reshape(-1)[order].reshape(4, 6)), 0.7))
    assert (permuted.reshape(-1) == mask[order]).all()


PATTERNS = {
    "unstructured": patterns.Unstructured(),
    "fan-in": patterns.ConstantFanIn(),
    "2:4": patterns.NM(2, 4),
    "block": patterns.Block((2, 3)),
    "channel": patterns.Channel(),
}
COMBINATIONS = [(p, a) for p in PATTERNS for a in ALLOCATIONS] + [("unstructured", "by_path")]
COMBINATIONS = [
    (p, a)
    for p, a in COMBINATIONS
    if not (p in ("fan-in", "2:4") and a in ("global_ranking", "lamp"))
]


def choice(name):
    return allocation.by_path({"a/*": 0.25}) if name == "by_path" else ALLOCATIONS[name]


@pytest.mark.parametrize(("pattern", "name"), COMBINATIONS)
def test_jit_equals_eager_equals_vmap_and_traced_sparsity_compiles_once(pattern, name):
    params = {"a": {"kernel": normal((8, 6))}, "b": {"kernel": normal((4, 16), 1)}}
    compute = functools.partial(
        prunax.compute_masks, allocation=choice(name), pattern=PATTERNS[pattern]
    )
    # Numbers of binary digits: the same in float32, so that a traced sparsity means the same.
    sparsities = [0.0, 0.125, 0.375, 0.5] + ([] if pattern == "2:4" else [0.75, 0.875, 1.0])
    eager = [compute(params, s) for s in sparsities]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(params, sparsity):
        return compute(params, sparsity)

    batched = jax.vmap(lambda s: compute(params, s))(jnp.array(sparsities))
    for i, (s, masks) in enumerate(zip(sparsities, eager, strict=True)):
        for other in (traced(params, s), jax.tree.map(lambda m: m[i], batched)):  # noqa: B023
            chex.assert_trees_all_equal(masks, other)
        closed = jax.jit(lambda p, s=s: compute(p, s))(params)
        chex.assert_trees_all_equal(masks, closed)


@pytest.mark.parametrize(("pattern", "name"), COMBINATIONS)
def test_vmap_over_params(pattern, name):
    params = {"a": {"kernel": normal((3, 8, 6))}, "b": {"kernel": normal((3, 4, 16), 1)}}
    compute = functools.partial(
        prunax.compute_masks, allocation=choice(name), pattern=PATTERNS[pattern]
    )
    batched = jax.vmap(lambda p: compute(p, 0.5))(params)
    for i in range(3):
        alone = compute(jax.tree.map(lambda p: p[i], params), 0.5)  # noqa: B023
        chex.assert_trees_all_equal(alone, jax.tree.map(lambda m: m[i], batched))  # noqa: B023


@pytest.mark.parametrize(("pattern", "name"), COMBINATIONS)
def test_a_new_sparsity_or_where_compiles_nothing(pattern, name):
    params = {"a": {"kernel": normal((8, 6))}, "b": {"kernel": normal((4, 16), 1)}}

    def compute(sparsity):
        return prunax.compute_masks(
            params,
            sparsity,
            allocation=choice(name),
            pattern=PATTERNS[pattern],
            where=lambda path, leaf: leaf.ndim == 2,
        )

    compute(0.5)
    with compilations() as compiled:
        for sparsity in (0.1, 0.25, 0.3, 0.0):
            compute(sparsity)
    assert compiled == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.int32])
def test_traced_sparsity_of_any_dtype(dtype):
    params = {"a": {"kernel": normal((8, 6))}, "b": {"kernel": normal((4, 16), 1)}}
    for chosen in ALLOCATIONS.values():
        for s in (0, 1) if dtype == jnp.int32 else (0.0, 0.5):
            traced = jax.jit(
                lambda s, chosen=chosen: prunax.compute_masks(params, s, allocation=chosen)
            )(jnp.asarray(s, dtype))
            eager = prunax.compute_masks(params, s, allocation=chosen)
            chex.assert_trees_all_equal(traced, eager)


@pytest.mark.parametrize("sparsity", [0.3, 0.45, 0.55, 0.7, 0.9])
def test_traced_sparsity_means_what_it_means_eager(sparsity):
    # s * n is a half here: in float32 s lies a little to one side of it.
    for n in (5, 10, 35, 70, 130):
        kernel = normal((1, n))
        traced = jax.jit(lambda s, kernel=kernel: mask_of(kernel, s))(sparsity)
        assert jnp.array_equal(traced, mask_of(kernel, sparsity)), n


def test_given_scores_may_be_traced_together_with_params():
    params = {"kernel": normal((6, 6))}
    scores = {"kernel": normal((6, 6), 1)}
    traced = jax.jit(lambda p, s: prunax.compute_masks(p, 0.5, scores=s))(params, scores)
    assert jnp.array_equal(traced["kernel"], mask_of(params["kernel"], 0.5, scores=scores))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_traced_nan_ranks_lowest(name):
    scores = {"kernel": jnp.array([[-1.0, jnp.nan, -jnp.inf, 2.0]])}
    if name == "lamp":
        scores = {"kernel": jnp.array([[1.0, jnp.nan, 0.5, 2.0]])}

    @jax.jit
    def compute(scores):
        return mask_of(jnp.ones((1, 4)), 0.25, scores=scores, allocation=ALLOCATIONS[name])

    if name != "erdos_renyi":  # a single leaf: ERK is uniform, but for the rounding of its density
        assert compute(scores).tolist() == [[True, False, True, True]]
    assert not bool(compute(scores)[0, 1])


def test_beyond_float32_counts_exactly():
    # 0.9 * n in float32 arithmetic is off by several units at this size.
    n = 2**24 + 2**20 + 7
    mask = mask_of(normal((1, n), dtype=jnp.bfloat16), 0.9)
    assert int(mask.sum()) == n - round(0.9 * n)


def test_150_leaves():
    params = {
        f"layer{i}": {"kernel": normal((8 + i % 5, 16), i), "bias": jnp.zeros(16)}
        for i in range(75)
    }
    masks = prunax.compute_masks(params, 0.9)
    for layer, mask in masks.items():
        n = params[layer]["kernel"].size
        assert int((~mask["kernel"]).sum()) == round(0.9 * n)


# Against the NumPy reference

NUMPY_DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
TREES = [
    {"a": (8, 3), "b": (4, 6)},
    {"a": (4, 1), "b": (2, 4, 5), "c": (12, 2)},
    {"conv": (3, 2, 4, 3), "stacked": (2, 4, 4)},
]
ALL_PATTERNS = [
    patterns.Unstructured(),
    patterns.ConstantFanIn(),
    patterns.ConstantFanIn(axis=-1),
    patterns.ConstantFanIn(axis=(0, -2)),
    patterns.NM(2, 4),
    patterns.NM(1, 4),
    patterns.NM(1, 2),
    patterns.Block((2, 2)),
    patterns.Block((3, 2)),
    patterns.Channel(),
    patterns.Channel(axis=-2),
]


SPARSITIES = [0.0, 0.05, 0.1, 1 / 3, 0.5, 0.55, 0.7, 0.8, 0.9, 0.99, 1.0]


def draw_scores(rng, shape, kind):
    if kind == "ties":
        return rng.integers(-3, 4, shape)
    if kind == "extreme":
        return rng.choice([0.0, -0.0, 1.0, -1.0, 3.0, np.inf], shape)
    return rng.standard_normal(shape)


@settings(max_examples=50)
@given(
    shapes=st.sampled_from(TREES),
    dtype=st.sampled_from(NUMPY_DTYPES),
    pattern=st.sampled_from(ALL_PATTERNS),
    name=st.sampled_from(sorted(ALLOCATIONS)),
    given_scores=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_the_reference(shapes, dtype, pattern, name, given_scores, seed):
    if pattern.compare_axis is not None and name in ("global_ranking", "lamp"):
        name = "uniform"
    if isinstance(pattern, patterns.NM):
        name = "uniform"  # Erdos-Renyi asks more of large leaves than the pattern can give
    if pattern == patterns.ConstantFanIn(axis=(0, -2)) and "conv" not in shapes:
        pattern = patterns.ConstantFanIn(axis=(0, 1))
    kinds = ["normal", "ties", "extreme"]
    if name == "lamp" or isinstance(pattern, patterns.Block | patterns.Channel):
        kinds.remove("extreme")  # a sum of infinities is for other tests
    if name == "lamp" and isinstance(pattern, patterns.Block | patterns.Channel):
        kinds = ["normal"]  # means of thirds tie in float64, and not in float32
    rng = np.random.default_rng(seed)
    # One compiled selection serves all of these.
    for kind, sparsity in itertools.product(kinds, rng.choice(SPARSITIES, 3)):
        if pattern.implied_sparsity is not None:
            sparsity = min(sparsity, pattern.implied_sparsity)
        if name == "erdos_renyi" and not clear_of_halves(shapes, sparsity, pattern):
            continue
        values = {
            path: draw_scores(rng, shape, kind).astype(dtype) for path, shape in shapes.items()
        }
        params = {path: {"kernel": jnp.asarray(v)} for path, v in values.items()}
        scores = list(values.values()) if given_scores else [np.abs(v) for v in values.values()]
        masks = prunax.compute_masks(
            params,
            sparsity,
            scores=params if given_scores else None,
            allocation=ALLOCATIONS[name],
            pattern=pattern,
        )
        expected = reference.masks(scores, sparsity, pattern=pattern, allocation=name)
        for path, mask in zip(values, expected, strict=True):
            np.testing.assert_array_equal(
                np.asarray(masks[path]["kernel"]), mask, err_msg=f"{path} {kind} {sparsity}"
            )


def clear_of_halves(shapes, sparsity, pattern):
    """Whether no budget of Erdos-Renyi is so near a half that float64 may round it either way."""
    sparsities = reference.erdos_renyi_sparsities(list(shapes.values()), sparsity)
    sizes = [
        len(units) for shape in shapes.values() for units in reference.contests(pattern, shape)[:1]
    ]
    budgets = [float(s * n) for s, n in zip(sparsities, sizes, strict=True)]
    return all(abs(b % 1 - 0.5) > 1e-6 for b in budgets)


# Bad input


def params_of(**leaves):
    return {name: {"kernel": leaf} for name, leaf in leaves.items()}


GOOD = params_of(a=jnp.ones((4, 4)), b=jnp.ones((4, 6)))
BAD = {
    "percent": (
        {"sparsity": 80},
        ValueError,
        r"compute_masks: sparsity .*\[0, 1\], got 80. Pass 0.8 for 80%",
    ),
    "negative": ({"sparsity": -0.1}, ValueError, r"sparsity must lie in \[0, 1\], got -0.1"),
    "nan": ({"sparsity": float("nan")}, ValueError, r"sparsity must lie in \[0, 1\], got nan"),
    "text": ({"sparsity": "0.5"}, TypeError, r"sparsity must be a number in \[0, 1\], got '0.5'"),
    "several": ({"sparsity": jnp.array([0.1, 0.2])}, TypeError, r"sparsity must be a number"),
    "neither": ({}, ValueError, r"pass a sparsity in \[0, 1\], or threshold="),
    "both": ({"sparsity": 0.5, "threshold": 0.1}, ValueError, r"both sparsity and threshold"),
    "negative threshold": (
        {"threshold": -1.0},
        ValueError,
        r"threshold must be a number of at least 0, got -1",
    ),
    "nan threshold": (
        {"threshold": float("nan")},
        ValueError,
        r"threshold must be a number of at least 0",
    ),
    "threshold for each leaf": (
        {"threshold": {"a": 1.0}},
        TypeError,
        r"threshold must be one number",
    ),
    "threshold of 2:4": (
        {"threshold": 0.1, "pattern": patterns.NM(2, 4)},
        ValueError,
        r"NM.* takes no threshold",
    ),
    "nothing selected": (
        {"sparsity": 0.5, "where": lambda path, leaf: False},
        ValueError,
        r"`where` selects no leaf. The leaves are: a/kernel, b/kernel. Pass where=",
    ),
    "3:8 on a length of 4": (
        {"pattern": patterns.NM(3, 8)},
        ValueError,
        r"NM\(.*\) does not fit 'a/kernel' of shape \(4, 4\): axis -2 .* 8 does not divide. Leave the leaf out",
    ),
    "axis of a convolution on a matrix": (
        {"sparsity": 0.5, "pattern": patterns.ConstantFanIn(axis=(-4, -3, -2))},
        ValueError,
        r"does not fit 'a/kernel' of shape \(4, 4\): axis -4 does not exist",
    ),
    "an axis twice": (
        {"sparsity": 0.5, "pattern": patterns.ConstantFanIn(axis=(0, -2))},
        ValueError,
        r"does not fit 'a/kernel' .* twice",
    ),
    "more than 2:4 prunes": (
        {"sparsity": 0.75, "pattern": patterns.NM(2, 4)},
        ValueError,
        r"prunes at most 0.5 of 'a/kernel', got sparsity 0.75. Leave the sparsity out",
    ),
    "2:4 across leaves": (
        {"pattern": patterns.NM(2, 4), "allocation": allocation.global_ranking},
        ValueError,
        r"nothing to rank across leaves. Use allocation.uniform",
    ),
    "pattern not called": (
        {"sparsity": 0.5, "pattern": patterns.Unstructured},
        TypeError,
        r"Call it: Unstructured",
    ),
    "scores of another tree": (
        {"sparsity": 0.5, "scores": {"a": {"kernel": jnp.ones((4, 4))}}},
        ValueError,
        r"scores must have the tree structure of the params, but 'b/kernel' is missing",
    ),
    "a score too many": (
        {
            "sparsity": 0.5,
            "scores": params_of(a=jnp.ones((4, 4)), b=jnp.ones((4, 6)), c=jnp.ones(2)),
        },
        ValueError,
        r"'c/kernel' of the scores is not in the params",
    ),
    "scores of another shape": (
        {"sparsity": 0.5, "scores": params_of(a=jnp.ones((4, 4)), b=jnp.ones((6, 4)))},
        ValueError,
        r"scores of 'b/kernel' have shape \(6, 4\), the leaf has \(4, 6\). Score every weight",
    ),
    "integer scores": (
        {"sparsity": 0.5, "scores": params_of(a=jnp.ones((4, 4), jnp.int32), b=jnp.ones((4, 6)))},
        TypeError,
        r"scores of 'a/kernel' must be floating-point, got int32. Convert them",
    ),
    "a score function": (
        {"sparsity": 0.5, "scores": prunax.scores.magnitude},
        TypeError,
        r"Call it: scores=score",
    ),
    "only scalar scores": (
        {"sparsity": 0.5, "scores": params_of(a=jnp.zeros(()), b=jnp.zeros(()))},
        ValueError,
        r"every selected leaf has a scalar score.*a/kernel, b/kernel",
    ),
    "nan scores": (
        {"sparsity": 0.5, "scores": params_of(a=jnp.ones((4, 4)), b=jnp.full((4, 6), jnp.nan))},
        ValueError,
        r"the scores of 'b/kernel' contain NaN.*jnp.nan_to_num",
    ),
    "unknown path": (
        {"sparsity": 0.5, "allocation": allocation.by_path({"c/kernel": 0.5})},
        ValueError,
        r"by_path: 'c/kernel' matches no prunable leaf. Prunable are: a/kernel, b/kernel. Correct the path",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        prunax.compute_masks(GOOD, **arguments)


def test_nan_params_are_named():
    params = params_of(a=jnp.ones((2, 2)), b=jnp.array([[1.0, jnp.nan]]))
    with pytest.raises(ValueError, match=r"the scores of 'b/kernel' contain NaN"):
        prunax.compute_masks(params, 0.5)
    with pytest.raises(ValueError, match=r"the scores of 'b/kernel' contain NaN"):
        prunax.compute_masks(params, threshold=0.5)


def test_nan_where_it_does_not_matter():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.array([jnp.nan])}
    assert int(prunax.compute_masks(params, 0.5)["kernel"].sum()) == 2


def test_integer_leaves_are_named():
    with pytest.raises(
        TypeError, match=r"`where` selects 'n', which is int32.*Leave it out with `where`"
    ):
        prunax.compute_masks(
            {"n": jnp.arange(4), "w": jnp.ones(3)}, 0.5, where=lambda path, leaf: True
        )


def test_traced_vector_of_sparsities():
    with pytest.raises(
        TypeError, match=r"sparsity must be a scalar, got shape \(2,\). Use jax.vmap"
    ):
        jax.jit(lambda s: prunax.compute_masks(GOOD, s))(jnp.array([0.5, 0.9]))


@pytest.mark.parametrize("function", [prunax.apply_masks, prunax.straight_through])
@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"k": jnp.ones((2, 2), jnp.bool_)}, ValueError, r"'b' is missing from the masks"),
        (
            {"k": jnp.ones((2, 2)), "b": True},
            TypeError,
            r"the mask of 'k' must be bool, got float32",
        ),
        (
            {"k": jnp.ones((1, 2), jnp.uint8), "b": True},
            TypeError,
            r"'k' must be bool, got uint8.*get_masks",
        ),
        (
            {"k": jnp.ones((2, 1), jnp.bool_), "b": True},
            ValueError,
            r"the mask of 'k' has shape \(2, 1\), the leaf has \(2, 2\)",
        ),
    ],
)
def test_bad_masks(function, masks, error, message):
    with pytest.raises(error, match=rf"{function.__name__}: .*{message}"):
        function({"k": jnp.ones((2, 2)), "b": jnp.ones(2)}, masks)


NARROW = ["float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"]
NARROW += ["float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_dtypes_are_ranked_by_their_values(dtype):
    # Values that every one of them holds exactly; those of equal magnitude are told apart by position.
    kernel = jnp.array([[0.5, -3.0, 1.0, 0.0], [-0.5, 2.0, -1.5, 4.0]]).astype(dtype)
    masks = prunax.compute_masks({"kernel": kernel}, 0.5)
    expected = [[False, True, False, False], [False, True, True, True]]
    assert masks["kernel"].tolist() == expected
    tx = prunax.prune(optax.sgd(0.0), 0.5)
    state = tx.init({"kernel": kernel})
    updates, state = tx.update({"kernel": jnp.zeros_like(kernel)}, state, {"kernel": kernel})
    assert updates["kernel"].dtype == kernel.dtype
    assert state.masks["kernel"].tolist() == expected
    pruned = prunax.apply_masks({"kernel": kernel}, masks)["kernel"]
    assert pruned.dtype == kernel.dtype
    assert pruned.astype(jnp.float32).tolist() == [[0.0, -3.0, 0.0, 0.0], [0.0, 2.0, -1.5, 4.0]]


def test_complex_weights_are_ranked_by_their_modulus():
    kernel = jnp.array([[3 + 4j, 4.0], [-6j, 0.1 + 0.1j]])
    params = {"kernel": kernel}
    assert prunax.compute_masks(params, 0.5)["kernel"].tolist() == [[True, False], [True, False]]
    assert prunax.compute_masks(params, threshold=4.5)["kernel"].tolist() == [
        [True, False],
        [True, False],
    ]
    grads = {"kernel": jnp.array([[0.0, 1.0], [0.0, 10j]], kernel.dtype)}
    by_score = {
        "gradient": [[0, 1], [0, 10]],
        "saliency": [[0, 4], [0, 2**0.5]],
        "fisher": [[0, 16], [0, 2]],
        "movement": [[0, -4], [0, 1]],  # removing (0.1 + 0.1j): -Re(w g)
    }
    for name, expected in by_score.items():
        scores = getattr(prunax.scores, name)(params, grads)["kernel"]
        assert scores.dtype == jnp.float32
        assert jnp.allclose(scores, jnp.array(expected, jnp.float32)), name
    tx = prunax.prune(optax.sgd(0.0), 0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    pruned = optax.apply_updates(params, updates)["kernel"]
    assert pruned.tolist() == [[3 + 4j, 0], [-6j, 0]]
