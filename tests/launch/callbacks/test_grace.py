"""The note for runs whose saves may be killed: once, with the numbers of the run, and only where it applies."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hift_ds.config import OffloadConfig
from hift_ds.launch.callbacks.callback import Step
from hift_ds.launch.callbacks.forecast import Forecast
from hift_ds.launch.callbacks.grace import GraceNote, smaller_state
from hift_ds.launch.config.settings import TrainingSettings


def notes(
    saving: float | None, steps: list[float], smaller: str | None = None, applies: bool = True
) -> list[list[str]]:
    """What is said before the first step, and after each."""
    now, said = [0.0], [[]]
    forecast = Forecast(TrainingSettings(max_steps=100), False, saving, clock=lambda: now[0])
    forecast.use(lambda after: after % 2, 2)
    note = GraceNote(forecast, lambda text: said[-1].append(text), Path("OUT/logs/rank0.log"), smaller, applies)
    note.begin()
    for index, seconds in enumerate(steps):
        said.append([])
        forecast.before_step(index + 1)
        now[0] += seconds
        step = Step(index + 1, {"block": index % 2, "cycle": index // 2}, 0.0)
        forecast.describe(step)
        note.after_step(step, 0.0)
    return said


def test_a_long_save_is_said_before_the_first_step_and_not_again() -> None:
    first, *rest = notes(95.0, [50.0] * 4, "deepspeed.hift.offload.moments=8bit")
    assert len(first) == 1 and rest == [[]] * 4
    for part in ("1 min 35 s", "30 s", "OUT/logs/rank0.log", "save_every", "output.dir", "moments=8bit"):
        assert part in first[0]


def test_a_save_after_a_long_step_is_said_when_all_blocks_are_known() -> None:
    said = notes(20.0, [4.0, 12.0, 4.0, 12.0])
    assert [len(texts) for texts in said] == [0, 0, 1, 0, 0]
    assert "about 20 s, after a step of up to 12 s" in said[2][0] and "8bit" not in said[2][0]


@pytest.mark.parametrize(
    ("saving", "steps", "applies"), [(20.0, [9.0] * 6, True), (None, [90.0] * 6, True), (95.0, [90.0] * 6, False)]
)
def test_nothing_is_said(saving: float | None, steps: list[float], applies: bool) -> None:
    assert not any(notes(saving, steps, applies=applies))


def test_moments_in_8_bits_are_named_where_they_help() -> None:
    def engine(optimizer: type, **offload: str) -> SimpleNamespace:
        basic = optimizer([torch.nn.Parameter(torch.zeros(1))])
        return SimpleNamespace(hift=SimpleNamespace(offload=OffloadConfig(**offload)), basic_optimizer=basic)

    assert smaller_state(engine(torch.optim.AdamW)) == "deepspeed.hift.offload.moments=8bit"
    for other in (
        engine(torch.optim.AdamW, moments="8bit"),
        engine(torch.optim.AdamW, device="none"),
        engine(torch.optim.Adagrad),
        SimpleNamespace(),
    ):
        assert smaller_state(other) is None
