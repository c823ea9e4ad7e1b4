"""Partition parameters over the ranks while a model is made, so that no rank ever has the whole model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus


class Partitioner:
    """Partitions single parameters for ZeRO 3, as ``deepspeed.zero.Init`` does with all that are made inside it.

    Each rank must give it the same parameters in the same order, with the same values: unlike DeepSpeed, it broadcasts
    none, and so an error on one rank leaves no other rank waiting.

    Args:
        config: the DeepSpeed config of training, which says where the partitions wait, and in which dtype.
    """

    def __init__(self, config: Mapping[str, Any]):
        zero = dict(config["zero_optimization"])
        if zero.get("offload_param"):  # the engine page-locks one buffer for all of them
            zero["offload_param"] = {**zero["offload_param"], "pin_memory": False}
        # The module is empty. With one, DeepSpeed sets up `torch.nn.functional.linear` for partitioned weights.
        self._init = Init(torch.nn.Module(), config_dict_or_path={**config, "zero_optimization": zero})

    def partition(self, parameter: torch.nn.Parameter) -> None:
        """Keep this rank's part of a parameter, in the dtype of training. Its ``data`` are empty afterwards."""
        partitioned: Any = parameter
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(self._init.dtype)
        self._init._convert_to_deepspeed_param(parameter)
        partitioned.partition()
        self.empty(parameter)

    @staticmethod
    def empty(parameter: torch.nn.Parameter) -> None:
        """Let the ``data`` of a partitioned parameter be empty, on the device that it is gathered to."""
        device = get_accelerator().current_device_name()
        parameter.data = torch.empty(0, dtype=parameter.ds_tensor.dtype, device=device)  # type: ignore[attr-defined]


@contextmanager
def gathered_in_turn(model: torch.nn.Module) -> Iterator[None]:
    """While inside, each module has its parameters during its forward pass, for a model without an engine.

    All ranks run the same forward passes. What is computed cannot be differentiated.
    """

    def gather(module: torch.nn.Module, *_: Any) -> None:
        if own := _partitioned(module):
            own[0].all_gather(param_list=own)

    def release(module: torch.nn.Module, *_: Any) -> None:
        for parameter in _partitioned(module):
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition()

    handles = [module.register_forward_pre_hook(gather) for module in model.modules()]
    handles += [module.register_forward_hook(release) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            release(module)


def _partitioned(module: torch.nn.Module) -> list[Any]:
    return [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
