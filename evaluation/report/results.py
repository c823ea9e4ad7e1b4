"""Read and check the results of a comparison, and arrange them by model and budget, method and task.

A record is one cell: a method (by its label) on one task with one seed, with the status "ok", "not_applicable" or
"failed".
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hift_ds.checkpoint.files import write_durably
from hift_ds.evaluation import json_lines
from hift_ds.evaluation.json_lines import Place, Record
from hift_ds.evaluation.report.resampling import Difference, paired_difference
from hift_ds.launch.errors import UserError, shown

RESULTS, SETTINGS = "results.jsonl", "compare.json"  # files in a comparison's folder
OK, NOT_APPLICABLE, FAILED = "ok", "not_applicable", "failed"
METHODS = (
    *("full", "hift", "lora", "prefix", "bitfit", "adapter", "prelayer", "s4", "mezo", "mezo-adam", "mezo-lora"),
    *("mezo-prefix", "lomo", "full-top2", "badam", "galore", "linear-probing", "zero-shot", "icl"),
)  # the order of rows in tables
LOSS, FLOOR = "answer_loss", 0.05  # a metric; a score below which it says more than the score
MEMORY_PARTS = ("parameters", "gradients", "master_weights", "optimizer_state", "activations", "buffers")

# --- checking -------------------------------------------------------------------------------------------

_NUMBER, _NONE = (int, float), type(None)
_NUMBERS = (  # fields of cells with status ok; null if a method has none
    *("steps", "samples", "tokens", "seconds", "step_seconds", "tokens_per_second", "trained_parameters"),
    *("total_parameters", "peak_memory", "flops", "loss_first", "loss_last", "learning_rate"),
)
_PRESENT = ("interval", "versions", "git", "data_sha256", "ranks", "date", "machine")


def read_results(*paths: Path) -> list[Record]:
    """Read and check the records of one or more results.jsonl.

    Raises:
        UserError: no such file, a line is broken or lacks a field, or a cell occurs twice; names file, line and field.
    """
    lines = [line for path in paths for line in json_lines.read_json_lines(path)]
    for where, record in lines:
        _check(where, record)
    return _distinct(lines)


def add_cells(out: Path, folders: Sequence[Path]) -> None:
    """Append the results of other folders to those of `out`, all or none; create `out` if it does not exist.

    Raises:
        UserError: as in `read_results`; or a comparison runs in `out` and would overwrite the file.
    """
    own = out / RESULTS
    if (out / SETTINGS).exists():
        raise UserError(f"{out}: a comparison runs in this folder and overwrites {RESULTS}; give another folder")
    paths = [own] * own.exists() + [folder / RESULTS for folder in folders]
    lines = read_results(*paths)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_durably(own, "".join(json.dumps(record) + "\n" for record in lines))
    except OSError as error:
        raise UserError(f"{own}: cannot be written: {error.strerror}") from None


def checked(found: Sequence[Record]) -> list[Record]:
    """Check records that do not come from a file; errors name them by number."""
    lines = [(f"record {number}", record) for number, record in enumerate(found, 1)]
    for where, record in lines:
        _check(where, record)
    return _distinct(lines)


def _check(where: Place, record: Record) -> None:
    need = json_lines.field
    for name in ("label", "method", "model", "task", "budget"):
        if not need(where, record, name, str, "a text").strip():
            raise UserError(f"{where}: {name!r}: empty; expected a name")
    need(where, record, "seed", int, "an integer")
    status = need(where, record, "status", str, "ok, not_applicable or failed")
    if status not in (OK, NOT_APPLICABLE, FAILED):
        raise UserError(f"{where}: 'status': expected ok, not_applicable or failed, got {status!r}")
    need(where, record, "reason", (str, _NONE), "a text or null")
    if status != OK:
        return
    need(where, record, "metric", str, "a metric's name")
    need(where, record, "score", (*_NUMBER, _NONE), "a number")
    need(where, record, "n", int, "the number of test examples")
    for name in _NUMBERS:
        need(where, record, name, (*_NUMBER, _NONE), "a number or null")
    need(where, record, "peak_memory_kind", (str, _NONE), "a text or null")
    need(where, record, "metrics", dict, "an object of metrics and their values")
    for name in _PRESENT:
        if name not in record:
            raise UserError(f"{where}: {name!r}: missing; run the cell again")
    if "unanswered" in record:  # results of earlier versions have no such field
        need(where, record, "unanswered", (int, _NONE), "a number of answers or null")
    each: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "bootstrap": ("a number", _is_number_or_null),
        "curve": ("[step, seconds, tokens, loss]", _is_point),
        "tuning": ("an object with learning_rate and score", _is_trial),
    }
    for name, (expected, is_right) in each.items():
        for value in need(where, record, name, (list, _NONE), "a list") or ():
            if not is_right(value):
                raise UserError(f"{where}: {name!r}: expected each to be {expected}, got {shown(value)}")
    for value in need(where, record, "loss_bootstrap", list, "a list") if "loss_bootstrap" in record else ():
        if not _is_number_or_null(value):
            raise UserError(f"{where}: 'loss_bootstrap': expected each to be a number, got {shown(value)}")
    if "spent" in record:
        for name, seconds in need(where, record, "spent", dict, "an object of parts and their seconds").items():
            if not is_finite(seconds if _is_number_or_null(seconds) else None):
                raise UserError(f"{where}: 'spent': {name!r}: expected seconds, got {shown(seconds)}")
    planned = need(where, record, "planned_memory", (dict, _NONE), "an object or null")
    for part in (*MEMORY_PARTS, "total") if planned else ():
        need(f"{where}: 'planned_memory'", planned, part, _NUMBER, "bytes")


def _is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, _NUMBER) and not isinstance(value, bool))


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number_or_null, value))


def _is_trial(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_number_or_null(value.get("loss")):  # earlier versions have no loss
        return False
    return all(name in value and _is_number_or_null(value[name]) for name in ("learning_rate", "score"))


def _distinct(lines: Iterable[tuple[Place, Record]]) -> list[Record]:
    """Keep one record per cell: the last one if the earlier ones failed; equal lines count once.

    A cell whose score is not a finite number counts as failed.
    """
    cells: dict[tuple[Any, ...], tuple[Place, Record]] = {}
    for where, record in lines:
        key = tuple(record[name] for name in ("model", "budget", "label", "task", "seed"))
        earlier = cells.get(key)
        if earlier and earlier[1]["status"] == OK:
            if record == earlier[1]:
                continue  # added twice
            raise UserError(f"{where}: the same cell as {earlier[0]}, which has a result; remove one of the two lines")
        cells[key] = (where, record)
    metrics: dict[tuple[Any, ...], tuple[Place, str]] = {}
    found = []
    for where, record in cells.values():
        if record["status"] == OK:
            column = tuple(record[name] for name in ("model", "budget", "task"))
            first, metric = metrics.setdefault(column, (where, record["metric"]))
            if metric != record["metric"]:
                raise UserError(f"{where}: 'metric': {record['metric']!r}, but {first} has {metric!r} for this task")
            if not is_finite(record["score"]):
                record = record | {"status": FAILED, "reason": "its score is not a finite number"}
        found.append(record)
    return found


def with_joined_budgets(found: Sequence[Record]) -> list[Record]:
    """Give all cells of a model with budgets in samples one budget, and those with budgets in seconds another one.

    The joined budget names that of each task. A model with a single budget of a kind keeps it. Cells without training
    do not depend on a budget, so they stand beside both kinds, where the same data were used.

    Raises:
        UserError: a task has two budgets of the same kind, so they cannot be joined.
    """
    found = [*found, *_untrained_elsewhere(found)]
    kinds: dict[tuple[str, str], dict[str, str]] = {}  # (model, kind) -> task -> budget
    for record in found:
        budgets = kinds.setdefault((record["model"], _kind(record)), {})
        if budgets.setdefault(record["task"], record["budget"]) != record["budget"]:
            both = f"{budgets[record['task']]!r} and {record['budget']!r}"
            raise UserError(f"{record['task']}: has the budgets {both}, which cannot be joined; make a report of each")
    names = {}
    for key, budgets in kinds.items():
        tasks: dict[str, list[str]] = {}
        for task, budget in budgets.items():
            tasks.setdefault(budget, []).append(task)
        each = ", ".join(f"{budget} on {' and '.join(some)}" for budget, some in tasks.items())
        names[key] = next(iter(tasks)) if len(tasks) == 1 else f"equal {key[1]}: {each}"
    return [record | {"budget": names[record["model"], _kind(record)]} for record in found]


def _untrained_elsewhere(found: Sequence[Record]) -> list[Record]:
    """Return copies of the cells without training for the budgets on the same data that lack them."""
    good = [record for record in found if record["status"] == OK]
    taken = {tuple(record[name] for name in ("model", "budget", "label", "task", "seed")) for record in found}
    copies = []
    for record in good:
        if record["steps"] != 0:
            continue
        same = ("model", "task", "seed", "n", "data_sha256")
        beside = [other for other in good if all(record.get(name) == other.get(name) for name in same)]
        for budget in dict.fromkeys(other["budget"] for other in beside if _kind(other) != _kind(record)):
            if (record["model"], budget, record["label"], record["task"], record["seed"]) not in taken:
                copies.append(record | {"budget": budget})
    return copies


def _kind(record: Record) -> str:
    return "samples" if record["budget"].endswith("samples") else "time"


# --- arranging ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The cells that a comparison asks for: each row on each task with each seed, for each budget.

    Attributes:
        rows: label -> method.
    """

    model: str
    budgets: Sequence[str]
    rows: Mapping[str, str]
    tasks: Sequence[str]
    seeds: Sequence[int]


def read_plan(folder: Path) -> Plan | None:
    """Read the plan of the comparison in `folder`; None if the folder has none, as after `add_cells`."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return Plan(
            str(settings["model_name"]),
            [str(budget) for budget in settings["budgets"]],
            {str(row["label"]): str(row["method"]) for row in settings["rows"]},
            [str(task["name"]) for task in settings["tasks"]],
            [int(seed) for seed in settings["seeds"]],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class Section:
    """The cells of one model and budget.

    Attributes:
        rows: label -> method, in the order of the tables' rows.
        seeds: the seeds of the records.
        wanted: the seeds that each row should have on each task.
        planned: whether the rows, tasks and seeds are those of a plan.
    """

    model: str
    budget: str
    rows: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    planned: bool = False
    cells: dict[tuple[str, str], dict[int, Record]] = field(default_factory=dict)  # (label, task) -> seed -> record

    def at(self, label: str, task: str) -> list[Record]:
        """Return the records of a label and task, of any status, sorted by seed."""
        return [record for _, record in sorted(self.cells.get((label, task), {}).items())]

    def ok(self, label: str, task: str) -> list[Record]:
        """Return the records with a score, sorted by seed."""
        return [record for record in self.at(label, task) if record["status"] == OK]

    @property
    def full(self) -> str | None:
        """The label of full fine-tuning: "full", or the first label of that method; None without one."""
        return (
            "full"
            if "full" in self.rows
            else next((label for label, method in self.rows.items() if method == "full"), None)
        )

    def metric(self, task: str) -> str:
        """Return the name of a task's score."""
        return next((record["metric"] for label in self.rows for record in self.ok(label, task)), "")

    def shown(self) -> list[str]:
        """Return the labels that have a score on some task."""
        return [label for label in self.rows if any(self.ok(label, task) for task in self.tasks)]

    def judged_by_loss(self) -> list[str]:
        """Return the tasks whose score says little, because no row reaches `FLOOR`, as small models on GSM8K.

        All their records must have the loss on the right answers, by which they are judged instead.
        """
        found = []
        for task in self.tasks:
            rows = [some for some in (self.ok(label, task) for label in self.rows) if some]
            low = all((mean_of(some, "score") or 0) < FLOOR for some in rows)
            if rows and low and all(is_finite(record["metrics"].get(LOSS)) for some in rows for record in some):
                found.append(task)
        return found

    def common_tasks(self) -> list[str]:
        """Return the tasks on which all shown labels have a score, without those that are judged by their loss."""
        shown, by_loss = self.shown(), self.judged_by_loss()
        tasks = [task for task in self.tasks if task not in by_loss]
        return [task for task in tasks if shown and all(self.ok(label, task) for label in shown)]

    def means(self, label: str) -> list[Record]:
        """Return records of the mean over the common tasks, one for each seed that has all of them."""
        tasks = self.common_tasks()
        found = []
        for seed in self.seeds if tasks else ():
            some = [self.cells.get((label, task), {}).get(seed) for task in tasks]
            members = [record for record in some if record is not None and record["status"] == OK]
            if len(members) == len(tasks):
                found.append(_mean_record(seed, members))
        return found


def _mean_record(seed: int, members: Sequence[Record]) -> Record:
    """Make the record of a mean over tasks, with the fields that `paired_difference` needs."""
    replicates = [record["bootstrap"] or [] for record in members]
    usable = len({len(some) for some in replicates}) == 1 and all(is_finite(v) for some in replicates for v in some)
    return {
        "seed": seed,
        "score": statistics.fmean(record["score"] for record in members),
        "bootstrap": np.mean(replicates, axis=0).tolist() if usable and replicates[0] else [],
        "n": [record["n"] for record in members],
        "data_sha256": [record.get("data_sha256") for record in members],
    }


def arrange(found: Sequence[Record], plan: Plan | None = None) -> list[Section]:
    """Arrange records by model and budget, in order of appearance; rows are sorted by method, then by appearance.

    Args:
        plan: adds the rows, tasks, seeds and budgets that have no record yet.
    """
    sections: dict[tuple[str, str], Section] = {}
    order = {method: place for place, method in enumerate(METHODS)}
    methods: dict[tuple[str, str], dict[str, str]] = {}  # of each section: label -> method
    for record in found:
        name = (record["model"], record["budget"])
        section = sections.setdefault(name, Section(*name))
        if record["task"] not in section.tasks:
            section.tasks.append(record["task"])
        section.seeds = sorted({*section.seeds, record["seed"]})
        section.cells.setdefault((record["label"], record["task"]), {})[record["seed"]] = record
        methods.setdefault(name, {}).setdefault(record["label"], record["method"])
    if plan is not None:
        for name in ((plan.model, budget) for budget in plan.budgets):
            section = sections.setdefault(name, Section(*name))
            section.tasks += [task for task in plan.tasks if task not in section.tasks]
            section.wanted, section.planned = list(plan.seeds), True
            methods[name] = methods.get(name, {}) | dict(plan.rows)
    for name, section in sections.items():
        section.wanted = sorted({*section.wanted, *section.seeds})
        rows = sorted(methods[name].items(), key=lambda row: order.get(row[1], len(order)))
        section.rows = dict(rows)
    return list(sections.values())


def best(rows: Mapping[str, Sequence[Record]]) -> str | None:
    """Return the label with the highest mean if the interval of its difference to the second excludes 0, else None."""
    ranked = sorted(
        (label for label, some in rows.items() if some),
        key=lambda label: statistics.fmean(record["score"] for record in rows[label]),
        reverse=True,
    )
    if len(ranked) < 2:
        return None
    difference: Difference | None = paired_difference(rows[ranked[0]], rows[ranked[1]])
    return ranked[0] if difference and difference.is_clear and difference.mean > 0 else None


# --- numbers --------------------------------------------------------------------------------------------


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number; None is not."""
    return value is not None and math.isfinite(value)


def tried_rates(record: Record) -> set[float]:
    """Return the learning rates that were tried for a cell."""
    return {trial["learning_rate"] for trial in record["tuning"] or () if is_finite(trial["learning_rate"])}


def mean_of(found: Iterable[Record], name: str) -> float | None:
    """Return the mean of a field over the records that have it; None if none has."""
    values = [record[name] for record in found if is_finite(record[name])]
    return statistics.fmean(values) if values else None


def std_of(found: Sequence[Record], name: str = "score") -> float | None:
    """Return the sample standard deviation over seeds; None for fewer than two."""
    values = [record[name] for record in found if is_finite(record[name])]
    return statistics.stdev(values) if len(values) > 1 else None


def as_text(value: Any) -> str:
    """Format any JSON value, such as versions or a hash, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return value if isinstance(value, str) else json.dumps(value)
