"""Stage 0 in fp32: DeepSpeed uses the torch optimizer unchanged, and the weights are their own masters."""

from typing import Any

import torch
from deepspeed.runtime.utils import is_invalid_grad_norm

from hift_ds.optim.properties import with_initial_state
from hift_ds.state.step import Slice
from hift_ds.zero.base import BlockOptimizer


class PlainBlockOptimizer(BlockOptimizer):
    """One block's optimizer at stage 0 in fp32.

    Attributes:
        overflow: the last step was skipped, because the loss or a gradient was non-finite.
        norm: norm of the gradients, set by the engine if it clipped them.
    """

    overflow = False
    norm: Any = None
    _global_grad_norm: Any = None

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = with_initial_state(optimizer)
        self._masters = [(weights, g) for g, group in enumerate(optimizer.param_groups) for weights in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the torch optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The state of the torch optimizer, which Lightning moves when it ends."""
        return self.optimizer.state

    def step(self) -> None:
        """Step the block, unless the loss or a gradient is non-finite."""
        norm, self.norm = self.norm, None
        if norm is None:
            gradients = [weights.grad for weights, _ in self._masters if weights.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self.overflow = self.invalid_loss or bool(is_invalid_grad_norm(norm))
        self._global_grad_norm = float("inf") if self.overflow else norm
        if self.overflow:
            return
        if self.block_state is None:
            self.optimizer.step()
        else:
            self.block_state.step()

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return each weight with the index of its parameter group."""
        return self._masters

    def gradient(self, cut: Slice, shape: torch.Size) -> torch.Tensor:
        """Return the gradient of a slice; zeros if there is none."""
        weights, _ = self._masters[cut.number]
        if weights.grad is None:
            return torch.zeros(shape, device=weights.device)
        return weights.grad.reshape(-1)[cut.start : cut.stop].view(shape)

    def weights(self, index: int) -> None:
        """Return None: the masters are the weights."""

    def first_element(self) -> int:
        """Return 0: each rank steps whole parameters."""
        return 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the block."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the torch optimizer's ``state_dict``."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        """Load a torch optimizer's ``state_dict``; DeepSpeed's other arguments have no effect here."""
        self.optimizer.load_state_dict(state_dict)
