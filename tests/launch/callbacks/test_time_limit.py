"""Training for a given time, by a clock that the test sets."""

from unittest import mock

import pytest

from hift_ds.launch.callbacks import time_limit
from hift_ds.launch.callbacks.callback import Step


def test_the_time_is_the_mean_over_ranks_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which the other always takes one second longer; the time between steps does not count."""
    clock = iter([0.0, 3.0, 100.0, 102.0, 200.0, 201.0])  # steps of 3, 2 and 1 seconds on this rank
    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time_limit, "dist", mock.Mock(get_world_size=lambda: 2))
    limit = time_limit.TimeLimit(7.0)
    ends = []
    for number in (1, 2, 3):
        limit.before_step(number)
        own = limit.contribution(number)
        ends.append(limit.after_step(Step(number, {}, 0.0), own + (own + 1)))
    assert ends == [False, False, True]  # 3.5, 6 and 7.5 seconds
    assert limit.elapsed == 7.5
