"""Statistics of layer inputs, and what follows from them without pruning anything yet."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from prunax import trees
from prunax.calibration import solver
from prunax.calibration._problems import Problem
from prunax.calibration._running import Task, layers_of, run

__all__ = ["input_statistics"]

PyTree = Any


def input_statistics(
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    kind: Literal["norm", "gram"] = "norm",
    where: trees.Where | None = None,
    progress: bool = False,
) -> PyTree:
    r"""Gather statistics of the inputs that each weight matrix meets, over all rows of all batches.

    Args:
        fn: ``fn(params, batch)``, any JAX function. Its jaxpr is interpreted: no hooks, no changes to the model.
        params: Pytree of arrays.
        batches: What `fn` takes as its second argument, any number of them.
        kind: ``"norm"`` for the L2 norm of each input, :math:`\|x_i\|_2`; ``"gram"`` for the Gram matrix
            :math:`X^T X`, whose diagonal is the norms squared.
        where: ``where(path, leaf) -> bool`` chooses the leaves; left out, as for `prune_layers`.
        progress: Show a progress bar.

    Returns:
        A tree of the params' structure, float32 (float64 for float64 activations). Leaves that were not chosen, or are
        only looked up in, have the scalar 0.

        Norms broadcast against their leaf: the leaf's shape, with 1 for the axes of its outputs. A kernel (in, out) has
        norms (in, 1); a stack (layers, in, out) has (layers, in, 1); one stored as (out, in) has (1, in); a convolution
        (height, width, in, out) has (height, width, in, 1).

        Gram matrices are (in, in), with axes in front for a stack and for batched weights (experts) or feature groups:
        (layers, in, in), (experts, in, in). Several input axes are one, in the leaf's order; those of a convolution are
        (window, channels). A leaf that is used in parts of different shapes has a tuple of them.

    Raises:
        ValueError: Naming the leaf, if the function uses it in a way that cannot be read, or its inputs are not finite.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
        >>> batches = [jnp.array([[3.0, 1.0]]), jnp.array([[4.0, 0.0]])]
        >>> prunax.calibration.input_statistics(fn, params, batches)["kernel"].tolist()
        [[5.0], [1.0]]
        >>> prunax.calibration.input_statistics(fn, params, batches, kind="gram")["kernel"].tolist()
        [[25.0, 3.0], [3.0, 1.0]]
    """
    statistics = {"norm": solver.squares, "gram": solver.gram}
    if kind not in statistics:
        raise ValueError(f'input_statistics: kind must be "norm" or "gram", got {kind!r}.')

    def note(tasks: list[Task]) -> Iterator[tuple[None, Any]]:
        for task in tasks:
            yield None, task.statistic

    layers = layers_of("input_statistics", fn, params, batches, where)
    _, totals = run(layers, statistics[kind], note, progress=progress)
    own: list[Any] = []
    for n, leaf in enumerate(layers.selection.leaves):
        pairs = zip(layers.problems, totals, strict=True)
        found = sorted((x for x in pairs if x[0].leaf == n), key=lambda x: x[0].weight.picks)
        join = _norms if kind == "norm" else _grams
        own.append(join(found, leaf.shape) if found else jnp.zeros(()))
    return layers.selection.put(own, jax.tree.map(lambda _: jnp.zeros(()), params))


def _grams(found: list[tuple[Problem, Any]], shape: tuple[int, ...]) -> Any:
    grams = [total if p.layout.is_batched else total[0] for p, total in found]
    if len(found) == 1 and not found[0][0].weight.picks:
        return grams[0]
    if len({g.shape for g in grams}) > 1:
        return tuple(grams)
    stacked = jnp.stack(grams)
    picked = shape[: len(found[0][0].weight.picks)]
    fits = int(np.prod(picked)) == len(found)
    return stacked.reshape(*picked, *stacked.shape[1:]) if fits else stacked


def _norms(found: list[tuple[Problem, Any]], shape: tuple[int, ...]) -> jax.Array:
    norms = jnp.zeros(shape, found[0][1].dtype)
    of_outputs = set(range(len(shape)))
    shared = len({id(total) for _, total in found}) == 1
    for problem, total in found:
        norms = problem.write(norms, _widen(total, problem.shape))
        coordinates = np.unravel_index(problem.places(shape)[:, :, 0].reshape(-1), shape)
        of_outputs &= {
            # Parts side by side (a fused projection) say the same of their outputs only if they share their inputs.
            a
            for a, c in enumerate(coordinates)
            if (c == (c[0] if shared else 0)).all()
        }
    return norms[tuple(slice(0, 1 if a in of_outputs else None) for a in range(len(shape)))]


@functools.partial(jax.jit, static_argnums=1)
def _widen(total: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    return jnp.broadcast_to(jnp.sqrt(total)[:, :, None], shape)
