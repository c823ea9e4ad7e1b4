"""``python -m evaluation.gpu_check`` on the CPU: all parts on a tiny model, with a table and a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from hift_ds.evaluation.cost.timed_methods import join_world
from hift_ds.evaluation.gpu_check import command, several, weights
from hift_ds.evaluation.gpu_check.task import PARTS, run
from tests.support.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def linear_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves its own function in place of torch's after an engine at ZeRO 3, and later plans would differ."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tasks here, which saves a process for each; tests/evaluation/gpu_check has the processes."""

    def check(chosen: Any, limit: float, save: Any) -> dict[str, Any]:
        return {task.name: {"task_seconds": 0.0, **list(run(task))[-1]} for task in chosen if task.ranks == 1}

    monkeypatch.setattr(command, "check", check)


def test_all_parts_run_on_a_tiny_model(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu-check.json"
    assert command.main(["--output", str(output)]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    results = found["results"]
    tasks = command.tasks("tiny", "tiny", on_device=False)
    assert list(results) == [task.name for task in tasks if task.ranks == 1]
    assert {part for task in tasks for part in task.parts} == {*PARTS}
    assert not [name for name, result in results.items() if "reason" in result]
    assert len(results["weights"]["cases"]) == 13 and all(promise["holds"] for promise in found["promises"])
    hift = results["hift large, prefetch"]
    for length in ("16", "32"):
        assert hift[length]["planned"] > 0 and hift[length]["trace"]["operations"] > 100
        assert len(hift[length]["blocks"]) == 4
        assert hift[length]["seconds"] == pytest.approx(sum(hift[length]["blocks"]) / 4, rel=0.5)
    assert hift["host"]["counted"] >= (2.125 + 8) * hift["parameters"]
    assert results["badam large"]["16"]["every_100"] > 0
    shown = capsys.readouterr().out
    assert all(f"| {name} |" in shown for name in results) and "| promise |" in shown


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_learning_rate_that_is_a_tenth_too_high_is_past_the_bound(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_world()
    start, expected = weights._plain(dtype)
    monkeypatch.setitem(weights.ADAMW, "lr", 1.1 * weights.ADAMW["lr"])
    assert weights._error(weights._train(dtype, 2, False, {}), start, expected) > weights.BOUNDS[dtype]


def test_each_part_has_its_tasks() -> None:
    names = {
        part: [t.name for t in command.tasks("llama-3.2-1b", "llama-7b", True) if part in t.parts] for part in PARTS
    }
    assert names["weights"] == ["weights"]
    assert {"badam large", "lora large", "lomo large", "full small"} <= set(names["methods"])
    assert dataclasses.asdict(command.tasks("tiny", "tiny", True)[2])["work"]["lengths"] == (512, 8192)


def of_two_ranks() -> dict[str, Any]:
    """In a rank: one of the runs on several ranks."""
    deepspeed.init_distributed(verbose=False)
    return several._measure("tiny", 16, 1, 2, {"weights": "cpu"}, on_host=False)


def test_a_run_on_two_ranks_is_planned_timed_and_profiled() -> None:
    for found in run_on_ranks(2, of_two_ranks):
        assert found["planned"] > 0 < found["seconds"] and found["trace"]["operations"] > 100


@pytest.mark.slow
def test_what_two_gpus_would_show_runs_on_two_gloo_ranks_through_the_launcher(tmp_path: Path) -> None:
    output = tmp_path / "gpu-check.json"
    assert command.main(["--only", "ranks", "--output", str(output)]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert len(found["promises"]) == 15 and all(promise["holds"] for promise in found["promises"])
    assert found["results"][command.TWO]["continued"]["equal"]
