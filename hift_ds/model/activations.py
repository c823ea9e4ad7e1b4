"""Activation checkpointing for training one block at a time, with checkpoints on the device or in host memory.

transformers can also keep checkpoints in host memory (``activation_checkpointing_enable(offload=True)``). It copies on
the compute stream, which waits for each copy, allocates pinned memory for each copy, and also copies the inputs of
layers below the active block, which no backward pass reads.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

_CALL = "_gradient_checkpointing_func"  # attribute of transformers' layers: the function that calls the layer
# Names of the hooks by which transformers, and PEFT and TRL, let the outputs of embeddings require gradients.
_INPUT_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")


def checkpoint_activations(model: Any, offload: bool = False) -> HostCheckpoints | None:
    """Turn on activation checkpointing for a Hugging Face model: backward recomputes layers from the active block up.

    transformers' own switch makes the outputs of the embeddings require gradients, for adapters in frozen models.
    Backward would then run through all frozen layers below the active block and keep their activations. This function
    turns that off and selects non-reentrant checkpointing, which does not need it.

    Args:
        model: a transformers model.
        offload: keep the checkpoints, which are the hidden states that layers receive, in host memory. Layers below the
            active block keep no checkpoint in either case.

    Returns:
        With ``offload``, the object that holds the checkpoints, otherwise None.

    Raises:
        ValueError: the model does not support activation checkpointing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns that the method will be renamed
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    if not offload:
        return None
    from hift_ds.state import transfer as transfers
    from hift_ds.state.allocator import HostMemory

    remedy = "keep them on the device: model.gradient_checkpointing=true"
    checkpoints = HostCheckpoints(HostMemory(purpose="checkpoints of activations", remedy=remedy), transfers)
    checkpoints.install(model)
    return checkpoints


def limit_recomputation(model: torch.nn.Module) -> None:
    """Let backward recompute only layers from the active block up, if a model's activation checkpointing is on.

    It does this to a model whose checkpointing was turned on elsewhere: it stops the outputs of the embeddings from
    requiring gradients, and makes reentrant checkpointing non-reentrant, which does not need that. Results are equal.

    Call it before each forward pass that is trained on: TRL, for one, turns checkpointing off and on again for each
    forward pass of a reference model, and asks for gradients of the embeddings' outputs each time.

    Args:
        model: a module; only the transformers models in it change.
    """
    for module in model.modules():
        # transformers' disable_input_require_grads knows only the hook that was added last.
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", None) in _INPUT_GRADIENTS:
                del module._forward_hooks[key]
        call = getattr(module, _CALL, None)
        if isinstance(call, functools.partial) and call.keywords.get("use_reentrant", True):
            keywords = {**call.keywords, "use_reentrant": False}
            setattr(module, _CALL, functools.partial(call.func, *call.args, **keywords))


class HostCheckpoints:
    """Calls layers so that their first argument, the hidden states, waits in host memory until backward needs it.

    Arguments that all layers share, such as masks and position tables, stay on the device. A checkpoint leaves the
    device when its layer is done, and returns while the layer above runs backward. Each direction has its own stream.
    Buffers are reused; there are as many as there are checkpoints at one time.

    Args:
        host: allocates the buffers, as :class:`hift_ds.state.allocator.HostMemory`.
        transfers: provides ``Lane``, ``mark`` and ``wait``, as :mod:`hift_ds.state.transfer`.

    Attributes:
        stored: number of checkpoints copied to host memory.
        fetched: number of checkpoints copied back.
    """

    def __init__(self, host: Any, transfers: Any):
        self.host = host
        self.stored = self.fetched = 0
        self._mark, self._wait = transfers.mark, transfers.wait
        self._storing, self._fetching = transfers.Lane(), transfers.Lane()
        self._free: list[tuple[Tensor, Any]] = []  # flat uint8 buffers, and the event after which each may be written
        self._last: Callable[[], _Checkpoint | None] = lambda: None

    def install(self, model: Any) -> None:
        """Call the model's layers through this object. Activation checkpointing must be on."""
        for module in model.modules():
            if hasattr(module, _CALL):
                setattr(module, _CALL, self)

    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        """Call ``layer(*args)`` with activation checkpointing.

        Raises:
            ValueError: the first argument is not a tensor.
        """
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(
                "checkpoints cannot move to host memory: the first argument of this model's layers is not their hidden "
                "states; use activation checkpointing without offload"
            )
        kept: list[_Checkpoint] = []
        shape = args[0].shape  # `pack` must not keep the tensor itself alive

        def pack(tensor: Tensor) -> Any:
            # PyTorch before 2.13 first saves an empty tensor of its own.
            if kept or tensor.shape != shape or isinstance(tensor, torch.nn.Parameter):
                return tensor
            kept.append(_Checkpoint(tensor))
            return kept[0]

        with saved_tensors_hooks(pack, self._unpack):
            result = checkpoint(layer, *args, use_reentrant=False)
        # Backward runs through this layer only if an output requires a gradient.
        if kept and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
            self._store(kept[0])
        return result

    def _store(self, entry: _Checkpoint) -> None:
        source = entry.device
        assert source is not None
        entry.buffer, read = self._buffer(source.nbytes)
        entry.free = self._free
        entry.host = entry.buffer[: source.nbytes].view(source.dtype).view(source.shape)
        with self._storing.after(self._mark(), read):
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
        # Computations that are still running may use the same memory.
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
            packed.device = None  # autograd holds the tensor as long as it needs it
        return tensor

    def _buffer(self, nbytes: int) -> tuple[Tensor, Any]:
        """Return a free buffer of at least ``nbytes``, and the event after which it may be written.

        A new buffer replaces a smaller free one.
        """
        fitting = [index for index, (buffer, _) in enumerate(self._free) if buffer.nbytes >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index][0].nbytes))
        if self._free:
            smaller, _ = self._free.pop()
            self.host.buffers = [buffer for buffer in self.host.buffers if buffer is not smaller]
        return self.host.empty(torch.empty(nbytes, dtype=torch.uint8, device="meta")), None


def host_buffers(model: torch.nn.Module) -> list[Tensor]:
    """Return the host buffers of a model's activation checkpoints; empty without offload."""
    calls = {id(call): call for module in model.modules() if (call := getattr(module, _CALL, None)) is not None}
    return [buffer for call in calls.values() if isinstance(call, HostCheckpoints) for buffer in call.host.buffers]


class _Checkpoint:
    """The hidden states that a layer received, on the device, in host memory, or in both."""

    def __init__(self, tensor: Tensor):
        self.device: Tensor | None = tensor
        self.where = tensor.device
        self.host: Tensor | None = None
        self.buffer: Tensor | None = None
        self.free: list[tuple[Tensor, Any]] = []
        self.written: Any = None
        self.ready: Any = None
        self.before: Callable[[], _Checkpoint | None] = lambda: None  # checkpoint of the layer below

    def __del__(self) -> None:
        if self.buffer is not None:
            self.free.append((self.buffer, self.ready))
