"""Training for a given time, by a clock that the test sets."""

from unittest import mock

import pytest

from hift_ds.launch.callbacks import time_limit
from hift_ds.launch.callbacks.callback import Step


def test_the_time_is_the_mean_over_ranks_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which the other always takes one second longer; the time between steps does not count."""
    # Steps of 3 + 1, 2 + 0.5 and 1 + 1 seconds on this rank: before and after the ranks exchange them.
    clock = iter([0.0, 3.0, 4.0, 100.0, 102.0, 102.5, 200.0, 201.0, 202.0])
    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time_limit, "dist", mock.Mock(get_world_size=lambda: 2))
    limit = time_limit.TimeLimit(8.5)
    ends = []
    for number in (1, 2, 3):
        limit.before_step(number)
        own = limit.contribution(number)
        limit.taken(number)
        ends.append(limit.after_step(Step(number, {}, 0.0), own + (own + 1)))
    assert ends == [False, False, True]  # 3.5, 3.5 + 3.5, 7 + 2
    assert limit.elapsed == 9.0
