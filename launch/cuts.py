"""The cuts into blocks that a run is trained in, one after the other, and the learning rate across them.

A run may continue in another cut from the end of a cycle on. `run.json` lists its cuts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hift_ds.blocks.block import Block
from hift_ds.blocks.schedule import BlockSchedule
from hift_ds.config import HiFTConfig
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.lr_schedules import schedule_factor
from hift_ds.launch.methods.table import METHODS

KEYS = ("layers_per_block", "max_block_numel", "balance")  # of `deepspeed.hift`: how a model is cut


@dataclass(frozen=True)
class Cut:
    """A cut into blocks, and where in the run it begins. A method without blocks has one cut.

    Attributes:
        keys: the values of `KEYS`.
        steps_per_tick: steps in which the learning-rate schedule advances once: those of a cycle, or 1.
        steps_before: steps of the run before this cut.
        ticks_before: how often the schedule advanced in them. Skipped steps do not count in a cycle.
    """

    keys: dict[str, Any]
    steps_per_tick: int
    steps_before: int = 0
    ticks_before: int = 0


def cut_of(settings: Settings, n_blocks: int, steps_before: int = 0, ticks_before: int = 0) -> Cut:
    """Return the cut that the settings ask for.

    Args:
        n_blocks: number of blocks that the model is cut into.
        steps_before, ticks_before: those of the run before it.
    """
    hift = settings.deepspeed["hift"]
    counts_cycles = METHODS[settings.method.name].block_wise and hift.get("lr_ticks") != "step"
    steps = n_blocks * hift.get("steps_per_block", 1) if counts_cycles else 1
    return Cut({key: hift.get(key, getattr(HiFTConfig, key)) for key in KEYS}, steps, steps_before, ticks_before)


def with_cut(settings: Settings, cut: Cut) -> Settings:
    """Return the settings with another cut."""
    section = settings.deepspeed
    return replace(settings, deepspeed={**section, "hift": {**section["hift"], **cut.keys}})


def cuts_until(recorded: Sequence[Mapping[str, Any]], step: int) -> list[Cut]:
    """Return the cuts in which the first `step` steps of a run were trained, from its `run.json`."""
    cuts = [Cut(**entry) for entry in recorded]
    return cuts[:1] + [cut for cut in cuts[1:] if cut.steps_before < step]


def other_cut(about: Mapping[str, Any], blocks: Sequence[Block]) -> bool:
    """Return whether a checkpoint was saved with other blocks, by the description in its manifest."""
    saved = about.get("blocks")
    return saved is not None and saved != [[block.name, block.numel] for block in blocks]


def is_in_cycle(about: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint was saved in the middle of a cycle, by the description in its manifest."""
    return BlockSchedule.steps_left(about["position"]) > 0


def steps_ahead(steps: int, done: int, blocks: int, steps_per_block: int, rest: int = 0, blocks_then: int = 0) -> str:
    """Return what a run takes, such as `20 steps, 12 done, then 2.7 cycles of 3 blocks`.

    Args:
        done: steps done before.
        blocks: number of blocks now; 0: the method has none.
        rest: steps from `done` to the end of the cycle, if the run then goes on with `blocks_then` blocks; else 0.
    """
    text, left = f"{steps} steps" + (f", {done} done" if done else ""), steps - done
    if 0 < rest < left:
        ends = "1 step ends" if rest == 1 else f"{rest} steps end"
        text, left = f"{text}; {ends} the cycle of {_blocks(blocks)}", left - rest
        blocks = blocks_then
    if not blocks or left <= 0:
        return text
    return f"{text}{', then' if done else ' in'} {left / (blocks * steps_per_block):.1f} cycles of {_blocks(blocks)}"


def _blocks(number: int) -> str:
    return f"{number} block{'s' * (number != 1)}"


def check_change(settings: Settings, before: Cut, now: Cut) -> None:
    """Refuse another number of steps in a cycle where DeepSpeed's schedule counts cycles: it would end elsewhere.

    Raises:
        UserError: with the settings that keep the cut.
    """
    if not settings.deepspeed.get("scheduler") or before.steps_per_tick == now.steps_per_tick:
        return
    kind = settings.deepspeed["scheduler"]["type"]
    keep = " ".join(f"--set deepspeed.hift.{key}={_yaml(value)}" for key, value in before.keys.items())
    raise UserError(
        f"deepspeed.hift: these settings cut the model into cycles of {now.steps_per_tick} steps, the run has cycles "
        f"of {before.steps_per_tick}, and deepspeed.scheduler ({kind}) counts cycles: its rates would come at other "
        f"steps than planned. Keep the blocks of the run ({keep}). A run with training.lr_schedule instead of "
        "deepspeed.scheduler, or with deepspeed.hift.lr_ticks=step, may continue with other blocks."
    )


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def lr_factor(settings: Settings, cuts: Sequence[Cut]) -> Callable[[int], float]:
    """Return the function from a tick of the run (0-based) to the fraction of the highest learning rate.

    Args:
        cuts: of the run; they are read at each tick.
    """
    training = settings.training

    def factor(tick: int) -> float:
        ticks, done = schedule_position(cuts, training.max_steps, tick)
        return schedule_factor(training.lr_schedule, training.warmup_ratio, ticks, done)

    return factor


def schedule_position(cuts: Sequence[Cut], max_steps: int, tick: int) -> tuple[float, float]:
    """Return the length of the learning-rate schedule, and how much of it is done at a tick, in ticks of the last cut.

    A cut begins where the one before it left the schedule, and its own ticks share the rest evenly. So the rate of a
    run has the same end in any cut.
    """
    cuts = [next(group) for _, group in itertools.groupby(cuts, key=lambda cut: cut.steps_per_tick)]
    share, cut = 0.0, cuts[0]  # the share of the schedule that is done where a cut begins
    for following in cuts[1:]:
        ticks = following.ticks_before - cut.ticks_before
        share += (1 - share) * ticks / max(ticks + 1, _ticks_left(cut, max_steps))
        cut = following
    length = max(1, _ticks_left(cut, max_steps)) / (1 - share)
    return length, share * length + tick - cut.ticks_before


def _ticks_left(cut: Cut, max_steps: int) -> int:
    """Return the number of ticks from the beginning of a cut to the end of the run. An incomplete cycle counts."""
    return math.ceil((max_steps - cut.steps_before) / cut.steps_per_tick)
