"""Evaluate a walked jaxpr with some of its axes shorter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from prunax._jaxprs import programs
from prunax.structured import _axes, _followers
from prunax.structured._axes import Axis, Incompatible
from prunax.structured._rules import (
    SCATTERS,
    choosing_axis,
    reading,
    solve_operands,
    while_operands,
)
from prunax.structured._walk import Step, Trace, Value, View, walk

__all__: list[str] = []

Keep = Mapping[Axis, np.ndarray]


def evaluate(trace: Trace, keep: Keep, args: Sequence[Any]) -> list[Any]:
    """Run a program on smaller arrays.

    Args:
        trace: The walked program.
        keep: For each atom that shrinks the units that are left, increasing.
        args: The program's inputs, already smaller.

    Returns:
        Its outputs, smaller where their axes are.
    """
    env: dict[Any, Any] = dict(zip(trace.jaxpr.jaxpr.invars, args, strict=True))
    for var, x, where in zip(
        trace.jaxpr.jaxpr.constvars, trace.jaxpr.consts, trace.consts, strict=True
    ):
        env[var] = take(x, where, keep)

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    for step in trace.steps:
        outs = _step(step, keep, [read(var) for var in step.eqn.invars])
        env.update(zip(step.eqn.outvars, outs, strict=True))
    return [read(var) for var in trace.jaxpr.jaxpr.outvars]


def take(x: Any, where: Sequence[Axis], keep: Keep) -> Any:
    """Take what is left of an array of full size."""
    for i, axis in enumerate(where):
        kept = _axes.kept_indices(axis, keep)
        if kept is not None:
            x = jnp.take(x, kept, axis=i, unique_indices=True, indices_are_sorted=True)
    return x


def _shape(where: Sequence[Axis], keep: Keep) -> tuple[int, ...]:
    kept = [(axis, _axes.kept_indices(axis, keep)) for axis in where]
    return tuple(axis.size if indices is None else len(indices) for axis, indices in kept)


def _changes(step: Step, keep: Keep) -> bool:
    """Whether any array within an equation gets smaller."""
    arrays = (*step.ins, *step.outs)
    here = any(atom in keep for where in arrays for axis in where for atom in _axes.atoms(axis))
    return here or any(_changes(inner, keep) for trace in step.inner for inner in trace.steps)


def _step(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    eqn = step.eqn
    if not _changes(step, keep):
        return programs.bind(eqn, args)
    if eqn.primitive.name in programs.CALLS:
        return _call(step, keep, args)
    if eqn.primitive.name in _WHOLE:
        return _WHOLE[eqn.primitive.name](step, keep, args)
    adapt = _PARAMS.get(eqn.primitive.name)
    params = dict(eqn.params) | (adapt(step, keep) if adapt else {})
    out = eqn.primitive.bind(*args, **params)
    return out if eqn.primitive.multiple_results else [out]


def keep_of_axes(
    kept: Iterable[tuple[Axis, np.ndarray | None]], followers: Sequence[_followers.Follower]
) -> dict[Axis, np.ndarray]:
    """From indices along axes to units of atoms.

    Args:
        kept: Axes, with the indices that are left of each; None where all are.
        followers: Axes of the program that are others in another order.

    Returns:
        For each atom that shrinks the units that are left.

    Raises:
        Incompatible: If a unit is kept in one place and removed in another.
    """
    keep: dict[Axis, np.ndarray] = {}
    kept = list(kept)
    for axis, indices in kept:
        if indices is not None:
            left = np.zeros(axis.size, bool)
            left[indices] = True
            for atom, position in _axes.locate(axis):
                # A copy may be gone because another factor of the same product shrinks.
                units = np.flatnonzero(left[position.indices(atom.size)].any(1))
                if len(units) < atom.size:
                    keep.setdefault(atom, units)
    _followers.extend(followers, keep)
    for axis, indices in kept:
        found = _axes.kept_indices(axis, keep)
        if found is None and indices is None:
            continue
        every = np.arange(axis.size)
        left, right = (every if x is None else x for x in (found, indices))
        if not np.array_equal(left, right):
            raise Incompatible
    return keep


# Inner programs.


def _call(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    inner, name, params = step.inner[0], step.eqn.primitive.name, step.eqn.params

    def run(*xs: Any) -> tuple[Any, ...]:
        return tuple(evaluate(inner, keep, xs))

    if name.startswith("custom_jvp"):
        return _custom_jvp(run, step, keep)(*args)
    if name.startswith("custom_vjp"):
        return _custom_vjp(run, step, keep)(*args)
    if "policy" in params:
        again = params["prevent_cse"]
        return jax.checkpoint(run, policy=params["policy"], prevent_cse=again)(*args)
    return run(*args)


def _custom_jvp(run: Callable[..., Any], step: Step, keep: Keep) -> Callable[..., Any]:
    """A function with its own derivative: the rule is traced at full size, and made smaller as all else."""
    moving = [i for i, var in enumerate(step.eqn.invars) if _is_float(var)]
    smooth = [i for i, var in enumerate(step.eqn.outvars) if _is_float(var)]

    def derivative(*args: Any) -> list[Any]:
        primals, tangents = args[: len(step.ins)], args[len(step.ins) :]
        dense = _of_some(step.eqn, primals, moving, smooth)
        return jax.jvp(dense, [primals[i] for i in moving], list(tangents))[1]

    small = jax.custom_jvp(run)

    @small.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        invars = step.eqn.invars
        avals = [var.aval for var in (*invars, *(invars[i] for i in moving))]
        where = [*step.ins, *(step.ins[i] for i in moving)]
        moved = iter(
            _at_small_size(derivative, avals, where, keep)(*primals, *(tangents[i] for i in moving))
        )
        outs = small(*primals)
        return outs, tuple(
            next(moved) if i in smooth else np.zeros(out.shape, jax.dtypes.float0)
            for i, out in enumerate(outs)
        )

    return small


def _custom_vjp(run: Callable[..., Any], step: Step, keep: Keep) -> Callable[..., Any]:
    """The same in reverse mode. The backward pass repeats the forward pass."""
    moving = [i for i, var in enumerate(step.eqn.invars) if _is_float(var)]
    smooth = [i for i, var in enumerate(step.eqn.outvars) if _is_float(var)]

    def gradient(*args: Any) -> list[Any]:
        primals, cotangents = args[: len(step.ins)], args[len(step.ins) :]
        dense = _of_some(step.eqn, primals, moving, smooth)
        return jax.vjp(dense, *(primals[i] for i in moving))[1](list(cotangents))

    small = jax.custom_vjp(run)

    def forward(*args: Any) -> Any:
        return small(*args), args

    def backward(args: Any, cotangents: Any) -> Any:
        avals = [var.aval for var in (*step.eqn.invars, *(step.eqn.outvars[i] for i in smooth))]
        where = [*step.ins, *(step.outs[i] for i in smooth)]
        grads = iter(
            _at_small_size(gradient, avals, where, keep)(*args, *(cotangents[i] for i in smooth))
        )
        return tuple(next(grads) if i in moving else None for i in range(len(args)))

    small.defvjp(forward, backward)
    return small


def _of_some(
    eqn: JaxprEqn, args: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int]
) -> Callable[..., list[Any]]:
    """An equation as a function of its floating-point inputs, to its floating-point outputs."""

    def dense(*xs: Any) -> list[Any]:
        whole = list(args)
        for i, x in zip(inputs, xs, strict=True):
            whole[i] = x
        outs = programs.bind(eqn, whole)
        return [outs[i] for i in outputs]

    return dense


def _is_float(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _at_small_size(
    function: Callable[..., Any], avals: Sequence[Any], where: Sequence[Sequence[Axis]], keep: Keep
) -> Callable[..., Any]:
    """Trace a function at full size, and evaluate it at the smaller one."""
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    jaxpr = jax.make_jaxpr(function)(*shapes)
    values = [Value(tuple(View(Axis(n)) for n in shape.shape), data=True) for shape in shapes]
    state = reading()
    trace = walk(state, jaxpr, values)
    kept = [
        (new, _axes.kept_indices(old, keep))
        for value, olds in zip(values, where, strict=True)
        for new, old in zip(value.axes, olds, strict=True)
    ]
    small_keep = keep_of_axes(kept, state.followers)
    return lambda *args: evaluate(trace, small_keep, args)


def _shard_map(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    p = step.eqn.params
    manual = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
    return jax.shard_map(
        lambda *xs: tuple(evaluate(step.inner[0], keep, xs)),
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=tuple(p["out_specs"]),
        axis_names=set(manual),
        check_vma=p["check_vma"],
    )(*args)


def _scan(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    p = step.eqn.params
    n, carries = programs.scan_arity(step.eqn)
    m = n + carries

    def body(carry: Any, xs: Any) -> Any:
        outs = evaluate(step.inner[0], keep, [*args[:n], *carry, *xs])
        return tuple(outs[: m - n]), tuple(outs[m - n :])

    carry, ys = lax.scan(
        body,
        tuple(args[n:m]),
        tuple(args[m:]),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys]


def _cond(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    def run(trace: Trace) -> Callable[..., Any]:
        return lambda *xs: tuple(evaluate(trace, keep, xs))

    index = jnp.asarray(args[0]).astype(jnp.int32)
    return lax.switch(index, [run(branch) for branch in step.inner], *args[1:])


def _while(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    test, body = step.inner
    of_test, of_body, carry = while_operands(step.eqn, args)
    return lax.while_loop(
        lambda carry: evaluate(test, keep, [*of_test, *carry])[0],
        lambda carry: tuple(evaluate(body, keep, [*of_body, *carry])),
        tuple(carry),
    )


def _custom_linear_solve(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    solver, product, *transposed = step.inner
    of_product, _, of_solver, of_transposed, right = solve_operands(step.eqn, args)

    def solving(program: Trace, constants: Sequence[Any]) -> Callable[..., Any]:
        def solve(_: Any, right: Sequence[Any]) -> Any:
            outs = evaluate(program, keep, [*constants, *right])
            return tuple(outs[: len(right)]), tuple(outs[len(right) :])

        return solve

    solution, others = lax.custom_linear_solve(
        lambda xs: tuple(evaluate(product, keep, [*of_product, *xs])),
        tuple(right),
        solving(solver, of_solver),
        transpose_solve=solving(transposed[0], of_transposed) if transposed else None,
        has_aux=True,
    )
    return [*solution, *others]


# Primitives whose parameters hold sizes.


def _iota(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    """Units keep their numbers."""
    p, shape = step.eqn.params, _shape(step.outs[0], keep)
    kept = _axes.kept_indices(step.outs[0][p["dimension"]], keep)
    numbers = np.arange(p["shape"][p["dimension"]]) if kept is None else kept
    return [lax.broadcast_in_dim(jnp.asarray(numbers.astype(p["dtype"])), shape, (p["dimension"],))]


def _slice(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    p, (x,) = step.eqn.params, args
    strides = p["strides"] or (1,) * x.ndim
    for i, axis in enumerate(step.ins[0]):
        wanted = np.arange(p["start_indices"][i], p["limit_indices"][i], strides[i])
        kept = _axes.kept_indices(axis, keep)
        if kept is not None:
            wanted = np.flatnonzero(np.isin(kept, wanted))
        gaps = np.unique(np.diff(wanted))
        if len(gaps) > 1:
            x = jnp.take(x, wanted, axis=i)
        elif len(wanted) < x.shape[i]:
            start, stop = (wanted[0], wanted[-1] + 1) if len(wanted) else (0, 0)
            x = lax.slice_in_dim(x, int(start), int(stop), int(gaps[0]) if len(gaps) else 1, i)
    return [x]


def _tile(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    sizes = zip(_shape(step.outs[0], keep), args[0].shape, strict=True)
    return [jnp.tile(args[0], [whole // max(part, 1) for whole, part in sizes])]


def _chosen(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    """Units are chosen among those that are left, by the numbers that they had."""
    outs = list(programs.bind(step.eqn, args))
    axis = choosing_axis(step.eqn)
    assert axis is not None
    kept = _axes.kept_indices(step.ins[0][axis], keep)
    if kept is not None:
        outs[-1] = jnp.asarray(kept, outs[-1].dtype)[outs[-1]]
    return outs


def _gather(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    p, small = step.eqn.params, _shape(step.ins[0], keep)
    sizes = zip(p["slice_sizes"], step.ins[0], small, strict=True)
    slice_sizes = tuple(s if size == axis.size else size for size, axis, s in sizes)
    numbers = p["dimension_numbers"]
    gone = numbers.collapsed_slice_dims
    index = _translated(step, keep, args[1], numbers.start_index_map, gone)
    params = p | {"slice_sizes": slice_sizes}
    return [step.eqn.primitive.bind(args[0], index, **params)]


def _scatter(step: Step, keep: Keep, args: Sequence[Any]) -> Sequence[Any]:
    numbers = step.eqn.params["dimension_numbers"]
    dims = numbers.scatter_dims_to_operand_dims
    index = _translated(step, keep, args[1], dims, numbers.inserted_window_dims)
    return [step.eqn.primitive.bind(args[0], index, args[2], **step.eqn.params)]


def _translated(
    step: Step, keep: Keep, index: Any, dims: Sequence[int], single: Sequence[int]
) -> Any:
    """Numbers of units to places among those that are left; of others to a place beyond the last."""
    columns = []
    for n, dim in enumerate(dims):
        column, axis = index[..., n], step.ins[0][dim]
        kept = _axes.kept_indices(axis, keep) if dim in single else None
        if kept is not None:
            places = np.full(axis.size + 1, len(kept))
            places[kept] = np.arange(len(kept))
            inside = (column >= 0) & (column < axis.size)
            column = jnp.asarray(places, index.dtype)[jnp.where(inside, column, axis.size)]
        columns.append(column)
    return jnp.stack(columns, -1) if columns else index


_WHOLE = {
    "top_k": _chosen,
    "approx_top_k": _chosen,
    "argmax": _chosen,
    "argmin": _chosen,
    "gather": _gather,
    **dict.fromkeys(SCATTERS.split(), _scatter),
    "scan": _scan,
    "shard_map": _shard_map,
    "cond": _cond,
    "while": _while,
    "custom_linear_solve": _custom_linear_solve,
    "iota": _iota,
    "slice": _slice,
    "tile": _tile,
}


def _random_bits(step: Step, keep: Keep) -> dict[str, Any]:
    # Fewer random numbers, not the same ones at the places that are left.
    return {"shape": _shape(step.outs[0], keep)[len(step.ins[0]) :]}


def _split(step: Step, keep: Keep) -> dict[str, Any]:
    axis = step.eqn.params["axis"]
    return {"sizes": tuple(_shape(where, keep)[axis] for where in step.outs)}


def _pad(step: Step, keep: Keep) -> dict[str, Any]:
    config = []
    pads = step.eqn.params["padding_config"]
    for pad, small, whole in zip(pads, step.ins[0], step.outs[0], strict=True):
        kept = _axes.kept_indices(whole, keep)
        if kept is not None:
            low = int(np.sum(kept < pad[0]))
            pad = (low, int(np.sum(kept >= pad[0] + small.size)), 0)
        config.append(pad)
    return {"padding_config": tuple(config)}


def _conv(step: Step, keep: Keep) -> dict[str, Any]:
    numbers = step.eqn.params["dimension_numbers"]
    channels = _shape(step.ins[0], keep)[numbers.lhs_spec[1]]
    return {"feature_group_count": channels // _shape(step.ins[1], keep)[numbers.rhs_spec[1]]}


_PARAMS: dict[str, Callable[[Step, Keep], dict[str, Any]]] = {
    "broadcast_in_dim": lambda step, keep: {"shape": _shape(step.outs[0], keep)},
    "reshape": lambda step, keep: {"new_sizes": _shape(step.outs[0], keep)},
    "dynamic_slice": lambda step, keep: {"slice_sizes": _shape(step.outs[0], keep)},
    "random_bits": _random_bits,
    "split": _split,
    "pad": _pad,
    "conv_general_dilated": _conv,
}
