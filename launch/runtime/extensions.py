"""torch's C++ extensions, which can delay the start of a run: a first build, or the lock of a killed process.

torch creates the file `lock` in an extension's folder while it builds or loads the extension, and keeps the file open
meanwhile (torch/utils/file_baton.py). If the process is killed, the file stays, and the next build waits for it without
a limit. DeepSpeed's kernels are such extensions.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

from hift_ds.launch.runtime.logs import say, warn

# No other machine can hold a file on these, so the processes of this machine show who does.
LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"})
LONGEST_BUILD = 1800.0  # seconds after which a lock with an unknown holder counts as stale
PROCESSES = Path("/proc")


def prepare(rank: int) -> None:
    """Delete stale locks, with a warning, and warn about locks whose holder is unknown.

    A virtual environment gets its own folder for extensions, `torch_extensions`, unless TORCH_EXTENSIONS_DIR is set.
    If nothing was built yet, print that the first build takes minutes.
    """
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        # Two environments that share a folder would recompile each other's kernels at every start.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if next(root.rglob("*.so"), None) is None:
        say(rank, "note: DeepSpeed compiles its kernels at their first use on a machine, which can take minutes")
    locks = [
        *root.glob("*/lock"),
        *root.glob("*/*/lock"),
    ]  # the default folder has one more level, for Python and device
    if not locks:
        return
    # One process at a time checks and deletes, so that it does not delete a lock that another process has just created.
    with contextlib.suppress(OSError), _alone(root):
        for lock in locks:
            _remove_if_stale(lock)


def _remove_if_stale(lock: Path) -> None:
    try:
        before = lock.stat()
        if _is_held(before):
            return
        age = time.time() - before.st_mtime
        if not _is_known(lock, before) and age < LONGEST_BUILD:
            warn(
                f"{lock} is there, and its holder is unknown. If no other process is building this extension, "
                f"delete the file: until it is gone, everything that needs the extension waits"
            )
            return
        lock.unlink()
    except FileNotFoundError:
        return  # released meanwhile
    except OSError as error:
        warn(f"{lock} was left behind by a killed process and cannot be deleted ({error.strerror}): delete it")
        return
    warn(f"deleted {lock}, left behind by a killed process {age:.0f} s ago: the extension could not have been loaded")


def _is_held(lock: os.stat_result) -> bool:
    """Return whether a process that this one may inspect has the file open."""
    for link in PROCESSES.glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            if os.readlink(link).endswith("/lock") and os.path.samestat(link.stat(), lock):
                return True
    return False


def _is_known(lock: Path, found: os.stat_result) -> bool:
    """Return whether `_is_held` sees every process that could hold the lock: its owner's, on this machine."""
    parts = psutil.disk_partitions(all=True)
    mounts = {Path(part.mountpoint): part.fstype for part in parts}
    place = next((parent for parent in lock.resolve().parents if parent in mounts), None)
    local = place is not None and mounts[place] in LOCAL_FILE_SYSTEMS
    return local and PROCESSES.exists() and os.geteuid() in (0, found.st_uid)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # releases the lock
