"""What the experts of a mixture contribute, measured where a function adds their outputs up."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from prunax._jaxprs import programs
from prunax.structured import _axes
from prunax.structured._axes import Axis
from prunax.structured._groups import Analysis, AxisGroup, analyse
from prunax.structured._rules import REDUCTIONS, choosing_axis
from prunax.structured._walk import Step, Trace

__all__ = ["expert_importance"]

PyTree = Any


class _Sum(NamedTuple):
    """Over the tokens that an expert gets: norms of what it contributes, and how many they are, ``(experts,)``."""

    norms: Any
    tokens: Any


def expert_importance(
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    groups: Sequence[AxisGroup],
) -> dict[str, jax.Array]:
    r"""Score the experts of mixtures by what they add to the tokens that are sent to them.

    .. math:: S_j = \frac{1}{|X_j|} \sum_{x \in X_j} g_j(x) \, \lVert f_j(x) \rVert_2

    The function's program is read for the equation that adds up outputs of experts, all of them or those that `top_k`
    took: the terms of that sum are :math:`g_j(x) f_j(x)`, in whatever order the code multiplies. :math:`X_j` are the
    tokens with a term that is not zero. Experts in turns of a scan over stacked layers share a group, and one score.

    Args:
        fn: ``fn(params, batch)``, any JAX function.
        params: Pytree of arrays.
        batches: Inputs, all of one structure.
        groups: The groups of experts, from `axis_groups`: of more than one unit, not frozen.

    Returns:
        For each group, by `AxisGroup.name`, float32 ``(experts,)``, larger = keep: what `prune_channels` takes as
        ``scores``. An expert that got no token scores 0.

    Raises:
        ValueError: If there are no batches; if nothing in the function adds up over the units of a group.

    Examples:
        >>> import jax, jax.numpy as jnp, prunax
        >>> params = {"router": jnp.eye(2), "up": jnp.array([1.0, 3.0])[:, None, None] * jnp.eye(2)}
        >>> def fn(params, x):
        ...     chances = jax.nn.softmax(x @ params["router"])
        ...     hot = jax.nn.one_hot(jnp.argmax(chances, -1), 2) * chances
        ...     return jnp.einsum("te,ted->td", hot, jnp.einsum("ti,eid->ted", x, params["up"]))
        >>> x = 100.0 * jnp.eye(2)
        >>> experts = [g for g in prunax.structured.axis_groups(fn, params, x) if g.name == "router[1]"]
        >>> prunax.structured.expert_importance(fn, params, [x], experts)["router[1]"].tolist()
        [100.0, 300.0]

    References:
        Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, 2025, arXiv:2510.13999,
        equation 9.
    """
    sums: dict[str, _Sum] | None = None
    compiled: dict[Any, Callable[..., dict[str, _Sum]]] = {}
    for batch in batches:
        leaves, treedef = jax.tree.flatten((params, (batch,)))
        key = treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(batch))
        if key not in compiled:
            compiled[key] = _measure(fn, params, batch, groups)
        found = compiled[key](leaves)
        sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    if sums is None:
        raise ValueError(
            "expert_importance: there are no batches. Pass a list, or a fresh iterator."
        )
    return {name: s.norms / jnp.maximum(s.tokens, 1) for name, s in sums.items()}


def _measure(
    fn: Callable[..., Any], params: PyTree, batch: Any, groups: Sequence[AxisGroup]
) -> Callable[[Sequence[Any]], dict[str, _Sum]]:
    """A compiled function of the leaves of ``(params, (batch,))``."""
    analysis = analyse(fn, params, batch)
    arrays = programs.traced(fn, params, (batch,)).arrays
    of_group = {group.name: _atom(analysis, group) for group in groups}

    @jax.jit
    def run(values: Sequence[Any]) -> dict[str, _Sum]:
        reader = _Reader(frozenset(of_group.values()))
        _, found = reader.run(analysis.trace, values)
        return {name: found[atom] for name, atom in of_group.items() if atom in found}

    known = jax.eval_shape(run, [jax.tree.leaves((params, (batch,)))[i] for i in arrays])
    if missing := sorted(set(of_group) - set(known)):
        raise ValueError(
            f"expert_importance: nothing in the function adds up over the units of {missing[0]}, nor over those "
            f"of them that `top_k` takes. Leave the group out, or give prune_channels other scores for it."
        )
    return lambda leaves: run([leaves[i] for i in arrays])


def _atom(analysis: Analysis, group: AxisGroup) -> Axis:
    """The group's units in another reading of the function."""
    paths = [leaf.path for leaf in analysis.leaves]
    first = group.members[0]
    where = analysis.axes[paths.index(first.path)][first.axis]
    atoms = [atom for atom, position in _axes.locate(where) if position == first.position]
    if not atoms or atoms[0].size != group.size:
        raise ValueError(
            f"expert_importance: the function has no group {group.name} of {group.size} units. "
            f"Find the groups with this function."
        )
    return atoms[0]


Found = dict[Axis, _Sum]


class _Reader:
    """Evaluates a program, and looks at what it adds up over some atoms."""

    def __init__(
        self, atoms: frozenset[Axis], adapt: Callable[[Step, list[Any]], list[Any]] | None = None
    ) -> None:
        self.atoms = atoms
        self.adapt = adapt or (lambda step, outs: outs)
        self.tokens: set[Axis] = (
            set()
        )  # axes beside that of the experts where they are chosen among

    def run(self, trace: Trace, args: Sequence[Any]) -> tuple[list[Any], Found]:
        inner = trace.jaxpr.jaxpr
        env: dict[Any, Any] = dict(zip(inner.invars, args, strict=True))
        env.update(zip(inner.constvars, trace.jaxpr.consts, strict=True))
        found: Found = {}
        taken: dict[
            Axis, tuple[Axis, Any]
        ] = {}  # by the axis of those taken: of what, and their numbers

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else env[var]

        def note(new: Found) -> None:
            for atom, s in new.items():
                found[atom] = jax.tree.map(jnp.add, found[atom], s) if atom in found else s

        for step in trace.steps:
            eqn, operands = step.eqn, [read(var) for var in step.eqn.invars]
            if eqn.primitive.name in programs.CALLS:
                outs, inside = self.run(step.inner[0], operands)
                note(inside)
            elif eqn.primitive.name == "scan":
                outs, inside = self.scan(step, operands)
                note(inside)
            else:
                outs = self.adapt(step, list(programs.bind(eqn, operands)))
                if choosing_axis(eqn) is not None or eqn.primitive.name == "reduce_max":
                    beside = {_axes.find(axis) for axis in step.ins[0]}
                    if beside & self.atoms:
                        self.tokens |= beside - self.atoms
                if eqn.primitive.name == "top_k":
                    axis = eqn.params.get("axis", -1) % len(step.ins[0])
                    atom = _axes.find(step.ins[0][axis])
                    if atom in self.atoms:
                        numbers = jnp.moveaxis(outs[1], axis, 0)
                        taken[_axes.find(step.outs[0][axis])] = atom, numbers
                note(self.sums(step, operands, taken))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in inner.outvars], found

    def scan(self, step: Step, operands: Sequence[Any]) -> tuple[list[Any], Found]:
        n, m = programs.scan_arity(step.eqn)
        order: list[Axis] = []

        def body(carry: Any, xs: Any) -> Any:
            outs, found = self.run(step.inner[0], [*operands[:n], *carry, *xs])
            order[:] = list(found)
            return tuple(outs[:m]), (tuple(outs[m:]), list(found.values()))

        p = step.eqn.params
        carry, (ys, sums) = lax.scan(
            body,
            tuple(operands[n : n + m]),
            tuple(operands[n + m :]),
            length=p["length"],
            reverse=p["reverse"],
        )
        totals = [jax.tree.map(lambda x: x.sum(0), s) for s in sums]
        return [*carry, *ys], dict(zip(order, totals, strict=True))

    def sums(
        self, step: Step, operands: Sequence[Any], taken: dict[Axis, tuple[Axis, Any]]
    ) -> Found:
        """The terms of an equation that adds up over experts, or over those that were taken."""
        wanted = {*self.atoms, *taken}
        for axis, terms in _terms(step, operands, wanted):
            features = [
                d
                for d, a in enumerate(step.outs[0])
                if a.size > 1 and _axes.find(a) not in wanted | self.tokens
            ]
            if not features:
                continue  # the sum of a softmax, or of router weights
            square = jnp.square(terms.astype(jnp.float32))
            norms = jnp.sqrt(jnp.sum(square, [d + 1 for d in features]))
            if axis in self.atoms:
                rest = tuple(range(1, norms.ndim))
                return {axis: _Sum(norms.sum(rest), (norms > 0).sum(rest))}
            atom, numbers = taken[axis]
            if numbers.size == norms.size:
                numbers, norms = numbers.reshape(-1), norms.reshape(-1)
                zeros = jnp.zeros(atom.size)
                return {atom: _Sum(zeros.at[numbers].add(norms), zeros.at[numbers].add(1.0))}
        return {}


def never_chosen(
    fn: Callable[[PyTree], Any], params: PyTree, groups: Sequence[AxisGroup], open_: dict[str, Any]
) -> Any:
    """Evaluate a function of params with some experts closed: their logits are minus infinity.

    Args:
        fn: ``fn(params)``.
        params: Pytree of arrays, which may be traced.
        groups: Groups of experts, of this or another function of these params.
        open_: For each, by name, a boolean ``(experts,)``, which may be traced.

    Returns:
        What the function returns.
    """
    analysis = analyse(fn, params)
    gates = {_atom(analysis, group): open_[group.name] for group in groups}
    beside = {atom: _beside(analysis.trace, atom) for atom in gates}

    def adapt(step: Step, outs: list[Any]) -> list[Any]:
        if step.eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
            return outs
        where = [_axes.find(axis) for axis in step.outs[0]]
        for atom, gate in gates.items():
            # A router's product: it makes the axis of the experts, and has no other but those of the tokens.
            made = not all(atom in map(_axes.find, operand) for operand in step.ins)
            others = {a for a in where if a is not atom and a.size > 1}
            if where.count(atom) == 1 and made and others <= beside[atom]:
                shape = [-1 if a is atom else 1 for a in where]
                outs = [jnp.where(gate.reshape(shape), outs[0], -jnp.inf)]
        return outs

    traced = programs.traced(fn, params, ())
    leaves = jax.tree.leaves((params, ()))
    reader = _Reader(frozenset(gates), adapt)
    outs, _ = reader.run(analysis.trace, [leaves[i] for i in traced.arrays])
    return analysis.outputs.unflatten(outs)


def _beside(trace: Trace, atom: Axis) -> set[Axis]:
    """The axes beside that of the experts where some are chosen: those of the tokens."""
    found: set[Axis] = set()
    for step in trace.steps:
        for inner in step.inner:
            found |= _beside(inner, atom)
        if choosing_axis(step.eqn) is not None:
            here = {_axes.find(axis) for axis in step.ins[0]}
            found |= here - {atom} if atom in here else set()
    return found


def _terms(step: Step, operands: Sequence[Any], wanted: set[Axis]) -> list[tuple[Axis, Any]]:
    """The axes that an equation adds up over, of those wanted, with what it adds: that axis first."""
    eqn = step.eqn
    if eqn.primitive.name == "reduce_sum" and eqn.primitive.name in REDUCTIONS:
        gone = eqn.params["axes"]
        found = []
        for d in gone:
            if (axis := _axes.find(step.ins[0][d])) in wanted:
                moved = jnp.moveaxis(operands[0], d, 0)
                others = [i + (i < d) for i in gone if i != d]
                found.append((axis, moved.sum(tuple(others)) if others else moved))
        return found
    if eqn.primitive.name != "dot_general":
        return []
    (left, right), _ = eqn.params["dimension_numbers"]
    return [
        (_axes.find(step.ins[0][i]), _one_by_one(eqn, operands, i, j))
        for i, j in zip(left, right, strict=True)
        if _axes.find(step.ins[0][i]) in wanted
    ]


def _one_by_one(eqn: JaxprEqn, operands: Sequence[Any], i: int, j: int) -> Any:
    """A product for each place along a contracted axis."""

    def product(a: Any, b: Any) -> Any:
        return eqn.primitive.bind(jnp.expand_dims(a, i), jnp.expand_dims(b, j), **eqn.params)

    return jax.vmap(functools.partial(product), in_axes=(i, j))(*operands)
