"""Experts of mixtures, chosen by number: one that is removed is one whose logit is minus infinity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from zoo import normal

import prunax
from prunax import structured

pytestmark = pytest.mark.relaxed_promotion

T, D, F, E, K = 12, 6, 5, 4, 2
P = {"router": normal(0, D, E), "up": normal(1, E, D, F), "down": normal(2, E, F, D)}
X = normal(3, T, D)
OPEN = np.zeros(E, np.float32)


def logits(p, x, closed):
    return x @ p["router"] + closed


def one_hot(p, x, closed):
    """Weights of all experts for each token, zero for those not taken."""
    weights, chosen = lax.top_k(jax.nn.softmax(logits(p, x, closed)), K)
    gates = (jax.nn.one_hot(chosen, p["router"].shape[1]) * weights[..., None]).sum(1)
    h = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("te,tef,efd->td", gates, h, p["down"])


def gathered(p, x, closed):
    """The weights of the experts taken, for each token."""
    scores, chosen = lax.top_k(logits(p, x, closed), K)
    h = jax.nn.relu(jnp.einsum("td,tkdf->tkf", x, p["up"][chosen]))
    y = jnp.einsum("tkf,tkfd->tkd", h, p["down"][chosen])
    return (jax.nn.softmax(scores)[..., None] * y).sum(1)


def switch(p, x, closed):
    """One expert, and its probability looked up by its number."""
    chances = jax.nn.softmax(logits(p, x, closed))
    chosen = jnp.argmax(chances, -1)
    h = jax.nn.relu(jnp.einsum("td,tdf->tf", x, p["up"][chosen]))
    y = jnp.einsum("tf,tfd->td", h, p["down"][chosen])
    return y * jnp.take_along_axis(chances, chosen[:, None], 1)


def capacity(p, x, closed):
    """Dispatch and combine with room for so many tokens an expert (GShard)."""
    room = 5
    chances = jax.nn.softmax(logits(p, x, closed))
    hot = jax.nn.one_hot(jnp.argmax(chances, -1), p["router"].shape[1])
    place = (jnp.cumsum(hot, 0) - 1) * hot
    fits = jax.nn.one_hot(place.sum(-1).astype(jnp.int32), room)
    dispatch = hot[:, :, None] * fits[:, None, :]
    inputs = jnp.einsum("tec,td->ecd", dispatch, x)
    y = jnp.einsum(
        "ecf,efd->ecd", jax.nn.relu(jnp.einsum("ecd,edf->ecf", inputs, p["up"])), p["down"]
    )
    return jnp.einsum("tec,te,ecd->td", dispatch, chances, y)


def ragged(p, x, closed):
    """Tokens sorted by expert, and products of each stretch with its expert's weights."""
    scores = logits(p, x, closed)
    chosen = jnp.argmax(scores, -1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=p["router"].shape[1])
    h = jax.nn.relu(lax.ragged_dot(x[order], p["up"], sizes))
    y = lax.ragged_dot(h, p["down"], sizes)
    return jnp.zeros_like(y).at[order].set(y) * jax.nn.sigmoid(scores.max(-1))[:, None]


def _sorted(p, x, closed, order, taken):
    scores = logits(p, x, closed)
    chosen = order(scores)[:, taken]
    h = jax.nn.relu(jnp.einsum("td,tkdf->tkf", x, p["up"][chosen]))
    y = jnp.einsum("tkf,tkfd->tkd", h, p["down"][chosen])
    return (jax.nn.softmax(jnp.take_along_axis(scores, chosen, 1))[..., None] * y).sum(1)


def first_of_sorted(p, x, closed):
    return _sorted(p, x, closed, lambda scores: jnp.argsort(-scores), slice(K))


def last_of_sorted(p, x, closed):
    return _sorted(p, x, closed, jnp.argsort, slice(-K, None))


def sorted_backwards(p, x, closed):
    """Twice: the scores reversed before, and their order afterwards."""
    descending = _sorted(p, x, closed, lambda s: jnp.argsort(s, descending=True), slice(K))
    return descending + _sorted(p, x, closed, lambda s: jnp.argsort(s)[:, ::-1], slice(K))


def approximate(p, x, closed):
    weights, chosen = lax.approx_max_k(logits(p, x, closed), K)
    gates = (jax.nn.one_hot(chosen, p["router"].shape[1]) * weights[..., None]).sum(1)
    h = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("te,tef,efd->td", gates, h, p["down"])


SORTED = [first_of_sorted, last_of_sorted, sorted_backwards]
MIXTURES = [one_hot, gathered, switch, capacity, ragged, *SORTED, approximate]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_removed_expert_is_one_that_no_token_is_sent_to(mixture):
    fn = lambda p, x: mixture(p, x, 0.0)  # noqa: E731 - E is an axis of the params alone
    group = next(g for g in structured.axis_groups(fn, P, X) if g.size == E)
    assert group.frozen is None
    assert {(m.path, m.axis) for m in group.members} == {("router", 1), ("up", 0), ("down", 0)}
    assert group.least == (1 if mixture in (switch, capacity, ragged) else K)
    assert not group.preserved  # zero weights would still be chosen
    for left in ([0, 2, 3], [1, 3]):
        keep = {group: left}
        small = structured.shrink_function(fn, keep)(structured.shrink(P, keep), X)
        closed = np.where(np.isin(np.arange(E), left), 0, -np.inf).astype(np.float32)
        np.testing.assert_allclose(small, mixture(P, X, closed), rtol=2e-4, atol=1e-5)
    keep = {group: [1, 3]}
    small_fn, small = structured.shrink_function(fn, keep), structured.shrink(P, keep)
    grads = jax.grad(lambda p: small_fn(p, X).sum())(small)
    closed = np.where(np.isin(np.arange(E), [1, 3]), 0, -np.inf).astype(np.float32)
    whole = jax.grad(lambda p: mixture(p, X, closed).sum())(P)
    np.testing.assert_allclose(grads["up"], whole["up"][np.array([1, 3])], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda chosen, y: y * chosen[:, None], "by number, and the number is used"),
        (lambda chosen, y: (y, chosen), "numbered in the function's output 1"),
        (
            lambda chosen, y: y + jnp.asarray(P["router"]).T[jnp.sin(chosen).astype(int)],
            "by number, and the number is used",
        ),
    ],
)
def test_other_uses_of_the_number_fix_the_axis(use, why):
    def fn(p, x):
        chosen = jnp.argmax(x @ p["router"], -1)
        return use(chosen, jnp.einsum("td,tdf,tfe->te", x, p["up"][chosen], p["down"][chosen]))

    group = next(g for g in structured.axis_groups(fn, P, X) if g.name.startswith("router[1]"))
    assert why in str(group.frozen)


def test_fewer_experts_than_a_token_takes():
    fn = lambda p, x: one_hot(p, x, 0.0)  # noqa: E731
    group = next(g for g in structured.axis_groups(fn, P, X) if g.size == E)
    with pytest.raises(ValueError, match=r"router\[1\] must keep at least 2 units.*top_k"):
        structured.shrink(P, {group: [0]})
    only = prunax.allocation.by_path({"router*": 0.75})
    with pytest.raises(ValueError, match=r"router\[1\] would keep 1 of 4.*takes 2.*up"):
        structured.prune_channels(fn, P, X, allocation=only)
    # A target takes what may go.
    small = structured.prune_channels(fn, P, X, target=0.5, cost=structured.count_parameters)
    assert small.params["router"].shape[1] >= 2


def test_a_table_indexed_by_the_input_stays():
    def fn(p, ids):
        return p["up"][ids].sum(1) @ P["down"][0]

    groups = structured.axis_groups(fn, P, np.array([1, 2]))
    group = next(g for g in groups if g.name == "up[0]")
    assert group.frozen.why == "indexed"


def by_hand(p, x, weighing):
    """Router weight times norm of the output, on average over the tokens sent to an expert, in numpy."""
    scores = x @ p["router"]
    sums, tokens = np.zeros(E), np.zeros(E)
    for token, own in zip(x, scores, strict=True):
        taken = np.argsort(-own)[:K]
        whole = own if weighing == "one_hot" else own[taken]
        for e in taken:
            y = np.maximum(token @ p["up"][e], 0) @ p["down"][e]
            sums[e] += np.exp(own[e]) / np.exp(whole).sum() * np.linalg.norm(y)
            tokens[e] += 1
    return sums / np.maximum(tokens, 1)


@pytest.mark.parametrize("mixture", [one_hot, gathered])
def test_importance_is_the_published_formula(mixture):
    fn = lambda p, x: mixture(p, x, 0.0)  # noqa: E731
    groups = [g for g in structured.axis_groups(fn, P, X) if g.size == E]
    batches = [X[:8], X[8:]]
    found = structured.expert_importance(fn, P, batches, groups)
    want = by_hand(P, X, mixture.__name__)
    np.testing.assert_allclose(found["router[1]"], want, rtol=1e-4)
    small = structured.prune_channels(fn, P, X, sparsity=0.5, scores=found)
    (left,) = small.keep.values()
    np.testing.assert_array_equal(left, np.sort(np.argsort(-want)[:2]))


def test_importance_of_experts_in_a_scan():
    stacked = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), P)

    def fn(p, x):
        return lax.scan(lambda x, p: (x + one_hot(p, x, 0.0), None), x, p)[0]

    groups = [g for g in structured.axis_groups(fn, stacked, X) if g.size == E]
    found = structured.expert_importance(fn, stacked, [X], groups)
    assert found["router[2]"].shape == (E,)
    assert (found["router[2]"] > 0).all()


def test_importance_needs_a_sum_over_experts():
    fn = lambda p, x: switch(p, x, 0.0)  # noqa: E731
    groups = [g for g in structured.axis_groups(fn, P, X) if g.size == E]
    with pytest.raises(ValueError, match=r"nothing in the function adds up over .*router\[1\]"):
        structured.expert_importance(fn, P, [X], groups)
    with pytest.raises(ValueError, match="no batches"):
        structured.expert_importance(fn, P, [], groups)
