"""The overview of one model and budget: each method against full fine-tuning, over all tasks.

A method is compared with full fine-tuning on their common cells: the tasks and seeds on which both have a score. Scores
and losses are never averaged together: some tasks are judged by their loss (`Section.judged_by_loss`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hift_ds.evaluation.json_lines import Record
from hift_ds.evaluation.report.document import Items, Paragraph, Part, Picture, Table
from hift_ds.evaluation.report.resampling import EXAMPLES, SEEDS, MeanDifference, mean_difference, paired_difference
from hift_ds.evaluation.report.results import FAILED, FLOOR, LOSS, NOT_APPLICABLE, Section, is_finite, mean_of
from hift_ds.evaluation.report.tables import NOTHING, Notes, format_bytes, format_seconds, joined

SAME = 1.2  # times that differ by less than this factor count as the same
Pair = tuple[Record, Record]  # a method's record and that of full fine-tuning, with the same task and seed


@dataclass(frozen=True)
class Compared:
    """A method against full fine-tuning.

    Attributes:
        points: the difference of scores (from 0 to 1), over the tasks that are judged by their score.
        loss: the difference of losses in nats, over the tasks that are judged by their loss.
        time, step_time, memory: of training, relative to full fine-tuning: the geometric mean over tasks. Times are 0
            for methods without training.
        seeds: task -> number of common seeds, for tasks with at least one.
        complete: whether all wanted cells are compared.
    """

    label: str
    points: MeanDifference | None
    loss: MeanDifference | None
    time: float | None
    step_time: float | None
    memory: float | None
    seeds: dict[str, int]
    complete: bool


def compare_with_full(section: Section) -> list[Compared]:
    """Compare each row with full fine-tuning, which is the first one; an empty list if it has no score."""
    full = section.full
    if full is None or full not in section.shown():
        return []
    by_loss = section.judged_by_loss()
    found = []
    for label in sorted(section.rows, key=lambda label: label != full):
        pairs = {task: _pairs(section, label, full, task) for task in section.tasks}
        pairs = {task: some for task, some in pairs.items() if some}
        scored = [some for task, some in pairs.items() if task not in by_loss]
        lost = [[(_as_loss(a), _as_loss(b)) for a, b in some] for task, some in pairs.items() if task in by_loss]
        found.append(
            Compared(
                label,
                mean_difference(scored) if scored else None,
                mean_difference(lost) if lost else None,
                time := _ratio(pairs.values(), "seconds"),
                _ratio(pairs.values(), "step_seconds") if time else time,
                _ratio(pairs.values(), "peak_memory"),
                {task: len(some) for task, some in pairs.items()},
                sum(map(len, pairs.values())) == len(section.tasks) * len(section.wanted),
            )
        )
    return found


def time_name(rows: Sequence[Compared]) -> str:
    """Return the name of the time that tells the methods apart."""
    return "step time / full's" if same_time(rows) else "training time / full's"


def same_time(rows: Sequence[Compared]) -> bool:
    """Whether all methods trained for about the same time, as with a budget in seconds; then steps tell them apart."""
    times = [row.time for row in rows[1:] if row.time]
    return bool(times) and all(1 / SAME <= time <= SAME for time in times)


def _pairs(section: Section, label: str, full: str, task: str) -> list[Pair]:
    theirs = {record["seed"]: record for record in section.ok(full, task)}
    return [(record, theirs[record["seed"]]) for record in section.ok(label, task) if record["seed"] in theirs]


def _as_loss(record: Record) -> Record:
    """Return a record whose score is its loss. Records of earlier versions have no replicates of losses."""
    return record | {"score": record["metrics"][LOSS], "bootstrap": record.get("loss_bootstrap") or []}


def _ratio(tasks: Iterable[Sequence[Pair]], name: str) -> float | None:
    """Return the geometric mean over tasks of the ratio of a field's means; 0 if it is 0, None if it is unknown."""
    ratios = []
    for pairs in tasks:
        values = [(a[name], b[name]) for a, b in pairs if is_finite(a[name]) and is_finite(b[name]) and b[name] > 0]
        if values:
            ratios.append(sum(a for a, _ in values) / sum(b for _, b in values))
    if not ratios:
        return None
    return statistics.geometric_mean(ratios) if all(ratios) else 0.0


# --- the table ------------------------------------------------------------------------------------------


def parts(section: Section, pictures: Sequence[Picture] = ()) -> list[Part]:
    """Make the table of a model and budget, with its pictures, what they show and what is missing."""
    rows, full = compare_with_full(section), section.full
    if not rows:
        why = "no cell has a score" if not section.shown() else "it has no score" if full else "it was not run"
        return [Paragraph(f"There is no comparison with full fine-tuning: {why}."), *_missing(section)]
    by_loss = section.judged_by_loss()
    scored = [task for task in section.tasks if task not in by_loss and section.metric(task)]
    equal, notes = same_time(rows), Notes()
    lines = [_own_values(section, rows, scored, by_loss)]
    for row in rows[1:]:
        points = [_difference(row.points, 100, 1, notes)] if scored else []
        loss = [_difference(row.loss, 1, 3, notes)] if by_loss else []
        costs = [_relative(row.step_time if equal else row.time, "no training"), _relative(row.memory, "0")]
        lines.append([row.label, *points, *loss, _steps(section, row.label), *costs, *_counts(section, row)])
    head = [
        "method",
        *(["score - full's, points"] if scored else []),
        *(["loss - full's, nats"] if by_loss else []),
        *("steps", time_name(rows), "peak memory / full's", "tasks", "seeds"),
    ]
    table = Table(head, lines)
    return [table, *notes.parts(), *pictures, Items(_explained(section, scored, by_loss, equal)), *_missing(section)]


def _explained(section: Section, scored: Sequence[str], by_loss: Sequence[str], equal: bool) -> list[str]:
    """Return what the columns show, a text for each."""
    texts = []
    if scored:
        texts.append(f"Scores: the difference to {section.full} in percentage points, the mean over {joined(scored)}.")
    if by_loss:
        texts.append(
            f"Loss on the right answers, lower is better: the difference to {section.full}, the mean over "
            f"{joined(by_loss)}. No row solves {100 * FLOOR:.0f} % there, so the score says nothing."
        )
    texts.append(f"In brackets: 95 % intervals over seeds and test examples, and for {section.full} its own values.")
    texts.append(f"Steps: of the optimizer on {joined(section.tasks)}, the mean over seeds.")
    if untold := _no_better_than_untrained(section, scored):
        texts.append(
            f"On {joined(untold)}, full fine-tuning is not clearly above zero-shot, so differences there tell little."
        )
    if equal:
        texts.append("Time: that of a step, because all methods trained for the same time.")
    kinds = joined(
        record["peak_memory_kind"]
        for label in section.rows
        for task in section.tasks
        for record in section.ok(label, task)
        if record["peak_memory_kind"]
    )
    return [*texts, *([f"Memory: {kinds}."] if kinds else [])]


def _no_better_than_untrained(section: Section, tasks: Sequence[str]) -> list[str]:
    """Return the tasks on which full fine-tuning is not clearly better than the model without training."""
    zero = next((label for label, method in section.rows.items() if method == "zero-shot"), "")
    gaps = {task: paired_difference(section.ok(section.full or "", task), section.ok(zero, task)) for task in tasks}
    return [task for task, gap in gaps.items() if gap and not (gap.is_clear and gap.mean > 0)]


def _own_values(section: Section, rows: Sequence[Compared], scored: Sequence[str], by_loss: Sequence[str]) -> list[str]:
    """Return the line of full fine-tuning: its score, loss, seconds and bytes, each the mean over the tasks."""
    found = {task: some for task in section.tasks if (some := section.ok(rows[0].label, task))}

    def mean(tasks: Iterable[str], value: Callable[[Record], float | None]) -> float | None:
        of_tasks = [
            [v for v in map(value, found[task]) if v is not None and is_finite(v)] for task in tasks if task in found
        ]
        return statistics.fmean(statistics.fmean(some) for some in of_tasks) if of_tasks and all(of_tasks) else None

    score, loss = mean(scored, lambda one: one["score"]), mean(by_loss, lambda one: one["metrics"][LOSS])
    time = "step_seconds" if same_time(rows) else "seconds"
    seconds, memory = mean(found, lambda one: one[time]), mean(found, lambda one: one["peak_memory"])
    return [
        rows[0].label,
        *([NOTHING if score is None else f"0 ({100 * score:.1f} %)"] if scored else []),
        *([NOTHING if loss is None else f"0 ({loss:.3f})"] if by_loss else []),
        _steps(section, rows[0].label),
        NOTHING if seconds is None else f"1 ({format_seconds(seconds)})",
        NOTHING if memory is None else f"1 ({format_bytes(memory)})",
        *_counts(section, rows[0]),
    ]


def _difference(found: MeanDifference | None, scale: float, digits: int, notes: Notes) -> str:
    if found is None:
        return NOTHING
    mean, *ends = (  # without "-0.0"
        f"{round(scale * value, digits) + 0.0:+.{digits}f}"
        for value in (found.mean, found.low, found.high)
        if value is not None
    )
    text = mean + (f" ({' to '.join(ends)})" if ends else "")
    if SEEDS not in found.shows:
        what = "the interval shows test examples only" if found.shows else "and no replicates: there is no interval"
        return f"{text} {notes.mark(f'One seed on some task, {what}. How much seeds differ is unknown.')}"
    if EXAMPLES not in found.shows:
        mark = notes.mark("The interval shows seeds only, because there are no replicates over test examples to pair.")
        return f"{text} {mark}"
    return text


def _steps(section: Section, label: str) -> str:
    """Return the steps on each task, the mean over seeds."""
    means = [mean_of(section.ok(label, task), "steps") for task in section.tasks]
    return ", ".join(NOTHING if mean is None else f"{mean:.0f}" for mean in means)


def _relative(ratio: float | None, zero: str) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}" if ratio else zero


def _counts(section: Section, row: Compared) -> list[str]:
    """Return the numbers of tasks and seeds that are compared."""
    least, most = min(row.seeds.values(), default=0), max(row.seeds.values(), default=0)
    seeds = f"{least}" if least == most else f"{least} to {most}"
    return [f"{len(row.seeds)} of {len(section.tasks)}", f"{seeds} of {len(section.wanted)}"]


# --- what is missing ------------------------------------------------------------------------------------


def _missing(section: Section) -> list[Part]:
    """Say which cells have a score, and for each row that lacks some, which ones and why."""
    total = len(section.rows) * len(section.tasks) * len(section.wanted)
    lacking = {label: _lacks(section, label) for label in section.rows}
    good = sum(len(section.ok(label, task)) for label in section.rows for task in section.tasks)
    sizes = {"method": len(section.rows), "task": len(section.tasks), "seed": len(section.wanted)}
    counted = ", ".join(f"{size} {what}{'s' * (size != 1)}" for what, size in sizes.items())
    if good == total:
        return [Paragraph(f"All {total} cells have a score: {counted}.")]
    begun = sum(len(section.at(label, task)) for label in section.rows for task in section.tasks)
    stopped = ""
    if section.planned and begun < total:
        stopped = f"The comparison was stopped before the end: {total - begun} of its {total} cells were not run. "
    complete = "; ".join(label for label, texts in lacking.items() if not texts) or "no row"
    parts: list[Part] = [
        Paragraph(
            f"{stopped}{good} of {total} cells have a score ({counted}). Complete: {complete}. A row is compared with "
            "full fine-tuning on the cells that both have, so incomplete rows are about fewer tasks or seeds."
        )
    ]
    return [*parts, Items([f"{label}: {'; '.join(texts)}." for label, texts in lacking.items() if texts])]


def _lacks(section: Section, label: str) -> list[str]:
    """Return what a row lacks, in words; tasks that lack the same are named together."""
    tasks: dict[str, list[str]] = {}
    for task in section.tasks:
        good, every = section.ok(label, task), section.at(label, task)
        if len(good) == len(section.wanted):
            continue
        counts = {
            name: sum(record["status"] == status for record in every)
            for status, name in ((FAILED, "failed"), (NOT_APPLICABLE, "not applicable"))
        }
        counts["not run"] = len(section.wanted) - len(every)
        why = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        tasks.setdefault(f"{len(good)} of {len(section.wanted)} seeds ({why})", []).append(task)
    return [f"{text} on {joined(some)}" for text, some in tasks.items()]
