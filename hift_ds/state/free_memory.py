"""Free host memory of this process: that of the machine, or less where a container has a limit (cgroup)."""

import contextlib
import ctypes
from pathlib import Path

import psutil

# Version 2 of cgroups has one hierarchy, version 1 one for each controller: the folder below the root, the limit, what
# is used, and the part of it that the kernel can take back at once (cached files), as a key of memory.stat.
_VERSIONS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that this process and its children can still allocate before the kernel ends one of them.

    Args:
        root: where the cgroup file systems are mounted.
        membership: the file that names the groups of this process.
    """
    free = psutil.virtual_memory().available
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no cgroups on this system
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in _VERSIONS:
                free = min([free, *_free_in_groups(root, path, *_VERSIONS[controller])])
    return free


def return_freed_memory() -> None:
    """Return what this process has freed to the system. glibc keeps freed tensors of up to 32 MiB for later use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _free_in_groups(root: Path, path: str, folder: str, limit: str, usage: str, cached: str) -> list[int]:
    """Return the free bytes of each group with a limit, from the root to the group of this process.

    A container often sees its own group as the root and the path of the machine; folders that are not there are
    skipped.
    """
    found = []
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts) + 1):
        group = root.joinpath(folder, *parts[:depth])
        try:
            most = int((group / limit).read_text())  # "max": no limit
            used = int((group / usage).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        found.append(max(0, most - used + int(statistics.get(cached, 0))))
    return found
