"""Rows that are read as they are needed: every row once an epoch, and the same steps however a run is cut."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hift_ds.launch.data import loading
from hift_ds.launch.data.batches import Share, Window, load_windows
from hift_ds.launch.data.settings import DataSettings
from hift_ds.launch.data.stream import Stream
from hift_ds.launch.errors import UserError
from tests.support.data_fixtures import bpe, load, write_jsonl

ROWS = [{"prompt": f"{i:03}", "completion": "yes " * (i % 5 + 1)} for i in range(50)]
SKIPPED = [{"prompt": "x", "completion": ""}]


def write(folder: Path, *files: list[Any]) -> Path:
    """Shards of a split, as the Hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        write_jsonl(folder / f"train-{number}.jsonl", rows)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of different lengths, one of them empty, with rows that give no example."""
    return write(tmp_path / "shards", ROWS[:13], [*SKIPPED * 4, *ROWS[13:15]], [], [*ROWS[15:], *SKIPPED])


def stream(folder: Path, **settings: Any) -> Any:
    return load(bpe(), name="jsonl", path=str(folder), streaming=True, **{"shuffle_rows": 8, **settings})


def steps(data: Any, first: int, last: int, *, position: Any = None, rank: int = 0, world: int = 1, micro: int = 6,
          workers: int = 0, seed: int = 1) -> list[Window]:  # fmt: skip
    share = Share(0, 6, micro, rank, world)
    return list(load_windows(data.train, seed, share, first, last, workers, position))


def prompts(windows: list[Window]) -> list[list[str]]:
    """The prompts of each step of one rank."""
    return [
        [bpe().decode(ids)[:3] for batch in window.batches for ids in batch["input_ids"].tolist()] for window in windows
    ]


def test_every_epoch_holds_every_row_once_in_another_order(shards: Path) -> None:
    data = stream(shards)
    assert isinstance(data.train, Stream)
    windows = steps(data, 0, 25)  # three epochs
    read = [one for window in prompts(windows) for one in window]
    epochs = [read[i : i + 50] for i in range(0, 150, 50)]
    assert all(sorted(epoch) == [f"{i:03}" for i in range(50)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [one for step in prompts(steps(data, 0, 25, seed=2)) for one in step] != read
    places = [place for window in windows for place in window.rows]
    assert Counter(places) == dict.fromkeys(places, 3) and len(set(places)) == 50
    assert str(shards / "train-1.jsonl:5") in places, "rows are named by file and line"
    # Rows are shuffled within blocks of 8.
    assert all(abs(int(one) - place) < 16 for place, one in enumerate(epochs[0]))
    assert epochs[0][:8] != sorted(epochs[0][:8])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_continues_at_any_step_on_other_ranks(workers: int, shards: Path) -> None:
    """Also in the middle of a block, at its ends, and across epochs."""
    straight = steps(stream(shards), 0, 25)
    whole = prompts(straight)
    draw = random.Random(workers)
    for stop in draw.sample(range(1, 25), 6 if workers == 0 else 2):
        position = json.loads(json.dumps(straight[stop - 1].position))
        world, micro = draw.choice([(1, 6), (1, 2), (2, 3), (2, 1), (3, 2), (3, 1), (6, 1)])
        ranks = [
            steps(stream(shards), stop, 25, position=position, rank=rank, world=world, micro=micro, workers=workers)
            for rank in range(world)
        ]
        for number in range(stop, 25):
            own = [prompts([rank[number - stop]])[0] for rank in ranks]
            assert sorted(one for part in own for one in part) == sorted(whole[number]), (stop, number, world, micro)
            taken = [part[i : i + micro] for i in range(0, 6 // world, micro) for part in own]
            assert [one for part in taken for one in part] == whole[number]
            assert ranks[0][number - stop].position == straight[number].position
            assert ranks[0][number - stop].tokens == straight[number].tokens


def test_rows_before_a_position_are_not_parsed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", ROWS[:20], ROWS[20:])
    data = stream(folder)
    position = steps(data, 0, 6)[-1].position
    rest = prompts(steps(data, 6, 8, position=position))
    assert position is not None and position["start"]["file"] == 1 and position["start"]["row"] > 5
    for name, rows in (("train-0.jsonl", 20), ("train-1.jsonl", position["start"]["row"])):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join(["{"] * rows + lines[rows:]))
    assert prompts(steps(data, 6, 8, position=position)) == rest
    with pytest.raises(UserError, match="train-0.jsonl:1: broken JSON"):
        steps(data, 6, 9, position=position)  # of the next epoch


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json"])
def test_files_of_all_kinds_are_found_again(kind: str, tmp_path: Path) -> None:
    import datasets

    rows = [{**row, "prompt": row["prompt"] + '\n"a"' * (i % 3)} for i, row in enumerate(ROWS)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    settings = {"name": kind, "path": str(path), "streaming": True, "shuffle_rows": 7}
    straight = steps(load(bpe(), **settings), 0, 12)
    assert len({place for window in straight[:8] for place in window.rows}) == 48
    for stop in (3, 8, 9):
        rest = steps(load(bpe(), **settings), stop, 12, position=straight[stop - 1].position)
        assert [one.rows for one in rest] == [one.rows for one in straight[stop:]]
        assert prompts(rest) == prompts(straight[stop:])


def test_what_is_found_is_said_once_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS[:10], *SKIPPED * 2, {"prompt": "<|im_end|>", "completion": "b"}, *ROWS[20:]]
    rows[30]["completion"] = "yes " * 50
    held_out = write_jsonl(tmp_path / "eval.jsonl", [ROWS[8]])
    folder = write(tmp_path / "a", rows)
    data = stream(folder, max_length=30, eval_path=str(tmp_path), eval_split="eval")
    assert held_out.exists() and len(data.eval) == 1
    said: list[str] = []
    data.train.say = said.append
    windows = steps(data, 0, 14)  # two epochs of 43 rows, and the first block of the third
    path = folder / "train-0.jsonl"
    shared = "held-out examples are also training examples, so their score does not measure new data"
    assert said == [
        f"train: rows without a trained token are skipped; the first is {path}:11",
        "train: texts contain control tokens of the tokenizer, and become these tokens: <|im_end|> (1); change them "
        f"where they are meant as text; the first row is {path}:13",
        f"warning: {shared}; the first is {path}:9",
        f"train: examples are cut on the right to data.max_length (30 tokens); the first is {path}:31",
    ]
    found = data.train.found
    assert (found.read, found.used, found.skipped_no_target, found.truncated) == (94, 90, 4, 2)
    # A continued run counts on, and says nothing again.
    other = stream(folder, max_length=30)
    other.train.say = said.append
    steps(other, 9, 14, position=windows[8].position)
    assert len(said) == 4 and other.train.found == found


def test_a_broken_row_is_named_when_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PEEK", 10)
    path = write(tmp_path / "a", [*ROWS[:45], {"prompt": 3, "completion": ""}]) / "train-0.jsonl"
    for workers in (0, 2):
        data = stream(tmp_path / "a")
        assert len(steps(data, 0, 6, workers=workers)) == 6
        with pytest.raises(UserError, match=rf"\A{path}:46: expected a text in column 'prompt'[^\n]*\Z"):
            steps(data, 0, 9, workers=workers)


def test_ids_that_the_model_does_not_have_are_refused_when_they_come(shards: Path) -> None:
    data = stream(shards)
    data.train.highest_token = 20
    with pytest.raises(UserError, match=r"rows from .*train-0.jsonl:1 to .* have the id \d+, .* end with 20"):
        steps(data, 0, 1)


def test_streams_without_examples_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row of the stream has a trained token"):
        steps(stream(write(tmp_path / "a", SKIPPED * 20)), 0, 1)
    with pytest.raises(UserError, match="has no rows in the split"):
        stream(write(tmp_path / "b", []))
    data = stream(write(tmp_path / "c", ROWS))
    (tmp_path / "c" / "train-0.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows any more"):
        steps(data, 0, 1)


def test_what_identifies_a_stream(shards: Path, tmp_path: Path) -> None:
    first = stream(shards).report["train"]["sha256"]
    moved = write(tmp_path / "moved", ROWS[:13], [*SKIPPED * 4, *ROWS[13:15]], [], [*ROWS[15:], *SKIPPED])
    assert stream(moved).report["train"]["sha256"] == first
    with (moved / "train-3.jsonl").open("a") as file:
        file.write("\n")
    assert stream(moved).report["train"]["sha256"] != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_examples": 5}, "data.train_examples: 5, but the rows of a stream are not counted"),
        ({"shuffle_rows": 0}, "data.shuffle_rows: 0 is too small"),
        ({"name": "arithmetic", "path": None}, "data.streaming: true, but 'arithmetic' is generated"),
    ],
)
def test_settings_that_a_stream_cannot_have(settings: dict[str, Any], message: str, shards: Path) -> None:
    (problem,) = DataSettings(**{"name": "jsonl", "path": str(shards), "streaming": True, **settings}).problems()
    assert message in problem


def test_labels_need_all_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match="data.streaming: true, but labels are numbered when all rows are known"):
        stream(folder, task="sequence-classification")
