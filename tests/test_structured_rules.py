"""What primitives let pass: channels that lie across a loop, a transform, a solve, an index, and what stays whole."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from test_structured import masked
from zoo import normal

import prunax
from prunax import structured

pytestmark = pytest.mark.relaxed_promotion

F = 8
P = {"up": normal(0, 5, F), "down": normal(1, F, 3)}
X = normal(2, 2, 6, 5)
MATRIX = normal(3, 6, 6) + 4 * np.eye(6, dtype=np.float32)


def _turns(h):
    return lax.fori_loop(0, jnp.int32(0 * h.sum() + 3), lambda i, h: 0.5 * h + h * h, h)


def _largest(h):
    def pooled(h):
        return lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID").sum()

    return jax.grad(pooled)(h) * h


def _on_each_device(h):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")

    def centred(h):
        return jnp.tanh(h - lax.pmean(h, "d")) + lax.ppermute(h, "d", [(0, 1), (1, 0)])

    return jax.shard_map(centred, mesh=mesh, in_specs=spec, out_specs=spec)(h)


def _some_channels(h):
    part = jax.vmap(lambda h, i: lax.dynamic_slice(h, (0, i), (6, 2)))(h, jnp.array([1, 3]))
    return part @ jnp.ones((2, F))


# h has the axes (batch, place, channel); each use lets the channels go one by one.
USES = {
    "tile": lambda h: jnp.tile(h, (2, 1, 1)),
    "tile of channels": lambda h: jnp.tile(h, (1, 1, 2)).reshape(2, 6, 2, F).sum(2),
    "while": lambda h: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, h))[
        1
    ],
    "fori_loop with a traced bound": _turns,
    "fft along another axis": lambda h: jnp.fft.fft(h, axis=1).real,
    "psum": lambda h: jax.vmap(lambda r: lax.psum(r, "i"), axis_name="i")(h),
    "shard_map over examples": _on_each_device,
    "gradient of max pooling": _largest,
    "linear solve": lambda h: jnp.linalg.solve(MATRIX, h),
    "triangular solve": lambda h: jax.scipy.linalg.solve_triangular(MATRIX, h[0], lower=True),
    "slice at a start for each": lambda h: jax.vmap(
        lambda h, i: lax.dynamic_slice(h, (i, 0), (2, h.shape[1]))
    )(h, jnp.array([1, 3])),
    "roll by a number for each": lambda h: jax.vmap(lambda h, i: jnp.roll(h, i, axis=0))(
        h, jnp.array([1, 3])
    ),
    "update at a start for each": lambda h: jax.vmap(
        lambda h, i: lax.dynamic_update_slice(jnp.zeros((8, h.shape[1])), h, (i, 0))
    )(h, jnp.array([1, 2])),
    "scatter at an index for each": lambda h: jax.vmap(lambda h, i: h.at[i].add(h[0]))(
        h, jnp.array([1, 2])
    ),
}


@pytest.mark.parametrize("name", USES)
def test_channels_pass(name):
    @jax.jit
    def fn(p, x):
        return USES[name](jnp.tanh(x @ p["up"])) @ p["down"]

    group = next(g for g in structured.axis_groups(fn, P, X) if g.size == F)
    assert group.frozen is None
    assert group.preserved
    keep = {group: [0, 2, 5]}
    small = structured.shrink_function(fn, keep)
    params = structured.shrink(P, keep)
    whole = masked(P, keep)
    np.testing.assert_allclose(small(params, X), fn(whole, X), rtol=1e-4, atol=1e-5)
    if "traced" in name or name == "while":
        return  # no reverse mode
    ours, theirs = (
        jax.jit(jax.grad(lambda p, f=f: f(p, X).sum()))(p)
        for f, p in ((small, params), (fn, whole))
    )
    np.testing.assert_allclose(ours["up"], theirs["up"][:, [0, 2, 5]], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("use", "primitive"),
    [
        (lambda h: jnp.fft.fft(h, axis=-1).real, "fft"),
        (lambda h: jnp.linalg.solve(jnp.eye(F) * 2.0, h.swapaxes(1, 2)).swapaxes(1, 2), "lu"),
        (_some_channels, "gather"),
    ],
)
def test_what_mixes_channels_freezes_them(use, primitive):
    def fn(p, x):
        return use(jnp.tanh(x @ p["up"])) @ p["down"]

    group = next(g for g in structured.axis_groups(fn, P, X) if g.name == "up[1]")
    assert primitive in str(group.frozen)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_or_last_of_sorted_channels(reverse):
    """The largest are the largest of those that are left."""

    def fn(p, x, keep=slice(None)):
        h = jnp.sort((x @ p["up"])[..., keep])
        return h[..., ::-1][..., :3] if reverse else h[..., -3:]

    group = next(g for g in structured.axis_groups(fn, P, X) if g.name == "up[1]")
    assert group.frozen is None and group.least == 3 and not group.preserved
    keep = {group: [0, 2, 5, 6]}
    small = structured.shrink_function(fn, keep)(structured.shrink(P, keep), X)
    np.testing.assert_allclose(small, fn(P, X, np.array(keep[group])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda h: jnp.sort(h)[..., 2:5], "sorted by `sort`"),
        (lambda h: jnp.sort(h)[..., :2] + jnp.sort(h) @ P["down"][:, :2], "sorted by `sort`"),
        (lambda h: jnp.cumsum(jnp.sort(h), -1)[..., -1], "accumulated from place to place"),
        (lambda h: (h * h[..., ::-1]).sum(-1), "reversed by `rev`"),
    ],
)
def test_other_uses_of_channels_in_another_order_freeze_them(use, why):
    def fn(p, x):
        return use(x @ p["up"] @ p["square"])

    params = {**P, "square": normal(9, F, F)}
    group = next(g for g in structured.axis_groups(fn, params, X) if g.name == "square[1]")
    assert why in str(group.frozen)


def test_another_function_that_sorts_the_channels_in_its_way_is_refused():
    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    def ordered(p, x):
        return jnp.sort(jnp.tanh(x @ p["up"])) @ p["down"]

    group = next(g for g in structured.axis_groups(fn, P, X) if g.size == F)
    keep = {group: [0, 2, 5]}
    with pytest.raises(ValueError, match="ordered ties units together"):
        structured.shrink_function(ordered, keep)(structured.shrink(P, keep), X)


def test_a_layer_of_a_stack_by_a_number_that_is_traced():
    stack = {"up": normal(0, 3, 5, F), "down": normal(1, 3, F, 5)}

    def fn(p, x):
        def turn(i, x):
            up, down = (lax.dynamic_index_in_dim(p[k], i, keepdims=False) for k in ("up", "down"))
            return x + jnp.tanh(x @ up) @ down

        return lax.fori_loop(0, 3, turn, x)

    small = structured.prune_channels(fn, stack, X, sparsity=0.5)
    assert small.params["up"].shape == (3, 5, F // 2)
    keep = {g.name: units for g, units in small.keep.items()}["up[2]"]
    silent = {**stack, "down": stack["down"] * np.isin(np.arange(F), keep)[:, None]}
    np.testing.assert_allclose(small.fn(small.params, X), fn(silent, X), rtol=1e-5, atol=1e-5)


def test_a_returned_cache_is_named():
    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        return {"logits": h @ p["down"], "cache": {"k": h}}

    group = next(g for g in structured.axis_groups(fn, P, X) if g.size == F)
    assert "output cache/k" in str(group.frozen)
    assert "shrink_function" in str(group.frozen)


# What shrinks is decided by the kernels.


@pytest.mark.parametrize("extra", ["embedding", "scale"])
def test_a_leaf_that_is_no_kernel_holds_nothing_back(extra):
    """A residual stream that starts at a table; a kernel with a gain for each unit."""
    p = {"embedding": normal(3, 7, F), "scale": normal(4, 1, F), **P, "mid": normal(5, F, F)}

    def fn(p, ids):
        if extra == "scale":
            return jnp.tanh(X @ (p["up"] * p["scale"])) @ p["down"]
        h = p["embedding"][ids]
        return (h + jnp.tanh(h) @ p["mid"]) @ p["down"]

    ids = np.array([[1, 2, 3]])
    small = structured.prune_channels(fn, p, ids, sparsity=0.5)
    assert any(g.size == F and extra in str(g.members) for g in small.keep)
    whole = masked(p, small.keep)
    np.testing.assert_allclose(small.fn(small.params, ids), fn(whole, ids), rtol=1e-5, atol=1e-6)


def test_what_is_left_whole_is_listed_with_the_reason():
    p = {
        "embedding": normal(3, 7, F),
        "up": normal(0, F, 6),
        "a": normal(1, 6, 4),
        "b": normal(2, 4, 3),
    }

    def fn(p, ids):
        return p["embedding"][ids] @ p["up"] @ p["a"] @ p["b"]

    def small(**kwargs):
        found = structured.prune_channels(fn, p, np.array([1, 2]), sparsity=0.5, **kwargs)
        return {g.name: why for g, why in found.whole.items()}, found

    whole, _ = small(where=lambda path, leaf: path == "a")
    assert whole["embedding[1]"] == "produced by embedding alone, which `where` leaves out"
    assert whole["up[1]"] == "produced by up, which `where` leaves out"
    assert "function's output" in whole["b[1]"]
    assert "a[1]" not in whole
    both = lambda path, leaf: prunax.trees.is_kernel(path, leaf) or "embedding" in path  # noqa: E731
    whole, found = small(where=both)
    assert found.params["embedding"].shape == (7, 4)
    whole, _ = small(scores={"a[1]": np.arange(4.0)})
    assert whole["up[1]"] == "without scores"


# Half means half.


class _Normed(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(self.groups)(nn.Conv(16, (3, 3), name="a")(x)))
        return nn.Dense(5)(x.mean((1, 2)))


def test_half_of_a_normalised_axis_is_half():
    x = normal(0, 1, 4, 4, 3)
    net = _Normed(4)
    variables = jax.tree.map(np.array, net.init(jax.random.key(0), x))
    small = structured.prune_channels(net.apply, variables, x, sparsity=0.5)
    assert small.params["params"]["a"]["kernel"].shape[-1] == 8
    # Whole groups go, so that what is left is normalised as before.
    assert [g.size for g in small.keep] == [4]
    assert "shrinks along the same axis" in " ".join(small.whole.values())
    whole = masked(variables, small.keep)
    np.testing.assert_allclose(small.fn(small.params, x), net.apply(whole, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sparsity", "left"), [(0.5, (1, 8)), (0.25, (2, 6))])
def test_heads_go_or_their_width(sparsity, left):
    """Half of two heads is one of them; a quarter is two of eight dimensions of each."""
    heads, width = 2, 8
    p = {name: normal(i, 6, heads * width) for i, name in enumerate("qkv")}
    p["o"] = normal(4, heads * width, 3)

    def fn(p, x):
        q, k, v = ((x @ p[n]).reshape(5, heads, width) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
        return jnp.einsum("hqk,khd->qhd", a, v).reshape(5, heads * width) @ p["o"]

    small = structured.prune_channels(fn, p, normal(9, 5, 6), sparsity=sparsity)
    assert {x.shape[1] for x in (small.params[n] for n in "qkv")} == {left[0] * left[1]}
    assert small.params["o"].shape == (left[0] * left[1], 3)


@functools.cache
def _many_widths():
    widths = range(6, 14)
    p = {f"w{i}": normal(i, a, a + 1) for i, a in enumerate(widths)}
    return lambda p, x: functools.reduce(lambda x, k: jnp.tanh(x @ p[k]), sorted(p), x), p


@pytest.mark.parametrize(
    "allocation",
    [
        prunax.allocation.uniform,
        functools.partial(prunax.allocation.global_ranking, normalize=True),
        prunax.allocation.lamp,
        prunax.allocation.erdos_renyi,
    ],
)
def test_units_are_chosen_as_masks_choose_weights(allocation):
    fn, p = _many_widths()
    x = normal(99, 2, 6)
    small = structured.prune_channels(fn, p, x, sparsity=0.4, allocation=allocation)
    groups = structured.prunable_groups(small.groups, p)
    magnitude = prunax.scores.magnitude(p)
    scores = structured.group_scores(groups, p, magnitude)
    vectors = {g.name: jnp.asarray(s, jnp.float32) for g, s in scores.items()}
    kept = prunax.compute_masks(vectors, 0.4, allocation=allocation, where=lambda *_: True)
    for group in groups:
        want = np.flatnonzero(np.broadcast_to(kept[group.name], group.size))
        np.testing.assert_array_equal(
            small.keep.get(group, range(group.size)),
            want if len(want) else [np.argmax(scores[group])],
        )
