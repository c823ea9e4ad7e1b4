"""NCCL communicates from the current device, so each rank chooses its own before the first collective."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.ranks import run_on_ranks
from tests.support.training import SHORT, arguments

COLLECTIVES = ("all_gather_object", "all_reduce", "all_gather", "all_gather_into_tensor", "barrier", "broadcast",
    "broadcast_object_list", "gather_object", "init_process_group", "new_group", "reduce_scatter_tensor")  # fmt: skip


def events_of(work: Callable[[], Any]) -> list[str]:
    """The accelerator's devices as they are set, and the collectives of torch, in the order of their calls."""
    import torch
    from deepspeed.accelerator import get_accelerator

    events: list[str] = []
    patches: list[Any] = [
        mock.patch.object(get_accelerator(), "set_device", lambda device: events.append(f"device {device}"))
    ]
    for name in COLLECTIVES:
        original = getattr(torch.distributed, name)

        def recorded(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            events.append(_name)
            return _original(*args, **kwargs)

        patches.append(mock.patch.object(torch.distributed, name, recorded))
    for patch in patches:
        patch.start()
    try:
        work()
    finally:
        for patch in patches:
            patch.stop()
    return events


def command_on_a_rank(argv: list[str]) -> list[str]:
    from hift_ds.launch import train
    from hift_ds.launch.runtime import process

    with mock.patch.object(process, "time", types.SimpleNamespace(sleep=lambda seconds: None)):
        return events_of(lambda: train.main(argv))


def comparison_on_a_rank(argv: list[str]) -> list[str]:
    from hift_ds.evaluation.compare import command

    return events_of(lambda: command.main(argv))


def script_on_a_rank() -> list[str]:
    from tests.support import tiny

    return events_of(lambda: tiny.optimizer_step(tiny.initialize(tiny.Case(stage=2)), 0))


def assert_device_first(per_rank: list[list[str]]) -> None:
    for rank, events in enumerate(per_rank):
        assert events[0] == f"device {rank}", events[:5]
        assert len(set(events)) > 1, "no collective was seen"
        assert {event for event in events if event.startswith("device")} == {f"device {rank}"}


def test_training(tmp_path: Path) -> None:
    assert_device_first(run_on_ranks(2, command_on_a_rank, arguments(tmp_path / "run", *SHORT)))


def test_mistake_in_the_folder(tmp_path: Path) -> None:
    """The first collective of a run that is refused."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert_device_first(run_on_ranks(2, command_on_a_rank, arguments(tmp_path / "run", *SHORT)))


def test_comparison(tmp_path: Path) -> None:
    argv = ["--config", "configs/compare_tiny.yaml", "--set", f"output.dir={tmp_path}", "--only", "zero-shot"]
    assert_device_first(run_on_ranks(2, comparison_on_a_rank, argv))


def test_script() -> None:
    assert_device_first(run_on_ranks(2, script_on_a_rank))
