"""Log a report as a run of Weights & Biases: its tables, with numbers as numbers, and its pictures."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hift_ds.evaluation.json_lines import Record
from hift_ds.evaluation.mt_bench.questions import PAIRWISE, SINGLE
from hift_ds.evaluation.mt_bench.verdicts import summarize
from hift_ds.evaluation.report import results
from hift_ds.evaluation.report.resampling import paired_difference
from hift_ds.evaluation.report.results import OK, Section, is_finite, mean_of, std_of
from hift_ds.launch.config import credentials

GIB = 2**30
COLUMNS = (
    *("method", "task", "metric", "seeds", "mean_percent", "std_percent", "difference_to_full_percent"),
    *("difference_low", "difference_high", "learning_rates", "steps", "samples", "seconds", "step_seconds"),
    *("tokens_per_second", "trained_parameters", "peak_memory_gib", "planned_memory_gib", "model_flops", "answer_loss"),
    *("status", "reason"),
)
RATINGS = ("judge", "model", "category", "mean", "turn_1", "turn_2", "n", "failed")
WINS = ("judge", "model", "against", "category", "wins", "ties", "losses", "flips", "reversed", "failed")


def log_report(
    records: Sequence[Record],
    folder: Path,
    title: str,
    *,
    mode: str,
    project: str,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    verdicts: Sequence[Record] = (),
) -> None:
    """Log the report that `write_report` wrote into `folder`. A failing service is only a warning.

    Args:
        title: the name of the group of runs.
        name: the name of the run; None = the title.
        mode: "online" or "offline".
    """
    try:
        import wandb

        with wandb.init(
            project=project,
            name=name or title,
            group=title,
            dir=str(folder),
            mode="online" if mode == "online" else "offline",
            config=dict(config or {}),
            settings=wandb.Settings(silent=True, init_timeout=20),
        ) as run:
            pictures = sorted((folder / "plots").glob("*.png"))
            logged = {f"report/{key}": table for key, table in tables(records, verdicts).items()}
            run.log(logged | {f"plots/{path.stem}": wandb.Image(str(path)) for path in pictures})
    except Exception as error:
        shown = credentials.redacted(" ".join(str(error).split()))
        print(f"warning: Weights & Biases failed: {shown}", file=sys.stderr)


def tables(records: Sequence[Record], verdicts: Sequence[Record] = ()) -> dict[str, Any]:
    """Make a `wandb.Table` for each model and budget, with a row for each method and task, and those of MT-Bench."""
    import wandb

    made = {}
    for section in results.arrange(results.checked(records)):
        places = [(label, task) for label in section.rows for task in section.tasks if section.at(label, task)]
        rows = [_row(section, label, task) for label, task in places]
        made[f"{section.model}, {section.budget}"] = wandb.Table(columns=list(COLUMNS), data=rows)
    summary = summarize(verdicts)
    single = [
        [one["judge"], one["model"], category, *(sums[key] for key in RATINGS[3:])]
        for one in summary[SINGLE]
        for category, sums in one["categories"].items()
    ]
    pairs = [
        [one["judge"], *one["models"], category, *(sums[key] for key in WINS[4:])]
        for one in summary[PAIRWISE]
        for category, sums in one["categories"].items()
    ]
    for key, columns, rows in (("MT-Bench", RATINGS, single), ("MT-Bench, pairs", WINS, pairs)):
        if rows:
            made[key] = wandb.Table(columns=list(columns), data=rows)
    return made


def _row(section: Section, label: str, task: str) -> list[Any]:
    good, every = section.ok(label, task), section.at(label, task)
    found = paired_difference(good, section.ok(section.full, task)) if section.full else None
    shares = [mean_of(good, "score"), std_of(good), *((found.mean, found.low, found.high) if found else (None,) * 3)]
    rates = sorted({record["learning_rate"] for record in good if is_finite(record["learning_rate"])})
    plans = [record["planned_memory"]["total"] for record in good if record["planned_memory"]]
    losses = [record["metrics"]["answer_loss"] for record in good if "answer_loss" in record["metrics"]]
    memory = [max((record["peak_memory"] for record in good if is_finite(record["peak_memory"])), default=None)]
    memory.append(max(plans, default=None))
    left = next((record for record in every if record["status"] != OK), every[-1])
    return [
        label,
        task,
        section.metric(task),
        len(good),
        *(None if value is None else 100 * value for value in shares),
        ", ".join(f"{rate:.3g}" for rate in rates),
        *(mean_of(good, name) for name in ("steps", "samples", "seconds", "step_seconds", "tokens_per_second")),
        mean_of(good, "trained_parameters"),
        *(None if value is None else value / GIB for value in memory),
        mean_of(good, "flops"),
        statistics.fmean(losses) if losses else None,
        OK if good else left["status"],
        left["reason"] or "",
    ]
