"""Cutting a program into stages at the products of its weights.

A stage is what can be computed with the weights that are solved so far: it ends where the inputs of the next weights
are known. Stages of equal structure (the layers of a stack of equal layers) are equal values, and share compiled code.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from prunax import _jaxprs
from prunax.calibration import layouts
from prunax.calibration._problems import Problem

__all__: list[str] = []


class Stage(NamedTuple):
    """What is done between two stops.

    Attributes:
        segment: The equations.
        inputs: Ids of what it reads.
        kept: Ids of the values that later stages read.
        reads: ``(activation id, reading)`` of each statistic, no two alike.
        layouts: A layout for each of them.
        collected: ``(problem, read)`` for each product whose inputs are read here.
        solved: Problems whose last inputs are read here.
        dropped: Ids of values that no later stage reads.
    """

    segment: _jaxprs.Segment
    inputs: tuple[int, ...]
    kept: tuple[int, ...]
    reads: tuple[Any, ...]
    layouts: tuple[layouts.Layout, ...]
    collected: tuple[tuple[int, Any], ...]
    solved: tuple[int, ...]
    dropped: tuple[int, ...]


class Staged(NamedTuple):
    """A program cut into stages.

    Attributes:
        program: The program.
        problems: What is to be solved.
        stages: In order.
    """

    program: _jaxprs.Program
    problems: list[Problem]
    stages: list[Stage]


def cut(program: _jaxprs.Program, problems: list[Problem]) -> Staged:
    """Find the stages between a program's problems."""
    products = program.products
    problem_of = {s: n for n, problem in enumerate(problems) for s in problem.products}
    layout_of = {s: x for p in problems for s, x in zip(p.products, p.layouts, strict=True)}
    key_of = {s: (products[s].activation, x.reading) for s, x in layout_of.items()}
    at = _stage_of_products(program, problems, problem_of)
    varying = depending(program, program.args)
    made_by = {i: n for n, equation in enumerate(program.equations) for i in equation.outputs}
    computed: dict[int, int] = {}  # id of a value of the batch -> the stage that computes it
    needed: list[tuple[list[int], list[int]]] = []
    last_use: dict[int, int] = {}
    kept: list[list[int]] = []
    for stage in range(max(at, default=-1) + 1):
        targets = [products[s].activation for s in range(len(at)) if at[s] == stage]
        equations, inputs = ancestors(program, made_by, computed, targets)
        for i in inputs:
            if i in varying:
                last_use[i] = stage
                if i in computed and i not in kept[computed[i]]:
                    kept[computed[i]].append(i)
        for n in equations:
            computed |= {i: stage for i in program.equations[n].outputs if i in varying}
        needed.append((equations, inputs))
        kept.append([])

    stages = []
    for stage, (equations, inputs) in enumerate(needed):
        own = [s for s in range(len(at)) if at[s] == stage]
        reads = {key_of[s]: layout_of[s] for s in own}
        outputs = [x for x, _ in reads] + kept[stage]
        chosen = [program.equations[n] for n in equations]
        stages.append(
            Stage(
                _jaxprs.Segment(chosen, program.known, inputs, outputs),
                tuple(inputs),
                tuple(kept[stage]),
                tuple(reads),
                tuple(reads.values()),
                tuple((problem_of[s], key_of[s]) for s in own),
                tuple(
                    n
                    for n, problem in enumerate(problems)
                    if max(at[s] for s in problem.products) == stage
                ),
                tuple(i for i, last in last_use.items() if last == stage),
            )
        )
    return Staged(program, problems, stages)


def depending(program: _jaxprs.Program, values: Iterable[int]) -> set[int]:
    """Values that depend on some. What depends on no batch is computed where it is used, and never kept."""
    found = set(values)
    for equation in program.equations:
        if not found.isdisjoint(equation.inputs):
            found.update(equation.outputs)
    return found


def ancestors(
    program: _jaxprs.Program, made_by: dict[int, int], computed: dict[int, int], targets: list[int]
) -> tuple[list[int], list[int]]:
    """The equations that targets still need, in order, and the values that these read from outside."""
    equations: set[int] = set()
    stack, seen = list(targets), set()
    while stack:
        i = stack.pop()
        if i in seen or i in computed or i not in made_by:
            continue
        seen.add(i)
        if made_by[i] not in equations:
            equations.add(made_by[i])
            stack.extend(program.equations[made_by[i]].inputs)
    order = sorted(equations)
    inside = {i for n in order for i in program.equations[n].outputs}
    reads = [i for n in order for i in program.equations[n].inputs] + targets
    outside = [i for i in dict.fromkeys(reads) if i not in inside and i not in program.known]
    return order, outside


def _stage_of_products(
    program: _jaxprs.Program, problems: list[Problem], problem_of: dict[int, int]
) -> list[int]:
    """The stage at which each product's inputs are read: after the problems that they depend on are solved.

    A problem is solved after its last product. Weights that are used again later (shared layers) cannot wait for
    themselves: until its problem is solved a product computes with the weights as they are.
    """
    products = program.products
    products_at: dict[int, list[int]] = {}
    for s, product in enumerate(products):
        products_at.setdefault(product.equation, []).append(s)
    before: dict[int, int] = {}  # value -> the products that it depends on, as bits
    at: list[int] = [0] * len(products)
    for n, equation in enumerate(program.equations):
        bits = 0
        for i in equation.inputs:
            bits |= before.get(i, 0)
        for s in products_at.get(n, ()):
            behind = before.get(products[s].activation, 0)
            for t in range(s):
                if behind >> t & 1:
                    others = problems[problem_of[t]].products
                    done = max(others) < s
                    at[s] = max(at[s], max(at[p] for p in others) + 1 if done else at[t])
        for s in products_at.get(n, ()):
            bits |= 1 << s
        if bits:
            before |= dict.fromkeys(equation.outputs, bits)
    return at
