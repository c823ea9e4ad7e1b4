"""Slots of weights that are full of NaN before they are filled, so that a weight that is not fetched is noticed."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from hift_ds.weights.turns import Turns


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Each slot is full of NaN before it is filled."""
    fill = Turns._fill

    def poison(turns: Turns, unit: Any) -> None:
        unit.slot.area.fill_(255)
        fill(turns, unit)

    with mock.patch.object(Turns, "_fill", poison):
        yield
