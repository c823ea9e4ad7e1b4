"""One DeepSpeed optimizer for each block.

DeepSpeed's optimizers assume that what they own is trained in every step. So each block gets one of its own, of the
class that DeepSpeed would have used for the whole model: what DeepSpeed does to a model, it does to one block, and
nothing in its steps has to be narrowed. Here are the few places in which such an optimizer must know that it is not
alone; ``block_optimizers.py`` holds them all. Only here and in ``engine.py`` are DeepSpeed's private names touched.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import split_params_grads_into_shared_and_expert_params
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import all_gather_dp_groups, get_global_norm, get_weight_norm, is_invalid_grad_norm
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from hift_ds.config import NORM_CHUNK
from hift_ds.optim.properties import has_elements, with_initial_state
from hift_ds.state.ledger import Held
from hift_ds.state.step import BlockState, Piece
from hift_ds.state.transfer import HostMemory

# What describes, and what must reach, every block.
LISTS_OF_ALL = ("round_robin_bit16_groups", "bit16_groups", "fp16_groups", "bf16_groups")
METHODS_OF_ALL = ("destroy", "refresh_fp32_params", "_restore_from_bit16_weights", "offload_states", "reload_states")


def _fp32_piece(gradients: Iterable[torch.Tensor], piece: Piece, shape: torch.Size) -> torch.Tensor:
    """The elements of a piece, in fp32, of the gradients laid end to end."""
    result: torch.Tensor | None = None
    offset = 0
    for gradient in gradients:
        begin, end = max(piece.start, offset), min(piece.stop, offset + gradient.numel())
        if begin < end:
            if result is None:
                result = torch.empty(piece.stop - piece.start, dtype=torch.float32, device=gradient.device)
            part = gradient.reshape(-1)[begin - offset : end - offset]
            result[begin - piece.start : end - piece.start].copy_(part)
        offset += gradient.numel()
    assert result is not None and offset >= piece.stop, "the gradients are shorter than what they belong to"
    return result.view(shape)


def _in_pieces(gradients: Iterable[torch.Tensor], owners: Iterable[Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """Large gradients cut, with the parameter of each piece: DeepSpeed takes norms of copies in fp64."""
    pairs = []
    real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    for gradient, owner in zip(real, owners, strict=False):
        pieces = gradient.reshape(-1).split(NORM_CHUNK) if gradient.numel() > NORM_CHUNK else [gradient]
        pairs += [(piece, owner) for piece in pieces]
    return [piece for piece, _ in pairs], [owner for _, owner in pairs]


def _shared(host: HostMemory, sizes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """For each block tensors of these sizes, all of them on one host buffer: one block uses it at a time."""
    flat = host.empty(torch.empty(max(sum(each) for each in sizes), dtype=dtype, device="meta")).zero_()
    return [list(flat[: sum(each)].split(list(each))) for each in sizes]


def _share_gradients(host: HostMemory, masters: Sequence[Sequence[torch.Tensor]], dtype: torch.dtype) -> None:
    """Give each block's masters their gradients, all on one host buffer."""
    buffers = _shared(host, [[master.numel() for master in own] for own in masters], dtype)
    for own, gradients in zip(masters, buffers, strict=True):
        for master, gradient in zip(own, gradients, strict=True):
            master.grad = gradient


def _clear_but(gradient: torch.Tensor, spans: Iterable[tuple[int, int]]) -> None:
    """Zero what no gradient was put in, and where another block's may be: parameters without one, and padding."""
    position = 0
    for start, stop in sorted(spans):
        gradient[position:start].zero_()
        position = max(position, stop)
    gradient[position:].zero_()


class PlainBlockOptimizer:
    """fp32 at stage 0, where DeepSpeed uses the torch optimizer as it is and the weights are their own masters."""

    offloaded: BlockState | None = None
    invalid_loss = False
    overflow = False
    norm: Any = None  # of the gradients, where they were clipped
    _global_grad_norm: Any = None

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer: Any = with_initial_state(optimizer)
        self._stepped = [(weights, g) for g, group in enumerate(optimizer.param_groups) for weights in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        norm, self.norm = self.norm, None
        if norm is None:
            gradients = [weights.grad for weights, _ in self._stepped if weights.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self.overflow = self.invalid_loss or bool(is_invalid_grad_norm(norm))
        self._global_grad_norm = float("inf") if self.overflow else norm
        if self.overflow:
            return
        if self.offloaded is None:
            self.optimizer.step()
        else:
            self.offloaded.step()

    def stepped(self) -> list[tuple[torch.Tensor, int]]:
        return self._stepped

    def gradient(self, piece: Piece, shape: torch.Size) -> torch.Tensor:
        weights, _ = self._stepped[piece.number]
        if weights.grad is None:
            return torch.zeros(shape, device=weights.device)
        return weights.grad.reshape(-1)[piece.start : piece.stop].view(shape)

    def weights(self, index: int) -> None:
        return None

    def origin(self) -> int:
        return 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], **_: Any) -> None:
        self.optimizer.load_state_dict(state_dict)


class UnfusedBlockOptimizer(FP16_UnfusedOptimizer):
    """bf16 at stage 0: fp32 masters that keep their parameters' shapes."""

    optimizer: Any
    offloaded: BlockState | None = None
    invalid_loss = False

    def initialize_optimizer_states(self) -> None:
        # DeepSpeed takes a step on zero gradients here, which counts, decays the masters, and builds state for every
        # block at once.
        self.optimizer = with_initial_state(self.optimizer)
        self._weights = [weights for members in self.fp16_groups for weights in members]

    def step(self, closure: Any = None) -> bool:
        if self.invalid_loss:
            return self._skip_invalid_grad_norm()
        if self.offloaded is None:
            return super().step(closure)
        self.overflow = False
        gradients = [split_params_grads_into_shared_and_expert_params(members)[0] for members in self.fp16_groups]
        norms = [get_weight_norm(members, mpu=self.mpu) if members else 0.0 for members in gradients]
        self._global_grad_norm = get_global_norm(norm_list=norms)
        if is_invalid_grad_norm(self._global_grad_norm):
            return self._skip_invalid_grad_norm()
        self._update_scale(False)
        self._combined_scale = self.unscale_and_clip_grads(self._global_grad_norm, apply_scale=False)
        self.offloaded.step()
        return self.overflow

    def stepped(self) -> list[tuple[torch.Tensor, int]]:
        return [(master, g) for g, masters in enumerate(self.fp32_groups) for master in masters]

    def gradient(self, piece: Piece, shape: torch.Size) -> torch.Tensor:
        weights = self.weights(piece.number)
        if weights.grad is None:
            return torch.zeros(shape, device=weights.device)
        return _fp32_piece([weights.grad], piece, shape).mul_(1.0 / self._combined_scale)

    def weights(self, index: int) -> torch.Tensor:
        return self._weights[index]

    def origin(self) -> int:
        return 0


class ZeroBlockOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO stage 1 or 2 over the parameters of one block."""

    optimizer: Any
    temp_grad_buffer_for_cpu_offload: torch.Tensor
    temp_grad_buffer_for_gpu_offload: torch.Tensor
    ready_for_gradients: bool
    overflow: bool
    offloaded: BlockState | None = None
    invalid_loss = False
    is_active = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.cpu_offload:
            self.param_buffer_of_bit16_for_cpu_offload_groups: list[torch.Tensor] = []  # see `share_host_buffers`

    def initialize_optimizer_states(self) -> None:
        if self.cpu_offload:
            return  # its gradients come by `share_host_buffers`
        if not isinstance(self.optimizer, torch.optim.Adagrad):
            super().initialize_optimizer_states()
            return
        # DeepSpeed rebuilds Adagrad from its defaults, which loses the settings of each parameter group.
        adagrad, self.optimizer = self.optimizer, None
        super().initialize_optimizer_states()
        self.optimizer = with_initial_state(adagrad)

    def share_buffers(self, largest: "ZeroBlockOptimizer") -> None:
        """Use the gradient staging buffers of the block that needs the largest; only one block uses them at a time."""
        if self.cpu_offload:
            self.temp_grad_buffer_for_cpu_offload = largest.temp_grad_buffer_for_cpu_offload
            self.temp_grad_buffer_for_gpu_offload = largest.temp_grad_buffer_for_gpu_offload

    def staging_numel(self) -> int:
        return self.temp_grad_buffer_for_cpu_offload.numel() if self.cpu_offload else 0

    @staticmethod
    def share_host_buffers(blocks: "Sequence[ZeroBlockOptimizer]") -> HostMemory | None:
        """Give the blocks what the host step needs for the active block only: gradients, weights on their way back.

        Returns:
            What the buffers are from; None where the step is not on the host.
        """
        one = blocks[0]
        if not one.cpu_offload:
            return None
        host = HostMemory(one.cpu_offload_pin_memory)
        masters = [block.single_partition_of_fp32_groups for block in blocks]
        _share_gradients(host, masters, one.master_weights_and_grads_dtype)
        weights = _shared(host, [[master.numel() for master in own] for own in masters], one.dtype)
        for block, own_weights in zip(blocks, weights, strict=True):
            block.param_buffer_of_bit16_for_cpu_offload_groups = own_weights
        if one.gradient_accumulation_steps > 1 and not one.low_precision_master_weights_and_grads:
            members = [[p for group in block.params_in_partition for p in group] for block in blocks]
            sums = _shared(host, [[p.numel() for p in parameters] for parameters in members], one.dtype)
            for block, parameters, own_sums in zip(blocks, members, sums, strict=True):
                ids = [block.get_param_id(parameter) for parameter in parameters]
                block.accumulated_grads_in_cpu = dict(zip(ids, own_sums, strict=True))
        return host

    def set_active(self, is_active: bool) -> None:
        self.is_active = is_active
        if self.cpu_offload:
            self._get_offload_gradient_dict()

    def _get_offload_gradient_dict(self) -> None:
        # What `safe_get_full_grad` reads. The gradients of an inactive block are gone.
        if self.is_active:
            super()._get_offload_gradient_dict()
        else:
            self.offload_gradient_dict.update(dict.fromkeys(range(len(self.bit16_groups))))

    # On one rank there is nothing to reduce: gradients stay where autograd put them, without a copy in a bucket.
    @property
    def _alone(self) -> bool:
        return not self.cpu_offload and dist.get_world_size(self.dp_process_group) == 1

    def setup_buckets(self) -> None:
        if not self._alone:
            super().setup_buckets()
        elif not self.ready_for_gradients:
            self.micro_step_id += 1
            self.ready_for_gradients = True

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        if not self._alone:
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
        elif self._use_compact_grad_partition_buffer(i):  # fp32 sums of 16-bit gradients
            place = self._get_compact_grad_partition_slice(i, 0, self.get_param_id(param), param.numel())
            self._add_to_grad_partition_buffer(place, self.get_gradient_for_reduction(param).reshape(-1))
            self.clear_grad_attribute(param)

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        if not self._alone:
            super().reduce_ipg_grads(comm_dtype)

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        return super().get_grad_norm_direct(*_in_pieces(gradients, params), norm_type)

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        # The norm of gradients that are not finite is not finite either, and it is looked at next.
        if self.invalid_loss or self.compute_grad_norm:
            return self.invalid_loss
        return super().has_overflow(partition_gradients)

    def step(self, closure: Any = None) -> None:
        if self.offloaded is None:
            if self.cpu_offload:
                for master, parameters in zip(
                    self.single_partition_of_fp32_groups, self.params_in_partition, strict=True
                ):
                    ids = [self.get_param_id(p) for p in parameters]
                    places = [self.grad_position[i] for i in ids if i in self.norm_for_param_grads]
                    _clear_but(master.grad, [(start, start + numel) for _, _, start, numel in places])
            super().step(closure)
            return
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        self.check_overflow(self.partition_gradients)
        norm = None
        if self.compute_grad_norm and not self.overflow:
            norm = self.scaled_global_norm()
            self.overflow = bool(is_invalid_grad_norm(norm))
        scale = self.loss_scale
        self._update_scale(self.overflow)
        self._global_grad_norm = None if norm is None else norm / scale
        if self.overflow:
            self._global_grad_norm = float("inf") if self.compute_grad_norm else None
            self.zero_grad(set_to_none=True)
        else:
            for others in self.params_not_in_partition:
                self.free_grad_in_param_list(others)
            self._scaled_norm = norm
            if self.offloaded.step():
                self.relink()
            for mine in self.params_in_partition:
                self.free_grad_in_param_list(mine)
        for group in self.averaged_gradients:
            self.averaged_gradients[group] = self.all_grad_tensors[group] = None
        if not self.overflow:
            all_gather_dp_groups(
                groups_flat=self.bit16_groups_flat,
                partitioned_param_groups=self.parallel_partitioned_bit16_groups,
                dp_process_group=self.real_dp_process_group,
                start_alignment_factor=self.nccl_start_alignment_factor,
                allgather_bucket_size=self.allgather_bucket_size,
            )

    def stepped(self) -> list[tuple[torch.Tensor, int]]:
        return [(master, group) for group, master in enumerate(self.single_partition_of_fp32_groups)]

    def gradient(self, piece: Piece, shape: torch.Size) -> torch.Tensor:
        gradient = _fp32_piece(self.averaged_gradients[piece.number], piece, shape)
        self.unscale_and_clip_grads([gradient], self._scaled_norm)
        return gradient

    def weights(self, index: int) -> torch.Tensor:
        rank = dist.get_rank(group=self.real_dp_process_group[index])
        return self.parallel_partitioned_bit16_groups[index][rank]

    def origin(self) -> int:
        rank = dist.get_rank(group=self.real_dp_process_group[0])
        return rank * self.single_partition_of_fp32_groups[0].numel()

    def relink(self) -> None:
        """Point DeepSpeed's per-parameter views (``safe_get_full_fp32_param`` ...) at where the state is now."""
        self._link_all_hp_params()
        self._hp_optimizer_states_linked = False
        if all(self.optimizer.state.get(master) for master in self.single_partition_of_fp32_groups):
            self._lazy_init_hp_params_optimizer_state()
        for parameters in self.bit16_groups if self.offloaded is not None else ():
            for parameter in parameters:
                for name in ("get_full_hp_param", "set_full_hp_param"):
                    setattr(parameter, name, functools.partial(self._settled, getattr(parameter, name)))

    def _settled(self, access: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Access to state in host memory: after what is under way, and before anything is fetched again."""
        assert self.offloaded is not None
        self.offloaded.settle()
        return access(*args, **kwargs)


class Zero3BlockOptimizer(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO stage 3 over the parameters of one block; gathering and partitioning of weights is shared by all blocks."""

    optimizer: Any
    grad_partitions_flat_buffer: torch.Tensor
    module: torch.nn.Module
    offloaded: BlockState | None = None
    invalid_loss = False

    def __init__(self, *args: Any, first: "Zero3BlockOptimizer | None", **kwargs: Any):
        self._first = first
        super().__init__(*args, **kwargs)

    def initialize_ds_offload(self, *args: Any, **kwargs: Any) -> Any:
        # The hooks that gather a layer's weights belong to the model: made once, with the first block.
        hooks = self._first.parameter_offload if self._first else super().initialize_ds_offload(*args, **kwargs)
        # Backward ends at the active block, so what forward has to keep for it is another trace for each block. By
        # another block's trace DeepSpeed keeps weights that no backward hook would ever release. Nothing ran yet.
        self._coordinator = copy.copy(hooks.param_coordinator)
        self._coordinator._clear_trace_structures()
        return hooks

    def set_active(self, is_active: bool) -> None:
        """Gather weights by what was recorded when this block was active; to be called between two steps."""
        if is_active:
            self.parameter_offload.param_coordinator = self._coordinator

    def _link_all_hp_params(self) -> None:
        if self._first is None:
            super()._link_all_hp_params()
        for parameters in self.fp16_groups:
            for parameter in parameters:
                parameter._z3_optimizer = self

    # DeepSpeed answers None for what is not trainable now, but an inactive block has its state all the same.
    def get_full_hp_param(self, param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        with self._trainable(param):
            return super().get_full_hp_param(param, optim_state_key)

    def set_full_hp_param(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        with self._trainable(param):
            super().set_full_hp_param(value, param, optim_state_key)

    def get_local_fp32_param(self, param: Any, optim_state_key: str | None = None) -> torch.Tensor | None:
        with self._trainable(param):
            return super().get_local_fp32_param(param, optim_state_key)

    def set_local_hp_param(self, value: torch.Tensor, param: Any, optim_state_key: str | None = None) -> None:
        with self._trainable(param):
            super().set_local_hp_param(value, param, optim_state_key)

    @contextmanager
    def _trainable(self, param: Any) -> Iterator[None]:
        if self.offloaded is not None:
            self.offloaded.settle()
        before = param.requires_grad
        param.requires_grad_(before or self.get_param_id(param) in self.grad_position)
        try:
            yield
        finally:
            param.requires_grad_(before)

    def initialize_optimizer_states(self) -> None:
        if self.offload_optimizer:
            return  # its gradients come by `share_host_buffers`
        if not isinstance(self.optimizer, torch.optim.Adagrad):
            super().initialize_optimizer_states()
            return
        adagrad, self.optimizer = self.optimizer, None
        super().initialize_optimizer_states()
        self.optimizer = adagrad
        self._set_fp32_optimizer_param_groups()
        self.optimizer = with_initial_state(adagrad)
        self._clear_fp32_optimizer_param_groups()

    def share_buffers(self, largest: "Zero3BlockOptimizer") -> None:
        """Keep this block's gradient partitions and its reduction bucket in the largest block's buffers."""
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
        return self.grad_partitions_flat_buffer.numel()

    @staticmethod
    def share_host_buffers(blocks: "Sequence[Zero3BlockOptimizer]") -> HostMemory | None:
        """Give the blocks the fp32 gradients that the host step needs for the active block only.

        Returns:
            What the buffer is from; None where the step is not on the host.
        """
        one = blocks[0]
        if not one.offload_optimizer:
            return None
        host = HostMemory(one.offload_optimizer_pin_memory)
        masters = [block.fp32_partitioned_groups_flat for block in blocks]
        _share_gradients(host, masters, one.master_weights_and_grads_dtype)
        return host

    # What no gradient is put in holds another block's: of parameters that the loss does not use, and padding.
    def independent_gradient_partition_epilogue(self) -> None:
        super().independent_gradient_partition_epilogue()
        if self.micro_step_id == 0:  # later gradients are added
            partitions = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            for parameters in self.fp16_groups:
                for parameter in parameters:
                    is_used = parameter.ds_id in self._offload_boundary_param_ids
                    partitions[parameter.ds_id][self._own_numel(parameter) if is_used else 0 :].zero_()

    def _own_numel(self, parameter: Any) -> int:
        """Elements in this rank's part of a parameter, without the padding."""
        begin = self._get_param_partition_rank(parameter) * parameter.partition_numel()
        return min(max(parameter.ds_numel - begin, 0), parameter.partition_numel())

    def step(self, closure: Any = None) -> None:
        if self.offload_optimizer:
            for master, parameters in zip(self.fp32_partitioned_groups_flat, self.fp16_groups, strict=True):
                used = [p for p in parameters if self.get_param_id(p) in self.norm_for_param_grads]
                starts = [self.grad_position[self.get_param_id(p)][1] for p in used]
                ends = [start + self._own_numel(p) for start, p in zip(starts, used, strict=True)]
                _clear_but(master.grad, zip(starts, ends, strict=True))
        super().step(closure)

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        return super().get_grad_norm_direct(*_in_pieces(gradients, params), norm_type)

    def _overflow_check_and_loss_scale_update(self, update_scale: bool = True) -> bool:
        self.overflow = self.invalid_loss  # what of the gradients is not finite is in the norm, taken next
        return self._loss_scale_update_and_overflow_cleanup() if update_scale else self.overflow

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        # DeepSpeed looks for all of the model's parameters in this optimizer's flat buffer, which holds one block's.
        module, self.module = self.module, torch.nn.ParameterList(p for members in self.fp16_groups for p in members)
        try:
            super().offload_states(*args, **kwargs)
        finally:
            self.module = module

    # DeepSpeed steps one sub-group after another; the block is stepped once, at the last of them.
    def _prepare_sub_group(self, sub_group_id: int, timer_names: Any) -> None:
        if self.offloaded is None:
            super()._prepare_sub_group(sub_group_id, timer_names)

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Any) -> None:
        if self.offloaded is None:
            super().unscale_and_clip_grads(sub_group_id, total_norm)
            return
        self._inverse_scale = 1.0 / self.loss_scale
        if self.clip_grad > 0.0:
            clip = torch.clamp(((total_norm / self.loss_scale) + 1e-6) / self.clip_grad, min=1.0)
            self._inverse_scale = 1.0 / (clip * self.loss_scale)

    def _optimizer_step(self, sub_group_id: int) -> None:
        if self.offloaded is None:
            super()._optimizer_step(sub_group_id)
        elif sub_group_id == len(self.fp16_groups) - 1:
            self.offloaded.step()

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        if self.offloaded is None:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)
        elif sub_group_id == len(self.fp16_groups) - 1:
            for sub_group in range(len(self.fp16_groups)):
                self.averaged_gradients[sub_group] = None
                self._unflatten_partitioned_parameters(sub_group)

    def stepped(self) -> list[tuple[torch.Tensor, int]]:
        groups = self.sub_group_to_group_id
        return [(master, groups[sub_group]) for sub_group, master in enumerate(self.fp32_partitioned_groups_flat)]

    def gradient(self, piece: Piece, shape: torch.Size) -> torch.Tensor:
        return _fp32_piece(self.averaged_gradients[piece.number], piece, shape).mul_(self._inverse_scale)

    def weights(self, index: int) -> torch.Tensor | None:
        weights = self.fp16_partitioned_groups_flat[index]
        # In fp32 DeepSpeed may take the weights themselves as masters.
        return None if weights is self.fp32_partitioned_groups_flat[index] else weights

    def origin(self) -> int:
        (parameter,) = self.fp16_groups[0]
        return dist.get_rank(group=self.dp_process_group) * parameter.partition_numel()


def held(block: Any) -> Iterator[Held]:
    """All tensors that one block's optimizer keeps, but the weights."""
    on_host = bool(getattr(block, "cpu_offload", False) or getattr(block, "offload_optimizer", False))
    for index, (tensor, _) in enumerate(block.stepped()):
        if block.weights(index) is not None:
            yield Held("master_weights", tensor, on_host)
            yield Held("gradients", tensor.grad, on_host)
        for value in block.optimizer.state.get(tensor, {}).values():
            if has_elements(value):
                yield Held("optimizer_state", value, on_host)
    if isinstance(block, ZeroBlockOptimizer):
        for gradients in (*block.averaged_gradients.values(), *block.all_grad_tensors.values()):
            yield from (Held("gradients", gradient) for gradient in gradients or ())
        if on_host:
            yield from (Held("gradients", gradient, True) for gradient in block.accumulated_grads_in_cpu.values())
            yield Held("buffers", block.temp_grad_buffer_for_gpu_offload)
            yield Held("buffers", block.temp_grad_buffer_for_cpu_offload, True)
            yield from (Held("buffers", buffer, True) for buffer in block.param_buffer_of_bit16_for_cpu_offload_groups)
        yield from (Held("buffers", buffer) for bucket in block.ipg_buckets.values() for buffer in bucket.buffer)
    if isinstance(block, Zero3BlockOptimizer):
        yield Held("gradients", block.grad_partitions_flat_buffer, on_host)
        yield from (Held("buffers", bucket.buffer) for bucket in block.ipg_buckets.values())


def whole_state(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint of all blocks holds beside their own state dicts.

    At stages 1 to 3 the masters, where ``zero_to_fp32.py``, which DeepSpeed puts beside a checkpoint, looks for them;
    they are the same tensors, so the file does not grow.
    """
    if "zero_stage" not in blocks[0]:
        return {}
    whole = {key: blocks[0][key] for key in ("zero_stage", "partition_count")}
    masters = "single_partition_of_fp32_groups" if whole["zero_stage"] <= 2 else "fp32_flat_groups"
    whole[masters] = [master for block in blocks for master in block[masters]]
    if isinstance(whole["partition_count"], list):
        whole["partition_count"] = [count for block in blocks for count in block["partition_count"]]
    return whole
