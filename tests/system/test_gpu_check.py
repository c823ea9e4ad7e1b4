"""``python -m evaluation.gpu_check`` on the CPU: all parts on a tiny model, with a table and a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hift_ds.evaluation.cost.timed_methods import join_world
from hift_ds.evaluation.gpu_check import command, weights
from hift_ds.evaluation.gpu_check.task import PARTS, run


@pytest.fixture(autouse=True)
def linear_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves its own function in place of torch's after an engine at ZeRO 3, and later plans would differ."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tasks here, which saves a process for each; tests/evaluation/gpu_check has the processes."""

    def check(chosen: Any, limit: float, save: Any) -> dict[str, Any]:
        return {task.name: {"task_seconds": 0.0, **list(run(task))[-1]} for task in chosen}

    monkeypatch.setattr(command, "check", check)


def test_all_parts_run_on_a_tiny_model(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu-check.json"
    assert command.main(["--output", str(output)]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    results = found["results"]
    tasks = command.tasks("tiny", "tiny", on_device=False)
    assert list(results) == [task.name for task in tasks] and {part for task in tasks for part in task.parts} == {
        *PARTS
    }
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
