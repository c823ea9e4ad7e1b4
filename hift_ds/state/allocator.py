"""Host memory and files for the state of inactive blocks: the one allocator of what is kept off the device."""

import math
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.collectives import gather
from hift_ds.state.arena import Arena
from hift_ds.state.direct_io import PAGE, open_direct_io
from hift_ds.state.free_memory import available_memory, return_freed_memory


class HostMemory:
    """The one allocator of everything that is kept off the device.

    Args:
        pin_memory: page-lock the buffers, through DeepSpeed's accelerator; see :class:`~hift_ds.state.arena.Arena`.
        folder: keep the buffers in memory-mapped files in this folder instead. The kernel writes their pages to the
            drive and frees them when it needs memory. The files are unlinked, so nothing remains when the process
            ends, however it ends.
        aio: DeepSpeed's ``aio`` section with all its keys; None: the defaults of :mod:`hift_ds.state.direct_io`.

    Attributes:
        folder: as given; None: the buffers are in host memory.
        buffers: every buffer handed out. They live as long as the run.
        direct: moves state between the files and the device, if DeepSpeed's asynchronous I/O works here; else None.
            The buffers are then only for reading and changing state between steps.
    """

    def __init__(self, pin_memory: bool = True, folder: str | None = None, aio: Mapping[str, Any] | None = None):
        self._arena = Arena(pin_memory and get_accelerator().device_name() != "cpu")
        self.folder = folder
        self.direct = open_direct_io(folder, aio) if folder is not None else None
        self.buffers: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def check_room(self, nbytes: int) -> None:
        """Check for enough free space before anything is allocated. All ranks call it, and all get the same answer.

        Args:
            nbytes: bytes that this rank will allocate.

        Raises:
            ValueError: on every rank, if less is free on any machine than its ranks need.
        """
        return_freed_memory()
        host = socket.gethostname()
        if self.folder is not None:
            place = f"the drive of hift.offload.nvme_path={self.folder!r} on {host}"
            free = shutil.disk_usage(self.folder).free
            remedy = "free some space there, or choose a folder on a larger drive"
        else:
            place, free = f"host memory on {host}", available_memory()
            remedy = "use more machines with ZeRO, or files: hift.offload.device='nvme' with hift.offload.nvme_path"
        needed, least = Counter[str](), dict[str, int]()
        for at, wanted, left in gather((place, nbytes, free)):
            needed[at] += wanted
            least[at] = min(left, least.get(at, left))
        problems = [
            f"fp32 masters and optimizer state of all blocks need {needed[at] / 2**30:.2f} GiB of {at}, and "
            f"{least[at] / 2**30:.2f} GiB are free"
            for at in needed
            if needed[at] > least[at]
        ]
        if problems:
            raise ValueError("; ".join([*problems, remedy]))

    def reserve(self, nbytes: int) -> None:
        """Allocate the memory of buffers that will be made, alignment included. Files are made with the buffers.

        Raises:
            MemoryError: the system does not give that much.
        """
        if self.folder is None:
            self._arena.reserve(nbytes)

    def empty(self, like: torch.Tensor, direct: bool = True) -> torch.Tensor:
        """Return an uninitialized buffer with the shape and dtype of ``like``.

        Args:
            like: a tensor on any device, ``meta`` included.
            direct: allow direct I/O for this buffer. It requires that slices of the buffer that travel to the device
                begin at multiples of 1,024 elements.

        Raises:
            OSError: the folder's file system is full or not writable.
            MemoryError: the system does not give that much memory.
        """
        buffer = self._mapped(like, direct) if self.folder is not None else self._arena.empty(like)
        self.buffers.append(buffer)
        return buffer

    def _mapped(self, like: torch.Tensor, direct: bool) -> torch.Tensor:
        """Return a buffer backed by an unlinked file."""
        assert self.folder is not None
        if not like.nbytes:
            return torch.empty(like.shape, dtype=like.dtype)
        try:
            with tempfile.NamedTemporaryFile(prefix="hift-", dir=self.folder) as file:
                # Reserve the space now: if the disk were full at a later page fault, the kernel would kill the process.
                os.posix_fallocate(file.fileno(), 0, math.ceil(like.nbytes / PAGE) * PAGE)
                flat = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
                if direct and self.direct is not None:
                    self.direct.add_file(flat, file.name)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: hift.offload.nvme_path={self.folder!r} needs {like.nbytes} more bytes for fp32 "
                f"masters and optimizer state, in addition to {self.nbytes} bytes already there; free some space, "
                "choose another folder, or set hift.offload.device='cpu'",
            ) from error
        return flat.view(like.shape)
