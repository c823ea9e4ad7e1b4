"""The norm of one block's gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.config import NORM_CHUNK


def squared_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the squared norm of gradients, computed in fp64: a tensor without dimensions on the device.

    Some devices copy what they take the norm of to fp64. Large gradients are cut into chunks of ``NORM_CHUNK``
    elements, which bounds the memory of these copies.
    """
    chunks = [chunk for gradient in gradients for chunk in gradient.reshape(-1).split(NORM_CHUNK)]
    if not chunks:
        return torch.zeros((), dtype=torch.float64, device=get_accelerator().current_device_name())
    return torch.stack(torch._foreach_norm(chunks, 2, torch.float64)).square().sum()


def sum_over(tensor: torch.Tensor, group: Any) -> None:
    """Replace a tensor by its sum over the ranks of a process group."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
