"""What travels if the optimizer computes on the host: gradients to it, and updated weights back to the device."""

from collections.abc import Sequence

import torch

from hift_ds.state.allocator import HostMemory
from hift_ds.state.gradients import elements_between

# Elements of a chunk: few enough that a chunk's fp32 gradients are small, enough that kernels use all cores.
CHUNK = 2**22


class HostStep:
    """Host memory for the gradients and the updated weights of one block. All blocks share it.

    The copies run on the device's current stream, and the host waits for none of them. It waits once in each step
    (:meth:`~hift_ds.zero.base.BlockOptimizer.step`), after it has issued the copies of gradients. They are there then,
    and so are the weights of the step before on the device, so that both areas can be used again.

    Args:
        host: allocates the areas.
        gradient_dtype: dtype of the gradients.
        weight_dtype: dtype of the weights.
    """

    def __init__(self, host: HostMemory, gradient_dtype: torch.dtype, weight_dtype: torch.dtype):
        self._host = host
        self._dtypes = gradient_dtype, weight_dtype
        self._numel = 0
        self._gradients = self._weights = torch.empty(0)
        self._fetched = self._sent = 0  # elements that are in use

    def reserve(self, numel: int) -> None:
        """Make the areas large enough for a block of so many elements. They are allocated by :meth:`allocate`."""
        self._numel = max(self._numel, numel)

    def allocate(self) -> None:
        """Allocate the areas, for the largest block."""
        self._gradients, self._weights = (
            self._host.empty(torch.empty(self._numel, dtype=dtype, device="meta")) for dtype in self._dtypes
        )

    def areas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the areas of gradients and weights."""
        return self._gradients, self._weights

    def begin(self) -> None:
        """Begin a step: use the area of the gradients from its beginning, and after the wait that of the weights."""
        self._fetched = self._sent = 0

    def fetch(self, parts: Sequence[torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """Start to copy a gradient to the host.

        Args:
            parts: the tensors whose concatenation is the gradient.
            start: the first element to copy.
            stop: the element after the last.

        Returns:
            A flat tensor on the host, which holds the elements after the host's next wait.
        """
        area = self._gradients[self._fetched : self._fetched + stop - start]
        self._fetched += stop - start
        for position, values in elements_between(parts, start, stop):
            area[position : position + values.numel()].copy_(values, non_blocking=True)
        return area

    def send(self, values: torch.Tensor, weights: torch.Tensor) -> None:
        """Start to copy updated values to weights on the device, in the weights' dtype."""
        area = self._weights[self._sent : self._sent + values.numel()].view(values.shape)
        self._sent += values.numel()
        weights.copy_(area.copy_(values), non_blocking=True)
