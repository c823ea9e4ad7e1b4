"""Measure the peak memory of training above the loaded model.

    python -m evaluation.efficiency --memory

All methods use the loss of ``launch/train.py``, which computes logits for one chunk of tokens at a time. Each method
trains in a separate process. On a CPU, the measure is anonymous memory, sampled from the kernel's statistics. HiFT then
keeps its state in files; pages of mapped files do not count, because the kernel can drop them. On a GPU, the measure is
memory allocated on the device, and HiFT keeps its state in host memory.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace

import torch
from deepspeed.accelerator import get_accelerator

import hift_ds
from hift_ds.evaluation.cost.process_memory import peak_memory
from hift_ds.evaluation.cost.timed_methods import Setup, join_world, make_batch, make_model, make_timed_method
from hift_ds.launch.errors import UserError

NO_ROOM = "out of memory on the device"


@dataclass
class Peak:
    """The memory of a process that trains, in bytes."""

    method: str
    checkpointing: bool
    loaded: int  # with the model, before the engine is made
    peak: int

    @property
    def above(self) -> int:
        """The peak above the loaded model."""
        return self.peak - self.loaded


def train(method: str, checkpointing: bool, setup: Setup) -> Peak:
    """Train a cycle and the first step of the next one, at least three steps, and return the peak.

    To be called in a new process.
    """
    join_world()
    # First a step on a tiny model: what a method imports and compiles does not count as memory of training.
    with contextlib.suppress(UserError):
        tiny = replace(setup, shape="tiny", batch=1, length=8)
        first = make_timed_method(method, tiny)
        first.step(make_batch("tiny", 0, 1, 8))
        first.destroy()
        del first
    model = make_model(setup.shape, setup.dtype)
    if checkpointing:
        hift_ds.checkpoint_activations(model)
    with peak_memory() as peak, tempfile.TemporaryDirectory() as folder:
        on_cpu = get_accelerator().device_name() == "cpu"
        offload = {"device": "nvme", "nvme_path": folder} if on_cpu else None
        timed_method = make_timed_method(method, setup, model, offload)
        for index in range(max(3, timed_method.cycle + 1)):
            timed_method.step(make_batch(setup.shape, index, setup.batch, setup.length))
            timed_method.between()
        time.sleep(0.01)
        timed_method.destroy()
    return Peak(method, checkpointing, peak.start, peak.highest)


def measure(method: str, checkpointing: bool, setup: Setup) -> Peak:
    """Run `train` in a new process.

    Raises:
        UserError: out of memory, or the process failed; its messages are on standard error.
    """
    arguments = [method, checkpointing, asdict(setup)]
    # With a fixed threshold, freed tensors return to the system at once, for every method.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command = [sys.executable, "-m", "hift_ds.evaluation.cost.peak_memory", json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        killed = " (killed, probably out of memory)" if done.returncode == -9 else ""
        raise UserError(
            f"the process that measures the peak memory of {method!r} exited with {done.returncode}{killed}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        raise UserError(NO_ROOM)
    return Peak(**found)


def compare(setup: Setup) -> list[Peak]:
    """Measure full fine-tuning and HiFT, without and with activation checkpointing."""
    return [measure(method, checkpointing, setup) for checkpointing in (False, True) for method in ("full", "hift")]


def table(peaks: list[Peak]) -> str:
    """Return a Markdown table with the ratio of HiFT to full fine-tuning."""
    rows = [
        "| activation checkpointing | full fine-tuning, MiB | HiFT, MiB | HiFT / full |",
        "| --- | --- | --- | --- |",
    ]
    for full, hift in zip(peaks[::2], peaks[1::2], strict=True):
        named = "yes" if full.checkpointing else "no"
        sizes = f"{full.above / 2**20:.0f} | {hift.above / 2**20:.0f}"
        rows.append(f"| {named} | {sizes} | {hift.above / full.above:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    name, checkpoints, common = json.loads(sys.argv[1])
    result: dict | None = None
    try:
        result = asdict(train(name, checkpoints, Setup(**common)))
    except torch.OutOfMemoryError:
        pass
    print(json.dumps(result))
