"""Keras models of smaller sizes, from their configuration."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__: list[str] = []


def remade(
    model: Any, leaves: Sequence[Any], shapes: Sequence[tuple[int, ...]], decide: Callable[..., Any]
) -> Any:
    """A functional or sequential model with smaller layers.

    Args:
        model: A built `keras.Model`.
        leaves: The smaller params, in the order of ``model.trainable_variables`` or of ``model.variables``.
        shapes: Of the params before.
        decide: ``decide(indices, kind, path, name, value)``: the new value of a layer's number, by the indices of the
            leaves that the layer has.

    Returns:
        The model, with the values of the leaves; other variables are those of the layers' initialisers, or unchanged
        where their shapes are.

    Raises:
        ValueError: If the params are not the model's variables, or a layer did not get the smaller shapes.
    """
    for variables in (model.trainable_variables, model.variables):
        if [tuple(v.shape) for v in variables] == list(shapes):
            break
    else:
        raise ValueError(
            "rebuild: the params are not the model's variables in their order. Prune a function whose params are "
            "[v.value for v in model.variables], or those of model.trainable_variables."
        )
    index = {id(v): n for n, v in enumerate(variables)}
    known = {layer.name: layer for layer in model.layers}
    config = copy.deepcopy(model.get_config())
    for layer in config.get("layers", ()):
        inner = layer["config"]
        own = known.get(inner.get("name"))  # none for an operation such as +
        mine = [index[id(v)] for v in own.variables if id(v) in index] if own else []
        for name, value in list(inner.items()):
            if mine and isinstance(value, int) and not isinstance(value, bool):
                inner[name] = decide(mine, layer["class_name"], inner["name"], name, value)
        # What a layer was built for is read from its inputs again.
        layer.pop("build_config", None)
    new = type(model).from_config(config)
    if not new.built:
        new.build(model.input_shape)
    by_path = dict(zip([v.path for v in model.variables], new.variables, strict=True))
    for old, variable in zip(variables, leaves, strict=True):
        target = by_path[old.path]
        if tuple(target.shape) != tuple(np.shape(variable)):
            raise ValueError(
                f"rebuild: {old.path!r} of the new model has shape {tuple(target.shape)}, where the smaller params "
                f"have {tuple(np.shape(variable))}. Say what the layer's number shall be: "
                f"attributes={{'{old.path.split('/')[0]}/...': ...}}."
            )
        target.assign(np.asarray(variable))
    for old in model.variables:
        if id(old) not in index and tuple(by_path[old.path].shape) == tuple(old.shape):
            by_path[old.path].assign(np.asarray(old.value))
    return new
