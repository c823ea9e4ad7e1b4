"""The plan of a run, and what makes it: one simulated step for each kind of block, and what is kept around it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from hift_ds.blocks.block import Block
from hift_ds.blocks.partition import partition_model
from hift_ds.config import AIO_BUFFERS, AIO_CHUNK, ConfigError
from hift_ds.model.activations import checkpoint_activations
from hift_ds.planner import presets
from hift_ds.planner.accounting import FP32, Setup, gathered, make_step, persistent, slot_bytes, state_numel
from hift_ds.planner.presets import Request
from hift_ds.planner.simulation import CATEGORIES, ForwardStep, LiveMemory, Simulator, StepBase

_STOCK_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size
_NUMBERS = 64  # bytes of single numbers for each parameter: step counts, norms


@dataclass
class BlockPlan:
    """One block's step: what is on the device when it holds most.

    ``simulated`` is False for a layer whose figures lie between those of the second and the last layer like it. Their
    total is an upper bound: the true one is a maximum of straight lines over the layer's position.
    """

    name: str
    numel: int
    device: dict[str, int]
    phase: str
    simulated: bool = True


@dataclass
class Plan:
    """Planned bytes of one rank by category; ``device`` at the instant of the highest total, which ``peak`` names."""

    request: Request
    total_parameters: int
    peak_trainable_parameters: int
    blocks: list[BlockPlan]
    peak: dict[str, Any]  # block, name, phase: forward, backward or step
    device: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    notes: list[str] = field(default_factory=list)
    fit: dict[str, Any] | None = None
    fitting: Request | None = None  # the request, with the change that makes it fit

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; all sizes in bytes."""
        inputs = {entry.name: getattr(self.request, entry.name) for entry in fields(Request)}
        inputs |= {"model": self.request.name, "zero_stage": self.request.stage, "placement": self.request.placement}
        blocks = [
            {"name": b.name, "parameters": b.numel, "phase": b.phase, "simulated": b.simulated,
             "device": with_total(b.device)} for b in self.blocks
        ]  # fmt: skip
        places = {name: with_total(getattr(self, name)) for name in ("device", "host", "nvme")}
        counts = {name: getattr(self, name) for name in ("total_parameters", "peak_trainable_parameters")}
        result = {**counts, **places, "peak": self.peak, "blocks": blocks, "notes": self.notes, "inputs": inputs}
        return result | ({"fit": self.fit} if self.fit else {})


def with_total(sizes: Mapping[str, int]) -> dict[str, int]:
    return {**sizes, "total": sum(sizes.values())}


@dataclass
class _Built:
    """A model made for simulation, and what each step of the method trains."""

    simulator: Simulator
    shapes: dict[str, tuple[int, ...]]
    units: list[Block]  # what a step trains
    longest_input: int | None

    def unit_shapes(self, unit: int) -> list[tuple[int, ...]]:
        """Of whole tensors, as which gradients are made."""
        return [self.shapes[name] for name in self.units[unit].parameter_names]

    def stepped_shapes(self, unit: int) -> list[tuple[int, ...]]:
        """Of what is updated: the rows of a tensor that is cut, for its blocks may differ by one: the most of any."""
        slices = self.units[unit].slices
        if not slices:
            return self.unit_shapes(unit)
        (name,) = slices
        rows = max(stop - start for other in self.units for start, stop in (other.slices.get(name, (0, 0)),))
        return [(rows, *self.shapes[name][1:])]

    def numels(self, unit: int) -> list[int]:
        return _numels(self.unit_shapes(unit))

    def owners(self) -> list[list[tuple[int, ...]]]:
        """Shapes of what each of DeepSpeed's optimizers has: all blocks of a tensor that is cut share one."""
        first = {tuple(block.parameter_names): unit for unit, block in reversed(list(enumerate(self.units)))}
        return [self.unit_shapes(unit) for unit in sorted(first.values())]

    def reached_from(self, unit: int) -> list[int]:
        """Elements of each parameter that backward passes on its way to a unit.

        For units alike those of the lowest: the rest lies on a line between them, and this would bend it.
        """
        first = next(run[0] for run in self.alike() if unit in run)
        model = self.simulator.model
        paths = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        tied = {name for name, parameter in model.named_parameters() if paths[id(parameter)] > 1}
        here_or_above = {name for block in self.units[first:] for name in block.parameter_names}
        below = {name for block in self.units[:first] for name in block.parameter_names} - here_or_above - tied
        return _numels(shape for name, shape in self.shapes.items() if name not in below)

    def decisive(self) -> list[int]:
        """The units whose steps bound those of all."""
        return sorted({unit for run in self.alike() for unit in (run[0], run[1 % len(run)], run[-1])})

    def alike(self) -> list[list[int]]:
        """Units with the same shapes, at even distances."""
        kinds: dict[Any, list[int]] = defaultdict(list)
        seen: Counter[str] = Counter()
        for unit, block in enumerate(self.units):
            names = block.parameter_names
            part = seen[names[0]] if block.slices else 0
            seen.update(names)
            kinds[tuple(self.unit_shapes(unit)), tuple(self.stepped_shapes(unit)), part].append(unit)
        runs: list[list[int]] = []
        for units in kinds.values():
            is_even = len({after - before for before, after in pairwise(units)}) <= 1
            runs += [units] if is_even else [[unit] for unit in units]
        return runs


def _numels(shapes: Iterable[Sequence[int]]) -> list[int]:
    return [math.prod(shape) for shape in shapes]


class Planner:
    """Plans variants of one request for one model; what is built for one is used again for the others."""

    def __init__(self, request: Request):
        found = request.problems()
        try:
            self.config = presets.load_config(request.model)
        except ConfigError as error:
            found = error.problems + found
        if found:
            raise ConfigError(found)
        self.request = request
        self.task = request.task or presets.task_of(self.config)
        self._built: dict[tuple[Any, ...], _Built] = {}
        self._simulated: dict[tuple[Request, int], LiveMemory] = {}

    def plan(self, request: Request) -> Plan:
        """The plan of a request for the same model. One step is simulated for each kind of block, three where there
        are many: the lowest two and the highest."""
        built = self.build(request)
        units = range(len(built.units))
        numels = [built.units[unit].numel for unit in units]
        planned: dict[int, BlockPlan] = {}
        for run in tqdm(built.alike(), desc="simulating steps", leave=False, disable=None):  # None: unless a terminal
            # Below the first layer nothing needs a gradient, so it does not lie on the line of those above it.
            for position, unit in enumerate(run):
                start, end = (0, 0) if position == 0 else (1, len(run) - 1)
                ends = self.simulate(request, run[start]), self.simulate(request, run[end])
                name = built.units[unit].name
                planned[unit] = _between(name, numels[unit], *ends, position - start, end - start)
        blocks = [planned[unit] for unit in units]
        if request.layout == "paper":
            top = max(units, key=lambda unit: numels[unit])
        else:
            top = max(units, key=lambda unit: sum(blocks[unit].device.values()))
        return Plan(
            request,
            total_parameters=sum(_numels(built.shapes.values())),
            peak_trainable_parameters=max(numels),
            blocks=blocks,
            peak={"block": top, "name": blocks[top].name, "phase": blocks[top].phase},
            device=blocks[top].device,
            host=self._off_device(request, built, top, "host") | {"activations": self._checkpoints(request, built)},
            nvme=self._off_device(request, built, top, "nvme"),
            notes=request.notes(self.task),
        )

    def simulate(self, request: Request, unit: int) -> LiveMemory:
        """One step on one unit, run once."""
        key = (replace(request, model=None), unit)
        if key not in self._simulated:
            self._simulated[key] = self._simulate(request, unit)
        return self._simulated[key]

    def _simulate(self, request: Request, unit: int) -> LiveMemory:
        built = self.build(request)
        limit = built.longest_input
        if limit is not None and request.seq_len > limit:
            raise ConfigError([f"--seq-len={request.seq_len}: the model has {limit} positions; use at most {limit}"])
        trained, shapes, step = built.units[unit].parameter_names, built.unit_shapes(unit), StepBase()
        if request.method == "mezo":
            trained, step = (), ForwardStep(request.weight, max(_numels(built.shapes.values())), request.accelerator)
        elif request.layout == "engine":
            step = make_step(self._setup(request, built), shapes, built.stepped_shapes(unit))
        chunk = 0 if request.layout == "paper" and request.loss_chunk is None else request.loss_chunk
        if chunk and (problem := built.simulator.why_no_chunks()):
            raise ConfigError([f"--loss-chunk={chunk}: {problem}; leave it out, or use 0"])
        held = self.holds(request, unit)
        try:
            return built.simulator.run(trained, request.batch_size, request.seq_len, held, step, chunk)
        except RuntimeError as error:  # an operation that fake tensors do not have, or not so
            reason = " ".join(str(error).split())[:300]
            where = f"--model={request.name}: its step cannot be simulated with --precision={request.precision}"
            raise ConfigError([f"{where} ({reason}); try another precision"]) from error

    def holds(self, request: Request, unit: int) -> dict[str, int]:
        """What is on the device all the time of a step on one unit, by category."""
        built = self.build(request)
        everything, shapes = list(built.shapes.values()), built.stepped_shapes(unit)
        model, active = sum(_numels(everything)), sum(_numels(shapes))
        others = sum(b.numel() * b.element_size() for b in built.simulator.model.buffers())
        if request.method == "mezo":
            return {"parameters": request.weight * model, "buffers": others}
        if request.layout == "paper":
            masters = 0 if request.precision == "fp32" else model if request.precision == "mixed" else active
            return {
                "parameters": request.weight * model,
                "master_weights": FP32 * masters,
                "gradients": FP32 * sum(built.numels(unit)),
                "optimizer_state": FP32 * state_numel(request.optimizer, shapes),
            }
        setup = self._setup(request, built)
        numels = _numels(everything)
        weights = sum(-(-n // request.ranks) for n in numels) if setup.stage == 3 else model
        held = {
            "parameters": request.weight * (weights + setup.persistent),
            "buffers": others + _NUMBERS * len(numels) + 2 * setup.slot,
        }
        units = built.owners()
        if setup.stage == 3:
            held["buffers"] += request.weight * (setup.bucket + gathered(setup, numels, built.reached_from(unit)))
            if setup.placement != "host":
                held["gradients"] = request.weight * max(setup.partition(_numels(owned)) for owned in units)
        if setup.placement == "resident":
            held["master_weights"] = sum(setup.masters(_numels(owned)) for owned in units)
            held["optimizer_state"] = sum(setup.state(owned) for owned in units)
        return held

    def build(self, request: Request) -> _Built:
        """The model as a request needs it, made once."""
        found = request.problems()
        if found:
            raise ConfigError(found)
        rank = request.lora_rank if request.method == "lora" else None
        cut = (request.layers_per_block, (), request.max_block_numel, request.balance)
        m = cut if request.method == "hift" else None
        key = (
            request.weight,
            request.recomputes,
            request.checkpoint_offload,
            request.accelerator,
            request.attention,
            rank,
            m,
        )
        if key not in self._built:
            dtype = torch.float32 if request.weight == FP32 else torch.bfloat16
            gpu = request.accelerator == "gpu"
            model: Any = presets.skeleton(self.config, self.task, dtype, request.attention, gpu)
            if request.recomputes:
                checkpoint_activations(model)
            if rank is not None:
                model = presets.with_lora(model, rank, self.task)
            if m is None:
                trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
                numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
                units = [Block("all" if rank is None else "adapters", trained, numel)]
            else:
                try:
                    units = partition_model(model, *m)
                except ValueError as error:
                    raise ConfigError([str(error)]) from error
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            limit = presets.longest_input(model)
            simulator = Simulator(model, self.task, request.checkpoint_offload)
            self._built[key] = _Built(simulator, shapes, units, limit)
        if rows := next((block.name for block in self._built[key].units if block.slices), None):
            self._check_rows(request, rows)
        return self._built[key]

    def _check_rows(self, request: Request, name: str) -> None:
        """What the engine refuses where tensors are cut by rows."""
        remedy = "raise --max-block-numel, or leave --balance out"
        if request.optimizer == "adafactor":
            raise ConfigError([f"{name} is cut by rows, and Adafactor uses the shape of a weight; {remedy}"])
        if request.placement in ("resident", "host") and request.layout == "engine":
            raise ConfigError([f"{name} is cut by rows, but its state stays in one place; {remedy}"])

    def _setup(self, request: Request, built: _Built) -> Setup:
        numels = [built.numels(unit) for unit in range(len(built.units))]
        stepped = [[b.numel] if b.slices else own for b, own in zip(built.units, numels, strict=True)]
        bucket = _STOCK_BUCKET
        if request.method == "hift":
            bucket = min(bucket, max(sum(block) for block in numels))
        ranks, streamed = request.ranks if request.stage > 0 else 1, request.placement == "streamed"
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
            slot=slot_bytes(request.optimizer, stepped, ranks, request.buffer_size) if streamed else 0,
        )
        return replace(setup, persistent=persistent(setup, _numels(built.shapes.values())))

    def _off_device(self, request: Request, built: _Built, top: int, place: str) -> dict[str, int]:
        """Bytes of one rank in host memory or in files: state that is not on the device, in buffers made once."""
        sizes = dict.fromkeys(CATEGORIES, 0)
        in_files = request.offload_device == "nvme"
        if request.method == "mezo" or place != ("nvme" if in_files else "host"):
            is_moved = request.placement in ("streamed", "block") and request.layout != "paper"
            if in_files and place == "host" and is_moved:
                sizes["buffers"] = AIO_CHUNK * AIO_BUFFERS
            return sizes
        if request.layout == "paper":
            for shapes in (built.stepped_shapes(unit) for unit in range(len(built.units)) if unit != top):
                if request.precision == "mixed-hi":
                    sizes["master_weights"] += FP32 * sum(_numels(shapes))
                sizes["optimizer_state"] += FP32 * state_numel(request.optimizer, shapes)
            return sizes
        setup = self._setup(request, built)
        if setup.placement == "resident":
            return sizes
        units = built.owners()
        partitions = [setup.partition(_numels(shapes)) for shapes in units]
        sizes["master_weights"] = sum(setup.masters(_numels(shapes)) for shapes in units)
        sizes["optimizer_state"] = sum(setup.state(shapes) for shapes in units)
        if setup.placement == "host":
            own = sum if setup.stock else max  # the engine's blocks share what only the active one needs
            sizes["gradients"] = FP32 * own(partitions)
            if setup.stage == 3:
                sizes["gradients"] += setup.weight * own(partitions)
            else:  # the updated weights on their way back, and a buffer for one parameter's gradient
                sizes["buffers"] = setup.weight * (own(partitions) + setup.staging)
                if setup.accumulates:
                    sizes["gradients"] += setup.weight * own(sum(_numels(shapes)) for shapes in units)
        return sizes

    def _checkpoints(self, request: Request, built: _Built) -> int:
        """Bytes of the host buffers for checkpoints, as many as any block needs."""
        if not request.checkpoint_offload:
            return 0
        return max(self.simulate(request, unit).host for unit in built.decisive())


def _between(name: str, numel: int, low: LiveMemory, high: LiveMemory, position: int, length: int) -> BlockPlan:
    """The figures of a block at ``position`` of ``length`` between two that were simulated."""
    phases = {}
    for phase, start in low.peaks.items():
        steps = {category: high.peaks[phase][category] - start[category] for category in CATEGORIES}
        phases[phase] = {
            category: start[category] - (-step * position // max(length, 1)) for category, step in steps.items()
        }
    top = max(phases, key=lambda phase: sum(phases[phase].values()))
    return BlockPlan(name, numel, phases[top], top, simulated=position in (0, length))
