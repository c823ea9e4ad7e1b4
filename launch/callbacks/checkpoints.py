"""Checkpoints of a run: every so many steps, at the last step, and of the best model so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from deepspeed import comm as dist

from hift_ds.checkpoint import store
from hift_ds.checkpoint.files import CheckpointError
from hift_ds.checkpoint.manifest import Checkpoint
from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.callbacks.held_out import better
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime import logs, outputs


class Checkpoints(Callback):
    """Save a checkpoint when one is due.

    Args:
        saved: step of the checkpoint that a continued run was loaded from.
        best: step and held-out result of the best model of a continued run.
        timed: called with the seconds of each save.

    Attributes:
        best: `{"step": ..., "held_out": ...}` of the best evaluation so far; None before the first.
        saved: the step of the last checkpoint that this process saved or loaded.
        is_pending: whether a signal has interrupted the evaluation of the latest step. A continued run repeats it.
    """

    def __init__(
        self,
        engine: Any,
        settings: Settings,
        saved: int = 0,
        best: dict[str, Any] | None = None,
        timed: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.engine, self.settings, self.saved, self.best, self.timed = engine, settings, saved, best, timed
        self.is_pending = False
        self.position: dict[str, Any] | None = None  # of a stream of data

    def describe(self, step: Step) -> None:
        """Remember where the data is after the step."""
        self.position = step.position

    def after_step(self, step: Step, total: float) -> bool:
        """Save if the step is a multiple of `training.save_every`, the last one, or the best so far."""
        training, found = self.settings.training, step.record.get("held_out")
        self.is_pending = "held_out" in step.record and found is None
        is_best = found is not None and self.is_best(step.number, found)
        is_last = step.number == training.max_steps and (training.save_every or training.keep_best)
        if is_best or is_last or training.save_every and step.number % training.save_every == 0:
            self.save(step.number)
        return False

    def is_best(self, step: int, found: dict[str, Any]) -> bool:
        """Return whether the held-out result of a step is the best so far, with `training.keep_best`; remember it."""
        if not self.settings.training.keep_best or self.best and not better(found, self.best["held_out"]):
            return False
        self.best = {"step": step, "held_out": found}
        return True

    def save(self, step: int) -> None:
        """Commit a checkpoint of `step` on all ranks, then delete the checkpoints that are not to be kept.

        Raises:
            UserError: the checkpoint cannot be written; earlier ones are unchanged.
        """
        training, folder = self.settings.training, outputs.folder(self.settings) / "checkpoints"
        started = time.perf_counter()
        state = {"step": step, "best": self.best, "evaluation_is_pending": self.is_pending}
        state |= {} if self.position is None else {"stream": self.position}
        try:
            self.engine.save_checkpoint(str(folder), tag=tag(step), client_state=state)
        except (CheckpointError, OSError) as error:
            raise UserError(
                f"the checkpoint after step {step} could not be saved:\n{error}\nEarlier checkpoints are unchanged; "
                "make room, then continue with --resume."
            ) from None
        self.saved = step
        if dist.get_rank() == 0:
            keep = [tag(self.best["step"])] if self.best and training.keep_best else []
            try:
                store.prune(folder, training.keep_last, training.keep_every, keep)
            except (CheckpointError, OSError) as error:  # the next save tries again
                logs.warn(f"an old checkpoint in {folder} could not be deleted: {error}")
        self.timed(time.perf_counter() - started)


class CycleEnd(Callback):
    """End training at the end of a cycle over all blocks, with a checkpoint.

    Args:
        ends_training: False: do nothing.

    Attributes:
        step: where training ended; None: it did not.
    """

    def __init__(self, checkpoints: Checkpoints, ends_training: bool) -> None:
        self.checkpoints, self.ends_training = checkpoints, ends_training
        self.step: int | None = None

    def after_step(self, step: Step, total: float) -> bool:
        """Save and end training if the step was the last one of its cycle."""
        if not self.ends_training or self.checkpoints.engine.cycle == step.record["cycle"]:
            return False
        if self.checkpoints.saved != step.number:
            self.checkpoints.save(step.number)
        self.step = step.number
        return True


def tag(step: int) -> str:
    """Name of the checkpoint after `step` in OUT/checkpoints."""
    return f"step{step}"


def steps_of(found: Checkpoint) -> int:
    """Return the steps of a run after which its checkpoint was saved."""
    return int(found.tag.removeprefix("step"))


def load_checkpoint(engine: Any, found: Checkpoint) -> dict[str, Any]:
    """Load a verified checkpoint; return its client state: `step`, the steps done, and what `Checkpoints` put there.

    Raises:
        UserError: the checkpoint is of another kind of run.
    """
    try:
        _, state = engine.load_checkpoint(str(found.path.parent), tag=found)
    except ValueError as error:
        raise UserError(f"--resume: {error}") from error
    return {"best": None, "evaluation_is_pending": False, **state}


def load_weights(engine: Any, found: Checkpoint) -> None:
    """Load a verified checkpoint of this run for its weights; HiFT's may have other blocks.

    Raises:
        UserError: the checkpoint is of another kind of run.
    """
    if not hasattr(engine, "blocks"):
        load_checkpoint(engine, found)
        return
    try:
        engine.load_checkpoint(str(found.path.parent), tag=found, load_module_only=True)
    except ValueError as error:
        raise UserError(f"training.keep_best: {error}") from error
