"""HiFT inside the Trainer in every combination of the settings below.

tests/integration/test_trainer.py holds a selection of them.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_trainer import (
    EVALUATED,
    STEPS,
    Run,
    check,
    check_best,
    check_resume,
    recomputed,
)
from tests.support import integrations

STAGES = (0, 1, 2, 3)
OWNERS = ("trainer", "deepspeed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model folder without and with tied weights."""
    made = {}
    for tied in (False, True):
        made[tied] = integrations.model_folder(tmp_path_factory.mktemp("model"), tied)
        integrations.rows_file(made[tied] / "rows.jsonl")
    return made


@pytest.mark.parametrize(
    "run",
    [
        *(
            Run(stage=stage, ranks=ranks, dtype=dtype, optimizer=optimizer, arguments=EVALUATED)
            for stage in STAGES
            for ranks in (1, 2)
            for dtype in ("fp32", "bf16")
            for optimizer in OWNERS
        ),
        *(Run(stage=stage, ranks=ranks, tied=True, callback=True) for stage in STAGES for ranks in (1, 2)),
        *(Run(stage=stage, optimizer=o, schedule=s) for stage in STAGES for o in OWNERS for s in OWNERS),
        *(
            Run(stage=stage, ranks=ranks, offload=True, optimizer="deepspeed")
            for stage in (1, 2, 3)
            for ranks in (1, 2)
        ),
    ],
    ids=str,
)
def test_weights_rates_blocks_and_logs(run: Run, folders: dict[bool, Path], tmp_path: Path) -> None:
    check(run, folders[run.tied], tmp_path)


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
}


@pytest.mark.parametrize("optimizer", OWNERS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules(kind: str, optimizer: str, folders: dict[bool, Path], tmp_path: Path) -> None:
    options = (("lr_scheduler_type", kind), ("lr_scheduler_kwargs", SCHEDULES[kind]))
    check(Run(optimizer=optimizer, arguments=options), folders[False], tmp_path)


@pytest.mark.parametrize(
    "run",
    [
        Run(stage=stage, ranks=ranks, dtype=dtype, optimizer=optimizer, schedule=schedule)
        for stage in STAGES
        for ranks, dtype in ((1, "fp32"), (1, "bf16"), (2, "fp32"))
        for optimizer, schedule in (("trainer", "trainer"), ("deepspeed", "deepspeed"))
    ],
    ids=str,
)
def test_resume_in_the_middle_of_a_cycle(run: Run, folders: dict[bool, Path], tmp_path: Path) -> None:
    check_resume(run, folders[False], tmp_path)


@pytest.mark.parametrize("save_at", range(1, STEPS))
def test_resume_after_each_step(save_at: int, folders: dict[bool, Path], tmp_path: Path) -> None:
    check_resume(Run(), folders[False], tmp_path, save_at)


@pytest.mark.parametrize(
    "run",
    [
        Run(stage=stage, ranks=ranks, dtype=dtype, tied=tied)
        for stage in STAGES
        for ranks, dtype, tied in ((1, "bf16", False), (1, "fp32", True), (2, "fp32", False))
    ],
    ids=str,
)
def test_the_best_model_is_loaded_and_saved(run: Run, folders: dict[bool, Path], tmp_path: Path) -> None:
    check_best(run, folders[run.tied], tmp_path)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_recomputes_from_the_active_block_up(
    stage: int, reentrant: bool, folders: dict[bool, Path], tmp_path: Path
) -> None:
    kwargs = ("gradient_checkpointing_kwargs", {"use_reentrant": reentrant})
    run = Run(stage=stage, dtype="bf16", arguments=(("gradient_checkpointing", True), kwargs))
    (ours,) = check(run, folders[False], tmp_path)
    assert ours.calls == [recomputed(step) for step in range(STEPS)]
