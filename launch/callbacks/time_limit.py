"""Training for a given time."""

from __future__ import annotations

import time

from deepspeed import comm as dist

from hift_ds.launch.callbacks.callback import Callback, Step


class TimeLimit(Callback):
    """End training after the first step that reaches `seconds` of training, averaged over the ranks."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.elapsed = self._started = 0.0

    def before_step(self, number: int) -> None:
        """Start the clock of the step; what other callbacks do after it is not counted."""
        self._started = time.perf_counter()

    def contribution(self, number: int) -> float:
        """Return the seconds that this rank spent on the step."""
        return time.perf_counter() - self._started

    def after_step(self, step: Step, total: float) -> bool:
        """Return whether the time is used up."""
        self.elapsed += total / dist.get_world_size()
        return self.elapsed >= self.seconds
