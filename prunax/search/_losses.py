"""The loss of a network under masks, by numbers of pruned units: compiled once, measured once each."""

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prunax import _counts, _progress, trees
from prunax.search._structures import Structures, as_counts

__all__ = ["Losses"]

PyTree = Any
LossFn = Callable[[PyTree], jax.Array]


def _nothing(by: int) -> None:
    """Where no bar is shown."""


class Losses:
    """Losses by numbers of pruned units, each measured once, all by one compiled function.

    Attributes:
        structures: What is pruned.
        dense: The loss with nothing pruned; measured first, and finite.
        evaluated: How many different networks were measured.
    """

    def __init__(
        self,
        function: str,
        loss_fn: LossFn,
        params: PyTree,
        structures: Structures,
        batch_size: int,
        progress: bool,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"{function}: batch_size must be at least 1, got {batch_size}.")
        self.structures = structures
        self._batch_size, self._progress = batch_size, progress
        self._advance: Callable[..., None] = _nothing
        self._known: dict[tuple[int, ...], float] = {}

        flat, treedef = jax.tree.flatten(params)
        arrays = [i for i, leaf in enumerate(flat) if trees.is_array(leaf)]

        def whole(values: Sequence[Any]) -> PyTree:
            full = list(flat)
            for i, value in zip(arrays, values, strict=True):
                full[i] = value
            return treedef.unflatten(full)

        def loss(values: Sequence[Any], scores: Any, num_pruned: _counts.Count) -> jax.Array:
            return self.structures.pruned(loss_fn, scores, num_pruned)(whole(values))

        self._arguments = [flat[i] for i in arrays], self.structures.scores
        result = jax.eval_shape(lambda values: loss_fn(whole(values)), self._arguments[0])
        if getattr(result, "shape", None) != () or not jnp.issubdtype(result.dtype, jnp.floating):
            raise ValueError(
                f"{function}: loss_fn must return one floating-point number, got {result}. "
                f"Take the mean, and leave out auxiliary results."
            )
        self._compiled = jax.jit(
            loss if batch_size == 1 else jax.vmap(loss, in_axes=(None, None, 0))
        )
        self.dense = float(self([np.zeros(len(self.structures.names), np.int64)])[0])
        if not math.isfinite(self.dense):
            raise ValueError(
                f"{function}: the loss with nothing pruned is {self.dense}, so that nothing can be compared with it. "
                f"Look for the step of loss_fn, or the parameter, that is not finite."
            )

    @property
    def evaluated(self) -> int:
        return len(self._known)

    def __call__(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Measure.

        Args:
            rows: Numbers of pruned units, ``(structures,)`` each.

        Returns:
            ``(rows,)`` float64.
        """
        keys = [tuple(map(int, row)) for row in rows]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        for start in range(0, len(new), self._batch_size):
            part = new[start : start + self._batch_size]
            for key, loss in zip(part, self._measure(part), strict=True):
                self._known[key] = float(loss)
            self._advance(by=len(part))
        return np.array([self._known[key] for key in keys])

    def _measure(self, part: list[tuple[int, ...]]) -> np.ndarray:
        if self._batch_size == 1:
            return np.asarray(self._compiled(*self._arguments, as_counts(np.array(part[0]))))[None]
        # The last ones again and again, so that no other number of rows is compiled.
        rows = np.array(part + part[-1:] * (self._batch_size - len(part)))
        return np.asarray(self._compiled(*self._arguments, as_counts(rows)))[: len(part)]

    @contextlib.contextmanager
    def counting(self, total: int | None) -> Generator[None]:
        """Show how many networks were measured, of how many at most, where progress was asked for."""
        with _progress.counted("measuring losses", total, show=self._progress) as advance:
            self._advance = advance
            advance(by=self.evaluated)
            try:
                yield
            finally:
                self._advance = _nothing
