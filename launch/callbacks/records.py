"""One record per step: metrics.jsonl, W&B, a progress bar and lines of text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hift_ds.checkpoint.files import write_durably
from hift_ds.launch.callbacks.callback import Callback, Step
from hift_ds.launch.callbacks.forecast import Forecast, as_time
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.errors import shown
from hift_ds.launch.runtime import outputs
from hift_ds.launch.runtime.logs import as_text, warn
from hift_ds.launch.runtime.tracking import start_wandb


class Records(Callback):
    """Write each step's record.

    Args:
        log: rank 0's log; None on other ranks.
        forecast: knows the time to the end.
    """

    def __init__(self, log: RunLog | None, forecast: Forecast) -> None:
        self.log, self.forecast = log, forecast

    def after_step(self, step: Step, total: float) -> bool:
        """Write the record."""
        if self.log is not None:
            self.log.step(step.record, self.forecast.left(step.number))
        return False


class RunLog:
    """One record per step in metrics.jsonl, W&B and the terminal. Only rank 0 has one.

    Args:
        folder: the run's output folder.
        first_step: number of steps already done. Records of later steps are removed, since those steps are repeated:
            the earlier process trained on after its last checkpoint.
        wandb_id: id of the W&B run to continue, if any.
    """

    def __init__(self, folder: Path, settings: Settings, first_step: int, wandb_id: str | None) -> None:
        self.settings = settings
        self.path = path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if first_step and path.exists() else []
        kept = [line for line in lines if _step_of(line) <= first_step]
        if len(kept) != first_step:
            warn(f"{path} has records of {len(kept)} of the {first_step} steps done; the summary counts only those")
        with outputs.writing(path):
            write_durably(path, "".join(f"{line}\n" for line in kept))
            self.file = path.open("ab", buffering=0)  # unbuffered: a killed process loses no record
        self.bar = _Bar(
            total=settings.training.max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}{postfix}]",
            disable=not sys.stderr.isatty(),
        )
        self.wandb = start_wandb(folder, settings, wandb_id, warn)

    @property
    def wandb_id(self) -> str | None:
        """Id of the W&B run, if there is one."""
        return self.wandb.id if self.wandb is not None else None

    def step(self, record: dict[str, Any], left: float | None) -> None:
        """Write the record of a step.

        Args:
            left: seconds to the end of the run; None: not known.
        """
        with outputs.writing(self.path):
            self.file.write(f"{json.dumps(record, allow_nan=False)}\n".encode())
        if self.wandb is not None:
            self.wandb.log(record)
        self.bar.left = left
        self.bar.set_postfix_str(f"block {record['block_name']}, loss {as_text(record['loss'])}")
        self.bar.update()
        step, steps = record["step"], self.settings.training.max_steps
        due = step == steps or step % self.settings.logging.every == 0
        if record["skipped"] or "held_out" in record or self.bar.disable and due:
            parts = [
                f"step {step}/{steps}: loss {as_text(record['loss'])}",
                f"learning rate {record['learning_rate']:.3g}",
                f"block {record['block_name']}",
                f"{record['tokens_per_second']:.0f} tokens/s",
                *([] if left is None or step == steps else [f"{as_time(left)} left"]),
                *_held_out(record),
                *(["skipped" + _why(record)] if record["skipped"] else []),
            ]
            self.say(", ".join(parts))

    def say(self, text: str) -> None:
        """Print a text above the bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self, summary: dict[str, Any] | None) -> None:
        """Close the file and W&B.

        Args:
            summary: summary of the finished run; None if the run was stopped and will be continued.
        """
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.close(summary)


class _Bar(tqdm):
    """A progress bar with the time to the end by the run's own estimate.

    That of tqdm follows the last steps, and blocks differ in time.
    """

    left: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the format of the bar may name."""
        left = "?" if self.left is None else self.format_interval(self.left)
        return {**super().format_dict, "left": left}


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # half a line: the process was killed while writing it


def _why(record: dict[str, Any]) -> str:
    if "not_finite" not in record:
        return ": the loss scale was too high"
    ranks = f" on rank {', '.join(map(str, record['ranks']))}" if record["ranks"] else ""
    return f": {record['not_finite']} not finite{ranks}, examples {shown(record['rows'])}"


def _held_out(record: dict[str, Any]) -> list[str]:
    found = record.get("held_out") or {}
    if "score" in found:
        empty = f" ({found['unanswered']} without an answer)" if found["unanswered"] else ""
        return [f"held-out {found['metric'].replace('_', ' ')} {100 * found['score']:.1f} %{empty}"]
    return [f"held-out loss {as_text(found['loss'])}"] if found else []
