"""Pruning one weight matrix with the second moments of its inputs: array mathematics that knows nothing of models.

Everything here is a pure function of a matrix ``(in, out)`` and the Gram matrix ``(in, in)`` of the inputs that meet
it, compiled once for each shape, and can be mapped over stacked layers and experts with `jax.vmap`. A mask is boolean,
True = kept.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from prunax import _counts, _meshes, _selection, patterns

__all__ = [
    "Factor",
    "Sparse",
    "alps",
    "block_budgets",
    "factorize",
    "gram",
    "keep_largest",
    "obs",
    "propagate_errors",
    "refit",
    "squares",
]

# Columns whose updates are applied one by one before the rest of their block is brought up to date by a matrix product.
_PANEL = 16
# Gram matrices of so many inputs are put together from parts; below, one product is faster.
_SPLIT = 512
_HIGHEST = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
    """What `obs` needs of a Gram matrix. Layers that share their inputs share it.

    Attributes:
        upper: (in, in) upper triangular U with ``U.T @ U`` the inverse of the damped Gram matrix.
        dead: (in,) bool, True for inputs that were always zero, unless all were.
        damping: Scalar, what was added to the diagonal over the diagonal's mean: the asked damping, or more where the
            factorization failed with that.
    """

    upper: jax.Array
    dead: jax.Array
    damping: jax.Array


class Sparse(NamedTuple):
    """A pruned matrix.

    Attributes:
        weights: (in, out), exactly 0.0 where the mask is False.
        mask: (in, out) bool, True = kept.
    """

    weights: jax.Array
    mask: jax.Array


def squares(inputs: jax.Array) -> jax.Array:
    """Sum up the squares of each input.

    Args:
        inputs: (rows, in), float32 or float64.

    Returns:
        (in,) sums over the rows.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.calibration.solver.squares(jnp.array([[3.0, 1.0], [4.0, 0.0]])).tolist()
        [25.0, 1.0]
    """
    return jnp.sum(jnp.square(inputs), axis=0)


def gram(inputs: jax.Array) -> jax.Array:
    """Multiply each input with each.

    Args:
        inputs: X, (rows, in), float32 or float64.

    Returns:
        The Gram matrix ``X.T @ X``, (in, in).

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.calibration.solver.gram(jnp.array([[3.0, 1.0], [4.0, 0.0]])).tolist()
        [[25.0, 3.0], [3.0, 1.0]]
    """
    length = inputs.shape[-1]
    if length < _SPLIT:
        return _product(inputs.T, inputs)
    # What stands on one side of the diagonal stands on the other too: of two halves, three products do for four.
    first, second = inputs[:, : length // 2], inputs[:, length // 2 :]
    off = _product(first.T, second)
    return jnp.block([[gram(first), off], [off.T, gram(second)]])


def keep_largest(
    scores: jax.Array, budget: jax.Array | int, pattern: patterns.Pattern
) -> jax.Array:
    """Mask the smallest scores of a matrix.

    Args:
        scores: (in, out), larger = keep.
        budget: int32 scalar: how many units of the pattern go; where it compares along an axis
            (`patterns.ConstantFanIn`, `patterns.NM`), how many of each slice.
        pattern: Any pattern.

    Returns:
        (in, out) bool, True = kept.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> scores = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> prunax.calibration.solver.keep_largest(scores, 1, prunax.patterns.ConstantFanIn()).tolist()
        [[False, False], [True, True]]
    """
    units = pattern.pool(scores)
    if pattern.compare_axis is None:
        count = _counts.Count(jnp.uint32(0), jnp.asarray(budget).astype(jnp.uint32))
        kept = _selection.keep_largest([units], [(0,)], [count])[0]
    else:
        kept = _selection.keep_largest_along(units, pattern.compare_axis, budget)
    return jnp.broadcast_to(pattern.expand(kept, scores.shape), scores.shape)


def block_budgets(
    budget: jax.Array | int, pattern: patterns.Pattern, length: int, block_size: int = 128
) -> jax.Array:
    """Share out how many weights are pruned among the blocks of inputs that `obs` goes through.

    Args:
        budget: int32 scalar: how many weights the matrix loses; for ConstantFanIn each output, for NM each group.
        pattern: `patterns.Unstructured`, `patterns.ConstantFanIn` or `patterns.NM`.
        length: How many inputs the matrix has.
        block_size: Inputs in a block.

    Returns:
        (blocks,) int32: what each block loses (each output of it, each group of it). The sums are exact: block by
        block, the total so far is the rounded share of the inputs so far, halves up.

    Examples:
        >>> import prunax
        >>> prunax.calibration.solver.block_budgets(5, prunax.patterns.Unstructured(), 5, 2).tolist()
        [2, 2, 1]
    """
    blocks = -(-length // block_size)
    budget = jnp.asarray(budget, jnp.int32)
    if isinstance(pattern, patterns.NM) or blocks == 1:
        return jnp.full(blocks, budget)
    # budget = each * length + rest, and only the rest needs rounding: no product here exceeds 32 bits.
    each, rest = budget // length, (budget % length).astype(jnp.uint32)
    sizes = np.minimum(block_size, length - np.arange(blocks) * block_size)

    def share(over: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = over + 2 * rest * size.astype(jnp.uint32)
        return total % (2 * length), (total // (2 * length)).astype(jnp.int32)

    _, extra = jax.lax.scan(share, jnp.uint32(length), jnp.asarray(sizes, jnp.int32))
    return each * jnp.asarray(sizes, jnp.int32) + extra


@jax.jit
def factorize(gram: jax.Array, damping: jax.Array | float = 0.01) -> Factor:
    r"""Factorize the inverse of a damped Gram matrix, the way OBS needs it.

    .. math:: U^T U = (H + \lambda \bar h I)^{-1}, \quad \bar h = \mathrm{mean}(\mathrm{diag}\,H)

    Args:
        gram: (in, in) Gram matrix H of the inputs, float32 or float64. Its scale does not matter.
        damping: The factor of the diagonal's mean. Where the factorization fails it is multiplied by ten, again and
            again up to 1e4, where the diagonal alone counts.

    Returns:
        The `Factor`, finite for any finite H. Inputs that were always zero are decoupled from the others.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> factor = prunax.calibration.solver.factorize(4.0 * jnp.eye(2), damping=0.0)
        >>> factor.upper.tolist(), factor.dead.tolist()
        ([[0.5, 0.0], [0.0, 0.5]], [False, False])

    References:
        Frantar and Alistarh, SparseGPT, 2023, arXiv:2301.00774, section 3.3. They invert H and factorize the inverse;
        factorizing H from its last row on and inverting the triangle gives the same U in half the work.
    """
    diagonal = jnp.diagonal(gram)
    silent = diagonal == 0
    # An input that was always zero gets the unit diagonal that decouples it, in units of the others.
    scale = jnp.mean(diagonal)
    scale = jnp.where(scale > 0, scale, 1)
    gram = gram / scale + jnp.diag(silent.astype(gram.dtype))
    eye = jnp.eye(len(gram), dtype=gram.dtype)

    def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, _, damping = state
        # H = V V^T with V upper triangular comes of the ordinary Cholesky factor of H turned end for end.
        lower = jnp.linalg.cholesky((gram + damping * eye)[::-1, ::-1])
        upper = solve_triangular(lower[::-1, ::-1], eye, lower=False)
        return upper, damping, jnp.maximum(damping * 10, 1e-6)

    def failed(state: tuple[jax.Array, ...]) -> jax.Array:
        upper, used, _ = state
        return ~jnp.all(jnp.isfinite(upper)) & (used < 1e4)

    first = jnp.asarray(damping, gram.dtype)
    untried = (jnp.full_like(eye, jnp.nan), jnp.zeros_like(first), first)
    upper, used, _ = jax.lax.while_loop(failed, attempt, untried)
    # Where nothing was heard of any input, nothing is known, and no input is worth less than another.
    return Factor(upper / jnp.sqrt(scale), silent & ~jnp.all(silent), used)


@functools.partial(jax.jit, static_argnames=("pattern", "block_size"))
def obs(
    weights: jax.Array,
    factor: Factor,
    budget: jax.Array | int,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    block_size: int = 128,
) -> Sparse:
    """Prune a matrix input by input, correcting the inputs to come for what each loses: SparseGPT.

    Args:
        weights: (in, out) matrix.
        factor: `factorize` of the Gram matrix of its inputs.
        budget: int32 scalar: how many weights the matrix loses; for ConstantFanIn each output, for NM each group.
        pattern: `patterns.Unstructured`: chosen within each block of inputs, over all outputs.
            `patterns.ConstantFanIn`: within each block, output by output. `patterns.NM`: within each group, when its
            turn comes.
        block_size: Inputs in a block; with NM a multiple of the length of a group.

    Returns:
        The `Sparse` matrix, in the weights' dtype. Weights of inputs that were always zero count nothing and go first,
        and where the budget leaves some of them they are zero all the same.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> solver = prunax.calibration.solver
        >>> factor = solver.factorize(jnp.array([[2.0, 1.0], [1.0, 2.0]]), 0.0)
        >>> solver.obs(jnp.array([[1.0], [3.0]]), factor, 1).weights[:, 0].tolist()
        [0.0, 3.5]

    References:
        Frantar and Alistarh, SparseGPT, 2023, arXiv:2301.00774, algorithm 1.
    """
    length, width = weights.shape
    panel = _panel(pattern, block_size)
    # One short block where there is no more, as long as whole panels make it.
    size = min(block_size, -(-length // panel) * panel)
    blocks = -(-length // size)
    padding = blocks * size - length
    dtype = factor.upper.dtype

    upper = jnp.pad(factor.upper, ((0, padding), (0, padding)))
    upper += jnp.diag((jnp.arange(length + padding) >= length).astype(dtype))
    rows = jnp.where(factor.dead[:, None], 0, weights.astype(dtype))
    rows = jnp.pad(rows, ((0, padding), (0, 0)))

    def prune_block(errors: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        # What the blocks before lost, applied to this one only now: each block is then read and written once.
        rows, columns, start, k = block
        rows = rows - _product(columns.T, errors)
        factor_block = jax.lax.dynamic_slice_in_dim(columns, start, size)
        padded = start + jnp.arange(size) >= length
        mask = _choose(pattern, rows, jnp.diagonal(factor_block), padded, k)
        rows, mask, lost = _prune_panels(pattern, panel, rows, factor_block, mask, k)
        return jax.lax.dynamic_update_slice_in_dim(errors, lost, start, 0), (rows, mask)

    columns = upper.reshape(-1, blocks, size).swapaxes(0, 1)
    starts = jnp.arange(blocks) * size
    _, (kept, mask) = jax.lax.scan(
        prune_block,
        _meshes.zeros_like(rows),
        (
            rows.reshape(blocks, size, width),
            columns,
            starts,
            block_budgets(budget, pattern, length, block_size),
        ),
    )
    kept, mask = (x.reshape(-1, width)[:length] for x in (kept, mask))
    return Sparse(kept.astype(weights.dtype), mask)


def _panel(pattern: patterns.Pattern, block_size: int) -> int:
    if not isinstance(pattern, patterns.NM):
        return math.gcd(block_size, _PANEL)
    if block_size % pattern.m:
        raise ValueError(
            f"obs: the block size must be a multiple of the groups of {pattern}, got {block_size}. "
            f"Pass block_size={-(-block_size // pattern.m) * pattern.m}."
        )
    return pattern.m  # groups are chosen one by one, each on weights that are up to date


def _choose(
    pattern: patterns.Pattern, rows: jax.Array, diagonal: jax.Array, padded: jax.Array, k: jax.Array
) -> jax.Array:
    """The mask of a block, as far as it is chosen before the first of its inputs is pruned."""
    if isinstance(pattern, patterns.NM):
        return jnp.ones(rows.shape, jnp.bool_)
    scores = jnp.where(padded[:, None], jnp.inf, jnp.square(rows / diagonal[:, None]))
    return keep_largest(scores, k, pattern)


def _prune_panels(
    pattern: patterns.Pattern,
    panel: int,
    rows: jax.Array,
    upper: jax.Array,
    mask: jax.Array,
    k: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prune the inputs of one block in turn. Returns the rows, the mask, and what the rows lost, over the diagonal."""
    size, width = rows.shape

    def prune_panel(lost: jax.Array, panel_inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        part, columns, kept, start = panel_inputs
        part = part - _product(columns.T, lost)
        own = jax.lax.dynamic_slice_in_dim(columns, start, panel)
        diagonal = jnp.diagonal(own)
        if isinstance(pattern, patterns.NM):
            kept = _selection.keep_largest_along(jnp.square(part / diagonal[:, None]), 0, k)

        def prune_input(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
            part, errors = state
            row, keep = part[j], kept[j]
            error = jnp.where(keep, 0, row) / diagonal[j]
            # Zero to the left of the diagonal: the rows before this one stay.
            part = part - own[j][:, None] * error[None, :]
            return part, errors.at[j].set(error)

        part, errors = jax.lax.fori_loop(0, panel, prune_input, (part, _meshes.zeros_like(part)))
        part = jnp.where(kept, part, 0)  # what the subtraction left is rounding
        return jax.lax.dynamic_update_slice_in_dim(lost, errors, start, 0), (part, kept)

    count = size // panel
    columns = upper.reshape(size, count, panel).swapaxes(0, 1)
    parts = (rows.reshape(count, panel, width), columns, mask.reshape(count, panel, width))
    starts = jnp.arange(count) * panel
    lost, (rows, mask) = jax.lax.scan(prune_panel, _meshes.zeros_like(rows), (*parts, starts))
    return rows.reshape(size, width), mask.reshape(size, width), lost


@jax.jit
def propagate_errors(
    weights: jax.Array, factor: Factor, errors: jax.Array, strength: jax.Array | float
) -> jax.Array:
    r"""Move a dense matrix so that it makes up for a part of the errors that its inputs bring along.

    .. math:: w + \alpha\,(\hat X^T \hat X + \lambda \bar h I)^{-1} \hat X^T (X - \hat X)\,w

    Of all matrices this one brings the outputs nearest to :math:`\hat X w + \alpha (X - \hat X) w`, with
    :math:`\hat X` the inputs that the layer gets and X those that it got in the dense model. Pruned in place of w it is
    pruned towards them.

    Args:
        weights: (in, out) dense matrix w.
        factor: `factorize` of the Gram matrix of the inputs that the layer gets.
        errors: (in, in) product of those with what they lack, :math:`\hat X^T (X - \hat X)`.
        strength: alpha, from 0, which changes nothing, to 1 for the outputs of the dense model.

    Returns:
        The matrix, in the weights' dtype.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> solver = prunax.calibration.solver
        >>> factor = solver.factorize(jnp.array([[1.0]]), 0.0)  # an input that comes at half its size
        >>> solver.propagate_errors(jnp.array([[3.0]]), factor, jnp.array([[1.0]]), 1.0).tolist()
        [[6.0]]

    References:
        Arai and Ichikawa, Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization, 2025,
        arXiv:2504.09629, weight correction with propagation strength alpha. There for quantized layers.
    """
    dtype = factor.upper.dtype
    dense = weights.astype(dtype)
    correction = _product(factor.upper.T, _product(factor.upper, _product(errors, dense)))
    return (dense + jnp.asarray(strength, dtype) * correction).astype(weights.dtype)


@functools.partial(jax.jit, static_argnames="iterations")
def refit(
    weights: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    *,
    damping: jax.Array | float = 0.01,
    start: jax.Array | None = None,
    iterations: int = 64,
) -> jax.Array:
    r"""Refit the kept weights so that the outputs come as near as they can to those of the dense matrix.

    .. math:: \min_{\hat w}\ \|X(\hat w - w)\|^2 + \lambda \bar h \|\hat w - w\|^2
              \quad\text{with } \hat w = 0 \text{ where pruned}

    Args:
        weights: (in, out) dense matrix w.
        mask: (in, out) bool, True = kept.
        gram: (in, in) Gram matrix of the inputs X.
        damping: lambda, the factor of the mean of the Gram matrix's diagonal; keeps weights that the inputs do not
            determine near where they were.
        start: Where to start from, the masked dense matrix where left out.
        iterations: At most so many steps of conjugate gradients, preconditioned by the diagonal, on all outputs at
            once. They stop as soon as no residual is above rounding.

    Returns:
        The refitted matrix, exactly 0.0 where pruned, in the weights' dtype.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> w, mask = jnp.array([[1.0], [3.0]]), jnp.array([[False], [True]])
        >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> prunax.calibration.solver.refit(w, mask, gram, damping=0.0)[:, 0].tolist()
        [0.0, 3.5]

    References:
        Meng et al., ALPS, 2024, arXiv:2406.07831, algorithm 2.
    """
    dtype = gram.dtype
    dense = weights.astype(dtype)
    scale = jnp.mean(jnp.diagonal(gram))
    scale = jnp.where(scale > 0, scale, 1)
    eye = jnp.eye(len(gram), dtype=dtype)
    gram = gram / scale + jnp.asarray(damping, dtype) * eye
    inverse = 1 / jnp.maximum(jnp.diagonal(gram), jnp.finfo(dtype).tiny)[:, None]
    first = jnp.where(mask, dense if start is None else start.astype(dtype), 0)
    residual = jnp.where(mask, _product(gram, dense - first), 0)
    energy = jnp.sum(residual * inverse * residual, axis=0)
    # Relative to the output itself: a column that is right already must not be polished for ever.
    target = jnp.finfo(dtype).eps ** 2 * jnp.sum(jnp.square(_product(gram, dense)) * inverse, 0)

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        step, _, _, _, energy = state
        return (step < iterations) & jnp.any(energy > target)

    def descend(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step, fitted, residual, direction, energy = state
        image = jnp.where(mask, _product(gram, direction), 0)
        curvature = jnp.sum(direction * image, axis=0)
        rate = jnp.where(curvature > 0, energy / jnp.where(curvature > 0, curvature, 1), 0)
        fitted = fitted + rate[None, :] * direction
        residual = residual - rate[None, :] * image
        after = jnp.sum(residual * inverse * residual, axis=0)
        momentum = jnp.where(energy > 0, after / jnp.where(energy > 0, energy, 1), 0)
        direction = inverse * residual + momentum[None, :] * direction
        return step + 1, fitted, residual, direction, after

    state = (jnp.int32(0), first, residual, inverse * residual, energy)
    fitted = jax.lax.while_loop(unfinished, descend, state)[1]
    return jnp.where(mask, fitted, 0).astype(weights.dtype)


@functools.partial(jax.jit, static_argnames=("pattern", "iterations", "polish"))
def alps(
    weights: jax.Array,
    gram: jax.Array,
    budget: jax.Array | int,
    *,
    pattern: patterns.Pattern = patterns.Unstructured(),
    damping: jax.Array | float = 0.01,
    iterations: int = 60,
    polish: int = 16,
) -> Sparse:
    r"""Choose support and weights of a matrix together, by the alternating direction method of multipliers.

    Minimizes the change of the layer's outputs, :math:`\|X(\hat W - W)\|^2`, over matrices of the pattern. Slower than
    `obs` and nearer to the minimum: no input is decided before the others, and the penalty that drives the dense and
    the sparse copy together grows only as fast as the support settles.

    Args:
        weights: (in, out) dense matrix W.
        gram: (in, in) Gram matrix of the inputs X.
        budget: int32 scalar: how many weights the matrix loses; for ConstantFanIn each output, for NM each group.
        pattern: `patterns.Unstructured`, `patterns.ConstantFanIn` or `patterns.NM`.
        damping: Factor of the mean of the Gram matrix's diagonal, added to it.
        iterations: At most so many rounds; they end when the support no longer changes.
        polish: Steps of `refit` on the support in the end.

    Returns:
        The `Sparse` matrix, in the weights' dtype.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
        >>> sparse = prunax.calibration.solver.alps(jnp.array([[1.0], [3.0]]), gram, 1, damping=0.0)
        >>> sparse.mask[:, 0].tolist(), round(float(sparse.weights[1, 0]), 3)
        ([False, True], 3.5)

    References:
        Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024,
        arXiv:2406.07831, algorithm 1 and its schedule of penalties.
    """
    dtype = gram.dtype
    diagonal = jnp.diagonal(gram)
    scale = jnp.mean(diagonal)
    scale = jnp.where(scale > 0, scale, 1)
    damped = gram / scale + jnp.asarray(damping, dtype) * jnp.eye(len(gram), dtype=dtype)
    damped += jnp.diag((diagonal == 0).astype(dtype))
    # Inputs of unit norm: in this metric the size of a weight is its Wanda score.
    norm = jnp.sqrt(jnp.diagonal(damped))
    values, vectors = jnp.linalg.eigh(damped / (norm[:, None] * norm[None, :]))
    values = jnp.maximum(values, 0)[:, None]
    dense = weights.astype(dtype) * norm[:, None]
    target = values * _product(vectors.T, dense)

    def project(x: jax.Array) -> jax.Array:
        return keep_largest(jnp.abs(x), budget, pattern)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, penalty, sparse, dual, mask, _, _ = state
        rotated = target + _product(vectors.T, penalty * sparse - dual)
        full = _product(vectors, rotated / (values + penalty))
        raised = full + dual / penalty
        new_mask = project(raised)
        sparse = jnp.where(new_mask, raised, 0)
        dual = dual + penalty * (full - sparse)
        changed = jnp.sum(new_mask != mask, dtype=jnp.int32) // 2
        changed = changed.astype(dtype) / jnp.maximum(jnp.sum(mask, dtype=dtype), 1)
        growth = jnp.where(changed >= 0.1, 1.3, jnp.where(changed >= 0.005, 1.2, 1.1))
        due = i % 3 == 2
        penalty = jnp.where(due, penalty * growth.astype(dtype), penalty)
        return i + 1, penalty, sparse, dual, new_mask, changed, due & (changed == 0)

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[0] < iterations) & ~state[-1]

    mask = project(dense)
    start = (
        jnp.int32(0),
        jnp.asarray(0.1, dtype),
        jnp.where(mask, dense, 0),
        jnp.zeros_like(dense),
    )
    state = (*start, mask, jnp.ones((), dtype), jnp.zeros((), jnp.bool_))
    _, _, sparse, _, mask, _, _ = jax.lax.while_loop(unfinished, step, state)
    first = sparse / norm[:, None]
    fitted = refit(weights, mask, gram, damping=damping, start=first, iterations=polish)
    return Sparse(fitted, mask)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)
