"""Make a smaller network an ordinary module of its framework again."""

import copy
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prunax import trees
from prunax.structured import _keras, _linen, _scalars
from prunax.structured._groups import AxisGroup, Member, kept_positions
from prunax.structured._prune import Shrunk

__all__ = ["rebuild"]

PyTree = Any

# Attributes of layers that are numbers but never numbers of units.
_NO_SIZES = frozenset(
    "kernel_size stride strides padding output_padding dilation input_dilation kernel_dilation lhs_dilation "
    "rhs_dilation num_spatial_dims spatial_dims axis feature_axis feature_axes reduction_axes broadcast_dims depth "
    "window_shape count_include_pad seed".split()
)
# Parts of names that say a number of units is meant.
_SIZES = re.compile(
    r"features|channels|filters|size|width|dim|heads|units|hidden|shape|embed|groups?(_|$)|^d_"
)
_INPUTS = re.compile(r"^(in|input|query|key|value)(_|$)")
_OUTPUTS = re.compile(r"^(out|output|hidden|embedding)(_|$)|^features$")


_ALL_GROUPS = "consumes, all groups together"


class _Size(NamedTuple):
    """A size among the leaves of a module: it was `old`, and is `new`.

    Attributes:
        old: A length of an axis, the number of units of a group, or a shape.
        new: What has become of it.
        role: What the leaf does there, as `Member.role`; "" where no group lies; `_ALL_GROUPS` for the inputs of a
            convolution in groups, whose kernel has those of one group.
        inner: Whether nothing outside the module has these units.
    """

    old: Any
    new: Any
    role: str
    inner: bool


def rebuild(
    module: PyTree, small: Shrunk, *, attributes: Mapping[str, Any] | None = None
) -> PyTree:
    """Make the module of the smaller network: its parameters, and attributes such as ``out_features`` to match.

    The result is an ordinary module, to be trained, split, merged, saved and pruned again. Which number is which size
    is told from what leaves do on their axes: ``in_features`` of a layer is what its kernel consumes, ``out_features``
    what it produces, and ``num_heads`` of an attention are units that nothing outside of it has. A number whose name
    says nothing of sizes is left alone; if it is equal to a size that changed, it has to be named in `attributes`.

    Layers that divide by a number of units (`nnx.LayerNorm`) now divide by the smaller one, where ``small.fn`` keeps
    to the larger: see `AxisGroup.crosses`. Attention divides by a root of the new width of its heads; the weights of
    its query are multiplied to make up for that, unless the module holds the root as a number. All others calculate
    what ``small.fn`` does.

    Variables that the function closed over (batch statistics, where ``nnx.split(model, nnx.Param, ...)`` left them out
    of the params) are found among the constants of its program, and cut as well.

    Args:
        module: The module of the original sizes: a `flax.nnx.Module`, or an Equinox module or any other dataclass that
            is a pytree, alone or in containers (``(model, state)``); or a `flax.linen.Module`, of which you get a clone
            with smaller attributes, those whose variables have the shapes of ``small.params``, for them to be applied
            to. A transformed Haiku function holds no sizes: there ``small.fn`` is all. A functional or sequential Keras
            model is made from its configuration; its params are the list of its variables' values, or of the trainable
            ones, in their order.
        small: From `prune_channels`; after fine-tuning ``small._replace(params=tuned)``. The paths of its params must
            be those of the module: ``fn`` had the module itself as its params, or `nnx.state` of it, or a part of that.
        attributes: Values of attributes that cannot be told, by path: ``{"attention/head_dim": 48}``.

    Returns:
        A new module; the one that was passed stays as it is.

    Raises:
        ValueError: If a leaf of the smaller params isn't in the module; if a variable that the function closed over
            cannot be told from others; if attention normalises what it divides by a root; or if an attribute may
            stand for several sizes and not all of them changed alike: the message names the module and the attribute.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> from flax import nnx
        >>> class MLP(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up, self.down = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.down(nnx.relu(self.up(x)))
        >>> graph, params = nnx.split(MLP(nnx.Rngs(0)))
        >>> def fn(params, x):
        ...     return nnx.merge(graph, params)(x)
        >>> small = prunax.structured.prune_channels(fn, params, jnp.ones((2, 4)), sparsity=0.75)
        >>> mlp = prunax.structured.rebuild(MLP(nnx.Rngs(0)), small)
        >>> mlp.up.out_features, mlp.down.in_features, mlp(jnp.ones((2, 4))).shape
        (4, 4, (2, 3))
    """
    from flax import nnx

    given = dict(attributes or {})
    if "haiku" in type(module).__module__:
        raise TypeError(
            "rebuild: a transformed Haiku function needs no rebuilding, since it holds no sizes: small.fn is the "
            "function for small.params. For Haiku code of the smaller sizes, pass them to your own modules."
        )
    seen: set[str] = set()
    sizes = _sizes(small)
    if _is_linen(module):
        return _linen.clone(
            module,
            small.params,
            small.inputs,
            given,
            lambda path, value: _may_be(sizes(""), path, value),
        )
    if _is_keras(module):
        return _keras_model(module, small, given)
    roots = _roots(module, small)
    small = small._replace(params=_with_other_roots(small, roots))

    def decide(prefix: str, kind: str, name: str, value: Any) -> Any:
        path = f"{prefix}/{name}".lstrip("/")
        if path in given:
            seen.add(path)
            return given[path]
        return _decided(f"{path!r} of {kind}", path, name, value, lambda: sizes(prefix))

    if isinstance(module, nnx.Module):
        graph, state = nnx.split(module)
        new = nnx.merge(graph, _replaced(state, small))
        for parts, part in nnx.iter_modules(new):
            prefix = "/".join(map(str, parts))
            for name, value in list(vars(part).items()):
                if _is_size(name, value):
                    setattr(part, name, decide(prefix, type(part).__name__, name, value))
    else:
        new = _with_attributes(_replaced(module, small), "", decide)
    if unknown := sorted(set(given) - seen):
        raise ValueError(
            f"rebuild: attributes names {unknown[0]!r}, which is no number of the module. "
            f"Write the path of the module and the attribute, as in 'block/attention/head_dim'."
        )
    return new


def _is_linen(module: Any) -> bool:
    nn = sys.modules.get("flax.linen")
    return nn is not None and isinstance(module, nn.Module)


def _is_keras(module: Any) -> bool:
    keras_ = sys.modules.get("keras")
    return keras_ is not None and isinstance(module, keras_.Model)


def _keras_model(model: Any, small: Shrunk, given: Mapping[str, Any]) -> Any:
    for group, units in small.keep.items():
        if group.root:
            raise ValueError(
                f"rebuild: {group.name} went from {group.size} to {len(units)} units, by whose root Keras divides. "
                f"Keep the width of the heads and remove heads (allocation.by_path names them), or use small.fn."
            )
    by_path = dict(trees.named_leaves(small.params))
    leaves = small.groups[0].leaves if small.groups else ()
    sizes = _sizes(small)
    seen: set[str] = set()

    def decide(mine: Sequence[int], kind: str, layer: str, name: str, value: Any) -> Any:
        path = f"{layer}/{name}"
        if path in given:
            seen.add(path)
            return given[path]
        if not _is_size(name, value):
            return value

        def within() -> list[_Size]:
            return [s for n in mine for s in sizes(leaves[n].path)]

        return _decided(f"{path!r} of {kind}", path, name, value, within)

    new = _keras.remade(
        model, [by_path[leaf.path] for leaf in leaves], [leaf.shape for leaf in leaves], decide
    )
    if unknown := sorted(set(given) - seen):
        raise ValueError(
            f"rebuild: attributes names {unknown[0]!r}, which is no number of a layer."
        )
    return new


def _may_be(sizes: Sequence[_Size], path: str, value: int) -> list[int]:
    """What has become of a number of a Linen module: by its name first, then anything that was as large."""
    name = path.rpartition("/")[2]
    if name.isdigit():
        name = path.split("/")[-2]
    alike = [s for s in sizes if s.old == value and s.new != s.old]
    if not alike or name in _NO_SIZES:
        return [value]
    ranked = [s.new for fits in _by_name(name) for s in alike if fits(s)]
    rest = [s.new for s in alike]
    if not _SIZES.search(name):
        return list(dict.fromkeys([value, *ranked, *rest]))
    return list(dict.fromkeys([*ranked, *rest, value]))


def _replaced(tree: PyTree, small: Shrunk) -> PyTree:
    """The tree with the leaves of the smaller params in their places, and what the function closes over cut alike."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = {path: x for path, x in trees.named_leaves(small.params) if trees.is_array(x)}
    names = trees.paths(tree)
    if missing := sorted(set(arrays) - set(names)):
        raise ValueError(
            f"rebuild: {missing[0]!r} of the smaller params is not in the module, whose leaves are: "
            f"{', '.join(names) or 'none'}. Prune a function whose params are the module's state or the module itself."
        )
    closed_over = _closed_over(small)
    return treedef.unflatten(
        arrays[name] if name in arrays else _cut_alike(name, x, closed_over)
        for name, x in zip(names, leaves, strict=True)
    )


class _ClosedOver(NamedTuple):
    """An array that the function closes over, and what is left of it on each axis."""

    array: Any
    kept: list[np.ndarray]


def _closed_over(small: Shrunk) -> list[_ClosedOver]:
    found: dict[int, tuple[Any, list[np.ndarray]]] = {}
    for group, units in small.keep.items():
        removed = np.setdiff1d(np.arange(group.size), units)
        for array, axis, position in group.constants:
            whole = (array, [np.ones(n, bool) for n in np.shape(array)])
            _, marks = found.setdefault(id(array), whole)
            marks[axis][position.indices(group.size)[removed]] = False
    return [_ClosedOver(x, [np.flatnonzero(m) for m in marks]) for x, marks in found.values()]


def _cut_alike(name: str, x: Any, closed_over: Sequence[_ClosedOver]) -> Any:
    """What is left of a leaf that was no parameter: a statistic, mostly."""
    if not trees.is_array(x) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    alike = [c for c in closed_over if c.array is x] or [
        c
        for c in closed_over
        if np.shape(c.array) == x.shape and np.array_equal(np.asarray(c.array), np.asarray(x))
    ]
    cuts = [np.asarray(x)[np.ix_(*c.kept)] for c in alike]
    if not cuts:
        return x
    if any(cut.shape != cuts[0].shape or not np.array_equal(cut, cuts[0]) for cut in cuts):
        raise ValueError(
            f"rebuild: {name!r} is closed over by the function, and equal to other arrays that shrink in other ways. "
            f"Let the function take it with its params: "
            f"`graph, params = nnx.split(model)` with all variables, in place of nnx.Param alone."
        )
    return jnp.asarray(cuts[0])


class _Root(NamedTuple):
    """A leaf whose module now divides by another root.

    Attributes:
        path: The leaf.
        axis: Its axis.
        indices: Where on that axis its units lie, those that are left.
        factor: What its weights are multiplied by to make up for it.
    """

    path: str
    axis: int
    indices: np.ndarray
    factor: float


def _roots(module: PyTree, small: Shrunk) -> list[_Root]:
    """Attention whose heads got narrower divides by the root of the new width: correct the query."""
    found: list[_Root] = []
    for group, units in small.keep.items():
        if not group.root:
            continue
        producers = [member for member in group.members if member.role == "produces"]
        first = producers[0] if producers else group.members[0]
        first = next((m for m in producers if re.search(r"(^|[/_])(q|query|to_q)", m.path)), first)
        if _has_number(module, first.path, group.size):
            continue
        if group.crosses:
            raise ValueError(
                f"rebuild: {group.name} went from {group.size} to {len(units)} units, and the module divides by a root "
                f"of their number after it normalised them ({group.crosses[0]}), which no weight makes up for. "
                f"Keep their number (allocation.by_path names the groups that shrink), or use small.fn."
            )
        home = first.path.rpartition("/")[0]
        for member in group.members:
            beside = member.role == "elementwise" and member.path.rpartition("/")[0] == home
            part = member.position.offset, member.position.stride
            if member == first or (
                beside and part == (first.position.offset, first.position.stride)
            ):
                mark = np.zeros(_length(group, member), bool)
                mark[member.position.indices(group.size)] = True
                left = _kept_along(small, member.path, member.axis, len(mark))
                factor = math.sqrt(len(units) / group.size)
                found.append(_Root(member.path, member.axis, np.flatnonzero(mark[left]), factor))
    return found


def _length(group: AxisGroup, member: Member) -> int:
    shape = next(leaf.shape for leaf in group.leaves if leaf.path == member.path)
    return shape[member.axis]


def _kept_along(small: Shrunk, path: str, axis: int, length: int) -> np.ndarray:
    kept = kept_positions("rebuild", small.keep, small.groups[0].leaves).get(path)
    left = kept[axis] if kept else None
    return np.arange(length) if left is None else left


def _has_number(module: PyTree, path: str, size: int) -> bool:
    """Whether a module on the way to a leaf holds the root of a size as a number of its own."""
    numbers: list[float] = []
    node = module
    for part in path.split("/"):
        held = vars(node).values() if hasattr(node, "__dict__") else ()
        numbers += [x for x in held if isinstance(x, float)]
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, Sequence) and part.isdigit():
            node = node[int(part)]
        else:
            node = getattr(node, part, None)
        if node is None:
            break
    return _scalars.has_root(numbers, size)


def _with_other_roots(small: Shrunk, roots: Sequence[_Root]) -> PyTree:
    def corrected(path: str, x: Any) -> Any:
        for root in roots:
            if root.path == path:
                shape = [1] * x.ndim
                shape[root.axis] = x.shape[root.axis]
                factors = np.ones(x.shape[root.axis])
                factors[root.indices] = root.factor
                x = x * jnp.asarray(factors.reshape(shape), x.dtype)
        return x

    return trees.map_with_path(corrected, small.params)


def _with_attributes(node: Any, path: str, decide: Callable[[str, str, str, Any], Any]) -> Any:
    """A copy of modules and containers with the attributes decided."""

    def child(name: Any, value: Any) -> Any:
        return _with_attributes(value, f"{path}/{name}".lstrip("/"), decide)

    if isinstance(node, dict):
        return type(node)({key: child(key, value) for key, value in node.items()})
    if isinstance(node, tuple) and (names := getattr(node, "_fields", None)):
        return type(node)(*map(child, names, node))
    if isinstance(node, list | tuple):
        return type(node)(child(i, value) for i, value in enumerate(node))
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(node)):
        return node
    new = copy.copy(node)
    for name, value in vars(node).items():
        if _is_size(name, value):
            value = decide(path, type(node).__name__, name, value)
        else:
            value = child(name, value)
        object.__setattr__(new, name, value)  # the class may be frozen
    return new


def _is_size(name: str | int, value: Any) -> bool:
    """Whether an attribute is a number, or several, that may be a size."""
    numbers = value if isinstance(value, list | tuple) else [value]
    return (
        isinstance(name, str)  # an item of a list of Flax modules may have a number
        and not name.startswith("_")
        and name not in _NO_SIZES
        and len(numbers) > 0
        and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        and max(numbers) > 1
    )


def _decided(
    what: str, path: str, name: str, value: Any, sizes: Callable[[], Sequence[_Size]]
) -> Any:
    """The attribute's new value."""
    if isinstance(value, list | tuple):
        shapes = [s for s in sizes() if s.old == tuple(value)]
        if not shapes:
            parts = [_decided(what, path, name, n, sizes) for n in value]
            return type(value)(parts)
        return type(value)(_agreed(what, path, name, value, shapes))
    return _agreed(what, path, name, value, [s for s in sizes() if s.old == value])


def _agreed(what: str, path: str, name: str, value: Any, sizes: Sequence[_Size]) -> Any:
    """What has become of a number, by those sizes that its name says it is."""
    changed = sorted({s.new for s in sizes if s.new != s.old})
    if not changed:
        return value
    if not _SIZES.search(name) and any(s.new != s.old and s.role != _ALL_GROUPS for s in sizes):
        raise ValueError(
            f"rebuild: {what} is {value}, as was a size that is now {changed[0]}, and its name does not tell whether "
            f"it is that size. Say what it shall be: attributes={{{path!r}: {value}}}, or {changed[0]}."
        )
    for ranked in _by_name(name):
        fitting = {s.new for s in sizes if ranked(s)}
        if len(fitting) == 1:
            return fitting.pop()
        if fitting:
            raise ValueError(
                f"rebuild: {what} is {value}, which may stand for sizes that are now "
                f"{' and '.join(map(str, sorted(fitting)))}. "
                f"Say what it shall be: attributes={{{path!r}: {min(fitting)}}}."
            )
    return value


def _by_name(name: str) -> list[Callable[[_Size], bool]]:
    """Which sizes an attribute may stand for, the likeliest first."""
    if _INPUTS.search(name):
        first = [*_doing("consumes"), *_doing("elementwise")[1:], *_doing(_ALL_GROUPS)[1:]]
    elif _OUTPUTS.search(name):
        first = [*_doing("produces"), *_doing("elementwise")[1:]]
    elif "group" in name:
        first = _doing("produces")
    else:
        first = [lambda s: s.inner and s.role != _ALL_GROUPS]
    return [*first, lambda s: s.role != _ALL_GROUPS]


def _doing(role: str) -> list[Callable[[_Size], bool]]:
    return [lambda s: s.role == role and not s.inner, lambda s: s.role == role]


def _sizes(small: Shrunk) -> Callable[[str], list[_Size]]:
    """All sizes among the leaves of the module at a path, as a function of the path."""
    shapes = {
        path: tuple(x.shape) for path, x in trees.named_leaves(small.params) if trees.is_array(x)
    }
    places: dict[tuple[str, int], list[tuple[AxisGroup, str]]] = {}
    homes: dict[AxisGroup, set[str]] = {}
    for group in small.groups:
        homes[group] = {member.path for member in group.members}
        for path, axis, _, role in group.members:
            places.setdefault((path, axis), []).append((group, role))
    counts = {group: len(small.keep.get(group, range(group.size))) for group in small.groups}
    leaves = small.groups[0].leaves if small.groups else ()

    def found(prefix: str) -> list[_Size]:
        def inside(path: str) -> bool:
            return not prefix or path == prefix or path.startswith(f"{prefix}/")

        inner = {
            group: not group.frozen and all(map(inside, paths)) for group, paths in homes.items()
        }
        result: list[_Size] = []
        for leaf in leaves:
            if inside(leaf.path):
                axes = [places.get((leaf.path, d), []) for d in range(len(leaf.shape))]
                result += _sizes_of_leaf(leaf.shape, shapes[leaf.path], axes, inner, counts)
        return result

    return found


def _sizes_of_leaf(
    old: tuple[int, ...],
    new: tuple[int, ...],
    axes: Sequence[Sequence[tuple[AxisGroup, str]]],
    inner: Mapping[AxisGroup, bool],
    counts: Mapping[AxisGroup, int],
) -> Iterator[_Size]:
    lengths = []
    for d, places in enumerate(axes):
        role = places[0][1] if places else ""
        within = bool(places) and all(inner[group] for group, _ in places)
        lengths.append(_Size(old[d], new[d], role, within))
        for group, _ in places:
            if group.size != old[d]:
                yield _Size(group.size, counts[group], role, inner[group])
    yield from lengths
    yield _Size(old, new, "", False)
    # Heads times their width, and so on: all axes that the leaf treats alike, as a product and as a shape.
    for role in ("produces", "consumes", "elementwise"):
        alike = [size for size in lengths if size.role == role]
        if alike:
            within = all(size.inner for size in alike)
            before, after = tuple(s.old for s in alike), tuple(s.new for s in alike)
            yield _Size(before, after, role, within)
            if len(alike) > 1:
                yield _Size(math.prod(before), math.prod(after), role, within)
    # Any product of inputs and another size may be that; only names of inputs are looked up there.
    for size in lengths:
        if size.role == "consumes":
            for places in axes:
                for group, role in places:
                    if role == "produces":
                        times = size.old * group.size, size.new * counts[group]
                        yield _Size(*times, _ALL_GROUPS, size.inner)
