"""One arena of host memory for each rank: few large regions, filled with buffers without gaps.

A region is mapped at once, its pages are made by several threads, and it is page-locked by one call to the accelerator.
torch's own page-locked memory is slower to make, and each tensor of it is rounded up to a power of two.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

# Buffers begin at multiples of this many bytes, which suits every dtype and every copy engine.
ALIGNMENT = 256

_HUGE_PAGE = 2 * 2**20
_PIECE = 32 * _HUGE_PAGE  # what a thread takes at a time
_THREADS = 16
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list["Region"] = []  # memory that must not be unmapped: see `Region.__del__`


class Region(mmap.mmap):
    """Memory of this process, or memory that it shares with others. All of its pages exist.

    Tensors made from it keep it alive. When the last of them is gone, it is unregistered, then unmapped.

    Args:
        nbytes: its size.
        file: number of an open file in memory, which other processes map as well; -1: the memory is private.
        offset: where the memory begins in the file, in bytes. The file must be large enough.

    Raises:
        MemoryError: the system does not give that much.
    """

    _process: int | None = None  # the one that registered it

    def __new__(cls, nbytes: int, file: int = -1, offset: int = 0) -> "Region":
        """Map the memory and make its pages, huge ones where the system has them."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if file < 0 else mmap.MAP_SHARED
        try:
            region = super().__new__(cls, file, nbytes, flags=flags, offset=offset)
            if nbytes >= _HUGE_PAGE:
                region._advise("MADV_HUGEPAGE")
            _make_pages(region.address(), nbytes)
        except OSError as error:
            raise MemoryError(
                f"{nbytes / 2**30:.2f} GiB of host memory: {error.strerror}; free memory or raise the limit of this "
                "process (ulimit -v)"
            ) from error
        return region

    def address(self) -> int:
        """Return where it begins."""
        return torch.frombuffer(self, dtype=torch.uint8).data_ptr()

    def register(self) -> None:
        """Page-lock the memory, so that the accelerator copies from it and to it without a wait of the host.

        A process that is forked later does not have the memory: the system would copy all of it at once, because pages
        that a device uses are never shared.

        Raises:
            RuntimeError: the accelerator cannot do it, or the system refuses.
        """
        if not get_accelerator().register_host_memory(self.address(), len(self)):
            raise RuntimeError(f"{get_accelerator().device_name()} cannot register memory")
        self._process = os.getpid()
        self._advise("MADV_DONTFORK")

    def _advise(self, advice: str) -> None:
        try:
            self.madvise(getattr(mmap, advice))
        except (AttributeError, OSError):  # not on this system
            return

    def __del__(self) -> None:
        """Unregister the memory before it is unmapped."""
        if self._process is None or sys.is_finalizing():
            return
        if self._process != os.getpid():  # a fork: other memory may be at this address now
            _kept.append(self)
            return
        try:
            get_accelerator().synchronize()  # copies may still run
            get_accelerator().unregister_host_memory(self.address())
        except RuntimeError as error:  # a device that failed; it must not hold pages of another owner
            _kept.append(self)
            logger.warning(f"{len(self) / 2**30:.2f} GiB of page-locked host memory cannot be freed: {error}")


@dataclass
class _Space:
    """What is free of a region, or of a page-locked array of torch: from ``start`` on, up to ``stop``."""

    memory: Any
    start: int
    stop: int


class Arena:
    """Allocates buffers in host memory. They are never freed one by one: a region lives as long as one of its buffers.

    Args:
        pin_memory: page-lock the regions. Where the accelerator cannot register memory or the system refuses, torch
            page-locks slabs whose sizes are powers of two, which it does not round up. If it fails as well, memory
            stays pageable and a warning is logged once.
        map_file: returns a memory-mapped file of a number of bytes; the regions are such files.
    """

    def __init__(self, pin_memory: bool = False, map_file: Callable[[int], mmap.mmap] | None = None):
        self._ways: list[Callable[[int, int], _Space]] = [_pageable]
        if map_file is not None:
            self._ways = [lambda nbytes, least: _Space(map_file(nbytes), 0, nbytes)]
        elif pin_memory:
            self._ways = [_registered, _slab, _pageable]
        self._spaces: list[_Space] = []
        self._planned = 0

    def reserve(self, nbytes: int) -> None:
        """Make room for buffers of that many bytes together, their alignment included. Buffers beyond them get regions
        of their own.

        Raises:
            MemoryError: the system does not give that much.
        """
        self._planned = nbytes
        if nbytes:
            self._add(0)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialized buffer with a storage of its own, with the shape and dtype of ``like``.

        Raises:
            MemoryError: the system does not give that much.
        """
        nbytes = like.numel() * like.element_size()
        if not nbytes:
            return torch.empty(like.shape, dtype=like.dtype)
        space = next((space for space in self._spaces if space.stop - space.start >= nbytes), None) or self._add(nbytes)
        buffer = torch.frombuffer(space.memory, dtype=like.dtype, count=like.numel(), offset=space.start)
        space.start += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._spaces = [space for space in self._spaces if space.start < space.stop]  # keeps no full region alive
        return buffer.view(like.shape)

    def _add(self, nbytes: int) -> _Space:
        """Map what is still planned, or at least a buffer of ``nbytes``."""
        while True:
            try:
                space = self._ways[0](max(self._planned, nbytes), nbytes)
                break
            except RuntimeError as error:
                if len(self._ways) == 1:
                    raise
                reason = str(error).splitlines()[0]
                way = self._ways.pop(0)
                if way is _registered:
                    clear_error()
                    logger.info(f"host memory cannot be registered ({reason}); torch page-locks it")
                else:
                    logger.warning(
                        f"host buffers cannot be page-locked ({reason}); they stay pageable, and transfers are slower. "
                        "Raise the limit (ulimit -l), or set hift.offload.pin_memory=false"
                    )
        self._planned = max(self._planned - space.stop, 0)
        self._spaces.append(space)
        return space


def _pageable(nbytes: int, least: int) -> _Space:
    return _Space(Region(nbytes), 0, nbytes)


def _registered(nbytes: int, least: int) -> _Space:
    region = Region(nbytes)
    region.register()
    return _Space(region, 0, nbytes)


def _slab(nbytes: int, least: int) -> _Space:
    """Let torch page-lock the largest power of two within ``nbytes``, or the smallest that holds ``least``."""
    size = max(1 << (nbytes.bit_length() - 1), 1 << (least - 1).bit_length() if least else 1)
    slab = get_accelerator().pin_memory(torch.empty(size, dtype=torch.uint8), make_copy=False).numpy()
    # torch does not know of copies from and to buffers in the slab. It would reuse the memory while they run.
    weakref.finalize(slab, _wait_for_copies, os.getpid()).atexit = False
    return _Space(slab, 0, size)


def _wait_for_copies(process: int) -> None:
    """Wait for the device, unless this is a fork of the process that uses it."""
    if process == os.getpid():
        with contextlib.suppress(RuntimeError):  # a device that failed copies nothing more
            get_accelerator().synchronize()


def clear_error() -> None:
    """Consume the error that a refused registration leaves behind in CUDA: the next kernel would report it."""
    try:
        torch.zeros(1, device=get_accelerator().current_device_name())
    except RuntimeError:
        return


def _make_pages(address: int, nbytes: int) -> None:
    """Make the pages of new memory, with several threads.

    Raises:
        OSError: there is too little memory.
    """
    pieces = [(address + start, min(_PIECE, nbytes - start)) for start in range(0, nbytes, _PIECE)]
    threads = min(_THREADS, len(os.sched_getaffinity(0)), len(pieces))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(_touch, *zip(*pieces, strict=True)):
            pass


def _touch(address: int, nbytes: int) -> None:
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE):
        code = ctypes.get_errno()
        if code in (errno.ENOMEM, errno.EFAULT):
            raise OSError(code, os.strerror(code))
        ctypes.memset(address, 0, nbytes)  # an older kernel
