"""How ZeRO 3 gathers weights, on the device or from host memory, without a wait of the host for the device.

DeepSpeed's own functions wait: for each copy from host memory, for the device after each blocking gather, and for
earlier gathers so that the host does not run ahead. Its hooks call what is here instead.
"""

import copy
import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from hift_ds.state.allocator import HostMemory
from hift_ds.state.transfer import Lane, mark, on_main_stream, wait


class Gathering:
    """Gathers the parameters of a model. Each parameter's memory comes from where the model computes, and goes back.

    A gather starts when all computation that was issued before it is done. So it may use memory that this computation
    frees, and the device never holds more weights than DeepSpeed counts, however far the host runs ahead. What is
    computed later waits for the gathers of its own parameters alone.

    Args:
        host: keeps this rank's partitions of the weights; None: they stay on the device.

    Attributes:
        host: as given.
        trace: what DeepSpeed's hooks follow in a pass with gradients: that of the active block.
        storing: the lane for copies of updated partitions to host memory.
    """

    def __init__(self, host: HostMemory | None):
        self.host = host
        self.trace: Any = None
        self.storing = Lane()
        self._fetching = Lane()

    def take_over(self, hooks: Any) -> None:
        """Gather the parameters of a model from now on, when DeepSpeed's hooks say so.

        DeepSpeed gathers ahead by a trace of the last passes. A forward pass without gradients gets a trace of its own:
        with that of a training step, weights would be gathered and kept for a backward pass that does not come. The
        model's mode does not matter: a model in evaluation mode can be trained.
        """
        for parameter in hooks.module.parameters():
            parameter.all_gather_coalesced = self.start
            parameter.all_gather = functools.partial(self.gather, parameter)
        # DeepSpeed lets the host wait for earlier gathers, so that weights do not pile up on the device.
        hooks.param_coordinator._PartitionedParameterCoordinator__max_ongoing_fetch_events = sys.maxsize
        self.trace = hooks.param_coordinator
        evaluation = new_trace(hooks)

        @torch.compiler.disable
        def choose_trace(*_: Any) -> None:
            hooks.param_coordinator = self.trace if torch.is_grad_enabled() else evaluation

        self._handle = hooks.module.register_forward_pre_hook(choose_trace, prepend=True)

    def end(self) -> None:
        """Stop choosing traces. The parameters keep the functions of this object, which still gather them."""
        self._handle.remove()

    def keep(self, parameters: Iterable[Any]) -> None:
        """Move the partitions of parameters that no block trains into host memory, if weights wait there."""
        if self.host is None:
            return
        for parameter in parameters:
            partition = parameter.ds_tensor
            partition.data = self.host.empty(partition).copy_(partition.data)

    def is_on_host(self, partition: torch.Tensor) -> bool:
        """Whether a partition is in host memory now; in a step, that of the active block is on the device."""
        address = partition.untyped_storage().data_ptr()
        return self.host is not None and any(buffer.data_ptr() == address for buffer in self.host.buffers)

    def settle(self) -> None:
        """Wait for all copies of weights between host and device, so that the host may read and change them."""
        for lane in (self.storing, self._fetching):
            event = lane.mark()
            if event is not None and self.host is not None:
                event.synchronize()

    def start(self, parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> "Gathered":
        """Start to gather parameters that are not available. Takes the place of DeepSpeed's ``all_gather_coalesced``.

        Args:
            parameters: the same ones on all ranks, in any order.
            safe_mode: has no effect.
            quantize: has no effect.
        """
        parameters = sorted(parameters, key=lambda parameter: parameter.ds_id)
        with on_main_stream():
            targets = [self._target(parameter) for parameter in parameters]
            begin = mark()
        written = {id(block): block.written for p in parameters if (block := getattr(p, "_z3_optimizer", None))}
        works = []
        with self._fetching.after(begin, *written.values()):
            for parameter, target in zip(parameters, targets, strict=True):
                own = target.chunk(parameter.ds_zero_partition_world_size)[parameter.ds_zero_partition_rank]
                if own.data_ptr() != parameter.ds_tensor.data_ptr():
                    own.copy_(parameter.ds_tensor, non_blocking=True)
                if own.numel() < target.numel():
                    group = parameter.ds_process_group
                    works.append(dist.all_gather_into_tensor(target, own, group=group, async_op=True))
            for work in works:
                work.wait()
        gathered = Gathered(parameters, self._fetching.mark())
        for parameter, target in zip(parameters, targets, strict=True):
            parameter.data = target[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status, parameter.gathered = ZeroParamStatus.INFLIGHT, gathered
        return gathered

    def _target(self, parameter: Any) -> torch.Tensor:
        """Return memory on the device for all partitions of a parameter; a rank that is alone has it there already."""
        partition = parameter.ds_tensor
        if parameter.ds_zero_partition_world_size == 1 and self.host is None:
            return partition.data
        numel = partition.ds_numel * parameter.ds_zero_partition_world_size
        return torch.empty(numel, dtype=partition.dtype, device=get_accelerator().current_device_name())

    def gather(
        self, parameter: Any, param_list: Sequence[Any] | None = None, async_op: bool = False, hierarchy: int = 0
    ) -> None:
        """Gather parameters for what the device computes next. Takes the place of DeepSpeed's ``all_gather``.

        A forward pass without a backward pass leaves gathers under way, which DeepSpeed starts ahead.

        Args:
            parameter: gather this one, unless there is a list.
            param_list: gather those of them that are not available.
            async_op: has no effect.
            hierarchy: has no effect.
        """
        parameters = [parameter] if param_list is None else param_list
        for one in parameters:
            if one.ds_status == ZeroParamStatus.INFLIGHT:
                one.gathered.wait()
        self.start(one for one in parameters if one.ds_status == ZeroParamStatus.NOT_AVAILABLE).wait()


def new_trace(hooks: Any) -> Any:
    """Return a trace of its own for DeepSpeed's hooks, which is still empty. No module may have run yet."""
    trace = copy.copy(hooks.param_coordinator)
    trace._clear_trace_structures()
    return trace


class Gathered:
    """Parameters whose gather has started: what DeepSpeed calls a handle."""

    def __init__(self, parameters: Sequence[Any], ready: Any):
        self._parameters = parameters
        self._ready = ready

    def wait(self, handle_dependency: bool = True) -> None:
        """Let the device's current stream wait for the parameters. The host does not wait."""
        wait(self._ready)
        for parameter in self._parameters:
            parameter.ds_status, parameter.gathered = ZeroParamStatus.AVAILABLE, None
        self._parameters, self._ready = (), None
