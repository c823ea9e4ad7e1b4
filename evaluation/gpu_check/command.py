"""Check one device: weights, planned and measured memory, where a step's time goes, and HiFT beside other methods.

    python -m evaluation.gpu_check --output gpu-check.json
    python -m evaluation.gpu_check --only weights,memory
    python -m evaluation.gpu_check --shapes smollm2-135m,llama-3.2-1b

It runs with what is installed, and makes no environment. docs/offline.md says how it comes to a machine without a
network. Each task has a process and a time limit of its own; a task that fails or takes too long becomes a row of the
table, and the others go on. On a CPU, the same code runs on a tiny model, where only the weights say something. What
needs two GPUs is skipped on one, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from hift_ds.evaluation.cost.machine import machine
from hift_ds.evaluation.cost.step_time import comma_separated, markdown
from hift_ds.evaluation.cost.timed_methods import SHAPES
from hift_ds.evaluation.gpu_check.promises import GIB, ON_HOST, promises
from hift_ds.evaluation.gpu_check.task import PARTS, Task, arguments
from hift_ds.evaluation.gpu_check.training import Workload

SHORT, LONG = 512, 8192  # tokens in a sequence
COMPILE_SECONDS = 240.0
TWO = "two GPUs"
STREAMED = f"hift large, {ON_HOST}"
PREFETCHED = {"prefetch": 3 * GIB, "defer": True}  # slots for the state of LLaMA-7B's largest block


def tasks(small: str, large: str, on_device: bool) -> list[Task]:
    """Return all tasks: first those that need no kernel of DeepSpeed, which is compiled meanwhile, then the decisive.

    Args:
        small, large: names of model shapes.
        on_device: the accelerator is not the CPU, where lengths and steps are small.
    """
    short, long = (SHORT, LONG) if on_device else (16, 32)

    def method(name: str, shape: str, steps: int) -> Workload:
        return Workload(name, shape, lengths=(short,), steps=steps if on_device else 2)

    slots = {"defer": True}
    prefetched = PREFETCHED if on_device else {"prefetch": 2**20, "defer": True}
    profiled = 4 if on_device else 1
    both = ("memory", "step", "methods")
    return [
        Task("weights", ("weights",), 120, False, offload={"prefetch": 2**19}),
        Task("lomo large", ("methods",), 40, False, method("lomo", large, 5)),
        Task("hift large, prefetch", both, 170, True, Workload(
            "hift", large, lengths=(short, long), offload=prefetched, profiled=profiled)),
        Task(TWO, ("ranks",), 150 if on_device else 400, True, Workload(
            "hift", small, lengths=(short,), profiled=2), ranks=2),
        Task("badam large", ("methods",), 60, False, method("badam", large, 0)),
        Task("lora large", ("methods",), 45, True, method("lora", large, 20)),
        Task("hift large, two slots", both[:2], 110, True, Workload(
            "hift", large, lengths=(short,), offload=slots, profiled=profiled)),
        Task(STREAMED, both[:2], 120, True, Workload(
            "hift", large, lengths=(short, long), offload={"weights": "cpu"}, profiled=profiled)),
        Task("hift large, fp32 masters", ("step",), 60, True, Workload(
            "hift", large, lengths=(short,), offload={**slots, "master": "fp32"})),
        Task("hift small", ("memory", "methods"), 60, True, Workload("hift", small, lengths=(short,), offload=slots)),
        Task("full small", ("methods",), 45, True, method("full", small, 10)),
    ]  # fmt: skip


def check(chosen: Sequence[Task], limit: float, save: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Run tasks one after the other, each in a process of its own, and return their results by name.

    The next task's process imports its modules while a task runs.

    Args:
        limit: seconds for all tasks together.
        save: is called with all results so far after each task.
    """
    start = time.monotonic()
    results: dict[str, Any] = {task.name: {"skipped": why} for task in chosen if (why := task.skipped())}
    chosen = [task for task in chosen if task.name not in results]
    processes: list[subprocess.Popen] = []
    compiler = _compile()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if compiler is not None:
            stack.callback(_stop, compiler)
        files = [Path(folder, f"{number}.json") for number in range(len(chosen))]
        for number, (task, file) in enumerate(zip(chosen, files, strict=True)):
            if compiler is not None and task.fused:
                _wait(compiler, max(0.0, min(COMPILE_SECONDS, limit + start - time.monotonic())))
            begun = time.monotonic()
            seconds = min(task.seconds, limit + start - begun)
            print(f"== {task.name} (limit {seconds:.0f} s)", flush=True)
            for index in range(len(processes), min(number + 2, len(chosen))):
                processes.append(_start(chosen[index], files[index]))
                stack.callback(_stop, processes[-1])
            reason = _finish(processes[number], seconds)
            result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            results[task.name] = {"task_seconds": time.monotonic() - begun, **result}
            if reason:
                results[task.name].setdefault("reason", reason)
            print(f"== {task.name}: {time.monotonic() - begun:.1f} s {reason or ''}", flush=True)
            save(results)
    return results


def _compile() -> subprocess.Popen | None:
    """Start to compile DeepSpeed's fused Adam."""
    if get_accelerator().device_name() == "cpu":
        return None
    command = [sys.executable, "-u", "-m", "hift_ds.launch.runtime.kernels", "FusedAdamBuilder"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _start(task: Task, file: Path) -> subprocess.Popen:
    return subprocess.Popen(arguments(task, file), stdin=subprocess.PIPE, text=True, start_new_session=True)


def _finish(process: subprocess.Popen, seconds: float) -> str | None:
    """Let a waiting process run its task; return why it did not end well, or None."""
    if seconds <= 0:
        _stop(process)
        return "no time left"
    try:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended; its code says why
    if not _wait(process, seconds):
        return f"stopped after {seconds:.0f} s, its time limit"
    return f"the process exited with {process.returncode}" if process.returncode else None


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a process, and kill it if it takes longer; return whether it ended by itself."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        _stop(process)
        return False
    return True


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each task and length."""
    head = ["task", "tokens", "s a step", "middle block", "tokens/s", "first", "peak GiB", "planned"]
    head += ["set-up s", "host GiB", "counted", "task s", ""]
    rows = []
    for name, result in results.items():
        host, lengths = result.get("host", {}), [key for key in result if key.isdigit()]
        for length in lengths or ["-"]:
            found = result.get(length, {})
            if "every_100" in found:
                found = {**found, "middle": found["steady"]}
            row = [_number(found, "seconds", 4), _number(found, "middle", 4), _number(found, "tokens_per_second", 0)]
            row += [
                _number(found, "first_seconds", 4),
                _number(found, "peak", 2, GIB),
                _number(found, "planned", 2, GIB),
            ]
            row += [
                _number(result, "setup_seconds", 1),
                _number(host, "grown", 2, GIB),
                _number(host, "counted", 2, GIB),
            ]
            rows.append(
                [
                    name,
                    length,
                    *row,
                    _number(result, "task_seconds", 0),
                    " ".join(str(result.get("reason", result.get("skipped", ""))).split())[:120],
                ]
            )
    return markdown(head, rows)


def trace_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of where the time of a step goes."""
    keys = ["wall_ms", "kernel_ms", "h2d_ms", "d2h_ms", "device_ms", "kernels"]
    keys += ["waits", "waits_in_forward", "wait_ms", "allocations", "operations"]
    rows = [
        [name, length, *(_number(result[length]["trace"], key, 1) for key in keys)]
        for name, result in results.items()
        for length in filter(str.isdigit, result)
        if "trace" in result[length]
    ]
    return markdown(["task", "tokens", *keys], rows) if rows else ""


def _number(values: Mapping[str, Any], key: str, digits: int, unit: float = 1) -> str:
    return "-" if values.get(key) is None else f"{values[key] / unit:.{digits}f}"


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.gpu_check", description=(__doc__ or "").splitlines()[0])
    on_device = get_accelerator().device_name() != "cpu"
    default = ["llama-3.2-1b", "llama-7b"] if on_device else ["tiny", "tiny"]
    add = parser.add_argument
    parts = "; ".join(f"{name}: {text}" for name, text in PARTS.items())
    add("--only", type=comma_separated(list(PARTS)), default=list(PARTS), metavar="PARTS",
        help=f"some of {','.join(PARTS)} (default: all). {parts}")  # fmt: skip
    add("--shapes", type=comma_separated(list(SHAPES)), default=default,
        help=f"a small and a large model, separated by a comma (default: {','.join(default)})")  # fmt: skip
    add("--output", type=Path, default=Path("gpu-check.json"), help="the file for all numbers (default: %(default)s)")
    add("--seconds", type=float, default=420.0, help="time limit of all tasks together (default: %(default)s)")
    options = parser.parse_args(given)
    if len(options.shapes) != 2:
        parser.error(f"--shapes {','.join(options.shapes)}: expected two, a small and a large model")
    if not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}; create it first")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a task failed or a promise does not hold."""
    options = parse(given)
    on_device = get_accelerator().device_name() != "cpu"
    chosen = [t for t in tasks(options.shapes[0], options.shapes[1], on_device) if set(t.parts) & set(options.only)]
    head = {"machine": machine(), "date": str(datetime.date.today()), "shapes": options.shapes}
    head["workloads"] = {task.name: asdict(task) for task in chosen}

    def save(results: Mapping[str, Any]) -> None:
        held = [asdict(promise) for promise in promises(results, on_device)]
        text = json.dumps({**head, "results": results, "promises": held}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")

    print(f"gpu-check on {head['machine']}", flush=True)
    results = check(chosen, options.seconds, save)
    save(results)
    found = promises(results, on_device)
    verdicts = {True: "yes", False: "NO", None: "-"}
    print("\n" + table(results))
    print("\n" + trace_table(results))
    print("\n" + markdown(["promise", "measured", "holds"], [[p.name, p.measured, verdicts[p.holds]] for p in found]))
    print(f"\nAll numbers: {options.output}", flush=True)
    failed = any("reason" in result for result in results.values())
    return int(failed or any(promise.holds is False for promise in found))
