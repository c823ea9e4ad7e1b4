"""The arena of host memory: what it registers, when it lets go, its fallbacks, and what torch's rounding would cost."""

import contextlib
import ctypes
import errno
import gc
import os
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.utils import logger

from hift_ds.state import arena as module
from hift_ds.state.allocator import HostMemory
from hift_ds.state.arena import ALIGNMENT, Arena, Region

MIB = 2**20


class Accelerator:
    """A device that page-locks memory: it registers what it is given, and rounds up its own as torch does.

    Args:
        registers: what `register_host_memory` does: True or False is its answer, text an error.
        pins: whether `pin_memory` works.
    """

    def __init__(self, registers: bool | str = True, pins: bool = True):
        self._registers, self._pins = registers, pins
        self.registered: dict[int, int] = {}
        self.released: list[int] = []
        self.pinned: list[int] = []
        self.slabs: list[torch.UntypedStorage] = []
        self.calls: list[str] = []
        self.breaks = False

    def device_name(self) -> str:
        return "fake"

    def current_device_name(self) -> str:
        return "cpu"

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def register_host_memory(self, address: int, nbytes: int) -> bool:
        if isinstance(self._registers, str):
            raise RuntimeError(self._registers + "\nand a long trace")
        if self._registers:
            self.registered[address] = nbytes
        return self._registers

    def unregister_host_memory(self, address: int) -> None:
        self.calls.append("unregister")
        if self.breaks:
            raise RuntimeError("an illegal memory access was encountered")
        self.released.append(ctypes.string_at(address, 1)[0])  # ends this process if it is not mapped any more
        del self.registered[address]

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True) -> torch.Tensor:
        if not self._pins:
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")
        self.pinned.append(1 << (tensor.nbytes - 1).bit_length())
        self.slabs.append(slab := torch.empty_like(tensor).untyped_storage())
        return torch.empty(0, dtype=tensor.dtype).set_(slab)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    accelerator = Accelerator(**getattr(request, "param", {}))
    with mock.patch.object(module, "get_accelerator", lambda: accelerator):
        yield accelerator


def flat(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="meta")


def addresses(buffers: list[torch.Tensor]) -> list[tuple[int, int]]:
    return sorted((buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in buffers)


def test_buffers_follow_each_other_and_have_storages_of_their_own(device: Accelerator) -> None:
    arena = Arena(pin_memory=True)
    arena.reserve(6 * ALIGNMENT)
    likes = [torch.empty(3, 7), torch.empty(70, dtype=torch.bfloat16), torch.empty(()), torch.empty(0, 4), flat(257)]
    buffers = [arena.empty(like) for like in likes]
    for buffer, like in zip(buffers, likes, strict=True):
        assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == (like.shape, like.dtype, True)
        assert buffer.untyped_storage().nbytes() == like.numel() * like.element_size()
        assert buffer.untyped_storage().data_ptr() == buffer.data_ptr() and buffer.data_ptr() % ALIGNMENT == 0
    ends = addresses([buffer for buffer in buffers if buffer.numel()])
    assert all(0 <= begin - end < ALIGNMENT for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    assert list(device.registered.values()) == [6 * ALIGNMENT]


def test_memory_is_unregistered_after_its_last_buffer_and_before_it_is_unmapped(device: Accelerator) -> None:
    arena = Arena(pin_memory=True)
    arena.reserve(2 * MIB)
    first, second = arena.empty(flat(MIB)), arena.empty(flat(MIB))
    first.fill_(7)
    view = second[5:9]
    del arena, second
    assert device.registered and not device.calls
    view.fill_(3)
    del view
    assert device.registered
    del first
    assert not device.registered and device.released == [7]
    assert device.calls == ["synchronize", "unregister"]  # copies may still run


def test_buffers_beyond_the_plan_get_regions_of_their_size(device: Accelerator) -> None:
    arena = Arena(pin_memory=True)
    arena.reserve(MIB)
    buffers = [arena.empty(flat(size)) for size in (MIB // 2, 3 * MIB, MIB // 2, 5000)]
    assert list(device.registered.values()) == [MIB, 3 * MIB, 5000]
    del buffers[1]
    assert list(device.registered.values()) == [MIB, 5000]  # the arena itself keeps no full region


def test_a_region_that_the_device_does_not_release_stays_mapped(device: Accelerator) -> None:
    device.breaks = True
    region = Region(4096)
    region.register()
    with mock.patch.object(module, "_kept", []) as kept:
        with mock.patch.object(logger, "warning") as warning:
            del region
        assert len(kept) == 1 and "cannot be freed: an illegal memory access" in warning.call_args.args[0]
        kept[0]._process = None


def test_a_forked_child_neither_has_nor_releases_registered_memory(device: Accelerator) -> None:
    region = Region(4096)
    region.register()
    with mock.patch.object(module, "_kept", []) as kept:
        with mock.patch.object(os, "getpid", lambda: -1):
            del region
        assert len(kept) == 1 and not device.calls
        (flags,) = vm_flags(kept[0].address())
        assert "dc" in flags  # not copied to a fork
        kept[0]._process = None


def vm_flags(address: int) -> list[list[str]]:
    """Of the mapping that holds an address, as /proc has them."""
    found, inside = [], False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(part, 16) for part in first.split("-"))
                inside = begin <= address < end
            elif inside and first == "VmFlags:":
                found.append(line.split()[1:])
    return found


@pytest.mark.parametrize("device", [{"registers": False}, {"registers": "out of memory"}], indirect=True)
def test_torch_page_locks_powers_of_two_where_nothing_can_be_registered(device: Accelerator) -> None:
    arena = Arena(pin_memory=True)
    layer = [2**16] * 4 + [176128] * 3  # the matrices of LLaMA-7B, a thousandth: fp32 masters and two of state
    sizes = [size for size in [512000, *layer * 32, 512000] for _ in range(3)]
    arena.reserve(sum(sizes) + len(sizes) * ALIGNMENT)
    buffers = [arena.empty(flat(size)) for size in sizes]
    ends = addresses(buffers)
    assert all(end <= begin for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    assert sum(device.pinned) <= 1.02 * sum(sizes)
    assert sum(map(torch_rounds, sizes)) > 1.3 * sum(sizes)  # each by itself, as torch would


@pytest.mark.parametrize("device", [{"registers": False}], indirect=True)
@pytest.mark.parametrize("is_fork", [False, True])
def test_a_slab_is_freed_after_the_copies_that_use_it(device: Accelerator, is_fork: bool) -> None:
    freed: list[list[str]] = []
    arena = Arena(pin_memory=True)
    arena.reserve(2 * ALIGNMENT)
    first, second = arena.empty(flat(ALIGNMENT)), arena.empty(flat(ALIGNMENT))
    weakref.finalize(device.slabs.pop(), lambda: freed.append(list(device.calls)))
    del arena, first
    assert not freed and not device.calls
    with mock.patch.object(os, "getpid", lambda: -1) if is_fork else contextlib.nullcontext():
        del second
    assert freed == [[] if is_fork else ["synchronize"]]


def torch_rounds(nbytes: int) -> int:
    return 1 << (nbytes - 1).bit_length()


@pytest.mark.parametrize("device", [{"registers": "out of memory"}], indirect=True)
def test_the_error_that_a_refusal_leaves_behind_is_consumed(device: Accelerator) -> None:
    """CUDA reports it again at the next kernel."""
    with mock.patch.object(torch, "zeros", side_effect=RuntimeError("out of memory")) as kernel:
        Arena(pin_memory=True).reserve(MIB)
    assert kernel.call_count == 1


@pytest.mark.parametrize("device", [{"registers": "out of memory", "pins": False}], indirect=True)
def test_memory_stays_pageable_where_nothing_page_locks_it(device: Accelerator) -> None:
    with mock.patch.object(logger, "warning") as warned:
        arena = Arena(pin_memory=True)
        arena.reserve(MIB)
        buffers = [arena.empty(flat(size)) for size in (MIB, 100)]
    assert not device.registered and not device.pinned and len(buffers) == 2
    ((warning,), _) = warned.call_args
    assert warned.call_count == 1
    assert "OS call failed" in warning and "ulimit -l" in warning and "hift.offload.pin_memory=false" in warning


def test_an_error_of_the_last_way_is_raised() -> None:
    arena = Arena(map_file=mock.Mock(side_effect=RuntimeError("first")))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="first"):
            arena.reserve(MIB)


def test_nothing_is_page_locked_without_pin_memory(device: Accelerator) -> None:
    host = HostMemory(pin_memory=False)
    host.reserve(MIB)
    assert host.empty(flat(MIB)).nbytes == MIB
    assert not device.registered and not device.pinned
    assert HostMemory(pin_memory=True).empty(flat(100)).nbytes == 100 and list(device.registered) == []  # on a CPU


@pytest.mark.parametrize("code", [0, errno.EINVAL])
def test_all_pages_are_made_at_once(code: int) -> None:
    """Also by a kernel that cannot populate memory."""

    def refuse(*_: Any) -> int:
        ctypes.set_errno(code)
        return 1

    libc = mock.Mock(madvise=refuse) if code else module._libc
    with mock.patch.object(module, "_libc", libc), mock.patch.object(module, "_PIECE", 2 * MIB):
        gc.collect()  # what is freed meanwhile would hide pages
        before = resident()
        region = Region(32 * MIB + 4096)
        assert resident() - before > 31 * MIB  # the kernel counts in batches
    assert not any(region[:4096])
    del region
    assert resident() - before < MIB


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_too_little_memory_is_an_error_with_a_remedy() -> None:
    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.ENOMEM)
        return 1

    with pytest.raises(MemoryError, match="4096.00 GiB of host memory: Cannot allocate.*ulimit -v"):
        Region(2**42)
    with mock.patch.object(module, "_libc", mock.Mock(madvise=refuse)):
        with pytest.raises(MemoryError, match="^masters and .*0.00 GiB of host memory.*hift.offload.nvme_path"):
            HostMemory().empty(flat(100))
        with pytest.raises(MemoryError, match="^weights: 0.00 GiB of host memory.*; or keep them elsewhere$"):
            HostMemory(purpose="weights", remedy="keep them elsewhere").empty(flat(100))
