"""Between files and the device by DeepSpeed's asynchronous I/O, past the kernel's page cache.

Page-locked buffers of a fixed size stand between: reads run ahead of the copies to the device, and copies from it
ahead of writes. DeepSpeed's handle does not tell whether what it was asked for succeeded (its ``wait`` counts failed
operations like others), so everything that is written is summed up, and checked when it is next read.
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

# Direct I/O wants offsets, sizes and addresses to be multiples of the drive's logical block, which is no larger.
PAGE = 4096

# Where the config has no ``aio`` section: what one handle has in flight is a chunk.
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
    """DeepSpeed's module, or None and the reason. It is compiled at the first use on a machine."""
    try:
        if not AsyncIOBuilder().is_compatible():
            return None, "libaio is not installed for development (Debian and Ubuntu: apt-get install libaio-dev)"
        logger.info("loading DeepSpeed's asynchronous I/O; its first use on a machine compiles it, which takes minutes")
        return AsyncIOBuilder().load(verbose=False), ""
    except Exception as error:  # whatever a compiler, a linker or DeepSpeed's own checks come up with
        return None, f"it cannot be built or loaded: {(str(error) or type(error).__name__).splitlines()[0]}"


def direct_io(folder: str, settings: Mapping[str, Any] | None) -> "DirectIO | None":
    """What serves the files of that folder; None where asynchronous I/O does not work, and that is logged."""
    module, reason = library()
    settings = settings or _DEFAULTS
    nbytes = AIO_CHUNK * 2 * _channels(settings)
    if module is not None and not _can_lock(nbytes):
        reason = f"the system refuses to page-lock {nbytes} bytes; raise the limit (ulimit -l)"
    elif module is not None:
        try:
            direct = DirectIO(module, settings)
            direct.try_out(folder)
            return direct
        except OSError as error:
            reason = f"it does not work in hift.offload.nvme_path={folder!r}: {error.strerror}"
    logger.warning(f"state goes through memory-mapped files, not through DeepSpeed's asynchronous I/O: {reason}")
    return None


def _channels(settings: Mapping[str, Any]) -> int:
    return max(AIO_BUFFERS // 2, settings["intra_op_parallelism"])


def _can_lock(nbytes: int) -> bool:
    """DeepSpeed's own allocator ends the process where the system refuses."""
    trial, system = torch.empty(nbytes, dtype=torch.uint8), ctypes.CDLL(None)
    refused = system.mlock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(nbytes))
    system.munlock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(nbytes))
    return not refused


class Job:
    """An event that a thread of ours has yet to record. What fails there is raised where one waits."""

    def __init__(self, future: "Future[Any]"):
        self._future = future

    def event(self) -> Any:
        return self._future.result()

    def synchronize(self) -> None:
        _synchronize(self.event())


def _synchronize(event: Any) -> None:
    if event is not None:
        event.synchronize()


class _Channel:
    """A page-locked buffer, and the handle that moves one chunk between it and a file."""

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
        self.free: Any = None  # the event after which the device does not read the buffer any more
        self._pending = False

    def read(self, fd: int, offset: int, nbytes: int) -> None:
        self._begin(self._handle.async_pread, fd, offset, nbytes)

    def write(self, fd: int, offset: int, nbytes: int) -> None:
        self._begin(self._handle.async_pwrite, fd, offset, nbytes)

    def _begin(self, operation: Callable[..., int], fd: int, offset: int, nbytes: int) -> None:
        # The handle opens files by name, and ours have none.
        if operation(self.buffer[: _whole_pages(nbytes)], f"/proc/self/fd/{fd}", offset):
            raise OSError(errno.EIO, "DeepSpeed's asynchronous I/O refuses a file of hift.offload.nvme_path")
        self._pending = True

    def finish(self) -> None:
        if self._pending:
            self._pending = False
            self._handle.wait()


class _Part(NamedTuple):
    """At most a chunk of a tensor: its bytes on the device, and where they are in a file."""

    device: torch.Tensor
    fd: int
    offset: int
    sums: list[int]  # of its tensor's parts, as they were last written; none: that was not by us
    number: int


class DirectIO:
    """Reads and writes tensors that lie in files, each in one of its own, in two threads.

    Of what the threads write nothing may be looked at through a mapping of the file, and nothing may be written
    through one, until ``release``: the kernel keeps direct I/O and mappings coherent one after the other, and not
    side by side.

    Attributes:
        buffers: page-locked, made once; no more host memory is used, whatever the size of the state.
    """

    def __init__(self, module: Any, settings: Mapping[str, Any]):
        sides = [[_Channel(module, settings) for _ in range(_channels(settings))] for _ in range(2)]
        self._reading, self._writing = sides
        self.buffers = [channel.buffer for side in sides for channel in side]
        self._threads = [ThreadPoolExecutor(1, initializer=_use, initargs=(_device(),)) for _ in range(2)]
        self._files: dict[int, int] = {}  # by the address of the mapping
        # By the same address and the offset of a piece: its bytes and its chunks' sums, as they were last written.
        self._sums: dict[int, dict[int, tuple[int, list[int]]]] = {}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:  # a file for each tensor stays open
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def try_out(self, folder: str) -> None:
        """Write a page and read it back.

        Raises:
            OSError: this does not work there.
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
                raise OSError(errno.EIO, "what was written is not what is read")
        finally:
            os.close(fd)

    def serve(self, mapped: torch.Tensor, path: str) -> None:
        """From now on read and write that tensor, the mapping of that file, whose size is a multiple of ``PAGE``."""
        # Slices must begin at a page, and they begin at multiples of 1,024 elements.
        if mapped.element_size() % 4:
            return
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        weakref.finalize(self, os.close, fd)
        self._files[_address(mapped)] = fd

    def read(self, pairs: Sequence[Pair], lane: Any, *events: Any) -> Job:
        """Fill device tensors with what is in the file: pairs (device, mapped), after the events."""
        return Job(self._threads[0].submit(self._read, pairs, lane, events))

    def write(self, pairs: Sequence[Pair], lane: Any, *events: Any) -> Job:
        """Write device tensors to the file: pairs (device, mapped), after the events."""
        return Job(self._threads[1].submit(self._write, pairs, lane, events))

    def release(self, buffers: Iterable[torch.Tensor]) -> None:
        """From now on the tensors may be used through their mappings, until they are next read or written here.

        Nothing may be under way.

        Raises:
            OSError: they do not hold what was written.
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
        parts, others = self._parts(pairs, self._recorded)

        def begin(channel: _Channel, part: _Part) -> None:
            _synchronize(channel.free)
            if part.sums:
                channel.read(part.fd, part.offset, part.device.numel())
                return
            # Last written through the mapping, so there is no sum to tell a failure by. The system itself does tell.
            nbytes = _whole_pages(part.device.numel())
            done = os.preadv(part.fd, [memoryview(channel.buffer.numpy())[:nbytes]], part.offset)
            if done != nbytes:
                raise OSError(errno.EIO, f"a file of hift.offload.nvme_path ends after {done} of {nbytes} bytes")

        def end(channel: _Channel, part: _Part) -> None:
            channel.finish()
            arrived = channel.buffer[: part.device.numel()]
            if part.sums:
                _check(arrived, part.sums[part.number])
            with lane.after():
                part.device.copy_(arrived, non_blocking=True)
            channel.free = lane.mark()

        _in_turns(self._reading, parts, begin, end)
        with lane.after():
            for device, mapped in others:
                device.copy_(mapped, non_blocking=True)
        return lane.mark()

    def _write(self, pairs: Sequence[Pair], lane: Any, events: Sequence[Any]) -> Any:
        with lane.after(*events):
            pass
        parts, others = self._parts(pairs, self._record)

        def begin(channel: _Channel, part: _Part) -> None:
            leaving = channel.buffer[: part.device.numel()]
            with lane.after():
                leaving.copy_(part.device, non_blocking=True)
            _synchronize(lane.mark())
            part.sums[part.number] = _sum(leaving)
            channel.write(part.fd, part.offset, part.device.numel())

        _in_turns(self._writing, parts, begin, lambda channel, _: channel.finish())
        with lane.after():
            for device, mapped in others:
                mapped.copy_(device, non_blocking=True)
        event = lane.mark()
        _synchronize(event)  # nothing of the device's is still needed when this thread lets go of it
        return event

    def _parts(
        self, pairs: Sequence[Pair], sums_of: Callable[[torch.Tensor], list[int]]
    ) -> tuple[list[_Part], list[Pair]]:
        """What goes in chunks, and the pairs whose mappings are no files of ours."""
        parts, others = [], []
        for device, mapped in pairs:
            fd = self._files.get(_address(mapped))
            if fd is None:
                others.append((device, mapped))
                continue
            offset, sums = _offset(mapped), sums_of(mapped)
            assert offset % PAGE == 0
            for number, chunk in enumerate(_bytes(device).split(AIO_CHUNK)):
                parts.append(_Part(chunk, fd, offset + number * AIO_CHUNK, sums, number))
        return parts, others

    def _recorded(self, mapped: torch.Tensor) -> list[int]:
        return self._sums.get(_address(mapped), {}).get(_offset(mapped), (0, []))[1]

    def _record(self, mapped: torch.Tensor) -> list[int]:
        sums = [0] * math.ceil(mapped.nbytes / AIO_CHUNK)
        self._sums.setdefault(_address(mapped), {})[_offset(mapped)] = (mapped.nbytes, sums)
        return sums


def _in_turns(
    channels: Sequence[_Channel],
    parts: Sequence[_Part],
    begin: Callable[[_Channel, _Part], None],
    end: Callable[[_Channel, _Part], None],
) -> None:
    """Begin one part after the other, as many at a time as there are channels, and end each in order."""
    under_way: deque[tuple[_Channel, _Part]] = deque()
    try:
        for channel, part in zip(itertools.cycle(channels), parts, strict=False):
            if len(under_way) == len(channels):
                end(*under_way.popleft())
            begin(channel, part)
            under_way.append((channel, part))
        while under_way:
            end(*under_way.popleft())
    finally:
        for channel in channels:  # a handle must not go, nor be used again, with something pending
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
    """Of bytes, by eight."""
    eights = values.numel() // 8 * 8
    return int(values[:eights].view(torch.int64).sum().item()) + int(values[eights:].sum().item())


def _check(values: torch.Tensor, expected: int) -> None:
    if _sum(values) != expected:
        raise OSError(
            errno.EIO,
            "masters and optimizer state read from hift.offload.nvme_path are not what was written: a read or a write "
            "failed, or the file was changed. Check the drive (dmesg), and resume from the last checkpoint",
        )


def _device() -> int:
    return get_accelerator().current_device()


def _use(device: int) -> None:
    get_accelerator().set_device(device)
