"""State between files and the device, by DeepSpeed's asynchronous I/O, which bypasses the kernel's page cache.

The data passes through page-locked buffers of a fixed size. Reads run ahead of the copies to the device, and copies
from the device run ahead of writes. DeepSpeed's handle does not report whether an operation succeeded (``wait`` counts
failed operations like others). So this module computes a checksum of everything it writes, and checks it at the next
read.
"""

import ctypes
import errno
import functools
import itertools
import math
import os
import resource
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import logger

from hift_ds.config import AIO_BUFFERS, AIO_CHUNK

# Direct I/O needs offsets, sizes and addresses that are multiples of the drive's logical block size, which is at most
# this many bytes.
PAGE = 4096

# Used if the config has no ``aio`` section. The requests that one handle has in flight make up one chunk.
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


def open_direct_io(folder: str, settings: Mapping[str, Any] | None) -> "DirectIO | None":
    """Return a :class:`DirectIO` for the files of a folder. If asynchronous I/O does not work, log why and return None.

    Args:
        settings: DeepSpeed's ``aio`` section with all its keys; None: the defaults of this module.
    """
    module, reason = library()
    settings = settings or _DEFAULTS
    nbytes = AIO_CHUNK * 2 * _channels(settings)
    if module is not None and not _can_lock(nbytes):
        reason = f"the system refuses to page-lock {nbytes} bytes; raise the limit (ulimit -l)"
    elif module is not None:
        try:
            direct = DirectIO(module, settings)
            direct.check_folder(folder)
            return direct
        except OSError as error:
            reason = f"it does not work in hift.offload.nvme_path={folder!r}: {error.strerror}"
    logger.warning(f"state uses memory-mapped files instead of DeepSpeed's asynchronous I/O: {reason}")
    return None


def _channels(settings: Mapping[str, Any]) -> int:
    return max(AIO_BUFFERS // 2, settings["intra_op_parallelism"])


def _can_lock(nbytes: int) -> bool:
    """Whether the system page-locks this many bytes. If it did not, DeepSpeed's allocator would end the process."""
    trial, system = torch.empty(nbytes, dtype=torch.uint8), ctypes.CDLL(None)
    refused = system.mlock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(nbytes))
    system.munlock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(nbytes))
    return not refused


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


class _Channel:
    """A page-locked buffer, and a handle that moves one chunk between this buffer and a file."""

    def __init__(self, module: Any, settings: Mapping[str, Any]):
        self._handle = module.aio_handle(
            settings["block_size"],
            settings["queue_depth"],
            settings["single_submit"],
            settings["overlap_events"],
            1,
        )
        if get_accelerator().device_name() == "cpu":
            self.buffer = self._handle.new_cpu_locked_tensor(AIO_CHUNK, torch.empty(0, dtype=torch.uint8))
            weakref.finalize(self, self._handle.free_cpu_locked_tensor, self.buffer)
        else:
            self.buffer = get_accelerator().pin_memory(torch.empty(AIO_CHUNK, dtype=torch.uint8))
        self.free: Any = None  # event after which the device no longer reads the buffer
        self._pending = False

    def read(self, fd: int, offset: int, nbytes: int) -> None:
        self._begin(self._handle.async_pread, fd, offset, nbytes)

    def write(self, fd: int, offset: int, nbytes: int) -> None:
        self._begin(self._handle.async_pwrite, fd, offset, nbytes)

    def _begin(self, operation: Callable[..., int], fd: int, offset: int, nbytes: int) -> None:
        # The handle opens files by name, and the files of `HostMemory` are unlinked.
        if operation(self.buffer[: _whole_pages(nbytes)], f"/proc/self/fd/{fd}", offset):
            raise OSError(errno.EIO, "DeepSpeed's asynchronous I/O refuses a file of hift.offload.nvme_path")
        self._pending = True

    def finish(self) -> None:
        if self._pending:
            self._pending = False
            self._handle.wait()


class _Chunk(NamedTuple):
    """At most ``AIO_CHUNK`` bytes of a tensor: on the device, and in a file."""

    device: torch.Tensor
    fd: int
    offset: int  # in the file, in bytes
    sums: list[int]  # checksums of all chunks of its tensor at their last write; empty: written through the mapping
    number: int  # index into `sums`


class DirectIO:
    """Reads and writes tensors in files, one file per tensor, in one thread for each direction.

    After a tensor was passed to :meth:`write` or :meth:`read`, it must not be used through the file's mapping until
    :meth:`release`: the kernel keeps direct I/O and mappings coherent only if they do not overlap in time.

    Args:
        module: DeepSpeed's asynchronous I/O module (see :func:`library`).
        settings: DeepSpeed's ``aio`` section with all its keys.

    Attributes:
        buffers: page-locked, allocated once. No other host memory is used, whatever the size of the state.
    """

    def __init__(self, module: Any, settings: Mapping[str, Any]):
        sides = [[_Channel(module, settings) for _ in range(_channels(settings))] for _ in range(2)]
        self._reading, self._writing = sides
        self.buffers = [channel.buffer for side in sides for channel in side]
        self._threads = [ThreadPoolExecutor(1, initializer=_use, initargs=(_device(),)) for _ in range(2)]
        self._files: dict[int, int] = {}  # address of the mapping -> file descriptor
        # address of the mapping -> offset of a slice -> its bytes, and its chunks' checksums at their last write
        self._sums: dict[int, dict[int, tuple[int, list[int]]]] = {}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:  # one file per tensor stays open
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def check_folder(self, folder: str) -> None:
        """Write one page to a file in the folder, and read it back.

        Raises:
            OSError: direct I/O does not work in this folder.
        """
        with tempfile.NamedTemporaryFile(prefix="hift-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, PAGE)
            fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        try:
            target, source = self._reading[0], self._writing[0]
            source.buffer[:PAGE].random_(256)
            source.write(fd, 0, PAGE)
            source.finish()
            target.buffer[:PAGE].fill_(0)
            target.read(fd, 0, PAGE)
            target.finish()
            if not torch.equal(target.buffer[:PAGE], source.buffer[:PAGE]):
                raise OSError(errno.EIO, "data read back differs from data written")
        finally:
            os.close(fd)

    def add_file(self, mapped: torch.Tensor, path: str) -> None:
        """Use direct I/O for a tensor from now on.

        Args:
            mapped: the memory-mapped contents of the file.
            path: the file; its size is a multiple of ``PAGE``.
        """
        # Slices begin at multiples of 1,024 elements, and must begin at multiples of `PAGE` bytes.
        if mapped.element_size() % 4:
            return
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        weakref.finalize(self, os.close, fd)
        self._files[_address(mapped)] = fd

    def read(self, pairs: Sequence[Pair], lane: Any, *events: Any) -> Job:
        """Copy tensors from their files to the device.

        Args:
            pairs: (device, mapped): a tensor on the device, and the mapped tensor whose contents it gets.
            lane: the :class:`~hift_ds.state.transfer.Lane` for copies to the device.
            events: the copies begin after these.
        """
        return Job(self._threads[0].submit(self._read, pairs, lane, events))

    def write(self, pairs: Sequence[Pair], lane: Any, *events: Any) -> Job:
        """Copy tensors from the device to their files; arguments as in :meth:`read`.

        After :meth:`write`, pass the same slices of a tensor to :meth:`read` and :meth:`write` until :meth:`release`.
        """
        return Job(self._threads[1].submit(self._write, pairs, lane, events))

    def release(self, buffers: Iterable[torch.Tensor]) -> None:
        """Allow the use of tensors through their mappings, until the next :meth:`read` or :meth:`write` of them.

        All earlier reads and writes must be done.

        Raises:
            OSError: a file does not hold what was written.
        """
        for buffer in buffers:
            flat = _bytes(buffer)
            for offset, (nbytes, sums) in self._sums.pop(_address(buffer), {}).items():
                chunks = flat[offset : offset + nbytes].split(AIO_CHUNK)
                for chunk, expected in zip(chunks, sums, strict=True):
                    _check(chunk, expected)

    def _read(self, pairs: Sequence[Pair], lane: Any, events: Sequence[Any]) -> Any:
        with lane.after(*events):
            pass
        chunks, others = self._chunks(pairs, self._recorded)

        def begin(channel: _Channel, chunk: _Chunk) -> None:
            _synchronize(channel.free)
            if chunk.sums:
                channel.read(chunk.fd, chunk.offset, chunk.device.numel())
                return
            # Last written through the mapping, so there is no checksum that would show a failed read. The system call
            # does report one.
            nbytes = _whole_pages(chunk.device.numel())
            done = os.preadv(chunk.fd, [memoryview(channel.buffer.numpy())[:nbytes]], chunk.offset)
            if done != nbytes:
                raise OSError(errno.EIO, f"a file of hift.offload.nvme_path ends after {done} of {nbytes} bytes")

        def end(channel: _Channel, chunk: _Chunk) -> None:
            channel.finish()
            arrived = channel.buffer[: chunk.device.numel()]
            if chunk.sums:
                _check(arrived, chunk.sums[chunk.number])
            with lane.after():
                chunk.device.copy_(arrived, non_blocking=True)
            channel.free = lane.mark()

        _in_turns(self._reading, chunks, begin, end)
        with lane.after():
            for device, mapped in others:
                device.copy_(mapped, non_blocking=True)
        return lane.mark()

    def _write(self, pairs: Sequence[Pair], lane: Any, events: Sequence[Any]) -> Any:
        with lane.after(*events):
            pass
        chunks, others = self._chunks(pairs, self._record)

        def begin(channel: _Channel, chunk: _Chunk) -> None:
            leaving = channel.buffer[: chunk.device.numel()]
            with lane.after():
                leaving.copy_(chunk.device, non_blocking=True)
            _synchronize(lane.mark())
            chunk.sums[chunk.number] = _sum(leaving)
            channel.write(chunk.fd, chunk.offset, chunk.device.numel())

        _in_turns(self._writing, chunks, begin, lambda channel, _: channel.finish())
        with lane.after():
            for device, mapped in others:
                mapped.copy_(device, non_blocking=True)
        event = lane.mark()
        _synchronize(event)  # this thread must not free device tensors that copies still read
        return event

    def _chunks(
        self, pairs: Sequence[Pair], sums_of: Callable[[torch.Tensor], list[int]]
    ) -> tuple[list[_Chunk], list[Pair]]:
        """Return the chunks of the tensors with direct I/O, and the pairs of the other tensors."""
        chunks, others = [], []
        for device, mapped in pairs:
            fd = self._files.get(_address(mapped))
            if fd is None:
                others.append((device, mapped))
                continue
            offset, sums = _offset(mapped), sums_of(mapped)
            assert offset % PAGE == 0
            for number, values in enumerate(_bytes(device).split(AIO_CHUNK)):
                chunks.append(_Chunk(values, fd, offset + number * AIO_CHUNK, sums, number))
        return chunks, others

    def _recorded(self, mapped: torch.Tensor) -> list[int]:
        return self._sums.get(_address(mapped), {}).get(_offset(mapped), (0, []))[1]

    def _record(self, mapped: torch.Tensor) -> list[int]:
        sums = [0] * math.ceil(mapped.nbytes / AIO_CHUNK)
        self._sums.setdefault(_address(mapped), {})[_offset(mapped)] = (mapped.nbytes, sums)
        return sums


def _in_turns(
    channels: Sequence[_Channel],
    chunks: Sequence[_Chunk],
    begin: Callable[[_Channel, _Chunk], None],
    end: Callable[[_Channel, _Chunk], None],
) -> None:
    """Begin and end the chunks in order, with as many in flight as there are channels."""
    in_flight: deque[tuple[_Channel, _Chunk]] = deque()
    try:
        for channel, chunk in zip(itertools.cycle(channels), chunks, strict=False):
            if len(in_flight) == len(channels):
                end(*in_flight.popleft())
            begin(channel, chunk)
            in_flight.append((channel, chunk))
        while in_flight:
            end(*in_flight.popleft())
    finally:
        for channel in channels:  # a handle must not be freed or reused while an operation is pending
            channel.finish()


def _whole_pages(nbytes: int) -> int:
    return math.ceil(nbytes / PAGE) * PAGE


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _address(mapped: torch.Tensor) -> int:
    return mapped.untyped_storage().data_ptr()


def _offset(mapped: torch.Tensor) -> int:
    return int(mapped.storage_offset()) * mapped.element_size()


def _sum(values: torch.Tensor) -> int:
    """Return a checksum of bytes: the sum of their 64-bit words."""
    eights = values.numel() // 8 * 8
    return int(values[:eights].view(torch.int64).sum().item()) + int(values[eights:].sum().item())


def _check(values: torch.Tensor, expected: int) -> None:
    if _sum(values) != expected:
        raise OSError(
            errno.EIO,
            "fp32 masters or optimizer state read from hift.offload.nvme_path are not what was written: a read or a "
            "write failed, or another program changed the file. Check the drive (dmesg), and resume from the last "
            "checkpoint",
        )


def _device() -> int:
    return get_accelerator().current_device()


def _use(device: int) -> None:
    get_accelerator().set_device(device)
