"""Free host memory under the limits of containers, in folders as the kernel writes them."""

import ctypes
from pathlib import Path
from unittest import mock

import psutil
import pytest

from hift_ds.evaluation.cost.process_memory import anonymous
from hift_ds.state.free_memory import available_memory, return_freed_memory

GIB = 2**30
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, limit: str, used: int, cached: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nslab 7\n")


def available(tmp_path: Path, membership: str, machine: int = 100 * GIB) -> int:
    (tmp_path / "membership").write_text(membership)
    with mock.patch.object(psutil, "virtual_memory", lambda: mock.Mock(available=machine)):
        return available_memory(tmp_path / "cgroup", tmp_path / "membership")


def test_no_limit(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", "max", 3 * GIB, GIB, V2)
    assert available(tmp_path, "0::/\n") == 100 * GIB
    assert available_memory(tmp_path / "no", tmp_path / "none") == pytest.approx(
        psutil.virtual_memory().available, rel=0.5
    )


def test_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """Of 24 GiB, 10 are used, 4 of them by cached files."""
    group(tmp_path / "cgroup", str(24 * GIB), 10 * GIB, 4 * GIB, V2)
    assert available(tmp_path, "0::/\n") == 18 * GIB
    assert available(tmp_path, "0::/../../docker/abc\n") == 18 * GIB  # the path is that of the machine
    assert available(tmp_path, "0::/\n", machine=7 * GIB) == 7 * GIB


def test_the_smallest_limit_of_nested_groups(tmp_path: Path) -> None:
    """As systemd and Slurm nest them; the root has no files of its own."""
    root = tmp_path / "cgroup"
    group(root / "job", str(8 * GIB), 6 * GIB, 0, V2)
    group(root / "job" / "step", "max", 5 * GIB, 0, V2)
    assert available(tmp_path, "0::/job/step\n") == 2 * GIB
    group(root / "job" / "step", str(5 * GIB), 5 * GIB + 1, 0, V2)
    assert available(tmp_path, "0::/job/step\n") == 0


def test_version_1(tmp_path: Path) -> None:
    root = tmp_path / "cgroup" / "memory"
    group(root, str(2**63 - 4096), 50 * GIB, 0, V1)  # version 1 writes no limit as a huge one
    group(root / "docker" / "abc", str(16 * GIB), 4 * GIB, GIB, V1)
    lines = "12:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/docker/abc\n"
    assert available(tmp_path, lines) == 13 * GIB


def test_freed_memory_is_returned() -> None:
    """Below a block that is still in use, the C library keeps it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    places = [ctypes.c_void_p(libc.malloc(100_000)) for _ in range(600)]
    for place in places:
        ctypes.memset(place, 1, 100_000)
    for place in places[:-1]:
        libc.free(place)
    kept = anonymous()
    return_freed_memory()
    assert kept - anonymous() > 50_000_000
    libc.free(places[-1])
