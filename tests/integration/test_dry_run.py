"""A dry run takes the first steps of every cell, keeps nothing, and says which cells would fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.comparisons import arguments, once, write_data

METHODS = "methods=[zero-shot, full, {name: hift, deepspeed: {hift: {strategy: top2down}}}, bitfit]"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Of a comparison of 128 steps and a minute with two rates and seeds, in which BitFit runs out of memory."""
    folder = tmp_path_factory.mktemp("dry")
    argv = arguments(
        write_data(folder / "data"),
        folder / "out",
        "tasks=[sst2, arithmetic]",
        METHODS,
        "budgets=[{samples: 1024}, {seconds: 60}]",
        "learning_rates=[1e-3, 1e-2]",
        "seeds=[4, 5]",
    )
    return folder / "out", once([*argv, "--dry-run"], broken="bitfit")


def test_nothing_is_kept_and_a_failed_cell_is_named(result: tuple[Path, dict[str, Any]]) -> None:
    out, found = result
    assert found["code"] == 1, found["printed"]
    assert not out.exists()
    assert "dry run: 12 cells ok, 0 not applicable, 4 failed; 2 steps each, nothing is kept" in found["printed"]
    assert re.search(
        r"^1024 samples +arithmetic +bitfit +failed +.*OutOfMemoryError: out of memory", found["printed"], re.MULTILINE
    )


def test_each_cell_takes_two_steps_with_the_first_rate_and_seed_and_is_validated(
    result: tuple[Path, dict[str, Any]],
) -> None:
    ran = [one for one in result[1]["ran"] if one[0] not in ("zero-shot", "bitfit")]
    assert sorted(ran) == sorted([(label, task, 4, 1e-3, True) for label in ("full", "hift") for task in TASKS] * 2)
    for budget in ("1024 samples", "60 s"):
        for task in TASKS:
            for label in ("zero-shot", "full", "hift"):
                assert re.search(rf"^{budget} +{task} +{label} +ok +\d+\.\d$", result[1]["printed"], re.MULTILINE)


TASKS = ("sst2", "arithmetic")
