"""Everything that a user may jit lowers for CPU, CUDA, ROCm and TPU alike, with nothing that only a CPU has."""

import functools

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
    initialization,
    patterns,
    penalties,
    schedules,
    scores,
    transforms,
)
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
    "pack": (_packing.pack, MASKS["first"]["kernel"]),
    "unpack": (lambda p: _packing.unpack(p, (16, 8)), jnp.zeros((2, 8), jnp.uint8)),
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
        lambda w, gram: solver.obs(w, solver.factorize(gram), jnp.full(1, 64, jnp.int32)),
        MATRIX,
        GRAM,
    ),
    "wanda": (solver.wanda_scores, MATRIX, jnp.ones((16, 1))),
    "refit": (solver.refit, MATRIX, MATRIX > 0, GRAM),
    "calibration.admm": (functools.partial(solver.admm, num_pruned=jnp.int32(64)), MATRIX, GRAM),
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
