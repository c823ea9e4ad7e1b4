"""An accelerator whose streams do what a program has made certain, and no more.

Each stream, and the host, has a clock, and knows how far the others were when it last waited for them. As in a race
detector, an operation that reads what another stream wrote, or writes what another stream read or wrote, must know of
that access: through an event, another stream that knows of it, or the host. Otherwise :class:`MissingWait` is raised.
So it is if memory goes back to the allocator while a stream may still use it.

Computations run at once. A copy between host and device on a stream other than the main one runs at the last moment:
when something waits for it. Until then its target is NaN and its source may change, so that code whose operations are
not PyTorch's (I/O, views of NumPy, kernels of extensions) works with wrong numbers if it does not wait.

The operations can be recorded, with their work and with what they wait for, for the planner's simulation of a device.
"""

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import hift_ds.state.direct_io
import hift_ds.state.encoded
import hift_ds.state.transfer
from hift_ds.planner.timeline import HOST, MAIN, TO_DEVICE, TO_HOST, Operation, has_kernel, work_of
from hift_ds.state.allocator import HostMemory, scratch
from hift_ds.state.direct_io import DirectIO
from hift_ds.state.transfer import Lane
from tests.support.device_memory import COPIES, key, skip_on_a_device, tensors

# The host waits for the values or the shapes of these.
_RESULTS_ON_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class MissingWait(AssertionError):
    """An operation did not wait for another one that uses the same memory."""


class Clock:
    """What one stream, or the host, knows of itself and the others: for each the number of its last known operation."""

    def __init__(self, name: str):
        self.name = name
        self.knows: dict[Clock, int] = {self: 0}

    def learn(self, other: "dict[Clock, int]") -> None:
        for clock, time in other.items():
            self.knows[clock] = max(self.knows.get(clock, 0), time)

    def tick(self) -> int:
        self.knows[self] += 1
        return self.knows[self]

    def has_seen(self, access: "_Access") -> bool:
        return self.knows.get(access.clock, 0) >= access.time


class _Access(NamedTuple):
    """The last operation of a stream or the host, of its kind, on some bytes of a storage."""

    begin: int
    end: int
    writes: bool
    clock: Clock
    time: int
    name: str

    def overlaps(self, begin: int, end: int) -> bool:
        return begin < self.end and self.begin < end


@dataclass
class _Memory:
    """What is known of a storage.

    Attributes:
        place: "device", "host", or "scalar": a number made from nothing, which the host knows.
        owner: the stream that it was made on, which may reuse the memory as soon as Python lets go of it.
        outlived_by: streams that the allocator waits for before it reuses the memory.
    """

    place: str
    owner: Clock
    accesses: list[_Access] = field(default_factory=list)
    outlived_by: set[Clock] = field(default_factory=set)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte in its storage and the one after the last."""
    begin = tensor.storage_offset() * tensor.element_size()
    if not tensor.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


class _Place:
    """Elements of a storage, which they do not keep alive unless asked to: on a device, the owners alone do."""

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
        return key(tensor) == self.key and begin < self._end and self._begin < end


class _Copy:
    """A copy between host and device that has not run yet."""

    def __init__(self, target: _Place, source: _Place):
        self.places = target, source

    def __call__(self) -> None:
        target, source = (place.tensor() for place in self.places)
        target.copy_(source)


class Stream(Clock):
    """A queue of copies between host and device, and of other streams' positions to wait for.

    Attributes:
        computes: the first computation was issued here; to wait is then to let others run at once.
        last: what comes next waits for these operations of the recorded program.
    """

    def __init__(self, machine: "LazyStreams"):
        super().__init__(f"stream {len(machine.streams)}" if machine.streams else "the main stream")
        self._machine = machine
        self.computes = not machine.streams
        self.items: list[Callable[[], None] | None] = []  # None: it ran
        self._done = 0
        self.last: set[int] = set()
        machine.streams.append(self)

    def wait_event(self, event: "Event") -> None:
        self.learn(event.knows)
        self.last = self.last | event.last
        self.items.append(event.runner())
        if self.computes:
            self.run()

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self._machine)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = Event(self._machine)
        event.record(self)
        event.synchronize()

    def run(self, end: int | None = None) -> None:
        """Let the first items run; None: all."""
        end = len(self.items) if end is None else end
        while self._done < end:
            number, self._done = self._done, self._done + 1
            item, self.items[number] = self.items[number], None
            if item is not None:
                with self._machine.unwatched():
                    item()

    def queued(self) -> list[_Copy]:
        return [item for item in self.items[self._done :] if isinstance(item, _Copy)]


class Event:
    def __init__(self, machine: "LazyStreams"):
        self._machine = machine
        self._stream: Stream | None = None
        self._position = 0
        self.knows: dict[Clock, int] = {}
        self.last: set[int] = set()

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or self._machine.current
        self._position = len(self._stream.items)
        self.knows = dict(self._stream.knows)
        self.last = self._stream.last

    def runner(self) -> Callable[[], None]:
        """Lets everything run that came before the event was recorded."""
        stream, position = self._stream, self._position
        return lambda: stream.run(position) if stream is not None else None

    def synchronize(self) -> None:
        self.runner()()
        self._machine.host.learn(self.knows)
        self._machine.record(Operation(HOST, after=tuple(sorted(self.last))))


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
        return self._machine.current

    def default_stream(self, device_index: Any = None) -> Stream:
        return self._machine.streams[0]

    def synchronize(self, device_index: Any = None) -> None:
        for stream in self._machine.streams:
            stream.synchronize()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._machine.current = self._machine.current, stream
        try:
            yield
        finally:
            self._machine.current = before


class Late(Future[Any]):
    """Work of an I/O thread that is done when somebody waits for it."""

    def __init__(self, *work: Any):
        super().__init__()
        self._work: tuple[Any, ...] = work

    def result(self, timeout: float | None = None) -> Any:
        self._run()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._run()
        return super().exception(timeout)

    def _run(self) -> None:
        (work, *args), self._work = self._work or (None,), ()
        if work is None:
            return
        try:
            self.set_result(work(*args))
        except OSError as error:
            self.set_exception(error)


class LazyStreams(TorchDispatchMode):
    """While inside, ``hift_ds.state.transfer`` has an accelerator with lazy streams; DeepSpeed keeps its own.

    Args:
        record: keep the program.

    Attributes:
        host: the clock of the host, which uses host memory and knows whatever it waited for.
        streams: all streams; the first is the main one.
        current: the stream that operations on the device are issued on.
        copies: how many copies were queued.
        program: what was issued on the streams, and where the host waited, if it is recorded.
    """

    def __init__(self, record: bool = False) -> None:
        super().__init__()
        skip_on_a_device()
        self.host = Clock("the host")
        self.streams: list[Stream] = []
        self.current = self._main = Stream(self)
        self.copies = 0
        self.program: list[Operation] = []
        self._records = record
        self._is_unwatched = False
        self._memory: dict[int, _Memory] = {}
        self._freed_in_use: list[str] = []
        self._has_raised = False
        self._patches = ExitStack()

    def __enter__(self) -> "LazyStreams":
        allocate, accelerator = HostMemory.empty, Accelerator(self)

        def empty(host: HostMemory, like: torch.Tensor, **options: Any) -> torch.Tensor:
            buffer = allocate(host, like, **options)
            self._declare_host(buffer)
            return buffer

        def outlives(lane: Lane, tensor: torch.Tensor) -> None:
            stream = lane._stream
            assert isinstance(stream, Stream)
            self._memory_of(tensor).outlived_by.add(stream)
            for copy in stream.queued():
                for place in copy.places:
                    if place.key == key(tensor):
                        place.kept = tensor.untyped_storage()

        files, add_file = hift_ds.state.direct_io, DirectIO.add_file
        locked, by_handle, by_system = DirectIO._locked, files._Handles.read, files._read_by_system

        def host_memory(direct: DirectIO, *args: Any) -> torch.Tensor:
            memory = locked(direct, *args)
            self._declare_host(memory)
            return memory

        def declared(direct: DirectIO, mapped: torch.Tensor, fd: int) -> None:
            self._declare_host(mapped)
            add_file(direct, mapped, fd)

        def in_scratch(*args: Any) -> torch.Tensor:
            values = scratch(*args)
            self._declare_host(values)
            return values

        def overwriting(read_into: Callable[..., Any]) -> Callable[..., Any]:
            """Nobody sees that the system writes to the memory."""

            def call(*args: Any) -> Any:
                next(arg for arg in args if torch.is_tensor(arg)).fill_(255)
                return read_into(*args)

            return call

        def at_once(_: Any, work: Callable[..., Any], *args: Any) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(work(*args))
            return done

        to_list = torch.Tensor.tolist  # is no operation

        def read(tensor: torch.Tensor) -> Any:
            if self._memory_of(tensor).place == "device":
                self._host_waits()
            return to_list(tensor)

        for patch in (
            mock.patch.object(torch.Tensor, "tolist", read),
            mock.patch.object(HostMemory, "empty", empty),
            mock.patch.object(hift_ds.state.encoded, "scratch", in_scratch),
            mock.patch.object(DirectIO, "_locked", host_memory),
            mock.patch.object(DirectIO, "add_file", declared),
            mock.patch.object(files._Handles, "read", overwriting(by_handle)),
            mock.patch.object(files, "_read_by_system", overwriting(by_system)),
            mock.patch.object(files._Handles, "submit", lambda _, *work: Late(*work)),
            mock.patch.object(files.ThreadPoolExecutor, "submit", at_once),
            mock.patch.object(Lane, "outlives", outlives),  # which otherwise speaks to the allocator of a device
            mock.patch.object(hift_ds.state.transfer, "get_accelerator", lambda: accelerator),
        ):
            self._patches.enter_context(patch)
        return super().__enter__()

    def __exit__(self, kind: Any = None, *error: Any) -> None:
        self._patches.close()
        super().__exit__(kind, *error)
        self._is_unwatched = True
        if kind is None and not self._has_raised:
            self._raise_freed()

    def record(self, operation: Operation) -> None:
        """Append an operation to the program: on the current stream, or a wait of the host."""
        if self._records and operation.stream == HOST:
            self.program.append(operation)
        elif self._records:
            name = MAIN if self.current is self._main else self.current.name
            after = tuple(sorted(self.current.last))
            self.current.last = {len(self.program)}
            self.program.append(operation._replace(stream=name, after=after))

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        before, self._is_unwatched = self._is_unwatched, True
        try:
            yield
        finally:
            self._is_unwatched = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if self._is_unwatched or is_view:
            return func(*args, **kwargs)
        self._raise_freed()
        name, given = str(func), tensors(args, kwargs)
        places = {self._memory_of(tensor).place for tensor in given}
        between = func in COPIES and places >= {"host", "device"}
        asynchronous = between and bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if between and self.current is not self._main:
            pairs = [args[:2]] if func is torch.ops.aten.copy_.default else list(zip(*args[:2], strict=True))
            for target, source in pairs:
                self._queue(self.current, target, source, name)
            to_host = self._memory_of(pairs[0][0]).place == "host"
            self.record(Operation("", TO_HOST if to_host else TO_DEVICE, nbytes=sum(t.nbytes for t, _ in pairs)))
            if not asynchronous:
                self.current.synchronize()
            return args[0] if returns else None
        clock = self.host if "host" in places and "device" not in places else self.current
        if clock is self.current:
            self.current.computes = True
            self.current.run()  # what it waited for before
            clock.learn(self.host.knows)
        time = clock.tick()
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors(value):
                if writes and "device" in places and self._memory_of(tensor).place == "scalar":
                    self._memory_of(tensor).place = "device"
                self._use(tensor, writes, clock, time, name)
        result = func(*args, **kwargs)
        known = {key(tensor) for tensor in given}
        for tensor in tensors(result):
            if key(tensor) not in known:  # else it is an alias, or what was written in place
                made = places - {"scalar"} or ({"device"} if tensor.dim() else {"scalar"})
                self._memory_of(tensor, min(made))  # "device" comes before "host"
                self._use(tensor, True, clock, time, name)
        if (
            self._records
            and has_kernel(func)
            and any(self._memory_of(one).place == "device" for one in (*given, *tensors(result)))
        ):
            self.record(work_of(func, args, kwargs, result))
        if "device" in places and (between and not asynchronous or set(func.tags) & set(_RESULTS_ON_HOST)):
            self._host_waits()
        return result

    def _host_waits(self) -> None:
        """The host waits for the current stream."""
        self.host.learn(self.current.knows)
        self.record(Operation(HOST, after=tuple(sorted(self.current.last))))

    def _queue(self, lane: Stream, target: torch.Tensor, source: torch.Tensor, name: str) -> None:
        assert target.is_contiguous() and source.is_contiguous()
        lane.learn(self.host.knows)
        time = lane.tick()
        self._use(source, False, lane, time, name)
        self._use(target, True, lane, time, name)
        queued = [place for stream in self.streams for copy in stream.queued() for place in copy.places]
        if not any(place.overlaps(target) for place in queued):
            with self.unwatched():
                target.fill_(torch.nan if target.is_floating_point() else 255)  # bytes of NaNs
        places = [_Place(tensor, keep=self._memory_of(tensor).place == "host") for tensor in (target, source)]
        lane.items.append(_Copy(*places))
        self.copies += 1

    def _memory_of(self, tensor: torch.Tensor, place: str | None = None) -> _Memory:
        """The entry of a tensor's storage. A new one gets the place; None: it was made before, or by the host."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            place = place or ("device" if tensor.dim() else "scalar")
            self._memory[storage._cdata] = _Memory(place, self.host if place == "host" else self.current)
            weakref.finalize(storage, self._gone, storage._cdata).atexit = False
        return self._memory[storage._cdata]

    def _declare_host(self, buffer: torch.Tensor) -> None:
        memory = self._memory_of(buffer)
        memory.place, memory.owner = "host", self.host
        memory.accesses.clear()  # the allocation, which looked like one on the device

    def _use(self, tensor: torch.Tensor, writes: bool, clock: Clock, time: int, name: str) -> None:
        """An operation is about to read or write a tensor; check that it has waited for others that did."""
        memory = self._memory_of(tensor)
        begin, end = _span(tensor)
        if memory.place == "scalar" or begin == end:
            return
        kept = []
        for other in memory.accesses:
            if other.overlaps(begin, end) and (writes or other.writes) and not clock.has_seen(other):
                self._has_raised = True
                raise MissingWait(
                    f"{name} on {clock.name} {'writes' if writes else 'reads'} memory that {other.name} on "
                    f"{other.clock.name} {'writes' if other.writes else 'reads'}, and has not waited for it"
                )
            # A later access stands for an earlier one if who waits for it has waited for both.
            is_inside = begin <= other.begin and other.end <= end
            if not (is_inside and (writes or other.clock is clock and not other.writes)):
                kept.append(other)
        memory.accesses = [*kept, _Access(begin, end, writes, clock, time, name)]

    def _gone(self, address: int) -> None:
        """Python let go of a storage. The allocator may reuse its memory for what is issued next on the owner."""
        memory = self._memory.pop(address)
        if self._is_unwatched or memory.place != "device":
            return
        for access in memory.accesses:
            known = access.clock is memory.owner or access.clock in memory.outlived_by
            if not (known or memory.owner.has_seen(access) or self.host.has_seen(access)):
                self._freed_in_use.append(
                    f"memory of {memory.owner.name} was freed while {access.name} on {access.clock.name} may still use "
                    "it: record_stream (Lane.outlives) is missing"
                )

    def _raise_freed(self) -> None:
        found, self._freed_in_use = self._freed_in_use, []
        if found:
            self._has_raised = True
            raise MissingWait("; ".join(found))
