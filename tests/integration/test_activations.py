"""Activation checkpoints in host memory, through the engine: the same bits, less on the device."""

import contextlib
from typing import Any

import pytest
import torch

from hift_ds.model.activations import checkpoint_activations
from tests.hift_ds.model.test_activations import HIDDEN_BYTES
from tests.support import tiny
from tests.support.device_memory import DeviceMemory
from tests.support.pairwise import others_slow
from tests.support.parity import STAGES
from tests.support.ranks import run_on_ranks
from tests.support.tiny import Case


def trained(case: Case, offload: bool) -> dict[str, Any]:
    """In a rank, under the harness that refuses to mix host and device: weights, and what was held."""
    llama = tiny.model(case.dtype)
    checkpoints = checkpoint_activations(llama, offload=offload)
    with DeviceMemory() if tiny.DEVICE == "cpu" else contextlib.nullcontext() as memory:
        engine = tiny.initialize(case, llama=llama)
        try:
            peaks, held = [], []
            for step in range(case.steps):
                if memory:
                    memory.reset()
                for micro in range(tiny.ACCUMULATION):
                    with memory.labelled("activations") if memory else contextlib.nullcontext():
                        loss = engine(**tiny.micro_batch(step, micro, torch.distributed.get_rank())).loss
                        engine.backward(loss)
                        del loss
                    engine.step()
                peaks.append(memory.peak["activations"] if memory else None)
                held.append(checkpoints.host.nbytes if checkpoints else 0)
            ledger = engine.memory_ledger()["host"]["buffers"]
            return {"weights": tiny.weights(engine), "peaks": peaks, "held": held, "ledger": ledger}
        finally:
            engine.destroy()


CASES = [Case(stage=stage, dtype=dtype, cycles=1) for stage in STAGES for dtype in ("fp32", "bf16")]


CASES += [Case(stage=2, ranks=2, cycles=1), Case(stage=3, ranks=2, cycles=1)]
TABLE = [case for case in CASES[:-2] if (case.stage % 2 == 1) == (case.dtype == "bf16")] + CASES[-2:-1]


@pytest.mark.parametrize("case", others_slow(CASES, TABLE), ids=str)
def test_the_engine_trains_the_same_bits(case: Case) -> None:
    for ours, truth in zip(*(run_on_ranks(case.ranks, trained, case, flag) for flag in (True, False)), strict=True):
        assert tiny.identical(ours["weights"], truth["weights"])
        hidden = HIDDEN_BYTES if case.dtype == "fp32" else HIDDEN_BYTES // 2
        assert ours["held"] == [tiny.LAYERS * hidden] * case.steps  # the embeddings come first
        assert ours["ledger"] == truth["ledger"] + tiny.LAYERS * hidden
        if tiny.DEVICE != "cpu":
            continue  # the peaks are those of the simulated device
        # With the embeddings active four checkpoints: gone but for those of the layer at work and the next one.
        assert ours["peaks"][0] <= truth["peaks"][0] - 2 * hidden
