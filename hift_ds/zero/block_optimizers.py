"""All blocks' optimizers behind the interface of one: which is active, what reaches all of them, and what is saved."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import log_dist
from torch.utils._pytree import tree_map_only

from hift_ds.optim.properties import restrict
from hift_ds.state.allocator import HostMemory
from hift_ds.state.codec import Codec
from hift_ds.state.host_step import HostStep
from hift_ds.state.ledger import Held
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import Staging
from hift_ds.zero.base import BlockOptimizer

# DeepSpeed's attributes that describe all blocks, and its methods that must reach all blocks.
_LISTS_OF_ALL = ("round_robin_bit16_groups", "bit16_groups", "fp16_groups", "bf16_groups")
_METHODS_OF_MASTERS = ("refresh_fp32_params", "_restore_from_bit16_weights")
_METHODS_OF_ALL = ("destroy", *_METHODS_OF_MASTERS, "offload_states", "reload_states")


class BlockOptimizers:
    """The optimizers of all blocks, behind the interface of one.

    Users and schedulers see this as the optimizer. Its ``param_groups`` are those of the configured optimizer, over all
    parameters. Their settings (learning rate, weight decay ...) reach a block when it steps. The active block's
    optimizer answers all other attribute accesses.

    Args:
        configured: the torch optimizer over all parameters. It carries settings and never steps.
        parameters: the parameters of each block.
        make_optimizer: makes the DeepSpeed optimizer of a block around a torch optimizer.
        slices: for each block None, or the first and last (exclusive) element of its only parameter that it trains.
            Blocks that share a parameter share an optimizer.
        host: the store of masters and state, except during a step. None: they stay on the device.
        chunk_bytes: size of a slot for the streamed step; None: a block's whole state comes to the device at once.
        bytes_per_element: bytes of the master and state of one element in a slot; with ``chunk_bytes`` it gives the
            number of elements in a chunk.
        prefetch: start to copy state to the device before the step.
        state: name and dtype of the tensors of state that the torch optimizer makes, for their buffers.
        slots: number of slots for the streamed step.
        defer: let the device do the streamed step during the next forward pass.
        on_host: the torch optimizer computes on the host, through these areas; None: it computes on the device.
        counted: settings in which the torch optimizer counts, such as its steps. Each block counts for itself.
        codecs: the format in the store of the masters (None) and of state by name; all others are kept as they are.
        weights_on_host: the weights are in host memory, and travel with the state.

    Attributes:
        optimizer: the configured optimizer.
        optimizers: the optimizers of the blocks, without repetition.
        active: index of the active block.
        rates: for each parameter group of ``optimizer``, the learning rate that blocks use instead of its own; None:
            its own.
        staging: the staging memory on the device.
        scratch_folder: for files that hold decoded masters while a checkpoint is saved; None: they are in memory.
    """

    def __init__(
        self,
        configured: torch.optim.Optimizer,
        parameters: Sequence[Sequence[torch.nn.Parameter]],
        make_optimizer: Callable[[torch.optim.Optimizer], Any],
        slices: Sequence[tuple[int, int] | None],
        host: HostMemory | None,
        chunk_bytes: int | None = None,
        bytes_per_element: float = 0,
        prefetch: bool = True,
        state: Sequence[tuple[str, torch.dtype]] = (),
        slots: int = 2,
        defer: bool = False,
        on_host: HostStep | None = None,
        counted: Collection[str] = (),
        codecs: Mapping[str | None, Codec] | None = None,
        weights_on_host: bool = False,
    ):
        self.optimizer = configured
        configured.state.clear()  # Adagrad makes its state at construction, here for the whole model
        self.host = host
        self.optimizers: list[Any] = []
        self._places: list[tuple[int, int]] = []  # for each block: index of its optimizer, index of its slice there
        self._on_host = on_host
        self._prefetch = prefetch and host is not None and on_host is None
        self._own_settings = {"params", *counted}
        self._codecs = dict(codecs or {})
        for codec in self._codecs.values():
            codec.prepare(torch.device(get_accelerator().current_device_name()))
        self._streamed = chunk_bytes is not None
        self._invalid_loss: torch.Tensor | None = None  # one flag, on the device
        self._sources: list[list[int]] = []  # for each optimizer: where in `configured` its parameter groups come from
        device = torch.device(get_accelerator().current_device_name())
        direct = host.direct if host is not None else None
        self.staging = Staging(device, chunk_bytes, direct, slots, defer and self._streamed and direct is None)
        owned: list[Sequence[torch.nn.Parameter]] = []  # for each optimizer: its parameters,
        slices_of: list[list[tuple[int, int]]] = []  # and the slices of the blocks that share it
        for members, cut in zip(parameters, slices, strict=True):
            if cut is None or not (owned and owned[-1][0] is members[0]):
                owned.append(members)
                slices_of.append([])
            if cut is not None:
                slices_of[-1].append(cut)
            self._places.append((len(owned) - 1, max(len(slices_of[-1]) - 1, 0)))
        for members, cuts in zip(owned, slices_of, strict=True):
            inner, sources = restrict(configured, members)
            # DeepSpeed adds hooks to the parameters that require a gradient now. The state of this block leaves the
            # device before DeepSpeed makes the next block's.
            for parameter in members:
                parameter.requires_grad_(True)
            block: BlockOptimizer = make_optimizer(inner)
            for parameter in members:
                parameter.requires_grad_(False)
            stepped: Any = block
            block.block_state = BlockState(
                stepped,
                host,
                self.staging,
                bytes_per_element,
                cuts,
                state,
                on_host,
                codecs,
                weights_on_host,
                block.replicas,
            )
            block.relink()
            self.optimizers.append(block)
            self._sources.append(sources)
            self._share_between_blocks()
        if on_host is not None:
            on_host.allocate()
        self.active = 0
        self.rates: list[Any] | None = None
        self.scratch_folder: str | None = None

    def _share_between_blocks(self) -> None:
        """Let all blocks use one loss scale, and the largest block's gradient buffers."""
        for attribute in ("loss_scaler", "loss_scale_config"):
            if hasattr(self.optimizers[0], attribute):
                for block in self.optimizers:
                    setattr(block, attribute, getattr(self.optimizers[0], attribute))
        largest = max(self.optimizers, key=lambda block: block.staging_numel())
        for block in self.optimizers:
            block.share_buffers(largest)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the configured optimizer."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The default settings of the configured optimizer, which some schedules read."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "optimizers" not in self.__dict__:
            raise AttributeError(name)
        if name in _LISTS_OF_ALL:
            return [entry for block in self.optimizers for entry in getattr(block, name)]
        if name in _METHODS_OF_ALL:
            methods = [getattr(block, name) for block in self.optimizers]

            def call_all(*args: Any, **kwargs: Any) -> None:
                for block, method in zip(self.optimizers, methods, strict=True):
                    with block.decoded() if name in _METHODS_OF_MASTERS else nullcontext():
                        method(*args, **kwargs)

            return call_all
        return getattr(self._active_optimizer, name)

    @property
    def _active_optimizer(self) -> Any:
        return self.optimizers[self._places[self.active][0]]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to step: the engine has the gradients' norm, the rate and the turn of the next block.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "optimizer.step() was called without the engine, and the next block would never get its turn: call "
            "engine.step() instead (in Lightning's Fabric: fabric.strategy.model.step())"
        )

    def activate(self, index: int) -> Any:
        """Activate a block.

        Args:
            index: of the block.

        Returns:
            The block's optimizer, with the current settings.
        """
        if index != self.active and not self.staging.is_late:  # a late update still needs its chunks
            self._active_optimizer.block_state.discard_prefetched()
        self._active_optimizer.set_active(False)
        self.active = index
        self._active_optimizer.set_active(True)
        self._active_optimizer.block_state.select(self._places[index][1])
        self.copy_settings()
        if self._streamed:  # the slots have their memory on the device in any case
            self.prefetch()
        elif self._prefetch:
            self._active_optimizer.block_state.read_ahead()
        return self._active_optimizer

    def copy_settings(self) -> None:
        """Copy learning rate, weight decay ... from the configured optimizer to the active block's."""
        groups = self._active_optimizer.optimizer.param_groups
        for group, source in zip(groups, self._sources[self._places[self.active][0]], strict=True):
            settings = {k: v for k, v in self.optimizer.param_groups[source].items() if k not in self._own_settings}
            if self.rates is not None and self.rates[source] is not None:
                settings["lr"] = self.rates[source]
            rate = group.get("lr")
            if torch.is_tensor(rate) and not torch.is_tensor(settings["lr"]):
                # A schedule may replace a rate that is a tensor by a number, and torchao's optimizers need the tensor.
                self.staging.uses(rate)
                settings["lr"] = torch.full_like(rate, settings["lr"])
            group.update(settings)

    def prefetch(self) -> None:
        """Start to copy the active block's state to the device, as far as the slots have room.

        With ``offload.step: block`` call this after the backward pass: before it, the whole block's state would add to
        the activations.
        """
        if self._prefetch and not self.staging.is_late:  # a late update fetches, too
            self._active_optimizer.block_state.prefetch()

    def watch_loss(self, loss: torch.Tensor) -> None:
        """Record whether a micro-batch's loss is finite. The host does not wait for the device."""
        invalid = loss.detach().isfinite().all().logical_not().reshape(1)
        self._invalid_loss = invalid if self._invalid_loss is None else self._invalid_loss | invalid

    def prepare_step(self, following: int) -> None:
        """Before a step: agree with all ranks on whether a loss was non-finite, and tell the step what comes next.

        Gradients need no such agreement: they are reduced before the step, so all ranks see the same norm.

        Args:
            following: index of the block that the step after this one trains.
        """
        self.staging.finish_update()
        self.staging.updating = self.active
        self._active_optimizer.following = None
        if self._streamed and self._prefetch:
            place, part = self._places[following]
            state = self.optimizers[place].block_state
            if state is not self._active_optimizer.block_state:
                state.select(part)
                self._active_optimizer.following = state
        flag, self._invalid_loss = self._invalid_loss, None
        if flag is None:  # the backward passes did not go through the engine
            flag = torch.zeros(1, dtype=torch.bool, device=get_accelerator().current_device_name())
        if dist.get_world_size() > 1:
            flag = flag.float()
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._active_optimizer.invalid_loss = flag.bool()

    def report_skipped_step(self, block: str) -> None:
        """Log why a step was skipped, unless only fp16's loss scale was too high.

        Args:
            block: index and name of the block, for the message.
        """
        active = self._active_optimizer
        is_loss_invalid = bool(active.invalid_loss)
        if is_loss_invalid or getattr(active, "dtype", None) != torch.float16:
            what = "loss" if is_loss_invalid else "gradients"
            log_dist(f"non-finite {what}: no rank updates block {block}", ranks=[0], level=logging.WARNING)
        if not self._streamed:
            active.block_state.discard_prefetched()  # a whole block's state must not add to the next activations

    def held(self) -> Iterator[Held]:
        """Yield all tensors that the optimizers and the staging keep, except the weights."""
        for block in self.optimizers:
            yield from block.held()
            yield from (Held("gradients", t) for name, t in block.block_state.staged if name == "gradients")
            yield from (Held("gradients", part) for part in block.block_state.held_gradients())
        yield from (Held("buffers", slot.area) for slot in self.staging.slots)
        if self._on_host is not None:
            yield from map(Held, ("gradients", "buffers"), self._on_host.areas())
        if self.host is not None and self.host.direct is not None:
            yield from (Held("buffers", buffer, on_host=True) for buffer in self.host.direct.buffers)

    def staged(self) -> Iterator[tuple[str, int]]:
        """Yield category and bytes of what the slots hold now, during a step."""
        for block in self.optimizers:
            yield from ((name, t.nbytes) for name, t in block.block_state.staged if name != "gradients")

    def settle_block(self, index: int) -> None:
        """Wait until the state of a block is in the store, and discard what was fetched of it."""
        self.optimizers[self._places[index][0]].settle()

    def weights_changed(self, index: int) -> None:
        """Let a block's masters be its weights, if the store keeps only what the weights lack of them."""
        self.optimizers[self._places[index][0]].block_state.weights_changed()

    def finish_update(self) -> None:
        """Let what the device computes next wait for the last step's update."""
        self.staging.finish_update()

    def settle(self) -> None:
        """Wait until the state of all blocks is in host memory, and discard prefetched chunks."""
        for block in self.optimizers:
            block.settle()

    def return_to_host(self) -> None:
        """Restore the placement of state after DeepSpeed moved or replaced tensors."""
        for block in self.optimizers:
            block.block_state.to_host()
            block.relink()

    def state_dict(self) -> dict[str, Any]:
        """Return all blocks' state on this rank."""
        self.settle()
        blocks = []
        for block in self.optimizers:
            with block.decoded(changes=False, folder=self.scratch_folder):
                blocks.append(_snapshot(block.state_dict()) if block.block_state.is_encoded else block.state_dict())
        encoded = [block.block_state.encoded_state() for block in self.optimizers]
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        counts = [block.block_state.step_counts() for block in self.optimizers]
        entries = {"blocks": blocks, "settings": settings, "counts": counts}
        return {**_masters_of_all(blocks), **entries, "encoded": encoded, "formats": self._formats()}

    def load_state_dict(self, state_dict: Any = None, *, state_dict_list: Any = None, **options: Any) -> None:
        """Load all blocks' state.

        Args:
            state_dict: what :meth:`state_dict` returned (stage 0).
            state_dict_list: the same of every rank (ZeRO stages 1 to 3).
            options: DeepSpeed's own, such as ``load_optimizer_states``.

        Raises:
            ValueError: the checkpoint holds another number of blocks.
        """
        self.settle()
        saved = state_dict if state_dict is not None else next(entry for entry in state_dict_list if entry)
        if "blocks" not in saved or len(saved["blocks"]) != len(self.optimizers):
            count = len(saved["blocks"]) if "blocks" in saved else "no"
            raise ValueError(
                f"the checkpoint holds {count} blocks of optimizer state, this run has {len(self.optimizers)}; resume "
                "with the layers_per_block, max_block_numel, balance and freeze of the run that saved it, or load "
                "with load_optimizer_states=False"
            )
        loads_state = options.get("load_optimizer_states", True)
        encoded = self._encoded_state(saved, state_dict_list) if loads_state else None
        for index, block in enumerate(self.optimizers):
            with block.decoded():
                if state_dict_list is not None:
                    entries = [entry and entry["blocks"][index] for entry in state_dict_list]
                    block.load_state_dict(state_dict_list=entries, **options)
                else:
                    block.load_state_dict(saved["blocks"][index], **options)
                if encoded is not None:
                    block.block_state.load_encoded_state(encoded[index])
        self.return_to_host()
        if loads_state:
            for block, counts in zip(self.optimizers, saved["counts"], strict=True):
                block.block_state.load_step_counts(counts)
            for group, settings in zip(self.optimizer.param_groups, saved["settings"], strict=True):
                group.update(settings)
        self._share_between_blocks()

    def _encoded_state(self, saved: dict[str, Any], of_ranks: Any) -> list[Any]:
        """Return the encoded state of this rank for each block, and log if this run keeps state in other formats."""
        if of_ranks is not None:
            saved = of_ranks[dist.get_rank(group=self._active_optimizer.dp_process_group)] or saved
        before, now = saved.get("formats", []), self._formats()
        if before != now:
            log_dist(
                f"the checkpoint keeps {_named(before)} in fewer bits, this run {_named(now)}: converted",
                ranks=[0],
                level=logging.WARNING,
            )
        return saved.get("encoded") or [[] for _ in self.optimizers]

    def _formats(self) -> list[str]:
        """Return the names of the state that a checkpoint holds in another format. Masters are in fp32 there."""
        return sorted(name for name in self._codecs if name is not None)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) or "no optimizer state"


def _snapshot(state: Any) -> Any:
    """Return state with tensors that keep their values when a parameter's ``data`` is replaced."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, state)


def _masters_of_all(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries of ZeRO state that DeepSpeed's ``zero_to_fp32.py`` reads from a checkpoint.

    They refer to the same tensors as the blocks' own state dicts, so the file does not grow. Stage 0 needs none.
    """
    if "zero_stage" not in blocks[0]:
        return {}
    entries = {key: blocks[0][key] for key in ("zero_stage", "partition_count")}
    masters = "single_partition_of_fp32_groups" if entries["zero_stage"] <= 2 else "fp32_flat_groups"
    entries[masters] = [master for block in blocks for master in block[masters]]
    if isinstance(entries["partition_count"], list):
        entries["partition_count"] = [count for block in blocks for count in block["partition_count"]]
    return entries
