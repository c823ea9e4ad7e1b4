"""The table of a comparison: its cells, the trainings that they need, and the order of these.

A cell is a method on a task with one budget and one seed. With the first seed, a cell has a training for each learning
rate; the one with the best score on the validation set is the cell's result, and its rate is that of the other seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hift_ds.evaluation.compare.jobs import Job, Sets, Timing, Training
from hift_ds.evaluation.compare.runs import Runs
from hift_ds.evaluation.compare.settings import Budget, Comparison, Row, TaskEntry
from hift_ds.evaluation.compare.step_times import StepTimes


@dataclass(frozen=True)
class Identity:
    """What decides results beside the settings.

    Attributes:
        model: the model with a hash of its files.
        machine: a description; it decides times.
    """

    model: Any
    machine: str
    ranks: int


class Table:
    """The cells of a comparison, what is still to do for them, and in which order.

    The first seed of all methods comes before the second one, so that what is finished early is a whole small table.

    Args:
        given: what the keys contain beside the settings.
        beside: whether trainings run beside each other.
        retry_failed: whether trainings that failed in earlier commands run again.
    """

    def __init__(
        self,
        comparison: Comparison,
        data: Sets,
        runs: Runs,
        given: Identity,
        *,
        beside: bool,
        retry_failed: bool,
    ) -> None:
        self.comparison, self.data, self.runs, self.given = comparison, data, runs, given
        self.beside, self.retry_failed = beside, retry_failed
        self.asked: set[str] = set()  # keys of the trainings that the cells need

    def next(self, running: Collection[str], fits: Callable[[Job], bool] = lambda job: True) -> tuple[str, Job] | None:
        """Return the next job that can start, with its key, or None.

        Args:
            running: keys of the jobs that run.
            fits: whether there is time for a job.
        """
        missing = ((key, job) for key, job in self._missing() if key not in running and fits(job))
        return next(missing, None)

    def why_untimed(self, training: Training) -> dict[str, Any] | None:
        """Return the record of a training's timing if that has failed, so that its steps are unknown; else None."""
        timed = self._times(training.row, training.entry) if training.budget.is_timed and training.row.trained else None
        return timed if timed is not None and timed["status"] != "ok" else None

    def total(self) -> int:
        """Return the number of cells."""
        one = self.comparison
        return len(one.budgets) * len(one.tasks) * len(one.rows) * len(one.seeds)

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the finished cells, in the order of the settings."""
        one = self.comparison
        found = []
        for budget, entry, row in itertools.product(one.budgets, one.tasks, one.rows):
            for number in range(len(one.seeds)):
                record = self._record(row, entry, budget, number)
                found += [record] if record is not None else []
        return found

    def _missing(self) -> Iterator[tuple[str, Job]]:
        one = self.comparison
        for number, budget, entry in itertools.product(range(len(one.seeds)), one.budgets, one.tasks):
            rows = [row for row in one.rows if self._tried(row, entry, budget, number) is None]
            untimed = [row for row in rows if self._is_timed(row, budget) and self._times(row, entry) is None]
            for row in untimed:
                timing = Timing(row, entry, one.seeds[0])
                yield self.key(timing), timing
            for row in rows:
                for training in () if row in untimed else self._trainings(row, entry, budget, number) or ():
                    if self._run(training) is None:
                        yield self.key(training), training

    def _is_timed(self, row: Row, budget: Budget) -> bool:
        return row.trained and budget.at_most is None and (self.beside or budget.is_timed)

    def _times(self, row: Row, entry: TaskEntry) -> dict[str, Any] | None:
        """Return the record of a timing, or None if it has not been done."""
        key = self.key(Timing(row, entry, self.comparison.seeds[0]))
        known = self.runs.timed.get(key)
        if known is not None and known["status"] == "failed" and self._tries_again(key):
            return None
        return known

    def _tries_again(self, key: str) -> bool:
        return self.retry_failed and key not in self.runs.finished_now

    def _trainings(self, row: Row, entry: TaskEntry, budget: Budget, number: int) -> list[Training] | None:
        """Return the trainings of a cell; None as long as its learning rate or the times of its steps are unknown."""
        timed = self._times(row, entry) if self._is_timed(row, budget) else None
        if timed is None and row.trained and budget.is_timed:
            return None
        times = StepTimes.of(timed) if timed is not None and timed["status"] == "ok" else None
        rates = row.learning_rates
        if number > 0:
            first = self._tried(row, entry, budget, 0)
            if first is None:
                return None
            best = best_of(first)
            rates = (best.get("learning_rate") or rates[0],) if best["status"] == "ok" else rates[:1]
        tune, seed = number == 0 and len(rates) > 1, self.comparison.seeds[number]
        trainings = [Training(row, entry, budget, seed, rate, tune, times) for rate in rates]
        # What could not be timed runs alone, so that its seconds can be measured.
        beside = self.beside and (times is not None or not self._is_timed(row, budget))
        return [replace(one, beside=beside and self.key(one) not in self.runs.must_be_alone) for one in trainings]

    def _tried(self, row: Row, entry: TaskEntry, budget: Budget, number: int) -> list[dict[str, Any]] | None:
        """Return the records of a cell's trainings, or None if one is missing."""
        trainings = self._trainings(row, entry, budget, number)
        found = [self._run(training) for training in trainings or ()]
        return None if trainings is None or None in found else found  # type: ignore[return-value]

    def _run(self, training: Training) -> dict[str, Any] | None:
        """Return the record of a training, or None if it has not been done."""
        key = self.key(training)
        self.asked.add(key)
        known = self.runs.done.get(key)
        if known is None or (known["status"] == "failed" and self._tries_again(key)):
            return None
        # Several rows and budgets may share a run.
        return known | {"label": training.row.label, "budget": str(training.budget)}

    def _record(self, row: Row, entry: TaskEntry, budget: Budget, number: int) -> dict[str, Any] | None:
        """Return the record of a cell, or None if it is not finished."""
        tried = self._tried(row, entry, budget, number)
        first = self._tried(row, entry, budget, 0)
        if tried is None or first is None:
            return None
        names = {"learning_rate": "learning_rate", "score": "dev_score", "loss": "dev_loss"}
        tuning = [{name: one.get(own) for name, own in names.items()} for one in first]
        best = {key: value for key, value in best_of(tried).items() if key not in ("key", "dev_score", "dev_loss")}
        return best | {"tuning": tuning}

    def key(self, job: Job) -> str:
        """Hash everything that decides the result. A stored one is reused only if all of it is the same."""
        comparison, row = self.comparison, job.row
        training = {key: value for key, value in row.sections["training"].items() if key != "rank_timeout"}
        report = self.data[job.entry.task.name][job.seed].report
        parts: dict[str, Any] = {
            "model": self.given.model,
            "method": row.method,
            "sections": row.sections | {"training": training},
            "task": job.entry.task.name,
            "data": {part: report[part]["sha256"] for part in ("train", "dev", "test")},
            "max_length": comparison.data.max_length,
            "seed": job.seed,
            "ranks": self.given.ranks,
        }
        if isinstance(job, Timing):
            parts |= {"machine": self.given.machine}
        else:
            parts |= {
                "shots": row.shots if row.method == "icl" else None,
                "budget": str(job.budget) if row.trained else None,
                "learning_rate": job.rate,
                "tune": job.tune,
                "bootstrap": comparison.evaluation.bootstrap,
            }
            # Trainings of equal time on another machine are others.
            parts |= {"steps": job.steps} if row.trained and job.budget.is_timed else {}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def best_of(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the run with the best validation score, of equal ones that with the least loss; if none is ok, the first.

    Runs of earlier versions have no loss; a loss that is not a number counts as the greatest.
    """
    ok = [run for run in tried if run["status"] == "ok"]
    scored = [run for run in ok if run.get("dev_score") is not None and run["dev_score"] == run["dev_score"]]

    def rank(run: dict[str, Any]) -> tuple[float, float]:
        loss = run.get("dev_loss")
        return run["dev_score"], -loss if loss is not None and loss == loss else -math.inf

    return max(scored, key=rank) if scored else (ok or list(tried))[0]
