"""`launch/train.py` that writes down what it saved, loaded, trained on and ended with: a script for the real launcher.

In the folder that the variable HIFT_WATCHED names:

saved-STEP.pt, loaded-STEP.pt, end.pt   weights, buffers, masters and moments by name, and update counts by block
batch-STEP-RANK-NUMBER.pt               a micro-batch that was trained on, the NUMBER-th of the process

The variable HIFT_KILLED lets the process kill itself: while "loading" the second block of a checkpoint, or while
"saving", when the files of a checkpoint are written and its manifest is not.
"""

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from hift_ds.checkpoint import store
from hift_ds.engine import HiFTEngine
from hift_ds.launch import loop, run, train
from hift_ds.state.step import BlockState
from tests.support import tiny

MOMENTS = ("exp_avg", "exp_avg_sq")


def state_of(engine: Any) -> dict[str, Tensor]:
    """Read what each parameter has, on every rank; at stages 1 to 3 by DeepSpeed's own functions."""
    engine.settle()
    found = {f"weight {name}": value for name, value in tiny.weights(engine).items()}
    found |= {f"buffer {name}": buffer.cpu().clone() for name, buffer in engine.module.named_buffers()}
    read = _at_stage_0 if engine.zero_optimization_stage() == 0 else _by_deepspeed
    found |= {key: value.detach().float().cpu().flatten().clone() for key, value in read(engine).items()}
    for block, (place, _) in zip(engine.blocks, engine.block_optimizers._places, strict=True):
        optimizer = engine.block_optimizers.optimizers[place]
        counts = {int(optimizer.optimizer.state.get(master, {}).get("step", 0)) for master, _ in optimizer.masters()}
        if not block.slices:  # blocks that share a tensor count for themselves
            (count,) = counts
            found |= {f"updates {name}": torch.tensor(count) for name in block.parameter_names}
    return found


def _by_deepspeed(engine: Any) -> dict[str, Tensor]:
    found = {}
    for block, (place, _) in zip(engine.blocks, engine.block_optimizers._places, strict=True):
        is_updated = bool(engine.block_optimizers.optimizers[place].optimizer.state)
        for name in block.parameter_names:
            parameter = engine.module.get_parameter(name)
            found[f"master {name}"] = safe_get_full_fp32_param(parameter)
            for key in MOMENTS if is_updated else ():
                found[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key)
    return found


def _at_stage_0(engine: Any) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found = {}
    for block in engine.block_optimizers.optimizers:
        with block.decoded(changes=False):
            for weights, (master, _) in zip(block._weights, block.masters(), strict=True):
                found[f"master {names[id(weights)]}"] = master.detach().clone()
        for key in MOMENTS:
            with block.decoded(key, changes=False):
                for weights, (master, _) in zip(block._weights, block.masters(), strict=True):
                    if (moment := block.optimizer.state.get(master, {}).get(key)) is not None:
                        found[f"{key} {names[id(weights)]}"] = moment.clone()
    return found


class Watched:
    """Writes into the folder: state on rank 0, batches on each rank."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ["RANK"])
        folder.mkdir(parents=True, exist_ok=True)
        self.batches = 0
        self.save, self.load, self.share = HiFTEngine.save_checkpoint, HiFTEngine.load_checkpoint, loop.loss_share
        self.export = run.Run.export

    def write(self, engine: Any, name: str) -> None:
        state = state_of(engine)
        if self.rank == 0:
            torch.save(state, self.folder / f"{name}.pt")

    def save_checkpoint(self, engine: Any, *args: Any, **kwargs: Any) -> Any:
        self.write(engine, f"saved-{engine.global_steps}")
        return self.save(engine, *args, **kwargs)

    def load_checkpoint(self, engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.load(engine, *args, **kwargs)
        self.write(engine, f"loaded-{engine.global_steps}")
        return result

    def loss_share(self, engine: Any, batch: Any, *args: Any) -> Any:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        inputs |= {key: getattr(batch["labels"], key) for key in ("kept", "rows", "values")}
        self.batches += 1
        name = f"batch-{engine.global_steps + 1}-{self.rank}-{self.batches}.pt"
        torch.save(inputs, self.folder / name)
        return self.share(engine, batch, *args)

    def at_the_end(self, one: run.Run) -> None:
        self.write(one.engine, "end")
        self.export(one)


def killed_at(call: int) -> Any:
    """Return a function that kills the process at its call of this number (from 1)."""
    calls = itertools.count(1)

    def wrap(function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return count

    return wrap


if __name__ == "__main__":
    if (moment := os.environ.get("HIFT_KILLED")) == "loading":
        BlockState.load = killed_at(2)(BlockState.load)
    elif moment == "saving":
        store.write_manifest = killed_at(1)(store.write_manifest)
    watched = Watched(Path(os.environ["HIFT_WATCHED"]))
    with (
        mock.patch.object(HiFTEngine, "save_checkpoint", lambda *a, **k: watched.save_checkpoint(*a, **k)),
        mock.patch.object(HiFTEngine, "load_checkpoint", lambda *a, **k: watched.load_checkpoint(*a, **k)),
        mock.patch.object(loop, "loss_share", watched.loss_share),
        mock.patch.object(run.Run, "export", lambda one: watched.at_the_end(one)),
    ):
        sys.exit(train.main())
