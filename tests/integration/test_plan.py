"""The planner's numbers against what the engine holds."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from hift_ds.planner.models import load_config
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request
from tests.hift_ds.planner.test_plan import SMALL, name_of, small
from tests.support.device_memory import DeviceMemory
from tests.support.pairwise import others_slow, params
from tests.support.ranks import run_on_ranks


def run_engine(request: Request) -> dict[str, Any]:
    """In a rank: device peak of each step of the first cycle, bytes off the device after it, and the staging areas."""
    import hift_ds
    from hift_ds.launch.model.batch_loss import summed_loss
    from hift_ds.model.activations import host_buffers

    config = request.deepspeed_config()
    config["optimizer"]["params"] |= {"lr": 1e-4, "weight_decay": 0.01}
    config |= {"gradient_clipping": 1.0, "steps_per_print": 10**9}
    torch.manual_seed(0)
    peaks = []
    # Stage 3 exchanges it in the whole process, for ever.
    plain_linear = mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear)
    with plain_linear, DeviceMemory() as memory:
        dtype = torch.float32 if request.precision == "fp32" else torch.bfloat16
        model = _model(dtype)
        if request.weights == "cpu":
            memory.declare(model.parameters(), "host")
        if request.recomputes:
            hift_ds.checkpoint_activations(model, offload=request.checkpoint_offload)
        engine = hift_ds.initialize(model=model, config=config)[0]
        try:
            ids = torch.randint(512, (request.batch_size, request.seq_len))
            # State that is made in the first cycle and stays on the device is all there in the second.
            for _ in range(len(engine.blocks) * (2 if request.offload_device == "none" else 1)):
                memory.reset()
                for _ in range(request.gradient_accumulation_steps):
                    given = {"input_ids": ids, "labels": ids}
                    loss = summed_loss(engine, given, "causal-lm", request.loss_chunk)
                    engine.backward(loss / ids.numel())
                    del loss
                    engine.step()
                peaks.append(memory.peak["total"])
            optimizers = engine.block_optimizers
            areas = [slot.area for slot in optimizers.staging.slots] if optimizers.staging else []
            return {
                "peaks": peaks[-len(engine.blocks) :],
                "off_device": optimizers.host.nbytes if optimizers.host else 0,
                "weights": engine.memory_ledger()["host"]["parameters"],
                "checkpoints": sum(buffer.nbytes for buffer in host_buffers(model)),
                "areas": [area.nbytes for area in areas if area is not None],
            }
        finally:
            engine.destroy()


def _model(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    config = load_config(SMALL)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


FACTORS = {"zero_stage": (0, 1, 2, 3), "precision": ("fp32", "mixed-hi"), "offload_step": ("block", "streamed")}
SINGLE = [
    {"zero_stage": 2, "activation_checkpointing": True},
    {"zero_stage": 2, "checkpoint_offload": True},
    {"zero_stage": 2, "loss_chunk": 24},
    {"zero_stage": 3, "checkpoint_offload": True, "loss_chunk": 24},
    {"zero_stage": 2, "gradient_accumulation_steps": 2, "optimizer": "sgdm"},
    {"zero_stage": 3, "layers_per_block": 2, "optimizer": "sgd"},
    {"zero_stage": 0, "optimizer": "adafactor"},
    {"zero_stage": 0, "master": "fp32"},
    {"zero_stage": 2, "weights": "cpu", "activation_checkpointing": True},
    {"zero_stage": 0, "weights": "cpu", "moments": "8bit"},
    {"zero_stage": 2, "moments": "8bit"},
    {"zero_stage": 3, "moments": "8bit", "optimizer": "sgdm", "offload_step": "block"},
    {"zero_stage": 2, "offload_device": "none"},
    {"zero_stage": 2, "max_block_numel": 20000},
    {"zero_stage": 2, "balance": True},
    {"zero_stage": 1, "offload_optimizer": "cpu", "precision": "fp32", "gradient_accumulation_steps": 2},
    {"zero_stage": 3, "offload_optimizer": "cpu", "precision": "fp32"},
]
# Each of their values is in one of those above, too.
MORE = [
    {"zero_stage": 1, "precision": "fp32", "checkpoint_offload": True, "loss_chunk": 40},
    {"zero_stage": 1, "gradient_accumulation_steps": 2},
    {"zero_stage": 0, "weights": "cpu", "precision": "fp32"},
    {"zero_stage": 1, "weights": "cpu", "master": "fp32", "offload_step": "block"},
    {"zero_stage": 0, "moments": "8bit", "precision": "fp32"},
    {"zero_stage": 1, "moments": "8bit", "master": "fp32", "optimizer": "lion"},
    {"zero_stage": 3, "offload_device": "none", "precision": "fp32"},
    {"zero_stage": 1, "offload_optimizer": "cpu"},
    {"zero_stage": 3, "offload_optimizer": "cpu", "max_block_numel": 20000},
    {"zero_stage": 2, "weights": "cpu", "max_block_numel": 20000},
    {"zero_stage": 2, "moments": "8bit", "max_block_numel": 20000},
    {"zero_stage": 1, "max_block_numel": 20000, "offload_step": "block"},
    {"zero_stage": 2, "offload_device": "none", "max_block_numel": 20000},
    {"zero_stage": 2, "offload_optimizer": "cpu", "max_block_numel": 20000},
    {"zero_stage": 3, "max_block_numel": 20000, "offload_step": "block"},
    {"zero_stage": 0, "max_block_numel": 20000, "precision": "fp32"},
]


@pytest.mark.parametrize("options", [*params(dict, FACTORS), *others_slow([*SINGLE, *MORE], SINGLE)], ids=name_of)
def test_planned_as_measured(options: dict[str, Any]) -> None:
    """State off the device and staging areas exactly; the device's peak never too low, and at most 5 % too high."""
    request = small(**options)
    request = replace(request, buffer_size=131072) if request.placement == "streamed" else request
    plan = Planner(request).plan(request)
    (seen,) = run_on_ranks(1, run_engine, request)
    print(f"{'block':<20}{'largest in':<12}{'planned':>12}{'measured':>12}")
    for block, peak in zip(plan.blocks, seen["peaks"], strict=True):
        print(f"{block.name:<20}{block.phase:<12}{sum(block.device.values()):>12,}{peak:>12,}")
    assert seen["off_device"] == sum(plan.host.values()) - plan.host["activations"] - plan.host["parameters"]
    assert plan.host["parameters"] <= seen["weights"] <= 1.01 * plan.host["parameters"]
    assert seen["checkpoints"] == plan.host["activations"]
    assert seen["areas"] == planned_areas(request)
    for block, peak in zip(plan.blocks, seen["peaks"], strict=True):
        assert peak <= sum(block.device.values()), block
    assert sum(plan.device.values()) <= 1.05 * max(seen["peaks"])


@pytest.mark.parametrize(("stage", "weights"), [(0, "device"), (2, "device"), (3, "device"), (0, "cpu"), (2, "cpu")])
def test_planned_as_measured_on_two_ranks(stage: int, weights: str) -> None:
    request = small(buffer_size=131072, zero_stage=stage, ranks=2, weights=weights)
    plan = Planner(request).plan(request)
    for rank, seen in enumerate(run_on_ranks(2, run_engine, request)):
        assert seen["off_device"] == sum(plan.host.values()) - plan.host["parameters"]
        of_machine = plan.host["parameters"] if rank == 0 else 0
        assert of_machine <= seen["weights"] <= 1.01 * of_machine
        assert seen["areas"] == planned_areas(request)
        assert max(seen["peaks"]) <= sum(plan.device.values())


def host_ledger(request: Request) -> dict[str, int]:
    """In a rank: what is in host memory after a cycle of steps on the host."""
    import hift_ds

    config = request.deepspeed_config()
    config["optimizer"]["params"] |= {"lr": 1e-4}
    engine = hift_ds.initialize(model=_model(torch.bfloat16), config=config)[0]
    try:
        ids = torch.zeros(1, 8, dtype=torch.long)
        for _ in range(len(engine.blocks) * request.gradient_accumulation_steps):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        return engine.memory_ledger()["host"]
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("stage", "accumulation"), others_slow([(s, a) for s in (1, 2, 3) for a in (1, 2)], [(1, 2), (2, 1), (3, 2)])
)
def test_host_memory_of_the_host_step_is_as_planned(stage: int, accumulation: int) -> None:
    request = small(zero_stage=stage, offload_optimizer="cpu", gradient_accumulation_steps=accumulation)
    (seen,) = run_on_ranks(1, host_ledger, request)
    plan = Planner(request).plan(request).host
    assert {category: nbytes for category, nbytes in plan.items() if nbytes} == {k: n for k, n in seen.items() if n}


def planned_areas(request: Request) -> list[int]:
    if request.placement != "streamed":
        return []
    planner = Planner(request)
    setup = planner.setup(request, planner.build(request))
    return setup.slots * [setup.slot]
