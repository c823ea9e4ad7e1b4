"""Real training under a harness that tells host from device: what stands on the device, and that nothing mixes."""

import contextlib
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from hift_ds.checkpoint.files import FileEngine
from hift_ds.state.allocator import HostMemory
from hift_ds.zero.block_optimizers import BlockOptimizers
from tests.support import tiny
from tests.support.device_memory import DeviceMemory
from tests.support.pairwise import Row, others_slow, pairwise
from tests.support.parity import STAGES
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case

CPU = torch.device("cpu")


def test_the_harness_tells_host_from_device() -> None:
    outside = torch.ones(1000)
    with DeviceMemory() as memory:
        host = HostMemory().empty(torch.empty(500))
        assert memory.is_host(host) and memory.is_host(host[:5] * host[5:10]) and not memory.is_host(torch.ones(3))
        assert memory.live["total"] == 0
        device = torch.zeros(500)
        device.copy_(host)
        host.copy_(device)
        device.mul_(host[0]).add_(torch.tensor(2.0))
        for mixed in (
            lambda: device + host,
            lambda: host.add_(device),
            lambda: torch.cat([host, device]),
            lambda: host.mul_(device[0]),
            lambda: torch.dot(host, device),
        ):
            with pytest.raises(AssertionError, match="mixes host and device"):
                mixed()
        assert memory.copies == 2
        with memory.labelled("mine"):
            whole = torch.zeros(500)
        view = whole[100:]
        del whole
        assert memory.live["mine"] == 2000, "a view of it lives"
        del view
        assert (memory.live["mine"], memory.peak["mine"]) == (0, 2000)
        outside + 1
        assert memory.live["outside"] == 4000


def wide(dtype: str) -> Any:
    """A Llama each of whose hidden layers has far more state than two slices."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, use_cache=False, **sizes)).to(tiny.DTYPES[dtype])


# Numbers, alignment, and the padding of a tensor's partition; together below one of the smallest layer's matrices.
SMALL = 10_000


@dataclass
class Seen:
    """Bytes on the device under the harness, beside the model's weights, unless said otherwise."""

    numel: list[int]  # of each block
    whole: list[int]  # elements of its tensors, which are more where one is cut by rows: autograd makes all of them
    widest: list[int]  # elements of each block's largest tensor
    start: int  # highest during start-up
    rest: int  # after start-up
    steps: list[int]  # highest in each step, without what forward and backward make
    gradients: list[int]  # in each step, what backward has left when the step begins
    slots: int  # of the streamed step
    copies: int  # operations between host and device


def watched(case: Case) -> Seen:
    """In a rank: trains under the harness from start-up to the end."""
    llama = wide(case.dtype)
    memory = DeviceMemory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory)
        stack.enter_context(memory.labels("state", BlockOptimizers, "prefetch"))
        if case.offload:
            watch_host_step(memory, stack)
        memory.declare([*llama.parameters(), *llama.buffers()], label="weights")
        loaded = memory.live["weights"]
        with memory.labelled("state"):
            engine = tiny.initialize(case, llama=llama)
        stack.callback(engine.destroy)
        start = memory.peak["total"] - loaded
        for weights in llama.parameters():
            memory.declare([getattr(weights, "ds_tensor", weights), weights], label="weights")
        named = {name: weights.numel() for name, weights in wide(case.dtype).named_parameters()}
        whole = [sum(named[name] for name in block.parameter_names) for block in engine.blocks]
        rest, steps, gradients = settled(memory, "state", sum(kept_on_device(case, whole)) + SMALL), [], []
        for step in range(case.steps):
            memory.reset()
            for micro in range(tiny.ACCUMULATION):
                with memory.labelled("activations"):
                    loss = engine(**tiny.micro_batch(step, micro, torch.distributed.get_rank())).loss
                    engine.backward(loss)
                del loss
                left = left_by_backward(memory, engine)
                with memory.labelled("state"):
                    engine.step()
            steps.append(memory.peak["state"])
            gradients.append(left)
        staging = engine.block_optimizers.staging
        slots = [slot.area.nbytes for slot in staging.slots if slot.area is not None] if staging else []
        numel = [block.numel for block in engine.blocks]
        widest = [max(named[name] for name in block.parameter_names) for block in engine.blocks]
        return Seen(numel, whole, widest, start, rest, steps, gradients, sum(slots), memory.copies)


def left_by_backward(memory: DeviceMemory, engine: Any) -> int:
    """Bytes."""
    block = engine.blocks[engine.active_block]
    weights = [engine.module.get_parameter(name) for name in block.parameter_names]
    gradients = sum(getattr(w, "ds_numel", w.numel()) * w.element_size() for w in weights)
    return settled(memory, "activations", gradients + SMALL)


def settled(memory: DeviceMemory, label: str, most: int) -> int:
    """Bytes under a label; what gloo's own thread still holds is given up to a second to be let go of."""
    for _ in range(100):
        if memory.live[label] <= most:
            break
        time.sleep(0.01)
    return memory.live[label]


def watch_host_step(memory: DeviceMemory, stack: contextlib.ExitStack) -> None:
    """Look into the operands of DeepSpeed's kernel, which works on the host, and of which PyTorch sees nothing."""
    kernel = DeepSpeedCPUAdam.step

    def step(optimizer: Any, closure: Any = None) -> Any:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        is_trial = all(parameter.numel() == 8 for parameter in parameters)  # in which settings are tried
        result = kernel(optimizer, closure)
        for master in () if is_trial else parameters:
            for tensor in (master, master.grad, *optimizer.state[master].values()):
                assert not torch.is_tensor(tensor) or memory.is_host(tensor), "the host step reads the device"
        return result

    stack.enter_context(mock.patch.object(DeepSpeedCPUAdam, "step", step))


@functools.cache
def seen_in(case: Case) -> Seen:
    return run_on_ranks(case.ranks, watched, case)[0]


def sizes(case: Case) -> tuple[int, int, int, int]:
    """Bytes of an element: a weight; master and moments; the fp32 gradient made for the step; AdamW's own tensors."""
    weight = torch.finfo(tiny.DTYPES[case.dtype]).bits // 8
    own_masters = case.stage == 0 and case.dtype == "fp32"  # the weights are their own masters
    return (weight, 8, 0, 8) if own_masters else (weight, 12, 4, 8)


def is_split(case: Case) -> bool:
    """Whether the store has only what bf16 weights lack of their masters, so that the step decodes and encodes them."""
    return case.dtype == "bf16" and case.place == "cpu" and not case.offload


# Of an element: its decoded master, and what the codec needs to encode it.
DECODED = 4 + 5


def kept_on_device(case: Case, whole: list[int]) -> tuple[int, int]:
    """Bytes on the device all the time: the slots; at stage 3 one block's gradient partition and one bucket."""
    slot = math.ceil(65536 * 10.125 / 12) + 4096 if is_split(case) else 65536
    return 2 * slot if case.step == "streamed" else 0, 2 * sizes(case)[0] * max(whole) if case.stage == 3 else 0


ON_DEVICE = [
    Case(stage=stage, dtype=dtype, step=step)
    for stage in STAGES
    for dtype in ("fp32", "bf16")
    for step in ("streamed", "block")
]
ON_DEVICE += [Case(stage=1, ranks=2, step="block"), Case(stage=2, ranks=2, dtype="bf16", step="streamed")]
# Cuts the layers between their matrices, and the larger of those in two by rows.
ON_DEVICE += [Case(stage=stage, dtype="bf16", step="block", max_block_numel=6000) for stage in STAGES]


def possible(row: Row) -> bool:
    return row["max_block_numel"] is None or (row["dtype"], row["step"]) == ("bf16", "block")


FACTORS = {"stage": STAGES, "dtype": ("fp32", "bf16"), "step": ("streamed", "block"), "max_block_numel": (None, 6000)}
TABLE = [Case(**row) for row in pairwise(FACTORS, possible)] + [case for case in ON_DEVICE if case.ranks == 2]
ON_DEVICE_AT_STAGE_3 = Case(stage=3, ranks=2, dtype="bf16", step="streamed")


@pytest.mark.parametrize(
    "case", others_slow([*ON_DEVICE, ON_DEVICE_AT_STAGE_3], [*TABLE, ON_DEVICE_AT_STAGE_3]), ids=str
)
def test_the_device_holds_no_more_than_the_active_block(case: Case) -> None:
    seen = seen_in(case)
    weight, state, gradient, temporary = sizes(case)
    slots, buffers = kept_on_device(case, seen.whole)
    kept = slots + buffers
    assert seen.slots == slots
    assert seen.rest <= kept + SMALL
    for step, (moving, gradients) in enumerate(zip(seen.steps, seen.gradients, strict=True)):
        block = step % len(seen.numel)
        numel = seen.numel[block]
        if case.step == "streamed":
            stepped = min(numel // case.ranks, 65536 // state)
            state_made = (
                8 if step < len(seen.numel) else 0
            )  # a block's first step makes the moments outside of the slots
            bound = (state_made + gradient + temporary) * stepped
        else:
            stepped = numel // case.ranks
            bound = (state + gradient + temporary) * stepped
        if is_split(case):  # each tensor of a chunk has room for a multiple of 1,024 elements
            bound += DECODED * (stepped + 4 * 1024)
        if case.stage:  # DeepSpeed takes a tensor's norm in float64
            bound = max(bound, 8 * seen.widest[block])
        assert moving <= kept + bound + SMALL, f"step {step}: {moving - kept} bytes, {numel=}"
        assert gradients <= weight * seen.whole[block] + SMALL, f"step {step}"
    assert seen.copies >= 2 * case.steps


def gathered_weights(case: Case) -> list[tuple[int, int, int]]:
    """In a rank: elements of whole matrices after forward and after backward of each step, and what backward needs."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    engine = tiny.initialize(case, llama=wide(case.dtype))
    blocks = [[engine.module.get_parameter(name) for name in block.parameter_names] for block in engine.blocks]
    matrices = [[p for p in weights if not p.ds_persist] for weights in blocks]

    def whole() -> int:
        return sum(p.ds_numel for block in matrices for p in block if p.ds_status == ZeroParamStatus.AVAILABLE)

    try:
        seen = []
        for step in range(case.steps):
            needed = sum(p.ds_numel for block in matrices[engine.active_block :] for p in block)
            for micro in range(tiny.ACCUMULATION):
                loss = engine(**tiny.micro_batch(step, micro, torch.distributed.get_rank())).loss
                after_forward = whole()
                engine.backward(loss)
                after_backward = whole()
                engine.step()
            seen.append((after_forward, after_backward, needed))
        return seen
    finally:
        engine.destroy()


def test_forward_gathers_nothing_for_layers_that_backward_does_not_pass() -> None:
    case = Case(stage=3, ranks=2, strategy="random")
    for after_forward, after_backward, needed in run_on_ranks(2, gathered_weights, case)[0]:
        assert (after_forward, after_backward) == (needed, 0)


@pytest.mark.parametrize("case", others_slow(ON_DEVICE, TABLE), ids=str)
def test_start_up_holds_no_more_than_one_block(case: Case) -> None:
    seen = seen_in(case)
    weight, state, gradient, _ = sizes(case)
    slots, buffers = kept_on_device(case, seen.whole)
    # While a block is set up, its weights are copied from the layers' memory into one flat piece, by way of the host,
    # which here is the same memory; it has master, gradient and state, and its own buffers before it shares others'.
    bound = slots + 2 * buffers + (2 * weight + state + gradient) * max(seen.whole)
    assert seen.start <= bound + SMALL


@pytest.mark.parametrize(
    "case",
    others_slow(
        [Case(stage=s, dtype=d, offload=True) for s in (1, 2, 3) for d in ("fp32", "bf16")],
        [Case(stage=s, dtype=d, offload=True) for s, d in ((1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))],
    ),
    ids=str,
)
def test_the_host_step_leaves_only_weights_and_gradients_on_the_device(case: Case) -> None:
    seen = seen_in(case)
    _, kept = kept_on_device(case, seen.whole)
    assert seen.rest <= kept + SMALL
    for step, (moving, gradients) in enumerate(zip(seen.steps, seen.gradients, strict=True)):
        block = step % len(seen.numel)
        assert moving <= kept + 8 * seen.widest[block] + SMALL, step  # a tensor's norm is taken in float64
        assert gradients <= sizes(case)[0] * seen.whole[block] + SMALL, step
    assert seen.copies >= 2 * case.steps


def saved_and_loaded(case: Case, folder: str) -> tuple[int, int, int]:
    """In a rank: highest bytes on the device in training, while saving, and while loading."""
    llama = wide(case.dtype)
    memory = DeviceMemory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory)
        stack.enter_context(memory.placed_on_host(FileEngine, "load"))
        memory.declare([*llama.parameters(), *llama.buffers()], label="weights")
        engine = tiny.initialize(case, llama=llama)
        stack.callback(engine.destroy)
        memory.reset()
        for step in range(case.steps // 2):
            tiny.optimizer_step(engine, step)
        peaks = [memory.peak["total"]]
        for action in (engine.save_checkpoint, engine.load_checkpoint):
            memory.reset()
            action(folder)
            peaks.append(memory.peak["total"])
        return peaks[0], peaks[1], peaks[2]


@pytest.mark.parametrize(
    "case",
    others_slow(
        [Case(stage=s, dtype=d) for s in STAGES for d in ("fp32", "bf16")],
        [Case(stage=s, dtype=d) for s, d in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))],
    ),
    ids=str,
)
def test_saving_and_loading_need_no_more_than_training(case: Case, tmp_path: Path) -> None:
    ((training, saving, loading),) = run_on_ranks(1, saved_and_loaded, case, str(tmp_path))
    assert saving <= training and loading <= training, f"training {training}, saving {saving}, loading {loading} bytes"
