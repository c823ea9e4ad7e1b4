"""Stopping a run from outside: by SIGTERM, by SIGINT, or when its launcher is gone.

Before the first step the process exits at once with 75; nothing was trained.

In training and in the evaluation after it, each rank finishes the step or the batch of examples. All ranks agree (by
the sum over ranks that a step makes anyway), save the same step and exit with 75 (launch/callbacks/stop_on_signal.py).

In the export the process exits at once with 75 if the last step has a checkpoint. Otherwise it finishes the export,
which is then the only result of the run.

Signals within 5 s of the first count as one, because launchers and schedulers often send several: on Ctrl-C a rank
receives the terminal's SIGINT and the SIGTERM of DeepSpeed's `launch.py`, in any order. A later signal ends the process
at once with 128 plus its number, until the checkpoint is committed. From then on signals are ignored.

DeepSpeed's `launch.py` passes a signal to the ranks one after the other, waits 30 s for each and then kills it. It ends
all ranks as soon as one has exited. On one node the outer `deepspeed` dies of SIGTERM without passing it on, so a rank
checks once a second whether both processes are still there. Signals that arrive before this module is imported, in the
first seconds of a process, have the system's default effect.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hift_ds.launch.exit_codes import STOPPED

SAME = 5.0  # seconds within which signals count as one
LOOK = 1.0  # seconds between two checks of the launcher
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAUNCHER = "deepspeed.launcher.launch"  # the module that starts the ranks of a machine
RUNNERS = ("deepspeed", "deepspeed.pt", "ds")  # DeepSpeed's names of its outer command


class Stopped(Exception):
    """All ranks have agreed to stop. What can be saved is saved; the message names it."""


class Preemption:
    """Requests to stop this process. A context: it catches signals inside it.

    Python runs signal handlers between two bytecodes of the main thread, which may be waiting for another rank in a
    collective. Therefore the interpreter writes each signal's number into a socket, and a thread reads the socket.

    Attributes:
        reasons: what asked for the stop, e.g. "SIGTERM"; empty if nothing did.
        nothing_to_lose: why this process may exit at once; None if it may not.
        leaving: whether everything is saved; signals are then ignored.
    """

    def __init__(self, rank: int) -> None:
        self.reasons: list[str] = []
        self.nothing_to_lose: str | None = "nothing was trained yet"
        self.leaving = False
        self._rank, self._since = rank, 0.0

    def __enter__(self) -> Preemption:
        global _active
        self._launcher_gone = _launcher_watch()
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._earlier_fd = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._earlier = {number: signal.signal(number, _heard) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()
        _active = self
        return self

    def __exit__(self, *exception: Any) -> None:
        global _active
        _active = None
        for number, earlier in self._earlier.items():
            # The launcher ends all ranks when one has exited; these are exiting with their own code.
            signal.signal(number, signal.SIG_IGN if self.leaving else earlier)
        signal.set_wakeup_fd(self._earlier_fd)
        self._outbox.close()
        self._thread.join()
        self._inbox.close()

    def _watch(self) -> None:
        while True:
            if select.select([self._inbox], [], [], LOOK)[0]:
                numbers = self._inbox.recv(64)
                if not numbers:
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self._ask(signal.Signals(number).name, 128 + number)
            elif not self.reasons and self._launcher_gone():
                self._ask("the end of its launcher", STOPPED)

    def _ask(self, reason: str, code: int) -> None:
        if self.leaving:
            return
        if not self.reasons:
            self._since = time.monotonic()
            self.reasons.append(reason)
            if self.nothing_to_lose is not None:
                self._say(f"stopped by {reason}: {self.nothing_to_lose}")
                os._exit(STOPPED)
            self._say(f"{reason}: stopping as soon as the current work is finished")
        elif time.monotonic() - self._since > SAME:
            self._say(f"{reason} again: exiting at once, without saving", everyone=True)
            os._exit(code)
        elif reason not in self.reasons:
            self.reasons.append(reason)

    def _say(self, text: str, everyone: bool = False) -> None:
        if self._rank == 0 or everyone:
            try:
                print(text, file=sys.stderr, flush=True)
            except OSError:
                pass  # the reader is gone, which may be why the run stops


_active: Preemption | None = None


def _heard(number: int, frame: Any) -> None:
    """Keep the signal from ending the process; the thread handles it."""


def _forget() -> None:
    """Restore the handlers in a forked child, whose signals must not go into the socket it shares with its parent."""
    if _active is not None:
        signal.set_wakeup_fd(-1)
        for number, earlier in _active._earlier.items():
            signal.signal(number, earlier)


os.register_at_fork(after_in_child=_forget)


def has_limit() -> bool:
    """Return whether DeepSpeed's `launch.py` started this process, which kills it some time after a signal."""
    try:
        return _LAUNCHER in psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False


def _launcher_watch() -> Callable[[], bool]:
    """Return a function that tells whether the `launch.py` or `deepspeed` that started this process is gone."""
    try:
        parent = psutil.Process(os.getppid())
        if _LAUNCHER not in parent.cmdline():
            return lambda: False
        runner = parent.parent()
        words = runner.cmdline()[:3] if runner is not None else []
    except psutil.Error:
        return lambda: False
    # On several nodes the grandparent is a shell. It is not watched: launch.py may be meant to outlive it.
    watched = any(Path(word).name in RUNNERS or word == "deepspeed.launcher.runner" for word in words)
    runner_pid = runner.pid if runner is not None and watched else None

    def gone() -> bool:
        if os.getppid() != parent.pid:
            return True
        try:
            return runner_pid is not None and parent.ppid() != runner_pid
        except psutil.Error:
            return True

    return gone
