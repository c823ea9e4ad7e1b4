"""What the engine decides by itself, without an optimizer or ranks."""

from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import DeepSpeedEngine

from hift_ds.config import HiFTConfig
from hift_ds.engine import HiFTEngine, _check_experts


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_at_stage_0_are_reduced_over_the_group_that_deepspeed_uses(size: int) -> None:
    """With sequence parallelism, it is larger than the data-parallel group."""
    engine: Any = HiFTEngine.__new__(HiFTEngine)
    torch.nn.Module.__init__(engine)
    engine.seq_data_parallel_group, engine.dp_world_size = "sequence and data", 1
    with (
        mock.patch.object(dist, "get_world_size", {"sequence and data": size}.__getitem__),
        mock.patch.object(DeepSpeedEngine, "buffered_allreduce_fallback") as reduce,
    ):
        engine.buffered_allreduce_fallback()
    assert reduce.called == (size > 1)


@pytest.mark.parametrize("size", [1, 2])
def test_experts_that_differ_between_ranks_are_refused(size: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), MoE(8, torch.nn.Linear(8, 8), num_experts=2, ep_size=size))
    if size == 1:
        return _check_experts(model)
    with pytest.raises(ValueError, match="1 is a deepspeed.moe layer with ep_size=2.*use ep_size=1"):
        HiFTEngine(model, HiFTConfig(), {})
