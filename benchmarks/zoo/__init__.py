"""Networks that others wrote, each as ``fn(params, *args)`` with random weights, one file for each source.

A source is a module with a table ``NETWORKS`` from a name to a function that builds the network. It imports its package
only there, so that the table can be read where the package is not installed.
"""

import functools
import importlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from prunax import trees

PyTree = Any
SOURCES = """
    keras transformers haiku equimo eqxvision flowjax jraph flaxmodels equinox gemma tunix linen nnx plain
""".split()


class Network(NamedTuple):
    """A function of parameters and inputs.

    Attributes:
        fn: ``fn(params, *args)``.
        params: random weights.
        args: random inputs, a small batch.
    """

    fn: Callable[..., Any]
    params: PyTree
    args: tuple[Any, ...]


def networks(source: str) -> Mapping[str, Callable[[], Network]]:
    """The table of a source: a module here, or any other by its full name (with a dot)."""
    return importlib.import_module(source if "." in source else f"benchmarks.zoo.{source}").NETWORKS


def build(name: str) -> Network:
    """Builds ``source/network``."""
    source, _, network = name.partition("/")
    return networks(source)[network]()


def table(build: Callable[..., Network], configs: Mapping[str, Any]) -> dict[str, Any]:
    """Functions that build networks, from a builder and its keyword arguments or the tuple of its arguments."""
    return {
        name: functools.partial(build, **config)
        if isinstance(config, Mapping)
        else functools.partial(build, *config)
        for name, config in configs.items()
    }


def normal(*shape: int) -> np.ndarray:
    """Normally distributed inputs."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def tokens(vocabulary: int = 50, batch: int = 2, length: int = 8) -> np.ndarray:
    """Random token numbers, each row with one 2 at its end."""
    rows = np.random.default_rng(0).integers(3, vocabulary, (batch, length), np.int32)
    rows[:, -1] = 2
    return rows


def random(tree: PyTree) -> PyTree:
    """Gives every floating leaf of a tree, of arrays or of shapes, random values that are nowhere zero.

    Initialisers leave biases at zero and last scales of residual blocks too, and so hide units that were removed in the
    wrong place. Matrices are scaled by their inputs, scales are near one, variances positive.
    """
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(trees.paths(tree), leaves, strict=True)
    return treedef.unflatten([_random(path, leaf) for path, leaf in pairs])


def _random(path: str, leaf: Any) -> Any:
    if not np.issubdtype(getattr(leaf, "dtype", int), np.floating):
        return leaf
    noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(leaf.shape, np.float32)
    name = path.rpartition("/")[2] if not path.endswith(("/average", "/value")) else path
    if "var" in name:
        value = np.exp(noise / 4)
    elif len(leaf.shape) >= 2:
        value = noise / np.sqrt(np.prod(leaf.shape[:-1]))
    elif any(word in name for word in ("scale", "gamma", "weight", "norm")):
        value = 1 + noise / 8
    else:
        value = noise / 8
    return value.astype(leaf.dtype)


def linen_network(module: Any, *args: Any, **kwargs: Any) -> Network:
    """A Flax Linen module. Its initialiser is traced only."""

    def fn(params: PyTree, *args: Any) -> Any:
        return module.apply(params, *args, **kwargs)

    init = functools.partial(module.init, **kwargs)
    return Network(fn, random(jax.eval_shape(init, jax.random.key(0), *args)), args)


def equinox_network(module: Any, *args: Any, call: Any = None, is_leaf: Any = None) -> Network:
    """An Equinox module, mapped over examples where there is no ``call(module, *args)``."""
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array, is_leaf=is_leaf)
    call = call or (lambda module, *args: jax.vmap(module)(*args))

    def fn(params: PyTree, *args: Any) -> Any:
        return call(eqx.combine(params, static, is_leaf=is_leaf), *args)

    return Network(fn, random(params), args)


def take_old_arguments(function: str, **names: str) -> None:
    """Lets a function of `jax.numpy` be called by names of arguments that JAX has dropped since."""
    new = getattr(jax.numpy, function)

    @functools.wraps(new)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return new(*args, **{names.get(name, name): value for name, value in kwargs.items()})

    setattr(jax.numpy, function, renamed)
