"""A note for runs whose saves take longer than DeepSpeed's launcher waits for its ranks after a signal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.callbacks.forecast import Forecast, as_time
from hift_ds.state.placement import MOMENTS

GRACE = 30.0  # seconds for which `launch.py` waits; DeepSpeed has no setting for it


class GraceNote(Callback):
    """Say once that a stop may be killed before its save is whole, and what to do: before the first step, or later.

    Before the first step only the save is known, by estimate. Later a step comes before it.

    Args:
        forecast: knows the seconds of a save and of the longest step.
        say: prints the note.
        log: of rank 0, which has its pid.
        smaller: a setting that makes checkpoints smaller; None: there is none.
        applies: DeepSpeed's launcher started the run, and the method can be continued. False: say nothing.
    """

    def __init__(
        self, forecast: Forecast, say: Callable[[str], None], log: Path, smaller: str | None, applies: bool
    ) -> None:
        self.forecast, self.say, self.log, self.smaller = forecast, say, log, smaller
        self.is_said = not applies

    def begin(self) -> None:
        """Look at the estimate of a save, before the first step."""
        self._look(0.0)

    def after_step(self, step: Step, total: float) -> bool:
        """Look at the steps and saves so far, once all blocks have been trained."""
        if not self.is_said and self.forecast.left(step.number) is not None:
            self._look(self.forecast.longest)
        return False

    def _look(self, step: float) -> None:
        saving = self.forecast.saving
        if self.is_said or saving is None or saving + step <= GRACE:
            return
        self.is_said = True
        before = f", after a step of up to {as_time(step)}" if step >= 1 else ""
        smaller = f", or {self.smaller} for smaller checkpoints" if self.smaller else ""
        self.say(
            f"note: to save a checkpoint takes about {as_time(saving)}{before}. After Ctrl-C or a SIGTERM to "
            f"launch.py, DeepSpeed kills the ranks after {GRACE:.0f} s, so the save may not be finished; the "
            f"checkpoint before it stays. To stop without this limit, send SIGTERM to rank 0 alone (its pid is in "
            f"{self.log}). To lose less if it is killed, set training.save_every. To save faster, set output.dir to a "
            f"folder on a faster drive{smaller}."
        )


def smaller_state(engine: Any) -> str | None:
    """Return the setting with which the checkpoints of an engine become smaller; None: there is none."""
    hift = getattr(engine, "hift", None)
    if hift is None or hift.offload.device == "none" or hift.offload.moments == "8bit":
        return None
    return "deepspeed.hift.offload.moments=8bit" if type(engine.basic_optimizer) in MOMENTS else None
