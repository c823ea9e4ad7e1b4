"""Adapters in DeepSpeed's engine at every ZeRO stage."""

from __future__ import annotations

import pytest
import torch

import hift_ds
from hift_ds.model import loss as losses
from tests.launch.methods.test_adapters import (
    batch,
    made,
)
from tests.support.ranks import run_on_ranks


def engine_steps(method: str, stage: int) -> tuple[list[float], bool]:
    """In a rank: losses of two steps of DeepSpeed, and whether what is frozen stayed."""
    import deepspeed

    module = made(method, "llama")
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
        "hift": {"enabled": False},
        "steps_per_print": 10**9,
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    engine = hift_ds.initialize(model=module, config=config, model_parameters=trained)[0]
    try:
        found = []
        for _ in range(3):
            given = batch()
            loss = losses.summed_loss(engine, engine.module, given, losses.find_targets(given["input_ids"])) / 24
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        named = dict(engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(named.values()), enabled=stage == 3):
            return found, all(torch.equal(named[n], p.bfloat16()) for n, p in frozen.items())
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("method", "stage"), [*((m, 2) for m in ("lora", "adapter", "prelayer", "s4")), ("prefix", 3), ("prelayer", 3)]
)
def test_through_deepspeed(method: str, stage: int) -> None:
    (((first, *_, last), stayed),) = run_on_ranks(1, engine_steps, method, stage)
    assert last < first and stayed
