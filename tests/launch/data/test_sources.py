"""Reading: files whose values stay as they are, splits, broken files, and sets of the Hub."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest

from hift_ds.launch.errors import UserError
from tests.support.data_fixtures import load, trained_texts, write_jsonl

# Files -----------------------------------------------------------------------------------------------


# What readers that guess types change.
TRICKY = [
    {"prompt": "2021-01-01", "completion": "2021-01-02T00:00:00"},
    {"prompt": "null", "completion": "007"},
    {"prompt": "NaN", "completion": "1.50"},
    {"prompt": "true", "completion": 'say "a,b"\tnow'},
    {"prompt": "l\u2028\x85s", "completion": "ünï"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json list", "csv", "tsv", "parquet"])
def test_values_of_files_are_not_changed(kind: str, plain_tokenizer: Any, tmp_path: Path) -> None:
    name = kind.split()[0]
    path = tmp_path / f"file.{name}"
    if kind == "json list":
        path.write_text(json.dumps(TRICKY, indent=1), encoding="utf-8")
    elif name in ("json", "jsonl"):
        path.write_text("\ufeff\n" + "\n\n".join(json.dumps(row) for row in TRICKY), encoding="utf-8")
    elif name == "parquet":
        datasets.Dataset.from_list(TRICKY).to_parquet(path)
    else:
        options = {"sep": "\t"} if name == "tsv" else {}
        datasets.Dataset.from_list(TRICKY).to_pandas().to_csv(path, index=False, **options)
    data = load(plain_tokenizer, name=name, path=str(path))
    expected = [f"{row['prompt']} {row['completion']}<|im_end|>" for row in TRICKY]
    assert [plain_tokenizer.decode(one.input_ids) for one in data.train] == expected
    assert list(data.report["files"]) == [str(path)] and len(data.report["files"][str(path)]) == 64


def test_splits_of_a_folder(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": "x"} for i in range(10)]
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", rows[:4])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", rows[4:7])
    write_jsonl(tmp_path / "test.jsonl", rows[7:])
    folder: dict[str, Any] = {"name": "jsonl", "path": str(tmp_path)}
    data = load(plain_tokenizer, **folder)
    assert [len(data.train), len(data.eval)] == [7, 3] and len(data.report["files"]) == 3
    write_jsonl(tmp_path / "dev.jsonl", rows[8:])
    assert len(load(plain_tokenizer, **folder).eval) == 2  # validation goes before test
    assert len(load(plain_tokenizer, **folder, eval_split="validation").eval) == 2
    assert len(load(plain_tokenizer, **folder, eval_split="test").eval) == 3
    swapped = load(plain_tokenizer, **folder, split="test", eval_split="train", eval_examples=2)
    assert [len(swapped.train), len(swapped.eval), swapped.report["eval"]["rows"]] == [3, 2, 7]
    with pytest.raises(UserError, match="data.eval_split: no file final.*dev.jsonl, test.jsonl, train-00000"):
        load(plain_tokenizer, **folder, eval_split="final")
    with pytest.raises(UserError, match="data.split: no file all.*"):
        load(plain_tokenizer, **folder, split="all")


def test_the_split_to_train_on_is_never_held_out(plain_tokenizer: Any, tmp_path: Path) -> None:
    """Without `eval_split` the search passes over the training split, under each of its names."""
    rows = [{"prompt": str(i), "completion": "x"} for i in range(10)]
    folder: dict[str, Any] = {"name": "jsonl", "path": str(tmp_path)}
    write_jsonl(tmp_path / "train.jsonl", rows[:4])
    assert len(load(plain_tokenizer, **folder).eval) == 0
    write_jsonl(tmp_path / "validation.jsonl", rows[4:7])
    assert len(load(plain_tokenizer, **folder, split="validation").eval) == 0
    with pytest.raises(UserError, match="data.eval_split: 'dev' is .*validation.jsonl, which is trained on"):
        load(plain_tokenizer, **folder, split="val", eval_split="dev")
    write_jsonl(tmp_path / "test.jsonl", rows[7:9])
    data = load(plain_tokenizer, **folder, split="dev")
    assert [len(data.train), len(data.eval)] == [3, 2]


def test_quotation_marks_in_glue_files_are_ordinary(plain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('sentence\tlabel\n"good\t1\nno" , "yes"\t0\n')
    data = load(plain_tokenizer, name="sst2", path=str(tmp_path))
    texts = [plain_tokenizer.decode(one.input_ids) for one in data.train]
    assert texts == ['"good It was great<|im_end|>', 'no" , "yes" It was terrible<|im_end|>']


def test_a_test_part_without_labels_is_not_taken_by_itself(plain_tokenizer: Any, tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b"}
    write_jsonl(tmp_path / "train.jsonl", [{**row, "label": "entailment"}])
    write_jsonl(tmp_path / "test.jsonl", [row])
    assert len(load(plain_tokenizer, name="superglue/rte", path=str(tmp_path)).eval) == 0
    with pytest.raises(UserError, match="test.jsonl:1: label None"):
        load(plain_tokenizer, name="superglue/rte", path=str(tmp_path), eval_split="test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a",\n', r"file:2: broken JSON"),
        ("jsonl", '{"prompt": "a", "completion": "b"}\n\n["a"]\n', r"file:3: expected a JSON object.*\['a'\]"),
        ("json", '[{"prompt": "a"},\n{"prompt" "a"}]', r"file:2: broken JSON"),
        ("json", "[1]", r"file element 1: expected a JSON object"),
        ("jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n', r"file:2: .*it is 3"),
        ("jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r"file:2: .*the columns are prompt"),
        ("jsonl", '{"question": "a", "answer": "b"}\n', r"found are answer, question; .*data.columns"),
        ("jsonl", "", "has no rows"),
        ("jsonl", "\n \n", "has no rows"),
        ("json", "[]", "has no rows"),
        ("csv", "", "has no rows"),
        ("csv", "prompt,completion\n", "has no rows"),
        ("csv", "prompt,completion\na,b\na,b,c\n", r"file:3: 3 values for 2 columns"),
        ("csv", "prompt,completion\na,b,c\n", r"file:2: 3 values for 2 columns"),
        ("csv", "prompt,completion\na,b\na\n", r"file:3: 1 values for 2 columns"),
        ("csv", 'prompt,completion\na,"b\n', r"file:2: broken table"),
        ("csv", "prompt,prompt\na,b\n", r"file:1: a column name occurs twice"),
        ("parquet", "not parquet", "file: cannot be read as parquet"),
    ],
)
def test_broken_files_are_named_with_their_line(
    name: str, text: str, message: str, plain_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(plain_tokenizer, name=name, path=str(tmp_path / "file"))


ROW = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("jsonl", ROW + b'{"prompt": "a\xff"}\n', "file:2: the byte 0xff is not UTF-8.*iconv"),
        ("json", b'[{"prompt": "a"},\n{"prompt": "\xed\xa0\xbd"}]', "file:2: the byte 0xed is not UTF-8"),
        ("csv", b"prompt,completion\ncaf\xe9,b\n", "file:2: the byte 0xe9 is not UTF-8"),
        ("jsonl", ROW.decode().encode("utf-16"), "file: the text is UTF-16.*iconv"),
        ("jsonl", ROW.decode().encode("utf-16-le"), "file:1: broken JSON"),
        ("jsonl", gzip.compress(ROW * 99, mtime=0)[:-9], "file: cannot be read as text: Compressed file ended"),
        ("jsonl", b"PK\x03\x04", "file: cannot be read as text"),
        ("csv", b"prompt,completion\na,b\n\xef\xbb\xbfprompt,completion\n", "file:3: a byte-order mark in the middle"),
        ("jsonl", ROW + rb'{"prompt": "Say \ud83d", "completion": "b"}', r"file:2: .*half of a surrogate.*\\ud83d, "),
        ("jsonl", ROW + rb'{"prompt": "a", "completion": "\udc00\ud83d"}', r"file:2: .*half of a surrogate.*\\udc00"),
        ("json", rb'[{"prompt": "a", "other": [{"\ud83d": 1}]}]', "file element 1: .*half of a surrogate"),
        ("jsonl", ROW + b'{"prompt": "a", "prompt": "b"}', "file:2: .*the key 'prompt' occurs twice"),
        ("jsonl", ROW + b'{"prompt": "a", "m": [{"x": 1, "x": 2}]}', "file:2: .*the key 'x' occurs twice"),
        ("jsonl", ROW + b'{"prompt": ' + b"9" * 5000 + b"}", "file:2: .*4300 digits.*correct the value"),
        ("jsonl", ROW + b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "file:2: .*nested too deeply"),
        ("jsonl", ROW + b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "file:2: .*nested more than 100 levels"),
        ("json", b"[" * 10**5, "file: .*nested too deeply"),
        ("jsonl", b'{"prompt": "a\x00"}', "file:1: broken JSON"),
        (
            "jsonl",
            ROW + b'{"prompt": NaN, "completion": "b"}',
            "file:2: expected a text in column 'prompt', but it is nan",
        ),
    ],
)
def test_what_no_tokenizer_can_read_is_named_with_its_line(
    name: str, content: bytes, message: str, plain_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(plain_tokenizer, name=name, path=str(tmp_path / "file"))


@pytest.mark.parametrize(
    "content",
    [
        ROW.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + ROW + b"\xef\xbb\xbf" + ROW,  # joined files
        gzip.compress(ROW, mtime=0),
        ROW.replace(b'"}', b'", "other": NaN, "more": 1e999}'),
        rb'{"prompt": "a", "completion": "b", "other": "\ud83d\ude00 \u0000"}',
    ],
)
def test_what_looks_broken_and_is_not(content: bytes, plain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    data = load(plain_tokenizer, name="jsonl", path=str(tmp_path / "file"))
    assert {plain_tokenizer.decode(one.input_ids) for one in data.train} == {"a b<|im_end|>"}


def test_parquet_columns_of_other_kinds(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "when": datetime(2026, 1, 1), "raw": b"\xff", "tags": ["x"]}]
    path = tmp_path / "file.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    data = load(plain_tokenizer, name="parquet", path=str(path))
    assert "train: columns not used: when, raw, tags" in data.report["notes"]
    for column in ("when", "raw", "tags"):
        with pytest.raises(UserError, match=f"file.parquet row 1: expected a text in column '{column}'"):
            load(plain_tokenizer, name="parquet", path=str(path), columns={"completion": column})


# The Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets` takes a folder of the same name for the Hub's repository: its own code, without the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(identity: str, subset: str, splits: dict[str, list[Any]]) -> None:
        folder = tmp_path / identity
        folder.mkdir(parents=True)
        files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n")
        for split, rows in splits.items():
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")

    return make


def test_hub_sets(hub_folder: Any, plain_tokenizer: Any) -> None:
    solution = {"question": "1 + 1?", "answer": "2\n#### 2"}
    hub_folder("openai/gsm8k", "main", {"train": [solution] * 3, "test": [solution]})
    data = load(plain_tokenizer, name="gsm8k")
    assert (len(data.train), len(data.eval), data.report["files"]) == (3, 1, {})

    # The Hub's SuperGLUE has numbers for labels and flat rows.
    entailed = {"premise": "a", "hypothesis": "b", "idx": 0, "label": 0}
    splits = {"train": [entailed], "validation": [{**entailed, "label": 1}], "test": [{**entailed, "label": -1}]}
    hub_folder("aps/super_glue", "rte", splits)
    data = load(plain_tokenizer, name="superglue/rte")
    assert [one.accepted for one in data.eval] == [("No",)]
    assert trained_texts(plain_tokenizer, data.train[0]) == [" Yes<|im_end|>"]
    with pytest.raises(UserError, match=r"aps/super_glue \(rte\) test row 1: label -1; .*name another split"):
        load(plain_tokenizer, name="superglue/rte", eval_split="test")

    hub_folder("me/chats", "default", {"train": [{"prompt": "a", "completion": "b"}]})
    assert len(load(plain_tokenizer, name="me/chats").train) == 1
    assert len(load(plain_tokenizer, name="me/chats").eval) == 0
    with pytest.raises(UserError, match="data.split: me/chats has no split 'all'; it has train"):
        load(plain_tokenizer, name="me/chats", split="all")
    with pytest.raises(UserError, match=r"me/chats \(none\) cannot be loaded.*data.subset"):
        load(plain_tokenizer, name="me/chats", subset="none")


def test_the_hubs_split_to_train_on_is_never_held_out(hub_folder: Any, plain_tokenizer: Any) -> None:
    row = {"prompt": "a", "completion": "b"}
    hub_folder("me/chats", "default", {"train": [row], "validation": [row] * 2, "test": [row] * 3})
    assert len(load(plain_tokenizer, name="me/chats", split="validation").eval) == 3
    with pytest.raises(UserError, match="data.eval_split: 'validation' of me/chats is trained on"):
        load(plain_tokenizer, name="me/chats", split="val", eval_split="dev")


def test_an_unreachable_hub_is_said_clearly(plain_tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hub cannot be reached for stanfordnlp/sst2.*give the publisher's files"):
        load(plain_tokenizer, name="sst2")
    with pytest.raises(UserError, match="Hub cannot be reached for me/mine.*use files"):
        load(plain_tokenizer, name="me/mine")
