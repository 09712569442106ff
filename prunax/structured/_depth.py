"""Make a network shallower: leave out residual branches, and whole blocks of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import schedules, trees
from prunax._jaxprs import programs
from prunax.structured._omission import (
    Need,
    Omission,
    Omissions,
    Place,
    Rows,
    Seen,
    gated,
    part,
    run,
)
from prunax.structured._prune import Shrunk, abstract_inputs
from prunax.structured._residuals import Branch, Residuals, covers, matches, residuals

__all__ = ["prune_depth"]

PyTree = Any
Loss = Callable[..., Any]
Blocks = dict[str, list[Branch]]


def prune_depth(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    remove: Sequence[str] | str | None = None,
    count: int | None = None,
    blocks: str | None = None,
    loss: Loss | None = None,
) -> Shrunk:
    """Make a network shallower by leaving out residual branches.

    The function that comes out is the traced one without the chosen additions: ``x + f(x)`` becomes ``x``, bit for bit,
    and what only f needed is not there any more. Its params lack the leaves of f. Blocks of a list (or of a dict with
    numbers for keys) that go as a whole leave no gap, and the others move up; stacks that a `jax.lax.scan` runs over
    lose rows; an attribute of a module becomes None.

    Args:
        fn: ``fn(params, *args)``, any JAX function; see `branches`.
        params: Pytree of arrays.
        *args: Example inputs; with `count` also the data that the choice looks at.
        remove: What to leave out: names of branches, or paths or globs that join some: ``"layers/3/mlp"``,
            ``"layers/3"``, ``"layers/[4-7]"``, and for a stack ``"layers[3]"``.
        count: In place of that: how many to leave out, chosen by `loss`.
        blocks: A glob of paths, with `count`: what lies under each path that it matches goes as a whole:
            ``"layers/*"``, for a stack ``"layers[[]*"``. Single branches otherwise.
        loss: ``loss(fn, params, *args) -> scalar`` to choose by, pure JAX: the branch without which it is the least
            goes first, then the next without both, and so on. Compiled once for all candidates. Without it the branches
            whose output is most like their input go: block influence, one minus the cosine between them, on `args`.

    Returns:
        The `Shrunk` network, `Shrunk.removed` saying what went.

    Raises:
        ValueError: If neither or both of remove and count are given; if a name or glob matches nothing, or only a part
            of a branch, or leaves that something else uses as well: the message has the paths.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = [{"up": jnp.full((2, 4), s), "down": jnp.ones((4, 2))} for s in (0.1, 2.0, 0.2)]
        >>> def fn(params, x):
        ...     for p in params:
        ...         x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        ...     return x
        >>> small = prunax.structured.prune_depth(fn, params, jnp.ones((1, 2)), remove=["1"])
        >>> len(small.params), small.removed
        (2, ('1',))
        >>> bool((small.fn(small.params, jnp.ones((1, 2))) == fn([params[0], params[2]], jnp.ones((1, 2)))).all())
        True

    References:
        Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
        arXiv:2403.03853: block influence; Muralidharan et al., Compact Language Models via Pruning and Knowledge
        Distillation (Minitron), 2024, arXiv:2407.14679: choice by loss.
    """
    if (remove is None) == (count is None):
        raise ValueError(
            "prune_depth: pass either remove=[...], names of branches, or count=, how many to choose."
        )
    known = residuals(fn, params, args)
    if not known.branches:
        raise ValueError(
            "prune_depth: the function has no residual branch, an addition x + f(x) whose f has parameters of its own."
            + _shared(known, known.shared)
        )
    if remove is not None:
        names = [remove] if isinstance(remove, str) else list(remove)
        gone = {b.name: b for name in names for b in _asked_for(known, name)}
        chosen = [branch for branch in known.branches if branch.name in gone]
        _check_covered(known, names, chosen)
    else:
        wanted = count or 0
        schedules.check_steps("prune_depth", count=wanted)
        groups = candidates("prune_depth", known, blocks)
        if wanted > len(groups):
            raise ValueError(
                f"prune_depth: count={count} is more than there are to leave out, {len(groups)}: {', '.join(groups)}."
            )
        pick = _by_influence if loss is None else _by_loss
        chosen = [b for n in pick(known, params, args, groups, wanted, loss) for b in groups[n]]
        chosen = [branch for branch in known.branches if branch in chosen]
    return without(fn, params, args, known, chosen)


def without(
    fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    known: Residuals,
    chosen: Sequence[Branch],
) -> Shrunk:
    """The network without some of its branches."""
    names = tuple(branch.name for branch in chosen)
    found = part(known.traced.jaxpr, _omissions(chosen), known.opened)
    whole = part(known.traced.jaxpr, {}, known.opened)
    count = len(known.paths)
    needs = _losses_alone(whole.needs[:count], found.needs[:count])
    arrays = known.traced.arrays[:count]
    flat, treedef = jax.tree.flatten(params)
    shapes = treedef.unflatten(programs.abstract(x) if trees.is_array(x) else x for x in flat)
    of_leaf = dict(zip(arrays, needs, strict=True))
    numbers = treedef.unflatten(range(len(flat)))
    left = _thinned(numbers, of_leaf.get)
    kept: list[int] = jax.tree.leaves(left)
    out = jax.tree.structure(left)
    cut = [_row_cut(flat[n], of_leaf.get(n, True)) for n in kept]
    compiled: dict[Any, Callable[..., Any]] = {}

    def small(params: PyTree, *args: Any) -> Any:
        mine, structure = jax.tree.flatten(params)
        if structure != out:
            raise ValueError(
                f"prune_depth: the params have other leaves than the smaller network's: "
                f"{_difference(params, out)}. Pass those that came with the function."
            )
        values = dict(zip(kept, mine, strict=True))
        inputs = [x for x in jax.tree.leaves(args) if trees.is_array(x)]
        fixed = [x for x in jax.tree.leaves(args) if not trees.is_array(x)]
        key = (
            jax.tree.structure(args),
            tuple((jnp.shape(x), jnp.result_type(x)) for x in inputs),
            tuple(map(repr, fixed)),
        )
        if key not in compiled:
            compiled[key] = _program(fn, shapes, args, names)
        stacks = []
        for n, need in zip(arrays, needs, strict=True):
            x = values.get(n)
            stacks.append(x if x is None or isinstance(need, bool) else Rows(x, need))
        return compiled[key](stacks, inputs)

    return Shrunk(small, out.unflatten(cut), {}, (), removed=names, inputs=abstract_inputs(args))


def _program(
    fn: Callable[..., Any], shapes: PyTree, args: tuple[Any, ...], names: Sequence[str]
) -> Callable[..., Any]:
    """The function without branches, for inputs of given shapes."""
    known = residuals(fn, shapes, args)
    by_name = {branch.name: branch for branch in known.branches}
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(
            f"prune_depth: for these inputs the function has no branch {missing[0]!r}. It has: {', '.join(by_name)}."
        )
    found = part(known.traced.jaxpr, _omissions([by_name[n] for n in names]), known.opened)
    outputs = jax.tree.structure(known.traced.out)

    def call(leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
        return outputs.unflatten(run(found, [*leaves, *inputs]))

    rows: dict[int, np.ndarray] = {}

    @jax.jit
    def compiled(arrays: Sequence[Any], inputs: Sequence[Any]) -> Any:
        leaves = [
            Rows(x, rows[n]) if n in rows and x is not None else x for n, x in enumerate(arrays)
        ]
        return call(leaves, inputs)

    def plain(leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
        rows.update({n: x.rows for n, x in enumerate(leaves) if isinstance(x, Rows)})
        arrays = [x.array if isinstance(x, Rows) else x for x in leaves]
        return compiled(arrays, inputs)

    return plain


def _omissions(chosen: Sequence[Branch]) -> Omissions:
    """The additions to leave out; turns of one loop together."""
    found: dict[Place, Omission] = {}
    for branch in chosen:
        before, own = found.get(branch.place), branch.omission
        turns = own.turns | before.turns if before else own.turns
        found[branch.place] = own._replace(turns=turns)
    return found


def _losses_alone(before: Sequence[Need], after: Sequence[Need]) -> list[Need]:
    """What is needed afterwards; what was not before stays as it is."""
    return [b if np.any(a) else True for a, b in zip(before, after, strict=True)]


def _row_cut(x: Any, need: Need) -> Any:
    if isinstance(need, bool):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((int(need.sum()), *x.shape[1:]), x.dtype)
    return x[np.flatnonzero(need)]


def _thinned(tree: PyTree, need: Callable[[int], Need | None]) -> PyTree:
    """A tree of leaf numbers without what is not needed, the rest of each list moved up.

    Args:
        tree: Pytree of numbers.
        need: Of a leaf whether it is needed; None for what is no array, which goes with its surroundings.
    """

    def gone(node: PyTree) -> bool:
        needs = [need(n) for n in jax.tree.leaves(node)]
        arrays = [x for x in needs if x is not None]
        return bool(arrays) and not any(np.any(x) for x in arrays)

    def thinned(node: PyTree) -> PyTree:
        if not any(need(n) is not None and not np.any(need(n)) for n in jax.tree.leaves(node)):
            return node
        flat, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
        if isinstance(node, Mapping):
            children = {k: thinned(v) for k, v in node.items() if not gone(v)}
            if list(node) == list(range(len(node))):
                children = dict(enumerate(children.values()))
            return type(node)(children)  # pyright: ignore[reportCallIssue] - dict, FrozenDict, nnx.State
        if type(node) in (list, tuple):
            return type(node)(thinned(child) for child in node if not gone(child))
        return treedef.unflatten(None if gone(child) else thinned(child) for child in flat)

    return thinned(tree)


def _difference(params: PyTree, expected: Any) -> str:
    ours = trees.paths(params)
    theirs = trees.paths(expected.unflatten(range(expected.num_leaves)))
    more, less = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if more:
        return f"{more[0]!r} was left out"
    return f"{less[0]!r} is missing" if less else "the containers differ"


# What was asked for.


def _asked_for(known: Residuals, name: str) -> list[Branch]:
    """The branches that a name, path or glob stands for."""
    exact = [branch for branch in known.branches if branch.name == name]
    if exact:
        return exact
    found = []
    for branch in known.branches:
        inside = [leaf for leaf in branch.leaves if covers(name, leaf)]
        if inside and len(inside) < len(branch.leaves) and not matches(name, branch.name):
            outside = [leaf for leaf in branch.leaves if leaf not in inside]
            raise ValueError(
                f"prune_depth: {name!r} matches a part of the branch {branch.name!r} only: {', '.join(inside)}, "
                f"and not {', '.join(outside)}. Name the branch, or a path above all of it."
            )
        if inside or matches(name, branch.name):
            found.append(branch)
    if not found:
        shared = [leaf for leaf in known.shared if covers(name, leaf)]
        raise ValueError(
            f"prune_depth: {name!r} matches no branch. The branches are: "
            f"{', '.join(branch.name for branch in known.branches)}.{_shared(known, shared)}"
        )
    return found


def _shared(known: Residuals, leaves: Any) -> str:
    if not leaves:
        return ""
    return (
        f" Of several additions, which can only go together: {', '.join(sorted(leaves))}. Parameters that are used "
        f"elsewhere belong to no branch."
    )


def _check_covered(known: Residuals, names: Sequence[str], chosen: Sequence[Branch]) -> None:
    """Refuse a path under which something stays in use."""
    whole, left = (
        part(known.traced.jaxpr, omissions, known.opened).needs
        for omissions in ({}, _omissions(chosen))
    )
    owned = {leaf.partition("[")[0] for branch in chosen for leaf in branch.leaves}
    for name in names:
        if any(branch.name == name and "+" in name for branch in chosen):
            continue
        stay = [
            path
            for path, before, after in zip(known.paths, whole, left, strict=False)
            if np.any(before) and np.array_equal(before, after) and covers(name, path)
        ]
        stay = [path for path in stay if path not in owned]
        if stay:
            raise ValueError(
                f"prune_depth: under {name!r} lies what is used elsewhere as well, and stays: {', '.join(stay)}. "
                f"Name the branches alone: {', '.join(branch.name for branch in chosen)}."
            )


def candidates(function: str, known: Residuals, pattern: str | None) -> Blocks:
    """The candidates: branches, or those under each path that a glob matches."""
    if pattern is None:
        return {branch.name: [branch] for branch in known.branches}
    found: Blocks = {}
    for branch in known.branches:
        homes = {leaf: covers(pattern, leaf) for leaf in branch.leaves}
        under = dict.fromkeys(home for home in homes.values() if home)
        if len(under) > 1 or (under and None in homes.values()):
            parts = "; ".join(f"{leaf} in {home or 'none'}" for leaf, home in homes.items())
            raise ValueError(
                f"{function}: blocks={pattern!r} matches a part of the branch {branch.name!r} only: {parts}. "
                f"Give a glob of paths that whole branches lie under."
            )
        for home in under:
            found.setdefault(home, []).append(branch)
    if not found:
        raise ValueError(
            f"{function}: blocks={pattern!r} matches no branch. The branches are: "
            f"{', '.join(branch.name for branch in known.branches)}."
        )
    for name, inside in found.items():
        _check_covered(known, [name], inside)
    return found


# Which ones.


class Switches:
    """The network with a switch at every branch, one program for all choices."""

    def __init__(self, known: Residuals) -> None:
        self.known = known
        self.kept = {branch.place: branch.omission.kept for branch in known.branches}
        self.loops = {place: _loops(known.traced.jaxpr, place) for place in self.kept}
        self.outputs = jax.tree.structure(known.traced.out)

    def arrays(self, *tree: Any) -> list[Any]:
        """What the program takes, of params and inputs."""
        leaves = jax.tree.leaves(tree)
        return [leaves[i] for i in self.known.traced.arrays]

    def gates(self, open_: Any) -> dict[Place, Any]:
        """From a switch for each branch to one for each addition and turn."""
        found: dict[Place, Any] = {}
        for n, branch in enumerate(self.known.branches):
            lengths = [length for _, length in self.loops[branch.place]]
            gate = found.get(branch.place, jnp.ones(lengths, jnp.bool_))
            if branch.omission.loop is None:
                found[branch.place] = gate & open_[n]
            else:
                axis, turn = self.turn(branch)
                here = np.arange(lengths[axis]) == turn
                here = here.reshape([-1 if d == axis else 1 for d in range(len(lengths))])
                found[branch.place] = gate & (open_[n] | ~here)
        return found

    def turn(self, branch: Branch) -> tuple[int, int]:
        """Which of the loops around a branch it is a turn of, and which turn."""
        around = [loop for loop, _ in self.loops[branch.place]]
        assert branch.omission.loop is not None
        return around.index(branch.omission.loop), min(branch.omission.turns)

    def run(self, open_: Any, arrays: Sequence[Any]) -> tuple[Any, list[Seen]]:
        """The network's outputs, and what was added, for switches that may be traced."""
        outs, seen = gated(
            self.known.traced.jaxpr, self.kept, self.known.opened, arrays, self.gates(open_)
        )
        return self.outputs.unflatten(outs), seen


def _loops(program: programs.ClosedJaxpr, place: Place) -> list[tuple[Place, int]]:
    """Place and length of the loops around an addition, the outermost first."""
    found = []
    for depth, n in enumerate(place[:-1], 1):
        eqn = program.jaxpr.eqns[n]
        if eqn.primitive.name == "scan":
            found.append((place[:depth], eqn.params["length"]))
        program = programs.called(eqn)
    return found


def _by_loss(
    known: Residuals,
    params: PyTree,
    args: tuple[Any, ...],
    blocks: Blocks,
    count: int,
    loss: Loss | None,
) -> list[str]:
    """Leave out one after the other, each time the one without which the loss is the least."""
    assert loss is not None
    switches = Switches(known)
    number = {branch.name: n for n, branch in enumerate(known.branches)}
    leaves, treedef = jax.tree.flatten((params, args))

    @jax.jit
    def measured(open_: Any, arrays: Sequence[Any]) -> Any:
        whole = list(leaves)
        for i, x in zip(known.traced.arrays, arrays, strict=True):
            whole[i] = x
        own, inputs = treedef.unflatten(whole)

        def switched(params: PyTree, *args: Any) -> Any:
            return switches.run(open_, switches.arrays(params, args))[0]

        return loss(switched, own, *inputs)

    gone: list[str] = []
    for _ in range(count):
        results = {}
        for name in blocks:
            if name not in gone:
                shut = [number[b.name] for block in (*gone, name) for b in blocks[block]]
                open_ = np.ones(len(number), bool)
                open_[shut] = False
                value = measured(open_, switches.arrays(params, args))
                if np.shape(value) != ():
                    raise ValueError(
                        f"prune_depth: loss must return one number, got shape {np.shape(value)}. Take the mean."
                    )
                results[name] = float(value)
        gone.append(min(results, key=lambda n: (not np.isfinite(results[n]), results[n])))
    return gone


def _by_influence(
    known: Residuals,
    params: PyTree,
    args: tuple[Any, ...],
    blocks: Blocks,
    count: int,
    loss: Loss | None,
) -> list[str]:
    """Leave out those whose output is most like their input."""
    switches = Switches(known)

    @jax.jit
    def influences(arrays: Sequence[Any]) -> dict[str, Any]:
        seen = {s.place: s for s in switches.run(np.ones(len(known.branches), bool), arrays)[1]}

        def at(branch: Branch, name: str) -> Any:
            x, loops = getattr(seen[branch.place], name), switches.loops[branch.place]
            left = len(loops)
            if branch.omission.loop is not None:
                axis, turn = switches.turn(branch)
                x, left = jnp.take(x, turn, axis=axis), left - 1
            # Of a branch that every turn of a loop takes the first input and the last sum.
            for _ in range(left):
                x = x[0] if name == "kept" else x[-1]
            return x

        return {
            name: _influence(at(inside[0], "kept"), at(inside[-1], "sum"))
            for name, inside in blocks.items()
        }

    found = {name: float(x) for name, x in influences(switches.arrays(params, args)).items()}
    return sorted(found, key=lambda name: found[name])[:count]


def _influence(before: jax.Array, after: jax.Array) -> jax.Array:
    """One minus the cosine between vectors of the last axis, on average; ShortGPT's equation 1."""
    a, b = before.astype(jnp.float32), after.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.sum(a * b, axis=-1) / jnp.where(norms > 0, norms, 1)
    return 1 - jnp.mean(cosine)
