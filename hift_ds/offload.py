"""Host memory for the state of inactive blocks."""

from collections.abc import Iterable

import torch
from deepspeed.accelerator import get_accelerator


class HostState:
    """Moves the tensors of one block between the device and host buffers that are made once.

    A tensor keeps its identity and changes its ``data``, so optimizer state keyed by it stays valid. Where the
    device is the host (a CPU accelerator, or DeepSpeed's own ``offload_optimizer: cpu``) there is nothing to move.

    Args:
        device: where the active block's state has to be.
        pin_memory: page-lock the host buffers, through DeepSpeed's accelerator.
    """

    def __init__(self, device: torch.device, pin_memory: bool = True):
        self.device = device
        self.pin_memory = pin_memory
        self._buffers: dict[torch.Tensor, torch.Tensor] = {}

    def to_host(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Copy ``tensors`` to host memory and release their device memory; True where anything moved."""
        if self.device.type == "cpu":
            return False
        for tensor in tensors:
            if tensor not in self._buffers:
                buffer = torch.empty_like(tensor.data, device="cpu")
                self._buffers[tensor] = get_accelerator().pin_memory(buffer) if self.pin_memory else buffer
            # Not non_blocking: the host buffer may be read (a checkpoint) right after this returns.
            self._buffers[tensor].copy_(tensor.data)
            tensor.data = self._buffers[tensor]
        return True

    def to_device(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Copy ``tensors`` back to the device; True where anything moved."""
        if self.device.type == "cpu":
            return False
        for tensor in tensors:
            tensor.data = tensor.data.to(self.device, non_blocking=self.pin_memory)
        return True
