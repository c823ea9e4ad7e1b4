"""The interface of everything that happens around a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Step:
    """A step that has just been taken.

    Attributes:
        number: steps done, this one included.
        record: the step's line of metrics.jsonl; callbacks may add to it in `describe`.
        own_loss: this rank's share of the step's loss.
        rows: the step's examples over all ranks, as indices of the training data, or the places of a stream's rows.
        position: of a stream, where it is after the step.
    """

    number: int
    record: dict[str, Any]
    own_loss: float
    rows: Sequence[int | str] = ()
    position: dict[str, Any] | None = None


class Callback:
    """Something that happens around training steps. The methods do nothing; subclasses override what they need.

    `launch.run` lists the callbacks of a run, and `launch.loop` calls them in that order, on every rank. A callback may
    call collectives in any method: all ranks are in the same one.
    """

    def before_step(self, number: int) -> None:
        """Called before step `number` (from 1) is taken."""

    def contribution(self, number: int) -> float:
        """Return this rank's number for `after_step`; the loop sums it over the ranks together with the loss.

        Called before the update of step `number` begins.
        """
        return 0.0

    def taken(self, number: int) -> None:
        """Called as soon as step `number` is taken."""

    def describe(self, step: Step) -> None:
        """Add to `step.record`. Called before `after_step` of any callback."""

    def after_step(self, step: Step, total: float) -> bool:
        """React to the step, and return whether training ends here.

        Args:
            total: sum of the ranks' contributions.
        """
        return False


def finite(value: float) -> float | None:
    """Return the value as a record can hold it: JSON has no infinities and no NaN, so they become None."""
    return value if math.isfinite(value) else None
