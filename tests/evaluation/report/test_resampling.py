"""Bootstrap intervals and paired differences, against numpy and scipy and cases worked out by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import scipy.stats

from hift_ds.evaluation.report.resampling import (
    EXAMPLES,
    SEEDS,
    bootstrap_means,
    bootstrap_scores,
    interval,
    mean_difference,
    paired_difference,
    resamples,
)


def record(seed: int, right: list[int], **changes: Any) -> dict[str, Any]:
    scores = bootstrap_scores(lambda some: sum(right[i] for i in some) / len(some), len(right), 400, "task")
    score = sum(right) / len(right)
    return {"seed": seed, "score": score, "bootstrap": scores, "n": len(right), "data_sha256": "d"} | changes


def answers(seed: int, n: int, chance: float) -> list[int]:
    draw = random.Random(seed)
    return [int(draw.random() < chance) for _ in range(n)]


def test_resamples_are_of_all_indices_with_replacement_and_the_same_for_the_same_seed() -> None:
    seen: list[list[int]] = []
    scores = bootstrap_scores(lambda some: seen.append(list(some)) or len(set(some)), 30, 50, "a")
    assert len(scores) == len(seen) == 50 and all(len(some) == 30 and set(some) <= set(range(30)) for some in seen)
    assert {i for some in seen for i in some} == set(range(30)) and len({tuple(some) for some in seen}) == 50
    # of n drawn with replacement, n (1 - (1 - 1/n)^n) are distinct on average
    assert np.mean(scores) == pytest.approx(30 * (1 - (1 - 1 / 30) ** 30), abs=1)
    assert scores == bootstrap_scores(lambda some: len(set(some)), 30, 50, "a")
    assert scores[:20] == bootstrap_scores(lambda some: len(set(some)), 30, 20, "a")
    assert scores != bootstrap_scores(lambda some: len(set(some)), 30, 50, "b")


def test_resamples_are_those_of_pythons_generator() -> None:
    for n in (1, 2, 277):
        draw = random.Random("bootstrap sst2")
        assert resamples(n, 40, "sst2").tolist() == [draw.choices(range(n), k=n) for _ in range(40)]


def test_means_of_resamples_are_those_of_the_examples_that_were_drawn() -> None:
    scores, units = [float(one) for one in answers(3, 60, 0.4)], [[0, 5, 7], [2], [1, 3], *([i] for i in range(8, 60))]
    expected = []
    for drawn in resamples(len(units), 50, "a").tolist():
        some = [scores[i] for unit in drawn for i in units[unit]]
        expected.append(sum(some) / len(some))
    assert bootstrap_means(scores, units, resamples(len(units), 50, "a")) == expected
    assert len(set(expected)) > 5


def test_interval_is_numpys_and_near_scipys() -> None:
    right = answers(1, 300, 0.8)
    scores = record(0, right)["bootstrap"]
    assert interval(scores) == pytest.approx(np.percentile(scores, [2.5, 97.5]))
    assert interval(scores, 0.5) == pytest.approx(np.percentile(scores, [25, 75]))
    theirs = scipy.stats.bootstrap((np.array(right),), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert interval(scores) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        low, high = interval(record(0, answers(trial, 100, 0.7))["bootstrap"])
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("scores", "level"), [([], 0.95), ([0.5, math.nan], 0.95), ([0.5], 1.0), ([0.5], 0.0)])
def test_interval_refuses_what_has_none(scores: list[float], level: float) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        interval(scores, level)


@pytest.mark.parametrize(("n", "replicates"), [(0, 10), (10, 0)])
def test_nothing_to_resample(n: int, replicates: int) -> None:
    with pytest.raises(ValueError, match="at least 1 resample of 1 example"):
        bootstrap_scores(lambda some: 0.0, n, replicates)


def test_difference_is_of_replicates_averaged_over_the_common_seeds() -> None:
    ours = [record(seed, answers(seed, 50, 0.8)) for seed in (0, 1, 2)]
    theirs = [record(seed, answers(100 + seed, 50, 0.6)) for seed in (3, 2, 1)]
    found = paired_difference(ours, theirs)
    assert found is not None and found.seeds == (1, 2) and found.why is None
    gaps = [
        (ours[1]["bootstrap"][i] + ours[2]["bootstrap"][i]) / 2
        - (theirs[2]["bootstrap"][i] + theirs[1]["bootstrap"][i]) / 2
        for i in range(400)
    ]
    assert (found.low, found.high) == pytest.approx(np.percentile(gaps, [2.5, 97.5]))
    by_hand = (ours[1]["score"] - theirs[2]["score"] + ours[2]["score"] - theirs[1]["score"]) / 2
    assert found.mean == pytest.approx(by_hand)
    assert found.is_clear == (found.low > 0 or found.high < 0)


def test_paired_interval_is_narrower_on_correlated_answers_and_agrees_with_scipys() -> None:
    theirs = answers(5, 400, 0.7)
    ours = [1 - one if i % 40 == 0 else one for i, one in enumerate(theirs)]  # they differ in 10 of 400
    found = paired_difference([record(0, ours)], [record(0, theirs)])
    assert found is not None and found.low is not None and found.high is not None
    unpaired = np.subtract(
        record(0, ours)["bootstrap"], np.random.default_rng(0).permutation(record(0, theirs)["bootstrap"])
    )
    low, high = interval(unpaired.tolist())
    assert found.high - found.low < 0.5 * (high - low)
    scipys = scipy.stats.bootstrap(
        (np.array(ours), np.array(theirs)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(scipys), abs=0.005)


def test_seeds_on_the_same_examples_do_not_narrow_the_interval() -> None:
    """Three seeds that answer alike know no more than one, where all resample alike."""
    ours, theirs = answers(1, 100, 0.8), answers(2, 100, 0.7)
    one = paired_difference([record(0, ours)], [record(0, theirs)])
    three = paired_difference([record(s, ours) for s in range(3)], [record(s, theirs) for s in range(3)])
    assert one is not None and three is not None
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": 49}, "different numbers of test examples"),
        ({"data_sha256": "other"}, "different data"),
        ({"bootstrap": []}, "no replicates"),
        ({"bootstrap": None}, "no replicates"),
        ({"bootstrap": [0.5] * 399}, "numbers of replicates differ"),
        ({"bootstrap": [math.nan] * 400}, "not finite numbers"),
        ({"bootstrap": [None] * 400}, "not finite numbers"),
    ],
)
def test_what_cannot_be_paired_has_no_interval(change: dict[str, Any], why: str) -> None:
    right = answers(1, 50, 0.8)
    found = paired_difference([record(0, right)], [record(0, right, **change)])
    assert found is not None and found.mean == 0 and found.low is None and found.high is None
    assert found.why is not None and why in found.why and not found.is_clear


def test_no_common_seed_no_difference() -> None:
    right = answers(1, 50, 0.8)
    assert paired_difference([record(0, right)], [record(1, right)]) is None
    assert paired_difference([record(0, right, score=math.nan)], [record(0, right)]) is None
    assert paired_difference([], [record(1, right)]) is None


# --- over tasks and seeds -------------------------------------------------------------------------------


def pairs(
    gaps: list[float], replicates: list[list[float]] | None = None
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of records, one for each seed, with these differences and replicates of them."""
    drawn = replicates or [[] for _ in gaps]
    theirs = {"score": 0.5, "n": 9, "data_sha256": "d"}
    return [
        (theirs | {"score": 0.5 + gap, "bootstrap": some}, theirs | {"bootstrap": [0.0] * len(some)})
        for gap, some in zip(gaps, drawn, strict=True)
    ]


def test_interval_of_one_task_over_seeds_is_that_of_the_t_test() -> None:
    gaps = [0.01, 0.03, -0.02]
    found = mean_difference([pairs(gaps)])
    expected = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(gaps)) and found.shows == (SEEDS,)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_interval_of_two_tasks_over_seeds_is_half_of_welchs() -> None:
    """The mean of two tasks' differences is half of the first less the negative of the second."""
    one, other = [0.01, 0.03, -0.02], [0.2, 0.1, 0.15, 0.4]
    found = mean_difference([pairs(one), pairs(other)])
    expected = scipy.stats.ttest_ind(one, [-gap for gap in other], equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low / 2, expected.high / 2))


def test_interval_of_one_seed_is_over_test_examples() -> None:
    draw = np.random.default_rng(0)
    some = [draw.normal(0.1, 0.02, 4000).tolist(), draw.normal(0.3, 0.04, 4000).tolist()]
    found = mean_difference([pairs([0.1], some[:1]), pairs([0.3], some[1:])])
    assert found.shows == (EXAMPLES,) and found.mean == pytest.approx(0.2)
    assert found.low is not None and found.high is not None
    assert (found.low, found.high) == pytest.approx(np.quantile(np.mean(some, axis=0), [0.025, 0.975]), abs=0.002)
    nothing = mean_difference([pairs([0.1]), pairs([0.3, 0.5])])
    assert (nothing.mean, nothing.low, nothing.high, nothing.shows) == (pytest.approx(0.25), None, None, ())
    assert mean_difference([pairs([0.0, 0.0], [[0.0] * 9] * 2)]).low == 0


def test_interval_over_seeds_and_test_examples_covers_the_truth_about_as_often_as_it_says() -> None:
    """And percentiles of replicates that resample three seeds and the test examples do not."""
    draw, trials, tasks, seeds, examples, draws = np.random.default_rng(0), 250, 2, 3, 60, 200
    covered = resampled = 0
    for _ in range(trials):
        made, brute = [], np.zeros(draws)
        for _ in range(tasks):
            # The same test examples for all seeds: each example and each seed shifts the difference.
            gaps = draw.normal(0, 0.02, (seeds, 1)) + draw.normal(0, 0.1, (1, examples))
            replicates = gaps[:, draw.integers(0, examples, (draws, examples))].mean(2)
            made.append(pairs(gaps.mean(1).tolist(), replicates.tolist()))
            chosen = draw.integers(0, seeds, (draws, seeds))
            brute += replicates[chosen, np.arange(draws)[:, None]].mean(1) / tasks
        found = mean_difference(made)
        assert found.shows == (SEEDS, EXAMPLES) and found.low is not None and found.high is not None
        covered += found.low <= 0 <= found.high
        low, high = np.quantile(brute, [0.025, 0.975])
        resampled += low <= 0 <= high
    assert 0.9 <= covered / trials <= 0.99
    assert resampled / trials < 0.92
