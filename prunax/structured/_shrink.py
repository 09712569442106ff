"""Make trees and functions smaller by removing units of axis groups."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from prunax import _meshes, trees
from prunax.structured._axes import Incompatible
from prunax.structured._evaluate import evaluate, keep_of_axes
from prunax.structured._groups import Analysis, Keep, Parameter, analyse, kept_positions

__all__ = ["shrink", "shrink_function"]

PyTree = Any


def shrink(tree: PyTree, keep: Keep) -> PyTree:
    """Remove units from parameters, or from any tree that is shaped like them.

    Args:
        tree: The parameters, or a tree with leaves of the same shapes under paths that end alike: the state of an optax
            transformation, masks, an average, gradients; of all parameters or of one branch (Flax's ``"params"``
            collection). Leaves that belong to no parameter pass through, and so do
            scalars and placeholders of one element. A leaf that lacks one axis of its parameter (the factored second
            moments of Adafactor) is cut on the others.
        keep: For each `AxisGroup` that shrinks the units to keep: increasing indices, or a boolean mask, True = kept.

    Returns:
        The tree with smaller arrays, dtypes kept, and shardings: an axis whose new length the devices do not divide is
        whole on each of them.

    Raises:
        ValueError: If a group is frozen (the message says why), units are out of range, or a leaf has another shape
            than its parameter.

    Examples:
        >>> import jax.numpy as jnp, optax, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> group, = [g for g in prunax.structured.axis_groups(fn, params, jnp.ones((2, 4))) if not g.frozen]
        >>> small = prunax.structured.shrink(params, {group: [0, 3, 5]})
        >>> small["up"].shape, small["down"].shape
        ((4, 3), (3, 3))
        >>> prunax.structured.shrink(optax.adam(1e-3).init(params), {group: [0, 3, 5]})[0].mu["up"].shape
        (4, 3)
    """
    leaves = _leaves_of(keep)
    kept = kept_positions("shrink", keep, leaves)
    named = _by_endings(leaves)
    out = []
    for name, x in trees.named_leaves(tree):
        owners = [leaf for leaf in _owners(name, named) if leaf.path in kept]
        if owners and trees.is_array(x) and np.prod(x.shape) != 1:
            if len(owners) > 1:
                raise ValueError(
                    f"shrink: {name!r} may belong to {' or '.join(repr(leaf.path) for leaf in owners)}. "
                    f"Pass a tree of all parameters, or put this one in a dict under the name of its branch."
                )
            x = _cut(name, x, owners[0], kept[owners[0].path])
        out.append(x)
    return jax.tree.structure(tree).unflatten(out)


def shrink_function(fn: Callable[..., Any], keep: Keep) -> Callable[..., Any]:
    """Make a function that takes smaller parameters.

    The function is traced with parameters of the original sizes, and its jaxpr evaluated at the smaller ones. So it
    need not know: a Flax Linen module that checks shapes works untouched. Numbers that were traced as constants stay
    what they were: the mean of a layer normalisation over 512 features still divides by 512 when 384 are left, which is
    what keeps it equal to the whole function with the others at zero.

    Args:
        fn: ``fn(params, *args)``, the function that the groups were found in, or another of the same parameters: the
            one used in training, say, or a loss. Outputs of it that have the removed units are smaller as well. Random
            numbers (dropout) are drawn for the units that are left.
        keep: As for `shrink`.

    Returns:
        ``small(params, *args)``. It is traced anew for inputs of new shapes, and can be compiled, differentiated,
        mapped, exported and pruned again.

    Raises:
        ValueError: If a group is frozen; when called, if `fn` ties units together that the groups do not, or params are
            not of the smaller shapes.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 16)), "down": jnp.ones((16, 3))}
        >>> fn = lambda params, x: jnp.tanh(x @ params["up"]).reshape(-1, 16) @ params["down"]
        >>> group, = [g for g in prunax.structured.axis_groups(fn, params, jnp.ones((2, 4))) if not g.frozen]
        >>> small = prunax.structured.shrink_function(fn, {group: [0, 3, 5]})
        >>> small(prunax.structured.shrink(params, {group: [0, 3, 5]}), jnp.ones((7, 4))).shape
        (7, 3)
    """
    return functions(fn)(keep)


def functions(
    fn: Callable[..., Any], known: tuple[Analysis, PyTree, tuple[Any, ...]] | None = None
) -> Callable[[Keep], Callable[..., Any]]:
    """`shrink_function` for many choices of units: the function is traced once for inputs of the same shapes.

    Args:
        fn: The function.
        known: What was found for some params and arguments before.
    """
    analyses: dict[Any, Analysis] = {}
    if known:
        analysis, params, args = known
        analyses[_arrays(params, args)[1]] = analysis

    def shrunk(keep: Keep) -> Callable[..., Any]:
        leaves = _leaves_of(keep)
        kept = kept_positions("shrink_function", keep, leaves)
        full = {leaf.path: leaf for leaf in leaves}
        programs: dict[Any, Any] = {}

        @functools.wraps(fn)
        def small(params: PyTree, *args: Any) -> Any:
            if not kept:
                return fn(params, *args)
            _check_small(params, full, kept)
            values, key = _arrays(params, args)
            if key not in programs:
                dense = _dense_params(params, full)
                _, dense_key = _arrays(dense, args)
                if dense_key not in analyses:
                    analyses[dense_key] = analyse(fn, dense, *args)
                programs[key] = _program(fn, analyses[dense_key], kept)
            return programs[key](*values)

        return small

    return shrunk


def _program(
    fn: Callable[..., Any], analysis: Analysis, kept: dict[str, Any]
) -> Callable[..., Any]:
    """The small function of arrays, for inputs of given shapes."""
    wanted = []
    for leaf, where in zip(analysis.leaves, analysis.axes, strict=True):
        wanted += zip(where, kept.get(leaf.path) or [None] * len(where), strict=True)
    try:
        keep = keep_of_axes(wanted, analysis.followers)
    except Incompatible:
        raise ValueError(
            f"shrink_function: {getattr(fn, '__name__', 'the function')} ties units together that were to be removed "
            f"apart. Find the groups with this function, or with both: "
            f"axis_groups(lambda params, *args: (fn(params, *args), other(params, *args)), params, *args)."
        ) from None
    outputs = analysis.outputs

    def run(*values: Any) -> Any:
        return outputs.unflatten(evaluate(analysis.trace, keep, values))

    return jax.jit(run)


def _arrays(params: PyTree, args: Sequence[Any]) -> tuple[list[Any], Any]:
    """The arrays among the arguments, and what tells one program from another."""
    leaves, treedef = jax.tree.flatten((params, args))
    arrays = [leaf for leaf in leaves if trees.is_array(leaf)]
    shapes = [
        (leaf.shape, leaf.dtype) if trees.is_array(leaf) else _Constant(leaf) for leaf in leaves
    ]
    return arrays, (treedef, tuple(shapes))


class _Constant:
    """A leaf that is no array, compared by value if it can be."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and (
            self.value is other.value
            or (type(self.value) is type(other.value) and bool(self.value == other.value))
        )


def _dense_params(params: PyTree, full: dict[str, Parameter]) -> PyTree:
    """The params' tree with shapes of the original sizes."""
    return trees.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(full[path].shape, x.dtype) if trees.is_array(x) else x,
        params,
    )


def _check_small(params: PyTree, full: dict[str, Parameter], kept: dict[str, Any]) -> None:
    for name, x in trees.named_leaves(params):
        if not trees.is_array(x):
            continue
        if name not in full:
            raise ValueError(
                f"shrink_function: {name!r} is not among the parameters that the groups were found in. "
                f"Pass a tree like those."
            )
        indices = kept.get(name) or [None] * len(full[name].shape)
        sizes = zip(full[name].shape, indices, strict=True)
        small = tuple(n if left is None else len(left) for n, left in sizes)
        if tuple(x.shape) != small:
            raise ValueError(
                f"shrink_function: {name!r} has shape {tuple(x.shape)}, expected {small}. "
                f"Pass structured.shrink(params, keep)."
            )


def _leaves_of(keep: Keep) -> tuple[Parameter, ...]:
    return next((group.leaves for group in keep), ())


def _by_endings(leaves: Sequence[Parameter]) -> dict[str, list[Parameter]]:
    """Parameters by their paths, and by their paths within the branch that they are in."""
    named: dict[str, list[Parameter]] = {}
    for leaf in leaves:
        within = leaf.path.partition("/")[2]
        if within:
            named.setdefault(within, []).append(leaf)
    return named | {leaf.path: [leaf] for leaf in leaves}


def _owners(name: str, named: dict[str, list[Parameter]]) -> list[Parameter]:
    """The parameters whose name a path ends with: of the longest such name."""
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((named[end] for end in ends if end in named), [])


def _cut(name: str, x: Any, leaf: Parameter, kept: Sequence[np.ndarray | None]) -> Any:
    shape = tuple(x.shape)
    if shape == leaf.shape:
        return _take(x, kept)
    # Factored statistics lack one axis of the parameter.
    lacking = [i for i in range(len(leaf.shape)) if leaf.shape[:i] + leaf.shape[i + 1 :] == shape]
    cuts = [[*kept[:i], *kept[i + 1 :]] for i in lacking]
    same = all(
        all(map(np.array_equal, map(_or_empty, cut), map(_or_empty, cuts[0]))) for cut in cuts
    )
    if cuts and same:
        return _take(x, cuts[0])
    raise ValueError(
        f"shrink: {name!r} has shape {shape}, where the parameter {leaf.path!r} has {leaf.shape}"
        + (", and which axis it lacks cannot be told" if cuts else "")
        + ". Unpack packed masks first, or initialise this tree anew from the smaller parameters."
    )


def _or_empty(kept: np.ndarray | None) -> Any:
    return "all" if kept is None else kept


def _take(x: Any, kept: Sequence[np.ndarray | None]) -> Any:
    for axis, indices in enumerate(kept):
        if indices is None:
            continue
        if isinstance(x, jax.ShapeDtypeStruct):
            shape = (*x.shape[:axis], len(indices), *x.shape[axis + 1 :])
            x = jax.ShapeDtypeStruct(shape, x.dtype)
        elif isinstance(x, np.ndarray):
            x = np.take(x, indices, axis)
        elif isinstance(getattr(x, "sharding", None), NamedSharding) and not trees.is_traced(x):
            x = _take_sharded(x, indices, axis)
        else:
            x = jnp.take(x, indices, axis=axis)
    return x


def _take_sharded(x: jax.Array, indices: np.ndarray, axis: int) -> jax.Array:
    """`jnp.take` that keeps the sharding, of the axis itself where the devices divide what is left of it."""
    sharding: Any = x.sharding
    spec: list[Any] = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    whole = NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], None, *spec[axis + 1 :]))
    # Units move between devices: the axis is gathered, one leaf at a time.
    x = jax.device_put(x, whole)
    told = _meshes.sharding_of(x)  # on the explicit axes of the mesh; of the others XLA sees to it
    x = x.at[(slice(None),) * axis + (jnp.asarray(indices),)].get(out_sharding=told)
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    parts = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
    even = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.device_put(x, whole if len(indices) % parts else even)
