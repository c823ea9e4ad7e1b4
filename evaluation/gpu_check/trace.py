"""Profile a few steps, and sum up where their time goes: kernels, copies, and waits of the host."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

STEP, FORWARD, LAST = "gpu_check.step", "gpu_check.forward", "gpu_check.last"  # annotations in the trace
WAITS = {
    *("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMemcpy2D"),
    *("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"),
}
ALLOCATIONS = {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaHostRegister", "cudaHostUnregister"}
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of what runs on the device

Event = dict[str, Any]
Span = tuple[float, float]  # start and end, in microseconds


def profile(step: Callable[[], Any], steps: int, module: nn.Module) -> dict[str, Any]:
    """Profile consecutive steps with torch's profiler, after one that is not counted, and return `summary` of them.

    Args:
        step: takes a step.
        steps: number of steps that are counted.
        module: the model; its forward pass is marked in the trace.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        with _marked(module), torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
            step()
            for _ in range(steps):
                with torch.profiler.record_function(STEP):
                    step()
            with torch.profiler.record_function(LAST):
                step()
            get_accelerator().synchronize()
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return summary(events)


@contextlib.contextmanager
def _marked(module: nn.Module) -> Iterator[None]:
    """Mark the forward passes of a module in the trace."""
    open_marks: list[Any] = []

    def begin(*_: Any) -> None:
        open_marks.append(torch.profiler.record_function(FORWARD))
        open_marks[-1].__enter__()

    def end(*_: Any) -> None:
        if open_marks:
            open_marks.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def summary(events: Iterable[Event]) -> dict[str, Any]:
    """Sum up the events of a Chrome trace between the first step and the step after the last one, per step.

    Returns:
        Milliseconds and counts, each the mean of a step. `wall_ms`: of the host. `kernel_ms`, `h2d_ms`, `d2h_ms`:
        some kernel, some copy in this direction runs; `device_ms`: anything runs on the device; `collective_ms`: a
        kernel of NCCL, and `collective_beside_copies_ms` such a kernel and a copy at once. `stream_ms`: the same for
        each stream. `kernels`, `copies`: their number. `waits`: the host waits for the device; `waits_in_forward`
        those inside the model's forward pass; `wait_ms`: how long; `waits_by`: their number by the operation that
        waits. `allocations`: calls that allocate or free device or page-locked memory. `operations`: operations of
        PyTorch. `slowest`: milliseconds of the kernels that take most, by name.
    """
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    marks = [event for event in complete if event.get("cat") == "user_annotation"]
    steps = [_span(event) for event in marks if event["name"] == STEP]
    start, end = min(s for s, _ in steps), min(_span(e)[0] for e in marks if e["name"] == LAST)
    forwards = [_span(event) for event in marks if event["name"] == FORWARD]
    inside = [event for event in complete if start <= event["ts"] < end]
    device = [e for e in complete if e.get("cat") in ON_DEVICE and _span(e)[1] > start and e["ts"] < end]
    kernels = [e for e in device if e["cat"] == "kernel"]
    waits = [e for e in inside if e["name"] in WAITS]
    operations = [e for e in inside if e.get("cat") == "cpu_op"]
    count = len(steps)

    def busy(chosen: Iterable[Event]) -> float:
        return round(_covered(((max(s, start), min(t, end)) for s, t in map(_span, chosen))) / 1000 / count, 3)

    by_name: Counter[str] = Counter()
    for event in kernels:
        by_name[event["name"][:90]] += event["dur"]
    streams = sorted({str(event.get("args", {}).get("stream")) for event in device})
    copies = {way: [e for e in device if way in e["name"]] for way in ("HtoD", "DtoH")}
    both = [*copies["HtoD"], *copies["DtoH"]]
    collectives = [e for e in kernels if "nccl" in e["name"].lower()]
    return {
        "steps": count,
        "wall_ms": round((end - start) / 1000 / count, 3),
        "kernel_ms": busy(kernels),
        "h2d_ms": busy(copies["HtoD"]),
        "d2h_ms": busy(copies["DtoH"]),
        "device_ms": busy(device),
        "collective_ms": busy(collectives),
        "collective_beside_copies_ms": round(busy(collectives) + busy(both) - busy([*collectives, *both]), 3),
        "stream_ms": {
            stream: busy(e for e in device if str(e.get("args", {}).get("stream")) == stream) for stream in streams
        },
        "kernels": len(kernels) / count,
        "copies": {way: len(found) / count for way, found in copies.items()},
        "copied_mib": {
            way: round(sum(e.get("args", {}).get("bytes", 0) for e in found) / 2**20 / count, 1)
            for way, found in copies.items()
        },
        "pageable_copies": sum("Pageable" in e["name"] for e in device) / count,
        "waits": len(waits) / count,
        "waits_in_forward": sum(any(s <= e["ts"] < t for s, t in forwards) for e in waits) / count,
        "wait_ms": round(sum(e["dur"] for e in waits) / 1000 / count, 3),
        "waits_by": {
            name: number / count for name, number in Counter(_caller(e, operations) for e in waits).most_common(12)
        },
        "allocations": sum(e["name"] in ALLOCATIONS for e in inside) / count,
        "operations": len(operations) / count,
        "slowest": {name: round(us / 1000 / count, 3) for name, us in by_name.most_common(12)},
    }


def _span(event: Event) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _caller(wait: Event, operations: Iterable[Event]) -> str:
    """Name the wait, with the outermost operation of PyTorch around it."""
    around = [
        operation
        for operation in operations
        if operation.get("tid") == wait.get("tid") and _span(operation)[0] <= wait["ts"] < _span(operation)[1]
    ]
    outermost = max(around, key=lambda operation: operation["dur"])["name"] if around else "no operation"
    return f"{wait['name']} in {outermost}"
