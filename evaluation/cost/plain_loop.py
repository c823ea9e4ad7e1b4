"""Algorithm 1 of the HiFT paper (section 3) as a plain PyTorch loop, without DeepSpeed, ranks or host memory.

It is the ground truth of the parity tests and a baseline of the benchmark.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

NamedTensors = list[tuple[str, Tensor]]


class PlainHiFT:
    """Train one block per step. Each block has its own optimizer and step count.

    Args:
        model: a module whose output has a scalar ``loss``, the mean over its micro-batch, unless ``share`` is given.
        blocks: the parameter names of each block, as ``model.named_parameters()`` gives them.
        rows: for each block the slice (start, stop) of rows that it trains, by parameter name, for sliced parameters.
        make_optimizer: builds a block's optimizer from its (name, tensor) pairs.
        make_scheduler: builds the learning-rate schedule of one block's optimizer; it advances once a cycle.
        order: indices into ``blocks`` in the order of one cycle; None = from the first to the last.
        steps_per_block: consecutive steps on one block.
        clip: maximum L2 norm of the active block's gradient; 0 = no clipping.
        loss_scale: factor of the loss in the backward pass, divided out of the fp32 gradients; a power of two.
        norm: computes the gradient norm; None = `global_norm`, in fp32. (DeepSpeed's ZeRO sums in fp64, slow on a CPU.)
        share: computes what a micro-batch adds to the step's loss, from the model, the micro-batch and their number;
            None = the model's loss divided by the number.

    16-bit weights get fp32 master weights, block by block (the paper's Mixed^Hi). Gradients are accumulated over the
    micro-batches in the weights' precision, as in DeepSpeed at every stage unless `grad_accum_dtype` is set.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Iterable[str]],
        make_optimizer: Callable[[NamedTensors], Optimizer],
        *,
        rows: Sequence[Mapping[str, tuple[int, int]]] | None = None,
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        order: Sequence[int] | None = None,
        steps_per_block: int = 1,
        clip: float = 0.0,
        loss_scale: float = 1.0,
        norm: Callable[[list[Tensor]], Tensor] | None = None,
        share: Callable[[nn.Module, Mapping[str, Any], int], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.share = share or _mean_share
        self.order = list(order) if order is not None else list(range(len(blocks)))
        self.steps_per_block = steps_per_block
        self.clip = clip
        self.loss_scale = loss_scale
        self.norm = norm or global_norm
        self.steps = 0  # optimizer steps so far, over all blocks
        self.grad_norm = 0.0  # of the latest step, before clipping

        by_name = dict(model.named_parameters())
        self.blocks = [[by_name[name] for name in names] for names in blocks]
        cut = rows or [{} for _ in blocks]
        self.rows = [
            [slice(*of_block[name]) if name in of_block else None for name in names]
            for names, of_block in zip(blocks, cut, strict=True)
        ]
        self.masters = [
            [_master(p if r is None else p.detach()[r]) for p, r in zip(params, cuts, strict=True)]
            for params, cuts in zip(self.blocks, self.rows, strict=True)
        ]
        self.optimizers = [
            make_optimizer(list(zip(names, masters, strict=True)))
            for names, masters in zip(blocks, self.masters, strict=True)
        ]
        self.schedulers = [make_scheduler(o) for o in self.optimizers] if make_scheduler else []
        model.requires_grad_(False)

    @property
    def active_block(self) -> int:
        """Index into `blocks` of the block that the next step trains."""
        return self.order[self.steps // self.steps_per_block % len(self.order)]

    @property
    def lr(self) -> float:
        """Learning rate of the next step (of the first parameter group)."""
        return self.optimizers[self.active_block].param_groups[0]["lr"]

    def step(self, micro_batches: Sequence[Mapping[str, Any]], ranks: int = 1) -> float:
        """Train the active block one step on the mean gradient of the micro-batches; return the mean loss.

        Args:
            micro_batches: those of all ranks, rank by rank, as many for each.
            ranks: the gradients of each rank are accumulated first and then added, as ranks do.
        """
        active = self.active_block
        params, masters, optimizer = self.blocks[active], self.masters[active], self.optimizers[active]
        rows = self.rows[active]
        for p in params:
            p.requires_grad_(True)

        mean_loss = 0.0
        of_ranks: list[list[Tensor | None]] = []
        for index, batch in enumerate(micro_batches, 1):
            loss = self.share(self.model, batch, len(micro_batches))
            (loss * self.loss_scale).backward()
            mean_loss += loss.item()
            if index % (len(micro_batches) // ranks) == 0 and ranks > 1:
                of_ranks.append([p.grad for p in params])
                self.model.zero_grad()
        for p, *grads in zip(params, *of_ranks, strict=True) if of_ranks else ():
            p.grad = sum(g for g in grads if g is not None) if any(g is not None for g in grads) else None

        for p, cut, master in zip(params, rows, masters, strict=True):
            p.requires_grad_(False)
            if master is not p and p.grad is not None:
                master.grad, p.grad = (p.grad if cut is None else p.grad[cut]).float(), None
        grads = [m.grad for m in masters if m.grad is not None]
        if self.loss_scale != 1:
            torch._foreach_div_(grads, self.loss_scale)
        self._clip(grads)
        optimizer.step()
        optimizer.zero_grad()
        for p, cut, master in zip(params, rows, masters, strict=True):
            if master is not p:
                (p.data if cut is None else p.data[cut]).copy_(master)

        self.steps += 1
        if self.steps % (len(self.order) * self.steps_per_block) == 0:
            for scheduler in self.schedulers:
                scheduler.step()
        return mean_loss

    def _clip(self, grads: list[Tensor]) -> None:
        """Scale the gradient down to the norm `clip`, by the factor clip / (norm + 1e-6) as DeepSpeed does."""
        if self.clip:
            norm = self.norm(grads)
            torch._foreach_mul_(grads, 1 / ((norm + 1e-6) / self.clip).clamp(min=1))
            self.grad_norm = norm.item()


def _mean_share(model: nn.Module, batch: Mapping[str, Any], count: int) -> Tensor:
    return model(**batch).loss / count


def global_norm(grads: list[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients taken as one vector, a scalar tensor."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def _master(p: Tensor) -> Tensor:
    """Return the tensor that the optimizer updates: an fp32 parameter itself, or an fp32 copy of a 16-bit one."""
    return p if p.dtype == torch.float32 else p.detach().float()
