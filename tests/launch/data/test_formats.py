"""Formats: columns, messages and labels of a user's rows, and published sets as prompts or labels."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest

from hift_ds.launch.data.formats import converter
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.launch.data.test_chat import WITH_TOOLS
from tests.support.data_fixtures import (
    SHARED,
    TWO_TURNS,
    bpe,
    classify,
    load,
    load_rows,
    needs_shared,
    trained_texts,
    write_jsonl,
)

# Columns ---------------------------------------------------------------------------------------------


def test_columns_are_renamed(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "not this", "question": "a", "answer": "b", "idx": 3}]
    data = load_rows(plain_tokenizer, tmp_path, rows, columns={"prompt": "question", "completion": "answer"})
    assert plain_tokenizer.decode(data.train[0].input_ids) == "a b<|im_end|>"


def test_columns_that_do_not_fit(plain_tokenizer: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    both = [{"messages": TWO_TURNS, "prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match="data.format: the columns fit prompt-completion and chat"):
        load_rows(chat_tokenizer, tmp_path, both)
    assert load_rows(chat_tokenizer, tmp_path, both, format="chat").report["format"] == "chat"
    with pytest.raises(UserError, match="data.columns: prompt: 'promt'.*did you mean 'prompt'"):
        load_rows(plain_tokenizer, tmp_path, both, columns={"prompt": "promt"})
    with pytest.raises(UserError, match="data.columns: prompt is not used by chat"):
        load_rows(chat_tokenizer, tmp_path, both, format="chat", columns={"prompt": "prompt"})
    with pytest.raises(UserError, match=r"expected text and label \(text-label\)"):
        load_rows(plain_tokenizer, tmp_path, both, format="text-label", task="sequence-classification")
    with pytest.raises(UserError, match="does not fit model.task 'sequence-classification'.*causal-lm"):
        load_rows(plain_tokenizer, tmp_path, both, task="sequence-classification")
    with pytest.raises(UserError, match="does not fit model.task 'causal-lm'.*sequence-classification"):
        load_rows(plain_tokenizer, tmp_path, [{"text": "a", "label": 0}])


def test_known_columns_of_another_format_do_not_matter(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": 0, "conversations": []},
        {"text": "b", "label": 1, "instruction": "c", "output": "d"},
    ]
    assert len(classify(plain_tokenizer, tmp_path, rows).train) == 2
    with pytest.raises(UserError, match="data.columns: messages is not used by text-label"):
        classify(plain_tokenizer, tmp_path, rows, columns={"messages": "conversations"})


# Messages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a list of messages.*'hello'"),
        ([], "expected a list of messages"),
        (["hello"], "message 1 must be"),
        ([{"from": "human"}], "message 1 must be"),
        ([{"from": 1, "value": "x"}], "message 1 must be"),
        ([{"from": "human", "value": 1}], "message 1 must be"),
        ([{"role": None, "content": "x"}], "message 1 must be"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "message 1 must be.*list of parts"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "message 1 must be"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "message 2 must be"),
        ([{"role": "user", "content": "x"}, {"role": "assistant"}], "message 2 must be"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "message 1: weight is 0.5; expected 0"),
        ([{"role": "assistant", "content": "x", "weight": "0"}], "message 1: weight is '0'; expected 0"),
        ([{"role": "assistant", "content": "x", "train": "no"}], "message 1: train is 'no'; expected true or false"),
        ([{"role": "assistant", "content": "x", "train": True, "weight": 0}], "contradict each other"),
        ([{"role": "user", "content": "x", "train": True}], "message 1 has the role 'user' and is marked"),
        ([{"role": "assistant", "content": "x", "reasoning_content": ["y"]}], "reasoning_content must be a text"),
        ([{"role": "assistant", "content": "x", "tool_calls": {"name": "f"}}], "tool_calls must be a list"),
    ],
)
def test_bad_messages_are_named(messages: Any, message: str, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": TWO_TURNS}, {"messages": messages}]
    with pytest.raises(UserError, match=rf"rows.jsonl:2: .*{message}"):
        load_rows(chat_tokenizer, tmp_path, rows)


@pytest.mark.parametrize("tools", ["f", "{}", 3, ["f"], '["f"]'])
def test_bad_tool_definitions_are_named(tools: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows.jsonl:1: column 'tools' must be a list"):
        load_rows(chat_tokenizer, tmp_path, [{"messages": TWO_TURNS, "tools": tools}])


SHAREGPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b", "weight": 1},
    {"from": "human", "value": "c"},
    {"from": "gpt", "value": "d", "weight": 0},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": ["c"]},
]


@pytest.mark.parametrize(
    ("row", "settings", "text"),
    [
        ({"conversations": SHAREGPT}, {}, "system\ns|user\na|assistant\nb"),
        ({"messages": SHAREGPT}, {}, "system\ns|user\na|assistant\nb"),
        ({"chat": SHAREGPT}, {"columns": {"messages": "chat"}}, "system\ns|user\na|assistant\nb"),
        ({"messages": PARTS}, {}, "user\na\nb|assistant\nc"),
    ],
)
def test_spellings_of_messages(
    row: Any, settings: dict[str, Any], text: str, chat_tokenizer: Any, tmp_path: Path
) -> None:
    data = load_rows(chat_tokenizer, tmp_path, [row], **settings)
    read = chat_tokenizer.decode(data.train[0].input_ids)
    assert read.replace("<|im_end|>\n<|im_start|>", "|") == f"<|im_start|>{text}<|im_end|>"
    assert not any("not used" in note for note in data.report["notes"])


def test_parquet_gives_each_message_the_keys_of_all(chat_tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    more = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "at": datetime(2026, 1, 1)}]
    datasets.Dataset.from_list([{"messages": messages + more}]).to_parquet(tmp_path / "rows.parquet")
    data = load(chat_tokenizer, name="parquet", path=str(tmp_path / "rows.parquet"))
    assert trained_texts(chat_tokenizer, data.train[0]) == ["d<|im_end|>"]
    assert any("keys of messages that are not used" in note and "at (1)" in note for note in data.report["notes"])


def test_parquet_gives_each_call_the_arguments_of_all(tmp_path: Path) -> None:
    """The nulls between them are not what the model should write or read."""
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        for function in (
            {"name": "add", "arguments": {"x": 1}},
            {"name": "look", "arguments": {"city": "Bonn", "days": [{"n": 1}, {"name": "May"}]}},
        )
    ]
    tools = [
        {"name": "add", "parameters": {"x": {"type": "int"}}},
        {"name": "look", "parameters": {"city": {"enum": []}}},
    ]
    ask = {"role": "user", "content": "a"}
    table = datasets.Dataset.from_list([{"messages": [ask, calls[0], ask, calls[1]], "tools": tools}])
    table.to_parquet(tmp_path / "rows.parquet")
    tokenizer = bpe(WITH_TOOLS)
    data = load(tokenizer, name="parquet", path=str(tmp_path / "rows.parquet"))
    assert trained_texts(tokenizer, data.train[0]) == [
        '<call>add{"x": 1}<|im_end|>',
        '<call>look{"city": "Bonn", "days": [{"n": 1}, {"name": "May"}]}<|im_end|>',
    ]
    assert "null" not in tokenizer.decode(data.train[0].input_ids)


# Columns that are not used, and those of Alpaca ------------------------------------------------------


@pytest.mark.parametrize("columns", [{}, {"prompt": "instruction", "completion": "output"}])
def test_alpacas_input_belongs_to_the_prompt(columns: dict[str, str], plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "Good day", "output": "Bonjour"},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
        {"instruction": "Say no.", "output": "No"},
        {"instruction": "Say yes.", "input": None, "output": "Yes"},
    ]
    data = load_rows(plain_tokenizer, tmp_path, rows, columns=columns)
    texts = [plain_tokenizer.decode(one.input_ids).removesuffix("<|im_end|>") for one in data.train]
    assert texts == ["Translate.\nGood day Bonjour", "Say hi. Hi", "Say no. No", "Say yes. Yes"]
    assert any("data.columns: {prompt: instruction, completion: output, input: input} is used" in note
               for note in data.report["notes"])  # fmt: skip
    with pytest.raises(UserError, match="rows.jsonl:2: expected a text in column 'input', but it is 3"):
        load_rows(plain_tokenizer, tmp_path, [rows[0], {**rows[0], "input": 3}])


def test_an_input_of_other_columns_is_used_where_it_is_mapped(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": "a", "context": "c", "answer": "b"}]
    columns = {"prompt": "question", "input": "context", "completion": "answer"}
    data = load_rows(plain_tokenizer, tmp_path, rows, columns=columns)
    assert plain_tokenizer.decode(data.train[0].input_ids) == "a\nc b<|im_end|>"
    assert not any("not used" in note or "data.columns" in note for note in data.report["notes"])
    own = load_rows(plain_tokenizer, tmp_path, [{"prompt": "a", "completion": "b", "input": "c"}])
    assert plain_tokenizer.decode(own.train[0].input_ids) == "a b<|im_end|>"
    assert "train: columns not used: input" in own.report["notes"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_columns_that_are_not_used_are_named_once(kind: str, plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": "x", "source": "web", "": "y"} for i in range(3)]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        write_jsonl(path, rows)
    notes = load(plain_tokenizer, name=kind, path=str(path)).report["notes"]
    assert [note for note in notes if "not used" in note] == ["train: columns not used: source, ''"]


def test_columns_of_some_rows_are_named_with_a_row(plain_tokenizer: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1, "note": None}, {"text": "c", "label": 1, "note": "d"}]
    path = write_jsonl(tmp_path / "eval.jsonl", [{**rows[0], "split": "x", "text_pair": "y"}])
    notes = classify(plain_tokenizer, tmp_path, rows, eval_path=str(path)).report["notes"]
    named = [note.replace(str(tmp_path), "") for note in notes if "not used" in note]
    assert named == [
        "train: columns not used: note (in 1 of 3 rows, the first is /rows.jsonl:3)",
        "eval: columns not used: split",
    ]
    chat = load_rows(chat_tokenizer, tmp_path, [{"messages": TWO_TURNS, "system": "be good", "tools": []}])
    assert [note for note in chat.report["notes"] if "not used" in note] == ["train: columns not used: system"]


# Labels ----------------------------------------------------------------------------------------------


def test_labels_of_users_files(plain_tokenizer: Any, tmp_path: Path) -> None:
    names = classify(plain_tokenizer, tmp_path, [{"text": "a", "label": one} for one in ("pos", "neg", "pos")])
    assert names.report["labels"] == ["neg", "pos"] and [one.labels for one in names.train] == [1, 0, 1]
    numbers = classify(plain_tokenizer, tmp_path, [{"text": "a", "label": one} for one in (2, 0, True)])
    assert numbers.report["labels"] == ["0", "1", "2"] and [one.labels for one in numbers.train] == [2, 0, 1]
    floats = classify(plain_tokenizer, tmp_path, [{"text": "a", "label": one} for one in (1.0, 0.0)])
    assert [one.labels for one in floats.train] == [1, 0]
    (tmp_path / "t.csv").write_text("sentence,label\nyes,1\nno,0\n")
    table = load(
        plain_tokenizer,
        task="sequence-classification",
        name="csv",
        path=str(tmp_path / "t.csv"),
        columns={"text": "sentence"},
    )
    assert [one.labels for one in table.train] == [1, 0]
    assert table.report["train"]["trained_tokens"] == 2 and table.report["template"] is False


def test_held_out_labels(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": one} for one in ("x", "y", "z")]
    path = write_jsonl(tmp_path / "eval.jsonl", rows[1:])
    data = classify(plain_tokenizer, tmp_path, rows, eval_path=str(path))
    assert [(one.labels, one.reference, one.prompt) for one in data.eval] == [(1, "y", "a"), (2, "z", "a")]
    score = data.score([1, 0], data.eval)
    assert (score.metric, score.correct, score.n) == ("accuracy", 1, 2)
    write_jsonl(path, [{"text": "a", "label": "new"}])
    with pytest.raises(UserError, match=r"eval.jsonl:1: label 'new'.*one of the names in training \(x, y, z\)"):
        classify(plain_tokenizer, tmp_path, rows, eval_path=str(path))


@pytest.mark.parametrize("label", [-1, 0.5, None, "one", [1], 10**6, 10**50, "9" * 5000])
def test_labels_that_are_none(label: Any, plain_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:2: label .*expected a whole number from 0"):
        classify(plain_tokenizer, tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": label}])


# Published sets --------------------------------------------------------------------------------------


@needs_shared
def test_gsm8k_files(chat_tokenizer: Any) -> None:
    gsm8k: dict[str, Any] = {"name": "gsm8k", "path": str(SHARED / "gsm8k")}
    data = load(chat_tokenizer, **gsm8k, train_examples=50, eval_examples=20, max_length=2000)
    assert (data.report["train"]["rows"], data.report["eval"]["rows"]) == (7473, 1319)
    assert (len(data.train), len(data.eval)) == (50, 20) and data.report["train"]["truncated"] == 0
    score = data.score([one.reference for one in data.eval], data.eval)
    assert (score.metric, score.correct, score.n) == ("exact_match", 20, 20)
    assert trained_texts(chat_tokenizer, data.eval[0]) == [data.eval[0].reference + "<|im_end|>"]


@needs_shared
def test_sst2_files(plain_tokenizer: Any) -> None:
    sst2: dict[str, Any] = {"name": "SST2", "path": str(SHARED / "sst2"), "train_examples": 100, "eval_examples": 100}
    data = load(plain_tokenizer, **sst2)
    assert (data.report["train"]["rows"], data.report["eval"]["rows"]) == (60614, 872)
    assert data.report["format"] == "prompt-completion"
    assert {trained_texts(plain_tokenizer, one)[0] for one in data.train} == {" great<|im_end|>", " terrible<|im_end|>"}
    labels = load(plain_tokenizer, task="sequence-classification", **sst2)
    assert labels.report["labels"] == ["0", "1"] and len(labels.train) == 100
    for words, ids in zip(data.eval, labels.eval, strict=True):
        assert words.prompt == f"{ids.prompt} It was"
        assert words.accepted == (("terrible", "great")[ids.labels],)
    assert data.score([one.reference.upper() for one in data.eval], data.eval).value == 1.0
    assert labels.score([one.labels for one in labels.eval], labels.eval).value == 1.0


# The first training prompt and completion of each task, checked by hand against the paper's Table 13.
FIRST = {
    "RTE": ('No Weapons of Mass Destruction Found in Iraq Yet. Does this mean that "Weapons of Mass Destruction Found '
            'in Iraq." is true? Yes or No?', "No"),
    "CB": ('noticed anything was amiss. Can we infer that "something was amiss"? Yes, No, or Maybe?', "Yes"),
    "BoolQ": ("was released on March 31, 2017. is ghost in the shell based on the anime?", "No"),
    "WSC": ('easier to pronounce. In the previous sentence, does the pronoun "it" refer to Tina? Yes or No?', "Yes"),
    "WiC": ('Does the word "feel" have the same meaning in these two sentences? Yes, No? You make me feel naked. She '
            "felt small and insignificant.", "Yes"),
    "MultiRC": ("Question: How does Jason react to the stranger who arrives with Susan? I found this answer \"He "
                'welcomes him with open arm". Is that correct? Yes or No?', "No"),
    "COPA": ("The chandelier shattered on the floor because", "the chandelier dropped from the ceiling."),
    "ReCoRD": ("'The important thing is to give competition to the players, the best thing was that",
               "Olimpija Ljubljana made it difficult."),
}  # fmt: skip
# Rows to answer, and those of the held-out part.
ROWS = {"RTE": (2490, 277), "CB": (32, 56), "WSC": (32, 104), "MultiRC": (154, 0)}


@needs_shared
@pytest.mark.parametrize("folder", FIRST)
def test_superglue_files_as_prompts(folder: str, plain_tokenizer: Any) -> None:
    data = load(plain_tokenizer, name=f"superglue/{folder.lower()}", path=str(SHARED / "superglue"), max_length=10**5)
    counts = {part: data.report[part]["rows"] for part in ("train", "eval")}
    assert tuple(counts.values()) == ROWS.get(folder, (32, 0))
    assert data.report["train"]["skipped_no_target"] == data.report["train"]["truncated"] == 0
    prompt, completion = FIRST[folder]
    assert plain_tokenizer.decode(data.train[0].input_ids).endswith(f"{prompt} {completion}<|im_end|>")
    assert trained_texts(plain_tokenizer, data.train[0]) == [f" {completion}<|im_end|>"]
    if data.eval:
        assert data.score([f" {one.reference}." for one in data.eval], data.eval).value == 1.0
        assert data.score(["", *["Never"] * (len(data.eval) - 1)], data.eval).unanswered == 1


@needs_shared
@pytest.mark.parametrize(
    ("folder", "labels", "ones", "n"),
    [  # how often the label with id 1 occurs, counted in the file itself
        ("RTE", ["entailment", "not_entailment"], 1241, 2490),
        ("CB", ["entailment", "contradiction", "neutral"], 10, 32),
        ("BoolQ", ["false", "true"], 18, 32),
        ("WSC", ["false", "true"], 32, 32),
        ("WiC", ["false", "true"], 17, 32),
        ("MultiRC", ["false", "true"], 68, 154),
    ],
)
def test_superglue_files_as_labels(folder: str, labels: list[str], ones: int, n: int) -> None:
    # The task's own folder, and the one above, are both taken.
    for path in (SHARED / "superglue" / folder, SHARED / "superglue"):
        data = load(
            byte_tokenizer(), name=f"superglue/{folder}", path=str(path), task="sequence-classification", max_length=64
        )
        assert data.report["labels"] == labels and len(data.train) == n
        assert sum(one.labels == 1 for one in data.train) == ones
    if folder == "WSC":  # its held-out file has the labels as texts
        assert sum(one.labels == 1 for one in data.eval) == 38 and len(data.eval) == 104


@needs_shared
@pytest.mark.parametrize("folder", ["COPA", "ReCoRD"])
def test_choices_have_no_labels_to_classify(folder: str, plain_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="does not fit model.task 'sequence-classification'.*causal-lm"):
        load(
            plain_tokenizer,
            name=f"superglue/{folder}",
            path=str(SHARED / "superglue"),
            task="sequence-classification",
        )


def test_record_accepts_every_published_answer(plain_tokenizer: Any, tmp_path: Path) -> None:
    passage = {"text": "Ann met Bo."}
    queries = [{"query": "Was it @placeholder who ran?", "answers": [{"text": "Ann"}, {"text": "Bo"}, {"text": "Ann"}]}]
    for split in ("train", "val"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"passage": passage, "qas": queries}])
    data = load(plain_tokenizer, name="superglue/record", path=str(tmp_path))
    (example,) = data.eval
    assert example.prompt == "Ann met Bo. Was it" and example.accepted == ("Ann who ran?", "Bo who ran?")
    assert data.score(["bo who ran"], data.eval).correct == 1
    assert data.score(["Cy who ran"], data.eval).correct == 0


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "a", "answer": "4"}, "train.jsonl:1: the answer must end in '#### '"),
        (
            "gsm8k",
            {"question": "a", "answer": "#### 4 apples"},
            "a plain number, such as 1,000 or -2.5",
        ),
        ("gsm8k", {"question": "a", "answer": "####4"}, "train.jsonl:1: the answer must end in '#### '"),
        ("gsm8k", {"question": "a"}, "expected a text in column 'answer', but the columns are question"),
        ("superglue/rte", {"premise": "a", "hypothesis": "b"}, "label None; expected entailment, not_entailment"),
        ("superglue/rte", {"premise": "a", "hypothesis": "b", "label": 2}, "label 2; expected"),
        ("superglue/cb", {"premise": "a", "label": "neutral"}, "expected a text in column 'hypothesis'"),
        ("superglue/wsc", {"text": "a", "target": {}, "label": True}, "expected a text in column 'span1_text'"),
        ("superglue/rte", {"premise": "a", "hypothesis": "b", "label": "\u00b2"}, "label '\u00b2'; expected"),
        ("superglue/copa", {"premise": "a", "choice1": "b", "choice2": "c", "question": ["x"], "label": 0}, "'x'"),
        ("superglue/record", {"passage": "a", "query": "@placeholder", "answers": [3]}, "list of texts.*'answers'"),
        ("superglue/record", {"passage": {"text": "a"}, "qas": [{"query": "b", "answers": ["c"]}]}, "as published"),
        ("superglue/multirc", {"passage": {"text": "a"}}, "not a row of superglue/multirc as published"),
        ("superglue/copa", {"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0}, "why"),
        ("superglue/record", {"passage": {"text": "a"}, "qas": [{"query": "b"}]}, "expected a query with"),
    ],
)
def test_rows_not_as_published(name: str, row: Any, message: str, plain_tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=message):
        load(plain_tokenizer, name=name, path=str(tmp_path))


def test_prompts_of_messages_are_explained() -> None:
    """As TRL has them. The remedy leaves the prompt's own answers out of the loss."""
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    with pytest.raises(UserError, match="row 1: .*one column 'messages', with weight: 0"):
        converter("jsonl", "prompt-completion", {})(row, "row 1")
    messages = [prompt[0], prompt[1] | {"weight": 0}, prompt[2], *row["completion"]]
    row = converter("jsonl", "chat", {})({"messages": messages}, "row 1")
    assert [one.get("weight") for one in row["messages"]] == [None, 0, None, None]
