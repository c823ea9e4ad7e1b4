"""What a comparison runs: trainings, and timings of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hift_ds.evaluation.compare.settings import Budget, Row, TaskEntry
from hift_ds.evaluation.compare.step_times import StepTimes
from hift_ds.evaluation.tasks.loading import TaskData

Sets = Mapping[str, Mapping[int, TaskData]]  # by the task's name and seed


@dataclass(frozen=True)
class Training:
    """One training, and everything that decides its result.

    Attributes:
        tune: whether to score it on the validation set too.
        times: of its steps, where others run beside it, or where its budget is in seconds.
        beside: whether other trainings may run meanwhile.
    """

    row: Row
    entry: TaskEntry
    budget: Budget
    seed: int
    rate: float
    tune: bool
    times: StepTimes | None = None
    beside: bool = False

    @property
    def alone(self) -> bool:
        """Whether it runs without others."""
        return not self.beside

    @property
    def steps(self) -> int:
        """The number of optimizer steps; 0 for methods without training."""
        if not self.row.trained:
            return 0
        return self.budget.steps(self.row.batch_size, self.times.steps_in if self.times else lambda seconds: 0)

    def __str__(self) -> str:
        rate = f", rate {self.rate:g}" if self.tune else ""
        return f"{self.entry.task.name}, {self.row.label}, seed {self.seed}{rate}"


@dataclass(frozen=True)
class Timing:
    """Time the steps of a method on a task, with no other training beside it."""

    row: Row
    entry: TaskEntry
    seed: int
    alone: bool = field(default=True, init=False)

    def __str__(self) -> str:
        return f"{self.entry.task.name}, {self.row.label}, timed alone"


Job = Training | Timing
