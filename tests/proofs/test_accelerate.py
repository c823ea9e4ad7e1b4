"""Loops on accelerate in every combination of the settings below. tests/integration/test_accelerate.py has a sample."""

from pathlib import Path

import pytest

from tests.integration.test_accelerate import Case, check
from tests.support import integrations
from tests.support.parity import STAGES, cases

OWNERS = ("script", "config")


@pytest.mark.parametrize(
    "case",
    cases(
        [
            Case(stage, ranks, optimizer, schedule)
            for stage in STAGES
            for ranks in (1, 2)
            for optimizer in OWNERS
            for schedule in OWNERS
        ],
        [Case(stage, dtype="bf16") for stage in STAGES],
        [Case(stage, in_code=True) for stage in STAGES],
    ),
    ids=str,
)
def test_loop(case: Case, tmp_path: Path) -> None:
    check(case, integrations.model_folder(tmp_path / "tiny"), tmp_path)
