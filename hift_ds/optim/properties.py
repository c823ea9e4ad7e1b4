"""What HiFT has to know of torch optimizers: how to make one for some parameters, and whether they may be cut."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.utils import logger

from hift_ds.optim.lion import Lion

_ELEMENTWISE = (
    *(torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax),
    *(
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    ),
    *(FusedAdam, FusedLion, DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion, Lion),
)


def has_fused(builder: str) -> bool:
    """Whether DeepSpeed's fused optimizer of that builder works here; where not, torch's step takes its place.

    The fused Adam of a CPU accelerator does not count: it keeps the powers of beta in one place for the whole process,
    so a block's step would depend on which block was stepped before.
    """
    if get_accelerator().device_name() == "cpu":
        return False
    try:
        get_accelerator().create_op_builder(builder).load()
    except Exception as error:  # no compiler, no toolkit, wrong version ...: DeepSpeed raises many kinds
        logger.warning(f"{builder} cannot be used here ({error}); the optimizer's plain PyTorch step is used")
        return False
    return True


def restrict(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]
) -> tuple[torch.optim.Optimizer, list[int]]:
    """A fresh optimizer like ``optimizer`` for only these parameters, with its settings of each but no state.

    Returns it with, for each of its parameter groups, the index of the group of ``optimizer`` that it comes from.
    """
    wanted = {id(parameter) for parameter in parameters}
    clone: Any = object.__new__(type(optimizer))
    clone.__dict__.update(optimizer.__dict__)
    # A scheduler replaces the step of the instance it watches; the clone's is its class's.
    clone.__dict__.pop("step", None)
    clone.state = defaultdict(dict)
    clone.param_groups, sources = [], []
    for source, group in enumerate(optimizer.param_groups):
        members = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if members:
            clone.param_groups.append({**group, "params": members})
            sources.append(source)
    if isinstance(optimizer, DeepSpeedCPUAdam):
        # Its C++ side keeps the powers of beta from step to step: blocks that shared them would disturb each other.
        clone.opt_id = DeepSpeedCPUAdam.optimizer_id
        DeepSpeedCPUAdam.optimizer_id += 1
        settings = optimizer.defaults
        optimizer.ds_opt_adam.create_adam(
            *(clone.opt_id, settings["lr"], *settings["betas"], settings["eps"], settings["weight_decay"]),
            *(optimizer.adam_w_mode, False),
        )
    return clone, sources


def with_initial_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, or, where its class makes state at construction, a new one that has it."""
    if isinstance(optimizer, torch.optim.Adagrad):
        return torch.optim.Adagrad([dict(group) for group in optimizer.param_groups], **optimizer.defaults)
    return optimizer


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an element's update depends on that element's own history only, so that flattening changes nothing.

    Known classes are looked up. Any other is tried: two steps on a small matrix must equal two steps on its two
    flattened halves.
    """
    if isinstance(optimizer, _ELEMENTWISE):
        return True
    device = get_accelerator().current_device_name()
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 6, generator=generator).to(device) for _ in range(3))

    def updated(split: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> torch.Tensor:
        parameters = [torch.nn.Parameter(part.clone()) for part in split(start)]
        trial, _ = restrict(optimizer, [])
        trial.param_groups = [{**optimizer.param_groups[0], "params": parameters, "lr": 1e-2}]
        for gradient in gradients:
            for parameter, part in zip(parameters, split(gradient), strict=True):
                parameter.grad = part.clone()
            trial.step()
        return torch.cat([parameter.detach().flatten() for parameter in parameters])

    return torch.allclose(updated(lambda t: [t]), updated(lambda t: t.flatten().chunk(2)), rtol=1e-5, atol=1e-7)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an element-wise optimizer keeps for each element, found by a trial step."""
    parameter = torch.nn.Parameter(torch.ones(8, device=get_accelerator().current_device_name()))
    parameter.grad = torch.ones_like(parameter)
    trial, _ = restrict(optimizer, [])
    trial.param_groups = [{**optimizer.param_groups[0], "params": [parameter]}]
    trial = with_initial_state(trial)
    trial.step()
    return sum(value.element_size() for value in trial.state[parameter].values() if has_elements(value))


def has_elements(value: Any) -> bool:
    """Return whether a value of optimizer state is a tensor with dimensions, and not a count."""
    return torch.is_tensor(value) and value.dim() > 0
