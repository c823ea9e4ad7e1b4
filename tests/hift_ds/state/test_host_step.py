"""The areas through which gradients and weights travel if the optimizer computes on the host."""

import torch

from hift_ds.state.allocator import HostMemory
from hift_ds.state.host_step import HostStep


def test_all_blocks_share_two_areas() -> None:
    host = HostMemory(pin_memory=False)
    through = HostStep(host, torch.float32, torch.bfloat16)
    for numel in (5, 9, 7):
        through.reserve(numel)
    assert not host.buffers
    through.allocate()
    gradients, weights = through.areas()
    assert [buffer.data_ptr() for buffer in host.buffers] == [gradients.data_ptr(), weights.data_ptr()]
    assert (gradients.numel(), gradients.dtype) == (9, torch.float32)
    assert (weights.numel(), weights.dtype) == (9, torch.bfloat16)


def test_each_step_uses_the_areas_from_their_beginning() -> None:
    through = HostStep(HostMemory(pin_memory=False), torch.bfloat16, torch.bfloat16)
    through.reserve(9)
    through.allocate()
    gradients, weights = through.areas()
    parts = [torch.arange(4.0).bfloat16().view(2, 2), torch.arange(4.0, 8.0).bfloat16()]
    on_device = torch.zeros(3, 2).bfloat16()
    for step in range(2):
        through.begin()
        first = through.fetch(parts, 1, 6)
        second = through.fetch([part + step for part in parts], 0, 4)
        assert first.tolist() == [1, 2, 3, 4, 5] and first.data_ptr() == gradients.data_ptr()
        assert second.tolist() == [step, step + 1, step + 2, step + 3]
        through.send(torch.full((3,), 8.0), torch.empty(3).bfloat16())
        through.send(torch.arange(6.0).view(3, 2) + step, on_device)
        assert on_device.flatten().tolist() == [step, step + 1, step + 2, step + 3, step + 4, step + 5]
        assert weights.tolist() == [8, 8, 8, *on_device.flatten().tolist()]
