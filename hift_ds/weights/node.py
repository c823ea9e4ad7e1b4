"""The ranks of a machine, which share one copy of the weights in host memory, and who waits for whom there.

Each rank maps the same memory, page-locks its own mapping, and copies layers from it to slots of its own. In a step:

1. All ranks have issued the passes that read the old weights of the active block. Each lets its device wait for its
   copies of these weights (``Turns.before_change``), and takes part in the reduction of the flag for invalid losses
   (``BlockOptimizers.prepare_step``) after that. So when this reduction is done on a device, no device reads the old
   weights of the block for a pass any more. The update is issued behind it.
2. At ZeRO 1 and 2, each rank reads and writes its own part of the block's weights. At ZeRO 0, each rank computes the
   same update, and the first one of the machine writes the weights. The update may read them, too: weights in fp32 are
   their own masters, and in bf16 they are the upper half of them. Then a chunk is written when all ranks have fetched
   it (:meth:`Node.meet_on_device`).
3. When its new weights are in host memory, each device takes part in a reduction of one number, on a stream of its own
   (:meth:`Node.after_all`). A later copy of these weights to a device, and a later fetch of them for an update, waits
   for the end of this reduction: all parts are there then.

A host waits for none of this. It cannot wait where it waits anyway, which is for the norm of the gradients: the next
forward pass needs the new weights, and comes before the norm of the next step. If the host changes weights, such as in
``load_state_dict``, the hosts of all ranks meet before and after (:meth:`Node.meet`).

The memory has no name in any file system, so nothing of it is left when the processes end, however they end. Other
limits than that of host memory, such as the size of ``/dev/shm`` in a container, do not matter.
"""

from __future__ import annotations

import functools
import mmap
import os
import socket
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from hift_ds.collectives import gather, on_every_rank, rank, world_size
from hift_ds.state.arena import Region, clear_error
from hift_ds.state.transfer import Lane

# Size of the file that ranks map. It takes memory only where it is used.
_ROOM = 2**46
_REMEDY = (
    "start all ranks of a machine as one user in one container, or remove hift.offload.weights and set "
    "zero_optimization.stage=3 and zero_optimization.offload_param.device='cpu', with which each rank keeps its part"
)


def machine() -> tuple[str, str]:
    """Return what tells the machine of this rank from others: its name, and the number that its kernel drew."""
    drawn = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), drawn.read_text() if drawn.exists() else ""


def check_ranks(stage: int, mpu: Any = None) -> None:
    """Check that the ranks can share the weights of each machine. All ranks call it.

    Args:
        stage: the ZeRO stage.
        mpu: DeepSpeed's model-parallel interface, if any.

    Raises:
        ValueError: on every rank, if ranks hold different weights, or if a machine would lack the updates of another.
    """
    if mpu is not None and mpu.get_model_parallel_world_size() > 1:
        raise ValueError(
            "hift.offload.weights='cpu' with model parallelism: all ranks of a machine share one copy of the weights, "
            "and model-parallel ranks have different ones; set hift.offload.weights='device'"
        )
    machines = len(set(gather(machine())))
    if machines > 1 and stage > 0:
        raise ValueError(
            f"hift.offload.weights='cpu' with zero_optimization.stage={stage} on {machines} machines: each rank writes "
            "its part of the updated weights to the memory of its own machine, where those of the others would be "
            "missing; remove it, and set zero_optimization.stage=3 and zero_optimization.offload_param.device='cpu'"
        )


class _File(NamedTuple):
    """An open file of a process: its process, number there, and identity on the machine."""

    process: int
    number: int
    device: int
    inode: int


class Node:
    """The ranks of this machine. A single rank shares nothing, and its methods do nothing. All ranks make it.

    Args:
        device: the device of this rank.
        pin_memory: page-lock the shared memory.

    Attributes:
        is_shared: there are several ranks, and this object maps memory for them.
        is_first: this is the first rank of its machine. It writes what all of them would write alike.

    Raises:
        ValueError: on every rank, if ranks of a machine cannot map the memory of another.
    """

    def __init__(self, device: torch.device, pin_memory: bool):
        self._device = device
        self._pins = pin_memory and get_accelerator().device_name() != "cpu"
        self._used = 0
        self._regions: dict[int, tuple[int, int]] = {}  # by address: place in the file, and size
        self._private: dict[int, mmap.mmap] = {}  # by address of the shared mapping
        self.is_shared, self.is_first = world_size() > 1, True
        if not self.is_shared:
            return
        self._lane = Lane()
        own = machine()
        first = gather(own).index(own)
        self.is_first = first == rank()
        made, problems = on_every_rank(self._make, OSError)
        if not problems:
            _, problems = on_every_rank(functools.partial(self._open, made[first]), OSError)
        if problems:
            found = "; ".join(f"rank {i}: {text}" for i, text in problems.items())
            raise ValueError(f"hift.offload.weights='cpu': ranks of a machine cannot share memory ({found}); {_REMEDY}")

    def _make(self) -> _File | None:
        if not self.is_first:
            return None
        self._keep(os.memfd_create("hift-weights", os.MFD_CLOEXEC))
        os.ftruncate(self._file, _ROOM)
        return _File(os.getpid(), self._file, *_identity(self._file))

    def _open(self, made: _File | None) -> None:
        if self.is_first or made is None:
            return
        path = f"/proc/{made.process}/fd/{made.number}"
        self._keep(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        if _identity(self._file) != (made.device, made.inode):  # of a process in another container
            raise OSError(f"{path} is not the memory of the first rank")

    def _keep(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)  # mappings keep the memory

    def map(self, nbytes: int) -> Region:
        """Map new memory, the same on all ranks of the machine. All ranks call it with the same sizes in turn.

        Raises:
            MemoryError: on every rank, if the system does not give that much to one of them.
        """
        start, found = self._used, []
        self._used += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

        def make() -> None:
            found.append(Region(nbytes, self._file, start))

        _, problems = on_every_rank(make, MemoryError)
        if problems:
            raise MemoryError("; ".join(f"rank {i}: {text}" for i, text in problems.items()))
        (region,) = found
        self._regions[region.address()] = start, nbytes
        if self._pins:
            self._page_lock(region)
        return region

    def _page_lock(self, region: Region) -> None:
        try:
            region.register()
        except RuntimeError as error:
            clear_error()
            self._pins = False
            logger.warning(
                f"weights that ranks share in host memory cannot be page-locked ({str(error).splitlines()[0]}); they "
                "stay pageable, and transfers are slower. Raise the limit (ulimit -l), or set "
                "hift.offload.pin_memory=false"
            )

    def private(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the values of one in shared memory, which other ranks do not see change.

        Its memory is that of all ranks until it is written to. Nobody may write to the shared memory any more.
        """
        if not tensor.numel():
            return tensor
        address = max(start for start in self._regions if start <= tensor.data_ptr())
        start, nbytes = self._regions[address]
        if address not in self._private:
            access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
            self._private[address] = mmap.mmap(self._file, nbytes, offset=start, **access)
        memory, place = self._private[address], tensor.data_ptr() - address
        values = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=place)
        return values.view(tensor.shape)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Let a contiguous tensor on the device have the values of rank 0 on all ranks."""
        if self.is_shared and tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0)

    def meet(self) -> None:
        """Let the host wait for the hosts of all ranks."""
        if self.is_shared:
            dist.barrier()

    def meet_on_device(self) -> None:
        """Let the device's current stream wait until those of all ranks are here."""
        if self.is_shared:
            dist.all_reduce(torch.zeros(1, device=self._device))

    def after_all(self, events: Collection[Any]) -> Any:
        """Return an event that passes when the events of all ranks have passed."""
        with self._lane.after(*events):
            self.meet_on_device()
        return self._lane.mark()


def _identity(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino
