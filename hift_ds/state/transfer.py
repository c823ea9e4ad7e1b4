"""Copies between host memory or files and the device: streams, events and the staging area on the device."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.state.direct_io import DirectIO, Job

# Byte offsets inside a staging area are multiples of this, which suits every dtype and every copy engine.
_ALIGNMENT = 256


class Lane:
    """A stream of the device for copies in one direction. On a device without streams, copies run at once."""

    def __init__(self) -> None:
        stream = get_accelerator().Stream
        self._stream = stream() if stream is not None else None

    @contextmanager
    def after(self, *events: Any) -> Iterator[None]:
        """Issue what runs inside the ``with`` statement on this lane, after the events (None: already passed)."""
        events = tuple(_recorded(event) for event in events)
        if self._stream is None:
            yield
            return
        for event in events:
            if event is not None:
                self._stream.wait_event(event)
        with get_accelerator().stream(self._stream):
            yield

    def mark(self) -> Any:
        """Return an event that passes when all work issued on this lane so far is done."""
        return _record(self._stream)

    def outlives(self, tensor: torch.Tensor) -> None:
        """Tell the device's allocator that this lane still uses ``tensor`` after Python frees it."""
        if self._stream is not None and tensor.device.type != "cpu":
            tensor.record_stream(self._stream)


def mark() -> Any:
    """Return an event that passes when all work issued on the device's current stream so far is done."""
    return _record(get_accelerator().current_stream())


def wait(event: Any) -> None:
    """Let the device's current stream wait for an event. The host does not wait."""
    event = _recorded(event)
    if event is not None:
        get_accelerator().current_stream().wait_event(event)


def _recorded(event: Any) -> Any:
    """Return the device event of a :class:`Job`; any other event is returned as it is."""
    return event.event() if isinstance(event, Job) else event


def _record(stream: Any) -> Any:
    kind = get_accelerator().Event
    if kind is None or stream is None:
        return None
    event = kind()
    event.record(stream)
    return event


class Slot:
    """A staging buffer on the device.

    Attributes:
        area: its memory, as bytes; None: allocated at each use.
        free: event that passes when the slot can be filled again: its last contents are written back, or, before the
            first use, no earlier computation uses its memory.
    """

    def __init__(self, area: torch.Tensor | None):
        self.area = area
        self.free: Any = mark()


class Staging:
    """The device memory that holds state during a step. All blocks share it.

    Args:
        device: where the slots are.
        slot_bytes: allocate two slots of this size, once. Chunks use them in turn: one is filled while the other is
            stepped. None: one slot, allocated as large as needed and freed after the step.
        direct: transfers state that lies in files, in its own threads; None: state lies in host memory or in files
            that are only memory-mapped.

    Attributes:
        slots: the staging buffers.
        fetching, storing: the lanes for copies to the device and from it.
    """

    def __init__(self, device: torch.device, slot_bytes: int | None, direct: DirectIO | None = None):
        self.device = device
        self._direct = direct
        self.slot_bytes = slot_bytes
        self.fetching, self.storing = Lane(), Lane()
        if slot_bytes is None:
            self.slots = [Slot(None)]
        else:
            self.slots = [Slot(self._area(slot_bytes)) for _ in range(2)]

    def _area(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def fill(self, slot: Slot, sources: list[torch.Tensor], written: Any) -> tuple[list[torch.Tensor], Any]:
        """Copy host tensors into a slot, each with its shape and dtype.

        Args:
            slot: its size is at least that of the sources together, alignment included.
            sources: contiguous tensors in host memory or in files.
            written: event after which the sources hold their current values.

        Returns:
            The copies on the device, and the event after which they are ready.
        """
        sizes = [math.ceil(source.nbytes / _ALIGNMENT) * _ALIGNMENT for source in sources]
        ready = None
        if self.slot_bytes is None:
            slot.area = self._area(sum(sizes))
            ready = mark()  # earlier computations may still use this memory
        assert slot.area is not None and sum(sizes) <= slot.area.numel()
        copies, offset = [], 0
        for source, size in zip(sources, sizes, strict=True):
            copies.append(slot.area[offset : offset + source.nbytes].view(source.dtype).view(source.shape))
            offset += size
        if self._direct is not None:
            pairs = list(zip(copies, sources, strict=True))
            return copies, self._direct.read(pairs, self.fetching, slot.free, written, ready)
        with self.fetching.after(slot.free, written, ready):
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source, non_blocking=True)
        return copies, self.fetching.mark()

    def drain(self, slot: Slot, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Copy pairs (host, device) to the host after all computation issued so far, then free the slot.

        Returns:
            The event after which the host tensors, or their files, hold the values.
        """
        if self._direct is not None:
            job = self._direct.write([(device, host) for host, device in pairs], self.storing, mark())
            if self.slot_bytes is None:
                job.synchronize()  # drives are slow: without this the slot would live into the next forward pass
                slot.area = None
            slot.free = job
            return job
        with self.storing.after(mark()):
            for host, device in pairs:
                host.copy_(device, non_blocking=True)
                self.storing.outlives(device)
        slot.free = self.storing.mark()
        if self.slot_bytes is None:
            slot.area = None
        return slot.free
