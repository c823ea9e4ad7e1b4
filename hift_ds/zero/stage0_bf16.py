"""Stage 0 in bf16: fp32 masters that keep their parameters' shapes."""

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import split_params_grads_into_shared_and_expert_params
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import bwc_tensor_model_parallel_rank, is_model_parallel_parameter

from hift_ds.optim.properties import with_initial_state
from hift_ds.zero.base import BlockOptimizer


class UnfusedBlockOptimizer(BlockOptimizer, FP16_UnfusedOptimizer):
    """One block's optimizer at stage 0 in bf16."""

    is_replicated = True

    def initialize_optimizer_states(self) -> None:
        """Make state only where the optimizer's class makes it at construction.

        DeepSpeed takes a step on zero gradients here. That step counts, decays the masters, and allocates the state of
        every block at once.
        """
        self.optimizer = with_initial_state(self.optimizer)
        self._weights = [weights for members in self.fp16_groups for weights in members]

    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of the block's gradients, on the device. Experts do not count, as in DeepSpeed."""
        shared = [split_params_grads_into_shared_and_expert_params(members)[0] for members in self.fp16_groups]
        counted = [[g for g in own if self._is_counted(g)] for own in shared]
        squares = [torch.stack(torch._foreach_norm(own, 2, torch.float32)).square().sum() for own in counted if own]
        total = torch.stack(squares).double().sum() if squares else torch.zeros((), device=self._weights[0].device)
        if self.mpu is not None:
            dist.all_reduce(total, group=self.mpu.get_model_parallel_group())
        return total.sqrt()

    def _is_counted(self, gradient: torch.Tensor) -> bool:
        return bwc_tensor_model_parallel_rank(mpu=self.mpu) == 0 or is_model_parallel_parameter(gradient)

    def scale(self) -> float:
        """Return the loss scale of the gradients."""
        return float(self.loss_scale_config.cur_scale)

    def release_gradients(self) -> None:
        """Free the gradients."""
        self.zero_grad(set_to_none=True)

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return each fp32 master with the index of its parameter group."""
        return [(master, g) for g, masters in enumerate(self.fp32_groups) for master in masters]

    def gradient_parts(self, index: int) -> list[torch.Tensor]:
        """Return the gradient of a master, if there is one."""
        gradient = self._weights[index].grad
        return [] if gradient is None else [gradient]

    def weights(self, index: int) -> torch.Tensor:
        """Return the bf16 weights of a master."""
        weights = self._weights[index]
        return weights if self.host_weights is None else self.host_weights.of(weights)

    def refresh_fp32_params(self) -> None:
        """Let the masters have the values of the weights."""
        for index, (master, _) in enumerate(self.masters()):
            master.data.copy_(self.weights(index).data)

    def first_element(self) -> int:
        """Return 0: each rank steps whole parameters."""
        return 0

    def elements(self, index: int) -> list[tuple[torch.nn.Parameter, int, int, int]]:
        """Return the whole parameter."""
        return [(self._weights[index], 0, self.masters()[index][0].numel(), 0)]
