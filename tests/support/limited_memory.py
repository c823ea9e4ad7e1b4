"""A limit of locked memory that holds, also for root, and a device that page-locks by mlock(2), which it stops."""

import contextlib
import ctypes
import resource
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import hift_ds.state.allocator
import hift_ds.state.arena
import hift_ds.state.page_locking
import hift_ds.state.placement

_PR_CAPBSET_DROP, _CAP_IPC_LOCK = 24, 14
_libc = ctypes.CDLL(None, use_errno=True)


def hard_limit() -> int:
    """The highest limit that a process without privileges can set; -1: any."""
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]


def limit_locked_memory(nbytes: int) -> None:
    """In a child, before it runs a program: let it lock at most so many bytes."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (nbytes, nbytes))
    _libc.prctl(_PR_CAPBSET_DROP, _CAP_IPC_LOCK, 0, 0, 0)  # fails for others than root, whom the limit holds anyway


def locked_bytes() -> int:
    """Bytes that this process has locked, by the kernel's count."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmLck:"))


class Locking(CPU_Accelerator):
    """A CPU under another name, whose page-locked memory counts against the limit."""

    def device_name(self, device_index: Any = None) -> str:
        return "locking" if device_index is None else "cpu"

    def current_device_name(self) -> str:
        return "cpu"

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)):
            raise RuntimeError("out of memory\nwith a long explanation")
        return True

    def unregister_host_memory(self, address: int) -> None:
        """The mapping ends right after it, and the lock with it."""

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1, make_copy: bool = True) -> torch.Tensor:
        copy = tensor.clone()
        self.register_host_memory(copy.data_ptr(), copy.nbytes)
        return copy


@contextlib.contextmanager
def page_locking_by_mlock() -> Iterator[None]:
    """Inside, what is kept off the device is page-locked by mlock."""
    with contextlib.ExitStack() as stack:
        for module in ("allocator", "arena", "page_locking", "placement"):
            place: Any = getattr(hift_ds.state, module)
            stack.enter_context(mock.patch.object(place, "get_accelerator", Locking))
        yield
