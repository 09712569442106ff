"""Slow, obvious NumPy versions of what prunax computes: loops, sorts, float64. Tests compare against them.

A leaf's pattern is spelled out as contests: lists of units that compete, a unit being the list of weights (as index
tuples) that live or die together.
"""

from fractions import Fraction
from itertools import product

import numpy as np

from prunax import patterns


def contests(pattern, shape):
    """The contests of a leaf: [[unit, ...], ...], with unit = [index, ...]."""
    every = [tuple(index) for index in np.ndindex(*shape)]
    if isinstance(pattern, patterns.Unstructured):
        return [[[index] for index in every]]
    if isinstance(pattern, patterns.Channel):
        axis = pattern.axis % len(shape)
        return [[[i for i in every if i[axis] == c] for c in range(shape[axis])]]
    if isinstance(pattern, patterns.Block):
        (height, width), (rows, columns) = pattern.shape, shape[-2:]
        units = []
        for lead in np.ndindex(*shape[:-2]):
            for top in range(0, rows, height):
                for left in range(0, columns, width):
                    block = product(
                        range(top, min(top + height, rows)),
                        range(left, min(left + width, columns)),
                    )
                    units.append([(*lead, r, c) for r, c in block])
        return [units]
    groups = {}
    if isinstance(pattern, patterns.NM):
        axis = pattern.axis % len(shape)
        for index in every:
            group = (*index[:axis], index[axis] // pattern.m, *index[axis + 1 :])
            groups.setdefault(group, []).append([index])
    else:
        axes = pattern.axis if isinstance(pattern.axis, tuple) else (pattern.axis,)
        axes = {a % len(shape) for a in axes}
        for index in every:
            group = tuple(i for a, i in enumerate(index) if a not in axes)
            groups.setdefault(group, []).append([index])
    return list(groups.values())


def unit_score(scores, unit):
    values = [float(scores[index]) for index in unit]
    return values[0] if len(values) == 1 else sum(values) / len(values)


def worst(values, k):
    """Positions of the k smallest; of equal ones the last go first."""
    return sorted(range(len(values)), key=lambda i: (values[i], -i))[:k]


def lamp_scores(values):
    """Lee et al. 2021, equation 3, with the sum of each weight's rank taken literally."""
    order = sorted(range(len(values)), key=lambda i: (values[i] ** 2, -i))
    result = [0.0] * len(values)
    for position, i in enumerate(order):
        total = sum(values[j] ** 2 for j in order[position:])
        result[i] = values[i] ** 2 / total if total else 0.0
    return result


def erdos_renyi_sparsities(shapes, sparsity):
    """The loop of Evci et al.'s code: make the leaf whose density exceeds 1 dense, and start again. Exact rationals."""
    sparsity = Fraction(sparsity)
    if sparsity == 0:
        return [Fraction(0)] * len(shapes)
    sizes = [int(np.prod(shape)) for shape in shapes]
    raw = [Fraction(sum(shape), size) for shape, size in zip(shapes, sizes, strict=True)]
    dense = set()
    while True:
        others = [i for i in range(len(shapes)) if i not in dense]
        budget = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in others)
        largest = max(raw[i] for i in others)
        if epsilon * largest <= 1:
            return [Fraction(0) if i in dense else 1 - epsilon * raw[i] for i in range(len(shapes))]
        dense |= {i for i in others if raw[i] == largest}


def masks(scores, sparsity, *, pattern=patterns.Unstructured(), allocation="uniform"):
    """Masks for a list of score arrays, True = kept; allocation by name."""
    result = [np.ones(s.shape, bool) for s in scores]
    layouts = [contests(pattern, s.shape) for s in scores]

    def prune(leaf, unit):
        for index in unit:
            result[leaf][index] = False

    if allocation in ("uniform", "erdos_renyi"):
        sparsities = [sparsity] * len(scores)
        if allocation == "erdos_renyi":
            sparsities = erdos_renyi_sparsities([s.shape for s in scores], sparsity)
        for leaf, (score, layout) in enumerate(zip(scores, layouts, strict=True)):
            for units in layout:
                k = round(sparsities[leaf] * len(units))
                for i in worst([unit_score(score, unit) for unit in units], k):
                    prune(leaf, units[i])
        return result

    places, values = [], []
    for leaf, (score, layout) in enumerate(zip(scores, layouts, strict=True)):
        (units,) = layout
        own = [unit_score(score, unit) for unit in units]
        values += lamp_scores(own) if allocation == "lamp" else own
        places += [(leaf, unit) for unit in units]
    for i in worst(values, round(sparsity * len(values))):
        prune(*places[i])
    return result
