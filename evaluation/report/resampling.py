"""What a score on a sample of test examples is worth: bootstrap intervals, and differences paired over examples.

After Efron and Tibshirani, "An Introduction to the Bootstrap" (1993): percentile intervals. Not named after its field,
because that is a module of Python's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, averaged over the seeds that both have; `low` and `high` are None where `why` says why."""

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    why: str | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def bootstrap_scores(
    score: Callable[[Sequence[int]], float], n: int, replicates: int = 500, seed: str = ""
) -> list[float]:
    """The metric of `replicates` resamples, each of n of the example indices 0 to n - 1, drawn with replacement.

    The same n and seed give the same resamples, so that methods tested on the same examples pair. Leave the run's seed
    out of `seed` where its test examples are the same in the same order: averages over seeds then vary as they should.
    """
    if n < 1 or replicates < 1:
        raise ValueError(f"{replicates} resamples of {n} examples; expected at least 1 of 1")
    draw = random.Random(f"bootstrap {seed}")
    return [float(score(draw.choices(range(n), k=n))) for _ in range(replicates)]


def interval(replicates: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of replicates, by percentiles (linear between neighbors)."""
    if not len(replicates) or not 0 < level < 1 or not np.isfinite(replicates).all():
        raise ValueError(f"{len(replicates)} replicates, level {level}; expected finite numbers and a level in 0 to 1")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], level: float = LEVEL
) -> Difference | None:
    """The difference of two rows of one task, over the seeds that both have; None without one.

    Replicates are averaged over these seeds and subtracted one by one: within a seed, the i-th replicates of both are
    of the same resample. So the interval is about the sampling of test examples; it knows nothing of other seeds.

    Args:
        ours, theirs: records with `seed`, `score` and `bootstrap`, one a seed; where they have `n` and `data_sha256`,
            these tell whether the two were tested on the same examples.
    """
    mine, others = (
        {record["seed"]: record for record in some if _is_number(record["score"])} for some in (ours, theirs)
    )
    seeds = tuple(sorted(mine.keys() & others.keys()))
    if not seeds:
        return None
    pairs = [(mine[seed], others[seed]) for seed in seeds]
    mean = sum(a["score"] - b["score"] for a, b in pairs) / len(pairs)
    why = _unpaired(pairs)
    if why:
        return Difference(mean, None, None, seeds, why)
    left, right = (np.mean([np.array(pair[side]["bootstrap"], float) for pair in pairs], axis=0) for side in (0, 1))
    return Difference(mean, *interval((left - right).tolist(), level), seeds)


def _unpaired(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str | None:
    """Why the replicates cannot be subtracted, if so."""
    for key, what in (("n", "numbers of test examples"), ("data_sha256", "data")):
        if any(a.get(key) != b.get(key) for a, b in pairs):
            return f"the two were tested on different {what}"
    both = [record for pair in pairs for record in pair]
    if not all(record["bootstrap"] for record in both):
        return "there are no replicates"
    if len({len(record["bootstrap"]) for record in both}) > 1:
        return "the numbers of replicates differ"
    if not all(_is_number(value) for record in both for value in record["bootstrap"]):
        return "some replicates are no numbers"
    return None


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)
