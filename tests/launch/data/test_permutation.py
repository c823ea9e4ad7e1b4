"""The computed permutation: every element once, as random as a shuffle, the same for ever."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import Counter

import pytest

from hift_ds.launch.data.batches import Order
from hift_ds.launch.data.permutation import Permutation


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 1000, 99_991])
def test_every_element_has_one_place(n: int) -> None:
    assert sorted(Permutation(n, "a")(range(n))) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_few_elements_are_equally_frequent(n: int) -> None:
    times, orders = 2400, math.factorial(n)
    counts = Counter(tuple(Permutation(n, f"{key}")(range(n))) for key in range(times))
    expected = times / orders
    chi2 = sum((counts[order] - expected) ** 2 / expected for order in counts) + expected * (orders - len(counts))
    assert chi2 < orders - 1 + 5 * math.sqrt(2 * orders), counts


def test_places_tell_nothing_about_elements() -> None:
    n, cells = 200_000, 20
    counts = Counter((place * cells // n, one * cells // n) for place, one in enumerate(Permutation(n, "b")(range(n))))
    expected = n / cells**2
    chi2 = sum((counts[i, j] - expected) ** 2 / expected for i in range(cells) for j in range(cells))
    assert 0.8 < chi2 / (cells - 1) ** 2 < 1.2
    found = Permutation(n, "b")(range(n))
    near = sum(abs(a - b) < 1000 for a, b in zip(found, found[1:], strict=False)) / n
    assert near == pytest.approx(2 * 1000 / n, rel=0.2)


def test_it_never_changes() -> None:
    """A continued run needs the order in which it began, also with another version."""
    assert Permutation(100_000, "order 7 3")(range(5)) == [80737, 50120, 96916, 86867, 65254]


def windows(n: int, steps: range, seed: int = 3, size: int = 7000) -> list[list[int]]:
    order = Order(n, seed, size)
    return [order.window(step) for step in steps]


def test_the_order_of_many_examples_is_computed() -> None:
    n = Order.LISTED + 1000
    stream = [one for window in windows(n, range(20)) for one in window]
    assert sorted(stream[:n]) == sorted(stream[n : 2 * n]) == list(range(n))
    assert stream[:n] != stream[n : 2 * n] and stream[:n] != [w for v in windows(n, range(20), seed=4) for w in v][:n]
    for start in (1, 9, 19):
        assert [one for window in windows(n, range(start, 20)) for one in window] == stream[start * 7000 :]


def test_the_order_of_fewer_examples_is_that_of_earlier_versions() -> None:
    shuffled = list(range(Order.LISTED))
    random.Random("order 3 0").shuffle(shuffled)
    assert windows(Order.LISTED, range(9)) == [shuffled[i * 7000 : (i + 1) * 7000] for i in range(9)]


def test_an_order_of_any_size_takes_no_memory() -> None:
    tracemalloc.start()
    order = Order(10**12, 0, 16)
    assert len(set(order.window(10**6))) == 16
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
