"""Stage 0 in bf16: fp32 masters that keep their parameters' shapes."""

from typing import Any

import torch
from deepspeed.moe.utils import split_params_grads_into_shared_and_expert_params
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import get_global_norm, get_weight_norm, is_invalid_grad_norm

from hift_ds.optim.properties import with_initial_state
from hift_ds.state.step import Slice
from hift_ds.zero.base import BlockOptimizer
from hift_ds.zero.gradients import fp32_slice


class UnfusedBlockOptimizer(BlockOptimizer, FP16_UnfusedOptimizer):
    """One block's optimizer at stage 0 in bf16."""

    def initialize_optimizer_states(self) -> None:
        """Make state only where the optimizer's class makes it at construction.

        DeepSpeed takes a step on zero gradients here. That step counts, decays the masters, and allocates the state of
        every block at once.
        """
        self.optimizer = with_initial_state(self.optimizer)
        self._weights = [weights for members in self.fp16_groups for weights in members]

    def step(self, closure: Any = None) -> bool:
        """Step the block, unless the loss or a gradient is non-finite; return whether the step was skipped."""
        if self.invalid_loss:
            return self._skip_invalid_grad_norm()
        if self.block_state is None:
            return super().step(closure)
        self.overflow = False
        gradients = [split_params_grads_into_shared_and_expert_params(members)[0] for members in self.fp16_groups]
        norms = [get_weight_norm(members, mpu=self.mpu) if members else 0.0 for members in gradients]
        self._global_grad_norm = get_global_norm(norm_list=norms)
        if is_invalid_grad_norm(self._global_grad_norm):
            return self._skip_invalid_grad_norm()
        self._update_scale(False)
        self._combined_scale = self.unscale_and_clip_grads(self._global_grad_norm, apply_scale=False)
        self.block_state.step()
        return self.overflow

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return each fp32 master with the index of its parameter group."""
        return [(master, g) for g, masters in enumerate(self.fp32_groups) for master in masters]

    def gradient(self, cut: Slice, shape: torch.Size) -> torch.Tensor:
        """Return the fp32 gradient of a slice, clipped; zeros if there is none."""
        weights = self.weights(cut.number)
        if weights.grad is None:
            return torch.zeros(shape, device=weights.device)
        return fp32_slice([weights.grad], cut, shape).mul_(1.0 / self._combined_scale)

    def weights(self, index: int) -> torch.Tensor:
        """Return the bf16 weights of a master."""
        return self._weights[index]

    def first_element(self) -> int:
        """Return 0: each rank steps whole parameters."""
        return 0
