"""One optimizer step of a method: by gradients, or by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from hift_ds.engine import UnreachedBlockError
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.table import Method

# Computes a micro-batch's share of the step's loss. Gradient methods call it once, forward-only ones several times.
Share = Callable[[], torch.Tensor]


# Is given this rank's share of the step's loss, a scalar in fp64 on the device.
BeforeStep = Callable[[torch.Tensor], None]


def take_step(
    method: Method, engine: Any, shares: Sequence[Share], before_step: BeforeStep = lambda loss: None
) -> bool:
    """Take one optimizer step on this rank's micro-batches; every rank calls it.

    Args:
        before_step: called once, before `engine.step()`, while the device still computes the gradients.

    Returns:
        Whether the weights were updated. Either all ranks update them or none does: a non-finite loss or gradient on
        one rank prevents the update on all.
    """
    return (_forward_step if method.forward_only else _gradient_step)(engine, shares, before_step)


def _gradient_step(engine: Any, shares: Sequence[Share], before_step: BeforeStep) -> bool:
    loss: torch.Tensor | None = None
    for number, share in enumerate(shares, start=1):
        value = share()
        # DeepSpeed averages over micro-batches and ranks, but the shares are to be summed.
        try:
            engine.backward(value * (len(shares) * dist.get_world_size()))
        except UnreachedBlockError as error:
            raise UserError(f"deepspeed.hift.freeze: {error}") from None
        loss = value.detach().double() if loss is None else loss + value.detach().double()
        if number == len(shares):
            before_step(loss)
            if not _may_step(engine, loss):
                return False
        engine.step()
    return engine.was_step_applied()


def _may_step(engine: Any, loss: torch.Tensor) -> bool:
    """Return whether loss and gradients are finite on all ranks; all ranks get the same answer.

    It checks for DeepSpeed's own engine, which in fp32 ignores non-finite values at stage 0 and looks only at gradients
    at other stages. Other engines check for themselves. After a refusal the engine cannot continue: its accumulation
    window stays open.
    """
    if getattr(engine, "skips_by_itself", False) or engine.fp16_enabled():
        return True
    is_finite = loss.isfinite()
    if engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        is_finite = is_finite & torch.nn.utils.get_total_norm(gradients).isfinite()
    flag = is_finite.float()
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _forward_step(engine: Any, shares: Sequence[Share], before_step: BeforeStep) -> bool:
    world = dist.get_world_size()

    def total() -> float:
        loss = shares[0]().double()
        for share in shares[1:]:
            loss += share().double()
        return loss.item()

    # MeZO divides the sum of the ranks' losses by the sum of the second numbers, which is 1.
    loss = engine.optimizer.step(lambda: (total(), 1 / world))
    before_step(torch.full((), loss / world, dtype=torch.float64, device=engine.device))
    engine.step()
    return engine.was_step_applied()
