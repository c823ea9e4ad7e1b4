"""The benchmark runs and prints its table. How fast anything is, no test asserts."""

import json
from pathlib import Path

import pytest

from evaluation import efficiency, peak_memory
from tests.distributed import run_on_ranks


def run_benchmark(arguments: list[str]) -> tuple[list[efficiency.Contest], str]:
    """In a rank: the benchmark's results and what it printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        contests = efficiency.main(arguments)
    return contests, printed.getvalue()


def test_it_times_all_and_prints_a_table(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    arguments = "--model-shape tiny --batch 2 --length 8 --stages 0,3 --dtypes fp32,bf16 --cycles 2"
    arguments += " --stock-every 2 --against full,plain,kept"
    ((contests, printed),) = run_on_ranks(1, run_benchmark, [*arguments.split(), "--json", str(file)])
    assert [(c.dtype, c.stage) for c in contests] == [("fp32", 0), ("fp32", 3), ("bf16", 0), ("bf16", 3)]
    for c in contests:
        assert set(c.seconds) == {"hift", "full", "plain", "kept"}
        for values in (*c.seconds.values(), *map(c.ratios, c.seconds)):
            assert len(values) == 2 and min(values) > 0
        assert c.ratios("hift") == [1.0, 1.0]
    assert arguments in printed
    assert printed.count("\n| ") == 2 + len(contests)
    assert len(json.loads(file.read_text())["contests"]) == 4


@pytest.mark.skipif(not peak_memory.STATUS.exists(), reason="the kernel's figures of a process are Linux's")
def test_peak_memory_is_of_two_processes_each_with_and_without_checkpointing() -> None:
    peaks = peak_memory.compare("tiny", 2, 8)
    assert [(p.method, p.checkpointing) for p in peaks] == [
        ("full", False),
        ("hift", False),
        ("full", True),
        ("hift", True),
    ]
    assert all(2**26 < p.loaded < p.peak < 2**32 for p in peaks)
    assert peak_memory.table(peaks).count("\n| ") == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "0,4"], "'4': expected some of 0,1,2,3"),
        (["--dtypes", "fp16"], "'fp16': expected some of fp32,bf16"),
        (["--against", "lora"], "'lora': expected some of kept,full,plain"),
        (["--cycles", "0"], "'0': expected an integer of at least 1"),
        (["--json", "no/such/folder/times.json"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        efficiency.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
