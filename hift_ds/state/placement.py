"""The placement of masters and optimizer state that a config, a model and an optimizer allow."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lion import FusedLion
from deepspeed.utils import logger

from hift_ds.blocks.block import Block, numel_of
from hift_ds.collectives import rank
from hift_ds.config import AS_ALLOWED, CODEC_ALIGNMENT, OffloadConfig, file_buffer_bytes
from hift_ds.optim.lion import Lion
from hift_ds.state.allocator import HostMemory
from hift_ds.state.arena import ALIGNMENT
from hift_ds.state.codec import FIRST_MOMENT, SECOND_MOMENT, Codec, Moment, Split
from hift_ds.state.direct_io import library
from hift_ds.state.host_step import HostStep
from hift_ds.state.page_locking import check_page_locking
from hift_ds.state.trial import Traits

# Elements by which DeepSpeed makes the shares of a block's parameter groups larger, at most.
_PADDING = 128
_ADAM = {"exp_avg": FIRST_MOMENT, "exp_avg_sq": SECOND_MOMENT, "max_exp_avg_sq": SECOND_MOMENT}
_LION = {"exp_avg": FIRST_MOMENT}
# The codec of each tensor of state, by class of the optimizer. Each has some of these.
MOMENTS: dict[type[torch.optim.Optimizer], dict[str, Moment]] = {
    **dict.fromkeys((torch.optim.AdamW, torch.optim.Adam, FusedAdam), _ADAM),
    **dict.fromkeys((Lion, FusedLion), _LION),
    torch.optim.SGD: {"momentum_buffer": FIRST_MOMENT},
}


@dataclass(frozen=True)
class StateSpec:
    """What decides the size and the format of a rank's masters and optimizer state.

    Attributes:
        offload: the section ``hift.offload``.
        blocks: all blocks of the model.
        parameters: each block's parameters.
        optimizer: the class of the configured optimizer.
        traits: what :func:`~hift_ds.state.trial.examine` found out about it.
        on_host: DeepSpeed's section ``offload_optimizer``, if the optimizer computes on the host; else None.
        dtypes: those of weights and of reduced gradients.
        ranks: number of ranks that share the state.
        has_masters: the run has fp32 masters in addition to the weights.
    """

    offload: OffloadConfig
    blocks: Sequence[Block]
    parameters: Sequence[Sequence[torch.nn.Parameter]]
    optimizer: type[torch.optim.Optimizer]
    traits: Traits
    on_host: Any
    dtypes: tuple[torch.dtype, torch.dtype]
    ranks: int
    has_masters: bool

    def numels(self) -> list[list[int]]:
        """Return for each block the elements of each parameter that it updates."""
        return [
            [block.numel] if block.slices else [numel_of(parameter) for parameter in own]
            for block, own in zip(self.blocks, self.parameters, strict=True)
        ]


def place_state(spec: StateSpec, aio: Mapping[str, Any] | None, weights: int = 0) -> dict[str, Any]:
    """Choose where state lives, and in which chunks it comes to the device.

    Args:
        spec: the state.
        aio: DeepSpeed's ``aio`` section with all its keys.
        weights: bytes of weights that this rank page-locks beside the state.

    Returns:
        Keyword arguments for :class:`~hift_ds.zero.block_optimizers.BlockOptimizers`.

    Raises:
        ValueError: a streamed step or ``max_block_numel`` cuts a tensor that the optimizer needs whole; state has no
            such format; the memory or drive is too small for all state; the system does not page-lock what must be.
    """
    offload, traits, on_host = spec.offload, spec.traits, spec.on_host
    slices = [_slice(block) for block in spec.blocks]
    name_of_optimizer = spec.optimizer.__name__
    cut = next((name for block in spec.blocks for name in block.slices), None)
    if cut and traits.shaped:
        raise ValueError(
            f"hift.max_block_numel or hift.balance cuts {cut} by rows, and {name_of_optimizer} is not element-wise "
            f"({traits.shaped}); raise max_block_numel, set balance=false, or use an element-wise optimizer such as "
            "AdamW"
        )
    if offload.device == "none" and on_host is None:
        return {"slices": slices, "host": None}
    needs = host_needs(spec)
    if on_host is not None:
        host = HostMemory(on_host.pin_memory)
        host.check_room(needs.total)
        _warn_of_page_locking(spec, needs, weights)
        host.reserve(needs.total)
        through = HostStep(host, spec.dtypes[1], spec.dtypes[0])
        return {"slices": slices, "host": host, "on_host": through, "state": traits.state}
    if offload.step == "streamed" and traits.shaped:
        raise ValueError(
            f"hift.offload.step='streamed' cuts tensors, and {name_of_optimizer} is not element-wise "
            f"({traits.shaped}); use 'block' or 'auto', or an element-wise optimizer such as AdamW"
        )
    codecs = needs.codecs
    decoded, stored = 4 + int(traits.state_bytes), bytes_in_store(codecs, traits)
    weights_on_host = offload.weights == "cpu"
    if weights_on_host and spec.has_masters:
        stored += spec.dtypes[0].itemsize  # the weights travel with the state
    chunk_bytes, slots = None, 1
    if not traits.shaped and offload.step != "block":
        is_other = bool(codecs) or weights_on_host
        chunk_bytes, slots = offload.slots(spec.numels(), spec.ranks, decoded, stored if is_other else None)
    host = HostMemory(offload.pins, offload.nvme_path, aio, offload.nvme == "all", needs.largest)
    host.check_room(needs.total, needs.of_masters)
    _warn_of_page_locking(spec, needs, weights)
    host.reserve(needs.total, needs.of_masters)
    return {
        "slices": slices,
        "host": host,
        "chunk_bytes": chunk_bytes,
        "bytes_per_element": stored,
        "codecs": codecs,
        "weights_on_host": weights_on_host,
        "prefetch": bool(offload.prefetch),
        "slots": slots,
        "defer": offload.defers and offload.device == "cpu",
        "state": traits.state,
    }


class HostNeeds(NamedTuple):
    """What a rank's masters and state need off the device.

    Attributes:
        total: bytes of all buffers.
        of_masters: bytes of those for masters.
        largest: the most bytes that one block has in files.
        moved: bytes that a step copies between host and device, the mean over the blocks.
        codecs: from :func:`choose_codecs`.
    """

    total: int
    of_masters: int
    largest: int
    moved: float
    codecs: dict[str | None, Codec]


def host_needs(spec: StateSpec) -> HostNeeds:
    """Return what a rank needs off the device; errors as for :func:`place_state`."""
    offload, parameters, traits = spec.offload, spec.parameters, spec.traits
    ranks, has_masters = spec.ranks, spec.has_masters
    numels = [sum(-(-numel // ranks) for numel in own) for own in spec.numels()]
    if spec.on_host is not None:
        both = sum(dtype.itemsize for dtype in spec.dtypes)  # weights and gradients
        total = _host_bytes(parameters, ranks, traits, has_masters) + (max(numels) + _PADDING) * both + 2 * ALIGNMENT
        return HostNeeds(total, 0, 0, both * sum(numels) / len(numels), {})
    codecs = choose_codecs(offload, spec.optimizer, traits, spec.dtypes[0], has_masters)
    for_masters: dict[str | None, Codec] = {name: codec for name, codec in codecs.items() if name is None}
    no_state = replace(traits, state_bytes=0.0, state=())
    in_files = bytes_in_store(codecs, traits)
    if not has_masters or offload.nvme == "moments":
        in_files -= bytes_in_store(for_masters, no_state)
    total = _host_bytes(parameters, ranks, traits, has_masters, codecs)
    of_masters = _host_bytes(parameters, ranks, no_state, has_masters, for_masters)
    return HostNeeds(total, of_masters, math.ceil(max(numels) * in_files), 2 * total / len(spec.blocks), codecs)


def page_locking_problem(spec: StateSpec, needs: HostNeeds, weights: int) -> str | None:
    """Return what :func:`~hift_ds.state.page_locking.check_page_locking` says of a run. All ranks call it.

    Args:
        spec: the state.
        needs: from :func:`host_needs`.
        weights: bytes of weights that this rank page-locks beside the state.
    """
    offload, on_host = spec.offload, spec.on_host
    uses_files = offload.device == "nvme" and on_host is None
    in_memory = needs.total if not uses_files else needs.of_masters if offload.nvme == "moments" else 0
    pins = on_host.pin_memory if on_host is not None else offload.pins
    wanted = {}
    if get_accelerator().device_name() != "cpu":
        wanted = {"masters and optimizer state": in_memory if pins else 0, "weights": weights}
    if uses_files and library()[0] is not None:
        wanted["transfers of state in files"] = file_buffer_bytes(needs.largest)
    required = "hift.offload.pin_memory=true" if offload.pin_memory is True else None
    return check_page_locking(wanted, needs.moved + 2 * weights, required) if any(wanted.values()) else None


def _warn_of_page_locking(spec: StateSpec, needs: HostNeeds, weights: int) -> None:
    if spec.offload.pin_memory is AS_ALLOWED:
        return
    if (problem := page_locking_problem(spec, needs, weights)) and rank() == 0:
        logger.warning(problem)


def choose_codecs(
    offload: OffloadConfig,
    optimizer: type[torch.optim.Optimizer],
    traits: Traits,
    weights: torch.dtype,
    has_masters: bool,
) -> dict[str | None, Codec]:
    """Return the format of each value that the store keeps in another one: of the masters (None), and of state by name.

    Args:
        offload: the section ``hift.offload``. State is off the device, and the optimizer computes there.
        optimizer: its class.
        traits: what is known about it.
        weights: the dtype of the weights.
        has_masters: the run has fp32 masters in addition to the weights.

    Raises:
        ValueError: the masters or the state have no such format.
    """
    codecs: dict[str | None, Codec] = {}
    is_bf16 = has_masters and weights == torch.bfloat16
    problems = []
    if offload.master == "split" and not is_bf16:
        found = str(weights).removeprefix("torch.")
        problems.append(
            f"hift.offload.master='split' needs bf16 weights, and these are {found}; set bf16.enabled=true, or use "
            "'auto'"
        )
    if offload.master == "split" and traits.shaped:
        problems.append(
            f"hift.offload.master='split' flattens tensors, and {optimizer.__name__} is not element-wise "
            f"({traits.shaped}); use 'auto', or an element-wise optimizer such as AdamW"
        )
    if offload.master != "fp32" and is_bf16 and not traits.shaped:
        codecs[None] = Split()
    if offload.moments == "8bit":
        of_moments = MOMENTS.get(optimizer, {})
        codecs.update((name, of_moments[name]) for name, _ in traits.state if name in of_moments)
        if optimizer in MOMENTS and not traits.state:
            problems.append(
                f"hift.offload.moments='8bit' has no effect: {optimizer.__name__} keeps no state with these settings; "
                "remove it, or give SGD a momentum"
            )
        is_known = optimizer in MOMENTS and all(name in of_moments and d == torch.float32 for name, d in traits.state)
        if not is_known or traits.shaped:
            names = sorted({kind.__name__ for kind in MOMENTS})
            problems.append(
                f"hift.offload.moments='8bit' knows the state of {', '.join(names)}, not of {optimizer.__name__}; use "
                "one of these, or 'fp32'"
            )
    if offload.device == "nvme" and offload.nvme == "moments" and not traits.state_bytes:
        problems.append(
            f"hift.offload.nvme='moments': {optimizer.__name__} keeps no state with these settings, so nothing would "
            "be in files; set nvme to all, or device to cpu"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return codecs


def bytes_in_store(codecs: Mapping[str | None, Codec], traits: Traits) -> float:
    """Return the bytes of one element's master and state in the store."""
    state = {name: float(dtype.itemsize) for name, dtype in traits.state}
    others = traits.state_bytes - sum(state.values())
    state.update((name, codec.bytes_per_value) for name, codec in codecs.items() if name is not None)
    return (codecs[None].bytes_per_value if None in codecs else 4) + sum(state.values()) + others


def _host_bytes(
    parameters: Sequence[Sequence[torch.nn.Parameter]],
    ranks: int,
    traits: Traits,
    has_masters: bool,
    codecs: Mapping[str | None, Codec] | None = None,
) -> int:
    """Return what a rank's buffers of masters and state need at most, alignment included.

    An optimizer that is not element-wise may need more or less: its state was measured on other shapes.
    """
    codecs = codecs or {}
    element = bytes_in_store(codecs, traits) - (0 if has_masters else 4)  # fp32 weights are masters at stage 0
    buffers = max(len(traits.state), bool(traits.state_bytes)) + has_masters + len(codecs)  # each codec has two parts
    total = 0
    for parameter in {id(parameter): parameter for own in parameters for parameter in own}.values():
        # DeepSpeed makes a rank's share of a parameter group even. With that, `ALIGNMENT` is the most that it grows by.
        total += math.ceil(-(-numel_of(parameter) // ranks) * element) + buffers * ALIGNMENT
    if codecs:  # each slice has room for a multiple of the codecs' alignment; ZeRO makes one of a parameter group
        times = Counter(id(parameter) for own in parameters for parameter in own)
        rooms = 2 * len(parameters) * CODEC_ALIGNMENT
        for parameter in (parameter for own in parameters for parameter in own):
            is_cut, share = times[id(parameter)] > 1, math.ceil(numel_of(parameter) / ranks)
            rooms += CODEC_ALIGNMENT if is_cut else -share % CODEC_ALIGNMENT
        total += math.ceil(rooms * sum(codec.bytes_per_value for codec in codecs.values()))
    return total


def _slice(block: Block) -> tuple[int, int] | None:
    """Return the first and last (exclusive) element that a block trains of a parameter cut by rows; None: no cut."""
    for start, stop in block.slices.values():
        row = block.numel // (stop - start)
        return start * row, stop * row
    return None
