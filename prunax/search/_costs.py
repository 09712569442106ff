"""What a weight costs: the unit that budgets count in."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from prunax import _jaxprs, trees
from prunax.structured import count_flops

__all__ = ["bytes_per_weight", "flops_per_weight"]

PyTree = Any
Cost = Callable[[str, Any], float]


def bytes_per_weight(path: str, leaf: Any) -> float:
    """Count the bytes that a weight takes: the cost for budgets in memory.

    Args:
        path: The leaf's path; it has no influence.
        leaf: An array.

    Returns:
        Bytes of one element.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.search.bytes_per_weight("kernel", jnp.ones((2, 3), jnp.bfloat16))
        2.0
    """
    del path
    return float(np.dtype(leaf.dtype).itemsize)


def flops_per_weight(
    fn: Callable[..., Any], params: PyTree, *args: Any, where: trees.Where | None = None
) -> Cost:
    """Count the floating-point operations that a weight takes part in: the cost for budgets in computation.

    A weight of a convolution meets every position of the image, one of a dense layer each example once, and one of an
    expert or a stack of layers its share only.

    Args:
        fn: ``fn(params, *args)``, any JAX function; its jaxpr is read, nothing is run.
        params: Pytree of arrays.
        *args: Example inputs, arrays or `jax.ShapeDtypeStruct`.
        where: ``where(path, leaf) -> bool`` chooses the leaves to count for; left out, the function's kernels.

    Returns:
        ``cost(path, leaf)``: operations for one weight, two for a multiplication and addition; 0 for other leaves.

    Raises:
        ValueError: Naming the leaves, if `where` chooses some that the function uses in a way that cannot be read.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.ones((4, 3))}
        >>> cost = prunax.search.flops_per_weight(lambda p, x: x @ p["kernel"], params, jnp.ones((5, 4)))
        >>> cost("kernel", params["kernel"])
        10.0
    """
    program = _jaxprs.trace(fn, params, *args, where=where)
    unread = [r.text for r in program.reasons.values() if r.kind != "looked up"]
    if where is not None and unread:
        raise ValueError(f"flops_per_weight: {'; '.join(unread)}. Leave them out with `where`.")
    totals = dict.fromkeys(program.selection.paths, 0.0)
    for product in program.products:
        totals[program.selection.paths[product.weight.leaf]] += _flops(program, product)
    per_weight = {
        path: totals[path] / max(math.prod(shape), 1) for path, shape in program.selection.shapes
    }
    return lambda path, leaf: per_weight.get(path, 0.0)


def _flops(program: _jaxprs.Program, product: _jaxprs.Product) -> float:
    """Of one product, in all turns of the loops that it stands in."""
    eqn = product.eqn
    avals = map(_jaxprs.aval, eqn.invars)
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
    turns = math.prod(program.shapes[product.activation].shape[: product.loops])
    return turns * count_flops(lambda _, *xs: _jaxprs.bind(eqn, xs), (), *operands)
