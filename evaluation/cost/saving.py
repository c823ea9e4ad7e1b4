"""Time saving a checkpoint beside writing the same bytes without hashing and committing them.

    python -m evaluation.efficiency --saving FOLDER --model-shape smollm2-135m --stages 2 --dtypes bf16 --cycles 5
    deepspeed --num_gpus 2 --module evaluation.efficiency --saving FOLDER ...

In turns, all ranks together: ``engine.save_checkpoint`` (masters are decoded, files are hashed, flushed to the disk and
committed); ``torch.save`` of the same content, flushed to the disk; a plain write of the same bytes, flushed to the
disk. Each rank writes the files that it has in the checkpoint.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

import hift_ds
from hift_ds.checkpoint.files import FileEngine, fsync
from hift_ds.collectives import gather
from hift_ds.evaluation.cost.timed_methods import LEARNING_RATE, Setup, join_world, make_batch, make_model

TAG = "timed"
WAYS = {"save": "save_checkpoint", "torch": "torch.save and fsync", "plain": "write and fsync"}


@dataclass
class Saves:
    """Times of saving that were measured in turns.

    Attributes:
        nbytes: of the checkpoint.
        seconds: of each way to write them, one value for each turn.
    """

    dtype: str
    stage: int
    ranks: int
    nbytes: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def ratios(self, other: str) -> list[float]:
        """Return the time of a save divided by that of `other`, for each turn."""
        return [a / b for a, b in zip(self.seconds["save"], self.seconds[other], strict=True)]


def join() -> None:
    """Join the ranks that `deepspeed` started, or make this process a world of one rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        deepspeed.init_distributed(verbose=False)
    else:
        join_world()


def time_saves(setup: Setup, turns: int, folder: Path) -> Saves:
    """Train a cycle, so that all state exists; then save and write in turns. All ranks call it.

    Args:
        folder: on the drive to measure. A new folder in it is used, and removed at the end.
    """
    inside = folder / f"hift-saving-stage{setup.stage}-{setup.dtype}"
    engine = make_engine(setup)
    try:
        engine.save_checkpoint(str(inside / "saved"), tag=TAG)
        written = set(engine.checkpoint_engine.finish())
        saved = inside / "saved" / TAG
        of_others = {name for names in gather(written) for name in names}
        here = {path.name for path in saved.iterdir()} - of_others - {"manifest.json"}
        mine = sorted(written | (here if dist.get_rank() == 0 else set()))
        contents = {name: FileEngine().load(str(saved / name)) for name in mine if name.endswith(".pt")}
        data = {name: (saved / name).read_bytes() for name in mine}
        found = Saves(
            setup.dtype, setup.stage, dist.get_world_size(), sum(path.stat().st_size for path in saved.iterdir())
        )
        ways: dict[str, Callable[[Path], Any]] = {
            "save": lambda folder: engine.save_checkpoint(str(folder), tag=TAG),
            "torch": lambda folder: write(folder, {name: contents.get(name, data[name]) for name in mine}),
            "plain": lambda folder: write(folder, data),
        }
        for turn in range(turns + 1):
            for way, run in ways.items():
                seconds = timed(run, inside / way)
                if turn:  # the first is a warm-up
                    found.seconds[way].append(seconds)
        return found
    finally:
        engine.destroy()
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(inside, ignore_errors=True)


def make_engine(setup: Setup) -> Any:
    """Return an engine with all its state: it has trained for a cycle."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": setup.stage},
        "bf16": {"enabled": setup.dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
    }
    engine = hift_ds.initialize(model=make_model(setup.shape, setup.dtype), config=config)[0]
    for step in range(len(engine.blocks)):
        engine.backward(engine(**make_batch(setup.shape, step, 1, min(setup.length, 8))).loss)
        engine.step()
    return engine


def write(folder: Path, contents: dict[str, Any]) -> None:
    """Write files of bytes as they are, and other values with `torch.save`; flush each to the disk."""
    for name, content in contents.items():
        if not isinstance(content, bytes):
            torch.save(content, folder / name)
            fsync(folder / name)
            continue
        with (folder / name).open("wb", buffering=0) as file:
            view, done = memoryview(content), 0
            while done < len(view):
                done += file.write(view[done:]) or 0
            os.fsync(file.fileno())


def timed(run: Callable[[Path], Any], folder: Path) -> float:
    """Return the seconds until all ranks have run something in an empty folder."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.sync()  # what earlier writes left does not count
    dist.barrier()
    start = time.perf_counter()
    run(folder)
    dist.barrier()
    seconds = time.perf_counter() - start
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return seconds


def table(all_saves: list[Saves]) -> str:
    """Return a Markdown table of seconds, rates and ratios: medians with the minimum and maximum."""
    lines = [
        f"| precision | stage | ranks | GB | {', s | '.join(WAYS.values())}, s | save / torch.save | save / write |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in all_saves:
        cells = [one.dtype, str(one.stage), str(one.ranks), f"{one.nbytes / 1e9:.2f}"]
        cells += [spread(one.seconds[way]) for way in WAYS]
        cells += [spread(one.ratios(way)) for way in ("torch", "plain")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Format the median with the minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
