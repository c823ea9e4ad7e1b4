"""Tasks in processes of their own: results, failures and time limits."""

from pathlib import Path
from unittest import mock

import pytest

from hift_ds.evaluation.gpu_check import command, task
from hift_ds.evaluation.gpu_check.promises import promises
from hift_ds.evaluation.gpu_check.task import PARTS, Task
from hift_ds.evaluation.gpu_check.training import Workload

ROOT = Path(__file__).resolve().parents[3]


def test_a_failure_and_a_time_limit_are_rows_and_the_next_task_runs() -> None:
    wrong = Task("wrong", ("step",), 60, False, Workload("hift", "tiny", lengths=(8,), offload={"slots": 3}))
    slow = Task("slow", ("step",), 0.01, False, Workload("hift", "tiny", lengths=(8,)))
    good = Task("good", ("step",), 60, False, Workload("lora", "tiny", lengths=(8,), steps=1))
    saved: list[int] = []
    results = command.check([wrong, slow, good], 120, lambda found: saved.append(len(found)))
    assert saved == [1, 2, 3]
    assert "hift.offload.slots=3 is an unknown key" in results["wrong"]["reason"]
    assert results["slow"]["reason"] == "stopped after 0 s, its time limit"
    assert "reason" not in results["good"] and results["good"]["8"]["seconds"] > 0
    rows = command.table(results).splitlines()
    assert len(rows) == 5 and "unknown key" in rows[2] and "time limit" in rows[3], rows


def test_without_time_left_no_task_starts() -> None:
    task = Task("late", ("step",), 60, False, Workload("hift", "tiny"))
    assert command.check([task], 0, lambda found: None)["late"]["reason"] == "no time left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "'speed': expected some of weights,memory,step,ranks,methods"),
        (["--shapes", "tiny"], "--shapes tiny: expected two, a small and a large model"),
        (["--output", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_help_explains_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {text}" in shown for name, text in PARTS.items())


def test_what_needs_two_gpus_is_skipped_on_one_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    device = mock.Mock(device_name=lambda: "cuda", device_count=lambda: 1)
    monkeypatch.setattr(task, "get_accelerator", lambda: device)
    monkeypatch.setattr(command, "_compile", lambda: None)
    both = Task("two", ("ranks",), 60, False, Workload("hift", "tiny"), ranks=2)
    results = command.check([both], 60, lambda found: None)
    assert results == {"two": {"skipped": "skipped: it needs 2 GPUs, and this machine has 1"}}
    assert "it needs 2 GPUs, and this machine has 1" in command.table(results)
    (promise,) = promises(results, on_device=True)
    assert promise.holds is None and "this machine has 1" in promise.measured
    device.device_count = lambda: 2
    assert both.skipped() is None
