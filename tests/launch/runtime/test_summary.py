"""The summary in plain text."""

from typing import Any

import pytest

from hift_ds.launch.runtime.summary import _cuts, _kept, _mib, report


def test_small_sizes_keep_their_digits() -> None:
    assert [_mib(int(size * 2**20)) for size in (0, 0.0471, 2.5, 42, 516.4, 4024)] == [
        "0",
        "0.0471",
        "2.5",
        "42",
        "516",
        "4024",
    ]
    kept = _kept({"device": {"parameters": 3 * 2**17, "gradients": 0}, "host": {"optimizer_state": 3 * 2**16}})
    assert kept == ["MiB kept           device 0.375 (parameters 0.375); host 0.188 (optimizer state 0.188)"]


def records(*blocks_of_cycles: int, skipped: int) -> list[dict[str, Any]]:
    """Of cycles with so many blocks, after skipped steps in which the first block waits."""
    at = [(0, 0)] * skipped + [(cycle, block) for cycle, n in enumerate(blocks_of_cycles) for block in range(n)]
    return [
        {"step": step, "cycle": cycle, "block": block, "block_name": f"b{block}", "skipped": step <= skipped}
        for step, (cycle, block) in enumerate(at, 1)
    ]


@pytest.mark.parametrize(
    ("cycles", "last", "starts", "skipped", "text"),
    [
        ([6] * 3 + [3] * 4, 3, [0, 18], 0, "30 steps, 3 whole cycles of 6 blocks, then 4 of 3"),
        ([6] * 3 + [3] * 4 + [2], 3, [0, 20], 2, "34 steps, 3 whole cycles of 6 blocks, then 4 of 3"),
        ([6] + [3] * 2 + [5], 6, [0, 6, 12], 0, "17 steps, 1 whole cycle of 6 blocks, then 2 of 3, then 0 of 6"),
        ([6] * 2, 3, [0, 12], 0, "12 steps, 2 whole cycles of 6 blocks, then 0 of 3"),  # no step of the last cut
        ([6] * 2 + [1], 6, [0], 0, "13 steps, 2 whole cycles of 6 blocks"),
        ([1], 1, [0], 0, "1 steps, 1 whole cycle of 1 block"),
    ],
)
def test_each_cut_has_its_cycles(cycles: list[int], last: int, starts: list[int], skipped: int, text: str) -> None:
    """`cycles` are the steps of each; the last one may be incomplete, of `last` blocks."""
    taken = records(*cycles, skipped=skipped)
    total = len(cycles) - (cycles[-1] not in (last, cycles[0]))
    cuts = _cuts(taken, starts, [f"b{block}" for block in range(last)], total)
    assert sum(cut["cycles"] for cut in cuts) == total
    summary: dict[str, Any] = dict.fromkeys(("loss_first", "loss_last", "loss_first_mean", "loss_last_mean"), 1.0)
    summary |= {"method": "hift", "model": "m", "dataset": "d", "steps": len(taken), "steps_skipped": 0}
    summary |= {"loss_window": 1, "seconds": 1.0, "tokens_per_second": 1.0, "peak_memory": 0, "peak_memory_kind": ""}
    summary |= {**cuts[-1], "cycles": total, "data": {"train": {"rows": 1}}} | ({"cuts": cuts} if cuts[1:] else {})
    assert report(summary).splitlines()[0] == f"hift on m, d: {text}"
