"""The time to the end of a run, from the steps, evaluations and saves so far."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.config.settings import TrainingSettings

_KEPT = 5  # steps of a block whose times count: a machine may become slower


class Forecast(Callback):
    """Estimates the time to the end. It comes first of the callbacks, so that it measures the steps alone.

    Blocks differ in time, so each has its own estimate: the median of its last steps. Steps of the first cycle also
    create optimizer state; they count until there are others. Evaluations and saves count as they were measured, and
    what else happens between steps, such as writing records, with its mean. Checkpoints that `training.keep_best` adds
    do not count: nobody knows when a model is the best.

    Args:
        training: settings of the run.
        evaluates: examples are held out, so the run ends with an evaluation.
        saving: seconds that a save takes by estimate; None: not known.
        clock: returns seconds.

    Attributes:
        saving: seconds of the last save; of the estimate, as long as there is none.
    """

    def __init__(
        self,
        training: TrainingSettings,
        evaluates: bool,
        saving: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.training, self.evaluates, self.saving, self.clock = training, evaluates, saving, clock
        self._block_after: Callable[[int], int] = lambda steps: 0
        self._cycle = 1
        self._times: dict[int, deque[float]] = {}  # of the steps of each block
        self._first_cycle: dict[int, int] = {}  # of the blocks that were only trained in their first cycle
        self._evaluations: list[float] = []
        self._started = 0.0  # when the last step began
        self._ended: float | None = None  # when it ended, or what followed and is counted elsewhere
        self._elsewhere, self._gaps = 0.0, 0  # seconds between steps, and how many steps came after others
        self._first: tuple[int, float, float] | None = None  # estimate: steps done, seconds left, clock

    def use(self, block_after: Callable[[int], int], cycle: int) -> None:
        """Begin with other blocks, whose times are not known.

        Args:
            block_after: returns the block that is trained after so many more steps.
            cycle: steps after which the blocks repeat; 0: there are no blocks.
        """
        self._block_after, self._cycle = block_after, max(1, cycle)
        self._times, self._first_cycle, self._ended = {}, {}, None

    def evaluated(self, seconds: float) -> None:
        """Count an evaluation, before training or after a step."""
        self._evaluations.append(seconds)
        self._pause(seconds)

    def saved(self, seconds: float) -> None:
        """Count a save."""
        self.saving = seconds
        self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        if self._ended is not None:
            self._ended += seconds

    def before_step(self, number: int) -> None:
        """Start the clock of the step."""
        self._started = self.clock()
        if self._ended is not None:
            self._elsewhere += self._started - self._ended
            self._gaps += 1

    def describe(self, step: Step) -> None:
        """Stop the clock of the step."""
        self._ended = self.clock()
        seconds, block, cycle = self._ended - self._started, step.record["block"], step.record["cycle"]
        if block not in self._times:
            self._times[block] = deque(maxlen=_KEPT)
            self._first_cycle[block] = cycle
        elif self._first_cycle.get(block, cycle) != cycle:
            self._times[block].clear()
            del self._first_cycle[block]
        self._times[block].append(seconds)

    @property
    def longest(self) -> float:
        """Seconds of the longest of the last steps on each block."""
        return max((seconds for times in self._times.values() for seconds in times), default=0.0)

    def left(self, done: int) -> float | None:
        """Return the seconds from now to the end of the run, its last evaluation included and the export not.

        None: not all of the coming blocks have been trained yet.

        Args:
            done: steps done. The save after the last of them is still to come, if there is one.
        """
        steps = self.training.max_steps - done
        coming = [self._block_after(index) for index in range(min(steps, self._cycle))]
        if not all(block in self._times for block in coming):
            return None
        cycles, rest = divmod(steps, self._cycle)
        seconds = [statistics.median(self._times[block]) for block in coming]
        total = cycles * sum(seconds) + sum(seconds[:rest])
        total += steps * self._elsewhere / max(1, self._gaps)
        total += self._evaluations_after(done) * (statistics.fmean(self._evaluations) if self._evaluations else 0.0)
        total += self._saves_after(done - 1) * (self.saving or 0.0)
        if self._first is None:
            self._first = done, total, self.clock()
        return total

    def outcome(self) -> dict[str, Any] | None:
        """Return the first estimate beside what it took until now: `after_step`, `predicted_seconds`, `seconds`."""
        if self._first is None:
            return None
        step, predicted, at = self._first
        return {"after_step": step, "predicted_seconds": predicted, "seconds": self.clock() - at}

    def _evaluations_after(self, step: int) -> int:
        every, last = self.training.eval_every, self.training.max_steps
        return _multiples(every, step, last) + (self.evaluates and not (every and step >= last))

    def _saves_after(self, step: int) -> int:
        training = self.training
        at_end = bool(training.save_every or training.keep_best) and step < training.max_steps
        return _multiples(training.save_every, step, training.max_steps) + at_end


def _multiples(every: int | None, after: int, end: int) -> int:
    """Return how many multiples of a number lie between two steps, both excluded."""
    return max(0, (end - 1) // every - max(after, 0) // every) if every else 0


def as_time(seconds: float) -> str:
    """Return a time in two units, such as `3 min 20 s` or `2 d 3 h`."""
    left = round(seconds)
    for size, name, below, name_below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= size:
            return f"{left // size} {name} {left % size // below} {name_below}"
    return f"{left} s"
