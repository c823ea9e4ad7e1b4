"""All blocks' optimizers behind the interface of one: which is active, what reaches all of them, and what is saved."""

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import log_dist

from hift_ds.optim.properties import restrict
from hift_ds.state.allocator import HostMemory
from hift_ds.state.codec import Codec
from hift_ds.state.host_step import HostStep
from hift_ds.state.ledger import Held
from hift_ds.state.saved import SavedState, Span
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import Staging
from hift_ds.zero.base import BlockOptimizer

# DeepSpeed's attributes that describe all blocks, and its methods that must reach all blocks.
_LISTS_OF_ALL = ("round_robin_bit16_groups", "bit16_groups", "fp16_groups", "bf16_groups")
_METHODS_OF_MASTERS = ("refresh_fp32_params", "_restore_from_bit16_weights")
_METHODS_OF_ALL = ("destroy", *_METHODS_OF_MASTERS, "offload_states", "reload_states")
# Classes with the same state: on the device in torch or by a kernel, and on the host.
# DeepSpeed's Lion and Adagrad on the host keep other state than those on the device.
_SAME_STATE = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}
# Settings of a parameter group that say how this run computes: they stay when a checkpoint is loaded.
_OF_THIS_RUN = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}


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
        names: of the parameters, by ``id``.

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
        names: Mapping[int, str] | None = None,
    ):
        self.optimizer = configured
        self._names, self._counted = dict(names or {}), frozenset(counted)
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
        """Return all blocks' state on this rank, by parameter name, and what DeepSpeed's tools read."""
        self.settle()
        masters: list[dict[str, Any]] = []
        of_zero: list[dict[str, Any]] = []
        for block in self.optimizers:
            with block.decoded(changes=False, folder=self.scratch_folder):
                found = block.block_state.saved(self._spans(block), self._counted_by(block), block.saves_masters)
                masters += [master.entry() for master in found]
                of_zero.append(block.entries_of_zero())
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        return {
            **_of_all(of_zero),
            "masters": masters,
            "optimizer": type(self.optimizer).__name__,
            "settings": settings,
            "loss_scaler": getattr(self.optimizers[0], "loss_scaler", None),
        }

    def check_state(self, entries: Sequence[dict[str, Any]]) -> None:
        """Check that this run can continue with the state in a checkpoint. Nothing is changed.

        Args:
            entries: what :meth:`state_dict` returned on each rank that saved.

        Raises:
            ValueError: there is no state of some parameter, or it cannot be cut as here.
        """
        self._read(entries)

    def load_state_dict(
        self,
        state_dict: Any = None,
        *,
        state_dict_list: Sequence[dict[str, Any]] | None = None,
        load_from_fp32_weights: bool = True,
        **_: Any,
    ) -> None:
        """Load all blocks' state, which any number of ranks, ZeRO stage and blocks may have saved.

        Args:
            state_dict: what :meth:`state_dict` returned, if there is only one.
            state_dict_list: what it returned on each rank that saved.
            load_from_fp32_weights: False: the masters become the weights.

        Raises:
            ValueError: there is no state of some parameter, or it cannot be cut as here. Nothing is changed then.
        """
        entries = state_dict_list or [state_dict]
        saved, spans = self._read(entries)
        recount = functools.partial(_as_counted_by, type(self.optimizer))
        anew = [
            block.load(saved, own, self._counted_by(block), load_from_fp32_weights, recount)
            for block, own in zip(self.optimizers, spans, strict=True)
        ]
        if saved.encoded != (now := self._formats()):
            self._log(f"the checkpoint keeps {_named(saved.encoded)} in fewer bits, this run {_named(now)}: converted")
        elif any(anew):
            self._log("8-bit moments are quantized again for the new blocks or ranks; their values differ slightly")
        for group, settings in zip(self.optimizer.param_groups, entries[0]["settings"], strict=True):
            group.update({key: value for key, value in settings.items() if key not in _OF_THIS_RUN})
        if entries[0]["loss_scaler"] is not None and hasattr(self.optimizers[0], "loss_scaler"):
            self.optimizers[0].loss_scaler = entries[0]["loss_scaler"]
        self._share_between_blocks()

    def _read(self, entries: Sequence[dict[str, Any]]) -> tuple[SavedState, list[list[list[Span]]]]:
        """Return the state in a checkpoint, and what each master of each block holds here."""
        saved = SavedState.read(entries)
        spans = [self._spans(block) for block in self.optimizers]
        if problems := self._problems(entries[0], saved, spans):
            raise ValueError(f"the optimizer state in the checkpoint does not fit: {'; '.join(problems)}")
        return saved, spans

    def _problems(
        self, entry: dict[str, Any], saved: SavedState, spans: Sequence[Sequence[Sequence[Span]]]
    ) -> list[str]:
        """Return why this run cannot continue with a checkpoint's state."""
        problems, ours, theirs = [], type(self.optimizer), entry["optimizer"]
        if theirs != ours.__name__ and not {theirs, ours.__name__} <= _SAME_STATE:
            problems.append(
                f"it is state of {theirs}, and this run uses {ours.__name__}; use the same optimizer and the same "
                "zero_optimization.offload_optimizer"
            )
        if (count := len(entry["settings"])) != (own := len(self.optimizer.param_groups)):
            problems.append(f"it has {count} parameter groups, and this run has {own}; use the same groups")
        trained = {span.name for of_block in spans for of_master in of_block for span in of_master}
        for names, where in ((trained - saved.names, "the run that saved it"), (saved.names - trained, "this run")):
            if names:
                problems.append(
                    f"{len(names)} parameters, such as {min(names)}, are in no block of {where}; use the same model "
                    "and hift.freeze"
                )
        if problems:
            return problems
        for block, of_block in zip(self.optimizers, spans, strict=True):
            for (master, _), of_master in zip(block.masters(), of_block, strict=True):
                problems += saved.problems(of_master, master.numel())
        if not problems:
            try:
                for block, of_block in zip(self.optimizers, spans, strict=True):
                    block.block_state.check_counts(saved, of_block)
            except ValueError as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))

    def _spans(self, block: Any) -> list[list[Span]]:
        """Return what each master of a block's optimizer holds, by parameter name."""
        return [
            [Span(self._names[id(parameter)], *place) for parameter, *place in block.elements(index)]
            for index in range(len(block.masters()))
        ]

    def _counted_by(self, block: Any) -> set[str]:
        """Return the settings in which a block's torch optimizer counts: some make them in their first step."""
        own = {key for group in block.optimizer.param_groups for key in group}
        configured = {key for group in self.optimizer.param_groups for key in group}
        return {*(own - configured), *self._counted}

    def _log(self, text: str) -> None:
        log_dist(text, ranks=[0], level=logging.WARNING)

    def _formats(self) -> list[str]:
        """Return the names of the state that a checkpoint holds in another format. Masters are in fp32 there."""
        return sorted(name for name in self._codecs if name is not None)


def _as_counted_by(optimizer: type, counts: dict[str, Any]) -> dict[str, Any]:
    """Return counts as an optimizer class keeps them: torch's Adam in a tensor, and DeepSpeed's in a number."""
    if optimizer.__name__ not in _SAME_STATE:
        return dict(counts)
    in_torch, number = optimizer.__module__.startswith("torch."), float(counts["step"])
    return {**counts, "step": torch.tensor(number, dtype=torch.float32) if in_torch else int(number)}


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) or "no optimizer state"


def _of_all(of_blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries of all blocks that DeepSpeed's ``zero_to_fp32.py`` reads, as those of one optimizer.

    They refer to the same tensors as the masters, so the file does not grow.
    """
    merged = dict(of_blocks[0])
    for name, value in merged.items():
        if isinstance(value, list):
            merged[name] = [entry for of_block in of_blocks for entry in of_block[name]]
    return merged
