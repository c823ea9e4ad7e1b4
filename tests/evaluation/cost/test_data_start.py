"""The benchmark of starts with few and many rows."""

import json
from pathlib import Path

import pytest

from hift_ds.evaluation.cost import data_start
from hift_ds.evaluation.cost.data_start import STEPS, Start, line, write_rows


def test_rows_are_distinct_and_the_same_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", 50)
    write_rows(tmp_path / "b", 60)
    lines = (tmp_path / "a").read_text().splitlines()
    assert len({json.loads(one)["prompt"] for one in lines}) == 50
    assert (tmp_path / "b").read_text().splitlines()[:50] == lines


def test_a_line_has_seconds_and_mib() -> None:
    assert (
        line(Start(10_000, "first", 1, 2.04, 3 << 20, 1 << 19, 0, 0))
        == "| 10,000 | first | 1 | 2.0 | 3.0 | 0.5 | 0.0 |"
    )


@pytest.mark.slow
def test_all_starts_read_all_batches(tmp_path: Path) -> None:
    found = list(data_start.compare(tmp_path, [40], 2))
    assert [(one.start, one.rank) for one in found] == [(start, rank) for start in data_start.STARTS for rank in (0, 1)]
    assert all(one.examples == STEPS * data_start.BATCH and one.seconds > 0 for one in found)
    assert list(tmp_path.iterdir()) == []
