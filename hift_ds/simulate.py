"""How much memory a training step holds, found by running it on tensors without data.

The model's real forward and backward run under PyTorch's ``FakeTensorMode``: every operation makes tensors of the right
shape and type, none is computed, and a dispatch mode counts the storages that are alive. What DeepSpeed does beside
autograd (buckets, flat copies, norms, the optimizer) is walked through in the same order with the same sizes.

Kernels allocate some scratch memory that a dispatcher does not see (cuBLAS workspaces, the softmax statistics of
attention); it is tens of MiB, and not counted.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = ("parameters", "master_weights", "gradients", "optimizer_state", "activations", "buffers")
FP32 = 4  # bytes of an element
FP64 = 8


# --- counting ----------------------------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside the mode, until each is freed.

    Storages that are shared (views) count once, those that existed before do not count. A storage belongs to a
    category of ``CATEGORIES``: ``activations`` at first, another one by :meth:`label`.

    Attributes:
        now: live bytes of each category.
        peaks: ``now`` at the instant of the highest total, for each phase.
        phase: set by whoever runs the step: ``forward``, ``backward``, ``step``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = dict.fromkeys(CATEGORIES, 0)
        self.phase = "forward"
        self.peaks: dict[str, dict[str, int]] = {}
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
            self._live[key] = (nbytes, category, weakref.ref(storage, lambda _: self._end(key)))
            self.take(category, nbytes)

    def _end(self, key: int) -> None:
        nbytes, category, _ = self._live.pop(key)
        self.give(category, nbytes)


# --- one step -----------------------------------------------------------------------------------------------------


class Simulator:
    """Runs steps of one model on fake tensors.

    Args:
        model: on the meta device (:func:`hift_ds.presets.skeleton`); its parameters and buffers become fake tensors.
        task: which loss, one of ``TASKS``.
    """

    def __init__(self, model: nn.Module, task: str):
        self.model, self.task = model, task
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

    def run(
        self, trained: Sequence[str], batch_size: int, seq_len: int, holds: Mapping[str, int], step: StepBase
    ) -> LiveMemory:
        """One forward, backward and update.

        Args:
            trained: names of the parameters that get gradients; where there are none, there is no backward.
            holds: bytes of each category that are there all the time; weights belong here.
            step: what happens to gradients and state.
        """
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
        with self.mode, memory, torch.set_grad_enabled(bool(trained)):
            loss = self._loss(batch_size, seq_len)
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

    def _loss(self, batch_size: int, seq_len: int) -> Tensor:
        """What ``launch/train.py`` computes on a batch in which every position but the last is trained.

        Without padding, so there is no mask: a run with padded batches holds one of batch x length x length more.
        """
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
        if self.task == "sequence-classification":
            labels = torch.zeros(batch_size, dtype=torch.long)
            return F.cross_entropy(self._logits(tokens).float(), labels, reduction="sum")
        kept = torch.arange(seq_len - 1)
        targets = torch.zeros(batch_size * (seq_len - 1), dtype=torch.long)
        if "logits_to_keep" in inspect.signature(type(self._unwrapped()).forward).parameters:
            logits = self._logits(tokens, logits_to_keep=kept)  # (batch, kept, vocabulary)
        else:
            logits = self._logits(tokens)[:, kept]
        rows = torch.arange(targets.numel())
        return F.cross_entropy(logits.flatten(0, 1)[rows].float(), targets, reduction="sum")

    def _logits(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.model(input_ids=tokens, **options).logits

    def _unwrapped(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- what DeepSpeed holds beside autograd ------------------------------------------------------------------------

# Tensors of optimizer state in the shape of the weight. Adafactor keeps one row and one column of a matrix instead.
MOMENTS = {"adamw": 2, "sgd": 0, "sgdm": 1, "adagrad": 1, "lion": 1}
# Tensors of the weight's size that a step makes for itself: (one tensor after the other, all tensors at once).
_SCRATCH = {"adamw": (2, 1), "sgd": (1, 1), "sgdm": (1, 1), "adagrad": (2, 2), "lion": (1, 1), "adafactor": (1, 1)}
FUSED = ("adamw", "lion")  # DeepSpeed has kernels for a GPU that need none


def state_numel(optimizer: str, shapes: Iterable[Sequence[int]]) -> int:
    """Elements of optimizer state for whole weights of these shapes."""
    if optimizer != "adafactor":
        return MOMENTS[optimizer] * sum(math.prod(shape) for shape in shapes)
    numel = 0
    for shape in shapes:
        rows = math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1] if len(shape) > 1 else math.prod(shape)
        numel += rows
    return numel


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a step beside the model and the batch.

    Attributes:
        stage, ranks: of ZeRO.
        weight: bytes of an element of the weights, and of their gradients.
        optimizer: a key of ``_SCRATCH``.
        gpu: which kernels step: a GPU's or plain PyTorch's on a CPU.
        placement: masters and state are on the device for ``block``: the step; ``streamed``: a slice at a time;
            ``resident``: always (stock DeepSpeed); ``host``: never, the step is on the host.
        bucket: elements that wait for their reduction together.
        staging: elements of the buffer through which gradients reach the host, at stages 1 and 2.
        accumulates: gradients of earlier micro-batches are there.
        slices: bytes of each of the two buffers of the streamed step.
        persistent: elements of the parameters that stage 3 keeps whole on every rank.
    """

    stage: int
    ranks: int
    weight: int
    optimizer: str
    gpu: bool
    placement: str
    bucket: int
    staging: int = 0
    accumulates: bool = False
    slices: int = 0
    persistent: int = 0

    def partition(self, numels: Sequence[int]) -> int:
        """Elements of these parameters that a rank owns."""
        if self.stage == 3:
            return sum(-(-numel // self.ranks) for numel in numels)
        if self.stage in (1, 2):  # flat, the start of each rank's part aligned to 4 bytes in 16 bit
            return -(-sum(numels) // (2 * self.ranks)) * 2
        return sum(numels)

    @property
    def has_masters(self) -> bool:
        """ZeRO copies fp32 weights, too."""
        return self.weight < FP32 or self.stage > 0

    def masters(self, numels: Sequence[int]) -> int:
        """Bytes of fp32 master weights on a rank."""
        return FP32 * self.partition(numels) if self.has_masters else 0

    def state(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of optimizer state on a rank, without the step counters."""
        if self.stage == 0:
            return FP32 * state_numel(self.optimizer, shapes)
        return FP32 * MOMENTS[self.optimizer] * self.partition([math.prod(shape) for shape in shapes])


class StepBase:
    """What a method does with gradients. Here: nothing, each is dropped when it is there."""

    def begin(self, memory: LiveMemory) -> None:
        self.memory = memory

    def on_gradient(self, parameter: Tensor) -> None:
        parameter.grad = None

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """All gradients are there."""

    def update(self) -> None:
        """The optimizer's step."""


class ForwardStep(StepBase):
    """MeZO: weights are moved by a random direction and its multiple, one parameter at a time."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes  # of the largest parameter

    def update(self) -> None:
        with self.memory.taken("buffers", 2 * self.nbytes):
            pass


class Step(StepBase):
    """The way of a block's gradients to its updated weights. Here: stage 0, gradients stay where autograd puts them.

    ``shapes`` are those of the parameters that the step trains, in their order.
    """

    def __init__(self, setup: Setup, shapes: Sequence[Sequence[int]]):
        self.setup = setup
        self.numels = [math.prod(shape) for shape in shapes]
        self.total = sum(self.numels)
        self.masters, self.state = setup.masters(self.numels), setup.state(shapes)
        self.waiting = 0  # elements of gradients in the bucket

    def begin(self, memory: LiveMemory) -> None:
        super().begin(memory)
        if self.setup.accumulates:
            memory.take("gradients", self.accumulated())

    def accumulated(self) -> int:
        """Bytes of earlier micro-batches' gradients."""
        return self.setup.weight * self.total

    def on_gradient(self, parameter: Tensor) -> None:
        if self.setup.accumulates:
            parameter.grad = None  # added to what is there
        else:
            assert parameter.grad is not None
            self.memory.label(parameter.grad, "gradients")

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """The all-reduce takes flat copies of up to ``MEMORY_OPT_ALLREDUCE_SIZE`` elements, on one rank too."""
        bucket: list[int] = []
        for position, numel in enumerate(self.numels, start=1):
            bucket.append(numel)
            if sum(bucket) > 500_000_000 or position == len(self.numels):
                if len(bucket) > 1:
                    with self.memory.taken("buffers", self.setup.weight * sum(bucket)):
                        pass
                bucket = []

    def update(self) -> None:
        with self.state_on_device():
            if self.setup.weight == FP32:
                self.optimize(self.numels, fp32_gradients=False)
            else:
                with self.memory.taken("buffers", FP32 * max(self.numels)):  # norms, one parameter at a time
                    pass
                if self.setup.gpu and self.setup.optimizer in FUSED:  # it flattens
                    with self.memory.taken("buffers", FP32 * self.total if len(self.numels) > 1 else 0):
                        with self.memory.taken("gradients", FP32 * self.total):
                            pass
                self.optimize(self.numels)

    @contextmanager
    def state_on_device(self) -> Iterator[None]:
        """Masters and optimizer state are on the device; norms and step counters, one of each a parameter, too."""
        masters, state = self.masters, self.state
        if self.setup.placement == "streamed":
            share = min(1.0, 2 * self.setup.slices / max(masters + state, 1))
            masters, state = math.ceil(masters * share), math.ceil(state * share)
        elif self.setup.placement != "block":
            masters = state = 0
        with (
            self.memory.taken("master_weights", masters),
            self.memory.taken("optimizer_state", state),
            self.memory.taken("buffers", FP64 * 4 * (len(self.numels) + 1)),
        ):
            yield

    def optimize(self, tensors: Sequence[int], fp32_gradients: bool = True) -> None:
        """The optimizer's own step on tensors of so many elements."""
        if self.setup.placement == "host":
            return
        one, every = _SCRATCH[self.setup.optimizer]
        if self.setup.gpu and self.setup.optimizer in FUSED:
            scratch = 0
        elif self.setup.gpu and self.setup.optimizer != "adafactor":
            scratch = every * sum(tensors)
        else:  # in a loop, whose variables still hold the tensor before
            scratch = max(one * numel + before for numel, before in zip(tensors, [0, *tensors], strict=False))
        gradients = sum(tensors) if fp32_gradients else 0
        if self.setup.placement == "streamed":
            limit = self.slice_numel()
            scratch, gradients = min(scratch, max(one, every) * limit), min(gradients, limit)
        if self.setup.optimizer == "adafactor":
            scratch += self.state // FP32  # means of rows and columns
        with self.memory.taken("gradients", FP32 * gradients), self.memory.taken("buffers", FP32 * scratch):
            pass

    def slice_numel(self) -> int:
        """Elements of the weights whose masters and state fill a buffer of the streamed step."""
        per_element = (self.masters + self.state) / max(self.setup.partition(self.numels), 1)
        return math.ceil(self.setup.slices / max(per_element, 1))


class ZeroStep(Step):
    """Stages 1 and 2: gradients are copied into a bucket, reduced, and copied to the partition's own buffer."""

    def begin(self, memory: LiveMemory) -> None:
        super().begin(memory)
        self.bucket = self.partitioned = 0  # bytes held
        owner = self.setup.partition(self.numels)
        ends = [0]
        for numel in self.numels:
            ends.append(ends[-1] + numel)
        # DeepSpeed keeps whole parameters where a rank owns a part of them.
        self.owned = 0
        self.pieces = 1
        for rank in range(self.setup.ranks):
            low, high = rank * owner, (rank + 1) * owner
            mine = [n for n, start in zip(self.numels, ends, strict=False) if start < high and start + n > low]
            if sum(mine) > self.owned:
                self.owned, self.largest = sum(mine), min(max(mine), owner)
            padding = high > ends[-1]
            self.pieces = max(self.pieces, len(mine) + padding)
        self.partition = owner
        if self.setup.placement == "host":  # staging for what is added up on the host
            memory.take("buffers", self.setup.weight * self.setup.staging)

    def accumulated(self) -> int:
        if self.setup.placement == "host":
            return 0
        return self.setup.weight * (self.total if self.setup.stage == 1 else self.owned_numel())

    def owned_numel(self) -> int:
        return self.total if self.setup.ranks == 1 else self.setup.partition(self.numels)

    def on_gradient(self, parameter: Tensor) -> None:
        self.make_bucket()
        if self.setup.stage == 2:
            self.into_bucket(parameter)
        else:
            super().on_gradient(parameter)

    def make_bucket(self) -> None:
        if not self.bucket:
            self.bucket = self.setup.weight * self.setup.bucket
            self.memory.take("buffers", self.bucket)

    def into_bucket(self, parameter: Tensor) -> None:
        if self.waiting + parameter.numel() > self.setup.bucket:
            self.reduce()
        if parameter.numel() <= self.setup.bucket:
            parameter.grad = None
        self.waiting += parameter.numel()

    def norms(self) -> None:
        """Each gradient in fp64, one after the other; the streamed step takes them in slices."""
        limit = self.slice_numel() if self.setup.placement == "streamed" else self.largest
        with self.memory.taken("buffers", FP64 * min(self.largest, limit)):
            pass

    def reduce(self) -> None:
        if not self.waiting:
            return
        if self.setup.ranks > 1:
            with self.memory.taken("buffers", self.setup.weight * self.waiting):
                pass
        if self.setup.placement == "host":
            largest = min(max(self.numels), self.partition)
            with self.memory.taken("buffers", FP64 * largest):
                pass
        elif not self.partitioned:
            self.partitioned = self.setup.weight * self.owned
            self.memory.take("gradients", self.partitioned)
        self.waiting = 0

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        self.make_bucket()
        if self.setup.stage == 1:
            for parameter in parameters:
                self.into_bucket(parameter)
        self.reduce()
        for parameter in parameters:
            parameter.grad = None
        self.memory.give("buffers", self.bucket)
        if self.setup.accumulates:
            self.memory.give("gradients", self.accumulated())

    def update(self) -> None:
        if self.setup.placement == "host":
            return
        with self.state_on_device():
            self.norms()
            if self.setup.placement == "streamed":
                self.optimize([self.partition])
                self.memory.give("gradients", self.partitioned)
                return
            flat = self.setup.weight * self.partition if self.pieces > 1 else 0
            self.memory.take("gradients", flat)
            if self.setup.weight < FP32:
                with self.memory.taken("gradients", FP32 * self.partition):
                    pass
                self.memory.give("gradients", flat + self.partitioned)
                self.optimize([self.partition])
            else:
                self.memory.give("gradients", self.partitioned if flat else 0)
                self.optimize([self.partition], fp32_gradients=False)


class Zero3Step(ZeroStep):
    """Stage 3: the bucket and the partition's gradients are made at set-up, as large as the largest block's."""

    def begin(self, memory: LiveMemory) -> None:
        Step.begin(self, memory)
        self.in_bucket = 0
        self.partition = self.setup.partition(self.numels)
        self.largest = max(-(-numel // self.setup.ranks) for numel in self.numels)

    def accumulated(self) -> int:
        return 0

    def on_gradient(self, parameter: Tensor) -> None:
        if self.waiting and self.waiting + parameter.numel() > self.setup.bucket:
            self.reduce()
        if self.waiting + parameter.numel() <= self.setup.bucket:
            parameter.grad = None
        self.waiting += parameter.numel()
        self.in_bucket += 1

    def reduce(self) -> None:
        flat = self.in_bucket > 1 or self.waiting % self.setup.ranks
        copies = int(flat) + (not self.setup.gpu)  # gloo makes another one
        with self.memory.taken("buffers", copies * self.setup.weight * self.waiting):
            pass
        if self.setup.placement == "host":  # sums and norms are taken on the device
            with self.memory.taken("buffers", (FP64 + self.setup.weight) * self.largest):
                pass
        self.waiting = self.in_bucket = 0

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        self.reduce()
        for parameter in parameters:
            parameter.grad = None

    def update(self) -> None:
        if self.setup.placement == "host":
            return
        whole = self.setup.weight * self.setup.persistent
        with self.state_on_device():
            self.memory.give("parameters", whole)
            self.norms()
            if self.setup.placement == "streamed":
                self.optimize([self.partition])
            else:
                flat = self.setup.weight * self.partition if len(self.numels) > 1 else 0
                with self.memory.taken("gradients", flat):
                    if self.setup.weight < FP32:
                        with self.memory.taken("gradients", FP32 * self.partition):
                            pass
                    else:
                        self.optimize([self.partition], fp32_gradients=False)
                if self.setup.weight < FP32:
                    self.optimize([self.partition])
            with self.memory.taken("buffers", whole):  # gathered again
                self.memory.take("parameters", whole)


# Stage 3's defaults, in elements: parameters up to this size stay whole; so much is gathered ahead; and so much of the
# model is looked ahead for a reason to keep what was gathered.
_PERSISTENT, _AHEAD, _REUSE = 100_000, 50_000_000, 1_000_000_000


def persistent(setup: Setup, numels: Iterable[int]) -> int:
    """Elements of the parameters that stage 3 keeps whole on every rank."""
    return sum(n for n in numels if n <= _PERSISTENT) if setup.stage == 3 and setup.ranks > 1 else 0


def gathered(setup: Setup, numels: Sequence[int]) -> int:
    """Elements that stage 3 holds at most of gathered weights: a bound, for which of them is left to timing.

    What backward needs again within ``_REUSE`` elements stays (so at most half of that, from the top of the model),
    the next ``_AHEAD`` elements are fetched, rounded up to a whole parameter, and fetching copies from a flat buffer.
    """
    if setup.stage < 3 or setup.ranks == 1:
        return 0
    partitioned = [n for n in numels if n > _PERSISTENT]
    largest, total = max(partitioned, default=0), sum(partitioned)
    return min(total, _REUSE // 2 + _AHEAD + 2 * largest) + min(total, _AHEAD + largest)


def make_step(setup: Setup, shapes: Sequence[Sequence[int]]) -> Step:
    kinds: dict[int, Callable[..., Step]] = {0: Step, 1: ZeroStep, 2: ZeroStep, 3: Zero3Step}
    return kinds[setup.stage](setup, shapes)
