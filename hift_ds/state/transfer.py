"""Copies between host memory or files and the device: streams, events and the staging area on the device."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.state.direct_io import DirectIO, Job, issue_copies

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


def on_main_stream() -> AbstractContextManager[None]:
    """Return a context whose work is issued on the stream on which models compute, the device's default stream."""
    return get_accelerator().stream(get_accelerator().default_stream())


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


class Run(NamedTuple):
    """Flat tensors of one dtype that lie in a slot one behind the other.

    Attributes:
        pieces: the tensors.
        sizes: for each the elements from its start to the next one's start.
    """

    pieces: list[torch.Tensor]
    sizes: list[int]


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
        slot_bytes: allocate slots of this size, once. Chunks use them in turn: while one is stepped, others are filled
            or written back. None: one slot, allocated as large as needed and freed after the step.
        direct: transfers state, some of which lies in files, in its own threads; None: state lies in host memory or in
            files that are only memory-mapped.
        count: number of slots.
        defer: step on a stream of its own, so that the device can go on with the next forward pass.

    Attributes:
        slots: the staging buffers.
        free: those that no chunk uses, in the order in which they are used next.
        fetching, storing: the lanes for copies to the device and from it.
        can_defer: whether :meth:`update` uses a stream of its own.
        updating: index of the block that the last step updates.
    """

    def __init__(
        self,
        device: torch.device,
        slot_bytes: int | None,
        direct: DirectIO | None = None,
        count: int = 2,
        defer: bool = False,
    ):
        self.device = device
        self._direct = direct
        self.slot_bytes = slot_bytes
        self.fetching, self.storing, self._stepping = Lane(), Lane(), Lane()
        self.can_defer = defer
        self.updating = 0
        self._late: Callable[[], None] | None = None  # an update that is not issued yet
        self._updated: Any = None  # event after which the weights of the last stepped block are updated
        if slot_bytes is None:
            self.slots = [Slot(None)]
        else:
            self.slots = [Slot(self._area(slot_bytes)) for _ in range(count)]
        self.free = deque(self.slots)

    def _area(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def update(self, issue: Callable[[], None], late: bool = False) -> None:
        """Update a block.

        Args:
            issue: issues the update.
            late: call it at the next :meth:`start_update`. A device makes its copies in one direction in the order in
                which they are issued, so a number that the host waits for would wait for all of a block's state.
        """
        self.finish_update()
        if late and self.can_defer:
            self._late = issue
        else:
            self._issue(issue)

    def _issue(self, issue: Callable[[], None]) -> None:
        if not self.can_defer:
            issue()
            return
        try:
            with self._stepping.after(mark()):
                issue()
        finally:
            self._updated = self._stepping.mark()

    def start_update(self) -> None:
        """Issue an update that is late."""
        if self._late is not None:
            issue, self._late = self._late, None
            with torch.inference_mode(False), torch.no_grad():  # whatever the forward pass runs in
                self._issue(issue)

    def uses(self, tensor: torch.Tensor) -> None:
        """Keep a tensor's memory until the update that is being issued is done, if its owner frees it earlier."""
        if self.can_defer:
            self._stepping.outlives(tensor)

    @property
    def is_late(self) -> bool:
        """Whether an update is not issued yet."""
        return self._late is not None

    def finish_update(self) -> None:
        """Let the device's current stream wait for the update of the last stepped block. The host does not wait."""
        self.start_update()
        wait(self._updated)
        self._updated = None

    def read_ahead(self, sources: Sequence[torch.Tensor]) -> None:
        """Start to read tensors from files that will be copied to the device soon, in this order."""
        if self._direct is not None:
            self._direct.read_ahead(sources)

    def fill(self, sources: Sequence[torch.Tensor | Run], written: Any) -> tuple[Slot, list[torch.Tensor], Any]:
        """Copy host tensors into the next free slot, each with its shape and dtype.

        Args:
            sources: contiguous tensors in host memory or in files; together, alignment included, at most a slot. A
                tensor on the meta device is not copied and gets the same room.
            written: event after which the sources hold their current values.

        Returns:
            The slot, the copies on the device, one flat tensor for each :class:`Run`, and the event after which they
            are ready.
        """
        slot = self.free.popleft()
        sizes = [_bytes_in_slot(source) for source in sources]
        ready = None
        if self.slot_bytes is None:
            slot.area = self._area(sum(sizes))
            ready = mark()  # earlier computations may still use this memory
        assert slot.area is not None and sum(sizes) <= slot.area.numel()
        copies, pairs, offset = [], [], 0
        for source, size in zip(sources, sizes, strict=True):
            copy, parts = _placed(slot.area[offset : offset + size], source)
            copies.append(copy)
            pairs += [(target, part) for target, part in parts if part.device.type != "meta"]
            offset += size
        if self._direct is not None:
            return slot, copies, self._direct.read(pairs, self.fetching, slot.free, written, ready)
        with self.fetching.after(slot.free, written, ready):
            issue_copies([target for target, _ in pairs], [part for _, part in pairs])
        return slot, copies, self.fetching.mark()

    def drain(self, slot: Slot, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Copy pairs (host, device) to the host after all computation issued so far, then free the slot.

        Returns:
            The event after which the host tensors hold the values; with ``direct``, after which the next :meth:`fill`
            gets them.
        """
        if self._direct is not None:
            job = self._direct.write([(device, host) for host, device in pairs], self.storing, mark())
            if self.slot_bytes is None:
                job.synchronize()  # without this the slot could live into the next forward pass
                slot.area = None
            slot.free = job
            self.free.append(slot)
            return job
        with self.storing.after(mark()):
            issue_copies([host for host, _ in pairs], [device for _, device in pairs])
            for _, device in pairs:
                self.storing.outlives(device)
        slot.free = self.storing.mark()
        if self.slot_bytes is None:
            slot.area = None
        self.free.append(slot)
        return slot.free


def _bytes_in_slot(source: torch.Tensor | Run) -> int:
    nbytes = sum(source.sizes) * source.pieces[0].itemsize if isinstance(source, Run) else source.nbytes
    return math.ceil(nbytes / _ALIGNMENT) * _ALIGNMENT


def _placed(
    area: torch.Tensor, source: torch.Tensor | Run
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the copy of a source in this area of a slot, and the pairs (target, tensor) to copy."""
    if not isinstance(source, Run):
        copy = area[: source.nbytes].view(source.dtype).view(source.shape)
        return copy, [(copy, source)]
    flat = area[: sum(source.sizes) * source.pieces[0].itemsize].view(source.pieces[0].dtype)
    targets = flat.split(source.sizes)
    return flat, [(t[: piece.numel()], piece) for t, piece in zip(targets, source.pieces, strict=True)]
