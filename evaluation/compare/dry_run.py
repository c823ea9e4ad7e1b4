"""What a dry run tells: each cell with its seconds, and why it failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hift_ds.evaluation.compare.settings import DRY_STEPS


def cells_text(records: Sequence[dict[str, Any]], total: int) -> str:
    """Return a line for each cell, and their number by status.

    Args:
        records: of the cells that ran.
        total: how many cells the comparison has with one seed.
    """
    rows = [("budget", "task", "method", "result", "seconds", "why")]
    for one in records:
        spent = one.get("spent")
        seconds = f"{sum(spent.values()):.1f}" if spent else ""
        status = one["status"].replace("_", " ")
        rows.append((one["budget"], one["task"], one["label"], status, seconds, one["reason"] or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    counts = {status: sum(one["status"] == status for one in records) for status in ("ok", "not_applicable", "failed")}
    lines.append(
        f"dry run: {counts['ok']} cells ok, {counts['not_applicable']} not applicable, {counts['failed']} failed"
        + (f", {left} not run" if (left := total - len(records)) else "")
        + f"; {DRY_STEPS} steps each, nothing is kept"
    )
    return "\n".join(lines)
