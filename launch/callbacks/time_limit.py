"""Training for a given time."""

from __future__ import annotations

import time

from deepspeed import comm as dist

from hift_ds.launch.callbacks.callback import Callback, Step


class TimeLimit(Callback):
    """End training after the first step that reaches `seconds` of training, averaged over the ranks.

    The ranks exchange their seconds before a step's update; the update itself counts with the next step.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.elapsed = self._started = self._left = 0.0

    def before_step(self, number: int) -> None:
        """Start the clock of the step; what other callbacks do after it is not counted."""
        self._started = time.perf_counter()

    def contribution(self, number: int) -> float:
        """Return the seconds that this rank has trained since the last contribution."""
        now, left = time.perf_counter(), self._left
        spent, self._started = now - self._started, now
        return left + spent

    def taken(self, number: int) -> None:
        """Stop the clock of the step."""
        self._left = time.perf_counter() - self._started

    def after_step(self, step: Step, total: float) -> bool:
        """Return whether the time is used up."""
        self.elapsed += total / dist.get_world_size()
        return self.elapsed >= self.seconds
