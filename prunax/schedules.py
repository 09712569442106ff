"""Schedules: sparsity over training steps, and the steps at which masks are recomputed.

A schedule is a frozen value. ``schedule(step)`` is the sparsity and ``schedule.is_update_step(step)`` says whether
masks change at that step; both take Python integers and traced ones. ``schedule.target`` is the sparsity at which it
ends.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from prunax import trees

__all__ = ["Schedule", "Sparsity", "alternating", "constant", "one_shot", "polynomial"]


class Schedule(Protocol):
    """What `prunax.prune` asks of a schedule: any object with these members will do."""

    @property
    def target(self) -> float:
        """The final sparsity, a number in [0, 1]."""
        ...

    def __call__(self, step: int | jax.Array) -> float | jax.Array:
        """The sparsity of the masks computed at `step`, in [0, 1]."""
        ...

    def is_update_step(self, step: int | jax.Array) -> bool | jax.Array:
        """Whether masks are recomputed at `step`, a bool scalar."""
        ...


Sparsity = float | Schedule | None
"""What `prunax.prune` takes: a number in [0, 1], a schedule, or None for what the pattern fixes."""


def constant(target: float, every: int | None = None) -> Schedule:
    """The same sparsity throughout, with masks computed at step 0.

    Args:
        target: The sparsity, in [0, 1].
        every: Recompute the masks every so many steps; None for never again.

    Returns:
        The schedule, a frozen value.

    Raises:
        ValueError: If the sparsity is not in [0, 1] or `every` is not positive.

    Examples:
        >>> import prunax
        >>> schedule = prunax.schedules.constant(0.9, every=100)
        >>> schedule(7), schedule.is_update_step(7), schedule.is_update_step(200)
        (0.9, False, True)
    """
    check_sparsity("constant", target)
    if every is not None:
        check_steps("constant", every=every)
    return _Constant(target, every)


@dataclass(frozen=True)
class _Constant:
    target: float
    every: int | None = None

    def __call__(self, step: int | jax.Array) -> float | jax.Array:
        return _where(step == step, self.target, 0.0)

    def is_update_step(self, step: int | jax.Array) -> bool | jax.Array:
        return step == 0 if self.every is None else step % self.every == 0


def one_shot(target: float, step: int) -> Schedule:
    """Dense until a step, then pruned at once and fixed.

    Args:
        target: The sparsity from `step` on, in [0, 1].
        step: The step at which masks are computed.

    Returns:
        The schedule, a frozen value.

    Raises:
        ValueError: If the sparsity is not in [0, 1] or the step is negative.

    Examples:
        >>> import prunax
        >>> schedule = prunax.schedules.one_shot(0.9, step=1000)
        >>> schedule(999), schedule(1000), schedule.is_update_step(1001)
        (0.0, 0.9, False)
    """
    check_sparsity("one_shot", target)
    check_steps("one_shot", step=step)
    return _OneShot(target, step)


@dataclass(frozen=True)
class _OneShot:
    target: float
    step: int

    def __call__(self, step: int | jax.Array) -> float | jax.Array:
        return _where(step >= self.step, self.target, 0.0)

    def is_update_step(self, step: int | jax.Array) -> bool | jax.Array:
        return step == self.step


def polynomial(
    target: float,
    begin_step: int,
    end_step: int,
    every: int,
    power: float = 3,
    initial: float = 0.0,
) -> Schedule:
    r"""Gradual pruning along a polynomial: fast at first, slow towards the target.

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^p

    Args:
        target: The final sparsity s_f, in [0, 1], reached exactly at `end_step`.
        begin_step: The first update, t_0. Nothing is pruned before it.
        end_step: The last update, t_1, whether or not `every` divides the span.
        every: Steps from one update to the next.
        power: The exponent p > 0; 3 is usual, 1 is linear.
        initial: The sparsity s_i at `begin_step`, in [0, 1].

    Returns:
        The schedule, a frozen value.

    Raises:
        ValueError: If a sparsity is not in [0, 1], the steps are negative or out of order, or power is not positive.

    Examples:
        >>> import prunax
        >>> schedule = prunax.schedules.polynomial(0.8, begin_step=100, end_step=200, every=30)
        >>> [round(schedule(step), 3) for step in (0, 100, 150, 200, 900)]
        [0.0, 0.0, 0.7, 0.8, 0.8]
        >>> [step for step in range(300) if schedule.is_update_step(step)]
        [100, 130, 160, 190, 200]

    References:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1.
    """
    check_sparsity("polynomial", target)
    check_sparsity("polynomial", initial, "initial")
    check_steps("polynomial", begin_step=begin_step, end_step=end_step, every=every)
    if end_step <= begin_step:
        raise ValueError(
            f"polynomial: end_step must come after begin_step, got {begin_step} and {end_step}. "
            f"To prune at a single step use schedules.one_shot."
        )
    if not power > 0:
        raise ValueError(f"polynomial: power must be positive, got {power}.")
    return _Polynomial(target, begin_step, end_step, every, power, initial)


@dataclass(frozen=True)
class _Polynomial:
    target: float
    begin_step: int
    end_step: int
    every: int
    power: float = 3
    initial: float = 0.0

    def __call__(self, step: int | jax.Array) -> float | jax.Array:
        remaining = 1 - (step - self.begin_step) / (self.end_step - self.begin_step)
        inside = (step >= self.begin_step) & (step < self.end_step)
        base = _where(
            inside, remaining, 0.0
        )  # out of the span a negative base would have no real power
        value = self.target + (self.initial - self.target) * base**self.power
        return _where(step >= self.begin_step, value, 0.0)

    def is_update_step(self, step: int | jax.Array) -> bool | jax.Array:
        due = ((step - self.begin_step) % self.every == 0) | (step == self.end_step)
        return due & (step >= self.begin_step) & (step <= self.end_step)


def alternating(
    target: float, begin_step: int, end_step: int, compressed_steps: int, dense_steps: int
) -> Schedule:
    """AC/DC: compressed phases alternate with dense ones, and the end is compressed.

    Args:
        target: Sparsity of the compressed phases, in [0, 1].
        begin_step: The first compressed phase begins here; training is dense before it.
        end_step: The last compressed phase begins here and lasts.
        compressed_steps: Length of a compressed phase; masks are computed at its first step and then fixed.
        dense_steps: Length of a dense phase, in which every weight is free.

    Returns:
        The schedule, a frozen value.

    Raises:
        ValueError: If the sparsity is not in [0, 1], or steps are negative, empty or out of order.

    Examples:
        >>> import prunax
        >>> schedule = prunax.schedules.alternating(0.9, 10, 40, compressed_steps=10, dense_steps=5)
        >>> [schedule(step) for step in (0, 10, 19, 20, 25, 36, 40, 99)]
        [0.0, 0.9, 0.9, 0.0, 0.9, 0.0, 0.9, 0.9]
        >>> [step for step in range(100) if schedule.is_update_step(step)]
        [10, 20, 25, 35, 40]

    References:
        Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, 2021,
        arXiv:2106.12379, algorithm 1.
    """
    check_sparsity("alternating", target)
    check_steps("alternating", begin_step=begin_step, end_step=end_step)
    if end_step < begin_step:
        raise ValueError(
            f"alternating: end_step must not come before begin_step, got {end_step} and {begin_step}."
        )
    if min(compressed_steps, dense_steps) < 1:
        raise ValueError(
            f"alternating: phases must last at least one step, got compressed_steps={compressed_steps}, "
            f"dense_steps={dense_steps}."
        )
    return _Alternating(target, begin_step, end_step, compressed_steps, dense_steps)


@dataclass(frozen=True)
class _Alternating:
    target: float
    begin_step: int
    end_step: int
    compressed_steps: int
    dense_steps: int

    def __call__(self, step: int | jax.Array) -> float | jax.Array:
        phase = (step - self.begin_step) % (self.compressed_steps + self.dense_steps)
        compressed = (step >= self.end_step) | (phase < self.compressed_steps)
        return _where((step >= self.begin_step) & compressed, self.target, 0.0)

    def is_update_step(self, step: int | jax.Array) -> bool | jax.Array:
        phase = (step - self.begin_step) % (self.compressed_steps + self.dense_steps)
        due = (step < self.end_step) & ((phase == 0) | (phase == self.compressed_steps))
        return (step >= self.begin_step) & (due | (step == self.end_step))


def as_schedule(name: str, sparsity: Any) -> Schedule:
    """Turn a number into `constant`, and pass a schedule through; errors name the function `name`."""
    if hasattr(sparsity, "init") and hasattr(sparsity, "update"):
        raise TypeError(
            f"{name}: sparsity must be a number or a schedule, got an optax transformation. "
            f"The optimizer comes first: {name}(optax.adam(1e-3), 0.9)."
        )
    if hasattr(sparsity, "is_update_step") and not isinstance(sparsity, type):
        return sparsity
    if callable(sparsity):
        raise TypeError(
            f"{name}: sparsity must be a number or a schedule with `is_update_step`, got {sparsity!r}. "
            f"See prunax.schedules."
        )
    if trees.is_traced(sparsity):
        raise TypeError(
            f"{name}: sparsity must be known when the transformation is built, got a traced value. A schedule from "
            "prunax.schedules moves it; under optax.inject_hyperparams name it in `static_args`."
        )
    check_sparsity(name, sparsity)
    return constant(sparsity)


def check_sparsity(function: str, value: Any, name: str = "sparsity") -> None:
    """Raise ValueError or TypeError unless a concrete sparsity is a number in [0, 1]."""
    try:
        if isinstance(value, str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} must be a number in [0, 1], got {value!r}.") from None
    if not 0 <= number <= 1:
        percent = f" Pass {number / 100:g} for {number:g}%." if 1 < number <= 100 else ""
        raise ValueError(f"{function}: {name} must lie in [0, 1], got {value}.{percent}")


def check_steps(function: str, **steps: int) -> None:
    """Raise ValueError unless every step is a whole number of at least 0, and `every` of at least 1."""
    for name, value in steps.items():
        least = 1 if name == "every" else 0
        if math.isnan(value) or value < least or value != int(value):
            raise ValueError(
                f"{function}: {name} must be an integer of at least {least}, got {value}."
            )


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """Choose between two numbers: at once for a Python condition, in float32 for an array."""
    if isinstance(condition, bool):
        return yes if condition else no
    return jnp.where(condition, jnp.asarray(yes, jnp.float32), jnp.asarray(no, jnp.float32))
