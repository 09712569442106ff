"""What each primitive says of the axes that it reads and writes.

A rule is a function ``rule(walk, eqn, ins) -> outs``. It makes axes one (`Walk.unify`), takes them apart
(`_axes.factor`, `_axes.cut`), fixes their sizes (`Walk.freeze`), and gives the axes of each output. A primitive that
has no rule fixes whatever it touches.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jax.extend.core import JaxprEqn

from prunax._jaxprs import programs
from prunax.structured import _axes, _followers, _indices
from prunax.structured._axes import Axis, Incompatible
from prunax.structured._walk import Rule, Value, View, Walk, shape_of, unknown

__all__ = ["RULES", "reading"]

T = TypeVar("T")
Views = tuple[View, ...]

# Each element of the output depends on the elements of the inputs at the same place.
ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt
    ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc
    exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite layout_constraint le
    le_to lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg nextafter not optimization_barrier or
    polygamma population_count pow pvary random_fold_in real reduce_precision reshard
    regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh threefry2x32
    with_memory_space_constraint xor zeta
    """.split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor reduce".split()
)
# Every place along the axis has a meaning that depends on the places before it.
ALONG_AXIS = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
WINDOWS = frozenset("reduce_window reduce_window_max reduce_window_min reduce_window_sum".split())
SCATTERS = (
    " ".join(f"scatter-{kind} scatter_{kind}" for kind in ("add", "sub", "mul", "min", "max"))
    + " scatter"
)
# Add up, or compare, the same place on all devices; or pass it from one to the other.
COLLECTIVES = frozenset("psum psum2 psum_invariant pmax pmin ppermute pbroadcast pcast".split())

RULES: dict[str, Rule] = {}


def reading() -> Walk:
    """A reading of a program, by these rules."""
    return Walk(RULES, functools.partial(_indices.numbers, calls=programs.CALLS))


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _combine(walk: Walk, values: Sequence[Value]) -> Views:
    """Make axes of the same place one; scalars go with anything."""
    rank = max(len(value.views) for value in values)
    result: Views = ()
    for value in values:
        if len(value.views) == rank:
            result = tuple(map(walk.unify, result, value.views)) if result else value.views
    return result


@_rule(*ELEMENTWISE)
def _elementwise(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    if len(eqn.outvars) == len(ins) > 1 and eqn.primitive.name == "optimization_barrier":
        return [value.views for value in ins]
    return [_combine(walk, ins)] * len(eqn.outvars)


@_rule("device_put")
def _identities(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    return [value.views for value in ins]


@_rule(*programs.CALLS)
def _call(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> Sequence[Value]:
    return walk.call(programs.called(eqn), ins).outs


@_rule("shard_map")
def _shard_map(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """Axes that devices divide keep their size; the others are those of each device's program."""
    why, program = "divided among devices", programs.called(eqn)

    def divided(views: Views, spec: Sequence[Any], shape: Sequence[int]) -> Views:
        made = list(views)
        for d, names in enumerate(spec):
            if names is not None:
                walk.freeze([views[d]], why)
                made[d] = walk.frozen(shape[d], why)
        return tuple(made)

    inside = [
        Value(divided(value.views, spec, shape_of(var)), value.data)
        for value, spec, var in zip(
            ins, eqn.params["in_specs"], programs.opened(program).invars, strict=True
        )
    ]
    outs = walk.call(program, inside).outs
    return [
        Value(divided(value.views, spec, shape_of(var)), value.data)
        for value, spec, var in zip(outs, eqn.params["out_specs"], eqn.outvars, strict=True)
    ]


@_rule("scan")
def _scan(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Any]:
    """The body's carry has the same axes in every iteration; what is stacked has one more, that of the iterations."""
    n, carries = programs.scan_arity(eqn)
    m = n + carries
    why = "`scan` takes one step for each of its units"
    for value in ins[m:]:
        walk.freeze(value.views[:1], why)
    init = [Value(value.views, data=True) for value in ins[n:m]]
    slices = [Value(value.views[1:], value.data) for value in ins[m:]]
    outs = walk.call(eqn.params["jaxpr"], [*ins[:n], *init, *slices]).outs
    for before, after in zip(init, outs, strict=False):
        _combine(walk, [before, after])
    length = walk.frozen(eqn.params["length"], why)
    ys = [Value((length, *value.views), value.data) for value in outs[m - n :]]
    return [*init, *ys]


@_rule("while")
def _while(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Any]:
    """What goes round has the same axes in every turn."""
    of_test, of_body, carry = while_operands(eqn, ins)
    carry = [Value(value.views, data=True) for value in carry]
    walk.call(eqn.params["cond_jaxpr"], [*of_test, *carry])
    outs = walk.call(eqn.params["body_jaxpr"], [*of_body, *carry]).outs
    for before, after in zip(carry, outs, strict=True):
        _combine(walk, [before, after])
    return carry


def while_operands(eqn: JaxprEqn, ins: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
    """Operands of a `while`: constants of the test, constants of the body, and what goes round."""
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    return list(ins[:n]), list(ins[n : n + m]), list(ins[n + m :])


@_rule("custom_linear_solve")
def _custom_linear_solve(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Any]:
    product, _, solver, transposed, right = solve_operands(eqn, ins)
    jaxprs = eqn.params["jaxprs"]
    solutions = walk.call(jaxprs.solve, [*solver, *right]).outs
    unknowns = [Value(value.views, data=True) for value in solutions[: len(right)]]
    again = walk.call(jaxprs.matvec, [*product, *unknowns]).outs
    for value, other in zip(right, again, strict=True):
        _combine(walk, [value, other])
    if jaxprs.transpose_solve is not None:
        walk.call(jaxprs.transpose_solve, [*transposed, *unknowns])
    return list(solutions)


def solve_operands(eqn: JaxprEqn, ins: Sequence[T]) -> list[list[T]]:
    """Operands of a linear solve: constants of its four programs, then the right-hand sides."""
    ends = list(itertools.accumulate(eqn.params["const_lengths"], initial=0))
    return [list(ins[a:b]) for a, b in itertools.pairwise([*ends, len(ins)])]


@_rule("cond")
def _cond(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    branches = [walk.call(branch, ins[1:]).outs for branch in eqn.params["branches"]]
    return [_combine(walk, outs) for outs in zip(*branches, strict=True)]


@_rule("transpose")
def _transpose(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    return [tuple(ins[0].views[i] for i in eqn.params["permutation"])]


@_rule("broadcast_in_dim")
def _broadcast_in_dim(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    out = [View(Axis(n)) for n in eqn.params["shape"]]
    for view, i in zip(ins[0].views, eqn.params["broadcast_dimensions"], strict=True):
        if view.axis.size == out[i].axis.size:
            out[i] = view
    return [tuple(out)]


@_rule("tile")
def _tile(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    """Copies of an axis, one after the other."""
    pairs = zip(ins[0].views, eqn.params["reps"], strict=True)
    return [tuple(View(_axes.product([Axis(n), v.axis]), v.origins) for v, n in pairs)]


@_rule("squeeze")
def _squeeze(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    return [_without(ins[0].views, eqn.params["dimensions"])]


@_rule("expand_dims")
def _expand_dims(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    views = list(ins[0].views)
    for i in sorted(eqn.params["dimensions"]):
        views.insert(i, View(Axis(1)))
    return [tuple(views)]


@_rule("rev")
def _rev(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    views = list(ins[0].views)
    for i in eqn.params["dimensions"]:
        views[i] = walk.follower(views[i].axis, "reversed", mirrored=True)
    return [tuple(views)]


@_rule("iota")
def _iota(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    # The number of a unit stays what it was, so that this may shrink: see `evaluate`.
    return [tuple(View(Axis(n)) for n in eqn.params["shape"])]


@_rule("reshape")
def _reshape(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    views, sizes = ins[0].views, eqn.params["new_sizes"]
    why = "reshaped in a way that mixes its units with those of another axis"
    if 0 in sizes or eqn.params.get("dimensions") is not None:
        walk.freeze(views, why)
        return [tuple(walk.frozen(size, why) for size in sizes)]
    out: list[View] = []
    old = [view for view in views if view.axis.size != 1]
    new = [size for size in sizes if size != 1]
    while old:
        i, j = _shortest_equal([view.axis.size for view in old], new)
        group, origins = old[:i], frozenset().union(*(view.origins for view in old[:i]))
        try:
            made = _regroup([view.axis for view in group], new[:j])
        except Incompatible:
            walk.freeze(group, why)
            made = [walk.frozen(size, why).axis for size in new[:j]]
        out += [View(axis, origins) for axis in made]
        old, new = old[i:], new[j:]
    rest = iter(out)
    return [tuple(View(Axis(1)) if size == 1 else next(rest) for size in sizes)]


def _shortest_equal(a: Sequence[int], b: Sequence[int]) -> tuple[int, int]:
    """The shortest heads of two sequences that have the same product."""
    i = j = 1
    while (left := math.prod(a[:i])) != (right := math.prod(b[:j])):
        i, j = (i + 1, j) if left < right else (i, j + 1)
    return i, j


def _regroup(old: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Take axes apart until products of the pieces have the sizes wanted."""
    before = list(itertools.accumulate((axis.size for axis in old), initial=1, func=_mul))
    after = list(itertools.accumulate(sizes, initial=1, func=_mul))
    ends = sorted({*before, *after})
    if any(end % start for start, end in itertools.pairwise(ends)):
        raise Incompatible
    pieces = {}
    for axis, start, stop in zip(old, before, before[1:], strict=False):
        inner = [end for end in ends if start <= end <= stop]
        parts = _axes.factor(axis, [b // a for a, b in itertools.pairwise(inner)])
        pieces.update(zip(inner, parts, strict=False))
    return [
        _axes.product([pieces[end] for end in ends if start <= end < stop])
        for start, stop in itertools.pairwise(after)
    ]


def _mul(a: int, b: int) -> int:
    return a * b


@_rule("slice")
def _slice(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    ranges = zip(ins[0].views, starts, limits, strides, strict=True)
    return [tuple(_range(walk, view, *r) for view, *r in ranges)]


def _range(walk: Walk, view: View, start: int, stop: int, stride: int = 1) -> View:
    axis, reverse = _followers.unmirrored(walk.followers, view.axis)
    ranked = _followers.of(walk.followers, axis)
    at_an_end = (start == 0) != (stop == view.axis.size)
    if ranked and stride == 1 and at_an_end and ranked.last in (None, (start > 0) != reverse):
        # The first of what is sorted, or the last: as `top_k` takes.
        ranked.last = (start > 0) != reverse
        walk.least.append((ranked.source, stop - start, ranked.why))
        return walk.frozen(stop - start, "ranked")
    try:
        return View(_axes.strided(view.axis, start, stop, stride), view.origins)
    except Incompatible:
        why = "sliced elsewhere than between whole units"
        walk.freeze([view], why)
        return walk.frozen(len(range(start, stop, stride)), why)


@_rule("split")
def _split(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    views, axis = ins[0].views, eqn.params["axis"]
    ends = list(itertools.accumulate(map(int, eqn.params["sizes"]), initial=0))
    parts = [_range(walk, views[axis], a, b) for a, b in itertools.pairwise(ends)]
    return [(*views[:axis], part, *views[axis + 1 :]) for part in parts]


@_rule("concatenate")
def _concatenate(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    d = eqn.params["dimension"]
    views = list(_combine(walk, [Value(_replace(v.views, d, View(Axis(1)))) for v in ins]))
    origins = frozenset().union(*(value.views[d].origins for value in ins))
    views[d] = View(_axes.concatenation([value.views[d].axis for value in ins]), origins)
    return [tuple(views)]


@_rule("stack")
def _stack(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    views, axis = _combine(walk, ins), eqn.params["axis"]
    return [(*views[:axis], walk.frozen(len(ins), "stacked"), *views[axis:])]


@_rule("pad")
def _pad(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    out = []
    for view, (low, high, interior) in zip(ins[0].views, eqn.params["padding_config"], strict=True):
        if min(low, high) < 0 or interior:
            why = "padded between its units"
            walk.freeze([view], why)
            size = view.axis.size
            out.append(walk.frozen(size + low + high + max(size - 1, 0) * interior, why))
        else:
            whole = _axes.concatenation([Axis(low), view.axis, Axis(high)])
            out.append(View(whole, view.origins))
    return [tuple(out)]


@_rule(*REDUCTIONS)
def _reduce(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    gone = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    arrays = ins[: len(eqn.outvars)]
    return [_without(_combine(walk, arrays), gone)] * len(eqn.outvars)


@_rule("argmax", "argmin")
def _argmax(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    gone = eqn.params["axes"]
    if len(gone) == 1:
        walk.least.append((ins[0].views[gone[0]].axis, 1, walk.reason("its places are numbered")))
    else:
        walk.freeze([ins[0].views[i] for i in gone], "its places are numbered")
    return [_without(ins[0].views, gone)]


@_rule(*ALONG_AXIS)
def _along_axis(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    walk.freeze([ins[0].views[eqn.params["axis"]]], "accumulated from place to place")
    return [ins[0].views]


@_rule("sort")
def _sort(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    d = eqn.params["dimension"]
    # Of arrays that are reversed alike the same comes out, but for the order of equals.
    plain = [_followers.unmirrored(walk.followers, value.views[d].axis)[0] for value in ins]
    same = [Value(_replace(v.views, d, View(a))) for v, a in zip(ins, plain, strict=True)]
    views = _combine(walk, same)
    if eqn.params["num_keys"] != 1:
        walk.freeze([views[d]], "sorted")
        return [views] * len(ins)
    walk.least.append((views[d].axis, 1, walk.reason("sorted")))
    return [_replace(views, d, walk.follower(views[d].axis, "sorted", mirrored=False))] * len(ins)


@_rule("top_k", "approx_top_k")
def _top_k(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    views, axis = ins[0].views, choosing_axis(eqn)
    assert axis is not None
    k = shape_of(eqn.outvars[0])[axis]
    walk.least.append((views[axis].axis, k, walk.reason("its places are ranked")))
    return [_replace(views, axis, walk.frozen(k, "ranked"))] * len(eqn.outvars)


@_rule(*WINDOWS)
def _reduce_window(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    p, shape = eqn.params, shape_of(eqn.outvars[0])
    views = list(_combine(walk, ins[: len(eqn.outvars)]))
    for i, view in enumerate(views):
        same = p["window_dimensions"][i] == p["window_strides"][i] == p["base_dilation"][i] == 1
        if not same or tuple(p["padding"][i]) != (0, 0):
            walk.freeze([view], "a window moves along it")
            views[i] = walk.frozen(shape[i], "a window moves along it")
    return [tuple(views)] * len(eqn.outvars)


@_rule("select_and_scatter_add", "select_and_gather_add")
def _select_in_windows(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    """The derivatives of a maximum over windows."""
    p, shape = eqn.params, shape_of(eqn.outvars[0])
    views: list[View] = []
    for i, (a, b) in enumerate(zip(ins[0].views, ins[1].views, strict=True)):
        same = p["window_dimensions"][i] == p["window_strides"][i] == 1
        if same and tuple(p["padding"][i]) == (0, 0):
            views.append(walk.unify(a, b))
        else:
            walk.freeze([a, b], "a window moves along it")
            views.append(walk.frozen(shape[i], "a window moves along it"))
    return [tuple(views)]


@_rule("fft")
def _fft(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    transformed = len(eqn.params["fft_lengths"])
    views, shape = ins[0].views, shape_of(eqn.outvars[0])
    first = len(views) - transformed
    why = "Fourier-transformed"
    walk.freeze(views[first:], why)
    return [(*views[:first], *(walk.frozen(n, why) for n in shape[first:]))]


@_rule("cholesky", "eigh", "lu", "qr", "svd", "householder_product", "geqrf")
def _matrices(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    """The last axes of the first operand are a matrix, others are many of them."""
    views, why = ins[0].views, "a matrix is taken apart"
    many = views[:-2]
    walk.freeze(views[-2:], why)
    for value in ins[1:]:
        walk.freeze(value.views, why)
    shapes = map(shape_of, eqn.outvars)
    return [(*many, *(walk.frozen(n, why) for n in shape[len(many) :])) for shape in shapes]


@_rule("triangular_solve")
def _triangular_solve(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    matrix, right = (value.views for value in ins)
    many = tuple(map(walk.unify, matrix[:-2], right[:-2]))
    rows, columns = right[-2:]
    walk.freeze([*matrix[-2:], rows if eqn.params["left_side"] else columns], "a system is solved")
    return [(*many, rows, columns)]


@_rule(*COLLECTIVES)
def _collective(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    # Under `vmap` an axis goes by its number, and is gone afterwards.
    gone = [axis for axis in eqn.params.get("axes", ()) if isinstance(axis, int)]
    for value in ins:
        walk.freeze([value.views[i] for i in gone], "added up over examples")
    return [_without(value.views, gone) for value in ins]


@_rule("all_gather", "all_gather_invariant")
def _all_gather(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    at, views, why = (
        eqn.params["all_gather_dimension"],
        list(ins[0].views),
        "devices' parts in a row",
    )
    n = shape_of(eqn.outvars[0])[at]
    if eqn.params["tiled"]:
        walk.freeze([views[at]], why)
        views[at] = walk.frozen(n, why)
    else:
        views.insert(at, walk.frozen(n, why))
    return [tuple(views)]


@_rule("axis_index")
def _axis_index(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    return [()]


@_rule("dot_general")
def _dot_general(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    (left_in, right_in), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = (value.views for value in ins)
    batch = [walk.unify(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    for i, j in zip(left_in, right_in, strict=True):
        walk.unify(left[i], right[j])
    left_out = _without(left, (*left_in, *left_batch))
    right_out = _without(right, (*right_in, *right_batch))
    if ins[0].data and ins[1].data:
        walk.contracted += [left[i].axis for i in left_in]
    if not ins[1].data:
        walk.role([right[j] for j in right_in], "consumes")
        walk.role(right_out, "produces")
    if not ins[0].data:
        # A product of two weights, as in low-rank adapters: the left one comes first.
        walk.role([left[i] for i in left_in], "consumes" if ins[1].data else "produces")
        walk.role(left_out, "produces" if ins[1].data else "consumes")
    return [(*batch, *left_out, *right_out)]


@_rule("ragged_dot_general")
def _ragged_dot(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    """A product of rows with the weights of the group that they are in."""
    p = eqn.params["ragged_dot_dimension_numbers"]
    (left_in, right_in), (left_batch, right_batch) = p.dot_dimension_numbers
    left, right, sizes = (value.views for value in ins)
    (ragged,) = p.lhs_ragged_dimensions
    if ragged in (*left_in, *left_batch) or len(p.rhs_group_dimensions) != 1:
        return unknown(walk, eqn, ins)
    (group,) = p.rhs_group_dimensions
    walk.unify(right[group], sizes[-1])
    batch = [walk.unify(left[i], right[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    for i, j in zip(left_in, right_in, strict=True):
        walk.unify(left[i], right[j])
    right_out = _without(right, (*right_in, *right_batch, group))
    if not ins[1].data:
        walk.role([right[j] for j in (*right_in, group)], "consumes")
        walk.role(right_out, "produces")
    return [(*batch, *_without(left, (*left_in, *left_batch)), *right_out)]


@_rule("conv_general_dilated")
def _conv(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    p, shape = eqn.params, shape_of(eqn.outvars[0])
    (data, kernel), numbers = (value.views for value in ins), p["dimension_numbers"]
    (batch, channels, *places), (units, inputs, *windows) = numbers.lhs_spec, numbers.rhs_spec
    out_batch, out_units, *out_places = numbers.out_spec
    groups = p["feature_group_count"]
    if p["batch_group_count"] != 1:
        why = "a convolution groups the batch"
        walk.freeze([*data, *kernel], why)
        return [tuple(walk.frozen(size, why) for size in shape)]
    try:
        # The slow part of both channel axes are the groups. Depthwise: one channel a group.
        one, rest = _groups(data[channels], groups)
        other, _ = _groups(kernel[units], groups)
    except Incompatible:
        walk.freeze([data[channels], kernel[units]], "does not line up with a convolution's groups")
        one = other = rest = View(Axis(1))
    walk.unify(one, other)
    walk.unify(rest, kernel[inputs])
    if not ins[1].data:
        walk.role([kernel[inputs]], "consumes")
        if groups == 1 or kernel[inputs].axis.size > 1:
            walk.role([kernel[units]], "produces")
    out: list[Any] = [None] * len(shape)
    out[out_batch], out[out_units] = data[batch], kernel[units]
    for i, (place, window, out_place) in enumerate(zip(places, windows, out_places, strict=True)):
        walk.freeze([kernel[window]], "the window of a convolution")
        plain = p["window_strides"][i] == p["lhs_dilation"][i] == kernel[window].axis.size == 1
        if plain and tuple(p["padding"][i]) == (0, 0):
            out[out_place] = data[place]
        else:
            walk.freeze([data[place]], "a window moves along it")
            out[out_place] = walk.frozen(shape[out_place], "a window moves along it")
    return [tuple(out)]


def _groups(view: View, groups: int) -> tuple[View, View]:
    major, minor = _axes.factor(view.axis, [groups, view.axis.size // groups])
    return View(major, view.origins), View(minor, view.origins)


@_rule("gather")
def _gather(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    operand, indices = (value.views for value in ins)
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = shape_of(eqn.outvars[0])
    out: list[Any] = [None] * len(shape)
    whole, places = [], iter(numbers.offset_dims)
    for i, view in enumerate(operand):
        batching = i in numbers.operand_batching_dims
        # A slice of the whole length starts at 0, whatever the index says.
        kept = sizes[i] == view.axis.size and i not in numbers.collapsed_slice_dims
        if batching:
            n = numbers.operand_batching_dims.index(i)
            walk.unify(view, indices[numbers.start_indices_batching_dims[n]])
        elif not kept and not _is_tied(walk, view, i, ins[1], numbers.start_index_map):
            walk.freeze([view], "indexed")
        if not batching and i not in numbers.collapsed_slice_dims:
            out[next(places)] = view if kept else walk.frozen(sizes[i], "indexed")
            whole += [view] if kept else []
    if not ins[0].data:
        walk.role(whole, "produces")
        walk.role([view for view in operand if view not in whole], "consumes")
    walk.freeze(indices[-1:], "an index")
    batch = iter(indices[:-1])
    return [tuple(next(batch) if view is None else view for view in out)]


@_rule(*SCATTERS.split())
def _scatter(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    operand, indices, updates = (value.views for value in ins)
    numbers = eqn.params["dimension_numbers"]
    out, windows = list(operand), iter(numbers.update_window_dims)
    for i, view in enumerate(operand):
        if i in numbers.operand_batching_dims:
            n = numbers.operand_batching_dims.index(i)
            out[i] = walk.unify(view, indices[numbers.scatter_indices_batching_dims[n]])
        elif i in numbers.inserted_window_dims:
            if not _is_tied(walk, view, i, ins[1], numbers.scatter_dims_to_operand_dims):
                walk.freeze([view], "written to by index")
        else:
            out[i] = _overwrite(walk, view, updates[next(windows)])
    walk.freeze(indices[-1:], "an index")
    places = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
    for i, view in zip(places, indices[:-1], strict=True):
        walk.unify(updates[i], view)
    return [tuple(out)]


def _is_tied(walk: Walk, view: View, dim: int, index: Value, dims: Sequence[int]) -> bool:
    """Whether an axis is indexed by numbers of its own units, or of those of an axis that shrinks along."""
    if dim not in dims:
        return False
    depth = index.views[-1].axis.size
    owner = _indices.of_component(index, list(dims).index(dim), depth)
    if owner is None or owner.size != view.axis.size:
        return False
    walk.unify(view, View(owner))
    return True


def _overwrite(walk: Walk, view: View, update: View) -> View:
    """An axis whose whole length is written, from 0 on therefore, stays free; one written in part is frozen."""
    if view.axis.size == update.axis.size:
        return walk.unify(view, update)
    walk.freeze([view, update], "written to by index")
    return view


@_rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    out = []
    for view, size in zip(ins[0].views, eqn.params["slice_sizes"], strict=True):
        if size != view.axis.size:
            walk.freeze([view], "indexed")
            view = walk.frozen(size, "indexed")
        out.append(view)
    # A layer's weights out of a stack are weights, wherever the number comes from.
    return [Value(tuple(out), ins[0].data)]


@_rule("dynamic_update_slice")
def _dynamic_update_slice(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    pairs = zip(ins[0].views, ins[1].views, strict=True)
    return [tuple(_overwrite(walk, *pair) for pair in pairs)]


@_rule("random_bits")
def _random_bits(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    return [(*ins[0].views, *(View(Axis(n)) for n in eqn.params["shape"]))]


@_rule("random_seed", "random_wrap", "random_unwrap", "random_split", "random_clone")
def _random_keys(walk: Walk, eqn: JaxprEqn, ins: Sequence[Value]) -> list[Views]:
    for value in ins:
        walk.freeze(value.views, "random keys")
    shape = shape_of(eqn.outvars[0])
    return [tuple(walk.frozen(n, "random keys") for n in shape)]


def choosing_axis(eqn: JaxprEqn) -> int | None:
    """The axis along which an equation chooses, or ranks, units by number; None for other equations."""
    p, name = eqn.params, eqn.primitive.name
    if name in ("argmax", "argmin"):
        return p["axes"][0] if len(p["axes"]) == 1 else None
    if name == "sort":
        return p["dimension"]
    if name in ("top_k", "approx_top_k"):
        axis = p.get("axis", p.get("reduction_dimension", -1))
        return axis % len(shape_of(eqn.invars[0]))
    return None


def _without(views: Sequence[View], gone: Sequence[int]) -> Views:
    return tuple(view for i, view in enumerate(views) if i not in gone)


def _replace(views: Sequence[View], at: int, view: View) -> Views:
    return (*views[:at], view, *views[at + 1 :])
