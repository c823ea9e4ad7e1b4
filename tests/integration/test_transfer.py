"""The place of state changes no bit of a training: device, host memory or files, in slices or whole."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import hift_ds.state.allocator
import hift_ds.state.codec
import hift_ds.state.direct_io
import hift_ds.state.encoded
import hift_ds.state.step
import hift_ds.state.transfer
from tests.support import tiny
from tests.support.device_memory import skip_on_a_device
from tests.support.lazy_streams import LazyStreams, MissingWait
from tests.support.pairwise import others_slow
from tests.support.parity import FINER, STAGES, STRATEGIES
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


@dataclass(frozen=True)
class Way:
    """One way to run a case: where the state is, and what happens on the way."""

    place: str = "cpu"
    step: str = "auto"
    prefetch: bool | int = True
    defer: bool = False
    lazy: bool = False
    pinning_refused: bool = False
    folder: str | None = None
    aio: bool = True  # where it is available
    chunk: int | None = None  # elements of a chunk that the host steps; None: as ever
    master: str = "auto"
    moments: str = "fp32"
    without_ties: bool = False  # a mutation
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
    offload |= {"buffer_size": 65536} if way.place != "none" and way.step != "block" and not case.offload else {}
    offload |= {"defer": way.defer} | ({"nvme_path": way.folder} if way.folder else {})
    offload |= {"master": way.master, "moments": way.moments}
    with contextlib.ExitStack() as stack:
        if way.lazy:
            stack.enter_context(LazyStreams())
        if way.pinning_refused:
            stack.enter_context(mock.patch.object(hift_ds.state.allocator, "get_accelerator", Unpinnable))
            stack.enter_context(mock.patch.object(hift_ds.state.arena, "get_accelerator", Unpinnable))
            logger = stack.enter_context(mock.patch.object(hift_ds.state.arena, "logger"))
        if way.chunk:
            stack.enter_context(mock.patch.object(hift_ds.state.step, "CHUNK", way.chunk))
        if way.without_ties:
            join = hift_ds.state.codec.join
            no_ties = lambda weights, remainder, ties, out: join(weights, remainder, ties * 0, out)  # noqa: E731
            stack.enter_context(mock.patch.object(hift_ds.state.codec, "join", no_ties))
        if not way.aio:
            stack.enter_context(mock.patch.object(hift_ds.state.direct_io, "library", lambda: (None, "a test")))
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
        engine.settle()
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


TABLE = [case for case in CASES if (case.stage % 2 == 1) == (case.dtype == "bf16")]


@pytest.mark.parametrize("case", others_slow(CASES, TABLE), ids=str)
def test_the_place_of_state_does_not_matter(case: Case) -> None:
    ways = Way("none"), Way(step="streamed"), Way(step="block"), Way(step="block", prefetch=False), Way(master="fp32")
    assert run_on_ranks(1, different, case, *ways) == [[]]


EIGHT_BITS = [Case(stage=stage, dtype="bf16", layers_per_block=2) for stage in STAGES]
EIGHT_BITS += [Case(stage=stage, layers_per_block=2) for stage in STAGES]
EIGHT_BITS += [Case(stage=2, dtype="bf16", optimizer="Lion"), Case(optimizer="momentum")]


@pytest.mark.parametrize("case", others_slow(EIGHT_BITS, [EIGHT_BITS[0], EIGHT_BITS[3], *EIGHT_BITS[-2:]]), ids=str)
def test_moments_in_8_bits_are_the_same_in_all_chunks(case: Case, tmp_path: Path) -> None:
    ways = [Way(moments="8bit", step=step) for step in ("streamed", "block")]
    ways.append(Way("nvme", folder=str(tmp_path), moments="8bit"))
    assert run_on_ranks(1, different, case, *ways) == [[]]
    assert run_on_ranks(1, different, case, ways[0], Way()) == [[Way()]]


@pytest.mark.parametrize("stage", others_slow((0, 2, 3), (0, 2)))
def test_masters_half_way_between_two_weights(stage: int) -> None:
    case = Case(stage=stage, dtype="bf16", optimizer="ties", cycles=4)
    assert run_on_ranks(1, different, case, Way("none"), Way(), Way(step="block"), Way(master="fp32")) == [[]]
    assert run_on_ranks(1, different, case, Way("none"), Way(without_ties=True)) == [[Way(without_ties=True)]]


def loaded_from_outside(case: Case) -> list[str]:
    """In a rank: masters that are not the weights, after the model loaded other weights, and after steps."""
    import hift_ds

    engine = hift_ds.initialize(model=tiny.model(case.dtype), config=tiny.ds_config(case))[0]
    for step in range(7):
        tiny.optimizer_step(engine, step)
    before = {name: weights.clone() for name, weights in engine.module.state_dict().items()}
    loaded = {name: weights * 1.25 for name, weights in before.items()}
    engine.module.load_state_dict(loaded)  # the next block's state is fetched already
    found = [
        name
        for name, values in tiny.masters(engine).items()
        if not torch.equal(values, loaded[name].float().view_as(values))
    ]
    for step in range(7, 13):
        tiny.optimizer_step(engine, step)
    for name, values in engine.module.state_dict().items():
        if not torch.allclose(values.float(), loaded[name].float(), rtol=0.02, atol=0.02):
            found.append(f"{name}: the step began elsewhere")
    engine.destroy()
    return found


LOADED = [Case(stage=2, dtype="bf16"), Case(stage=0, waiting="cpu"), Case(stage=0, dtype="bf16", waiting="cpu")]


@pytest.mark.parametrize("case", [*LOADED, Case(stage=2, dtype="bf16", waiting="cpu")], ids=str)
def test_weights_that_are_loaded_become_the_masters(case: Case) -> None:
    assert run_on_ranks(1, loaded_from_outside, case) == [[]]


def set_on_two_ranks(stage: int) -> float:
    """In a rank: sets a master, and returns the loss of a batch."""
    from deepspeed.utils import safe_set_full_fp32_param

    engine = tiny.initialize(Case(stage=stage, dtype="bf16", ranks=2))
    tiny.optimizer_step(engine, 0)
    for name in engine.blocks[2].parameter_names:
        weights = engine.module.get_parameter(name)
        safe_set_full_fp32_param(weights, torch.full(getattr(weights, "ds_shape", weights.shape), 0.5))
    engine.eval()
    with torch.no_grad():
        loss = float(engine(**tiny.micro_batch(0, 0)).loss)
    engine.destroy()
    return loss


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_weights_follow_a_master_that_is_set_on_every_rank(stage: int) -> None:
    first, second = run_on_ranks(2, set_on_two_ranks, stage)
    assert first == second


def reads_and_other_dtypes() -> tuple[int, bool]:
    """In a rank: what reading masters and moments encodes, and whether steps work under another default dtype."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = tiny.initialize(Case(stage=2, dtype="bf16", moments="8bit"))
    for step in range(6):
        tiny.optimizer_step(engine, step)
    with mock.patch.object(hift_ds.state.encoded.EncodedState, "write") as write:
        for weights in engine.module.parameters():
            safe_get_full_fp32_param(weights)
            safe_get_full_optimizer_state(weights, "exp_avg")
    torch.set_default_dtype(torch.bfloat16)
    try:
        tiny.optimizer_step(engine, 6)
    finally:
        torch.set_default_dtype(torch.float32)
    is_finite = all(values.isfinite().all() for values in tiny.masters(engine).values())
    engine.destroy()
    return write.call_count, is_finite


def test_reading_encodes_nothing_and_the_default_dtype_does_not_matter() -> None:
    assert run_on_ranks(1, reads_and_other_dtypes) == [(0, True)]


def aio_is_there() -> bool:
    """Asked here first, it is compiled where nobody limits the time."""
    return hift_ds.state.direct_io.library()[0] is not None


@pytest.mark.parametrize("aio", (True, False))
@pytest.mark.parametrize("case", [Case(stage=0), Case(stage=2, dtype="bf16"), Case(stage=3)], ids=str)
def test_files_in_place_of_memory(case: Case, aio: bool, tmp_path: Path) -> None:
    if aio and not aio_is_there():
        pytest.skip(hift_ds.state.direct_io.library()[1])
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


@pytest.mark.parametrize(
    "case",
    others_slow([Case(stage=stage, dtype="bf16") for stage in (1, 2, 3)], [Case(stage=2, dtype="bf16")]),
    ids=str,
)
def test_what_is_set_between_steps_is_what_is_stepped(case: Case, tmp_path: Path) -> None:
    aio_is_there()
    on_device = Way("none", meddle=change_masters_and_moments)
    changed = [replace(on_device, place="cpu"), replace(on_device, place="cpu", step="block")]
    changed.append(replace(on_device, place="nvme", folder=str(tmp_path)))
    assert run_on_ranks(1, different, case, on_device, *(replace(way, master="fp32") for way in changed)) == [[]]
    assert run_on_ranks(1, different, case, *changed) == [[]]  # the weights change at once
    assert run_on_ranks(1, different, replace(case, cycles=1), Way(), changed[0]) == [[changed[0]]]


@pytest.mark.parametrize("step", ("streamed", "block"))
def test_lazy_streams_change_no_training(step: str) -> None:
    skip_on_a_device()
    case = Case(stage=2, dtype="bf16")
    ways = [Way(step=step, lazy=lazy, prefetch=lazy, meddle=change_masters_and_moments) for lazy in (False, True)]
    assert run_on_ranks(1, different, case, *ways) == [[]]


def evaluate(engine: Any) -> None:
    """Read the weights as a script does between two steps: a forward pass, and the model's state."""
    engine.eval()
    with torch.no_grad():
        assert engine(**tiny.micro_batch(0, 0)).loss.isfinite()
        assert engine.module(**tiny.micro_batch(0, 1)).loss.isfinite()
    assert all(value.isfinite().all() for value in engine.module.state_dict().values())
    engine.train()


DEFERRED = [
    Case(stage=stage, dtype=dtype, strategy=strategy)
    for dtype in ("fp32", "bf16")
    for stage in (0, 1, 2)
    for strategy in STRATEGIES
]
SAMPLE = [Case(stage=2, dtype="bf16", strategy="top2down")]


@pytest.mark.parametrize("case", others_slow(DEFERRED, SAMPLE), ids=str)
def test_a_step_during_the_next_forward_pass_changes_nothing(case: Case) -> None:
    """With few slots and with many, with and without reads between steps, and with several steps on a block."""
    skip_on_a_device()
    truth = Way()
    ways = [replace(truth, lazy=True, defer=True, prefetch=prefetch) for prefetch in (True, 2**20)]
    ways.append(replace(truth, lazy=True, defer=True, meddle=evaluate))
    ways.append(replace(truth, lazy=True, defer=True, meddle=save_and_load))
    assert run_on_ranks(1, different, case, truth, *ways) == [[]]


ON_THE_HOST = [
    Case(stage=1, dtype="bf16", offload=True),
    Case(stage=2, offload=True, max_block_numel=FINER, clip=0.005),
    Case(stage=3, dtype="fp16", offload=True, optimizer="Adagrad", steps_per_block=2),
]


@pytest.mark.parametrize("case", others_slow(ON_THE_HOST, ON_THE_HOST[:1]), ids=str)
def test_lazy_streams_and_small_chunks_change_no_step_on_the_host(case: Case) -> None:
    skip_on_a_device()
    ways = [Way(chunk=2048), Way(lazy=True), Way(lazy=True, chunk=2048, meddle=evaluate)]
    assert run_on_ranks(1, different, case, Way(), *ways) == [[]]
    both = [Way(lazy=lazy, meddle=change_masters_and_moments) for lazy in (False, True)]
    if case.optimizer == "AdamW" and not case.max_block_numel:
        assert run_on_ranks(1, different, case, *both) == [[]]


def early(case: Case) -> str:
    """In a rank: what happens if the host does not wait for the gradients, or for the weights of the step before."""
    from hift_ds.state.step import BlockState

    fetch, update = BlockState.fetch_gradients, BlockState.update

    def late(state: BlockState, *args: Any) -> None:
        fetch(state)
        update(state, *args)

    with (
        mock.patch.object(BlockState, "fetch_gradients", lambda state: None),
        mock.patch.object(BlockState, "update", late),
    ):
        try:
            return "nothing" if not different(case, Way(), Way(lazy=True)) else "wrong"
        except MissingWait:
            return "missing"


def test_a_step_on_the_host_that_does_not_wait_for_its_gradients_is_noticed() -> None:
    skip_on_a_device()
    assert run_on_ranks(1, early, ON_THE_HOST[0]) == ["missing"]


def never_at_a_gate(case: Case, way: Way) -> str:
    """In a rank: what happens if no forward pass waits for the update."""
    from hift_ds.zero.gates import UpdateGates

    with mock.patch.multiple(UpdateGates, _enter=lambda *_: None, _finish_unless_gated=lambda *_: None):
        try:
            return "nothing" if not different(case, replace(way, lazy=False, defer=False), way) else "wrong"
        except MissingWait:
            return "missing"


def test_a_forward_pass_that_does_not_wait_for_the_update_is_noticed() -> None:
    skip_on_a_device()
    (found,) = run_on_ranks(1, never_at_a_gate, Case(stage=2, dtype="bf16"), Way(lazy=True, defer=True))
    assert found != "nothing"


def save_and_load(engine: Any) -> None:
    """Replace the engine's state with what a checkpoint of it holds."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)


@pytest.mark.parametrize("step", ("streamed", "block"))
def test_a_checkpoint_waits_for_the_copies_to_the_host(step: str) -> None:
    """The second save follows a step of the second cycle. In a block's first step, the step itself waits."""
    skip_on_a_device()
    case = Case(stage=2, dtype="bf16", layers_per_block=3)
    saving = Way(step=step, lazy=True, meddle=save_and_load)
    assert run_on_ranks(1, different, case, Way(step=step), saving) == [[]]


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
    """In a rank: bytes and number of host buffers, and of their addresses, at the start and after each step."""
    import hift_ds

    config = tiny.ds_config(Case(stage=2, layers_per_block=2)) | {"gradient_accumulation_steps": 1}
    engine = hift_ds.initialize(model=tiny.model(layers=1), config=config)[0]
    try:
        seen = []
        for step in range(len(engine.blocks) + steps):
            if step:
                engine.backward(engine(**tiny.micro_batch(0, 0)).loss)
                engine.step()
            buffers = engine.block_optimizers.host.buffers
            seen.append((engine.block_optimizers.host.nbytes, len(buffers), len({b.data_ptr() for b in buffers})))
        return seen
    finally:
        engine.destroy()


@pytest.mark.parametrize("steps", others_slow((40, 500), [40]))
def test_host_memory_is_constant_from_the_start(steps: int) -> None:
    ((first, *others),) = run_on_ranks(1, host_over_time, steps)
    assert first[0] > 0 and first[1] == first[2]
    assert set(others) == {first}


def refusal(case: Case) -> str:
    try:
        tiny.initialize(case).destroy()
    except ValueError as error:
        return str(error)
    return "none"


def slot_bytes(case: Case) -> int | None:
    """In a rank: the size of the areas that a case's engine steps in, after a step."""
    engine = tiny.initialize(case)
    try:
        tiny.optimizer_step(engine, 0)
        return engine.block_optimizers.staging.slot_bytes
    finally:
        engine.destroy()


def test_optimizers_that_need_whole_tensors_are_not_streamed() -> None:
    adafactor = Case(optimizer="Adafactor", client_optimizer=True)
    (message,) = run_on_ranks(1, refusal, replace(adafactor, step="streamed"))
    assert "hift.offload.step='streamed'" in message and "Adafactor" in message and "'block'" in message
    assert run_on_ranks(1, slot_bytes, adafactor) == [None]
    assert run_on_ranks(1, slot_bytes, Case()) == [65536]
