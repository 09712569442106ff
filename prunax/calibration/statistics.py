"""Statistics of layer inputs, and what follows from them without pruning anything yet."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from prunax import trees
from prunax.calibration import stages

__all__ = ["input_statistics"]

PyTree = Any


def input_statistics(
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    kind: Literal["norm", "gram"] = "norm",
    where: trees.Where = trees.is_kernel,
    progress: bool = False,
) -> PyTree:
    r"""Gather statistics of the inputs that each weight matrix meets, over all rows of all batches.

    Args:
        fn: ``fn(params, batch)``, any JAX function. Its jaxpr is interpreted: no hooks, no changes to the model.
        params: Pytree of arrays.
        batches: What `fn` takes as its second argument, any number of them.
        kind: ``"norm"`` for the L2 norm of each input, :math:`\|x_i\|_2`; ``"gram"`` for the Gram matrix
            :math:`X^T X`, whose diagonal is the norms squared.
        where: ``where(path, leaf) -> bool`` chooses the leaves.
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
    statistics = {"norm": stages.squares, "gram": stages.gram}
    if kind not in statistics:
        raise ValueError(f'input_statistics: kind must be "norm" or "gram", got {kind!r}.')
    found: dict[int, list[stages.Task]] = {}

    def note(tasks: list[stages.Task]) -> list[None]:
        for task in tasks:
            found.setdefault(task.problem.leaf, []).append(task._replace(weights=None))
        return [None] * len(tasks)

    stages.walk(
        "input_statistics",
        fn,
        params,
        batches,
        statistics[kind],
        note,
        where=where,
        progress=progress,
    )
    chosen = trees.select(params, where)
    own = [
        _join(kind, found[n], leaf.shape) if n in found else jnp.zeros(())
        for n, leaf in enumerate(chosen.leaves)
    ]
    return chosen.put(own, jax.tree.map(lambda _: jnp.zeros(()), params))


def _join(kind: str, tasks: list[stages.Task], shape: tuple[int, ...]) -> Any:
    tasks = sorted(tasks, key=lambda task: task.problem.view.picks)
    if kind == "norm":
        return _norms(tasks, shape)
    grams = [
        task.statistic if task.problem.layout.is_batched else task.statistic[0] for task in tasks
    ]
    if len(tasks) == 1 and not tasks[0].problem.view.picks:
        return grams[0]
    if len({g.shape for g in grams}) > 1:
        return tuple(grams)
    stacked = jnp.stack(grams)
    picked = shape[: len(tasks[0].problem.view.picks)]
    fits = int(np.prod(picked)) == len(tasks)
    return stacked.reshape(*picked, *stacked.shape[1:]) if fits else stacked


def _norms(tasks: list[stages.Task], shape: tuple[int, ...]) -> jax.Array:
    norms = jnp.zeros(shape, tasks[0].statistic.dtype)
    of_outputs = set(range(len(shape)))
    shared = len({id(task.statistic) for task in tasks}) == 1
    for problem, _, total in tasks:
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
