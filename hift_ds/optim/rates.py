"""The learning rates of a cycle, where the schedule counts steps (``hift.lr_ticks: step``).

All blocks of a cycle are trained with the same rate (the paper's delayed update, section 3.1). A schedule that advances
every step gives each step another rate, so the engine takes the rate of the cycle's first step.
"""

import copy
import gc
import inspect
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger
from torch.optim.lr_scheduler import LRScheduler


def needs_metrics(schedule: Any) -> bool:
    """Return whether a schedule advances by a metric of an evaluation (``ReduceLROnPlateau``) and not by steps."""
    return "metrics" in inspect.signature(schedule.step).parameters


def rates_of_cycle(groups: Sequence[dict[str, Any]], schedule: Any, steps: int) -> list[Any]:
    """Return the learning rate of each parameter group for a cycle that begins now.

    It is the current rate. Where that is 0, as at the start of a warm-up, it is the rate of the cycle's last step, so
    that the cycle is not lost.

    Args:
        groups: the parameter groups that the schedule changes.
        schedule: the schedule; None: search for one that a script made for these groups.
        steps: number of steps in the cycle.
    """
    rates = [_copied(group["lr"]) for group in groups]
    if all(float(rate) for rate in rates):
        return rates
    schedule = schedule if schedule is not None else schedule_of(groups)
    if schedule is None or needs_metrics(schedule):
        return rates
    later = _rates_after(schedule, groups, _ticks(schedule, steps - 1))
    return [rate if float(rate) else at_end for rate, at_end in zip(rates, later, strict=True)]


def schedule_of(groups: Sequence[dict[str, Any]]) -> LRScheduler | None:
    """Return the schedule that a script made for these parameter groups, or None.

    An optimizer does not know its schedules, and a script does not pass them to DeepSpeed. So this looks through the
    live objects. A schedule made of others (``SequentialLR``) is found, and not its parts.
    """
    found = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), LRScheduler)
        and getattr(getattr(thing, "optimizer", None), "param_groups", None) is groups
    ]
    parts = {id(part) for schedule in found for part in getattr(schedule, "_schedulers", ())}
    return next((schedule for schedule in found if id(schedule) not in parts), None)


def _ticks(schedule: Any, steps: int) -> int:
    """Return how often a schedule advances in a number of steps: once per step, unless a framework does it otherwise.

    accelerate advances a script's schedule once for each process. Lightning advances it every few steps, or after
    epochs, which count as none here.
    """
    for thing in gc.get_objects():
        kind = type(thing).__name__
        if kind == "AcceleratedScheduler" and thing.scheduler is schedule:
            is_each_process = thing.step_with_optimizer and not thing.split_batches
            return steps * (dist.get_world_size() if is_each_process else 1)
        if kind == "LRSchedulerConfig" and thing.scheduler is schedule:
            return steps // thing.frequency if thing.interval == "step" else 0
    return steps


def _rates_after(schedule: Any, groups: Sequence[dict[str, Any]], ticks: int) -> list[Any]:
    """Return the rates after a schedule advanced, from a copy of it; the schedule and its optimizer do not change."""
    stand_in = SimpleNamespace(
        param_groups=[{**{k: _copied(v) for k, v in group.items() if k != "params"}, "params": []} for group in groups],
        state={},
        defaults=dict(getattr(schedule.optimizer, "defaults", {})),
        step=lambda: None,
        _opt_called=True,
    )
    try:
        trial = copy.deepcopy(schedule, {id(schedule.optimizer): stand_in})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # schedules warn if their optimizer does not step between two ticks
            for _ in range(ticks):
                trial.step()
    except Exception as error:  # a script's own class, of which nothing is known
        logger.warning(
            f"the learning rate is 0 at the start of a cycle, and {type(schedule).__name__} cannot be advanced ahead "
            f"({type(error).__name__}: {error}): the steps of this cycle change nothing"
        )
    return [group["lr"] for group in stand_in.param_groups]


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else copy.copy(value)
