"""Programs compute what their functions compute, and know their products, whatever stands between leaf and product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    """What a product's view says its weight is."""
    value = jax.tree.leaves(params)[program.selection.indices[product.view.leaf]]
    for i in product.view.picks:
        value = value[i]
    return product.view.rearrange(value)


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
    equation = program.equations[product.equation]
    weight = operand(program, product, params)
    assert weight.shape == equation.operation.eqn.invars[product.operand].aval.shape
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
    assert [p.view.picks for p in program.products] == [(i, j) for i in range(3) for j in range(2)]
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


def test_recurrent_weights_are_one_view_used_each_turn():
    def fn(params, x):
        return jax.lax.scan(lambda h, row: (jnp.tanh(row + h @ params["kernel"]), h), X[0], x)

    program = _jaxprs.trace(fn, {"kernel": W}, X)
    assert [p.name for p in program.products] == ["kernel"] * 5
    # Turn by turn, as the program is run: compiled as a whole it rounds otherwise.
    with jax.disable_jit():
        expected = jax.tree.leaves(fn({"kernel": W}, X))
    for ours, theirs in zip(run(program, {"kernel": W}, X), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


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
    with pytest.raises(ValueError, match=r"no product of 'unused/kernel'"):
        only()


def test_lookups_are_ignored():
    params = {"table": W, "kernel": W}

    def fn(params, tokens):
        return params["table"][tokens] @ params["kernel"]

    program = _jaxprs.trace(fn, params, jnp.array([1, 2]))
    assert [p.name for p in program.products] == ["kernel"]
    tied = _jaxprs.trace(lambda p, t: fn(p, t) @ p["table"].T, params, jnp.array([1, 2]))
    assert [p.name for p in tied.products] == ["kernel", "table"]


REFUSED = {
    "mul": lambda p, x: x @ (p["kernel"] * 2),
    "add": lambda p, x: x @ p["kernel"] + p["kernel"][:1].sum(),
    "dot_general": lambda p, x: x @ (p["kernel"] @ p["kernel"]),
    "concatenate": lambda p, x: x @ jnp.concatenate([p["kernel"], p["kernel"]], axis=1),
    "broadcast_in_dim": lambda p, x: jnp.einsum(
        "bi,bio->bo", x, jnp.broadcast_to(p["kernel"], (5, 6, 6))
    ),
    "while": lambda p, x: (
        jax.lax.fori_loop(0, x.shape[0] + 0, lambda i, c: c, x) @ p["kernel"]
        + jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c @ p["kernel"] + 1, x)
    ),
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x, p["kernel"]),
    "reduce_sum": lambda p, x: x @ p["kernel"] + p["kernel"].sum(),
    "dynamic_slice": lambda p, x: (
        x[:, :3] @ jax.lax.dynamic_slice_in_dim(p["kernel"], x[0, 0].astype(int), 3)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_path(name):
    expected = "reduce_sum" if name == "add" else name
    with pytest.raises(ValueError, match=f"'kernel' is used by `{expected}`.*where"):
        _jaxprs.trace(REFUSED[name], {"kernel": W}, X)


def test_selecting_nothing_lists_the_paths():
    with pytest.raises(ValueError, match=r"selects no leaf.*: bias\."):
        _jaxprs.trace(lambda p, x: x + p["bias"], {"bias": jnp.ones(6)}, X)


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
