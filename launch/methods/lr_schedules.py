"""The learning-rate schedules by name. A new schedule is one more entry of `SCHEDULES`."""

from __future__ import annotations

import math

# The fraction of the highest rate, by how much of the schedule after warm-up is done (0 to 1).
SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def warmup_ticks(warmup_ratio: float, ticks: float) -> int:
    """Return the number of ticks in which the rate rises."""
    return math.ceil(warmup_ratio * ticks)


def schedule_factor(name: str, warmup_ratio: float, ticks: float, tick: float) -> float:
    """Return the learning rate at `tick` (0-based) as a fraction of the highest one.

    Warm-up rises over ceil(warmup_ratio x ticks) ticks. It does not start at 0: under HiFT a tick is a whole cycle, and
    a cycle with rate 0 would train nothing. `linear` and `cosine` would reach 0 one tick after the last.
    """
    warmup = warmup_ticks(warmup_ratio, ticks)
    if tick < warmup:
        return (tick + 1) / (warmup + 1)
    return SCHEDULES[name](min(1.0, (tick - warmup) / max(1, ticks - warmup)))
