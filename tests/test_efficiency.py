"""The benchmark runs and prints its table. How fast anything is, no test asserts."""

import json
from pathlib import Path

import pytest

from evaluation import efficiency
from tests.distributed import run_on_ranks


def run_benchmark(arguments: list[str]) -> tuple[list[efficiency.Contest], str]:
    """In a rank: the benchmark's results and what it printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        contests = efficiency.main(arguments)
    return contests, printed.getvalue()


def test_it_times_all_three_and_prints_a_table(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    arguments = "--model-shape tiny --batch 2 --length 8 --stages 0,3 --dtypes fp32,bf16 --cycles 2 --stock-every 2"
    ((contests, printed),) = run_on_ranks(1, run_benchmark, [*arguments.split(), "--json", str(file)])
    assert [(c.dtype, c.stage) for c in contests] == [("fp32", 0), ("fp32", 3), ("bf16", 0), ("bf16", 3)]
    for c in contests:
        for values in (c.hift, c.stock, c.plain, c.to_stock, c.to_plain):
            assert len(values) == 2 and min(values) > 0
    assert arguments in printed
    assert printed.count("\n| ") == 2 + len(contests)
    assert len(json.loads(file.read_text())["contests"]) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "0,4"], "'4': expected some of 0,1,2,3"),
        (["--dtypes", "fp16"], "'fp16': expected some of fp32,bf16"),
        (["--cycles", "0"], "'0': expected an integer of at least 1"),
        (["--json", "no/such/folder/times.json"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        efficiency.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
