"""Plan the memory of a training run, without weights and without a GPU.

    python -m hift_ds.plan --model llama-7b --batch-size 1 --seq-len 512 [--gpu-memory 24GiB] [--gpu 4090] [--json]

--layout engine simulates a step as hift_ds.initialize runs it. All sizes are those at the instant of the highest device
total. --layout paper uses the accounting of the HiFT paper (section 4.3, appendix A.2, tables 3 and 6 to 9): the whole
state of the block with the most parameters is on the device, its gradients are in fp32, and nothing that DeepSpeed
allocates is counted.

Exit code: 0, or 1 if --gpu-memory is given and the planner finds nothing that fits, or 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from hift_ds import paths
from hift_ds.config import ConfigError
from hift_ds.planner.api import prepare
from hift_ds.planner.models import PRESETS
from hift_ds.planner.picture import plot, table
from hift_ds.planner.plan import Plan, Planner
from hift_ds.planner.request import OPTIMIZERS, Request
from hift_ds.planner.timeline import CARDS

# field of Request -> help text of its option
_HELP = {
    "model": "a preset, a folder with a config.json, a config.json, a GGUF file, or a Hub id; presets: "
    + ", ".join(PRESETS),
    "method": "hift (default), full (DeepSpeed without HiFT), lora or mezo",
    "precision": "fp32; mixed: fp32 master weights of all blocks on the device; mixed-hi (default): of the active one",
    "optimizer": ", ".join(OPTIMIZERS) + "; default adamw",
    "batch_size": "sequences in a micro-batch of one rank; default 1",
    "seq_len": "tokens in a sequence; default 512",
    "layers_per_block": "layers in a block, the paper's m; default 1",
    "max_block_numel": "cut blocks with more parameters, as hift.max_block_numel",
    "balance": "make the blocks more equal, as hift.balance",
    "zero_stage": "0 to 3; default 2, or 0 with adafactor",
    "ranks": "number of GPUs; default 1",
    "offload_device": "where the state of blocks waits, as hift.offload.device: cpu (default), nvme or none",
    "offload_step": "auto (default), block or streamed, as hift.offload.step",
    "buffer_size": "bytes of a chunk of the streamed step, as hift.offload.buffer_size; default 64 MiB",
    "prefetch": "bytes of all slots of the streamed step, as hift.offload.prefetch; default: two slots",
    "nvme_path": "folder for files, of --offload-device nvme; with --host-memory, permits state in files there if it "
    "does not fit in memory. If the folder exists, its free space is a limit",
    "nvme": "what is in files: all state (default), or the moments, as hift.offload.nvme",
    "drive_read": "bytes a second that the drive reads, for the step time; default 3000000000",
    "drive_write": "bytes a second that the drive writes, for the step time; default 2000000000",
    "weights": "where the weights of layers wait, as hift.offload.weights: device (default) or cpu",
    "master": "form of the master weights, as hift.offload.master: auto (default), fp32 or split",
    "moments": "form of the optimizer's state, as hift.offload.moments: fp32 (default) or 8bit",
    "offload_param": "none (default), or cpu: at ZeRO-3, the weights wait in host memory",
    "offload_optimizer": "none (default), or cpu: the host runs the optimizer step",
    "pin_memory": "page-lock host memory, as hift.offload.pin_memory (default); without, copies are slower, and the "
    "host waits for each",
    "activation_checkpointing": "recompute layers in the backward pass",
    "checkpoint_offload": "recompute layers, and keep the checkpoints in host memory",
    "gradient_accumulation_steps": "micro-batches in a step; default 1",
    "loss_chunk": "tokens in a chunk of logits; default: as many as 128 MiB of fp32 logits; 0: all tokens at once",
    "layout": "engine (default), or paper: the accounting of the HiFT paper",
    "accelerator": "gpu (default), or cpu: the device whose kernels run",
    "attention": "sdpa or eager; default: transformers' choice",
    "task": "causal-lm or sequence-classification; default: the task of the configuration",
    "lora_rank": "rank of the adapters of --method lora; default 8",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}; see --help"])


def _joined(argv: Sequence[str]) -> list[str]:
    """Join options with values such as -8GiB, which argparse would take for options."""
    joined: list[str] = []
    for part in argv:
        is_value = bool(re.match(r"-\.?\d", part)) and bool(joined) and bool(re.fullmatch(r"--[a-z-]+", joined[-1]))
        joined[-1:] = [f"{joined[-1]}={part}"] if is_value else [*joined[-1:], part]
    return joined


def _integer(text: str) -> int | str:
    """Convert to an integer. Other text stays as it is, so that the request reports it with all other problems."""
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
        if entry.default is True:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=_HELP[entry.name])
        elif entry.type == "bool":
            parser.add_argument(option, action="store_true", help=_HELP[entry.name])
        else:
            kind, text = (_integer if "int" in str(entry.type) else str), _HELP[entry.name]
            parser.add_argument(option, type=kind, help=text, required=entry.name == "model", metavar="X")
    parser.add_argument(
        "--gpu-memory", metavar="24GiB", help="find out whether the run fits, and the largest sizes that fit"
    )
    parser.add_argument(
        "--reserve",
        metavar="2GiB",
        help="memory to keep free for what PyTorch does not count; default: 1 GiB and a twentieth of --gpu-memory",
    )
    parser.add_argument(
        "--host-memory",
        metavar="64GiB",
        help="memory of the machine: with --gpu-memory, find what fits there, too, if need be with state in 8 bits, or "
        "in files in --nvme-path; with --gpu, the fastest of what fits",
    )
    parser.add_argument("--gpu", metavar="X", help="predict the time of a step on this card: " + ", ".join(CARDS))
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with all sizes in bytes and times in seconds"
    )
    parser.add_argument("--write-config", metavar="FILE", help="write the DeepSpeed config of the run that fits")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the plan next to full fine-tuning")
    return parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit code."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        options = vars(_parse(argv))
        as_json, config, picture = (options.pop(name, None) for name in ("json", "write_config", "plot"))
        memory, reserve, gpu, host = (
            options.pop(name, None) for name in ("gpu_memory", "reserve", "gpu", "host_memory")
        )
        planner, fit, times = prepare(Request(**options), memory, reserve, gpu, host, _file_problems(config, picture))
        if config:
            planner.request.deepspeed_config()  # report what cannot be written before the slow simulation
        print(
            f"planning {planner.request.name}: the planner simulates steps, which can take minutes",
            file=sys.stderr,
            flush=True,
        )
        planner.tell = _Progress()
        plan = planner.plan(planner.request)
        if times:
            plan = times.answer(plan)
        if fit:
            print("searching for what fits", file=sys.stderr, flush=True)
            plan = fit.answer(plan)
        chosen = plan.fitting if fit else plan.request
        shown = plan
        if chosen and chosen != plan.request:
            shown = planner.plan(chosen)
            shown = times.answer(shown) if times else shown
        full = None
        if plan.request.method != "full" and (picture or not as_json):
            full_request = plan.request.full_fine_tuning()
            full_planner = Planner(full_request)
            full_planner.tell = planner.tell
            full = full_planner.plan(full_request)
        if picture:
            plot(plan, full or plan, picture)
        if config and chosen:
            Path(config).write_text(json.dumps(chosen.deepspeed_config(plan.freeze), indent=2) + "\n", encoding="utf-8")
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    _print(json.dumps(plan.as_dict(), indent=2) if as_json else table(plan, full, shown))
    if config and chosen is None:
        print(
            "error: --write-config: no change that the planner knows makes the run fit; nothing was written",
            file=sys.stderr,
        )
    if config and chosen:
        print(_written(config, plan, chosen), file=sys.stderr)
    return int(chosen is None)


class _Progress:
    """Prints what the planner does to standard error, at most once in five seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last > 5:
            print(text, file=sys.stderr, flush=True)
            self._last = time.monotonic()


def _print(text: str) -> None:
    """Print to standard output. A reader such as ``head`` may close it early, which is not an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes standard output again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _written(config: str, plan: Plan, request: Request) -> str:
    """Return a message that names the written config and the settings of the plan that it cannot hold."""
    change = f" with {plan.fit['change']}" if plan.fit and plan.fit["change"] else ""
    missing = [f"sequences of at most {request.seq_len} tokens", "a learning rate"]
    if request.recomputes:
        missing.append(f"model.gradient_checkpointing: {'cpu' if request.checkpoint_offload else 'true'}")
    missing.append(f"training.micro_batch_size: {request.batch_size}")
    if (steps := request.gradient_accumulation_steps) > 1:
        missing.append(f"training.batch_size: {request.batch_size * request.ranks * steps}")
    return f"wrote {config}: the DeepSpeed config of the plan{change}. Set these yourself: {'; '.join(missing)}"


def _file_problems(config: str | None, picture: str | None) -> list[str]:
    """Return the problems of the files that the command would write."""
    found = []
    for option, file in (("--write-config", config), ("--plot", picture)):
        if file is not None and (reason := paths.fault(file)):
            found.append(f"{option}: {reason}")
        elif file and not Path(file).resolve().parent.is_dir():
            found.append(f"{option}={file!r}: there is no such folder; create it, or use another name")
    if config and os.path.exists(config):
        found.append(f"--write-config={config!r} exists; remove it, or use another name")
    if picture and Path(picture).suffix not in (".png", ".svg", ".pdf"):
        found.append(f"--plot={picture!r}: expected a name that ends in .png, .svg or .pdf")
    return found
