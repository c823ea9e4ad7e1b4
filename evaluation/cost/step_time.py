"""Measure the step time of HiFT, full fine-tuning with stock DeepSpeed and a plain PyTorch loop, or of all methods.

    python -m evaluation.efficiency --model-shape smollm2-135m --batch 4 --length 256 --stages 0,1,2,3 --cycles 3
    python -m evaluation.efficiency --memory          peak memory instead of time (peak_memory.py)
    python -m evaluation.efficiency --files FOLDER    state in files under a limit of memory (file_state.py)
    python -m evaluation.efficiency --saving FOLDER   saving checkpoints beside bare writes (saving.py)
    python -m evaluation.efficiency --methods all --memory          time, tokens/s and memory of each method

All methods train the same model from the same weights on the same batches, with AdamW or the method's own optimizer, in
one process, one step each in turns. A step is a forward pass, a backward pass and an optimizer step. HiFT's blocks take
different times, so a measurement is the mean over a cycle, in which each block is trained once. The tables show the
median of the measurements with the minimum and maximum. With `--methods`, the engines would not fit in memory together:
full fine-tuning stays in memory, and each other method is made, timed in turns with it, and freed. Ratios are between
methods that were timed side by side.
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hift_ds.evaluation.cost import file_state, peak_memory, saving
from hift_ds.evaluation.cost.machine import machine
from hift_ds.evaluation.cost.timed_methods import (
    DTYPES,
    NOTES,
    SHAPES,
    Setup,
    TimedMethod,
    join_world,
    make_timed_method,
    time_in_turns,
)
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.table import TRAINED
from hift_ds.launch.runtime import extensions

TITLES = {
    "hift": "HiFT",
    "kept": "HiFT without offload",
    "full": "full fine-tuning",
    "plain": "plain loop",
}
STAGES = (0, 1, 2, 3)


@dataclass
class StepTimes:
    """Seconds per step of methods that were timed side by side, one mean for each measured cycle."""

    dtype: str
    stage: int
    seconds: dict[str, list[float]]

    def ratios(self, other: str, one: str = "hift") -> list[float]:
        """Return the time of `one` divided by the time of `other`, for each cycle."""
        return [a / b for a, b in zip(self.seconds[one], self.seconds[other], strict=True)]


@dataclass
class Row:
    """The costs of a method.

    Attributes:
        seconds: seconds per step, one mean for each measured cycle, or one value per step without cycles.
        full_seconds: the same of full fine-tuning, timed in turns with the method.
        ratios: `seconds` divided by `full_seconds`, one by one.
        flops: model FLOPs per step (flops.py).
        peak: peak memory in bytes above the loaded model.
        peak_ratio: the peak divided by that of full fine-tuning.
        reason: why the times or the memory are missing.
    """

    method: str
    dtype: str
    stage: int
    seconds: list[float] = field(default_factory=list)
    full_seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    tokens_per_second: float | None = None
    trained_parameters: int | None = None
    flops: float | None = None
    peak: int | None = None
    peak_ratio: float | None = None
    reason: str | None = None


def time_side_by_side(names: Sequence[str], setup: Setup, cycles: int, stock_every: int) -> StepTimes:
    """Time methods side by side for `cycles` cycles, after a warm-up on short batches."""
    timed_methods: dict[str, TimedMethod] = {}
    try:
        for name in names:
            timed_methods[name] = make_timed_method(name, setup)
            timed_methods[name].warm_up(setup)
        seconds = time_in_turns(timed_methods, setup, cycles, timed_methods["hift"].cycle, stock_every)
    finally:
        for timed_method in timed_methods.values():
            timed_method.destroy()
    return StepTimes(setup.dtype, setup.stage, seconds)


def compare_methods(names: Sequence[str], setup: Setup, cycles: int, steps: int, stock_every: int) -> list[Row]:
    """Time each method side by side with full fine-tuning; return a row for each, with one for full fine-tuning.

    Args:
        cycles: measured cycles of a method that trains block by block.
        steps: measured steps of any other method.
    """
    names = list(dict.fromkeys(names if "full" in names else ["full", *names]))
    rows = {name: Row(name, setup.dtype, setup.stage) for name in names}
    full = _timed(rows["full"], None, setup, cycles, steps, stock_every)
    try:
        for name in names:
            if name == "full":
                continue
            if other := _timed(rows[name], full, setup, cycles, steps, stock_every):
                other.destroy()
            del other
            _free()  # before the next one is made
    finally:
        if full is not None:
            full.destroy()
    del full
    _free()  # make room for the processes that measure memory
    return list(rows.values())


def _timed(
    row: Row, full: TimedMethod | None, setup: Setup, cycles: int, steps: int, stock_every: int
) -> TimedMethod | None:
    """Time a method, side by side with full fine-tuning if that fits in memory, and fill in its row.

    Returns:
        The method, or None if it could not be timed; then `row.reason` says why.
    """
    timed_method = None
    with _reason_in(row):
        timed_method = make_timed_method(row.method, setup)
        timed_method.warm_up(setup)
        runners = {row.method: timed_method} if full is None else {"full": full, row.method: timed_method}
        units = steps if timed_method.cycle == 1 else cycles
        _fill(row, timed_method, setup, time_in_turns(runners, setup, units, timed_method.cycle, stock_every))
    if row.reason and timed_method is not None:
        timed_method.destroy()
        timed_method = None
    return timed_method


@contextlib.contextmanager
def _reason_in(row: Row) -> Iterator[None]:
    """Store in the row why a method does not apply to the model or does not fit in memory; other methods go on."""
    try:
        yield
    except UserError as error:
        row.reason = str(error)
    except torch.OutOfMemoryError:
        row.reason = peak_memory.NO_ROOM


def _free() -> None:
    gc.collect()
    get_accelerator().empty_cache()


def _fill(row: Row, timed_method: TimedMethod, setup: Setup, seconds: dict[str, list[float]]) -> None:
    row.seconds, row.full_seconds = seconds[row.method], seconds.get("full", [])
    if row.full_seconds:
        row.ratios = StepTimes(row.dtype, row.stage, seconds).ratios("full", row.method)
    row.tokens_per_second = setup.tokens / statistics.median(row.seconds)
    row.trained_parameters, row.flops = timed_method.trained_parameters, timed_method.flops


def add_memory(rows: Sequence[Row], setup: Setup) -> None:
    """Measure the peak memory of the timed methods, full fine-tuning first, and fill in their rows."""
    full: int | None = None
    for row in sorted(rows, key=lambda row: row.method != "full"):
        if row.reason is None:
            with _reason_in(row):
                row.peak = peak_memory.measure(row.method, False, setup).above
            if row.peak is None:
                continue
            full = row.peak if row.method == "full" else full
            row.peak_ratio = row.peak / full if full else None


def spread(values: Sequence[float], digits: int) -> str:
    """Format the median with the minimum and maximum."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(step_times: Sequence[StepTimes]) -> str:
    """Return a Markdown table of seconds per step and ratios."""
    others = [name for name in step_times[0].seconds if name != "hift"]
    head = ["precision", "stage", *(f"{TITLES[name]}, s" for name in ("hift", *others))]
    head += [f"HiFT / {name}" for name in others]
    rows = [
        [
            c.dtype,
            str(c.stage),
            *(spread(c.seconds[name], 3) for name in ("hift", *others)),
            *(spread(c.ratios(name), 2) for name in others),
        ]
        for c in step_times
    ]
    return markdown(head, rows)


def methods_table(rows: Sequence[Row], memory: bool) -> str:
    """Return a Markdown table of the methods' costs, followed by notes and the reasons for missing values."""
    head = [
        "method",
        "precision",
        "stage",
        "s per step",
        "tokens/s",
        "time / full",
        "trained parameters",
        "FLOPs per step",
    ]
    head += ["peak above the model, MiB", "memory / full"] if memory else []
    lines = []
    for row in rows:
        line = [row.method, row.dtype, str(row.stage)]
        if row.seconds:
            line += [spread(row.seconds, 3), f"{row.tokens_per_second:.0f}"]
            line += [spread(row.ratios, 2) if row.ratios else "n/a"]
            line += [f"{row.trained_parameters:,}", f"{row.flops:.3g}"]
        if row.peak is not None:
            line += [f"{row.peak / 2**20:.1f}", "n/a" if row.peak_ratio is None else f"{row.peak_ratio:.2f}"]
        lines.append(line + ["n/a"] * (len(head) - len(line)))
    notes = [NOTES[name] for name in NOTES if any(row.method == name and row.seconds for row in rows)]
    if memory and get_accelerator().device_name() == "cpu":
        notes += ["Memory: HiFT keeps master weights and optimizer state in files."]
    notes += dict.fromkeys(f"{row.method}: n/a: {row.reason}" for row in rows if row.reason)
    return "\n".join([markdown(head, lines), "", *(f"- {note}" for note in notes)]).rstrip()


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def comma_separated(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return an argparse type for a comma-separated list of allowed values."""

    def parse(text: str) -> list[str]:
        for value in text.split(","):
            if value not in allowed:
                raise argparse.ArgumentTypeError(f"{value!r}: expected some of {','.join(allowed)}")
        return text.split(",")

    return parse


def positive(text: str) -> int:
    """Parse a positive integer (argparse type)."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return int(text)


def section(text: str) -> dict:
    """Parse a JSON object (argparse type)."""
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object")


def methods(text: str) -> list[str]:
    """Parse "all" or a comma-separated list of training methods (argparse type)."""
    return list(TRAINED) if text == "all" else comma_separated(list(TRAINED))(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.efficiency", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--model-shape", choices=list(SHAPES), default="smollm2-135m")
    add("--batch", type=positive, default=4, help="examples per step")
    add("--length", type=positive, default=256, help="tokens per example")
    add("--methods", type=methods, help=f"measure the costs of all methods, or some of {','.join(TRAINED)}")
    add(
        "--against",
        type=comma_separated([name for name in TITLES if name != "hift"]),
        help="compare HiFT with full: stock DeepSpeed; plain: a PyTorch loop; kept: HiFT with all state on the device "
        "(default: full,plain)",
    )
    add(
        "--stages",
        type=comma_separated([str(s) for s in STAGES]),
        help="ZeRO stages (default: 0,1,2,3; with --methods 0)",
    )
    add("--dtypes", type=comma_separated(list(DTYPES)), help="default: fp32,bf16; with --methods fp32")
    add("--cycles", type=positive, default=1, help="measured cycles; a cycle is one step for each block")
    add("--steps", type=positive, default=8, help="with --methods: measured steps of methods without cycles")
    add("--stock-every", type=positive, default=4, help="time full fine-tuning only in every N-th step of a cycle")
    add("--memory", action="store_true", help="peak memory instead of step time; with --methods both (Linux)")
    add("--files", type=Path, metavar="FOLDER", help="state in files in this folder, under a limit, beside host memory")
    add(
        "--saving",
        type=Path,
        metavar="FOLDER",
        help="save checkpoints to this folder, beside bare writes, --cycles times",
    )
    add("--hift", type=section, default={}, help="with --files: the config's section hift, as JSON")
    add("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; create it first")
    for name in ("files", "saving"):
        if (folder := getattr(options, name)) and not folder.is_dir():
            parser.error(f"--{name} {folder}: not a folder; create it first")
    if options.methods and options.against:
        parser.error(
            "--against: not with --methods, which compares all methods with full fine-tuning; remove one of them"
        )
    options.against = options.against or ["full", "plain"]
    options.stages = list(map(int, options.stages or ("0" if options.methods else "0123")))
    options.dtypes = options.dtypes or (["fp32"] if options.methods else ["fp32", "bf16"])
    return options


def main(arguments: Sequence[str] | None = None) -> list[StepTimes] | list[Row]:
    """Run the command line and print a table; return what was timed."""
    options = parse(arguments)
    extensions.prepare(int(os.environ.get("RANK", "0")))
    given = sys.argv[1:] if arguments is None else arguments
    origin = f"{datetime.date.today()}: python -m evaluation.efficiency {shlex.join(given)}"
    shape, size = options.model_shape, (options.batch, options.length)
    sizes = f"{shape}, {options.batch} x {options.length} tokens"
    if options.memory and not options.methods:
        print(f"Peak memory above the loaded model on {machine()}\n{origin}\n{sizes}, fp32, AdamW", flush=True)
        peaks = peak_memory.compare(Setup(shape, "fp32", 0, *size))
        write_json(options.json, [origin], peaks=[asdict(p) for p in peaks])
        print("\n" + peak_memory.table(peaks))
        return []
    if options.files:
        print(f"State in files on {machine()}\n{origin}\n{sizes}, bf16, AdamW, ZeRO 2", flush=True)
        setup = Setup(shape, "bf16", 2, *size)
        runs: list[file_state.Run] = []
        for run in file_state.compare(setup, options.cycles, str(options.files), options.hift):
            runs.append(run)
            write_json(options.json, [origin], runs=[asdict(one) for one in runs])
            print("\n" + file_state.table(runs), flush=True)
        return []
    if options.saving:
        saving.join()
        saves = [
            saving.time_saves(Setup(shape, dtype, stage, *size), options.cycles, options.saving)
            for dtype in options.dtypes
            for stage in options.stages
        ]
        if dist.get_rank() == 0:
            print(f"Saving to {options.saving} on {machine()}\n{origin}\n{shape}, AdamW, {options.cycles} turns")
            write_json(options.json, [origin], saves=[asdict(one) for one in saves])
            print("\n" + saving.table(saves), flush=True)
        return []
    join_world()
    units = f"{options.cycles} cycles" + (f" or {options.steps} steps" if options.methods else "")
    heading = [f"Step time on {machine()}", origin]
    heading += [f"{sizes}, AdamW, median of cycle means (minimum to maximum) over {units}"]
    print("\n".join(heading), flush=True)
    rows: list[Row] = []
    step_times: list[StepTimes] = []
    for dtype in options.dtypes:
        for stage in options.stages:
            setup = Setup(shape, dtype, stage, *size, stock=not options.methods)
            if options.methods:
                found = compare_methods(options.methods, setup, options.cycles, options.steps, options.stock_every)
                if options.memory:
                    add_memory(found, setup)
                rows += found
            else:
                step_times.append(
                    time_side_by_side(["hift", *options.against], setup, options.cycles, options.stock_every)
                )
            gc.collect()  # free these engines before the next ones are made
            # After each one, so that a stopped run has written its measurements.
            write_json(
                options.json, heading, step_times=[asdict(c) for c in step_times], methods=[asdict(r) for r in rows]
            )
    print("\n" + (methods_table(rows, options.memory) if rows else table(step_times)))
    return rows or step_times


def write_json(file: Path | None, heading: Sequence[str], **results: Sequence[dict]) -> None:
    """Write the results to a JSON file, if one is given."""
    if file:
        file.write_text(json.dumps({"heading": heading} | results, indent=1) + "\n")
