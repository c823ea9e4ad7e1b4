"""Values of wrong kinds for settings and for columns of data, as files of other tools and typing errors hold them."""

import copy
import datetime
import math
from collections.abc import Iterator
from typing import Any

WRONG_VALUES: tuple[Any, ...] = (
    "", " ", "text", "1e-3", "12", "true", "auto", "x" * 300, "a\0b", "~nobody-here/x", "\ud800",
    0, 1, -1, 3, 10**30, -(10**30), 0.5, -0.5, 1e-30, 1e300, math.nan, math.inf, -math.inf,
    True, False, None,
    [], [1], ["a"], [None], [0.9, 0.999], [[1]], {}, {"a": 1}, {1: 2}, {"a": {"b": None}},
    datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1, 12, 30), b"bytes",
)  # fmt: skip


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each mapping and of each value in it, without the root."""
    if path:
        yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))


def with_value(node: dict, path: tuple[Any, ...], value: Any) -> dict:
    """Return a copy of nested mappings with another value at a path."""
    changed = copy.deepcopy(node)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(value)
    return changed
