"""One-shot pruning with calibration data: statistics, Wanda, SparseGPT, ADMM, reconstruction."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _counts, patterns, schedules, trees
from prunax import allocation as allocations
from prunax import masks as mask_trees
from prunax.calibration import plans, solver, stages

__all__ = ["Pruned", "admm", "reconstruct", "sparsegpt", "wanda"]

PyTree = Any
Function = Callable[[PyTree, Any], Any]
Solved = tuple[jax.Array, jax.Array]


class Pruned(NamedTuple):
    """Pruned parameters with their masks.

    Attributes:
        params: The params with exactly 0.0 where a weight is pruned.
        masks: A mask tree of the same structure: bool arrays, True = kept, for pruned leaves; the scalar True for
            others.
    """

    params: PyTree
    masks: PyTree


def wanda(
    fn: Function,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    pattern: patterns.Pattern = patterns.ConstantFanIn(),
    allocation: Any = allocations.uniform,
    where: trees.Where = trees.is_kernel,
    sequential: bool = True,
    donate: bool = False,
    progress: bool = False,
) -> Pruned:
    r"""Prune by weight magnitude times input norm, :math:`|w_{ij}| \|x_i\|_2`. Kept weights stay as they are.

    Args:
        fn: ``fn(params, batch)``, any JAX function; what it returns matters only in that layers on which no output
            depends cannot be pruned. No hooks and no changes to the model: layer inputs come from its jaxpr.
        params: Pytree of arrays.
        batches: Calibration inputs, each what `fn` takes as its second argument. All live on the device at once, with
            the activations between two stages.
        sparsity: Fraction of each layer's weights to remove, in [0, 1]. May be left out with `patterns.NM`.
        pattern: Read on the layer's matrix ``(in, out)`` wherever its axes lie in the leaf: axis -2 is the inputs, so
            that the defaults fit kernels stored as (out, in), with several input axes, and convolutions, whose inputs
            are the whole window. Another axis must be the leaf's input axis.
        allocation: How the sparsity is shared out among leaves: `allocation.uniform`, `allocation.erdos_renyi`,
            `allocation.by_path`, or what `outlier_allocation` gives.
        where: ``where(path, leaf) -> bool`` chooses the leaves. Leaves that are only looked up in stay whole.
        sequential: Score each layer on the inputs that it gets from the pruned layers before it, rather than the dense.
        donate: Prune in place: what is pruned takes the memory of `params`, whose arrays cannot be used afterwards,
            nor if an error stops it half-way. Only where it is sequential.
        progress: Show a progress bar.

    Returns:
        `Pruned` params and masks (True = kept). Deterministic. Each slice of a scanned stack is a layer of its own;
        weights that are used more than once are scored by all their inputs.

    Raises:
        ValueError: Naming the leaf: if the function uses it in a way that cannot be read, the pattern does not fit, or
            its inputs are not finite. Inputs that are all zero are warned of.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[1.0, 5.0], [3.0, 2.0]])}
        >>> batch = jnp.array([[9.0, 1.0]])
        >>> prunax.calibration.wanda(lambda p, x: x @ p["kernel"], params, [batch], 0.5).params
        {'kernel': Array([[1., 5.],
               [0., 0.]], dtype=float32)}

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, arXiv:2306.11695. There the
        layers of a block see inputs that the block's own pruned layers have not touched yet; here they do.
    """
    planner = _Planner("wanda", params, sparsity, pattern, allocation, where)

    def solve(problem: plans.Problem, weights: jax.Array, total: jax.Array) -> Solved:
        return _wanda(
            weights, total, planner.budget(problem), pattern=planner.matrix_pattern(problem)
        )

    each = _each(solve)
    return planner.run(
        fn, batches, stages.squares, each, sequential=sequential, donate=donate, progress=progress
    )


def sparsegpt(
    fn: Function,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    block_size: int = 128,
    damping: float = 0.01,
    correction: float = 0.0,
    allocation: Any = allocations.uniform,
    where: trees.Where = trees.is_kernel,
    sequential: bool = True,
    donate: bool = False,
    progress: bool = False,
) -> Pruned:
    """Prune input by input, correcting the weights of later inputs for what earlier ones lose.

    Args:
        fn: As for `wanda`.
        params: Pytree of arrays.
        batches: As for `wanda`. A layer's statistics are one ``(in, in)`` matrix, in float32.
        sparsity: Fraction of each layer's weights to remove, in [0, 1]. May be left out with `patterns.NM`.
        pattern: `patterns.Unstructured`, `patterns.ConstantFanIn` or `patterns.NM`, read as for `wanda`.
        block_size: Masks are chosen for so many inputs at a time, with the corrections that the inputs before them
            brought. With NM it is rounded up to whole groups.
        damping: Added to the diagonal of the Gram matrix, times the diagonal's mean; more where that does not do.
        correction: How much of what the pruned layers before it have changed in its inputs a layer is to make good,
            from 0, none, to 1, all that the calibration data show; with few data that is too much, and a half better.
            Takes the dense model along, at about twice the time.
        allocation: As for `wanda`.
        where: As for `wanda`.
        sequential: As for `wanda`.
        donate: As for `wanda`; not with a correction.
        progress: As for `wanda`.

    Returns:
        `Pruned` params, kept weights corrected, and masks (True = kept). Weights of inputs that are zero in every batch
        go first, and are zero in the end even where they are kept.

    Raises:
        ValueError: As for `wanda`.
        TypeError: If the pattern is none of the three.

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
    _check_solvable("sparsegpt", pattern)
    _check_positive("sparsegpt", "block_size", block_size)
    statistic, options = _moments("sparsegpt", correction, sequential)
    planner = _Planner("sparsegpt", params, sparsity, pattern, allocation, where)
    if isinstance(pattern, patterns.NM):
        block_size = -(-block_size // pattern.m) * pattern.m

    def solve(tasks: list[stages.Task]) -> list[Solved]:
        factors: dict[int, solver.Factor] = {}  # q, k and v share their inputs
        results = []
        for problem, weights, total in tasks:
            grams, *drift = total
            if id(grams) not in factors:
                factors[id(grams)] = _factorize(grams, damping)
            own = planner.matrix_pattern(problem)
            budget = solver.budgets(own, planner.budget(problem), problem.shape, block_size)
            factor = factors[id(grams)]
            weights = _retarget(weights, factor, *drift, correction) if drift else weights
            results.append(_obs(weights, factor, budget, pattern=own, block_size=block_size))
        return results

    return planner.run(fn, batches, statistic, solve, donate=donate, progress=progress, **options)


def admm(
    fn: Function,
    params: PyTree,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    damping: float = 0.01,
    correction: float = 0.0,
    iterations: int = 60,
    allocation: Any = allocations.uniform,
    where: trees.Where = trees.is_kernel,
    sequential: bool = True,
    donate: bool = False,
    progress: bool = False,
) -> Pruned:
    """Choose the masks and the kept weights of each layer together. Slower than `sparsegpt`, and better.

    Args:
        fn: As for `wanda`.
        params: Pytree of arrays.
        batches: As for `sparsegpt`.
        sparsity: As for `sparsegpt`.
        pattern: As for `sparsegpt`.
        damping: As for `sparsegpt`.
        correction: As for `sparsegpt`.
        iterations: At most so many rounds a layer, see `solver.admm`.
        allocation: As for `wanda`.
        where: As for `wanda`.
        sequential: As for `wanda`.
        donate: As for `wanda`; not with a correction.
        progress: As for `wanda`.

    Returns:
        `Pruned` params, kept weights refitted, and masks (True = kept).

    Raises:
        ValueError: As for `wanda`.
        TypeError: If the pattern is not one that `sparsegpt` takes.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[1.0], [3.0]])}
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> pruned = prunax.calibration.admm(lambda p, x: x @ p["kernel"], params, [batch], 0.5)
        >>> pruned.masks["kernel"][:, 0].tolist()
        [False, True]

    References:
        Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024,
        arXiv:2406.07831.
    """
    _check_solvable("admm", pattern)
    statistic, options = _moments("admm", correction, sequential)
    planner = _Planner("admm", params, sparsity, pattern, allocation, where)

    def solve(problem: plans.Problem, weights: jax.Array, total: Any) -> Solved:
        weights, grams = _made_good(weights, total, damping, correction)
        own = planner.matrix_pattern(problem)
        k = planner.budget(problem)
        each = solver.budgets(own, k, problem.shape, problem.shape[1])[:, 0]
        return _admm(weights, grams, each, damping, pattern=own, iterations=iterations)

    return planner.run(
        fn, batches, statistic, _each(solve), donate=donate, progress=progress, **options
    )


def reconstruct(
    fn: Function,
    params: PyTree,
    masks: PyTree,
    batches: Iterable[Any],
    *,
    damping: float = 0.01,
    correction: float = 0.0,
    iterations: int = 32,
    sequential: bool = True,
    donate: bool = False,
    progress: bool = False,
) -> PyTree:
    """Refit the kept weights of each layer, for any masks, to the outputs of the dense layer.

    Args:
        fn: ``fn(params, batch)``, as for `wanda`.
        params: The **dense** params.
        masks: A mask tree of the same structure, True = kept, of any pattern; leaves with the scalar True stay.
        batches: Calibration inputs.
        damping: Keeps weights that the inputs do not determine near where they were, see `solver.refit`.
        correction: As for `sparsegpt`.
        iterations: Steps of conjugate gradients.
        sequential: Fit each layer on the inputs that it gets from the refitted layers before it.
        donate: As for `wanda`; not with a correction.
        progress: Show a progress bar.

    Returns:
        The params, exactly 0.0 where the mask is False, kept weights refitted.

    Raises:
        ValueError: If the masks do not fit the params or prune nothing, and as for `wanda`.
        TypeError: If a mask is not boolean.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params, masks = {"kernel": jnp.array([[1.0], [3.0]])}, {"kernel": jnp.array([[False], [True]])}
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> fn = lambda p, x: x @ p["kernel"]
        >>> prunax.calibration.reconstruct(fn, params, masks, [batch], damping=0.0)["kernel"][:, 0].tolist()
        [0.0, 3.5]
    """
    statistic, options = _moments("reconstruct", correction, sequential)
    mask_leaves = mask_trees.check_masks("reconstruct", params, masks)
    leaves = jax.tree.leaves(params)
    chosen = {
        path
        for path, leaf, mask in zip(trees.paths(params), leaves, mask_leaves, strict=True)
        if trees.is_prunable(mask, leaf)
    }
    if not chosen:
        raise ValueError(
            "reconstruct: every mask is the scalar True, so that there is nothing to refit. "
            "Pass the masks that compute_masks, wanda or sparsegpt gave."
        )

    def where(path: str, leaf: Any) -> bool:
        return path in chosen

    kept = trees.select(params, where).take("reconstruct", "masks", masks)

    def solve(problem: plans.Problem, weights: jax.Array, total: Any) -> jax.Array:
        weights, grams = _made_good(weights, total, damping, correction)
        mask = problem.read(jnp.asarray(kept[problem.leaf]))
        return _refit(weights, mask, grams, damping, iterations=iterations)

    return stages.walk(
        "reconstruct",
        fn,
        params,
        batches,
        statistic,
        _each(solve),
        where=where,
        donate=donate,
        progress=progress,
        **options,
    )


class _Planner:
    """Budgets of the problems as they come, and the masks that are made of them."""

    def __init__(
        self,
        function: str,
        params: PyTree,
        sparsity: Any,
        pattern: patterns.Pattern,
        allocation: Any,
        where: trees.Where,
    ) -> None:
        _check_request(function, sparsity, pattern, allocation)
        self.function, self.params, self.where, self.pattern = function, params, where, pattern
        self.chosen = trees.select(params, where)
        self.sparsities = _sparsities(function, self.chosen, sparsity, pattern, allocation)
        self.masks: dict[int, jax.Array] = {}
        self.done: dict[int, int] = {}

    def run(
        self,
        fn: Function,
        batches: Iterable[Any],
        statistic: stages.Statistic,
        solve: Callable[[list[stages.Task]], Sequence[Any]],
        **options: Any,
    ) -> Pruned:
        """Walk through the stages and gather masks on the way."""

        def solve_and_mask(tasks: list[stages.Task]) -> list[jax.Array | None]:
            todo = [t for t in tasks if t.problem.leaf in self.sparsities]
            results = iter(solve(todo))
            return [
                self._note(t, *next(results)) if t.problem.leaf in self.sparsities else None
                for t in tasks
            ]

        params = stages.walk(
            self.function,
            fn,
            self.params,
            batches,
            statistic,
            solve_and_mask,
            where=self.where,
            **options,
        )
        everywhere = jax.tree.map(lambda _: trees.keep_all(), self.params)
        own = [self.masks.get(n, trees.keep_all()) for n in range(len(self.chosen.indices))]
        return Pruned(params, self.chosen.put(own, everywhere))

    def _note(self, task: stages.Task, weights: jax.Array, mask: jax.Array) -> jax.Array:
        leaf = task.problem.leaf
        if leaf not in self.masks:
            self.masks[leaf] = jnp.ones(self.chosen.leaves[leaf].shape, jnp.bool_)
        self.masks[leaf] = task.problem.write(self.masks[leaf], mask)
        return weights

    def budget(self, problem: plans.Problem) -> int:
        """What the problem loses: all its matrices together, or each slice where the pattern compares along an axis."""
        sparsity = self.sparsities[problem.leaf]
        own = self.matrix_pattern(problem)
        if not isinstance(own, patterns.Unstructured):
            shapes = [(problem.name, problem.shape)]
            plan = mask_trees.plan(shapes, sparsity, allocation=allocations.uniform, pattern=own)
            return int(plan.budgets[0])
        # Exact for the leaf, whatever rounding its slices need: each is given what the leaf's share so far lacks.
        size = int(np.prod(problem.shape))
        before = self.done.get(problem.leaf, 0)
        self.done[problem.leaf] = before + size
        whole = self.chosen.leaves[problem.leaf].size
        total = round(float(sparsity) * whole)
        return solver.share(total, before + size, whole) - solver.share(total, before, whole)

    def matrix_pattern(self, problem: plans.Problem) -> patterns.Pattern:
        """The pattern on ``(matrices, in, out)``, or an error that names the leaf."""
        pattern = self.pattern
        if isinstance(pattern, patterns.NM | patterns.ConstantFanIn) and pattern.axis != -2:
            self._check_axis(problem, pattern.axis)
        if isinstance(pattern, patterns.ConstantFanIn):
            return patterns.ConstantFanIn()
        if not isinstance(pattern, patterns.NM):
            return pattern
        if problem.layout.group_length % pattern.m:
            raise ValueError(
                f"{self.function}: {pattern} does not fit {problem.name!r}: its input axis has length "
                f"{problem.layout.group_length}, which {pattern.m} does not divide. Leave the leaf out with `where`."
            )
        return patterns.NM(pattern.n, pattern.m)

    def _check_axis(self, problem: plans.Problem, axis: int | tuple[int, ...]) -> None:
        shape = self.chosen.leaves[problem.leaf].shape
        places = problem.places(shape)[0, :, 0]
        if isinstance(self.pattern, patterns.NM):  # groups are runs of the last input axis
            places = places[: problem.layout.group_length]
        coordinates = np.unravel_index(places, shape)
        inputs = {a for a, c in enumerate(coordinates) if (c != c[0]).any()}
        asked = {axis} if isinstance(axis, int) else set(axis)
        if {a % len(shape) for a in asked if -len(shape) <= a < len(shape)} != inputs:
            raise ValueError(
                f"{self.function}: axis {axis} is not the input axis of {problem.name!r} of shape {shape}, which is "
                f"{', '.join(map(str, sorted(inputs)))}. Leave the axis out: its default, -2, means the inputs here."
            )


def _sparsities(
    function: str, chosen: trees.Selection, sparsity: Any, pattern: Any, allocation: Any
) -> dict[int, Any]:
    """The sparsity of each leaf that the allocation prunes."""
    if sparsity is None:
        sparsity = pattern.max_sparsity
    infos = [allocations.Leaf(path, shape, int(np.prod(shape))) for path, shape in chosen.shapes]
    pools, rescale = allocation(infos, sparsity)
    if rescale is not None or any(len(pool.leaves) != 1 for pool in pools):
        raise ValueError(
            f"{function}: layers are pruned one after the other, so there is nothing to rank across them. Use "
            f"allocation.uniform, allocation.erdos_renyi, allocation.by_path or calibration.outlier_allocation."
        )
    return {pool.leaves[0]: pool.sparsity for pool in pools}


def _check_request(function: str, sparsity: Any, pattern: Any, allocation: Any) -> None:
    if isinstance(pattern, type):
        raise TypeError(
            f"{function}: pattern must be a pattern, got its class. Call it: {pattern.__name__}(...)."
        )
    if trees.is_traced(sparsity):
        raise TypeError(f"{function}: the sparsity must be a number, got a traced value.")
    if sparsity is not None:
        schedules.check_sparsity(function, sparsity)
    elif pattern.max_sparsity is None and not isinstance(allocation, allocations.by_path):
        raise ValueError(
            f"{function}: needs a sparsity in [0, 1], or a pattern that fixes it (patterns.NM), or "
            f"allocation.by_path. Pass 0.5 to remove half of the weights."
        )


def _check_solvable(function: str, pattern: Any) -> None:
    if not isinstance(pattern, type | patterns.Unstructured | patterns.ConstantFanIn | patterns.NM):
        raise TypeError(
            f"{function}: pattern must be Unstructured, ConstantFanIn or NM, got {pattern}. For others choose the "
            f"masks with compute_masks or wanda, and refit the weights with reconstruct."
        )


def _check_positive(function: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{function}: {name} must be 1 or more, got {value}.")


def _moments(
    function: str, correction: float, sequential: bool
) -> tuple[stages.Statistic, dict[str, bool]]:
    """The statistic that a correction needs, a tuple, and how to walk for it."""
    if not 0 <= correction <= 1:
        raise ValueError(f"{function}: correction must lie in [0, 1], got {correction}.")
    if sequential and correction:
        return stages.gram_and_drift, {"sequential": True, "beside_dense": True}
    return stages.only_gram, {"sequential": sequential}


def _made_good(
    weights: jax.Array, total: Any, damping: float, correction: float
) -> tuple[jax.Array, jax.Array]:
    """Matrices to fit in place of the dense ones, and the Gram matrices of their inputs."""
    grams, *drift = total
    if drift:
        weights = _retarget(weights, _factorize(grams, damping), *drift, correction)
    return weights, grams


def _each(
    solve: Callable[[plans.Problem, jax.Array, Any], Any],
) -> Callable[[list[stages.Task]], list[Any]]:
    """Solve the tasks of a stage one by one."""
    return lambda tasks: [solve(*task) for task in tasks]


@functools.partial(jax.jit, static_argnames="pattern")
def _wanda(weights: jax.Array, total: jax.Array, budget: Any, *, pattern: Any) -> Solved:
    scores = solver.wanda_scores(weights, jnp.sqrt(total))
    budget = _counts.Count(jnp.uint32(0), jnp.asarray(budget).astype(jnp.uint32))
    (mask,) = mask_trees.select_masks(
        [scores], [budget], pattern=pattern, structure=(((0,),), None)
    )
    mask = jnp.broadcast_to(mask, weights.shape)
    return jnp.where(mask, weights, jnp.zeros((), weights.dtype)), mask


@jax.jit
def _factorize(grams: jax.Array, damping: Any) -> solver.Factor:
    return jax.vmap(lambda gram: solver.factorize(gram, damping))(grams)


@jax.jit
def _retarget(
    weights: jax.Array, factors: solver.Factor, drifts: jax.Array, correction: Any
) -> jax.Array:
    return jax.vmap(lambda *one: solver.retarget(*one, correction))(weights, factors, drifts)


@functools.partial(jax.jit, static_argnames=("pattern", "block_size"))
def _obs(
    weights: jax.Array, factors: solver.Factor, budgets: Any, *, pattern: Any, block_size: int
) -> Solved:
    obs = functools.partial(solver.obs, pattern=pattern, block_size=block_size)
    return tuple(jax.vmap(obs)(weights, factors, budgets))


@functools.partial(jax.jit, static_argnames=("pattern", "iterations"))
def _admm(
    weights: jax.Array, grams: jax.Array, k: Any, damping: Any, *, pattern: Any, iterations: int
) -> Solved:
    one = functools.partial(solver.admm, pattern=pattern, damping=damping, iterations=iterations)
    return tuple(jax.vmap(one)(weights, grams, k))


@functools.partial(jax.jit, static_argnames="iterations")
def _refit(
    weights: jax.Array, mask: jax.Array, grams: jax.Array, damping: Any, *, iterations: int
) -> jax.Array:
    one = functools.partial(solver.refit, damping=damping, iterations=iterations)
    return jax.vmap(one)(weights, mask, grams)
