"""Where an array lies, as far as its type tells: on which mesh, in how many parts, varying over which manual axes.

The mesh is the array's own, never one that `jax.set_mesh` put around the call.
"""

import contextlib
import math
from collections.abc import Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prunax import trees

__all__ = [
    "agree",
    "devices",
    "divide",
    "gather",
    "kind",
    "move_to",
    "own_mesh",
    "shard_like",
    "sharding_of",
    "shards",
    "split",
    "to_host",
    "vary_like",
    "varying_axes",
]

PyTree = Any


def sharding_of(x: Any) -> NamedSharding | None:
    """Give the sharding that an array's type tells (on explicit mesh axes), or None where it tells of no division."""
    aval = jax.typeof(x) if isinstance(x, jax.Array) else x
    sharding = getattr(aval, "sharding", None)
    divided = isinstance(sharding, NamedSharding) and any(
        part is not None for part in sharding.spec
    )
    return sharding if divided else None


def shards(x: Any) -> tuple[int, ...]:
    """Say in how many parts each axis of an array is, as far as its type tells."""
    sharding, axes = sharding_of(x), len(x.shape)
    if sharding is None:
        return (1,) * axes
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in sharding.spec]
    parts += [()] * (axes - len(parts))
    return tuple(math.prod(sharding.mesh.shape[name] for name in part) for part in parts)


def split(sharding: NamedSharding | None, axes: Iterable[int]) -> NamedSharding | None:
    """Make the sharding of another view: each of its axes is divided as the axis named is, or (-1) not at all."""
    if sharding is None:
        return None
    known = dict(enumerate(sharding.spec))  # may leave out what is not divided at the end
    return NamedSharding(sharding.mesh, PartitionSpec(*[known.get(a) for a in axes]))


def move_to(x: jax.Array, other: Any) -> jax.Array:
    """Bring a small array that every device holds onto the mesh of another, where their types name two."""
    ours, theirs = (jax.typeof(a).sharding.mesh for a in (x, other))
    if ours == theirs or ours.empty or theirs.empty:
        return x
    return jax.sharding.reshard(x, NamedSharding(theirs, PartitionSpec()))


def zeros_like(x: jax.Array) -> jax.Array:
    """Make zeros of an array's type; `jnp.zeros_like` of JAX 0.12 forgets the mesh where no axis is divided."""
    return jnp.where(jnp.zeros(x.shape, jnp.bool_), x, jnp.zeros((), x.dtype))


def gather(x: jax.Array, axes: Iterable[int] | None = None) -> jax.Array:
    """Gather an array along axes (all where left out) of which its type says that they are divided."""
    sharding, axes = sharding_of(x), set(range(x.ndim) if axes is None else axes)
    whole = split(sharding, [-1 if a in axes else a for a in range(x.ndim)])
    return x if whole is None or whole == sharding else jax.sharding.reshard(x, whole)


def divide(x: jax.Array, other: Any, axes: Iterable[int]) -> jax.Array:
    """Divide each axis of an array as the axis named of another is, as far as the other's type tells."""
    sharding = split(sharding_of(other), axes)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def shard_like(x: jax.Array, other: Any) -> jax.Array:
    """Divide an array like another of its shape: as its sharding says, or where that is traced, its type.

    Where the type does not tell (auto meshes under `jit`), the array is made to depend on the other, so that XLA
    carries the division over; it then drops what does not matter.
    """
    if not trees.is_traced(x, other):
        here = isinstance(other, jax.Array) and x.sharding != other.sharding
        return jax.device_put(x, other.sharding) if here else x
    sharding = sharding_of(other)
    if sharding is None:
        alone = jax.device_count() == 1 or varying_axes(other)  # each device has its own
        return x if alone else jnp.where(other == other, x, x)
    return x if sharding == jax.typeof(x).sharding else jax.sharding.reshard(x, sharding)


def varying_axes(x: Any) -> frozenset[str]:
    """Name the manual mesh axes (of `jax.shard_map`) over which an array's type says that it varies."""
    aval: Any = jax.typeof(x)
    if hasattr(aval, "mat"):
        return aval.mat.varying
    return getattr(aval, "vma", frozenset())  # before JAX 0.10


def vary_like(tree: PyTree, *others: Any) -> PyTree:
    """Let arrays vary over the manual mesh axes that others vary over, as the carry of a loop over those must."""
    marks = {varying_axes(x): x for x in jax.tree.leaves(others)}
    for axes, x in marks.items():
        if axes:
            # The cast has another name in each release of JAX; a zero like the array varies in all of them.
            zero = jnp.zeros_like(x, dtype=jnp.bool_, shape=())
            tree = jax.tree.map(lambda a, zero=zero: jnp.where(zero, a, a), tree)
    return tree


def agree(flag: jax.Array) -> jax.Array:
    """Turn a flag of each device into whether it is set on any, so that all do the same."""
    axes = varying_axes(flag)
    return jax.lax.pmax(flag, tuple(sorted(axes))) if axes else flag


def kind(x: Any) -> tuple[Any, ...]:
    """What must be alike in types for arrays to be put together: the mesh, and the axes that they vary over."""
    return jax.typeof(x).sharding.mesh, varying_axes(x)


@contextlib.contextmanager
def own_mesh(*trees_: PyTree) -> Generator[None]:
    """Enter the explicit mesh that concrete arrays lie on, for functions of the user's that run op by op.

    JAX differentiates some of those (`jax.nn.relu`) under a mesh context only. One that is there already stays, and so
    does none where arrays are traced or lie on several meshes.
    """
    arrays = [x for x in jax.tree.leaves(trees_) if isinstance(x, jax.Array)]
    meshes: set[Any] = set()
    if not trees.is_traced(*arrays) and jax.sharding.get_abstract_mesh().empty:
        found = [x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)]
        meshes = {mesh for mesh in found if AxisType.Explicit in mesh.axis_types}
    with jax.set_mesh(meshes.pop()) if len(meshes) == 1 else contextlib.nullcontext():
        yield


def to_host(x: Any) -> np.ndarray:
    """Copy a whole array to the host of each process, also where its parts lie on devices of several processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(jax.device_get(x))


def devices(x: Any) -> tuple[Any, ...]:
    """List the devices that a concrete array is bound to, in the order of its mesh; none where JAX may move it."""
    if not isinstance(x, jax.Array) or not x.committed:
        return ()
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        return tuple(np.asarray(sharding.mesh.devices).flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))
