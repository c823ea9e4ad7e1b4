"""The built-in data sets by name. They are generated from a seed and need no files and no network."""

from __future__ import annotations

from collections.abc import Callable

from hift_ds.launch.data.arithmetic import MAX_PROBLEMS, arithmetic_problems
from hift_ds.launch.data.yes_no import yes_no_questions

__all__ = ["BUILT_IN", "MAX_PROBLEMS", "built_in_rows"]

# Each function takes a split ("train" or "test"), the number of rows and a seed.
BUILT_IN: dict[str, Callable[[str, int, int], list[dict[str, str]]]] = {
    "arithmetic": arithmetic_problems,
    "yes-no": yes_no_questions,
}


def built_in_rows(name: str, split: str, n: int, seed: int) -> list[tuple[str, dict[str, str]]]:
    """Generate `n` rows of a split of `BUILT_IN[name]`, each with its origin for messages."""
    return [(f"built-in {split} problem {i}", row) for i, row in enumerate(BUILT_IN[name](split, n, seed), 1)]
