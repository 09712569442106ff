"""Residual branches: additions ``x + f(x)`` in a function's program whose f has parameters of its own."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import (
    Jaxpr,
    JaxprEqn,
    Literal,
)

from prunax import trees
from prunax._jaxprs import programs
from prunax.structured._omission import Need, Omission, Place, part, prefixes
from prunax.structured._rules import shape_of
from prunax.structured._walk import source_line

__all__ = ["Branch", "branches"]

PyTree = Any

# Move elements about, or change their type: what comes out is still the stream.
_SAME_STREAM = frozenset(
    "convert_element_type copy copy_p name optimization_barrier pvary reduce_precision reshape sharding_constraint "
    "squeeze transpose".split()
)


@dataclass(frozen=True)
class Branch:
    """One residual addition ``x + f(x)``, which can be left out so that x passes.

    Attributes:
        name: The common path of the leaves that go with it, ``layers/3/mlp``; where branches share that, with what sets
            them apart, ``layers/3/fc1+fc2+norm2``. One turn of a `scan` over stacked layers: ``layers/mlp[3]``.
        leaves: Paths of the parameters that nothing else uses; of a stack ``layers/mlp/kernel[3]``, its row.
        source: ``file:line`` of the addition.
    """

    name: str
    leaves: tuple[str, ...]
    source: str
    place: Place = field(repr=False)
    omission: Omission = field(repr=False)


class Residuals(NamedTuple):
    """A function's program with its residual additions.

    Attributes:
        traced: The program.
        paths: Of the leaves of the params that are arrays: its first inputs.
        branches: The branches, in the order of the program.
        opened: The calls and loops that they are in.
        shared: Leaves that several additions use, and nothing else.
    """

    traced: programs.Traced
    paths: tuple[str, ...]
    branches: tuple[Branch, ...]
    opened: frozenset[Place]
    shared: frozenset[str]


def branches(fn: Callable[..., Any], params: PyTree, *args: Any) -> tuple[Branch, ...]:
    """Find the residual branches of a function: every addition ``x + f(x)`` whose f owns parameters.

    The jaxpr is read; no layer is known by name. Layers that run under `jax.lax.scan` over stacked parameters have a
    branch for each turn. An addition whose parameters something else uses as well is no branch.

    Args:
        fn: ``fn(params, *args)``, any JAX function.
        params: Pytree of arrays, or of `jax.ShapeDtypeStruct`.
        *args: Example inputs; only shapes and dtypes are looked at.

    Returns:
        The branches, in the order of the program.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = [{"up": jnp.ones((2, 4)), "down": jnp.ones((4, 2))} for _ in range(2)]
        >>> def fn(params, x):
        ...     for p in params:
        ...         x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        ...     return x
        >>> [(b.name, b.leaves) for b in prunax.structured.branches(fn, params, jnp.ones((1, 2)))]
        [('0', ('0/down', '0/up')), ('1', ('1/down', '1/up'))]

    References:
        Veit et al., Residual Networks Behave Like Ensembles of Relatively Shallow Networks, 2016, arXiv:1605.06431.
    """
    return residuals(fn, params, args).branches


def residuals(fn: Callable[..., Any], params: PyTree, args: tuple[Any, ...]) -> Residuals:
    """Trace a function and find its residual branches."""
    traced = programs.traced(fn, params, args)
    every_path = trees.paths(params)
    paths = tuple(every_path[i] for i in traced.arrays if i < len(every_path))
    additions = list(_additions(traced.jaxpr, ()))
    opened = prefixes([a.place for a in additions])

    found: list[tuple[_Addition, Omission, tuple[str, ...], int | None]] = []
    levels = _Levels(traced.jaxpr, len(paths))
    for addition in additions:
        for loop, length in (*addition.loops, (None, 1)):  # noqa: B007 - used when it breaks
            leaves = tuple(paths[i] for i in levels.freed(addition, loop))
            if leaves:
                break
        else:
            continue
        if loop is None:
            found.append((addition, Omission(addition.kept), leaves, None))
        else:
            found += [
                (addition, Omission(addition.kept, loop, frozenset([turn])), leaves, turn)
                for turn in range(length)
            ]
    together = {a.place: Omission(a.kept) for a in additions}
    whole, left = (
        part(traced.jaxpr, omissions, opened).needs[: len(paths)] for omissions in ({}, together)
    )
    owned = {leaf for *_, leaves, _ in found for leaf in leaves}
    shared = set(_fewer(paths, whole, left)) - owned
    return Residuals(traced, paths, _named(found), opened, frozenset(shared))


def _fewer(paths: Sequence[str], before: Sequence[Need], after: Sequence[Need]) -> tuple[str, ...]:
    """The leaves of which less is needed than before."""
    triples = zip(paths, before, after, strict=True)
    return tuple(path for path, a, b in triples if np.any(a) and not np.array_equal(a, b))


class _Addition(NamedTuple):
    """A residual addition.

    Attributes:
        place: Where it is.
        kept: The operand that stays.
        loops: Place and length of each loop that it is in, the outermost first.
        source: Its line.
    """

    place: Place
    kept: int
    loops: tuple[tuple[Place, int], ...]
    source: str


def _additions(
    program: programs.ClosedJaxpr, place: Place, loops: tuple[tuple[Place, int], ...] = ()
) -> Iterator[_Addition]:
    """Additions of which one operand depends on the other, or on what that is a sum of."""
    inner = program.jaxpr
    number = {var: n for n, var in enumerate(_summed(inner))}
    depends: dict[Any, int] = {}  # of each value, a bit for each summand that it depends on
    stream: dict[Any, int] = {var: 1 << n for var, n in number.items()}  # that it is a sum of

    for n, eqn in enumerate(inner.eqns):
        name, here = eqn.primitive.name, (*place, n)
        operands = [var for var in eqn.invars if not isinstance(var, Literal)]
        if name in programs.CALLS and not name.startswith("custom"):
            yield from _additions(programs.called(eqn), here, loops)
        elif name == "scan":
            within = (*loops, (here, eqn.params["length"]))
            yield from _additions(eqn.params["jaxpr"], here, within)
        behind = made_of = 0
        for var in operands:
            behind |= depends.get(var, 0) | (1 << number[var] if var in number else 0)
        if _is_sum(eqn):
            for kept in (0, 1):
                if stream[operands[kept]] & depends.get(operands[1 - kept], 0):
                    yield _Addition(here, kept, loops, source_line(eqn))
                    break
            made_of = stream[operands[0]] | stream[operands[1]]
        elif name in _SAME_STREAM and len(operands) == 1:
            made_of = stream.get(operands[0], 0)
        for var in eqn.outvars:
            depends[var] = behind
            if made_of:
                stream[var] = stream.get(var, 0) | made_of


def _is_sum(eqn: JaxprEqn) -> bool:
    operands = [var for var in eqn.invars if not isinstance(var, Literal)]
    of_two = len(operands) == 2 and operands[0] is not operands[1]
    return eqn.primitive.name in ("add", "add_any") and of_two and bool(shape_of(eqn.outvars[0]))


def _summed(inner: Jaxpr) -> dict[Any, None]:
    """The values that are added to others, and what those are under another shape or type."""
    found: dict[Any, None] = {}
    for eqn in reversed(inner.eqns):
        if _is_sum(eqn) or (eqn.primitive.name in _SAME_STREAM and eqn.outvars[0] in found):
            found.update((var, None) for var in eqn.invars if not isinstance(var, Literal))
    return found


class _Uses:
    """Who uses which value of a program, as far as its outputs need it."""

    def __init__(self, inner: Jaxpr) -> None:
        self.inner = inner
        self.counts: Counter[Any] = Counter(v for v in inner.outvars if not isinstance(v, Literal))
        self.made_by: dict[Any, JaxprEqn] = {}
        for eqn in reversed(inner.eqns):
            self.made_by.update((var, eqn) for var in eqn.outvars)
            if eqn.effects or any(self.counts[var] for var in eqn.outvars):
                self.counts.update(v for v in eqn.invars if not isinstance(v, Literal))

    def freed(self, values: Sequence[Any]) -> list[int]:
        """The inputs that nothing uses any more when values are used once less each."""
        gone: Counter[Any] = Counter()
        number = {var: n for n, var in enumerate(self.inner.invars)}
        freed, left = [], [v for v in values if not isinstance(v, Literal)]
        while left:
            var = left.pop()
            gone[var] += 1
            if gone[var] < self.counts[var]:
                continue
            if var in number:
                freed.append(number[var])
            elif var in self.made_by:
                eqn = self.made_by[var]
                used = any(gone[v] < self.counts[v] for v in eqn.outvars)
                if not used and not eqn.effects:
                    left += [v for v in eqn.invars if not isinstance(v, Literal)]
        return freed


class _Levels:
    """What becomes free in a program, and in those around it, when an addition is left out."""

    def __init__(self, program: programs.ClosedJaxpr, leaves: int) -> None:
        self.program, self.leaves = program, leaves
        self.known: dict[int, _Uses] = {}

    def uses(self, inner: Jaxpr) -> _Uses:
        if id(inner) not in self.known:
            self.known[id(inner)] = _Uses(inner)
        return self.known[id(inner)]

    def freed(self, addition: _Addition, loop: Place | None) -> list[int]:
        """The leaves that are free: with a loop, the rows of stacks that one turn of it no longer needs."""
        path, inner = [], self.program.jaxpr
        for n in addition.place:
            path.append((inner, inner.eqns[n]))
            inner = _called(inner.eqns[n]) or inner
        uses = self.uses(path[-1][0])
        freed = uses.freed([path[-1][1].invars[1 - addition.kept]])
        rows = False
        for depth in range(len(path) - 2, -1, -1):
            outer, eqn = path[depth]
            positions = freed
            if eqn.primitive.name == "scan":
                n, m = programs.scan_arity(eqn)
                here = addition.place[: depth + 1] == loop
                if here or rows:
                    # Of one turn: its rows of the stacks; what is there in every turn stays.
                    positions = [i for i in freed if (i >= n + m if here else i < n)]
                else:
                    positions = [i for i in freed if not n <= i < n + m]
                rows |= here
            values = [eqn.invars[i] for i in positions]
            uses = self.uses(outer)
            if rows:
                alone = [v for v in values if uses.counts[v] == 1]
                freed = [i for i, var in enumerate(outer.invars) if var in alone]
            else:
                freed = uses.freed(values)
        if loop is not None and not rows:
            return []
        return sorted({i for i in freed if i < self.leaves})


def _called(eqn: JaxprEqn) -> Jaxpr | None:
    if eqn.primitive.name == "scan":
        return eqn.params["jaxpr"].jaxpr
    return programs.called(eqn).jaxpr if eqn.primitive.name in programs.CALLS else None


def _named(
    found: Sequence[tuple[_Addition, Omission, tuple[str, ...], int | None]],
) -> tuple[Branch, ...]:
    common = [_common(leaves) for _, _, leaves, _ in found]
    # A name stands for one branch: it is not a path that leaves of others lie under.
    owners: dict[str, set[Place]] = {}
    for addition, _, leaves, _ in found:
        for leaf in leaves:
            parts = leaf.split("/")
            for n in range(len(parts) + 1):
                owners.setdefault("/".join(parts[:n]), set()).add(addition.place)
    result = []
    for (addition, omission, leaves, turn), name in zip(found, common, strict=True):
        if len(owners[name]) > 1 or not name:
            below = [leaf[len(name) :].lstrip("/").partition("/")[0] for leaf in leaves]
            name = f"{name}/{'+'.join(sorted(set(below)))}".lstrip("/")
        row = "" if turn is None else f"[{turn}]"
        rows = tuple(f"{leaf}{row}" for leaf in leaves)
        result.append(Branch(f"{name}{row}", rows, addition.source, addition.place, omission))
    return tuple(result)


def _common(paths: Sequence[str]) -> str:
    """The longest path that all paths begin with."""
    parts = [path.split("/") for path in paths]
    same = 0
    while all(len(p) > same and p[same] == parts[0][same] for p in parts):
        same += 1
    return "/".join(parts[0][:same])


def covers(pattern: str, leaf: str) -> str | None:
    """The path under which a leaf of a branch lies that a path or glob matches, the shortest; None if there is none.

    A row of a stack, ``layers/mlp/kernel[3]``, lies under ``layers``, ``layers[3]``, also written ``layers/3``,
    ``layers/mlp`` and so on.
    """
    path, bracket, row = leaf.partition("[")
    parts = path.split("/")
    heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    if bracket:
        heads += [f"{head}[{row}" for head in heads]
        if (home := next((h for h in heads if pattern == f"{h}/{row[:-1]}"), None)) is not None:
            return f"{home}[{row}"
    return next((head for head in heads if matches(pattern, head)), None)


def matches(pattern: str, path: str) -> bool:
    """Whether a path or glob matches; a path itself as well, since brackets would be read as a set of characters."""
    return path == pattern or fnmatch.fnmatchcase(path, pattern)
