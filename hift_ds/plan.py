"""Plans the memory of a training run before it starts: without weights, without a GPU, without DeepSpeed.

    python -m hift_ds.plan --model llama-7b --batch-size 1 --seq-len 512 [--gpu-memory 24GiB] [--json]

Two accountings. ``--layout engine`` walks through a step as ``hift_ds.initialize`` takes it and says what is alive at
the instant of the highest device total; every figure is of that instant. ``--layout paper`` is the HiFT paper's
(section 4.3, appendix A.2, tables 3 and 6 to 9): the whole state of the block with most parameters on the device, its
gradients in fp32, nothing else of DeepSpeed's.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch

from hift_ds import presets
from hift_ds.activations import checkpoint_activations
from hift_ds.blocks import Block, partition_model
from hift_ds.config import AIO_BUFFERS, AIO_CHUNK, ConfigError
from hift_ds.fit import Fit
from hift_ds.presets import Request
from hift_ds.simulate import CATEGORIES, ForwardStep, LiveMemory, Simulator, StepBase
from hift_ds.stages import FP32, Setup, gathered, make_step, persistent, slot_bytes, state_numel

GIB = 2**30
_STOCK_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size
_STOCK = {  # no blocks: what of a request only the engine does is as if it was not asked for
    name: getattr(Request, name) for name in ("offload_device", "offload_step", "nvme_path", "offload_optimizer")
} | {"method": "full"}
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
             "device": _with_total(b.device)} for b in self.blocks
        ]  # fmt: skip
        places = {name: _with_total(getattr(self, name)) for name in ("device", "host", "nvme")}
        counts = {name: getattr(self, name) for name in ("total_parameters", "peak_trainable_parameters")}
        result = {**counts, **places, "peak": self.peak, "blocks": blocks, "notes": self.notes, "inputs": inputs}
        return result | ({"fit": self.fit} if self.fit else {})


def _with_total(sizes: Mapping[str, int]) -> dict[str, int]:
    return {**sizes, "total": sum(sizes.values())}


def plan_memory(
    model: Any, *, gpu_memory: int | str | None = None, reserve: int | str | None = None, **options: Any
) -> Plan:
    """Plan the memory of a training run.

    Args:
        model: a preset (``hift_ds.presets.PRESETS``), a folder with a ``config.json``, such a file, a Hub id, a
            mapping with ``model_type``, or a ``transformers`` configuration. No weights are read.
        method: ``hift``, ``full`` (stock DeepSpeed), ``lora`` (PEFT's default layers) or ``mezo``.
        precision: ``fp32``; ``mixed``: 16-bit weights and the fp32 masters of all of them on the device; ``mixed-hi``:
            fp32 masters of the active block only (the paper's Mixed^Hi).
        optimizer: ``adamw``, ``sgd``, ``sgdm``, ``adafactor``, ``adagrad`` or ``lion``. MeZO needs none.
        batch_size: sequences of a micro-batch on one rank; ``seq_len`` tokens each, without padding.
        layers_per_block: the paper's m.
        zero_stage: of DeepSpeed, on ``ranks`` ranks; default 2, and 0 for Adafactor. Sizes are those of one rank.
        offload_device, offload_step, buffer_size, nvme_path: as ``device``, ``step`` ... of ``hift.offload``.
        offload_optimizer: ``cpu``: the step is on the host.
        layout: ``engine`` or ``paper``.
        accelerator: whose kernels: ``gpu``, or ``cpu`` for a run on a machine without one.
        attention: ``attn_implementation`` of transformers, ``sdpa`` or ``eager``; by default transformers' choice.
        gpu_memory: bytes, or text like ``24GiB``: also answer whether it fits, and what would, with ``reserve``
            (1GiB) kept free for what PyTorch does not count: the CUDA context, fragmentation, communication.

    Raises:
        hift_ds.config.ConfigError: (a ValueError) every problem of the arguments, with the remedy.
    """
    names = [entry.name for entry in fields(Request)]
    unknown = [
        f"{key}={value!r} is an unknown argument; "
        + (f"did you mean {near[0]!r}?" if (near := difflib.get_close_matches(key, names, n=1)) else "")
        + f" known: {', '.join(names)}, gpu_memory, reserve"
        for key, value in options.items()
        if key not in names
    ]
    if unknown:
        raise ConfigError(unknown)
    planner, fit = _prepare(Request(model, **options), gpu_memory, reserve)
    plan = planner.plan(planner.request)
    return fit.answer(plan) if fit else plan


def _prepare(
    request: Request, gpu_memory: int | str | None, reserve: int | str | None, found: Iterable[str] = ()
) -> tuple[Planner, Fit | None]:
    """What plans and what answers whether it fits.

    Raises:
        ConfigError: every problem of the arguments, after those that were found before.
    """
    found = list(found)
    planner, memory, kept = None, 0, presets.parse_size("--reserve", "1GiB")
    try:
        planner = Planner(request)
    except ConfigError as error:
        found += error.problems
    try:
        memory = presets.parse_size("--gpu-memory", gpu_memory) if gpu_memory is not None else 0
    except ConfigError as error:
        found += error.problems
    try:
        kept = presets.parse_size("--reserve", reserve) if reserve is not None else kept
    except ConfigError as error:
        found += error.problems
    if gpu_memory is None and reserve is not None:
        found.append(f"--reserve={reserve} has no effect without --gpu-memory; add it, or leave --reserve out")
    elif memory and kept >= memory:
        found.append(f"--reserve={kept}: expected less than --gpu-memory, which is {memory} bytes")
    if planner is None or found:
        raise ConfigError(found)
    return planner, Fit(planner, memory, kept) if memory else None


# --- planning ----------------------------------------------------------------------------------------------------


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
        for run in built.alike():
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
            host=self._off_device(request, built, top, "host"),
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
            trained, step = (), ForwardStep(request.weight * max(_numels(built.shapes.values())))
        elif request.layout == "engine":
            step = make_step(self._setup(request, built), shapes, built.stepped_shapes(unit))
        return built.simulator.run(trained, request.batch_size, request.seq_len, self.holds(request, unit), step)

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
            "buffers": others + _NUMBERS * len(numels) + request.weight * gathered(setup, numels) + 2 * setup.slot,
        }
        units = built.owners()
        if setup.stage == 3:
            held["buffers"] += request.weight * setup.bucket
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
        key = (request.weight, request.activation_checkpointing, request.accelerator, request.attention, rank, m)
        if key not in self._built:
            dtype = torch.float32 if request.weight == FP32 else torch.bfloat16
            gpu = request.accelerator == "gpu"
            model: Any = presets.skeleton(self.config, self.task, dtype, request.attention, gpu)
            if request.activation_checkpointing:
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
                if rows := next((block.name for block in units if block.slices), None):
                    self._check_rows(request, rows)
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            limit = presets.longest_input(model)
            self._built[key] = _Built(Simulator(model, self.task), shapes, units, limit)
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
            sizes["gradients"] = FP32 * sum(partitions)
            if setup.stage == 3:
                sizes["gradients"] += setup.weight * max(partitions)
            else:  # the updated weights on their way back, and a buffer for one parameter's gradient
                sizes["buffers"] = setup.weight * (sum(partitions) + setup.staging)
                if setup.accumulates:
                    sizes["gradients"] += setup.weight * sum(sum(_numels(shapes)) for shapes in units)
        return sizes


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


# --- output ------------------------------------------------------------------------------------------------------


def table(plan: Plan, full: Plan | None = None) -> str:
    """The plan as text, in GiB; ``full``: full fine-tuning beside it."""

    def gib(sizes: Mapping[str, int], key: str = "total") -> str:
        return f"{_with_total(sizes)[key] / GIB:.2f}"

    request, peak = plan.request, plan.peak
    zero = f"ZeRO-{request.stage} on {request.ranks} rank{'s' * (request.ranks > 1)}"
    lines = [
        f"{request.name}: {plan.total_parameters:,} parameters; {request.method}, {request.precision}, "
        f"{request.optimizer}, batch {request.batch_size} x {request.seq_len} tokens, "
        + (zero if request.layout == "engine" else "the paper's accounting"),
        f"A step trains up to {plan.peak_trainable_parameters:,} parameters. Most memory: in the {peak['phase']} of "
        f"block {peak['block']}, {peak['name']}.",
    ]
    columns = {"device": plan.device, "host": plan.host}
    if any(plan.nvme.values()):
        columns["files"] = plan.nvme
    if full:
        columns["full fine-tuning"] = full.device
    lines.append(f"\n{'GiB':<18}" + "".join(f"{name:>{_width(name)}}" for name in columns))
    for key in (*CATEGORIES, "total"):
        row = "".join(f"{gib(sizes, key):>{_width(name)}}" for name, sizes in columns.items())
        lines.append(f"{key.replace('_', ' '):<18}{row}")
    lines.append(f"\n{'block':<36}{'parameters':>14}{'device, GiB':>14}  largest in")
    rows = [(f"{b.numel:>14,}{gib(b.device):>14}  {b.phase}", b.name) for b in plan.blocks]
    for row, alike in groupby(rows, key=lambda row: row[0]):
        names = [name for _, name in alike]
        shown = names[0] if len(names) == 1 else f"{names[0][:20]} to {names[-1][-12:]}"
        lines.append(f"{shown[:35]:<36}{row}")
    if fit := plan.fit:
        verdict = "It fits" if fit["fits"] else f"It does not fit, but does with {fit['change']}"
        if "device_total" in fit:
            verdict += (
                f": {fit['device_total'] / GIB:.2f} GiB. Then fit at most {fit['longest_sequence']:,} tokens in a "
                f"sequence, or {fit['largest_batch']:,} sequences in a micro-batch."
            )
        else:
            verdict = "It does not fit, nor does it with any change that the planner knows."
        lines.append(f"\n{fit['gpu_memory'] / GIB:g} GiB, {fit['reserve'] / GIB:g} GiB of it kept free: {verdict}")
    return "\n".join([*lines, *(["", *(f"- {note}" for note in plan.notes)] if plan.notes else [])])


def _width(name: str) -> int:
    return max(12, len(name) + 4)


def plot(plan: Plan, full: Plan, path: str) -> None:
    """A stacked bar beside that of full fine-tuning, as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(["--plot: matplotlib is not installed; install it with: pip install matplotlib"]) from error
    colors = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#999999")  # Okabe and Ito's: told apart by all
    axes = (figure := Figure(figsize=(7, 5), layout="constrained")).subplots()
    bars = {"full fine-tuning": full, f"{plan.request.method}, {plan.request.precision}": plan}
    bottom = [0.0] * len(bars)
    for category, color in zip(CATEGORIES, colors, strict=True):
        heights = [entry.device[category] / GIB for entry in bars.values()]
        axes.bar(list(bars), heights, 0.55, bottom, color=color, edgecolor="white", label=category.replace("_", " "))
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for position, total in enumerate(bottom):
        axes.annotate(f"{total:.1f} GiB", (position, total), (0, 4), textcoords="offset points", ha="center")
    if plan.fit:
        axes.axhline(plan.fit["gpu_memory"] / GIB, color="black", linestyle="--", linewidth=1, label="the device")
    request = plan.request
    axes.set(ylabel="GiB on the device", ylim=(0, max(bottom) * 1.12), xlim=(-0.6, len(bars) - 0.4))
    axes.set_title(f"{request.name}, {request.optimizer}, {request.batch_size} x {request.seq_len} tokens")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


# --- command -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}; see --help"])


def _integer(text: str) -> int | str:
    """What is no integer stays text, which the request then names with all that is wrong."""
    try:
        return int(text)
    except ValueError:
        return text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        "python -m hift_ds.plan", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    for entry in fields(Request):
        option = "--" + entry.name.replace("_", "-")
        if entry.type == "bool":
            parser.add_argument(option, action="store_true")
        else:
            kind, said = (_integer if "int" in str(entry.type) else str), presets.HELP[entry.name]
            parser.add_argument(option, type=kind, help=said, required=entry.name == "model", metavar="X")
    parser.add_argument("--gpu-memory", metavar="24GiB", help="does it fit, and what does at most")
    parser.add_argument("--reserve", metavar="1GiB", help="of it, for what PyTorch does not count")
    parser.add_argument("--json", action="store_true", help="one object, sizes in bytes")
    parser.add_argument("--write-config", metavar="FILE", help="the DeepSpeed config of what fits")
    parser.add_argument("--plot", metavar="FILE.png", help="a picture beside full fine-tuning")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``; the exit code."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        options = vars(_parse(argv))
        as_json, config, picture = (options.pop(name, None) for name in ("json", "write_config", "plot"))
        memory, reserve = (options.pop(name, None) for name in ("gpu_memory", "reserve"))
        planner, fit = _prepare(Request(**options), memory, reserve, _file_problems(config, picture))
        if config:
            planner.request.deepspeed_config()  # what cannot be written is said before the plan is made
        plan = planner.plan(planner.request)
        if fit:
            plan = fit.answer(plan)
        if config and fit and plan.fitting is None:
            raise ConfigError(["--write-config: nothing that the planner knows fits, so there is no config to write"])
        written = (plan.fitting or plan.request).deepspeed_config() if config else None
        full = None if plan.request.method == "full" or (as_json and not picture) else _full(plan.request)
        if picture:
            plot(plan, full or plan, picture)
        if config:
            Path(config).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    print(json.dumps(plan.as_dict(), indent=2) if as_json else table(plan, full))
    return 0


def _file_problems(config: str | None, picture: str | None) -> list[str]:
    found = []
    for option, file in (("--write-config", config), ("--plot", picture)):
        if file and not Path(file).resolve().parent.is_dir():
            found.append(f"{option}={file!r}: there is no such folder; make it, or name another one")
    if config and Path(config).exists():
        found.append(f"--write-config={config!r} exists; give another name, or remove it")
    if picture and Path(picture).suffix not in (".png", ".svg", ".pdf"):
        found.append(f"--plot={picture!r}: expected a name that ends in .png, .svg or .pdf")
    return found


def _full(request: Request) -> Plan:
    """Full fine-tuning of the same model on the same batch, as stock DeepSpeed does it."""
    full = Request(**{**vars(request), **_STOCK})
    return Planner(full).plan(full)


if __name__ == "__main__":
    sys.exit(main())
