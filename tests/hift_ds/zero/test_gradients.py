"""Gradients of one block, as the ZeRO optimizers take them apart."""

import pytest
import torch

from hift_ds.config import NORM_CHUNK
from hift_ds.state.step import Slice
from hift_ds.zero.gradients import clear_except, fp32_slice, squared_norm


def test_a_norm_is_of_all_gradients() -> None:
    """A large matrix is cut into chunks, a small one is not."""
    gradients = [torch.full((2, NORM_CHUNK // 2 + 3), 2.0), torch.full((3, 5), 3.0), torch.full((NORM_CHUNK,), 1.0)]
    assert squared_norm(gradients).item() == pytest.approx(4.0 * (NORM_CHUNK + 6) + 9.0 * 15 + NORM_CHUNK, rel=1e-14)
    assert squared_norm([]).item() == 0.0
    assert squared_norm([gradients[1].bfloat16(), torch.tensor([torch.inf])]).isinf()


def test_a_slice_of_gradients_lies_across_several() -> None:
    gradients = [torch.tensor([[0.0, 1.0], [2.0, 3.0]]).bfloat16(), torch.tensor([4.0]), torch.tensor([5.0, 6.0, 7.0])]
    found = fp32_slice(gradients, Slice(0, 3, 7, False), torch.Size([2, 2]), None)
    assert found.dtype == torch.float32 and found.tolist() == [[3.0, 4.0], [5.0, 6.0]]
    doubled = fp32_slice(gradients, Slice(0, 3, 7, False), torch.Size([4]), torch.tensor(2.0))
    assert doubled.tolist() == [6.0, 8.0, 10.0, 12.0] and gradients[1].tolist() == [4.0]


def test_what_is_outside_of_the_spans_is_cleared() -> None:
    gradient = torch.arange(1.0, 11.0)
    clear_except(gradient, [(6, 8), (1, 3), (2, 4)])  # in any order; two overlap
    assert gradient.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0, 0.0, 7.0, 8.0, 0.0, 0.0]
