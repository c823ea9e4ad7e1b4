"""Measure the peak memory of a block of code, from the accelerator's allocator or the process's resident pages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspeed.accelerator import get_accelerator

from hift_ds.state.free_memory import return_freed_memory

STATUS = Path("/proc/self/status")
SECONDS = 0.01  # between samples


@dataclass
class Peak:
    """Bytes at the start and at the peak.

    Attributes:
        kind: how the memory was measured.
    """

    start: int
    highest: int
    kind: str

    @property
    def above(self) -> int:
        """The peak above the start."""
        return self.highest - self.start


def anonymous() -> int:
    """Return the anonymous resident memory of this process in bytes, without the pages of mapped files."""
    return _status("RssAnon", "RssShmem")


def resident() -> int:
    """Return the resident memory of this process in bytes, with page-locked memory and the pages of mapped files."""
    return _status("VmRSS", "HugetlbPages")


def _status(*keys: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return sum(int(lines.get(key, "0").split()[0]) * 1024 for key in keys)


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak memory inside a `with` block; `highest` is set at its end."""
    # Memory that is freed inside the block would hide as much new memory, so free it first.
    gc.collect()
    _return_freed_memory()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.synchronize()
        accelerator.reset_peak_memory_stats()
        peak = Peak(accelerator.memory_allocated(), 0, "allocated on the device")
        try:
            yield peak
        finally:
            peak.highest = accelerator.max_memory_allocated()
        return
    peak = Peak(anonymous(), 0, "resident memory of the process above its start, sampled")
    peak.highest, done = peak.start, threading.Event()

    def sample() -> None:
        while not done.wait(SECONDS):
            peak.highest = max(peak.highest, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        peak.highest = max(peak.highest, anonymous())


def _return_freed_memory() -> None:
    """Make glibc return freed tensors to the system at once, so that resident memory is memory in use."""
    with contextlib.suppress(OSError, AttributeError):
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; once set, they no longer grow
            ctypes.CDLL(None).mallopt(parameter, 262144)
    return_freed_memory()  # also what was freed earlier
