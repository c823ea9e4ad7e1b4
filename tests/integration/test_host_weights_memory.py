"""What is on the device with ``hift.offload.weights: cpu``, from start-up to export, and how often the host waits."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.checkpoint.files import FileEngine
from hift_ds.weights.host import HostWeights
from hift_ds.zero.block_optimizers import BlockOptimizers
from tests.integration.test_device_memory import SMALL, left_by_backward, sizes, wide
from tests.integration.test_waits import MOST, steady_steps
from tests.support import tiny
from tests.support.device_memory import DeviceMemory
from tests.support.pairwise import others_slow
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def peaks(case: Case, folder: str) -> dict[str, Any]:
    """In a rank: the highest bytes on the device in each part of a run, but for activations."""
    llama = wide(case.dtype)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in llama.model.layers]
    outside = sum(p.nbytes for p in llama.parameters()) - sum(layers)
    memory, found = DeviceMemory(), {}

    def part(name: str) -> None:
        found[name] = memory.peak["total"] - memory.peak["activations"]
        memory.reset()

    with contextlib.ExitStack() as stack:
        stack.enter_context(memory)
        stack.enter_context(memory.placed_on_host(FileEngine, "load"))
        stack.enter_context(memory.labels("state", BlockOptimizers, "prefetch"))
        memory.declare(llama.parameters(), "host")
        memory.declare(llama.buffers(), label="buffers")
        engine = tiny.initialize(case, llama=llama)
        stack.callback(engine.destroy)
        part("start-up")
        found["rest"] = memory.live["total"]
        steps, gradients = [], []
        for step in range(case.steps):
            memory.reset()
            for micro in range(tiny.ACCUMULATION):
                with memory.labelled("activations"):
                    loss = engine(**tiny.micro_batch(step, micro)).loss
                    engine.backward(loss)
                del loss
                left = left_by_backward(memory, engine)
                engine.step()
            steps.append(memory.peak["total"] - memory.peak["activations"])
            gradients.append(left)
        memory.reset()
        engine.eval()
        with memory.labelled("activations"), torch.no_grad():
            engine(**tiny.micro_batch(0, 0))
        engine.train()
        part("evaluation")
        engine.save_checkpoint(folder)
        part("saving")
        engine.load_checkpoint(folder)
        part("loading")
        engine.module.save_pretrained(folder + "/export")
        part("export")
        slots = sum(slot.area.nbytes for slot in engine.block_optimizers.staging.slots if slot.area is not None)
        numel = [block.numel for block in engine.blocks]
        static = layers[0] + layers[1] + outside + memory.live["buffers"] + slots
        ledger = engine.memory_ledger()
    return {**found, "steps": steps, "gradients": gradients, "numel": numel, "static": static, "ledger": ledger}


CASES = [
    Case(stage=stage, dtype=dtype, step=step, waiting="cpu")
    for stage in (0, 1, 2)
    for dtype in ("bf16", "fp32")
    for step in ("streamed", "block")
]


def holds_two_layers_and_the_active_block(case: Case, seen: dict[str, Any]) -> None:
    """Check what :func:`peaks` saw."""
    weight, state, gradient, temporary = sizes(case)
    static, largest = seen["static"], max(seen["numel"])
    assert seen["rest"] <= static + SMALL
    assert seen["start-up"] <= static + (2 * weight + state + gradient) * largest + SMALL
    for step, peak in enumerate(seen["steps"]):
        numel = seen["numel"][step % len(seen["numel"])]
        assert seen["gradients"][step] <= weight * numel + SMALL
        moving = min(numel, 65536 // state) if case.step == "streamed" else numel
        made = 8 if case.step == "streamed" and step < len(seen["numel"]) else 0
        bound = max((made + gradient + temporary + (0 if case.step == "streamed" else state)) * moving, 8 * numel)
        assert peak <= static + bound + SMALL, f"step {step}: {peak - static}"
    for name in ("evaluation", "saving", "loading", "export"):
        assert seen[name] <= static + SMALL, name


@pytest.mark.parametrize("case", others_slow(CASES, [CASES[0], CASES[3], CASES[6], CASES[8]]), ids=str)
def test_the_device_holds_two_layers_and_the_active_block(case: Case, tmp_path: Path) -> None:
    (seen,) = run_on_ranks(1, peaks, case, str(tmp_path))
    holds_two_layers_and_the_active_block(case, seen)
    weight, *_ = sizes(case)
    total = sum(seen["numel"])
    assert seen["ledger"]["device"]["parameters"] < 0.7 * weight * total
    assert weight * total <= seen["ledger"]["host"]["parameters"] < 1.01 * weight * total + SMALL


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(2, dtype="bf16", waiting="cpu"), {"chunked": True}),
        (Case(0, dtype="bf16", waiting="cpu"), {"offload_activations": True}),
        (Case(1, dtype="fp16", waiting="cpu", strategy="random"), {}),
    ],
    ids=str,
)
def test_a_steady_step_waits_at_most_once(case: Case, options: dict[str, bool]) -> None:
    (seen,) = run_on_ranks(1, steady_steps, case, **options)
    assert all(len(step) <= MOST for step in seen.waits), seen.report()


def loaded_from_files(folder: str) -> tuple[float, bool]:
    """In a rank: the largest share of the model that is in host memory twice while the engine takes it."""
    from transformers import LlamaForCausalLM

    wide("bf16").save_pretrained(folder)
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    keep, total = HostWeights.keep, sum(p.nbytes for p in llama.parameters())
    worst = [0.0]

    def watched(host: HostWeights, flat: torch.Tensor, parameters: Any) -> torch.Tensor:
        kept = keep(host, flat, parameters)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in host._of_host.values()}
        buffers = {buffer.data_ptr(): buffer.nbytes for buffer in host.buffers}
        worst[0] = max(worst[0], (sum({**storages, **buffers}.values()) - total) / total)
        return kept

    with mock.patch.object(HostWeights, "keep", watched):
        engine = tiny.initialize(Case(stage=2, dtype="bf16", waiting="cpu"), llama=llama)
    same = {key: value.clone() for key, value in engine.module.state_dict().items()}
    engine.destroy()
    return worst[0], tiny.identical(same, wide("bf16").state_dict())


def test_no_weight_is_in_host_memory_twice(tmp_path: Path) -> None:
    ((worst, is_same),) = run_on_ranks(1, loaded_from_files, str(tmp_path))
    assert is_same and worst < 0.01
