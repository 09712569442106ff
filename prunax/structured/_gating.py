"""Gates: a number for each unit of each group, 1 for what is there and 0 for what is removed."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _meshes, trees
from prunax.structured._groups import AxisGroup, Member

__all__ = ["apply_gates", "gate_importance", "gates"]

PyTree = Any
Gates = dict[str, jax.Array]


def gates(groups: Sequence[AxisGroup]) -> Gates:
    """Make open gates.

    Args:
        groups: From `axis_groups`, mostly `prunable_groups` of them. Frozen groups get no gates.

    Returns:
        For each group, by `AxisGroup.name`, ones: float32 ``(units,)``.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 3))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)))
        >>> {name: gate.shape for name, gate in prunax.structured.gates(groups).items()}
        {'up[1]': (6,)}
    """
    return {g.name: jnp.ones(g.size, jnp.float32) for g in groups if not g.frozen}


def apply_gates(params: PyTree, groups: Sequence[AxisGroup], gates: Mapping[str, Any]) -> PyTree:
    """Multiply what units give to those that read them by their gates.

    At 1 the function stays what it is, bit for bit. At 0 it equals the function without the units, where
    `AxisGroup.preserved` is true. In between it is differentiable, for any model, which need not know.

    The weights that *consume* the units are multiplied: the rows of the next layer. Where nothing consumes them (the
    width of queries and keys), or a reduction crosses them (the statistics of a normalisation, which would go on
    counting a unit that nobody reads), those that produce them are, with what lies between: biases, scales.

    Args:
        params: Pytree of arrays.
        groups: From `axis_groups`.
        gates: For some or all of them, by `AxisGroup.name`, an array ``(units,)``; may be traced. From `gates`, or a
            sample of a distribution, or the first n ones to try a width without compiling for it.

    Returns:
        The params with other values; shapes, dtypes and structure stay.

    Raises:
        ValueError: If a gate is of no group, of a frozen one, or of another shape.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.ones((4, 2)), "down": jnp.ones((2, 1))}
        >>> groups = prunax.structured.axis_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 4)))
        >>> prunax.structured.apply_gates(params, groups, {"up[1]": jnp.array([1.0, 0.5])})["down"].tolist()
        [[1.0], [0.5]]

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771, section 3.2: gates.
    """
    known = {group.name: group for group in groups}
    by_leaf: dict[str, list[tuple[AxisGroup, Member]]] = {}
    for name, gate in gates.items():
        if name not in known:
            raise ValueError(
                f"apply_gates: {name!r} is no group. The groups are: {', '.join(known) or 'none'}."
            )
        group = known[name]
        if group.frozen:
            raise ValueError(f"apply_gates: {name} cannot shrink. It is {group.frozen}.")
        if np.shape(gate) != (group.size,):
            raise ValueError(
                f"apply_gates: the gates of {name} have shape {np.shape(gate)}, expected {(group.size,)}."
            )
        for member in _gated(group):
            by_leaf.setdefault(member.path, []).append((group, member))
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = []
    for path, leaf in flat:
        for group, member in by_leaf.get(trees.path_name(path), ()):
            factors = along_axis(group, member, leaf.shape, gates[group.name])
            # Divided as the leaf is, so that the gates' derivatives come back whole, as gathers need them.
            own = [d if d == member.axis else -1 for d in range(leaf.ndim)]
            factors = _meshes.divide(factors.astype(leaf.dtype), leaf, own)
            leaf = leaf * factors
        leaves.append(leaf)
    return treedef.unflatten(leaves)


def _gated(group: AxisGroup) -> list[Member]:
    """The members whose weights a gate multiplies."""
    consumers = [member for member in group.members if member.role == "consumes"]
    if consumers and not group.crosses:
        return consumers
    return [member for member in group.members if member.role != "consumes"] or consumers


def along_axis(
    group: AxisGroup, member: Member, shape: tuple[int, ...], values: Any, other: Any = 1
) -> jax.Array:
    """Values of units where the units lie in a leaf, to be broadcast against it.

    Args:
        group: The group.
        member: One of its places.
        shape: Of the leaf.
        values: ``(units,)``.
        other: What stands at indices that belong to no unit.

    Returns:
        An array of as many axes as the leaf, of length 1 but for the member's.
    """
    unit_of = np.full(shape[member.axis], group.size)
    unit_of[member.position.indices(group.size)] = np.arange(group.size)[:, None]
    values = jnp.asarray(values)
    spread = jnp.concatenate([values, jnp.full(1, other, values.dtype)])[unit_of]
    return spread.reshape([n if d == member.axis else 1 for d, n in enumerate(shape)])


def gate_importance(
    loss_fn: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    groups: Sequence[AxisGroup],
    *,
    measure: Callable[[jax.Array], jax.Array] = jnp.square,
    per_example: bool = False,
) -> dict[str, jax.Array]:
    r"""Score units by what the loss loses with them, to first order: the gradient by their gates, at 1.

    .. math:: I_u = \mathbb{E}_b \left(\frac{\partial L_b}{\partial g_u}\right)^2

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``, a pure JAX function. Compiled once for batches of one shape.
        params: Pytree of arrays.
        batches: Batches of data, pytrees of arrays whose first axis counts examples.
        groups: From `axis_groups` or `prunable_groups`; frozen ones are left out.
        measure: What is averaged of a gradient: `jnp.square`, or `jnp.abs`.
        per_example: Take the gradient of each example apart, by `jax.vmap` over the first axes of a batch's arrays;
            `loss_fn` then sees batches of one. Otherwise the gradient of each batch's loss.

    Returns:
        For each group, by `AxisGroup.name`, float32 ``(units,)``, larger = keep: what `prune_channels` takes as
        ``scores``.

    Raises:
        ValueError: If there are no batches, or no group may shrink.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"up": jnp.eye(2), "down": jnp.array([[3.0], [1.0]])}
        >>> fn = lambda params, x: x @ params["up"] @ params["down"]
        >>> groups = prunax.structured.axis_groups(fn, params, jnp.ones((1, 2)))
        >>> loss_fn = lambda params, x: jnp.mean(fn(params, x))
        >>> scores = prunax.structured.gate_importance(loss_fn, params, [jnp.ones((1, 2))], groups)
        >>> scores["up[1]"].tolist()
        [9.0, 1.0]

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771, equations 8 and 9.
        Michel et al., Are Sixteen Heads Really Better than One?, 2019, arXiv:1905.10650, equation 2: absolute values.
    """
    ones = gates(groups)
    if not ones:
        raise ValueError("gate_importance: none of the groups may shrink, so there are no gates.")

    def gradient(params: PyTree, batch: Any) -> Gates:
        gated = jax.grad(lambda gates: loss_fn(apply_gates(params, groups, gates), batch))
        return jax.tree.map(measure, gated(ones))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(sums: Gates, params: PyTree, batch: Any) -> Gates:
        if per_example:
            alone = jax.tree.map(lambda x: x[:, None], batch)
            each = jax.vmap(gradient, in_axes=(None, 0))(params, alone)
            found = jax.tree.map(lambda x: x.sum(0), each)
        else:
            found = gradient(params, batch)
        return jax.tree.map(jnp.add, sums, found)

    sums, count = jax.tree.map(jnp.zeros_like, ones), 0
    for batch in batches:
        sums = step(sums, params, batch)
        count += np.shape(jax.tree.leaves(batch)[0])[0] if per_example else 1
    if not count:
        raise ValueError("gate_importance: there are no batches. Pass a list, or a fresh iterator.")
    return jax.tree.map(lambda x: x / count, sums)
