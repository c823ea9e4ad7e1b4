"""The seconds of steps, by a clock that the test sets, and the steps that a number of seconds suffices for."""

from __future__ import annotations

from unittest import mock

import pytest

from hift_ds.evaluation.compare import step_times
from hift_ds.evaluation.compare.step_times import StepClock, StepTimes
from hift_ds.launch.callbacks.callback import Step


def ends_of(clock: StepClock, readings: list[float], monkeypatch: pytest.MonkeyPatch, other: float) -> list[bool]:
    """Let the clock time steps on two ranks, of which the other always takes `other` seconds longer."""
    times = iter(readings)
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(step_times, "dist", mock.Mock(get_world_size=lambda: 2))
    ends = []
    for number in range(1, len(readings) // 3 + 1):
        clock.before_step(number)
        own = clock.contribution(number)
        clock.taken(number)
        ends.append(clock.after_step(Step(number, {}, 0.0), own + (own + other)))
    return ends


def test_seconds_are_means_over_ranks_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens between steps does not count; an update counts with the next step; `enough` ends the training."""
    clock = StepClock(cycle=100, enough=8.5)
    # Steps of 3 + 1, 2 + 0.5 and 1 + 1 seconds on this rank: before and after the ranks exchange them.
    ends = ends_of(clock, [0.0, 3.0, 4.0, 100.0, 102.0, 102.5, 200.0, 201.0, 202.0], monkeypatch, 1.0)
    assert clock.seconds == [3.5, 3.5, 2.0] and ends == [False, False, True]
    assert clock.times() == StepTimes((3.5, 3.5, 2.0), 3.0)


def test_both_phases_are_whole_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cycles of two steps: 0.2 + 0.2 s is too short for a warm-up, then 0.4 + 0.4 s; two cycles of 0.8 s are timed."""
    seconds = [0.2, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.5]
    readings = [float(x) for n, one in enumerate(seconds) for x in (10 * n, 10 * n + one, 10 * n + one)]
    clock = StepClock(cycle=2, enough=float("inf"))
    assert ends_of(clock, readings, monkeypatch, 0.0) == [False] * 7 + [True]
    times = clock.times()
    assert times.first == pytest.approx((0.2, 0.2, 0.4, 0.4)) and times.later == pytest.approx(1.7 / 4)


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.5, 1), (1.0, 1), (1.1, 2), (3.0, 2), (3.1, 3), (3.5, 3), (3.6, 4), (4.0, 4), (13.0, 22)]
)
def test_steps_of_a_budget(seconds: float, steps: int) -> None:
    """The first step that reaches the seconds is the last: steps of 1, 2, 0.5, 0.5 ... seconds."""
    times = StepTimes((1.0, 2.0), 0.5)
    assert times.steps_in(seconds) == steps
    assert times.seconds_of(steps) >= seconds > times.seconds_of(steps - 1)


def test_a_training_beside_others_gets_the_times_it_has_alone() -> None:
    measured = {"steps": 4, "tokens": 80, "seconds": 99.0, "step_seconds": 9.0, "tokens_per_second": 1.0, "flops": 7.0}
    found = StepTimes((1.0, 2.0), 0.5).as_alone(measured | {"curve": [[2, 50.0, 40, 1.5], [4, 99.0, 80, 1.0]]})
    assert found == {
        "steps": 4, "tokens": 80, "seconds": 4.0, "step_seconds": 0.5, "tokens_per_second": 20.0, "flops": 7.0,
        "curve": [[2, 3.0, 40, 1.5], [4, 4.0, 80, 1.0]],
    }  # fmt: skip
