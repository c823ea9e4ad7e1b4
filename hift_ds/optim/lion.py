"""Lion in plain PyTorch, for devices without DeepSpeed's fused Lion kernel."""

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Updates weights by the sign of an interpolated momentum, with decoupled weight decay.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2. The state of a parameter is
    one tensor ``exp_avg`` with the parameter's shape and dtype.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: coefficients of the momentum in the update's direction, and in the momentum's own update.
        weight_decay: decoupled weight decay, multiplied by ``lr``.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, and return the loss of ``closure`` if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                exp_avg = state["exp_avg"]
                direction = exp_avg.lerp(param.grad, 1 - beta1).sign_()
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                exp_avg.lerp_(param.grad, 1 - beta2)
        return loss
