"""The HiFT engine: DeepSpeed's engine, with the optimizer restricted to the active block of layers at each step.

Source: the paper, Algorithm 1 and section 3.1. With ``zero.py`` the only file that touches DeepSpeed's private names.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.config import ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LION_OPTIMIZER, DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import logger
from deepspeed.utils.timer import NoopTimer

from hift_ds import config as hift_config
from hift_ds.blocks.block import numel_of
from hift_ds.blocks.partition import partition_model
from hift_ds.blocks.schedule import BlockSchedule
from hift_ds.checkpoint.engine import SavingEngine
from hift_ds.checkpoint.files import FileEngine
from hift_ds.model.activations import host_buffers
from hift_ds.optim.lion import Lion
from hift_ds.optim.properties import has_fused, is_elementwise
from hift_ds.state.ledger import Held, Ledger, count, device_total
from hift_ds.state.placement import place_state
from hift_ds.zero.block_optimizers import BlockOptimizers
from hift_ds.zero.optimizers import (
    PlainBlockOptimizer,
    UnfusedBlockOptimizer,
    Zero3BlockOptimizer,
    ZeroBlockOptimizer,
)

# Our entry in a checkpoint's client state.
_STATE_KEY = "hift"


class _Files(FileEngine, CheckpointEngine):
    """The defaults of all that DeepSpeed asks a checkpoint engine beside writing and reading."""


class CheckpointingEngine(SavingEngine):
    """DeepSpeed's engine, but for how it saves and loads."""

    def _configure_checkpointing(self) -> None:
        super()._configure_checkpointing()
        self.checkpoint_engine = _Files(mmap=True)  # `BlockOptimizers` copies what is loaded

    def _copy_recovery_script(self, save_path: str) -> None:
        with self.checkpoint_engine.errors_kept(save_path):  # not to leave the other ranks alone in a barrier
            super()._copy_recovery_script(save_path)


class HiFTEngine(CheckpointingEngine):
    """Trains one block of layers in each optimizer step, and all of them in a cycle.

    Used exactly like DeepSpeed's engine: ``engine(...)``, ``engine.backward(loss)``, ``engine.step()``. The block
    does not change inside a gradient-accumulation window, nor after a step that was skipped: where a loss in the window
    or a gradient is not finite on any rank, no rank updates anything. The learning-rate scheduler is stepped once a
    cycle (the paper's delayed update), so it counts cycles.

    Attributes:
        blocks: what the model was cut into, in order from the embeddings to the head.
        optimizer: of the active block. :func:`initialize` returns ``block_optimizers``, which stands for all.
    """

    optimizer: Any
    lr_scheduler: Any
    block_optimizers: BlockOptimizers
    skips_by_itself = True  # what is not finite; DeepSpeed's engine does not in every case

    def __init__(self, model: torch.nn.Module, hift: hift_config.HiFTConfig, **kwargs: Any):
        self.hift = hift
        self.blocks = partition_model(model, hift.layers_per_block, hift.freeze, hift.max_block_numel, hift.balance)
        named = dict(model.named_parameters())
        self._block_parameters = [[named[name] for name in block.parameter_names] for block in self.blocks]
        trained = {id(parameter) for parameters in self._block_parameters for parameter in parameters}
        for parameter in named.values():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)
        for name in {name: None for block in self.blocks for name in block.slices}:  # before DeepSpeed's hooks
            named[name].register_post_accumulate_grad_hook(functools.partial(self._clear_other_rows, name))
        self._schedule = BlockSchedule(len(self.blocks), hift.strategy, hift.steps_per_block, hift.seed)
        super().__init__(model=model, **kwargs)
        if self.basic_optimizer is None:
            raise ValueError("HiFT needs an optimizer: pass one, or add an 'optimizer' section to the DeepSpeed config")
        if self._support_torch_style_backward:
            for optimizer in self.block_optimizers.owners:
                if optimizer is not self.optimizer:
                    optimizer.register_grad_acc_post_hook(self._backward_post_hook)
        for optimizer in self.block_optimizers.owners:
            if optimizer.offloaded is not None:
                optimizer.offloaded.watch = self._watch_memory
        self._peak_ledger = self._count_memory()
        self._warn_of_long_schedule()

    # ---- what users see ----------------------------------------------------------------------------------------

    @property
    def active_block(self) -> int:
        """Index into ``blocks`` of the block that the next step trains."""
        return self._schedule.active_block

    @property
    def cycle(self) -> int:
        """Completed cycles: how often every block was trained ``steps_per_block`` steps."""
        return self._schedule.cycle

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not loss.requires_grad:
            raise RuntimeError(
                f"the loss does not depend on block {self.active_block} ({self.blocks[self.active_block].name}), the "
                "one this step trains. If the model never uses these parameters, add them to hift.freeze; if "
                "activation checkpointing is on, use its non-reentrant form (use_reentrant=False)"
            )
        self.block_optimizers.watch_loss(loss)
        result = super().backward(loss, *args, **kwargs)
        if self.is_gradient_accumulation_boundary():
            self._watch_memory()
            self.block_optimizers.prefetch()
        return result

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> bool:
        """DeepSpeed's ``save_checkpoint``; the state of all blocks and the place in the schedule go with it.

        Inside an accumulation window it holds the step before; its gradients so far are computed again on resume.
        """
        with self._all_blocks():
            return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any] | None]:
        """DeepSpeed's ``load_checkpoint``; training continues at the saved step of the saved cycle.

        With ``load_optimizer_states=False`` or ``load_module_only=True`` the weights alone are taken.

        Raises:
            ValueError: the checkpoint is damaged, or was made with other blocks or another order of them, another
                number of ranks, another ZeRO stage, or without HiFT.
        """
        with self._all_blocks():
            return super().load_checkpoint(*args, **kwargs)

    def place(self) -> dict[str, Any]:
        return {**self._schedule.state_dict(), "blocks": [[block.name, block.numel] for block in self.blocks]}

    def position(self) -> dict[str, Any]:
        return {_STATE_KEY: self.place()}

    def restore_position(self, where: str, client_state: dict[str, Any]) -> None:
        position = client_state.pop(_STATE_KEY, None)
        if position is None:
            raise ValueError(
                f"the checkpoint in {where!r} was made without HiFT; for its weights alone use load_module_only=True"
            )
        self.check_cut(where, position.pop("blocks", None))  # an adopted checkpoint has no manifest of ours
        self._schedule.load_state_dict(position)

    def memory_ledger(self, peak: bool = False) -> Ledger:
        """Bytes of this rank's ``parameters``, ``gradients``, ``master_weights``, ``optimizer_state`` and ``buffers``.

        Counted from the live tensors, for each of ``device``, ``host`` and ``nvme``. Activations, and what an
        optimizer's kernel needs for a moment, are not tensors that anybody keeps, and are not in it.

        Args:
            peak: as it was at the instant of the highest device total so far. Looked at after set-up, after the last
                backward pass before a step, and when a step's first slice is on the device.
        """
        return copy.deepcopy(self._peak_ledger) if peak else self._count_memory()

    def _count_memory(self) -> Ledger:
        ledger = count(self._held(), self.block_optimizers.host)
        for category, nbytes in self.block_optimizers.staged():
            ledger["device"][category] += nbytes
            ledger["device"]["buffers"] -= nbytes
        return ledger

    def _held(self) -> Iterator[Held]:
        for parameter in self.module.parameters():
            yield Held("parameters", parameter.data)
            yield Held("parameters", getattr(parameter, "ds_tensor", None))
            yield Held("gradients", parameter.grad)
            yield Held("gradients", getattr(parameter, "grad_accum", None))
        yield from self.block_optimizers.held()
        yield from (Held("buffers", buffer) for buffer in self.module.buffers())
        yield from (Held("buffers", buffer, on_host=True) for buffer in host_buffers(self.module))

    def _watch_memory(self) -> None:
        ledger = self._count_memory()
        # Also where it is equal: later, when all blocks have state, the ledger of the host is the full one.
        if device_total(ledger) >= device_total(self._peak_ledger):
            self._peak_ledger = ledger

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        with self._all_blocks():
            super().offload_states(*args, **kwargs)

    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        with self._all_blocks():
            super().reload_states(*args, **kwargs)
            self.block_optimizers.return_to_host()

    def destroy(self) -> None:
        if hasattr(self, "block_optimizers"):
            self.optimizer = self.block_optimizers
        super().destroy()

    # ---- the active block --------------------------------------------------------------------------------------

    def _activate(self) -> None:
        """Freeze everything but the scheduled block, and make its optimizer the engine's."""
        active = self._schedule.active_block
        for parameters in (*self._block_parameters, self._block_parameters[active]):  # blocks may share a parameter
            for parameter in parameters:
                parameter.requires_grad_(parameters is self._block_parameters[active])
        self.optimizer = self.block_optimizers.activate(active)

    def _clear_other_rows(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Autograd makes the whole gradient; what the active block does not train is not to count in its norm."""
        start, stop = self.blocks[self.active_block].slices[name]
        assert parameter.grad is not None
        parameter.grad[:start].zero_()
        parameter.grad[stop:].zero_()

    @contextmanager
    def _all_blocks(self) -> Iterator[None]:
        """Present all blocks to DeepSpeed as one trainable model, for what concerns the whole of it."""
        for parameters in self._block_parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.block_optimizers.settle()
        self.optimizer = self.block_optimizers
        try:
            yield
        finally:
            self._activate()

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        self.block_optimizers.copy_settings()
        self.block_optimizers.agree_on_loss()
        scheduler, self.lr_scheduler = self.lr_scheduler, None  # its turn is at the end of a cycle
        try:
            super()._take_model_step(lr_kwargs)
        finally:
            self.lr_scheduler = scheduler
        if not self.was_step_applied():
            self.block_optimizers.skipped(f"{self.active_block} ({self.blocks[self.active_block].name})")
            return
        if self._schedule.advance() and scheduler is not None:
            scheduler.step(**(lr_kwargs or {}))
        self._activate()

    def clip_fp32_gradients(self) -> None:
        """Clip over the active block's norm (stage 0 in fp32; DeepSpeed's optimizers clip by themselves)."""
        self.optimizer.norm = clip_grad_norm_(
            parameters=self._block_parameters[self.active_block],
            max_norm=self.gradient_clipping(),
            mpu=self.mpu,
        )

    # ---- set-up ------------------------------------------------------------------------------------------------

    def zero_allow_untested_optimizer(self) -> bool:
        # DeepSpeed's list of optimizers is narrower than what is right: `_per_block` checks what matters.
        return True

    def optimizer_params(self) -> dict[str, Any] | None:
        params = super().optimizer_params()
        if self.optimizer_name() in (ADAM_OPTIMIZER, ADAMW_OPTIMIZER) and not self._has_fused("FusedAdamBuilder"):
            # torch's AdamW decays weights by default, DeepSpeed's does not.
            return {"weight_decay": 0.0, **(params or {}), "torch_adam": True}
        return params

    def _has_fused(self, builder: str) -> bool:
        """Whether DeepSpeed has an optimizer kernel to use for this run: its host step's, or a fused one's."""
        return self.zero_use_cpu_optimizer() or has_fused(builder)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        if self.optimizer_name() == LION_OPTIMIZER and not self._has_fused("FusedLionBuilder"):
            return Lion(model_parameters, **(self.optimizer_params() or {}))
        return super()._configure_basic_optimizer(model_parameters)

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        super()._configure_optimizer(client_optimizer, model_parameters)
        if not isinstance(self.optimizer, BlockOptimizers):  # stage 0 in fp32: DeepSpeed uses the bare optimizer
            self.optimizer = self._per_block(self.optimizer, PlainBlockOptimizer, flattens=False)
        self.block_optimizers = self.optimizer

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        # torch's schedulers want to see a step of the optimizer that they watch; that one only carries the settings.
        self.basic_optimizer._opt_called = True
        self._activate()

    def _configure_fp16_optimizer(self, optimizer: torch.optim.Optimizer, low_precision_dtype: torch.dtype) -> Any:
        """Stage 0 in bf16."""

        def wrap(inner: torch.optim.Optimizer) -> Any:
            return UnfusedBlockOptimizer(
                inner,
                deepspeed=self,
                low_precision_dtype=low_precision_dtype,
                static_loss_scale=self.loss_scale(),
                mpu=self.mpu,
                clip_grad=self.gradient_clipping(),
            )

        return self._per_block(optimizer, wrap, flattens=False)

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        # DeepSpeed's choice for stage 1 with bf16 weights and fp32 accumulation makes fp32 gradient buffers for the
        # whole model at set-up; the ZeRO optimizer does the same arithmetic without.
        return self._configure_zero_optimizer(optimizer)

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer | None) -> Any:
        if optimizer is None:
            raise ValueError("HiFT needs an optimizer: pass one, or add an 'optimizer' section to the DeepSpeed config")
        stage = self.zero_optimization_stage()
        _, accumulation_dtype = self.get_data_types()
        largest = max(sum(map(numel_of, parameters)) for parameters in self._block_parameters)
        common = {
            "timers": self._step_timers(),
            "static_loss_scale": self.loss_scale(),
            "dynamic_loss_scale": self.dynamic_loss_scale(),
            "dynamic_loss_args": self.dynamic_loss_scale_args(),
            "clip_grad": self.gradient_clipping(),
            "contiguous_gradients": self.zero_contiguous_gradients(),
            # Only one block's gradients ever wait for their reduction.
            "reduce_bucket_size": min(self.zero_reduce_bucket_size(), largest),
            "dp_process_group": self.seq_data_parallel_group,
            "reduce_scatter": self.zero_reduce_scatter(),
            "overlap_comm": self.zero_overlap_comm(),
            "offload_optimizer_config": self.zero_offload_optimizer(),
            "mpu": self.mpu,
            "postscale_gradients": self.postscale_gradients(),
            "gradient_predivide_factor": self.gradient_predivide_factor(),
            "gradient_accumulation_steps": self.gradient_accumulation_steps(),
            "gradient_accumulation_dtype": accumulation_dtype,
            "communication_data_type": self.communication_data_type,
        }
        if stage <= 2:

            def wrap(inner: torch.optim.Optimizer) -> Any:
                return ZeroBlockOptimizer(
                    inner,
                    self.param_names,
                    optimizer_params=self.optimizer_params(),
                    use_multi_rank_bucket_allreduce=self.zero_multi_rank_bucket_allreduce(),
                    allgather_bucket_size=self.zero_allgather_bucket_size(),
                    gradient_average=self.gradient_average,
                    ignore_unused_parameters=self.zero_ignore_unused_parameters(),
                    partition_grads=stage == 2,
                    round_robin_gradients=self.zero_round_robin_gradients(),
                    parameter_alignment=self.zero_parameter_alignment(),
                    check_grad_overflow=True,
                    compute_grad_norm=self.zero_compute_grad_norm(),
                    **common,
                )

        else:
            first: Zero3BlockOptimizer | None = None

            def wrap(inner: torch.optim.Optimizer) -> Any:
                nonlocal first
                block = Zero3BlockOptimizer(
                    self.module,
                    inner,
                    self.param_names,
                    first=first,
                    ds_config=self.config,
                    prefetch_bucket_size=min(self.zero_prefetch_bucket_size(), largest),
                    max_reuse_distance=self.zero_max_reuse_distance(),
                    max_live_parameters=self.zero_max_live_parameters(),
                    param_persistence_threshold=self.zero_param_persistence_threshold(),
                    model_persistence_threshold=self.zero_model_persistence_threshold(),
                    sub_group_size=self.zero_sub_group_size(),
                    offload_ratio=self.zero_partial_offload(),
                    aio_config=self.aio_config(),
                    zero_module_granularity_threshold=self.zero_module_granularity_threshold(),
                    log_trace_cache_warnings=self.zero_log_trace_cache_warnings(),
                    enable_sanity_checks=self.is_sanity_checks_enabled(),
                    cpuadam_cores_perc=self.cpuadam_cores_perc(),
                    **common,
                )
                first = first or block
                return block

        return self._per_block(optimizer, wrap, flattens=True)

    def _per_block(self, optimizer: torch.optim.Optimizer, wrap: Any, flattens: bool) -> BlockOptimizers:
        """One optimizer for each block in place of the configured one.

        Raises:
            ValueError: parameters of a block that the optimizer was not given, or an optimizer that needs the
                parameters' shapes where they are flattened.
        """
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [
            name
            for block, parameters in zip(self.blocks, self._block_parameters, strict=True)
            for name, parameter in zip(block.parameter_names, parameters, strict=True)
            if id(parameter) not in given
        ]
        if missing:
            raise ValueError(
                f"{len(missing)} parameters are neither frozen nor in the optimizer: {', '.join(missing[:8])}"
                f"{' ...' if len(missing) > 8 else ''}; pass them to the optimizer, or add them to hift.freeze"
            )
        if flattens and not is_elementwise(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} uses the shape of a parameter, and zero_optimization.stage="
                f"{self.zero_optimization_stage()} flattens it; use stage 0, or an element-wise optimizer such as AdamW"
            )
        placed = place_state(
            self.hift.offload,
            self.blocks,
            self._block_parameters,
            optimizer,
            on_host=self.zero_use_cpu_optimizer(),
            ranks=self.dp_world_size if self.zero_optimization() else 1,
            has_masters=self.zero_optimization() or self.bfloat16_enabled(),
            aio=self.aio_config(),
        )
        return BlockOptimizers(optimizer, self._block_parameters, wrap, **placed)

    def _step_timers(self) -> Any:
        return self.timers if self.wall_clock_breakdown() else NoopTimer()

    def _warn_of_long_schedule(self) -> None:
        """Say how long a schedule with an end takes, since it counts cycles and not steps."""
        attributes = ("total_num_steps", "total_steps", "total_iters", "T_max")
        ticks = next((v for name in attributes if isinstance(v := getattr(self.lr_scheduler, name, None), int)), None)
        if ticks and dist.get_rank() == 0 and self._schedule.steps_per_cycle > 1:
            logger.warning(
                f"the learning-rate schedule of {ticks} ticks advances once a cycle: it ends after "
                f"{ticks * self._schedule.steps_per_cycle} steps, not after {ticks}. For a run of N steps give it "
                f"ceil(N / {self._schedule.steps_per_cycle}) ticks"
            )


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with HiFT: same arguments, same four results.

    Args:
        config: a DeepSpeed config, as a dict or the path of a JSON file, with one more section, ``hift``
            (:class:`hift_ds.config.HiFTConfig`). Without the section its defaults hold; with ``enabled: false``
            this is DeepSpeed's own ``initialize``.
        model: with the parameters that are not to be trained already frozen, if any.

    Returns:
        engine, optimizer, training_dataloader, lr_scheduler.

    Raises:
        hift_ds.config.ConfigError: (a ValueError) every problem of the ``hift`` section and of its combination with
            the rest of the config, before anything is built.
        ValueError: the model cannot be cut into blocks as asked, or the optimizer cannot be used with them.
    """
    config = hift_config.read(config if config is not None else config_params or getattr(args, "deepspeed_config", {}))
    problems = hift_config.problems(config)
    if isinstance(model, deepspeed.PipelineModule):
        problems.append("model is a PipelineModule, which has an engine of its own; pass a plain module")
    if mesh_param is not None:
        problems.append(f"mesh_param={mesh_param!r} cannot be combined with HiFT; leave it out")
    hift = hift_config.HiFTConfig.from_dict(config.pop(hift_config.SECTION, None)) if not problems else None
    arguments = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "config": config,
    }
    if hift is not None and not hift.enabled:
        made = deepspeed.initialize(**arguments, distributed_port=distributed_port, mesh_param=mesh_param)
        engine = made[0]
        if type(engine) is DeepSpeedEngine and type(engine.checkpoint_engine) is TorchCheckpointEngine:
            # `deepspeed.initialize` has no argument for the class; nothing but saving and loading is another.
            engine.__class__, engine.checkpoint_engine = CheckpointingEngine, _Files()
        return made
    if hift is None or problems:
        raise hift_config.ConfigError(problems)
    if model is None:
        raise ValueError("model=None: hift_ds.initialize needs a model")
    # From here on what `deepspeed.initialize` does, which has no argument for the engine's class.
    deepspeed.zero.partition_parameters.shutdown_init_context()
    try:
        dist.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            distributed_port=distributed_port,
            dist_init_required=dist_init_required,
        )
    except ModuleNotFoundError as error:
        if error.name != "mpi4py":
            raise
        raise RuntimeError(
            "no rank is set in the environment, so DeepSpeed looked for MPI: start the script with its launcher, "
            "e.g. deepspeed --num_gpus 1 script.py"
        ) from None
    engine = HiFTEngine(hift=hift, config_class=DeepSpeedConfig(config, mpu), **arguments)
    deepspeed.zero.partition_parameters.restore_init_context()
    engine._configure_python_gc()
    return engine, engine.block_optimizers, engine.training_dataloader, engine.lr_scheduler
