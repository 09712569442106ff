"""Schedules: values by hand, the same for Python and traced steps, and the target reached exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunax import schedules

ALL = {
    "constant": schedules.constant(0.9),
    "constant every 3": schedules.constant(0.9, every=3),
    "one_shot": schedules.one_shot(0.9, step=4),
    "polynomial": schedules.polynomial(0.9, begin_step=3, end_step=17, every=4),
    "linear from 0.2": schedules.polynomial(
        0.7, begin_step=0, end_step=10, every=3, power=1, initial=0.2
    ),
    "square root": schedules.polynomial(0.7, begin_step=2, end_step=10, every=1, power=0.5),
    "downwards": schedules.polynomial(0.1, begin_step=0, end_step=10, every=5, initial=0.9),
    "alternating": schedules.alternating(0.8, 2, 13, compressed_steps=3, dense_steps=2),
}


def updates(schedule, steps=40):
    return [t for t in range(steps) if schedule.is_update_step(t)]


def test_update_steps():
    assert updates(ALL["constant"]) == [0]
    assert updates(ALL["constant every 3"], 10) == [0, 3, 6, 9]
    assert updates(ALL["one_shot"]) == [4]
    assert updates(ALL["polynomial"]) == [3, 7, 11, 15, 17]
    assert updates(ALL["linear from 0.2"]) == [0, 3, 6, 9, 10]
    assert updates(ALL["alternating"]) == [2, 5, 7, 10, 12, 13]


def test_values():
    assert [ALL["one_shot"](t) for t in (0, 3, 4, 99)] == [0.0, 0.0, 0.9, 0.9]
    assert [round(ALL["linear from 0.2"](t), 6) for t in (0, 5, 10, 11)] == [0.2, 0.45, 0.7, 0.7]
    # Zhu and Gupta's cubic halfway: 0.9 (1 - 0.5**3).
    assert ALL["polynomial"](10) == pytest.approx(0.9 * (1 - 0.5**3))
    assert [ALL["alternating"](t) for t in range(1, 15)] == [
        0.0, 0.8, 0.8, 0.8, 0.0, 0.0, 0.8, 0.8, 0.8, 0.0, 0.0, 0.8, 0.8, 0.8,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_ends_at_the_target_exactly(name):
    schedule = ALL[name]
    last = max(updates(schedule))
    for step in (last, last + 1, 10**6):
        assert schedule(step) == schedule.target
    assert float(jax.jit(schedule)(last)) == np.float32(schedule.target)


@pytest.mark.parametrize("name", ALL)
def test_traced_steps_give_what_python_steps_give(name):
    schedule = ALL[name]
    sparsity, due = jax.jit(jax.vmap(lambda t: (schedule(t), schedule.is_update_step(t))))(
        jnp.arange(40)
    )
    assert sparsity.dtype == jnp.float32 and due.dtype == jnp.bool_
    np.testing.assert_allclose(sparsity, [schedule(t) for t in range(40)], rtol=1e-5, atol=1e-6)
    assert due.tolist() == [bool(schedule.is_update_step(t)) for t in range(40)]
    assert isinstance(schedule(5), float)


@given(
    target=st.floats(0, 1),
    begin=st.integers(0, 50),
    span=st.integers(1, 60),
    every=st.integers(1, 70),
    power=st.sampled_from([0.5, 1, 2, 3]),
)
def test_polynomial_rises_to_its_target_whatever_divides(target, begin, span, every, power):
    schedule = schedules.polynomial(target, begin, begin + span, every, power=power)
    steps = updates(schedule, begin + span + every + 1)
    values = [schedule(t) for t in steps]
    assert steps[0] == begin
    assert steps[-1] == begin + span
    assert values == sorted(values)
    assert values[-1] == target
    assert all(0 <= v <= 1 for v in values)


def test_schedules_are_values():
    assert schedules.one_shot(0.5, 3) == schedules.one_shot(0.5, step=3)
    assert len({schedules.constant(0.5), schedules.constant(0.5), schedules.constant(0.6)}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: schedules.constant(80),
            r"constant: sparsity must lie in \[0, 1\], got 80. Pass 0.8 for 80%",
        ),
        (lambda: schedules.constant(-0.1), r"constant: .*got -0.1"),
        (lambda: schedules.constant(float("nan")), r"constant: .*got nan"),
        (
            lambda: schedules.constant(0.5, every=0),
            r"constant: every must be an integer of at least 1, got 0",
        ),
        (
            lambda: schedules.one_shot(0.5, step=-1),
            r"one_shot: step must be an integer of at least 0, got -1",
        ),
        (lambda: schedules.one_shot(0.5, step=1.5), r"one_shot: step must be an integer"),
        (
            lambda: schedules.polynomial(0.5, 10, 10, 1),
            r"polynomial: end_step must come after begin_step.*one_shot",
        ),
        (
            lambda: schedules.polynomial(0.5, 0, 10, 1, power=0),
            r"polynomial: power must be positive, got 0",
        ),
        (
            lambda: schedules.polynomial(0.5, 0, 10, 1, initial=20),
            r"polynomial: initial must lie .*got 20",
        ),
        (
            lambda: schedules.alternating(0.5, 10, 5, 1, 1),
            r"alternating: end_step must not come before begin_step",
        ),
        (
            lambda: schedules.alternating(0.5, 0, 5, 0, 1),
            r"alternating: phases must last at least one step",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", [None, "0.5", "ninety", [0.5]])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"constant: sparsity must be a number in \[0, 1\]"):
        schedules.constant(value)
