"""What a run tells people: metrics.jsonl, the summary, W&B, a progress bar and plain text."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import set_log_level_from_string
from tqdm import tqdm

import hift_ds
from hift_ds.checkpoint.files import write_durably
from hift_ds.launch.config.credentials import redacted
from hift_ds.launch.config.settings import LoggingSettings, Settings
from hift_ds.launch.data.loading import Data
from hift_ds.launch.errors import shown
from hift_ds.launch.runtime import outputs
from hift_ds.launch.runtime.tracking import start_wandb


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def quieten(settings: LoggingSettings, rank: int) -> None:
    """Leave DeepSpeed's and transformers' warnings and errors on the terminal, and their reports if asked for."""
    if settings.verbose:
        set_log_level_from_string("info")
    else:
        set_log_level_from_string("warning" if rank == 0 else "error")
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    if rank != 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


class RunLog:
    """One record a step, to metrics.jsonl, W&B and the terminal. Made on rank 0 only.

    Args:
        folder: the run's output folder.
        first_step: number of steps already done. Records of later ones, left by a run that went on after its last
            checkpoint, are removed, since those steps are done again.
        wandb_id: of the W&B run to continue, if any.
    """

    def __init__(self, folder: Path, settings: Settings, first_step: int, wandb_id: str | None) -> None:
        self.settings = settings
        self.path = path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if first_step and path.exists() else []
        kept = [line for line in lines if _step_of(line) <= first_step]
        if len(kept) != first_step:
            warn(f"{path} has {len(kept)} of the {first_step} steps done; the summary can only count those")
        with outputs.writing(path):
            write_durably(path, "".join(f"{line}\n" for line in kept))
            self.file = path.open("ab", buffering=0)  # each record is in the file, whatever comes next
        self.bar = tqdm(
            total=settings.training.max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self.wandb = start_wandb(folder, settings, wandb_id, warn)

    @property
    def wandb_id(self) -> str | None:
        return self.wandb.id if self.wandb is not None else None

    def step(self, record: dict[str, Any]) -> None:
        with outputs.writing(self.path):
            self.file.write(f"{json.dumps(record, allow_nan=False)}\n".encode())
        if self.wandb is not None:
            self.wandb.log(record)
        self.bar.set_postfix_str(f"block {record['block_name']}, loss {_number(record['loss'])}")
        self.bar.update()
        step, steps = record["step"], self.settings.training.max_steps
        if record["skipped"] or self.bar.disable and (step == steps or step % self.settings.logging.every == 0):
            parts = [
                f"step {step}/{steps}: loss {_number(record['loss'])}",
                f"learning rate {record['learning_rate']:.3g}",
                f"block {record['block_name']}",
                f"{record['tokens_per_second']:.0f} tokens/s",
                *(["skipped" + _why(record)] if record["skipped"] else []),
            ]
            self.bar.write(", ".join(parts), file=sys.stdout)
            sys.stdout.flush()

    def close(self, summary: dict[str, Any] | None) -> None:
        """Args: summary: of the finished run; None: it was stopped and is to be continued."""
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.close(summary)


def warn(text: str) -> None:
    print(f"warning: {redacted(text)}", file=sys.stderr, flush=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # half a line: the process was killed while writing it


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _why(record: dict[str, Any]) -> str:
    if "not_finite" not in record:
        return ": the loss scale was too high"
    ranks = f" on rank {', '.join(map(str, record['ranks']))}" if record["ranks"] else ""
    return f": {record['not_finite']} not finite{ranks}, examples {shown(record['rows'])}"


# ---- the summary -----------------------------------------------------------------------------------------------


def summarize(
    folder: Path,
    settings: Settings,
    recorded: dict[str, Any],
    after: dict[str, Any] | None,
    block_names: list[str],
    cycles: int,
) -> dict[str, Any]:
    """The run in one mapping, from its metrics.jsonl and what was recorded at its start."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if record["loss"] is not None]
    window = max(1, min(10, len(losses) // 2))
    applied = [record["block"] for record in records if not record["skipped"]]
    seconds = sum(record["seconds"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    summary: dict[str, Any] = {
        "method": settings.method.name,
        "model": settings.model.describe(),
        "dataset": settings.data.name,
        "steps": records[-1]["step"],
        "steps_skipped": len(records) - len(applied),
        "cycles": cycles,
        "blocks": len(block_names),
        "block_names": block_names,
        "updates_per_block": [applied.count(block) for block in range(len(block_names))],
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "loss_window": window,
        "loss_first_mean": sum(losses[:window]) / window if losses else None,
        "loss_last_mean": sum(losses[-window:]) / window if losses else None,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seed": settings.training.seed,
        "ranks": dist.get_world_size(),
        "versions": versions(),
        "command": redacted(shlex.join([Path(sys.executable).name, *sys.argv])),
        "wandb_id": recorded["wandb_id"],
        "data": recorded["data"],
    }
    for when, evaluation in (("before", recorded["before"]), ("after", after)):
        if evaluation is not None and "loss" in evaluation:
            summary[f"held_out_loss_{when}"] = evaluation["loss"]
            summary["held_out_n"] = evaluation["n"]
        elif evaluation is not None:
            summary[f"score_{when}"] = evaluation["score"]
            summary[f"score_{when}_correct"] = evaluation["correct"]
            summary[f"score_{when}_unanswered"] = evaluation["unanswered"]
            summary[f"sample_{when}"] = evaluation["sample"]
            summary["score_n"] = evaluation["n"]
            summary["score_metric"] = evaluation["metric"]
    return summary


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The highest memory use so far in bytes, of the rank that used most, and what it is of. Every rank calls it."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        kind = "resident memory of a process, no device"
    else:
        peak, kind = get_accelerator().max_memory_allocated(), "allocated on a device"
    highest = torch.tensor([peak], dtype=torch.int64, device=device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return {"peak_memory": int(highest.item()), "peak_memory_kind": kind}


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers; the repository's commit has a "+" where files differ from it."""
    packages = ("torch", "deepspeed", "transformers", "datasets", "tokenizers")
    found: dict[str, str | None] = {package: importlib.metadata.version(package) for package in packages}
    return {"hift_ds": hift_ds.__version__, **found, "python": platform.python_version(), "git": _commit()}


def _commit() -> str | None:
    repository = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != repository:
            return None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ---- text ------------------------------------------------------------------------------------------------------


def data_report(data: Data) -> str:
    """What the data became, for the start of a run: counts of both parts, and what was left out or cut."""
    lines = []
    for part, name in (("train", "training data"), ("eval", "held-out data")):
        counts = data.report[part]
        lines.append(
            f"{name}: {counts['used']} examples, {counts['tokens']} tokens, {counts['trained_tokens']} of them "
            f"with a loss; {counts['truncated']} cut, {counts['skipped_no_target']} skipped"
        )
    return "\n".join([*lines, *data.report["notes"]])


def report(summary: dict[str, Any]) -> str:
    """The end of a run in plain text."""
    s = summary
    lines = [
        f"{s['method']} on {s['model']}, {s['dataset']}: {s['steps']} steps, {s['cycles']} whole "
        f"cycle{'s' * (s['cycles'] != 1)} of "
        f"{s['blocks']} block{'s' * (s['blocks'] != 1)}",
        f"loss               {_number(s['loss_first'])} at the first step, {_number(s['loss_last'])} at the last; "
        f"means of {s['loss_window']}: {_number(s['loss_first_mean'])}, {_number(s['loss_last_mean'])}",
    ]
    for when in ("before", "after"):
        if f"score_{when}" in s:
            lines.append(
                f"{s['score_metric'].replace('_', ' ') + ' ' + when:<18} {100 * s[f'score_{when}']:.1f} % "
                f"({s[f'score_{when}_correct']} of {s['score_n']} held-out examples)"
            )
        if f"held_out_loss_{when}" in s:
            loss, n = s[f"held_out_loss_{when}"], s["held_out_n"]
            lines.append(f"{'held-out ' + when:<18} loss {_number(loss)} ({n} examples)")
    lines += [
        f"time               {s['seconds']:.1f} s of training, {s['tokens_per_second']:.0f} tokens/s",
        f"peak memory        {s['peak_memory'] / 2**20:.0f} MiB ({s['peak_memory_kind']})",
        *_kept(s.get("memory")),
        f"updates            {_updates(s['block_names'], s['updates_per_block'])}",
    ]
    if s["steps_skipped"]:
        lines.append(f"skipped            {s['steps_skipped']} steps: loss or gradients not finite")
    if "sample_before" in s:
        lines.append(_indented("a held-out problem", s["sample_after"]["prompt"]))
        lines.append(_indented("expected answer", s["sample_after"]["expected"]))
    for when in ("before", "after"):
        if f"sample_{when}" in s:
            lines.append(_indented(f"answer {when} training", s[f"sample_{when}"]["answer"]))
    return "\n".join(lines)


def _kept(memory: dict[str, dict[str, int]] | None) -> list[str]:
    """The ledger at its highest: `MiB kept           device 516 (parameters 513, ...); host 1539 (...)`."""
    places = []
    for place, sizes in (memory or {}).items():
        parts = [f"{name.replace('_', ' ')} {size / 2**20:.0f}" for name, size in sizes.items() if size >= 2**19]
        if parts:
            places.append(f"{place} {sum(sizes.values()) / 2**20:.0f} ({', '.join(parts)})")
    return [f"MiB kept           {'; '.join(places)}"] if places else []


def _updates(names: list[str], counts: list[int]) -> str:
    """`12 x embeddings ... model.layers.3; 11 x head`: neighbors with equal counts together."""
    runs: list[tuple[int, str, str]] = []
    for name, count in zip(names, counts, strict=True):
        first = runs.pop()[1] if runs and runs[-1][0] == count else name
        runs.append((count, first, name))
    return "; ".join(f"{n} x {first}" + (f" ... {last}" if last != first else "") for n, first, last in runs)


def _indented(title: str, text: str) -> str:
    return "\n".join([f"{title}:", *(f"    {line}" for line in text.splitlines() or ["(empty)"])])
