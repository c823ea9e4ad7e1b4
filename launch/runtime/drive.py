"""The drive that a run needs for its checkpoints and its model, and how fast it is."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed import comm as dist

from hift_ds.checkpoint.files import CheckpointError, FileEngine
from hift_ds.launch.config.settings import TrainingSettings

PROBE = 2**25  # bytes that each rank writes to find out how fast the drive is


@dataclass(frozen=True)
class Room:
    """What a run needs on the drive of its output folder, in bytes.

    Attributes:
        checkpoint: size of a checkpoint.
        checkpoints: how many are there at the same time, at most, with the one being written.
        model: size of the exported model; 0: none.
        present: what of it is there already.
        free: on the drive.
    """

    checkpoint: int
    checkpoints: int
    model: int
    present: int
    free: int

    @property
    def needed(self) -> int:
        """Bytes that must be free."""
        return max(0, self.checkpoints * self.checkpoint + self.model - self.present)

    def report(self, training: TrainingSettings) -> str:
        """Describe the room, with a warning and its remedy if it is too little."""
        if training.save_every or training.keep_best:
            also = [
                f"training.{key}={value}" for key in ("keep_every", "keep_best") if (value := getattr(training, key))
            ]
            kept = "null" if training.keep_last is None else training.keep_last
            why = ", ".join([f"training.keep_last={kept}", *also])
        else:
            why = "if the run is stopped"
        saved = f"{self.checkpoints} checkpoint{'s' * (self.checkpoints != 1)} of {as_size(self.checkpoint)} ({why})"
        model = f" and a model of {as_size(self.model)}" if self.model else ""
        text = f"drive: up to {saved}{model}; "
        if self.needed <= self.free:
            return f"{text}{as_size(self.free)} are free"
        lower = training.save_every and (training.keep_last is None or training.keep_last > 1 or training.keep_every)
        remedy = "set training.keep_last=1 without training.keep_every, " if lower else ""
        return (
            f"{text}{as_size(self.free)} are free\nwarning: the run needs {as_size(self.needed)} of free "
            "room on the drive of output.dir. The run stops at the first checkpoint that does not fit. Earlier "
            f"checkpoints are kept. Make room, {remedy}or set output.dir to a folder on a larger drive."
        )


def room(folder: Path, training: TrainingSettings, checkpoint: int, model: int) -> Room:
    """Return what a run needs in its output folder, which exists."""
    present = sum(
        path.stat().st_size
        for inside in ("checkpoints", "model")
        for path in (folder / inside).rglob("*")
        if path.is_file()
    )
    return Room(checkpoint, checkpoints_at_once(training), model, present, shutil.disk_usage(folder).free)


def checkpoints_at_once(training: TrainingSettings) -> int:
    """Return the largest number of checkpoints of a run on its drive, the one being written included."""
    last = training.max_steps
    saves = set(range(training.save_every, last + 1, training.save_every)) if training.save_every else set()
    saves |= (
        set(range(training.eval_every, last + 1, training.eval_every))
        if training.keep_best and training.eval_every
        else set()
    )
    saves.add(last)  # the last step, or where the run is stopped
    if training.keep_last is None:
        return len(saves)
    older = sorted(saves)[: -training.keep_last]
    kept = sum(step % training.keep_every == 0 for step in older) if training.keep_every else 0
    return min(len(saves), training.keep_last + kept + bool(training.keep_best) + 1)


def seconds_of_save(folder: Path, nbytes: int, device: torch.device) -> float:
    """Estimate the seconds of a save from a small one that is written and removed here. All ranks call it.

    Args:
        folder: exists, and is the same on all ranks or on the ranks of a machine.
        nbytes: of all ranks' files.
        device: for the ranks' messages.
    """
    path = folder / f".drive-{dist.get_rank()}.pt"
    probe, tensor = FileEngine(), torch.randint(256, (PROBE,), dtype=torch.uint8)
    dist.barrier()
    started = time.perf_counter()
    try:
        probe.save(tensor, str(path))
        probe.finish()
    except CheckpointError:
        pass  # the first save says what is wrong
    finally:
        path.unlink(missing_ok=True)
    seconds = torch.tensor([time.perf_counter() - started], device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds.item()) * nbytes / (PROBE * dist.get_world_size())


def as_size(nbytes: float) -> str:
    """Return a size in the units of drives, such as `1.8 GB`."""
    return f"{nbytes / 1e6:.0f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.1f} GB"
