"""The optimizer step of one block, whose fp32 masters and optimizer state live on the device or off it.

Off the device, they come there in chunks. The configured torch optimizer steps each chunk, and the chunk goes back.
With one chunk that holds everything, this is the paper's step: the whole block's state is on the device (section 3.1).
With small chunks the device never holds even one block's state. For an element-wise optimizer both give the same bits.

If the optimizer computes on the host, masters and state stay where they are. Gradients and updated weights travel.

The store may keep masters and state in fewer bytes (``codec.py``). They are decoded for the step, and encoded after it,
on the device, a chunk at a time.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils._pytree import tree_map_only

from hift_ds.config import CODEC_ALIGNMENT, SLOT_OVERHEAD
from hift_ds.optim.properties import assembled, has_elements, parts
from hift_ds.state.allocator import HostMemory
from hift_ds.state.codec import Codec
from hift_ds.state.encoded import EncodedState, Slice, view, without_memory
from hift_ds.state.gradients import fp32_slice
from hift_ds.state.host_step import CHUNK, HostStep
from hift_ds.state.saved import Counted, SavedMaster, SavedState, Span, encoded_entry
from hift_ds.state.transfer import Run, Slot, Staging, wait

# Elements by which the alignment of tensors in a slot can enlarge a slice, at most.
_SLICE_OVERHEAD = 128


class SteppedOptimizer(Protocol):
    """What :class:`BlockState` needs to know of a block's optimizer."""

    optimizer: Any  # the torch optimizer, whose parameters are the masters
    factor: Any  # in a step, what the gradients are multiplied by, where the optimizer computes; None: by nothing

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return each fp32 master with the index of its parameter group, in order.

        fp32 weights without masters of their own count as masters.
        """
        ...

    def gradient_parts(self, index: int) -> list[torch.Tensor]:
        """Return tensors on the device whose concatenation is the gradient of a master; empty: it is zero."""
        ...

    def weights(self, index: int) -> torch.Tensor | None:
        """Return the weights that belong to a master; None: the master is the weights."""
        ...

    def first_element(self) -> int:
        """Return the index of the first master's first element in the only parameter; called if it is cut by rows."""
        ...


class Replicas(Protocol):
    """Ranks that all compute the same update, and share the weights in host memory."""

    is_first: bool  # this rank writes the weights

    def meet_on_device(self) -> None:
        """Let the device's current stream wait until those of all ranks are here."""
        ...


class _StagedChunk(NamedTuple):
    """A chunk on the device.

    Attributes:
        slot: None if nothing of it ever leaves the device.
        masters: of each slice; None: it never left the device, or is encoded.
        states: of each slice by name, as far as it is not encoded.
        rooms: of each slice by name, the room in the slot for state that the optimizer makes in this step.
        encoded: the parts of each encoded value, flat, for all slices.
        weights: the weights, flat, for all slices, if they are kept on the host.
        ready: event after which it is there.
    """

    slot: Slot | None
    masters: list[torch.Tensor | None]
    states: list[dict[str, Any]]
    rooms: list[dict[str, torch.Tensor]]
    encoded: dict[str | None, list[torch.Tensor]]
    weights: torch.Tensor | None
    ready: Any


class _Decoded(NamedTuple):
    """What a chunk needs on the device only for its step: flat fp32 values, and views of them for each slice."""

    flat: dict[str | None, torch.Tensor]
    views: dict[str | None, list[torch.Tensor]]


@dataclass
class _BlockPlan:
    """How one block is stepped.

    The last three attributes matter only if several blocks share a parameter that is cut by rows. ``optimizer.state``
    then holds the counts of the block that was stepped last.

    Attributes:
        chunks: the slices that are on the device at a time.
        written: for each chunk, the event after which it is in host memory again.
        counts: for each master, the state without elements (such as a step count).
        settings: for each parameter group, what the optimizer itself counts there.
        is_new: the optimizer has not made state for this block yet.
    """

    chunks: list[list[Slice]]
    written: list[Any]
    counts: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    is_new: bool = False


class BlockState:
    """fp32 masters and optimizer state of one block's optimizer, in their store except during a step.

    If a parameter is cut by rows, this is the state of the whole parameter. The blocks that train slices of it share
    this state, but each has its own step count: :meth:`select` chooses the block to step.

    The tensors in ``optimizer.state`` and the masters' ``data`` are the host buffers. The device only holds copies.

    Args:
        owner: the block's optimizer.
        host: the store, which allocates the buffers; None: masters and state stay on the device, and nothing is copied.
        staging: holds the state on the device during a step.
        bytes_per_element: bytes of one element in a slot. With the size of a slot this gives the number of elements in
            a chunk.
        slices: for each block that shares the only parameter, the first and last (exclusive) element that it trains;
            empty: one block trains everything.
        state: name and dtype of the tensors of state that the first step will make, all of the master's shape. Their
            buffers are allocated now, so that training needs no more host memory; others when they are made.
        on_host: the optimizer computes on the host, through these areas; None: it computes on the device.
        codecs: the format in the store of the masters (None) and of state by name; all others are kept as they are.
        weights_on_host: the owner's ``weights`` are in host memory.
        replicas: ranks that compute the same update, and share these weights; None: each rank writes what it updates.

    Attributes:
        staged: while ``on_first_chunk`` runs: category and tensor of what the first chunk has on the device only for
            the step: masters, state and fp32 gradients.
        on_first_chunk: called once in each step, when the first chunk, which is the largest, is ready to be stepped.
    """

    def __init__(
        self,
        owner: SteppedOptimizer,
        host: HostMemory | None,
        staging: Staging,
        bytes_per_element: float,
        slices: Sequence[tuple[int, int]] = (),
        state: Sequence[tuple[str, torch.dtype]] = (),
        on_host: HostStep | None = None,
        codecs: Mapping[str | None, Codec] | None = None,
        weights_on_host: bool = False,
        replicas: Replicas | None = None,
    ):
        self._owner = owner
        self._weights_on_host, self._replicas = weights_on_host, replicas
        self._writes_weights = replicas is None or replicas.is_first
        self._host = host
        self._on_host = on_host
        self._moves_state = host is not None and on_host is None
        self._staging = staging
        self._masters = [master for master, _ in owner.masters()]
        self._groups = [group for _, group in owner.masters()]
        # fp32 weights at stage 0 are their own masters: on the device, or in host memory that is not this store's.
        self._are_weights = [owner.weights(i) is None for i in range(len(self._masters))]
        self._off_device = [host is not None and (weights_on_host or not own) for own in self._are_weights]
        limit = CHUNK if on_host is not None else None
        if self._moves_state and staging.slot_bytes is not None and bytes_per_element:
            limit = int((staging.slot_bytes - (SLOT_OVERHEAD if codecs or weights_on_host else 0)) // bytes_per_element)
        # Elements by which the alignment of tensors in a slot can enlarge a slice, at most.
        overhead = CODEC_ALIGNMENT if codecs or weights_on_host else _SLICE_OVERHEAD
        self._elements: list[tuple[int, int] | None] = list(slices) or [None]
        owned = self._slices_of_blocks(slices)
        self._plans = [self._plan(of_block, limit, overhead) for of_block in owned]
        self._active = self._plans[0]
        self._buffers: dict[tuple[int, str | None, int], torch.Tensor] = {}
        self._nothing = torch.full((), torch.nan, dtype=torch.float32, device="cpu")
        self._new_state = dict(state) if self._moves_state else {}
        # Not a method of this object: state in a cycle of references would stay until Python looks for cycles.
        buffer = functools.partial(_buffer_in_store, host, self._buffers)
        self._encoded = EncodedState(codecs or {}, [cut for of_block in owned for cut in of_block], buffer)
        self._has_new_weights = False  # the remainders in the store belong to earlier ones
        self._encoded.reserve()
        self._fetched: dict[int, _StagedChunk] = {}
        self._made: set[str] = set()  # names of encoded state that the optimizer makes in this step
        self._failed = False  # a step ended between two chunks
        self._parts: list[list[torch.Tensor]] = []  # of the gradient of each master, in a step
        self._gradients: dict[Slice, torch.Tensor] = {}  # on the host, if the optimizer computes there
        if on_host is not None:
            for plan in self._plans:
                on_host.reserve(sum(cut.stop - cut.start for chunk in plan.chunks for cut in chunk))
        self.staged: list[tuple[str, torch.Tensor]] = []
        self.on_first_chunk: Callable[[], None] | None = None
        self.to_host()
        for index, master in enumerate(self._masters):
            for name, dtype in state:
                if name not in self._encoded.codecs:
                    self._buffer((index, name, 0), torch.empty(master.shape, dtype=dtype, device="meta"))

    def _slices_of_blocks(self, slices: Sequence[tuple[int, int]]) -> list[list[Slice]]:
        """Return for each block the slices of the masters that it trains on this rank."""
        whole = [Slice(index, 0, master.numel(), True) for index, master in enumerate(self._masters)]
        if not slices:
            return [whole]
        (master,) = self._masters
        size, first, place = master.numel(), self._owner.first_element(), 0
        owned = []
        for start, stop in slices:
            low, high = (min(max(end - first, 0), size) for end in (start, stop))
            own = [Slice(0, low, high, high - low == size, place)] if low < high else []
            owned.append(own)
            place += sum(cut.room for cut in own)
        return owned

    def _plan(self, slices: list[Slice], limit: int | None, overhead: int) -> _BlockPlan:
        chunks = _chunks(slices, limit, overhead)
        state = self._owner.optimizer.state
        counts = [_without_elements(state.get(master, {})) for master in self._masters]
        settings: list[dict[str, Any]] = [{} for _ in self._owner.optimizer.param_groups]
        is_new = not any(map(state.get, self._masters))  # encoded state comes later
        return _BlockPlan(chunks, [None] * len(chunks), counts, settings, is_new)

    @property
    def _is_shared(self) -> bool:
        """Whether several blocks share the only parameter, which is cut by rows."""
        return len(self._plans) > 1

    def select(self, block: int) -> None:
        """Choose the block that is stepped next, by its index in ``slices``. Nothing may be fetched for another."""
        self._active = self._plans[block]

    def saved(self, spans: Sequence[Sequence[Span]], counted: Collection[str], with_masters: bool) -> list[SavedMaster]:
        """Return masters and state for a checkpoint. The masters must be decoded.

        Args:
            spans: of each master, what it holds.
            counted: settings in which the torch optimizer counts.
            with_masters: False: the checkpoint holds the masters as weights.
        """
        found = []
        for index, (master, own) in enumerate(zip(self._masters, spans, strict=True)):
            group = self._owner.optimizer.param_groups[self._groups[index]]
            state = self._owner.optimizer.state.get(master, {})
            if self._is_shared:  # another rank knows the counts of what it alone trains
                of_plans = [
                    Counted(elements, plan.counts[index], plan.settings[self._groups[index]], plan.is_new)
                    for plan, elements in zip(self._plans, self._elements, strict=True)
                    if plan.chunks
                ]
            else:
                settings = {key: group[key] for key in counted if key in group}
                is_new = not state and not self._encoded.parts_of(index)
                of_plans = [Counted(None, _without_elements(state), settings, is_new)]
            encoded = self._encoded.parts_of(index).items()
            found.append(
                SavedMaster(
                    list(own),
                    master.numel(),
                    master.detach() if with_masters else None,
                    {name: value for name, value in state.items() if has_elements(value)},
                    {name: encoded_entry(self._encoded.codecs[name], tensors) for name, tensors in encoded},
                    [(cut.start, cut.stop, cut.place) for cut in self._encoded.slices(index)],
                    of_plans,
                )
            )
        return found

    def load(
        self,
        saved: SavedState,
        spans: Sequence[Sequence[Span]],
        counted: Collection[str],
        with_masters: bool = True,
        recount: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> bool:
        """Load masters and state from a checkpoint. The weights are loaded already.

        Args:
            saved: the state in the checkpoint.
            spans: of each master, what it holds here.
            counted: settings in which the torch optimizer counts.
            with_masters: False: the masters become the weights.
            recount: returns counts of the checkpoint as this optimizer keeps them.

        Returns:
            Whether state in another format is encoded anew, because the checkpoint does not hold it in this place.
        """
        self._failed, self._has_new_weights = False, False
        self._encoded.forget_state()
        optimizer, is_recoded = self._owner.optimizer, False
        for index, (master, own) in enumerate(zip(self._masters, spans, strict=True)):
            if (weights := self._owner.weights(index)) is not None:
                values = saved.values(own, None, master) if with_masters else None
                if values is None:
                    values = weights.detach().to("cpu", torch.float32)
                if None in self._encoded.codecs:
                    master.data = values.view(master.shape)
                    self._encode_master(index)
                else:
                    master.data.copy_(values.view(master.shape))
            state: dict[str, Any] = {}
            for name in saved.state_names(own, master.numel()):
                codec, slices = self._encoded.codecs.get(name), self._encoded.slices(index)
                codes = codec and saved.codes(own, master.numel(), name, codec, slices)
                if codes:
                    self._encoded.load(index, name, codes)
                    continue
                values = saved.values(own, name, master)
                assert values is not None
                if codec is not None:
                    self._encoded.write(index, name, values)
                    is_recoded = True
                else:  # the store copies it
                    state[name] = values if self._host is not None else values.to(master.device, copy=True)
            group = optimizer.param_groups[self._groups[index]]
            for key in counted:
                group.pop(key, None)
            for plan, elements in zip(self._plans, self._elements, strict=True):
                of_plan = saved.counted(own, elements)
                plan.is_new = of_plan.is_new
                counts = dict(of_plan.counts) if plan.is_new else recount(of_plan.counts)
                if self._on_host is None and (group.get("fused") or group.get("capturable")):  # kernels of torch count
                    counts = tree_map_only(torch.Tensor, lambda count: count.to(self._staging.device), counts)
                plan.counts[index], plan.settings[self._groups[index]] = counts, dict(of_plan.settings)
                if not self._is_shared:
                    state |= counts
                    group.update(of_plan.settings)
            optimizer.state.pop(master, None)
            if state or self._encoded.parts_of(index):
                optimizer.state[master] = state
        if self._is_shared:
            self._load_counts_into_optimizer(self._active)
        self.to_host()
        return is_recoded

    def check_counts(self, saved: SavedState, spans: Sequence[Sequence[Span]]) -> None:
        """Raise a ValueError if what one block of this run trains was updated differently often."""
        for own, elements in itertools.product(spans, self._elements):
            saved.counted(own, elements)

    def to_host(self) -> None:
        """Move masters and state to the store, into their earlier buffers if they have any."""
        if self._host is None:
            return
        for index, master in enumerate(self._masters):
            if self._off_device[index] and self._are_weights[index]:
                pass
            elif self._off_device[index] and None not in self._encoded.codecs:
                master.data = self._in_buffer((index, None, 0), master.data)
            elif self._off_device[index] and not self._is_away(master):
                self._encode_master(index)
            state = self._owner.optimizer.state.get(master, {})
            for name, value in list(state.items()):
                if name in self._encoded.codecs:
                    self._encoded.write(index, name, state.pop(name))
                elif has_elements(value):
                    buffers = [self._in_buffer((index, name, i), part) for i, part in enumerate(parts(value))]
                    state[name] = assembled(value, buffers)

    def _encode_master(self, index: int) -> None:
        """Encode a master, and round its weights from it. What remains in its place has no memory, and is NaN."""
        master, weights = self._masters[index], self._owner.weights(index)
        assert weights is not None
        self._encoded.write(index, None, master.data)
        self._has_new_weights = False
        weights.data.copy_(master.data.view_as(weights))
        master.data = self._nothing.expand(master.shape)

    def _is_away(self, master: torch.Tensor) -> bool:
        """Whether a master's values are encoded in the store, and not in the tensor."""
        return master.data_ptr() == self._nothing.data_ptr()

    def weights_changed(self) -> None:
        """Let the masters be the weights, which something else than a step changed, such as ``load_state_dict``."""
        if None in self._encoded.codecs and not self._has_new_weights:
            self.settle()
            self._has_new_weights = True

    def _forget_remainders(self) -> None:
        if self._has_new_weights:
            self._encoded.clear(None)
            self._has_new_weights = False

    @property
    def splits_masters(self) -> bool:
        """Whether the store keeps only what the weights lack of the masters."""
        return None in self._encoded.codecs

    @property
    def is_encoded(self) -> bool:
        """Whether the store keeps anything in another format."""
        return bool(self._encoded.codecs)

    def decode(self, names: Collection[str | None], folder: str | None = None) -> None:
        """Decode values into fp32 tensors of the host, as far as they are encoded. :meth:`to_host` reverses it.

        Args:
            names: the masters (None), and state by name, which appears in ``optimizer.state``.
            folder: for files that hold the decoded masters; None: they are in memory.
        """
        self._forget_remainders()
        for index, master in enumerate(self._masters):
            for name in self._encoded.names(index):
                if name is None and name in names:
                    weights = self._owner.weights(index)
                    master.data = self._encoded.read(index, None, master.shape, weights, folder)
                elif name in names:
                    self._owner.optimizer.state[master][name] = self._encoded.read(index, name, master.shape)

    def discard_decoded(self) -> None:
        """Undo :meth:`decode`, without any change of what the store has."""
        for index, master in enumerate(self._masters):
            state = self._owner.optimizer.state.get(master, {})
            for name in self._encoded.names(index):
                if name is None:
                    master.data = self._nothing.expand(master.shape)
                else:
                    state.pop(name, None)

    def masters_in_store(self) -> list[torch.Tensor]:
        """Return the tensors that hold the masters between two steps, and that are not weights at the same time."""
        held = [
            master.data
            for index, master in enumerate(self._masters)
            if self._owner.weights(index) is not None and not self._is_away(master)
        ]
        return held + [buffer for (_, name, _), buffer in self._buffers.items() if name is None]

    def _in_buffer(self, key: tuple[int, str | None, int], value: torch.Tensor) -> torch.Tensor:
        """Return the host buffer of a master or of a part of its state, with this value.

        Args:
            key: number of the master, name of the state (None: the master itself), and number of the part.
            value: a plain tensor.
        """
        buffer = self._buffer(key, value)
        if buffer.data_ptr() != value.data_ptr():
            buffer.copy_(value)
        return buffer

    def _buffer(self, key: tuple[int, str | None, int], like: torch.Tensor) -> torch.Tensor:
        """Return the buffer of this key in the store, a new one unless it has the shape and dtype of ``like``."""
        if self._host is not None:
            return _buffer_in_store(self._host, self._buffers, key, like)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._buffers[key] = torch.empty_like(like, device=self._masters[key[0]].device)
        return buffer

    def held_gradients(self) -> Iterator[torch.Tensor]:
        """Yield the gradients of an update that is not issued yet."""
        for own in self._parts:
            yield from own

    def state_buffers(self) -> list[torch.Tensor]:
        """Return the buffers of all state except the masters, those of state not made yet included."""
        return [buffer for (_, name, _), buffer in self._buffers.items() if name is not None]

    def prefetch(self) -> None:
        """Start to copy the first chunks to the device that are not there yet, as many as there are free slots, and to
        read the others from their files."""
        self.read_ahead()
        if self._staging.free and len(self._fetched) < len(self._active.chunks):
            self._fill_slots(self._known_state())

    def read_ahead(self) -> None:
        """Start to read the selected block's state from its files, in the order of its chunks."""
        if self._host is None or self._host.direct is None:
            return
        of_master: dict[int, list[torch.Tensor]] = defaultdict(list)
        for (index, _, _), buffer in self._buffers.items():
            of_master[index].append(buffer.view(-1))
        slices = []
        for cut in (cut for chunk in self._active.chunks for cut in chunk if cut.stop > cut.start):
            size = self._masters[cut.number].numel()
            for buffer in of_master[cut.number]:
                start, stop = (end * buffer.numel() // size for end in (cut.start, cut.stop))
                slices.append(buffer[start:stop])
        self._staging.read_ahead(slices)

    def _fill_slots(self, known: list[dict[str | None, Any]], begin: int = 0) -> None:
        """Start to copy chunks from number ``begin`` on to the device that are not there yet, into the free slots."""
        for number in range(begin, len(self._active.chunks)):
            if number in self._fetched:
                continue
            if self._moves_state and not self._staging.free:
                return
            self._fetched[number] = self._fetch(number, known)

    def settle(self) -> None:
        """Wait until all state is in its store, and discard prefetched chunks. It can then be read and changed."""
        self._staging.finish_update()
        fetched = [chunk.ready for chunk in self._fetched.values()]
        self.discard_prefetched()
        for event in fetched:
            if event is not None:
                event.synchronize()
        for plan in self._plans:
            for event in plan.written:
                if event is not None:
                    event.synchronize()
        if self._host is not None and self._host.direct is not None:
            self._host.direct.release(self._buffers.values())

    def written(self) -> list[Any]:
        """Return the events after which the store and weights on the host have what the last step changed."""
        return [event for event in self._active.written if event is not None]

    def fetch_after(self, event: Any) -> None:
        """Let later copies of the selected block to the device wait for an event that follows :meth:`written`."""
        self._active.written = [event] * len(self._active.written)

    def discard_prefetched(self) -> None:
        """Discard chunks that were fetched and not stepped."""
        for chunk in self._fetched.values():
            wait(chunk.ready)
            if chunk.slot is not None:
                self._staging.drain(chunk.slot, [])
        self._fetched.clear()

    def _known_state(self) -> list[dict[str | None, Any]]:
        """Return the state of each master before the step, without any before the block's first step.

        For what is encoded, the master itself (None) included, the value is the codec.
        """
        self._forget_remainders()
        state, plan = self._owner.optimizer.state, self._active
        is_first = self._is_shared and plan.is_new
        known: list[dict[str | None, Any]] = []
        for index, master in enumerate(self._masters):
            encoded = {name: self._encoded.codecs[name] for name in self._encoded.names(index)}
            if is_first:
                known.append({name: codec for name, codec in encoded.items() if name is None})
                continue
            own = dict(state.get(master, {}))
            if self._is_shared:
                own = {**{name: v for name, v in own.items() if has_elements(v)}, **plan.counts[index]}
            known.append({**encoded, **own})
        return known

    def _fetch(self, number: int, known: list[dict[str | None, Any]]) -> _StagedChunk:
        """Start to copy a chunk to the device, into the next free slot."""
        plan = self._active
        if not self._moves_state:
            in_place: list[dict[str, Any]] = [
                {str(name): _part_of(v, cut) for name, v in known[cut.number].items() if has_elements(v)}
                for cut in plan.chunks[number]
            ]
            return _StagedChunk(None, [None] * len(in_place), in_place, [{} for _ in in_place], {}, None, None)
        chunk = plan.chunks[number]
        sources: list[torch.Tensor | Run] = []
        places: list[tuple[int, str | None]] = []
        for position, cut in enumerate(chunk):
            if self._off_device[cut.number] and None not in self._encoded.codecs:
                sources.append(view(self._masters[cut.number].data, cut))
                places.append((position, None))
            for name, value in known[cut.number].items():
                for part in parts(value):  # none of what is encoded
                    sources.append(view(part, cut))
                    places.append((position, name))
        rooms = self._rooms(chunk, known)
        runs = {
            name: self._encoded.runs(name, chunk, all(name in known[cut.number] for cut in chunk))
            for name in self._encoded.codecs
        }
        of_weights = self._runs_of_weights(chunk)
        everything = [*sources, *(room for _, _, room in rooms), *(run for own in runs.values() for run in own)]
        slot, copies, ready = self._staging.fill([*everything, *of_weights], plan.written[number])
        remaining = iter(copies)
        masters: list[torch.Tensor | None] = [None] * len(chunk)
        copied: list[dict[str, list[torch.Tensor]]] = [defaultdict(list) for _ in chunk]
        for (position, key), copy in zip(places, remaining, strict=False):
            if key is None:
                masters[position] = copy
            else:
                copied[position][key].append(copy)
        states = [
            {name: assembled(known[cut.number][name], own[name]) for name in own}
            for cut, own in zip(chunk, copied, strict=True)
        ]
        new: list[dict[str, torch.Tensor]] = [{} for _ in chunk]
        for (position, name, _), copy in zip(rooms, remaining, strict=False):
            new[position][name] = copy
        encoded = {name: [next(remaining) for _ in own] for name, own in runs.items()}
        return _StagedChunk(slot, masters, states, new, encoded, next(remaining, None), ready)

    def _rooms(self, chunk: list[Slice], known: list[dict[str | None, Any]]) -> list[tuple[int, str, torch.Tensor]]:
        """Return position, name, and a tensor without memory, for the state that the optimizer will make of a chunk.

        An area that is allocated for one chunk has no room for it: the state would exist twice.
        """
        if self._staging.slot_bytes is None:
            return []
        return [
            (position, name, torch.empty(_shape_of(self._masters[cut.number], cut), dtype=dtype, device="meta"))
            for position, cut in enumerate(chunk)
            for name, dtype in self._new_state.items()
            if name not in known[cut.number] and name not in self._encoded.codecs
        ]

    def _runs_of_weights(self, chunk: list[Slice]) -> list[Run]:
        """Return what a chunk's weights are copied from, if they are kept on the host; only room if nothing needs them.

        They are sources only if the masters are encoded: the step makes the weights from the masters.
        """
        if not self._weights_on_host or all(self._are_weights):
            return []
        pieces = self._weights_of(chunk)
        if None not in self._encoded.codecs:
            pieces = [without_memory(piece) for piece in pieces]
        return [Run(pieces, [cut.room for cut in chunk])]

    def _weights_of(self, chunk: list[Slice]) -> list[torch.Tensor]:
        """Return the weights of each slice, flat."""
        found = []
        for cut in chunk:
            weights = self._owner.weights(cut.number)
            assert weights is not None
            found.append(weights.data.view(-1)[cut.start : cut.stop])
        return found

    @property
    def is_on_host(self) -> bool:
        """Whether the optimizer computes on the host."""
        return self._on_host is not None

    def fetch_gradients(self) -> None:
        """Start to copy the selected block's gradients to where the optimizer computes.

        On the host they are there after the host's next wait for the device's current stream.
        """
        if self._on_host is None:
            return
        self._on_host.begin()
        self._gradients = {}
        for cut in (cut for chunk in self._active.chunks for cut in chunk):
            if parts := self._owner.gradient_parts(cut.number):
                self._gradients[cut] = self._on_host.fetch(parts, cut.start, cut.stop)

    def update(self, issue: Callable[[], None], late: bool) -> None:
        """Update the selected block. The owner may free the gradients at once.

        Args:
            issue: issues the update, with :meth:`step` in it.
            late: see :meth:`Staging.update <hift_ds.state.transfer.Staging.update>`.
        """
        self._hold_gradients()
        self._staging.update(issue, late)

    def _hold_gradients(self) -> None:
        if not self._parts:
            self._parts = [self._owner.gradient_parts(index) for index in range(len(self._masters))]

    @torch.no_grad()
    def step(self, following: "BlockState | None" = None) -> bool:
        """Step the selected block.

        Args:
            following: the state of the block that is stepped next. Its chunks are fetched into the slots that this
                block no longer needs.

        Returns:
            Whether the optimizer made new state, which it does in a block's first step.

        Raises:
            OSError: state in files could not be read or written.
        """
        if self._failed:
            raise RuntimeError(
                "an earlier step failed after some chunks of the block were stepped, so its state is not of one step; "
                "load a checkpoint"
            )
        optimizer, plan = self._owner.optimizer, self._active
        if not plan.chunks:  # other ranks hold all of it
            self._parts = []
            return False
        self._hold_gradients()
        for value in (*(part for own in self._parts for part in own), self._owner.factor):
            if torch.is_tensor(value):
                self._staging.uses(value)
        groups, state = optimizer.param_groups, optimizer.state
        known = self._known_state()
        if self._is_shared:
            self._load_counts_into_optimizer(plan)
        before = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        is_new, number = False, 0
        readers = self._replicas if self.splits_masters or any(self._are_weights) else None
        self._made = set()
        try:
            for number in range(len(plan.chunks)):
                self._fill_slots(known, number)
                chunk = self._fetched.pop(number)
                wait(chunk.ready)
                if readers is not None:  # they have fetched the weights that the first of them will overwrite
                    readers.meet_on_device()
                try:
                    pairs, is_host_new, is_device_new = self._step_chunk(number, chunk, known, before, groups, state)
                except BaseException:
                    if chunk.slot is not None:
                        self._staging.drain(chunk.slot, [])
                    raise
                is_new |= is_host_new
                if chunk.slot is not None:
                    written = plan.written[number] = self._staging.drain(chunk.slot, pairs)
                    if is_device_new and written is not None:
                        written.synchronize()  # new state is in no slot, and must not pile up on the device
                del chunk, pairs
                if following is not None and number + len(self._fetched) + 1 == len(plan.chunks):
                    # Copies in both directions run at once only if they are issued in turns.
                    following.prefetch()
        except BaseException:
            self._failed = number > 0
            raise
        finally:
            optimizer.param_groups, optimizer.state = groups, state
            self._parts = []
        for number, name in itertools.product({cut.number for chunk in plan.chunks for cut in chunk}, self._made):
            self._encoded.set_known(number, name)
        if self._is_shared:
            plan.is_new = False
            plan.counts = [_without_elements(state.get(master, {})) for master in self._masters]
            for group, earlier, settings in zip(groups, before, plan.settings, strict=True):
                settings.update({k: v for k, v in group.items() if k != "params" and earlier.get(k) is not v})
        return is_new

    def _load_counts_into_optimizer(self, plan: _BlockPlan) -> None:
        """Load this block's counts into ``optimizer.state`` and the parameter groups, in place of another block's."""
        optimizer = self._owner.optimizer
        for master, counts in zip(self._masters, plan.counts, strict=True):
            if master in optimizer.state:
                elements = {name: value for name, value in optimizer.state[master].items() if has_elements(value)}
                optimizer.state[master] = {**elements, **counts}
        counted = {key for other in self._plans for settings in other.settings for key in settings}
        for group, settings in zip(optimizer.param_groups, plan.settings, strict=True):
            for key in counted:
                group.pop(key, None)
            group.update(settings)

    def _step_chunk(
        self,
        number: int,
        chunk: _StagedChunk,
        known: list[dict[str | None, Any]],
        before: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        state: Any,
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], bool, bool]:
        """Step one chunk on the device; return what :meth:`_store_results` returns. Its gradients are freed here.

        Each chunk starts from the counts (``known``) and the settings (``before``) before the step, so that one step
        counts once.
        """
        optimizer, slices = self._owner.optimizer, self._active.chunks[number]
        decoded = self._decode_chunk(slices, chunk, known)
        parameters = self._chunk_parameters(slices, chunk, decoded)
        if number == 0 and self.on_first_chunk is not None:
            self.staged = [] if self.is_on_host else _by_category(chunk, decoded, parameters)
            self.on_first_chunk()
            self.staged = []
        by_group: dict[int, list[torch.Tensor]] = defaultdict(list)
        for cut, parameter in zip(slices, parameters, strict=True):
            by_group[self._groups[cut.number]].append(parameter)
        optimizer.state = defaultdict(dict)
        for position, (parameter, values, cut) in enumerate(zip(parameters, chunk.states, slices, strict=True)):
            for name, value in known[cut.number].items():
                if name in self._encoded.codecs:
                    continue
                optimizer.state[parameter][name] = values[name] if name in values else _copied(value)
            for name in decoded.views.keys() - {None}:
                optimizer.state[parameter][name] = decoded.views[name][position]
        optimizer.param_groups = [{**before[g], "params": members} for g, members in by_group.items()]
        optimizer.step()
        for members in by_group.values():
            _count_alike([optimizer.state[parameter] for parameter in members])
        for g, after in zip(by_group, optimizer.param_groups, strict=True):
            groups[g].update({key: value for key, value in after.items() if key != "params"})
        results = self._store_results(slices, chunk, decoded, parameters, optimizer.state, state, known)
        optimizer.param_groups, optimizer.state = groups, state
        return results

    def _decode_chunk(self, slices: list[Slice], chunk: _StagedChunk, known: list[dict[str | None, Any]]) -> _Decoded:
        """Decode what a chunk has in other formats. State that the optimizer has not made yet is not among it."""
        flat: dict[str | None, torch.Tensor] = {}
        for name, own in chunk.encoded.items():
            if all(name in known[cut.number] for cut in slices):
                size = sum(cut.room for cut in slices)
                flat[name] = torch.empty(size, dtype=torch.float32, device=self._staging.device)
                if name is None:
                    self._copy_weights(slices, chunk, flat[name])
                self._encoded.codecs[name].decode(own, flat[name])
        return _Decoded(flat, {name: self._views(values, slices) for name, values in flat.items()})

    def _copy_weights(self, slices: list[Slice], chunk: _StagedChunk, flat: torch.Tensor) -> None:
        """Copy the weights of a chunk into a flat fp32 tensor on the device, each slice with its room."""
        if chunk.weights is not None:
            flat.copy_(chunk.weights)
            return
        pieces = self._weights_of(slices)
        targets = flat.split([cut.room for cut in slices])
        torch._foreach_copy_([t[: p.numel()] for t, p in zip(targets, pieces, strict=True)], pieces)

    def _views(self, flat: torch.Tensor, slices: list[Slice]) -> list[torch.Tensor]:
        """Return each slice of a flat value in its shape."""
        return [
            values[: cut.stop - cut.start].view(_shape_of(self._masters[cut.number], cut))
            for values, cut in zip(flat.split([cut.room for cut in slices]), slices, strict=True)
        ]

    def _chunk_parameters(
        self, slices: list[Slice], chunk: _StagedChunk, decoded: _Decoded
    ) -> list[torch.nn.Parameter]:
        """Return for each slice a parameter on the device, with its gradient."""
        parameters = []
        for cut, master in zip(slices, decoded.views.get(None, chunk.masters), strict=True):
            values = master if master is not None else view(self._masters[cut.number].data, cut)
            parameter = torch.nn.Parameter(values)
            parameter.grad = self._gradient(cut, values)
            parameters.append(parameter)
        return parameters

    def _gradient(self, cut: Slice, values: torch.Tensor) -> torch.Tensor:
        """Return the fp32 gradient of a slice, unscaled and clipped, in the shape of its values; zeros if it has none.

        A gradient in fp32 is multiplied in its place if nothing reads it later.
        """
        owner, start = self._owner, cut.start
        if self._on_host is None:
            parts, is_last = self._parts[cut.number], owner.weights(cut.number) is None
        else:
            parts, is_last, start = [self._gradients[cut]] if cut in self._gradients else [], True, 0
        if not parts:
            return values.new_zeros(values.shape)
        stop = start + cut.stop - cut.start
        if not is_last or len(parts) > 1 or parts[0].dtype != torch.float32:
            return fp32_slice(parts, start, stop, owner.factor).view(values.shape)
        gradient = parts[0].reshape(-1)[start:stop].view(values.shape)
        return gradient if owner.factor is None else gradient.mul_(owner.factor)

    def _store_results(
        self,
        slices: list[Slice],
        chunk: _StagedChunk,
        decoded: _Decoded,
        parameters: list[torch.nn.Parameter],
        stepped: Any,
        state: Any,
        known: list[dict[str | None, Any]],
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], bool, bool]:
        """Update the weights and the counts after a chunk's step, and encode what the store has in other formats.

        Args:
            slices, chunk, decoded, parameters: the chunk.
            stepped: the optimizer's state of ``parameters``.
            state: the optimizer's state of the masters, which receives the counts and the buffers of new state.
            known: the state of the masters before the step.

        Returns:
            Pairs (host, device) of tensors to copy back, whether any tensor in the store is new, and whether any tensor
            on the device is new and therefore lies outside of the slot.
        """
        pairs, is_host_new, is_device_new = [], False, False
        for position, (cut, parameter) in enumerate(zip(slices, parameters, strict=True)):
            master = self._masters[cut.number]
            weights = self._owner.weights(cut.number)
            if weights is not None and self._on_host is not None:
                self._on_host.send(parameter.data, view(weights.data, cut))
            elif weights is not None and chunk.weights is None:
                view(weights.data, cut).copy_(parameter.data)
            is_written = not self._are_weights[cut.number] or self._writes_weights
            if self._off_device[cut.number] and self._moves_state and None not in decoded.flat and is_written:
                pairs.append((view(master.data, cut), parameter.data))
            for name, value in stepped[parameter].items():
                if name in self._encoded.codecs:
                    continue
                if not has_elements(value):
                    state[master][name] = value
                    continue
                if self._host is None and cut.whole:
                    is_host_new |= name not in known[cut.number]
                    state[master][name] = value
                    continue
                if name not in state[master]:
                    is_host_new = True
                    state[master][name] = assembled(value, self._new_buffers(cut, name, parts(value)))
                if name in chunk.rooms[position]:
                    value = chunk.rooms[position][name].copy_(value)
                else:
                    is_device_new |= name not in known[cut.number]
                for held, part in zip(parts(state[master][name]), parts(value), strict=True):
                    pairs.append((view(held, cut), part))
        if not self._moves_state:  # what was stepped in its place is there; new tensors are not
            for held, value in pairs:
                if held.data_ptr() != value.data_ptr():
                    held.copy_(value)
            return [], is_host_new, is_device_new
        if chunk.weights is not None:
            rounded = self._views(chunk.weights, slices)
            torch._foreach_copy_(rounded, [parameter.data for parameter in parameters])
            if self._writes_weights:
                pairs += zip(self._weights_of(slices), [values.view(-1) for values in rounded], strict=True)
        pairs += self._encode_chunk(slices, chunk, decoded, [stepped[parameter] for parameter in parameters])
        return pairs, is_host_new, is_device_new

    def _encode_chunk(
        self, slices: list[Slice], chunk: _StagedChunk, decoded: _Decoded, stepped: list[dict[str, Any]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Encode a chunk after its step into its slot, and yield pairs (host, device) to copy back."""
        for name, own in chunk.encoded.items():
            flat = decoded.flat.get(name)
            if name is not None:
                if not all(name in values for values in stepped):  # such as momentum that is switched off
                    continue
                if flat is None:
                    size = sum(cut.room for cut in slices)
                    flat = torch.zeros(size, dtype=torch.float32, device=self._staging.device)
                views = decoded.views.get(name) or self._views(flat, slices)
                changed = [
                    (held, values[name])
                    for held, values in zip(views, stepped, strict=True)
                    if held.data_ptr() != values[name].data_ptr()
                ]
                if changed:
                    torch._foreach_copy_([held for held, _ in changed], [value for _, value in changed])
                self._made.add(name)
            assert flat is not None
            self._encoded.codecs[name].encode(flat, own)
            for position, part in enumerate(own):
                sizes = [cut.room // self._encoded.codecs[name].parts[position].grain for cut in slices]
                hosts = [self._encoded.pieces(name, cut)[position] for cut in slices]
                yield from zip(hosts, part.split(sizes), strict=True)

    def _new_buffers(self, cut: Slice, name: str, values: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the host buffers of new state, which has a slice's shape or, if it is cut, its master's."""
        for number, value in enumerate(values):
            shape = value.shape if cut.whole else self._masters[cut.number].shape
            like = torch.empty(shape, dtype=value.dtype, device="meta")
            buffer = self._buffer((cut.number, name, number), like)
            if self._is_shared:  # the rows of other blocks are not written yet
                buffer.zero_()
            yield buffer


def _count_alike(states: Sequence[dict[str, Any]]) -> None:
    """Let all tensors of a call have its count of updates: DeepSpeed's fused optimizers count in only one of them."""
    for name in {name for state in states for name, value in state.items() if type(value) is int}:
        counting = [state for state in states if name in state]
        count = max(state[name] for state in counting)
        for state in counting:
            state[name] = count


def _buffer_in_store(
    host: HostMemory | None,
    buffers: dict[tuple[int, str | None, int], torch.Tensor],
    key: tuple[int, str | None, int],
    like: torch.Tensor,
) -> torch.Tensor:
    """Return the buffer of this key in host memory or in a file, as :meth:`BlockState._buffer` does."""
    assert host is not None
    buffer = buffers.get(key)
    if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
        buffer = buffers[key] = host.empty(like, of_master=key[1] is None)
    return buffer


def _by_category(
    chunk: _StagedChunk, decoded: _Decoded, parameters: list[torch.nn.Parameter]
) -> list[tuple[str, torch.Tensor]]:
    """Return category and tensor of everything that a chunk has on the device only for the step, for the ledger."""
    gradients = [("gradients", parameter.grad) for parameter in parameters if parameter.grad is not None]
    if chunk.slot is None:
        return gradients
    found = [("master_weights", master) for master in chunk.masters if master is not None]
    found += [("optimizer_state", part) for state in chunk.states for value in state.values() for part in parts(value)]
    for name, own in chunk.encoded.items():
        found += [("master_weights" if name is None else "optimizer_state", part) for part in own]
    return found + gradients


def _chunks(slices: list[Slice], limit: int | None, overhead: int) -> list[list[Slice]]:
    """Distribute slices over chunks of at most ``limit`` elements, and cut slices as needed; None: one chunk.

    ``overhead``: elements by which the alignment of tensors in a slot can enlarge a slice, at most.
    """
    if limit is None or not slices:
        return [slices] if slices else []
    chunks: list[list[Slice]] = [[]]
    room = limit - overhead
    for index, start, stop, whole, place in slices:
        size = stop - start
        while start < stop:
            taken = stop - start if stop - start <= room else max(room, 0) // CODEC_ALIGNMENT * CODEC_ALIGNMENT
            if taken:
                chunks[-1].append(Slice(index, start, start + taken, whole and taken == size, place))
                start, place = start + taken, place + taken
                room -= taken + overhead
            else:
                assert chunks[-1], f"a chunk of {limit} elements is too small"
                chunks.append([])
                room = limit - overhead
    return chunks


def _shape_of(master: torch.Tensor, cut: Slice) -> torch.Size | tuple[int]:
    """Return the shape of a slice of a tensor of the master's shape."""
    return master.shape if cut.whole else (cut.stop - cut.start,)


def _part_of(value: torch.Tensor, cut: Slice) -> torch.Tensor:
    """Return a slice of a value of optimizer state: a view."""
    return value if cut.whole else assembled(value, [view(part, cut) for part in parts(value)])


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _without_elements(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in state.items() if not has_elements(value)}
