"""Results of a comparison: read and checked, and arranged by model and budget, method and task.

A record is one method (by its label) on one task with one seed, with the status "ok", "not_applicable" or "failed".
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
from hift_ds.evaluation import records
from hift_ds.evaluation.records import Place, Record
from hift_ds.evaluation.report.resampling import Difference, paired_difference
from hift_ds.launch.errors import UserError, shown

RESULTS, SETTINGS = "results.jsonl", "compare.json"  # of a comparison's folder
OK, NOT_APPLICABLE, FAILED = "ok", "not_applicable", "failed"
METHODS = (
    *("full", "hift", "lora", "prefix", "bitfit", "adapter", "prelayer", "s4", "mezo", "mezo-adam", "mezo-lora"),
    *("mezo-prefix", "lomo", "full-top2", "badam", "galore", "linear-probing", "zero-shot", "icl"),
)  # in the order of rows
MEMORY_PARTS = ("parameters", "gradients", "master_weights", "optimizer_state", "activations", "buffers")

# --- checking -------------------------------------------------------------------------------------------

_NUMBER, _NONE = (int, float), type(None)
_NUMBERS = (  # of cells that are ok; null where a method has none
    *("steps", "samples", "tokens", "seconds", "step_seconds", "tokens_per_second", "trained_parameters"),
    *("total_parameters", "peak_memory", "flops", "loss_first", "loss_last", "learning_rate"),
)
_PRESENT = ("interval", "versions", "git", "data_sha256", "ranks", "date", "machine")


def read_results(*paths: Path) -> list[Record]:
    """The records of a results.jsonl, or of several as if they were one, checked.

    Raises:
        UserError: no such file, a line is broken or lacks a key, or a cell is there twice; names file, line and key.
    """
    lines = [line for path in paths for line in records.read_json_lines(path)]
    for where, record in lines:
        _check(where, record)
    return _distinct(lines)


def add_cells(out: Path, folders: Sequence[Path]) -> None:
    """Put the results of other folders after those of `out`, which need not be there; all of them or none.

    Raises:
        UserError: as `read_results`; or `out` is a comparison's own folder, which is written anew by the next command.
    """
    own = out / RESULTS
    if (out / SETTINGS).exists():
        raise UserError(f"{out}: a comparison runs here and writes {RESULTS} anew; expected a folder of its own")
    paths = [own] * own.exists() + [folder / RESULTS for folder in folders]
    lines = read_results(*paths)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_durably(own, "".join(json.dumps(record) + "\n" for record in lines))
    except OSError as error:
        raise UserError(f"{own}: cannot be written: {error.strerror}") from None


def checked(found: Sequence[Record]) -> list[Record]:
    """The same for records that are not from a file; they are named by their number."""
    lines = [(f"record {number}", record) for number, record in enumerate(found, 1)]
    for where, record in lines:
        _check(where, record)
    return _distinct(lines)


def _check(where: Place, record: Record) -> None:
    need = records.field
    for name in ("label", "method", "model", "task", "budget"):
        if not need(where, record, name, str, "a text").strip():
            raise UserError(f"{where}: {name!r}: it is empty; expected a name")
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
            raise UserError(f"{where}: {name!r}: it is not there; run the cell again")
    each: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "bootstrap": ("a number", _is_number_or_null),
        "curve": ("[step, seconds, tokens, loss]", _is_point),
        "tuning": ("an object with learning_rate and score", _is_trial),
    }
    for name, (expected, is_right) in each.items():
        for value in need(where, record, name, (list, _NONE), "a list") or ():
            if not is_right(value):
                raise UserError(f"{where}: {name!r}: expected each to be {expected}, got {shown(value)}")
    planned = need(where, record, "planned_memory", (dict, _NONE), "an object or null")
    for part in (*MEMORY_PARTS, "total") if planned else ():
        need(f"{where}: 'planned_memory'", planned, part, _NUMBER, "bytes")


def _is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, _NUMBER) and not isinstance(value, bool))


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number_or_null, value))


def _is_trial(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in value and _is_number_or_null(value[name]) for name in ("learning_rate", "score")
    )


def _distinct(lines: Iterable[tuple[Place, Record]]) -> list[Record]:
    """One record a cell: one that was run again after it failed counts by its last line, equal lines once.

    A score that is no number makes a cell a failed one.
    """
    cells: dict[tuple[Any, ...], tuple[Place, Record]] = {}
    for where, record in lines:
        key = tuple(record[name] for name in ("model", "budget", "label", "task", "seed"))
        earlier = cells.get(key)
        if earlier and earlier[1]["status"] == OK:
            if record == earlier[1]:
                continue  # joined twice
            raise UserError(f"{where}: the same cell as {earlier[0]}, which is ok; remove one of the two lines")
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
                record = record | {"status": FAILED, "reason": "its score is not a number"}
        found.append(record)
    return found


# --- arranging ------------------------------------------------------------------------------------------


@dataclass
class Section:
    """One model and budget. `rows` has a method's name for each label, in the order of rows."""

    model: str
    budget: str
    rows: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    cells: dict[tuple[str, str], dict[int, Record]] = field(default_factory=dict)  # (label, task) -> seed -> record

    def at(self, label: str, task: str) -> list[Record]:
        """All records of a cell, whatever their status, by seed."""
        return [record for _, record in sorted(self.cells.get((label, task), {}).items())]

    def ok(self, label: str, task: str) -> list[Record]:
        return [record for record in self.at(label, task) if record["status"] == OK]

    @property
    def full(self) -> str | None:
        """The label of full fine-tuning: "full", or else the first of that method."""
        return (
            "full"
            if "full" in self.rows
            else next((label for label, method in self.rows.items() if method == "full"), None)
        )

    def metric(self, task: str) -> str:
        return next((record["metric"] for label in self.rows for record in self.ok(label, task)), "")

    def shown(self) -> list[str]:
        """Labels that have a score anywhere."""
        return [label for label in self.rows if any(self.ok(label, task) for task in self.tasks)]

    def common_tasks(self) -> list[str]:
        """Tasks on which all labels that have any score have one."""
        return [task for task in self.tasks if self.shown() and all(self.ok(label, task) for label in self.shown())]

    def means(self, label: str) -> list[Record]:
        """Records of the mean over the common tasks, one for each seed that has all of them."""
        tasks = self.common_tasks()
        found = []
        for seed in self.seeds if tasks else ():
            some = [self.cells.get((label, task), {}).get(seed) for task in tasks]
            members = [record for record in some if record is not None and record["status"] == OK]
            if len(members) == len(tasks):
                found.append(_mean_record(seed, members))
        return found


def _mean_record(seed: int, members: Sequence[Record]) -> Record:
    """What `paired_difference` needs to know of a mean over tasks."""
    replicates = [record["bootstrap"] or [] for record in members]
    usable = len({len(some) for some in replicates}) == 1 and all(is_finite(v) for some in replicates for v in some)
    return {
        "seed": seed,
        "score": statistics.fmean(record["score"] for record in members),
        "bootstrap": np.mean(replicates, axis=0).tolist() if usable and replicates[0] else [],
        "n": [record["n"] for record in members],
        "data_sha256": [record.get("data_sha256") for record in members],
    }


def arrange(found: Sequence[Record]) -> list[Section]:
    """Records by model and budget, in the order in which these come; rows by method, then as they come."""
    sections: dict[tuple[str, str], Section] = {}
    order = {method: place for place, method in enumerate(METHODS)}
    by_method = sorted(found, key=lambda record: order.get(record["method"], len(order)))
    for record in found:
        name = (record["model"], record["budget"])
        section = sections.setdefault(name, Section(*name))
        if record["task"] not in section.tasks:
            section.tasks.append(record["task"])
        section.seeds = sorted({*section.seeds, record["seed"]})
        section.cells.setdefault((record["label"], record["task"]), {})[record["seed"]] = record
    for record in by_method:
        sections[record["model"], record["budget"]].rows.setdefault(record["label"], record["method"])
    return list(sections.values())


def best(rows: Mapping[str, Sequence[Record]]) -> str | None:
    """The label of the highest mean, if its difference to the second highest is clear of 0."""
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
    return value is not None and math.isfinite(value)


def tried_rates(record: Record) -> set[float]:
    return {trial["learning_rate"] for trial in record["tuning"] or () if is_finite(trial["learning_rate"])}


def mean_of(found: Iterable[Record], name: str) -> float | None:
    """The mean of a number over records that have it; None where none has."""
    values = [record[name] for record in found if is_finite(record[name])]
    return statistics.fmean(values) if values else None


def std_of(found: Sequence[Record], name: str = "score") -> float | None:
    """The sample standard deviation over seeds; None for fewer than two."""
    values = [record[name] for record in found if is_finite(record[name])]
    return statistics.stdev(values) if len(values) > 1 else None


def as_text(value: Any) -> str:
    """Versions, hashes, machines: whatever they are, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return value if isinstance(value, str) else json.dumps(value)
