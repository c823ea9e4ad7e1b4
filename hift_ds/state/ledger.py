"""The memory ledger: bytes that a run keeps, by place and category, counted from the live tensors."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.state.allocator import HostMemory

PLACES = ("device", "host", "nvme")
CATEGORIES = ("parameters", "gradients", "master_weights", "optimizer_state", "buffers")

Ledger = dict[str, dict[str, int]]


class Held(NamedTuple):
    """A tensor that a run keeps.

    Attributes:
        category: one of ``CATEGORIES``.
        tensor: None counts nothing.
        on_host: it is in host memory. With the CPU accelerator, the tensor's device does not show this.
    """

    category: str
    tensor: torch.Tensor | None
    on_host: bool = False


def count(held: Iterable[Held], host: HostMemory | None) -> Ledger:
    """Return the bytes of the tensors by place and category.

    A storage that several tensors share counts once, in the category of the first.

    Args:
        held: the tensors.
        host: the allocator of the buffers; None: there are none.
    """
    ledger = {place: dict.fromkeys(CATEGORIES, 0) for place in PLACES}
    of_ours = {buffer.data_ptr(): host.place(buffer) for buffer in host.buffers} if host else {}
    device_is_host = get_accelerator().device_name() == "cpu"
    seen: set[tuple[torch.device, int]] = set()
    for category, tensor, on_host in held:
        if tensor is None or tensor.device.type == "meta":
            continue
        storage = tensor.untyped_storage()
        address = (tensor.device, storage.data_ptr())
        if not storage.nbytes() or address in seen:
            continue
        seen.add(address)
        if storage.data_ptr() in of_ours:
            place = of_ours[storage.data_ptr()]
        elif on_host or (tensor.device.type == "cpu" and not device_is_host):
            place = "host"
        else:
            place = "device"
        ledger[place][category] += storage.nbytes()
    return ledger


def device_total(ledger: Ledger) -> int:
    """Return the bytes on the device, over all categories."""
    return sum(ledger["device"].values())
