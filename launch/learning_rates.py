"""The learning rates of a run before its first step: HiFT's from full fine-tuning's, and a warning of rates near 0."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from hift_ds.blocks.partition import partition_model
from hift_ds.config import HiFTConfig
from hift_ds.launch.config.deepspeed_trial import made_schedule
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.methods.lr_schedules import schedule_factor

LOW = 1e-3  # of the highest rate; steps with at most this share train next to nothing
NOTABLE = 0.1  # of the steps: the ends of schedules are shorter
MOST = 100_000  # ticks that are computed
MEASURED = 8  # blocks, at most, for which the rule for HiFT's rate was measured (docs/results/learning_rates.md)
ENOUGH = 8  # updates of a block: with four, an encoder learned nothing at any rate (docs/results.md, updates per block)
# The keys of the lowest rates of DeepSpeed's schedules. WarmupCosineLR begins at 0 whatever its warmup_min_ratio is.
LOWEST = {
    "WarmupLR": "warmup_min_lr",
    "WarmupDecayLR": "warmup_min_lr",
    "OneCycle": "cycle_min_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}


def hift_rate(full_rate: float, blocks: int) -> float:
    """Return HiFT's learning rate for that of full fine-tuning with as many steps: so many times as there are blocks.

    AdamW moves a weight by about its rate in an update. A block gets a share of the updates that full fine-tuning gives
    it, so its weights come as far with a rate that is higher by the number of blocks. docs/results/learning_rates.md
    has what was measured.
    """
    return full_rate * blocks


def with_rate(settings: Settings, blocks: int, recorded: float | None = None) -> Settings:
    """Return the settings with a number for `training.learning_rate: auto`, and a note that says where it is from.

    Args:
        settings: with the number of steps (see `Settings.with_steps`).
        blocks: number of blocks that the model is cut into.
        recorded: the rate of the run that is continued. It stays, also with other steps or blocks.
    """
    training, section = settings.training, settings.deepspeed
    if training.learning_rate != "auto":
        return settings
    assert training.full_learning_rate is not None, "checked with the settings"
    rate, steps = hift_rate(training.full_learning_rate, blocks), training.max_steps
    counted = f"{blocks} block{'s' * (blocks > 1)}"
    note = (
        f"training.learning_rate: auto is {rate:.4g}: {training.full_learning_rate:.4g} (training.full_learning_rate) "
        f"x {counted}; {steps} steps update each block {steps / blocks:.4g} times"
    )
    if blocks > MEASURED:
        note += f"; this was measured with up to {MEASURED} blocks, so try a lower rate as well"
    if recorded is not None:
        note = f"training.learning_rate: auto stays {recorded:.4g}, the rate of the run so far"
        if recorded != rate:
            note += f"; a new run with these settings would use {rate:.4g} ({counted})"
        rate = recorded
    optimizer = section["optimizer"]
    return replace(
        settings,
        training=replace(training, learning_rate=rate),
        deepspeed={**section, "optimizer": {**optimizer, "params": {**optimizer["params"], "lr": rate}}},
        notes=(*settings.notes, note),
    )


def few_updates_warning(settings: Settings, blocks: int, model: Any) -> str:
    """Return a warning if the run updates each block too rarely for any rate, with a remedy; else "".

    Args:
        blocks: number of blocks that the model is cut into.
        model: the model or its skeleton.
    """
    steps = settings.training.max_steps
    if steps >= ENOUGH * blocks:
        return ""
    hift = HiFTConfig.from_dict(settings.deepspeed["hift"])
    remedy = f"Raise training.max_steps or training.epochs to {ENOUGH * blocks} steps"
    for m in range(hift.layers_per_block + 1, len(partition_model(model, 1, hift.freeze)) + 1):
        fewer = len(partition_model(model, m, hift.freeze, hift.max_block_numel, hift.balance))
        if steps >= ENOUGH * fewer:
            remedy = f"Set deepspeed.hift.layers_per_block={m} ({fewer} blocks), or r{remedy[1:]}"
            break
    return (
        f"warning: {steps} steps update each of {blocks} blocks {steps / blocks:.2g} times; with fewer than {ENOUGH} "
        f"updates, blocks may learn little at any rate. {remedy}."
    )


def learning_rates(settings: Settings, ticks: int) -> list[float]:
    """Return the learning rate at each tick of the run's schedule, from the schedule itself.

    Args:
        settings: without an open "auto" (see `Settings.for_model`).
        ticks: how often the schedule advances; at most `MOST` are computed.
    """
    training, scheduler = settings.training, settings.deepspeed.get("scheduler")
    rate, ticks = float(settings.deepspeed["optimizer"]["params"]["lr"]), min(ticks, MOST)
    if not scheduler:
        name, ratio = training.lr_schedule, training.warmup_ratio
        return [rate * schedule_factor(name, ratio, ticks, tick) for tick in range(ticks)]
    schedule = made_schedule(scheduler, rate)
    rates = []
    for _ in range(ticks):
        rates.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()  # torch's schedules expect it
        schedule.step()
    return rates


def low_rate_warning(settings: Settings, ticks: int, cycle: int) -> str:
    """Return a warning if the learning rate is next to 0 for a notable part of the run, else "".

    Args:
        ticks: how often the schedule advances in the run.
        cycle: steps of a tick: those of a cycle over all blocks, or 1.
    """
    rates, scheduler = learning_rates(settings, ticks), settings.deepspeed.get("scheduler") or {}
    params = scheduler.get("params", {})
    given = [value for key, value in params.items() if key.endswith("max_lr") and isinstance(value, (int, float))]
    highest = max(*rates, settings.deepspeed["optimizer"]["params"]["lr"], *given)
    low = [rate <= LOW * highest for rate in rates]
    steps = min(settings.training.max_steps, len(rates) * cycle)
    sizes = [min(cycle, steps - tick * cycle) for tick in range(len(rates))]
    lost = sum(itertools.compress(sizes, low))
    if lost < NOTABLE * steps:
        return ""
    first, last = (sum(1 for _ in itertools.takewhile(bool, order)) == sum(low) for order in (low, low[::-1]))
    place = f"all {steps}" if all(low) else f"{'the first ' * first or 'the last ' * last}{lost} of {steps}"
    in_cycles = f" ({sum(low)} of {len(rates)} cycles over all blocks)" if cycle > 1 else ""
    worst = max(itertools.compress(rates, low))
    value = "0" if worst == 0 else f"at most {worst:.2g}"
    return (
        f"warning: the learning rate is {value} in {place} steps{in_cycles}, and the highest is {highest:.2g}: these "
        f"steps train next to nothing. {_remedy(settings, highest, cycle)}"
    )


def _remedy(settings: Settings, highest: float, cycle: int) -> str:
    scheduler = settings.deepspeed.get("scheduler")
    if highest == 0:
        without = " --set deepspeed.scheduler=null" if scheduler else ""
        return f"Set a rate (--set deepspeed.optimizer.params.lr=1e-4{without})."
    assert scheduler, "only a scheduler of DeepSpeed has such rates"
    kind = scheduler["type"]
    way = (
        "eplace it by training.lr_schedule and training.warmup_ratio, which do not reach 0 "
        "(--set deepspeed.scheduler=null --set training.lr_schedule=linear)."
    )
    decays = bool(scheduler.get("params", {}).get("decay_lr_rate"))  # OneCycle then goes below its lowest rate
    if (key := LOWEST.get(kind)) and not decays:
        value = f"{highest / 10:.2g}"
        way = f"Raise its lowest rate (--set deepspeed.scheduler.params.{key}={value}), or r{way}"
    else:
        way = f"R{way}"
    return f"{kind} counts cycles here, not steps. {way}" if cycle > 1 else way
