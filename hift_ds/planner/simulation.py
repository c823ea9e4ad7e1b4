"""How much memory a training step holds, found by running it on tensors without data.

The model's real forward and backward run under PyTorch's ``FakeTensorMode``: every operation makes tensors of the right
shape and type, none is computed, and a dispatch mode counts the storages that are alive. What DeepSpeed does beside
autograd (buckets, flat copies, norms, the optimizer) ``stages.py`` walks through in the same order and sizes.

Kernels allocate some scratch memory that a dispatcher does not see (cuBLAS workspaces, the softmax statistics of
attention); it is tens of MiB, and not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hift_ds.config import noise_chunk
from hift_ds.model.activations import HostCheckpoints
from hift_ds.model.loss import Targets, classification_loss, default_chunk, summed_loss, why_not

CATEGORIES = ("parameters", "master_weights", "gradients", "optimizer_state", "activations", "buffers")


# --- counting ----------------------------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside the mode, until each is freed.

    Storages that are shared (views) count once, those that existed before do not count. A storage belongs to a
    category of ``CATEGORIES``: ``activations`` at first, another one by :meth:`label`.

    Attributes:
        now: live bytes of each category.
        peaks: ``now`` at the instant of the highest total, for each phase.
        phase: set by whoever runs the step: ``forward``, ``backward``, ``step``.
        host: bytes of the storages that were made in host memory, which nothing else counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.phase = "forward"
        self.peaks: dict[str, dict[str, int]] = {}
        self.host = 0
        self._on_host = False
        self._total = 0
        self._highest: dict[str, int] = {}  # phase -> total
        self._live: dict[int, tuple[int, str, Any]] = {}  # storage -> bytes, category, what tells of its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks for a device
            return result
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage(), "activations")
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these storages, also when an operation returns a view of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = (0, "activations", storage)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Storages that are made inside are in host memory."""
        self._on_host = True
        yield
        self._on_host = False

    def label(self, tensor: Tensor, category: str) -> None:
        """Count the storage of ``tensor`` in another category from now on."""
        nbytes, before, end = self._live[tensor.untyped_storage()._cdata]
        self._live[tensor.untyped_storage()._cdata] = (nbytes, category, end)
        self.now[before] -= nbytes
        self.now[category] += nbytes

    def take(self, category: str, nbytes: int) -> None:
        """Count memory that no tensor here stands for."""
        self.now[category] += nbytes
        self._total += nbytes
        if self._total > self._highest.get(self.phase, -1):
            self._highest[self.phase] = self._total
            self.peaks[self.phase] = dict(self.now)

    def give(self, category: str, nbytes: int) -> None:
        """Undo :meth:`take`."""
        self.now[category] -= nbytes
        self._total -= nbytes

    @contextmanager
    def taken(self, category: str, nbytes: int) -> Iterator[None]:
        self.take(category, nbytes)
        yield
        self.give(category, nbytes)

    def _see(self, storage: Any, category: str) -> None:
        key = storage._cdata
        if key not in self._live:
            nbytes = storage.nbytes()
            if self._on_host:
                self.host, nbytes = self.host + nbytes, 0
            self._live[key] = (nbytes, category, weakref.ref(storage, lambda _: self._end(key)))
            self.take(category, nbytes)

    def _end(self, key: int) -> None:
        nbytes, category, _ = self._live.pop(key)
        self.give(category, nbytes)


# --- one step -----------------------------------------------------------------------------------------------------


class Simulator:
    """Runs steps of one model on fake tensors.

    Args:
        model: on the meta device (:func:`presets.skeleton`); its parameters and buffers become fake tensors.
        task: which loss, one of ``TASKS``.
        offload: checkpoints wait in host memory; activation checkpointing is on.
    """

    def __init__(self, model: nn.Module, task: str, offload: bool = False):
        self.model, self.task, self.offload = model, task, offload
        self.mode = FakeTensorMode()
        made: dict[int, Any] = {}  # so that tied weights stay tied
        with self.mode:
            for module in model.modules():
                stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for store in stores:
                    for name, old in store.items():
                        if old is None:
                            continue
                        if id(old) not in made:
                            new: Any = torch.empty(old.shape, dtype=old.dtype)
                            is_parameter = isinstance(old, nn.Parameter)
                            made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                        store[name] = made[id(old)]
            self._old = list(made)  # ids must stay those of living tensors until here

    def why_no_chunks(self) -> str | None:
        """Why the model's logits cannot be had in chunks, as :func:`hift_ds.model.loss.why_not`."""
        with self.mode:
            return why_not(self.model)

    def run(
        self,
        trained: Sequence[str],
        batch_size: int,
        seq_len: int,
        holds: Mapping[str, int],
        step: StepBase,
        loss_chunk: int | None = None,
    ) -> LiveMemory:
        """One forward, backward and update.

        Args:
            trained: names of the parameters that get gradients; where there are none, there is no backward.
            holds: bytes of each category that are there all the time; weights belong here.
            step: what happens to gradients and state.
            loss_chunk: tokens whose logits exist at a time, as in :func:`hift_ds.model.loss.summed_loss`.
        """
        if self.task == "causal-lm" and batch_size * (seq_len - 1) > (loss_chunk or default_chunk(self.model)):
            self.why_no_chunks()  # asked for the first time here, where what it does is not counted
        parameters = dict(self.model.named_parameters())
        memory = LiveMemory()
        memory.ignore([*parameters.values(), *self.model.buffers()])
        for category, nbytes in holds.items():
            memory.take(category, nbytes)
        step.begin(memory)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        active: list[Tensor] = [parameters[name].requires_grad_(True) for name in trained]
        handles = [parameter.register_post_accumulate_grad_hook(step.on_gradient) for parameter in active]
        if self.offload:
            HostCheckpoints(_Host(memory), _Transfers).install(self.model)
        linear: Any = _keeping_linear if step.linear_keeps_input else F.linear
        with self.mode, memory, torch.set_grad_enabled(bool(trained)), _linear_is(linear):
            loss = self._loss(batch_size, seq_len, loss_chunk)
            if trained:
                memory.phase = "backward"
                loss.backward()
        del loss
        step.after_backward(active)
        memory.phase = "step"
        step.update()
        for handle in handles:
            handle.remove()
        self.model.zero_grad()
        return memory

    def _loss(self, batch_size: int, seq_len: int, chunk: int | None) -> Tensor:
        """What ``launch/train.py`` computes on a batch in which every position but the last is trained.

        Without padding, so there is no mask: a run with padded batches holds one of batch x length x length more.
        """
        inputs = {"input_ids": torch.zeros(batch_size, seq_len, dtype=torch.long)}
        if self.task == "sequence-classification":
            return classification_loss(self.model, inputs, torch.zeros(batch_size, dtype=torch.long))
        rows = torch.arange(batch_size * (seq_len - 1))
        targets = Targets(torch.arange(seq_len - 1), rows, torch.zeros_like(rows))
        return summed_loss(self.model, self.model, inputs, targets, chunk)


class _Host:
    """Host memory that is counted."""

    def __init__(self, memory: LiveMemory):
        self._memory = memory
        self.buffers: list[Tensor] = []

    def empty(self, like: Tensor) -> Tensor:
        with self._memory.on_host():
            self.buffers.append(torch.empty_like(like, device="cpu"))
        return self.buffers[-1]


class _Transfers:
    """What stands for :mod:`hift_ds.state.transfer`, which needs a device: copies are there at once."""

    class Lane:
        def after(self, *_: Any) -> AbstractContextManager[None]:
            return nullcontext()

        def mark(self) -> None: ...

        def outlives(self, tensor: Tensor) -> None: ...

    @staticmethod
    def mark() -> None: ...

    @staticmethod
    def wait(event: Any) -> None: ...


class _KeepingLinear(torch.autograd.Function):
    """Stage 3 exchanges ``F.linear`` for one that lets weights go; it keeps inputs even where weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = x.matmul(weight.t())
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_x = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        of_weight = flat.t().matmul(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


def _keeping_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _KeepingLinear.apply(x, weight, bias)


@contextmanager
def _linear_is(function: Any) -> Iterator[None]:
    before, F.linear = F.linear, function
    try:
        yield
    finally:
        F.linear = before


# --- what a method does with gradients ---------------------------------------------------------------------------


class StepBase:
    """What a method does with gradients. Here: nothing, each is dropped when it is there."""

    linear_keeps_input = False  # of a linear layer whose weights are frozen

    def begin(self, memory: LiveMemory) -> None:
        self.memory = memory

    def on_gradient(self, parameter: Tensor) -> None:
        parameter.grad = None

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """All gradients are there."""

    def update(self) -> None:
        """The optimizer's step."""


class ForwardStep(StepBase):
    """MeZO: weights are moved by a random direction, one piece of a parameter at a time, computed in fp32.

    Args:
        weight: bytes of an element of the weights.
        largest: elements of the largest parameter.
        device: its kind, on which the size of a piece depends.
    """

    def __init__(self, weight: int, largest: int, device: str):
        copies = 4 if weight < 4 else 3  # 16-bit weights have an fp32 one
        self.nbytes = 4 * copies * min(noise_chunk(device), largest)

    def update(self) -> None:
        with self.memory.taken("buffers", self.nbytes):
            pass
