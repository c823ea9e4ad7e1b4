"""Whether results hold the promises: each is seen to hold, and to fail just past its bound."""

import copy
from typing import Any

import pytest

from hift_ds.evaluation.gpu_check.promises import GIB, promises

TRACE = {"waits": 2.0, "waits_in_forward": 1.0}
LENGTH = {"seconds": 0.1, "first_seconds": 0.12, "peak": 100 * GIB, "planned": 96 * GIB, "trace": TRACE}
RESULTS: dict[str, Any] = {
    "weights": {"cases": {"fp32 ZeRO 0": {"bound": 1e-3, "error": 5e-4, "holds": True}}},
    "hift large": {"512": LENGTH, "host": {"counted": 75 * GIB, "grown": 76 * GIB}, "setup_seconds": 44.0},
    "badam large": {"512": {"seconds": 0.12, "every_100": 0.096}},
    "lora large": {"512": {"seconds": 0.17}},
}


def failing(results: dict[str, Any]) -> list[str]:
    return [promise.name for promise in promises(results, on_device=True) if not promise.holds]


def test_good_results_hold_every_promise() -> None:
    assert failing(RESULTS) == []
    assert len(promises(RESULTS, on_device=True)) == 9


@pytest.mark.parametrize(
    ("task", "path", "value", "named"),
    [
        ("weights", ("cases", "fp32 ZeRO 0"), {"bound": 1e-3, "reason": "ValueError: no"}, "weights, fp32 ZeRO 0"),
        ("hift large", ("512", "planned"), 94 * GIB, "planned device peak"),
        ("hift large", ("512", "trace", "waits"), 2.25, "wait a step"),
        ("hift large", ("host", "grown"), 77 * GIB, "host memory"),
        ("hift large", ("setup_seconds",), 45.5, "set-up"),
        ("hift large", ("512", "first_seconds"), 0.13, "first cycle"),
        ("badam large", ("512", "seconds"), 0.095, "of BAdam, switching after every step"),
        ("badam large", ("512", "every_100"), 0.095, "of BAdam, switching after every 100 steps"),
        ("lora large", ("512", "seconds"), 0.166, "of LoRA"),
    ],
)
def test_a_result_past_its_bound_fails_its_promise(task: str, path: tuple[str, ...], value: Any, named: str) -> None:
    results = copy.deepcopy(RESULTS)
    place = results[task]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (name,) = failing(results)
    assert named in name


def test_times_of_a_cpu_promise_nothing() -> None:
    assert [promise.name for promise in promises(RESULTS, on_device=False)] == [
        "weights, fp32 ZeRO 0: error at most 0.001"
    ]


def test_a_method_that_was_not_measured_holds_and_breaks_nothing() -> None:
    results = {name: result for name, result in RESULTS.items() if name != "lora large"}
    (promise,) = [promise for promise in promises(results, on_device=True) if promise.holds is None]
    assert "LoRA" in promise.name and promise.measured == "not measured"
