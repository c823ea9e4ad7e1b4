"""Gradients of one block: slices of them in fp32, chunks for their norm, and host buffers that blocks share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.config import NORM_CHUNK
from hift_ds.state.allocator import HostMemory
from hift_ds.state.step import Slice


def fp32_slice(
    gradients: Iterable[torch.Tensor], cut: Slice, shape: torch.Size, factor: torch.Tensor | float | None
) -> torch.Tensor:
    """Return a slice of gradients as a new fp32 tensor.

    Args:
        gradients: their concatenation belongs to the sliced tensor.
        cut: which elements of the concatenation.
        shape: of the result.
        factor: multiply by this; None: by nothing.
    """
    result: torch.Tensor | None = None
    offset = 0
    for gradient in gradients:
        begin, end = max(cut.start, offset), min(cut.stop, offset + gradient.numel())
        if begin < end:
            if result is None:
                result = torch.empty(cut.stop - cut.start, dtype=torch.float32, device=gradient.device)
            values = gradient.reshape(-1)[begin - offset : end - offset]
            result[begin - cut.start : end - cut.start].copy_(values)
        offset += gradient.numel()
    assert result is not None and offset >= cut.stop, "the gradients have fewer elements than their tensor"
    return (result if factor is None else result.mul_(factor)).view(shape)


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


def shared_tensors(host: HostMemory, sizes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Return zeroed flat host tensors of these sizes for each block.

    The tensors of all blocks share one buffer: only one block may use them at a time.
    """
    flat = host.empty(torch.empty(max(sum(each) for each in sizes), dtype=dtype, device="meta")).zero_()
    return [list(flat[: sum(each)].split(list(each))) for each in sizes]


def share_gradients(host: HostMemory, masters: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> None:
    """Set the gradients of each block's masters to host tensors that share one buffer."""
    buffers = shared_tensors(host, [[master.numel() for master in own] for own in masters], dtype)
    for own, gradients in zip(masters, buffers, strict=True):
        for master, gradient in zip(own, gradients, strict=True):
            master.grad = gradient


def clear_except(gradient: torch.Tensor, spans: Iterable[tuple[int, int]]) -> None:
    """Zero everything outside of these spans of a flat gradient.

    Nothing was written there for this block (parameters without a gradient, padding), but the shared buffer may hold
    another block's gradients.
    """
    position = 0
    for start, stop in sorted(spans):
        gradient[position:start].zero_()
        position = max(position, stop)
    gradient[position:].zero_()
