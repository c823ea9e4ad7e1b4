"""The tasks of the check, and the process that runs one: ``python -m hift_ds.evaluation.gpu_check.task TASK FILE``."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.evaluation.cost.timed_methods import join_world
from hift_ds.evaluation.gpu_check import several, weights
from hift_ds.evaluation.gpu_check.training import Workload, measure, plan

PARTS = {  # name -> what it checks
    "weights": "those of ZeRO 0 to 3 beside a plain PyTorch loop's",
    "memory": "planned beside measured, on the device and on the host",
    "step": "where its time goes: kernels, copies, waits of the host",
    "ranks": "on two GPUs: weights, memory and waits of ZeRO 0 to 3, collectives beside copies",
    "methods": "step times of HiFT, BAdam, LoRA, LOMO and full fine-tuning",
}


@dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        name: of the row in the table.
        parts: the parts of the check that need it.
        seconds: its time limit.
        fused: needs DeepSpeed's fused kernel.
        work: what `training.measure` measures; None: `weights.check` with `offload`.
        offload: the section ``hift.offload`` of `weights.check`.
        ranks: processes, each with a device of its own; several are started by DeepSpeed's launcher, for
            `several.check` with ``work``'s shape, first length and profiled steps.
    """

    name: str
    parts: tuple[str, ...]
    seconds: float
    fused: bool
    work: Workload | None = None
    offload: Mapping[str, Any] | None = None
    ranks: int = 1

    def skipped(self) -> str | None:
        """Return why this machine cannot run the task, or None. On a CPU, ranks share it."""
        devices = get_accelerator().device_count()
        if self.ranks == 1 or get_accelerator().device_name() == "cpu" or devices >= self.ranks:
            return None
        return f"skipped: it needs {self.ranks} GPUs, and this machine has {devices}"


def run(task: Task, wait: Callable[[], Any] = lambda: None) -> Iterator[dict[str, Any]]:
    """Run a task in this process, and yield all results so far after each measurement.

    A failure ends the task, and is the result ``reason``.

    Args:
        wait: waits until the task may use the device; memory is planned before.
    """
    found: dict[str, Any] = {}
    try:
        planned = plan(task.work) if task.work and task.ranks == 1 else {}
        wait()
        if task.ranks > 1:
            get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
            deepspeed.init_distributed(verbose=False)
        else:
            join_world()
        for more in _results(task, planned):
            found |= more
            yield found
    except torch.OutOfMemoryError as error:
        yield found | {"reason": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # of a method, of the settings, of a library: the other tasks go on
        traceback.print_exc()
        yield found | {"reason": f"{type(error).__name__}: {str(error)[:500]}"}


def _results(task: Task, planned: Mapping[int, int | None]) -> Iterator[dict[str, Any]]:
    if task.work and task.ranks > 1:
        return several.check(task.work.shape, task.work.lengths[0], task.work.profiled)
    return measure(task.work, planned) if task.work else weights.check(task.offload or {})


def main() -> None:
    """Run the task once standard input has a line, and write its results to the file."""
    values, file = json.loads(sys.argv[1]), Path(sys.argv[2])
    work = values.pop("work")
    task = Task(**values, work=Workload(**work) if work else None)

    is_first = os.environ.get("RANK", "0") == "0"

    def wait() -> None:
        if is_first and not sys.stdin.readline():
            os._exit(1)  # the command has ended

    for found in run(task, wait):
        if not is_first:
            continue
        new = file.with_suffix(".new")
        new.write_text(json.dumps(found), encoding="utf-8")
        new.replace(file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to free gigabytes of page-locked memory takes seconds


def arguments(task: Task, file: Path) -> list[str]:
    """Return the command of a process that runs a task."""
    own = ["hift_ds.evaluation.gpu_check.task", json.dumps(asdict(task)), str(file)]
    if task.ranks == 1:
        return [sys.executable, "-u", "-m", *own]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--num_gpus", str(task.ranks)]
    return [*launcher, "--master_port", port, "--no_local_rank", "--module", *own]


if __name__ == "__main__":
    main()
