"""Host memory and files for the state of inactive blocks, and the way between them and the device.

Nothing here knows which block comes when, nor anything of DeepSpeed but its accelerator interface.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from hift_ds.state.files import PAGE, DirectIO, Job, direct_io

# Byte offsets inside a staging area are multiples of this, which suits every dtype and every copy engine.
_ALIGNMENT = 256


class HostMemory:
    """The one allocator of everything that is kept off the device.

    Args:
        pin_memory: page-lock the buffers, through DeepSpeed's accelerator. Where the system refuses, they stay
            pageable, and that is said once.
        folder: keep the buffers in files there instead, mapped into memory: the kernel writes them out and drops
            their pages as it needs room. The files have no name, so nothing is left behind, whatever ends the process.
        aio: DeepSpeed's section of that name, with all its keys; None: DeepSpeed's defaults.

    Attributes:
        buffers: all that was handed out, never more than the run needs and never freed before its end.
        direct: carries state between the files and the device, where DeepSpeed's asynchronous I/O works. The buffers
            are then what the state is looked at and changed through between the steps.
    """

    def __init__(self, pin_memory: bool = True, folder: str | None = None, aio: Mapping[str, Any] | None = None):
        self._pin_memory = pin_memory and folder is None and get_accelerator().device_name() != "cpu"
        self.folder = folder
        self.direct = direct_io(folder, aio) if folder is not None else None
        self.buffers: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def check_room(self, nbytes: int) -> None:
        """Refuse before anything is built what could not be held in the end.

        Args:
            nbytes: that all processes of this machine will ask for together.

        Raises:
            ValueError: there is less.
        """
        if self.folder is not None:
            free, place = shutil.disk_usage(self.folder).free, f"the drive of hift.offload.nvme_path={self.folder!r}"
            remedy = "make room there, or name a folder on a larger drive"
        else:
            free, place = psutil.virtual_memory().available, "host memory"
            remedy = "use more machines with ZeRO, or files: hift.offload.device='nvme' with hift.offload.nvme_path"
        if nbytes > free:
            raise ValueError(
                f"masters and optimizer state of all blocks need {nbytes / 2**30:.2f} GiB of {place}, and "
                f"{free / 2**30:.2f} GiB are free; {remedy}"
            )

    def empty(self, like: torch.Tensor, direct: bool = True) -> torch.Tensor:
        """An uninitialized buffer with the shape and dtype of ``like``.

        Args:
            direct: if it goes to the device in slices, they begin at multiples of 1,024 elements.

        Raises:
            OSError: the folder's file system is full or cannot be written.
        """
        if self.folder is not None:
            buffer = self._mapped(like, direct)
        else:
            buffer = torch.empty(like.shape, dtype=like.dtype, device="cpu")
            if self._pin_memory:
                try:
                    buffer = get_accelerator().pin_memory(buffer)
                except RuntimeError as error:
                    self._pin_memory = False
                    logger.warning(
                        f"host buffers cannot be page-locked ({str(error).splitlines()[0]}); they stay pageable, which "
                        "slows the transfers. Raise the limit (ulimit -l), or set hift.offload.pin_memory=false"
                    )
        self.buffers.append(buffer)
        return buffer

    def _mapped(self, like: torch.Tensor, direct: bool) -> torch.Tensor:
        assert self.folder is not None
        if not like.nbytes:
            return torch.empty(like.shape, dtype=like.dtype)
        try:
            with tempfile.NamedTemporaryFile(prefix="hift-", dir=self.folder) as file:
                # Reserved now: a page that finds no room on the disk later would kill the process.
                os.posix_fallocate(file.fileno(), 0, math.ceil(like.nbytes / PAGE) * PAGE)
                flat = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
                if direct and self.direct is not None:
                    self.direct.serve(flat, file.name)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: hift.offload.nvme_path={self.folder!r} has to take {like.nbytes} bytes more of "
                f"masters and optimizer state, beside {self.nbytes} bytes so far; make room there, name another "
                "folder, or set hift.offload.device='cpu'",
            ) from error
        return flat.view(like.shape)


class Lane:
    """A stream of the device for copies in one direction; on a device without streams, copies just happen."""

    def __init__(self) -> None:
        stream = get_accelerator().Stream
        self._stream = stream() if stream is not None else None

    @contextmanager
    def after(self, *events: Any) -> Iterator[None]:
        """What is issued inside runs on the lane, not before the events (None: already passed)."""
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
        """An event that passes when everything issued on the lane so far is done."""
        return _record(self._stream)

    def outlives(self, tensor: torch.Tensor) -> None:
        """Tell the device's allocator that the lane still uses ``tensor`` when Python lets go of it."""
        if self._stream is not None and tensor.device.type != "cpu":
            tensor.record_stream(self._stream)


def mark() -> Any:
    """An event that passes when everything computed on the device so far is done."""
    return _record(get_accelerator().current_stream())


def wait(event: Any) -> None:
    """Nothing that is computed on the device from here on begins before the event."""
    event = _recorded(event)
    if event is not None:
        get_accelerator().current_stream().wait_event(event)


def _recorded(event: Any) -> Any:
    return event.event() if isinstance(event, Job) else event


def _record(stream: Any) -> Any:
    kind = get_accelerator().Event
    if kind is None or stream is None:
        return None
    event = kind()
    event.record(stream)
    return event


class Slot:
    """One staging area on the device."""

    def __init__(self, area: torch.Tensor | None):
        self.area = area
        # Passes when what was last in the area has been written back; at first, when nothing uses its memory any more.
        self.free: Any = mark()


class Staging:
    """Where state stands on the device during a step, shared by all blocks.

    Args:
        device: of the staging areas.
        slot_bytes: two areas of this size, made once, which slices take in turn: while one is stepped the other is
            filled. None: one area, as large as is asked for and released after the step.
        direct: carries what lies in files, in threads of its own.
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
            written: event after which the sources hold what they shall.

        Returns:
            The copies on the device, and the event after which they may be used.
        """
        sizes = [math.ceil(source.nbytes / _ALIGNMENT) * _ALIGNMENT for source in sources]
        ready = None
        if self.slot_bytes is None:
            slot.area = self._area(sum(sizes))
            ready = mark()  # the memory may be what earlier computations still use
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
        """Copy pairs (host, device) to the host, after all that was computed so far, and set the slot free.

        Returns:
            The event after which the host tensors hold the values, which may be in files then.
        """
        if self._direct is not None:
            job = self._direct.write([(device, host) for host, device in pairs], self.storing, mark())
            if self.slot_bytes is None:
                job.synchronize()  # a drive is slow: the area would stay on the device during the next forward
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
