"""Clones of Flax Linen modules for smaller parameters."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prunax import trees

__all__: list[str] = []

_MOST = 512  # clones that are tried

PyTree = Any
# For a number of the module, by path: what it may have become, the likeliest first.
Candidates = Callable[[str, Any], Sequence[Any]]


def clone(
    module: Any,
    params: PyTree,
    inputs: tuple[Any, ...],
    given: Mapping[str, Any],
    may_be: Candidates,
) -> Any:
    """The clone of a Linen module whose variables have the shapes of smaller ones.

    Args:
        module: A `flax.linen.Module`.
        params: The smaller variables, or their ``"params"`` collection.
        inputs: What `init` takes after the random key, abstract.
        given: Values of attributes by path.
        may_be: See `Candidates`.

    Returns:
        The clone.

    Raises:
        ValueError: If no values of its attributes give those shapes, naming what could not be settled.
    """
    wanted = {path: tuple(np.shape(x)) for path, x in trees.named_leaves(params)}
    known, error = _shapes(module, inputs)
    names = {*known, *(path.removeprefix("params/") for path in known)}
    if not error and (missing := sorted(set(wanted) - names)):
        raise ValueError(
            f"rebuild: {missing[0]!r} of the smaller params is not in the module, whose leaves are: "
            f"{', '.join(known) or 'none'}. Prune a function whose params are the module's variables."
        )
    numbers = dict(_numbers(module, ""))
    if unknown := sorted(set(given) - set(numbers)):
        raise ValueError(
            f"rebuild: attributes names {unknown[0]!r}, which is no number of the module. "
            f"Its numbers are: {', '.join(numbers) or 'none'}."
        )
    choices = {
        path: [given[path]] if path in given else list(may_be(path, value))
        for path, value in numbers.items()
    }
    last = ""
    for values in itertools.islice(itertools.product(*choices.values()), _MOST):
        new = _with(module, "", dict(zip(choices, values, strict=True)))
        shapes, error = _shapes(new, inputs)
        differing = _difference(shapes, wanted)
        if not error and differing is None:
            return new
        last = error or str(differing)
    open_ = [f"{path} (now {numbers[path]})" for path, values in choices.items() if len(values) > 1]
    raise ValueError(
        f"rebuild: no values of the attributes of {type(module).__name__} give variables of the smaller shapes; "
        f"{last}. Not settled: {', '.join(open_) or 'sizes that are written into its code'}. Say what they shall "
        f"be with attributes={{...}}, make them attributes of the module, prune layers that share one alike, or "
        f"use small.fn."
    )


def _shapes(module: Any, inputs: tuple[Any, ...]) -> tuple[dict[str, tuple[int, ...]], str]:
    """The shapes of a module's variables, or why they cannot be had."""
    key = jax.random.key(0)
    rngs = {"params": key, "dropout": key}
    arrays = [x for x in jax.tree.leaves(inputs) if trees.is_array(x)]
    treedef = jax.tree.structure(inputs)
    fixed = jax.tree.leaves(inputs)

    def init(arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        whole = [next(rest) if trees.is_array(x) else x for x in fixed]
        return module.init(rngs, *treedef.unflatten(whole))

    try:
        variables = jax.eval_shape(init, arrays)
    except Exception as error:  # a choice that does not fit may fail in any way
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {path: tuple(x.shape) for path, x in trees.named_leaves(variables)}, ""


def _difference(
    shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str | None:
    for path, shape in wanted.items():
        found = shapes.get(path, shapes.get(f"params/{path}"))
        if found != shape:
            return f"{path!r} would have shape {found}, where the smaller params have {shape}"
    return None


def _numbers(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Attributes that are numbers, by path: of the module, of modules and settings among its attributes."""
    for name, value in _attributes(node):
        own = f"{path}/{name}".lstrip("/")
        if _is_number(value):
            yield own, value
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                if _is_number(item):
                    yield f"{own}/{i}", item
                elif dataclasses.is_dataclass(item):
                    yield from _numbers(item, f"{own}/{i}")
        elif dataclasses.is_dataclass(value):
            yield from _numbers(value, own)


def _attributes(node: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(node):
        if field.init and field.name not in ("parent", "name"):
            yield field.name, getattr(node, field.name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _with(node: Any, path: str, values: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with other numbers."""

    def changed(value: Any, own: str) -> Any:
        if own in values:
            return values[own]
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(changed(item, f"{own}/{i}") for i, item in enumerate(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _with(value, own, values)
        return value

    new = {name: changed(value, f"{path}/{name}".lstrip("/")) for name, value in _attributes(node)}
    if hasattr(node, "clone"):
        return node.clone(parent=None, **new)
    return dataclasses.replace(node, **new)
