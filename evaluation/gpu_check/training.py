"""Measure a training method alone in its process: set-up, steps, memory of device and host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import hift_ds
from hift_ds.evaluation.compare.planned_memory import planned_memory
from hift_ds.evaluation.cost.process_memory import resident
from hift_ds.evaluation.cost.timed_methods import (
    SHAPES,
    Batch,
    Setup,
    TimedMethod,
    make_batch,
    make_model,
    make_settings,
    make_timed_method,
)
from hift_ds.evaluation.gpu_check import trace
from hift_ds.planner.models import load_config

_BATCHES = 4  # different ones, used in turns


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        method: a key of `timed_methods.METHOD_SECTIONS`.
        shape, dtype, stage: the model and DeepSpeed's ZeRO stage.
        lengths: tokens of the one sequence in a batch. The first is without activation checkpointing, all others are
            with it.
        steps: timed steps of a method without blocks; a method with blocks is timed over a whole cycle.
        offload: the section ``hift.offload``.
        profiled: steps under the profiler; 0: none.
    """

    method: str
    shape: str
    dtype: str = "bf16"
    stage: int = 2
    lengths: Sequence[int] = (512,)
    steps: int = 10
    offload: Mapping[str, Any] = field(default_factory=dict)
    profiled: int = 0


def plan(work: Workload) -> dict[int, int | None]:
    """Return the planned bytes on the device for each length; None if the planner cannot plan the method."""
    planned = {}
    for number, length in enumerate(work.lengths):
        setup = Setup(work.shape, work.dtype, work.stage, 1, length)
        settings = make_settings(work.method, setup, work.offload)
        settings = replace(settings, model=replace(settings.model, gradient_checkpointing=bool(number)))
        sizes = planned_memory(settings, load_config(SHAPES[work.shape]), length, 1)
        planned[length] = sizes["total"] if sizes else None
    return planned


def measure(work: Workload, planned: Mapping[int, int | None]) -> Iterator[dict[str, Any]]:
    """Measure a workload, and yield more results after each measurement.

    Args:
        planned: from `plan`.

    Yields:
        ``setup_seconds``, ``model_seconds``: to make the engine, the model. ``host``: bytes that the process has grown
        by, and what the engine counts. Then, for each length, with its number as key, the results of `_measure_length`.
    """
    setup = Setup(work.shape, work.dtype, work.stage, 1, work.lengths[0])
    on_host = work.offload.get("weights") == "cpu"
    _load_libraries(work, setup.length)
    before = resident()
    model, seconds = _timed(lambda: make_model(work.shape, work.dtype, on_host))
    yield {"model_seconds": seconds}
    method, seconds = _timed(lambda: make_timed_method(work.method, setup, model, offload=work.offload))
    try:
        yield {"setup_seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
        yield {"host_after_setup": _host(method, before)}
        for number, length in enumerate(work.lengths):
            if number:
                hift_ds.checkpoint_activations(model)
            batches = [make_batch(work.shape, i, 1, length) for i in range(_BATCHES)]
            for found in _measure_length(work, method, batches, first=not number):
                yield {str(length): {"planned": planned.get(length), **found}}
            yield {"host": _host(method, before)}
    finally:
        method.destroy()


def _load_libraries(work: Workload, length: int) -> None:
    """Run a forward pass of one layer: the libraries that it loads take host memory that is not the method's."""
    model = make_model(work.shape, work.dtype, layers=1)
    with torch.no_grad():
        model(input_ids=make_batch(work.shape, 0, 1, length)["input_ids"])
    get_accelerator().synchronize()


def _measure_length(
    work: Workload, method: TimedMethod, batches: Sequence[Batch], first: bool
) -> Iterator[dict[str, Any]]:
    """Take steps on batches of one length, and yield all results so far after each measurement.

    Yields:
        ``first_seconds``: of a step, the mean over the first cycle, or of the first steps of a method without blocks.
        ``seconds``: of a step, the mean over a cycle; ``middle``: of the middle block; ``blocks``: of each block.
        ``peak``, ``reserved``: bytes on the device, allocated and reserved by the allocator. ``trace``:
        `trace.summary`; ``no_trace``: why there is none.
    """
    accelerator, length = get_accelerator(), batches[0]["input_ids"].shape[1]
    by_block = hasattr(method.engine, "active_block")
    found: dict[str, Any] = {}
    numbers = count()

    def step() -> None:
        method.step(batches[next(numbers) % len(batches)])

    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    warm_up = method.cycle if by_block and first else 2
    found["first_seconds"] = _timed(step, warm_up)[1] / warm_up
    if work.method == "badam":
        found |= _time_badam(method, step)
    else:
        found |= _time_steps(method, step, method.cycle if by_block else work.steps)
    found["tokens_per_second"] = length / found["seconds"]
    found["peak"], found["reserved"] = accelerator.max_memory_allocated(), accelerator.max_memory_reserved()
    yield found
    if work.profiled:
        while by_block and method.engine.active_block != max(0, method.cycle // 2 - work.profiled // 2 - 1):
            step()  # up to the middle blocks
        try:
            found["trace"] = trace.profile(step, work.profiled, method.engine.module)
        except (RuntimeError, ValueError, KeyError) as error:  # of the profiler, or of a trace that cannot be read
            found["no_trace"] = f"{type(error).__name__}: {error}"
            print(f"no trace: {found['no_trace']}", flush=True)
        yield found


def _time_steps(method: TimedMethod, step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Take steps without waiting between them, as a training loop does.

    A block's time is that between the host's ends of two steps. The host waits for the device in each step, so that
    these times are right but for the part of a step that follows the wait.
    """
    ends, blocks = [], []

    def take() -> None:
        for _ in range(steps):
            blocks.append(getattr(method.engine, "active_block", 0))
            step()
            ends.append(time.perf_counter())

    get_accelerator().synchronize()
    ends.append(time.perf_counter())
    _, total = _timed(take)
    found: dict[str, Any] = {"seconds": total / steps}
    if hasattr(method.engine, "active_block"):
        by_block = {block: after - before for block, before, after in zip(blocks, ends, ends[1:], strict=False)}
        found["blocks"] = [by_block[block] for block in sorted(by_block)]
        found["middle"] = by_block[sorted(by_block)[len(by_block) // 2]]
    return found


def _time_badam(method: TimedMethod, step: Callable[[], None], steady: int = 3) -> dict[str, Any]:
    """Time BAdam on each block: the switch to it with the first step, which makes its state, and later steps.

    Returns:
        ``seconds``: of a step with a switch after every step; ``every_100``: with one after every 100 steps;
        ``steady``: without a switch.
    """
    switched, later = [], []

    def switch() -> None:
        method.between()
        step()

    for _ in range(method.cycle):
        switched.append(_timed(switch)[1])
        later.append(_timed(step, steady)[1] / steady)
    each, rest = sum(switched) / len(switched), sum(later) / len(later)
    return {"seconds": each, "every_100": (each + 99 * rest) / 100, "steady": rest}


def _timed(run: Callable[[], Any], times: int = 1) -> tuple[Any, float]:
    """Call a function, and return its last result, and the seconds until the device has done the work of all calls."""
    get_accelerator().synchronize()
    start = time.perf_counter()
    for _ in range(times):
        result = run()
    get_accelerator().synchronize()
    return result, time.perf_counter() - start


def _host(method: TimedMethod, before: int) -> dict[str, int | None]:
    ledger = getattr(method.engine, "memory_ledger", None)
    return {"grown": resident() - before, "counted": sum(ledger()["host"].values()) if ledger else None}
