"""The results printed in the paper, from paper_tables.yaml. Reports show them separately from measured results."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

DATA = Path(__file__).with_name("paper_tables.yaml")
_PRINTED = re.compile(r"(\d+(?:\.\d+)?)(?: \((\d+(?:\.\d+)?)\))?")


@dataclass(frozen=True)
class PaperValue:
    """One printed number; `table` numbers the tables of the file."""

    table: int
    source: str
    model: str
    setting: str | None
    unit: str
    method: str  # its name here
    label: str  # its name in the paper
    cited: bool  # cited from other work
    task: str
    metric: str | None
    printed: str
    mean: float
    std: float | None


@cache
def paper_values() -> tuple[PaperValue, ...]:
    """Return all printed numbers in the order of the file."""
    found = []
    for number, table in enumerate(yaml.safe_load(DATA.read_text(encoding="utf-8"))):
        about = {key: table[key] for key in ("source", "model", "setting", "unit")}
        for row in table["rows"]:
            for column, printed in zip(table["columns"], row["values"], strict=True):
                task, _, metric = column.partition(" ")
                match = _PRINTED.fullmatch(printed)
                if match is None:
                    raise ValueError(f"{DATA.name}: {table['source']}, {row['label']}: {printed!r} is no number")
                mean, std = match.groups()
                found.append(
                    PaperValue(
                        table=number,
                        **about,
                        **{key: row[key] for key in ("method", "label", "cited")},
                        task=task,
                        metric=metric or None,
                        printed=printed,
                        mean=float(mean),
                        std=float(std) if std else None,
                    )
                )
    return tuple(found)


def paper_tables(tasks: Collection[str]) -> list[list[PaperValue]]:
    """Return the numbers of some tasks, one list for each table that has any."""
    tables: dict[int, list[PaperValue]] = {}
    for value in paper_values():
        if value.task in tasks:
            tables.setdefault(value.table, []).append(value)
    return list(tables.values())
