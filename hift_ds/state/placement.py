"""Where the blocks' masters and optimizer state live, and how they get to the device for a step."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hift_ds.blocks.block import Block
from hift_ds.config import OffloadConfig, slot_bytes
from hift_ds.optim.properties import is_elementwise, state_bytes
from hift_ds.state.transfer import HostMemory


def place_state(
    offload: OffloadConfig,
    blocks: Sequence[Block],
    parameters: Sequence[Sequence[torch.nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    on_host: bool,
    ranks: int,
    has_masters: bool,
    aio: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What ``BlockOptimizers`` wants to know of it, as its arguments.

    Args:
        parameters: of each block.
        on_host: DeepSpeed steps there (``offload_optimizer: cpu``) and keeps the state.
        ranks: that share the state.
        has_masters: beside the weights.
        aio: DeepSpeed's section of that name.

    Raises:
        ValueError: a tensor is cut, by a streamed step or by ``max_block_numel``, and the optimizer needs it whole;
            rows of a tensor with state where DeepSpeed keeps it; no room for all the state.
    """
    parts = [_part(block) for block in blocks]
    cut = next((name for block in blocks for name in block.slices), None)
    where = "hift.offload.device='none'" if offload.device == "none" else "offload_optimizer"
    if offload.device == "none" or on_host:
        if cut:
            raise ValueError(
                f"hift.max_block_numel or hift.balance cuts {cut} by rows, and {where} keeps the state of whole "
                "tensors; remove it, or raise max_block_numel, or set balance=false"
            )
        return {"parts": parts, "host": None}
    elementwise = is_elementwise(optimizer)
    if cut and not elementwise:
        raise ValueError(
            f"hift.max_block_numel or hift.balance cuts {cut} by rows, and {type(optimizer).__name__} uses its "
            "shape; raise max_block_numel, set balance=false, or use an element-wise optimizer such as AdamW"
        )
    if offload.step == "streamed" and not elementwise:
        raise ValueError(
            f"hift.offload.step='streamed' cuts tensors, and {type(optimizer).__name__} uses their shape; use "
            "'block' or 'auto', or an element-wise optimizer such as AdamW"
        )
    slice_bytes, element = None, 4
    if elementwise:
        element += state_bytes(optimizer)
    per_element = element
    if elementwise and offload.step != "block":
        numels = [
            [block.numel] if block.slices else [parameter.numel() for parameter in own]
            for block, own in zip(blocks, parameters, strict=True)
        ]
        slice_bytes = slot_bytes(numels, ranks, per_element, offload.buffer_size)
    if not has_masters:
        element -= 4  # fp32 weights at stage 0 are their own masters
    host = HostMemory(offload.pin_memory, offload.nvme_path, aio)
    local_ranks = int(os.environ.get("LOCAL_SIZE", 1))  # set by DeepSpeed's launcher
    host.check_room(sum(block.numel for block in blocks) * element // ranks * local_ranks)
    return {
        "parts": parts,
        "host": host,
        "slice_bytes": slice_bytes,
        "per_element": per_element,
        "prefetch": offload.prefetch,
    }


def _part(block: Block) -> tuple[int, int] | None:
    """First and last (exclusive) element that a block trains of a parameter that is cut."""
    for start, stop in block.slices.values():
        row = block.numel // (stop - start)
        return start * row, stop * row
    return None
