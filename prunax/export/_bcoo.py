"""Sparse arrays of JAX's own: `jax.experimental.sparse.BCOO`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _masks as mask_trees
from prunax import trees

__all__ = ["to_bcoo"]

PyTree = Any


def to_bcoo(params: PyTree, masks: PyTree) -> PyTree:
    """Turn masked leaves into `jax.experimental.sparse.BCOO` arrays.

    They multiply, transpose and differentiate under `jax.experimental.sparse.sparsify`. On a CPU they are slower than a
    dense product until very few weights are left: for speed see `pack`.

    Args:
        params: Pytree of arrays.
        masks: A mask tree of the same structure, True = kept.

    Returns:
        The params with a BCOO in the place of each leaf that has a mask of its own. It holds one element for each kept
        weight, those that happen to be zero as well, in row-major order. Other leaves pass through; one whose scalar
        mask is False becomes zero.

    Raises:
        ValueError: If the structures or shapes differ, naming the leaf.
        TypeError: If a mask is not boolean, naming the leaf.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> sparse = prunax.export.to_bcoo({"kernel": w}, {"kernel": jnp.array([[True, False], [False, True]])})
        >>> sparse["kernel"].nse, (jnp.ones((1, 2)) @ sparse["kernel"]).tolist()
        (2, [[1.0, 4.0]])
    """
    mask_leaves = trees.check_masks("to_bcoo", params, masks)
    leaves, treedef = jax.tree.flatten(mask_trees.apply_masks(params, masks))
    return treedef.unflatten(
        _bcoo(leaf, np.asarray(mask)) if np.shape(mask) else leaf
        for leaf, mask in zip(leaves, mask_leaves, strict=True)
    )


def _bcoo(leaf: Any, mask: np.ndarray) -> Any:
    # Imported here, since few programs need it.
    from jax.experimental import sparse

    indices = np.argwhere(mask)
    values = jnp.asarray(leaf)[tuple(indices.T)]
    return sparse.BCOO(
        (values, jnp.asarray(indices, jnp.int32)),
        shape=leaf.shape,
        indices_sorted=True,
        unique_indices=True,
    )
