"""Find the memory of a training step by running it on tensors without data.

The model's real forward and backward pass run under PyTorch's ``FakeTensorMode``: every operation returns tensors of
the right shape and type and computes nothing. A dispatch mode counts the storages that are alive.
:mod:`hift_ds.planner.accounting` adds what DeepSpeed and the engine allocate around the passes.

Some kernels allocate scratch memory that the dispatcher does not see, such as cuBLAS workspaces and the softmax
statistics of attention. The plan leaves it out; it is tens of MiB.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hift_ds.blocks.layers import find_hidden_layers
from hift_ds.config import noise_chunk
from hift_ds.model.activations import HostCheckpoints
from hift_ds.model.loss import (
    SMALLER,
    Pieces,
    Targets,
    chunking_problem,
    classification_loss,
    default_chunk,
    summed_loss,
)
from hift_ds.model.reach import give_fake_tensors
from hift_ds.planner.timeline import Trace

# It prints a traceback for each operation that fails. The error says the same.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)

CATEGORIES = ("parameters", "master_weights", "gradients", "optimizer_state", "activations", "buffers")


Kind = tuple[Any, ...]  # phase, operation, and of its result: type, number of dimensions, width


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate inside the mode, until each is freed.

    A storage that several tensors share (views) counts once. Storages that existed before do not count if
    :meth:`ignore` knows them. A storage is in one of ``CATEGORIES``: ``activations`` until :meth:`label` changes it.

    Attributes:
        now: live bytes of each category.
        peaks: for each phase, ``now`` at the instant of the highest total.
        phase: ``forward``, ``backward`` or ``step``; the caller sets it.
        host: bytes allocated inside :meth:`on_host`. No category includes them.
        operations: number of operations so far.
        by_kind: for each phase and kind of operation, ``now`` at the instant of the highest total that such an
            operation leaves.

    Args:
        by_kind: batch size and length, to set ``by_kind``; otherwise it is None.
    """

    def __init__(self, by_kind: Sequence[int] | None = None) -> None:
        super().__init__()
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.phase = "forward"
        self.peaks: dict[str, dict[str, int]] = {}
        self.host = 0
        self.operations = 0
        self._on_host = False
        self._total = 0
        self._highest: dict[str, int] = {}  # phase -> total
        self.by_kind: dict[Kind, dict[str, int]] | None = None if by_kind is None else {}
        self._batch = by_kind or ()
        self._highest_by_kind: dict[Kind, int] = {}
        self._kind: tuple[Any, ...] = ()
        self._live: dict[int, tuple[int, str, Any]] = {}  # storage -> bytes, category, weak reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # returns a device
            return result
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                if self.by_kind is not None:
                    self._kind = (func.__name__, value.dtype, value.dim(), self._width(value))
                self.count(value.untyped_storage(), "activations")
        self._kind = ()
        return result

    def _width(self, value: Tensor) -> int:
        """Return the size of the last dimension, or 0 if it depends on the batch."""
        width = value.shape[-1] if value.dim() else 0
        return 0 if width in self._batch else width

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out the storages of these tensors, also when an operation returns a view of one."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = (0, "activations", storage)

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Count storages that are allocated inside the context as host memory."""
        self._on_host = True
        yield
        self._on_host = False

    def label(self, tensor: Tensor, category: str) -> None:
        """Move the storage of ``tensor`` to another category."""
        nbytes, before, end = self._live[tensor.untyped_storage()._cdata]
        self._live[tensor.untyped_storage()._cdata] = (nbytes, category, end)
        self.now[before] -= nbytes
        self.now[category] += nbytes

    def allocate(self, category: str, nbytes: int) -> None:
        """Count memory that no simulated tensor represents."""
        self.now[category] += nbytes
        self._total += nbytes
        if self._total > self._highest.get(self.phase, -1):
            self._highest[self.phase] = self._total
            self.peaks[self.phase] = dict(self.now)
        if self.by_kind is not None:
            kind = (self.phase, *self._kind)
            if self._total > self._highest_by_kind.get(kind, -1):
                self._highest_by_kind[kind] = self._total
                self.by_kind[kind] = dict(self.now)

    def free(self, category: str, nbytes: int) -> None:
        """Undo :meth:`allocate`."""
        self.now[category] -= nbytes
        self._total -= nbytes

    @contextmanager
    def temporary(self, category: str, nbytes: int) -> Iterator[None]:
        """Count memory that is freed at the end of the context."""
        self.allocate(category, nbytes)
        yield
        self.free(category, nbytes)

    def count(self, storage: Any, category: str) -> None:
        """Count a storage until it is freed, unless it is counted or ignored already."""
        key = storage._cdata
        if key not in self._live:
            nbytes = storage.nbytes()
            if self._on_host:
                self.host, nbytes = self.host + nbytes, 0
            self._live[key] = (nbytes, category, weakref.ref(storage, lambda _: self._forget(key)))
            self.allocate(category, nbytes)

    def _forget(self, key: int) -> None:
        nbytes, category, _ = self._live.pop(key)
        self.free(category, nbytes)


class TokenLoop(NamedTuple):
    """How the operations of a forward pass grow with the length, because transformers loops over tokens in Python.

    Attributes:
        length: tokens in a short sequence.
        step: tokens by which the next longer one is longer: a group of tokens.
        few: operations in a forward pass of such a sequence.
        per_token: operations for each further token; 0 without a loop.
    """

    length: int
    step: int
    few: int
    per_token: float

    def operations(self, seq_len: int) -> float:
        """Return the operations that a forward pass has because of the loop; 0 without a loop."""
        return self.few + self.per_token * (seq_len - self.length) if self.per_token else 0


class Simulator:
    """Runs steps of one model on fake tensors.

    Args:
        model: a model on the meta device (:func:`hift_ds.planner.models.skeleton`). The simulator replaces its
            parameters and buffers by fake tensors.
        task: selects the loss: ``causal-lm`` or ``sequence-classification``.
        offload: activation checkpoints wait in host memory. The model must have activation checkpointing on.
    """

    def __init__(self, model: nn.Module, task: str, offload: bool = False):
        self.model, self.task, self.offload = model, task, offload
        self.mode = give_fake_tensors(model)

    def operations(self, seq_len: int) -> int:
        """Return the number of operations in a forward pass of one sequence of ``seq_len`` tokens."""
        with self.mode, LiveMemory() as memory, torch.no_grad():
            self._loss(1, seq_len, 0, Pieces)
        return memory.operations

    def token_loop(self, seq_len: int) -> TokenLoop:
        """Find out whether the model computes its tokens, or groups of them, one after the other.

        Args:
            seq_len: the longest sequence of interest.
        """
        for length, longest, step in ((3, 10, 1), (320, 1280, 320)):  # unlike the dimensions of most models
            if seq_len >= longest:
                few, many = self.operations(length), self.operations(longest)
                if many > few:
                    return TokenLoop(length, step, few, (many - few) / (longest - length))
        return TokenLoop(3, 1, 0, 0)

    def chunk(self, tokens: int, loss_chunk: int | None) -> int:
        """Return the tokens in a chunk of logits for ``tokens`` targets; 0: the logits of all tokens exist at once.

        Args:
            tokens: number of targets.
            loss_chunk: as in :meth:`run`.
        """
        if self.task != "causal-lm":
            return 0
        chunk = default_chunk(self.model) if loss_chunk is None else loss_chunk
        return chunk if chunk and tokens > chunk and not self.chunking_problem() else 0

    def chunking_problem(self) -> str | None:
        """Return why the model cannot compute its logits in chunks: see :func:`hift_ds.model.loss.chunking_problem`."""
        with self.mode:
            return chunking_problem(self.model)

    def run(
        self,
        trained: Sequence[str],
        batch_size: int,
        seq_len: int,
        held: Mapping[str, int],
        step: StepBase,
        loss_chunk: int | None = None,
        *,
        by_kind: bool = False,
        trace: Trace | None = None,
    ) -> LiveMemory:
        """Run one forward pass, backward pass and update.

        Args:
            trained: names of the parameters that get gradients. An empty sequence skips the backward pass.
            batch_size: sequences in the batch.
            seq_len: tokens in each sequence.
            held: bytes of each category that exist throughout the step, including the weights.
            step: what the method does with gradients and optimizer state.
            loss_chunk: tokens in a chunk of logits: see :func:`hift_ds.model.loss.summed_loss`.
            by_kind: see :class:`LiveMemory`.
            trace: collects the operations. All pieces of the logits are then computed.

        Returns:
            The memory of the step, with its peaks.
        """
        self.chunk(batch_size * (seq_len - 1), loss_chunk)  # the first call runs the model, which must not count
        parameters = dict(self.model.named_parameters())
        memory = LiveMemory((batch_size, seq_len) if by_kind else None)
        memory.ignore([*parameters.values(), *self.model.buffers()])
        for category, nbytes in held.items():
            memory.allocate(category, nbytes)
        step.begin(memory)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        active: list[Tensor] = [parameters[name].requires_grad_(True) for name in trained]
        handles: list[Any] = [p.register_post_accumulate_grad_hook(step.on_gradient) for p in active]
        if trace is not None:
            handles += self._watch_layers(trace)
        if self.offload:
            HostCheckpoints(_Host(memory), _Transfers).install(self.model)
        linear: Any = _input_saving_linear if step.linear_saves_input else F.linear
        watched = self.mode, memory, trace or nullcontext()
        with ExitStack() as stack:
            for context in (*watched, torch.set_grad_enabled(bool(trained)), _replaced_linear(linear)):
                stack.enter_context(context)
            loss = self._loss(batch_size, seq_len, loss_chunk, _FewPieces if trace is None else Pieces)
            if trained:
                memory.phase = "backward"
                if trace is not None:
                    trace.phase, trace.layer = "backward", None
                loss.backward()
        del loss
        step.after_backward(active)
        memory.phase = "step"
        step.update()
        for handle in handles:
            handle.remove()
        self.model.zero_grad()
        return memory

    def update(self, trained: Sequence[str], held: Mapping[str, int], step: StepBase) -> LiveMemory:
        """Run the update of a step alone, on gradients that the passes would leave.

        Args:
            trained, held, step: as in :meth:`run`.

        Returns:
            The memory of the update; its peaks of the passes mean nothing.
        """
        parameters = dict(self.model.named_parameters())
        memory = LiveMemory()
        memory.ignore([*parameters.values(), *self.model.buffers()])
        for category, nbytes in held.items():
            memory.allocate(category, nbytes)
        step.begin(memory)
        active = [parameters[name] for name in trained]
        memory.phase = "backward"
        with self.mode, memory, torch.no_grad():
            for parameter in active:
                parameter.grad = torch.empty_like(parameter)
                step.on_gradient(parameter)
        step.after_backward(active)
        memory.phase = "step"
        step.update()
        self.model.zero_grad()
        return memory

    def _watch_layers(self, trace: Trace) -> list[Any]:
        """Set ``trace.layer`` where the pass of a hidden layer begins. Return the handles of the hooks."""
        handles = []

        def enters(number: int) -> Any:
            def enter(*_: Any) -> None:
                trace.layer = number

            return enter

        def watch(number: int) -> Any:
            def leave(module: Any, args: Any, output: Any) -> None:
                tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
                for tensor in tensors:  # their gradients come before the layer's backward pass
                    tensor.register_hook(enters(number))

            return leave

        modules = dict(self.model.named_modules(remove_duplicate=False))
        for number, paths in enumerate(find_hidden_layers(self.model)):
            for path in paths:
                handles.append(modules[path].register_forward_pre_hook(enters(number)))
                handles.append(modules[path].register_forward_hook(watch(number)))
        return handles

    def _loss(self, batch_size: int, seq_len: int, chunk: int | None, pieces: Callable[[int], Pieces]) -> Tensor:
        """Compute the loss of ``launch/train.py`` on a batch in which every position but the last has a target.

        The batch has no padding and therefore no mask. A padded batch needs a mask of batch x length x length.
        """
        inputs = {"input_ids": torch.zeros(batch_size, seq_len, dtype=torch.long)}
        if self.task == "sequence-classification":
            return classification_loss(self.model, inputs, torch.zeros(batch_size, dtype=torch.long))
        rows = torch.arange(batch_size * (seq_len - 1))
        targets = Targets(torch.arange(seq_len - 1), rows, torch.zeros_like(rows))
        return summed_loss(self.model, self.model, inputs, targets, chunk, pieces=pieces)


class _FewPieces(Pieces):
    """The first pieces. They write to tensors that hold the results of all pieces, so the peaks are those of a run."""

    def of_tokens(self, tokens: int) -> Iterable[slice]:
        return islice(super().of_tokens(tokens), 2)

    def of_gradient(self, tokens: int, vocabulary: int) -> Iterable[tuple[slice, slice]]:
        """Return pieces of as many logits, in a shape that does not depend on the number of tokens.

        One more token stands for the few numbers that a piece has for each token.
        """
        return [(slice(0, self.chunk + 1), slice(0, -(-vocabulary // SMALLER)))] * 2


class _Host:
    """Replaces :class:`hift_ds.state.transfer.HostMemory`: counts the bytes of host buffers."""

    def __init__(self, memory: LiveMemory):
        self._memory = memory
        self.buffers: list[Tensor] = []

    def empty(self, like: Tensor) -> Tensor:
        with self._memory.on_host():
            self.buffers.append(torch.empty_like(like, device="cpu"))
        return self.buffers[-1]


class _Transfers:
    """Replaces :mod:`hift_ds.state.transfer`, which needs a device: every copy is complete at once."""

    class Lane:
        def after(self, *_: Any) -> AbstractContextManager[None]:
            return nullcontext()

        def mark(self) -> None: ...

        def outlives(self, tensor: Tensor) -> None: ...

    @staticmethod
    def mark() -> None: ...

    @staticmethod
    def wait(event: Any) -> None: ...


class _InputSavingLinear(torch.autograd.Function):
    """ZeRO-3's replacement of ``F.linear``, which saves its input for backward even if the weight is frozen."""

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


def _input_saving_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _InputSavingLinear.apply(x, weight, bias)


@contextmanager
def _replaced_linear(function: Any) -> Iterator[None]:
    before, F.linear = F.linear, function
    try:
        yield
    finally:
        F.linear = before


class StepBase:
    """What a method allocates around the passes. The base class drops each gradient as soon as it exists.

    Attributes:
        linear_saves_input: linear layers save their input for backward, also if the weight is frozen.
    """

    linear_saves_input = False

    def begin(self, memory: LiveMemory) -> None:
        """Allocate what exists before the forward pass."""
        self.memory = memory

    def on_gradient(self, parameter: Tensor) -> None:
        """Handle the gradient that autograd has just added to ``parameter.grad``."""
        parameter.grad = None

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """Handle the end of the backward pass; ``parameters`` are all that got gradients."""

    def update(self) -> None:
        """Run the optimizer's step."""


class ForwardStep(StepBase):
    """MeZO's step, which perturbs the weights in chunks that it computes in fp32.

    Args:
        weight: bytes of an element of the weights.
        largest: elements of the largest parameter.
        device: ``cpu`` or ``gpu``; the size of a chunk depends on it.
    """

    def __init__(self, weight: int, largest: int, device: str):
        copies = 4 if weight < 4 else 3  # a 16-bit chunk also needs an fp32 copy of the weights
        self.nbytes = 4 * copies * min(noise_chunk(device), largest)

    def update(self) -> None:
        """Allocate the chunk's fp32 copies for a moment."""
        with self.memory.temporary("buffers", self.nbytes):
            pass
