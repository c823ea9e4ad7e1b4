"""Host memory and files for the state of inactive blocks: the one allocator of what is kept off the device."""

import contextlib
import functools
import math
import mmap
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.collectives import gather, on_every_rank
from hift_ds.config import file_buffer_bytes
from hift_ds.state.arena import Arena
from hift_ds.state.direct_io import PAGE, DirectIO, open_direct_io
from hift_ds.state.free_memory import available_memory, return_freed_memory


class HostMemory:
    """The one allocator of everything that is kept off the device.

    Args:
        pin_memory: page-lock the buffers, through DeepSpeed's accelerator; see :class:`~hift_ds.state.arena.Arena`.
        folder: keep buffers in memory-mapped files in this folder. The kernel writes their pages to the drive and
            frees them when it needs memory. The files have no name, so nothing remains when the process ends, however
            it ends. None: all buffers are in host memory.
        aio: DeepSpeed's ``aio`` section with all its keys; None: the defaults of :mod:`hift_ds.state.direct_io`.
        masters_in_files: if there is a folder, keep masters there as well, and not only the rest of the state.
        largest: the most bytes that one block will have in files. The memory between files and the device has room for
            twice as many.
        purpose: what the buffers are for, for messages.
        remedy: what to set if there is too little host memory; None: that for masters and optimizer state.
        map_memory: returns memory of a number of bytes that other processes have as well; None: it is private.

    Attributes:
        folder: as given.
        buffers: every buffer handed out. They live as long as the run.
    """

    def __init__(
        self,
        pin_memory: bool = True,
        folder: str | None = None,
        aio: Mapping[str, Any] | None = None,
        masters_in_files: bool = True,
        largest: int = 1,
        purpose: str = "masters and optimizer state",
        remedy: str | None = None,
        map_memory: Callable[[int], mmap.mmap] | None = None,
    ):
        self._arena = Arena(pin_memory and get_accelerator().device_name() != "cpu", map_memory)
        self._files = Arena(map_file=self._map_file)
        self._masters_in_files = masters_in_files
        self._aio = aio
        self._between = file_buffer_bytes(largest) if folder is not None else 0
        self._purpose, self._given_remedy = purpose, remedy
        self.folder = folder
        self.buffers: list[torch.Tensor] = []
        self._in_files: set[int] = set()  # addresses of buffers

    @functools.cached_property
    def direct(self) -> DirectIO | None:
        """What moves state between the files and the device; None: there are no files, or DeepSpeed's asynchronous I/O
        does not work here. With it, the buffers in files are only for reading and changing state between steps."""
        return open_direct_io(self.folder, self._aio, self._between) if self.folder is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def place(self, buffer: torch.Tensor) -> str:
        """Return where a buffer is: ``host`` or ``nvme``."""
        return "nvme" if buffer.data_ptr() in self._in_files else "host"

    def _is_in_files(self, of_master: bool) -> bool:
        return self.folder is not None and (self._masters_in_files or not of_master)

    def _split(self, nbytes: int, of_masters: int) -> tuple[int, int]:
        """Return the bytes in host memory and in files, of all bytes and those of masters among them."""
        parts = ((of_masters, True), (nbytes - of_masters, False))
        in_files = sum(size for size, of_master in parts if self._is_in_files(of_master))
        return nbytes - in_files, in_files

    def _remedy(self, has_buffers: bool) -> str:
        """Return what to set if there is too little host memory, in which there are buffers or not."""
        if self._given_remedy is not None:
            return self._given_remedy
        if self.folder is None:
            return "use more machines with ZeRO, or files: hift.offload.device='nvme' with hift.offload.nvme_path"
        remedy = "cut the largest blocks (hift.max_block_numel), because two blocks' state passes through it"
        return f"{remedy}, or set hift.offload.nvme='all'" if has_buffers else remedy

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Let an error about too little host memory name the purpose and the remedy."""
        try:
            yield
        except MemoryError as error:
            raise MemoryError(f"{self._purpose}: {error}; or {self._remedy(True)}") from error

    def check_room(self, nbytes: int, of_masters: int = 0) -> None:
        """Check for enough free space before anything is allocated. All ranks call it, and all get the same answer.

        Args:
            nbytes: bytes that this rank will allocate.
            of_masters: how many of them are for masters.

        Raises:
            ValueError: on every rank, if less is free on any machine than its ranks need.
        """
        return_freed_memory()
        host = socket.gethostname()
        in_memory, in_files = self._split(nbytes, of_masters)
        remedy = self._remedy(in_memory > 0)
        wanted = [(f"host memory on {host}", remedy, in_memory + self._between, available_memory())]
        if self.folder is not None:
            place = f"the drive of hift.offload.nvme_path={self.folder!r} on {host}"
            remedy = "free some space there, or choose a folder on a larger drive"
            wanted.append((place, remedy, in_files, shutil.disk_usage(self.folder).free))
        needed, least, remedies = Counter[str](), dict[str, int](), dict[str, str]()
        for place, remedy, size, free in (entry for of_rank in gather(wanted) for entry in of_rank):
            needed[place] += size
            least[place] = min(free, least.get(place, free))
            remedies[place] = remedy
        problems = [
            f"{self._purpose} of all blocks need {needed[place] / 2**30:.2f} GiB of {place}, and "
            f"{least[place] / 2**30:.2f} GiB are free; {remedies[place]}"
            for place in needed
            if needed[place] > least[place]
        ]
        if problems:
            raise ValueError(". ".join(problems))

    def reserve(self, nbytes: int, of_masters: int = 0) -> None:
        """Allocate memory and files for buffers that will be made, alignment included; arguments as for `check_room`.

        Raises:
            MemoryError: on every rank, if the system does not give that much memory to one of them.
            OSError: on every rank, if a folder's file system is full or not writable.
        """
        in_memory, in_files = self._split(nbytes, of_masters)

        def reserve(arena: Arena, size: int) -> None:
            with self._explained():
                arena.reserve(size)

        for arena, size, error in ((self._arena, in_memory, MemoryError), (self._files, in_files, OSError)):
            _, problems = on_every_rank(functools.partial(reserve, arena, size), error)
            if problems:
                raise error("\n".join(f"rank {i}: {text}" for i, text in problems.items()))

    def empty(self, like: torch.Tensor, of_master: bool = False) -> torch.Tensor:
        """Return an uninitialized buffer with the shape and dtype of ``like``.

        Args:
            like: a tensor on any device, ``meta`` included.
            of_master: it is for a master, or a part of one.

        Raises:
            OSError: the folder's file system is full or not writable.
            MemoryError: the system does not give that much memory.
        """
        is_in_files = self._is_in_files(of_master)
        with self._explained():
            buffer = (self._files if is_in_files else self._arena).empty(like)
        self.buffers.append(buffer)
        if is_in_files:
            self._in_files.add(buffer.data_ptr())
        return buffer

    def _map_file(self, nbytes: int) -> mmap.mmap:
        assert self.folder is not None
        try:
            with tempfile.TemporaryFile(prefix="hift-", dir=self.folder) as file:
                mapped = _mapped(file.fileno(), nbytes)
                if self.direct is not None:
                    self.direct.add_file(torch.frombuffer(mapped, dtype=torch.uint8), file.fileno())
        except OSError as error:
            there = sum(buffer.nbytes for buffer in self.buffers if self.place(buffer) == "nvme")
            raise OSError(
                error.errno,
                f"{error.strerror}: hift.offload.nvme_path={self.folder!r} needs {nbytes} more bytes for masters and "
                f"optimizer state, in addition to {there} bytes already there; free some space, choose another "
                "folder, or set hift.offload.device='cpu'",
            ) from error
        return mapped


def scratch(shape: Sequence[int], dtype: torch.dtype, folder: str) -> torch.Tensor:
    """Return an uninitialized tensor in a memory-mapped file without a name, which takes no anonymous memory.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        folder: where the file is.

    Raises:
        OSError: the folder's file system is full or not writable.
    """
    numel = math.prod(shape)
    if not numel:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(prefix="hift-", dir=folder) as file:
        return torch.frombuffer(_mapped(file.fileno(), numel * dtype.itemsize), dtype=dtype, count=numel).view(shape)


def _mapped(fd: int, nbytes: int) -> mmap.mmap:
    """Make a file of at least this many bytes, in whole pages, and map it."""
    size = math.ceil(nbytes / PAGE) * PAGE
    # Reserve the space now: if the disk were full at a later page fault, the kernel would kill the process.
    os.posix_fallocate(fd, 0, size)
    return mmap.mmap(fd, size)
