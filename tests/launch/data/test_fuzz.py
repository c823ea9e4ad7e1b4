"""Rows with values of wrong kinds at any place: they are trained, or refused with their file and line."""

from __future__ import annotations

import copy
import datetime
import decimal
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hift_ds.launch.data import loading, sources
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.launch.data.test_chat import CALL, LATEST_REASONING, OPENED_REASONING, TOOL, WITH_TOOLS
from tests.support.data_fixtures import CHATML_WITHOUT_MARKERS, bpe, load

# What JSON can hold, and what only Python objects from Parquet can.
JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, 1e300, float("nan"), float("inf"), 10**30, -(10**30),
    "", " ", "\n", "text", "0", "1", "-1", "\u00b2", "9" * 5000, "\0", "\ud83d", "\ufeff", "<|im_end|>", "<eos>",
    "{{ x }}", "{% raw %}", "<think>", "</think>", "x" * 3000, "user", "assistant", "tool", "[1", "[]",
    "[" * 500 + "]" * 500, '[{"a": 1}]',
    [], [None], [1], ["a"], [[]], [{}], {}, {"a": 1}, {"": None}, {"type": "text", "text": "a"}, [{"type": "image"}],
    {"a": {"b": [{"c": None}]}}, [[[[[[]]]]]],
)  # fmt: skip
OBJECTS = (
    *(value for value in JSON_VALUES if value != "\ud83d"),  # Parquet's texts are UTF-8
    b"\xff", datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), datetime.timedelta(1), decimal.Decimal("1.5"),
)  # fmt: skip
KEYS = (
    "role", "content", "weight", "train", "name", "from", "value", "tools", "tool_calls", "function_call", "function",
    "arguments", "reasoning_content", "thinking", "tool_call_id", "type", "text", "prompt", "completion",
    "input", "instruction", "output", "messages", "conversations", "label", "text_pair", "", "items", "keys",
)  # fmt: skip

CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
    {"role": "assistant", "content": "b", "reasoning_content": "B", "train": True},
]
PLAIN_CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
QUERY = {"query": "is @placeholder here", "answers": [{"text": "Ann", "start": 0, "end": 2}]}
QUESTION = {"question": "who", "answers": [{"text": "x", "label": 1}]}
# (data.name, a good row)
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("jsonl", {"prompt": "a", "completion": "b", "source": {"url": ["x"]}}),
    ("jsonl", {"instruction": "a", "input": "c", "output": "b"}),
    ("jsonl", {"messages": CHAT, "tools": [TOOL]}),
    ("jsonl", {"messages": PLAIN_CHAT}),
    ("jsonl", {"conversations": SHAREGPT}),
    ("jsonl", {"text": "a", "text_pair": "b", "label": "x"}),
    ("jsonl", {"text": "a", "label": 1}),
    ("gsm8k", {"question": "a", "answer": "b\n#### 3"}),
    ("superglue/rte", {"premise": "a", "hypothesis": "b", "label": "entailment"}),
    ("superglue/boolq", {"passage": "a", "question": "b", "label": True}),
    ("superglue/wic", {"word": "a", "sentence1": "b", "sentence2": "c", "label": 0}),
    ("superglue/wsc", {"text": "a b", "target": {"span1_text": "a", "span2_text": "b"}, "label": True}),
    ("superglue/copa", {"premise": "a.", "choice1": "B", "choice2": "C", "question": "cause", "label": 1}),
    ("superglue/record", {"passage": {"text": "Ann", "entities": [{"start": 0, "end": 2}]}, "qas": [QUERY]}),
    ("superglue/record", {"passage": "Ann", "query": "@placeholder", "answers": ["Ann"], "entities": ["Ann"]}),
    ("superglue/multirc", {"passage": {"text": "a", "questions": [QUESTION]}}),
)
TOKENIZERS = (None, CHATML_WITHOUT_MARKERS, WITH_TOOLS, LATEST_REASONING, OPENED_REASONING, "byte")
SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))]
A_SEED = 150


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value inside lists and objects."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for _ in path[:1]] + [place for key, one in inner for place in places(one, (*path, key))]


def spoilt(draw: random.Random, row: dict[str, Any], values: tuple[Any, ...]) -> dict[str, Any]:
    """A copy of a row in which one to three places are changed."""
    row = copy.deepcopy(row)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        path = draw.choice(places(row) or [("new",)])
        above: Any = row
        for key in path[:-1]:
            above = above[key]
        key, value = path[-1], copy.deepcopy(draw.choice(values))
        change = draw.randrange(6)
        if change == 0 and key in range(len(above)) if isinstance(above, list) else change == 0 and key in above:
            del above[key]
        elif change == 1 and isinstance(above, dict):
            above[draw.choice(KEYS)] = value
        elif change == 2 and isinstance(above, dict):
            above[draw.choice(KEYS)] = above.pop(key, None)
        elif change == 3 and isinstance(above, list):
            above.insert(draw.randrange(len(above) + 1), value)
        else:
            above[key] = value
    return row


def as_line(draw: random.Random, row: dict[str, Any]) -> str:
    """A row as a line of JSON, sometimes with a character that is missing, or another one."""
    line = json.dumps(row, ensure_ascii=draw.random() < 0.7).encode("utf-8", "replace").decode()
    if draw.random() < 0.1:
        at = draw.randrange(len(line))
        line = (
            line[:at] + draw.choice(["", '"', "{", "]", "\\", "\0", "\ufeff", "1" * 5000, "[" * 2000]) + line[at + 1 :]
        )
    return line


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_any_kind_are_trained_or_refused_with_their_line(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    tokenizers: list[Any] = [byte_tokenizer() if one == "byte" else bpe(one) for one in TOKENIZERS]
    outcomes = {"trained": 0, "refused": 0}
    for number in range(A_SEED):
        name, good = draw.choice(ROWS)
        # Tools need a template that writes them, and classes another task.
        tokenizer = tokenizers[2] if "tools" in good and draw.random() < 0.9 else draw.choice(tokenizers)
        objects = draw.random() < 0.3  # as from Parquet
        bad = spoilt(draw, good, OBJECTS if objects else JSON_VALUES)
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "train.jsonl"
        settings: dict[str, Any] = {
            "name": name,
            "path": str(folder),
            "template": draw.choice([None, None, None, False]),
        }
        if "text" in good and name == "jsonl" or "label" in good and draw.random() < 0.3:
            settings["task"] = "sequence-classification"
        if objects:
            path.write_text("-")
            rows = [(f"{path} row {i}", row) for i, row in enumerate((good, bad, good), 1)]
            reading = mock.patch.object(loading, "read_file", lambda *_, rows=rows: copy.deepcopy(rows))
        else:
            lines = [json.dumps(good), as_line(draw, bad), json.dumps(good)]
            path.write_text("\n".join(lines), encoding="utf-8")
            # The reader of `datasets` takes 20 ms, which would be most of this test.
            reading = mock.patch.object(
                sources, "read_lines", lambda path: path.read_text(encoding="utf-8").splitlines(keepends=True)
            )
        shown = f"seed {seed}, row {number}: {name} {bad!r}"
        try:
            with reading:
                data = load(tokenizer, **settings)
        except UserError as error:
            outcomes["refused"] += 1
            message = str(error)
            assert re.search(r"train\.jsonl(:\d+| row \d+)|^data[.:]", message), f"{shown}\n{message}"
            assert len(message) < 2500, f"{shown}\n{message}"
        except Exception as error:
            raise AssertionError(shown) from error
        else:
            outcomes["trained"] += 1
            json.dumps(data.report)
            assert data.train and all(len(note) < 2500 for note in data.report["notes"]), shown
    assert min(outcomes.values()) > A_SEED / 10, outcomes


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A file in which up to three bytes or pieces are changed, doubled or missing."""
    pieces = [
        b"",
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"\xed\xa0\xbd",
        b"\xef\xbb\xbf",
        b"{",
        b"]",
        b"\\",
        b"\t",
        b"NaN",
    ]
    for _ in range(draw.randrange(4)):
        start = draw.randrange(len(content))
        stop = min(len(content), start + draw.choice((0, 0, 1, 1, 5, 40)))
        content = content[:start] + draw.choice([*pieces, content[start:stop] * 2]) + content[stop:]
    return draw.choice(
        [content, content, content, content.decode("latin-1").encode("utf-16"), gzip.compress(content)[:-3]]
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_damaged_files_are_read_or_refused_by_name(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    rows = [
        {"prompt": "a", "completion": "b", "source": 'x, "y"'},
        {"prompt": "ü", "completion": "c", "source": ""},
    ] * 2
    whole = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, indent=1),
        "csv": 'prompt,completion,source\na,b,"x, ""y"""\nü,"c\nd",\n',
        "tsv": "prompt\tcompletion\tsource\na\tb\tx\nü\tc\t\n",
    }
    read = 0
    for number in range(40):
        kind = draw.choice([*whole, "parquet"])
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(damaged(draw, whole.get(kind, "PAR1 no table PAR1").encode()))
        try:
            load(bpe(), name=kind, path=str(path))
            read += 1
        except UserError as error:
            message = str(error)
            assert f"{path}" in message or re.match("data[.:]", message), f"seed {seed}, file {number}: {message}"
        except Exception as error:
            raise AssertionError(f"seed {seed}, file {number}: {path.read_bytes()!r}") from error
    assert 0 < read < 40
