"""The learning rates of a run before its first step, and a warning where they are too low to train anything."""

from __future__ import annotations

import itertools

from hift_ds.launch.config.deepspeed_trial import made_schedule
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.methods.lr_schedules import schedule_factor

LOW = 1e-3  # of the highest rate; steps with at most this share train next to nothing
NOTABLE = 0.1  # of the steps: the ends of schedules are shorter
MOST = 100_000  # ticks that are computed
# The keys of the lowest rates of DeepSpeed's schedules. WarmupCosineLR begins at 0 whatever its warmup_min_ratio is.
LOWEST = {
    "WarmupLR": "warmup_min_lr",
    "WarmupDecayLR": "warmup_min_lr",
    "OneCycle": "cycle_min_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}


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
