"""TRL's trainers with HiFT at every ZeRO stage, on one rank and two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import test_trl
from tests.integration.test_trl import COLUMNS, Case, check
from tests.support.parity import STAGES

CASES = [Case(kind, stage, ranks) for kind in COLUMNS for stage in STAGES for ranks in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in test_trl.CASES], ids=str)
def test_trains_as_the_plain_loop(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


LORA = [
    *(Case("sft", stage, lora=True) for stage in STAGES),
    *(Case("dpo", stage, lora=True) for stage in STAGES),
    Case("grpo", 0, lora=True),
    Case("grpo", 2, lora=True),
    Case("sft", 2, 2, lora=True),
    Case("dpo", 2, 2, lora=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in LORA if case not in test_trl.CASES], ids=str)
def test_trains_adapters_as_the_plain_loop(case: Case, tmp_path: Path) -> None:
    """The reference model is the model without adapters, which peft turns off and on again, with their gradients."""
    check(case, tmp_path)


OTHERS = [
    Case("sft", 2, settings=(("packing", True),)),
    Case("sft", 2, settings=(("completion_only_loss", False),)),
    Case("sft", 3, 2, settings=(("packing", True),)),
    Case("sft", 2, settings=(("gradient_checkpointing_kwargs", {"use_reentrant": True}),)),
    Case("dpo", 2, settings=(("gradient_checkpointing_kwargs", {"use_reentrant": True}),)),
    Case("dpo", 2, settings=(("precompute_ref_log_probs", True),)),
    Case("dpo", 3, settings=(("precompute_ref_log_probs", True),)),
    Case("sft", 2, bf16=True),
    Case("dpo", 2, bf16=True),
    Case("grpo", 3, bf16=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_trains_with_other_settings_as_the_plain_loop(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
