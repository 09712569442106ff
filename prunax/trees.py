"""Paths, predicates and structure checks for parameter pytrees.

Every path in prunax is spelled here, once: ``encoder/0/kernel``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import GetAttrKey

__all__ = ["is_kernel", "path_name", "paths"]

PyTree = Any
Where = Callable[[str, Any], bool]

# The last part of a path that names something other than a connection between units. Stacking layers for `scan`
# makes biases two-dimensional, so the name decides and not the rank alone.
_NOT_KERNELS = frozenset(
    "b bias biases scale scales offset mean var embedding embeddings pos_embedding".split()
)


def path_name(path: tuple[Any, ...]) -> str:
    """Spell a JAX key path the way prunax does everywhere.

    Args:
        path: A key path as given by `jax.tree_util.tree_flatten_with_path`.

    Returns:
        The parts joined by ``/``. The box that Flax puts around an array (`nnx.Param`, `nn.Partitioned`) adds no part.

    Examples:
        >>> import jax, prunax
        >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"encoder": [{"kernel": 1.0}]})
        >>> prunax.trees.path_name(leaves[0][0])
        'encoder/0/kernel'
    """
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def paths(tree: PyTree) -> list[str]:
    """List the path of every leaf in tree order.

    Args:
        tree: Any pytree.

    Returns:
        One path a leaf, as `path_name` spells it.

    Examples:
        >>> import prunax
        >>> prunax.trees.paths({"dense": {"kernel": 1.0, "bias": 2.0}})
        ['dense/bias', 'dense/kernel']
    """
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def is_kernel(path: str, leaf: Any) -> bool:
    """Say whether a leaf is a weight matrix or a convolution kernel: the default choice of what to prune.

    Args:
        path: The leaf's path, ``encoder/0/kernel``.
        leaf: An array of any shape and dtype.

    Returns:
        True for a floating-point array of two or more axes whose name is not that of a bias, a normalisation
        parameter or statistic, or an embedding.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.trees.is_kernel("dense/kernel", jnp.ones((3, 4)))
        True
        >>> prunax.trees.is_kernel("layers/bias", jnp.ones((12, 4)))
        False
    """
    name = path.rsplit("/", 1)[-1].lower()
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2 and name not in _NOT_KERNELS


def is_array(leaf: Any) -> bool:
    """Say whether a leaf has a shape and a dtype: a JAX or NumPy array, a tracer, or an abstract array."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def shards(leaf: Any) -> tuple[int, ...]:
    """Say in how many parts each axis of an array is, as far as its type tells: on meshes of explicit axes."""
    aval = jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf
    spec = getattr(getattr(aval, "sharding", None), "spec", None) or ()
    names = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    names += [()] * (len(leaf.shape) - len(names))
    return tuple(math.prod(aval.sharding.mesh.shape[n] for n in part) for part in names)


def wide_dtype(*dtypes: Any) -> Any:
    """The dtype to calculate in: float64 where one is given, float32 for all narrower ones.

    `jnp.promote_types` would do, but raises for bfloat16 and float32 under strict promotion.
    """
    return jnp.float64 if any(dtype == jnp.float64 for dtype in dtypes) else jnp.float32


def is_traced(*leaves: Any) -> bool:
    """Say whether any leaf is being traced, so that its values cannot be looked at."""
    return any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in leaves)


class Selection(NamedTuple):
    """The leaves that `where` chose, and what it takes to put others in their places.

    Attributes:
        params: The tree they were chosen from.
        indices: Their places among its leaves, in tree order.
        paths: Their paths.
        leaves: The chosen leaves.
    """

    params: PyTree
    indices: list[int]
    paths: list[str]
    leaves: list[Any]

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """``(path, shape)`` of each chosen leaf."""
        return [(path, leaf.shape) for path, leaf in zip(self.paths, self.leaves, strict=True)]

    def only(self, which: Sequence[int]) -> "Selection":
        """Narrow the choice to some of the chosen leaves."""
        indices, paths = [self.indices[n] for n in which], [self.paths[n] for n in which]
        return Selection(self.params, indices, paths, [self.leaves[n] for n in which])

    def take(self, function: str, noun: str, tree: PyTree) -> list[Any]:
        """Flatten a tree like the params (see `leaves_like`) and take the leaves in the chosen places."""
        leaves = leaves_like(function, noun, tree, self.params)
        return [leaves[i] for i in self.indices]

    def put(self, leaves: Sequence[Any], tree: PyTree) -> PyTree:
        """Copy a tree like the params with other leaves in the chosen places."""
        whole, treedef = jax.tree.flatten(tree)
        for i, leaf in zip(self.indices, leaves, strict=True):
            whole[i] = leaf
        return treedef.unflatten(whole)


def select(params: PyTree, where: Where) -> Selection:
    """Choose the leaves to prune.

    Args:
        params: Any pytree of arrays; leaves that are not arrays are never chosen.
        where: ``where(path, leaf) -> bool``.

    Returns:
        The chosen leaves, none perhaps.
    """
    chosen = [
        (i, path_name(path), leaf)
        for i, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0])
        if is_array(leaf) and where(path_name(path), leaf)
    ]
    return Selection(
        params, [i for i, _, _ in chosen], [p for _, p, _ in chosen], [x for _, _, x in chosen]
    )


def leaves_like(function: str, noun: str, tree: PyTree, params: PyTree) -> list[Any]:
    """Flatten a tree that must have the structure of the params.

    Args:
        function: The public function that asks, named in the error.
        noun: What the tree is, named in the error.
        tree: The tree to flatten.
        params: The tree whose structure it must have.

    Returns:
        The leaves of `tree` in tree order, one for each leaf of `params`.

    Raises:
        ValueError: Naming the first path at which the two trees differ.
    """
    if jax.tree.structure(tree) == jax.tree.structure(params):
        return jax.tree.leaves(tree)
    ours, theirs = paths(params), paths(tree)
    missing = [path for path in ours if path not in set(theirs)]
    extra = [path for path in theirs if path not in set(ours)]
    if missing:
        difference = f"{missing[0]!r} is missing from the {noun}"
    elif extra:
        difference = f"{extra[0]!r} of the {noun} is not in the params"
    else:
        difference = f"the containers differ: {jax.tree.structure(tree)} against {jax.tree.structure(params)}"
    raise ValueError(
        f"{function}: the {noun} must have the tree structure of the params, but {difference}. "
        f"Build them from the same params, with the same framework's containers."
    )


def keep_all() -> jax.Array:
    """Make the mask of a leaf that is not prunable: the scalar True."""
    return jnp.ones((), jnp.bool_)


def is_prunable(mask: Any, leaf: Any) -> bool:
    """Say whether a leaf's mask (or score) is one of its own, not the 0-d one of a leaf that is left alone."""
    return np.shape(mask) == np.shape(leaf) and (np.ndim(leaf) > 0 or is_array(leaf))
