"""Pairwise tables: few rows of a product of factors in which every possible pair of two factors' values occurs.

Most bugs need two settings to meet, seldom three. `pairwise` picks such rows, `params` turns them into parameters of a
test and marks every other row of the product as slow. Where a row takes seconds, the table itself is slow, and
`each_value` picks a sample of it.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest

Row = dict[str, Any]


def product(factors: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Return all valid rows, one value of each factor to a row."""
    rows = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return [row for row in rows if valid(row)]


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    valid: Callable[[Row], bool] = lambda row: True,
    pinned: Iterable[Row] = (),
    seed: int = 0,
) -> list[Row]:
    """Return rows that hold every pair of values of two factors that some valid row holds.

    The same arguments give the same rows. The rows come from a greedy search: each one holds as many new pairs as
    possible. It goes through the whole product, so keep that below some ten thousand rows.

    Args:
        factors: the values of each factor; hashable, and no value twice.
        valid: whether a row is possible.
        pinned: rows that come first, and whose pairs count. They may lack factors, which then take the first value.
        seed: decides between rows with equally many new pairs.

    Raises:
        ValueError: a pinned row is not valid, or names an unknown factor or value.
    """
    first = {name: values[0] for name, values in factors.items()}
    table = []
    for given in pinned:
        row = first | given
        if row.keys() != factors.keys() or any(row[name] not in factors[name] for name in factors) or not valid(row):
            raise ValueError(f"pinned row {given}: not among the valid rows of the product")
        table.append(row)

    rows = product(factors, valid)
    random.Random(seed).shuffle(rows)
    number: dict[Any, int] = {}  # of each pair; a row's pairs are the set bits of an integer
    bits = [sum(1 << number.setdefault(pair, len(number)) for pair in _pairs(row)) for row in rows]
    missing = (1 << len(number)) - 1
    for row in table:
        for pair in _pairs(row):
            missing &= ~(1 << number[pair])
    while missing:
        best = max(range(len(rows)), key=lambda i: (bits[i] & missing).bit_count())
        table.append(rows[best])
        missing &= ~bits[best]
    return list({tuple(row.items()): row for row in table}.values())


def each_value(rows: Sequence[Row]) -> list[Row]:
    """Return few of the rows of a table, in which each value of each factor occurs: a sample of the table.

    They come from a greedy search, in the order of the table where rows are equally good.
    """
    missing = {item for row in rows for item in row.items()}
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(missing & set(row.items()))))
        missing -= set(chosen[-1].items())
    return chosen


def params(
    build: Callable[..., Any],
    factors: Mapping[str, Sequence[Any]],
    valid: Callable[[Row], bool] = lambda row: True,
    pinned: Iterable[Row] = (),
    seed: int = 0,
) -> list[Any]:
    """Return `build(**row)` of every valid row, as parameters of a test: those outside the pairwise table are slow."""
    table = pairwise(factors, valid, pinned, seed)
    others = [row for row in product(factors, valid) if row not in table]
    slow = [pytest.param(build(**row), marks=pytest.mark.slow) for row in others]
    return [*(pytest.param(build(**row)) for row in table), *slow]


def others_slow(values: Iterable[Any], chosen: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters of a test; a tuple holds one for each argument. Those not `chosen` are slow.

    Raises:
        ValueError: a chosen value is not among the values.
    """
    values, chosen = list(values), list(chosen)
    if strange := [value for value in chosen if value not in values]:
        raise ValueError(f"chosen, but not among the values: {strange}")
    rows = [(value if isinstance(value, tuple) else (value,), value in chosen) for value in values]
    return [pytest.param(*row, marks=() if is_chosen else pytest.mark.slow) for row, is_chosen in rows]


def _pairs(row: Row) -> Iterable[Any]:
    return itertools.combinations(row.items(), 2)
