"""Peak memory of a stretch of work: the accelerator's allocator, or this process's own pages where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspeed.accelerator import get_accelerator

STATUS = Path("/proc/self/status")
SECONDS = 0.01  # between two samples


@dataclass
class Peak:
    """Bytes at the start and at the highest."""

    start: int
    highest: int
    kind: str

    @property
    def above(self) -> int:
        return self.highest - self.start


def anonymous() -> int:
    """Anonymous resident memory of this process, in bytes: not the pages of mapped files, which the kernel can drop."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return sum(int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Whose `highest` is filled in when the block is left."""
    gc.collect()  # what is garbage already would be freed in the middle, and hide as much of what is new
    _return_freed_memory()  # and so would be what was freed and is resident still
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
    """Let glibc give freed tensors back to the system at once, so that what is resident is what is used."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; setting them stops their growing by itself
            libc.mallopt(parameter, 262144)
        libc.malloc_trim(0)  # what was freed before this call, too
