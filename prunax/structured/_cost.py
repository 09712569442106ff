"""What a function costs: floating-point operations, parameters, time."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr

from prunax import trees
from prunax._jaxprs import programs

__all__ = ["count_bytes", "count_cache_bytes", "count_flops", "count_parameters", "latency"]

PyTree = Any


def count_flops(fn: Callable[..., Any], params: PyTree, *args: Any) -> float:
    """Count the floating-point operations of matrix products and convolutions, two for a multiplication and addition.

    Everything else a network does costs little next to these. The count is of the program as written, the same on every
    backend, and nothing is compiled. A `while` loop counts for one pass, a branch for its dearest case.

    Args:
        fn: ``fn(params, *args)``.
        params: Pytree of arrays or of `jax.ShapeDtypeStruct`.
        *args: Example inputs.

    Returns:
        The number.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.structured.count_flops(lambda w, x: x @ w, jnp.ones((4, 3)), jnp.ones((2, 4)))
        48.0
    """
    return float(_count(programs.opened(programs.traced(fn, params, args).jaxpr)))


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, p = eqn.primitive.name, eqn.params
        shapes: list[Any] = [getattr(var.aval, "shape", ()) for var in (*eqn.invars, *eqn.outvars)]
        if name == "dot_general":
            contracted = p["dimension_numbers"][0][0]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in contracted)
        elif name == "conv_general_dilated":
            units = p["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1]) // max(shapes[1][units], 1)
        elif name == "ragged_dot_general":
            (contracted, _), _ = p["ragged_dot_dimension_numbers"].dot_dimension_numbers
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in contracted)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in p["branches"])
        else:
            inner = [x for x in p.values() if programs.is_program(x)]
            counts = [_count(programs.opened(x)) for x in inner]
            total += sum(counts) * (p["length"] if name == "scan" else 1)
    return total


def count_parameters(fn: Callable[..., Any], params: PyTree, *args: Any) -> float:
    """Count the elements of all arrays among the parameters.

    Args:
        fn: Not used; there so that every cost is called alike.
        params: Pytree of arrays.
        *args: Not used.

    Returns:
        The number.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.structured.count_parameters(None, {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)})
        15.0
    """
    del fn, args
    return float(sum(math.prod(x.shape) for x in jax.tree.leaves(params) if trees.is_array(x)))


def count_bytes(fn: Callable[..., Any], params: PyTree, *args: Any) -> float:
    """Count the bytes of all arrays among the parameters.

    Args:
        fn: Not used; there so that every cost is called alike.
        params: Pytree of arrays.
        *args: Not used.

    Returns:
        The number.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.structured.count_bytes(None, {"kernel": jnp.ones((4, 3), jnp.bfloat16)})
        24.0
    """
    del fn, args
    return _bytes(params)


def count_cache_bytes(fn: Callable[..., Any], params: PyTree, *args: Any) -> float:
    """Count the bytes of what a function returns besides its first output: a cache of keys and values.

    Args:
        fn: ``fn(params, *args) -> (output, cache, ...)``; only shapes are looked at.
        params: Pytree of arrays.
        *args: Example inputs.

    Returns:
        The number.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> fn = lambda params, x: (x @ params["out"], x @ params["key"])
        >>> params = {"out": jnp.ones((4, 3)), "key": jnp.ones((4, 2))}
        >>> prunax.structured.count_cache_bytes(fn, params, jnp.ones((5, 4)))
        40.0
    """
    _, *rest = jax.eval_shape(lambda params: fn(params, *args), params)
    return _bytes(rest)


def _bytes(tree: PyTree) -> float:
    arrays = [x for x in jax.tree.leaves(tree) if trees.is_array(x)]
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays))


def latency(fn: Callable[..., Any], params: PyTree, *args: Any, repeats: int = 20) -> float:
    """Measure the time of a call, compiled: the least of several, which the rest of the machine disturbs least.

    Args:
        fn: ``fn(params, *args)``.
        params: Pytree of arrays.
        *args: Inputs.
        repeats: Timed calls.

    Returns:
        Seconds, results ready on the device.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> prunax.structured.latency(lambda w, x: x @ w, jnp.ones((4, 3)), jnp.ones((2, 4)), repeats=1) > 0
        True
    """
    params, args = jax.tree.map(
        lambda x: jax.device_put(x) if trees.is_array(x) else x, (params, args)
    )
    compiled = jax.jit(fn)
    jax.block_until_ready(compiled(params, *args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, *args))
        times.append(time.perf_counter() - start)
    return min(times)
