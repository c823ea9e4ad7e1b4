"""Stage 0 in fp32: DeepSpeed uses the torch optimizer unchanged, and the weights are their own masters."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import is_model_parallel_parameter

from hift_ds.optim.properties import has_elements, with_initial_state
from hift_ds.weights.host import HostWeights
from hift_ds.zero.base import BlockOptimizer


class PlainBlockOptimizer(BlockOptimizer):
    """One block's optimizer at stage 0 in fp32.

    Args:
        optimizer: the torch optimizer of the block.
        clip_grad: largest norm of the gradients; 0: any.
        mpu: DeepSpeed's model-parallel interface, if any.
        order: the model's parameters. In their order, the norm is rounded as DeepSpeed rounds it.
    """

    loss_scale = 1.0
    is_replicated = True
    saves_masters = False

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip_grad: float, mpu: Any, order: Iterable[torch.nn.Parameter]
    ):
        self.optimizer = with_initial_state(optimizer)
        self.clip_grad, self._mpu = clip_grad, mpu
        self._weights = [weights for group in optimizer.param_groups for weights in group["params"]]
        self._masters = [(weights, g) for g, group in enumerate(optimizer.param_groups) for weights in group["params"]]
        own = set(map(id, self._weights))
        self._in_order = [weights for weights in order if id(weights) in own]

    def keep_weights_on_host(self, host: HostWeights, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Take the weights in host memory for the masters."""
        super().keep_weights_on_host(host, parameters)
        self._masters = [(host.of(weights), g) for weights, (_, g) in zip(self._weights, self._masters, strict=True)]
        for weights in self._weights:  # some optimizers have initial state
            if (values := self.state.pop(weights, None)) is not None:
                moved = {name: value.to("cpu") if has_elements(value) else value for name, value in values.items()}
                self.state[host.of(weights)] = moved
        for group in self.param_groups:
            group["params"] = [host.of(weights) for weights in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the torch optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The state of the torch optimizer, which Lightning moves when it ends."""
        return self.optimizer.state

    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of the block's gradients, on the device."""
        counted = [w.grad for w in self._in_order if w.grad is not None and self._is_counted(w)]
        if not counted:
            return torch.zeros((), device=self._in_order[0].device)
        total = torch.stack(torch._foreach_norm(counted, 2)).square().sum()
        if self._mpu is not None:
            dist.all_reduce(total, group=self._mpu.get_model_parallel_group())
        return total.sqrt()

    def _is_counted(self, weights: torch.Tensor) -> bool:
        return self._mpu is None or self._mpu.get_model_parallel_rank() == 0 or is_model_parallel_parameter(weights)

    def factor_for(self, norm: torch.Tensor, scale: float) -> torch.Tensor | None:
        """Return what to multiply gradients by, rounded as DeepSpeed does at this stage."""
        if self.clip_grad <= 0:
            return None
        # A number divided by a tensor is the tensor's reciprocal times the number, which rounds twice.
        return (torch.full_like(norm, self.clip_grad) / (norm + 1e-6)).clamp(max=1.0)

    def _update_scale(self, is_skipped: bool) -> None:
        """Do nothing: there is no loss scale."""

    def release_gradients(self) -> None:
        """Free the gradients."""
        self.zero_grad()

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return each weight with the index of its parameter group."""
        return self._masters

    def gradient_parts(self, index: int) -> list[torch.Tensor]:
        """Return the gradient of a weight, if there is one."""
        gradient = self._weights[index].grad
        return [] if gradient is None else [gradient]

    def weights(self, index: int) -> None:
        """Return None: the masters are the weights."""

    def first_element(self) -> int:
        """Return 0: each rank steps whole parameters."""
        return 0

    def elements(self, index: int) -> list[tuple[torch.nn.Parameter, int, int, int]]:
        """Return the whole parameter."""
        return [(self._weights[index], 0, self._masters[index][0].numel(), 0)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the block."""
        for weights in self._weights:
            if set_to_none:
                weights.grad = None
            elif weights.grad is not None:
                weights.grad.zero_()
