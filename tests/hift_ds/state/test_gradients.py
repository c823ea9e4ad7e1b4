"""Slices of a gradient that consists of several tensors."""

import pytest
import torch

from hift_ds.state.gradients import elements_between, fp32_slice

PARTS = [torch.tensor([[0.0, 1.0], [2.0, 3.0]]).bfloat16(), torch.tensor([4.0]), torch.tensor([5.0, 6.0, 7.0])]


def test_a_slice_of_gradients_lies_across_several() -> None:
    found = fp32_slice(PARTS, 3, 7, None)
    assert found.dtype == torch.float32 and found.tolist() == [3.0, 4.0, 5.0, 6.0]
    doubled = fp32_slice(PARTS, 3, 7, torch.tensor(2.0))
    assert doubled.tolist() == [6.0, 8.0, 10.0, 12.0] and PARTS[1].tolist() == [4.0]


def test_elements_are_found_where_they_are() -> None:
    found = [(position, values.tolist()) for position, values in elements_between(PARTS, 2, 6)]
    assert found == [(0, [2.0, 3.0]), (2, [4.0]), (3, [5.0])]
    with pytest.raises(AssertionError, match="fewer elements"):
        list(elements_between(PARTS, 6, 9))
