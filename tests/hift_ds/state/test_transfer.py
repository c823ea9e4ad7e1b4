"""State off the device: what is there when, that every wait is needed, and that no bit gets lost on the way."""

import contextlib
import errno
import gc
import os
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import hift_ds.state.allocator
import hift_ds.state.codec
import hift_ds.state.direct_io
import hift_ds.state.step
import hift_ds.state.transfer
from hift_ds.state.allocator import HostMemory
from hift_ds.state.codec import FIRST_MOMENT, SECOND_MOMENT, Split
from hift_ds.state.saved import SavedState, Span
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import Lane, Slot, Staging
from tests.support.device_memory import DeviceMemory
from tests.support.lazy_streams import Event, LazyStreams, MissingWait

CPU = torch.device("cpu")


# ---- every wait, on the parts ---------------------------------------------------------------------------------------


class Owner:
    """The least that a block's optimizer has to be: AdamW over fp32 masters of bf16 weights, or over fp32 weights."""

    factor = None

    def __init__(self, sizes: list[int], has_masters: bool, generator: torch.Generator):
        start = [torch.randn(size, generator=generator) for size in sizes]
        self._weights = [weights.bfloat16() for weights in start] if has_masters else []
        self.optimizer: Any = torch.optim.AdamW([torch.nn.Parameter(weights) for weights in start], lr=1e-2)
        self._tensors: list[torch.Tensor] = self.optimizer.param_groups[0]["params"]
        self.gradients = [torch.zeros_like(weights) for weights in start]

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        return [(tensor, 0) for tensor in self._tensors]

    def gradient_parts(self, index: int) -> list[torch.Tensor]:
        return [self.gradients[index]]

    def weights(self, index: int) -> torch.Tensor | None:
        return self._weights[index] if self._weights else None

    def first_element(self) -> int:
        return 0

    def everything(self) -> list[torch.Tensor]:
        state = [value for tensor in self._tensors for value in self.optimizer.state[tensor].values()]
        return [value.detach().clone() for value in [*self._weights, *self._tensors, *state]]

    def to_host(self, host: HostMemory) -> None:
        """Keep the weights in host memory."""
        kept = [host.empty(weights) for weights in self._weights]
        for buffer, weights in zip(kept, self._weights, strict=True):
            buffer.copy_(weights)
        self._weights = kept


@contextlib.contextmanager
def tables_on_host() -> Iterator[None]:
    """Masters and state are read and changed on the host, and so are the codec's tables then."""
    tables = hift_ds.state.codec.tables

    def on_host(*args: Any) -> list[torch.Tensor]:
        found = tables(*args)
        copies = [HostMemory().empty(table) for table in found]
        for copy, table in zip(copies, found, strict=True):
            copy.copy_(table)
        return copies

    with mock.patch.object(hift_ds.state.codec, "tables", on_host):
        yield


FORMATS: dict[str | None, Any] = {None: Split(), "exp_avg": FIRST_MOMENT, "exp_avg_sq": SECOND_MOMENT}


def random_steps(
    seed: int,
    steps: int,
    slot_bytes: int | None,
    prefetch: bool,
    folder: str | None = None,
    encodes: bool = False,
    weights_on_host: bool = False,
) -> list[torch.Tensor]:
    """Blocks of random sizes, stepped in random order; between the steps their state is read, changed and refetched.

    Returns all that was seen on the way and at the end.
    """
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    host = HostMemory(folder=folder)
    staging = Staging(CPU, slot_bytes, host.direct)
    owners, states = [], []
    for number in range(4):
        sizes = [chance.randrange(1, 4000) for _ in range(chance.randrange(1, 4))]
        has_masters = number != 1
        owner = Owner(sizes, has_masters, generator)
        waits = weights_on_host and has_masters
        if waits:
            owner.to_host(host)
        codecs = {name: codec for name, codec in FORMATS.items() if encodes and (has_masters or name is not None)}
        per_element = (2.125 if has_masters else 4) + 2 * 260 / 256 + 2 * waits if encodes else 12 + 2 * waits
        owners.append(owner)
        states.append(BlockState(owner, host, staging, per_element, (), ADAMW, codecs=codecs, weights_on_host=waits))
    seen: list[torch.Tensor] = []
    for _ in range(steps):
        block = chance.randrange(len(owners))
        owner, state = owners[block], states[block]
        action = chance.random()
        if prefetch and action < 0.9:
            state.prefetch()
        if action < 0.1:  # another block comes first after all
            state.discard_prefetched()
            state, owner = states[block - 1], owners[block - 1]
            if prefetch:
                state.prefetch()
        elif action < 0.2:
            for other in states:
                other.settle()
            with tables_on_host():
                state.decode({None, "exp_avg", "exp_avg_sq"})
                seen += owner.everything()
                master, _ = owner.masters()[0]
                master.data.mul_(0.5)
                state.to_host()
        for gradient in owner.gradients:
            gradient.normal_(generator=generator)
        state.step()
    for state in states:
        state.settle()
        with tables_on_host():
            state.decode({None, "exp_avg", "exp_avg_sq"})
    return seen + [tensor for owner in owners for tensor in owner.everything()]


# Of blocks of up to 12,000 elements, whose masters and moments take 12 bytes each, 1,500 fit into a slot.
SLOTS = {"streamed": 18_000, "block": None}
ADAMW = [("exp_avg", torch.float32), ("exp_avg_sq", torch.float32)]


def same(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return len(ours) == len(truth) and all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def check_lazy_steps(seed: int, steps: int, step: str, **options: bool) -> int:
    """Random steps under lazy streams with prefetch, against the same without either; returns the copies made."""
    slot_bytes = SLOTS[step] and 2 * SLOTS[step] if options else SLOTS[step]
    truth = random_steps(seed, steps, slot_bytes, prefetch=False, **options)
    assert all(tensor.isfinite().all() for tensor in truth)
    with LazyStreams() as machine:
        ours = random_steps(seed, steps, slot_bytes, prefetch=True, **options)
    assert same(ours, truth)
    return machine.copies


@pytest.mark.parametrize("step", SLOTS)
def test_lazy_streams_change_nothing(step: str) -> None:
    assert check_lazy_steps(seed=1, steps=60, step=step) > 400


@pytest.mark.parametrize(
    "options", [{"encodes": True}, {"weights_on_host": True, "encodes": True}, {"weights_on_host": True}]
)
@pytest.mark.parametrize("step", SLOTS)
def test_lazy_streams_change_nothing_in_other_formats(step: str, options: dict[str, bool]) -> None:
    assert check_lazy_steps(seed=3, steps=60, step=step, **options) > 300


def test_formats_and_chunks_change_no_bit() -> None:
    """Masters are exact in every format, moments in 8 bits are the same in all chunks."""
    truth = random_steps(4, 60, SLOTS["streamed"], prefetch=True)
    assert same(random_steps(4, 60, 36_000, prefetch=True, weights_on_host=True), truth)
    truth = random_steps(4, 60, SLOTS["block"], prefetch=True, encodes=True)
    assert same(random_steps(4, 60, 36_000, prefetch=True, encodes=True), truth)
    assert same(random_steps(4, 60, 2**20, prefetch=True, encodes=True, weights_on_host=True), truth)


@pytest.mark.slow
@pytest.mark.parametrize("step", SLOTS)
def test_lazy_streams_change_nothing_in_1000_steps(step: str) -> None:
    check_lazy_steps(seed=2, steps=1000, step=step)


def without_waits(owner: Any, method: str, **patches: Any) -> Callable[[], Any]:
    """A mutation: names of ``hift_ds.state.transfer`` or ``hift_ds.state.step`` do nothing inside that method."""

    def mutate() -> Any:
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for name, module in patches.items():
                    stack.enter_context(mock.patch.object(module, name, lambda *_: None))
                return original(*args, **kwargs)

        return mock.patch.object(owner, method, call)

    return mutate


def without_waiting_for(free: bool, written: bool) -> Callable[[], Any]:
    """A mutation: a slot is filled without waiting until it is free, or until what goes there is written."""

    def mutate() -> Any:
        fill, first = Staging.fill, {}

        def call(staging: Staging, sources: Any, event: Any) -> Any:
            slot = staging.free[0]
            before = slot.free
            first.setdefault(slot, before)  # at the very first, nothing is known of the area's memory
            slot.free = first[slot] if free else before
            try:
                return fill(staging, sources, None if written else event)
            finally:
                slot.free = before

        return mock.patch.object(Staging, "fill", call)

    return mutate


# What is taken out, and under which placement of the step that has to show.
MUTATIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    "a slot is filled before it is free": ("streamed", without_waiting_for(free=True, written=False)),
    "a slot is filled before its contents are written": ("block", without_waiting_for(free=True, written=True)),
    "an area is filled while its memory is in use": (
        "block",
        without_waits(Staging, "fill", mark=hift_ds.state.transfer),
    ),
    "a slice goes back before it is stepped": (
        "streamed",
        without_waits(Staging, "drain", mark=hift_ds.state.transfer),
    ),
    "a block goes back before it is stepped": ("block", without_waits(Staging, "drain", mark=hift_ds.state.transfer)),
    "a slice is stepped before it is there": ("streamed", without_waits(BlockState, "step", wait=hift_ds.state.step)),
    "a block is stepped before it is there": ("block", without_waits(BlockState, "step", wait=hift_ds.state.step)),
    "what is forgotten is freed under way": (
        "block",
        without_waits(BlockState, "discard_prefetched", wait=hift_ds.state.step),
    ),
    "what goes back is freed under way": ("block", lambda: mock.patch.object(Lane, "outlives", lambda *_: None)),
    "settled before it is written": ("streamed", lambda: mock.patch.object(Event, "synchronize", lambda _: None)),
    "settled with what was fetched": (
        "streamed",
        lambda: mock.patch.object(BlockState, "discard_prefetched", lambda _: None),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_wait_can_be_taken_out(mutation: str) -> None:
    step, mutate = MUTATIONS[mutation]
    truth = random_steps(1, 60, SLOTS[step], prefetch=False)
    with LazyStreams(), mutate():
        try:
            ours = random_steps(1, 60, SLOTS[step], prefetch=True)
        except (MissingWait, KeyError):  # KeyError: no slot was free for a chunk
            return
    assert not same(ours, truth), "nobody would notice"


def test_a_slot_is_first_filled_after_earlier_computations() -> None:
    """They may still use its memory. Here nothing else makes the copy wait for them."""

    class Unmarked(Slot):
        def __init__(self, area: torch.Tensor | None):
            super().__init__(area)
            self.free = None

    with LazyStreams():
        owner = Owner([3000], True, torch.Generator().manual_seed(0))
        state = BlockState(owner, HostMemory(), Staging(CPU, SLOTS["streamed"]), bytes_per_element=12)
        state._staging = Staging(CPU, SLOTS["streamed"])
        state.prefetch()
        state.settle()
        with mock.patch.object(hift_ds.state.transfer, "Slot", Unmarked):
            state._staging = Staging(CPU, SLOTS["streamed"])
        with pytest.raises(MissingWait):
            state.prefetch()


@pytest.mark.parametrize("lazy", (False, True))
def test_new_state_does_not_pile_up_on_the_device(lazy: bool) -> None:
    """The first step makes the moments outside of the slots; they go to the host chunk by chunk."""
    elements = 60_000
    with DeviceMemory() as memory, LazyStreams() if lazy else contextlib.nullcontext():
        owner = Owner([elements], True, torch.Generator().manual_seed(0))
        staging = Staging(CPU, SLOTS["streamed"])
        state = BlockState(owner, HostMemory(), staging, bytes_per_element=12)
        for label in ("first", "second"):
            owner.gradients[0].fill_(1.0)
            memory.reset()
            before = memory.live["total"]
            state.step()
            chunk = SLOTS["streamed"] // 12  # elements, at most
            # Of a chunk: gradient, two new moments, what AdamW makes for itself. The chunk before may still be there.
            bound = 2 * (4 + 8 + 8) * chunk
            assert bound < 8 * elements / 4, "the block is too small to tell a chunk's moments from all of them"
            assert memory.peak["total"] - before <= bound, label
        state.settle()


@pytest.mark.parametrize(
    ("place", "trips"), [("memory", 1000), ("files", 100), pytest.param("files", 1000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("step", SLOTS)
def test_round_trips_keep_every_bit(step: str, place: str, trips: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    host = HostMemory(folder=str(tmp_path) if place == "files" else None)
    owner, staging = Owner([3000, 70, 1], True, generator), Staging(CPU, SLOTS[step], host.direct)
    state = BlockState(owner, host, staging, bytes_per_element=12)
    state.step()
    state.settle()
    optimizer, masters = owner.optimizer, [tensor for tensor, _ in owner.masters()]
    resident = [tensor.data for tensor in masters]
    resident += [optimizer.state[tensor][name] for tensor in masters for name in ("exp_avg", "exp_avg_sq")]
    for tensor in resident:  # any pattern of bits, NaNs among them
        tensor.view(torch.int32).random_(-(2**31), 2**31, generator=generator)
    before = [tensor.view(torch.int32).clone() for tensor in resident]
    addresses = [tensor.data_ptr() for tensor in resident]

    def negate() -> None:
        for tensor in optimizer.param_groups[0]["params"]:
            for values in (tensor.data, optimizer.state[tensor]["exp_avg"], optimizer.state[tensor]["exp_avg_sq"]):
                values.view(torch.int32).bitwise_not_()

    optimizer.step = negate
    for trip in range(trips):
        if trip % 2:
            state.prefetch()
        if trip % 3 == 0:
            state.settle()
        state.step()
        state.settle()
        expected = before if trip % 2 else [~values for values in before]
        assert same([tensor.view(torch.int32) for tensor in resident], expected), f"trip {trip}"
    assert [tensor.data_ptr() for tensor in resident] == addresses


def test_the_allocator_hears_of_tensors_that_a_lane_still_uses() -> None:
    """A device's allocator would give their memory away as soon as Python lets go of them."""
    stream, tensor = object(), mock.Mock()
    tensor.device.type = "cuda"
    with mock.patch.object(hift_ds.state.transfer, "get_accelerator", lambda: mock.Mock(Stream=lambda: stream)):
        Lane().outlives(tensor)
    tensor.record_stream.assert_called_once_with(stream)


def test_tensors_in_a_slot_are_aligned() -> None:
    """Kernels and copy engines of a device are fast, or work at all, on aligned addresses."""
    sources = [torch.arange(n, dtype=dtype) for n in (1, 3, 65, 7) for dtype in (torch.float32, torch.int16)]
    for slot_bytes in SLOTS.values():
        staging = Staging(CPU, slot_bytes)
        slot, copies, _ = staging.fill(sources, None)
        assert slot.area is not None and same(copies, sources)
        assert [(copy.data_ptr() - slot.area.data_ptr()) % 256 for copy in copies] == [0] * len(copies)


def test_chunks_of_a_tensor_begin_where_kernels_cut_it() -> None:
    """At multiples of 1,024 elements, and each element once: a vectorized kernel then rounds as on the whole tensor."""
    owner = Owner([5000, 3000, 700], True, torch.Generator().manual_seed(0))
    state = BlockState(owner, HostMemory(), Staging(CPU, SLOTS["streamed"]), bytes_per_element=12)
    slices = [cut for chunk in state._plans[0].chunks for cut in chunk]
    for number, size in enumerate((5000, 3000, 700)):
        spans = [(cut.start, cut.stop) for cut in slices if cut.number == number]
        assert all(start % 1024 == 0 for start, _ in spans)
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == size
    assert len(slices) > 5


class CountsInItsGroup(torch.optim.SGD):
    """Keeps its count of steps in the parameter group, and one in plain numbers, as some fused optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["lr"] = 1.0 / group["step"]
            for parameter in group["params"]:
                self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
        return super().step(closure)


def test_slices_of_one_step_count_as_one() -> None:
    owner = Owner([5000], True, torch.Generator().manual_seed(0))
    owner.optimizer = CountsInItsGroup([{"params": [tensor]} for tensor, _ in owner.masters()], lr=1.0)
    state = BlockState(owner, HostMemory(), Staging(CPU, SLOTS["streamed"]), bytes_per_element=12)
    assert len(state._plans[0].chunks) > 1
    for step in range(1, 4):
        state.step()
        assert owner.optimizer.param_groups[0]["step"] == step


def test_parts_of_a_tensor_count_for_themselves() -> None:
    owner = Owner([5000], True, torch.Generator().manual_seed(0))
    owner.optimizer = CountsInItsGroup([{"params": [tensor]} for tensor, _ in owner.masters()], lr=1.0)
    parts = [(0, 1500), (1500, 5000), (5000, 7000)]  # the last one is on another rank
    state = BlockState(owner, HostMemory(), Staging(CPU, SLOTS["streamed"]), bytes_per_element=12, slices=parts)
    (tensor,) = owner.optimizer.param_groups[0]["params"]
    done = [0, 0, 0]
    for part in (1, 0, 1, 1, 2, 0, 1, 2, 0):
        state.select(part)
        state.step()
        done[part] += 1
        if part < 2:
            assert owner.optimizer.param_groups[0]["step"] == done[part]
            assert owner.optimizer.state[tensor]["count"] == done[part]
    other = BlockState(owner, HostMemory(), Staging(CPU, SLOTS["streamed"]), bytes_per_element=12, slices=parts)
    spans = [[Span("weight", 0, 5000, 0)]]
    (ours,) = state.saved(spans, {"step"}, True)
    theirs = ours.counted[0]._replace(elements=parts[2])
    saved = [ours, ours._replace(spans=[Span("weight", 5000, 2000, 0)], counted=[theirs])]
    other.load(SavedState(saved), spans, {"step"})
    other.select(0)
    other.step()
    assert owner.optimizer.param_groups[0]["step"] == owner.optimizer.state[tensor]["count"] == done[0] + 1


def test_parts_step_as_tensors_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    owner, parts = Owner([5000], True, generator), [(0, 1111), (1111, 5000)]
    state = BlockState(owner, HostMemory(), Staging(CPU, SLOTS["streamed"]), bytes_per_element=12, slices=parts)
    (master,) = owner.masters()
    alone = [torch.nn.Parameter(master[0].detach()[start:stop].clone()) for start, stop in parts]
    optimizers = [torch.optim.AdamW([parameter], lr=1e-2) for parameter in alone]
    for part in (1, 1, 0, 1, 0, 1):
        owner.gradients[0].normal_(generator=generator)
        start, stop = parts[part]
        alone[part].grad = owner.gradients[0][start:stop].clone()
        optimizers[part].step()
        state.select(part)
        state.prefetch()
        state.step()
    state.settle()
    assert torch.equal(master[0].detach(), torch.cat([parameter.detach() for parameter in alone]))


@pytest.mark.parametrize("what", (errno.ENOSPC, errno.EROFS))
def test_a_full_disk_is_named(what: int, tmp_path: Path) -> None:
    host = HostMemory(folder=str(tmp_path))
    kept = host.empty(torch.empty(10))
    with mock.patch("os.posix_fallocate", side_effect=OSError(what, os.strerror(what))):
        with pytest.raises(OSError, match="4000 more bytes .* in addition to 40 bytes") as caught:
            host.empty(torch.empty(1000))
    assert caught.value.errno == what and str(tmp_path) in str(caught.value)
    assert host.buffers == [kept] and not list(tmp_path.iterdir())


def test_a_step_that_ends_between_two_chunks_is_not_taken_again() -> None:
    owner = Owner([4000], True, torch.Generator().manual_seed(0))
    state = BlockState(owner, HostMemory(), Staging(CPU, SLOTS["streamed"]), 12, (), ADAMW)
    calls, step = [0], owner.optimizer.step

    def fails(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("no drive")
        step()

    owner.optimizer.step = fails
    with pytest.raises(OSError, match="no drive"):
        state.step()
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        state.step()
    state.settle()
    spans = [[Span("weight", 0, 4000, 0)]]
    state.load(SavedState(state.saved(spans, (), True)), spans, ())  # as a checkpoint does
    state.step()


def test_state_is_freed_with_its_owner_and_not_when_python_looks_for_cycles() -> None:
    owner = Owner([4000], True, torch.Generator().manual_seed(0))
    state = BlockState(owner, HostMemory(), Staging(CPU, 36_000), 10.125, (), ADAMW, codecs={None: Split()})
    state.step()
    gone = weakref.ref(state)
    gc.disable()
    try:
        del state
        assert gone() is None
    finally:
        gc.enable()
