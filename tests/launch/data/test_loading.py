"""Data: settings and their mistakes, subsets, the report, batches and the order of examples."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hift_ds.launch.data.batches import (
    Share,
    collate,
    collate_prompts,
    load_windows,
    on_device,
    trained_tokens,
)
from hift_ds.launch.data.encoding import IGNORED, EvalExample, Example
from hift_ds.launch.data.settings import DataSettings
from hift_ds.launch.errors import UserError
from hift_ds.model.loss import find_targets
from tests.support.data_fixtures import load, load_rows, window_batches, write_jsonl

# Settings --------------------------------------------------------------------------------------------


def test_good_settings_have_no_problems(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{}])
    (tmp_path / "other").mkdir()
    write_jsonl(tmp_path / "other" / "train.jsonl", [{}])
    for settings in (
        DataSettings(),
        DataSettings(name="gsm8k"),
        DataSettings(name="superglue/BoolQ", format="text-label"),
        DataSettings(name="someone/something", subset="main", revision="main", columns={"text": "sentence"}),
        DataSettings(name="jsonl", path=str(path), eval_path=str(tmp_path / "other"), eval_split="train"),
        DataSettings(name="json", path=str(tmp_path)),
        DataSettings(name="gsm8k", path=str(tmp_path), eval_examples=0),
    ):
        assert settings.problems() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gsm8"}, "data.name: unknown data set 'gsm8'.*did you mean 'gsm8k'"),
        ({"name": "superglue/rt"}, "did you mean 'superglue/rte'"),
        ({"name": "a/b/c"}, "unknown data set 'a/b/c'"),
        ({"name": "jsonl"}, "data.path: missing"),
        ({"name": "jsonl", "path": "nowhere"}, "data.path: 'nowhere' does not exist"),
        ({"name": "sst2", "path": "{file}"}, "is a file; 'sst2' needs its folder"),
        ({"name": "sst2", "path": "{folder}"}, r"data.split: no file train with the ending .tsv.*rows.jsonl"),
        ({"path": "{file}"}, "data.path: .* has no meaning with data.name 'arithmetic'"),
        ({"name": "a/b", "path": "{file}"}, "has no meaning with data.name 'a/b'"),
        ({"name": "jsonl", "path": "{file}", "eval_path": "nowhere"}, "data.eval_path: 'nowhere' does not exist"),
        ({"name": "gsm8k", "eval_path": "{file}"}, "data.eval_path: .* use data.eval_split"),
        ({"name": "jsonl", "path": "{file}", "split": "test"}, "one file, which has no splits"),
        ({"name": "jsonl", "path": "{file}", "eval_split": "test"}, "held-out file as data.eval_path"),
        ({"name": "gsm8k", "eval_split": "train"}, "data.eval_split: 'train' is trained on"),
        ({"name": "a/b", "split": "test", "eval_split": "test"}, "data.eval_split: 'test' is trained on"),
        ({"name": "jsonl", "path": "{file}", "eval_path": "{file}"}, "data.eval_path: .*rows.jsonl' is trained on"),
        (
            {"name": "jsonl", "path": "{folder}", "split": "rows", "eval_split": "rows"},
            "data.eval_split: 'rows' is .*rows.jsonl, which is trained on",
        ),
        (
            {"name": "jsonl", "path": "{file}", "eval_path": "{folder}", "eval_split": "rows"},
            "data.eval_split: 'rows' is .*rows.jsonl, which is trained on",
        ),
        ({"name": "gsm8k", "subset": "main"}, "data.subset: 'main'"),
        ({"name": "jsonl", "path": "{file}", "revision": "x"}, "data.revision: 'x'"),
        ({"split": "validation"}, "built-in problems are trained on 'train'"),
        ({"format": "chta", "name": "a/b"}, "data.format: 'chta'.*did you mean 'chat'"),
        ({"format": "chat"}, "data.format: 'chat' does not exist for 'arithmetic'"),
        ({"columns": {"prompt": "x"}}, "data.columns: the columns of 'arithmetic' are known"),
        ({"name": "a/b", "columns": {"promt": "x"}}, "unknown column 'promt'.*did you mean 'prompt'"),
        ({"train_examples": 0}, "data.train_examples: 0 is too small; expected at least 1"),
        ({"eval_examples": -1}, "data.eval_examples: -1 is too small"),
        ({"max_length": 1}, "data.max_length: 1 is too small"),
        ({"train_examples": 10**9}, "more than the 200000 built-in problems"),
    ],
)
def test_problems_are_named_with_a_remedy(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{}])
    filled: dict[str, Any] = {
        key: value.format(file=file, folder=tmp_path) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    problems = DataSettings(**filled).problems()
    assert len(problems) == 1 and re.search(message, problems[0]), problems


def test_all_problems_are_told_at_once(plain_tokenizer: Any) -> None:
    settings: dict[str, Any] = {
        "name": "csv",
        "path": "nowhere",
        "format": "chart",
        "max_length": 0,
        "columns": {"txt": "a"},
    }
    assert len(DataSettings(**settings).problems()) == 4
    with pytest.raises(UserError, match="(?s)nowhere.*chart.*txt.*max_length"):
        load(plain_tokenizer, **settings)


# Subsets and the report ------------------------------------------------------------------------------


def test_subsets_are_seeded_and_in_order(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:02}", "completion": "x"} for i in range(50)]

    def prompts(seed: int, n: int) -> list[str]:
        data = load_rows(plain_tokenizer, tmp_path, rows, seed=seed, train_examples=n, eval_examples=0)
        return [plain_tokenizer.decode(one.input_ids)[:2] for one in data.train]

    assert prompts(0, 10) == sorted(prompts(0, 10)) and len(set(prompts(0, 10))) == 10
    assert prompts(0, 10) == prompts(0, 10) != prompts(1, 10)
    data = load_rows(plain_tokenizer, tmp_path, rows, train_examples=99)
    assert len(data.train) == 50 and any("is 99, but there are only 50" in note for note in data.report["notes"])
    assert any("no held-out rows" in note for note in data.report["notes"])
    with pytest.raises(UserError, match="data.eval_examples: 5.*nothing held out.*data.eval_path"):
        load_rows(plain_tokenizer, tmp_path, rows, eval_examples=5)


def test_content_hash_follows_the_rows(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    first = load_rows(plain_tokenizer, tmp_path, rows).report["train"]["sha256"]
    assert load_rows(plain_tokenizer, tmp_path, [{**row, "idx": 1} for row in rows]).report["train"]["sha256"] == first
    assert load_rows(plain_tokenizer, tmp_path, rows[::-1]).report["train"]["sha256"] != first


def test_report_counts_what_the_loss_counts(chat_tokenizer: Any, plain_tokenizer: Any, tmp_path: Path) -> None:
    data = load(chat_tokenizer, train_examples=30, eval_examples=3)
    batch = collate(data.train, chat_tokenizer.pad_token_id)
    assert data.report["train"]["trained_tokens"] == trained_tokens(batch)
    assert data.report["train"]["tokens"] == int(batch["attention_mask"].sum())
    # Nothing predicts a first token, so of "b" and the end of the sequence only the latter counts.
    bare = load_rows(plain_tokenizer, tmp_path, [{"prompt": "", "completion": "b"}])
    assert len(bare.train[0].input_ids) == 2 and bare.report["train"]["trained_tokens"] == 1


# Batches ---------------------------------------------------------------------------------------------


def test_collate_pads_right_and_never_trains_padding() -> None:
    # The padding token is also a trained token here, as in models that pad with end-of-turn.
    batch = collate([Example([5, 6, 2], [IGNORED, 6, 2]), Example([7], [7])], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 2], [7, IGNORED, IGNORED]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert trained_tokens(batch) == 2  # nothing predicts the second example's only token


def test_collate_labels_and_token_types() -> None:
    batch = collate([Example([5, 6], 1, [0, 1]), Example([7], 0, [0])], pad_token_id=0)
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert trained_tokens(batch) == 2


def test_collate_prompts_pads_left() -> None:
    examples = [EvalExample([], [], prompt_ids=[1, 2, 3]), EvalExample([], [], prompt_ids=[4])]
    batch = collate_prompts(examples, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


# Order of examples -----------------------------------------------------------------------------------


def take(n: int, *arguments: int) -> list[list[list[int]]]:
    return list(itertools.islice(window_batches(*arguments), n))


@pytest.mark.parametrize("n", [40, 37, 9, 3])
def test_a_step_sees_the_same_examples_however_it_is_cut(n: int) -> None:
    whole = take(15, n, 5, 8, 8, 0, 1)
    assert all(len(window) == 1 and len(window[0]) == 8 for window in whole)
    for micro, world in ((2, 1), (4, 1), (1, 1), (2, 2), (1, 4), (4, 2), (1, 8)):
        ranks = [take(15, n, 5, 8, micro, rank, world) for rank in range(world)]
        for step, window in enumerate(whole):
            pieces = [micro_batch for rank in ranks for micro_batch in rank[step]]
            assert all(len(piece) == micro for piece in pieces)
            assert all(len(rank[step]) == 8 // (micro * world) for rank in ranks)
            assert sorted(i for piece in pieces for i in piece) == sorted(window[0])


def test_every_epoch_holds_every_example_once_in_a_new_order() -> None:
    stream = [i for window in take(15, 20, 1, 8, 8, 0, 1) for i in window[0]]
    epochs = [stream[i : i + 20] for i in range(0, 120, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream != [i for window in take(15, 20, 2, 8, 8, 0, 1) for i in window[0]]


def test_a_later_start_continues_the_same_stream() -> None:
    straight = take(30, 13, 4, 6, 1, 1, 2)
    for start in (1, 7, 29):
        assert list(itertools.islice(window_batches(13, 4, 6, 1, 1, 2, start), 30 - start)) == straight[start:]


def test_windows_that_cannot_be_cut_are_refused_at_once() -> None:
    for arguments in ((0, 8, 3, 0, 1), (0, 8, 2, 0, 3), (0, 8, 8, 1, 1), (0, 8, 0, 0, 1)):
        with pytest.raises(ValueError):
            Share(*arguments)


def test_the_first_token_has_no_prediction() -> None:
    """Three labels of the first row and one of the second have a loss: a first token is predicted from nothing."""
    ignored = -100
    labels = torch.tensor([[5, 6, 7, 8], [5, 9, ignored, ignored]])
    assert trained_tokens({"labels": labels}) == 4
    assert trained_tokens({"labels": torch.tensor([0, 1, 1])}) == 3  # classes: one each


def examples(task: str) -> list[Example]:
    """Examples of different lengths, some of whose labels are not trained."""
    ids = [list(range(2, 4 + n % 5)) for n in range(13)]
    if task == "regression":
        return [Example(one, float(n), [0] * len(one)) for n, one in enumerate(ids)]
    if task == "classes":
        return [Example(one, n % 3) for n, one in enumerate(ids)]
    return [
        Example(one, [IGNORED if n % 2 and i < 2 else token for i, token in enumerate(one)])
        for n, one in enumerate(ids)
    ]


@pytest.mark.parametrize("task", ["causal", "classes", "regression"])
@pytest.mark.parametrize("workers", [0, 2])
def test_windows_are_what_the_order_of_batches_says(task: str, workers: int) -> None:
    """Each rank's batches in order, from any step on; the counts are over all ranks."""
    data, world = examples(task), 2
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loaded = [list(load_windows(data, 4, Share(0, 8, 2, rank, world), 3, 9, workers)) for rank in range(world)]
    assert torch.equal(torch.get_rng_state(), before)
    orders = [window_batches(len(data), 4, 8, 2, rank, world, 3) for rank in range(world)]
    for of_ranks in zip(*loaded, strict=True):
        truth = [[collate([data[i] for i in indices], 0) for indices in next(order)] for order in orders]
        masked = [int(batch["attention_mask"].sum()) for own in truth for batch in own]
        counted = [[trained_tokens(batch) for batch in own] for own in truth]
        for window, batches in zip(of_ranks, truth, strict=True):
            assert window.tokens == sum(masked)
            assert window.targets == sum(map(sum, counted))
            assert len(window.batches) == len(batches)
            for number, (found, batch) in enumerate(zip(on_device(window.batches, "cpu"), batches, strict=True)):
                assert found.keys() == batch.keys()
                if task == "causal":
                    labels, targets = batch.pop("labels"), found.pop("labels")
                    expected = find_targets(labels)
                    assert targets.most == max(own[number] for own in counted)
                    for name in ("kept", "rows", "values"):
                        assert torch.equal(getattr(targets, name), getattr(expected, name))
                for name, tensor in batch.items():
                    assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_workers_survive_the_signals_that_ask_a_run_to_stop() -> None:
    others = multiprocessing.active_children()  # of other tests in this process
    windows = load_windows(examples("causal"), 4, Share(0, 2, 2, 0, 1), 0, 30, 1)
    first = next(windows)
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    assert len([first, *windows]) == 30
