"""Where the jobs of a comparison run: on the ranks of this process one after another, or in several processes.

The processes share the devices of this machine; each is the only rank of its own world, loads the model once, and runs
one job after another. They end when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from hift_ds.evaluation.compare.cell import Cells, ran_out_of_memory
from hift_ds.evaluation.compare.jobs import Job, Sets, Timing
from hift_ds.evaluation.compare.settings import Comparison
from hift_ds.evaluation.cost.machine import machine
from hift_ds.launch.config import credentials
from hift_ds.launch.errors import NotApplicable, UserError
from hift_ds.launch.runtime import extensions, logs, outputs
from hift_ds.launch.runtime.determinism import deterministic
from hift_ds.launch.runtime.process import world_of_one
from hift_ds.launch.runtime.ranks import RankWatch, join

GRACE = 5.0  # seconds for a process to end before it is killed


class Died(Exception):
    """The process of a job has died without a message."""


class Place(Protocol):
    """Where jobs run."""

    @property
    def free(self) -> int:
        """How many more jobs can start."""

    def start(self, name: str, job: Job) -> None:
        """Start a job under a name that no other job has."""

    def finished(self) -> Iterator[tuple[str, dict[str, Any] | Died]]:
        """Wait until a job ends; yield the names and records of the jobs that have ended."""

    def stop(self) -> None:
        """End the jobs that run."""


class ThisProcess:
    """Runs one job at a time on all ranks of this process."""

    def __init__(self, cells: Cells, data: Sets, watch: RankWatch) -> None:
        self._cells, self._data, self._watch = cells, data, watch
        self._next: tuple[str, Job] | None = None

    @property
    def free(self) -> int:
        """1 if no job waits."""
        return int(self._next is None)

    def start(self, name: str, job: Job) -> None:
        """Keep the job until :meth:`finished`."""
        self._next = name, job

    def finished(self) -> Iterator[tuple[str, dict[str, Any] | Died]]:
        """Run the job, and yield its record."""
        assert self._next is not None
        name, job = self._next
        record = run_job(self._cells, self._data, job, self._watch, name)
        self._next = None
        yield name, record

    def stop(self) -> None:
        """Nothing: the job has been interrupted."""


@dataclass
class _Process:
    process: Any
    connection: Connection
    name: str | None = None  # of its job
    is_ready: bool = False  # whether it has loaded what its first job needs


class Processes:
    """Runs up to `count` jobs at a time, each in a process with a world of one rank.

    Args:
        say: prints a note of a process.
    """

    def __init__(self, count: int, comparison: Comparison, data: Sets, say: Callable[[str], None]) -> None:
        self._count, self._arguments, self._say = count, (comparison, data), say
        self._context = multiprocessing.get_context("spawn")  # a device cannot be used after a fork
        self._processes: dict[int, _Process] = {}

    @property
    def free(self) -> int:
        """How many more jobs can start."""
        return self._count - sum(one.name is not None for one in self._processes.values())

    def start(self, name: str, job: Job) -> None:
        """Give the job to an idle process, or to a new one."""
        for number in [n for n, one in self._processes.items() if one.name is None and not one.process.is_alive()]:
            del self._processes[number]
        idle = [number for number, one in self._processes.items() if one.name is None]
        number = idle[0] if idle else min(set(range(self._count)) - set(self._processes))
        if not idle:
            ours, theirs = self._context.Pipe()
            arguments = (theirs, number, self._count, *self._arguments)
            process = self._context.Process(target=_serve, args=arguments, name=f"comparison {number}", daemon=True)
            process.start()
            theirs.close()
            self._processes[number] = _Process(process, ours)
        self._processes[number].name = name
        self._processes[number].connection.send(job)

    def finished(self) -> Iterator[tuple[str, dict[str, Any] | Died]]:
        """Wait until a job ends; yield the names and records of the jobs that have ended.

        Raises:
            UserError: a process cannot start.
        """
        ended = 0
        while not ended:
            by_connection = {one.connection: number for number, one in self._processes.items() if one.name is not None}
            for connection in wait(list(by_connection)):
                number = by_connection[connection]  # type: ignore[index]
                one = self._processes[number]
                try:
                    kind, value = one.connection.recv()
                except (EOFError, OSError):
                    one.process.join()
                    del self._processes[number]
                    if not one.is_ready:
                        code = one.process.exitcode
                        raise UserError(
                            f"--jobs {self._count}: a process ended with exit code {code} before its first training; "
                            "its messages are above. If memory is short, lower --jobs"
                        ) from None
                    kind, value = "ended", Died(f"exit code {one.process.exitcode}")
                one.is_ready |= kind != "note"
                if kind == "note":
                    self._say(value)
                if kind != "ended":
                    continue
                assert one.name is not None
                name, one.name = one.name, None
                ended += 1
                yield name, value

    def stop(self) -> None:
        """End all processes, also those that run a job."""
        for one in self._processes.values():
            one.process.terminate()
        until = time.monotonic() + GRACE
        for one in self._processes.values():
            one.process.join(max(0.0, until - time.monotonic()))
            if one.process.is_alive():
                one.process.kill()
                one.process.join()
        self._processes.clear()


def run_job(cells: Cells, data: Sets, job: Job, watch: RankWatch, name: str) -> dict[str, Any]:
    """Run a job and return its record, also if it fails.

    Raises:
        Exception: only this rank failed. The others wait in a collective, so the comparison cannot go on.
    """
    task, sets = job.entry.task, data[job.entry.task.name][job.seed]
    began = time.monotonic()
    try:
        if isinstance(job, Timing):
            return cells.time_steps(job.row, task, sets)
        times = job.times if job.beside else None
        outcome = cells.run(job.row, task, sets, job.budget, job.seed, job.rate, job.tune, job.steps, times)
        return outcome.record | {"dev_score": outcome.dev_score, "dev_loss": outcome.dev_loss}
    except Exception as error:
        place = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        place_hash = hashlib.sha256(repr(place).encode()).hexdigest()[:16]
        if not watch.fails_everywhere(f"{name} {place_hash}", time.monotonic() - began, error):
            print("error: only some ranks failed; the same command tries this cell again", file=sys.stderr)
            raise
        if isinstance(error, (NotApplicable, UserError)):
            status, reason = "not_applicable" if isinstance(error, NotApplicable) else "failed", str(error)
        else:
            print(credentials.redacted(traceback.format_exc()), file=sys.stderr, flush=True)
            status = "failed"
            reason = credentials.redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")[:500]
        if isinstance(job, Timing):
            return {"status": status, "reason": reason}
        return cells.not_run(job.row, task, job.budget, job.seed, job.rate, status, reason, ran_out_of_memory(error))


def _serve(connection: Connection, number: int, count: int, comparison: Comparison, data: Sets) -> None:
    """Run the jobs that arrive, until there are no more; the process ends here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    without_shared_locks()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if get_accelerator().device_name() != "cpu":
        os.environ["LOCAL_RANK"] = str(number % get_accelerator().device_count())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    world_of_one()
    logs.quieten(comparison.logging, 0)
    extensions.prepare(1)  # silent: the first process has said it
    join(comparison.rank_timeout)
    with RankWatch() as watch, contextlib.ExitStack() as stack:
        watch.start(comparison.folder / outputs.LOGS / f"process{number}", 0, 1, comparison.rank_timeout, keep=True)
        stack.enter_context(deterministic(comparison.deterministic))
        cells = Cells(comparison, machine(), watch.progress, say=lambda text: connection.send(("note", text)))
        connection.send(("ready", None))
        while True:
            job = connection.recv()
            connection.send(("ended", run_job(cells, data, job, watch, "job")))


def without_shared_locks() -> None:
    """Let progress bars use a lock of this process. Their default is a semaphore, which is left when it is killed."""
    tqdm.set_lock(threading.RLock())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
