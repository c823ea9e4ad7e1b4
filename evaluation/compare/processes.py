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


class Processes:
    """Runs up to `count` jobs at a time, each in a process with a world of one rank.

    Args:
        say: prints a note of a process.
    """

    def __init__(self, count: int, comparison: Comparison, data: Sets, say: Callable[[str], None]) -> None:
        self._count, self._comparison, self._data, self._say = count, comparison, data, say
        self._context = multiprocessing.get_context("spawn")  # a device cannot be used after a fork
        self._processes: dict[int, _Process] = {}

    @property
    def free(self) -> int:
        """How many more jobs can start."""
        return self._count - sum(one.name is not None for one in self._processes.values())

    def start(self, name: str, job: Job) -> None:
        """Give the job to an idle process; all processes start before the first job.

        Raises:
            UserError: a process cannot start.
        """
        while True:
            self._start_missing()
            one = next(one for one in self._processes.values() if one.name is None)
            try:
                one.connection.send(job)
            except OSError:  # it has been killed while it was idle
                self._remove(one)
                continue
            one.name = name
            return

    def finished(self) -> Iterator[tuple[str, dict[str, Any] | Died]]:
        """Wait until a job ends; yield the names and records of the jobs that have ended."""
        ended = 0
        while not ended:
            by_connection = {one.connection: one for one in self._processes.values() if one.name is not None}
            for connection in wait(list(by_connection)):
                one = by_connection[connection]  # type: ignore[index]
                assert one.name is not None
                value = self._receive(one)
                if value is None:
                    continue
                # A process ends after a failure, because its device may be unusable.
                if isinstance(value, Died) or value["status"] == "failed":
                    self._remove(one)
                name, one.name = one.name, None
                ended += 1
                yield name, value

    def _start_missing(self) -> None:
        """Start the processes that are missing, at the same time, and wait until they are ready."""
        new: list[_Process] = []
        if not self._processes:
            self._say(f"starting {self._count} processes, each of which loads the model")
        for number in set(range(self._count)) - set(self._processes):
            ours, theirs = self._context.Pipe()
            arguments = (theirs, number, self._count, self._comparison)
            process = self._context.Process(target=_serve, args=arguments, name=f"comparison {number}", daemon=True)
            process.start()
            theirs.close()
            self._processes[number] = _Process(process, ours)
            new.append(self._processes[number])
        for one in new:
            # Not among the arguments: `Process.start` would wait until the process has imported all and read so much.
            with contextlib.suppress(OSError):  # it has ended
                one.connection.send(self._data)
            while (value := self._receive(one)) is None:
                pass
            if isinstance(value, Died):
                raise UserError(
                    f"--jobs {self._count}: a process ended ({value}) before its first training; its messages are "
                    "above. If memory is short, lower --jobs"
                )

    def _receive(self, one: _Process) -> dict[str, Any] | Died | None:
        """Return the next message of a process; print a note, and return None."""
        try:
            kind, value = one.connection.recv()
        except (EOFError, OSError):
            one.process.join()
            return Died(f"exit code {one.process.exitcode}")
        if kind == "note":
            self._say(value)
            return None
        return value

    def _remove(self, one: _Process) -> None:
        one.connection.close()  # it ends
        one.process.join(GRACE)
        one.process.kill()
        one.process.join()
        self._processes = {number: other for number, other in self._processes.items() if other is not one}

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
    sets = data[job.entry.task.name][job.seed]
    began = time.monotonic()
    try:
        if isinstance(job, Timing):
            return cells.time_steps(job.row, job.entry.task, sets)
        outcome = cells.run(job, sets)
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
        return cells.not_run(job, status, reason, ran_out_of_memory(error))


def _serve(connection: Connection, number: int, count: int, comparison: Comparison) -> None:
    """Run the jobs that arrive after the data, until one fails or there are no more; the process ends here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    without_shared_locks()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    world_of_one()
    on_cpu = get_accelerator().device_name() == "cpu"
    if not on_cpu:
        os.environ["LOCAL_RANK"] = str(number % get_accelerator().device_count())
    logs.quieten(comparison.logging, 0)
    extensions.prepare(1)  # silent: the first process has said it
    join(comparison.rank_timeout)
    threads = torch.get_num_threads()
    with RankWatch() as watch, contextlib.ExitStack() as stack:
        watch.start(comparison.folder / outputs.LOGS / f"process{number}", 0, 1, comparison.rank_timeout, keep=True)
        stack.enter_context(deterministic(comparison.deterministic))
        cells = Cells(comparison, machine(), watch.progress, say=lambda text: connection.send(("note", text)))
        sets = connection.recv()
        connection.send(("ready", {}))
        record: dict[str, Any] = {"status": "ok"}
        while record["status"] != "failed":
            try:
                job = connection.recv()
            except EOFError:
                break
            if on_cpu and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(threads if job.alone else max(1, threads // count))
            record = run_job(cells, sets, job, watch, "job")
            connection.send(("ended", record))
    os._exit(0)  # as `run_process`: threads of gloo now and then abort a process that Python takes down


def without_shared_locks() -> None:
    """Let progress bars use a lock of this process. Their default is a semaphore, which is left when it is killed."""
    tqdm.set_lock(threading.RLock())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
