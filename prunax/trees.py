"""Paths, predicates and structure checks for parameter pytrees.

Every path in prunax is spelled here, once: ``encoder/0/kernel``.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import GetAttrKey

from prunax import _leaf_names

__all__ = ["explain", "is_kernel", "map_with_path", "path_name", "paths"]

PyTree = Any
Where = Callable[[str, Any], bool]


def path_name(path: tuple[Any, ...]) -> str:
    """Spell a JAX key path the way prunax does everywhere.

    Args:
        path: A key path as given by `jax.tree_util.tree_flatten_with_path`.

    Returns:
        The parts joined by ``/``.

    Examples:
        >>> import jax, prunax
        >>> leaves, _ = jax.tree_util.tree_flatten_with_path({"encoder": [{"kernel": 1.0}]})
        >>> prunax.trees.path_name(leaves[0][0])
        'encoder/0/kernel'
    """
    return "/".join(_parts(path))


def paths(tree: PyTree) -> list[str]:
    """List the path of every leaf in tree order.

    Args:
        tree: Any pytree.

    Returns:
        One path a leaf, as `path_name` spells it. The box that Flax puts around an array (`nnx.Param`,
        `nn.Partitioned`) adds no part.

    Examples:
        >>> import prunax
        >>> prunax.trees.paths({"dense": {"kernel": 1.0, "bias": 2.0}})
        ['dense/bias', 'dense/kernel']
    """
    return [path for path, _ in named_leaves(tree)]


def map_with_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Map a function of path and leaf over a tree.

    Args:
        function: ``function(path, leaf)``, with paths as `paths` spells them.
        tree: Any pytree.

    Returns:
        A tree of the same structure.

    Examples:
        >>> import prunax
        >>> prunax.trees.map_with_path(lambda path, leaf: path, {"dense": {"kernel": 1.0}})
        {'dense': {'kernel': 'dense/kernel'}}
    """
    return jax.tree.structure(tree).unflatten(function(*named) for named in named_leaves(tree))


def is_kernel(path: str, leaf: Any) -> bool:
    """Say whether a leaf is a weight matrix or a convolution kernel: the default choice of what to prune.

    Passed as `where` it is asked about the whole tree: leaves beside the one in question tell a gain of two axes from a
    kernel where both are called ``weight``. Called by itself, within a `where` of your own, it sees one leaf, and where
    that does not tell, says False. `explain` lists what is chosen and what is left whole, with the reasons.

    Args:
        path: The leaf's path, ``encoder/0/kernel``.
        leaf: An array of any shape and dtype.

    Returns:
        True for a floating-point (or complex) array of two or more axes that is, by its path and shape, none of: a
        bias, a scale or gain, a statistic, a table of embeddings, positions or tokens, a constant of a recurrence, a
        buffer, a low-rank adapter.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.trees.is_kernel("dense/kernel", jnp.ones((3, 4)))
        True
        >>> prunax.trees.is_kernel("layers/bias", jnp.ones((12, 4)))
        False
        >>> prunax.trees.is_kernel("embed_tokens/weight", jnp.ones((100, 4)))
        False
    """
    return not _why_whole(path, leaf)


def _why_whole(path: str, leaf: Any, known: _leaf_names.Folders | None = None) -> str:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return f"{leaf.dtype} is no floating-point dtype"
    if not has_zero(leaf.dtype):
        return f"{leaf.dtype} has no zero to set weights to"
    return _leaf_names.why_whole(path, tuple(leaf.shape), known)


def explain(params: PyTree, where: Where = is_kernel) -> dict[str, str]:
    """Say of each leaf why it is left whole.

    Args:
        params: Any pytree.
        where: ``where(path, leaf) -> bool``, the choice to explain.

    Returns:
        Path -> reason, in tree order; an empty one where the leaf is chosen.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> norm = {"weight": jnp.ones((4, 8)), "bias": jnp.ones((4, 8))}
        >>> prunax.trees.explain({"ln": norm, "linear": {"weight": jnp.ones((8, 8))}})["ln/weight"]
        'the gain of a normalisation, by the bias of its shape'
    """
    return {path: reason for path, _, reason in _looked_at(params, where)}


def _looked_at(params: PyTree, where: Where) -> list[tuple[str, Any, str]]:
    """Path, leaf, and why it is left whole, of every leaf."""
    check_where("", where)
    flat = named_leaves(params)
    known = _leaf_names.folders({path: tuple(x.shape) for path, x in flat if is_array(x)})

    def reason(path: str, leaf: Any) -> str:
        if not is_array(leaf):
            return "no array"
        if where is is_kernel:
            return _why_whole(path, leaf, known)
        return "" if where(path, leaf) else "left out by `where`"

    return [(path, leaf, reason(path, leaf)) for path, leaf in flat]


def is_array(leaf: Any) -> bool:
    """Say whether a leaf has a shape and a dtype: a JAX or NumPy array, a tracer, or an abstract array."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def has_zero(dtype: Any) -> bool:
    """Say whether a floating-point dtype can hold 0: one of scales (float8_e8m0fnu) cannot."""
    return not np.asarray(0, dtype).astype(np.complex64)


def wide_dtype(*dtypes: Any) -> Any:
    """The dtype to calculate in: float64 where one is given, float32 for all narrower ones; complex where one is.

    `jnp.promote_types` would do, but raises for bfloat16 and float32 under strict promotion.
    """
    wide = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return jnp.complex128 if wide else jnp.complex64
    return jnp.float64 if wide else jnp.float32


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

    def merge(self, some: "Selection", new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
        """Put what belongs to some of the chosen leaves in its place among what belongs to all of them."""
        at = dict(zip(some.indices, new, strict=True))
        return [at.get(i, leaf) for i, leaf in zip(self.indices, old, strict=True)]

    def take(self, function: str, noun: str, tree: PyTree) -> list[Any]:
        """Flatten a tree like the params (see `leaves_like`) and take the leaves in the chosen places."""
        leaves = leaves_like(function, noun, tree, self.params)
        return [leaves[i] for i in self.indices]

    def put(self, leaves: Sequence[Any], tree: PyTree) -> PyTree:
        """Copy a tree like the params with other leaves in the chosen places."""
        whole, treedef = jax.tree.flatten(tree)
        where = _matched("put", "tree", tree, self.params)
        for i, leaf in zip(self.indices, leaves, strict=True):
            whole[where[i]] = leaf
        return treedef.unflatten(whole)


def select(params: PyTree, where: Where) -> Selection:
    """Choose the leaves to prune.

    Args:
        params: Any pytree of arrays; leaves that are not arrays are never chosen.
        where: ``where(path, leaf) -> bool``. `is_kernel` is told of each leaf's neighbours.

    Returns:
        The chosen leaves, none perhaps.
    """
    chosen = [
        (i, path, leaf)
        for i, (path, leaf, reason) in enumerate(_looked_at(params, where))
        if not reason
    ]
    indices, names, leaves = zip(*chosen, strict=True) if chosen else ((), (), ())
    return Selection(params, list(indices), list(names), list(leaves))


def leaves_like(function: str, noun: str, tree: PyTree, params: PyTree) -> list[Any]:
    """Flatten a tree whose paths must be those of the params, whatever its containers are.

    Args:
        function: The public function that asks, named in the error.
        noun: What the tree is, named in the error.
        tree: The tree to flatten.
        params: The tree whose paths it must have.

    Returns:
        The leaves of `tree`, one for each leaf of `params` and in their order.

    Raises:
        ValueError: Naming the first path at which the two trees differ.
    """
    leaves = jax.tree.leaves(tree)
    return [leaves[i] for i in _matched(function, noun, tree, params)]


def check_masks(function: str, params: PyTree, masks: PyTree) -> list[Any]:
    """Flatten a mask tree that must fit the params.

    Args:
        function: The public function that asks, named in the error.
        params: Pytree of arrays.
        masks: A mask tree of its structure.

    Returns:
        The masks, one for each leaf of the params and in their order.

    Raises:
        ValueError: Naming the leaf, if structures or shapes differ.
        TypeError: Naming the leaf, if a mask is not boolean.
    """
    mask_leaves = leaves_like(function, "masks", masks, params)
    leaves = jax.tree.leaves(params)
    if _are_bools(leaves) and not _are_bools(mask_leaves):
        raise TypeError(
            f"{function}: the params are bool and the masks are not. The params come first: {function}(params, masks)."
        )
    for path, leaf, mask in zip(paths(params), leaves, mask_leaves, strict=True):
        dtype = np.dtype(bool) if isinstance(mask, bool) else getattr(mask, "dtype", type(mask))
        if dtype != np.bool_:
            raise TypeError(
                f"{function}: the mask of {path!r} must be bool, got {dtype}. Take packed masks out of an optimizer's "
                f"state with prunax.get_masks; compare scores with a threshold to make a mask."
            )
        if np.shape(mask) not in ((), np.shape(leaf)):
            raise ValueError(
                f"{function}: the mask of {path!r} has shape {np.shape(mask)}, the leaf has {np.shape(leaf)}. "
                f"A mask has its leaf's shape or is the scalar True."
            )
    return mask_leaves


def _are_bools(leaves: Sequence[Any]) -> bool:
    dtypes = {leaf.dtype for leaf in leaves if is_array(leaf)}
    return dtypes == {np.dtype(bool)}


def _matched(function: str, noun: str, tree: PyTree, params: PyTree) -> Sequence[int]:
    """Say for each leaf of the params which leaf of a tree is at its path."""
    if jax.tree.structure(tree) == jax.tree.structure(params):
        return range(len(jax.tree.leaves(tree)))
    ours, theirs = places(params), places(tree)
    known = set(ours)
    found = {place: i for i, place in enumerate(theirs)}
    missing = [place for place in ours if place not in found]
    extra = [place for place in theirs if place not in known]
    if missing:
        difference = f"{'/'.join(missing[0])!r} is missing from the {noun}"
    elif extra:
        difference = f"{'/'.join(extra[0])!r} of the {noun} is not in the params"
    elif len(ours) != len(theirs) or len(found) != len(theirs):
        twice = next(place for place in theirs if theirs.count(place) > 1)
        difference = f"{'/'.join(twice)!r} is the path of more than one leaf"
    else:
        return [found[place] for place in ours]
    raise ValueError(
        f"{function}: the {noun} must have the tree structure of the params, but {difference}. "
        f"Build them from the same params."
    )


def places(tree: PyTree) -> list[tuple[str, ...]]:
    """The path of every leaf in its parts: unlike the path, one for each leaf where names hold slashes."""
    return [place for place, _ in _placed(tree)]


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The path and the leaf, in tree order."""
    return [("/".join(place), leaf) for place, leaf in _placed(tree)]


def _placed(tree: PyTree) -> list[tuple[tuple[str, ...], Any]]:
    """The parts of the path, and the leaf, in tree order."""
    placed: list[tuple[tuple[str, ...], Any]] = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)[0]:
        if not _is_box(node):
            placed.append((_parts(path), node))
            continue
        for inner, leaf in jax.tree_util.tree_flatten_with_path(node)[0]:
            rest = inner[1:] if inner and inner[0] == GetAttrKey("value") else inner
            placed.append((_parts((*path, *rest)), leaf))
    return placed


def _parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_box(node: Any) -> bool:
    """Say whether a node is what Flax puts around an array."""
    return isinstance(
        node, (loaded("flax.nnx", "Variable"), loaded("flax.core.meta", "AxisMetadata"))
    )


def loaded(module: str, name: str) -> Any:
    """A class of a package that need not be there: no class, where the package is not imported."""
    return getattr(sys.modules.get(module), name, ())


def check_params(function: str, params: PyTree, *, trained: bool = False) -> None:
    """Raise TypeError, saying what came and what to pass, unless it is a tree that can hold parameters.

    Where they are to be `trained`, each leaf must be a number or an array.
    """
    wanted = f"{function}: params must be a pytree of arrays"
    for kind, module, mend in (
        ("a Linen", "flax.linen", 'module.init(key, x)["params"]'),
        ("an NNX", "flax.nnx", "nnx.state(module, nnx.Param)"),
    ):
        if isinstance(params, loaded(module, "Module")):
            name = type(params).__name__
            raise TypeError(f"{wanted}, got {kind} module, {name}. Pass its parameters: {mend}.")
    leaves = jax.tree.leaves(params)
    if any(leaf is params for leaf in leaves) and not is_array(params):
        raise TypeError(f"{wanted}, got {shown(params)}. The params come first.")
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    if arrays and all(leaf.dtype == jnp.bool_ for leaf in arrays):
        raise TypeError(
            f"{wanted} of numbers, got bools only, as masks are. Pass the params first."
        )
    odd = [(path, leaf) for path, leaf in named_leaves(params) if trained and callable(leaf)]
    if odd:
        raise TypeError(
            f"{wanted}, but {odd[0][0]!r} is {odd[0][1]!r}. Pass the arrays alone: of an Equinox module "
            f"eqx.filter(module, eqx.is_inexact_array)."
        )


def check_function(fn: Any) -> None:
    """Raise TypeError for a module that holds its own params, where a function of params is wanted."""
    # What Equinox makes of a function, `eqx.filter_jit(fn)` or `eqx.Partial(fn)`, is a module too.
    place = type(fn).__module__
    wrapped = place.startswith("equinox.") and not place.startswith("equinox.nn.")
    for kind, module, mend in (
        (
            "an NNX",
            "flax.nnx",
            "graph, params = nnx.split(model); fn = lambda params, x: nnx.merge(graph, params)(x)",
        ),
        ("an Equinox", "equinox", "fn = lambda model, x: model(x), with the model as its params"),
    ):
        if isinstance(fn, loaded(module, "Module")) and not wrapped:
            raise TypeError(
                f"fn must be a function of params and inputs, got {kind} module, {type(fn).__name__}, which holds its "
                f"own params. Pass both apart: {mend}."
            )


def shown(value: Any) -> str:
    """What an error says of a wrong argument: all of it, if that is a line."""
    text = repr(value)
    return text if len(text) <= 200 and "\n" not in text else f"an object of {type(value)}"


def check_where(function: str, where: Any) -> None:
    """Raise TypeError unless `where` can be called with a path and a leaf."""
    function = f"{function}: " if function else ""
    mend = "Pass where=lambda path, leaf: ... that is true for the leaves to prune."
    if not callable(where):
        raise TypeError(f"{function}`where` must be a function, got {where!r}. {mend}")
    try:
        signature = inspect.signature(where)
    except (TypeError, ValueError):  # one written in C, of which nothing is known
        return
    try:
        signature.bind("path", None)
    except TypeError:
        raise TypeError(
            f"{function}`where` is called with a path and a leaf, got a function of {signature}. {mend}"
        ) from None


def keep_all() -> jax.Array:
    """Make the mask of a leaf that is not prunable: the scalar True."""
    return jnp.ones((), jnp.bool_)


def is_prunable(mask: Any, leaf: Any) -> bool:
    """Say whether a leaf's mask (or score) is one of its own, not the 0-d one of a leaf that is left alone."""
    return np.shape(mask) == np.shape(leaf) and (np.ndim(leaf) > 0 or is_array(leaf))
