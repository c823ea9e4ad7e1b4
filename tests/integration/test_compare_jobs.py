"""Comparisons with several trainings at a time, stopped by --minutes, killed, and continued."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.comparisons import FEW, arguments, cells_of, environment_alone, lasting, lines, once
from tests.support.paths import REPOSITORY

ROWS = "methods=[zero-shot, full, {name: hift, learning_rates: [1e-2, 1e-3]}]"
SETTINGS = (ROWS, "tasks=[sst2]", "learning_rates=[1e-3, 1e-4]", "seeds=[0, 1]")
ENDLESS = "budgets=[{samples: 32}, {samples: 100000000}]"


def started(argv: list[str]) -> subprocess.Popen[str]:
    """A comparison in a process of its own."""
    command = [sys.executable, "-m", "hift_ds.evaluation.compare", *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment_alone(), **pipes)


def records(out: Path) -> dict[Any, dict[str, Any]]:
    return {(one["label"], one["seed"]): lasting(one) for one in lines(out / "results.jsonl")}


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)


def test_killed_side_by_side_and_continued_as_in_one_go(data: Path, tmp_path: Path) -> None:
    """SIGKILL while two trainings run: their processes end too, and the end is the table of one at a time."""
    one = tmp_path / "one"
    assert once(arguments(data, one, *SETTINGS))["code"] == 0
    out = tmp_path / "two"
    argv = [*arguments(data, out, *SETTINGS), "--jobs", "2"]
    process = started(argv)
    runs, begun = out / "runs.jsonl", out / "begun.jsonl"
    # Two timings, zero-shot, and two more trainings have begun, of which one is finished at least.
    wait_for(lambda: begun.exists() and len(lines(begun)) >= 5 and runs.exists() and len(lines(runs)) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive and len(children) >= 2
    kept = {line["key"] for line in lines(runs)}

    process = started(argv)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert "leaked" not in printed and "Traceback" not in printed, printed
    keys = [line["key"] for line in lines(runs)]
    assert len(keys) == len(set(keys)) == 2 * (1 + 1 + 1) + 2 and kept < set(keys)
    assert {line["key"] for line in lines(one / "runs.jsonl")} == set(keys)
    assert list(records(out)) == list(records(one)) and records(out) == records(one)
    found = lines(out / "results.jsonl")
    assert {(record["label"], record["seconds_are"]) for record in found} == {
        ("zero-shot", "measured"), ("full", "timed alone"), ("hift", "timed alone")
    }  # fmt: skip
    times = {line["label"]: line for line in lines(out / "step_times.jsonl")}
    for record in (one for one in found if one["label"] != "zero-shot"):
        own = times[record["label"]]
        assert record["seconds"] == pytest.approx(
            sum(own["first"][: record["steps"]]) + own["later"] * max(0, record["steps"] - len(own["first"]))
        )


def test_stopped_by_the_clock(data: Path, tmp_path: Path) -> None:
    """A training that never ends is stopped, and is no death; the report has the cells that are finished."""
    argv = arguments(data, tmp_path, FEW, "tasks=[rte]", ENDLESS)
    counts = []
    for _ in range(3):
        result = once([*argv, "--minutes", "0.5"])
        assert result["code"] == 75 and "Traceback" not in result["printed"], result["printed"]
        said = r"stopped, to have the report within 0\.5 minutes: (\d) of 8 cells are finished"
        counts.append(int(re.search(said, result["printed"])[1]))  # type: ignore[index]
        assert len(lines(tmp_path / "results.jsonl")) == counts[-1]
    assert counts == sorted(counts) and counts[-1] == 5  # a busy machine may need more than one go
    assert "mezo" in (tmp_path / "report.md").read_text()
    result = once([*argv, "--set", "budgets=[{samples: 32}]", "--minutes", "5"])
    assert result["code"] == 0 and result["ran"] == [] and "stopped, to" not in result["printed"]
    result = once([*argv, "--set", "budgets=[{samples: 100000000}]", "--only", "full", "--minutes", "0.4"])
    assert result["code"] == 75 and len(result["ran"]) == 1  # three stops are no three deaths


@pytest.mark.slow
def test_stopped_by_the_clock_side_by_side(data: Path, tmp_path: Path) -> None:
    process = started([*arguments(data, tmp_path, FEW, "tasks=[rte]", ENDLESS), "--jobs", "2", "--minutes", "2"])
    began = time.monotonic()
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 75 and "of 8 cells are finished" in printed, printed
    assert time.monotonic() - began < 120
    assert len(cells_of(tmp_path)) >= 4 and (tmp_path / "report.md").exists()
    begun = lines(tmp_path / "begun.jsonl")
    assert sum(one.get("stopped", False) for one in begun) == 2


DIES = """
import os, sys
from hift_ds.evaluation.compare import cell, command, step_times
train = cell.train
def dies(engine, data, pad, settings, *rest):
    is_timed = settings.training.max_steps in (1, step_times.MOST_STEPS)
    if settings.method.name == "full" and not is_timed and not os.path.exists(os.environ["MARK"]):
        open(os.environ["MARK"], "w").close()
        os.kill(os.getpid(), 9)
    return train(engine, data, pad, settings, *rest)
cell.train = dies
if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_dies_costs_one_attempt(data: Path, tmp_path: Path) -> None:
    """Its training runs again, without others beside it; nothing else is lost."""
    script = tmp_path / "dies.py"  # a process that is spawned runs it, too
    script.write_text(DIES)
    out = tmp_path / "out"
    argv = [*arguments(data, out, "methods=[full, hift]", "tasks=[rte]"), "--jobs", "2"]
    environment = environment_alone() | {"MARK": str(tmp_path / "mark")}
    done = subprocess.run(
        [sys.executable, str(script), *argv],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        timeout=400,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its process died (exit code -9); it is tried again without other trainings" in done.stderr
    begun = lines(out / "begun.jsonl")
    assert sum(-1 if one.get("stopped") else 1 for one in begun) == 4  # two timings and two trainings: no death counts
    found = {one["label"]: one for one in lines(out / "results.jsonl")}
    assert found["full"]["seconds_are"] == "measured" and found["hift"]["seconds_are"] == "timed alone"


UNSTARTED = """
import multiprocessing, sys
from hift_ds.evaluation.compare import command, processes
if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
def join(timeout):
    raise RuntimeError("no such device")
processes.join = join
"""


@pytest.mark.slow
def test_a_process_that_cannot_start_ends_the_comparison(data: Path, tmp_path: Path) -> None:
    """With one message, and no training counts as tried."""
    script = tmp_path / "unstarted.py"
    script.write_text(UNSTARTED)
    argv = [*arguments(data, tmp_path / "out", "methods=[full, hift]", "tasks=[rte]"), "--jobs", "2"]
    command = [sys.executable, str(script), *argv]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment_alone(), capture_output=True, timeout=400, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no such device" in done.stderr
    assert "error: --jobs 2: a process ended (exit code 1) before its first training" in done.stderr
    begun = lines(tmp_path / "out" / "begun.jsonl")
    assert [one.get("stopped", False) for one in begun] == [False, True] and not (
        tmp_path / "out" / "runs.jsonl"
    ).exists()


def test_stopped_by_a_signal_side_by_side(data: Path, tmp_path: Path) -> None:
    """SIGTERM ends the processes, and the trainings that ran are no deaths."""
    process = started([*arguments(data, tmp_path, FEW, "tasks=[rte]", ENDLESS.replace("32", "100000")), "--jobs", "2"])
    begun = tmp_path / "begun.jsonl"
    wait_for(lambda: begun.exists() and len(lines(begun)) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped; finished trainings are kept" in printed, printed
    assert not psutil.wait_procs(children, timeout=10)[1]
    keys = [(one["key"], one.get("stopped", False)) for one in lines(begun)]
    stored = [tmp_path / name for name in ("runs.jsonl", "step_times.jsonl")]
    finished = {one["key"] for path in stored if path.exists() for one in lines(path)}
    assert all((key, True) in keys for key, _ in keys if key not in finished)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--jobs", "0"], "--jobs: got 0; expected 1 or more"),
        (["--minutes", "0.1"], "--minutes: got 0.1; expected more than 0.33"),
        (["--jobs", "-1", "--minutes", "nan"], "--minutes: got nan"),
    ],
)
def test_wrong_numbers(given: list[str], message: str, data: Path, tmp_path: Path) -> None:
    result = once([*arguments(data, tmp_path / "out"), *given])
    assert result["code"] == 2 and message in result["printed"] and not (tmp_path / "out").exists()
