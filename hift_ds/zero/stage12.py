"""ZeRO stages 1 and 2: masters and state are sharded over the ranks, at stage 2 gradients too."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from hift_ds.optim.properties import with_initial_state
from hift_ds.state.allocator import HostMemory
from hift_ds.state.ledger import Held
from hift_ds.state.step import Slice
from hift_ds.zero.base import BlockOptimizer
from hift_ds.zero.gradients import (
    clear_except,
    fp32_slice,
    share_gradients,
    shared_tensors,
    squared_norm,
    sum_over,
)


class Stage12BlockOptimizer(BlockOptimizer, DeepSpeedZeroOptimizer):
    """One block's optimizer at ZeRO stage 1 or 2."""

    temp_grad_buffer_for_cpu_offload: torch.Tensor
    temp_grad_buffer_for_gpu_offload: torch.Tensor
    ready_for_gradients: bool
    overflow: bool
    is_active = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.cpu_offload:
            self.param_buffer_of_bit16_for_cpu_offload_groups: list[torch.Tensor] = []  # see `share_host_buffers`

    @property
    def steps_on_host(self) -> bool:
        """Whether DeepSpeed steps in host memory (``offload_optimizer: cpu``)."""
        return bool(self.cpu_offload)

    def initialize_optimizer_states(self) -> None:
        """Let DeepSpeed make state, but keep Adagrad's settings."""
        if self.cpu_offload:
            return  # `share_host_buffers` allocates its gradients
        if not isinstance(self.optimizer, torch.optim.Adagrad):
            super().initialize_optimizer_states()
            return
        # DeepSpeed makes a new Adagrad from the defaults, which loses the settings of each parameter group.
        adagrad, self.optimizer = self.optimizer, None
        super().initialize_optimizer_states()
        self.optimizer = with_initial_state(adagrad)

    def share_buffers(self, largest: "Stage12BlockOptimizer") -> None:
        """Use the largest block's buffers, through which gradients travel to the host."""
        if self.cpu_offload:
            self.temp_grad_buffer_for_cpu_offload = largest.temp_grad_buffer_for_cpu_offload
            self.temp_grad_buffer_for_gpu_offload = largest.temp_grad_buffer_for_gpu_offload

    def staging_numel(self) -> int:
        """Return the elements of the buffer through which gradients travel to the host."""
        return self.temp_grad_buffer_for_cpu_offload.numel() if self.cpu_offload else 0

    @staticmethod
    def share_host_buffers(blocks: "Sequence[Stage12BlockOptimizer]") -> None:
        """Allocate the host step's gradients and updated weights once: only the active block uses them."""
        one = blocks[0]
        if not one.cpu_offload:
            return
        host = HostMemory(one.cpu_offload_pin_memory)
        masters = [block.single_partition_of_fp32_groups for block in blocks]
        share_gradients(host, masters, one.master_weights_and_grads_dtype)
        weights = shared_tensors(host, [[master.numel() for master in own] for own in masters], one.dtype)
        for block, own_weights in zip(blocks, weights, strict=True):
            block.param_buffer_of_bit16_for_cpu_offload_groups = own_weights
        if one.gradient_accumulation_steps > 1 and not one.low_precision_master_weights_and_grads:
            members = [[p for group in block.params_in_partition for p in group] for block in blocks]
            sums = shared_tensors(host, [[p.numel() for p in parameters] for parameters in members], one.dtype)
            for block, parameters, own_sums in zip(blocks, members, sums, strict=True):
                ids = [block.get_param_id(parameter) for parameter in parameters]
                block.accumulated_grads_in_cpu = dict(zip(ids, own_sums, strict=True))

    def set_active(self, is_active: bool) -> None:
        """Activate or deactivate the block, between two steps."""
        self.is_active = is_active
        if self.cpu_offload:
            self._get_offload_gradient_dict()

    def _get_offload_gradient_dict(self) -> None:
        # `safe_get_full_grad` reads this. The gradients of an inactive block no longer exist.
        if self.is_active:
            super()._get_offload_gradient_dict()
        else:
            self.offload_gradient_dict.update(dict.fromkeys(range(len(self.bit16_groups))))

    @functools.cached_property
    def _alone(self) -> bool:
        """Whether there is nothing to reduce. Gradients then stay where autograd put them, not copied to a bucket."""
        return not self.cpu_offload and dist.get_world_size(self.dp_process_group) == 1

    def setup_buckets(self) -> None:
        """Allocate reduction buckets if there is another rank."""
        if not self._alone:
            super().setup_buckets()
        elif not self.ready_for_gradients:
            self.micro_step_id += 1
            self.ready_for_gradients = True

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        """Take a parameter's gradient after backward; on one rank without reduction."""
        if not self._alone:
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
        elif self._use_compact_grad_partition_buffer(i):  # fp32 sums of 16-bit gradients
            place = self._get_compact_grad_partition_slice(i, 0, self.get_param_id(param), param.numel())
            self._add_to_grad_partition_buffer(place, self.get_gradient_for_reduction(param).reshape(-1))
            self.clear_grad_attribute(param)

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the bucket's gradients if there is another rank."""
        if not self._alone:
            super().reduce_ipg_grads(comm_dtype)

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        """Return the norm of gradients over all ranks. The host does not wait for the device."""
        real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        is_first = self.model_parallel_rank == 0
        counted = [g for g, p in zip(real, params, strict=False) if is_first or is_model_parallel_parameter(p)]
        total = squared_norm(counted).float()
        sum_over(total, self.dp_process_group)
        self._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        return total.sqrt()

    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of the block's gradients, scaled, over all ranks."""
        return self.scaled_global_norm()

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Whether the host step skips this step, as far as it is known before the gradients' norm."""
        # Non-finite gradients have a non-finite norm, which is checked next.
        if self.invalid_loss or self.compute_grad_norm:
            return bool(self.invalid_loss)
        return super().has_overflow(partition_gradients)

    def step(self, closure: Any = None) -> None:
        """Step the block, unless the loss or a gradient is non-finite."""
        if self.block_state is not None:
            self.micro_step_id = INITIAL_MICRO_STEP_ID
            super().step(closure)
            return
        for master, parameters in zip(self.single_partition_of_fp32_groups, self.params_in_partition, strict=True):
            ids = [self.get_param_id(p) for p in parameters]
            places = [self.grad_position[i] for i in ids if i in self.norm_for_param_grads]
            clear_except(master.grad, [(start, start + numel) for _, _, start, numel in places])
        DeepSpeedZeroOptimizer.step(self, closure)

    def publish_weights(self) -> None:
        """Give the other ranks the weights that this rank updated."""
        all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat,
            partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )

    def gradients(self) -> list[torch.Tensor]:
        """Return the tensors that :meth:`gradient` reads."""
        return [gradient for group in self.averaged_gradients.values() for gradient in group or ()]

    def release_gradients(self) -> None:
        """Free the gradients, reduced ones and those of single parameters."""
        self.zero_grad(set_to_none=True)
        for group in self.averaged_gradients:
            self.averaged_gradients[group] = self.all_grad_tensors[group] = None

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return this rank's fp32 masters, each with the index of its parameter group."""
        return [(master, group) for group, master in enumerate(self.single_partition_of_fp32_groups)]

    def gradient(self, cut: Slice, shape: torch.Size) -> torch.Tensor:
        """Return the fp32 gradient of a slice, unscaled and clipped."""
        return fp32_slice(self.averaged_gradients[cut.number], cut, shape, self.factor)

    def weights(self, index: int) -> torch.Tensor:
        """Return this rank's weights of a master."""
        rank = dist.get_rank(group=self.real_dp_process_group[index])
        return self.parallel_partitioned_bit16_groups[index][rank]

    def first_element(self) -> int:
        """Return the index of this rank's first element in the block's only parameter."""
        rank = dist.get_rank(group=self.real_dp_process_group[0])
        return rank * self.single_partition_of_fp32_groups[0].numel()

    def relink(self) -> None:
        """Point DeepSpeed's views of each parameter's state (``safe_get_full_fp32_param``) at the current tensors."""
        self._link_all_hp_params()
        self._hp_optimizer_states_linked = False
        if all(self.optimizer.state.get(master) for master in self.single_partition_of_fp32_groups):
            self._lazy_init_hp_params_optimizer_state()
        for parameters in self.bit16_groups if self.block_state is not None else ():
            for parameter in parameters:
                for name in ("get_full_hp_param", "set_full_hp_param"):
                    setattr(parameter, name, functools.partial(self._settled, getattr(parameter, name)))

    def _settled(self, access: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wait until the state is in host memory before it is read or changed."""
        assert self.block_state is not None
        self.block_state.settle()
        return access(*args, **kwargs)

    def held(self) -> Iterator[Held]:
        """Yield all tensors that this optimizer keeps, except the weights."""
        yield from super().held()
        for gradients in (*self.averaged_gradients.values(), *self.all_grad_tensors.values()):
            yield from (Held("gradients", gradient) for gradient in gradients or ())
        if self.steps_on_host:
            yield from (Held("gradients", gradient, True) for gradient in self.accumulated_grads_in_cpu.values())
            yield Held("buffers", self.temp_grad_buffer_for_gpu_offload)
            yield Held("buffers", self.temp_grad_buffer_for_cpu_offload, True)
            yield from (Held("buffers", buffer, True) for buffer in self.param_buffer_of_bit16_for_cpu_offload_groups)
        yield from (Held("buffers", buffer) for bucket in self.ipg_buckets.values() for buffer in bucket.buffer)
