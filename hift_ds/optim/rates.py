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

    It is the current rate. Where that is 0, as at the start of a warm-up, it is the last rate of the cycle that is not
    0, so that the cycle is not lost. A warning is logged if there is none for any group.

    Args:
        groups: the parameter groups that the schedule changes.
        schedule: the schedule; None: search for one that a script made for these groups.
        steps: number of steps in the cycle.

    Returns:
        The rates. None for a group without a rate, as in an Adafactor that computes its own.
    """
    rates = current = [_copied(group.get("lr")) for group in groups]
    if all(map(_trains, current)):
        return rates
    schedule = schedule if schedule is not None else schedule_of(groups)
    if schedule is not None and not needs_metrics(schedule):
        for later in _rates_ahead(schedule, groups, _ticks(schedule, steps - 1)):
            rates = [
                one if not _trains(now) and _trains(one) else rate
                for now, rate, one in zip(current, rates, later, strict=True)
            ]
    if not any(map(_trains, rates)):
        logger.warning(
            "the learning rate is 0 in all steps of a cycle, which change nothing: check the schedule's length and the "
            "optimizer's lr"
        )
    return rates


def _trains(rate: Any) -> bool:
    return rate is None or float(rate) != 0


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


def _rates_ahead(schedule: Any, groups: Sequence[dict[str, Any]], ticks: int) -> list[list[Any]]:
    """Return the rates after each tick of a schedule, from a copy of it; the schedule and its optimizer do not change.

    The list is shorter than ``ticks`` if the schedule ends before, as a ``OneCycleLR`` does: it refuses the second tick
    after the last step, and no step uses the rate after the first.
    """
    stand_in = SimpleNamespace(
        param_groups=[{**{k: _copied(v) for k, v in group.items() if k != "params"}, "params": []} for group in groups],
        state={},
        defaults=dict(getattr(schedule.optimizer, "defaults", {})),
        step=lambda: None,
        _opt_called=True,
    )
    before = [_copied(group.get("lr")) for group in groups]
    ahead: list[list[Any]] = []
    try:
        trial = copy.deepcopy(schedule, {id(schedule.optimizer): stand_in})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # schedules warn if their optimizer does not step between two ticks
            for _ in range(ticks):
                trial.step()
                ahead.append([_copied(group.get("lr")) for group in stand_in.param_groups])
    except Exception as error:  # the schedule's end, or a script's own class, of which nothing is known
        del ahead[-1:]
        logger.warning(
            f"the learning rate is 0 at the start of a cycle, and {type(schedule).__name__} gives the rates of only "
            f"{len(ahead)} of the next {ticks} steps ({type(error).__name__}: {error})"
        )
    finally:  # a script's own class may change more than its copy
        for group, rate in zip(groups, before, strict=True):
            if torch.is_tensor(rate):
                group["lr"].copy_(rate)
            elif "lr" in group:
                group["lr"] = rate
    return ahead


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else copy.copy(value)
