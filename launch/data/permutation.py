"""A seeded permutation of any number of elements that takes no memory: each element is computed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

ROUNDS = 8


class Permutation:
    """The elements 0 to n - 1 in an order that depends on a key.

    A Feistel network permutes the pairs (row, column) of a table with at least `n` cells. A cell outside of the `n`
    elements is permuted again until it is one of them (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002).

    Args:
        n: number of elements, at most 2**62.
        key: decides the order.
    """

    def __init__(self, n: int, key: str) -> None:
        self.n = n
        self._rows = math.isqrt(n - 1) + 1
        self._columns = -(-n // self._rows)
        digest = hashlib.shake_256(key.encode()).digest(8 * ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: Sequence[int]) -> list[int]:
        """Return the elements at some places, each of 0 to n - 1."""
        found = self._permuted(np.asarray(places, dtype=np.uint64))
        while (outside := found >= self.n).any():
            found[outside] = self._permuted(found[outside])
        return found.tolist()

    def _permuted(self, cells: np.ndarray) -> np.ndarray:
        """Permute the cells of the table."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(cells, columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                column = (column + _mixed(row ^ key) % columns) % columns
            else:
                row = (row + _mixed(column ^ key) % rows) % rows
        return row * columns + column


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit numbers: the finalizer of SplitMix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
