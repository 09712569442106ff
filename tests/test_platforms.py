"""Everything that a user may jit lowers for CPU, CUDA, ROCm and TPU alike, with nothing that only a CPU has.

And what goes wrong on an accelerator alone is looked for here: products in TF32, arrays on two kinds of device.
"""

import ast
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import prunax
from prunax import (
    _packing,
    allocation,
    calibration,
    initialization,
    patterns,
    penalties,
    schedules,
    scores,
    structured,
    transforms,
)
from prunax import export as exporting
from prunax.calibration import solver

pytestmark = pytest.mark.relaxed_promotion  # optax's Adam needs it
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PARAMS = {
    "first": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)},
    "second": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)},
}
MASKS = jax.tree.map(
    lambda p: jnp.ones(p.shape, bool) if p.ndim > 1 else jnp.ones((), bool), PARAMS
)
KEY = jax.random.key(0)
X = jnp.ones((4, 16))
MATRIX, GRAM = jnp.ones((16, 8)), jnp.eye(16)


def apply(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x


def loss(params, x):
    return jnp.sum(apply(params, x) ** 2)


def masks_of(**options):
    return lambda params, sparsity: prunax.compute_masks(params, sparsity, **options)


def step_of(tx):
    return lambda params, state: tx.update(params, state, params)


MASKING = {
    **{
        str(pattern): masks_of(pattern=pattern)
        for pattern in (
            patterns.Unstructured(),
            patterns.ConstantFanIn(),
            patterns.NM(2, 4),
            patterns.Block((4, 4)),
            patterns.Channel(),
        )
    },
    "global": masks_of(allocation=allocation.global_ranking),
    "lamp": masks_of(allocation=allocation.lamp),
    "erdos_renyi": masks_of(allocation=allocation.erdos_renyi),
}
POLYNOMIAL = schedules.polynomial(0.9, 0, 4, every=2)
TRANSFORMS = {
    "prune": prunax.prune(optax.adam(0.1), POLYNOMIAL),
    "prune, packed": prunax.prune(optax.adam(0.1), POLYNOMIAL, packed=True),
    "prune, averaged": prunax.prune(
        optax.adam(0.1), POLYNOMIAL, score=scores.ema(scores.saliency, 0.9)
    ),
    "fixed_masks": transforms.fixed_masks(optax.adam(0.1), MASKS),
    "rigl": transforms.rigl(optax.adam(0.1), 0.5, key=KEY, every=2),
    "sparse_evolutionary": transforms.sparse_evolutionary(optax.adam(0.1), 0.5, key=KEY, every=2),
    "static_sparse": transforms.static_sparse(optax.adam(0.1), 0.5, key=KEY),
    "admm": transforms.admm(optax.adam(0.1), 0.5, penalty=0.1, end_step=4),
    "proximal_l1": transforms.proximal_l1(optax.adam(0.1), 0.1),
    "proximal_group_lasso": transforms.proximal_group_lasso(optax.adam(0.1), 0.1),
}
FUNCTIONS = {
    "apply_masks": (prunax.apply_masks, PARAMS, MASKS),
    "straight_through": (
        jax.grad(lambda p, m: penalties.l2(prunax.straight_through(p, m))),
        PARAMS,
        MASKS,
    ),
    "pack": (_packing.pack_bits, MASKS["first"]["kernel"]),
    "unpack": (lambda p: _packing.unpack_bits(p, (16, 8)), jnp.zeros((2, 8), jnp.uint8)),
    "magnitude": (scores.magnitude, PARAMS),
    "gradient": (scores.gradient, PARAMS, PARAMS),
    "saliency": (scores.saliency, PARAMS, PARAMS),
    "movement": (scores.movement, PARAMS, PARAMS),
    "fisher": (scores.fisher, PARAMS, PARAMS),
    "random": (lambda p, key: scores.random(p, key=key), PARAMS, KEY),
    "snip": (lambda p, x: initialization.snip(loss, p, x), PARAMS, X),
    "grasp": (lambda p, x: initialization.grasp(loss, p, x), PARAMS, X),
    "synflow": (lambda p, x: initialization.synflow(apply, p, x), PARAMS, X),
    "l1": (penalties.l1, PARAMS),
    "group_lasso": (penalties.group_lasso, PARAMS),
    "masked_l2": (penalties.masked_l2, PARAMS, MASKS),
    "sparsegpt": (
        lambda w, gram: solver.obs(w, solver.factorize(gram), 64),
        MATRIX,
        GRAM,
    ),
    "wanda": (calibration.wanda_scores, MATRIX, jnp.ones((16, 1))),
    "refit": (solver.refit, MATRIX, MATRIX > 0, GRAM),
    "alps": (functools.partial(solver.alps, budget=64), MATRIX, GRAM),
}


def lower(function, *args):
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS


@pytest.mark.parametrize("name", MASKING)
@pytest.mark.parametrize("concrete", [True, False], ids=["sparsity fixed", "sparsity traced"])
def test_masks(name, concrete):
    function = MASKING[name]
    if concrete:
        lower(functools.partial(function, sparsity=0.5), PARAMS)
    else:
        lower(function, PARAMS, jnp.float32(0.5))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_masks_of_narrow_floats(dtype):
    lower(
        functools.partial(MASKING["global"], sparsity=0.5),
        jax.tree.map(lambda p: p.astype(dtype), PARAMS),
    )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations(name):
    tx = TRANSFORMS[name]
    lower(step_of(tx), PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, *args = FUNCTIONS[name]
    lower(function, *args)


def test_what_was_exported_runs_here():
    values = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)}
    function = jax.jit(functools.partial(prunax.compute_masks, sparsity=0.9))
    exported = export.export(function, platforms=PLATFORMS)(values)
    assert np.array_equal(exported.call(values)["kernel"], function(values)["kernel"])


PRODUCTS = set("dot vdot inner matmul einsum tensordot dot_general".split())
CONVOLUTIONS = set("conv conv_general_dilated conv_general_dilated_patches".split())
# These stand where a product of the user's own stood, in the precision that the user runs it in.
OF_THE_USER = ("export/_packed.py", "export/tpu.py")


@pytest.mark.parametrize(
    "file", sorted(Path(prunax.__file__).parent.rglob("*.py")), ids=lambda file: file.stem
)
def test_products_say_their_precision(file):
    # By default a GPU multiplies float32 in TF32 and a TPU in bfloat16, with three and two decimals: no Gram matrix
    # can be factorized then. On a CPU no result shows it.
    if file.as_posix().endswith(OF_THE_USER):
        return
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)), node.lineno
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        on_device = ast.unparse(node.func.value) in ("jnp", "lax", "jax.numpy", "jax.lax")
        if on_device and node.func.attr in PRODUCTS | CONVOLUTIONS:
            assert any(k.arg == "precision" for k in node.keywords), f"{file.name}:{node.lineno}"


def products(jaxpr):
    """Every product and convolution of a jaxpr, those of inner ones as well."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize(
    ("name", "least"), [("sparsegpt", 2), ("refit", 3), ("alps", 6), ("propagate_errors", 3)]
)
def test_solvers_multiply_in_full(name, least):
    functions = FUNCTIONS | {
        "propagate_errors": (
            lambda w, gram: solver.propagate_errors(w, solver.factorize(gram), gram, 0.5),
            MATRIX,
            GRAM,
        )
    }
    function, *args = functions[name]
    found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
    assert len(found) >= least
    for eqn in found:
        precision = eqn.params["precision"]
        assert precision is not None, eqn
        assert {jax.lax.Precision(p) for p in precision} == {jax.lax.Precision.HIGHEST}, eqn


def packed_product(params, x):
    kernel = params["first"]["kernel"]
    mask = prunax.compute_masks({"kernel": kernel}, 0.5, pattern=patterns.Block((4, 4)))["kernel"]
    return x @ exporting.pack(kernel, mask, patterns.Block((4, 4)))


ELSEWHERE = {
    "global masks": lambda p, x: MASKING["global"](p, 0.5),
    "blocks": lambda p, x: prunax.compute_masks(p, 0.5, pattern=patterns.Block((4, 4))),
    "prune": lambda p, x: step_of(TRANSFORMS["prune"])(p, TRANSFORMS["prune"].init(p))[0],
    "norms": lambda p, x: calibration.input_statistics(apply, p, [x]),
    "sparsegpt": lambda p, x: calibration.sparsegpt(apply, p, [x], 0.5),
    "channels": lambda p, x: structured.prune_channels(apply, p, x, target=0.5).params,
    "packed product": packed_product,
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_arrays_stay_on_their_device(name):
    # As arrays on the CPU beside a GPU: committed to a device that is not the default one.
    device = jax.devices()[-1]
    params = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape) if p.ndim > 1 else p, PARAMS)
    x = jax.random.normal(KEY, X.shape)
    here = ELSEWHERE[name](params, x)
    there = ELSEWHERE[name](*jax.device_put((params, x), device))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert b.devices() == {device} or b.ndim == 0
        np.testing.assert_array_equal(a, b)
