"""What the sparse-training transformations say before they train: errors, and warnings of what will not be pruned."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prunax import _packing, trees

__all__: list[str] = []  # for the modules of prunax

PyTree = Any
_HOLE = object()
_MOST = 20  # leaves that a warning names


def arguments_of(
    name: str, function: Callable[..., Any], /, *args: Any, **options: Any
) -> dict[str, Any]:
    """Bind arguments as a call of `function` would, with its defaults, for one that is called `name`.

    Raises:
        TypeError: If the function does not take them.
    """
    try:
        bound = inspect.signature(function).bind(*args, **options)
    except TypeError as e:
        raise TypeError(f"{name}: {e}. It takes what {function.__name__} takes.") from None
    bound.apply_defaults()
    return bound.arguments


def gradients_of(name: str, model: PyTree, updates: PyTree) -> list[Any]:
    """Find the gradient of each leaf of the model: None where None or `optax.MaskedNode` stands in its place.

    Raises:
        ValueError: Naming the leaf, if the trees differ otherwise.
    """
    if jax.tree.structure(updates) == jax.tree.structure(model):
        return jax.tree.leaves(updates)
    marked = jax.tree.map(lambda g: _HOLE if _is_hole(g) else g, updates, is_leaf=_is_hole)
    at = dict(zip(trees.places(marked), jax.tree.leaves(marked), strict=True))
    places = trees.places(model)
    found = [[at[p[:n]] for n in range(len(p), -1, -1) if p[:n] in at] for p in places]
    extra = {place for place, g in at.items() if g is not _HOLE} - set(places)
    if extra or not all(found):
        trees.leaves_like(name, "updates", updates, model)  # says at which path
    return [None if gradients[0] is _HOLE else gradients[0] for gradients in found]


def check_shapes(
    name: str, chosen: trees.Selection, stored: list[Any], gradients: list[Any], packed: bool
) -> None:
    """Raise ValueError, naming the leaf, where the state or the updates are those of other params."""
    for path, leaf, mask, gradient in zip(
        chosen.paths, chosen.leaves, stored, gradients, strict=True
    ):
        wanted = _packing.packed_shape(leaf.shape) if packed else leaf.shape
        if jnp.shape(mask) != wanted:
            raise ValueError(
                f"{name}: {path!r} has shape {leaf.shape}, and the mask in the state has shape {jnp.shape(mask)} where "
                f"it should have {wanted}. The state was made for other params (or with another `packed`, or another "
                f"`where`): make a new one with tx.init(params)."
            )
        if jnp.shape(gradient) != leaf.shape:
            raise ValueError(
                f"{name}: {path!r} has shape {leaf.shape}, and its update has shape {jnp.shape(gradient)}. Pass the "
                f"gradients of these params."
            )


@contextlib.contextmanager
def explained(name: str, model: PyTree, missing: list[str]) -> Generator[None]:
    """Say which leaves are likely to blame where the inner optimizer raises: no gradient, or integers of a few bits."""
    try:
        yield
    except (TypeError, ValueError) as error:
        narrow = [
            f"{path!r} ({leaf.dtype})"
            for path, leaf in trees.named_leaves(model)
            if trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.integer)
        ]
        if missing:
            what, which = f"{missing[0]!r}, which has no gradient (None)", "leaves with gradients"
        elif narrow:
            what, which = f"{', '.join(narrow[:_MOST])}", "floating-point leaves"
        else:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name}: the inner optimizer cannot update {what}. Let it see {which} only: optax.masked(inner, mask), "
            f"or optax.partition with optax.set_to_zero() for the others."
        ) from error


def warn_of_nothing(name: str, model: PyTree, chosen: trees.Selection, at_rest: set[str]) -> None:
    """Warn, with a reason for each leaf, if there is nothing to prune in a whole model.

    Parts of a model (`optax.masked`, `optax.partition`) and the placeholders by which optax asks what a state looks
    like may well hold nothing.
    """
    arrays = [(path, leaf) for path, leaf in trees.named_leaves(model) if trees.is_array(leaf)]
    nodes = jax.tree.leaves(model, is_leaf=_is_hole)
    # A part of a model may be an empty dict; nobody asks NNX for an empty state.
    if not nodes and isinstance(model, trees.loaded("flax.nnx", "State")):
        warnings.warn(
            f"{name}: nothing will be pruned, since the params are an empty {type(model).__name__}. Pass all params, "
            f"or as wrt= of nnx.Optimizer what the model has: nnx.Param.",
            stacklevel=4,
        )
    if chosen.indices or not arrays or any(isinstance(n, optax.MaskedNode) for n in nodes):
        return

    def reason(path: str, leaf: Any) -> str:
        if path in at_rest:
            return "the optimizer never moves it"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return "not floating-point"
        return "less than two axes" if leaf.ndim < 2 else "left out by `where`"

    lines = [f"{p!r} ({x.dtype}, {x.shape}): {reason(p, x)}" for p, x in arrays[:_MOST]]
    if len(arrays) > _MOST:
        lines.append(f"and {len(arrays) - _MOST} more")
    warnings.warn(
        f"{name}: nothing will be pruned, since no leaf is chosen. {'; '.join(lines)}. "
        f"Pass where=lambda path, leaf: ... that is true for the leaves to prune.",
        stacklevel=4,
    )


def warn_of_no_numbers(name: str, chosen: trees.Selection, masks: list[Any] | None) -> None:
    """Warn if a weight that is pruned, or may be, is infinite or NaN: no update can bring it to zero."""
    if trees.is_traced(*chosen.leaves, *(masks or [])):
        return
    found = _infinite(chosen.leaves, masks)
    if trees.is_traced(
        *jax.tree.leaves(found)
    ):  # of arrays that a function under trace closes over
        return
    counts = jax.device_get(found)
    bad = [
        f"{path!r} ({n} of {leaf.size})"
        for path, leaf, n in zip(chosen.paths, chosen.leaves, counts, strict=True)
        if n
    ]
    if bad:
        which = "weights" if masks is None else "pruned weights"
        warnings.warn(
            f"{name}: {which} of {', '.join(bad)} are infinite or NaN. No update added to one gives zero, so "
            f"that it is NaN where it is pruned. Mend the params first: prunax.apply_masks(params, masks), or "
            f"jnp.nan_to_num.",
            stacklevel=4,
        )


@jax.jit
def _infinite(leaves: list[jax.Array], masks: list[jax.Array] | None) -> list[jax.Array]:
    kept = masks or [jnp.zeros((), jnp.bool_)] * len(leaves)
    return [jnp.sum(~jnp.isfinite(leaf) & ~mask) for leaf, mask in zip(leaves, kept, strict=True)]


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)
