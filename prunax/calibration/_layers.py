"""Pruning a function layer by layer, by any method: the one driver, and the short names of two methods."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from prunax import _masks as mask_trees
from prunax import allocation as allocations
from prunax import patterns, schedules, trees
from prunax.calibration import _methods
from prunax.calibration._problems import Problem
from prunax.calibration._running import Layers, Task, layers_of, run

__all__ = ["Pruned", "prune_layers", "sparsegpt", "wanda"]

PyTree = Any
Function = Callable[[PyTree, Any], Any]


class Pruned(NamedTuple):
    """Pruned parameters with their masks.

    Attributes:
        params: The params with exactly 0.0 where a weight is pruned.
        masks: A mask tree of the same structure: bool arrays, True = kept, for pruned leaves; the scalar True for
            others.
    """

    params: PyTree
    masks: PyTree


class Options(TypedDict, total=False):
    """What the short names take besides, see `prune_layers`."""

    pattern: patterns.Pattern | None
    allocation: Any
    where: trees.Where | None
    sequential: bool
    donate: bool
    progress: bool


def prune_layers(
    fn: Function,
    params: PyTree,
    batches: Iterable[Any],
    method: _methods.Method,
    sparsity: float | None = None,
    *,
    pattern: patterns.Pattern | None = None,
    allocation: allocations.Allocation = allocations.uniform,
    where: trees.Where | None = None,
    sequential: bool = True,
    donate: bool = False,
    progress: bool = False,
) -> Pruned:
    """Prune a function layer by layer, each on the inputs that it gets.

    Args:
        fn: ``fn(params, batch)``, any JAX function; what it returns matters only in that layers on which no output
            depends cannot be pruned. No hooks and no changes to the model: layer inputs come from its jaxpr.
        params: Pytree of arrays, dense.
        batches: Calibration inputs, each what `fn` takes as its second argument. All live on the device at once, with
            the activations between two stages.
        method: `Wanda`, `SparseGPT`, `Alps`, `Refit`, or any other `Method`.
        sparsity: Fraction of each layer's weights to remove, in [0, 1]. May be left out with `patterns.NM`.
        pattern: Read on the layer's matrix ``(in, out)`` wherever its axes lie in the leaf: axis -2 is the inputs, so
            that the defaults fit kernels stored as (out, in), with several input axes, and convolutions, whose inputs
            are the whole window. Another axis must be the leaf's input axis. Left out, the method's own.
        allocation: How the sparsity is shared out among leaves: `allocation.uniform`, `allocation.erdos_renyi`,
            `allocation.by_path`, or what `outlier_allocation` gives.
        where: ``where(path, leaf) -> bool`` chooses the leaves. Left out, all kernels that the function's jaxpr shows
            (`prunax.kernels`); leaves that look like one by name and are none, and kernels that are recomputed before
            their product, stay whole, and one warning lists them. Leaves that are only looked up in stay whole.
        sequential: Solve each layer on the inputs that it gets from the pruned layers before it, rather than the dense.
        donate: Prune in place: what is pruned takes the memory of `params`, whose arrays cannot be used afterwards,
            nor if an error stops it half-way. Only where it is sequential, and without a correction.
        progress: Show a progress bar.

    Returns:
        `Pruned` params and masks (True = kept). Deterministic. Each slice of a scanned stack is a layer of its own, and
        each expert has its own budget; weights that are used more than once are solved for all their inputs.

    Raises:
        ValueError: If `where` selects leaves that cannot be pruned by their inputs, naming them all; if the pattern
            does not fit, or inputs are not finite, naming the leaf. Inputs that are all zero are warned of.
        TypeError: If the method cannot do the pattern.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> from prunax.calibration import SparseGPT, Wanda, prune_layers
        >>> params = {"kernel": jnp.array([[1.0], [3.0]])}
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> fn = lambda p, x: x @ p["kernel"]
        >>> prune_layers(fn, params, [batch], Wanda(), 0.5).params["kernel"][:, 0].tolist()
        [0.0, 3.0]
        >>> prune_layers(fn, params, [batch], SparseGPT(damping=0.0), 0.5).params["kernel"][:, 0].tolist()
        [0.0, 3.5]
    """
    return _prune(
        "prune_layers",
        fn,
        params,
        batches,
        method,
        sparsity,
        pattern=pattern,
        allocation=allocation,
        where=where,
        sequential=sequential,
        donate=donate,
        progress=progress,
    )


def wanda(
    fn: Function,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float | None = None,
    **options: Unpack[Options],
) -> Pruned:
    r"""Prune by weight magnitude times input norm, :math:`|w_{ij}| \|x_i\|_2`: `prune_layers` with `Wanda`.

    Args:
        fn: ``fn(params, batch)``, any JAX function.
        params: Pytree of arrays.
        batches: Calibration inputs, each what `fn` takes as its second argument.
        sparsity: Fraction of each layer's weights to remove, in [0, 1]. May be left out with `patterns.NM`.
        **options: As for `prune_layers`.

    Returns:
        `Pruned` params and masks (True = kept). Kept weights stay as they are.

    Raises:
        ValueError: As for `prune_layers`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[1.0, 5.0], [3.0, 2.0]])}
        >>> batch = jnp.array([[9.0, 1.0]])
        >>> prunax.calibration.wanda(lambda p, x: x @ p["kernel"], params, [batch], 0.5).params
        {'kernel': Array([[1., 5.],
               [0., 0.]], dtype=float32)}

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, arXiv:2306.11695.
    """
    return _prune("wanda", fn, params, batches, _methods.Wanda(), sparsity, **options)


def sparsegpt(
    fn: Function,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    correction: float = 0.0,
    **options: Unpack[Options],
) -> Pruned:
    """Prune input by input, correcting the weights of later inputs: `prune_layers` with `SparseGPT`.

    Args:
        fn: ``fn(params, batch)``, any JAX function.
        params: Pytree of arrays.
        batches: As for `prune_layers`. A layer's statistics are one ``(in, in)`` matrix, in float32.
        sparsity: Fraction of each layer's weights to remove, in [0, 1]. May be left out with `patterns.NM`.
        block_size: As for `SparseGPT`.
        damping: As for `SparseGPT`.
        correction: As for `SparseGPT`.
        **options: As for `prune_layers`.

    Returns:
        `Pruned` params, kept weights corrected, and masks (True = kept).

    Raises:
        ValueError: As for `prune_layers`.
        TypeError: If the pattern is none that `SparseGPT` takes.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[1.0], [3.0]])}
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> fn = lambda p, x: x @ p["kernel"]
        >>> pruned = prunax.calibration.sparsegpt(fn, params, [batch], 0.5, damping=0.0)
        >>> pruned.params["kernel"][:, 0].tolist(), pruned.masks["kernel"][:, 0].tolist()
        ([0.0, 3.5], [False, True])

    References:
        Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023,
        arXiv:2301.00774, algorithm 1.
    """
    method = _methods.SparseGPT(damping=damping, correction=correction, block_size=block_size)
    return _prune("sparsegpt", fn, params, batches, method, sparsity, **options)


def _prune(
    function: str,
    fn: Function,
    params: PyTree,
    batches: Iterable[Any],
    method: Any,
    sparsity: float | None,
    *,
    pattern: Any = None,
    allocation: allocations.Allocation = allocations.uniform,
    where: trees.Where | None = None,
    sequential: bool = True,
    donate: bool = False,
    progress: bool = False,
) -> Pruned:
    given = getattr(method, "masks", None)
    if given is None:
        pattern = (
            getattr(method, "pattern", patterns.Unstructured()) if pattern is None else pattern
        )
        _check_request(function, method, sparsity, pattern, allocation)
        layers = layers_of(function, fn, params, batches, where)
        sparsities = _sparsities(function, layers.selection, sparsity, pattern, allocation)
        own = [_matrix_pattern(layers, p, pattern) for p in layers.problems]
        budgets = _budgets(layers, sparsities, own)
    else:
        chosen = _masked(function, params, given)
        layers = layers_of(function, fn, params, batches, lambda path, leaf: path in chosen)
        masks = layers.selection.take(function, "masks", given)
        own = [patterns.Unstructured()] * len(layers.problems)
        budgets = [p.read(jnp.asarray(masks[p.leaf])) for p in layers.problems]
        method = dataclasses.replace(method, masks=None)
    beside_dense = sequential and getattr(method, "beside_dense", False)

    def solve(tasks: list[Task]) -> Iterator[tuple[jax.Array | None, jax.Array | None]]:
        prepared: dict[Any, Any] = {}  # q, k and v share their inputs
        for n, weights, statistic in tasks:
            if budgets[n] is None:
                yield None, None
                continue
            key = id(jax.tree.leaves(statistic)[0])
            if key not in prepared:
                prepared[key] = _prepare(method, statistic)
            leaf = layers.selection.leaves[layers.problems[n].leaf]
            scale = layers.problems[n].scale(leaf)
            yield _solve(method, weights, prepared[key], budgets[n], scale, pattern=own[n])

    new, solved = run(
        layers,
        method.statistic,
        solve,
        sequential=sequential,
        beside_dense=beside_dense,
        donate=donate,
        progress=progress,
    )
    if given is not None:
        return Pruned(new, given)
    masks: list[jax.Array] = [trees.keep_all() for _ in layers.selection.indices]
    pruned = jax.tree.leaves(new)
    for problem, mask in zip(layers.problems, solved, strict=True):
        if mask is not None:
            whole = masks[problem.leaf]
            leaf = pruned[layers.selection.indices[problem.leaf]]
            whole = whole if whole.shape == leaf.shape else jnp.ones_like(leaf, dtype=jnp.bool_)
            masks[problem.leaf] = problem.write(whole, mask)
    everywhere = jax.tree.map(lambda _: trees.keep_all(), params)
    return Pruned(new, layers.selection.put(masks, everywhere))


# A method whose numbers are data is compiled once for all of them; any other is a constant of the program.


def _static(method: Any) -> tuple[list[Any], Any]:
    leaves, treedef = jax.tree.flatten(method)
    return ([], method) if leaves and leaves[0] is method else (leaves, treedef)


def _method(numbers: list[Any], static: Any) -> Any:
    return static.unflatten(numbers) if isinstance(static, PyTreeDef) else static


def _prepare(method: Any, statistic: Any) -> Any:
    numbers, static = _static(method)
    return _prepared(numbers, statistic, static=static)


@functools.partial(jax.jit, static_argnames="static")
def _prepared(numbers: list[Any], statistic: Any, *, static: Any) -> Any:
    return jax.vmap(_method(numbers, static).prepare)(statistic)


def _solve(
    method: Any, weights: jax.Array, prepared: Any, budgets: Any, scale: Any, *, pattern: Any
) -> tuple[jax.Array, jax.Array]:
    numbers, static = _static(method)
    return _solved(numbers, weights, prepared, budgets, scale, static=static, pattern=pattern)


@functools.partial(jax.jit, static_argnames=("static", "pattern"))
def _solved(
    numbers: list[Any],
    weights: jax.Array,
    prepared: Any,
    budgets: Any,
    scale: jax.Array | None,
    *,
    static: Any,
    pattern: patterns.Pattern,
) -> tuple[jax.Array, jax.Array]:
    one = functools.partial(_method(numbers, static).solve, pattern=pattern)
    if scale is None:
        new, mask = jax.vmap(one)(weights, prepared, budgets)
        return jnp.where(mask, new, jnp.zeros((), new.dtype)), mask
    # The function multiplies the weights by constants. What counts is their product; one that is nothing stays so.
    scaled = (weights.astype(scale.dtype) * scale).astype(weights.dtype)
    new, mask = jax.vmap(one)(scaled, prepared, budgets)
    divided = new.astype(scale.dtype) / jnp.where(scale == 0, 1, scale)
    kept = (new == scaled) | (scale == 0)
    new = jnp.where(kept, weights, divided.astype(weights.dtype))
    return jnp.where(mask, new, jnp.zeros((), new.dtype)), mask


def _budgets(
    layers: Layers, sparsities: dict[int, Any], own: list[patterns.Pattern]
) -> list[np.ndarray | None]:
    """What each matrix of each problem loses; None where the allocation keeps the leaf whole."""
    units = [
        math.prod(q.unit_shape(p.shape[1:])) for p, q in zip(layers.problems, own, strict=True)
    ]
    whole: dict[int, int] = {}
    for p, n in zip(layers.problems, units, strict=True):
        whole[p.leaf] = whole.get(p.leaf, 0) + p.shape[0] * n
    done = dict.fromkeys(whole, 0)
    budgets: list[np.ndarray | None] = []
    for p, q, n in zip(layers.problems, own, units, strict=True):
        if p.leaf not in sparsities:
            budgets.append(None)
            continue
        sparsity = sparsities[p.leaf]
        if q.compare_axis is None:
            # Exact for the leaf, whatever rounding its matrices need: each is given what the leaf's share so far lacks.
            total = round(float(sparsity) * whole[p.leaf])
            ends = [done[p.leaf] + n * k for k in range(p.shape[0] + 1)]
            done[p.leaf] = ends[-1]
            shares = [_share(total, end, whole[p.leaf]) for end in ends]
            budgets.append(np.diff(shares).astype(np.int32))
        else:
            plan = mask_trees.plan(
                [(p.name, p.shape[1:])], sparsity, allocation=allocations.uniform, pattern=q
            )
            budgets.append(np.full(p.shape[0], int(plan.budgets[0]), np.int32))
    return budgets


def _share(total: int, part: int, whole: int) -> int:
    """``round(total * part / whole)`` in exact integers, halves up."""
    return (2 * total * part + whole) // (2 * whole) if whole else 0


def _matrix_pattern(layers: Layers, problem: Problem, pattern: Any) -> patterns.Pattern:
    """The pattern on ``(in, out)``, or an error that names the leaf."""
    if isinstance(pattern, patterns.NM | patterns.ConstantFanIn) and pattern.axis != -2:
        _check_axis(layers, problem, pattern)
    if isinstance(pattern, patterns.ConstantFanIn):
        return patterns.ConstantFanIn()
    if isinstance(pattern, patterns.NM):
        if problem.run % pattern.m:
            raise ValueError(
                f"{layers.function}: {pattern} does not fit {problem.name!r}: its input axis has length "
                f"{problem.run}, which {pattern.m} does not divide. Leave the leaf out with `where`."
            )
        return patterns.NM(pattern.n, pattern.m)
    patterns.check_fit(layers.function, pattern, [(problem.name, problem.shape[1:])])
    return pattern


def _check_axis(layers: Layers, problem: Problem, pattern: Any) -> None:
    axis, shape = pattern.axis, layers.selection.leaves[problem.leaf].shape
    places = problem.places(shape)[0, :, 0]
    if isinstance(pattern, patterns.NM):  # groups are runs of the last input axis
        places = places[: problem.run]
    coordinates = np.unravel_index(places, shape)
    inputs = {a for a, c in enumerate(coordinates) if (c != c[0]).any()}
    asked = {axis} if isinstance(axis, int) else set(axis)
    if {a % len(shape) for a in asked if -len(shape) <= a < len(shape)} != inputs:
        raise ValueError(
            f"{layers.function}: axis {axis} is not the input axis of {problem.name!r} of shape {shape}, which is "
            f"{', '.join(map(str, sorted(inputs)))}. Leave the axis out: its default, -2, means the inputs here."
        )


def _sparsities(
    function: str, chosen: trees.Selection, sparsity: Any, pattern: Any, allocation: Any
) -> dict[int, Any]:
    """The sparsity of each leaf that the allocation prunes."""
    if sparsity is None:
        sparsity = pattern.implied_sparsity
    infos = [allocations.Leaf(path, shape, math.prod(shape)) for path, shape in chosen.shapes]
    pools, rescale = allocation(infos, sparsity)
    if rescale is not None or any(len(pool.leaves) != 1 for pool in pools):
        raise ValueError(
            f"{function}: layers are pruned one after the other, so there is nothing to rank across them. Use "
            f"allocation.uniform, allocation.erdos_renyi, allocation.by_path or calibration.outlier_allocation."
        )
    return {pool.leaves[0]: pool.sparsity for pool in pools}


def _masked(function: str, params: PyTree, masks: PyTree) -> frozenset[str]:
    """The paths of leaves that have masks of their own."""
    own = trees.check_masks(function, params, masks)
    leaves = zip(trees.paths(params), jax.tree.leaves(params), own, strict=True)
    chosen = frozenset(path for path, leaf, mask in leaves if trees.is_prunable(mask, leaf))
    if not chosen:
        raise ValueError(
            f"{function}: every mask is the scalar True, so that there is nothing to refit. "
            f"Pass the masks that compute_masks, wanda or sparsegpt gave."
        )
    return chosen


def _check_request(
    function: str, method: Any, sparsity: Any, pattern: Any, allocation: Any
) -> None:
    if isinstance(method, type) or not hasattr(method, "solve"):
        raise TypeError(
            f"{function}: method must be a method such as calibration.Wanda(), got {method!r}."
        )
    patterns.check_pattern(function, pattern)
    allocations.check_allocation(function, allocation)
    problem = method.check(pattern) if hasattr(method, "check") else None
    if problem is not None:
        raise TypeError(f"{function}: {problem}.")
    if trees.is_traced(sparsity):
        raise TypeError(f"{function}: the sparsity must be a number, got a traced value.")
    if sparsity is not None:
        schedules.check_sparsity(function, sparsity)
    elif pattern.implied_sparsity is None and allocations.needs_sparsity(allocation):
        raise ValueError(
            f"{function}: needs a sparsity in [0, 1], or a pattern that fixes it (patterns.NM), or "
            f"allocation.by_path. Pass 0.5 to remove half of the weights."
        )
