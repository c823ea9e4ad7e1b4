"""The uncertainty of scores: bootstrap intervals over test examples, and paired differences between methods.

Intervals are percentile intervals (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
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
    """The difference of two methods' scores, averaged over their common seeds.

    Attributes:
        low, high: the interval, or None; then `why` gives the reason.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    why: str | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def bootstrap_scores(
    score: Callable[[Sequence[int]], float], n: int, replicates: int = 500, seed: str = ""
) -> list[float]:
    """Return the metric of `replicates` resamples. Each draws n of the indices 0 to n - 1 with replacement.

    The same n and seed give the same resamples, so that methods tested on the same examples can be paired. Do not put
    the training seed into `seed` if the test examples are the same for all seeds: averages over seeds would then look
    too certain.
    """
    if n < 1 or replicates < 1:
        raise ValueError(f"{replicates} resamples of {n} examples; expected at least 1 resample of 1 example")
    draw = random.Random(f"bootstrap {seed}")
    return [float(score(draw.choices(range(n), k=n))) for _ in range(replicates)]


def interval(replicates: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval that holds the middle `level` of the replicates (linear interpolation)."""
    if not len(replicates) or not 0 < level < 1 or not np.isfinite(replicates).all():
        raise ValueError(f"{len(replicates)} replicates, level {level}; expected finite numbers and a level in 0 to 1")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], level: float = LEVEL
) -> Difference | None:
    """Return the difference of two methods on one task over their common seeds; None if there is no common seed.

    The i-th replicates of both methods come from the same resample. They are averaged over the seeds, then subtracted.
    The interval shows the uncertainty from the choice of test examples, not from the choice of seeds.

    Args:
        ours, theirs: records with `seed`, `score` and `bootstrap`, one per seed. If they have `n` and `data_sha256`,
            these must be equal for an interval.
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
    """Return why the replicates cannot be subtracted, or None if they can."""
    for key, what in (("n", "numbers of test examples"), ("data_sha256", "data")):
        if any(a.get(key) != b.get(key) for a, b in pairs):
            return f"the two were tested on different {what}"
    both = [record for pair in pairs for record in pair]
    if not all(record["bootstrap"] for record in both):
        return "there are no replicates"
    if len({len(record["bootstrap"]) for record in both}) > 1:
        return "the numbers of replicates differ"
    if not all(_is_number(value) for record in both for value in record["bootstrap"]):
        return "some replicates are not finite numbers"
    return None


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)
