"""A run whose learning rate is 0 for long says so before its first step, and the remedy that it prints works."""

import json
import re

import pytest

from hift_ds.launch.config.settings import Settings, load_settings
from hift_ds.launch.learning_rates import few_updates_warning, learning_rates, low_rate_warning, with_rate
from hift_ds.launch.make_engine import find_blocks
from hift_ds.launch.model import loading
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.support.training import TINY

CYCLE = 6  # blocks of the tiny model
WARMUP = {"warmup_num_steps": 1000, "warmup_max_lr": 3e-3}


def settings_of(*overrides: str, ticks: int) -> Settings:
    class Config:
        hidden_size = 64

    return load_settings(TINY, overrides).for_model(Config, ticks)


def scheduler(kind: str, **params: object) -> str:
    return f"deepspeed.scheduler={json.dumps({'type': kind, 'params': params})}"


# name: (overrides, what the warning must hold)
LOW = {
    "WarmupLR": (["training.max_steps=12", scheduler("WarmupLR", **WARMUP)], "0 in all 12 steps (2 of 2 cycles"),
    "short WarmupLR": (
        ["training.max_steps=60", scheduler("WarmupLR", warmup_num_steps=2, warmup_max_lr=3e-3)],
        "0 in the first 12 of 60 steps (2 of 10 cycles",
    ),
    "WarmupDecayLR": (
        ["training.max_steps=30", scheduler("WarmupDecayLR", total_num_steps=30, **WARMUP)],
        "0 in the first 12 of 30 steps (2 of 5 cycles",
    ),
    "WarmupDecayLR, too short": (
        ["training.max_steps=60", scheduler("WarmupDecayLR", total_num_steps=4, warmup_num_steps=2)],
        "0 in 42 of 60 steps (7 of 10 cycles",
    ),
    "WarmupCosineLR": (
        ["training.max_steps=30", scheduler("WarmupCosineLR", total_num_steps=30, warmup_num_steps=10)],
        "0 in the first 12 of 30 steps (2 of 5 cycles",
    ),
    "OneCycle": (
        ["training.max_steps=12", scheduler("OneCycle", cycle_min_lr=0, cycle_max_lr=3e-3, cycle_first_step_size=4000)],
        "in all 12 steps",
    ),
    "OneCycle, decaying": (
        ["training.max_steps=1000", "method.name=full", scheduler("OneCycle", cycle_min_lr=1e-5, cycle_max_lr=3e-3,
         cycle_first_step_size=50, decay_step_size=10, decay_lr_rate=10)],
        "of 1000 steps",
    ),
    "LRRangeTest": (["training.max_steps=12", scheduler("LRRangeTest", lr_range_test_min_lr=1e-9)], "in all 12 steps"),
    "torch": (
        ["training.max_steps=60", scheduler("StepLR", step_size=1, gamma=0.01)],
        "at most 3e-07 in the last 48 of 60 steps (8 of 10 cycles",
    ),
    "constant 0": (
        ["training.max_steps=12", "training.learning_rate=null", "deepspeed.optimizer={params: {lr: 0}}"],
        "0 in all 12 steps",
    ),
    "scheduled 0": (
        ["training.max_steps=12", scheduler("WarmupLR", warmup_max_lr=0), "training.learning_rate=null",
         "deepspeed.optimizer={params: {lr: 0}}"],
        "0 in all 12 steps",
    ),
    "full fine-tuning": (
        ["training.max_steps=100", "method.name=full", scheduler("WarmupLR", warmup_num_steps=20000, warmup_max_lr=3e-3,
                                                                 warmup_type="linear")],
        "at most 3e-06 in the first 22 of 100 steps, and",
    ),
}  # fmt: skip


def warning_of(overrides: list[str]) -> str:
    block_wise = "method.name=full" not in overrides
    steps = load_settings(TINY, overrides).training.max_steps
    ticks = -(-steps // CYCLE) if block_wise else steps
    return low_rate_warning(settings_of(*overrides, ticks=ticks), ticks, CYCLE if block_wise else 1)


@pytest.mark.parametrize("name", LOW)
def test_low_rates_are_said_and_each_remedy_works(name: str) -> None:
    overrides, expected = LOW[name]
    warning = warning_of(overrides)
    assert warning.startswith("warning: the learning rate is ") and expected in warning, warning
    remedies = [re.findall(r"--set (\S+)", way) for way in re.findall(r"\((--set [^)]*)\)", warning)]
    assert remedies
    for remedy in remedies:
        assert warning_of([*overrides, *remedy]) == "", remedy


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.lr_schedule=linear", "training.warmup_ratio=0.5"],
        ["training.lr_schedule=cosine", "training.max_steps=6000"],
        [scheduler("WarmupLR", warmup_min_lr=3e-4, **WARMUP)],
        [scheduler("WarmupLR", warmup_min_lr="auto", warmup_max_lr="auto", warmup_num_steps="auto")],
        [scheduler("WarmupDecayLR", warmup_min_lr="auto", warmup_num_steps="auto", total_num_steps="auto")],
        ["training.max_steps=600", "training.warmup_ratio=0.3",
         scheduler("WarmupCosineLR", warmup_min_ratio="auto", warmup_num_steps="auto", total_num_steps="auto")],
        ["method.name=full", "training.max_steps=1000", scheduler("WarmupLR", warmup_num_steps=50)],
        ["training.max_steps=1000000000"],
    ],
)  # fmt: skip
def test_other_schedules_are_not_warned_of(overrides: list[str]) -> None:
    assert warning_of(["training.max_steps=60", *overrides]) == ""


def test_the_rates_are_those_of_the_schedule() -> None:
    rates = learning_rates(settings_of(scheduler("WarmupLR", warmup_type="linear", **WARMUP), ticks=4), 4)
    assert rates == pytest.approx([0, 0, 3e-6, 6e-6])
    rates = learning_rates(settings_of("training.lr_schedule=linear", "training.warmup_ratio=0.5", ticks=4), 4)
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 1.5e-3])


AUTO = ("training.learning_rate=auto", "training.full_learning_rate=2e-5")


@pytest.mark.parametrize(
    ("steps", "blocks", "rate"), [(96, 6, 1.2e-4), (96, 3, 6e-5), (1000, 34, 6.8e-4), (8, 1, 2e-5)]
)
def test_the_rate_is_that_of_full_fine_tuning_times_blocks(steps: int, blocks: int, rate: float) -> None:
    settings = with_rate(load_settings(TINY, [*AUTO, f"training.max_steps={steps}"]), blocks)
    assert settings.training.learning_rate == pytest.approx(rate, rel=1e-12)
    assert settings.deepspeed["optimizer"]["params"]["lr"] == settings.training.learning_rate
    (note,) = settings.notes
    assert f"auto is {rate:.4g}: 2e-05 (training.full_learning_rate) x {blocks} block" in note
    assert f"; {steps} steps update each block {steps / blocks:.4g} times" in note
    assert ("measured with up to 8 blocks" in note) is (blocks == 34)
    rates = learning_rates(settings.for_model(type("Config", (), {"hidden_size": 64}), 4), 4)
    assert rates == pytest.approx([rate] * 4)


def test_a_run_keeps_its_rate() -> None:
    settings = load_settings(TINY, [*AUTO, "training.max_steps=96"])
    same, other = (with_rate(settings, 6, recorded) for recorded in (settings_rate(settings, 6), 3e-4))
    assert same.training.learning_rate == pytest.approx(1.2e-4) and other.training.learning_rate == 3e-4
    assert same.notes == ("training.learning_rate: auto stays 0.00012, the rate of the run so far",)
    assert "stays 0.0003, the rate" in other.notes[0] and "would use 0.00012 (6 blocks)" in other.notes[0]
    number = load_settings(TINY)
    assert with_rate(number, 6) is number and with_rate(number, 6, 1e-5) is number


def settings_rate(settings: Settings, blocks: int) -> float:
    rate = with_rate(settings, blocks).training.learning_rate
    assert isinstance(rate, float)
    return rate


@pytest.mark.parametrize(
    "overrides",
    [["deepspeed.hift.layers_per_block=1"], ["deepspeed.hift.max_block_numel=20000"]],
)
@pytest.mark.parametrize("steps", [4, 8, 16, 31, 47, 48, 400])
def test_too_few_updates_are_said_and_the_remedy_works(overrides: list[str], steps: int) -> None:
    def warned(*more: str) -> str:
        settings = load_settings(TINY, [*AUTO, f"training.max_steps={steps}", *overrides, *more])
        model = loading.skeleton(settings.model, loading.load_config(settings.model, byte_tokenizer()))
        return few_updates_warning(settings, len(find_blocks(settings, model)), model)

    warning = warned()
    if not overrides[0].startswith("deepspeed.hift.max_block_numel"):
        assert bool(warning) is (steps < 48)  # six blocks with eight updates each
    if warning:
        larger = re.findall(r"Set (deepspeed\.hift\.layers_per_block=\d+)", warning)
        (enough,) = re.findall(r"training\.epochs to (\d+) steps", warning)
        assert warned(f"training.max_steps={enough}") == ""
        assert warned(f"training.max_steps={int(enough) - 1}") != ""
        assert not larger or warned(*larger) == ""
        assert larger or steps < 8 or "max_block_numel" in overrides[0]
