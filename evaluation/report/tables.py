"""The tables of one model and budget: scores, other metrics, differences to full fine-tuning, and costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hift_ds.evaluation.json_lines import Record
from hift_ds.evaluation.report import results
from hift_ds.evaluation.report.document import Bold, Heading, Items, Paragraph, Part, Table
from hift_ds.evaluation.report.resampling import paired_difference
from hift_ds.evaluation.report.results import FAILED, OK, Section, is_finite, mean_of, std_of, tried_rates

MEAN = "mean"
NOTHING = "-"  # a cell of a table that has no value
MIB, GIB = 2**20, 2**30
TRAINING, SMALL = "training", 0.01  # a part of a cell's seconds, and the share below which a part has no column


def joined(texts: Iterable[str]) -> str:
    """Join distinct texts with commas."""
    return ", ".join(dict.fromkeys(texts))


class Notes:
    """Footnotes, numbered in the order in which they are first used."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return the mark of a footnote, e.g. "[1]"."""
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def parts(self) -> list[Part]:
        """Return the list of footnotes to put below the table."""
        return [Items([f"Note {number}: {text}" for number, text in enumerate(self.texts, 1)])] if self.texts else []


# --- scores -------------------------------------------------------------------------------------------


def _columns(section: Section) -> dict[str, str]:
    """Return the column headings of the tasks."""
    heads = {}
    for task in section.tasks:
        some = [record for label in section.rows for record in section.ok(label, task)]
        sizes = sorted({record["n"] for record in some})
        n = f", n = {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "") if sizes else ""
        heads[task] = f"{task}, {section.metric(task)} %{n}" if some else task
    return heads


def _has_mean(section: Section) -> bool:
    return len(section.common_tasks()) > 1


def _about_mean(section: Section) -> list[Part]:
    common = section.common_tasks()
    if len(section.tasks) < 2 or not section.shown():
        return []
    if not _has_mean(section):
        return [Paragraph("There is no mean over tasks, because fewer than two tasks have a score for every row.")]
    by_loss = section.judged_by_loss()
    left = [task for task in section.tasks if task not in common and task not in by_loss]
    without = f" It leaves out {joined(left)}, because some rows have no score there." if left else ""
    without += f" It leaves out {joined(by_loss)}, judged by the loss on the right answers." if by_loss else ""
    return [Paragraph(f"The mean is over {joined(common)}; its ± is the standard deviation of a seed's mean.{without}")]


def scores(section: Section, notes: Notes) -> list[Part]:
    """Make the table of scores; the best of a column is bold if it is clearly better than the second best."""
    if not section.shown():
        rows = [[label, *(_score(section, label, task, notes) for task in section.tasks)] for label in section.rows]
        return [Paragraph("No cell has a score."), Table(["method", *section.tasks], rows)]
    winners = {task: results.best({label: section.ok(label, task) for label in section.rows}) for task in section.tasks}
    means = {label: section.means(label) for label in section.rows}
    best_mean = results.best(means)
    rows_with_mean: list[list[str | Bold]] = []
    for label in section.rows:
        row: list[str | Bold] = []
        for task in section.tasks:
            text = _score(section, label, task, notes)
            row.append(Bold(text) if winners[task] == label else text)
        if _has_mean(section):
            text = _plus_minus(means[label]) + _seeds(section, means[label]) if means[label] else NOTHING
            row.append(Bold(text) if best_mean == label else text)
        rows_with_mean.append([label, *row])
    head = ["method", *_columns(section).values(), *([f"{MEAN} %"] if _has_mean(section) else [])]
    what = "Mean ± standard deviation" if len(section.seeds) > 1 else "Score with its interval over test examples"
    seeds = f"{len(section.seeds)} seeds" if len(section.seeds) > 1 else f"seed {section.seeds[0]}"
    return [Paragraph(f"{what}, in %; {seeds}."), Table(head, rows_with_mean), *_about_mean(section)]


def other_metrics(section: Section) -> list[Part]:
    """Make the table of all metrics except the score, e.g. the loss on written answers."""
    columns: dict[tuple[str, str], None] = {}
    for task in section.tasks:
        for record in (record for label in section.shown() for record in section.ok(label, task)):
            names = (name for name, value in record["metrics"].items() if is_finite(value))
            columns |= dict.fromkeys((task, name) for name in names if name != record["metric"])
    if not columns:
        return []
    rows = []
    for label in section.shown():
        values = [[record["metrics"].get(name) for record in section.ok(label, task)] for task, name in columns]
        rows.append([label, *map(_plain, values)])
    caption = (
        "Mean ± standard deviation, from 0 to 1 and not in %. answer_loss is the cross entropy of the right answers in "
        "nats: of their tokens, or among the candidates or classes. Lower is better."
    )
    head = ["method", *(f"{task}, {name}" for task, name in columns)]
    return [Heading("Other metrics", 3), Paragraph(caption), Table(head, rows)]


def unanswered(section: Section) -> list[Part]:
    """Make the table of the numbers of empty answers; an empty list if there are none."""
    counts: dict[str, dict[str, str]] = {}  # task -> label -> a count for each seed
    for task in section.tasks:
        found = {
            label: [one for one in section.ok(label, task) if one.get("unanswered") is not None]
            for label in section.shown()
        }
        if any(one["unanswered"] for some in found.values() for one in some):
            counts[task] = {
                label: ", ".join(f"{one['unanswered']} of {one['n']}" for one in some) for label, some in found.items()
            }
    if not counts:
        return []
    rows = [[label, *(counts[task][label] or NOTHING for task in counts)] for label in section.shown()]
    caption = (
        "Test answers without any text, and solutions without a final number, for each seed. They count as wrong, so a "
        "low score may be due to the form of the answers."
    )
    return [Heading("Empty answers", 3), Paragraph(caption), Table(["method", *counts], rows)]


def _plain(values: Sequence[Any]) -> str:
    known = [value for value in values if is_finite(value)]
    if not known:
        return NOTHING
    return f"{statistics.fmean(known):.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def _score(section: Section, label: str, task: str, notes: Notes) -> str:
    """Return a cell's text: its mean, or why there is none."""
    every, good = section.at(label, task), section.ok(label, task)
    if not every:
        return NOTHING
    marks = []
    for record in every:
        if record["status"] != OK:
            what = "failed" if record["status"] == FAILED else "not applicable"
            marks.append(notes.mark(f"{label}: {what}: {record['reason'] or 'no reason given'}"))
    mark = " " + " ".join(dict.fromkeys(marks)) if marks else ""
    if not good:
        return ("failed" if any(record["status"] == FAILED for record in every) else "n/a") + mark
    if len(section.seeds) == 1:
        return _plus_minus(good) + _between(good[0]["interval"])
    return _plus_minus(good) + _seeds(section, good) + mark


def _seeds(section: Section, some: Sequence[Record]) -> str:
    """Return the number of seeds if some are missing."""
    return f" ({len(some)} of {len(section.wanted)} seeds)" if len(some) < len(section.wanted) else ""


def _plus_minus(some: Sequence[Record]) -> str:
    std = std_of(some)
    mean = statistics.fmean(record["score"] for record in some)
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def _between(interval: Any) -> str:
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(is_finite, interval)):
        return ""
    return f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def differences(section: Section, notes: Notes) -> list[Part]:
    """Make the table of paired differences to full fine-tuning."""
    full = section.full
    if full is None or full not in section.shown():
        why = "it has no score" if full else "it was not run"
        return [Paragraph(f"There is no comparison with full fine-tuning: {why}.")]
    rows = []
    for label in section.shown():
        if label == full:
            continue
        row = [_difference(section.ok(label, task), section.ok(full, task), label, notes) for task in section.tasks]
        if _has_mean(section):
            row.append(_difference(section.means(label), section.means(full), label, notes))
        rows.append([label, *row])
    if not rows:
        return [Paragraph("Only full fine-tuning has a score.")]
    head = ["method", *section.tasks, *([MEAN] if _has_mean(section) else [])]
    caption = (
        f"A method's score minus the score of {full}, in percentage points, with a 95 % interval over test examples."
    )
    return [Paragraph(caption), Table(head, rows)]


def _difference(ours: Sequence[Record], theirs: Sequence[Record], label: str, notes: Notes) -> str:
    found = paired_difference(ours, theirs)
    if found is None:
        return NOTHING
    text = f"{100 * found.mean:+.1f}"
    if found.low is None or found.high is None:
        return f"{text} {notes.mark(f'{label}: no interval, because {found.why}')}"
    return f"{text} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


# --- costs ----------------------------------------------------------------------------------------------

_COSTS = (
    *("method", "learning rate", "steps", "samples", "training time", "step time", "step time / full's", "tokens/s"),
    *("trained parameters", "peak memory, measured", "memory, planned", "FLOPs"),
)


def costs(section: Section) -> list[Part]:
    """Make a table for each task of what training has cost: time, memory, FLOPs."""
    caption = "Means over seeds; for the learning rate, every chosen value. FLOPs count the model's matrix products in "
    caption += (
        "training, as a proxy for energy. Memory is the peak of the seed with the highest peak: in training, or in "
    )
    caption += "evaluation for methods without training."
    parts: list[Part] = [Paragraph(caption)]
    kinds = joined(
        f"{record['peak_memory_kind']}"
        for label in section.rows
        for task in section.tasks
        for record in section.ok(label, task)
        if record["peak_memory_kind"]
    )
    if kinds:
        parts.append(Paragraph(f"Measured memory: {kinds}. Planned memory: the planner's prediction for the device."))
    at_end = False
    for task in section.tasks:
        some = {label: section.ok(label, task) for label in section.rows if section.ok(label, task)}
        if not some:
            continue
        theirs = {record["seed"]: record for record in some.get(section.full or "", ())}
        rows = [[label, *_cost(found, theirs)] for label, found in some.items()]
        at_end = at_end or any(row[1].endswith("*") for row in rows)
        parts += [Heading(task, 4), Table(_COSTS, rows)]
    if at_end:
        caption = (
            "* The lowest or highest learning rate of the grid was chosen, so a better one may lie outside the grid."
        )
        parts.append(Paragraph(caption))
    return parts


def _cost(found: Sequence[Record], full: Mapping[int, Record]) -> list[str]:
    """Return the columns after the first for one method and task.

    Args:
        full: the records of full fine-tuning by seed.
    """
    rates = sorted({record["learning_rate"] for record in found if is_finite(record["learning_rate"])})
    common = [record for record in found if record["seed"] in full]
    ours, theirs = mean_of(common, "step_seconds"), mean_of([full[one["seed"]] for one in common], "step_seconds")
    peaks = [record["peak_memory"] for record in found if is_finite(record["peak_memory"])]
    plans = [record["planned_memory"]["total"] for record in found if record["planned_memory"]]
    return [
        (", ".join(map(format_rate, rates)) or NOTHING) + ("*" if any(map(_is_at_end, found)) else ""),
        _count(mean_of(found, "steps")),
        _count(mean_of(found, "samples")),
        format_seconds(mean_of(found, "seconds")),
        format_seconds(mean_of(found, "step_seconds")),
        f"{ours / theirs:.2f}" if ours is not None and theirs else NOTHING,
        _count(mean_of(found, "tokens_per_second")),
        _count(mean_of(found, "trained_parameters")),
        format_bytes(max(peaks)) if peaks else NOTHING,
        format_bytes(max(plans)) if plans else NOTHING,
        _flops(mean_of(found, "flops")),
    ]


def spent(section: Section) -> list[Part]:
    """Make the table of the seconds of a cell by part; an empty list for records of earlier versions."""
    cells = {
        label: [one for task in section.tasks for one in section.ok(label, task) if one.get("spent")]
        for label in section.rows
    }
    cells = {label: some for label, some in cells.items() if some}
    if not cells:
        return []
    means = {
        label: {name: sum(one["spent"].get(name, 0) for one in some) / len(some) for name in _parts(some)}
        for label, some in cells.items()
    }
    whole = {label: sum(of.values()) for label, of in means.items()}
    named = [TRAINING, *(name for name in _parts([one for some in cells.values() for one in some]) if name != TRAINING)]
    named = [name for name in named if any(of.get(name, 0) > SMALL * whole[label] for label, of in means.items())]
    rows = []
    for label, of in means.items():
        shown = [of.get(name, 0) for name in named]
        rest = max(0.0, whole[label] - sum(shown))  # not -0.0 by rounding
        rows.append([label, *(f"{seconds:,.1f}" for seconds in (whole[label], *shown, rest))])
    caption = (
        "Means over tasks and seeds, in seconds of the clock while the comparison ran. The first cell of a process has "
        f"also its start. Parts of less than {100 * SMALL:.0f} % are together."
    )
    heading = Heading("Seconds of a cell", 3)
    return [heading, Paragraph(caption), Table(["method", "cell", *named, "the rest"], rows)]


def _parts(some: Sequence[Record]) -> list[str]:
    """Return the parts' names, the largest first."""
    names = {name for one in some for name in one["spent"]}
    return sorted(names, key=lambda name: (-sum(one["spent"].get(name, 0) for one in some), name))


def rates(section: Section) -> list[Part]:
    """Make the table of the learning rates that were tried, if there were several."""
    rows = []
    for label in section.rows:
        for task in section.tasks:
            record = next((one for one in section.ok(label, task) if len(tried_rates(one)) > 1), None)
            if record is not None:
                tried = "; ".join(
                    f"{format_rate(one['learning_rate'])}: {_trial(one, record)}" for one in record["tuning"]
                )
                rows.append([label, task, format_rate(record["learning_rate"]), tried])
    if not rows:
        return []
    caption = "On the validation set, with the first seed: the score in %, and the loss on the right answers if known."
    return [Heading("Learning rates", 3), Paragraph(caption), Table(["method", "task", "chosen", "tried"], rows)]


def _trial(trial: Mapping[str, Any], record: Record) -> str:
    score, loss = trial["score"], trial.get("loss")
    if is_finite(score) and score < 0 and "answer_loss" in record["metrics"] and loss in (None, -score):
        return f"loss {-score:.3f}"  # written answers are chosen by their loss
    known = [f"{100 * score:.1f}"] if is_finite(score) else []
    known += [f"loss {loss:.3f}"] if is_finite(loss) else []
    return ", ".join(known) or NOTHING


def _is_at_end(record: Record) -> bool:
    rates = tried_rates(record)
    return len(rates) > 1 and record["learning_rate"] in (min(rates), max(rates))


def format_rate(value: float) -> str:
    """Format a learning rate."""
    return f"{value:.3g}"


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def format_seconds(value: float | None) -> str:
    """Format a time in seconds or milliseconds; None becomes `NOTHING`."""
    if value is None:
        return NOTHING
    return (
        f"{value:,.1f} s" if value >= 10 else f"{value:.3g} s" if value >= 1 or not value else f"{1000 * value:.3g} ms"
    )


def format_bytes(value: float) -> str:
    """Format bytes in MiB or GiB."""
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB"


def _flops(value: float | None) -> str:
    if not value:
        return NOTHING if value is None else "0"
    unit, size = next((u, s) for u, s in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)) if value >= s or s == 1e9)
    return f"{value / size:,.1f} {unit}"
