"""How much host memory is planned before anything is built."""

import math

import pytest
import torch

from hift_ds.state.arena import ALIGNMENT
from hift_ds.state.placement import _host_bytes
from hift_ds.state.trial import Traits

ADAM = Traits(None, 8, state=(("exp_avg", torch.float32), ("exp_avg_sq", torch.float32)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_plan_holds_every_share_with_its_padding_and_alignment(dtype: torch.dtype, ranks: int) -> None:
    traits = Traits(None, dtype.itemsize, state=(("moment", dtype),))
    for numel in range(1, 600):
        share = math.ceil(numel / ranks / 2) * 2
        placed = sum(math.ceil(share * size / ALIGNMENT) * ALIGNMENT for size in (4, dtype.itemsize))
        planned = _host_bytes([[torch.nn.Parameter(torch.empty(numel, device="meta"))]], ranks, traits, True)
        assert placed <= planned <= placed + 2 * ALIGNMENT


def test_a_parameter_that_blocks_share_counts_once_and_masters_count_where_there_are_some() -> None:
    one, other = (torch.nn.Parameter(torch.empty(1000, device="meta")) for _ in range(2))
    assert _host_bytes([[one], [one], [other]], 1, ADAM, True) == 2 * (12 * 1000 + 3 * ALIGNMENT)
    assert _host_bytes([[one]], 1, ADAM, False) == 8 * 1000 + 2 * ALIGNMENT
    assert _host_bytes([[one]], 1, Traits("it has rows", 0.5), True) == 4500 + 2 * ALIGNMENT
