"""Methods that prune one matrix from a statistic of its inputs: Wanda, SparseGPT, ALPS, refitting."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from prunax import patterns
from prunax.calibration import solver
from prunax.calibration._scores import wanda_scores

__all__ = ["Alps", "Method", "Refit", "SparseGPT", "Wanda"]

PyTree = Any
Solved = tuple[jax.Array, jax.Array]


class Method(Protocol):
    """What `prune_layers` asks of a method: a frozen dataclass with these members. Nothing is to be registered.

    All three are pure functions of arrays, for one matrix; stacked layers and experts are mapped over.

    Examples:
        >>> import dataclasses, jax.numpy as jnp, prunax
        >>> from prunax.calibration import solver
        >>> @dataclasses.dataclass(frozen=True)
        ... class MeanContribution:
        ...     def statistic(self, inputs):
        ...         return jnp.abs(inputs).sum(axis=0)
        ...     def prepare(self, statistic):
        ...         return statistic[:, None]
        ...     def solve(self, weights, prepared, budget, pattern):
        ...         mask = solver.keep_largest(jnp.abs(weights) * prepared, budget, pattern)
        ...         return jnp.where(mask, weights, 0), mask
        >>> params = {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]])}
        >>> fn = lambda params, x: x @ params["kernel"]
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        >>> prunax.calibration.prune_layers(fn, params, [x], MeanContribution(), 0.5).params["kernel"].tolist()
        [[4.0, 0.0], [0.0, 3.0]]
    """

    @property
    def statistic(self) -> Callable[[jax.Array], Any]:
        """From the inputs of one batch, (rows, in), float32 or float64, to arrays, which are summed over the batches.

        `solver.gram`, `solver.squares`, or any other function of that form. A finite first array that is all zero
        means that nothing reached the layer.
        """
        ...

    def prepare(self, statistic: Any) -> Any:
        """What solving takes of the summed statistic, worked out once for all layers that share their inputs."""
        ...

    def solve(
        self, weights: jax.Array, prepared: Any, budget: jax.Array, pattern: patterns.Pattern
    ) -> Solved:
        """Prune (in, out) weights.

        Args:
            weights: The dense matrix.
            prepared: What `prepare` gave.
            budget: int32 scalar: how many units of the pattern go, where it compares along an axis how many of each
                slice. `solver.keep_largest` takes it.
            pattern: The pattern, on the matrix. Static.

        Returns:
            The new matrix in the weights' dtype, and its mask, (in, out) bool, True = kept.
        """
        ...


@dataclass(frozen=True)
class Wanda:
    r"""Keep the weights of largest magnitude times input norm, :math:`|w_{ij}| \|x_i\|_2`, as they are.

    Compares within each output where no pattern is given (`patterns.ConstantFanIn`); takes any pattern.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]])}
        >>> fn = lambda params, x: x @ params["kernel"]
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        >>> method = prunax.calibration.Wanda()
        >>> pruned = prunax.calibration.prune_layers(fn, params, [x], method, 0.5)
        >>> pruned.params["kernel"].tolist()
        [[4.0, 0.0], [0.0, 3.0]]

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, arXiv:2306.11695. There the
        layers of a block see inputs that the block's own pruned layers have not touched yet; with ``sequential=True``
        here they do.
    """

    pattern = patterns.ConstantFanIn()
    statistic = staticmethod(solver.squares)

    def prepare(self, statistic: jax.Array) -> jax.Array:
        """The norms, (in,)."""
        return jnp.sqrt(statistic)

    def solve(
        self, weights: jax.Array, prepared: jax.Array, budget: jax.Array, pattern: patterns.Pattern
    ) -> Solved:
        """See `Method`."""
        scores = wanda_scores(weights, prepared[:, None])
        mask = solver.keep_largest(scores, budget, pattern)
        return jnp.where(mask, weights, jnp.zeros((), weights.dtype)), mask


class _Propagating:
    """A method on Gram matrices that may make up for what the pruned layers before have changed."""

    damping: float
    correction: float

    pattern = patterns.Unstructured()

    def __post_init__(self) -> None:
        correction: Any = self.correction  # no number where JAX puts the value together
        if isinstance(correction, int | float) and not 0 <= correction <= 1:
            name = type(self).__name__
            raise ValueError(f"{name}: correction must lie in [0, 1], got {self.correction}.")

    @property
    def beside_dense(self) -> bool:
        """Whether the statistic wants the inputs in the dense model besides."""
        return bool(self.correction)

    @staticmethod
    def statistic(inputs: jax.Array, dense: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The Gram matrix; with the dense inputs also the product of the inputs with what they lack."""
        if dense is None:
            return (solver.gram(inputs),)
        errors = jnp.matmul(inputs.T, dense - inputs, precision=jax.lax.Precision.HIGHEST)
        return solver.gram(inputs), errors

    def prepare(self, statistic: tuple[jax.Array, ...]) -> tuple[Any, ...]:
        """The Gram matrix, its factor, the errors if there are any."""
        return statistic[0], solver.factorize(statistic[0], self.damping), *statistic[1:]

    def target(self, weights: jax.Array, prepared: tuple[Any, ...]) -> jax.Array:
        """The matrix to come near to: the dense one, moved to make up for the errors of the inputs."""
        _, factor, *errors = prepared
        if not errors:
            return weights
        return solver.propagate_errors(weights, factor, *errors, self.correction)

    def check(self, pattern: patterns.Pattern) -> str | None:
        """What is wrong with a pattern, if anything."""
        known = patterns.Unstructured | patterns.ConstantFanIn | patterns.NM
        if isinstance(pattern, known):
            return None
        return (
            f"pattern must be Unstructured, ConstantFanIn or NM, got {pattern}. For others choose the masks with "
            f"compute_masks or Wanda, and refit the weights with Refit"
        )


@functools.partial(
    register_dataclass, data_fields=["damping", "correction"], meta_fields=["block_size"]
)
@dataclass(frozen=True)
class SparseGPT(_Propagating):
    """Prune input by input, correcting the weights of later inputs for what earlier ones lose.

    Weights of inputs that are zero in every batch go first, and are zero in the end even where they are kept. Takes
    `patterns.Unstructured`, `patterns.ConstantFanIn` and `patterns.NM`.

    Attributes:
        block_size: Masks are chosen for so many inputs at a time, with the corrections that the inputs before them
            brought. With NM it is rounded up to whole groups.
        damping: Added to the diagonal of the Gram matrix, times the diagonal's mean; more where that does not do.
        correction: How much of the errors that the pruned layers before it leave in its inputs a layer is to make up
            for, from 0, none, to 1, all that the calibration data show: the propagation strength of QEP. With few data
            all is too much, and a half better; where `refine` follows, none at all. Takes the dense model along, at
            about twice the time.

    Raises:
        ValueError: If the correction does not lie in [0, 1], or the block size is not positive.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]])}
        >>> fn = lambda params, x: x @ params["kernel"]
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        >>> method = prunax.calibration.SparseGPT()
        >>> pruned = prunax.calibration.prune_layers(fn, params, [x], method, 0.5)
        >>> pruned.params["kernel"].round(2).tolist()  # 3 is corrected for the loss of -1
        [[4.0, 0.0], [0.0, 2.799999952316284]]

    References:
        Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023,
        arXiv:2301.00774, algorithm 1. Arai and Ichikawa, Quantization Error Propagation, 2025, arXiv:2504.09629.
    """

    block_size: int = 128
    damping: float = 0.01
    correction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"SparseGPT: block_size must be 1 or more, got {self.block_size}.")

    def solve(
        self,
        weights: jax.Array,
        prepared: tuple[Any, ...],
        budget: jax.Array,
        pattern: patterns.Pattern,
    ) -> Solved:
        """See `Method`."""
        group = pattern.m if isinstance(pattern, patterns.NM) else 1
        size = -(-self.block_size // group) * group
        target = self.target(weights, prepared)
        return tuple(solver.obs(target, prepared[1], budget, pattern=pattern, block_size=size))


@functools.partial(
    register_dataclass, data_fields=["damping", "correction"], meta_fields=["iterations"]
)
@dataclass(frozen=True)
class Alps(_Propagating):
    """Choose mask and kept weights of each matrix together. Slower than `SparseGPT`, and better.

    Takes the patterns that `SparseGPT` takes.

    Attributes:
        iterations: At most so many rounds a layer, see `solver.alps`.
        damping: As for `SparseGPT`.
        correction: As for `SparseGPT`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]])}
        >>> fn = lambda params, x: x @ params["kernel"]
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        >>> method = prunax.calibration.Alps()
        >>> pruned = prunax.calibration.prune_layers(fn, params, [x], method, 0.5)
        >>> pruned.params["kernel"].round(2).tolist()  # each for the loss of the other
        [[3.0199999809265137, 0.0], [0.0, 2.799999952316284]]

    References:
        Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024,
        arXiv:2406.07831.
    """

    iterations: int = 60
    damping: float = 0.01
    correction: float = 0.0

    def solve(
        self,
        weights: jax.Array,
        prepared: tuple[Any, ...],
        budget: jax.Array,
        pattern: patterns.Pattern,
    ) -> Solved:
        """See `Method`."""
        options = {"damping": self.damping, "iterations": self.iterations, "pattern": pattern}
        return tuple(solver.alps(self.target(weights, prepared), prepared[0], budget, **options))


@functools.partial(
    register_dataclass, data_fields=["masks", "damping", "correction"], meta_fields=["iterations"]
)
@dataclass(frozen=True)
class Refit(_Propagating):
    """Refit the kept weights of each layer, for masks that there are, to the outputs of the dense layer.

    Attributes:
        masks: A mask tree like the params, True = kept, of any pattern; leaves with the scalar True stay. Takes the
            place of sparsity, pattern, allocation and `where`.
        iterations: Steps of conjugate gradients.
        damping: Keeps weights that the inputs do not determine near where they were, see `solver.refit`.
        correction: As for `SparseGPT`.

    Examples:
        >>> import jax.numpy as jnp, prunax
        >>> params = {"kernel": jnp.array([[4.0, -1.0], [-2.0, 3.0]])}
        >>> fn = lambda params, x: x @ params["kernel"]
        >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
        >>> masks = prunax.compute_masks(params, 0.5)
        >>> pruned = prunax.calibration.prune_layers(fn, params, [x], prunax.calibration.Refit(masks))
        >>> pruned.params["kernel"].round(2).tolist()
        [[3.0199999809265137, 0.0], [0.0, 2.799999952316284]]
    """

    masks: PyTree
    iterations: int = 32
    damping: float = 0.01
    correction: float = 0.0

    def solve(
        self,
        weights: jax.Array,
        prepared: tuple[Any, ...],
        budget: jax.Array,
        pattern: patterns.Pattern,
    ) -> Solved:
        """See `Method`. The budget is the matrix's mask."""
        target = self.target(weights, prepared)
        options = {"damping": self.damping, "iterations": self.iterations}
        return solver.refit(target, budget, prepared[0], **options), budget
