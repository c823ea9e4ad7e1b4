"""Signals that ask a run to stop, without a run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from hift_ds.launch.exit_codes import STOPPED
from hift_ds.launch.runtime.preemption import Preemption


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_signals_within_five_seconds_count_as_one() -> None:
    with Preemption(1) as stop:
        stop.nothing_to_lose = None
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.reasons == ["SIGTERM"])
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: stop.reasons == ["SIGTERM", "SIGINT"])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_to_a_forked_child_is_the_childs() -> None:
    """Pools of processes end their workers with SIGTERM."""
    ready, write = os.pipe()
    with Preemption(1) as stop:
        stop.nothing_to_lose = None
        child = os.fork()
        if child == 0:
            os.write(write, b"x")
            time.sleep(60)
            os._exit(0)
        assert os.read(ready, 1) == b"x"
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)  # one of our own comes after whatever the child's could have left
        until(lambda: stop.reasons)
        assert stop.reasons == ["SIGINT"]
    os.close(ready)
    os.close(write)


EARLY = """
import os, signal, sys, time
from hift_ds.launch.runtime import preemption
with preemption.Preemption(0) as stop:
    if sys.argv[1] == "again":
        stop.nothing_to_lose = None
        preemption.SAME = -1.0
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.reasons:
            time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def exits(when: str) -> tuple[int, str]:
    """Exit code and messages of a process that a signal ends at once."""
    done = subprocess.run([sys.executable, "-c", EARLY, when], capture_output=True, text=True, timeout=50)
    return done.returncode, done.stderr


def test_before_the_first_step_a_signal_ends_the_process_at_once() -> None:
    code, said = exits("early")
    assert code == STOPPED and "stopped by SIGTERM: nothing was trained yet" in said and "Traceback" not in said


def test_a_second_signal_ends_the_process_without_saving() -> None:
    code, said = exits("again")
    assert code == 128 + signal.SIGTERM and "SIGTERM again: exiting at once, without saving" in said
