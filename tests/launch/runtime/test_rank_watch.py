"""A rank that is dead, stopped or silent is named by another one, which exits."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hift_ds.launch.exit_codes import RANK_LOST
from hift_ds.launch.runtime import ranks
from hift_ds.launch.runtime.ranks import RankWatch

OTHER = """
import os, socket, sys, time
print(f"start: rank 1 of 2, pid {os.getpid()} on {socket.gethostname()}\\nx step 7", file=open(sys.argv[1], "w"))
print("ready", flush=True)
time.sleep(100)
"""
WATCH = """
import sys, time
from pathlib import Path
from hift_ds.launch.runtime.ranks import RankWatch
with RankWatch() as watch:
    watch.start(Path(sys.argv[1]), rank=0, world=2, limit=1.0, keep=False)
    watch.progress(8)
    time.sleep(100)
"""


@pytest.mark.parametrize("end", ["stopped", "dead"])
def test_a_lost_rank_is_named(end: str, tmp_path: Path) -> None:
    """Both in processes of their own: the one is really stopped or killed, the other really exits."""
    log = tmp_path / "rank1.log"
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(log)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        other.send_signal(signal.SIGSTOP if end == "stopped" else signal.SIGKILL)
        if end == "stopped":
            deadline = time.monotonic() + 30
            while psutil.Process(other.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            other.wait()
        command = [sys.executable, "-c", WATCH, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=os.environ)
    finally:
        other.kill()
        other.wait()
    assert done.returncode == RANK_LOST, done.stderr
    assert f"error: rank 1 (pid {other.pid} on " in done.stderr and f") is {end}; last heartbeat" in done.stderr
    assert f"after step 7: {log}" in done.stderr and "training.rank_timeout (1 s)" in done.stderr
    own = (tmp_path / "rank0.log").read_text()
    assert f"is {end}" in own and "gave up after 1 s" in own


@pytest.mark.parametrize(
    ("line", "lost", "alike"),
    [
        ("fails: cell 1 at here", False, True),
        ("fails: cell 2 at here", False, False),
        ("step 3", False, False),
        ("step 3", True, False),
    ],
)
def test_whether_all_ranks_fail_alike(
    line: str, lost: bool, alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then can they go on together; one that fails alone leaves the others in a collective."""
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    other = subprocess.Popen(["sleep", "100"])
    start = f"x start: rank 1 of 2, pid {other.pid} on {socket.gethostname()}\nx {line}\n"
    (tmp_path / "rank1.log").write_text(start)
    try:
        if lost:
            other.kill()
            other.wait()
        with RankWatch() as watch:
            watch.start(tmp_path, rank=0, world=2, limit=60.0, keep=False)
            assert watch.fails_everywhere("cell 1 at here", 0.3, RuntimeError("out of memory")) is alike
            assert watch.any_lost() is lost
            watch.stop()
    finally:
        other.kill()
        other.wait()
    own = (tmp_path / "rank0.log").read_text()
    assert "RuntimeError: out of memory" in own and "fails: cell 1 at here" in own
