"""Seconds of wall-clock time by part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil


class Spent:
    """The seconds that this process has spent, by part. What a part contains does not count for the part around it.

    A part ends when its code has ended. The host waits for the device only where that code reads a result.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = 0.0  # seconds of the parts inside the present one

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a `with` block."""
        around, self._inside = self._inside, 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            inside, self._inside = self._inside, around
            self.add(name, taken - inside)
            self._inside = around + taken

    def add(self, name: str, seconds: float) -> None:
        """Count time that has been measured inside the present part."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._inside += seconds


def process_age() -> float:
    """Return the seconds since this process began; resolution 0.01 s."""
    return time.time() - psutil.Process().create_time()
