"""The learning rate of a run that continues in another cut into blocks, and what the settings may change."""

import math
import random

import pytest

from hift_ds.launch.config.settings import Settings, load_settings
from hift_ds.launch.cuts import (
    Cut,
    check_change,
    cut_of,
    cuts_until,
    lr_factor,
    schedule_position,
    steps_ahead,
    with_cut,
)
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.lr_schedules import schedule_factor
from tests.support.training import TINY

SCHEDULER = 'deepspeed.scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_min_lr": 1e-4}}'


def settings_of(*overrides: str) -> Settings:
    return load_settings(TINY, overrides)


def cut(cycle: int, steps: int = 0, ticks: int = 0) -> Cut:
    return Cut({}, cycle, steps, ticks)


def rates(settings: Settings, cuts: list[Cut], ticks: int) -> list[float]:
    """At the first ticks of the last cut."""
    factor = lr_factor(settings, cuts)
    return [factor(cuts[-1].ticks_before + tick) for tick in range(ticks)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("cycle", "steps"), [(6, 36), (5, 33), (1, 7), (9, 4)])
def test_one_cut_has_the_rates_of_the_schedule(name: str, cycle: int, steps: int) -> None:
    """To the last bit."""
    settings = settings_of(f"training.lr_schedule={name}", "training.warmup_ratio=0.3", f"training.max_steps={steps}")
    ticks = math.ceil(steps / cycle)
    assert rates(settings, [cut(cycle)], ticks) == [schedule_factor(name, 0.3, ticks, tick) for tick in range(ticks)]


def test_another_cut_goes_on_where_the_schedule_was_and_ends_at_the_same_end() -> None:
    settings = settings_of("training.lr_schedule=linear", "training.max_steps=36")
    assert rates(settings, [cut(6)], 6) == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    # After two of six cycles a third is done. Eight cycles of three steps share the other two thirds.
    finer = rates(settings, [cut(6), cut(3, 12, 2)], 9)
    assert finer == pytest.approx([2 / 3 * (8 - tick) / 8 for tick in range(9)])
    # After four of these cycles two thirds are done; twelve steps are left.
    assert rates(settings, [cut(6), cut(3, 12, 2), cut(12, 24, 6)], 2) == pytest.approx([1 / 3, 0])
    # Another cut with as many steps in a cycle changes nothing, to the last bit.
    assert rates(settings, [cut(6), cut(6, 12, 2)], 4) == rates(settings, [cut(6)], 6)[2:]


def test_a_warm_up_goes_on_in_another_cut() -> None:
    settings = settings_of("training.warmup_ratio=0.5", "training.max_steps=48")
    assert rates(settings, [cut(12)], 4) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    # A quarter of the run is done, so half of the warm-up; the schedule has 16 ticks of three steps, 8 of warm-up.
    expected = [(4 + tick + 1) / 9 for tick in range(4)] + [1] * 8
    assert rates(settings, [cut(12), cut(3, 12, 1)], 12) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(50))
def test_any_cuts(seed: int) -> None:
    """The schedule advances with each tick, never jumps where a cut begins, and ends with the run's last cycle."""
    numbers = random.Random(seed)
    steps, cuts, done, ticks = numbers.randrange(20, 200), [cut(numbers.randrange(1, 12))], 0, 0
    last = 0.0
    while True:
        left = math.ceil((steps - done) / cuts[-1].steps_per_tick)
        taken = left if numbers.random() < 0.3 else numbers.randrange(left)
        for tick in range(taken + 1):
            length, place = schedule_position(cuts, steps, ticks + tick)
            assert place / length >= last - 1e-12
            assert tick == 0 or place / length > last
            last = place / length
        if taken == left:
            break
        done, ticks = done + taken * cuts[-1].steps_per_tick, ticks + taken
        cuts.append(cut(numbers.randrange(1, 12), done, ticks))
        length, place = schedule_position(cuts, steps, ticks)
        assert place / length == pytest.approx(last, abs=1e-12)
    assert last == pytest.approx(1)


def test_a_run_that_is_made_longer_or_shorter_has_a_rate() -> None:
    settings = settings_of("training.lr_schedule=linear", "training.max_steps=6")
    assert rates(settings, [cut(6), cut(3, 12, 2)], 2) == pytest.approx([1 / 3, 0])


def test_a_cut_is_what_the_settings_say() -> None:
    assert cut_of(settings_of(), 6) == Cut({"layers_per_block": 1, "max_block_numel": None, "balance": False}, 6)
    two = settings_of("deepspeed.hift.layers_per_block=2", "deepspeed.hift.steps_per_block=2")
    assert cut_of(two, 3, 12, 2) == Cut({"layers_per_block": 2, "max_block_numel": None, "balance": False}, 6, 12, 2)
    assert cut_of(settings_of("deepspeed.hift.lr_ticks=step"), 6).steps_per_tick == 1
    assert cut_of(settings_of("method.name=full"), 0).steps_per_tick == 1
    again = with_cut(settings_of("deepspeed.hift.strategy=random", "deepspeed.hift.balance=true"), cut_of(two, 3))
    assert cut_of(again, 3).keys == cut_of(two, 3).keys and again.deepspeed["hift"]["strategy"] == "random"


def test_cuts_that_no_step_was_trained_in_are_forgotten() -> None:
    """Of a run that went on in another cut, or an older checkpoint of it."""
    recorded = [{"keys": {}, "steps_per_tick": 6}, {"keys": {}, "steps_per_tick": 3, "steps_before": 12}]
    assert cuts_until(recorded, 13) == [cut(6), cut(3, 12)]
    assert cuts_until(recorded, 12) == cuts_until(recorded, 0) == [cut(6)]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((300, 0, 6, 1), "300 steps in 50.0 cycles of 6 blocks"),
        ((300, 0, 6, 2), "300 steps in 25.0 cycles of 6 blocks"),
        ((20, 12, 3, 1), "20 steps, 12 done, then 2.7 cycles of 3 blocks"),
        ((300, 29, 6, 1, 1, 3), "300 steps, 29 done; 1 step ends the cycle of 6 blocks, then 90.0 cycles of 3 blocks"),
        (
            (300, 26, 6, 2, 10, 1),
            "300 steps, 26 done; 10 steps end the cycle of 6 blocks, then 132.0 cycles of 1 block",
        ),
        ((11, 9, 6, 1, 3, 3), "11 steps, 9 done, then 0.3 cycles of 6 blocks"),  # it ends before the cycle does
        ((12, 9, 6, 1, 3, 3), "12 steps, 9 done, then 0.5 cycles of 6 blocks"),
        ((12, 12, 6, 1), "12 steps, 12 done"),
        ((12, 14, 6, 1), "12 steps, 14 done"),
        ((12, 5, 0, 1), "12 steps, 5 done"),
    ],
)
def test_what_a_run_takes(given: tuple[int, ...], text: str) -> None:
    assert steps_ahead(*given) == text


def test_a_schedule_of_deepspeed_keeps_its_cycles_and_the_remedy_works() -> None:
    before = cut_of(settings_of("deepspeed.hift.layers_per_block=2"), 3)
    check_change(settings_of(), before, cut_of(settings_of(), 6))
    check_change(settings_of(SCHEDULER, "deepspeed.hift.layers_per_block=3"), before, cut_of(settings_of(), 3))
    step = settings_of(SCHEDULER, "deepspeed.hift.lr_ticks=step")
    check_change(step, cut_of(step, 3), cut_of(step, 6))
    asked = settings_of(SCHEDULER)
    with pytest.raises(UserError, match="cycles of 6 steps, the run has cycles of 3.*WarmupLR") as error:
        check_change(asked, before, cut_of(asked, 6))
    remedy = str(error.value).split("(--set ")[1].split(")")[0].split(" --set ")
    assert cut_of(settings_of(SCHEDULER, *remedy), 3) == before
