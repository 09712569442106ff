"""Masks out of the states of optimizers, wherever in them a sparse-training transformation is."""

import warnings
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from prunax import _packing, trees
from prunax.reports._summary import summarize

__all__ = ["get_masks"]

Tree = TypeVar("Tree")
Place = tuple[str, ...]


def get_masks(opt_state: Any, params: Tree) -> Tree:
    """Find the masks in an optimizer's state.

    Args:
        opt_state: The state of any optax transformation that has `prunax.prune` (or another transformation with masks)
            in it: a chain, `optax.multi_transform`, `optax.masked`, `optax.MultiSteps`, `optax.inject_hyperparams`,
            `optax.apply_if_finite`; the state of an `nnx.Optimizer`, or a `TrainState`. Masks may be packed.
        params: The params that are trained, or arrays or abstract arrays of their shapes.

    Returns:
        A mask tree of the params' structure: bool arrays, True = kept, and the scalar True for leaves that nothing
        prunes. Where several transformations prune one leaf, a weight is kept that all of them keep.

    Raises:
        ValueError: If the state holds no masks, saying what it holds, or masks of other params, naming the leaf.
        TypeError: If the arguments are of the wrong kind.

    Warns:
        UserWarning: If pruned weights of the params are not zero, as they are once another transformation of the chain
            comes after `prune`.

    Examples:
        >>> import jax.numpy as jnp, optax, prunax
        >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
        >>> tx = optax.chain(optax.clip(1.0), prunax.prune(optax.sgd(0.1), 0.5, packed=True))
        >>> masks = prunax.get_masks(tx.init(params), params)
        >>> masks["dense"]["kernel"].shape, masks["dense"]["bias"].tolist()
        ((3, 2), True)
    """
    trees.check_params("get_masks", params)
    leaves, treedef = jax.tree.flatten(params)
    places = trees.places(params)
    shapes = {place: jnp.shape(leaf) for place, leaf in zip(places, leaves, strict=True)}
    masks: dict[Place, jax.Array] = {}
    found = _masks_in(opt_state)
    if not found:
        raise ValueError(
            f"get_masks: found no masks in the state, which holds {_described(opt_state)}. Wrap the optimizer with "
            f"prunax.prune, and pass its state: get_masks(opt_state, params)."
        )
    for place, stored in found:
        path = "/".join(place)
        if place not in shapes and place[:1] in (("fast",), ("slow",)):
            place = place[1:]  # one of the two copies of `optax.LookaheadParams`
        if place not in shapes:
            raise ValueError(
                f"get_masks: the state has a mask for {path!r}, which is not in the params. These are: "
                f"{', '.join(trees.paths(params)) or 'none'}. Pass the params that the optimizer was initialised with."
            )
        if not stored.shape:
            continue
        shape = shapes[place]
        packed = stored.dtype == jnp.uint8
        wanted = _packing.packed_shape(shape) if packed else shape
        if stored.shape != wanted:
            raise ValueError(
                f"get_masks: the mask of {path!r} in the state has shape {stored.shape}, expected {wanted} for a leaf "
                f"of shape {shape}. Pass the params that the optimizer was initialised with."
            )
        mask = _packing.unpack_bits(stored, shape) if packed else stored
        masks[place] = masks[place] & mask if place in masks else mask
    # A buffer for each scalar, so that the tree can be donated.
    result = treedef.unflatten(
        masks[place] if place in masks else trees.keep_all() for place in places
    )
    if not trees.is_traced(*leaves, *masks.values()):
        for text in summarize(params, result).warnings:
            warnings.warn(f"get_masks: {text}", stacklevel=2)
    return result


class _Found(NamedTuple):
    place: Place
    stored: Any


def _masks_in(state: Any) -> list[_Found]:
    """The masks in a state by their places in the params.

    Places tell them, not types: those of a `PruneState` have `masks` beside `skipped_updates`, and still so in the dict
    or the `nnx.State` that a checkpoint or `nnx.state` makes of it.
    """
    leaves = dict(zip(trees.places(state), jax.tree.leaves(state), strict=True))
    roots = [place[:-1] for place in leaves if place[-1:] == ("skipped_updates",)]
    found = []
    for root in roots:
        start = (*root, "masks")
        n = len(start)
        found += [_Found(place[n:], x) for place, x in leaves.items() if place[:n] == start]
    return found


def _described(state: Any) -> str:
    """The types of a state's parts: of all named tuples in it, or of the state itself."""
    kinds: dict[str, None] = {}

    def seen(node: Any) -> bool:
        if hasattr(node, "_fields"):
            kinds[type(node).__name__] = None
        return False

    jax.tree.leaves(state, is_leaf=seen)
    return ", ".join(kinds) or f"a {type(state).__name__}"
