"""Train with state in files in a process that may use little memory, beside HiFT with its state in host memory.

    python -m evaluation.efficiency --model-shape smollm2-1.7b --batch 1 --length 32 --files FOLDER --cycles 2

Each run trains in a separate process, at ZeRO stage 2 in bf16. Its anonymous memory is sampled: the memory that the
kernel cannot drop, libraries included, but not the pages of files. The run with state in files gets a limit of the
system (``RLIMIT_DATA``): what stock DeepSpeed's weights and gradients alone take, but at least 1 GiB.
"""

import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import hift_ds
from hift_ds.evaluation.cost.process_memory import SECONDS, anonymous
from hift_ds.evaluation.cost.timed_methods import LEARNING_RATE, Setup, join_world, make_batch, make_model
from hift_ds.launch.errors import UserError
from hift_ds.state.free_memory import return_freed_memory

BF16 = 2  # bytes of a weight or a gradient


@dataclass
class Run:
    """What one process measured, in bytes and seconds.

    Attributes:
        name: where the state is.
        parameters: of the model.
        libraries: anonymous memory before the model is made.
        highest: the peak of anonymous memory.
        state: bytes of masters and optimizer state in host memory, and in files.
        limit: of the process; None: none.
        seconds: of a step, one mean for each cycle. The first cycle makes the optimizer's state.
        losses: of the first step and of the last.
    """

    name: str
    parameters: int
    libraries: int
    highest: int
    state: list[int]
    limit: int | None
    seconds: list[float]
    losses: list[float]


def train(name: str, setup: Setup, cycles: int, hift: Mapping[str, Any], is_limited: bool) -> Run:
    """Train some cycles. To be called in a new process."""
    join_world()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in make_shape(setup).parameters())
    libraries, limit = anonymous(), None
    if is_limited:
        limit = max(parameters * 2 * BF16, 2**30)
        reserved = _data() - libraries  # mapped by libraries, and never used
        resource.setrlimit(resource.RLIMIT_DATA, (limit + reserved, limit + reserved))
    highest, done = [libraries], threading.Event()

    def sample() -> None:
        while not done.wait(SECONDS):
            highest[0] = max(highest[0], anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        model = make_model(setup.shape, setup.dtype)
        config = {
            "train_micro_batch_size_per_gpu": setup.batch,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": setup.stage},
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
            "hift": dict(hift),
        }
        engine = hift_ds.initialize(model=model, config=config)[0]
        del model
        return_freed_memory()
        seconds, losses = [], []
        for cycle in range(cycles):
            start = time.perf_counter()
            for block in range(len(engine.blocks)):
                batch = make_batch(setup.shape, cycle * len(engine.blocks) + block, setup.batch, setup.length)
                loss = engine(**batch).loss
                losses.append(loss.item())
                engine.backward(loss)
                engine.step()
            seconds.append((time.perf_counter() - start) / len(engine.blocks))
        engine.settle()
        ledger = engine.memory_ledger()
        state = [sum(ledger[place][key] for key in ("master_weights", "optimizer_state")) for place in ("host", "nvme")]
        engine.destroy()
    finally:
        done.set()
        sampler.join()
    return Run(name, parameters, libraries, highest[0], state, limit, seconds, [losses[0], losses[-1]])


def measure(name: str, setup: Setup, cycles: int, hift: Mapping[str, Any], is_limited: bool) -> Run:
    """Run `train` in a new process.

    Raises:
        UserError: the process failed; its messages are on standard error.
    """
    arguments = json.dumps([name, asdict(setup), cycles, hift, is_limited])
    # One arena of malloc, whose freed memory returns to the system at once, for both runs.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    environment["MALLOC_TRIM_THRESHOLD_"] = "262144"
    command = [sys.executable, "-m", "hift_ds.evaluation.cost.file_state", arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the process that trains with {name} exited with {done.returncode}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def compare(setup: Setup, cycles: int, folder: str, hift: Mapping[str, Any]) -> Iterator[Run]:
    """Train with state in files under the limit, then in host memory without one; yield each run when it has ended.

    Args:
        folder: for the files.
        hift: keys of the section ``hift`` for both. Those of ``offload`` about files are for the first run alone.
    """
    offload = hift.get("offload", {})
    in_files = {**hift, "offload": {**offload, "device": "nvme", "nvme_path": folder}}
    others = {key: value for key, value in offload.items() if key not in ("device", "nvme", "nvme_path")}
    yield measure("state in files", setup, cycles, in_files, True)
    yield measure("state in host memory", setup, cycles, {**hift, "offload": {**others, "device": "cpu"}}, False)


def table(runs: Sequence[Run]) -> str:
    """Return a Markdown table, and what stock DeepSpeed needs for weights and gradients."""
    gib = 2.0**30
    lines = [
        "| GiB of | state in memory | state in files | limit | anonymous memory at its peak | libraries before | "
        "s/step of each cycle | loss, first and last |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        limit = "none" if run.limit is None else f"{run.limit / gib:.2f}"
        seconds = ", ".join(f"{value:.2f}" for value in run.seconds)
        lines.append(
            f"| {run.name} | {run.state[0] / gib:.2f} | {run.state[1] / gib:.2f} | {limit} | {run.highest / gib:.2f} | "
            f"{run.libraries / gib:.2f} | {seconds} | {run.losses[0]:.4f}, {run.losses[1]:.4f} |"
        )
    numel = runs[0].parameters
    stock = (
        f"{numel:,} parameters: stock DeepSpeed's weights and gradients alone take {numel * 4 / gib:.2f} GiB in bf16"
    )
    return "\n".join([*lines, "", f"- {stock} and {numel * 8 / gib:.2f} GiB in fp32."])


def make_shape(setup: Setup) -> torch.nn.Module:
    """Make the model on the default device of torch."""
    from transformers import AutoModelForCausalLM

    from hift_ds.evaluation.cost.timed_methods import SHAPES
    from hift_ds.planner.models import load_config

    return AutoModelForCausalLM.from_config(load_config(SHAPES[setup.shape]))


def _data() -> int:
    """Return the private writable memory that this process has mapped, which ``RLIMIT_DATA`` limits."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))


if __name__ == "__main__":
    name, common, cycles, hift, is_limited = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        result = train(name, Setup(**common), cycles, hift, is_limited)
    gc.collect()
    print(json.dumps(asdict(result)))
