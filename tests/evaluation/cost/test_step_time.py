"""The benchmark runs and prints its table. How fast anything is, no test asserts."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from hift_ds.evaluation.cost import file_state, peak_memory, step_time
from hift_ds.evaluation.cost.process_memory import STATUS
from hift_ds.evaluation.cost.timed_methods import Setup, TimedMethod, time_in_turns

TINY = Setup("tiny", "fp32", 0, 2, 8)
linux = pytest.mark.skipif(not STATUS.exists(), reason="the kernel's figures of a process are Linux's")


def test_steps_are_taken_in_turns_and_averaged_over_a_cycle() -> None:
    taken: list[str] = []

    def timed_method(name: str) -> TimedMethod:
        return TimedMethod(lambda batch: taken.append(name), between=lambda: taken.append("after " + name))

    seconds = time_in_turns({name: timed_method(name) for name in ("full", "hift")}, TINY, 2, 3, stock_every=2)
    full, hift = (["full", "after full"], ["hift", "after hift"])
    # A cycle's steps 0 and 2 are full fine-tuning's too; who begins, changes.
    assert taken == [*full, *hift, *hift, *full, *hift, *hift, *full, *hift, *hift, *full]
    assert [len(values) for values in seconds.values()] == [2, 2]


@pytest.mark.slow
@linux
def test_peak_memory_is_of_two_processes_each_with_and_without_checkpointing() -> None:
    peaks = peak_memory.compare(TINY)
    assert [(p.method, p.checkpointing) for p in peaks] == [
        ("full", False),
        ("hift", False),
        ("full", True),
        ("hift", True),
    ]
    assert all(2**26 < p.loaded < p.peak < 2**32 for p in peaks)
    assert peak_memory.table(peaks).count("\n| ") == 3


@pytest.mark.slow
@linux
def test_state_in_files_changes_no_loss_of_a_process_with_a_limit(tmp_path: Path) -> None:
    in_files, in_memory = file_state.compare(replace(TINY, dtype="bf16", stage=2), 2, str(tmp_path), {"seed": 1})
    assert in_files.losses == in_memory.losses and len(in_files.seconds) == 2
    assert in_files.limit == 2**30 > in_files.highest and in_memory.limit is None
    assert in_files.state == in_memory.state[::-1] and in_files.state[0] == 0 < in_files.state[1]
    assert not list(tmp_path.iterdir())
    assert file_state.table([in_files, in_memory]).count("\n| ") == 3


def test_settings_of_files_are_for_the_run_with_files_alone() -> None:
    offload = {"device": "nvme", "nvme": "moments", "nvme_path": "elsewhere", "moments": "8bit"}
    with mock.patch.object(file_state, "measure") as measured:
        list(file_state.compare(TINY, 2, "folder", {"seed": 1, "offload": offload}))
    in_files, in_memory = (call.args[3] for call in measured.call_args_list)
    assert in_files == {"seed": 1, "offload": {**offload, "nvme_path": "folder"}}
    assert in_memory == {"seed": 1, "offload": {"device": "cpu", "moments": "8bit"}}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "0,4"], "'4': expected some of 0,1,2,3"),
        (["--dtypes", "fp16"], "'fp16': expected some of fp32,bf16"),
        (["--against", "lora"], "'lora': expected some of kept,full,plain"),
        (["--cycles", "0"], "'0': expected an integer of at least 1"),
        (["--methods", "lora,qlora"], "'qlora': expected some of hift,full,lora"),
        (["--methods", "zero-shot"], "'zero-shot': expected some of hift,full,lora"),
        (["--methods", "all", "--against", "full"], "--against: not with --methods"),
        (["--steps", "0"], "'0': expected an integer of at least 1"),
        (["--files", "no/such/folder"], "not a folder"),
        (["--files", ".", "--hift", "[1]"], "expected a JSON object"),
        (["--json", "no/such/folder/times.json"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        step_time.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
