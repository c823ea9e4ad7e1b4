"""Read and summarize verdicts: mean ratings by category and turn, and wins, ties, losses and flips of two models.

Failed verdicts are counted, but enter no mean and no comparison.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from hift_ds.evaluation.json_lines import Place, Record, field, read_records
from hift_ds.evaluation.mt_bench.questions import PAIRWISE, SINGLE, TEMPERATURES
from hift_ds.launch.errors import UserError

TOTAL = "total"
SPENDING = "spending"  # the field of records that store the cost of a reply without a verdict


def verdict_key(where: Place, record: Record) -> Hashable:
    """Return the key of a stored verdict (a tuple) or of a record of spending. Raises UserError if it is neither."""
    if SPENDING in record:
        return str(field(where, record, SPENDING, str, "a text"))
    names = field(where, record, "models", list, "a list of names")
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: 'models': expected a list of names")
    number, turn = (field(where, record, key, int, "a number") for key in ("question_id", "turn"))
    mode, judge, digest = (field(where, record, key, str, "a text") for key in ("mode", "judge", "prompt_sha256"))
    return (number, turn, mode, tuple(names), judge, digest)


def read_verdicts(path: Path) -> list[Record]:
    """Read and check a file of verdicts that `python -m evaluation.mt_bench` wrote.

    Raises:
        UserError: no such file, or a line is not a verdict; names file and line.
    """

    def key_of(where: Place, record: Record) -> Hashable:
        key = verdict_key(where, record)
        checked(where, record)
        return key

    return list(read_records(path, key_of).values())


def checked(where: Place, record: Record) -> None:
    """Check that a stored verdict can be summarized. Raises UserError if not."""
    if SPENDING in record:
        return
    mode = field(where, record, "mode", str, f"{SINGLE!r} or {PAIRWISE!r}")
    number = len(record["models"])
    if mode not in (SINGLE, PAIRWISE) or number != {SINGLE: 1, PAIRWISE: 2}[mode]:
        raise UserError(f"{where}: 'mode': {mode!r} of {number} model(s); expected single of 1 or pairwise of 2")
    field(where, record, "category", str, "a category")
    if field(where, record, "status", str, "'ok' or 'failed'") == "failed":
        return
    if mode == SINGLE:
        value = field(where, record, "rating", (int, float), "a number in 1 to 10")
        if not 1 <= value <= 10:
            raise UserError(f"{where}: 'rating': got {value}, expected a number in 1 to 10")
    elif "winner" not in record or record["winner"] not in (None, *record["models"]):
        raise UserError(f"{where}: 'winner': expected one of the two models, or null for a tie")


def summarize(verdicts: Iterable[Record]) -> dict[str, list[dict[str, Any]]]:
    """Summarize verdicts for each judge and model, or each judge and pair of models; records of spending are skipped.

    Returns:
        "single": objects of `judge`, `model` and `categories`, which has for each category and for "total" the `mean`
        of its ratings, the means `turn_1` and `turn_2` (None without ratings), their number `n`, and how many
        `failed`. "pairwise": objects of `judge`, `models` (two, in alphabetical order) and `categories`, which has
        `wins` and `losses` of the first model, `ties`, `flips` (ties only because the two orders disagree), `reversed`
        (flips in which each order names another model) and `failed` (one of the two verdicts failed or is missing).
    """
    single: dict[tuple[str, str], list[Record]] = {}
    pairs: dict[tuple[str, tuple[str, ...]], list[Record]] = {}
    for verdict in verdicts:
        if SPENDING in verdict:
            continue
        if verdict["mode"] == SINGLE:
            single.setdefault((verdict["judge"], verdict["models"][0]), []).append(verdict)
        else:
            pairs.setdefault((verdict["judge"], tuple(sorted(verdict["models"]))), []).append(verdict)
    return {
        SINGLE: [
            {"judge": judge, "model": model, "categories": {name: _means(some) for name, some in _by_category(found)}}
            for (judge, model), found in sorted(single.items())
        ],
        PAIRWISE: [
            {
                "judge": judge,
                "models": list(models),
                "categories": {name: _wins(models[0], some) for name, some in _by_category(found)},
            }
            for (judge, models), found in sorted(pairs.items())
        ],
    }


def _by_category(verdicts: list[Record]) -> list[tuple[str, list[Record]]]:
    present = {verdict["category"] for verdict in verdicts}
    order = [*(name for name in TEMPERATURES if name in present), *sorted(present - set(TEMPERATURES))]
    return [*((name, [v for v in verdicts if v["category"] == name]) for name in order), (TOTAL, verdicts)]


def _means(verdicts: list[Record]) -> dict[str, Any]:
    good = [verdict for verdict in verdicts if verdict["status"] == "ok"]
    return {
        "mean": _mean(good),
        "turn_1": _mean([verdict for verdict in good if verdict["turn"] == 1]),
        "turn_2": _mean([verdict for verdict in good if verdict["turn"] == 2]),
        "n": len(good),
        "failed": len(verdicts) - len(good),
    }


def _mean(verdicts: list[Record]) -> float | None:
    return sum(verdict["rating"] for verdict in verdicts) / len(verdicts) if verdicts else None


def _wins(model: str, verdicts: list[Record]) -> dict[str, int]:
    sums = dict.fromkeys(("wins", "ties", "losses", "flips", "reversed", "failed"), 0)
    questions: dict[tuple[int, int], list[Record]] = {}
    for verdict in verdicts:
        questions.setdefault((verdict["question_id"], verdict["turn"]), []).append(verdict)
    for orders in questions.values():
        if len(orders) < 2 or any(verdict["status"] != "ok" for verdict in orders):
            sums["failed"] += 1
            continue
        named = {verdict["winner"] for verdict in orders}
        if len(named) > 1:
            sums["flips"] += 1
            sums["reversed"] += None not in named
        agreed = named.pop() if len(named) == 1 else None
        sums["ties" if agreed is None else "wins" if agreed == model else "losses"] += 1
    return sums


def tables(summary: dict[str, list[dict[str, Any]]]) -> str:
    """Format a summary as tables for a terminal."""
    parts = []
    for one in summary[SINGLE]:
        rows = [
            [name, _shown(c["mean"]), _shown(c["turn_1"]), _shown(c["turn_2"]), str(c["n"]), str(c["failed"])]
            for name, c in one["categories"].items()
        ]
        head = ["category", "mean", "turn 1", "turn 2", "verdicts", "failed"]
        parts.append(f"{one['model']}: mean rating from 1 to 10 by {one['judge']}\n{_table(head, rows)}")
    for one in summary[PAIRWISE]:
        first, second = one["models"]
        head = ["category", "wins", "ties", "losses", "flips", "reversed", "failed"]
        rows = [[name, *(str(c[key]) for key in head[1:])] for name, c in one["categories"].items()]
        title = f"{first} against {second}: wins in both orders, by {one['judge']}"
        note = "flips are ties because the two orders disagree; reversed: each order names another model"
        parts.append(f"{title}\n{_table(head, rows)}\n({note})")
    return "\n\n".join(parts)


def _shown(mean: float | None) -> str:
    return "-" if mean is None else f"{mean:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for first, *rest in (head, *rows):
        lines.append("  ".join([first.ljust(widths[0]), *(v.rjust(w) for v, w in zip(rest, widths[1:], strict=True))]))
    return "\n".join(lines)
