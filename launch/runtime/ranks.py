"""The ranks of a run: joining them, one log per rank, and detection of ranks that are dead, stopped or stuck.

OUT/logs/rank{r}.log holds the rank's pid and host, a line per step, the traceback of an unexpected error, and the
stacks of its threads after a crash or a hang. A thread updates the file's modification time as a heartbeat.

A rank that makes no progress for `training.rank_timeout` seconds, or whose collective fails, reads the logs and process
states of the other ranks, reports which rank is the cause, and exits with 76. Timeouts of collectives are not enough:
those of DeepSpeed's process groups cannot be set, and NCCL ends the process before it can report anything.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import RawIOBase
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import psutil
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import DistNetworkError

from hift_ds import collectives
from hift_ds.launch.config.credentials import redacted
from hift_ds.launch.errors import UserError, shown
from hift_ds.launch.exit_codes import RANK_LOST

MEETING = 5.0  # seconds between two meetings of ranks that wait for long work
PATIENCE = 60.0  # seconds that a failed rank waits for the same failure on the others
MOST = 16  # ranks or differences listed in a message
_T = TypeVar("_T")


@dataclass
class State:
    """The state of another rank, from its log and its process."""

    log: Path
    name: str  # "rank 1 (pid 123 on host)"
    host: str | None
    step: str | None  # its last finished step
    where: str | None  # what it was doing when it timed out
    age: float  # seconds since its last heartbeat
    problem: str | None = None  # None if it looks healthy

    def __str__(self) -> str:
        since = "before its first step" if self.step is None else f"after step {self.step}"
        if self.problem is not None:
            return f"{self.name} {self.problem}; last heartbeat {self.age:.0f} s ago, {since}: {self.log}"
        return f"{self.name} is {since}{self.where and f', {self.where}' or ''}: {self.log}"


def join(rank_timeout: float) -> None:
    """Choose this rank's device, and join the process group of all ranks.

    Collectives time out a minute after `RankWatch`, which reports more.

    Raises:
        UserError: the port of the launcher is in use.
    """
    # NCCL communicates from the current device, which is the first one until it is set: all ranks would share it.
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            verbose=False,
            timeout=timedelta(seconds=rank_timeout + 60),
        )
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = int(os.environ["MASTER_PORT"])
        raise UserError(
            f"port {port} of this machine is in use, perhaps by another run; choose another port for this run: "
            f"deepspeed --master_port {port + 1} ..."
        ) from None


def decide(question: Callable[[], _T]) -> _T:
    """Answer a question about files on rank 0, and return its answer on every rank.

    Ranks on other machines may see other files, or see them later; if they answered differently, they would go on with
    different collectives and wait for each other.

    Raises:
        UserError: on every rank, if rank 0 raises one.
    """
    answers, problems = collectives.on_every_rank(lambda: question() if collectives.rank() == 0 else None, UserError)
    if problems:
        raise UserError(problems[0])
    return answers[0]  # type: ignore[return-value]


def together(action: Callable[[], _T]) -> _T:
    """Run an action without collectives on every rank, and return this rank's result.

    Raises:
        UserError: on every rank, if any rank raises one. The message names the ranks, unless it is the same on all.
    """
    own: list[_T] = []
    _, problems = collectives.on_every_rank(lambda: own.append(action()), UserError)
    if len(problems) == collectives.world_size() and len(set(problems.values())) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n".join(f"rank {i}: {text}" for i, text in problems.items()))
    return own[0]


def first_on_node(work: Iterable[_T | None]) -> _T:
    """Do long work without collectives on the first rank of each machine, and return its last result on all its ranks.

    The ranks meet every few seconds. So no collective times out, however long the work takes.

    Args:
        work: yields None now and then, and the result at the end.

    Raises:
        UserError: on every rank, if the work raises one anywhere. The message names the ranks, unless it is the same on
            all that work.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    steps, result, problem = iter(work if local == 0 else ()), None, None
    is_done = False
    while not is_done:
        until = time.monotonic() + MEETING
        try:
            for latest in steps:
                result = latest
                if time.monotonic() > until:
                    break
            else:
                is_done = True
        except UserError as error:
            problem, is_done = str(error), True
        states = collectives.gather((is_done, result, problem, local))
        is_done = all(state[0] for state in states)
        problems = {rank: state[2] for rank, state in enumerate(states) if state[2] is not None}
        if problems:
            working = [state for state in states if state[3] == 0]
            if len(problems) == len(working) and len(set(problems.values())) == 1:
                raise UserError(next(iter(problems.values())))
            raise UserError("\n".join(f"rank {rank}: {text}" for rank, text in problems.items()))
    return states[collectives.rank() - local][1]  # type: ignore[return-value]


def check_same(what: str, value: Mapping[str, Any], remedy: str) -> None:
    """Check that all ranks have the same values.

    Args:
        what: the subject of the message, e.g. "settings".
        value: the values by the names that the message uses.

    Raises:
        UserError: on every rank, naming each difference to rank 0.
    """
    first, *others = collectives.gather(value)
    problems = [
        f"{name}: rank {i} has {shown(other.get(name))}, rank 0 has {shown(first.get(name))}"
        for i, other in enumerate(others, 1)
        for name in {**first, **other}
        if other.get(name) != first.get(name)
    ]
    if problems:
        more = [f"and {len(problems) - MOST} more differences"] * (len(problems) > MOST)
        raise UserError("\n".join([f"the ranks have different {what}. {remedy}", *problems[:MOST], *more]))


def sum_over_ranks(device: torch.device, *values: float) -> list[float]:
    """Return the sum of each value over the ranks, in fp64, by one collective."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


class StepSums:
    """Sums over the ranks that the device adds up while it trains, and that the host reads when they are there.

    Args:
        device: where the loss is.
        count: how many numbers beside the loss are summed.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._given = self._page_locked(count)
        self._found = self._page_locked(count + 2)
        self._event: Any = None

    @staticmethod
    def _page_locked(count: int) -> torch.Tensor:
        return get_accelerator().pin_memory(torch.zeros(count, dtype=torch.float64))

    def start(self, loss: torch.Tensor, values: Sequence[float]) -> None:
        """Start to sum this rank's loss, a scalar on the device, and `values`. The host does not wait.

        Call it once before each :meth:`read`, on all ranks, with `count` values.
        """
        for index, value in enumerate(values):
            self._given[index] = value
        sums = torch.empty(len(self._found), dtype=torch.float64, device=self._device)
        sums[:2] = loss.detach()
        sums[2:].copy_(self._given, non_blocking=True)
        dist.all_reduce(sums[1:])
        self._found.copy_(sums, non_blocking=True)
        event = get_accelerator().Event
        if event is not None:
            self._event = event()
            self._event.record(get_accelerator().current_stream())

    def read(self) -> list[float]:
        """Return this rank's loss, the sum of all losses, and the sum of each value, in fp64.

        The host waits for the device, unless it has waited since :meth:`start` for what came later.
        """
        if self._event is not None:
            self._event.synchronize()
        return self._found.tolist()


class RankWatch:
    """This rank's log and heartbeat, and the watch over the other ranks. A context; call `start` once inside it."""

    def __init__(self) -> None:
        self._file: RawIOBase | None = None
        self._closed = threading.Event()
        # Counts only seconds in which this process ran: the time while it was stopped is not silence of others.
        self._clock = self._heard = 0.0

    def __enter__(self) -> RankWatch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closed.set()
        if self._file is not None:
            self._thread.join()
            (faulthandler.enable if self._faults else faulthandler.disable)()
            self._file.close()
            self._file = None

    def start(
        self,
        folder: Path,
        rank: int,
        world: int,
        limit: float,
        keep: bool,
        remedy: str = "Continue from the newest checkpoint with --resume.",
    ) -> None:
        """Open the log in `folder`, and start watching.

        Args:
            limit: seconds without progress after which this rank times out, if there is more than one rank.
            keep: whether to append to an earlier log.
            remedy: advice that follows the message about a lost rank.
        """
        self.folder, self.rank, self.world, self.limit, self.remedy = folder, rank, world, limit, remedy
        self.beat = min(10.0, limit / 4)  # seconds between two heartbeats
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._log(rank).open("ab" if keep else "wb", buffering=0)
        self._line(f"start: rank {rank} of {world}, pid {os.getpid()} on {socket.gethostname()}")
        self._faults = faulthandler.is_enabled()
        faulthandler.enable(self._file)
        self.progress()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def progress(self, step: int | None = None) -> None:
        """Report progress; after a step, pass the number of steps done."""
        self._heard = self._clock
        if step is not None and self._file is not None:
            self._line(f"step {step}")

    def fails_everywhere(self, what: str, seconds: float, error: BaseException) -> bool:
        """Return whether all ranks fail in `what`, a text that names the place; logs the error.

        If all fail, their collectives still match, and the process can continue with other work. A collective cannot
        decide this, because a healthy rank is waiting in another one.

        Args:
            seconds: time until this rank failed; the others get as long, plus `PATIENCE`.
        """
        if self.world == 1:
            return True
        self.progress()
        self._error(error)
        self._line(f"fails: {what}")
        deadline = time.monotonic() + min(seconds + PATIENCE, self.limit / 2)
        while not all(f" fails: {what}\n" in self._text(rank) for rank in range(self.world)):
            if time.monotonic() > deadline or self._suspects():
                return False
            time.sleep(0.1)
        return True

    def any_fails(self, what: str) -> bool:
        """Return whether a rank has logged a failure in something that begins with `what`."""
        return any(f" fails: {what}" in self._text(rank) for rank in range(self.world))

    def stop(self) -> None:
        """Log that this rank ends because it was asked to, so that the others do not report it as lost."""
        self._line("stopped")

    def any_lost(self) -> bool:
        """Return whether another rank has died without being asked to stop."""
        return self.world > 1 and any(" stopped\n" not in self._text(rank) for rank in self._suspects())

    def blame(self, error: BaseException) -> bool:
        """Log an unexpected error; if another rank is the cause, report that and return True."""
        if self._file is None:
            return False
        self._error(error)
        if self.world == 1:
            return False
        if self._silence() > 0.9 * self.limit:
            self._give_up()
        near = all(state.host in (None, socket.gethostname()) for state in self._states().values())
        deadline = time.monotonic() + (
            2.0 if near else 3 * self.beat + 2.0
        )  # a dying process is still listed for a moment
        while not (found := self._suspects()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not found:
            return False
        self._say(found)
        return True

    def _watch(self) -> None:
        tick, last, touched = min(1.0, self.beat), time.monotonic(), 0.0
        while not self._closed.wait(tick):
            now = time.monotonic()
            self._clock += min(now - last, 5.0)
            last = now
            if now - touched >= self.beat:
                os.utime(self._log(self.rank))
                touched = now
            if self.world > 1 and self._silence() > self.limit:
                self._give_up()

    def _silence(self) -> float:
        return self._clock - self._heard

    def _give_up(self) -> None:
        assert self._file is not None
        os.utime(self._log(self.rank))
        self._line(f"gave up after {self.limit:g} s {_main_thread()}")
        faulthandler.dump_traceback(self._file)
        time.sleep(min(2.0, self.limit))  # the others write the same now
        self._say(self._suspects())
        os._exit(RANK_LOST)

    def _say(self, found: dict[int, State]) -> None:
        """Write to this rank's log; the first rank that is not the cause also prints to the terminal."""
        lines = [str(state) for state in found.values()]
        if not lines:
            lines = [f"no rank has made progress for {self.limit:g} s, and all are alive:"]
            lines += [f"  {state}" for state in self._states().values()]
        lines[MOST:] = [f"... and {len(lines) - MOST} more"] if len(lines) > MOST else []
        lines.append(f"The run cannot continue. {self.remedy}")
        if self._silence() > 0.9 * self.limit:
            setting = f"training.rank_timeout ({self.limit:g} s)"
            lines.append(f"If a step, loading or the export takes longer than {setting}, raise it.")
        text = "\n".join(lines)
        self._line(text)
        if self.rank == min(set(range(self.world)) - set(found)):
            print(f"error: {text}", file=sys.stderr, flush=True)

    def _suspects(self) -> dict[int, State]:
        return {rank: state for rank, state in self._states().items() if state.problem is not None}

    def _states(self) -> dict[int, State]:
        states = {rank: self._state(rank) for rank in range(self.world)}
        states[self.rank].problem = None  # this process runs
        return states

    def _state(self, rank: int) -> State:
        log = self._log(rank)
        try:
            text, age = self._text(rank), time.time() - log.stat().st_mtime
        except OSError:
            return State(log, f"rank {rank}", None, None, None, self._clock, "has not started")
        process = re.search(r"pid (\d+) on (\S+)", text)
        name = f"rank {rank} ({process[0]})" if process else f"rank {rank}"
        steps, gave_up = re.findall(r" step (\d+)$", text, re.MULTILINE), re.search(r"gave up after \S+ s (.*)", text)
        state = State(log, name, process and process[2], steps[-1] if steps else None, gave_up and gave_up[1], age)
        if process and state.host == socket.gethostname():
            state.problem = _process_problem(int(process[1]))
        if state.problem is None and age > 3 * self.beat + 2.0:
            state.problem = "is silent"
        return state

    def _text(self, rank: int) -> str:
        """Return a rank's log since its last start."""
        text = self._log(rank).read_text(encoding="utf-8", errors="replace")
        return text[max(0, text.rfind(" start: rank ")) :]

    def _error(self, error: BaseException) -> None:
        self._line(redacted("".join(traceback.format_exception(error))))

    def _line(self, text: str) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):  # a full disk is reported by the files that must be written
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


def _process_problem(pid: int) -> str | None:
    """Return what is wrong with a process of this machine, or None."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "is dead"
    problems = {psutil.STATUS_ZOMBIE: "is dead", psutil.STATUS_DEAD: "is dead", psutil.STATUS_STOPPED: "is stopped"}
    return problems.get(status)


def _main_thread() -> str:
    """Return what the main thread is doing: its innermost Python function."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
