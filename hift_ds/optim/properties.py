"""Properties of torch optimizers that HiFT relies on: restriction to some parameters, and the parts of their state."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.utils import logger
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hift_ds.optim.lion import Lion

# Optimizers whose update of an element depends on that element's own history only.
ELEMENTWISE = (
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
    """Return whether DeepSpeed's fused optimizer of a builder works on this machine; log a warning if it fails to load.

    A CPU accelerator's fused Adam does not count. It keeps the powers of beta once for the whole process, so the step
    of a block would depend on the block of the step before.

    Args:
        builder: name of the builder, such as ``FusedAdamBuilder``.
    """
    if get_accelerator().device_name() == "cpu":
        return False
    try:
        get_accelerator().create_op_builder(builder).load()
    except Exception as error:  # DeepSpeed raises many types: no compiler, no toolkit, a wrong version ...
        logger.warning(f"{builder} does not work on this machine ({error}); the optimizer uses its plain PyTorch step")
        return False
    return True


def optimizer_class(kind: str, on_host: bool = False, torch_adam: bool = False) -> type[torch.optim.Optimizer] | None:
    """Return the class of the optimizer that the ``optimizer`` section of a DeepSpeed config names, or None.

    Nothing is compiled for the answer: on a GPU, the fused kernels are assumed to work.

    Args:
        kind: ``optimizer.type``. DeepSpeed ignores the case of its own names; the others are classes of torch.optim.
        on_host: DeepSpeed steps on the host (``offload_optimizer``).
        torch_adam: ``optimizer.params.torch_adam``.
    """
    is_fused = get_accelerator().device_name() != "cpu"
    name = kind.lower()
    if name in ("adam", "adamw"):
        in_torch = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return in_torch if torch_adam or not (on_host or is_fused) else DeepSpeedCPUAdam if on_host else FusedAdam
    if name == "lion":
        return DeepSpeedCPULion if on_host else FusedLion if is_fused else Lion
    if name == "lamb":
        return FusedLamb
    if name == "adagrad":
        return DeepSpeedCPUAdagrad if on_host else torch.optim.Adagrad
    found = getattr(torch.optim, kind, None)
    return found if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) else None


def restrict(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]
) -> tuple[torch.optim.Optimizer, list[int]]:
    """Make an optimizer without state for some of the parameters of another, with the same settings for each.

    Args:
        optimizer: the optimizer to copy.
        parameters: parameters of ``optimizer``.

    Returns:
        The new optimizer, and for each of its parameter groups the index of the corresponding group of ``optimizer``.
    """
    wanted = {id(parameter) for parameter in parameters}
    clone: Any = object.__new__(type(optimizer))
    clone.__dict__.update(optimizer.__dict__)
    # A scheduler replaces the step method of its optimizer instance; the clone uses the method of its class.
    clone.__dict__.pop("step", None)
    clone.state = defaultdict(dict)
    clone.param_groups, sources = [], []
    for source, group in enumerate(optimizer.param_groups):
        members = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if members:
            clone.param_groups.append({**group, "params": members})
            sources.append(source)
    if hasattr(optimizer, "mng"):
        _keep_overrides(clone, optimizer)
    if hasattr(optimizer, "opt_id"):
        _make_kernel(clone)
    return clone, sources


def _make_kernel(clone: Any) -> None:
    """Give a restricted CPU optimizer of DeepSpeed its own C++ object.

    The object keeps the powers of beta between steps, and is destroyed with the optimizer.
    """
    kind, settings = type(clone), clone.defaults
    clone.opt_id = kind.optimizer_id
    kind.optimizer_id += 1
    rate, decay = settings["lr"], settings["weight_decay"]
    if isinstance(clone, DeepSpeedCPUAdam):
        given = (rate, *settings["betas"], settings["eps"], decay, clone.adam_w_mode)
        clone.ds_opt_adam.create_adam(clone.opt_id, *given, False)
    elif isinstance(clone, DeepSpeedCPULion):
        clone.ds_opt_lion.create_lion(clone.opt_id, rate, *settings["betas"], decay, False)
    else:
        clone.ds_opt_adagrad.create_adagrad(clone.opt_id, rate, settings["eps"], decay, False)


def with_initial_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer, or a new one with initial state if its class creates state at construction (Adagrad)."""
    if isinstance(optimizer, torch.optim.Adagrad):
        return torch.optim.Adagrad([dict(group) for group in optimizer.param_groups], **optimizer.defaults)
    return optimizer


def overrides(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Return the settings of single parameters that bitsandbytes keeps beside the parameter groups, by ``id``.

    transformers' Trainer uses them to keep the state of embeddings in 32 bits.
    """
    manager = getattr(optimizer, "mng", None)
    if manager is None:
        return {}
    of_modules = {id(getattr(module, name)): config for module, name, config in manager.module_weight_config_triple}
    return {**manager.pid2config, **of_modules}


def _keep_overrides(clone: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give a restricted optimizer of bitsandbytes its own manager of :func:`overrides`.

    The global one finds a parameter by its place in the parameter groups, which differs between blocks.
    """
    settings = overrides(optimizer)
    clone.mng = copy.copy(clone.mng)
    clone.mng.pid2config, clone.mng.module_weight_config_triple = {}, []
    clone.mng.index2config = {
        (number, place): settings[id(parameter)]
        for number, group in enumerate(clone.param_groups)
        for place, parameter in enumerate(group["params"])
        if id(parameter) in settings
    }


def has_elements(value: Any) -> bool:
    """Return whether a value of optimizer state is a tensor with dimensions, and not a count."""
    return torch.is_tensor(value) and value.dim() > 0


def parts(value: Any) -> list[torch.Tensor]:
    """Return the plain tensors that hold the elements of a value of optimizer state; none for a count.

    A tensor of a wrapper subclass, such as torchao's quantized state, has several.
    """
    if not has_elements(value):
        return []
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(value, name))]


def assembled(like: torch.Tensor, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return a value like another one, made of these :func:`parts`."""
    return _assembled(like, iter(tensors))


def _assembled(like: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if not is_traceable_wrapper_subclass(like):
        return next(tensors) if has_elements(like) else like
    names, context = like.__tensor_flatten__()
    inner = {name: _assembled(getattr(like, name), tensors) for name in names}
    return type(like).__tensor_unflatten__(inner, context, like.shape, like.stride())
