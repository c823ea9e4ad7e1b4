"""Seconds by part, by a clock that the test sets."""

from __future__ import annotations

import time

import pytest

from hift_ds.evaluation.cost import spent
from hift_ds.evaluation.cost.spent import Spent, process_age


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_a_part_counts_without_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, parts = Clock(), Spent()
    monkeypatch.setattr(spent, "time", clock)
    with parts.part("cell"):
        clock.now += 1
        with parts.part("train"):
            clock.now += 10
            parts.add("steps", 7)
            with parts.part("model"):
                clock.now += 100
        clock.now += 2
        with parts.part("test"):
            clock.now += 1000
        with parts.part("test"):
            clock.now += 1000
    with parts.part("cell"):
        clock.now += 0.5
    assert parts.seconds == {"cell": 3.5, "train": 3, "steps": 7, "model": 100, "test": 2000}


def test_a_part_that_fails_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, parts = Clock(), Spent()
    monkeypatch.setattr(spent, "time", clock)
    with pytest.raises(ValueError, match="broken"), parts.part("cell"):
        clock.now += 1
        with parts.part("train"):
            clock.now += 2
            raise ValueError("broken")
    assert parts.seconds == {"cell": 1, "train": 2}


def test_a_process_grows_older() -> None:
    age = process_age()
    time.sleep(0.05)
    assert 0 < age < process_age() < age + 600
