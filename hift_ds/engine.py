"""The HiFT engine: a subclass of DeepSpeed's engine in which each optimizer step trains one block of layers.

Source: the HiFT paper, Algorithm 1 and section 3.1. Only this file and ``hift_ds/zero/`` use DeepSpeed's private names.
"""

import copy
import functools
import importlib.util
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.config import (
    ADAM_OPTIMIZER,
    ADAMW_OPTIMIZER,
    LAMB_OPTIMIZER,
    LION_OPTIMIZER,
    MUADAM_OPTIMIZER,
    MUADAMW_OPTIMIZER,
    MUON_OPTIMIZER,
    MUSGD_OPTIMIZER,
    DeepSpeedConfig,
)
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils import logger
from deepspeed.utils.timer import NoopTimer

from hift_ds.blocks.block import numel_of
from hift_ds.blocks.layers import largest_hidden_layer
from hift_ds.blocks.partition import partition_model
from hift_ds.blocks.schedule import BlockSchedule
from hift_ds.checkpoint.contents import Contents
from hift_ds.checkpoint.engine import SavingEngine
from hift_ds.checkpoint.files import CheckpointError, FileEngine
from hift_ds.checkpoint.manifest import Checkpoint
from hift_ds.collectives import on_every_rank
from hift_ds.config import HiFTConfig, needs_streamed_step
from hift_ds.model.activations import host_buffers
from hift_ds.model.reach import freeze_patterns
from hift_ds.optim.lion import Lion
from hift_ds.optim.properties import has_fused, optimizer_class
from hift_ds.optim.rates import needs_metrics, rates_of_cycle
from hift_ds.state.allocator import HostMemory
from hift_ds.state.free_memory import return_freed_memory
from hift_ds.state.ledger import Held, Ledger, count, device_total
from hift_ds.state.placement import StateSpec, bytes_in_store, place_state
from hift_ds.state.trial import examine
from hift_ds.weights.host import HostWeights
from hift_ds.weights.node import check_ranks
from hift_ds.zero.block_optimizers import BlockOptimizers
from hift_ds.zero.gates import UpdateGates, has_compiled
from hift_ds.zero.gathering import Gathering
from hift_ds.zero.stage0_bf16 import UnfusedBlockOptimizer
from hift_ds.zero.stage0_fp32 import PlainBlockOptimizer
from hift_ds.zero.stage3 import Stage3BlockOptimizer
from hift_ds.zero.stage12 import Stage12BlockOptimizer

_NO_OPTIMIZER = "HiFT needs an optimizer: pass one, or add an 'optimizer' section to the DeepSpeed config"
# The key of HiFT's entry in a checkpoint's client state.
_STATE_KEY = "hift"
# Cycles in which the memory is watched. The second is the first in which all blocks have optimizer state.
_WATCHED_CYCLES = 2


class UnreachedBlockError(RuntimeError):
    """The loss does not depend on the block that a step trains."""


def scheduler_class(kind: str) -> type | None:
    """Return the class of the schedule that the ``scheduler`` section of a DeepSpeed config names, or None."""
    if kind in lr_schedules.VALID_LR_SCHEDULES:
        return getattr(lr_schedules, kind)
    found = getattr(torch.optim.lr_scheduler, kind, None)
    is_schedule = isinstance(found, type) and issubclass(found, torch.optim.lr_scheduler.LRScheduler)
    return found if is_schedule else None


def _check_optimizer_name(name: str) -> None:
    """Raise a ValueError if this machine does not have the optimizer that a DeepSpeed config names."""
    if name in (MUADAM_OPTIMIZER, MUADAMW_OPTIMIZER, MUSGD_OPTIMIZER):
        if importlib.util.find_spec("mup") is None:
            raise ValueError(f"optimizer.type={name!r} needs the package mup: pip install mup")
    elif name == LAMB_OPTIMIZER and not has_fused("FusedLambBuilder"):
        raise ValueError(
            f"optimizer.type={name!r} needs DeepSpeed's fused kernel, which does not work on this machine "
            f"(accelerator: {get_accelerator().device_name()}); use another optimizer, such as AdamW"
        )
    elif name != MUON_OPTIMIZER and optimizer_class(name) is None:
        raise ValueError(
            f"optimizer.type={name!r} is neither an optimizer of DeepSpeed {deepspeed.__version__} (Adam, AdamW, Lamb, "
            "Lion, Adagrad, Muon) nor of torch.optim; use one of these, or pass an optimizer to initialize"
        )


def _check_experts(model: torch.nn.Module) -> None:
    """Raise a ValueError if ranks hold different experts: a norm of their gradients would differ between ranks."""
    for name, module in model.named_modules():
        if isinstance(module, MoE) and module.ep_size > 1:
            raise ValueError(
                f"{name or 'the model'} is a deepspeed.moe layer with ep_size={module.ep_size}, and HiFT does not "
                "distribute experts over ranks; use ep_size=1, or set hift.enabled=false"
            )


def _check_partitioned(model: torch.nn.Module, config: DeepSpeedConfig) -> None:
    """Raise a ValueError if ``deepspeed.zero.Init`` has partitioned a model's parameters, and the config differs."""
    partitioned = {name: p for name, p in model.named_parameters() if hasattr(p, "ds_id")}
    if partitioned and config.zero_optimization_stage != 3:
        raise ValueError(
            f"zero_optimization.stage={config.zero_optimization_stage}, and deepspeed.zero.Init has partitioned the "
            "parameters of the model; set stage=3, or make the model outside deepspeed.zero.Init"
        )
    wanted = torch.float32
    if config.float16_config.enabled or config.bfloat16_config.enabled:
        wanted = torch.float16 if config.float16_config.enabled else torch.bfloat16
    if other := [name for name, p in partitioned.items() if p.dtype.is_floating_point and p.dtype != wanted]:
        found = str(partitioned[other[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"deepspeed.zero.Init has made {len(other)} parameters, such as {other[0]}, in {found}, and the DeepSpeed "
            f"config trains in {str(wanted).removeprefix('torch.')}; make the model inside "
            "deepspeed.zero.Init(config_dict_or_path=...) with the config of training"
        )


def _make_on_host(host: HostWeights, make_optimizer: Any, flattens: bool, inner: torch.optim.Optimizer) -> Any:
    """Make a block's optimizer with its weights on the device, as DeepSpeed needs them, then move them to the host."""
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    if not flattens:
        host.gather(parameters)
    with host.on_device(parameters):
        block = make_optimizer(inner)
        block.keep_weights_on_host(host, parameters)
        return block


def _without_synchronization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which DeepSpeed's throughput timer does not wait for the device, unless it says otherwise.

    By default, this timer synchronizes twice in each step.
    """
    timers = dict(config.get("timers") or {})
    timers["throughput"] = {"synchronized": False, **(timers.get("throughput") or {})}
    return {**config, "timers": timers}


class _Files(FileEngine, CheckpointEngine):
    """A :class:`FileEngine` with DeepSpeed's defaults for the rest of a checkpoint engine's interface."""


class CheckpointingEngine(SavingEngine):
    """DeepSpeed's engine, changed only in how it saves and loads checkpoints."""

    @classmethod
    def take_over(cls, engine: DeepSpeedEngine) -> None:
        """Turn an engine that ``deepspeed.initialize`` made into one of this class.

        Other engine classes, and engines with another checkpoint engine, stay as they are.
        """
        if type(engine) is DeepSpeedEngine and type(engine.checkpoint_engine) is TorchCheckpointEngine:
            # `deepspeed.initialize` has no argument for the engine's class.
            engine.__class__, engine.checkpoint_engine = cls, _Files()

    def _configure_checkpointing(self) -> None:
        super()._configure_checkpointing()
        self.checkpoint_engine = _Files(mmap=True)  # `BlockOptimizers` copies what is loaded

    def _copy_recovery_script(self, save_path: str) -> None:
        with self.checkpoint_engine.errors_kept(save_path):  # an error must not leave the other ranks in a barrier
            super()._copy_recovery_script(save_path)


class HiFTEngine(CheckpointingEngine):
    """Trains one block of layers in each optimizer step; a cycle of steps trains every block.

    Use it like DeepSpeed's engine: ``engine(...)``, ``engine.backward(loss)``, ``engine.step()``. The active block does
    not change inside a gradient-accumulation window, nor after a skipped step. A step is skipped on all ranks if, on
    any rank, a loss in the window or a gradient is non-finite. All blocks of a cycle are trained with the same learning
    rate (the paper's delayed update): the schedule advances once per cycle, or, with ``lr_ticks: step``, the engine
    uses the rate of the cycle's first step until the cycle ends.

    Make an engine with :func:`hift_ds.initialize`.

    Args:
        model: the module to train.
        hift: the config section ``hift``.
        config: the rest of the DeepSpeed config.
        mpu: DeepSpeed's model-parallel interface, if any.
        kwargs: the other arguments of DeepSpeed's engine.

    Attributes:
        hift: the config section ``hift``.
        blocks: the model's blocks, in order from the embeddings to the head.
        optimizer: the active block's optimizer.
        block_optimizers: the optimizers of all blocks, behind the interface of one. :func:`hift_ds.initialize` returns
            it as the optimizer.

    Raises:
        ValueError: the model cannot be cut into blocks as configured, or distributes experts over ranks, or there is no
            optimizer, or it cannot be used with these blocks.
    """

    optimizer: Any
    lr_scheduler: Any
    block_optimizers: BlockOptimizers
    _host_weights: HostWeights | None = None  # with `offload.weights: cpu`
    _loading: Contents | None = None  # the checkpoint that is being loaded
    skips_by_itself = True  # steps with a non-finite loss or gradient; DeepSpeed's engine does not skip all of them
    # The engine that freezes a model's parameters: the last one that was made of it.
    _owners: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()

    def __init__(
        self, model: torch.nn.Module, hift: HiFTConfig, config: Mapping[str, Any], mpu: Any = None, **kwargs: Any
    ):
        _check_experts(model)
        if hift.offload.weights == "cpu":
            check_ranks(int((config.get("zero_optimization") or {}).get("stage", 0)), mpu)
        config = _without_synchronization(config)
        config_class = DeepSpeedConfig(config, mpu)
        if kwargs.get("optimizer") is None and config_class.optimizer_name is not None:
            _check_optimizer_name(config_class.optimizer_name)
        _check_partitioned(model, config_class)
        deepspeed.set_optimizer_flags(config_class, model)  # as `deepspeed.initialize` does, for Muon
        if (predecessor := self._owner_of(model)) is not None:
            predecessor._let_go()
        self.hift = hift
        self.blocks = partition_model(model, hift.layers_per_block, hift.freeze, hift.max_block_numel, hift.balance)
        named = dict(model.named_parameters())
        self._block_parameters = [[named[name] for name in block.parameter_names] for block in self.blocks]
        self._trainable = [parameter for parameter in named.values() if parameter.requires_grad]
        self._last_step: tuple[Any, int, int] | None = None  # learning rate, block, cycle
        trained = {id(parameter) for parameters in self._block_parameters for parameter in parameters}
        for parameter in named.values():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)
        self._row_hooks = [  # must run before DeepSpeed's hooks
            named[name].register_post_accumulate_grad_hook(functools.partial(self._clear_other_rows, name))
            for name in {name: None for block in self.blocks for name in block.slices}
        ]
        self._gathering = Gathering(None)
        self._load_hooks = [  # must run before those of `HostWeights`
            register(functools.partial(call, index))
            for index, block in enumerate(self.blocks)
            for owner in {model.get_submodule(name.rpartition(".")[0]) for name in block.parameter_names}
            for register, call in (
                (owner.register_load_state_dict_pre_hook, self._before_loading),
                (owner.register_load_state_dict_post_hook, self._after_loading),
            )
        ]
        self._schedule = BlockSchedule(len(self.blocks), hift.strategy, hift.steps_per_block, hift.seed)
        if hift.offload.weights == "cpu":
            kwargs["dont_change_device"] = True
        try:
            super().__init__(model=model, config=config, config_class=config_class, mpu=mpu, **kwargs)
            if self.basic_optimizer is None:
                raise ValueError(_NO_OPTIMIZER)
        except BaseException:  # another attempt must find the model as it was
            for parameter in self._trainable:
                parameter.requires_grad_(True)
            if self._host_weights is not None:
                self._host_weights.release()
            own = (vars(self).get(name) for name in ("module_forward_pre_hook", "module_forward_post_hook"))
            for hook in (*self._row_hooks, *self._load_hooks, *filter(None, own)):
                hook.remove()
            raise
        if self._support_torch_style_backward:
            for optimizer in self.block_optimizers.optimizers:
                if optimizer is not self.optimizer:
                    optimizer.register_grad_acc_post_hook(self._backward_post_hook)
        for optimizer in self.block_optimizers.optimizers:
            optimizer.block_state.on_first_chunk = self._watch_memory
        self._peak_ledger = self._count_memory()
        self._gates = UpdateGates(
            self.module, [block.parameter_names for block in self.blocks], self.block_optimizers.staging
        )
        self._given_schedule = self.lr_scheduler  # a script may take over `lr_scheduler` to advance it itself
        self._warn_of_long_schedule()
        self._configure_python_gc()
        self._owners[model] = weakref.ref(self)

    # ---- the public interface ----------------------------------------------------------------------------------

    @property
    def active_block(self) -> int:
        """Index into ``blocks`` of the block that the next step trains."""
        return self._schedule.active_block

    @property
    def cycle(self) -> int:
        """Completed cycles: in a cycle, each block is trained for ``steps_per_block`` steps."""
        return self._schedule.cycle

    @property
    def steps_per_cycle(self) -> int:
        """Number of steps in a cycle."""
        return self._schedule.steps_per_cycle

    def block_after(self, steps: int) -> int:
        """Index into ``blocks`` of the block that is trained after so many more applied steps; after 0: the active."""
        return self._schedule.block_at(self._schedule.step + steps)

    @property
    def checkpoint_nbytes(self) -> int:
        """Bytes of tensors in a checkpoint, of all ranks together, without padding: the same after every step."""
        parameters = self.module.parameters()
        weights = sum(numel_of(parameter) * parameter.element_size() for parameter in parameters)
        state = sum(block.numel for block in self.blocks) * self._saved_per_element
        # At ZeRO 3, masters stand for the weights.
        return round(state) + (0 if self.zero_optimization_partition_weights() else weights)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """DeepSpeed's ``backward``: compute the active block's gradients.

        Raises:
            UnreachedBlockError: the loss does not depend on the active block.
        """
        if not loss.requires_grad:
            raise UnreachedBlockError(self._why_unreached())
        self.block_optimizers.watch_loss(loss)
        self._freeze_others()  # activation checkpointing runs layers again, and needs the same as in the forward pass
        result = super().backward(loss, *args, **kwargs)
        if self.is_gradient_accumulation_boundary():
            self.block_optimizers.prefetch()
        elif self._host_weights is not None:
            self._host_weights.prepare()
        return result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's ``forward``.

        Raises:
            ValueError: the model is compiled, and its weights wait in host memory.
        """
        if self.module.training:
            self._freeze_others()
        if self._gates.leave_to_compiler() and self.hift.offload.defer is True and dist.get_rank() == 0:
            logger.warning("hift.offload.defer=true has no effect from now on: the model is compiled")
        if self._host_weights is not None and has_compiled(self.module):
            raise ValueError(
                "the model is compiled, and hift.offload.weights='cpu' needs hooks, which a compiler would take for a "
                "part of the model; do not compile the model, or set hift.offload.weights='device'"
            )
        return super().forward(*args, **kwargs)

    def unfreeze(self) -> None:
        """Let all parameters require gradients again that did before the engine was made.

        Call it when training is done. A further forward pass in training mode freezes the inactive blocks again.
        """
        self.settle()
        if self._owner_of(self.module) is not self:
            return
        for parameter in self._trainable:
            parameter.requires_grad_(True)

    def settle(self) -> None:
        """Finish the last step, of which ``hift.offload.defer`` leaves the update to the next forward pass.

        Until then, the weights of the block have their old values. Call this before reading or changing weights other
        than through the model's forward pass, its ``state_dict`` and ``load_state_dict``, a checkpoint or ``unfreeze``.
        The host does not wait; what the device computes next does.
        """
        self.block_optimizers.finish_update()

    @classmethod
    def _owner_of(cls, model: torch.nn.Module) -> Any:
        return cls._owners.get(model, lambda: None)()

    def _let_go(self) -> None:
        """Leave the model as it was before the engine, for another engine."""
        if self._owner_of(self.module) is self:  # not if Python deletes the engine after another one was made
            self.settle()
            self._gates.remove()
            self.unfreeze()
            if self._host_weights is not None:
                self._host_weights.release()
            del self._owners[self.module]
        for hook in (*self._row_hooks, *self._load_hooks):
            hook.remove()

    def _before_loading(self, block: int, *_: Any) -> None:
        """Before weights of a block are loaded: what was fetched of them may be their old values."""
        if (optimizers := vars(self).get("block_optimizers")) is not None:
            optimizers.settle_block(block)

    def _after_loading(self, block: int, *_: Any) -> None:
        """After weights of a block were loaded."""
        self.block_optimizers.weights_changed(block)

    def log_values(self) -> dict[str, float]:
        """Return the learning rate, block and cycle of the last applied step, for a log; empty before the first.

        Returns:
            ``hift/lr``: the learning rate of the block's first parameter group, unless the group has none;
            ``hift/block``: index into ``blocks``; ``hift/cycle``: number of cycles completed before the step.
        """
        if self._last_step is None:
            return {}
        rate, block, cycle = self._last_step
        return {**({} if rate is None else {"hift/lr": float(rate)}), "hift/block": block, "hift/cycle": cycle}

    def _why_unreached(self) -> str:
        block = self.blocks[self.active_block]
        names = block.parameter_names
        patterns = freeze_patterns(names, [name for other in self.blocks for name in other.parameter_names])
        return (
            f"the loss does not depend on block {self.active_block} ({block.name}), which this step trains: "
            f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}. If the model never uses "
            f"these parameters, freeze them: hift.freeze={[*self.hift.freeze, *patterns]}. "
            "hift_ds.unreached_parameters(model, loss), before hift_ds.initialize, finds those of all blocks. If "
            "activation checkpointing is on, use its non-reentrant form (use_reentrant=False)"
        )

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,  # transformers' Trainer looks for this name in the signature
    ) -> bool:
        """DeepSpeed's ``save_checkpoint``, with the state of all blocks and the position in the cycle.

        Inside a gradient-accumulation window, the checkpoint holds the state after the last step; the gradients of the
        window are not saved. Arguments and errors: :meth:`SavingEngine.save_checkpoint
        <hift_ds.checkpoint.engine.SavingEngine.save_checkpoint>`.
        """
        self._on_every_rank("finish its last step", self.block_optimizers.settle)
        with self._all_blocks():
            return super().save_checkpoint(save_dir, tag, client_state, save_latest, exclude_frozen_parameters)

    @staticmethod
    def _on_every_rank(what: str, action: Callable[[], Any]) -> Any:
        """Run an action on every rank. What one rank cannot do must not leave the others waiting for it.

        Returns:
            The result on this rank.

        Raises:
            CheckpointError: on every rank, if the action failed on any rank because of a file, a value or memory.
        """
        result = None

        def act() -> None:
            nonlocal result
            result = action()

        _, problems = on_every_rank(act, (OSError, ValueError, MemoryError))
        if problems:
            texts = {text: [i for i, other in problems.items() if other == text] for text in problems.values()}
            raise CheckpointError(
                "\n".join(
                    f"rank {', '.join(map(str, ranks))} could not {what}: {text}" for text, ranks in texts.items()
                )
            )
        return result

    @contextmanager
    def saving_into(self, folder: str) -> Iterator[None]:
        """While inside, masters are decoded into files in this folder, which take no anonymous memory.

        The folder must have room for these files and the checkpoint of all ranks. Else masters are decoded in memory.
        """
        masters = 4 * sum(master.numel() for block in self.block_optimizers.optimizers for master, _ in block.masters())
        state = self.block_optimizers.host.nbytes if self.block_optimizers.host is not None else 0
        weights = sum(numel_of(parameter) * parameter.element_size() for parameter in self.module.parameters())
        needed = dist.get_world_size() * (2 * masters + state) + weights
        if shutil.disk_usage(folder).free > needed:
            self.block_optimizers.scratch_folder = folder
        try:
            yield
        finally:
            self.block_optimizers.scratch_folder = None

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any] | None]:
        """DeepSpeed's ``load_checkpoint``. Training continues at the saved step of the saved cycle.

        Any number of ranks, ZeRO stage and placement of state may have saved it: state is found by parameter name, and
        loaded bit for bit. So may other blocks, or another order of them, at the end of a cycle. What is in 8 bits is
        encoded anew where it is cut elsewhere. With ``load_optimizer_states=False`` or ``load_module_only=True``, only
        the weights are loaded.

        Raises:
            ValueError: the checkpoint is damaged, or was saved without HiFT, or with another dtype, optimizer or
                ``freeze``, or with other blocks in the middle of a cycle. Nothing is changed then.
        """
        self._on_every_rank("finish its last step", self.block_optimizers.settle)
        with self._all_blocks():
            return super().load_checkpoint(*args, **kwargs)

    def _zero3_consolidated_16bit_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._on_every_rank("finish its last step", self.block_optimizers.settle)
        with self._all_blocks():  # with `exclude_frozen_parameters`, inactive blocks would be left out
            return super()._zero3_consolidated_16bit_state_dict(*args, **kwargs)

    def check_continues(self, found: Checkpoint) -> None:
        """Check that this run can continue from a checkpoint.

        Raises:
            ValueError: another dtype saved it, or other blocks in the middle of a cycle, or with experts of
                ``deepspeed.moe`` another number of ranks or ZeRO stage.
        """
        fixed = ("world_size", "zero_stage") if self.has_moe_layers else ()
        self.check_settings(found, ("dtype", *fixed))
        if "position" in found.about:  # not in that of an adopted checkpoint
            self._check_place(str(found.path), found.about)

    def check_loads_weights(self, found: Checkpoint) -> None:
        """Do nothing: the weights alone can always be loaded."""

    def _check_place(self, where: str, saved: Mapping[str, Any]) -> None:
        """Check that this run has the blocks of a checkpoint, or begins a new cycle, and that schedules count alike.

        Args:
            where: the checkpoint, for the message.
            saved: what :meth:`place` returned.

        Raises:
            ValueError: it does not.
        """
        if (ticks := saved["lr_ticks"]) != self.hift.lr_ticks:
            raise ValueError(
                f"the checkpoint in {where!r} was saved with hift.lr_ticks={ticks!r}, this run has "
                f"{self.hift.lr_ticks!r}, so its learning-rate schedule counts something else; resume with "
                f"hift.lr_ticks={ticks!r}"
            )
        left, ours = self._schedule.steps_left(saved["position"]), self.place()
        is_same = saved["blocks"] == ours["blocks"] and self._schedule.is_same(saved["position"])
        if left and not is_same:
            raise ValueError(
                f"the checkpoint in {where!r} was saved {left} steps before the end of a cycle over "
                f"{_shown_cut(saved)}, and this run has {_shown_cut(ours)}, which can only begin with a new cycle. "
                "Continue with the layers_per_block, max_block_numel, balance, freeze, strategy, seed and "
                f"steps_per_block of the run that saved it for {left} more steps, save, and change them then"
            )

    def _load_checkpoint(
        self,
        load_dir: str,
        tag: str,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load weights and state by parameter name, and let DeepSpeed load the rest."""
        continues = load_optimizer_states and not load_module_only

        def read() -> Contents:
            load = functools.partial(self.checkpoint_engine.load, map_location="cpu")
            contents = Contents(Path(load_dir) / tag, load, self.checkpoint_mp_rank)
            if custom_load_fn is None:
                self._check_shapes(contents)
            if continues:
                self.block_optimizers.check_state(contents.states)
            return contents

        self._loading = contents = self._on_every_rank("load the checkpoint", read)
        try:
            path, client_state = super()._load_checkpoint(
                load_dir,
                tag,
                load_module_strict,
                self.zero_optimization_partition_weights(),  # else it reads the weights that `latest` names
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
        finally:
            self._loading = None
        if continues:
            options = {"load_from_fp32_weights": self.zero_load_from_fp32_weights()}
            self.block_optimizers.load_state_dict(state_dict_list=contents.states, **options)
        elif hasattr(self.optimizer, "refresh_fp32_params"):
            self.optimizer.refresh_fp32_params()
        return path, client_state and {key: value for key, value in client_state.items() if key != "optimizer"}

    def _check_shapes(self, contents: Contents) -> None:
        """Raise a ValueError if a weight has another shape in a checkpoint."""
        differing = []
        for name, parameter in self.module.named_parameters():
            ours = self._get_param_shape_func(parameter)
            if name in contents.names and (theirs := contents.shape(name)) != ours:
                differing.append(f"{name} {list(theirs)} in the checkpoint, {list(ours)} in this run")
        if differing:
            raise ValueError(
                f"{len(differing)} weights have another shape: {'; '.join(differing[:4])}"
                f"{' ...' if len(differing) > 4 else ''}; use the model of the run that saved it"
            )

    def _load_zero_checkpoint(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: `_load_checkpoint` has loaded the state."""
        return True

    def _get_all_ckpt_names(self, checkpoints_path: str, tag: str) -> list[str]:
        """Return the file that DeepSpeed reads on this rank: of this rank's weights, or of all."""
        if self._loading is None or self.mp_world_size > 1:
            return super()._get_all_ckpt_names(checkpoints_path, tag)
        return [str(self._loading.files[min(dist.get_rank(), len(self._loading.files) - 1)])]

    def load_module_state_dict(self, checkpoint: dict[str, Any], strict: bool = True, **kwargs: Any) -> None:
        """Load the weights of a checkpoint, from whole ones or from the parts that ranks saved at ZeRO 3."""
        custom = kwargs.get("custom_load_fn") is not None or self.has_moe_layers
        if self._loading is not None and not custom:
            if self.zero_optimization_partition_weights():
                self._load_partitions(self._loading, checkpoint["module"], strict)
                return
            if self._loading.are_weights_sharded:
                checkpoint = {**checkpoint, "module": self._whole_weights(self._loading, checkpoint["module"])}
        if not self.zero_optimization_partition_weights():  # frozen weights are in the module's state, too
            checkpoint = {key: value for key, value in checkpoint.items() if key != "frozen_param_fragments"}
        super().load_module_state_dict(checkpoint, strict, **kwargs)

    def place(self) -> dict[str, Any]:
        """Return the position in the cycle, the blocks and what the schedule counts, for the manifest."""
        blocks = [[block.name, block.numel] for block in self.blocks]
        return {"position": self._schedule.state_dict(), "blocks": blocks, "lr_ticks": self.hift.lr_ticks}

    def _load_partitions(self, contents: Contents, module: Mapping[str, Any], strict: bool) -> None:
        """At ZeRO 3: load this rank's part of each weight, and the buffers.

        Args:
            contents: of the checkpoint.
            module: what the file of this rank holds; of weights that are sharded there, it has none.
            strict: the names must be the same.

        Raises:
            ValueError: they are not.
        """
        named = dict(self.module.named_parameters())
        known = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in self.module.named_buffers(remove_duplicate=False)}
        unknown = sorted(contents.names - known)
        missing = sorted(named.keys() - contents.names)
        if strict and (missing or unknown):
            raise ValueError(
                f"weights that are not in the checkpoint: {', '.join(missing[:4]) or 'none'}; weights of the "
                f"checkpoint that are not in the model: {', '.join(unknown[:4]) or 'none'}; use the same model, or "
                "load_module_strict=False"
            )
        for name, parameter in named.items():
            if name in missing:
                continue
            partition = parameter.ds_tensor
            start = parameter.ds_zero_partition_rank * partition.ds_numel
            stop = min(start + partition.ds_numel, parameter.ds_numel)
            if start < stop:
                partition.data.view(-1)[: stop - start].copy_(contents.weight(name, start, stop))
        for name, buffer in self.module.named_buffers():
            if name in module:
                buffer.copy_(module[name])

    def _whole_weights(self, contents: Contents, module: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return a state dict of the module from a checkpoint of ZeRO 3."""
        names: dict[int, str] = {}
        found = {name: module[name] for name, _ in self.module.named_buffers() if name in module}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            saved = names.setdefault(id(parameter), name)
            if saved in contents.names:
                shape = contents.shape(saved)
                is_first = saved == name  # of the names of a tied weight
                whole = contents.weight(saved, 0, shape.numel()).to(parameter.dtype) if is_first else found[saved]
                found[name] = whole.view(shape)
        # torch names those that the model does not have
        return found | {name: torch.empty(0) for name in contents.names - set(names.values())}

    def position(self) -> dict[str, Any]:
        """Return HiFT's entry for the client state of a checkpoint."""
        return {_STATE_KEY: {**self.place(), "rates": self.block_optimizers.rates}}

    def restore_position(self, where: str, client_state: dict[str, Any]) -> None:
        """Continue at the position in the cycle that a checkpoint's client state holds.

        Raises:
            ValueError: the checkpoint was saved without HiFT, with other blocks, or with another ``lr_ticks``.
        """
        position = client_state.pop(_STATE_KEY, None)
        if position is None:
            raise ValueError(
                f"the checkpoint in {where!r} was saved without HiFT; load only its weights with load_module_only=True"
            )
        self._check_place(where, position)  # an adopted checkpoint's manifest does not have it
        self.block_optimizers.rates = position["rates"]
        self._schedule.load_state_dict(position["position"], position["blocks"] == self.place()["blocks"])

    def memory_ledger(self, peak: bool = False) -> Ledger:
        """Return this rank's memory in bytes, counted from the live tensors.

        Args:
            peak: return the ledger at the highest device total so far. It is measured after initialization and, in the
                first two cycles, when a step's first chunk is ready to be stepped. Later cycles repeat the second.

        Returns:
            ``{"device": {...}, "host": {...}, "nvme": {...}}``, each with bytes of ``parameters``, ``gradients``,
            ``master_weights``, ``optimizer_state`` and ``buffers``. Activations and the temporary memory of kernels are
            not included. Weights in host memory that the ranks of a machine share count at its first rank.
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
            if hasattr(parameter, "ds_tensor"):
                yield Held("parameters", parameter.ds_tensor, self._gathering.is_on_host(parameter.ds_tensor))
            yield Held("gradients", parameter.grad)
            yield Held("gradients", getattr(parameter, "grad_accum", None))
        yield from self.block_optimizers.held()
        yield from (Held("buffers", buffer) for buffer in self.module.buffers())
        yield from (Held("buffers", buffer, on_host=True) for buffer in host_buffers(self.module))
        if self._host_weights is not None:
            yield from (Held("parameters", buffer, on_host=True) for buffer in self._host_weights.buffers)

    def _watch_memory(self) -> None:
        if self.cycle >= _WATCHED_CYCLES:
            return
        ledger = self._count_memory()
        # At equal totals keep the later one: once all blocks have state, the host's share of the ledger is complete.
        if device_total(ledger) >= device_total(self._peak_ledger):
            self._peak_ledger = ledger

    def _refine_include_states(self, include: Any) -> list[Any]:
        """Return what DeepSpeed's ``offload_states`` moves: not masters and state that are off the device anyway."""
        included = super()._refine_include_states(include)
        away = ("hp_params", "optim_states") if self.block_optimizers.host is not None else ()
        return [kind for kind in included if kind not in away]

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's ``offload_states``, for all blocks.

        Raises:
            RuntimeError: with ``hift.offload.weights: cpu``.
        """
        if self._host_weights is not None:
            raise RuntimeError(
                "engine.offload_states() with hift.offload.weights='cpu': the weights wait in host memory already, and "
                "the slots on the device stay where they are; leave the call out, or set hift.offload.weights='device'"
            )
        with self._all_blocks():
            super().offload_states(*args, **kwargs)

    def reload_states(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's ``reload_states``, for all blocks."""
        with self._all_blocks():
            super().reload_states(*args, **kwargs)
            self.block_optimizers.return_to_host()

    def destroy(self) -> None:
        """Release what DeepSpeed holds for all blocks. All parameters require gradients again that did before."""
        if hasattr(self, "block_optimizers"):
            self.block_optimizers.settle()
            self.optimizer = self.block_optimizers
            self._let_go()
        super().destroy()

    # ---- the active block --------------------------------------------------------------------------------------

    def _activate(self) -> None:
        """Freeze all parameters outside the scheduled block, and use the block's optimizer."""
        self._freeze_others()
        self.optimizer = self.block_optimizers.activate(self.active_block)

    def _freeze_others(self) -> None:
        """Freeze all parameters outside the scheduled block.

        Scripts undo it: PEFT lets all adapters require gradients when it turns them on again, after a forward pass of
        the model without them, which TRL takes for the reference model.
        """
        active = set(map(id, self._block_parameters[self.active_block]))
        for parameter in self._trainable:
            if parameter.requires_grad != (id(parameter) in active):
                parameter.requires_grad_(id(parameter) in active)

    def buffered_allreduce_fallback(self, *args: Any, **kwargs: Any) -> None:
        """Reduce the gradients at stage 0, if there is another rank. DeepSpeed also copies those of a single rank."""
        if dist.get_world_size(self.seq_data_parallel_group) > 1:
            super().buffered_allreduce_fallback(*args, **kwargs)

    def _clear_other_rows(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Zero the gradient's rows that the active block does not train, so that they do not count in its norm."""
        start, stop = self.blocks[self.active_block].slices[name]
        assert parameter.grad is not None
        parameter.grad[:start].zero_()
        parameter.grad[stop:].zero_()

    @contextmanager
    def _all_blocks(self) -> Iterator[None]:
        """Show all blocks to DeepSpeed as one trainable model, for operations on the whole model."""
        was_unfrozen = all(parameter.requires_grad for parameter in self._trainable)
        for parameters in self._block_parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.block_optimizers.settle()
        self.optimizer = self.block_optimizers
        try:
            yield
        finally:
            self._activate()
            if was_unfrozen:
                self.unfreeze()

    def _take_model_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        optimizers, place = self.block_optimizers, (self.active_block, self.cycle)
        if self.hift.lr_ticks == "step" and optimizers.rates is None:
            optimizers.rates = rates_of_cycle(
                optimizers.param_groups, self._given_schedule, self._schedule.steps_per_cycle
            )
        optimizers.copy_settings()
        optimizers.finish_update()
        active = self._block_parameters[self.active_block]
        if self._host_weights is not None:  # before all ranks agree on the step: see `hift_ds/weights/node.py`
            self._host_weights.before_change(active)
        scheduler, self.lr_scheduler = self.lr_scheduler, None  # it advances below
        try:
            optimizers.prepare_step(self._schedule.following_block)
            super()._take_model_step(lr_kwargs)
        except BaseException:
            if self._host_weights is not None:
                self._host_weights.unchanged(active)
            raise
        finally:
            self.lr_scheduler = scheduler
        if not self.was_step_applied():
            optimizers.report_skipped_step(f"{self.active_block} ({self.blocks[self.active_block].name})")
            if self._host_weights is not None:
                self._host_weights.unchanged(active)
                self._host_weights.prepare()
            return
        self._last_step = (self.optimizer.param_groups[0].get("lr"), *place)
        is_cycle_over = self._schedule.advance()
        if is_cycle_over:
            optimizers.rates = None
        if scheduler is not None and (is_cycle_over or self.hift.lr_ticks == "step"):
            if lr_kwargs or not needs_metrics(scheduler):
                scheduler.step(**(lr_kwargs or {}))
            elif self.hift.lr_ticks == "cycle":
                self._warn_of_missing_metric()
        self._activate()
        if self._host_weights is not None:
            self._host_weights.prepare()

    def clip_fp32_gradients(self) -> None:
        """Do nothing: the block's optimizer clips, at every stage."""

    def _get_param_fragment_func(self, param: torch.nn.Parameter) -> torch.Tensor:
        """Return the weights of a frozen parameter, for a checkpoint."""
        if self._host_weights is not None:
            self._host_weights.settle()
            return self._host_weights.of(param)
        return super()._get_param_fragment_func(param)

    # ---- initialization ----------------------------------------------------------------------------------------

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        # At ZeRO 3, partitioning moves weights to the device one by one. DeepSpeed would move the whole model before,
        # unless it was made inside `deepspeed.zero.Init`.
        self.dont_change_device |= self.zero_optimization_partition_weights()
        super()._configure_distributed_model(model)
        if self.dont_change_device:  # the weights stay where they are, and only they do
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.device)

    def _broadcast_model(self) -> None:
        if not self.dont_change_device:  # `HostWeights` or partitioning does it
            super()._broadcast_model()

    def zero_allow_untested_optimizer(self) -> bool:
        """Return True: `_per_block` checks the optimizer, and accepts more than DeepSpeed's list."""
        return True

    def optimizer_params(self) -> dict[str, Any] | None:
        """Return the parameters of the config's optimizer, for torch's Adam where there is no fused kernel."""
        params = super().optimizer_params()
        if not self._has_fused("FusedAdamBuilder"):
            if self.optimizer_name() in (ADAM_OPTIMIZER, ADAMW_OPTIMIZER):
                # torch's AdamW has weight decay by default; DeepSpeed's has none.
                return {"weight_decay": 0.0, **(params or {}), "torch_adam": True}
            if self.optimizer_name() == MUON_OPTIMIZER:  # it leaves embeddings, head and vectors to Adam
                return {**(params or {}), "torch_adam": True}
        return params

    def _has_fused(self, builder: str) -> bool:
        """Whether this run can use an optimizer kernel of DeepSpeed: of the step on the host, or this fused one."""
        return self.zero_use_cpu_optimizer() or has_fused(builder)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        if self.optimizer_name() == LION_OPTIMIZER and not self._has_fused("FusedLionBuilder"):
            return Lion(model_parameters, **(self.optimizer_params() or {}))
        return super()._configure_basic_optimizer(model_parameters)

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        super()._configure_optimizer(client_optimizer, model_parameters)
        if not isinstance(self.optimizer, BlockOptimizers):  # stage 0 in fp32: a torch optimizer
            order = list(self.module.parameters())
            make_optimizer = functools.partial(
                PlainBlockOptimizer, clip_grad=self.gradient_clipping(), mpu=self.mpu, order=order
            )
            self.optimizer = self._per_block(self.optimizer, make_optimizer, flattens=False)
        self.block_optimizers = self.optimizer

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        # torch's schedulers warn unless their optimizer has stepped. This one only carries settings and never steps.
        self.basic_optimizer._opt_called = True
        self._activate()

    def _configure_fp16_optimizer(self, optimizer: torch.optim.Optimizer, low_precision_dtype: torch.dtype) -> Any:
        """Stage 0 in bf16."""

        def make_optimizer(inner: torch.optim.Optimizer) -> Any:
            return UnfusedBlockOptimizer(
                inner,
                deepspeed=self,
                low_precision_dtype=low_precision_dtype,
                static_loss_scale=self.loss_scale(),
                mpu=self.mpu,
                clip_grad=self.gradient_clipping(),
            )

        return self._per_block(optimizer, make_optimizer, flattens=False)

    def _configure_bf16_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        # For stage 1 with bf16 weights and fp32 accumulation, DeepSpeed would allocate fp32 gradient buffers for the
        # whole model at initialization. The ZeRO optimizer computes the same without them.
        return self._configure_zero_optimizer(optimizer)

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer | None) -> Any:
        if optimizer is None:
            raise ValueError(_NO_OPTIMIZER)
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
            # Only one block's gradients are reduced at a time.
            "reduce_bucket_size": min(self.zero_reduce_bucket_size(), largest),
            "dp_process_group": self.seq_data_parallel_group,
            "reduce_scatter": self.zero_reduce_scatter(),
            "overlap_comm": self.zero_overlap_comm(),
            "offload_optimizer_config": None,  # `BlockState` brings gradients to an optimizer on the host
            "mpu": self.mpu,
            "postscale_gradients": self.postscale_gradients(),
            "gradient_predivide_factor": self.gradient_predivide_factor(),
            "gradient_accumulation_steps": self.gradient_accumulation_steps(),
            "gradient_accumulation_dtype": accumulation_dtype,
            "communication_data_type": self.communication_data_type,
        }
        if stage <= 2:

            def make_optimizer(inner: torch.optim.Optimizer) -> Any:
                return Stage12BlockOptimizer(
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
            first: Stage3BlockOptimizer | None = None
            options = self._gathering_options()

            def make_optimizer(inner: torch.optim.Optimizer) -> Any:
                nonlocal first
                block = Stage3BlockOptimizer(
                    self.module,
                    inner,
                    self.param_names,
                    first=first,
                    gathering=self._gathering,
                    prefetch_bucket_size=min(self.zero_prefetch_bucket_size(), largest),
                    param_persistence_threshold=self.zero_param_persistence_threshold(),
                    model_persistence_threshold=self.zero_model_persistence_threshold(),
                    sub_group_size=self.zero_sub_group_size(),
                    offload_ratio=self.zero_partial_offload(),
                    aio_config=self.aio_config(),
                    zero_module_granularity_threshold=self.zero_module_granularity_threshold(),
                    log_trace_cache_warnings=self.zero_log_trace_cache_warnings(),
                    enable_sanity_checks=self.is_sanity_checks_enabled(),
                    cpuadam_cores_perc=self.cpuadam_cores_perc(),
                    **options,
                    **common,
                )
                first = first or block
                return block

        made = self._per_block(optimizer, make_optimizer, flattens=True)
        trained = {id(parameter) for parameters in self._block_parameters for parameter in parameters}
        self._gathering.keep(parameter for parameter in self.module.parameters() if id(parameter) not in trained)
        return made

    def _gathering_options(self) -> dict[str, Any]:
        """Return the arguments of ZeRO 3 that say where weights wait, and how many of them are gathered.

        Of weights that wait on the host, two hidden layers are on the device, unless the config says how many.
        """
        weights, zero = self.zero_offload_param(), self._config.zero_config
        options = {
            "ds_config": self.config,
            "offload_param_config": weights,
            "max_reuse_distance": self.zero_max_reuse_distance(),
            "max_live_parameters": self.zero_max_live_parameters(),
        }
        if weights is None or weights.device != OffloadDeviceEnum.cpu:
            return options
        remedy = "use more machines, or keep the weights on the device: remove zero_optimization.offload_param"
        self._gathering = Gathering(HostMemory(weights.pin_memory, purpose="weights", remedy=remedy))
        layers = 2 * largest_hidden_layer(self.module)
        limits = {"max_reuse_distance", "max_live_parameters"} - zero.model_fields_set
        options |= dict.fromkeys(limits, layers)
        # `Gathering` page-locks the weights. DeepSpeed would page-lock other copies of them before.
        section = self.config["zero_optimization"]
        section = {**section, "offload_param": {**section["offload_param"], "pin_memory": False}}
        return {**options, "ds_config": {**self.config, "zero_optimization": section}}

    def _per_block(self, optimizer: torch.optim.Optimizer, make_optimizer: Any, flattens: bool) -> BlockOptimizers:
        """Make one optimizer for each block from the configured one.

        Args:
            optimizer: the configured optimizer.
            make_optimizer: makes a block's DeepSpeed optimizer around a torch optimizer.
            flattens: the ZeRO stage flattens parameters.

        Raises:
            ValueError: HiFT is not exact with this optimizer, or it lacks parameters of a block, or it is not
                element-wise and the ZeRO stage flattens parameters.
        """
        traits = examine(optimizer, on_host=self.zero_use_cpu_optimizer())
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
        name = type(optimizer).__name__
        if flattens and traits.shaped:
            raise ValueError(
                f"{name} is not element-wise ({traits.shaped}), and zero_optimization.stage="
                f"{self.zero_optimization_stage()} flattens and shards tensors; use stage 0, or an element-wise "
                "optimizer such as AdamW"
            )
        offload = self.hift.offload
        if traits.shaped and offload.step == "auto" and dist.get_rank() == 0:
            for setting, remedy in needs_streamed_step(vars(offload)).items():
                logger.warning(
                    f"{setting} has no effect: {name} is not element-wise ({traits.shaped}), and only the streamed "
                    f"step has slots and is deferred; {remedy}, or use an element-wise optimizer such as AdamW"
                )
        has_masters = self.zero_optimization() or self.bfloat16_enabled()
        spec = StateSpec(
            offload,
            self.blocks,
            self._block_parameters,
            type(optimizer),
            traits,
            on_host=self.zero_offload_optimizer() if self.zero_use_cpu_optimizer() else None,
            dtypes=self.get_data_types(),
            ranks=self.dp_world_size if self.zero_optimization() else 1,
            has_masters=has_masters,
        )
        placed = place_state(spec, self.aio_config(), self._page_locked_weights())
        formats = {name: codec for name, codec in placed.get("codecs", {}).items() if name is not None}
        self._saved_per_element = bytes_in_store(formats, traits) - (0 if has_masters else 4)  # masters are in fp32
        if self.hift.offload.weights == "cpu":
            self._host_weights = HostWeights(self.module, self.device, self.hift.offload.pins)
            make_optimizer = functools.partial(_make_on_host, self._host_weights, make_optimizer, flattens)
        if self.zero_optimization_stage() == 3:  # DeepSpeed gathers weights ahead of the layers that use them
            placed["defer"] = False
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        made = BlockOptimizers(
            optimizer, self._block_parameters, make_optimizer, counted=traits.counted, names=names, **placed
        )
        if self._host_weights is not None:
            self._host_weights.start(made.staging)
        return_freed_memory()  # DeepSpeed flattens weights in host memory
        return made

    def _page_locked_weights(self) -> int:
        """Return the bytes of weights that wait in page-locked memory of this rank."""
        weights = self.zero_offload_param() if self.zero_optimization_stage() == 3 else None
        if weights is not None and weights.device == OffloadDeviceEnum.cpu and weights.pin_memory:
            ranks = self.dp_world_size
        elif self.hift.offload.weights == "cpu" and self.hift.offload.pins:
            ranks = 1
        else:
            return 0
        return sum(-(-numel_of(p) // ranks) * p.element_size() for p in self.module.parameters())

    def _step_timers(self) -> Any:
        return self.timers if self.wall_clock_breakdown() else NoopTimer()

    def _warn_of_missing_metric(self) -> None:
        """Warn once that the schedule follows a metric, and that the engine got none at the end of a cycle."""
        if self.cycle == 1 and dist.get_rank() == 0:
            name = type(self._given_schedule).__name__
            logger.warning(
                f"the engine does not advance {name}, which follows a metric: engine.step() received none at the end "
                "of the cycle. Call engine.step(lr_kwargs={'metrics': value}), or set hift.lr_ticks='step' and call "
                "scheduler.step(value) after each evaluation"
            )

    def _warn_of_long_schedule(self) -> None:
        """Warn if the learning-rate schedule has an end and counts cycles, not steps."""
        if self.hift.lr_ticks == "step":
            return
        attributes = ("total_num_steps", "total_steps", "total_iters", "T_max")
        ticks = next((v for name in attributes if isinstance(v := getattr(self.lr_scheduler, name, None), int)), None)
        if ticks and dist.get_rank() == 0 and self._schedule.steps_per_cycle > 1:
            logger.warning(
                f"the learning-rate schedule of {ticks} ticks advances once per cycle: it ends after "
                f"{ticks * self._schedule.steps_per_cycle} steps, not after {ticks}. For a run of N steps, give it "
                f"ceil(N / {self._schedule.steps_per_cycle}) ticks, or set hift.lr_ticks='step'"
            )


def _shown_cut(place: Mapping[str, Any]) -> str:
    blocks, position = place["blocks"], place["position"]
    shown = ", ".join(f"{name} ({numel})" for name, numel in blocks[:3])
    order = f"order {', '.join(map(str, position['order'][:3]))}{' ...' if len(position['order']) > 3 else ''}"
    return (
        f"{len(blocks)} blocks: {shown}{' ...' if len(blocks) > 3 else ''}, in the {order}, "
        f"steps_per_block={position['steps_per_block']}"
    )
