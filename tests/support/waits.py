"""Waits of the host on a machine without a device: where a GPU would make the host wait, and how often.

The device is ``cpu:0``. Inside :class:`Waits`, the accelerator names it so, and a tensor is on the device if

* it was made with ``device="cpu:0"``, or moved there;
* it was computed from a tensor on the device, or has the shape of one (``zeros_like``, ``new_zeros``);
* or it was made before, and nobody declared it: models are built first.

Every other tensor is in host memory: what was made from Python data or with no device, with ``device="cpu"``, what
``.cpu()`` returns, and what is computed from such tensors alone. Host memory is pageable, unless ``HostMemory`` handed
it out or ``pin_memory`` did. Computation runs at once, as ever. Streams and events only keep count of what was issued.
"""

import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from hift_ds.state.allocator import HostMemory
from tests.support.device_memory import key, skip_on_a_device, tensors
from tests.support.paths import REPOSITORY

DEVICE = torch.device("cpu", 0)
_ATEN = torch.ops.aten
# Operations whose result the host needs, or whose size depends on values. By overload packet.
_NEEDS_VALUES = {
    _ATEN._local_scalar_dense: "item",
    _ATEN.equal: "equal",
    _ATEN.nonzero: "nonzero",
    _ATEN.masked_select: "masked_select",
    _ATEN.bincount: "bincount",
    _ATEN._unique2: "unique",
    _ATEN.unique_consecutive: "unique",
    _ATEN.unique_dim: "unique",
}
_INDEXING = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)
_COPIES = (_ATEN.copy_, _ATEN._foreach_copy_)
_HOST_COLLECTIVES = (
    "barrier",
    "monitored_barrier",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
)
_TENSOR = torch._C.TensorBase
_LEGACY = {  # constructors that an accelerator has
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor)
_FOLDERS = {
    str(REPOSITORY) + "/": "",
    str(Path(deepspeed.__file__).parent) + "/": "deepspeed/",
}
_OF_MODELS = ("transformers", "peft")
# ZeRO 3 puts its own function in the place of `torch.nn.functional.linear`, for the rest of the process. The caller's
# line issues what it computes, as with torch's.
_LINEAR = "deepspeed.runtime.zero.linear"


class _Name(str):
    """The name of the kind of device, "cpu". As the device of a tensor it is the current one."""


@dataclass(frozen=True)
class Wait:
    """One wait of the host.

    Attributes:
        kind: what waits, such as "item".
        site: "file:line" of the innermost line of the project or of DeepSpeed, and, if that is DeepSpeed's, of the
            innermost line of the project.
        in_model: the model's own forward or backward waits.
    """

    kind: str
    site: str
    in_model: bool

    def __str__(self) -> str:
        return f"{self.kind} at {self.site}" + " (in the model)" * self.in_model


class TooEarly(AssertionError):
    """The host reads what a copy that nothing waited for may not have written yet."""


class Stream:
    """A queue of the device. What is issued runs at once; this counts it.

    Attributes:
        issued: operations issued so far.
    """

    def __init__(self, waits: "Waits", *_: Any, **__: Any):
        self._waits = waits
        self.issued = 0
        self._follows: dict[Stream, int] = {}

    def reach(self) -> "dict[Stream, int]":
        """What is certain to be done when all that was issued here is done: operations of each stream."""
        return {**self._follows, self: self.issued}

    def wait_event(self, event: "Event") -> None:
        _merge(self._follows, event.reach)

    def wait_stream(self, other: "Stream") -> None:
        _merge(self._follows, other.reach())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self._waits)
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._waits.host_waits_for(self.reach(), "synchronize of a stream")


class Event:
    """Of a stream. One that was never recorded has passed."""

    def __init__(self, waits: "Waits", *_: Any, **__: Any):
        self._waits = waits
        self.reach: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.reach = (stream or self._waits.stream).reach()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._waits.stream).wait_event(self)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 0.0

    def synchronize(self) -> None:
        self._waits.host_waits_for(self.reach, "synchronize of an event")


def _merge(into: dict[Stream, int], other: Mapping[Stream, int]) -> None:
    for stream, issued in other.items():
        into[stream] = max(issued, into.get(stream, 0))


class Waits:
    """A context that counts each time the host waits for the device, and what it issues.

    These wait: ``item`` and what needs it (``bool``, ``float`` ...), ``tolist``, ``numpy``, ``equal``, operations whose
    size depends on values (``nonzero``, ``masked_select``, an index that is a mask, ``unique``, ``repeat_interleave``
    without ``output_size``), copies between host and device without ``non_blocking`` or to and from pageable memory,
    tensors made on the device from Python data, ``synchronize`` of the accelerator, a stream or an event, barriers and
    collectives of objects. Nothing waits that an earlier wait covers: ``synchronize`` of what is known to be done.
    Collectives of tensors do not wait, as with NCCL. To read host memory before a copy to it has been waited for raises
    :class:`TooEarly`.

    Make the engine inside, so that it gets the names of the device and its streams.

    Attributes:
        seen: the waits since the last :meth:`reset`.
        issued: operations with tensors on the device, views not counted, since then, by the line that issues them, as
            ``Wait.site``. Those of the model's own forward and backward are under ``"model"``.
    """

    def __init__(self) -> None:
        skip_on_a_device()
        self.seen: list[Wait] = []
        self.issued: Counter[str] = Counter()
        self._main = self.stream = Stream(self)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet([self._main])
        self._known: dict[Stream, int] = {}  # what the host knows to be done
        self._places: dict[int, str] = {}  # of storages: "device", "host" or "pinned"; a storage not here is "device"
        # Copies to page-locked memory: storage, first byte and one after the last, what is done when they are.
        self._arriving: list[tuple[int, int, int, dict[Stream, int]]] = []
        self._contexts = ExitStack()

    def __enter__(self) -> Self:
        waits, allocate = self, HostMemory.empty

        def empty(host: HostMemory, like: torch.Tensor, **options: Any) -> torch.Tensor:
            buffer = allocate(host, like, **options)
            waits.declare([buffer], "host" if host.folder else "pinned")
            return buffer

        def pin_memory(_: Any, tensor: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
            return waits.pinned(tensor)

        def synchronize(*_: Any) -> None:
            everything: dict[Stream, int] = {}
            for stream in waits._streams:
                _merge(everything, stream.reach())
            waits.host_waits_for(everything, "synchronize of the accelerator")

        def make(kind: type) -> property:
            def new(*args: Any, **kwargs: Any) -> Any:
                made = kind(waits, *args, **kwargs)
                if isinstance(made, Stream):
                    waits._streams.add(made)
                return made

            return property(lambda _: new)

        replaced = {
            "device_name": lambda _, index=None: _Name("cpu") if index is None else str(DEVICE),
            "current_device_name": lambda _: str(DEVICE),
            "on_accelerator": lambda _, tensor: waits.place(tensor) == "device",
            **{name: property(lambda _, kind=name: waits.legacy(kind)) for name in _LEGACY},
            # What DeepSpeed asks whether it must order what runs on several streams; a GPU answers so.
            "is_synchronized_device": lambda _: False,
            "resolves_data_dependency": lambda _: False,
            "handles_memory_backpressure": lambda _: False,
            "synchronize": synchronize,
            "pin_memory": pin_memory,
            "is_pinned": lambda _, tensor: waits.place(tensor) == "pinned",
            "Stream": make(Stream),
            "Event": make(Event),
            "current_stream": lambda _, index=None: waits.stream,
            "default_stream": lambda _, index=None: waits._main,
            "stream": lambda _, stream: waits._issuing_on(stream),
        }
        for name, value in replaced.items():
            self._contexts.enter_context(mock.patch.object(CPU_Accelerator, name, value))
        self._contexts.enter_context(mock.patch.object(HostMemory, "empty", empty))
        self._contexts.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        for name in _HOST_COLLECTIVES:
            original = getattr(torch.distributed, name)

            def collective(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                with waits._paused():
                    result = _original(*args, **kwargs)
                waits.host_waits_for(None, _name)
                return result

            self._contexts.enter_context(mock.patch.object(torch.distributed, name, collective))
        # Hooks see the two names of the device in one computation and its repetition.
        self._contexts.enter_context(mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=_metadata))
        # Otherwise torch would run backward, and the hooks in it, without the mode below.
        self._contexts.enter_context(mock.patch.object(torch.autograd, "has_torch_function", lambda _: False))
        self._contexts.enter_context(_Operations(self))
        self._contexts.enter_context(_Calls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.close()

    def reset(self) -> None:
        """Forget what was seen."""
        self.seen = []
        self.issued = Counter()

    def outside_the_model(self) -> list[Wait]:
        """The waits that are not those of the model's own forward and backward."""
        return [wait for wait in self.seen if not wait.in_model]

    def report(self) -> str:
        """The waits seen, by line, one a line, for a message."""
        return "\n".join(f"{number} x {wait}" for wait, number in Counter(self.seen).most_common())

    def declare(self, things: Iterable[torch.Tensor], place: str) -> None:
        """Say where tensors are: "device", "host" (pageable) or "pinned"."""
        for tensor in things:
            self._put(tensor, place)

    def place(self, tensor: torch.Tensor) -> str:
        """Where a tensor is: "device", "host" (pageable) or "pinned"."""
        return self._places.get(key(tensor), "device")

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in page-locked memory."""
        with self._paused():
            copy = tensor.detach().clone()
        self._put(copy, "pinned")
        return copy

    def legacy(self, name: str) -> Callable[..., torch.Tensor]:
        """The accelerator's constructor of that name: from a size, or from values."""

        def make(*given: Any) -> torch.Tensor:
            is_size = all(isinstance(one, int) for one in given)
            return (torch.empty if is_size else torch.tensor)(*given, dtype=_LEGACY[name], device=DEVICE)

        return make

    def host_waits_for(self, reach: "Mapping[Stream, int] | None", kind: str) -> None:
        """Count a wait for what was issued on streams, unless the host knows it to be done; None: the current one."""
        if reach is not None and all(self._known.get(stream, 0) >= issued for stream, issued in reach.items()):
            return
        _merge(self._known, self.stream.reach() if reach is None else reach)
        site, in_model = _site()
        self.seen.append(Wait(kind, site, in_model))

    # ---- what the two modes call -------------------------------------------------------------------------------

    def _put(self, tensor: torch.Tensor, place: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._places:
            weakref.finalize(storage, self._places.pop, storage._cdata, None)
        self._places[storage._cdata] = place

    @contextmanager
    def _issuing_on(self, stream: Stream | None) -> Iterator[None]:
        before, self.stream = self.stream, stream or self.stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _paused(self) -> Iterator[None]:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield

    def _issue(self) -> None:
        self.stream.issued += 1
        site, in_model = _site()
        self.issued["model" if in_model else site] += 1

    def _copied(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        """A copy between host and device was issued."""
        to, of = self.place(target), self.place(source)
        if not target.numel() or "device" not in (to, of) or to == of:
            return
        if not non_blocking:
            self.host_waits_for(None, f"blocking copy to the {'device' if to == 'device' else 'host'}")
        elif "host" in (to, of):
            self.host_waits_for(None, f"copy {'from' if to == 'device' else 'to'} pageable memory")
        elif of == "device":
            first = target.storage_offset() * target.element_size()
            self._arriving = [one for one in self._arriving if not self._knows(one[3])]
            self._arriving.append((key(target), first, first + target.nbytes, self.stream.reach()))

    def _knows(self, reach: Mapping[Stream, int]) -> bool:
        return all(self._known.get(stream, 0) >= issued for stream, issued in reach.items())

    def _read_on_host(self, tensor: torch.Tensor) -> None:
        first = tensor.storage_offset() * tensor.element_size()
        for storage, begin, end, reach in self._arriving:
            if storage == key(tensor) and first < end and begin < first + tensor.nbytes and not self._knows(reach):
                raise TooEarly(f"the host reads page-locked memory at {_site()[0]}; nothing has waited for its copy")

    def _dispatched(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = tensors(args, kwargs)
        on_device = [tensor for tensor in inputs if self.place(tensor) == "device" and not _is_new_data(func)]
        packet = func.overloadpacket
        if packet in _COPIES:
            result = func(*args, **kwargs)
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            pairs = [(args[0], args[1])] if packet is _ATEN.copy_ else zip(args[0], args[1], strict=True)
            if on_device:
                self._issue()
            for target, source in pairs:
                self._copied(target, source, non_blocking)
            return result
        if on_device and not _is_view(func):
            self._issue()
        if on_device and (kind := self._needs_values(packet, args, kwargs)):
            self.host_waits_for(None, kind)
        if not on_device and not _is_view(func) and not _is_made_alike(func):
            for tensor in inputs:
                self._read_on_host(tensor)
        result = func(*args, **kwargs)
        device = kwargs.get("device")
        if device != DEVICE if device is not None else not on_device:
            for tensor in tensors(result):
                if key(tensor) not in self._places:
                    self._put(tensor, "host")
        return result

    def _needs_values(self, packet: Any, args: Any, kwargs: Mapping[str, Any]) -> str | None:
        """The kind of wait if the host must know values of tensors on the device for the operation."""
        if packet in _NEEDS_VALUES:
            return _NEEDS_VALUES[packet]
        if packet is _ATEN.repeat_interleave:
            return None if kwargs.get("output_size") is not None else "repeat_interleave"
        if packet not in _INDEXING:
            return None
        indices = [index for index in args[1] if index is not None]
        if not any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return None
        # One number of the host under one mask: torch fills, and needs no indices.
        is_filled = packet is not _ATEN.index and len(indices) == 1 and args[2].numel() == 1
        return None if is_filled and self.place(args[2]) != "device" else "index by a mask"


def _metadata(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": tensor.shape, "dtype": tensor.dtype}


def _is_made_alike(func: Any) -> bool:
    """Whether the operation needs the shape of its tensor alone."""
    name = func.overloadpacket.__name__
    return name.endswith("_like") or name.startswith("new_")


def _is_new_data(func: Any) -> bool:
    return func.overloadpacket is _ATEN.lift_fresh


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._waits._dispatched(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What never becomes an operation, because to torch both sides are the same device."""

    def __init__(self, waits: Waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: DEVICE if isinstance(value, _Name) else value for name, value in (kwargs or {}).items()}
        args = tuple(DEVICE if isinstance(value, _Name) else value for value in args)
        special = self._SPECIAL.get(func)
        if special is not None:
            return special(self, *args, **kwargs)
        if func in _FROM_DATA:
            return self._from_data(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _device(self, tensor: torch.Tensor) -> torch.device:
        if tensor.device.type == "cpu" and self._waits.place(tensor) == "device":
            return DEVICE
        return torch.device(tensor.device)

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = dict(kwargs)
        rest = list(args)
        if rest and not isinstance(rest[0], torch.dtype | torch.Tensor):
            given["device"] = rest.pop(0)
        elif rest and isinstance(rest[0], torch.Tensor):
            given["other"] = rest.pop(0)
        if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
            given["dtype"] = rest.pop(0)
        given |= dict(zip(("non_blocking", "copy"), rest, strict=False))
        if (other := given.pop("other", None)) is not None:
            given |= {"device": self._device(other), "dtype": other.dtype}
        given = {name: value for name, value in given.items() if value is not None}
        place = given.pop("device", None)
        if place is not None and not (torch.device(place).type == tensor.device.type == "cpu"):
            return tensor.to(device=place, **given)
        to_device = None if place is None else torch.device(place) == DEVICE
        if to_device in (None, self._waits.place(tensor) == "device"):
            given.pop("non_blocking", None)
            return tensor.to(**given) if given else tensor
        return self._moved(tensor, bool(to_device), given.get("dtype"), given.get("non_blocking", False))

    def _moved(
        self, tensor: torch.Tensor, to_device: bool, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> torch.Tensor:
        target = torch.empty_like(
            tensor, dtype=dtype, device=DEVICE if to_device else torch.device("cpu"), requires_grad=False
        )
        self._waits.declare([target], "device" if to_device else "host")
        return target.copy_(tensor, non_blocking=non_blocking)

    def _cpu(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self._moved(tensor, False) if self._waits.place(tensor) == "device" else tensor

    def _to_python(self, func: Callable[..., Any], kind: str, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._waits.place(tensor) == "device":
            self._waits.host_waits_for(None, kind)
        else:
            self._waits._read_on_host(tensor)
        return func(tensor, *args, **kwargs)

    def _from_data(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        data = args[1] if func is torch.Tensor.new_tensor else args[0] if args else kwargs.get("data")
        device = kwargs.get("device")
        if device is None and func is torch.Tensor.new_tensor:
            device = self._device(args[0])
        to_device = device is not None and torch.device(device) == DEVICE
        if isinstance(data, torch.Tensor):
            if func in (torch.as_tensor, torch.asarray):
                return data if device is None else self._to(data, device, kwargs.get("dtype"))
            to_device |= device is None and self._waits.place(data) == "device"
            result = func(*args, **kwargs)
            self._waits.declare([result], "device" if to_device else "host")
            return result
        result = func(*args, **kwargs)
        self._waits.declare([result], "device" if to_device else "host")
        if to_device:
            self._waits.host_waits_for(None, "tensor from Python data")
        return result

    def _backward(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(torch.Tensor.backward).bind(tensor, *args, **kwargs).arguments
        with self:  # torch calls a function without the mode, and hooks would not be watched
            torch.autograd.backward(
                tensor,
                bound.get("gradient"),
                bound.get("retain_graph"),
                bound.get("create_graph", False),
                inputs=bound.get("inputs"),
            )

    _SPECIAL: dict[Any, Callable[..., Any]] = {
        _TENSOR.device.__get__: _device,  # type: ignore[attr-defined]
        _TENSOR.to: _to,
        _TENSOR.cpu: _cpu,
        _TENSOR.tolist: lambda self, *args: self._to_python(_TENSOR.tolist, "tolist", *args),
        _TENSOR.numpy: lambda self, *args, **kwargs: self._to_python(_TENSOR.numpy, "numpy", *args, **kwargs),
        torch.Tensor.__array__: lambda self, *args: self._to_python(torch.Tensor.__array__, "numpy", *args),
        _TENSOR.pin_memory: lambda self, tensor, *_: self._waits.pinned(tensor),
        _TENSOR.is_pinned: lambda self, tensor, *_: self._waits.place(tensor) == "pinned",
        torch.Tensor.backward: _backward,
    }


def _site() -> tuple[str, bool]:
    """Of the line that runs: ``Wait.site``, and whether it is the model's own."""
    frame, sites, is_backward = sys._getframe(1), [], False
    while frame is not None:
        code = frame.f_code
        if not sites and code.co_name in ("_engine_run_backward", "_make_grads"):
            is_backward = True
        name = frame.f_globals.get("__name__", "")
        if not sites and name.split(".")[0] in _OF_MODELS:
            return f"{name.replace('.', '/')}.py:{frame.f_lineno}", True
        for folder, shown in _FOLDERS.items():
            path = code.co_filename
            is_inside = path.startswith(folder) and "/.venv/" not in path[len(folder) - 1 :]
            if is_inside and path != __file__ and name != _LINEAR:
                if is_backward and not sites:
                    return f"{shown}{path[len(folder) :]}:{frame.f_lineno}", True
                sites.append(f"{shown}{path[len(folder) :]}:{frame.f_lineno}")
                if not shown:
                    return " from ".join((sites[0], sites[-1]) if len(sites) > 1 else sites), False
                break
        frame = frame.f_back  # type: ignore[assignment]
    return sites[0] if sites else "elsewhere", False
