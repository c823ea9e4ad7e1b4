"""The step of one block whose masters and optimizer state live off the device.

They come to the device in slices, are stepped there by the torch optimizer that was configured, and go back. With one
slice that holds all, this is the paper's step: the whole block's state on the device. With small ones the device never
holds even one block's state. An element-wise optimizer does not see the difference, so the result is the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from hift_ds.optim.properties import has_elements
from hift_ds.state.transfer import HostMemory, Slot, Staging, wait

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

    def origin(self) -> int:
        """Which element of its only parameter the first tensor begins with. Asked for where a parameter is cut."""
        ...


class _Staged(NamedTuple):
    """A slice on the device: for each of its pieces the master (None: it never left) and the state by name."""

    slot: Slot
    masters: list[torch.Tensor | None]
    states: list[dict[str, torch.Tensor]]
    ready: Any


@dataclass
class _Part:
    """What is stepped at a time: all of the block's optimizer, or some rows of its only parameter.

    Attributes:
        slices: in which it comes to the device.
        written: for each slice, the event after which it is in host memory again.
        counts: of a part of several, by tensor: the state that is no tensor of elements (a step count). It is the
            part's own, while ``optimizer.state`` has that of the part that was stepped last.
        settings: of a part of several, by parameter group: what the optimizer itself counts there.
        is_new: the optimizer has made no state for it so far.
    """

    slices: list[list[Piece]]
    written: list[Any]
    counts: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    is_new: bool = False


class BlockState:
    """Masters and optimizer state of one block, in host memory but for the time of a step.

    Where a parameter is cut by rows, this is the state of the whole parameter, and each block that trains some of its
    rows is a *part*: stepped by itself, with a step count of its own.

    ``optimizer.state`` and the masters' ``data`` are the host buffers, and stay so; what is on the device are copies.

    Args:
        owner: the block's optimizer.
        host: where the state lives.
        staging: where it stands during a step.
        bytes_per_element: of state and master; how many elements a slice holds follows from it.
        parts: first and last (exclusive) element of each part of the only parameter; empty: it is not cut.

    Attributes:
        under_way: during a step, the slice on the device: its masters, state and fp32 gradients by category.
        watch: called once in each step, when its first slice, which none exceeds, is on the device.
    """

    def __init__(
        self,
        owner: Stepped,
        host: HostMemory,
        staging: Staging,
        bytes_per_element: int,
        parts: Sequence[tuple[int, int]] = (),
    ):
        self._owner = owner
        self._host = host
        self._staging = staging
        self._tensors = [tensor for tensor, _ in owner.stepped()]
        self._groups = [group for _, group in owner.stepped()]
        self._off_device = [owner.weights(index) is not None for index in range(len(self._tensors))]
        limit = None
        if staging.slot_bytes is not None and bytes_per_element:
            limit = staging.slot_bytes // bytes_per_element
        self._parts = [self._part(pieces, limit) for pieces in self._divided(parts)]
        self._active = self._parts[0]
        self._buffers: dict[tuple[int, str | None], torch.Tensor] = {}
        self._staged: dict[int, _Staged] = {}
        self.under_way: list[tuple[str, torch.Tensor]] = []
        self.watch: Callable[[], None] | None = None
        self.to_host()

    def _divided(self, parts: Sequence[tuple[int, int]]) -> list[list[Piece]]:
        """For each part what it has of each tensor."""
        whole = [Piece(index, 0, tensor.numel(), True) for index, tensor in enumerate(self._tensors)]
        if not parts:
            return [whole]
        ((_, _, size, _),) = whole
        origin = self._owner.origin()
        divided = []
        for start, stop in parts:
            low, high = (min(max(end - origin, 0), size) for end in (start, stop))
            divided.append([Piece(0, low, high, high - low == size)] if low < high else [])
        return divided

    def _part(self, pieces: list[Piece], limit: int | None) -> _Part:
        slices = _slices(pieces, limit)
        state = self._owner.optimizer.state
        counts = [_without_elements(state.get(tensor, {})) for tensor in self._tensors]
        settings: list[dict[str, Any]] = [{} for _ in self._owner.optimizer.param_groups]
        return _Part(slices, [None] * len(slices), counts, settings, is_new=not any(map(state.get, self._tensors)))

    @property
    def _is_cut(self) -> bool:
        return len(self._parts) > 1

    def select(self, part: int) -> None:
        """Make a part the one that is stepped next; nothing of another one may be fetched."""
        self._active = self._parts[part]

    def counts(self) -> list[dict[str, Any]]:
        """What a checkpoint has to hold of the parts of a cut parameter, beside the optimizer's state."""
        return [{"counts": p.counts, "settings": p.settings, "is_new": p.is_new} for p in self._parts]

    def load_counts(self, saved: list[dict[str, Any]]) -> None:
        """Take over what ``counts`` gave."""
        for part, entry in zip(self._parts, saved, strict=True):
            part.counts, part.settings, part.is_new = entry["counts"], entry["settings"], entry["is_new"]

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
            buffer = self._buffers[index, name] = self._host.empty(value, direct=not self._is_cut)
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
        for part in self._parts:
            for event in part.written:
                if event is not None:
                    event.synchronize()
        if self._host.direct is not None:
            self._host.direct.release(self._buffers.values())

    def forget(self) -> None:
        """Drop what was fetched and not stepped."""
        for staged in self._staged.values():
            wait(staged.ready)
            self._staging.drain(staged.slot, [])
        self._staged.clear()

    def _known(self) -> list[dict[str, Any]]:
        """The state of each tensor before the step; empty before the first."""
        state, part = self._owner.optimizer.state, self._active
        if not self._is_cut:
            return [dict(state.get(tensor, {})) for tensor in self._tensors]
        if part.is_new:
            return [{} for _ in self._tensors]
        of_all = [{name: v for name, v in state.get(t, {}).items() if has_elements(v)} for t in self._tensors]
        return [{**elements, **counts} for elements, counts in zip(of_all, part.counts, strict=True)]

    def _fetch(self, number: int, known: list[dict[str, Any]]) -> None:
        part = self._active
        if number in self._staged or number >= len(part.slices):
            return
        sources: list[torch.Tensor] = []
        places: list[tuple[int, str | None]] = []
        for position, piece in enumerate(part.slices[number]):
            tensor = self._tensors[piece.number]
            if self._off_device[piece.number]:
                sources.append(_cut(tensor.data, piece))
                places.append((position, None))
            for name, value in known[piece.number].items():
                if has_elements(value):
                    sources.append(_cut(value, piece))
                    places.append((position, name))
        slot = self._staging.slots[number % len(self._staging.slots)]
        copies, ready = self._staging.fill(slot, sources, part.written[number])
        masters: list[torch.Tensor | None] = [None] * len(part.slices[number])
        states: list[dict[str, torch.Tensor]] = [{} for _ in part.slices[number]]
        for (position, key), copy in zip(places, copies, strict=True):
            if key is None:
                masters[position] = copy
            else:
                states[position][key] = copy
        self._staged[number] = _Staged(slot, masters, states, ready)

    @torch.no_grad()
    def step(self) -> bool:
        """Step the block; True where this made state that was not there before."""
        optimizer, part = self._owner.optimizer, self._active
        if not part.slices:  # all of it is on other ranks
            return False
        groups, state = optimizer.param_groups, optimizer.state
        known = self._known()
        if self._is_cut:
            self._take_up(part)
        before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        is_new = False
        try:
            for number in range(len(part.slices)):
                for ahead in range(len(self._staging.slots)):
                    self._fetch(number + ahead, known)
                staged = self._staged.pop(number)
                wait(staged.ready)
                pairs, made, has_fresh = self._step_slice(number, staged, known, before, groups, state)
                is_new |= made
                written = part.written[number] = self._staging.drain(staged.slot, pairs)
                if has_fresh and written is not None:
                    written.synchronize()  # fresh state is in no slot: it must not pile up on the device
                del staged, pairs
        finally:
            optimizer.param_groups, optimizer.state = groups, state
        if self._is_cut:
            part.is_new = False
            part.counts = [_without_elements(state.get(tensor, {})) for tensor in self._tensors]
            for group, earlier, settings in zip(groups, before, part.settings, strict=True):
                settings.update({k: v for k, v in group.items() if k != "params" and earlier.get(k) is not v})
        return is_new

    def _take_up(self, part: _Part) -> None:
        """Put the counts of a part where its optimizer looks for them, in place of those of the part before."""
        optimizer = self._owner.optimizer
        for tensor, counts in zip(self._tensors, part.counts, strict=True):
            if tensor in optimizer.state:
                elements = {name: value for name, value in optimizer.state[tensor].items() if has_elements(value)}
                optimizer.state[tensor] = {**elements, **counts}
        counted = {key for other in self._parts for settings in other.settings for key in settings}
        for group, settings in zip(optimizer.param_groups, part.settings, strict=True):
            for key in counted:
                group.pop(key, None)
            group.update(settings)

    def _step_slice(
        self,
        number: int,
        staged: _Staged,
        known: list[dict[str, Any]],
        before: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        state: Any,
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], bool, bool]:
        """Step what is on the device; returns what ``_results`` does. A gradient of it does not outlive the call.

        Every slice starts from the counts and settings ``known`` and ``before`` the step, so that none counts twice.
        """
        optimizer, pieces = self._owner.optimizer, self._active.slices[number]
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
        results = self._results(pieces, stand_ins, optimizer.state, state, known)
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
        self,
        pieces: list[Piece],
        stand_ins: list[torch.nn.Parameter],
        stepped: Any,
        state: Any,
        known: list[dict[str, Any]],
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], bool, bool]:
        """Update weights and counts.

        Returns:
            The pairs (host, device) to be written back, whether host buffers for new state were made, and whether some
            state on the device was not ``known`` before the step and so lies outside of the staging area.
        """
        pairs, is_new, has_fresh = [], False, False
        for piece, stand_in in zip(pieces, stand_ins, strict=True):
            tensor = self._tensors[piece.number]
            weights = self._owner.weights(piece.number)
            if weights is not None:
                _cut(weights.data, piece).copy_(stand_in.data)
                pairs.append((_cut(tensor.data, piece), stand_in.data))
            for name, value in stepped[stand_in].items():
                if not has_elements(value):
                    # DeepSpeed's fused optimizers count in one tensor of a call only; no count ever goes down.
                    earlier = state[tensor].get(name)
                    is_less = isinstance(value, int) and isinstance(earlier, int) and value < earlier
                    state[tensor][name] = earlier if is_less else value
                    continue
                has_fresh |= name not in known[piece.number]
                if name not in state[tensor]:
                    is_new = True
                    shape = value.shape if piece.whole else tensor.shape
                    like = torch.empty(shape, dtype=value.dtype, device="meta")
                    buffer = self._host.empty(like, direct=not self._is_cut)
                    state[tensor][name] = self._buffers[piece.number, name] = buffer
                    if self._is_cut:  # the rows of other parts are not written yet
                        state[tensor][name].zero_()
                pairs.append((_cut(state[tensor][name], piece), value))
        return pairs, is_new, has_fresh


def _by_category(staged: _Staged, stand_ins: list[torch.nn.Parameter]) -> list[tuple[str, torch.Tensor]]:
    """What a slice has on the device, for the ledger."""
    found = [("master_weights", master) for master in staged.masters if master is not None]
    found += [("optimizer_state", value) for state in staged.states for value in state.values()]
    return found + [("gradients", stand_in.grad) for stand_in in stand_ins if stand_in.grad is not None]


def _slices(pieces: list[Piece], limit: int | None) -> list[list[Piece]]:
    """Cut pieces of tensors into slices of at most ``limit`` elements; None: all in one."""
    if limit is None or not pieces:
        return [pieces] if pieces else []
    slices: list[list[Piece]] = [[]]
    room = limit - _GAP
    for index, start, stop, whole in pieces:
        size = stop - start
        while start < stop:
            taken = stop - start if stop - start <= room else max(room, 0) // _GRAIN * _GRAIN
            if taken:
                slices[-1].append(Piece(index, start, start + taken, whole and taken == size))
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


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _without_elements(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in state.items() if not has_elements(value)}
