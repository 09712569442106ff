"""Typical mistakes: the error says what came, and the mend."""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import prunax

PARAMS = {"d": {"kernel": jnp.arange(1.0, 65.0).reshape(8, 8), "bias": jnp.ones(8)}}
MASKS = prunax.compute_masks(PARAMS, 0.5)
SGD = optax.sgd(0.1)
X = jnp.ones((3, 4))


def one_argument(path):
    return True


def module() -> nnx.Linear:
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0))


def equinox_module() -> eqx.nn.MLP:
    return eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))


def masks_of(*args, **options):
    return lambda: prunax.compute_masks(*args, **options)


def pruning(*args, **options):
    return lambda: prunax.prune(SGD, *args, **options)


TYPES = {
    "pattern": (masks_of(PARAMS, pattern="2:4"), "got '2:4'. .* patterns.NM(2, 4)"),
    "a word as pattern": (pruning(0.5, pattern="block"), "prune: pattern .* 'block'. .*Block("),
    "class of a pattern": (pruning(0.5, pattern=prunax.patterns.Channel), "Call it: Channel("),
    "allocation": (masks_of(PARAMS, 0.5, allocation="global"), "'global'. .*global_ranking"),
    "allocation of prune": (pruning(0.5, allocation="lamp"), "prune: allocation .*tion.lamp"),
    "dict as allocation": (masks_of(PARAMS, 0.5, allocation={"d/*": 0.5}), "allocation.by_path("),
    "score": (pruning(0.5, score="saliency"), "got 'saliency'. Pass prunax.scores.saliency"),
    "Linen module": (masks_of(nn.Dense(3), 0.5), "a Linen module, Dense. .*module.init("),
    "NNX module": (lambda: prunax.compute_masks(module(), 0.5), "an NNX module, Linear. .*nnx.st"),
    "NNX module trained": (lambda: prunax.prune(SGD, 0.5).init(module()), "prune: .*nnx.state("),
    "Equinox module trained": (
        lambda: prunax.prune(SGD, 0.5).init(equinox_module()),
        "prune: .*'activation' is .*eqx.filter(module",
    ),
    "NNX module as function": (
        lambda: prunax.calibration.wanda(module(), PARAMS, [X], 0.5),
        "an NNX module, Linear, which .*nnx.split(",
    ),
    "NNX module and no params": (
        lambda: prunax.structured.prune_channels(module(), X, sparsity=0.5),
        "an NNX module, Linear, which .*nnx.split(",
    ),
    "Equinox module as function": (
        lambda: prunax.structured.axis_groups(equinox_module(), PARAMS, X),
        "an Equinox module, MLP, which .*with the model as its params",
    ),
    "a state of another optimizer": (
        lambda: prunax.prune(SGD, 0.5).update(PARAMS, SGD.init(PARAMS), PARAMS),
        "prune: the state is a tuple, which `init` of this one does not give. .*tx.init(params)",
    ),
    "an object of many lines": (
        lambda: prunax.prune(nnx.Optimizer(module(), SGD, wrt=nnx.Param), 0.5),
        "got an object of .*Optimizer.*The optimizer comes first",
    ),
    "swapped": (masks_of(0.5, PARAMS), "compute_masks: .*got 0.5. The params come first"),
    "swapped masks": (lambda: prunax.apply_masks(MASKS, PARAMS), "apply_masks(params, masks)"),
    "swapped summary": (lambda: prunax.summarize(MASKS, PARAMS), "summarize: .*Pass the params fi"),
    "swapped optimizer": (lambda: prunax.prune(0.5, SGD), "prune(optax.adam(1e-3), 0.9)"),
    "masks as params": (masks_of(MASKS, 0.5), "got bools only, as masks are. Pass the params"),
    "masks trained": (lambda: prunax.prune(SGD, 0.5).init(MASKS), "prune: .*got bools only"),
    "where of one argument": (
        masks_of(PARAMS, 0.5, where=one_argument),
        "got a function of (path)",
    ),
    "where of prune": (
        pruning(0.5, where=one_argument),
        "prune: `where` is called with a path and",
    ),
    "where is a name": (masks_of(PARAMS, 0.5, where="kernel"), "must be a function, got 'kernel'"),
    "pattern of wanda": (
        lambda: prunax.calibration.wanda(lambda p, x: x, PARAMS, [jnp.ones(8)], pattern="2:4"),
        "wanda: pattern must be a pattern, got '2:4'. .* patterns.NM(2, 4)",
    ),
    "a module called": (
        lambda: prunax.transforms(SGD, 0.5),  # pyright: ignore
        "prunax.transforms is a module and cannot be called. Call what is in it: .*fixed_masks",
    ),
    "no zero": (
        masks_of({"kernel": jnp.ones((4, 4), jnp.float8_e8m0fnu)}, 0.5, where=lambda p, x: True),
        "'kernel', which is float8_e8m0fnu: .*without a zero",
    ),
}
VALUES = {
    "percent": (masks_of(PARAMS, 80), "compute_masks: .*got 80. Pass 0.8 for 80%"),
    "percent of prune": (pruning(80), "prune: .*got 80. Pass 0.8 for 80%"),
    "integers": (masks_of({"kernel": jnp.ones((8, 8), jnp.int8)}, 0.5), "'kernel' is int8"),
}


def matching(text: str) -> str:
    return ".*".join(map(re.escape, text.split(".*")))


@pytest.mark.parametrize("mistake", TYPES)
def test_wrong_kinds_are_named_with_the_mend(mistake):
    call, text = TYPES[mistake]
    with pytest.raises(TypeError, match=matching(text)):
        call()


@pytest.mark.parametrize("mistake", VALUES)
def test_wrong_values_are_named_with_the_mend(mistake):
    call, text = VALUES[mistake]
    with pytest.raises(ValueError, match=matching(text)):
        call()


def test_params_that_are_none_are_said():
    with pytest.warns(UserWarning, match=r"prune: nothing will be pruned.*empty State.*nnx\.Param"):
        nnx.Optimizer(module(), prunax.prune(SGD, 0.5), wrt=nnx.LoRAParam)


def test_a_compiled_equinox_function_is_a_function():
    fn = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
    groups = prunax.structured.axis_groups(fn, equinox_module(), X)
    assert any(group.size == 8 and not group.frozen for group in groups)


def test_a_bound_method_is_a_function():
    class Scaled(eqx.Module):
        scale: jax.Array

        def apply(self, params, x):
            return self.scale * (jnp.tanh(x @ params["a"]) @ params["b"])

    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    small = prunax.structured.prune_channels(Scaled(jnp.ones(())).apply, params, X, sparsity=0.5)
    assert small.params["a"].shape == (4, 4)


def test_a_module_in_training_mode_is_told_from_one_that_only_predicts():
    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(self.hidden(x)))

    model, x = Normalized(nnx.Rngs(0)), jnp.ones((2, 4))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def in_training(params, x):
        return nnx.merge(graph, params, rest)(x)

    with pytest.raises(Exception, match="Cannot mutate BatchStat") as error:
        prunax.structured.prune_channels(in_training, params, x, sparsity=0.5)
    assert any("model.eval() before nnx.split" in note for note in error.value.__notes__)

    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    pruned = prunax.structured.prune_channels(
        lambda params, x: nnx.merge(graph, params, rest)(x), params, x, sparsity=0.5
    )
    assert pruned.params["hidden"]["kernel"].shape == (4, 4)
