"""One DeepSpeed optimizer for each block.

DeepSpeed's optimizers assume that what they own is trained in every step. So each block gets one of its own, of the
class that DeepSpeed would have used for the whole model: what DeepSpeed does to a model, it does to one block, and
nothing in its steps has to be narrowed. Here are the few places in which such an optimizer must know that it is not
alone, and the object that holds them all.

With ``engine.py`` the only file that touches DeepSpeed's private names.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from hift_ds.lion import Lion
from hift_ds.offload import HostState

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


class _NoWarmUpStep:
    """Leaves out the step on zero gradients that DeepSpeed takes at set-up to make optimizer state.

    That step counts, decays the masters, and builds state for every block at once.
    """

    optimizer: Any

    def initialize_optimizer_states(self) -> None:
        self.optimizer = with_initial_state(self.optimizer)


class UnfusedBlockOptimizer(_NoWarmUpStep, FP16_UnfusedOptimizer):
    """bf16 at stage 0: fp32 masters that keep their parameters' shapes."""


class FusedBlockOptimizer(_NoWarmUpStep, FP16_Optimizer):
    """bf16 at stage 0 with a fused Adam: one flat fp32 master for each parameter group."""


class ZeroBlockOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO stage 1 or 2 over the parameters of one block."""

    optimizer: Any
    temp_grad_buffer_for_cpu_offload: torch.Tensor
    temp_grad_buffer_for_gpu_offload: torch.Tensor

    def initialize_optimizer_states(self) -> None:
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

    def relink(self) -> None:
        """Point DeepSpeed's per-parameter views (``safe_get_full_fp32_param`` ...) at where the state is now."""
        self._link_all_hp_params()
        self._hp_optimizer_states_linked = False
        if all(self.optimizer.state.get(master) for master in self.single_partition_of_fp32_groups):
            self._lazy_init_hp_params_optimizer_state()


class Zero3BlockOptimizer(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO stage 3 over the parameters of one block; gathering and partitioning of weights is shared by all blocks."""

    optimizer: Any
    grad_partitions_flat_buffer: torch.Tensor

    def __init__(self, *args: Any, first: "Zero3BlockOptimizer | None", **kwargs: Any):
        self._first = first
        super().__init__(*args, **kwargs)

    def initialize_ds_offload(self, *args: Any, **kwargs: Any) -> Any:
        # The hooks that gather a layer's weights belong to the model: made once, with the first block.
        return self._first.parameter_offload if self._first else super().initialize_ds_offload(*args, **kwargs)

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
        before = param.requires_grad
        param.requires_grad_(before or self.get_param_id(param) in self.grad_position)
        try:
            yield
        finally:
            param.requires_grad_(before)

    def initialize_optimizer_states(self) -> None:
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

    def relink(self) -> None:
        """Nothing to do: stage 3 looks its state up at each access."""


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a DeepSpeed optimizer, or a bare one itself."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _masters(optimizer: Any) -> Iterator[torch.Tensor]:
    """The fp32 masters of one block that are tensors of their own (fp32 weights at stage 3 are their own masters)."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from optimizer.single_partition_of_fp32_groups
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for master, weights in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            if master is not weights:
                yield master
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for masters in optimizer.fp32_groups:
            yield from masters
    elif isinstance(optimizer, FP16_Optimizer):
        yield from optimizer.fp32_groups_flat


def state_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Masters and optimizer state of one block; step counters (single elements) stay where they are."""
    state = _inner(optimizer).state.values()
    moments = [value for entry in state for value in entry.values() if torch.is_tensor(value) and value.numel() > 1]
    return [*_masters(optimizer), *moments]


class BlockOptimizers:
    """The optimizers of all blocks, behind the interface of one.

    What users and schedulers see as the optimizer: its ``param_groups`` are those of the optimizer that was
    configured, over all parameters, and their settings (learning rate ...) reach a block when it steps. Anything else
    that is asked of it, the active block's optimizer answers.

    Args:
        configured: the torch optimizer over all parameters; it carries settings and is never stepped.
        parameters: for each block, what it trains.
        wrap: makes DeepSpeed's optimizer for a block around a torch one, or returns that one itself.
        device: where the active block is stepped; elsewhere its state lives in host memory.
        pin_memory: page-lock that memory.
    """

    # Attributes that describe, and methods that must reach, every block.
    _LISTS = ("round_robin_bit16_groups", "bit16_groups", "fp16_groups", "bf16_groups")
    _ALL = (
        "destroy",
        "refresh_fp32_params",
        "_restore_from_bit16_weights",
        "offload_states",
        "reload_states",
    )

    def __init__(
        self,
        configured: torch.optim.Optimizer,
        parameters: Sequence[Sequence[torch.nn.Parameter]],
        wrap: Callable[[torch.optim.Optimizer], Any],
        device: torch.device,
        pin_memory: bool,
    ):
        self.optimizer = configured
        self.blocks: list[Any] = []
        self._sources: list[list[int]] = []
        self._host: list[HostState] = []
        for members in parameters:
            inner, sources = restrict(configured, members)
            # DeepSpeed takes what is trainable at construction, and hooks it. One block at a time, and its state
            # leaves the device at once, so that set-up never holds more than one block's.
            for parameter in members:
                parameter.requires_grad_(True)
            self.blocks.append(wrap(inner))
            for parameter in members:
                parameter.requires_grad_(False)
            self._sources.append(sources)
            self._host.append(HostState(device, pin_memory))
            self.active = len(self.blocks) - 1
            self.state_to_host()
        self._share()
        self.active = 0

    def _share(self) -> None:
        """Give all blocks the one loss scale, and the largest block's staging buffers."""
        for attribute in ("loss_scaler", "loss_scale_config"):
            if hasattr(self.blocks[0], attribute):
                for block in self.blocks:
                    setattr(block, attribute, getattr(self.blocks[0], attribute))
        if hasattr(self.blocks[0], "share_buffers"):
            largest = max(self.blocks, key=lambda block: block.staging_numel())
            for block in self.blocks:
                block.share_buffers(largest)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "blocks" not in self.__dict__:
            raise AttributeError(name)
        if name in self._LISTS:
            return [entry for block in self.blocks for entry in getattr(block, name)]
        if name in self._ALL:
            methods = [getattr(block, name) for block in self.blocks]

            def call_all(*args: Any, **kwargs: Any) -> None:
                for method in methods:
                    method(*args, **kwargs)

            return call_all
        return getattr(self.blocks[self.active], name)

    def activate(self, index: int) -> Any:
        """Make a block the active one; returns its optimizer, with the current settings."""
        self.active = index
        self.copy_settings()
        return self.blocks[index]

    def copy_settings(self) -> None:
        """Copy learning rate, weight decay ... of the configured optimizer to the active block's."""
        groups = _inner(self.blocks[self.active]).param_groups
        for group, source in zip(groups, self._sources[self.active], strict=True):
            settings = self.optimizer.param_groups[source]
            group.update({key: value for key, value in settings.items() if key != "params"})

    def state_to_device(self) -> None:
        """Bring the active block's masters and optimizer state to the device."""
        block = self.blocks[self.active]
        if self._host[self.active].to_device(state_tensors(block)) and hasattr(block, "relink"):
            block.relink()

    def state_to_host(self) -> None:
        """Take the active block's masters and optimizer state off the device."""
        block = self.blocks[self.active]
        if self._host[self.active].to_host(state_tensors(block)) and hasattr(block, "relink"):
            block.relink()

    def state_dict(self) -> dict[str, Any]:
        """All blocks' state, on one rank.

        At stages 1 to 3 the masters stand also where ``zero_to_fp32.py``, which DeepSpeed puts beside a checkpoint,
        looks for them; they are the same tensors, so the file does not grow.
        """
        blocks = [block.state_dict() for block in self.blocks]
        whole: dict[str, Any] = {}
        if "zero_stage" in blocks[0]:
            whole = {key: blocks[0][key] for key in ("zero_stage", "partition_count")}
            masters = "single_partition_of_fp32_groups" if whole["zero_stage"] <= 2 else "fp32_flat_groups"
            whole[masters] = [master for block in blocks for master in block[masters]]
            if isinstance(whole["partition_count"], list):
                whole["partition_count"] = [count for block in blocks for count in block["partition_count"]]
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        return {**whole, "blocks": blocks, "settings": settings}

    def load_state_dict(self, state_dict: Any = None, *, state_dict_list: Any = None, **options: Any) -> None:
        """Restore all blocks' state, from one state dict or (ZeRO) from the list with one entry a rank."""
        saved = state_dict if state_dict is not None else next(entry for entry in state_dict_list if entry)
        if "blocks" not in saved or len(saved["blocks"]) != len(self.blocks):
            count = len(saved["blocks"]) if "blocks" in saved else "no"
            raise ValueError(
                f"the checkpoint holds {count} blocks of optimizer state, this run has {len(self.blocks)}; resume "
                "with the layers_per_block and freeze it was saved with, or load with load_optimizer_states=False"
            )
        for index, block in enumerate(self.blocks):
            if state_dict_list is not None:
                entries = [entry and entry["blocks"][index] for entry in state_dict_list]
                block.load_state_dict(state_dict_list=entries, **options)
            else:
                block.load_state_dict(saved["blocks"][index], **options)
            self._host[index] = HostState(self._host[index].device, self._host[index].pin_memory)
            if hasattr(block, "relink"):
                block.relink()
        if options.get("load_optimizer_states", True):
            for group, settings in zip(self.optimizer.param_groups, saved["settings"], strict=True):
                group.update(settings)
        self._share()
