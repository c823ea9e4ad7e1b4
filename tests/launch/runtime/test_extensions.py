"""Lock files of torch's extensions: those that killed processes left are deleted, those of living ones are not."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.file_baton import FileBaton

from hift_ds.launch.runtime import extensions

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path


@pytest.fixture
def holder(folder: Path) -> Callable[[Path], "subprocess.Popen[str]"]:
    """A process that holds a lock as torch does."""
    started = []

    def hold(lock: Path) -> "subprocess.Popen[str]":
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None and started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold  # type: ignore[misc]
    for process in started:
        process.kill()
        process.wait()


def test_a_killed_processs_lock_is_deleted_and_a_living_ones_is_not(
    folder: Path, holder: Callable[[Path], "subprocess.Popen[str]"], capsys: pytest.CaptureFixture[str]
) -> None:
    lock = folder / "cpu_adam" / "lock"
    process = holder(lock)
    extensions.prepare(0)
    assert lock.exists() and capsys.readouterr().err == ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    extensions.prepare(0)
    assert not lock.exists() and f"deleted {lock}" in capsys.readouterr().err
    extensions.prepare(0)
    assert capsys.readouterr().err == ""


def test_that_nothing_is_compiled_yet_is_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extensions.prepare(1)
    assert capsys.readouterr().out == ""
    extensions.prepare(0)
    assert capsys.readouterr().out.startswith("note: DeepSpeed compiles its kernels")
    (folder / "cpu_adam" / "cpu_adam.so").touch()
    extensions.prepare(0)
    assert capsys.readouterr().out == ""


def test_the_default_folder_has_a_level_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(extensions, "get_default_build_root", lambda: str(tmp_path))
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    extensions.prepare(0)
    assert not lock.exists() and str(lock) in capsys.readouterr().err


def test_a_virtual_environment_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # for its end: what `prepare` sets is to be undone
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    extensions.prepare(0)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "elsewhere")
    extensions.prepare(0)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "elsewhere"


@pytest.mark.parametrize("what", ["file system", "processes"])
def test_an_unknown_holders_lock_stays_until_no_build_takes_so_long(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that other machines share, or a system that does not list processes."""
    if what == "file system":
        monkeypatch.setattr(extensions, "LOCAL_FILE_SYSTEMS", frozenset())
    else:
        monkeypatch.setattr(extensions, "PROCESSES", folder / "none")
    lock = folder / "cpu_adam" / "lock"
    lock.touch()
    extensions.prepare(0)
    assert lock.exists()
    message = capsys.readouterr().err
    assert str(lock) in message and "delete the file" in message
    long_ago = time.time() - extensions.LONGEST_BUILD - 1
    os.utime(lock, (long_ago, long_ago))
    extensions.prepare(0)
    assert not lock.exists()


def test_two_that_start_at_once_leave_each_others_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has found a lock stale; before it deletes it, the other does the same and makes its own: that one stays."""
    lock = folder / "cpu_adam" / "lock"
    lock.touch()
    baton = FileBaton(str(lock))

    def start_and_build() -> None:
        extensions.prepare(0)
        assert baton.try_acquire()

    other = threading.Thread(target=start_and_build)

    def decide(*_: Any) -> bool:
        if not other.ident:
            other.start()
            other.join(1.0)  # time enough for all that it wants to do
        return True

    monkeypatch.setattr(extensions, "_is_known", decide)
    extensions.prepare(0)
    other.join()
    assert lock.exists()
    baton.release()
