"""The memory of a step with many tokens, from simulations with few.

transformers computes the tokens of some models one after the other, in Python: a simulation then takes as long as the
sequence. Everything that such a step allocates has a size of the form

    a + b * batch + c * length + d * batch * length + e * chunk

where ``chunk`` is the number of tokens in a chunk of logits. The total at an instant is such a sum, too, and the peak
is the largest one. Which one it is depends mostly on the number of tokens. A few short sequences in large batches, with
as many tokens as are asked for, therefore give its coefficients exactly, and one more simulation verifies them. To be
sure of the right sum, this is done for the highest total of each kind of operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from hift_ds.planner.simulation import Kind, LiveMemory

_Sizes = dict[Kind, dict[str, int]]  # kind of operation -> category -> bytes
_HOST = "host"  # a phase of its own: bytes of host buffers


class Point(NamedTuple):
    """What is simulated.

    Attributes:
        batch_size: sequences in the batch.
        seq_len: tokens in each sequence.
        chunk: tokens in a chunk of logits; 0: the logits of all tokens at once.
    """

    batch_size: int
    seq_len: int
    chunk: int

    @property
    def terms(self) -> tuple[int, ...]:
        """The factors of the coefficients."""
        batch, length, chunk = self
        return (1, batch, length, batch * length) + ((chunk,) if chunk else ())


@dataclass(frozen=True)
class Extrapolated:
    """The memory of a step that was not simulated.

    Attributes:
        peaks: for each phase, the bytes of each category at the highest total.
        host: bytes of host buffers.
        lengths: lengths of the sequences that were simulated.
    """

    peaks: dict[str, dict[str, int]]
    host: int
    lengths: tuple[int, ...]


class NotLinearError(Exception):
    """The simulated sizes are not of the form that can be extrapolated."""


class Extrapolation:
    """Finds the memory of one step for any batch size and length.

    Args:
        simulate: returns the memory at a point.
        length: length of the shortest sequence to simulate, at least 2.
        step: tokens by which longer sequences are longer. Both are doubled until the sizes extrapolate.
    """

    def __init__(self, simulate: Callable[[Point], LiveMemory], length: int, step: int):
        self._simulate, self._length, self._step = simulate, length, step
        self._fits: list[_Fit] = []

    def at(self, point: Point) -> Extrapolated:
        """Return the memory at a point.

        Raises:
            NotLinearError: the sizes do not extrapolate.
        """
        near = self._near(point)
        # Each fit is one sum of those of which the peak is the largest. One simulation shows whether it still is.
        if not self._fits or _totals(self._largest(near)) != _totals(_of_phases([_sizes(self._simulate(near))])):
            self._fits.append(self._fit(point))
        sizes = self._largest(point)
        host = sum(sizes.pop(_HOST).values())
        return Extrapolated(sizes, host, tuple(self._length + self._step * steps for steps in (0, 1, 2)))

    def _near(self, point: Point, steps: int = 0, more: int = 0, longer: int = 0) -> Point:
        """Return a point with short sequences and as many tokens, and enough for two chunks."""
        length, chunk = self._length + self._step * steps, point.chunk and point.chunk + longer
        batch = max(-(-point.batch_size * point.seq_len // length), -(-2 * chunk // (length - 1)))
        return Point(batch + more, length, chunk)

    def _largest(self, point: Point) -> dict[str, dict[str, int]]:
        """Return the sizes at a point, for each phase: those of the kind and the fit with the highest total."""
        return _of_phases(fit.at(point) for fit in self._fits)

    def _fit(self, point: Point) -> _Fit:
        for _ in range(4):
            near = partial(self._near, point)
            points = [near(), near(more=1), near(1), near(1, more=1)] + ([near(longer=1)] if point.chunk else [])
            fit = _Fit(points, [_sizes(self._simulate(one)) for one in points])
            verified = near(2, more=2, longer=2)
            if fit.verify(verified, _sizes(self._simulate(verified))):
                return fit
            self._length, self._step = 2 * self._length, 2 * self._step
        raise NotLinearError


class _Fit:
    """Linear functions through the sizes at as many points as a point has terms."""

    def __init__(self, points: Sequence[Point], sizes: Sequence[_Sizes]):
        rows = _inverse([list(map(Fraction, point.terms)) for point in points])

        def solve(values: Sequence[int]) -> list[Fraction]:
            return [sum((w * value for w, value in zip(row, values, strict=True)), Fraction()) for row in rows]

        self._coefficients = {
            kind: {category: solve([one[kind][category] for one in sizes]) for category in sizes[0][kind]}
            for kind in sizes[0]
            if all(kind in one for one in sizes)
        }

    def at(self, point: Point) -> _Sizes:
        """Return the sizes of each kind at a point, rounded up."""
        return {
            kind: {
                category: -int(-sum(c * term for c, term in zip(coefficients, point.terms, strict=True)) // 1)
                for category, coefficients in categories.items()
            }
            for kind, categories in self._coefficients.items()
        }

    def verify(self, point: Point, sizes: _Sizes) -> bool:
        """Forget the kinds whose sizes at another point differ. Return whether the peaks of all phases are right."""
        expected = self.at(point)
        self._coefficients = {k: c for k, c in self._coefficients.items() if expected[k] == sizes.get(k)}
        return _totals(_of_phases([self.at(point)])) == _totals(_of_phases([sizes]))


def _inverse(rows: list[list[Fraction]]) -> list[list[Fraction]]:
    """Invert a matrix by Gauss-Jordan elimination, exactly."""
    size = len(rows)
    rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(rows)]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            if i != column and rows[i][column]:
                rows[i] = [a - rows[i][column] * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [row[size:] for row in rows]


def _sizes(memory: LiveMemory) -> _Sizes:
    assert memory.by_kind is not None
    return {**memory.by_kind, (_HOST,): {"activations": memory.host}}


def _of_phases(all_sizes: Iterable[_Sizes]) -> dict[str, dict[str, int]]:
    """Return the sizes with the highest total of each phase."""
    result: dict[str, dict[str, int]] = {}
    for sizes in all_sizes:
        for (phase, *_), one in sizes.items():
            if phase not in result or sum(one.values()) > sum(result[phase].values()):
                result[phase] = one
    return result


def _totals(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {phase: sum(one.values()) for phase, one in sizes.items()}
