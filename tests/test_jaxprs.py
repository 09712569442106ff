"""Programs compute what their functions compute, and know their products, whatever stands between leaf and product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prunax
from prunax import _jaxprs


def run(program, params, *args):
    """Evaluate a program equation by equation."""
    values = dict(program.constants) | dict(program.known)
    values |= dict(zip(program.params, jax.tree.leaves(params), strict=True))
    values |= dict(zip(program.args, jax.tree.leaves(args), strict=True))
    for equation in program.equations:
        operands = [values[i] for i in equation.inputs]
        if isinstance(equation.operation, _jaxprs.Pick):
            operands.append(equation.pick)
        values |= dict(zip(equation.outputs, equation.operation(*operands), strict=True))
    return [values[i] for i in program.outputs]


def operand(program, product, params):
    """What a product says its weight is, in terms of the params."""
    value = jax.tree.leaves(params)[program.selection.indices[product.weight.leaf]]
    for i in product.weight.picks:
        value = value[i]
    return product.weight.apply(value)


KEY = jax.random.key(0)
W = jax.random.normal(KEY, (6, 6))
X = jax.random.normal(jax.random.key(1), (5, 6))


@jax.custom_jvp
def with_jvp(w, x):
    return jnp.tanh(x @ w)


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[1]))


@jax.custom_vjp
def with_vjp(w, x):
    return jnp.tanh(x @ w)


with_vjp.defvjp(lambda w, x: (with_vjp(w, x), None), lambda _, g: (W, g))

FUNCTIONS = {
    "plain": lambda p, x: x @ p["kernel"],
    "left": lambda p, x: (p["kernel"] @ x.T).T,
    "transposed": lambda p, x: x @ p["kernel"].T,
    "einsum": lambda p, x: jnp.einsum("oi,bi->bo", p["kernel"], x),
    "reshaped": lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["kernel"].reshape(6, 2, 3)),
    "converted": lambda p, x: x @ p["kernel"].astype(jnp.bfloat16).astype(jnp.float32),
    "expanded": lambda p, x: jax.lax.dot_general(x, p["kernel"][None], (((1,), (1,)), ((), ()))),
    "reversed": lambda p, x: x @ p["kernel"][::-1],
    "jit": jax.jit(lambda p, x: jax.jit(jnp.dot)(x, p["kernel"])),
    "checkpoint": jax.checkpoint(lambda p, x: jnp.sin(x @ p["kernel"])),
    "custom_jvp": lambda p, x: with_jvp(p["kernel"], x),
    "custom_vjp": lambda p, x: with_vjp(p["kernel"], x),
    "cond": lambda p, x: jax.lax.cond(True, lambda w: x @ w, lambda w: x * w[:1], p["kernel"]),
    "switch": lambda p, x: jax.lax.switch(1, [lambda w: x, lambda w: x @ w], p["kernel"]),
    "vmap": lambda p, x: jax.vmap(lambda row: row @ p["kernel"])(x),
    "constant": lambda p, x: (x + jnp.arange(6.0)[None]) @ p["kernel"],
    "same operand twice": lambda p, x: jnp.square(x * x) @ p["kernel"],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_product(name):
    fn, params = FUNCTIONS[name], {"kernel": W, "bias": jnp.ones(6)}
    program = _jaxprs.trace(fn, params, X)
    (product,) = program.products
    assert product.name == "kernel"
    (result,) = run(program, params, X)
    np.testing.assert_allclose(result, fn(params, X), rtol=1e-5, atol=1e-6)
    weight = operand(program, product, params)
    assert weight.shape == product.eqn.invars[product.side].aval.shape
    np.testing.assert_array_equal(np.sort(weight, axis=None), np.sort(W, axis=None))


STACK = {"kernel": jax.random.normal(KEY, (3, 6, 6)), "scale": jnp.array([1.0, 2.0, 3.0])}


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_one_product_a_layer(reverse):
    def fn(params, x):
        def layer(carry, own):
            out = jnp.tanh(carry @ own["kernel"]) * own["scale"]
            return out, out.sum()

        return jax.lax.scan(layer, x, params, reverse=reverse)

    program = _jaxprs.trace(fn, STACK, X)
    names = [f"kernel[{i}]" for i in range(3)]
    assert [product.name for product in program.products] == names[:: -1 if reverse else 1]
    for product, i in zip(program.products, [2, 1, 0] if reverse else [0, 1, 2], strict=True):
        np.testing.assert_array_equal(operand(program, product, STACK), STACK["kernel"][i])
    for ours, theirs in zip(run(program, STACK, X), jax.tree.leaves(fn(STACK, X)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_nested_scans():
    params = {"kernel": STACK["kernel"].reshape(3, 1, 6, 6).repeat(2, axis=1)}

    def fn(params, x):
        def outer(carry, ws):
            return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w.T), None), carry, ws)[0], None

        return jax.lax.scan(outer, x, params["kernel"])[0]

    program = _jaxprs.trace(fn, params, X)
    assert [p.weight.picks for p in program.products] == [
        (i, j) for i in range(3) for j in range(2)
    ]
    np.testing.assert_allclose(run(program, params, X)[0], fn(params, X), rtol=1e-5)
    np.testing.assert_array_equal(
        operand(program, program.products[3], params), params["kernel"][1, 1].T
    )


def test_scan_without_weights_stays_whole():
    def fn(params, x):
        return jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(6), x)[0] @ params["kernel"]

    program = _jaxprs.trace(fn, {"kernel": W}, X)
    assert "scan" in [e.operation.eqn.primitive.name for e in program.equations]
    np.testing.assert_allclose(run(program, {"kernel": W}, X)[0], fn({"kernel": W}, X), rtol=1e-5)


def test_recurrent_weights_are_one_product_in_a_loop():
    def fn(params, x):
        return jax.lax.scan(lambda h, row: (jnp.tanh(row + h @ params["kernel"]), h), X[0], x)

    program = _jaxprs.trace(fn, {"kernel": W}, X)
    (product,) = program.products
    assert (product.name, product.loops) == ("kernel", 1)
    assert program.shapes[product.activation].shape == (5, 6)
    # The loop that gives the activations is one equation however long it is.
    longer = _jaxprs.trace(fn, {"kernel": W}, jnp.tile(X, (100, 1)))
    assert len(longer.equations) == len(program.equations)
    expected = jax.tree.leaves(fn({"kernel": W}, X))
    for ours, theirs in zip(run(program, {"kernel": W}, X), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    values = run(program._replace(outputs=[product.activation]), {"kernel": W}, X)
    np.testing.assert_allclose(values[0], expected[1], rtol=1e-5)


def test_layers_that_a_counter_picks_are_layers_of_their_own():
    def fn(params, x):
        def layer(i, h):
            return jnp.tanh(h @ params["kernel"][i])

        return jax.lax.fori_loop(0, 3, layer, x)

    program = _jaxprs.trace(fn, STACK, X)
    assert not program.reasons.keys() - {1}  # the scale is not used
    for i, product in enumerate(program.products):
        np.testing.assert_array_equal(operand(program, product, STACK), STACK["kernel"][i])


OTHERS = {
    "concatenated": lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1),
    "stacked inputs": lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["a"], p["b"]]),
    "stacked": lambda p, x: jnp.einsum("bi,nio->nbo", x, jnp.stack([p["a"], p["b"]])),
    "padded": lambda p, x: x @ jnp.pad(p["a"], ((0, 0), (0, 2))) + (x @ p["b"]).sum(),
    "scaled": lambda p, x: x @ (p["a"] / np.sqrt(8).astype("f4")) - x @ (0.5 * -p["b"]),
    "permuted": lambda p, x: x @ p["a"][:, jnp.array([2, 0, 1, 5, 4, 3])] + x @ p["b"],
    "taken": lambda p, x: x @ jnp.take(jnp.stack([p["a"], p["b"]]), 1, axis=0) @ p["a"],
    "masked": lambda p, x: x @ (p["a"] * np.tri(6, dtype="f4")) + x @ p["b"],
    "chosen": lambda p, x: x @ jnp.where(np.tri(6) > 0, p["a"], 0.0) + x @ p["b"],
    "expanded and squeezed": lambda p, x: jax.lax.scan(
        lambda h, w: (h @ w, None), x, jnp.stack([p["a"], p["b"]])
    )[0],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_stands_between_leaf_and_product_is_followed(name):
    """Where an operand's element comes from one of a leaf, the way there finds it, and elsewhere it gives zeros."""
    fn = OTHERS[name]
    params = {"a": W, "b": jax.random.normal(jax.random.key(5), (6, 6))}
    program = _jaxprs.trace(fn, params, X)
    assert program.kernels == [0, 1]
    by_equation = {}
    for product in program.products:
        value = jax.tree.leaves(params)[product.weight.leaf]
        for i in product.weight.picks:
            value = value[i]
        by_equation.setdefault(product.equation, []).append(
            (product.side, product.weight.apply(value, scaled=True))
        )
    # What the program computes is what it computes with these in place of its weights, but for scalar factors.
    values = dict(program.constants) | dict(program.known)
    values |= dict(zip(program.params, jax.tree.leaves(params), strict=True))
    values |= dict(zip(program.args, [X], strict=True))
    for n, equation in enumerate(program.equations):
        operands = [values[i] for i in equation.inputs]
        if n in by_equation:
            sides = {side for side, _ in by_equation[n]}
            (side,) = sides
            made = sum(value for _, value in by_equation[n])
            ratio = np.asarray(operands[side])[np.asarray(made) != 0]
            ratio = ratio / np.asarray(made)[np.asarray(made) != 0]
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
            assert np.all(np.asarray(operands[side])[np.asarray(made) == 0] == 0)
        if isinstance(equation.operation, _jaxprs.Pick):
            operands.append(equation.pick)
        values |= dict(zip(equation.outputs, equation.operation(*operands), strict=True))


def test_splits_and_slices_are_views_of_parts():
    params = {"kernel": jax.random.normal(KEY, (6, 12))}

    def fn(params, x):
        a, b = jnp.split(params["kernel"], 2, axis=1)
        return x @ a + x @ b, x @ params["kernel"][:, :3]

    program = _jaxprs.trace(fn, params, X)
    parts = [operand(program, product, params) for product in program.products]
    k = params["kernel"]
    for part, expected in zip(parts, (k[:, :6], k[:, 6:], k[:, :3]), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_what_no_output_needs_is_dropped():
    def fn(params, x):
        _ = jnp.sort(params["unused"]["kernel"])
        _ = x @ params["unused"]["kernel"]
        return x @ params["kernel"]

    params = {"kernel": W, "unused": {"kernel": W}}
    only = functools.partial(_jaxprs.trace, fn, params, X)
    program = only(where=lambda path, leaf: path == "kernel")
    assert len(program.equations) == 1
    reasons = only().reasons
    assert [r.text for r in reasons.values()] == [
        "the function's outputs depend on no product of 'unused/kernel' with an activation"
    ]


def test_lookups_are_ignored():
    params = {"table": W, "kernel": W}

    def fn(params, tokens):
        return params["table"][tokens] @ params["kernel"]

    program = _jaxprs.trace(fn, params, jnp.array([1, 2]))
    assert [p.name for p in program.products] == ["kernel"]
    tied = _jaxprs.trace(lambda p, t: fn(p, t) @ p["table"].T, params, jnp.array([1, 2]))
    assert [p.name for p in tied.products] == ["kernel", "table"]


UNREADABLE = {
    "mul": lambda p, x: x @ (p["kernel"] * x.sum()),
    "add": lambda p, x: x @ p["kernel"] + p["kernel"][:1].sum(),
    "dot_general": lambda p, x: x @ (p["kernel"] @ p["kernel"]),
    "abs": lambda p, x: x @ jnp.abs(p["kernel"]),
    "concatenate": lambda p, x: x @ jnp.concatenate([p["kernel"], x[:, :2].T @ x], axis=0)[:6],
    "broadcast_in_dim": lambda p, x: jnp.einsum(
        "bi,bio->bo", x, jnp.broadcast_to(p["kernel"], (5, 6, 6))
    ),
    "while": lambda p, x: (
        jax.lax.fori_loop(0, x.shape[0] + 0, lambda i, c: c, x) @ p["kernel"]
        + jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ p["kernel"] + 1, x)
    ),
    "scan": lambda p, x: (
        x @ jax.lax.scan(lambda c, _: (c[::-1], None), (p["kernel"], x.T @ x), length=4)[0][0]
    ),
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x, p["kernel"]),
    "reduce_sum": lambda p, x: x @ p["kernel"] + p["kernel"].sum(),
    "dynamic_slice": lambda p, x: (
        x[:, :3] @ jax.lax.dynamic_slice_in_dim(p["kernel"], x[0, 0].astype(int), 3)
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_has_a_reason_that_names_the_path(name):
    expected = "reduce_sum" if name == "add" else name
    (reason,) = _jaxprs.trace(UNREADABLE[name], {"kernel": W}, X).reasons.values()
    assert reason.text.startswith(f"'kernel' is used by `{expected}`, where it cannot be seen")


def standardised(w):
    return (w - w.mean(0, keepdims=True)) / w.std(0, keepdims=True)


@pytest.mark.parametrize(
    "weight",
    [
        lambda p: standardised(p["kernel"]),
        lambda p: p["gain"] * p["kernel"] / jnp.linalg.norm(p["kernel"], axis=0, keepdims=True),
        lambda p: p["kernel"] / (p["gain"] @ p["kernel"] @ p["gain"].T),
        lambda p: p["kernel"] + p["kernel"] @ p["kernel"],
    ],
    ids=["standardised", "normalised", "spectral", "low rank"],
)
def test_kernels_that_are_recomputed_are_told_from_what_is_no_kernel(weight):
    params = {"kernel": W, "gain": jnp.ones((1, 6)), "position": jnp.ones((1, 6))}
    program = _jaxprs.trace(lambda p, x: (x + p["position"]) @ weight(p), params, X)
    kinds = dict(zip(program.selection.paths, range(3), strict=True))
    assert program.reasons[kinds["kernel"]].kind == "recomputed"
    assert program.reasons[kinds["position"]].kind == "no product"


def test_learned_inputs_are_told_from_the_kernel_that_they_meet():
    params = {"queries": jnp.ones((4, 6)), "kernel": W}
    program = _jaxprs.trace(lambda p, x: (p["queries"] @ p["kernel"]) @ x.T, params, X)
    assert [program.selection.paths[n] for n in program.kernels] in (["kernel"], [])


def test_tables_are_no_kernels():
    params = {"table": W, "kernel": W}

    def looked_up(p, t):
        return p["table"][t] @ p["kernel"]

    def one_hot(p, t):
        return (jax.nn.one_hot(t, 6) @ p["table"]) @ p["kernel"]

    def tied(p, t):
        return looked_up(p, t) @ p["table"].T

    for fn in (looked_up, one_hot, tied):
        where = prunax.kernels(fn, params, jnp.array([1, 2]))
        assert where.paths == ("kernel",)
        assert where.left_out == (("table", "'table' is looked up in"),) or fn is looked_up


def test_kernels_are_a_where():
    params = {"body": W, "head": W, "scale": jnp.ones(6)}
    fn = lambda p, x: (x * p["scale"][None]) @ p["body"]  # noqa: E731
    where = prunax.kernels(fn, params, jax.ShapeDtypeStruct((5, 6), jnp.float32))
    assert repr(where) == "<kernels: body; left out: head>"
    assert where == prunax.kernels(fn, params, X) and hash(where)
    assert dict(where.left_out)["head"].startswith("the function's outputs depend on no product of")
    masks = prunax.compute_masks(params, 0.5, where=where)
    assert int(masks["body"].sum()) == 18 and masks["head"].shape == ()


def test_equal_equations_have_equal_keys():
    def fn(params, x):
        for i in range(2):
            x = jax.nn.relu(jax.nn.gelu(x @ params[f"kernel{i}"]) * 2.0)
        return x * 3.0

    program = _jaxprs.trace(fn, {"kernel0": W, "kernel1": W}, X)
    keys = [e.operation.key for e in program.equations]
    half = (len(keys) - 1) // 2
    assert keys[:half] == keys[half:-1]
    assert len({*keys}) < len(keys)
    # Numbers written into the program count, even where only the sign of zero tells them apart.
    a, b = (
        _jaxprs.trace(lambda p, x, z=z: (x @ p["kernel"]) / z, {"kernel": W}, X).equations[-1]
        for z in (0.0, -0.0)
    )
    assert a.operation.key != b.operation.key


def test_leaves_that_are_no_arrays_are_passed_on():
    params = {"kernel": W, "activation": jnp.tanh, "power": 2, "nothing": None}

    def fn(params, x):
        return params["activation"](x @ params["kernel"]) ** params["power"]

    program = _jaxprs.trace(fn, params, X)
    assert len(program.params) == 1
    np.testing.assert_allclose(run(program, {"k": W}, X)[0], fn(params, X), rtol=1e-5)
