"""From a function to its layers: which leaves calibration can prune, and what is said of those that it cannot."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from prunax import _jaxprs, trees
from prunax.calibration._problems import find_problems
from prunax.calibration._stages import Staged, cut

__all__: list[str] = []

PyTree = Any


def read(
    function: str,
    fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    batch: Any,
    where: trees.Where | None,
) -> Staged:
    """Read a function's layers.

    Args:
        function: The public function that asks, named in errors and warnings.
        fn: ``fn(params, batch)``.
        params: Pytree of arrays.
        batch: One batch.
        where: Chooses the leaves. None takes all kernels, and warns of leaves that look like one by name.

    Returns:
        The function's program in stages, with the leaves that calibration can prune selected.

    Raises:
        ValueError: If `where` selects leaves that calibration cannot prune, naming them all; or if there are no others.
    """
    program = _jaxprs.trace(fn, params, batch, where=where)
    left: dict[str, _jaxprs.Reason] = {}
    while True:
        paths = program.selection.paths
        problems, refused = find_problems(program)
        reasons = {n: _jaxprs.Reason("no product", text) for n, text in refused.items()}
        reasons |= program.reasons
        if where is None:
            found = _jaxprs.Reason("looked up", "")
            reasons = dict.fromkeys(program.looked_up, found) | reasons
        else:
            impossible = [r.text for r in reasons.values() if r.kind != "looked up"]
            if impossible:
                raise ValueError(
                    f"{function}: `where` selects leaves that calibration cannot prune: {'; '.join(impossible)}. "
                    f"Leave them out with `where`, or leave `where` out to prune all others."
                )
        left |= {paths[n]: reason for n, reason in reasons.items()}
        if not reasons:
            break
        program = program.only(n for n in range(len(paths)) if n not in reasons)
    if not program.selection.indices and (where is None or not left):
        what = "`where` selects no leaf" if where else "no leaf is a kernel of a product"
        why = "; ".join(r.text for r in left.values() if r.text)
        raise ValueError(
            f"{function}: {what}{': ' + why if why else ''}. The leaves are: "
            f"{', '.join(trees.paths(params)) or 'none'}. Pass where=lambda path, leaf: ... that is true for the ones "
            f"to prune."
        )
    _warn(function, params, left, where)
    return cut(program, problems)


def _warn(
    function: str, params: PyTree, left: Mapping[str, _jaxprs.Reason], where: trees.Where | None
) -> None:
    """Say which leaves stay whole that one would have expected to be pruned."""
    every = trees.select(params, lambda path, leaf: True)
    sizes = {path: math.prod(shape) for path, shape in every.shapes}
    total = max(sum(sizes.values()), 1)
    expected = where or trees.is_kernel
    surprising = trees.select(
        params, lambda path, leaf: path in left and expected(path, leaf)
    ).paths
    groups: dict[str, list[str]] = {}
    for path in surprising:
        groups.setdefault(left[path].kind, []).append(path)
    if not groups:
        return
    kinds = {
        "recomputed": "recomputed before their products",
        "looked up": "looked up in",
        "no product": "not in products with activations alone",
    }
    lines = [
        f"{kinds[kind]} ({sum(sizes[p] for p in own) / total:.1%} of the parameters): {', '.join(own)}"
        for kind, own in groups.items()
    ]
    warn(f"{function}: leaves that calibration cannot prune are left whole: {'; '.join(lines)}.")


def warn(message: str) -> None:
    """Warn where the user called."""
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").startswith("prunax."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
