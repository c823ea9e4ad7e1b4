"""What DeepSpeed and the HiFT engine hold beside autograd in a step, at each ZeRO stage: sizes only, in their order.

The planner's counterpart of ``zero.py``, ``step.py`` and ``offload.py``, which it must not load: a plan needs neither
DeepSpeed nor a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hift_ds import config
from hift_ds.config import NORM_CHUNK
from hift_ds.planner.simulation import LiveMemory, StepBase

FP32 = 4  # bytes of an element
FP64 = 8

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


def slot_bytes(optimizer: str, blocks: Iterable[Sequence[int]], ranks: int, buffer_size: int) -> int:
    """Bytes of each of the two staging areas of the streamed step; ``blocks``: elements of each block's parameters."""
    return config.slot_bytes(blocks, ranks, _per_element(optimizer), buffer_size)


def _per_element(optimizer: str) -> int:
    """Bytes of master and state of an element, as the engine cuts its slices."""
    return FP32 * (1 + MOMENTS[optimizer])


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a step beside the model and the batch.

    Attributes:
        stage, ranks: of ZeRO.
        weight: bytes of an element of the weights, and of their gradients.
        optimizer: a key of ``_SCRATCH``.
        gpu: which kernels step: a GPU's or plain PyTorch's on a CPU.
        stock: DeepSpeed's own step of the whole model, not the engine's of one block.
        placement: masters and state are on the device for ``block``: the step; ``streamed``: a slice at a time;
            ``resident``: always; ``host``: never, the step is on the host.
        bucket: elements that wait for their reduction together.
        staging: elements of the buffer through which gradients reach the host, at stages 1 and 2.
        accumulates: gradients of earlier micro-batches are there.
        slot: bytes of each of the two staging areas of the streamed step.
        persistent: elements of the parameters that stage 3 keeps whole on every rank.
    """

    stage: int
    ranks: int
    weight: int
    optimizer: str
    gpu: bool
    stock: bool
    placement: str
    bucket: int
    staging: int = 0
    accumulates: bool = False
    slot: int = 0
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

    @property
    def comes_to_device(self) -> bool:
        """State is off the device but for the step, which the engine takes."""
        return self.placement in ("block", "streamed")

    @property
    def alone(self) -> bool:
        """Stages 1 and 2: with nothing to reduce, the engine leaves gradients where autograd put them."""
        return not self.stock and self.ranks == 1 and self.placement != "host"

    def masters(self, numels: Sequence[int]) -> int:
        """Bytes of fp32 master weights on a rank."""
        return FP32 * self.partition(numels) if self.has_masters else 0

    def state(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of optimizer state on a rank, without the step counters."""
        if self.stage == 0:
            return FP32 * state_numel(self.optimizer, shapes)
        return FP32 * MOMENTS[self.optimizer] * self.partition([math.prod(shape) for shape in shapes])


class Step(StepBase):
    """The way of a block's gradients to its updated weights. Here: stage 0, gradients stay where autograd puts them.

    ``shapes`` are those of the parameters that get gradients, in their order; ``stepped`` those of what is updated,
    which is less where a parameter is cut by rows.
    """

    def __init__(self, setup: Setup, shapes: Sequence[Sequence[int]], stepped: Sequence[Sequence[int]]):
        self.setup = setup
        self.numels = [math.prod(shape) for shape in shapes]
        self.total = sum(self.numels)
        self.partition = setup.partition(self.numels)
        self.masters, self.state = setup.masters(self.numels), setup.state(shapes)
        self.stepped: int | None = None  # elements, where that is not all
        if sum(math.prod(shape) for shape in stepped) < self.total:
            self.stepped = min(self.partition, sum(math.prod(shape) for shape in stepped))
            self.masters = FP32 * self.stepped if setup.has_masters else 0
            self.state = FP32 * MOMENTS[setup.optimizer] * self.stepped
        self.parameters: Sequence[Tensor] = ()
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

    def drop_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """The all-reduce takes flat copies of up to ``MEMORY_OPT_ALLREDUCE_SIZE`` elements, on one rank too."""
        self.parameters = parameters
        bucket: list[int] = []
        for position, numel in enumerate(self.numels, start=1):
            bucket.append(numel)
            if sum(bucket) > 500_000_000 or position == len(self.numels):
                if len(bucket) > 1:
                    with self.memory.taken("buffers", self.setup.weight * sum(bucket)):
                        pass
                bucket = []

    def update(self) -> None:
        if self.setup.weight < FP32:
            with self.memory.taken("buffers", FP32 * max(self.numels)):  # norms, one parameter at a time
                pass
        if self.setup.comes_to_device:
            self.step_off_device(self.numels, fp32_gradients=self.setup.weight < FP32)
        elif self.setup.weight == FP32:
            self.optimize(self.numels, fp32_gradients=False)
        else:
            if self.setup.stock and self.setup.gpu and self.setup.optimizer in FUSED:  # it flattens
                with self.memory.taken("buffers", FP32 * self.total if len(self.numels) > 1 else 0):
                    with self.memory.taken("gradients", FP32 * self.total):
                        pass
            self.optimize(self.numels)

    def step_off_device(self, tensors: Sequence[int], fp32_gradients: bool = True) -> None:
        """The engine's own step: masters and state come to the device, all at once or a slice after the other.

        Args:
            tensors: elements of each tensor that the optimizer steps.
            fp32_gradients: they are made for the step, of the slice.
        """
        masters, state = self.masters, self.state
        if self.stepped is not None:  # of a parameter that has it all
            tensors = [self.stepped]
        if self.setup.placement == "streamed":
            tensors = [min(sum(tensors), self.setup.slot // _per_element(self.setup.optimizer))]
            masters = FP32 * tensors[0] if self.setup.has_masters else 0
            state = FP32 * MOMENTS[self.setup.optimizer] * tensors[0]
            # Masters are in their staging area. State is made by the block's first step, outside of it.
            self.memory.give("buffers", masters)
        with self.memory.taken("master_weights", masters), self.memory.taken("optimizer_state", state):
            self.optimize(tensors, fp32_gradients)
        if self.setup.placement == "streamed":
            self.memory.take("buffers", masters)

    def optimize(self, tensors: Sequence[int], fp32_gradients: bool = True) -> None:
        """The optimizer's own step on tensors of so many elements."""
        one, every = _SCRATCH[self.setup.optimizer]
        if self.setup.gpu and self.setup.optimizer in FUSED:
            scratch = 0
        elif self.setup.gpu and self.setup.optimizer != "adafactor":
            scratch = every * sum(tensors)
        else:  # in a loop, whose variables still hold the tensor before
            scratch = max(one * numel + before for numel, before in zip(tensors, [0, *tensors], strict=False))
        if self.setup.optimizer == "adafactor":
            scratch += self.state // FP32  # means of rows and columns
        counts = FP64 * 4 * (len(self.numels) + 1)  # norms and step counters, one of each a parameter
        gradients = FP32 * sum(tensors) if fp32_gradients else 0
        with self.memory.taken("gradients", gradients), self.memory.taken("buffers", FP32 * scratch + counts):
            pass


class ZeroStep(Step):
    """Stages 1 and 2: gradients are copied into a bucket, reduced, and copied to the partition's own buffer.

    On one rank the engine does without: gradients stay where autograd puts them.
    """

    def begin(self, memory: LiveMemory) -> None:
        super().begin(memory)
        self.bucket = self.partitioned = 0  # bytes held
        ends = [0]
        for numel in self.numels:
            ends.append(ends[-1] + numel)
        # DeepSpeed keeps whole parameters where a rank owns a part of them.
        self.owned = 0
        self.pieces = 1
        for rank in range(self.setup.ranks):
            low, high = rank * self.partition, (rank + 1) * self.partition
            mine = [n for n, start in zip(self.numels, ends, strict=False) if start < high and start + n > low]
            if sum(mine) > self.owned:
                self.owned, self.largest = sum(mine), min(max(mine), self.partition)
            padding = high > ends[-1]
            self.pieces = max(self.pieces, len(mine) + padding)
        if self.setup.placement == "host":  # staging for what is added up on the host
            memory.take("buffers", self.setup.weight * self.setup.staging)

    def accumulated(self) -> int:
        if self.setup.placement == "host":
            return 0
        is_whole = self.setup.stage == 1 or self.setup.ranks == 1
        return self.setup.weight * (self.total if is_whole else self.partition)

    def on_gradient(self, parameter: Tensor) -> None:
        if self.setup.alone:
            if self.setup.stage == 1:
                super().on_gradient(parameter)
            else:  # added to those before at the end of backward
                assert parameter.grad is not None
                self.memory.label(parameter.grad, "gradients")
            return
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
        """Each gradient in fp64, one after the other, at most so many elements at a time."""
        with self.memory.taken("buffers", FP64 * (self.largest if self.setup.stock else min(self.largest, NORM_CHUNK))):
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
        self.parameters = parameters
        if self.setup.alone:
            if self.setup.accumulates:
                self.drop_gradients()
            return
        self.make_bucket()
        if self.setup.stage == 1:
            for parameter in parameters:
                self.into_bucket(parameter)
        self.reduce()
        self.drop_gradients()
        self.memory.give("buffers", self.bucket)
        if self.setup.accumulates:
            self.memory.give("gradients", self.accumulated())

    def drop_16_bit(self) -> None:
        """Gradients in the weights' precision are not needed any more."""
        self.drop_gradients()
        self.memory.give("gradients", self.partitioned)
        if self.setup.alone and self.setup.accumulates:
            self.memory.give("gradients", self.accumulated())

    def update(self) -> None:
        if self.setup.placement == "host":
            return
        self.norms()
        if self.setup.comes_to_device:
            self.step_off_device([self.partition])
            self.drop_16_bit()
            return
        flat = self.setup.weight * self.partition if self.pieces > 1 else 0
        self.memory.take("gradients", flat)
        if self.setup.weight < FP32:
            with self.memory.taken("gradients", FP32 * self.partition):
                pass
            self.memory.give("gradients", flat)
            self.drop_16_bit()
            self.optimize([self.partition])
        else:  # the flat gradients are the optimizer's, or the one that there is
            if flat:
                self.drop_16_bit()
            self.optimize([self.partition], fp32_gradients=False)


class Zero3Step(ZeroStep):
    """Stage 3: the bucket and the partition's gradients are made at set-up, as large as the largest block's."""

    linear_keeps_input = True

    def begin(self, memory: LiveMemory) -> None:
        Step.begin(self, memory)
        self.in_bucket = 0
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
        self.parameters = parameters
        self.reduce()
        self.drop_gradients()

    def update(self) -> None:
        if self.setup.placement == "host":
            return
        whole = self.setup.weight * self.setup.persistent
        self.memory.give("parameters", whole)
        self.norms()
        if self.setup.comes_to_device:
            self.step_off_device([self.partition])
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


def gathered(setup: Setup, numels: Sequence[int], reached: Sequence[int]) -> int:
    """Elements that stage 3 holds at most of gathered weights: a bound, for which of them is left to timing.

    What backward needs again within ``_REUSE`` elements stays (so at most half of that, from the top of the model),
    the next ``_AHEAD`` elements are fetched, rounded up to a whole parameter, and fetching copies from a flat buffer.

    Args:
        numels: of all parameters.
        reached: of those that backward passes.
    """
    if setup.stage < 3 or setup.ranks == 1:
        return 0
    partitioned = [n for n in numels if n > _PERSISTENT]
    largest, total = max(partitioned, default=0), sum(partitioned)
    kept = min(sum(n for n in reached if n > _PERSISTENT), _REUSE // 2)
    ahead = _AHEAD if setup.stock else min(_AHEAD, setup.bucket)  # the engine's are of the largest block at most
    return min(total, kept + ahead + 2 * largest) + min(total, ahead + largest)


def make_step(setup: Setup, shapes: Sequence[Sequence[int]], stepped: Sequence[Sequence[int]]) -> Step:
    kinds: dict[int, Callable[..., Step]] = {0: Step, 1: ZeroStep, 2: ZeroStep, 3: Zero3Step}
    return kinds[setup.stage](setup, shapes, stepped)
