"""The sizes of what DeepSpeed and the HiFT engine allocate around autograd in a step, in their order.

The classes mirror ``hift_ds/zero`` and ``hift_ds/state`` without importing them: a plan needs neither DeepSpeed nor a
device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from hift_ds.config import CODEC_ALIGNMENT, NORM_CHUNK, SLOT_OVERHEAD
from hift_ds.planner.simulation import LiveMemory, StepBase
from hift_ds.planner.timeline import Operation, Trace
from hift_ds.state.codec import FIRST_MOMENT, SECOND_MOMENT, Codec, Moment, Split, tables

FP32 = 4  # bytes of an element
FP64 = 8

# Optimizer state, in tensors of the weight's size. Adafactor keeps one row and one column of a matrix instead.
MOMENTS = {"adamw": 2, "sgd": 0, "sgdm": 1, "adagrad": 1, "lion": 1}
# Temporary tensors of the weight's size in an optimizer step: (one tensor after the other, all tensors at once).
_SCRATCH = {"adamw": (2, 1), "sgd": (1, 1), "sgdm": (1, 1), "adagrad": (2, 2), "lion": (1, 1), "adafactor": (1, 1)}
FUSED = ("adamw", "lion")  # DeepSpeed has fused GPU kernels for these, which need no temporary tensors


def state_numel(optimizer: str, shapes: Iterable[Sequence[int]]) -> int:
    """Return the elements of optimizer state for whole weights of these shapes."""
    if optimizer != "adafactor":
        return MOMENTS[optimizer] * sum(math.prod(shape) for shape in shapes)
    numel = 0
    for shape in shapes:
        rows = math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1] if len(shape) > 1 else math.prod(shape)
        numel += rows
    return numel


class Encoding(NamedTuple):
    """What the store keeps of an element, in which form: the codecs of :mod:`hift_ds.state.codec` know the sizes.

    Attributes:
        masters: fp32 master weights exist.
        moments: tensors of optimizer state.
        splits: the store keeps what 16-bit weights lack of the master weights.
        eight_bit: the store keeps the state in codes of 8 bit.
        carried: bytes of the element's weight, which travels along if it waits in host memory, too; else 0.
    """

    masters: bool
    moments: int
    splits: bool = False
    eight_bit: bool = False
    carried: int = 0

    def codecs(self) -> tuple[list[Codec], list[Codec]]:
        """Return the codecs of master weights and of state; empty: they are not encoded, or there are none."""
        of_state = [FIRST_MOMENT, SECOND_MOMENT][: self.moments] if self.eight_bit else []
        return [Split()] if self.masters and self.splits else [], [*of_state]

    @property
    def is_plain(self) -> bool:
        """Whether everything is kept as the step needs it."""
        return not (self.splits or self.eight_bit)

    def stored(self, numel: int) -> tuple[int, int]:
        """Return the bytes of the master weights and of the state of a tensor in the store."""
        with_room = -(-numel // CODEC_ALIGNMENT) * CODEC_ALIGNMENT  # of what is encoded
        masters, state = (
            sum(part.dtype.itemsize * (with_room // part.grain) for codec in codecs for part in codec.parts)
            for codecs in self.codecs()
        )
        plain_masters, plain_state = self._plain
        return masters + FP32 * plain_masters * numel, state + FP32 * plain_state * numel

    def encoded(self, numel: int) -> int:
        """Return the bytes of what is encoded of a tensor and of its weights, with the alignment of its parts."""
        if self.in_slot is None:
            return 0
        masters, state = self.stored(numel)
        return masters * self.splits + state * self.eight_bit + self.carried * numel * self.masters + SLOT_OVERHEAD

    @property
    def tables(self) -> int:
        """Bytes of the tables of the codecs on the device."""
        kinds = {codec.signed for codec in self.codecs()[1] if isinstance(codec, Moment)}
        return sum(table.nbytes for signed in kinds for table in tables(torch.device("meta"), signed))

    @property
    def per_element(self) -> tuple[float, float]:
        """Bytes of an element's master weight and state in the store."""
        masters, state = (sum(codec.bytes_per_value for codec in codecs) for codecs in self.codecs())
        plain_masters, plain_state = self._plain
        return masters + FP32 * plain_masters, state + FP32 * plain_state

    @property
    def _plain(self) -> tuple[int, int]:
        """The number of tensors of master weights and of state that are not encoded."""
        return self.masters and not self.splits, 0 if self.eight_bit else self.moments

    @property
    def moved(self) -> float:
        """Bytes of an element that travel in each direction."""
        return sum(self.per_element) + self.carried

    @property
    def in_slot(self) -> float | None:
        """Bytes of an element in a slot; None: those that the step needs."""
        if self.is_plain and not self.carried:
            return None
        return sum(self.per_element) + (self.carried if self.masters else FP32)  # fp32 weights may be the masters

    def temporary(self, numel: int) -> int:
        """Return the bytes of temporary tensors while a chunk is encoded, the copy of new state included."""
        masters, state = self.codecs()
        needed = [codec.temporary for codec in masters] + [codec.temporary + FP32 for codec in state]
        # Decoded tensors are larger than the values by this.
        room = 0 if self.is_plain else FP32 * CODEC_ALIGNMENT * (1 + self.moments)
        return max(needed, default=0) * numel + room

    def kernels(self) -> list[Operation]:
        """Return the kernels that decode and encode a chunk of ``TRACED`` elements."""
        return list(_kernels(self))


TRACED = 2**20  # elements


@cache
def _kernels(encoding: Encoding) -> tuple[Operation, ...]:
    masters, state = encoding.codecs()
    trace = Trace()
    for codec in [*masters, *state]:
        empty = partial(torch.empty, device="meta")
        stored = [empty(TRACED // part.grain, dtype=part.dtype) for part in codec.parts]
        values = empty(TRACED)
        codec.encode(values, stored)  # makes the codec's tables, which the step does not
        with trace:
            codec.decode(stored, values)
            codec.encode(values, stored)
    return tuple(trace.passes["forward"])


def bytes_per_element(optimizer: str) -> int:
    """Return the bytes of master weight and optimizer state of one element in a chunk of the streamed step."""
    return FP32 * (1 + MOMENTS[optimizer])


@dataclass(frozen=True)
class Setup:
    """Everything besides the model and the batch that determines the memory of a step.

    Attributes:
        stage: ZeRO stage.
        ranks: number of ranks.
        weight: bytes of one element of the weights, and of their gradients.
        optimizer: a key of ``_SCRATCH``.
        gpu: the optimizer uses a GPU's kernels, not those of PyTorch on a CPU.
        stock: DeepSpeed steps the whole model itself. Otherwise the engine steps one block.
        placement: when master weights and optimizer state are on the device. ``block``: during the step; ``streamed``:
            one chunk at a time; ``resident``: always; ``host``: never, because the host runs the step.
        bucket: elements of gradients that are reduced together.
        staging: elements of the buffer through which DeepSpeed copies gradients to the host, at ZeRO-1 and ZeRO-2.
        accumulates: gradients of earlier micro-batches exist.
        chunk: elements of a chunk of the streamed step.
        slot: bytes of each staging slot of the streamed step.
        slots: number of staging slots; 0: the engine moves no state to the device.
        persistent: elements of the parameters that ZeRO-3 keeps whole on every rank.
        splits, eight_bit: the form of what the store keeps: see :class:`Encoding`.
        weights: where weights that are not computed with wait: ``device``, or ``cpu``.
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
    chunk: int = 0
    slot: int = 0
    slots: int = 0
    persistent: int = 0
    splits: bool = False
    eight_bit: bool = False
    weights: str = "device"

    def partition(self, numels: Sequence[int]) -> int:
        """Return the elements of these parameters that a rank owns."""
        if self.stage == 3:
            return sum(-(-numel // self.ranks) for numel in numels)
        if self.stage in (1, 2):  # flat; each rank's partition starts at a multiple of 4 bytes in 16 bit
            return -(-sum(numels) // (2 * self.ranks)) * 2
        return sum(numels)

    @property
    def has_masters(self) -> bool:
        """Whether fp32 master weights exist. ZeRO makes them for fp32 weights, too."""
        return self.weight < FP32 or self.stage > 0

    @property
    def encoding(self) -> Encoding:
        """The form of what the store keeps."""
        carried = self.weight if self.weights == "cpu" and self.stage < 3 else 0
        return Encoding(self.has_masters, MOMENTS.get(self.optimizer, 0), self.splits, self.eight_bit, carried)

    @property
    def moves_state(self) -> bool:
        """Whether the engine moves optimizer state to the device for the step."""
        return self.placement in ("block", "streamed")

    @property
    def skips_bucket(self) -> bool:
        """Whether the engine at ZeRO-1 and ZeRO-2 uses the gradients of autograd, because one rank reduces nothing."""
        return not self.stock and self.ranks == 1

    @property
    def copies_gradients(self) -> bool:
        """Whether DeepSpeed copies gradients to the host during backward. The engine copies them in the step."""
        return self.stock and self.placement == "host"

    def masters(self, numels: Sequence[int]) -> int:
        """Return the bytes of fp32 master weights on a rank."""
        return FP32 * self.partition(numels) if self.has_masters else 0

    def stored(self, shapes: Sequence[Sequence[int]], slices: Sequence[int] = ()) -> tuple[int, int]:
        """Return the bytes of master weights and of optimizer state of these weights in a rank's store.

        Args:
            shapes: of the weights of an optimizer.
            slices: elements of the slices of the only weight, if it is cut by rows. Each is encoded on its own.
        """
        numels = [math.prod(shape) for shape in shapes]
        if self.encoding.is_plain:
            return self.masters(numels), self.state(shapes)
        tensors = slices or (numels if self.stage == 0 else [self.partition(numels)])
        ranks = self.ranks if slices and self.stage else 1
        sizes = [self.encoding.stored(-(-numel // ranks)) for numel in tensors]
        return sum(masters for masters, _ in sizes), sum(state for _, state in sizes)

    def state(self, shapes: Sequence[Sequence[int]]) -> int:
        """Return the bytes of optimizer state on a rank, without the step counts."""
        if self.stage == 0:
            return FP32 * state_numel(self.optimizer, shapes)
        return FP32 * MOMENTS[self.optimizer] * self.partition([math.prod(shape) for shape in shapes])


class Step(StepBase):
    """A step at ZeRO-0, which uses the gradients of autograd.

    Args:
        setup: what determines the memory.
        shapes: shapes of the parameters that get gradients, in order.
        updated: shapes the optimizer updates; for sliced tensors, the largest slice.
    """

    def __init__(self, setup: Setup, shapes: Sequence[Sequence[int]], updated: Sequence[Sequence[int]]):
        self.setup = setup
        self.numels = [math.prod(shape) for shape in shapes]
        self.total = sum(self.numels)
        self.partition = setup.partition(self.numels)
        self.masters, self.state = setup.masters(self.numels), setup.state(shapes)
        self.sliced: int | None = None  # elements of the largest slice, if a tensor is cut
        if sum(math.prod(shape) for shape in updated) < self.total:
            self.sliced = min(self.partition, sum(math.prod(shape) for shape in updated))
            self.masters = FP32 * self.sliced if setup.has_masters else 0
            self.state = FP32 * MOMENTS[setup.optimizer] * self.sliced
        self.parameters: Sequence[Tensor] = ()
        self.in_bucket = 0  # elements of gradients that wait in the bucket

    def begin(self, memory: LiveMemory) -> None:
        """Allocate the gradients of earlier micro-batches."""
        super().begin(memory)
        if self.setup.accumulates:
            memory.allocate("gradients", self.accumulated())

    def accumulated(self) -> int:
        """Return the bytes of gradients of earlier micro-batches."""
        return self.setup.weight * self.total

    def on_gradient(self, parameter: Tensor) -> None:
        """Keep the gradient, or add it to the one of earlier micro-batches."""
        if self.setup.accumulates:
            parameter.grad = None
        else:
            assert parameter.grad is not None
            self.memory.label(parameter.grad, "gradients")

    def drop_gradients(self) -> None:
        """Free the gradients of autograd."""
        for parameter in self.parameters:
            parameter.grad = None

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """Reduce the gradients, of which DeepSpeed flattens ``MEMORY_OPT_ALLREDUCE_SIZE`` elements at a time."""
        self.parameters = parameters
        bucket: list[int] = []
        for position, numel in enumerate(self.numels, start=1):
            bucket.append(numel)
            if sum(bucket) > 500_000_000 or position == len(self.numels):
                if len(bucket) > 1:
                    with self.memory.temporary("buffers", self.setup.weight * sum(bucket)):
                        pass
                bucket = []

    def update(self) -> None:
        """Compute the gradient norms and run the optimizer's step."""
        if self.setup.weight < FP32:
            with self.memory.temporary("buffers", FP32 * max(self.numels)):  # norm of one parameter at a time
                pass
        if not self.setup.stock:
            self.step_block(self.numels, fp32_gradients=self.setup.weight < FP32)
        elif self.setup.weight == FP32:
            self.optimize(self.numels, fp32_gradients=False)
        else:
            if (
                self.setup.stock and self.setup.gpu and self.setup.optimizer in FUSED
            ):  # DeepSpeed flattens the gradients
                with self.memory.temporary("buffers", FP32 * self.total if len(self.numels) > 1 else 0):
                    with self.memory.temporary("gradients", FP32 * self.total):
                        pass
            self.optimize(self.numels)

    def step_block(self, tensors: Sequence[int], fp32_gradients: bool = True) -> None:
        """Step as the engine does: with master weights and state on the device, brought there whole or in chunks.

        Args:
            tensors: elements of each tensor that the optimizer updates.
            fp32_gradients: the step copies the gradients of each chunk to fp32.
        """
        masters, state = (self.masters, self.state) if self.setup.moves_state else (0, 0)
        in_slot = 0  # bytes of a chunk that are in a slot, which is counted
        if self.sliced is not None:
            tensors = [self.sliced]
        if self.setup.placement == "streamed":
            tensors = [min(sum(tensors), self.setup.chunk)]
            masters = FP32 * tensors[0] if self.setup.has_masters else 0
            state = FP32 * MOMENTS[self.setup.optimizer] * tensors[0]
            # The staging slots hold the master weights. A block's first step creates its state outside the slots.
            in_slot = 0 if self.setup.splits else masters
            self.memory.free("buffers", in_slot)
        elif self.setup.placement == "block":  # what is encoded comes beside it
            encoded = self.setup.encoding.encoded(sum(tensors))
            self.memory.allocate("buffers", encoded)
            in_slot = -encoded
        with self.memory.temporary("master_weights", masters), self.memory.temporary("optimizer_state", state):
            self.optimize(tensors, fp32_gradients)
            if self.setup.moves_state:  # encoded beside the gradient
                with (
                    self.memory.temporary("gradients", FP32 * sum(tensors) if fp32_gradients else 0),
                    self.memory.temporary("buffers", self.setup.encoding.temporary(sum(tensors))),
                ):
                    pass
        self.memory.allocate("buffers", in_slot)

    def optimize(self, tensors: Sequence[int], fp32_gradients: bool = True) -> None:
        """Run the optimizer on tensors of these numbers of elements."""
        one, every = _SCRATCH[self.setup.optimizer]
        if self.setup.gpu and self.setup.optimizer in FUSED:
            scratch = 0
        elif self.setup.gpu and self.setup.optimizer != "adafactor":
            scratch = every * sum(tensors)
        else:  # a loop, whose variables still hold the previous tensor
            scratch = max(one * numel + before for numel, before in zip(tensors, [0, *tensors], strict=False))
        if self.setup.optimizer == "adafactor":
            scratch += self.state // FP32  # means over rows and columns
        counts = FP64 * 4 * (len(self.numels) + 1)  # a norm and a step count for each parameter
        gradients = FP32 * sum(tensors) if fp32_gradients else 0
        with self.memory.temporary("gradients", gradients), self.memory.temporary("buffers", FP32 * scratch + counts):
            pass


class ZeroStep(Step):
    """A step at ZeRO-1 or ZeRO-2.

    DeepSpeed copies gradients into a bucket, reduces the bucket and copies the result to the partition's buffer. On one
    rank the engine skips the bucket.
    """

    def begin(self, memory: LiveMemory) -> None:
        """Find the rank that owns most, and allocate what exists before the forward pass."""
        super().begin(memory)
        self.bucket = self.partitioned = 0  # allocated bytes
        ends = [0]
        for numel in self.numels:
            ends.append(ends[-1] + numel)
        # DeepSpeed keeps the whole gradient of a parameter of which a rank owns some elements.
        self.owned = 0
        self.tensors = 1  # in the flat buffer of a rank
        for rank in range(self.setup.ranks):
            low, high = rank * self.partition, (rank + 1) * self.partition
            mine = [n for n, start in zip(self.numels, ends, strict=False) if start < high and start + n > low]
            if sum(mine) > self.owned:
                self.owned, self.largest = sum(mine), min(max(mine), self.partition)
            padding = high > ends[-1]
            self.tensors = max(self.tensors, len(mine) + padding)
        if self.setup.copies_gradients:  # through which gradients reach the host
            memory.allocate("buffers", self.setup.weight * self.setup.staging)

    def accumulated(self) -> int:
        """Return the bytes of gradients of earlier micro-batches; the host step keeps them on the host."""
        if self.setup.copies_gradients:
            return 0
        is_whole = self.setup.stage == 1 or self.setup.ranks == 1
        return self.setup.weight * (self.total if is_whole else self.partition)

    def on_gradient(self, parameter: Tensor) -> None:
        """Copy the gradient into the bucket at ZeRO-2, or keep it until the end of backward at ZeRO-1."""
        if self.setup.skips_bucket:
            if self.setup.stage == 1:
                super().on_gradient(parameter)
            else:  # the end of backward adds it to earlier micro-batches
                assert parameter.grad is not None
                self.memory.label(parameter.grad, "gradients")
            return
        self.make_bucket()
        if self.setup.stage == 2:
            self.add_to_bucket(parameter)
        else:
            super().on_gradient(parameter)

    def make_bucket(self) -> None:
        """Allocate the bucket, once."""
        if not self.bucket:
            self.bucket = self.setup.weight * self.setup.bucket
            self.memory.allocate("buffers", self.bucket)

    def add_to_bucket(self, parameter: Tensor) -> None:
        """Copy a gradient into the bucket, and reduce the bucket first if the gradient does not fit."""
        if self.in_bucket + parameter.numel() > self.setup.bucket:
            self.reduce()
        if parameter.numel() <= self.setup.bucket:
            parameter.grad = None
        self.in_bucket += parameter.numel()

    def compute_norms(self) -> None:
        """Copy gradients to fp64 for their norms: one tensor at a time, or one chunk at a time in the engine."""
        with self.memory.temporary(
            "buffers", FP64 * (self.largest if self.setup.stock else min(self.largest, NORM_CHUNK))
        ):
            pass

    def reduce(self) -> None:
        """Reduce the bucket and copy the result to the partition."""
        if not self.in_bucket:
            return
        if self.setup.ranks > 1:
            with self.memory.temporary("buffers", self.setup.weight * self.in_bucket):
                pass
        if self.setup.copies_gradients:
            largest = min(max(self.numels), self.partition)
            with self.memory.temporary("buffers", FP64 * largest):
                pass
        elif not self.partitioned:
            self.partitioned = self.setup.weight * self.owned
            self.memory.allocate("gradients", self.partitioned)
        self.in_bucket = 0

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """Reduce what is left, and free the bucket."""
        self.parameters = parameters
        if self.setup.skips_bucket:
            if self.setup.accumulates:
                self.drop_gradients()
            return
        self.make_bucket()
        if self.setup.stage == 1:
            for parameter in parameters:
                self.add_to_bucket(parameter)
        self.reduce()
        self.drop_gradients()
        self.memory.free("buffers", self.bucket)
        if self.setup.accumulates:
            self.memory.free("gradients", self.accumulated())

    def drop_unconverted(self) -> None:
        """Free the gradients in the precision of the weights."""
        self.drop_gradients()
        self.memory.free("gradients", self.partitioned)
        if self.setup.skips_bucket and self.setup.accumulates:
            self.memory.free("gradients", self.accumulated())

    def update(self) -> None:
        """Compute the gradient norms, convert the gradients to fp32 and run the optimizer's step."""
        if self.setup.copies_gradients:
            return
        self.compute_norms()
        if not self.setup.stock:
            if self.setup.placement != "host":
                self.step_block([self.partition])
            self.drop_unconverted()
            return
        flat = self.setup.weight * self.partition if self.tensors > 1 else 0
        self.memory.allocate("gradients", flat)
        if self.setup.weight < FP32:
            with self.memory.temporary("gradients", FP32 * self.partition):
                pass
            self.memory.free("gradients", flat)
            self.drop_unconverted()
            self.optimize([self.partition])
        else:  # the optimizer uses the flat gradients, or the only gradient
            if flat:
                self.drop_unconverted()
            self.optimize([self.partition], fp32_gradients=False)


class Zero3Step(ZeroStep):
    """A step at ZeRO-3.

    The bucket and the partition's gradients are allocated once, for the largest block. :meth:`Planner.held` counts
    them.
    """

    linear_saves_input = True

    def begin(self, memory: LiveMemory) -> None:
        """Find the largest parameter; nothing is allocated here."""
        Step.begin(self, memory)
        self.gradients_in_bucket = 0
        self.largest = max(-(-numel // self.setup.ranks) for numel in self.numels)

    def accumulated(self) -> int:
        """Return 0: the partition's gradients also hold those of earlier micro-batches."""
        return 0

    def on_gradient(self, parameter: Tensor) -> None:
        """Copy the gradient into the bucket if it fits."""
        if self.in_bucket and self.in_bucket + parameter.numel() > self.setup.bucket:
            self.reduce()
        if self.in_bucket + parameter.numel() <= self.setup.bucket:
            parameter.grad = None
        self.in_bucket += parameter.numel()
        self.gradients_in_bucket += 1

    def reduce(self) -> None:
        """Reduce the bucket; the result is scattered to the partitions."""
        flat = self.gradients_in_bucket > 1 or self.in_bucket % self.setup.ranks
        copies = int(flat) + (not self.setup.gpu)  # gloo makes another copy
        with self.memory.temporary("buffers", copies * self.setup.weight * self.in_bucket):
            pass
        if self.setup.copies_gradients:  # the device computes sums and norms
            with self.memory.temporary("buffers", (FP64 + self.setup.weight) * self.largest):
                pass
        self.in_bucket = self.gradients_in_bucket = 0

    def after_backward(self, parameters: Sequence[Tensor]) -> None:
        """Reduce what is left in the bucket."""
        self.parameters = parameters
        self.reduce()
        self.drop_gradients()

    def update(self) -> None:
        """Partition the persistent parameters, run the optimizer's step, and gather them again."""
        if self.setup.copies_gradients:
            return
        whole = self.setup.weight * self.setup.persistent
        self.memory.free("parameters", whole)
        self.compute_norms()
        if not self.setup.stock:
            if self.setup.placement != "host":
                self.step_block([self.partition])
        else:
            flat = self.setup.weight * self.partition if len(self.numels) > 1 else 0
            with self.memory.temporary("gradients", flat):
                if self.setup.weight < FP32:
                    with self.memory.temporary("gradients", FP32 * self.partition):
                        pass
                else:
                    self.optimize([self.partition], fp32_gradients=False)
            if self.setup.weight < FP32:
                self.optimize([self.partition])
        with self.memory.temporary("buffers", whole):  # gathered again
            self.memory.allocate("parameters", whole)


# Defaults of DeepSpeed's ZeRO-3 settings, all in elements.
_PERSISTENCE_THRESHOLD = 100_000  # stage3_param_persistence_threshold
_PREFETCH = 50_000_000  # stage3_prefetch_bucket_size
_REUSE_DISTANCE = 1_000_000_000  # stage3_max_reuse_distance


def persistent_numel(setup: Setup, numels: Iterable[int]) -> int:
    """Return the elements of the parameters that ZeRO-3 keeps whole on every rank.

    Args:
        setup: gives the stage and the number of ranks.
        numels: elements of each parameter.
    """
    is_sharded = setup.stage == 3 and (setup.ranks > 1 or setup.weights == "cpu")
    return sum(n for n in numels if n <= _PERSISTENCE_THRESHOLD) if is_sharded else 0


def gathered_numel(
    setup: Setup, numels: Sequence[int], reached: Sequence[int], layers: Sequence[int], active: Sequence[int]
) -> int:
    """Return an upper bound of the elements of gathered weights at ZeRO-3. The exact number depends on timing.

    ZeRO-3 keeps weights that it needs again within the reuse distance. Around the turn from forward to backward that is
    at most half of the distance, from the top of the model. It fetches the next weights up to the prefetch bucket,
    rounded up to a whole parameter. DeepSpeed itself copies them from a flat buffer.

    Of weights that wait in host memory, the engine gathers two hidden layers and one more parameter at most. In a step
    it has a rank's part of the active block instead.

    Args:
        setup: gives the stage, the number of ranks and the bucket.
        numels: elements of each parameter.
        reached: elements of each parameter that the backward pass reaches.
        layers: elements of each hidden layer.
        active: elements of each parameter of the active block.
    """
    if setup.stage < 3 or setup.ranks == 1 and setup.weights == "device":
        return 0
    partitioned = [n for n in numels if n > _PERSISTENCE_THRESHOLD]
    largest, total = max(partitioned, default=0), sum(partitioned)
    if setup.weights == "cpu":
        return max(min(total, 2 * max(layers) + largest), setup.partition(active))
    kept = min(sum(n for n in reached if n > _PERSISTENCE_THRESHOLD), _REUSE_DISTANCE // 2)
    ahead = _PREFETCH if setup.stock else min(_PREFETCH, setup.bucket)  # the engine fetches at most the largest block
    flat = min(total, ahead + largest) if setup.stock else 0
    return min(total, kept + ahead + 2 * largest) + flat


def make_step(setup: Setup, shapes: Sequence[Sequence[int]], updated: Sequence[Sequence[int]]) -> Step:
    """Return the step of the setup's ZeRO stage; the arguments are those of :class:`Step`."""
    kinds: dict[int, Callable[..., Step]] = {0: Step, 1: ZeroStep, 2: ZeroStep, 3: Zero3Step}
    return kinds[setup.stage](setup, shapes, updated)
