"""Device discipline on a machine without a device: which storages would be on one, how many bytes, and who mixes them.

Host memory is what ``HostMemory`` hands out, what a test declares, and whatever is computed from such tensors alone.
Every other storage counts as device memory.
"""

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hift_ds.state import encoded
from hift_ds.state.allocator import HostMemory

# What may have one foot on either side.
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)


def skip_on_a_device() -> None:
    """Skips the test where the device is a real one: this one is simulated in host memory."""
    if os.environ.get("DS_ACCELERATOR", "cpu") != "cpu":
        pytest.skip("a simulated device, for machines without one")


def key(tensor: torch.Tensor) -> int:
    """Of a tensor's storage, unique while it lives."""
    return tensor.untyped_storage()._cdata


def tensors(*things: Any) -> list[torch.Tensor]:
    """Those in nested arguments that have memory of their own."""
    return [
        leaf
        for leaf in tree_leaves(things)
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"
    ]


@dataclass
class _Storage:
    place: str  # "device", "host", or "scalar": a number made from nothing, which may go anywhere
    label: str
    nbytes: int


class DeviceMemory(TorchDispatchMode):
    """Watches every operation inside: refuses to mix host and device, and counts live device bytes by label.

    What was made before, and is not declared, counts as device memory labelled ``"outside"``.

    Attributes:
        live: device bytes now, by the label under which each storage was made, and as ``"total"``.
        peak: the highest of each since the last ``reset``.
        operations, copies: how many operations had tensors, and how many of them copied between host and device.
    """

    def __init__(self) -> None:
        super().__init__()
        skip_on_a_device()
        self._storages: dict[int, _Storage] = {}
        self._label, self._place = "other", "device"
        self._patches = ExitStack()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.operations = self.copies = 0

    def __enter__(self) -> "DeviceMemory":
        self._patches.enter_context(self.placed_on_host(HostMemory, "empty"))
        self._patches.enter_context(self.placed_on_host(encoded, "_zeros"))  # of masters that are decoded into files
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages that are made inside count under the label; the innermost label holds."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def labels(self, label: str, owner: Any, name: str) -> Any:
        """A patch after which all that is made in calls of that method counts under the label."""
        return _around(owner, name, lambda: self.labelled(label))

    def placed_on_host(self, owner: Any, name: str) -> Any:
        """A patch after which tensors that calls of that method make from nothing are in host memory."""

        @contextmanager
        def placed() -> Iterator[None]:
            before, self._place = self._place, "host"
            try:
                yield
            finally:
                self._place = before

        return _around(owner, name, placed)

    def declare(self, things: Iterable[torch.Tensor], place: str = "device", label: str | None = None) -> None:
        """Say where these tensors are, and under which label they count."""
        for tensor in things:
            storage = self._of(tensor, place)
            self._count(storage, -1)
            storage.place, storage.label = place, label or self._label
            self._count(storage, 1)

    def is_host(self, tensor: torch.Tensor) -> bool:
        return self._of(tensor, "device").place == "host"

    def reset(self) -> None:
        """Forget the peaks."""
        self.peak = Counter(self.live)

    def _of(self, tensor: torch.Tensor, place: str) -> _Storage:
        """The entry of a tensor's storage; new ones get the place."""
        memory = tensor.untyped_storage()
        entry = self._storages.get(memory._cdata)
        if entry is None:
            entry = self._storages[memory._cdata] = _Storage(place, self._label, memory.nbytes())
            weakref.finalize(memory, self._gone, memory._cdata)
            self._count(entry, 1)
        elif entry.nbytes != memory.nbytes():  # resized in place
            self._count(entry, -1)
            entry.nbytes = memory.nbytes()
            self._count(entry, 1)
        return entry

    def _gone(self, address: int) -> None:
        self._count(self._storages.pop(address), -1)

    def _count(self, entry: _Storage, sign: int) -> None:
        if entry.place == "device":
            for label in (entry.label, "total"):
                self.live[label] += sign * entry.nbytes
                self.peak[label] = max(self.peak[label], self.live[label])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors(args, kwargs)
        with self.labelled("outside"):  # what has memory that no operation made, inside `placed_on_host`, is there
            entries = [self._of(tensor, self._place) for tensor in inputs]
        places = {entry.place for entry in entries}
        # As on a GPU, a number in host memory may go into a computation on the device.
        fixed = {
            entry.place
            for entry, tensor in zip(entries, inputs, strict=True)
            if tensor.dim() and entry.place != "scalar" or entry.place == "device"
        }
        if len(fixed) > 1:
            assert func in COPIES, f"{func} mixes host and device: " + ", ".join(
                f"{entry.place} {entry.label} {tuple(tensor.shape)}"
                for entry, tensor in zip(entries, inputs, strict=True)
            )
            self.copies += 1
        self.operations += bool(inputs)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            if "device" in places:
                place = "device"
            elif "host" in places:
                place = "host"
            else:
                place = "scalar" if tensor.dim() == 0 and self._place == "device" else self._place
            self._of(tensor, place)
        return result


def _around(owner: Any, name: str, context: Callable[[], Any]) -> Any:
    """A patch after which that method runs inside the context."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return method(*args, **kwargs)

    return mock.patch.object(owner, name, call)
