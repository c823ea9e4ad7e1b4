"""ZeRO stage 3: weights, gradients, masters and state are sharded over the ranks."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import combine_grad_norm_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from hift_ds.optim.properties import with_initial_state
from hift_ds.state.ledger import Held
from hift_ds.state.transfer import mark, wait
from hift_ds.zero.base import BlockOptimizer
from hift_ds.zero.gathering import Gathering, new_trace
from hift_ds.zero.gradients import squared_norm, sum_over


class Stage3BlockOptimizer(BlockOptimizer, DeepSpeedZeroOptimizer_Stage3):
    """One block's optimizer at ZeRO stage 3.

    Args:
        first: the first block's optimizer, whose hooks gather and partition the weights of the whole model; None: this
            is the first block.
        gathering: gathers the weights of all blocks, and keeps them in host memory if ``offload_param`` says so.

    Attributes:
        written: event after which this rank's weights have the values of the last step, in their place.
    """

    grad_partitions_flat_buffer: torch.Tensor
    averaged_gradients: dict[int, Any]
    module: torch.nn.Module
    written: Any = None

    def __init__(self, *args: Any, first: "Stage3BlockOptimizer | None", gathering: Gathering, **kwargs: Any):
        self._first = first
        self._gathering = gathering
        super().__init__(*args, **kwargs)
        self._gathering.settle()  # DeepSpeed's hooks were made on gathered weights
        self.param_groups_fp16_flat_cpu_memory: list[torch.Tensor] = []  # not for DeepSpeed to unpin
        if (reducing := self.reduce_and_partition_stream) is not None:
            # After each backward pass, DeepSpeed lets the host wait for its reductions, which only the device reads.
            reducing.synchronize = lambda: get_accelerator().current_stream().wait_stream(reducing)

    def initialize_ds_offload(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's hooks that gather weights; the first block's optimizer makes them."""
        if self._first:
            hooks = self._first.parameter_offload
        else:
            hooks = super().initialize_ds_offload(*args, **kwargs)
            self._gathering.take_over(hooks)
        # Backward ends at the active block, so DeepSpeed's trace of which weights to keep after forward differs from
        # block to block. With another block's trace, DeepSpeed would keep weights that no backward hook releases.
        self._trace = new_trace(hooks)
        return hooks

    def _create_param_groups_fp16_flat_cpu_memory(self) -> None:
        """Allocate the memory of weights that wait on the host, in place of DeepSpeed, which page-locks more."""
        assert self._gathering.host is not None
        for group in self.trainable_param_groups:
            numel = sum(parameter.partition_numel() for parameter in group["params"])
            flat = torch.empty(numel, dtype=self.dtype, device="meta")
            self.param_groups_fp16_flat_cpu_memory.append(self._gathering.host.empty(flat))

    def set_active(self, is_active: bool) -> None:
        """Use the trace that was recorded while this block was active to gather weights."""
        if is_active:
            self._gathering.trace = self.parameter_offload.param_coordinator = self._trace

    def _link_all_hp_params(self) -> None:
        if self._first is None:
            super()._link_all_hp_params()
        for parameters in self.fp16_groups:
            for parameter in parameters:
                parameter._z3_optimizer = self

    def create_reduce_and_remove_grad_hooks(self) -> None:
        """Let DeepSpeed make its hooks, and disable those of mixtures of experts while their block is inactive.

        DeepSpeed reduces the gradients of all experts of a layer after the layer's backward pass, and makes zeros for
        those without a gradient. This hook belongs to a module and would also run for frozen parameters.
        """
        super().create_reduce_and_remove_grad_hooks()
        for handle in self._leaf_module_hooks:
            hooks = handle.hooks_dict_ref()
            hooks[handle.id] = functools.partial(self._reduce_if_active, hooks[handle.id])

    def _reduce_if_active(self, reduce: Any, module: Any, *gradients: Any) -> None:
        if any(parameter.requires_grad for parameter in self.leaf_parameters[module]):
            reduce(module, *gradients)

    # DeepSpeed returns None for a parameter that does not require a gradient, but an inactive block has state, too.
    def get_full_hp_param(self, param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        """Return a parameter's gathered fp32 master, or its state of that name."""
        with self._trainable(param, optim_state_key, changes=False):
            return super().get_full_hp_param(param, optim_state_key)

    def set_full_hp_param(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """Set a parameter's fp32 master, or its state of that name, from a gathered tensor."""
        with self._trainable(param, optim_state_key):
            super().set_full_hp_param(value, param, optim_state_key)

    def get_local_fp32_param(self, param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        """Return this rank's shard of a parameter's fp32 master, or of its state of that name."""
        with self._trainable(param, optim_state_key, changes=False):
            return super().get_local_fp32_param(param, optim_state_key)

    def set_local_hp_param(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        """Set this rank's shard of a parameter's fp32 master, or of its state of that name."""
        with self._trainable(param, optim_state_key):
            super().set_local_hp_param(value, param, optim_state_key)

    @contextmanager
    def _trainable(self, param: Any, optim_state_key: str | None, changes: bool = True) -> Iterator[None]:
        before = param.requires_grad
        with self.decoded(optim_state_key, changes):
            param.requires_grad_(before or self.get_param_id(param) in self.grad_position)
            try:
                yield
            finally:
                param.requires_grad_(before)

    def initialize_optimizer_states(self) -> None:
        """Let DeepSpeed make state, but keep Adagrad's settings."""
        if not isinstance(self.optimizer, torch.optim.Adagrad):
            super().initialize_optimizer_states()
            return
        adagrad, self.optimizer = self.optimizer, None
        super().initialize_optimizer_states()
        self.optimizer = adagrad
        self._set_fp32_optimizer_param_groups()
        self.optimizer = with_initial_state(adagrad)
        self._clear_fp32_optimizer_param_groups()

    def share_buffers(self, largest: "Stage3BlockOptimizer") -> None:
        """Use the largest block's buffers for this block's gradient partitions and its reduction bucket."""
        if self is largest:
            return
        flat = largest.grad_partitions_flat_buffer
        views, offset = {}, 0
        for parameters in self.fp16_groups:
            for parameter in parameters:
                views[parameter.ds_id] = flat.narrow(0, offset, parameter.partition_numel())
                offset += parameter.partition_numel()
        self.grad_partitions_flat_buffer = flat.narrow(0, 0, offset)
        self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = views
        for dtype, bucket in self.ipg_buckets.items():
            bucket.buffer = largest.ipg_buckets[dtype].buffer

    def staging_numel(self) -> int:
        """Return the elements of this rank's gradients."""
        return self.grad_partitions_flat_buffer.numel()

    def independent_gradient_partition_epilogue(self) -> None:
        """Finish the reduction, then clear what it did not write.

        The shared buffer still holds another block's gradients for parameters that the loss does not use, and in the
        padding.
        """
        super().independent_gradient_partition_epilogue()
        if self.micro_step_id == 0:  # later micro-batches add their gradients
            partitions = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            for parameters in self.fp16_groups:
                for parameter in parameters:
                    is_used = parameter.ds_id in self._offload_boundary_param_ids
                    partitions[parameter.ds_id][self._own_numel(parameter) if is_used else 0 :].zero_()

    def _own_numel(self, parameter: Any) -> int:
        """Return the elements in this rank's shard of a parameter, without the padding."""
        begin = self._get_param_partition_rank(parameter) * parameter.partition_numel()
        return min(max(parameter.ds_numel - begin, 0), parameter.partition_numel())

    def step(self, closure: Any = None) -> None:
        """Step the block, unless the loss or a gradient is non-finite."""
        self._pre_step()
        self._partition_all_parameters()
        with self._weights_on_device():
            super().step(closure)

    def settle(self) -> None:
        """Wait until the host may read and change all that it keeps of the block."""
        super().settle()
        self._gathering.settle()

    @contextmanager
    def _weights_on_device(self) -> Iterator[None]:
        """Bring weights that wait on the host to the device, and back if they are updated."""
        if self._gathering.host is None or self.block_state.is_on_host:
            yield
            return
        on_host = list(self.fp16_partitioned_groups_flat)
        device = get_accelerator().current_device_name()
        wait(self.written)
        here = [torch.empty(weights.shape, dtype=weights.dtype, device=device) for weights in on_host]
        for target, weights in zip(here, on_host, strict=True):
            target.copy_(weights, non_blocking=True)
        self._place_weights(here)
        try:
            yield
            if not self.overflow:
                storing = self._gathering.storing
                with storing.after(mark()):
                    for weights, updated in zip(on_host, self.fp16_partitioned_groups_flat, strict=True):
                        weights.copy_(updated, non_blocking=True)
                        storing.outlives(updated)
                self.written = storing.mark()
        finally:
            self._place_weights(on_host)

    def _place_weights(self, flat: list[torch.Tensor]) -> None:
        """Use these tensors as this rank's weights."""
        self.fp16_partitioned_groups_flat = flat
        for sub_group in range(len(flat)):
            self._unflatten_partitioned_parameters(sub_group)

    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of the block's gradients, scaled, over all ranks."""
        return combine_grad_norm_groups(self._get_norm_groups())

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        """Return the norm of gradients over all ranks. The host does not wait for the device."""
        group = self._get_param_partition_group(params[0])
        counts = self._grad_norm_counts_every_rank(params, group) or self.model_parallel_rank == 0
        total = squared_norm(
            g for g, p in zip(gradients, params, strict=True) if counts or is_model_parallel_parameter(p)
        )
        sum_over(total, group)
        if not self._grad_norm_counts_every_rank(params, group):
            self._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        return total.sqrt()

    def publish_weights(self) -> None:
        """Gather the weights that all ranks keep whole."""
        self.written = mark()
        if self._gathering.host is None:
            self._place_weights(self.fp16_partitioned_groups_flat)
        if self.persistent_parameters:
            self._gathering.gather(None, self.persistent_parameters)

    def release_gradients(self) -> None:
        """Free the gradients of single parameters. Those of the block stay in their shared buffer."""
        self.zero_grad(set_to_none=True)
        self.averaged_gradients = {}

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks, and ours."""
        self._gathering.end()
        super().destroy()

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's ``offload_states`` for this block."""
        # DeepSpeed expects all of the model's parameters in the optimizer's flat buffer, but it only holds one block's.
        module, self.module = self.module, torch.nn.ParameterList(p for members in self.fp16_groups for p in members)
        try:
            super().offload_states(*args, **kwargs)
        finally:
            self.module = module

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return this rank's fp32 masters, each with the index of its parameter group."""
        groups = self.sub_group_to_group_id
        return [(master, groups[sub_group]) for sub_group, master in enumerate(self.fp32_partitioned_groups_flat)]

    def gradient_parts(self, index: int) -> list[torch.Tensor]:
        """Return this rank's partitions of the gradients of a master's parameters."""
        return list(self.averaged_gradients[index])

    def weights(self, index: int) -> torch.Tensor | None:
        """Return this rank's weights of a master; None: they are the same tensor, as DeepSpeed may arrange in fp32."""
        weights = self.fp16_partitioned_groups_flat[index]
        return None if weights is self.fp32_partitioned_groups_flat[index] else weights

    def first_element(self) -> int:
        """Return the index of this rank's first element in the block's only parameter."""
        (parameter,) = self.fp16_groups[0]
        return dist.get_rank(group=self.dp_process_group) * parameter.partition_numel()

    def elements(self, index: int) -> list[tuple[torch.nn.Parameter, int, int, int]]:
        """Return this rank's partitions of the parameters of a sub-group."""
        found, place = [], 0
        for parameter in self.fp16_groups[index]:
            start = self._get_param_partition_rank(parameter) * parameter.partition_numel()
            numel = self._own_numel(parameter)
            found.append((parameter, start if numel else 0, numel, place if numel else 0))
            place += parameter.partition_numel()
        return found

    def entries_of_zero(self) -> dict[str, Any]:
        """Return what DeepSpeed's ``zero_to_fp32.py`` reads from a checkpoint."""
        masters = [master.detach() for master in self.fp32_partitioned_groups_flat]
        return {"zero_stage": 3, "partition_count": self.partition_count, "fp32_flat_groups": masters}

    def held(self) -> Iterator[Held]:
        """Yield all tensors that this optimizer keeps, except the weights."""
        yield from super().held()
        yield Held("gradients", self.grad_partitions_flat_buffer)
        yield from (Held("buffers", bucket.buffer) for bucket in self.ipg_buckets.values())
