"""The benchmark of step times on a rank: its rows, its table, its files. No test asserts how fast anything is."""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hift_ds.evaluation.cost import step_time
from hift_ds.evaluation.cost.flops import forward_flops
from hift_ds.evaluation.cost.timed_methods import make_model
from hift_ds.launch.methods.table import TRAINED
from tests.evaluation.cost.test_step_time import linux
from tests.support.ranks import run_on_ranks


def run_benchmark(arguments: list[str]) -> tuple[list[Any], str]:
    """In a rank: the benchmark's results and what it printed."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        step_times = step_time.main(arguments)
    return step_times, printed.getvalue()


def test_it_times_all_and_prints_a_table(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    arguments = "--model-shape tiny --batch 2 --length 8 --stages 0,3 --dtypes fp32,bf16 --cycles 2"
    arguments += " --stock-every 2 --against full,plain,kept"
    ((step_times, printed),) = run_on_ranks(1, run_benchmark, [*arguments.split(), "--json", str(file)])
    assert [(c.dtype, c.stage) for c in step_times] == [("fp32", 0), ("fp32", 3), ("bf16", 0), ("bf16", 3)]
    for c in step_times:
        assert set(c.seconds) == {"hift", "full", "plain", "kept"}
        for values in (*c.seconds.values(), *map(c.ratios, c.seconds)):
            assert len(values) == 2 and min(values) > 0
        assert c.ratios("hift") == [1.0, 1.0]
    assert arguments in printed
    assert printed.count("\n| ") == 2 + len(step_times)
    assert len(json.loads(file.read_text())["step_times"]) == 4


def run_methods(arguments: str, file: Path) -> tuple[dict[Any, step_time.Row], str]:
    """Rows by method and stage, after a look at what holds for all of them."""
    common = "--model-shape tiny --batch 2 --length 8 --steps 3 --cycles 2 --json"
    ((rows, printed),) = run_on_ranks(1, run_benchmark, [*arguments.split(), *common.split(), str(file)])
    assert json.loads(file.read_text())["methods"] == [asdict(row) for row in rows]
    assert printed.count("\n| ") == 2 + len(rows)
    for row in rows:
        if row.reason:
            assert not row.seconds and f"- {row.method}: n/a: {row.reason}" in printed
            continue
        assert len(row.seconds) == (2 if row.method in ("hift", "badam") else 3)
        pairs = zip(row.seconds, row.full_seconds, strict=True)
        assert row.ratios == [mine / full for mine, full in pairs] and min(row.ratios) > 0
        assert row.tokens_per_second == 16 / statistics.median(row.seconds)
    return {(row.method, row.stage): row for row in rows}, printed


def test_each_method_has_a_row_or_a_reason(tmp_path: Path) -> None:
    found, printed = run_methods("--methods all", tmp_path / "methods.json")
    rows = {name: row for (name, _), row in found.items()}
    assert list(rows) == list(TRAINED)
    reasons = {name: row.reason for name, row in rows.items() if row.reason}
    assert set(reasons) == {"bitfit", "s4", "galore"}
    assert "no biases" in reasons["bitfit"] and "2 hidden layers" in reasons["s4"] and "rank 128" in reasons["galore"]
    assert "| bitfit | fp32 | 0 | n/a |" in printed

    full = rows["full"]
    assert full.ratios == [1.0] * 3
    # Each was timed beside full fine-tuning, not with one measurement of it for all.
    assert len({tuple(row.full_seconds) for row in rows.values() if row.seconds}) == len(rows) - len(reasons)

    everything = sum(p.numel() for p in make_model("tiny", "fp32").parameters())
    for name in ("full", "hift", "badam", "mezo", "mezo-adam", "lomo"):
        assert rows[name].trained_parameters == everything
    assert rows["lora"].trained_parameters == rows["mezo-lora"].trained_parameters == 3584
    forward = forward_flops(make_model("tiny", "fp32"), 16, 14)
    assert rows["mezo"].flops == 2 * forward
    assert rows["lomo"].flops == 2 * full.flops - forward  # clipping takes a backward pass of its own
    assert rows["hift"].flops == rows["badam"].flops
    assert forward < rows["lora"].flops < full.flops and forward < rows["hift"].flops < full.flops


def test_methods_count_alike_at_all_stages(tmp_path: Path) -> None:
    rows, _ = run_methods("--methods hift,lora --stages 0,3 --dtypes bf16", tmp_path / "methods.json")
    assert list(rows) == [(name, stage) for stage in (0, 3) for name in ("full", "hift", "lora")]
    for name in ("full", "hift", "lora"):
        one, other = rows[name, 0], rows[name, 3]
        assert one.dtype == other.dtype == "bf16"
        assert (one.flops, one.trained_parameters) == (other.flops, other.trained_parameters)


@linux
def test_memory_of_methods_is_set_against_full_fine_tuning(tmp_path: Path) -> None:
    rows, printed = run_methods("--methods bitfit,mezo --memory", tmp_path / "methods.json")
    full, mezo, none = rows["full", 0], rows["mezo", 0], rows["bitfit", 0]
    assert full.peak_ratio == 1.0 and none.peak is None
    assert full.peak and mezo.peak and 0 < mezo.peak < full.peak and mezo.peak_ratio == mezo.peak / full.peak
    assert f"| {full.peak / 2**20:.1f} | 1.00 |" in printed
