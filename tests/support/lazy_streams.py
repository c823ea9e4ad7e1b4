"""An accelerator whose streams do what a program has made certain, and no more.

A copy on a stream runs at the last moment: when something waits for it. Until then what it will write is NaN for
whoever touches it, and what it reads may be overwritten. On the other hand it may run at once, before the computation
that was not waited for: if it has not waited for the last computation on its tensors, it copies NaN. So a missing wait,
of either side, is a wrong number.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import hift_ds.state.direct_io
import hift_ds.state.transfer
from hift_ds.state.allocator import HostMemory
from hift_ds.state.transfer import Lane
from tests.support.device_memory import key, skip_on_a_device, tensors


class MissingWait(AssertionError):
    """The program let go of memory that a copy of its own still needed."""


class _Place:
    """Elements of a storage, which they do not keep alive unless asked to."""

    def __init__(self, tensor: torch.Tensor, keep: bool):
        self.storage = weakref.ref(tensor.untyped_storage())
        self.key = key(tensor)
        self.kept = tensor.untyped_storage() if keep else None
        self._layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        self._dtype = tensor.dtype
        self._begin, self._end = _span(tensor)

    def tensor(self) -> torch.Tensor:
        storage = self.storage()
        if storage is None:
            raise MissingWait("a copy ran after its memory on the device was given back")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._layout)

    def overlaps(self, tensor: torch.Tensor) -> bool:
        begin, end = _span(tensor)
        return key(tensor) == self.key and begin < self._end and self._begin < end and self.storage() is not None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte in its storage and the one after the last."""
    begin = tensor.storage_offset() * tensor.element_size()
    return begin, begin + tensor.nbytes  # what is copied is contiguous


def spoil(tensor: torch.Tensor) -> None:
    tensor.fill_(torch.nan if tensor.is_floating_point() else 255)  # bytes of NaNs


class _Copy:
    """Of tensors on the device the storages are kept alive by their owners only, as on a GPU.

    Attributes:
        settled: it ran, and whoever may use its target knows.
    """

    def __init__(self, target: _Place, source: _Place, racing: bool, to_host: bool):
        self.target, self.source, self.racing = target, source, racing
        self._to_host = to_host
        self.settled = False

    def run(self) -> None:
        target, source = self.target.tensor(), self.source.tensor()
        target.copy_(source)
        if self.racing:
            spoil(target)
        self.settled = not self._to_host
        self.target.kept = self.source.kept = None


class Stream:
    """A queue of copies and of events to wait for."""

    def __init__(self, machine: "LazyStreams"):
        self._machine = machine
        self.items: list[Any] = []
        self.done = 0  # items that ran
        self.synchronized = 0  # items of which the host knows that they ran
        self.knows = 0  # the time of the computation that what comes next is certain to follow
        machine.streams.append(self)

    def wait_event(self, event: "Event") -> None:
        self.items.append(event)
        self.knows = max(self.knows, event.knows)

    def run(self, end: int) -> None:
        while self.done < end:
            item, self.done = self.items[self.done], self.done + 1
            item.run()

    def wait_stream(self, other: Any) -> None:
        event = Event(self._machine)
        event.record(other)
        self.wait_event(event)


class Computation(Stream):
    """The stream of all computation, which runs at once: to wait is to let others run."""

    def wait_event(self, event: "Event") -> None:
        event.run()


class Event:
    def __init__(self, machine: "LazyStreams"):
        self._machine = machine
        self._stream: Stream | None = None
        self._position = self.knows = 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._machine.computation
        self._stream, self._position = stream, len(stream.items)
        self.knows = self._machine.time if stream is self._machine.computation else stream.knows

    def run(self) -> None:
        if self._stream is not None:
            with self._machine.running():
                self._stream.run(self._position)

    def synchronize(self) -> None:
        self.run()
        self._settle()

    def _settle(self) -> None:
        """The host knows now of all that came before, on other streams too."""
        stream = self._stream
        if stream is None:
            return
        items = stream.items[stream.synchronized : self._position]
        stream.synchronized = max(stream.synchronized, self._position)
        for item in items:
            if isinstance(item, Event):
                item._settle()
            else:
                item.settled = True


class Accelerator(CPU_Accelerator):
    def __init__(self, machine: "LazyStreams"):
        super().__init__()
        self._machine = machine

    @property
    def Stream(self) -> Callable[[], Stream]:
        return lambda: Stream(self._machine)

    @property
    def Event(self) -> Callable[[], Event]:
        return lambda: Event(self._machine)

    def current_stream(self, device_index: Any = None) -> Stream:
        return self._machine.lane or self._machine.computation

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._machine.lane = self._machine.lane, stream
        try:
            yield
        finally:
            self._machine.lane = before


class LazyStreams(TorchDispatchMode):
    """While inside, ``hift_ds.state.transfer`` has an accelerator with lazy streams; DeepSpeed keeps its own.

    Attributes:
        time: counts the computations.
        copies: how many were queued.
    """

    def __init__(self) -> None:
        super().__init__()
        skip_on_a_device()
        self.streams: list[Stream] = []
        self.computation = Computation(self)
        self.lane: Stream | None = None
        self.time = self.copies = 0
        self._running = False
        self._host: set[int] = set()
        self._read: dict[int, int] = {}  # storages, and when they were last read and written by a computation
        self._written: dict[int, int] = {}
        self._watched: set[int] = set()
        self._copies: list[_Copy] = []
        self._patches = ExitStack()

    def __enter__(self) -> "LazyStreams":
        allocate, accelerator = HostMemory.empty, Accelerator(self)

        def empty(host: HostMemory, like: torch.Tensor, **options: Any) -> torch.Tensor:
            buffer = allocate(host, like, **options)
            self._watch(buffer)
            self._host.add(key(buffer))
            return buffer

        def outlives(lane: Lane, tensor: torch.Tensor) -> None:
            for copy in self._copies:
                for place in (copy.target, copy.source):
                    if place.key == key(tensor):
                        place.kept = tensor.untyped_storage()

        make = hift_ds.state.direct_io._Channel.__init__

        def channel(one: hift_ds.state.direct_io._Channel, *args: Any) -> None:
            make(one, *args)
            self._watch(one.buffer)
            self._host.add(key(one.buffer))

        def at_once(work: Callable[..., Any], *args: Any) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(work(*args))
            return done

        for patch in (
            mock.patch.object(HostMemory, "empty", empty),
            mock.patch.object(hift_ds.state.direct_io._Channel, "__init__", channel),
            mock.patch.object(hift_ds.state.direct_io.ThreadPoolExecutor, "submit", lambda _, *call: at_once(*call)),
            mock.patch.object(Lane, "outlives", outlives),  # which otherwise speaks to the allocator of a device
            mock.patch.object(hift_ds.state.transfer, "get_accelerator", lambda: accelerator),
        ):
            self._patches.enter_context(patch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let queued copies run, unwatched."""
        before, self._running = self._running, True
        try:
            yield
        finally:
            self._running = before

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._watched:
            self._watched.add(storage._cdata)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, address: int) -> None:
        self._watched.discard(address)
        self._host.discard(address)
        self._read.pop(address, None)
        self._written.pop(address, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if self._running or is_view:
            return func(*args, **kwargs)
        if self.lane is not None:
            assert func is torch.ops.aten.copy_.default, f"{func} on a stream that is for copies"
            return self._queue(self.lane, *args[:2])
        self.time += 1
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors(value):
                self._touch(tensor, writes)
        result = func(*args, **kwargs)
        for tensor in tensors(result):
            self._watch(tensor)
            self._written[key(tensor)] = self.time
        return result

    def _queue(self, lane: Stream, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        assert target.is_contiguous() and source.is_contiguous()
        racing = False
        if key(target) not in self._host:
            last = max(self._read.get(key(target), 0), self._written.get(key(target), 0))
            racing |= last > lane.knows
        if key(source) not in self._host:
            racing |= self._written.get(key(source), 0) > lane.knows
        places = [_Place(tensor, keep=key(tensor) in self._host) for tensor in (target, source)]
        copy = _Copy(*places, racing, to_host=key(target) in self._host)
        lane.items.append(copy)
        self._copies = [known for known in self._copies if not known.settled] + [copy]
        self.copies += 1
        return target

    def _touch(self, tensor: torch.Tensor, writes: bool) -> None:
        """A computation, or the host itself, is about to use a tensor."""
        for copy in self._copies:
            if not copy.settled and copy.target.overlaps(tensor):
                with self.running():
                    spoil(copy.target.tensor())
        self._watch(tensor)
        (self._written if writes else self._read)[key(tensor)] = self.time
