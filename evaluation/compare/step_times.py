"""How long the steps of a method take on a task, alone on the device.

A budget in seconds becomes a number of steps by these times. So the steps of a training, and its result, do not depend
on what else the machine does meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed import comm as dist

from hift_ds.launch.callbacks.callback import Callback, Step

WARM_UP, TIMED = 0.5, 1.5  # seconds; both phases last whole cycles
MOST_STEPS = 10_000  # of the training that is timed


@dataclass(frozen=True)
class StepTimes:
    """Seconds a step of one method on one task.

    Attributes:
        first: seconds of each of the first steps, in which HiFT makes the state of its blocks.
        later: mean seconds of a later step, over whole cycles.
    """

    first: tuple[float, ...]
    later: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> StepTimes:
        """Read the record of a timing."""
        return cls(tuple(record["first"]), record["later"])

    def steps_in(self, seconds: float) -> int:
        """Return the number of steps after which a training has taken at least `seconds`."""
        spent = 0.0
        for number, one in enumerate(self.first, 1):
            spent += one
            if spent >= seconds:
                return number
        number = len(self.first) + max(1, int((seconds - spent) / self.later))
        return number if self.seconds_of(number) >= seconds else number + 1

    def seconds_of(self, steps: int) -> float:
        """Return the seconds of a training of so many steps."""
        return sum(self.first[:steps]) + self.later * max(0, steps - len(self.first))

    def as_alone(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a training has measured beside others, with the times that it would have alone."""
        steps, seconds = measured["steps"], self.seconds_of(measured["steps"])
        curve = [[step, round(self.seconds_of(step), 3), *rest] for step, _, *rest in measured["curve"]]
        times = {"seconds": seconds, "step_seconds": self.later if steps > len(self.first) else seconds / steps}
        return {**measured, **times, "tokens_per_second": measured["tokens"] / seconds, "curve": curve}


class StepClock(Callback):
    """Time steps, averaged over the ranks, and end training after `TIMED` seconds that follow a warm-up.

    The ranks exchange their seconds before a step's update, so the update counts with the next step. What other
    callbacks do between two steps does not count.

    Args:
        cycle: steps of a cycle; 1 for methods without blocks.
        enough: seconds after which training ends in any case, because no budget is larger.
    """

    def __init__(self, cycle: int, enough: float) -> None:
        self.cycle, self.enough = cycle, enough
        self.seconds: list[float] = []  # of each step
        self._warm_up: int | None = None  # steps
        self._started = self._left = 0.0

    def before_step(self, number: int) -> None:
        """Start the clock of the step."""
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
        """Return whether enough steps are timed."""
        self.seconds.append(total / dist.get_world_size())
        if sum(self.seconds) >= self.enough:
            return True
        if len(self.seconds) % self.cycle:
            return False
        if self._warm_up is None:
            if sum(self.seconds) >= WARM_UP:
                self._warm_up = len(self.seconds)
            return False
        return sum(self.seconds[self._warm_up :]) >= TIMED

    def times(self) -> StepTimes:
        """Return the times: those of the warm-up step by step, and the mean of the steps after it."""
        first, later = self.seconds[: self._warm_up], self.seconds[self._warm_up or 0 :]
        return StepTimes(tuple(first), sum(later or first) / len(later or first))
