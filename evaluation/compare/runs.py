"""What a comparison has done, in its folder, one line of JSON each: the store with which it continues."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import write_durably
from hift_ds.evaluation.compare.jobs import Job, Timing
from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime.ranks import decide

ATTEMPTS = 3  # give up on a training after the process has died in it this often


class Runs:
    """The finished trainings and timings by key. Rank 0 reads and writes the files for all ranks.

    Attributes:
        done: records of trainings, from runs.jsonl.
        timed: records of timings, from step_times.jsonl.
    """

    def __init__(self, folder: Path, rank: int):
        self.path, self.rank = folder / "runs.jsonl", rank
        self.times_path, self.begun_path = folder / "step_times.jsonl", folder / "begun.jsonl"
        finished, timed, begun = decide(
            lambda: [_lines(path) for path in (self.path, self.times_path, self.begun_path)]
        )
        self.done = {run["key"]: run for run in finished}
        self.timed = {run["key"]: run for run in timed}
        self.finished_now: set[str] = set()  # keys of this command
        self.tries: Counter[str] = Counter()  # attempts of this command
        # How often the process died in a training: the training began, and no stop was recorded.
        self.deaths: Counter[str] = Counter()
        for line in begun:
            self.deaths[line["key"]] += -1 if line.get("stopped") else 1
        self.must_be_alone = {line["key"] for line in begun if line.get("alone")}  # failed beside others

    def begin(self, key: str) -> str:
        """Record that a training begins; return the name of this attempt for `RankWatch`."""
        self.tries[key] += 1
        self._append(self.begun_path, {"key": key})
        return f"{key} {self.tries[key]}"

    def stop(self, key: str) -> None:
        """Record that a training was stopped on purpose, so that it does not count as a death."""
        self._append(self.begun_path, {"key": key, "stopped": True})

    def leave_alone(self, key: str) -> None:
        """Record that a training failed beside others, so that it runs without them; that does not count as a death."""
        self.must_be_alone.add(key)
        self._append(self.begun_path, {"key": key, "stopped": True, "alone": True})

    def add(self, key: str, job: Job, record: dict[str, Any]) -> None:
        """Store a finished training or timing."""
        self.finished_now.add(key)
        if isinstance(job, Timing):
            self.timed[key] = record
            self._append(self.times_path, {"key": key, **record})
        else:
            self.done[key] = record
            self._append(self.path, {"key": key, **record})

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        if self.rank == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a file, and remove an incomplete last line, which a killed process leaves."""
    if not path.exists():
        return []
    whole, _, cut = path.read_text(encoding="utf-8").rpartition("\n")
    if cut:
        write_durably(path, whole + "\n" if whole else "")
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: broken JSON ({error}); delete the line, and its training runs again"
            ) from None
    return found
