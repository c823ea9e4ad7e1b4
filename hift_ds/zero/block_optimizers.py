"""The optimizers of all blocks as one: which is active, what reaches all of them, and what is saved.

Not one name of DeepSpeed's inside: ``zero.py`` has those.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import log_dist

from hift_ds.optim.properties import restrict
from hift_ds.state.ledger import Held
from hift_ds.state.step import BlockState
from hift_ds.state.transfer import HostMemory, Staging
from hift_ds.zero.optimizers import LISTS_OF_ALL, METHODS_OF_ALL, held, whole_state


class BlockOptimizers:
    """The optimizers of all blocks, behind the interface of one.

    What users and schedulers see as the optimizer: its ``param_groups`` are those of the optimizer that was
    configured, over all parameters, and their settings (learning rate ...) reach a block when it steps. Anything else
    that is asked of it, the active block's optimizer answers.

    Args:
        configured: the torch optimizer over all parameters; it carries settings and is never stepped.
        parameters: for each block, what it trains.
        wrap: makes DeepSpeed's optimizer for a block around a torch one.
        parts: for each block None, or the first and last (exclusive) element of its only parameter that it trains.
            Blocks that share a parameter share DeepSpeed's optimizer.
        host: where masters and state live, but for the time of a step. None: where DeepSpeed keeps them.
        slice_bytes: of the streamed step; None: the whole block's state comes to the device at once.
        per_element: bytes of master and state of an element; with ``slice_bytes`` it says how many fill a slice.
        prefetch: let state travel before the step.
    """

    def __init__(
        self,
        configured: torch.optim.Optimizer,
        parameters: Sequence[Sequence[torch.nn.Parameter]],
        wrap: Callable[[torch.optim.Optimizer], Any],
        parts: Sequence[tuple[int, int] | None],
        host: HostMemory | None,
        slice_bytes: int | None = None,
        per_element: int = 0,
        prefetch: bool = True,
    ):
        self.optimizer = configured
        configured.state.clear()  # Adagrad makes its state at once, and for the whole model
        self.host = host
        self.owners: list[Any] = []  # DeepSpeed's optimizers
        self._place: list[tuple[int, int]] = []  # of each block: its owner, and which part of that it is
        self._prefetch = prefetch and host is not None
        self._streamed = slice_bytes is not None
        self._invalid_loss: torch.Tensor | None = None  # one flag, on the device
        self._sources: list[list[int]] = []
        staging = None
        cuts: list[list[tuple[int, int]]] = []  # by owner
        owned: list[Sequence[torch.nn.Parameter]] = []
        for members, part in zip(parameters, parts, strict=True):
            if part is None or not (owned and owned[-1][0] is members[0]):
                owned.append(members)
                cuts.append([])
            if part is not None:
                cuts[-1].append(part)
            self._place.append((len(owned) - 1, max(len(cuts[-1]) - 1, 0)))
        for members, cut in zip(owned, cuts, strict=True):
            inner, sources = restrict(configured, members)
            # DeepSpeed hooks what is trainable now. A block's state leaves the device before the next one's.
            for parameter in members:
                parameter.requires_grad_(True)
            block = wrap(inner)
            for parameter in members:
                parameter.requires_grad_(False)
            if host is not None:
                if staging is None:
                    device = torch.device(get_accelerator().current_device_name())
                    staging = Staging(device, slice_bytes, host.direct)
                block.offloaded = BlockState(block, host, staging, per_element, cut)
                if hasattr(block, "relink"):
                    block.relink()
            self.owners.append(block)
            self._sources.append(sources)
            self._share()
        if hasattr(self.owners[0], "share_host_buffers"):
            self.owners[0].share_host_buffers(self.owners)
        self.staging = staging
        self.active = 0

    def _share(self) -> None:
        """Give all blocks the one loss scale, and the largest block's gradient buffers."""
        for attribute in ("loss_scaler", "loss_scale_config"):
            if hasattr(self.owners[0], attribute):
                for block in self.owners:
                    setattr(block, attribute, getattr(self.owners[0], attribute))
        if hasattr(self.owners[0], "share_buffers"):
            largest = max(self.owners, key=lambda block: block.staging_numel())
            for block in self.owners:
                block.share_buffers(largest)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "owners" not in self.__dict__:
            raise AttributeError(name)
        if name in LISTS_OF_ALL:
            return [entry for block in self.owners for entry in getattr(block, name)]
        if name in METHODS_OF_ALL:
            methods = [getattr(block, name) for block in self.owners]

            def call_all(*args: Any, **kwargs: Any) -> None:
                for method in methods:
                    method(*args, **kwargs)

            return call_all
        return getattr(self._owner, name)

    @property
    def _owner(self) -> Any:
        return self.owners[self._place[self.active][0]]

    def activate(self, index: int) -> Any:
        """Make a block the active one; returns its optimizer, with the current settings."""
        if index != self.active and self._owner.offloaded is not None:
            self._owner.offloaded.forget()
        if hasattr(self._owner, "set_active"):
            self._owner.set_active(False)
        self.active = index
        if hasattr(self._owner, "set_active"):
            self._owner.set_active(True)
        if self._owner.offloaded is not None:
            self._owner.offloaded.select(self._place[index][1])
        self.copy_settings()
        if self._streamed:  # two slices, whose places on the device are taken in any case
            self.prefetch()
        return self._owner

    def copy_settings(self) -> None:
        """Copy learning rate, weight decay ... of the configured optimizer to the active block's."""
        groups = self._owner.optimizer.param_groups
        for group, source in zip(groups, self._sources[self._place[self.active][0]], strict=True):
            settings = self.optimizer.param_groups[source]
            group.update({key: value for key, value in settings.items() if key != "params"})

    def prefetch(self) -> None:
        """Let the active block's state begin to travel to the device, as far as there is a place for it.

        A whole block's state would stand on top of the activations: with ``offload.step: block`` this is to be called
        after the backward pass.
        """
        if self._prefetch:
            self._owner.offloaded.prefetch()

    def watch_loss(self, loss: torch.Tensor) -> None:
        """Remember whether a micro-batch's loss is finite. Nothing waits for the device here."""
        invalid = loss.detach().isfinite().all().logical_not().reshape(1)
        self._invalid_loss = invalid if self._invalid_loss is None else self._invalid_loss | invalid

    def agree_on_loss(self) -> None:
        """Before a step: let the active block's optimizer skip it if a loss on any rank was not finite.

        Gradients need no such word: a step comes after their reduction, and all ranks see the same norm of them.
        """
        flag, self._invalid_loss = self._invalid_loss, None
        if flag is None:  # backward passes that did not go through the engine
            flag = torch.zeros(1, dtype=torch.bool, device=get_accelerator().current_device_name())
        flag = flag.float()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._owner.invalid_loss = bool(flag)

    def skipped(self, block: str) -> None:
        """After a step that was not taken: say so, unless fp16's loss scale was only too high."""
        if self._owner.invalid_loss or getattr(self._owner, "dtype", None) != torch.float16:
            what = "the loss is" if self._owner.invalid_loss else "gradients are"
            log_dist(f"{what} not finite: no rank updates block {block}", ranks=[0], level=logging.WARNING)
        if not self._streamed and self._owner.offloaded is not None:
            self._owner.offloaded.forget()  # a whole block's state is not to wait on top of the next activations

    def held(self) -> Iterator[Held]:
        """All tensors that the blocks' optimizers keep, but the weights."""
        for block in self.owners:
            yield from held(block)
            if block.offloaded is not None:
                yield from (Held("gradients", t) for name, t in block.offloaded.under_way if name == "gradients")
        if self.staging is not None:
            yield from (Held("buffers", slot.area) for slot in self.staging.slots)
        if self.host is not None and self.host.direct is not None:
            yield from (Held("buffers", buffer, on_host=True) for buffer in self.host.direct.buffers)

    def staged(self) -> Iterator[tuple[str, int]]:
        """Category and bytes of what stands in the staging areas now, during a step."""
        for block in self.owners:
            if block.offloaded is not None:
                yield from ((name, t.nbytes) for name, t in block.offloaded.under_way if name != "gradients")

    def settle(self) -> None:
        """Wait until the state of all blocks is in host memory; what was fetched ahead is dropped."""
        for block in self.owners:
            if block.offloaded is not None:
                block.offloaded.settle()

    def return_to_host(self) -> None:
        """Put back where it belongs what others have moved or replaced."""
        for block in self.owners:
            if block.offloaded is not None:
                block.offloaded.to_host()
            if hasattr(block, "relink"):
                block.relink()

    def state_dict(self) -> dict[str, Any]:
        """All blocks' state, on one rank."""
        self.settle()
        blocks = [block.state_dict() for block in self.owners]
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        counts = [owner.offloaded.counts() if owner.offloaded is not None else [] for owner in self.owners]
        return {**whole_state(blocks), "blocks": blocks, "settings": settings, "counts": counts}

    def load_state_dict(self, state_dict: Any = None, *, state_dict_list: Any = None, **options: Any) -> None:
        """Restore all blocks' state, from one state dict or (ZeRO) from the list with one entry a rank."""
        self.settle()
        saved = state_dict if state_dict is not None else next(entry for entry in state_dict_list if entry)
        if "blocks" not in saved or len(saved["blocks"]) != len(self.owners):
            count = len(saved["blocks"]) if "blocks" in saved else "no"
            raise ValueError(
                f"the checkpoint holds {count} blocks of optimizer state, this run has {len(self.owners)}; resume "
                "with the layers_per_block, max_block_numel, balance and freeze it was saved with, or load with "
                "load_optimizer_states=False"
            )
        for index, block in enumerate(self.owners):
            if state_dict_list is not None:
                entries = [entry and entry["blocks"][index] for entry in state_dict_list]
                block.load_state_dict(state_dict_list=entries, **options)
            else:
                block.load_state_dict(saved["blocks"][index], **options)
        self.return_to_host()
        if options.get("load_optimizer_states", True):
            for owner, counts in zip(self.owners, saved["counts"], strict=True):
                if owner.offloaded is not None:
                    owner.offloaded.load_counts(counts)
            for group, settings in zip(self.optimizer.param_groups, saved["settings"], strict=True):
                group.update(settings)
        self._share()
