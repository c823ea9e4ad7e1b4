"""Lightning in every combination of the settings below. tests/integration/test_lightning.py has a sample."""

from pathlib import Path

import pytest

from tests.integration.test_lightning import Case, check
from tests.support import integrations
from tests.support.parity import STAGES, cases

OWNERS = (("script", "script"), ("script", "config"), ("config", "config"))  # Lightning asks a script for both or none


@pytest.mark.parametrize(
    "case",
    cases(
        [Case(stage, ranks, *owners) for stage in STAGES for ranks in (1, 2) for owners in OWNERS],
        [Case(stage, interval="epoch") for stage in STAGES],
        [Case(stage, dtype="bf16") for stage in STAGES],
    ),
    ids=str,
)
def test_fit(case: Case, tmp_path: Path) -> None:
    check(case, integrations.model_folder(tmp_path / "tiny"), tmp_path)
