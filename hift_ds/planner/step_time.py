"""The predicted time of a step: the program of a step, by arithmetic from the plan, on the simulated device."""

from __future__ import annotations

import difflib
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hift_ds.planner.accounting import FP32, TRACED
from hift_ds.planner.plan import Plan, Planner
from hift_ds.planner.request import Request
from hift_ds.planner.timeline import (
    CARDS,
    DRIVE,
    FETCH,
    HOST,
    HOST_SECONDS,
    MAIN,
    PAGEABLE_SHARE,
    READ,
    STEP,
    STORE,
    TO_DEVICE,
    TO_HOST,
    WEIGHTS,
    WRITE,
    Card,
    Operation,
    kernel_seconds,
    simulate,
)

_VISIBLE = 1.05  # copies that lengthen a step by less are hidden
_LARGEST_BATCH = 256  # sequences
_BEFORE_LAYERS = 4  # operations of a forward pass: a late update is issued when the first layer runs
_DECISION = 8  # bytes of the number by which the host decides whether to skip the step
_STEPS = 4  # of a simulation; the last but one takes as long as all later ones


class Stepper(NamedTuple):
    """How the optimizer steps one block on the device.

    Attributes:
        chunks: for each chunk, the elements of its slices.
        moments: tensors of optimizer state.
        weight: bytes of an element of the weights.
        slots: staging slots; 0: state stays on the device.
        moved: bytes of an element that cross the bus in each direction.
        in_files: bytes of an element that are read from files and written to them.
        codes: kernels that decode and encode ``TRACED`` elements of a chunk.
        defer: the update runs under the next forward pass, until that reaches ``position``.
        position: the share of the forward pass that comes before the block.
        layers: numbers of the hidden layers in the block.
        waits: the host waits for each copy, because host memory is not page-locked.
    """

    chunks: list[list[int]]
    moments: int
    weight: int
    slots: int
    moved: float = 12.0
    in_files: float = 0.0
    codes: tuple[Operation, ...] = ()
    defer: bool = False
    position: float = 0.0
    layers: tuple[int, ...] = ()
    waits: bool = False

    def nbytes(self, slices: Sequence[int]) -> float:
        """Return the bytes of a chunk that cross the bus in each direction. One call issues all copies of a chunk."""
        return self.moved * sum(slices)

    def kernels(self, slices: Sequence[int], stream: str, after: tuple[int, ...]) -> list[Operation]:
        """Return the kernels that step a chunk: gradients to fp32, a fused step, weights back to 16 bit."""
        numel = sum(slices)
        casts = [Operation(stream, nbytes=(FP32 + self.weight) * n) for n in slices] if self.weight < FP32 else []
        fused = Operation(stream, nbytes=FP32 * (3 + 2 * self.moments) * numel)
        codes = [one.times(numel / TRACED)._replace(stream=stream) for one in self.codes]
        kernels = [*casts, *codes, fused, *casts]
        kernels[0] = kernels[0]._replace(after=after)
        return kernels


def chunks(numels: Sequence[int], limit: int | None) -> list[list[int]]:
    """Cut tensors of these numbers of elements into chunks of at most ``limit`` elements; None: one chunk."""
    if limit is None:
        return [list(numels)]
    result: list[list[int]] = [[]]
    for numel in numels:
        while numel:
            room = limit - sum(result[-1])
            if room <= 0:
                result.append([])
                continue
            result[-1].append(min(numel, room))
            numel -= result[-1][-1]
    return result


class _Layers:
    """The weights of hidden layers on their way into two slots on the device: layer i into slot i % 2.

    Args:
        result: the program, to which copies are added.
        nbytes: bytes of the weights of each layer; empty: all weights stay on the device.
        waits: the host waits for each copy.
    """

    def __init__(self, result: list[Operation], nbytes: Sequence[float], waits: bool = False):
        self._result, self._nbytes, self._waits = result, nbytes, waits
        self._held: list[int | None] = [None, None]  # the layer in each slot, and its last copy
        self._copied: list[tuple[int, ...]] = [(), ()]
        self._stale: dict[int, tuple[int, ...] | None] = {}  # layer -> after what the host has its new weights

    def fetch(self, layer: int | None) -> None:
        """Copy a layer's weights into its slot, behind all that was issued, unless they are there."""
        if layer is None or not self._nbytes or self._held[layer % 2] == layer:
            return
        written = self._stale.get(layer, ())
        if written is None:  # the update is not issued yet
            return
        computed = next((i for i in range(len(self._result) - 1, -1, -1) if self._result[i].stream == MAIN), None)
        after = written if computed is None else (*written, computed)
        self._result.append(Operation(WEIGHTS, TO_DEVICE, nbytes=self._nbytes[layer], after=after))
        _wait_for_copy(self._result, self._waits)
        self._held[layer % 2], self._copied[layer % 2] = layer, (len(self._result) - 1,)

    def enter(self, layer: int) -> tuple[int, ...]:
        """Return what the first operation of a layer waits for."""
        self.fetch(layer)
        return self._copied[layer % 2] if self._nbytes else ()

    def change(self, layers: Iterable[int], written: tuple[int, ...] | None) -> None:
        """Forget the copies of layers, whose new weights are in host memory after ``written``; None: not issued."""
        for layer in layers:
            self._stale[layer] = written
            if self._held[layer % 2] == layer:
                self._held[layer % 2] = None


def _wait_for_copy(result: list[Operation], waits: bool) -> None:
    """Let the host wait for the last operation, if it waits for copies."""
    if waits:
        result.append(Operation(HOST, after=(len(result) - 1,)))


def program(
    forward: Sequence[Operation],
    backward: Sequence[Operation],
    tensors: Sequence[int],
    stepper: Stepper,
    steps: int,
    layers: Sequence[float] = (),
) -> tuple[list[Operation], list[int]]:
    """Return the operations of several equal steps, and the index at which each begins and the last one ends.

    The order is the engine's. A deferred update is issued when the first layer of the next forward pass runs; that of
    the last step follows its end. The chunks of the next block are fetched in turns with the stores. State in files is
    read a whole block ahead, and written behind. The weights of a layer that wait in host memory are copied while the
    layer before computes.

    Args:
        forward, backward: the passes of a step.
        tensors: elements of each gradient, whose norms are computed.
        stepper: how the block is stepped.
        steps: number of steps.
        layers: bytes of the weights of each hidden layer, if they wait in host memory.
    """
    result: list[Operation] = []
    begins: list[int] = []
    free: deque[tuple[int, ...]] = deque([()] * stepper.slots)  # for each free slot, after what it is filled
    fetched: deque[int] = deque()  # the last copy of each chunk on the device, or on its way
    ahead = 0  # chunks that were asked for: of the block, and once it has all, of the next one
    is_late = False  # the update of the last step is not issued yet
    read: deque[int] = deque()  # reads of chunks from files that were not fetched
    weights = _Layers(result, layers, stepper.waits)
    entered = [operation.enters for operation in (*forward, *backward) if operation.enters is not None]
    visits: deque[int] = deque(entered * steps)

    def fetch(limit: int) -> None:
        """As much as the free slots hold, of the chunks of a block and of those of the next block."""
        nonlocal ahead
        while free and ahead < limit:
            slices = stepper.chunks[ahead % len(stepper.chunks)]
            after = (*free.popleft(), *((read.popleft(),) if stepper.in_files else ()))
            result.append(Operation(FETCH, TO_DEVICE, nbytes=stepper.nbytes(slices), after=after))
            _wait_for_copy(result, stepper.waits)
            fetched.append(len(result) - 1)
            ahead += 1

    def read_block() -> None:
        """Read the chunks of a block from files."""
        for slices in stepper.chunks if stepper.in_files else ():
            result.append(Operation(DRIVE, READ, nbytes=stepper.in_files * sum(slices)))
            read.append(len(result) - 1)

    def update(stream: str, after: int) -> tuple[int, ...]:
        """Step the chunks, and fetch those of the next block in turns with the stores. Return the last operation."""
        nonlocal ahead
        count = len(stepper.chunks)
        stored = stepped = after
        for slices in stepper.chunks:
            if stepper.slots:
                fetch(count)
                result.extend(stepper.kernels(slices, stream, (after, fetched.popleft())))
                stepped = len(result) - 1
                result.append(Operation(STORE, TO_HOST, nbytes=stepper.nbytes(slices), after=(stepped,)))
                _wait_for_copy(result, stepper.waits)
                stored = len(result) - 1
                if stepper.in_files:
                    result.append(Operation(DRIVE, WRITE, nbytes=stepper.in_files * sum(slices), after=(stored,)))
                free.append((stored,))
                if ahead >= count:
                    fetch(2 * count)
            else:
                result.extend(stepper.kernels(slices, stream, (after,)))
                stepped = stored = len(result) - 1
        ahead -= count if stepper.slots else 0
        weights.change(stepper.layers, (stored,))
        return (stepped,)

    def run(operations: Sequence[Operation], after: Mapping[int, tuple[int, ...]]) -> None:
        """Issue a pass; ``after``: what some of its operations wait for."""
        for number, operation in enumerate(operations):
            waits = after.get(number, ())
            if operation.enters is not None:
                layer = visits.popleft()
                waits = (*waits, *weights.enter(layer))
                if visits and visits[0] % 2 != layer % 2:  # else its slot is in use
                    weights.fetch(visits[0])
            result.append(operation._replace(after=waits))

    read_block()
    for _ in range(steps):
        begins.append(len(result))
        read_block()
        reached = int(stepper.position * (len(forward) - 1))
        begin = min(reached, _BEFORE_LAYERS)
        run(forward[:begin], {})
        updated = update(STEP, len(result) - 1) if is_late else ()
        run(forward[begin:], {reached - begin: updated})
        run(backward, {})
        weights.fetch(visits[0] if visits else None)
        if stepper.slots:
            fetch(len(stepper.chunks))
        result += [Operation(MAIN, nbytes=stepper.weight * numel) for numel in tensors]  # norms
        result.append(Operation(MAIN, TO_HOST, nbytes=_DECISION))  # behind the copies to the host of the last update
        result.append(Operation(HOST, after=(len(result) - 1,)))
        is_late = stepper.defer
        if is_late:
            weights.change(stepper.layers, None)
        else:
            update(MAIN, len(result) - 2)
    begins.append(len(result))
    if is_late:
        update(STEP, len(result) - 1)
    return result, begins


class Figures(NamedTuple):
    """Seconds of a step.

    Attributes:
        seconds: the step.
        kernels: all its kernels, one after the other.
        bus: its copies to the device.
        drive: what it reads from files and writes to them.
        host: the host's time to issue it.
        without_bus: the step, if copies (those of files included) took no time.
    """

    seconds: float
    kernels: float
    bus: float
    drive: float
    host: float
    without_bus: float

    @property
    def limit(self) -> str:
        """What takes longest alone: ``kernels``, ``bus``, ``drive`` or ``host``. A step cannot take less."""
        return max(("kernels", "bus", "drive", "host"), key=lambda name: float(getattr(self, name)))

    @property
    def hides_copies(self) -> bool:
        """Whether a step takes at most 5 % longer than without copies."""
        return self.seconds <= _VISIBLE * self.without_bus

    def towards(self, other: Figures, share: float) -> Figures:
        """Return the figures at a share of the way to others."""
        return Figures(*(a + share * (b - a) for a, b in zip(self, other, strict=True)))


class StepTimes:
    """Predicts the time of the steps of planned runs on one card: of one rank, without communication.

    Args:
        planner: plans the runs.
        card: a key of ``CARDS``.
        defer: as ``hift.offload.defer``.
        host_seconds: the host's time to issue one operation.
    """

    def __init__(self, planner: Planner, card: str, defer: bool = True, host_seconds: float = HOST_SECONDS):
        self.planner, self.name, self.card, self.defer = planner, card, CARDS[card], defer
        self.host_seconds = host_seconds

    def answer(self, plan: Plan) -> Plan:
        """Set the plan's ``time``, add notes on it, and return the plan.

        ``time`` holds ``gpu``; ``seconds`` of a step and, each alone, of its ``kernels``, of the ``bus`` in one
        direction, of the ``drive`` with state in files and of the ``host``, as means over the blocks of a cycle, and
        ``without_bus``, a step if copies took no time; ``by_block``, seconds of a step of each block; ``limit``, the
        longest of ``kernels``, ``bus``, ``drive`` and ``host``; ``hides_copies``, whether a step takes at most 5 %
        longer than without copies; ``tokens_per_second``; ``bus_hidden_from``, the
        sequences in a micro-batch from which a step on the middle block takes at most 5 % longer than without copies
        (None: nothing is moved, or no batch is large enough); and ``measured``, whether predictions were held against
        such a card.
        """
        request = plan.request
        if plan.extrapolated_from:
            plan.notes.append("no step time is predicted: the model computes its tokens one after the other")
            return plan
        figures = self.by_block(request)
        mean = _mean(figures)
        tokens = request.batch_size * request.seq_len * request.gradient_accumulation_steps
        plan.time = {
            "gpu": self.name,
            **mean._asdict(),
            "by_block": [one.seconds for one in figures],
            "limit": mean.limit,
            "hides_copies": mean.hides_copies,
            "tokens_per_second": tokens / mean.seconds,
            "bus_hidden_from": self.hidden_from(request) if mean.bus else None,
            "measured": self.card.measured,
        }
        plan.notes += _notes(request, self.name, self.card)
        return plan

    def mean(self, request: Request) -> float:
        """Return the mean seconds of a step over the blocks of a cycle."""
        return _mean(self.by_block(request)).seconds

    def by_block(self, request: Request) -> list[Figures]:
        """Return the figures of each block's step.

        Of a run of similar blocks, the lowest two and the highest are simulated, and the others interpolated.
        """
        built = self.planner.build(request)
        simulated: dict[int, Figures] = {}
        found: dict[int, Figures] = {}
        for run in built.similar_runs():
            for index in {run[0], run[min(1, len(run) - 1)], run[-1]}:
                simulated[index] = self.figures(request, index)
            for position, index in enumerate(run):
                start, end = (0, 0) if position == 0 else (1, len(run) - 1)
                low, high = simulated[run[start]], simulated[run[end]]
                found[index] = low.towards(high, (position - start) / max(1, end - start))
        return [found[index] for index in range(len(built.blocks))]

    def figures(self, request: Request, block: int, batch: float = 1.0) -> Figures:
        """Return the figures of a block's step in a run whose steps are all like this one.

        Args:
            request: the run.
            block: its index.
            batch: the step of a micro-batch that is so many times larger.
        """
        passes, built = self.planner.trace(request, block), self.planner.build(request)
        forward, backward = ([one.times(batch) for one in passes[name]] for name in ("forward", "backward"))
        backward = [*backward, *[*forward, *backward] * (request.gradient_accumulation_steps - 1)]
        layers = self.planner.layer_bytes(request)
        stepper = self.stepper(request, block)
        operations, begins = program(forward, backward, built.numels(block), stepper, _STEPS, layers)
        step = operations[begins[-3] : begins[-2]]
        bus = self.card.bus if request.pin_memory else PAGEABLE_SHARE * self.card.bus
        card = self.card._replace(bus=bus, read=request.drive_read, write=request.drive_write)

        def seconds(card: Card) -> float:
            issued = simulate(operations, card, self.host_seconds).issued
            return issued[begins[-2]] - issued[begins[-3]]

        def alone(*kinds: str) -> float:
            return sum(operation.seconds(card) for operation in step if operation.kind in kinds)

        return Figures(
            seconds(card),
            kernel_seconds(step, card),
            alone(TO_DEVICE),
            alone(READ, WRITE),
            self.host_seconds * sum(operation.stream not in (HOST, DRIVE) for operation in step),
            seconds(card._replace(bus=math.inf, read=math.inf, write=math.inf)),
        )

    def stepper(self, request: Request, block: int) -> Stepper:
        """Return how the optimizer steps a block."""
        built = self.planner.build(request)
        setup, streamed = self.planner.setup(request, built), request.placement == "streamed"
        ranks = request.ranks if request.stage else 1
        numels = [-(-math.prod(shape) // ranks) for shape in built.updated_shapes(block)]
        layer_of = built.layer_of() if request.streams_weights else {}
        names = built.blocks[block].parameter_names
        return Stepper(
            chunks(numels, setup.chunk if streamed else None),
            setup.encoding.moments,
            request.weight,
            setup.slots,
            setup.encoding.moved,
            sum(size for size, in_files in zip(setup.encoding.per_element, request.in_files, strict=True) if in_files),
            tuple(setup.encoding.kernels()),
            self.defer and streamed and request.offload_device == "cpu" and request.stage < 3,
            block / len(built.blocks),
            tuple(sorted({layer_of[name] for name in names if name in layer_of})),
            waits=not request.pin_memory,
        )

    def hidden_from(self, request: Request) -> int | None:
        """Return the sequences of the smallest micro-batch with which a step on the middle block hides its copies."""
        middle = len(self.planner.build(request).blocks) // 2

        def hides(size: int) -> bool:
            return self.figures(request, middle, size / request.batch_size).hides_copies

        high = 1
        while not hides(high):
            high *= 2
            if high > _LARGEST_BATCH:
                return None
        low = high // 2  # does not hide them, or is 0
        while high - low > 1:
            middle_size = (low + high) // 2
            low, high = (low, middle_size) if hides(middle_size) else (middle_size, high)
        return high


def _mean(figures: Sequence[Figures]) -> Figures:
    return Figures(*(sum(values) / len(figures) for values in zip(*figures, strict=True)))


def _digits(card: str) -> str:
    return "".join(filter(str.isdigit, card))


def problems(request: Request, gpu: str) -> list[str]:
    """Return why no step time can be predicted for a request, each with a remedy."""
    if gpu not in CARDS:
        same_number = [card for card in CARDS if _digits(card) == _digits(gpu)]  # 3060 is no misspelled 4060
        near = difflib.get_close_matches(gpu, same_number, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return [f"--gpu={gpu!r}: expected one of {', '.join(CARDS)}{hint}"]
    reasons = {
        "--method=mezo": request.method == "mezo",
        "--layout=paper": request.layout == "paper",
        "--accelerator=cpu": request.accelerator == "cpu",
        "--offload-optimizer=cpu, whose processor sets the pace": request.offload_optimizer == "cpu",
    }
    return [
        f"--gpu={gpu} with {reason}: no step time is predicted for it; leave --gpu out, or plan without it"
        for reason, applies in reasons.items()
        if applies
    ]


def _notes(request: Request, name: str, card: Card) -> list[str]:
    """Return what a reader of the predicted time must know."""
    notes = []
    if not card.measured:
        notes.append(
            f"no step was measured on {name}: the time follows from its data sheet, and from the shares of the peak "
            "rates that three H200s reached"
        )
    notes.append(
        f"the host's time assumes {1e6 * HOST_SECONDS:.0f} microseconds for each operation, the mean of the machines "
        "that were measured; with another processor, time a step"
    )
    if not request.pin_memory:
        notes.append(
            f"copies of memory that is not page-locked are assumed to have {PAGEABLE_SHARE:.2f} of the rate of "
            "page-locked memory, and the host waits for each; no machine was measured"
        )
    if request.checkpoint_offload:
        notes.append("the step time does not contain the bus's time for activation checkpoints")
    if request.ranks > 1:
        notes.append("the step time does not contain the communication between ranks")
    return notes
