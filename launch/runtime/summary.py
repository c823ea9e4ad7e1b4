"""The summary of a run: summary.json, and the same in plain text."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

import hift_ds
from hift_ds.launch.config.credentials import redacted
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.data.loading import Data
from hift_ds.launch.runtime.logs import as_text


def summarize(
    folder: Path,
    settings: Settings,
    recorded: dict[str, Any],
    after: dict[str, Any] | None,
    block_names: list[str],
    cycles: int,
) -> dict[str, Any]:
    """Return the run in one mapping, from its metrics.jsonl and what was recorded when it began.

    Args:
        recorded: the content of run.json. With several cuts into blocks, `cuts` describes each, and the counts of
            blocks and updates are those of the last.
        after: the result of the evaluation after training.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if record["loss"] is not None]
    window = max(1, min(10, len(losses) // 2))
    applied = [record for record in records if not record["skipped"]]
    cuts = _cuts(records, [cut["steps_before"] for cut in recorded["cuts"]], block_names, cycles)
    seconds = sum(record["seconds"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    summary: dict[str, Any] = {
        "method": settings.method.name,
        "model": settings.model.describe(),
        "dataset": settings.data.name,
        "steps": records[-1]["step"],
        "steps_skipped": len(records) - len(applied),
        "cycles": cycles,
        "epochs": settings.training.epochs,
        **{key: cuts[-1][key] for key in ("blocks", "block_names", "updates_per_block")},
        **({"cuts": cuts} if len(cuts) > 1 else {}),
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


def _cuts(
    records: list[dict[str, Any]], starts: list[int], block_names: list[str], cycles: int
) -> list[dict[str, Any]]:
    """Return the whole cycles, the blocks and their updates in each cut of a run, by its records.

    Args:
        starts: the steps of the run before each cut.
        block_names: those of the last cut.
        cycles: those of the run.
    """
    found = []
    begun = [0, *(next((r["cycle"] for r in records if r["step"] > first), cycles) for first in starts[1:]), cycles]
    for first, end, before, after in zip(starts, [*starts[1:], None], begun[:-1], begun[1:], strict=True):
        own = [r for r in records if r["step"] > first and (end is None or r["step"] <= end)]
        names = {record["block"]: record["block_name"] for record in own} if end else dict(enumerate(block_names))
        updated = [record["block"] for record in own if not record["skipped"]]
        found.append(
            {
                "first_step": first + 1,
                "cycles": after - before,
                "blocks": len(names),
                "block_names": [names[block] for block in sorted(names)],
                "updates_per_block": [updated.count(block) for block in sorted(names)],
            }
        )
    return found


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Return the peak memory so far, in bytes, of the rank that used most, and its kind. Every rank calls it."""
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
    """Return the versions that decide the numbers.

    The commit ends in "+" if files of the repository differ from it. In an unpacked copy (evaluation/offline), nothing
    tells whether they do.
    """
    packages = ("torch", "deepspeed", "transformers", "datasets", "tokenizers")
    found: dict[str, str | None] = {package: importlib.metadata.version(package) for package in packages}
    return {"hift_ds": hift_ds.__version__, **found, "python": platform.python_version(), "git": _commit()}


def _commit() -> str | None:
    repository = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == repository:  # not installed inside somebody else's
            return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    packed = repository / "COMMIT"
    return f"{packed.read_text().strip()} (packed)" if packed.exists() else None


def data_report(data: Data) -> str:
    """Describe the data at the start of a run: the size of both parts, and what was left out or truncated."""
    lines = []
    for part, name in (("train", "training data"), ("eval", "held-out data")):
        counts = data.report[part]
        if counts["rows"] is None:
            lines.append(f"{name}: a stream; its rows are read as they are needed ({counts['sha256']})")
            continue
        lines.append(
            f"{name}: {counts['used']} examples, {counts['tokens']} tokens, {counts['trained_tokens']} of them "
            f"with a loss; {counts['truncated']} cut, {counts['skipped_no_target']} skipped"
        )
    return "\n".join([*lines, *data.report["notes"]])


def report(summary: dict[str, Any]) -> str:
    """Return the summary in plain text."""
    s = summary
    cut, *later = s.get("cuts", [s])
    lines = [
        f"{s['method']} on {s['model']}, {s['dataset']}: {s['steps']} steps, {cut['cycles']} whole "
        f"cycle{'s' * (cut['cycles'] != 1)} of {cut['blocks']} block{'s' * (cut['blocks'] != 1)}"
        + "".join(f", then {other['cycles']} of {other['blocks']}" for other in later),
        f"loss               {as_text(s['loss_first'])} at the first step, {as_text(s['loss_last'])} at the last; "
        f"means of {s['loss_window']}: {as_text(s['loss_first_mean'])}, {as_text(s['loss_last_mean'])}",
    ]
    for when in ("before", "after"):
        if f"score_{when}" in s:
            empty = s[f"score_{when}_unanswered"]
            lines.append(
                f"{s['score_metric'].replace('_', ' ') + ' ' + when:<18} {100 * s[f'score_{when}']:.1f} % "
                f"({s[f'score_{when}_correct']} of {s['score_n']} held-out examples"
                + (f"; {empty} without an answer)" if empty else ")")
            )
        if f"held_out_loss_{when}" in s:
            loss, n = s[f"held_out_loss_{when}"], s["held_out_n"]
            lines.append(f"{'held-out ' + when:<18} loss {as_text(loss)} ({n} examples)")
    lines += [
        f"time               {s['seconds']:.1f} s of training, {s['tokens_per_second']:.0f} tokens/s",
        f"peak memory        {_mib(s['peak_memory'])} MiB ({s['peak_memory_kind']})",
        *_kept(s.get("memory")),
        *_cut_lines(s),
    ]
    if s.get("best"):
        lines.append(f"best               step {s['best']['step']} of {s['steps']}; exported and evaluated last")
    if (counts := s["data"]["train"])["rows"] is None:
        first = "; ".join(f"the first {name.split('_')[0]}: {where}" for name, where in counts["first"].items())
        lines.append(
            f"rows read          {counts['read']}; {counts['truncated']} examples cut, {counts['skipped_no_target']} "
            f"rows skipped{first and f' ({first})'}"
        )
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
    """Describe the ledger at its peak: `MiB kept           device 516 (parameters 513, ...); host 1539 (...)`."""
    places = []
    for place, sizes in (memory or {}).items():
        parts = [f"{name.replace('_', ' ')} {_mib(size)}" for name, size in sizes.items() if size]
        if parts:
            places.append(f"{place} {_mib(sum(sizes.values()))} ({', '.join(parts)})")
    return [f"MiB kept           {'; '.join(places)}"] if places else []


def _cut_lines(s: dict[str, Any]) -> list[str]:
    """Return a line of updates for each cut."""
    if "cuts" not in s:
        return [f"updates            {_updates(s['block_names'], s['updates_per_block'])}"]
    return [
        f"{'updates from':<18} step {cut['first_step']} on: {_updates(cut['block_names'], cut['updates_per_block'])}"
        for cut in s["cuts"]
    ]


def _mib(nbytes: int) -> str:
    """Return a size in MiB, of a small one with three digits."""
    mib = nbytes / 2**20
    return f"{mib:.0f}" if mib >= 100 else f"{mib:.3g}"


def _updates(names: list[str], counts: list[int]) -> str:
    """Return `12 x embeddings ... model.layers.3; 11 x head`; neighbors with equal counts are joined."""
    runs: list[tuple[int, str, str]] = []
    for name, count in zip(names, counts, strict=True):
        first = runs.pop()[1] if runs and runs[-1][0] == count else name
        runs.append((count, first, name))
    return "; ".join(f"{n} x {first}" + (f" ... {last}" if last != first else "") for n, first, last in runs)


def _indented(title: str, text: str) -> str:
    return "\n".join([f"{title}:", *(f"    {line}" for line in text.splitlines() or ["(empty)"])])
