"""The rate of a cycle that a schedule of steps gives: the truth is the schedule itself, advanced by hand."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.utils import logger
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from hift_ds.optim.rates import needs_metrics, rates_of_cycle, schedule_of

STEPS = 5  # in a cycle


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.AdamW(groups)


def warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda tick: min(1.0, tick / 8))


def sequence(optimizer: torch.optim.Optimizer) -> SequentialLR:
    parts = [LambdaLR(optimizer, lambda tick: tick / 3), CosineAnnealingLR(optimizer, 20)]
    return SequentialLR(optimizer, parts, milestones=[3])


SCHEDULES = {
    "warm-up": warm_up,
    "sequence": sequence,
    "deepspeed": lambda optimizer: lr_schedules.WarmupDecayLR(optimizer, 20, 0.0, 0.1, 8, "linear"),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20, div_factor=1e30),
}


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_a_cycle_that_begins_at_0_gets_the_rate_of_its_last_step(name: str, given: bool) -> None:
    other = optimizer()
    truth = SCHEDULES[name](other)
    for _ in range(STEPS - 1):
        other.step()
        truth.step()
    expected = rates(other)
    assert expected != [0.0]

    ours = optimizer()
    schedule: Any = SCHEDULES[name](ours)
    before = [{key: value for key, value in group.items() if key != "params"} for group in ours.param_groups]
    state = {key: value for key, value in schedule.state_dict().items() if not key.startswith("_schedulers")}
    given |= name == "deepspeed"  # DeepSpeed has its own schedules
    found = rates_of_cycle(ours.param_groups, schedule if given else None, STEPS)
    assert found == pytest.approx(expected, rel=1e-12)
    after = [{key: value for key, value in group.items() if key != "params"} for group in ours.param_groups]
    assert after == before, "looking ahead changed the optimizer"
    assert {k: v for k, v in schedule.state_dict().items() if k in state} == state, "looking ahead changed the schedule"


def test_a_cycle_keeps_the_rate_of_its_first_step() -> None:
    ours = optimizer(0.1, 0.3)
    schedule = warm_up(ours)
    for _ in range(3):
        ours.step()
        schedule.step()
    assert rates_of_cycle(ours.param_groups, schedule, STEPS) == rates(ours)
    assert rates(ours) == pytest.approx([0.1 * 3 / 8, 0.3 * 3 / 8])


def test_only_groups_at_0_get_the_later_rate() -> None:
    ours = optimizer(0.1, 0.3)
    schedule = LambdaLR(ours, [lambda tick: tick / 8, lambda tick: 1 - tick / 8])
    assert rates_of_cycle(ours.param_groups, schedule, STEPS) == pytest.approx([0.1 * 4 / 8, 0.3])


def test_a_rate_that_is_a_tensor_is_copied() -> None:
    ours = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(0.1))
    (rate,) = rates_of_cycle(ours.param_groups, None, STEPS)
    ours.param_groups[0]["lr"].fill_(0.5)
    assert float(rate) == pytest.approx(0.1)


def test_without_a_schedule_a_rate_of_0_stays() -> None:
    assert rates_of_cycle(optimizer(0.0).param_groups, None, STEPS) == [0.0]


def test_a_schedule_that_cannot_be_copied_leaves_the_rate_at_0(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(LambdaLR):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("one of a kind")

    ours = optimizer()
    schedule = Odd(ours, lambda tick: float(tick))
    assert rates_of_cycle(ours.param_groups, schedule, STEPS) == [0.0]


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What DeepSpeed's logger gets, which does not propagate."""
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def short_warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Up to the given rate at tick 1, and down to 0 at tick 3."""
    return LambdaLR(optimizer, lambda tick: tick if tick < 1 else max(0.0, (3 - tick) / 2))


def test_a_schedule_that_ends_at_0_inside_the_cycle(logged: pytest.LogCaptureFixture) -> None:
    ours = optimizer()
    schedule = short_warm_up(ours)
    assert rates_of_cycle(ours.param_groups, schedule, STEPS) == [0.05]
    assert rates(ours) == [0.0] and not messages(logged)


def test_a_schedule_that_refuses_to_go_past_its_end(logged: pytest.LogCaptureFixture) -> None:
    ours = optimizer()
    schedule = OneCycleLR(ours, 0.1, total_steps=3, pct_start=0.6, div_factor=1e30, final_div_factor=1e-29)
    ours.param_groups[0]["lr"] = 0.0
    (rate,) = rates_of_cycle(ours.param_groups, schedule, STEPS)
    assert rate == pytest.approx(0.01) and rates(ours) == [0.0], "the rate of the third and last step"
    assert "OneCycleLR gives the rates of only 2 of the next 4 steps" in messages(logged)


def test_a_cycle_of_0_only_is_named(logged: pytest.LogCaptureFixture) -> None:
    ours = optimizer(0.0, 0.0)
    assert rates_of_cycle(ours.param_groups, LambdaLR(ours, lambda tick: float(tick)), STEPS) == [0.0, 0.0]
    assert "0 in all steps of a cycle" in messages(logged)


def test_a_class_that_changes_the_real_optimizer_is_undone() -> None:
    class Reaching(LambdaLR):
        def step(self, epoch: Any = None) -> None:
            for group in ours.param_groups:
                group["lr"] += 1.0
            super().step()
            if self.last_epoch == 3:
                raise ValueError("no more")

    ours = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(2))]}, {"params": []}], lr=torch.tensor(0.1))
    ours.param_groups[1]["lr"] = 0.2
    schedule = Reaching(ours, lambda tick: float(tick))
    for group, zero in zip(ours.param_groups, (torch.tensor(0.0), 0.0), strict=True):
        group["lr"] = zero
    rate = ours.param_groups[0]["lr"]
    rates_of_cycle(ours.param_groups, schedule, STEPS)
    assert rates(ours) == [0.0, 0.0] and ours.param_groups[0]["lr"] is rate


def test_groups_without_a_rate_have_none() -> None:
    ours = optimizer(0.1, 0.1, 0.0)
    ours.param_groups[0]["lr"] = None
    del ours.param_groups[1]["lr"]
    assert rates_of_cycle(ours.param_groups, None, STEPS) == [None, None, 0.0]
    assert ours.param_groups[0]["lr"] is None and "lr" not in ours.param_groups[1]


def test_the_schedule_of_other_groups_is_not_found() -> None:
    ours, other = optimizer(), optimizer()
    kept = warm_up(other)
    assert schedule_of(ours.param_groups) is None
    whole = sequence(ours)
    assert schedule_of(ours.param_groups) is whole
    assert schedule_of(other.param_groups) is kept


def test_schedules_that_follow_a_metric() -> None:
    assert needs_metrics(ReduceLROnPlateau(optimizer()))
    assert not needs_metrics(LinearLR(optimizer()))
    assert not needs_metrics(lr_schedules.WarmupLR(optimizer()))
