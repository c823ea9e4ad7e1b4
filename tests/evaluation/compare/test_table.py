"""The order of a comparison's trainings and the records of its cells, without any training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hift_ds.evaluation.compare.jobs import Job, Timing, Training
from hift_ds.evaluation.compare.runs import ATTEMPTS, Runs
from hift_ds.evaluation.compare.settings import dry, load_comparison
from hift_ds.evaluation.compare.table import Identity, Table
from hift_ds.evaluation.tasks.loading import TaskData
from tests.support.comparisons import TINY

ROWS = "methods=[zero-shot, {name: full, learning_rates: [1e-3, 1e-4]}, {name: hift, learning_rates: [1e-2, 1e-3]}]"
SIZE = 8  # examples of a step


def table(folder: Path, *overrides: str, beside: bool = False, retry_failed: bool = False, seeds: int = 2) -> Table:
    settings = [ROWS, f"seeds={list(range(seeds))}", f"output.dir={folder}", f"training.batch_size={SIZE}", *overrides]
    comparison = load_comparison(TINY, settings)
    report = {part: {"sha256": part} for part in ("train", "dev", "test")}
    data = {one.task.name: {seed: TaskData([], [], [], report) for seed in range(seeds)} for one in comparison.tasks}
    folder.mkdir(exist_ok=True)
    runs = Runs(folder, 0)
    return Table(comparison, data, runs, Identity("a model", "a machine", 1), beside=beside, retry_failed=retry_failed)


def name(job: Job) -> str:
    if isinstance(job, Timing):
        return f"time {job.entry.task.name} {job.row.label}"
    return f"{job.entry.task.name} {job.row.label} {job.seed} {job.rate:g}"


def finish(made: Table, key: str, job: Job, **more: Any) -> None:
    """Store a result. The validation score of a rate is the rate itself, so the highest rate is the best."""
    if isinstance(job, Timing):
        record: dict[str, Any] = {"status": "ok", "reason": None, "first": [1.0, 1.0], "later": 0.5}
    else:
        record = {"status": "ok", "dev_score": job.rate, "learning_rate": job.rate, "task": job.entry.task.name}
        record |= {"seed": job.seed, "steps": job.steps}
    made.runs.add(key, job, record | more)


def drain(made: Table, fits: Callable[[Job], bool] = lambda job: True) -> list[str]:
    """Run jobs one after another; return their names."""
    names = []
    while (found := made.next([], fits)) is not None:
        finish(made, *found)
        names.append(name(found[1]))
    return names


def test_a_seed_of_all_methods_comes_before_the_next_seed(tmp_path: Path) -> None:
    made = table(tmp_path)
    first = [f"{task} {row}" for task in ("arithmetic", "yes-no") for row in (
        "zero-shot 0 0", "full 0 0.001", "full 0 0.0001", "hift 0 0.01", "hift 0 0.001")]  # fmt: skip
    second = [f"{task} {row}" for task in ("arithmetic", "yes-no") for row in (
        "zero-shot 1 0", "full 1 0.001", "hift 1 0.01")]  # fmt: skip
    assert drain(made) == first + second  # the second seed has the best rate alone
    found = made.records()
    assert [(one["task"], one["label"], one["seed"]) for one in found] == [
        (task, label, seed)
        for task in ("arithmetic", "yes-no")
        for label in ("zero-shot", "full", "hift")
        for seed in (0, 1)
    ]
    assert found[3]["tuning"] == [{"learning_rate": rate, "score": rate, "loss": None} for rate in (1e-3, 1e-4)]
    assert all("dev_score" not in one and "key" not in one for one in found)


def test_another_table_of_the_folder_goes_on(tmp_path: Path) -> None:
    made = table(tmp_path)
    for _ in range(4):
        finish(made, *made.next([]))  # type: ignore[misc]
    assert [one["label"] for one in made.records()] == ["zero-shot", "full"]  # hift has one rate of two
    again = table(tmp_path)
    assert again.records() == made.records()
    assert drain(again)[0] == "arithmetic hift 0 0.001"


def test_side_by_side_what_waits_for_a_rate_lets_others_pass(tmp_path: Path) -> None:
    """A seed's training starts only when the rates of its cell are done; nothing starts twice."""
    made = table(tmp_path, "tasks=[yes-no]")
    running: dict[str, Job] = {}
    while (found := made.next(list(running))) is not None:
        running[found[0]] = found[1]
    # Zero-shot has one rate, so its result is not needed to know that of the second seed, but its cell is.
    assert [name(job) for job in running.values()] == [
        "yes-no zero-shot 0 0", "yes-no full 0 0.001", "yes-no full 0 0.0001",
        "yes-no hift 0 0.01", "yes-no hift 0 0.001",
    ]  # fmt: skip
    for key, job in list(running.items())[:3]:
        finish(made, key, job)
        del running[key]
    assert name(made.next(list(running))[1]) == "yes-no zero-shot 1 0"  # type: ignore[index]


def test_methods_are_timed_before_they_share_a_device(tmp_path: Path) -> None:
    """All of a task together, and alone; a task that nothing is missing for is not timed."""
    made = table(tmp_path, beside=True, seeds=1)
    names = drain(made)
    half = len(names) // 2
    assert names[:3] == ["time arithmetic full", "time arithmetic hift", "arithmetic zero-shot 0 0"]
    assert names[half : half + 2] == ["time yes-no full", "time yes-no hift"]
    assert sum(one.startswith("time") for one in names) == 4
    assert all(one["steps"] == 4 for one in made.records() if one["label"] != "zero-shot")  # 32 samples
    # Without others beside them, trainings of a number of samples need no times; they are the same trainings.
    alone = tmp_path / "alone"
    alone.mkdir()
    assert not any(one.startswith("time") for one in drain(table(alone, seeds=1)))
    (alone / "step_times.jsonl").write_text("")
    assert drain(table(alone, beside=True, seeds=1)) == []


def test_seconds_become_steps_by_the_times(tmp_path: Path) -> None:
    """1 + 1 + 6 x 0.5 = 5 seconds: eight steps, whatever else runs; another machine is timed again."""
    made = table(tmp_path, "budgets=[{seconds: 5}]", seeds=1)
    assert drain(made)[:2] == ["time arithmetic full", "time arithmetic hift"]
    assert {one["steps"] for one in made.records()} == {0, 8}
    beside = table(tmp_path, "budgets=[{seconds: 5}]", beside=True, seeds=1)
    assert drain(beside) == [] and beside.records() == made.records()
    other = table(tmp_path, "budgets=[{seconds: 5}]", seeds=1)
    other.given = Identity("a model", "another machine", 1)
    # Its steps take longer, so five seconds are five steps: these are other trainings.
    names = []
    while (found := other.next([])) is not None:
        finish(other, *found, **({"first": [1.0], "later": 1.0} if isinstance(found[1], Timing) else {}))
        names.append(name(found[1]))
    assert names[:3] == ["time arithmetic full", "time arithmetic hift", "arithmetic full 0 0.001"] and len(names) == 12
    assert {one["steps"] for one in other.records()} == {0, 5}


def test_a_failed_timing_fails_the_trainings(tmp_path: Path) -> None:
    made = table(tmp_path, "budgets=[{seconds: 5}]", "tasks=[yes-no]", seeds=1)
    key, job = made.next([])  # type: ignore[misc]
    finish(made, key, job, status="failed", reason="no room")
    names: list[str] = []
    while (found := made.next([])) is not None:
        why = made.why_untimed(found[1]) if isinstance(found[1], Training) else None
        names += [name(found[1])] if why and why["reason"] == "no room" else []
        finish(made, *found, **(why or {}))
    assert names == ["yes-no full 0 0.001", "yes-no full 0 0.0001"]
    again = table(tmp_path, "budgets=[{seconds: 5}]", "tasks=[yes-no]", seeds=1)
    assert again.next([]) is None
    retried = table(tmp_path, "budgets=[{seconds: 5}]", "tasks=[yes-no]", retry_failed=True, seeds=1)
    assert drain(retried) == ["time yes-no full", "yes-no full 0 0.001", "yes-no full 0 0.0001"]


def test_what_failed_beside_others_runs_alone(tmp_path: Path) -> None:
    """Also after the next command, and however often it was tried beside others: that is no death."""
    for _ in range(ATTEMPTS):
        made = table(tmp_path, "tasks=[yes-no]", beside=True, seeds=1)
        while (found := made.next([])) is not None and name(found[1]) != "yes-no full 0 0.001":
            finish(made, *found)
        assert found is not None
        made.runs.begin(found[0])
        made.runs.leave_alone(found[0])
    made = table(tmp_path, "tasks=[yes-no]", beside=True, seeds=1)
    key, job = made.next([])  # type: ignore[misc]
    assert name(job) == "yes-no full 0 0.001" and job.alone and made.runs.deaths[key] == 0
    finish(made, key, job)
    assert not made.next([])[1].alone  # type: ignore[index]


def test_what_cannot_be_timed_runs_alone(tmp_path: Path) -> None:
    """If its budget is in samples: its seconds are measured. A dry run times nothing."""
    made = table(tmp_path, "tasks=[yes-no]", beside=True, seeds=1)
    key, job = made.next([])  # type: ignore[misc]
    finish(made, key, job, status="failed", reason="no room")
    found = {}
    while (one := made.next([])) is not None:
        assert isinstance(one[1], Timing) or made.why_untimed(one[1]) is None
        found[name(one[1])] = one[1].alone
        finish(made, *one)
    assert [label for label, alone in found.items() if alone] == [
        "time yes-no hift", "yes-no full 0 0.001", "yes-no full 0 0.0001"
    ]  # fmt: skip
    few = table(tmp_path / "dry", beside=True)
    few.comparison = dry(few.comparison, tmp_path / "dry")
    assert not any(one.startswith("time") for one in drain(few))


def test_what_does_not_fit_into_the_time_is_passed_over(tmp_path: Path) -> None:
    made = table(tmp_path, "tasks=[yes-no]", seeds=1)
    names = drain(made, lambda job: job.row.label != "full")
    assert names == ["yes-no zero-shot 0 0", "yes-no hift 0 0.01", "yes-no hift 0 0.001"]
    assert [one["label"] for one in made.records()] == ["zero-shot", "hift"]


@pytest.mark.parametrize(
    ("tried", "best"),
    [
        ([(0.5, 1.0), (0.6, 2.0)], 1),
        ([(0.6, 2.0), (0.6, 1.0)], 1),  # of equal scores the least loss
        ([(0.6, None), (0.6, 1.0), (0.6, float("nan"))], 1),
        ([(float("nan"), 1.0), (0.1, 9.0)], 1),
    ],
)
def test_the_best_rate(tried: list[tuple[float, float | None]], best: int) -> None:
    from hift_ds.evaluation.compare.table import best_of

    runs = [{"status": "ok", "dev_score": score, "dev_loss": loss} for score, loss in tried]
    assert best_of(runs) is runs[best]
