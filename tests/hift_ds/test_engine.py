"""What the engine decides by itself, without an optimizer or ranks."""

from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from hift_ds.engine import HiFTEngine


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
