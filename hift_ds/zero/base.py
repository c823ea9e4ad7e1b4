"""What the optimizers of single blocks share at every ZeRO stage.

DeepSpeed's optimizers assume that each step trains every parameter they own. So each block gets an optimizer of its
own, of the class that DeepSpeed would use for the whole model. Then DeepSpeed treats one block as it would treat a
model, and its steps need no changes. The subclasses hold the few places where such an optimizer must know that other
blocks exist. ``block_optimizers.py`` manages all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hift_ds.optim.properties import parts
from hift_ds.state.ledger import Held
from hift_ds.state.saved import SavedState
from hift_ds.state.step import BlockState, Replicas, SteppedOptimizer
from hift_ds.weights.host import HostWeights


class BlockOptimizer:
    """The optimizer of one block. A subclass for each ZeRO stage implements :class:`SteppedOptimizer`.

    The default methods do nothing. Stages that need them override them.

    Attributes:
        optimizer: the torch optimizer of the block.
        block_state: steps masters and optimizer state, and moves them.
        invalid_loss: skip the next step, because a loss is non-finite on some rank: a flag on the device.
        overflow: the last step was skipped, because the loss or a gradient was non-finite.
        following: the state of the block that is stepped next, to be fetched in this block's step; None: not yet.
        factor: in a step, what the gradients are multiplied by, where the optimizer computes; None: by nothing.
        clip_grad: largest norm of the gradients; 0: any.
        host_weights: keeps the weights in host memory; None: they are on the device.
        is_replicated: all ranks compute the same update of all weights of the block.
        saves_masters: a checkpoint holds the masters; False: the weights, which it holds anyway, are the masters.
    """

    optimizer: Any
    block_state: BlockState
    following: BlockState | None = None
    invalid_loss: torch.Tensor
    overflow = False
    factor: torch.Tensor | float | None = None
    clip_grad: float = 0.0
    host_weights: HostWeights | None = None
    is_replicated = False
    saves_masters = True
    _global_grad_norm: Any = None
    _trained: Sequence[torch.nn.Parameter] = ()

    def step(self: Any, closure: Any = None) -> None:
        """Step the block, unless the loss or a gradient is non-finite."""
        norm = self.gradient_norm()
        is_skipped = norm.isfinite().logical_not() | self.invalid_loss.view(())
        self.block_state.fetch_gradients()
        scale = self.scale()
        self.factor = self.factor_for(norm, scale)
        numbers = [is_skipped, norm, *([self.factor] if torch.is_tensor(self.factor) else [])]
        # The one wait of the host for the device in a step.
        skipped, norm_value, *factor = torch.stack([number.double() for number in numbers]).tolist()
        if factor and self.block_state.is_on_host:
            (self.factor,) = factor
        self.overflow = bool(skipped)
        self._update_scale(self.overflow)
        self._global_grad_norm = float("inf") if self.overflow else norm_value / scale
        if not self.overflow:
            following = self.following

            def update() -> None:
                if self.block_state.step(following):
                    self.relink()
                self.publish_weights()
                self._announce_weights()

            self.block_state.update(update, following is not None and self.updates_alone)
        self.release_gradients()

    def factor_for(self, norm: torch.Tensor, scale: float) -> torch.Tensor | float | None:
        """Return what to multiply gradients by, to unscale and clip them.

        Args:
            norm: of the scaled gradients, on the device.
            scale: the loss scale.
        """
        if self.clip_grad > 0:
            clip = torch.clamp(((norm / scale) + 1e-6) / self.clip_grad, min=1.0)
            return 1.0 / (clip * scale)
        return None if scale == 1.0 else 1.0 / scale

    def scale(self: Any) -> float:
        """Return the loss scale of the gradients."""
        return float(self.loss_scale)

    @property
    def updates_alone(self) -> bool:
        """Whether the update needs no other rank, so that each rank may issue it when it likes."""
        return self.host_weights is None or not self.host_weights.node.is_shared

    def publish_weights(self) -> None:
        """Give the other ranks the weights that this rank updated on the device."""

    @property
    def replicas(self) -> Replicas | None:
        """The ranks that compute the same update, and share the weights in host memory; None: there are none."""
        node = self.host_weights.node if self.host_weights is not None and self.is_replicated else None
        return node if node is not None and node.is_shared else None

    def keep_weights_on_host(self, host: HostWeights, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Update the weights of the block's parameters in host memory. Call it before ``block_state`` is made."""
        self.host_weights, self._trained = host, parameters

    def _announce_weights(self) -> None:
        """Let the layers use weights that changed in host memory."""
        if self.host_weights is not None:
            of_all = self.host_weights.changed(self._trained, *self.block_state.written())
            if of_all is not None:
                self.block_state.fetch_after(of_all)

    def set_active(self, is_active: bool) -> None:
        """Activate or deactivate the block, between two steps."""

    def settle(self) -> None:
        """Wait until the host may read and change all that it keeps of the block."""
        self.block_state.settle()

    @contextmanager
    def decoded(self, name: str | None = None, changes: bool = True, folder: str | None = None) -> Iterator[None]:
        """Let DeepSpeed read the masters, or the state of a name, as fp32 tensors in host memory.

        Args:
            name: of the state; None: the masters.
            changes: keep what is changed meanwhile. Weights follow their masters.
            folder: for files that hold the masters; None: they are in memory.
        """
        self.settle()
        if not self.block_state.is_encoded:
            yield
            return
        if self.host_weights is not None:
            self.host_weights.settle()
            if changes and name is None:  # weights will be written
                self.host_weights.node.meet()
        self.block_state.decode({name}, folder)
        self.relink()
        try:
            yield
        finally:
            if not changes:
                self.block_state.discard_decoded()
            self.block_state.to_host()
            self.relink()
            if changes and name is None:
                self._announce_weights()

    def entries_of_zero(self) -> dict[str, Any]:
        """Return what DeepSpeed's ``zero_to_fp32.py`` reads from a checkpoint; without ZeRO nothing."""
        return {}

    def load(self, saved: SavedState, spans: Any, counted: Any, with_masters: bool, recount: Any) -> bool:
        """Load masters and state from a checkpoint, by :meth:`BlockState.load`."""
        self.settle()
        if self.host_weights is not None:
            self.host_weights.settle()
            self.host_weights.node.meet()  # weights will be written
        is_recoded = self.block_state.load(saved, spans, counted, with_masters, recount)
        self.relink()
        self._announce_weights()
        return is_recoded

    def relink(self: Any) -> None:
        """Point DeepSpeed's references to state at the current tensors."""

    def staging_numel(self) -> int:
        """Return the elements of this block's gradient buffers."""
        return 0

    def share_buffers(self, largest: Any) -> None:
        """Use the gradient buffers of another optimizer, whose buffers are the largest, instead of separate ones."""

    def held(self: Any) -> Iterator[Held]:
        """Yield all tensors that this optimizer keeps, except the weights."""
        stepped: SteppedOptimizer = self
        for index, (master, _) in enumerate(stepped.masters()):
            if stepped.weights(index) is not None:
                yield Held("gradients", master.grad)
            for value in self.optimizer.state.get(master, {}).values():
                yield from (Held("optimizer_state", part) for part in parts(value))
        yield from (Held("master_weights", tensor) for tensor in self.block_state.masters_in_store())
        # from the start, before the first step makes the state
        yield from (Held("optimizer_state", buffer) for buffer in self.block_state.state_buffers())
