"""The placement of masters and optimizer state that a config, a model and an optimizer allow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hift_ds.blocks.block import Block, numel_of
from hift_ds.config import OffloadConfig
from hift_ds.state.allocator import HostMemory
from hift_ds.state.arena import ALIGNMENT
from hift_ds.state.host_step import HostStep
from hift_ds.state.trial import Traits

# Elements by which DeepSpeed makes the shares of a block's parameter groups larger, at most.
_PADDING = 128


def place_state(
    offload: OffloadConfig,
    blocks: Sequence[Block],
    parameters: Sequence[Sequence[torch.nn.Parameter]],
    optimizer: str,
    traits: Traits,
    on_host: Any,
    dtypes: tuple[torch.dtype, torch.dtype],
    ranks: int,
    has_masters: bool,
    aio: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Choose where state lives, and in which chunks it comes to the device.

    Args:
        offload: the section ``hift.offload``.
        blocks: all blocks of the model.
        parameters: each block's parameters.
        optimizer: the name of the configured optimizer, for messages.
        traits: what :func:`~hift_ds.state.trial.examine` found out about it.
        on_host: DeepSpeed's section ``offload_optimizer``, if the optimizer computes on the host; else None.
        dtypes: those of weights and of reduced gradients.
        ranks: number of ranks that share the state.
        has_masters: the run has fp32 masters in addition to the weights.
        aio: DeepSpeed's ``aio`` section with all its keys.

    Returns:
        Keyword arguments for :class:`~hift_ds.zero.block_optimizers.BlockOptimizers`.

    Raises:
        ValueError: a streamed step or ``max_block_numel`` cuts a tensor that the optimizer needs whole; the memory or
            drive is too small for all state.
    """
    slices = [_slice(block) for block in blocks]
    cut = next((name for block in blocks for name in block.slices), None)
    if cut and traits.shaped:
        raise ValueError(
            f"hift.max_block_numel or hift.balance cuts {cut} by rows, and {optimizer} is not element-wise "
            f"({traits.shaped}); raise max_block_numel, set balance=false, or use an element-wise optimizer such as "
            "AdamW"
        )
    if offload.device == "none" and on_host is None:
        return {"slices": slices, "host": None}
    numels = [
        [block.numel] if block.slices else [numel_of(parameter) for parameter in own]
        for block, own in zip(blocks, parameters, strict=True)
    ]
    if on_host is not None:
        host = HostMemory(on_host.pin_memory)
        weights, gradients = dtypes
        largest = max(sum(-(-numel // ranks) for numel in own) for own in numels)
        areas = (largest + _PADDING) * (weights.itemsize + gradients.itemsize) + 2 * ALIGNMENT
        needed = _host_bytes(parameters, ranks, traits, has_masters) + areas
        host.check_room(needed)
        host.reserve(needed)
        through = HostStep(host, gradients, weights)
        return {"slices": slices, "host": host, "on_host": through, "state": traits.state}
    if offload.step == "streamed" and traits.shaped:
        raise ValueError(
            f"hift.offload.step='streamed' cuts tensors, and {optimizer} is not element-wise ({traits.shaped}); use "
            "'block' or 'auto', or an element-wise optimizer such as AdamW"
        )
    chunk_bytes, slots, per_element = None, 1, 4 + int(traits.state_bytes)
    if not traits.shaped and offload.step != "block":
        chunk_bytes, slots = offload.slots(numels, ranks, per_element)
    host = HostMemory(offload.pin_memory, offload.nvme_path, aio)
    needed = _host_bytes(parameters, ranks, traits, has_masters)
    host.check_room(needed)
    host.reserve(needed)
    return {
        "slices": slices,
        "host": host,
        "chunk_bytes": chunk_bytes,
        "bytes_per_element": per_element,
        "prefetch": bool(offload.prefetch),
        "slots": slots,
        "defer": offload.defers and offload.device == "cpu",
        "state": traits.state,
    }


def _host_bytes(
    parameters: Sequence[Sequence[torch.nn.Parameter]], ranks: int, traits: Traits, has_masters: bool
) -> int:
    """Return what a rank's buffers of masters and state need at most, alignment included.

    An optimizer that is not element-wise may need more or less: its state was measured on other shapes.
    """
    element = traits.state_bytes + (4 if has_masters else 0)  # at stage 0, fp32 weights are their own masters
    buffers = max(len(traits.state), bool(traits.state_bytes)) + has_masters
    total = 0
    for parameter in {id(parameter): parameter for own in parameters for parameter in own}.values():
        # DeepSpeed makes a rank's share of a parameter group even. With that, `ALIGNMENT` is the most that it grows by.
        total += math.ceil(-(-numel_of(parameter) // ranks) * element) + buffers * ALIGNMENT
    return total


def _slice(block: Block) -> tuple[int, int] | None:
    """Return the first and last (exclusive) element that a block trains of a parameter cut by rows; None: no cut."""
    for start, stop in block.slices.values():
        row = block.numel // (stop - start)
        return start * row, stop * row
    return None
