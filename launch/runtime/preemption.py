"""Stopping a run from outside: by SIGTERM, by SIGINT, or because its launcher is gone.

Before the first step: the process exits at once with 75; nothing was trained.
In training, and in the evaluation after it: the step or the batch of examples is finished, all ranks agree (with the
    sum over ranks that a step makes anyway), save the same step, meet, and exit with 75 (launch/callbacks/stopping.py).
During the export: with a checkpoint of the last step, at once, with 75; without one the export is finished, since it
    is then all that is left of the run.
Signals within 5 s of the first count as one: a launcher and a scheduler often send several (on Ctrl-C a rank hears the
    terminal's SIGINT and the SIGTERM of DeepSpeed's `launch.py`, in any order). A later one ends the process at once
    with 128 plus its number, until the save is committed; from then on they are ignored.

DeepSpeed's `launch.py` hands a signal to the ranks one after the other, gives each 30 s and then kills it, and ends all
as soon as one has exited. On one node the outer `deepspeed` dies of SIGTERM without telling anybody, so a rank looks
once a second whether both are still there. Before this module is imported (the first seconds of a process) a signal has
the effect that the system gives it.
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

STOPPED = 75  # exit code; EX_TEMPFAIL of sysexits.h: try again
SAME = 5.0  # seconds in which signals count as one
LOOK = 1.0  # seconds between two looks for the launcher
SIGNALS = (signal.SIGTERM, signal.SIGINT)
RUNNERS = ("deepspeed", "deepspeed.pt", "ds")  # DeepSpeed's names of its outer command


class Stopped(Exception):
    """All ranks have agreed to stop and have saved what can be saved; the message says what that is."""


class Preemption:
    """Whether this process was asked to stop. A context: signals are caught inside it.

    Python runs signal handlers between two bytecodes of the main thread, which may be waiting for another rank in a
    collective. Here the interpreter writes each signal's number into a socket as it arrives, and a thread reads them.

    Attributes:
        reasons: what asked for the stop, e.g. "SIGTERM"; empty: nothing did.
        nothing_to_lose: why this process may exit at once; None: it may not.
        leaving: what there is to save is saved; signals are ignored from here on.
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
            # The launcher ends the others as soon as it sees one gone; they are on their way out with their own code.
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
            self._say(f"{reason}: stopping as soon as the work in hand is done and saved")
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
                pass  # whoever read it is gone, which may be why the run stops


_active: Preemption | None = None


def _heard(number: int, frame: Any) -> None:
    """A handler, so that the signal does not end the process; the thread does the rest."""


def _forget() -> None:
    """In a forked child: signals to it are its own, and do not go into the socket that it shares with its parent."""
    if _active is not None:
        signal.set_wakeup_fd(-1)
        for number, earlier in _active._earlier.items():
            signal.signal(number, earlier)


os.register_at_fork(after_in_child=_forget)


def _launcher_watch() -> Callable[[], bool]:
    """A function that says whether the `launch.py` or the `deepspeed` that started this process is gone."""
    try:
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" not in parent.cmdline():
            return lambda: False
        runner = parent.parent()
        words = runner.cmdline()[:3] if runner is not None else []
    except psutil.Error:
        return lambda: False
    # On several nodes the grandparent is a shell: not watched, since launch.py may be meant to outlive it.
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
