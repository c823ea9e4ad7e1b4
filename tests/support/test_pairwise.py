"""The generator of pairwise tables against brute force."""

import itertools
import random
from typing import Any

import pytest

from tests.support.pairwise import Row, each_value, others_slow, pairwise, params, product

FACTORS = {"stage": (0, 1, 2, 3), "dtype": ("fp32", "bf16", "fp16"), "ranks": (1, 2), "offload": (False, True)}


def possible(row: Row) -> bool:
    return row["stage"] > 0 or (row["dtype"] != "fp16" and not row["offload"])


def pairs(rows: list[Row]) -> set[Any]:
    return {pair for row in rows for pair in itertools.combinations(sorted(row.items()), 2)}


def test_every_possible_pair_is_there_and_no_impossible_row() -> None:
    draw = random.Random(0)
    for _ in range(50):
        factors = {name: tuple(range(draw.randrange(1, 5))) for name in "abcde"}
        banned = {tuple(draw.randrange(4) for _ in range(3)) for _ in range(40)}

        def valid(row: Row, banned: set[Any] = banned) -> bool:
            return (row["a"], row["b"], row["c"]) not in banned and (row["c"], row["d"], row["e"]) not in banned

        everything = [dict(zip(factors, v, strict=True)) for v in itertools.product(*factors.values())]
        everything = [row for row in everything if valid(row)]
        table = pairwise(factors, valid)
        assert all(row in everything for row in table)
        assert pairs(table) == pairs(everything)


def test_few_rows_suffice() -> None:
    table = pairwise(FACTORS, possible)
    assert len(product(FACTORS, possible)) == 40
    assert 11 <= len(table) <= 13  # 4 stages x 3 dtypes are 12 pairs, of which one is impossible
    large = {str(i): tuple(range(4)) for i in range(7)}
    assert len(pairwise(large)) <= 30  # of 16384


def test_the_same_table_every_time_and_another_one_for_another_seed() -> None:
    assert pairwise(FACTORS, possible) == pairwise(FACTORS, possible)
    assert pairwise(FACTORS, possible, seed=1) != pairwise(FACTORS, possible)


def test_pinned_rows_come_first_and_count() -> None:
    pinned = [{"stage": 3, "dtype": "fp16", "ranks": 2, "offload": True}, {"stage": 1}]
    table = pairwise(FACTORS, possible, pinned)
    assert table[0] == pinned[0]
    assert table[1] == {"stage": 1, "dtype": "fp32", "ranks": 1, "offload": False}
    assert pairs(table) == pairs(product(FACTORS, possible))
    assert pairwise(FACTORS, possible, pinned=table) == table, "nothing is missing, so nothing is added"


def test_a_sample_has_each_value_once_more() -> None:
    table = pairwise(FACTORS, possible)
    sample = each_value(table)
    assert all(row in table for row in sample) and 4 <= len(sample) <= 5 < len(table)
    assert {item for row in sample for item in row.items()} == {item for row in table for item in row.items()}
    assert each_value([{"a": 1}, {"a": 1}]) == [{"a": 1}] and each_value([]) == []


@pytest.mark.parametrize("row", [{"stage": 0, "dtype": "fp16"}, {"stage": 4}, {"stages": 1}])
def test_a_pinned_row_must_be_possible(row: Row) -> None:
    with pytest.raises(ValueError, match="pinned row"):
        pairwise(FACTORS, possible, [row])


def test_the_rest_of_the_product_is_slow() -> None:
    made = params(lambda **row: tuple(row.values()), FACTORS, possible)
    table = [one.values[0] for one in made if not one.marks]
    slow = [one.values[0] for one in made if [mark.name for mark in one.marks] == ["slow"]]
    assert len(table) + len(slow) == len(made)
    assert table == [tuple(row.values()) for row in pairwise(FACTORS, possible)]
    assert sorted(table + slow) == sorted(tuple(row.values()) for row in product(FACTORS, possible))


def test_what_is_not_chosen_is_slow() -> None:
    made = others_slow("abc", "b")
    assert [(one.values[0], [mark.name for mark in one.marks]) for one in made] == [
        ("a", ["slow"]),
        ("b", []),
        ("c", ["slow"]),
    ]
    with pytest.raises(ValueError, match="not among the values.*'d'"):
        others_slow("abc", "bd")
