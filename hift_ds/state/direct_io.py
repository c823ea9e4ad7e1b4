"""State between files and the device, by DeepSpeed's asynchronous I/O, which bypasses the kernel's page cache.

The data passes through page-locked memory with room for the state of two blocks, in pieces. The state of the block that
comes next is read ahead, and what comes back from the device is written behind, so that the drive works while the
device computes. DeepSpeed's handle does not report whether an operation succeeded (it counts failed operations like
others). So this module computes a checksum of everything it writes, and checks it at the next read.
"""

import bisect
import ctypes
import errno
import functools
import os
import queue
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import logger

from hift_ds.config import AIO_CHUNK
from hift_ds.state.arena import Arena

# Direct I/O needs offsets, sizes and addresses that are multiples of the drive's logical block size, which is at most
# this many bytes.
PAGE = 4096

# Used if the config has no ``aio`` section. The requests that one handle has in flight make up one piece.
_DEFAULTS = {
    "block_size": 2**20,
    "queue_depth": AIO_CHUNK // 2**20,
    "single_submit": False,
    "overlap_events": True,
    "intra_op_parallelism": 1,
}

Pair = tuple[torch.Tensor, torch.Tensor]


@functools.cache
def library() -> tuple[Any, str]:
    """Return DeepSpeed's asynchronous I/O module and an empty string, or None and why it is not available.

    DeepSpeed compiles the module at its first use on a machine.
    """
    try:
        if not AsyncIOBuilder().is_compatible():
            return None, "libaio is not installed for development (Debian and Ubuntu: apt-get install libaio-dev)"
        logger.info("loading DeepSpeed's asynchronous I/O; the first use on a machine compiles it, which takes minutes")
        return AsyncIOBuilder().load(verbose=False), ""
    except Exception as error:  # compilers, linkers and DeepSpeed's own checks raise many kinds
        return None, f"it cannot be compiled or loaded: {(str(error) or type(error).__name__).splitlines()[0]}"


def open_direct_io(folder: str, settings: Mapping[str, Any] | None, nbytes: int) -> "DirectIO | None":
    """Return a :class:`DirectIO` for the files of a folder. If asynchronous I/O does not work, log why and return None.

    Args:
        settings: DeepSpeed's ``aio`` section with all its keys; None: the defaults of this module.
        nbytes: page-locked memory that it takes.
    """
    module, reason = library()
    if module is not None:
        try:
            direct = DirectIO(module, settings or _DEFAULTS, nbytes)
        except (OSError, MemoryError, RuntimeError) as error:  # memory is short, or must not be page-locked
            text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            reason = f"no {nbytes / 2**30:.2f} GiB of page-locked memory: {text.splitlines()[0]}"
        else:
            try:
                direct.check_folder(folder)
                return direct
            except OSError as error:
                reason = f"it does not work in hift.offload.nvme_path={folder!r}: {error.strerror}"
    logger.warning(f"state uses memory-mapped files instead of DeepSpeed's asynchronous I/O: {reason}")
    return None


def _can_lock(nbytes: int) -> bool:
    """Whether the system page-locks this many bytes. If it did not, DeepSpeed's allocator would end the process.

    Raises:
        RuntimeError: there is not that much memory.
    """
    trial, system = torch.empty(nbytes, dtype=torch.uint8), ctypes.CDLL(None)
    refused = system.mlock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(nbytes))
    system.munlock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(nbytes))
    return not refused


def issue_copies(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Issue the copies of many tensors by one call, which takes the host less time than one call for each."""
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)


class Job:
    """An event that an I/O thread records later. An error in that thread is raised in whoever waits for the event."""

    def __init__(self, future: "Future[Any]"):
        self._future = future

    def event(self) -> Any:
        """Wait until the thread has issued its last copy; return the device event after it (None: already passed).

        Raises:
            OSError: reading or writing failed.
        """
        return self._future.result()

    def synchronize(self) -> None:
        """Let the host wait for the event.

        Raises:
            OSError: reading or writing failed.
        """
        _synchronize(self.event())


def _synchronize(event: Any) -> None:
    if event is not None:
        event.synchronize()


_DONE: "Future[None]" = Future()
_DONE.set_result(None)


class _Handles:
    """Threads with a handle of DeepSpeed's each, for one direction."""

    def __init__(self, module: Any, settings: Mapping[str, Any]):
        count = max(2, settings["intra_op_parallelism"])
        keys = ("block_size", "queue_depth", "single_submit", "overlap_events")
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(module.aio_handle(*(settings[key] for key in keys), 1))
        self._threads = ThreadPoolExecutor(count, initializer=_use, initargs=(_device(),))

    def submit(self, work: Callable[..., None], *args: Any) -> "Future[None]":
        return self._threads.submit(work, *args)

    def read(self, buffer: torch.Tensor, fd: int, offset: int) -> None:
        """Fill a buffer from a file by an idle handle, which reports no error."""
        self._move("sync_pread", buffer, fd, offset)

    def write(self, buffer: torch.Tensor, fd: int, offset: int) -> None:
        """Write a buffer to a file by an idle handle, which reports no error."""
        self._move("sync_pwrite", buffer, fd, offset)

    def _move(self, method: str, buffer: torch.Tensor, fd: int, offset: int) -> None:
        handle = self._idle.get()
        try:
            # The handle opens files by name, and the files of `HostMemory` have none.
            if getattr(handle, method)(buffer, f"/proc/self/fd/{fd}", offset) != 1:
                raise OSError(errno.EIO, "DeepSpeed's asynchronous I/O refuses a file of hift.offload.nvme_path")
        finally:
            self._idle.put(handle)


class _File(NamedTuple):
    """A file, and its mapping into memory as bytes."""

    fd: int
    mapped: torch.Tensor


class _Place(NamedTuple):
    """What a piece holds: bytes of a file (a number) from ``offset`` on."""

    file: int
    offset: int


class _Piece:
    """A part of the page-locked memory, which holds a part of a file.

    Attributes:
        memory: at most as many bytes of the file.
        is_dirty: it was changed, and no write of it has begun.
        filled: the read of the file.
        written: the last write of the file.
        fetched: event after the last copy to the device.
        stored: event after the last copy from the device.
    """

    def __init__(self, memory: torch.Tensor):
        self.memory = memory
        self.is_dirty = False
        self.filled: Future[None] = _DONE
        self.written: Future[None] = _DONE
        self.fetched: Any = None
        self.stored: Any = None


class DirectIO:
    """Reads and writes tensors in files, through a cache of parts of these files in page-locked memory.

    A thread copies between the cache and the device, in the order of calls. It alone decides what the cache holds.
    Others read and write the files.

    After a tensor was passed to :meth:`write`, :meth:`read` or :meth:`read_ahead`, it must not be used through the
    file's mapping until :meth:`release`: the kernel keeps direct I/O and mappings coherent only if they do not overlap
    in time.

    Args:
        module: DeepSpeed's asynchronous I/O module (see :func:`library`).
        settings: DeepSpeed's ``aio`` section with all its keys.
        nbytes: size of the cache, at least two pages.

    Attributes:
        buffers: the cache's memory, page-locked, allocated once. No other host memory is used.

    Raises:
        OSError: the system does not page-lock that much.
        MemoryError, RuntimeError: there is not that much memory.
    """

    def __init__(self, module: Any, settings: Mapping[str, Any], nbytes: int):
        self._readers, self._writers = _Handles(module, settings), _Handles(module, settings)
        self._copies = ThreadPoolExecutor(1, initializer=_use, initargs=(_device(),))
        memory = self._locked(module, nbytes)
        self.buffers = [memory]
        self._spare = [_Piece(part) for part in memory.split(AIO_CHUNK)]
        self._held: dict[_Place, _Piece] = {}  # least recently used first
        self._awaited: dict[_Place, None] = {}  # will be needed soon
        self._files: list[_File] = []
        self._addresses: list[int] = []  # of the mappings, in ascending order
        self._numbers: list[int] = []  # of the files, in this order
        self._sums: dict[_Place, int] = {}  # checksums of what was written since the last `release`
        self._writes: dict[_Place, Future[None]] = {}  # of places that no piece holds any more
        self._ahead: Future[None] = _DONE  # the last `read_ahead`
        # Python's collector calls finalizers of all objects in a cycle, which end threads and free memory, before an
        # engine in the cycle is destroyed.
        self._is_open = [True]
        weakref.finalize(self, self._is_open.clear)

    def _locked(self, module: Any, nbytes: int) -> torch.Tensor:
        """Return page-locked memory that DeepSpeed's handles use directly."""
        if get_accelerator().device_name() == "cpu":
            if not _can_lock(nbytes):
                raise OSError(errno.ENOMEM, "the system refuses it; raise the limit (ulimit -l)")
            handle = module.aio_handle()
            memory: torch.Tensor = handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))
            weakref.finalize(self, handle.free_cpu_locked_tensor, memory)
            return memory
        memory = Arena(pin_memory=True).empty(torch.empty(nbytes, dtype=torch.uint8, device="meta"))
        if not memory.is_pinned():
            raise OSError(errno.ENOMEM, f"{get_accelerator().device_name()} cannot page-lock it")
        return memory

    def check_folder(self, folder: str) -> None:
        """Write one page to a file in the folder, and read it back.

        Raises:
            OSError: direct I/O does not work in this folder.
        """
        (memory,) = self.buffers
        source, target = memory[:PAGE].random_(), memory[-PAGE:].fill_(0)
        with tempfile.TemporaryFile(prefix="hift-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, PAGE)
            fd = _reopened(file.fileno())
        try:
            self._writers.write(source, fd, 0)
            self._readers.read(target, fd, 0)
            if not torch.equal(source, target):
                raise OSError(errno.EIO, "data read back differs from data written")
        finally:
            os.close(fd)

    def add_file(self, mapped: torch.Tensor, fd: int) -> None:
        """Use direct I/O for all tensors in a mapped file from now on.

        Args:
            mapped: the whole file as bytes, a multiple of ``PAGE``.
            fd: a descriptor of the file, which the caller may close.
        """
        own = _reopened(fd)
        weakref.finalize(self, os.close, own)
        at = bisect.bisect(self._addresses, mapped.data_ptr())
        self._addresses.insert(at, mapped.data_ptr())
        self._numbers.insert(at, len(self._files))
        self._files.append(_File(own, mapped))

    def read(self, pairs: Sequence[Pair], lane: Any, *events: Any) -> Job:
        """Copy tensors to the device.

        Args:
            pairs: (device, host): a tensor on the device, and a tensor in a file or in host memory that it gets the
                values of.
            lane: the :class:`~hift_ds.state.transfer.Lane` for copies to the device.
            events: the copies begin after these.
        """
        return Job(self._copies.submit(self._read, pairs, lane, events, self._ahead))

    def write(self, pairs: Sequence[Pair], lane: Any, *events: Any) -> Job:
        """Copy tensors from the device to the cache and to host memory; arguments as in :meth:`read`.

        The files are written later. Until then the cache has the values.
        """
        return Job(self._copies.submit(self._write, pairs, lane, events))

    def read_ahead(self, tensors: Iterable[torch.Tensor]) -> None:
        """Start to read what will be needed soon, as far as the cache has room, and to write what was changed.

        Args:
            tensors: what will be needed, in order; those in host memory are skipped.
        """
        places = [place for tensor in tensors for place, _, _ in self._places(tensor)]
        self._ahead = self._copies.submit(self._read_ahead, list(dict.fromkeys(places)))

    def release(self, buffers: Iterable[torch.Tensor]) -> None:
        """Allow the use of tensors through their mappings, until the next call of another method.

        Raises:
            OSError: a file could not be written, or does not hold what was written.
        """
        if not self._is_open or sys.is_finalizing():
            return
        self._copies.submit(self._empty).result()
        for place in {place for buffer in buffers for place, _, _ in self._places(buffer)}:
            if place in self._sums:
                mapped = self._files[place.file].mapped
                _check(mapped[place.offset : place.offset + AIO_CHUNK], self._sums.pop(place))

    # ---- where a tensor is

    def _places(self, tensor: torch.Tensor) -> list[tuple[_Place, int, int]]:
        """Return the pieces that a contiguous tensor is in, each with the tensor's first byte there and the one after
        its last; an empty list: it is in no file."""
        address = tensor.data_ptr()
        at = bisect.bisect(self._addresses, address) - 1
        if at < 0 or not tensor.nbytes:
            return []
        begin, number = address - self._addresses[at], self._numbers[at]
        end = begin + tensor.nbytes
        if end > self._files[number].mapped.nbytes:
            return []
        return [
            (_Place(number, first), max(begin - first, 0), min(end - first, AIO_CHUNK))
            for first in range(begin // AIO_CHUNK * AIO_CHUNK, end, AIO_CHUNK)
        ]

    def _by_place(self, pairs: Sequence[Pair]) -> tuple[dict[_Place, list[tuple[torch.Tensor, slice]]], list[Pair]]:
        """Return for each place the parts of tensors on the device that belong there, and the pairs in no file."""
        found: dict[_Place, list[tuple[torch.Tensor, slice]]] = {}
        others = []
        for device, host in pairs:
            places = self._places(host)
            if not places:
                others.append((device, host))
                continue
            done, flat = 0, device.view(-1).view(torch.uint8)
            for place, begin, end in places:
                found.setdefault(place, []).append((flat[done : done + end - begin], slice(begin, end)))
                done += end - begin
        return found, others

    # ---- in the thread of the copies

    def _read(self, pairs: Sequence[Pair], lane: Any, events: Sequence[Any], ahead: "Future[None]") -> Any:
        ahead.result()  # raises its error
        found, others = self._by_place(pairs)
        with lane.after(*events):
            issue_copies([device for device, _ in others], [host for _, host in others])
        for place, parts in found.items():
            piece = self._hold(place)
            piece.filled.result()
            with lane.after(piece.stored):
                issue_copies([device for device, _ in parts], [piece.memory[cut] for _, cut in parts])
            piece.fetched = lane.mark()
        return lane.mark()

    def _write(self, pairs: Sequence[Pair], lane: Any, events: Sequence[Any]) -> Any:
        found, others = self._by_place(pairs)
        with lane.after(*events):
            issue_copies([host for _, host in others], [device for device, _ in others])
        for place, parts in found.items():
            piece = self._hold(place)
            piece.filled.result()
            piece.written.result()
            with lane.after(piece.fetched):
                issue_copies([piece.memory[cut] for _, cut in parts], [device for device, _ in parts])
            piece.stored, piece.is_dirty = lane.mark(), True
            self._awaited.pop(place, None)
        for device, _ in pairs:
            lane.outlives(device)
        for place, piece in self._held.items():
            if place not in found:  # the next tensors may lie in the pieces of these
                self._write_behind(place, piece)
        return lane.mark()

    def _read_ahead(self, places: Sequence[_Place]) -> None:
        self._awaited.update(dict.fromkeys(places))
        for place, piece in self._held.items():
            self._write_behind(place, piece)
        for place in places:
            if place not in self._held:
                if not self._spare and all(held in self._awaited for held in self._held):
                    return
                self._hold(place)

    def _hold(self, place: _Place) -> _Piece:
        """Return the piece that holds a place, or will when its transfer is done."""
        piece = self._held.pop(place, None)
        if piece is None:
            piece = self._spare.pop() if self._spare else self._given_up()
            # Its memory may still be read or written, and the file may not have what another piece had of it.
            before = piece.filled, piece.written, self._writes.pop(place, _DONE)
            piece.filled = self._readers.submit(self._read_piece, place, piece, before, piece.fetched)
            piece.written = _DONE
        self._held[place] = piece
        return piece

    def _given_up(self) -> _Piece:
        """Give up the least recently used piece, if possible one that is not needed soon."""
        place = next((place for place in self._held if place not in self._awaited), next(iter(self._held)))
        piece = self._held.pop(place)
        self._write_behind(place, piece)
        self._writes[place] = piece.written
        return piece

    def _write_behind(self, place: _Place, piece: _Piece) -> None:
        if piece.is_dirty:
            piece.is_dirty = False
            piece.written = self._writers.submit(self._write_piece, place, piece)

    def _empty(self) -> None:
        """Write all that was changed, and forget what the cache holds."""
        for place, piece in self._held.items():
            self._write_behind(place, piece)
        held, self._held = list(self._held.values()), {}
        transfers = [*self._writes.values(), *(one for piece in held for one in (piece.filled, piece.written))]
        errors = [error for error in (transfer.exception() for transfer in transfers) if error is not None]
        for piece in held:
            piece.filled = piece.written = _DONE
        self._spare += held
        self._awaited.clear()
        self._writes.clear()
        if errors:
            raise errors[0]

    # ---- in the threads of the files

    def _read_piece(self, place: _Place, piece: _Piece, before: "Iterable[Future[None]]", fetched: Any) -> None:
        for transfer in before:
            transfer.result()
        _synchronize(fetched)
        fd, memory = self._files[place.file].fd, self._memory_of(place, piece)
        if place in self._sums:
            self._readers.read(memory, fd, place.offset)
            _check(memory, self._sums[place])
            return
        # Last written through the mapping, so there is no checksum that would show a failed read. The system call does
        # report one.
        done = _read_by_system(memory, fd, place.offset)
        if done != memory.nbytes:
            raise OSError(errno.EIO, f"a file of hift.offload.nvme_path ends after {done} of {memory.nbytes} bytes")

    def _write_piece(self, place: _Place, piece: _Piece) -> None:
        _synchronize(piece.stored)
        memory = self._memory_of(place, piece)
        self._sums[place] = _sum(memory)
        self._writers.write(memory, self._files[place.file].fd, place.offset)

    def _memory_of(self, place: _Place, piece: _Piece) -> torch.Tensor:
        """Return a piece's memory, without what lies beyond the end of the file."""
        return piece.memory[: self._files[place.file].mapped.nbytes - place.offset]


def _read_by_system(buffer: torch.Tensor, fd: int, offset: int) -> int:
    """Fill a buffer from a file; return the number of bytes, which is smaller if the file ends before."""
    memory, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
    while done < buffer.nbytes:
        count = os.preadv(fd, [memory[done:]], offset + done)  # the system may return less than there is
        if not count:
            break
        done += count
    return done


def _reopened(fd: int) -> int:
    """Return a descriptor of the same file for direct I/O."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)


def _sum(values: torch.Tensor) -> int:
    """Return a checksum of bytes: the sum of their 64-bit words. Their number is a multiple of 8."""
    return int(values.view(torch.int64).sum().item())


def _check(values: torch.Tensor, expected: int) -> None:
    if _sum(values) != expected:
        raise OSError(
            errno.EIO,
            "masters or optimizer state read from hift.offload.nvme_path are not what was written: a read or a "
            "write failed, or another program changed the file. Check the drive (dmesg), and resume from the last "
            "checkpoint",
        )


def _device() -> int:
    return get_accelerator().current_device()


def _use(device: int) -> None:
    get_accelerator().set_device(device)
