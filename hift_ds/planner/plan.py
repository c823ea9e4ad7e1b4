"""The plan of a run. The planner simulates one step for each kind of block and adds what exists around the step."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from tqdm import tqdm

from hift_ds.blocks.block import Block
from hift_ds.blocks.partition import partition_model
from hift_ds.config import SLOT_OVERHEAD, ConfigError, file_buffer_bytes
from hift_ds.model.activations import checkpoint_activations
from hift_ds.model.loss import unwrapped
from hift_ds.model.positions import PositionLimit, position_limit
from hift_ds.model.quantization import quantization_problem
from hift_ds.model.reach import freeze_patterns, unreached_by_text
from hift_ds.planner import models
from hift_ds.planner.accounting import (
    FP32,
    FUSED,
    Setup,
    bytes_per_element,
    gathered_numel,
    make_step,
    persistent_numel,
    state_numel,
)
from hift_ds.planner.extrapolation import Extrapolated, Extrapolation, NotLinearError, Point
from hift_ds.planner.request import PRECISIONS, Request
from hift_ds.planner.simulation import (
    CATEGORIES,
    ForwardStep,
    LiveMemory,
    Simulator,
    StepBase,
    TokenLoop,
)
from hift_ds.planner.timeline import Operation, Trace
from hift_ds.weights.units import find_units

Memory: TypeAlias = LiveMemory | Extrapolated  # of a step
_STOCK_BUCKET = 500_000_000  # elements: the default of DeepSpeed's reduce_bucket_size
_FEW_TOKENS = 32  # a sequence that is always simulated as it is
_MANY_OPERATIONS = 40_000  # of a simulation that takes several seconds; a step of a loop over tokens takes fewer
_AROUND_THE_PASSES = (  # fields that change what is held and the update, and nothing in between
    "offload_device", "offload_step", "buffer_size", "prefetch", "nvme_path", "nvme", "drive_read", "drive_write",
    "weights", "master", "moments", "offload_param", "pin_memory",
)  # fmt: skip
_AROUND_THE_FORWARD_PASS = (  # fields of a request that do not change its activations
    *("ranks", "optimizer", "gradient_accumulation_steps", "offload_optimizer"),
    *_AROUND_THE_PASSES,
)
_MANY_OPERATIONS_OF_A_PLAN = 500_000  # then only the blocks are simulated that bound the memory
_MOST_OPERATIONS_OF_A_PLAN = 2_000_000  # of a loop over tokens: more than a minute
_SCALARS = 64  # bytes of step counts, norms and other scalars for each parameter


@dataclass
class BlockPlan:
    """The memory of one block's step.

    Attributes:
        name: the block's name.
        numel: trained elements.
        device: bytes on the device by category, at the instant of the highest total.
        phase: phase of that instant: ``forward``, ``backward`` or ``step``.
        simulated: False if the figures are interpolated between the second and the last block like this one, or those
            of a block below. Their total is then an upper bound: the true total is a maximum of linear functions of the
            position, and falls with it.
    """

    name: str
    numel: int
    device: dict[str, int]
    phase: str
    simulated: bool = True


@dataclass
class Plan:
    """The planned memory of one rank.

    Attributes:
        request: what was planned.
        total_parameters: elements of all parameters.
        peak_trainable_parameters: elements of the largest block.
        blocks: the memory of each block's step.
        peak: ``block`` (index), ``name`` and ``phase`` of the instant of the highest device total.
        device: bytes on the device by category, at that instant.
        host: bytes in host memory by category.
        nvme: bytes in files by category.
        notes: what a reader must know about the figures.
        freeze: patterns of parameters that no text reaches. The run needs them in ``hift.freeze``.
        positions: the most tokens in a sequence that the model's configuration names.
        extrapolated_from: lengths of the sequences that were simulated instead of the requested ones, or None.
        time: the answer of :class:`hift_ds.planner.step_time.StepTimes`, if a card was named.
        fit: the answer of :class:`hift_ds.planner.search.Fit`, if a device size was given.
        fitting: the request with the change that makes it fit, or None.
    """

    request: Request
    total_parameters: int
    peak_trainable_parameters: int
    blocks: list[BlockPlan]
    peak: dict[str, Any]
    device: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    notes: list[str] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)
    positions: int | None = None
    extrapolated_from: list[int] | None = None
    time: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    fitting: Request | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON, with all sizes in bytes."""
        inputs = {entry.name: getattr(self.request, entry.name) for entry in fields(Request)}
        inputs |= {"model": self.request.name, "zero_stage": self.request.stage, "placement": self.request.placement}
        blocks = [
            {"name": b.name, "parameters": b.numel, "phase": b.phase, "simulated": b.simulated,
             "device": with_total(b.device)} for b in self.blocks
        ]  # fmt: skip
        places = {name: with_total(getattr(self, name)) for name in ("device", "host", "nvme")}
        counts = {name: getattr(self, name) for name in ("total_parameters", "peak_trainable_parameters")}
        result = {**counts, **places, "peak": self.peak, "blocks": blocks, "notes": self.notes, "inputs": inputs}
        result |= {"freeze": self.freeze, "positions": self.positions, "extrapolated_from": self.extrapolated_from}
        return result | {name: found for name, found in (("time", self.time), ("fit", self.fit)) if found}


def with_total(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return sizes by category with their sum as ``total``."""
    return {**sizes, "total": sum(sizes.values())}


@dataclass
class BuiltModel:
    """A model built for simulation, and the blocks that steps train. Methods other than HiFT have one block.

    Attributes:
        simulator: runs steps of the model.
        shapes: shape of each parameter by name.
        blocks: what each step trains.
        positions: the most tokens in a sequence.
        freeze: patterns for ``hift.freeze``, of whole blocks that no text reaches.
    """

    simulator: Simulator
    shapes: dict[str, tuple[int, ...]]
    blocks: list[Block]
    positions: PositionLimit
    freeze: list[str]

    def gradient_shapes(self, block: int) -> list[tuple[int, ...]]:
        """Return the shapes of a block's gradients, which are those of whole tensors."""
        return [self.shapes[name] for name in self.blocks[block].parameter_names]

    def updated_shapes(self, block: int) -> list[tuple[int, ...]]:
        """Return the shapes the optimizer updates; for sliced tensors, the largest slice."""
        slices = self.blocks[block].slices
        if not slices:
            return self.gradient_shapes(block)
        (name,) = slices
        rows = max(stop - start for other in self.blocks for start, stop in (other.slices.get(name, (0, 0)),))
        return [(rows, *self.shapes[name][1:])]

    def numels(self, block: int) -> list[int]:
        """Return the elements of each gradient of a block."""
        return _numels(self.gradient_shapes(block))

    def updated_numels(self) -> list[list[int]]:
        """Return for each block the elements of each parameter that it updates."""
        return [[one.numel] if one.slices else self.numels(block) for block, one in enumerate(self.blocks)]

    def layer_of(self) -> dict[str, int]:
        """Return the number of the hidden layer of each parameter in one, by name; the first layer is 0."""
        names = {id(parameter): name for name, parameter in self.simulator.model.named_parameters()}
        units, _ = find_units(self.simulator.model)
        return {names[id(p)]: number for number, unit in enumerate(units) for p in unit.parameters}

    def layers(self) -> list[int]:
        """Return the elements of each hidden layer."""
        numels: Counter[int] = Counter()
        for name, number in self.layer_of().items():
            numels[number] += math.prod(self.shapes[name])
        return [numels[number] for number in sorted(numels)]

    def optimizer_shapes(self) -> list[list[tuple[int, ...]]]:
        """Return the shapes of each DeepSpeed optimizer. All blocks that hold rows of one tensor share an optimizer."""
        first = {tuple(block.parameter_names): index for index, block in reversed(list(enumerate(self.blocks)))}
        return [self.gradient_shapes(index) for index in sorted(first.values())]

    def optimizer_slices(self) -> list[list[int]]:
        """Return for each DeepSpeed optimizer the elements of the slices of its blocks; empty: whole weights."""
        slices: dict[tuple[str, ...], list[int]] = {}
        for block in self.blocks:
            slices.setdefault(tuple(block.parameter_names), []).extend([block.numel] if block.slices else [])
        return list(slices.values())

    def reached_from(self, block: int) -> list[int]:
        """Return the elements of each parameter that backward reaches on its way down to a block.

        All blocks of a run get the value of its lowest one, so that the figures of a run stay linear in the position.
        """
        first = next(run[0] for run in self.similar_runs() if block in run)
        model = self.simulator.model
        paths = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        tied = {name for name, parameter in model.named_parameters() if paths[id(parameter)] > 1}
        here_or_above = {name for block in self.blocks[first:] for name in block.parameter_names}
        below = {name for block in self.blocks[:first] for name in block.parameter_names} - here_or_above - tied
        return _numels(shape for name, shape in self.shapes.items() if name not in below)

    def bounding_blocks(self) -> list[int]:
        """Return the indices of the blocks whose steps bound the memory of all steps.

        Nothing below the lowest block needs a gradient. Otherwise, a block needs at most the memory of an equal block
        below it.
        """
        bounding: set[int] = set()
        for indices in self._kinds():
            bounding |= {indices[0], indices[1 % len(indices)]}
            bounding |= {indices[-1]} if _is_even(indices) else set()
        return sorted(bounding)

    def equal_below(self) -> dict[int, int]:
        """Return the next lower block with equal shapes of each block that does not bound the memory."""
        pairs = {after: before for indices in self._kinds() for before, after in pairwise(indices)}
        return {after: before for after, before in pairs.items() if after not in self.bounding_blocks()}

    def similar_runs(self) -> list[list[int]]:
        """Return runs of blocks with equal shapes at even distances, each run as a list of block indices."""
        return [
            run
            for indices in self._kinds()
            for run in ([indices] if _is_even(indices) else [[index] for index in indices])
        ]

    def _kinds(self) -> list[list[int]]:
        """Return the indices of blocks with equal shapes."""
        kinds: dict[Any, list[int]] = defaultdict(list)
        seen: Counter[str] = Counter()
        for index, block in enumerate(self.blocks):
            names = block.parameter_names
            number = seen[names[0]] if block.slices else 0  # of the slice in its tensor
            seen.update(names)
            kinds[tuple(self.gradient_shapes(index)), tuple(self.updated_shapes(index)), number].append(index)
        return list(kinds.values())


def _is_even(indices: Sequence[int]) -> bool:
    return len({after - before for before, after in pairwise(indices)}) <= 1


def _cut(model: Any, partition: tuple[Any, ...], unreached: Collection[str]) -> tuple[list[Block], list[str]]:
    """Return the blocks of a model, and patterns of parameters that must be frozen because they would fill a block."""
    layers, most, balance = partition
    try:
        blocks = partition_model(model, layers, (), most, balance)
        if all(set(block.parameter_names) - set(unreached) for block in blocks):
            return blocks, []
        trained = [name for block in blocks for name in block.parameter_names]
        freeze = freeze_patterns([name for name in trained if name in unreached], trained)
        return partition_model(model, layers, freeze, most, balance), freeze
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def _numels(shapes: Iterable[Sequence[int]]) -> list[int]:
    return [math.prod(shape) for shape in shapes]


class TooManyOperationsError(Exception):
    """The planner's ``limit`` of operations is reached."""


class Planner:
    """Plans one request and variants of it for the same model. Variants share built models and simulated steps.

    Args:
        request: the first request to plan.

    Attributes:
        request: the same request.
        config: the model's transformers configuration.
        task: ``causal-lm`` or ``sequence-classification``.
        operations: number of operations that were simulated so far.
        limit: number of operations after which nothing more is simulated, or None.
        tell: is called with what the planner is about to do.

    Raises:
        ConfigError: every problem of the request.
    """

    def __init__(self, request: Request):
        found = request.problems()
        try:
            self.config = models.load_config(request.model)
            if problem := quantization_problem(request.name, self.config):
                found.insert(0, f"--model: {problem}")
        except ConfigError as error:
            found = error.problems + found
        if found:
            raise ConfigError(found)
        self.request = request
        self.task = request.task or models.task_of(self.config)
        self._built: dict[tuple[Any, ...], BuiltModel] = {}
        self._simulated: dict[tuple[Request, int], Memory] = {}
        self._forward: dict[tuple[Request, int], int] = {}
        self._traces: dict[tuple[Request, int], dict[str, list[Operation]]] = {}
        self._extrapolations: dict[tuple[Request, int, bool], Extrapolation] = {}
        self._loop: TokenLoop | None = None
        self._missed: list[str] | None = None
        self.operations = 0
        self.limit: int | None = None
        self.tell: Callable[[str], None] = lambda _: None

    def plan(self, request: Request) -> Plan:
        """Return the plan of a request for the same model.

        Of a run of similar blocks, this simulates the lowest two and the highest, and interpolates the others. After
        ``_MANY_OPERATIONS_OF_A_PLAN``, blocks at uneven distances get the figures of the equal block below.

        Raises:
            ConfigError: the request cannot be planned.
        """
        built = self.build(request)
        indices = range(len(built.blocks))
        numels = [built.blocks[index].numel for index in indices]
        planned: dict[int, BlockPlan] = {}
        below = built.equal_below()
        progress = tqdm(built.similar_runs(), desc="simulating steps", leave=False, disable=None)  # on a terminal only
        for run in progress:
            if run[0] in below and len(run) == 1 and self.operations > _MANY_OPERATIONS_OF_A_PLAN:
                index = run[0]
                planned[index] = replace(planned[below[index]], name=built.blocks[index].name, simulated=False)
                continue
            # Nothing below the lowest block needs a gradient, so the lowest is not on the line of the others.
            for position, index in enumerate(run):
                start, end = (0, 0) if position == 0 else (1, len(run) - 1)
                ends = self.simulate(request, run[start]), self.simulate(request, run[end])
                name = built.blocks[index].name
                planned[index] = _interpolate(name, numels[index], *ends, position - start, end - start)
        blocks = [planned[index] for index in indices]
        first = self.simulate(request, built.similar_runs()[0][0])
        lengths = list(first.lengths) or None if isinstance(first, Extrapolated) else None
        if request.layout == "paper":
            top = max(indices, key=lambda index: numels[index])
        else:
            top = max(indices, key=lambda index: sum(blocks[index].device.values()))
        nvme = self._off_device(request, built, top, "nvme")
        return Plan(
            request,
            total_parameters=sum(_numels(built.shapes.values())),
            peak_trainable_parameters=max(numels),
            blocks=blocks,
            peak={"block": top, "name": blocks[top].name, "phase": blocks[top].phase},
            device=blocks[top].device,
            host=self._off_device(request, built, top, "host") | {"activations": self._checkpoints(request, built)},
            nvme=nvme,
            notes=[
                *_notes(request, built, self.config, self.task, lengths),
                *_notes_on_drive(request, request.ranks * sum(nvme.values())),
            ],
            freeze=built.freeze,
            positions=built.positions.tokens,
            extrapolated_from=lengths,
        )

    def simulate(self, request: Request, block: int) -> Memory:
        """Return the memory of one step on a block. Each step is simulated once, or extrapolated from short ones.

        Raises:
            ConfigError: the step cannot be simulated.
        """
        key = (replace(request, model=None), block)
        if key not in self._simulated:
            other = _same_passes(request)
            memory = self._simulate(request, block) if other == request else self._stepped(request, other, block)
            self._simulated[key] = memory
            self._forward[_same_forward(request), block] = memory.peaks["forward"]["activations"]
        return self._simulated[key]

    def _stepped(self, request: Request, other: Request, block: int) -> Extrapolated:
        """Return the memory of a step with the passes of another request: its update alone is simulated."""
        passes, built = self.simulate(other, block), self.build(request)
        held, before = self.held(request, block), self.held(other, block)
        peaks = {
            phase: {name: nbytes + held.get(name, 0) - before.get(name, 0) for name, nbytes in peak.items()}
            for phase, peak in passes.peaks.items()
        }
        names, step = built.blocks[block].parameter_names, self._step(request, built, block)
        peaks["step"] = built.simulator.update(names, held, step).peaks["step"]
        return Extrapolated(peaks, passes.host, passes.lengths if isinstance(passes, Extrapolated) else ())

    def trace(self, request: Request, block: int) -> dict[str, list[Operation]]:
        """Return the operations of one forward and backward pass of a step on a block: see :class:`Trace`.

        Raises:
            ConfigError: the step cannot be simulated.
        """
        request = _same_passes(request)
        key = (replace(request, model=None), block)
        if key not in self._traces:
            trace = Trace()
            self._run(request, block, request.batch_size, request.seq_len, request.loss_chunk, trace=trace)
            self._traces[key] = trace.passes
        return self._traces[key]

    def least(self, request: Request, block: int) -> int:
        """Return a lower bound of the device total of a step on a block, without a simulation.

        It consists of what exists throughout the step, and of the activations if a step with the same forward pass was
        simulated.
        """
        return sum(self.held(request, block).values()) + self._forward.get((_same_forward(request), block), 0)

    def _simulate(self, request: Request, block: int) -> Memory:
        built = self.build(request)
        limit = built.positions.tokens
        if built.positions.table and limit is not None and request.seq_len > limit:
            raise ConfigError([f"--seq-len={request.seq_len}: the model has {limit} positions; use at most {limit}"])
        chunk = 0 if request.layout == "paper" and request.loss_chunk is None else request.loss_chunk
        if chunk and (problem := built.simulator.chunking_problem()):
            raise ConfigError([f"--loss-chunk={chunk}: {problem}; leave it out, or use --loss-chunk 0"])
        try:
            extrapolated = self._extrapolation(request, block, chunk)
            return extrapolated or self._run(request, block, request.batch_size, request.seq_len, chunk)
        except (ConfigError, TooManyOperationsError):
            raise
        except Exception as error:  # of the model's code
            raise ConfigError([self._explain(request, block, error)]) from error

    def _explain(self, request: Request, block: int, error: Exception) -> str:
        """Return why a step cannot be simulated, with a remedy."""
        what = f"--batch-size={request.batch_size}, --seq-len={request.seq_len}"
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        if "overflow" in reason:
            return f"{what}: a tensor of the step has more elements than PyTorch can count; use fewer tokens"
        problem = f"--model={request.name}: its step cannot be simulated with --precision={request.precision}"
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            remedy = "the sizes depend on the values of the tokens; measure a run with engine.memory_ledger(peak=True)"
            return f"{problem} ({reason}): {remedy}"
        for precision in reversed(PRECISIONS):  # some operations support one type only
            other = replace(request, precision=precision)
            if other.weight != request.weight and not other.problems():
                with contextlib.suppress(Exception):
                    self._run(other, block, 1, min(request.seq_len, _FEW_TOKENS), 0)
                    return f"{problem} ({reason}); use --precision {precision}"
        return f"{problem} ({reason}); no other precision works; use another model, or another --attention"

    def _run(
        self,
        request: Request,
        block: int,
        batch_size: int,
        seq_len: int,
        chunk: int | None,
        **options: Any,
    ) -> LiveMemory:
        """Simulate a step with this batch; ``options`` are those of :meth:`Simulator.run`."""
        if self.limit is not None and self.operations > self.limit:
            raise TooManyOperationsError
        built = self.build(request)
        trained = () if request.method == "mezo" else built.blocks[block].parameter_names
        step = self._step(request, built, block)
        held = self.held(request, block)
        self.tell(
            f"simulating a step on {built.blocks[block].name} with a batch of {batch_size:,} x {seq_len:,} tokens"
        )
        memory = built.simulator.run(trained, batch_size, seq_len, held, step, chunk, **options)
        self.operations += memory.operations
        return memory

    def _step(self, request: Request, built: BuiltModel, block: int) -> StepBase:
        """Return what a step on a block allocates around the passes."""
        if request.method == "mezo":
            return ForwardStep(request.weight, max(_numels(built.shapes.values())), request.accelerator)
        if request.layout == "paper":
            return StepBase()
        return make_step(self.setup(request, built), built.gradient_shapes(block), built.updated_shapes(block))

    def _extrapolation(self, request: Request, block: int, loss_chunk: int | None) -> Memory | None:
        """Return the memory of a step that is too long to simulate, because the model loops over tokens, or None."""
        simulator, length = self.build(request).simulator, request.seq_len
        if length <= _FEW_TOKENS:
            return None
        if self._loop is None:
            self._loop = simulator.token_loop(length)
        if 4 * self._loop.operations(length) < _MANY_OPERATIONS:
            return None
        targets = request.batch_size * (length - (self.task == "causal-lm"))
        chunk = simulator.chunk(targets, loss_chunk)

        def simulate(point: Point) -> LiveMemory:
            if self.limit is None and self.operations > _MOST_OPERATIONS_OF_A_PLAN:
                raise ConfigError(
                    [
                        f"--seq-len={length}: {request.name} computes its tokens one after the other, and planning "
                        f"takes more than {_MOST_OPERATIONS_OF_A_PLAN:,} simulated operations; use at most "
                        f"{_FEW_TOKENS} tokens, or fewer and larger blocks (--layers-per-block)"
                    ]
                )
            return self._run(request, block, *point, by_kind=True)

        key = (replace(request, model=None, batch_size=1, seq_len=1), block, chunk > 0)
        if key not in self._extrapolations:
            self._extrapolations[key] = Extrapolation(simulate, self._loop.length, self._loop.step)
        try:
            if length > (window := models.attention_window(self.config)):
                raise NotLinearError  # short sequences have no mask
            return self._extrapolations[key].at(Point(request.batch_size, length, chunk))
        except NotLinearError as error:
            if self.limit is not None:
                raise TooManyOperationsError from error
            raise ConfigError(
                [
                    f"--seq-len={length}: {request.name} computes its tokens one after the other, which takes too long "
                    "to simulate, and the memory of such a sequence does not follow from shorter ones; use at most "
                    f"{window if length > window else _FEW_TOKENS}"
                ]
            ) from error

    def held(self, request: Request, block: int) -> dict[str, int]:
        """Return the bytes on the device by category that exist throughout a step on a block."""
        built = self.build(request)
        everything, shapes = list(built.shapes.values()), built.updated_shapes(block)
        model, active = sum(_numels(everything)), sum(_numels(shapes))
        others = sum(b.numel() * b.element_size() for b in built.simulator.model.buffers())
        if request.method == "mezo":
            return {"parameters": request.weight * model, "buffers": others}
        if request.layout == "paper":
            masters = 0 if request.precision == "fp32" else model if request.precision == "mixed" else active
            return {
                "parameters": request.weight * model,
                "master_weights": FP32 * masters,
                "gradients": FP32 * sum(built.numels(block)),
                "optimizer_state": FP32 * state_numel(request.optimizer, shapes),
            }
        setup = self.setup(request, built)
        numels = _numels(everything)
        if setup.weights == "cpu":
            layers = built.layers() if setup.stage < 3 else []
            slots = [max(layers[first::2], default=0) for first in (0, 1)]  # layers take them in turn
            weights = sum(slots) + (model - sum(layers) if layers else 0)
        else:
            weights = sum(-(-n // request.ranks) for n in numels) if setup.stage == 3 else model
        held = {
            "parameters": request.weight * (weights + setup.persistent),
            "buffers": others + _SCALARS * len(numels) + setup.slots * setup.slot + setup.encoding.tables,
        }
        optimizers = built.optimizer_shapes()
        if setup.stage == 3:
            gathered = gathered_numel(setup, numels, built.reached_from(block), built.layers(), built.numels(block))
            held["buffers"] += request.weight * (setup.bucket + gathered)
            if not setup.copies_gradients:
                held["gradients"] = request.weight * max(setup.partition(_numels(owned)) for owned in optimizers)
        if setup.placement == "resident":
            held["master_weights"] = sum(setup.masters(_numels(owned)) for owned in optimizers)
            held["optimizer_state"] = sum(setup.state(owned) for owned in optimizers)
        return held

    def build(self, request: Request) -> BuiltModel:
        """Return the model as a request needs it. Each variant is built once.

        Raises:
            ConfigError: every problem of the request, or the model cannot be built or cut.
        """
        found = request.problems()
        if found:
            raise ConfigError(found)
        rank = request.lora_rank if request.method == "lora" else None
        cut = (request.layers_per_block, request.max_block_numel, request.balance)
        partition = cut if request.method == "hift" else None
        key = (
            request.weight,
            request.recomputes,
            request.checkpoint_offload,
            request.accelerator,
            request.attention,
            rank,
            partition,
        )
        if key not in self._built:
            dtype = torch.float32 if request.weight == FP32 else torch.bfloat16
            gpu = request.accelerator == "gpu"
            model: Any = models.skeleton(self.config, self.task, dtype, request.attention, gpu)
            if request.recomputes:
                checkpoint_activations(model)
            unreached = set(self._unreached(request))
            if rank is not None:
                model = models.with_lora(model, rank, self.task)
            freeze: list[str] = []
            if partition is None:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(parameter.requires_grad and name not in unreached)
                trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
                numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
                blocks = [Block("all" if rank is None else "adapters", trained, numel)]
            else:
                blocks, freeze = _cut(model, partition, unreached)
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            limit = position_limit(model)
            simulator = Simulator(model, self.task, request.checkpoint_offload)
            self._built[key] = BuiltModel(simulator, shapes, blocks, limit, freeze)
        if sliced := next((block.name for block in self._built[key].blocks if block.slices), None):
            self._check_slices(request, sliced)
        return self._built[key]

    def _unreached(self, request: Request) -> list[str]:
        """Return the names of the parameters that no text reaches."""
        if self._missed is None:
            config = copy.deepcopy(self.config)  # the search changes it
            model = models.skeleton(config, self.task, torch.bfloat16, request.attention)
            self._missed = unreached_by_text(model, request.seq_len) or []
        return self._missed

    def _check_slices(self, request: Request, name: str) -> None:
        """Refuse what the engine refuses for a tensor that is cut by rows; ``name`` is a block with such rows."""
        remedy = "raise --max-block-numel, or leave --balance out"
        if request.optimizer == "adafactor":
            raise ConfigError([f"{name} is cut by rows, and Adafactor needs the shape of a weight; {remedy}"])

    def setup(self, request: Request, built: BuiltModel) -> Setup:
        """Return what determines the memory of a request's steps, besides the model and the batch."""
        numels = [built.numels(block) for block in range(len(built.blocks))]
        updated = built.updated_numels()
        bucket = _STOCK_BUCKET
        if request.method == "hift":
            bucket = min(bucket, max(sum(block) for block in numels))
        setup = Setup(
            stage=request.stage,
            ranks=request.ranks,
            weight=request.weight,
            optimizer=request.optimizer,
            gpu=request.accelerator == "gpu",
            stock=request.method != "hift",
            placement=request.placement,
            bucket=bucket,
            staging=max(max(block) for block in numels),
            accumulates=request.gradient_accumulation_steps > 1,
            slots=1 if request.placement == "block" else 0,
            splits=request.splits,
            eight_bit=request.moments == "8bit",
            weights="cpu" if request.streams_weights else "device",
        )
        if request.placement == "streamed":
            ranks, decoded = request.ranks if request.stage else 1, bytes_per_element(request.optimizer)
            in_slot = setup.encoding.in_slot
            slot, slots = request.offload.slots(updated, ranks, decoded, in_slot)
            chunk = slot // decoded if in_slot is None else int((slot - SLOT_OVERHEAD) // in_slot)
            setup = replace(setup, chunk=chunk, slot=slot, slots=slots)
        return replace(setup, persistent=persistent_numel(setup, _numels(built.shapes.values())))

    def layer_bytes(self, request: Request) -> list[int]:
        """Return the bytes of each hidden layer's weights that a rank copies to the device; empty: they stay there."""
        if not request.streams_weights:
            return []
        parts = request.ranks if request.stage == 3 else 1
        return [request.weight * -(-numel // parts) for numel in self.build(request).layers()]

    def off_device(self, request: Request, place: str) -> dict[str, int]:
        """Return the bytes of one rank by category in a place, ``host`` or ``nvme``, without activation checkpoints."""
        return self._off_device(request, self.build(request), 0, place)

    def _off_device(self, request: Request, built: BuiltModel, top: int, place: str) -> dict[str, int]:
        """Return the bytes of one rank by category in a place, ``host`` or ``nvme``; ``top``: the block at the peak."""
        sizes = dict.fromkeys(CATEGORIES, 0)
        if request.method == "mezo":
            return sizes
        if request.layout == "paper":
            for shapes in (built.updated_shapes(block) for block in range(len(built.blocks)) if block != top):
                if place == "host" and request.precision == "mixed-hi":
                    sizes["master_weights"] += FP32 * sum(_numels(shapes))
                sizes["optimizer_state"] += FP32 * state_numel(request.optimizer, shapes) if place == "host" else 0
            return sizes
        setup, optimizers = self.setup(request, built), built.optimizer_shapes()
        if place == "host" and setup.weights == "cpu":
            ranks = request.ranks if setup.stage == 3 else 1
            sizes["parameters"] = request.weight * sum(-(-n // ranks) for n in _numels(built.shapes.values()))
        if setup.placement == "resident":
            return sizes
        for category, in_files, nbytes in zip(
            ("master_weights", "optimizer_state"),
            request.in_files,
            map(sum, zip(*map(setup.stored, optimizers, built.optimizer_slices()), strict=True)),
            strict=True,
        ):
            sizes[category] = nbytes if (place == "nvme") == in_files else 0
        if place == "nvme":
            return sizes
        if any(request.in_files):
            each = zip(setup.encoding.per_element, request.in_files, strict=True)
            per_element = sum(size for size, in_files in each if in_files)
            ranks = request.ranks if request.stage > 0 else 1
            largest = max(sum(-(-numel // ranks) for numel in block) for block in built.updated_numels())
            sizes["buffers"] = file_buffer_bytes(math.ceil(largest * per_element))
        partitions = [setup.partition(_numels(shapes)) for shapes in optimizers]
        if setup.copies_gradients:
            sizes["gradients"] = FP32 * sum(partitions)
            if setup.stage == 3:
                sizes["gradients"] += setup.weight * sum(partitions)
            else:  # updated weights on their way to the device, and a buffer for the gradient of one parameter
                sizes["buffers"] = setup.weight * (sum(partitions) + setup.staging)
                if setup.accumulates:
                    sizes["gradients"] += setup.weight * sum(sum(_numels(shapes)) for shapes in optimizers)
        elif setup.placement == "host":  # one area for gradients, and one for updated weights
            sizes["gradients"] = sizes["buffers"] = setup.weight * max(
                min(setup.partition(built.numels(block)), one.numel)
                if one.slices
                else setup.partition(built.numels(block))
                for block, one in enumerate(built.blocks)
            )
        return sizes

    def _checkpoints(self, request: Request, built: BuiltModel) -> int:
        """Return the bytes of host buffers for activation checkpoints: the most that a step on any block needs."""
        if not request.checkpoint_offload:
            return 0
        return max(self.simulate(request, block).host for block in built.bounding_blocks())


def _same_passes(request: Request) -> Request:
    """Return the request with the same passes whose state and weights wait where they do by default.

    How state and weights travel changes what is on the device throughout a step, and the update, but no pass.
    """
    if request.method != "hift" or request.layout != "engine":
        return request
    given: dict[str, Any] = {name: getattr(Request, name) for name in _AROUND_THE_PASSES}
    return replace(request, **given)


def _same_forward(request: Request) -> Request:
    """Return what all requests for this model with the same activations in the forward pass have in common."""
    given: dict[str, Any] = {name: getattr(Request, name) for name in _AROUND_THE_FORWARD_PASS}
    stage = 3 if request.stage == 3 else 2  # ZeRO-3 replaces linear layers
    return replace(request, model=None, zero_stage=stage, **given)


def _interpolate(name: str, numel: int, low: Memory, high: Memory, position: int, length: int) -> BlockPlan:
    """Return the figures of a block at ``position`` of ``length`` between two simulated blocks, rounded up."""
    phases = {}
    for phase, start in low.peaks.items():
        steps = {category: high.peaks[phase][category] - start[category] for category in CATEGORIES}
        phases[phase] = {
            category: start[category] - (-step * position // max(length, 1)) for category, step in steps.items()
        }
    top = max(phases, key=lambda phase: sum(phases[phase].values()))
    return BlockPlan(name, numel, phases[top], top, simulated=position in (0, length))


def _notes(request: Request, built: BuiltModel, config: Any, task: str, lengths: Sequence[int] | None) -> list[str]:
    """Return what a reader of the plan must know."""
    notes = _notes_on_model(request, built, config, task, lengths)
    if request.layout == "paper":
        return [
            *notes,
            "the paper's accounting, for the block with the most parameters; activations come from the simulation",
        ]
    if request.method == "hift" and request.precision == "mixed":
        notes.append(
            "mixed keeps the fp32 master weights of all blocks on the device; the engine trains with mixed-hi instead"
        )
    if request.method == "mezo":
        notes.append("MeZO has no gradients and no optimizer state; options about them have no effect")
    elif request.accelerator == "gpu" and request.optimizer in FUSED and request.placement != "host":
        notes.append(
            "the optimizer step uses DeepSpeed's fused kernel; if it does not compile, PyTorch's step needs one more "
            "copy of what it updates"
        )
    if request.ranks > 1:
        notes.append(f"sizes are those of one of {request.ranks} ranks; ranks on one machine share its host memory")
    if request.ranks > 1 and request.weights == "cpu":
        notes.append(
            "the ranks of a machine share one copy of the weights in host memory: the first rank has all of it, the "
            "others none; ZeRO-1 and ZeRO-2 need all ranks on one machine"
        )
    if request.stage == 3 and request.method in ("hift", "full"):
        tensor = max(_numels(built.shapes.values()))
        part = sum(_numels(built.shapes.values())) // request.ranks if request.offload_param == "cpu" else 0
        what = "its part of the weights and one tensor" if part else "one tensor of the weights"
        notes.append(
            f"while launch/train.py loads files, the host memory of a rank holds {what} at a time, at most "
            f"{request.weight * (part + tensor) / 2**30:.2f} GiB"
        )
    if request.recomputes:
        value = '"cpu"' if request.checkpoint_offload else "true"
        notes.append(f"enable activation checkpointing in the run's YAML: model.gradient_checkpointing: {value}")
    if task == "causal-lm" and request.seq_len >= 4096 and request.batch_size > 1:
        notes.append("all sequences have the same length; padding adds attention masks of batch x length x length")
    return notes


def free_space(folder: str | None) -> int | None:
    """Return the free bytes of the drive of a folder; None: no such folder is on this machine."""
    try:
        return None if folder is None else shutil.disk_usage(folder).free
    except (OSError, ValueError):
        return None


def _notes_on_drive(request: Request, needed: int) -> list[str]:
    """Return whether the drive has room for the files of all ranks."""
    if request.nvme_path is None:
        return []
    if (free := free_space(request.nvme_path)) is None:
        return [f"--nvme-path={request.nvme_path} is not on this machine, so its free space was not checked"]
    if free >= needed:
        return []
    return [
        f"--nvme-path={request.nvme_path}: {free / 2**30:.1f} GiB are free, and files take {needed / 2**30:.1f} GiB; "
        "free some space there, or choose a folder on a larger drive"
    ]


def _notes_on_model(
    request: Request, built: BuiltModel, config: Any, task: str, lengths: Sequence[int] | None
) -> list[str]:
    notes = []
    planned, limit = type(unwrapped(built.simulator.model)).__name__, built.positions.tokens
    named = [name for name in models.architectures(config) if name != planned]
    if named:
        notes.append(f"the configuration names {named[0]}; the plan is for {planned} (--task {task})")
    if built.freeze:
        trained = {name for block in built.blocks for name in block.parameter_names}
        left_out = sum(math.prod(shape) for name, shape in built.shapes.items() if name not in trained)
        notes.append(
            f"no text reaches {left_out:,} parameters. They stay on the device and are not trained: set hift.freeze to "
            f"{json.dumps(built.freeze)}"
        )
    if limit is not None and request.seq_len > limit:
        notes.append(
            f"the model has {limit:,} positions, fewer than the {request.seq_len:,} tokens of a sequence; "
            "launch/train.py takes no longer sequences than positions"
        )
    if lengths:
        notes.append(
            f"extrapolated from simulations of {', '.join(map(str, lengths[:-1]))} and {lengths[-1]} tokens in larger "
            "batches: transformers computes the tokens of this model one after the other. Kernels of other libraries "
            "that compute all tokens at once need less memory"
        )
    return notes
