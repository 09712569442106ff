"""Residual branches of networks of every framework, and the networks without them, bit for bit."""

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import normal

from prunax import structured

pytestmark = pytest.mark.relaxed_promotion

D, F, LAYERS = 6, 8, 3
X = normal(100, 2, 4, D)


def block(p, x):
    """Two branches: the first mixes places, the second channels."""
    h = jnp.tanh(x * p["scale"])
    x = x + jnp.einsum("qk,bkd->bqd", p["mix"], h)
    return x + jax.nn.gelu(x @ p["mlp"]["up"]) @ p["mlp"]["down"]


def layer(seed):
    mlp = {"up": normal(seed, D, F) / 3, "down": normal(seed + 1, F, D) / 3}
    return {"scale": normal(seed + 2, D), "mix": normal(seed + 3, 4, 4), "mlp": mlp}


PLAIN = {"layers": [layer(10 * i) for i in range(LAYERS)], "head": normal(99, D, 3)}


def plain(p, x, without=()):
    for i, own in enumerate(p["layers"]):
        if i not in without:
            x = block(own, x)
    return x @ p["head"]


STACKED = {**PLAIN, "layers": jax.tree.map(lambda *x: np.stack(x), *PLAIN["layers"])}


@pytest.mark.parametrize("remat", [False, True])
def test_branches_are_named_by_what_is_theirs(remat):
    """Also where the whole is compiled, and each block recomputed."""

    def fn(p, x):
        own = jax.checkpoint(block) if remat else block
        for q in p["layers"]:
            x = own(q, x)
        return x @ p["head"]

    found = structured.branches(jax.jit(fn), PLAIN, X)
    names = ("mix+scale", "mlp")
    assert [b.name for b in found] == [f"layers/{i}/{n}" for i in range(LAYERS) for n in names]
    assert found[1].leaves == ("layers/0/mlp/down", "layers/0/mlp/up")
    assert found[0].leaves == ("layers/0/mix", "layers/0/scale")
    assert "test_structured_depth.py" in found[0].source


def test_block_of_a_list_leaves_no_gap():
    small = structured.prune_depth(plain, PLAIN, X, remove=["layers/1"])
    assert small.removed == tuple(b.name for b in structured.branches(plain, PLAIN, X)[2:4])
    rest = {**PLAIN, "layers": [PLAIN["layers"][0], PLAIN["layers"][2]]}
    chex.assert_trees_all_equal(small.params, rest)
    np.testing.assert_array_equal(small.fn(rest, X), jax.jit(plain)(rest, X))
    # Inputs of another shape are traced anew, and the function can be pruned again.
    np.testing.assert_array_equal(small.fn(rest, X[:1]), jax.jit(plain)(rest, X[:1]))
    narrow = structured.prune_channels(small.fn, small.params, X, sparsity=0.5)
    assert narrow.params["layers"][0]["mlp"]["up"].shape == (D, F // 2)
    twice = structured.prune_depth(small.fn, small.params, X, remove=["layers/1"])
    np.testing.assert_array_equal(twice.fn(twice.params, X), jax.jit(plain)(twice.params, X))


def test_one_branch_of_a_block():
    small = structured.prune_depth(plain, PLAIN, X, remove=["layers/1/mlp"])
    assert [sorted(p) for p in small.params["layers"]] == [
        ["mix", "mlp", "scale"], ["mix", "scale"], ["mix", "mlp", "scale"]
    ]  # fmt: skip
    silent = jax.tree.map(np.copy, PLAIN)
    silent["layers"][1]["mlp"]["down"][:] = 0
    np.testing.assert_array_equal(small.fn(small.params, X), jax.jit(plain)(silent, X))
    grads = jax.grad(lambda p: small.fn(p, X).sum())(small.params)
    whole = jax.grad(lambda p: plain(p, X).sum())(silent)
    # Of gradients up to 6: JAX 0.12 compiles the two programs to sums of other orders.
    np.testing.assert_allclose(
        grads["layers"][1]["mix"], whole["layers"][1]["mix"], rtol=1e-5, atol=3e-5
    )
    with pytest.raises(ValueError, match="'layers/1/mlp/down' was left out"):
        small.fn(PLAIN, X)


@pytest.mark.parametrize("reverse", [False, True])
def test_turns_of_a_scan(reverse):
    def scanned(p, x):
        def body(x, own):
            return block(own, x), jnp.sum(x)

        x, _ = jax.lax.scan(jax.checkpoint(body), x, p["layers"], reverse=reverse)
        return x @ p["head"]

    names = [b.name for b in structured.branches(scanned, STACKED, X)]
    assert names[1:4] == ["layers/mix+scale[1]", "layers/mix+scale[2]", "layers/mlp[0]"]
    for remove in (["layers[1]"], ["layers/1"], ["layers/mlp[1]", "layers/mix+scale[1]"]):
        small = structured.prune_depth(scanned, STACKED, X, remove=remove)
        rest = {**STACKED, "layers": jax.tree.map(lambda x: x[[0, 2]], STACKED["layers"])}
        chex.assert_trees_all_equal(small.params, rest)
        np.testing.assert_array_equal(small.fn(rest, X), jax.jit(scanned)(rest, X))
    small = structured.prune_depth(scanned, STACKED, X, remove=["layers/mlp[1]"])
    assert small.params["layers"]["mlp"]["up"].shape == (2, D, F)
    assert small.params["layers"]["mix"].shape == (3, 4, 4)
    silent = jax.tree.map(np.copy, STACKED)
    silent["layers"]["mlp"]["down"][1] = 0
    np.testing.assert_allclose(small.fn(small.params, X), scanned(silent, X), rtol=1e-4, atol=1e-5)


def test_what_a_scan_stacks_is_still_there():
    def scanned(p, x):
        def body(x, own):
            return block(own, x), x.sum((0, 1))

        return jax.lax.scan(body, x, p["layers"])

    small = structured.prune_depth(scanned, STACKED, X, remove=["layers[1]"])
    x, sums = small.fn(small.params, X)
    rest = jax.tree.map(lambda x: x[[0, 2]], STACKED["layers"])
    want, without = scanned({"layers": rest}, X)
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)
    # The turn that does nothing hands on what comes in.
    np.testing.assert_allclose(np.asarray(sums)[[0, 2]], without, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums[2], sums[1])


# Frameworks.


class _LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(D, name="down")(nn.relu(nn.Dense(F, name="up")(nn.LayerNorm()(x))))


class _Linen(nn.Module):
    skip: int = -1

    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            if i != self.skip:
                x = _LinenBlock(name=f"block_{i}")(x)
        return nn.Dense(3)(x)


def linen():
    variables = _Linen().init(jax.random.key(0), X)
    return _Linen().apply, _Linen(1).apply, variables, "params/block_1"


class _NNX(nnx.Module):
    def __init__(self, layers, rngs):
        self.blocks = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(layers)])
        self.head = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x):
        for own in self.blocks:
            x = x + nnx.relu(own(x))
        return self.head(x)


def nnx_model():
    graph, state = nnx.split(_NNX(LAYERS, nnx.Rngs(0)))
    smaller, _ = nnx.split(_NNX(LAYERS - 1, nnx.Rngs(0)))
    return (
        lambda state, x: nnx.merge(graph, state)(x),
        lambda state, x: nnx.merge(smaller, state)(x),
        state,
        "blocks/1",
    )


class _Equinox(eqx.Module):
    blocks: list
    head: eqx.nn.Linear

    def __call__(self, x):
        for own in self.blocks:
            x = x + jax.vmap(jax.vmap(own))(x)
        return jax.vmap(jax.vmap(self.head))(x)


def equinox():
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    blocks = [eqx.nn.MLP(D, D, F, 1, key=key) for key in keys[1:]]
    model = _Equinox(blocks, eqx.nn.Linear(D, 3, key=keys[0]))
    run = lambda model, x: model(x)  # noqa: E731
    return run, run, model, "blocks/1"


def haiku():
    def network(skip):
        def run(x):
            for i in range(LAYERS):
                if i != skip:
                    x = x + hk.nets.MLP([F, D], name=f"block_{i}")(x)
            return hk.Linear(3)(x)

        return hk.without_apply_rng(hk.transform(run))

    params = network(-1).init(jax.random.key(0), X)
    return network(-1).apply, network(1).apply, params, "block_1*"


@pytest.mark.parametrize("make", [linen, nnx_model, equinox, haiku])
def test_every_framework(make):
    fn, smaller, params, name = make()
    assert len(structured.branches(fn, params, X)) == LAYERS
    small = structured.prune_depth(fn, params, X, remove=name)
    assert len(jax.tree.leaves(small.params)) < len(jax.tree.leaves(params))
    want = eqx.filter_jit(smaller)(small.params, X)
    np.testing.assert_array_equal(small.fn(small.params, X), want)


# Which ones.


def test_choice_by_loss_is_greedy_and_compiles_once():
    calls = []

    def loss(fn, p, x):
        calls.append(1)
        return jnp.mean((fn(p, x) - plain(PLAIN, x)) ** 2)

    small = structured.prune_depth(plain, PLAIN, X, count=2, blocks="layers/*", loss=loss)
    assert len(calls) == 1
    losses = {}
    for first in range(LAYERS):
        losses[first] = loss(lambda p, x, i=first: plain(p, x, (i,)), PLAIN, X)
    first = min(losses, key=losses.get)
    seconds = {
        i: loss(lambda p, x, i=i: plain(p, x, (first, i)), PLAIN, X)
        for i in range(LAYERS)
        if i != first
    }
    gone = {first, min(seconds, key=seconds.get)}
    (left,) = set(range(LAYERS)) - gone
    chex.assert_trees_all_equal(small.params["layers"], [PLAIN["layers"][left]])


@pytest.mark.parametrize("stacked", [False, True])
def test_choice_by_block_influence(stacked):
    def scanned(p, x):
        return jax.lax.scan(lambda x, own: (block(own, x), None), x, p["layers"])[0] @ p["head"]

    values, x = [], X
    for own in PLAIN["layers"]:
        after = np.asarray(block(own, x), np.float64)
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(after, axis=-1)
        values.append(1 - ((x * after).sum(-1) / norms).mean())
        x = after.astype(np.float32)
    least = int(np.argmin(values))
    fn, params, glob = (scanned, STACKED, "layers[[]*") if stacked else (plain, PLAIN, "layers/*")
    small = structured.prune_depth(fn, params, X, count=1, blocks=glob)
    assert all(f"[{least}]" in n or f"/{least}/" in n for n in small.removed)
    assert len(small.removed) == 2


def shared(p, x):
    """One feed-forward layer for all, and a weight of the second block that the head uses as well."""
    x = x + jnp.tanh(x @ p["all"]["w"])
    x = x + jnp.tanh(x @ p["all"]["w"])
    x = x + jnp.tanh(x @ p["own"]["w"] @ p["own"]["tied"])
    return x @ p["own"]["tied"].T


SHARED = {"all": {"w": normal(0, D, D)}, "own": {"w": normal(1, D, D), "tied": normal(2, D, D)}}


@pytest.mark.parametrize(
    ("fn", "params", "options", "message"),
    [
        (plain, PLAIN, {}, "either remove=.* or count="),
        (plain, PLAIN, {"remove": ["layers/7"]}, "'layers/7' matches no branch. The branches are: layers/0/mix"),
        (plain, PLAIN, {"remove": "layers/1/mlp/up"}, "a part of .*'layers/1/mlp' only: .*/up, and not .*/down"),
        (plain, PLAIN, {"count": 1, "blocks": "*/scale"}, "matches a part of the branch.*layers/0/mix in none"),
        (plain, PLAIN, {"count": 7}, "count=7 is more than there are to leave out, 6"),
        (plain, PLAIN, {"count": 1, "blocks": "towers/*"}, "matches no branch"),
        (shared, SHARED, {"remove": ["all"]}, "'all' matches no branch.*can only go together: all/w"),
        (shared, SHARED, {"remove": ["own"]}, "under 'own' lies what is used elsewhere as well, and stays: own/tied"),
        (shared, SHARED, {"count": 1, "blocks": "own"}, "used elsewhere as well, and stays: own/tied"),
        (plain, PLAIN, {"count": 1, "loss": lambda f, p, x: f(p, x)}, "loss must return one number"),
        (lambda p, x: x @ p["head"], PLAIN, {"count": 1}, "no residual branch"),
    ],
)  # fmt: skip
def test_wrong_requests(fn, params, options, message):
    with pytest.raises(ValueError, match=message):
        structured.prune_depth(fn, params, X, **options)
