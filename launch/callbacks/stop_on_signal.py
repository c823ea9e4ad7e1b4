"""Stopping a run when a signal asks for it."""

from __future__ import annotations

from typing import NoReturn

from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.callbacks.checkpoints import Checkpoints, tag
from hift_ds.launch.callbacks.held_out import EvaluationInterrupted
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.methods.table import METHODS
from hift_ds.launch.runtime import outputs
from hift_ds.launch.runtime.preemption import Preemption, Stopped
from hift_ds.launch.runtime.ranks import RankWatch, sum_over_ranks


class Stopping(Callback):
    """Stop after the step, with a checkpoint, as soon as any rank was asked to. It also reports progress to the watch.

    Args:
        last_step: the step that training ends with.

    Ranks receive signals at different times. The sum over ranks that each step makes anyway tells all of them in the
    same step.
    """

    def __init__(
        self, settings: Settings, checkpoints: Checkpoints, asked: Preemption, watch: RankWatch, last_step: int
    ) -> None:
        self.settings, self.checkpoints, self.asked, self.watch = settings, checkpoints, asked, watch
        self.last_step = last_step
        self.any_asked = False

    def contribution(self, number: int) -> float:
        """Return 1 if this rank was asked to stop."""
        return float(bool(self.asked.reasons))

    def taken(self, number: int) -> None:
        """Report progress."""
        self.watch.progress(number)

    def after_step(self, step: Step, total: float) -> bool:
        """Stop if any rank was asked to.

        Raises:
            Stopped: the message says which step is saved.
        """
        if total or self.any_asked:
            self._stop(step.number)
        return False

    def after_batch(self) -> None:
        """Interrupt a held-out evaluation if any rank was asked to stop. Every rank calls it after each batch.

        Raises:
            EvaluationInterrupted: a rank was asked to stop.
        """
        self.watch.progress()
        self.any_asked = bool(sum_over_ranks(self.checkpoints.engine.device, float(bool(self.asked.reasons)))[0])
        if self.any_asked:
            raise EvaluationInterrupted

    def after_last_step(self) -> None:
        """`after_batch` for the evaluation after training: stop with the checkpoint of the last step.

        Raises:
            Stopped: a rank was asked to stop.
        """
        try:
            self.after_batch()
        except EvaluationInterrupted:
            self._stop(self.last_step)

    def _stop(self, step: int) -> NoReturn:
        method = self.settings.method.name
        if not METHODS[method].resumable:
            raise Stopped(f"after step {step}; nothing was saved: method {method!r} cannot be continued")
        if self.checkpoints.saved != step:
            self.checkpoints.save(step)
        path = outputs.folder(self.settings) / "checkpoints" / tag(step)
        raise Stopped(f"after step {step}; checkpoint {path}; continue with --resume")
