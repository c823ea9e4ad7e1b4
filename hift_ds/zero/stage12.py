"""ZeRO stages 1 and 2: masters and state are sharded over the ranks, at stage 2 gradients too."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from hift_ds.optim.properties import with_initial_state
from hift_ds.state.ledger import Held
from hift_ds.weights.host import HostWeights
from hift_ds.zero.base import BlockOptimizer
from hift_ds.zero.gradients import squared_norm, sum_over


class Stage12BlockOptimizer(BlockOptimizer, DeepSpeedZeroOptimizer):
    """One block's optimizer at ZeRO stage 1 or 2."""

    ready_for_gradients: bool

    def keep_weights_on_host(self, host: HostWeights, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Keep the flat weights of each parameter group in host memory. They are on the device now."""
        super().keep_weights_on_host(host, parameters)
        for group, flat in enumerate(self.bit16_groups_flat):
            self.bit16_groups_flat[group] = kept = host.keep(flat, self.bit16_groups[group])
            self.parallel_partitioned_bit16_groups[group] = self.get_data_parallel_partitions(kept, group)

    def initialize_optimizer_states(self) -> None:
        """Let DeepSpeed make state, but keep Adagrad's settings."""
        if not isinstance(self.optimizer, torch.optim.Adagrad):
            super().initialize_optimizer_states()
            return
        # DeepSpeed makes a new Adagrad from the defaults, which loses the settings of each parameter group.
        adagrad, self.optimizer = self.optimizer, None
        super().initialize_optimizer_states()
        self.optimizer = with_initial_state(adagrad)

    @functools.cached_property
    def _alone(self) -> bool:
        """Whether there is nothing to reduce. Gradients then stay where autograd put them, not copied to a bucket."""
        return dist.get_world_size(self.dp_process_group) == 1

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

    def step(self, closure: Any = None) -> None:
        """Step the block, unless the loss or a gradient is non-finite."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        super().step(closure)

    @property
    def updates_alone(self) -> bool:
        """Whether the update needs no other rank."""
        return self._alone

    def publish_weights(self) -> None:
        """Give the other ranks the weights that this rank updated on the device."""
        if self.host_weights is not None:
            return
        all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat,
            partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )

    def release_gradients(self) -> None:
        """Free the gradients, reduced ones and those of single parameters."""
        self.zero_grad(set_to_none=True)
        for group in self.averaged_gradients:
            self.averaged_gradients[group] = self.all_grad_tensors[group] = None

    def masters(self) -> list[tuple[torch.Tensor, int]]:
        """Return this rank's fp32 masters, each with the index of its parameter group."""
        return [(master, group) for group, master in enumerate(self.single_partition_of_fp32_groups)]

    def gradient_parts(self, index: int) -> list[torch.Tensor]:
        """Return the reduced gradients of a master's parameters, as far as this rank owns them, and padding."""
        return list(self.averaged_gradients.get(index) or ())

    def weights(self, index: int) -> torch.Tensor:
        """Return this rank's weights of a master."""
        rank = dist.get_rank(group=self.real_dp_process_group[index])
        return self.parallel_partitioned_bit16_groups[index][rank]

    def first_element(self) -> int:
        """Return the index of this rank's first element in the block's only parameter."""
        rank = dist.get_rank(group=self.real_dp_process_group[0])
        return rank * self.single_partition_of_fp32_groups[0].numel()

    def elements(self, index: int) -> list[tuple[torch.nn.Parameter, int, int, int]]:
        """Return what this rank's partition of a parameter group holds."""
        found = []
        for parameter in self.bit16_groups[index]:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank has all of it
                found.append((parameter, 0, 0, 0))
            else:
                own, place = mapping.lp_fragment_address, mapping.get_hp_fragment_address().start
                found.append((parameter, own.start, own.numel, place))
        return found

    def entries_of_zero(self) -> dict[str, Any]:
        """Return what DeepSpeed's ``zero_to_fp32.py`` reads from a checkpoint."""
        masters = self._get_groups_without_padding([master.detach() for master, _ in self.masters()])
        stage = 2 if self.partition_gradients else 1
        return {
            "zero_stage": stage,
            "partition_count": self.partition_count,
            "single_partition_of_fp32_groups": masters,
        }

    def relink(self) -> None:
        """Point DeepSpeed's views of each parameter's state (``safe_get_full_fp32_param``) at the current tensors."""
        self._link_all_hp_params()
        self._hp_optimizer_states_linked = False
        if all(self.optimizer.state.get(master) for master in self.single_partition_of_fp32_groups):
            self._lazy_init_hp_params_optimizer_state()
        for parameters in self.bit16_groups:
            for parameter in parameters:
                parameter.get_full_hp_param = functools.partial(self._read, parameter.get_full_hp_param)
                parameter.set_full_hp_param = functools.partial(self._write, parameter, parameter.set_full_hp_param)

    def _read(self, access: Callable[..., Any], optim_state_key: str | None = None) -> Any:
        """Let masters or state be in host memory, as fp32 tensors, while they are read."""
        with self.decoded(optim_state_key, changes=False):
            return access(optim_state_key)

    def _write(
        self, parameter: Any, access: Callable[..., Any], value: torch.Tensor, optim_state_key: str | None = None
    ) -> None:
        """Let masters or state be in host memory, as fp32 tensors, while they are changed."""
        with self.decoded(optim_state_key):
            access(value, optim_state_key)
        is_on_device = self.host_weights is None
        if optim_state_key is None and self.block_state.splits_masters and is_on_device and not self._alone:
            parameter.data.copy_(value.view_as(parameter))  # the weights follow on every rank

    def held(self) -> Iterator[Held]:
        """Yield all tensors that this optimizer keeps, except the weights."""
        yield from super().held()
        for gradients in (*self.averaged_gradients.values(), *self.all_grad_tensors.values()):
            yield from (Held("gradients", gradient) for gradient in gradients or ())
        yield from (Held("buffers", buffer) for bucket in self.ipg_buckets.values() for buffer in bucket.buffer)
