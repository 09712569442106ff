"""Scores from statistics of inputs."""

from typing import Any

import jax
import jax.numpy as jnp

from prunax import trees

__all__ = ["wanda_scores"]

PyTree = Any


def wanda_scores(params: PyTree, statistics: PyTree) -> PyTree:
    r"""Score each weight by its magnitude times the norm of the input that it meets, :math:`|w_{ij}| \|x_i\|_2`.

    Args:
        params: Pytree of arrays, any shapes.
        statistics: ``input_statistics(fn, params, batches, kind="norm")``: the params' structure, each norm
            broadcasting against its leaf, and the scalar 0 where nothing is known.

    Returns:
        Scores of the params' structure and shapes, at least float32: larger = keep, for `prunax.compute_masks`. Leaves
        without statistics get the scalar 0: no score, never pruned. Norms that are all zero say nothing: there the
        magnitude alone counts.

    Raises:
        ValueError: Naming the leaf, if the statistics are not like the params.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[-1.0, 4.0], [3.0, 2.0]]), "bias": jnp.ones(2)}
        >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
        >>> norms = prunax.calibration.input_statistics(fn, params, [jnp.array([[5.0, 1.0]])])
        >>> prunax.calibration.wanda_scores(params, norms)["kernel"].tolist()
        [[5.0, 20.0], [3.0, 2.0]]

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, arXiv:2306.11695,
        equation 1.
    """
    leaves, treedef = jax.tree.flatten(params)
    norms = trees.leaves_like("wanda_scores", "statistics", statistics, params)
    scores = []
    for path, leaf, norm in zip(trees.paths(params), leaves, norms, strict=True):
        if not trees.is_array(leaf) or (jnp.ndim(norm) == 0 and leaf.ndim > 0):
            scores.append(jnp.zeros(()))
            continue
        fits = jnp.ndim(norm) == leaf.ndim and all(
            n in (1, size) for n, size in zip(jnp.shape(norm), leaf.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"wanda_scores: the statistics of {path!r} have shape {jnp.shape(norm)}, which does not broadcast "
                f'against {leaf.shape}. Pass input_statistics(..., kind="norm") of these params.'
            )
        dtype = trees.wide_dtype(leaf.dtype, norm.dtype)
        norm = jnp.where(jnp.any(norm > 0), norm, 1).astype(dtype)
        scores.append(jnp.abs(leaf.astype(dtype)) * norm)
    return treedef.unflatten(scores)
