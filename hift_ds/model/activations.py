"""Activation checkpointing that goes with training one block at a time, with the checkpoints on the device or off it.

transformers can keep checkpoints in host memory, too (``activation_checkpointing_enable(offload=True)``). It copies on
the stream that computes, which waits, page-locks memory anew for each copy, and also copies what layers below the
active block were given, which nobody will ask for.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

_CALL = "_gradient_checkpointing_func"  # where transformers keeps how a layer is to be called


def checkpoint_activations(model: Any, offload: bool = False) -> HostCheckpoints | None:
    """Recompute each layer in the backward pass, of a Hugging Face model, and only from the active block up.

    transformers' own switch also makes the outputs of the embeddings require gradients, for adapters in frozen models.
    Backward would then go through all the frozen layers below the active block, and keep what they need. That is taken
    back here, and the form of checkpointing chosen that can do without (the non-reentrant one).

    Args:
        offload: keep the hidden states from which layers are recomputed in host memory. Layers below the active block
            keep nothing, there either.

    Returns:
        What holds them, with ``offload``.

    Raises:
        ValueError: the model does not support activation checkpointing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method's next name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    if not offload:
        return None
    from hift_ds.state import transfer as transfers
    from hift_ds.state.host import HostMemory

    checkpoints = HostCheckpoints(HostMemory(), transfers)
    checkpoints.install(model)
    return checkpoints


class HostCheckpoints:
    """Calls layers so that their first argument, the hidden states, waits in host memory until backward needs it.

    What all layers share, masks and tables of positions, stays where it is. A checkpoint leaves the device when its
    layer has been computed, and comes back while the layer above it is in its backward pass, each on a stream of its
    own. The buffers are used again: there are as many as there ever were checkpoints at a time.

    Args:
        host: allocates the buffers, as :class:`hift_ds.state.host.HostMemory`.
        transfers: has ``Lane``, ``mark`` and ``wait``, as :mod:`hift_ds.state.transfer`.

    Attributes:
        stored, fetched: how many checkpoints left the device, and how many came back.
    """

    def __init__(self, host: Any, transfers: Any):
        self.host = host
        self.stored = self.fetched = 0
        self._mark, self._wait = transfers.mark, transfers.wait
        self._storing, self._fetching = transfers.Lane(), transfers.Lane()
        self._free: list[Tensor] = []  # flat, of bytes
        self._last: Callable[[], _Checkpoint | None] = lambda: None

    def install(self, model: Any) -> None:
        """Be what the model's layers call themselves with; activation checkpointing must be on."""
        for module in model.modules():
            if hasattr(module, _CALL):
                setattr(module, _CALL, self)

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                "checkpoints cannot go to host memory: this model's layers are not given their hidden states as their "
                "first argument; use activation checkpointing without offload"
            )
        kept: list[_Checkpoint] = []
        shape = args[0].shape  # the tensor itself would live as long as `pack`

        def pack(tensor: Tensor) -> Any:
            # torch before 2.13 saves an empty tensor of its own first.
            if kept or tensor.shape != shape or isinstance(tensor, torch.nn.Parameter):
                return tensor
            kept.append(_Checkpoint(tensor))
            return kept[0]

        with saved_tensors_hooks(pack, self._unpack):
            result = checkpoint(layer, *args, use_reentrant=False)
        # Only now is it known whether backward will come here.
        if kept and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            self._store(kept[0])
        return result

    def _store(self, entry: _Checkpoint) -> None:
        source = entry.device
        assert source is not None
        entry.buffer, entry.free = self._buffer(source.nbytes), self._free
        entry.host = entry.buffer[: source.nbytes].view(source.dtype).view(source.shape)
        with self._storing.after(self._mark()):
            entry.host.copy_(source, non_blocking=True)
            self._storing.outlives(source)
        entry.written = self._storing.mark()
        entry.device = None
        entry.before, self._last = self._last, weakref.ref(entry)
        self.stored += 1

    def _fetch(self, entry: _Checkpoint) -> None:
        if entry.device is not None or entry.host is None:
            return
        entry.device = torch.empty(entry.host.shape, dtype=entry.host.dtype, device=entry.where)
        # Its memory may be what earlier computations still use.
        with self._fetching.after(entry.written, self._mark()):
            entry.device.copy_(entry.host, non_blocking=True)
            self._fetching.outlives(entry.device)
        entry.ready = self._fetching.mark()
        self.fetched += 1

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Checkpoint):
            return packed
        self._fetch(packed)
        before = packed.before()
        if before is not None:
            self._fetch(before)
        self._wait(packed.ready)
        tensor = packed.device
        assert tensor is not None
        if packed.host is not None:
            packed.device = None  # from now on it lives as long as it is used
        return tensor

    def _buffer(self, nbytes: int) -> Tensor:
        """A free buffer of at least so many bytes, made where there is none; a smaller one then makes room."""
        fitting = [index for index, buffer in enumerate(self._free) if buffer.nbytes >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
        if self._free:
            smaller = self._free.pop()
            self.host.buffers = [buffer for buffer in self.host.buffers if buffer is not smaller]
        return self.host.empty(torch.empty(nbytes, dtype=torch.uint8, device="meta"))


def host_buffers(model: torch.nn.Module) -> list[Tensor]:
    """The buffers in host memory that hold the checkpoints of a model's layers."""
    calls = {id(call): call for module in model.modules() if (call := getattr(module, _CALL, None)) is not None}
    return [buffer for call in calls.values() if isinstance(call, HostCheckpoints) for buffer in call.host.buffers]


class _Checkpoint:
    """The hidden states that a layer was given: on the device, in host memory, or in both."""

    def __init__(self, tensor: Tensor):
        self.device: Tensor | None = tensor
        self.where = tensor.device
        self.host: Tensor | None = None
        self.buffer: Tensor | None = None
        self.free: list[Tensor] = []
        self.written: Any = None
        self.ready: Any = None
        self.before: Callable[[], _Checkpoint | None] = lambda: None  # the layer below's

    def __del__(self) -> None:
        if self.buffer is not None:
            self.free.append(self.buffer)
