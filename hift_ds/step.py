"""The step of one block whose masters and optimizer state live off the device.

They come to the device in slices, are stepped there by the torch optimizer that was configured, and go back. With one
slice that holds all, this is the paper's step: the whole block's state on the device. With small ones the device never
holds even one block's state. An element-wise optimizer does not see the difference, so the result is the same bits.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from hift_ds.offload import HostMemory, Slot, Staging, wait

# Slices of one tensor begin at multiples of this many elements, so that vectorized kernels cut them all alike.
_GRAIN = 1024
# What a piece takes in a staging area beyond its elements, at most: alignment of its tensors.
_GAP = 128


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of the ``number``-th tensor that the optimizer steps; ``whole``: all of it."""

    number: int
    start: int
    stop: int
    whole: bool


class Stepped(Protocol):
    """What a block's optimizer tells about the tensors that it steps, in order."""

    optimizer: Any

    def stepped(self) -> list[tuple[torch.Tensor, int]]:
        """Each tensor (fp32 master, or fp32 weights that are their own) and the parameter group it is in."""
        ...

    def gradient(self, piece: Piece, shape: torch.Size) -> torch.Tensor:
        """The fp32 gradient of a piece on the device, with that shape, unscaled and clipped."""
        ...

    def weights(self, index: int) -> torch.Tensor | None:
        """The weights on the device that a master is the fp32 copy of; None where the tensor is the weights."""
        ...


class _Staged(NamedTuple):
    """A slice on the device: for each of its pieces the master (None: it never left) and the state by name."""

    slot: Slot
    masters: list[torch.Tensor | None]
    states: list[dict[str, torch.Tensor]]
    ready: Any


class BlockState:
    """Masters and optimizer state of one block, in host memory but for the time of a step.

    ``optimizer.state`` and the masters' ``data`` are the host buffers, and stay so; what is on the device are copies.

    Args:
        owner: the block's optimizer.
        host: where the state lives.
        staging: where it stands during a step.
        bytes_per_element: of state and master; how many elements a slice holds follows from it.

    Attributes:
        under_way: during a step, the slice on the device: its masters, state and fp32 gradients by category.
        watch: called once in each step, when its first slice, which none exceeds, is on the device.
    """

    def __init__(self, owner: Stepped, host: HostMemory, staging: Staging, bytes_per_element: int):
        self._owner = owner
        self._host = host
        self._staging = staging
        self._tensors = [tensor for tensor, _ in owner.stepped()]
        self._groups = [group for _, group in owner.stepped()]
        self._off_device = [owner.weights(index) is not None for index in range(len(self._tensors))]
        limit = None
        if staging.slot_bytes is not None and bytes_per_element:
            limit = staging.slot_bytes // bytes_per_element
        self._slices = _slices([tensor.numel() for tensor in self._tensors], limit)
        self._buffers: dict[tuple[int, str | None], torch.Tensor] = {}
        self._written: list[Any] = [None] * len(self._slices)
        self._staged: dict[int, _Staged] = {}
        self.under_way: list[tuple[str, torch.Tensor]] = []
        self.watch: Callable[[], None] | None = None
        self.to_host()

    def to_host(self) -> None:
        """Take masters and state off the device, into the buffers that they had before if they had any."""
        for index, tensor in enumerate(self._tensors):
            if self._off_device[index]:
                tensor.data = self._kept(index, None, tensor.data)
            state = self._owner.optimizer.state.get(tensor, {})
            for name, value in state.items():
                if has_elements(value):
                    state[name] = self._kept(index, name, value)

    def _kept(self, index: int, name: str | None, value: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get((index, name))
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._buffers[index, name] = self._host.empty(value)
        if buffer.data_ptr() != value.data_ptr():
            buffer.copy_(value)
        return buffer

    def prefetch(self) -> None:
        """Begin to bring the first slices to the device."""
        known = self._known()
        for number in range(len(self._staging.slots)):
            self._fetch(number, known)

    def settle(self) -> None:
        """Wait until all is in host memory, and forget what was fetched: it may be read and changed there."""
        self.forget()
        for event in self._written:
            if event is not None:
                event.synchronize()

    def forget(self) -> None:
        """Drop what was fetched and not stepped."""
        for staged in self._staged.values():
            wait(staged.ready)
            self._staging.drain(staged.slot, [])
        self._staged.clear()

    def _known(self) -> list[dict[str, Any]]:
        """The state of each tensor before the step; empty before the first."""
        return [dict(self._owner.optimizer.state.get(tensor, {})) for tensor in self._tensors]

    def _fetch(self, number: int, known: list[dict[str, Any]]) -> None:
        if number in self._staged or number >= len(self._slices):
            return
        sources: list[torch.Tensor] = []
        places: list[tuple[int, str | None]] = []
        for position, piece in enumerate(self._slices[number]):
            tensor = self._tensors[piece.number]
            if self._off_device[piece.number]:
                sources.append(_cut(tensor.data, piece))
                places.append((position, None))
            for name, value in known[piece.number].items():
                if has_elements(value):
                    sources.append(_cut(value, piece))
                    places.append((position, name))
        slot = self._staging.slots[number % len(self._staging.slots)]
        copies, ready = self._staging.fill(slot, sources, self._written[number])
        masters: list[torch.Tensor | None] = [None] * len(self._slices[number])
        states: list[dict[str, torch.Tensor]] = [{} for _ in self._slices[number]]
        for (position, key), copy in zip(places, copies, strict=True):
            if key is None:
                masters[position] = copy
            else:
                states[position][key] = copy
        self._staged[number] = _Staged(slot, masters, states, ready)

    @torch.no_grad()
    def step(self) -> bool:
        """Step the block; True where this made state that was not there before."""
        optimizer = self._owner.optimizer
        groups, state = optimizer.param_groups, optimizer.state
        before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        known = self._known()
        is_new = False
        try:
            for number in range(len(self._slices)):
                for ahead in range(len(self._staging.slots)):
                    self._fetch(number + ahead, known)
                staged = self._staged.pop(number)
                wait(staged.ready)
                pairs, made = self._step_slice(number, staged, known, before, groups, state)
                is_new |= made
                self._written[number] = self._staging.drain(staged.slot, pairs)
                if made and self._written[number] is not None:
                    self._written[number].synchronize()  # new state is in no slot: not to pile up on the device
                del staged, pairs
        finally:
            optimizer.param_groups, optimizer.state = groups, state
        return is_new

    def _step_slice(
        self,
        number: int,
        staged: _Staged,
        known: list[dict[str, Any]],
        before: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        state: Any,
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], bool]:
        """Step what is on the device; returns what ``_results`` does. A gradient of it does not outlive the call.

        Every slice starts from the counts and settings ``known`` and ``before`` the step, so that none counts twice.
        """
        optimizer, pieces = self._owner.optimizer, self._slices[number]
        stand_ins = self._stand_ins(pieces, staged)
        if number == 0 and self.watch is not None:
            self.under_way = _by_category(staged, stand_ins)
            self.watch()
            self.under_way = []
        by_group: dict[int, list[torch.Tensor]] = defaultdict(list)
        for piece, stand_in in zip(pieces, stand_ins, strict=True):
            by_group[self._groups[piece.number]].append(stand_in)
        optimizer.state = defaultdict(dict)
        for stand_in, values, piece in zip(stand_ins, staged.states, pieces, strict=True):
            for name, value in known[piece.number].items():
                optimizer.state[stand_in][name] = values[name] if name in values else _copied(value)
        optimizer.param_groups = [{**before[g], "params": members} for g, members in by_group.items()]
        optimizer.step()
        for g, after in zip(by_group, optimizer.param_groups, strict=True):
            groups[g].update({key: value for key, value in after.items() if key != "params"})
        results = self._results(pieces, stand_ins, optimizer.state, state)
        optimizer.param_groups, optimizer.state = groups, state
        return results

    def _stand_ins(self, pieces: list[Piece], staged: _Staged) -> list[torch.nn.Parameter]:
        """For each piece a parameter on the device, with its gradient."""
        stand_ins = []
        for piece, master in zip(pieces, staged.masters, strict=True):
            values = master if master is not None else _cut(self._tensors[piece.number].data, piece)
            stand_in = torch.nn.Parameter(values)
            stand_in.grad = self._owner.gradient(piece, values.shape)
            stand_ins.append(stand_in)
        return stand_ins

    def _results(
        self, pieces: list[Piece], stand_ins: list[torch.nn.Parameter], stepped: Any, state: Any
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], bool]:
        """Update weights and counts; returns the pairs (host, device) to be written back, and whether some are new."""
        pairs, is_new = [], False
        for piece, stand_in in zip(pieces, stand_ins, strict=True):
            tensor = self._tensors[piece.number]
            weights = self._owner.weights(piece.number)
            if weights is not None:
                _cut(weights.data, piece).copy_(stand_in.data)
                pairs.append((_cut(tensor.data, piece), stand_in.data))
            for name, value in stepped[stand_in].items():
                if not has_elements(value):
                    # DeepSpeed's fused optimizers count in one tensor of a call only; no count ever goes down.
                    known = state[tensor].get(name)
                    is_less = isinstance(value, int) and isinstance(known, int) and value < known
                    state[tensor][name] = known if is_less else value
                    continue
                if name not in state[tensor]:
                    is_new = True
                    shape = value.shape if piece.whole else tensor.shape
                    like = torch.empty(shape, dtype=value.dtype, device="meta")
                    state[tensor][name] = self._buffers[piece.number, name] = self._host.empty(like)
                pairs.append((_cut(state[tensor][name], piece), value))
        return pairs, is_new


def _by_category(staged: _Staged, stand_ins: list[torch.nn.Parameter]) -> list[tuple[str, torch.Tensor]]:
    """What a slice has on the device, for the ledger."""
    found = [("master_weights", master) for master in staged.masters if master is not None]
    found += [("optimizer_state", value) for state in staged.states for value in state.values()]
    return found + [("gradients", stand_in.grad) for stand_in in stand_ins if stand_in.grad is not None]


def _slices(sizes: list[int], limit: int | None) -> list[list[Piece]]:
    """Cut tensors of these numbers of elements into slices of at most ``limit`` elements; None: all in one."""
    if limit is None:
        return [[Piece(index, 0, size, True) for index, size in enumerate(sizes)]]
    slices: list[list[Piece]] = [[]]
    room = limit - _GAP
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            taken = size - start if size - start <= room else max(room, 0) // _GRAIN * _GRAIN
            if taken:
                slices[-1].append(Piece(index, start, start + taken, taken == size))
                start += taken
                room -= taken + _GAP
            else:
                assert slices[-1], f"a slice of {limit} elements is too small"
                slices.append([])
                room = limit - _GAP
    return slices


def _cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The piece of a tensor: the tensor itself with its shape if it is whole, else flat."""
    return tensor if piece.whole else tensor.view(-1)[piece.start : piece.stop]


def has_elements(value: Any) -> bool:
    """Whether a value of optimizer state is more than a count."""
    return torch.is_tensor(value) and value.dim() > 0


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
