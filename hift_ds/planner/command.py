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
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from hift_ds.config import ConfigError
from hift_ds.planner.plan import Plan, Planner, presets, with_total
from hift_ds.planner.presets import Request
from hift_ds.planner.search import Fit
from hift_ds.planner.simulation import CATEGORIES

GIB = 2**30
_STOCK = {  # no blocks: what of a request only the engine does is as if it was not asked for
    name: getattr(Request, name)
    for name in ("offload_device", "offload_step", "nvme_path", "offload_optimizer", "max_block_numel", "balance")
} | {"method": "full"}


def plan_memory(
    model: Any, *, gpu_memory: int | str | None = None, reserve: int | str | None = None, **options: Any
) -> Plan:
    """Plan the memory of a training run.

    Args:
        model: a preset (``hift_ds.planner.presets.PRESETS``), a folder with a ``config.json``, such a file, a Hub id, a
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
        activation_checkpointing, checkpoint_offload: layers are computed again in the backward pass; from what they
            kept on the device, or in host memory.
        loss_chunk: tokens whose logits exist at a time, as ``training.loss_chunk`` of a run.
        layout: ``engine`` or ``paper``.
        accelerator: whose kernels: ``gpu``, or ``cpu`` for a run on a machine without one.
        attention: ``attn_implementation`` of transformers, ``sdpa`` or ``eager``; by default transformers' choice.
        gpu_memory: bytes, or text like ``24GiB``: also answer whether it fits, and what would, with ``reserve`` kept
            free for what PyTorch does not count: the CUDA context, fragmentation, communication. By default
            `default_reserve`.

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


def default_reserve(gpu_memory: int) -> int:
    """Bytes: 1 GiB for the CUDA context and communication, and a twentieth for fragmentation.

    Without the twentieth, a run at the longest sequence of the plan for LLaMA-7B on 24 GiB had no room on an H200 whose
    allocator had the remaining 23 GiB. That a twentieth is enough was not measured.
    """
    return 2**30 + gpu_memory // 20


def _prepare(
    request: Request, gpu_memory: int | str | None, reserve: int | str | None, found: Iterable[str] = ()
) -> tuple[Planner, Fit | None]:
    """What plans and what answers whether it fits.

    Raises:
        ConfigError: every problem of the arguments, after those that were found before.
    """
    found = list(found)
    planner, memory, kept = None, 0, 0
    try:
        planner = Planner(request)
    except ConfigError as error:
        found += error.problems
    try:
        memory = presets.parse_size("--gpu-memory", gpu_memory) if gpu_memory is not None else 0
    except ConfigError as error:
        found += error.problems
    if gpu_memory is not None and 0 < memory < 2**20:
        found.append(f"--gpu-memory={gpu_memory}: is taken as bytes; did you mean {gpu_memory}GiB?")
        memory = 0
    try:
        kept = default_reserve(memory) if reserve is None else presets.parse_size("--reserve", reserve)
    except ConfigError as error:
        found += error.problems
    if gpu_memory is None and reserve is not None:
        found.append(f"--reserve={reserve} has no effect without --gpu-memory; add it, or leave --reserve out")
    elif memory and kept >= memory:
        free = f"the {kept / GIB:.2f} GiB that are kept free of it (--reserve)"
        found.append(f"--gpu-memory={gpu_memory}: expected more than {free}")
    if planner is None or found:
        raise ConfigError(found)
    return planner, Fit(planner, memory, kept) if memory else None


# --- output ------------------------------------------------------------------------------------------------------


def table(plan: Plan, full: Plan | None = None) -> str:
    """The plan as text, in GiB; ``full``: full fine-tuning beside it."""

    def gib(sizes: Mapping[str, int], key: str = "total") -> str:
        return f"{with_total(sizes)[key] / GIB:.2f}"

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
    wide = max(len("block"), *(min(len(b.name), 60) for b in plan.blocks)) + 2
    lines.append(f"\n{'block':<{wide}}{'parameters':>14}{'device, GiB':>14}  largest in")
    rows = [(f"{b.numel:>14,}{gib(b.device):>14}  {b.phase}", b.name) for b in plan.blocks]
    for row, alike in groupby(rows, key=lambda row: row[0]):
        names = [name for _, name in alike]
        shown = names[0] if len(names) == 1 else f"{len(names)} like {names[0]}"
        lines.append(f"{textwrap.shorten(shown, wide - 2, placeholder=' ...'):<{wide}}{row}")
    notes = [*plan.notes, _STOCK_NOTE] if full else plan.notes
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join([*lines, f"\n{_verdict(plan)}"] if plan.fit else lines)


_STOCK_NOTE = (
    "full fine-tuning is stock DeepSpeed's, without offload; from ZeRO-1 on its step makes flat and fp32 copies of all "
    "gradients"
)


def _verdict(plan: Plan) -> str:
    """The answer to whether it fits, in words."""
    assert plan.fit is not None
    fit = plan.fit
    question = f"On {fit['gpu_memory'] / GIB:g} GiB, with {fit['reserve'] / GIB:g} GiB kept free"
    if "device_total" not in fit:
        return f"{question}, it does not fit, nor does it with any change that the planner knows."
    said = "it fits" if fit["fits"] else f"it does not fit as asked. It does with {fit['change']}"
    return (
        f"{question}, {said}: {fit['device_total'] / GIB:.2f} GiB. At most {fit['longest_sequence']:,} tokens in a "
        f"sequence fit, or {fit['largest_batch']:,} sequences in a micro-batch."
    )


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
            parser.add_argument(option, action="store_true", help=presets.HELP[entry.name])
        else:
            kind, said = (_integer if "int" in str(entry.type) else str), presets.HELP[entry.name]
            parser.add_argument(option, type=kind, help=said, required=entry.name == "model", metavar="X")
    parser.add_argument("--gpu-memory", metavar="24GiB", help="does it fit, and what does at most")
    parser.add_argument("--reserve", metavar="2GiB", help="of it, for what PyTorch does not count (1 GiB and a "
        "twentieth)")  # fmt: skip
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
        print(
            f"planning {planner.request.name}: steps are simulated, which can take minutes", file=sys.stderr, flush=True
        )
        plan = planner.plan(planner.request)
        if fit:
            plan = fit.answer(plan)
        chosen = plan.fitting if fit else plan.request
        full = None if plan.request.method == "full" or (as_json and not picture) else _full(plan.request)
        if picture:
            plot(plan, full or plan, picture)
        if config and chosen:
            Path(config).write_text(json.dumps(chosen.deepspeed_config(), indent=2) + "\n", encoding="utf-8")
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    print(json.dumps(plan.as_dict(), indent=2) if as_json else table(plan, full))
    if config and chosen is None:
        print("error: --write-config: nothing that the planner knows fits, so nothing was written", file=sys.stderr)
        return 2
    if config and chosen:
        print(_written(config, plan, chosen), file=sys.stderr)
    return 0


def _written(config: str, plan: Plan, request: Request) -> str:
    """What a config that was written is for, and what of the plan it cannot hold."""
    change = f" with {plan.fit['change']}" if plan.fit and plan.fit["change"] else ""
    beside = [f"sequences of at most {request.seq_len} tokens", "a learning rate"]
    if request.recomputes:
        beside.append(f"model.gradient_checkpointing: {'cpu' if request.checkpoint_offload else 'true'}")
    beside.append(f"training.micro_batch_size: {request.batch_size}")
    if (steps := request.gradient_accumulation_steps) > 1:
        beside.append(f"training.batch_size: {request.batch_size * request.ranks * steps}")
    return f"wrote {config}: the DeepSpeed config of the plan{change}. Not in it, and needed: {'; '.join(beside)}"


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
