"""A run on a stream of rows: killed in the middle of an epoch, it continues with the same examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.data_fixtures import write_jsonl
from tests.support.training import records, run_tiny, summary

ROWS = [{"prompt": f"What is {i} + {i}?", "completion": "4" * (i % 7 + 1)} for i in range(22)]


def settings(folder: Path, *others: str) -> tuple[str, ...]:
    path = write_jsonl(folder / "rows.jsonl", [*ROWS[:9], {"prompt": "a", "completion": ""}, *ROWS[9:]])
    data = ("name=jsonl", f"path={path}", "streaming=true", "shuffle_rows=5", "train_examples=null", "eval_examples=0")
    training = ("max_steps=10", "batch_size=4", "save_every=3")
    return tuple(f"data.{one}" for one in data) + tuple(f"training.{one}" for one in training) + others


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_continues_in_the_middle_of_a_stream(ranks: int, tmp_path: Path) -> None:
    """Four examples a step, 22 an epoch: step 6 ends in the second epoch."""
    chosen = settings(tmp_path)
    straight = run_tiny(1, tmp_path / "straight", *chosen)
    assert straight["code"] == 0, straight["printed"]
    assert run_tiny(1, tmp_path / "killed", *chosen, stop_after=7)["code"] is None
    resumed = run_tiny(ranks, tmp_path / "killed", *chosen, resume="yes")
    assert resumed["code"] == 0 and "continues after step 6" in resumed["printed"], resumed["printed"]
    counts = [
        [(one["tokens"], one["trained_tokens"]) for one in records(tmp_path / run)] for run in ("straight", "killed")
    ]
    assert counts[0] == counts[1] and len(set(counts[0])) > 5
    if ranks == 1:
        assert resumed["digest"] == straight["digest"]
    for out, printed in (("straight", straight["printed"]), ("killed", resumed["printed"])):
        found = summary(tmp_path / out)["data"]["train"]
        assert found["rows"] is None and found["skipped_no_target"] >= 1
        assert found["first"] == {"skipped_no_target": f"{tmp_path / 'rows.jsonl'}:10"}
        assert f"rows skipped (the first skipped: {tmp_path / 'rows.jsonl'}:10)" in printed


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.max_steps=null", "training.max_steps: not set, but data.streaming is true"),
        ("training.epochs=2", "training.epochs: got 2, but the rows of a stream are not counted"),
        ("data.path=x", "data.path: 'x' does not exist"),
    ],
)
def test_what_a_stream_needs_is_said_at_once(key: str, message: str, tmp_path: Path) -> None:
    refused = run_tiny(1, tmp_path / "run", *settings(tmp_path), *(key, "training.max_steps=null"))
    assert refused["code"] == 2 and message in refused["printed"]
