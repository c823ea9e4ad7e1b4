"""The norm of a block's gradients."""

import pytest
import torch

from hift_ds.config import NORM_CHUNK
from hift_ds.zero.gradients import squared_norm


def test_a_norm_is_of_all_gradients() -> None:
    """A large matrix is cut into chunks, a small one is not."""
    gradients = [torch.full((2, NORM_CHUNK // 2 + 3), 2.0), torch.full((3, 5), 3.0), torch.full((NORM_CHUNK,), 1.0)]
    assert squared_norm(gradients).item() == pytest.approx(4.0 * (NORM_CHUNK + 6) + 9.0 * 15 + NORM_CHUNK, rel=1e-14)
    assert squared_norm([]).item() == 0.0
    assert squared_norm([gradients[1].bfloat16(), torch.tensor([torch.inf])]).isinf()
