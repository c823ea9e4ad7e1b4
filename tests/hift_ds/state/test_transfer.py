"""State off the device: what is there when, that every wait is needed, and that no bit gets lost on the way."""

import contextlib
import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import hift_ds.state.files
import hift_ds.state.host
import hift_ds.state.step
import hift_ds.state.transfer
from hift_ds.state.host import HostMemory
from hift_ds.state.step import BlockState, Slice
from hift_ds.state.transfer import Lane, Slot, Staging
from tests.integration.test_parity import STAGES
from tests.support import tiny
from tests.support.device_memory import DeviceMemory, skip_on_a_device
from tests.support.lazy_streams import Event, LazyStreams
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

CPU = torch.device("cpu")


# ---- every wait, on the parts ---------------------------------------------------------------------------------------


class Owner:
    """The least that a block's optimizer has to be: AdamW over fp32 masters of bf16 weights, or over fp32 weights."""

    def __init__(self, sizes: list[int], has_masters: bool, generator: torch.Generator):
        start = [torch.randn(size, generator=generator) for size in sizes]
        self._weights = [weights.bfloat16() for weights in start] if has_masters else []
        self.optimizer: Any = torch.optim.AdamW([torch.nn.Parameter(weights) for weights in start], lr=1e-2)
        self._tensors: list[torch.Tensor] = self.optimizer.param_groups[0]["params"]
        self.gradients = [torch.zeros_like(weights) for weights in start]

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        return [(tensor, 0) for tensor in self._tensors]

    def gradient(self, cut: Slice, shape: torch.Size) -> torch.Tensor:
        return self.gradients[cut.number][cut.start : cut.stop].clone()

    def weights(self, index: int) -> torch.Tensor | None:
        return self._weights[index] if self._weights else None

    def first_element(self) -> int:
        return 0

    def everything(self) -> list[torch.Tensor]:
        state = [value for tensor in self._tensors for value in self.optimizer.state[tensor].values()]
        return [value.detach().clone() for value in [*self._weights, *self._tensors, *state]]


def random_steps(
    seed: int, steps: int, slot_bytes: int | None, prefetch: bool, folder: str | None = None
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
        owners.append(Owner(sizes, number != 1, generator))
        states.append(BlockState(owners[-1], host, staging, bytes_per_element=12))
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
            seen += owner.everything()
            master, _ = owner.masters()[0]
            master.data.mul_(0.5)
        for gradient in owner.gradients:
            gradient.normal_(generator=generator)
        state.step()
    for state in states:
        state.settle()
    assert host.nbytes == sum(buffer.nbytes for state in states for buffer in state._buffers.values())
    return seen + [tensor for owner in owners for tensor in owner.everything()]


# Of blocks of up to 12,000 elements, whose masters and moments take 12 bytes each, 1,500 fit into a slot.
SLOTS = {"streamed": 18_000, "block": None}


def same(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return len(ours) == len(truth) and all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def check_lazy_steps(seed: int, steps: int, step: str) -> int:
    """Random steps under lazy streams with prefetch, against the same without either; returns the copies made."""
    truth = random_steps(seed, steps, SLOTS[step], prefetch=False)
    assert all(tensor.isfinite().all() for tensor in truth)
    with LazyStreams() as machine:
        ours = random_steps(seed, steps, SLOTS[step], prefetch=True)
    assert same(ours, truth)
    return machine.copies


@pytest.mark.parametrize("step", SLOTS)
def test_lazy_streams_change_nothing(step: str) -> None:
    assert check_lazy_steps(seed=1, steps=60, step=step) > 400


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

        def call(staging: Staging, slot: Any, sources: Any, event: Any) -> Any:
            before = slot.free
            first.setdefault(slot, before)  # at the very first, nothing is known of the area's memory
            slot.free = first[slot] if free else before
            try:
                return fill(staging, slot, sources, None if written else event)
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
    "the areas are in use at first": (
        "streamed",
        lambda: mock.patch.object(hift_ds.state.transfer, "Slot", UnmarkedSlot),
    ),
}


class UnmarkedSlot(Slot):
    def __init__(self, area: torch.Tensor | None):
        super().__init__(area)
        self.free = None


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_no_wait_can_be_taken_out(mutation: str) -> None:
    step, mutate = MUTATIONS[mutation]
    truth = random_steps(1, 60, SLOTS[step], prefetch=False)
    with LazyStreams(), mutate():
        try:
            ours = random_steps(1, 60, SLOTS[step], prefetch=True)
        except AssertionError:
            return
    assert not same(ours, truth), "nobody would notice"


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


@pytest.mark.parametrize("place", ("memory", "files"))
@pytest.mark.parametrize("step", SLOTS)
def test_1000_round_trips_keep_every_bit(step: str, place: str, tmp_path: Path) -> None:
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
    for trip in range(1000):
        if trip % 2:
            state.prefetch()
        if trip % 3 == 0:
            state.settle()
        state.step()
        state.settle()
        expected = before if trip % 2 else [~values for values in before]
        assert same([tensor.view(torch.int32) for tensor in resident], expected), f"trip {trip}"
    assert [tensor.data_ptr() for tensor in resident] == addresses


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
    other.load_step_counts(state.step_counts())
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


# ---- the engine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to run a case: where the state is, and what happens on the way."""

    place: str = "cpu"
    step: str = "auto"
    prefetch: bool = True
    lazy: bool = False
    pinning_refused: bool = False
    folder: str | None = None
    aio: bool = True  # where it is available
    meddle: Callable[[Any], None] | None = None  # before some steps


class Unpinnable(CPU_Accelerator):
    def device_name(self, device_index: Any = None) -> str:
        return "cuda"

    def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of page-locked memory\nwith a long explanation")


def run(case: Case, way: Way) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """In a rank: weights and all blocks' state after the run."""
    import hift_ds

    config = tiny.ds_config(case)
    offload = config["hift"]["offload"] = {"device": way.place, "step": way.step, "prefetch": way.prefetch}
    offload |= {"buffer_size": 65536} | ({"nvme_path": way.folder} if way.folder else {})
    with contextlib.ExitStack() as stack:
        if way.lazy:
            stack.enter_context(LazyStreams())
        if way.pinning_refused:
            stack.enter_context(mock.patch.object(hift_ds.state.host, "get_accelerator", Unpinnable))
            logger = stack.enter_context(mock.patch.object(hift_ds.state.host, "logger"))
        if not way.aio:
            stack.enter_context(mock.patch.object(hift_ds.state.files, "library", lambda: (None, "a test")))
        engine = hift_ds.initialize(model=tiny.model(case.dtype), config=config)[0]
        stack.callback(engine.destroy)
        if way.folder:
            assert (engine.block_optimizers.host.direct is not None) == (way.aio and aio_is_there())
        for step in range(case.steps):
            if way.meddle and step % case.k in (1, 2):
                way.meddle(engine)
            tiny.optimizer_step(engine, step)
            assert way.folder is None or not os.listdir(way.folder)
        if way.pinning_refused:
            (message,) = (call.args[0] for call in logger.warning.call_args_list)
            assert "page-locked" in message and "long explanation" not in message
        return tiny.weights(engine), tiny.block_states(engine)


def different(case: Case, truth: Way, *others: Way) -> list[Way]:
    """In a rank: the ways that do not leave the same bits as the first."""
    weights, states = run(case, truth)
    found = []
    for way in others:
        our_weights, our_states = run(case, way)
        pairs = zip(our_states, states, strict=True)
        if not tiny.identical(our_weights, weights) or not all(tiny.identical(a, b) for a, b in pairs):
            found.append(way)
    return found


# Two layers to a block: some slices end within a tensor.
CASES = [Case(stage=stage, dtype=dtype, layers_per_block=2) for dtype in ("fp32", "bf16") for stage in STAGES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_place_of_state_does_not_matter(case: Case) -> None:
    ways = Way("none"), Way(step="streamed"), Way(step="block"), Way(step="block", prefetch=False)
    assert run_on_ranks(1, different, case, *ways) == [[]]


def aio_is_there() -> bool:
    """Asked here first, it is compiled where nobody limits the time."""
    return hift_ds.state.files.library()[0] is not None


@pytest.mark.parametrize("aio", (True, False))
@pytest.mark.parametrize("case", [Case(stage=0), Case(stage=2, dtype="bf16"), Case(stage=3)], ids=str)
def test_files_in_place_of_memory(case: Case, aio: bool, tmp_path: Path) -> None:
    if aio and not aio_is_there():
        pytest.skip(hift_ds.state.files.library()[1])
    in_files = Way("nvme", folder=str(tmp_path), aio=aio)
    assert run_on_ranks(1, different, case, Way(), in_files, replace(in_files, step="block")) == [[]]
    assert not list(tmp_path.iterdir())


def test_pinning_refused_by_the_system() -> None:
    assert run_on_ranks(1, different, Case(stage=1), Way(), Way(pinning_refused=True)) == [[]]


def change_masters_and_moments(engine: Any) -> None:
    """Through DeepSpeed's own functions, of the block to be stepped, whose state is on the way, and of another."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    for block in (engine.active_block, engine.active_block - 1):
        for name in engine.blocks[block].parameter_names:
            weights = engine.module.get_parameter(name)
            value = safe_get_full_fp32_param(weights) * 1.25
            safe_set_full_fp32_param(weights, value)
            assert torch.equal(safe_get_full_fp32_param(weights), value)
            if engine.cycle:
                moment = safe_get_full_optimizer_state(weights, "exp_avg") * 3
                safe_set_full_optimizer_state(weights, moment, "exp_avg")
                assert torch.equal(safe_get_full_optimizer_state(weights, "exp_avg"), moment)


@pytest.mark.parametrize("case", [Case(stage=stage, dtype="bf16") for stage in (1, 2, 3)], ids=str)
def test_what_is_set_between_steps_is_what_is_stepped(case: Case, tmp_path: Path) -> None:
    aio_is_there()
    changed = [Way(place, meddle=change_masters_and_moments) for place in ("none", "cpu")]
    changed.append(Way(step="block", meddle=change_masters_and_moments))
    changed.append(Way("nvme", folder=str(tmp_path), meddle=change_masters_and_moments))
    assert run_on_ranks(1, different, case, *changed) == [[]]
    assert run_on_ranks(1, different, replace(case, cycles=1), Way(), changed[1]) == [[changed[1]]]


@pytest.mark.parametrize("step", ("streamed", "block"))
def test_lazy_streams_change_no_training(step: str) -> None:
    skip_on_a_device()
    case = Case(stage=2, dtype="bf16")
    ways = [Way(step=step, lazy=lazy, prefetch=lazy, meddle=change_masters_and_moments) for lazy in (False, True)]
    assert run_on_ranks(1, different, case, *ways) == [[]]


def gradients_of_the_host_step(case: Case) -> list[str]:
    """In a rank: names of parameters whose ``safe_get_full_grad`` before a step is not what autograd gave."""
    from deepspeed.utils import safe_get_full_grad

    engine, wrong = tiny.initialize(case), []
    named = dict(engine.module.named_parameters())
    try:
        for step in range(case.k + 2):
            plain = tiny.model(case.dtype)
            plain.load_state_dict(tiny.weights(engine))
            for micro in range(tiny.ACCUMULATION):
                engine.backward(engine(**tiny.micro_batch(step, micro)).loss)
                (plain(**tiny.micro_batch(step, micro)).loss / tiny.ACCUMULATION).backward()
                if micro + 1 < tiny.ACCUMULATION:
                    engine.step()
            truth = {name: p.grad for name, p in plain.named_parameters()}
            for block in (engine.active_block, engine.active_block - 1):
                for name in engine.blocks[block].parameter_names:
                    try:
                        gradient = safe_get_full_grad(named[name])
                    except ValueError:  # it says that there are none now
                        gradient = None
                    if block != engine.active_block:
                        is_right = gradient is None
                    else:
                        is_right = torch.allclose(gradient.view_as(truth[name]), truth[name], rtol=1e-4, atol=1e-6)
                    wrong += [] if is_right else [f"step {step}: {name}"]
            engine.step()
        return wrong
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_gradients_of_the_host_step_are_shown_of_the_active_block_only(stage: int) -> None:
    assert run_on_ranks(1, gradients_of_the_host_step, Case(stage=stage, offload=True)) == [[]]


def offload_and_reload(engine: Any) -> None:
    """All that DeepSpeed itself can offload here: at stage 3 it wants FusedAdam for masters and state."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kind

    some = [Kind.lp_params, Kind.lp_grads, Kind.contiguous_grad_buffer]
    engine.offload_states(include=some if engine.zero_optimization_stage() == 3 else None)
    engine.reload_states()


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=1, layers_per_block=3),
        Case(stage=2, dtype="bf16", layers_per_block=3),
        Case(stage=3, dtype="bf16", layers_per_block=3),
    ],
    ids=str,
)
def test_offload_states_and_reload_states(case: Case) -> None:
    assert run_on_ranks(1, different, case, Way(), Way(meddle=offload_and_reload)) == [[]]


def host_over_time(steps: int) -> list[tuple[int, int, int]]:
    """In a rank: bytes and number of host buffers, and of their addresses, from the end of the first cycle on."""
    import hift_ds

    config = tiny.ds_config(Case(stage=2, layers_per_block=2)) | {"gradient_accumulation_steps": 1}
    engine = hift_ds.initialize(model=tiny.model(layers=1), config=config)[0]
    try:
        seen = []
        for step in range(len(engine.blocks) + steps):
            engine.backward(engine(**tiny.micro_batch(0, 0)).loss)
            engine.step()
            if step >= len(engine.blocks) - 1:
                buffers = engine.block_optimizers.host.buffers
                seen.append((engine.block_optimizers.host.nbytes, len(buffers), len({b.data_ptr() for b in buffers})))
        return seen
    finally:
        engine.destroy()


def test_host_memory_is_constant_after_the_first_cycle() -> None:
    ((first, *others),) = run_on_ranks(1, host_over_time, 500)
    assert first[0] > 0 and first[1] == first[2]
    assert set(others) == {first}


def refusal(case: Case) -> str:
    try:
        tiny.initialize(case).destroy()
    except ValueError as error:
        return str(error)
    return "none"


def test_optimizers_that_need_whole_tensors_are_not_streamed() -> None:
    adafactor = Case(optimizer="Adafactor", client_optimizer=True)
    (message,) = run_on_ranks(1, refusal, replace(adafactor, step="streamed"))
    assert "hift.offload.step='streamed'" in message and "Adafactor" in message and "'block'" in message
    assert run_on_ranks(1, slot_bytes, adafactor) == [None]
    assert run_on_ranks(1, slot_bytes, Case()) == [65536]


@pytest.mark.parametrize("what", (errno.ENOSPC, errno.EROFS))
def test_a_full_disk_is_named(what: int, tmp_path: Path) -> None:
    host = HostMemory(folder=str(tmp_path))
    kept = host.empty(torch.empty(10))
    with mock.patch("os.posix_fallocate", side_effect=OSError(what, os.strerror(what))):
        with pytest.raises(OSError, match="4000 more bytes .* in addition to 40 bytes") as caught:
            host.empty(torch.empty(1000))
    assert caught.value.errno == what and str(tmp_path) in str(caught.value)
    assert host.buffers == [kept] and not list(tmp_path.iterdir())
