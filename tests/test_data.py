"""Data: reading, formats, masks, truncation, order of batches, and messages for users' mistakes."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from launch import arithmetic
from launch.arithmetic import arithmetic_problems
from launch.data import (
    IGNORED,
    DataSettings,
    EvalExample,
    Example,
    collate,
    collate_prompts,
    load_data,
    trained_tokens,
    window_batches,
)
from launch.errors import UserError
from launch.scores import extract_number
from launch.tokenizer import byte_tokenizer

SHARED = Path(os.environ.get("HIFT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data (../shared/data) is not there")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITHOUT_MARKERS = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def bpe(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE as GPT-2's, with merges over letters, digits and line breaks."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "user assistant system Question Answer the good answer is yes or no 12 34 12 34\n\n\n\nyes it was great"
    backend.train_from_iterator([text] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        **{"pad_token": "<pad>", "eos_token": "<|im_end|>", **special},
    )


@pytest.fixture(scope="module")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return bpe()


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return bpe(CHATML_WITHOUT_MARKERS)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tokenizer: Any, *, task: str = "causal-lm", seed: int = 0, **settings: Any) -> Any:
    return load_data(DataSettings(**settings), tokenizer, task=task, seed=seed)


def load_rows(tokenizer: Any, folder: Path, rows: list[Any], **settings: Any) -> Any:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return load(tokenizer, **{"name": "jsonl", "path": str(path), **settings})


def trained_texts(tokenizer: Any, example: Example) -> list[str]:
    """The text of each stretch of trained tokens, decoded on its own."""
    assert isinstance(example.labels, list) and len(example.labels) == len(example.input_ids)
    pairs = list(zip(example.input_ids, example.labels, strict=True))
    assert all(label in (IGNORED, token) for token, label in pairs)  # not shifted
    stretches = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in stretch]) for trained, stretch in stretches if trained]


# The byte tokenizer -----------------------------------------------------------------------------------


def test_byte_tokenizer_keeps_every_text_and_reloads(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = " Héllo\n\t𝄞 x  y ,z\x00�"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 262 and {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} == {
        0,
        1,
        2,
    }
    assert tokenizer("a<eos>").input_ids[1:] == [tokenizer.eos_token_id]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids and again.decode(ids) == text and again.get_vocab() == tokenizer.get_vocab()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert again.apply_chat_template(turns, tokenize=False) == "<|user|>a<eos><|assistant|>b<eos>"
    assert again.special_tokens_map == tokenizer.special_tokens_map


# Built-in problems ------------------------------------------------------------------------------------


def test_problems_are_right_and_in_gsm8k_format() -> None:
    operators = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    step_counts = set()
    for problem in arithmetic_problems("train", 2000, seed=3):
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", problem["answer"])
        step_counts.add(len(steps))
        known = set(re.findall(r"\d+", problem["question"])) | {"2"}  # "twice"
        for left, sign, right, result in steps:
            assert operators[sign](int(left), int(right)) == int(result) > 0
            assert {left, right} <= known, problem
            known.add(result)
        assert problem["answer"].endswith(f"\n#### {steps[-1][3]}")
        assert extract_number(problem["answer"]) == int(steps[-1][3])
        assert problem["question"].endswith("?")
        assert len(problem["answer"].split()) <= 20
    assert step_counts == {1, 2, 3}


def skeleton(question: str) -> str:
    """A problem without its names and things: the template and the numbers."""
    words = (*arithmetic._NAMES, *arithmetic._THINGS, *arithmetic._PACKS)
    return re.sub("|".join(words), "_", question)


def test_train_and_test_problems_are_disjoint_for_all_seeds() -> None:
    train = {skeleton(one["question"]) for seed in (0, 1) for one in arithmetic_problems("train", 12000, seed)}
    test = {skeleton(one["question"]) for seed in (0, 7) for one in arithmetic_problems("test", 3000, seed)}
    assert len(train) > 5000 and len(test) > 1000
    assert not train & test


def test_problems_are_seeded_distinct_and_varied() -> None:
    problems = arithmetic_problems("train", 3000, seed=1)
    assert problems[:100] == arithmetic_problems("train", 100, seed=1)
    assert problems[:100] != arithmetic_problems("train", 100, seed=2)
    assert len({one["question"] for one in problems}) == 3000
    text = " ".join(one["question"] for one in problems)
    assert all(word in text for word in (*arithmetic._NAMES, *arithmetic._THINGS, *arithmetic._PACKS))
    kinds = {re.sub(r"\d+", "0", skeleton(one["question"])) for one in problems}
    assert len(kinds) == len(arithmetic._TEMPLATES)


def test_arithmetic_data_is_scored(chat_tokenizer: Any, plain_tokenizer: Any) -> None:
    data = load(chat_tokenizer, train_examples=40, eval_examples=10)
    assert len(data.train) == 40 and len(data.eval) == 10
    assert data.report["train"]["used"] == 40 and data.report["files"] == {} and data.report["template"] is True
    score = data.score([one.reference for one in data.eval], data.eval)
    assert (score.metric, score.correct, score.n) == ("exact_match", 10, 10)
    assert data.score(["#### -1"] * 9 + [""], data.eval).correct == 0
    assert data.eval[0].prompt.endswith("?<|im_end|>\n<|im_start|>assistant\n")
    plain = load(plain_tokenizer, train_examples=2, eval_examples=2)
    assert plain.report["template"] is False
    assert re.fullmatch(r"Question: [A-Z].*\?\nAnswer:", plain.eval[0].prompt, re.DOTALL)
    assert plain.report["train"]["sha256"] != load(plain_tokenizer, train_examples=2, seed=1).report["train"]["sha256"]


# Order of examples ------------------------------------------------------------------------------------


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
    for arguments in ((10, 0, 8, 3, 0, 1), (10, 0, 8, 2, 0, 3), (10, 0, 8, 8, 1, 1), (0, 0, 8, 8, 0, 1)):
        with pytest.raises(ValueError):
            window_batches(*arguments)


# Batches ----------------------------------------------------------------------------------------------


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


def test_report_counts_what_the_loss_counts(chat_tokenizer: Any, plain_tokenizer: Any, tmp_path: Path) -> None:
    data = load(chat_tokenizer, train_examples=30, eval_examples=3)
    batch = collate(data.train, chat_tokenizer.pad_token_id)
    assert data.report["train"]["trained_tokens"] == trained_tokens(batch)
    assert data.report["train"]["tokens"] == int(batch["attention_mask"].sum())
    # Nothing predicts a first token, so of "b" and the end of the sequence only the latter counts.
    bare = load_rows(plain_tokenizer, tmp_path, [{"prompt": "", "completion": "b"}])
    assert len(bare.train[0].input_ids) == 2 and bare.report["train"]["trained_tokens"] == 1


# Chat -------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "yes or no?"},
    {"role": "assistant", "content": "yes\n\n12"},
    {"role": "user", "content": "assistant\nuser"},
    {"role": "assistant", "content": "\n it was great \n"},
    {"role": "user", "content": "no one answers"},
]


def test_exactly_the_assistant_and_its_end_of_turn_is_trained(chat_tokenizer: Any, tmp_path: Path) -> None:
    data = load_rows(chat_tokenizer, tmp_path, [{"messages": CONVERSATION}])
    assert data.report["format"] == "chat"
    example = data.train[0]
    assert trained_texts(chat_tokenizer, example) == ["yes\n\n12<|im_end|>", "\n it was great \n<|im_end|>"]
    whole = chat_tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert whole.startswith(chat_tokenizer.decode(example.input_ids))


def test_masks_equal_those_of_a_template_with_generation_markers(tmp_path: Path) -> None:
    """transformers' own assistant mask, which needs markers that few templates have, as the reference."""
    marked = bpe(CHATML)
    words = ["yes", "12", "it was", "great\n\n", " no ", "ünï", "<b>", "assistant"]
    conversations = []
    for i in range(40):
        turns = [{"role": "system", "content": words[i % 8]}] * (i % 2)
        for j in range(1 + i % 4):
            turns.append({"role": "user", "content": words[(i + j) % 8] * (1 + j)})
            turns.append({"role": "assistant", "content": " ".join(words[(i * k + j) % 8] for k in range(3))})
        conversations.append({"messages": turns})
    data = load_rows(bpe(CHATML_WITHOUT_MARKERS), tmp_path, conversations)
    assert data.report["train"]["used"] == 40
    for row, example in zip(conversations, data.train, strict=True):
        expected = marked.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        n = len(example.input_ids)
        mask = expected["assistant_masks"]
        assert sum(mask[n:]) == 0  # only what follows the last turn is left out
        assert chat_tokenizer_text(marked, example.input_ids) == chat_tokenizer_text(marked, expected["input_ids"][:n])
        if example.input_ids == expected["input_ids"][:n]:  # no token lies across a border
            assert [label != IGNORED for label in example.labels] == [bool(one) for one in mask[:n]]
        assert trained_texts(marked, example) == [
            turn["content"] + "<|im_end|>" for turn in row["messages"] if turn["role"] == "assistant"
        ]


def chat_tokenizer_text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids)


LLAMA2_LIKE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
GEMMA_LIKE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ '<turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
NO_END_MARK = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{{ message['content'] if loop.last else message['content'].split('THINK')[-1] }}{{ '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one THINK two"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "three"},
]


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (LLAMA2_LIKE, [" one THINK two </s>", " three </s>"]),
        (GEMMA_LIKE, ["one THINK two</turn>", "three</turn>"]),
        (NO_END_MARK, ["one THINK two\n", "three\n"]),
    ],
)
def test_masks_of_other_templates(template: str, trained: list[str], tmp_path: Path) -> None:
    tokenizer = bpe(template)
    data = load_rows(tokenizer, tmp_path, [{"messages": TWO_TURNS}])
    assert trained_texts(tokenizer, data.train[0]) == trained


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*earlier turns differently.*message 2 of 4"):
        load_rows(bpe(FORGETS_THOUGHTS), tmp_path, [{"messages": TWO_TURNS}])
    one_turn = load_rows(bpe(FORGETS_THOUGHTS), tmp_path, [{"messages": TWO_TURNS[:2]}])
    assert trained_texts(bpe(FORGETS_THOUGHTS), one_turn.train[0]) == ["one THINK two</>"]


def test_what_a_template_refuses_is_said_with_its_own_words(tmp_path: Path) -> None:
    rows = [{"messages": TWO_TURNS}, {"messages": CONVERSATION}]
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*system.*no system role here"):
        load_rows(bpe(GEMMA_LIKE), tmp_path, rows)
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*first 0 of 1 messages"):
        load_rows(bpe(GEMMA_LIKE), tmp_path, [{"messages": [{"role": "assistant", "content": "I begin"}]}])


def test_conversations_without_an_answer_are_skipped_and_counted(chat_tokenizer: Any, tmp_path: Path) -> None:
    empty = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]
    rows = [{"messages": turns} for turns in (TWO_TURNS, TWO_TURNS[:1], empty)]
    data = load_rows(chat_tokenizer, tmp_path, rows)
    counts = data.report["train"]
    assert (counts["read"], counts["used"], counts["skipped_no_target"], len(data.train)) == (3, 1, 2, 1)
    assert any("2 of 3 examples skipped" in note for note in data.report["notes"])


def test_held_out_conversations_end_before_the_last_answer(chat_tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "eval.jsonl", [{"messages": CONVERSATION}])
    data = load_rows(chat_tokenizer, tmp_path, [{"messages": TWO_TURNS}], eval_path=str(path))
    (example,) = data.eval
    assert example.reference == "\n it was great \n" and data.score is None
    assert example.prompt == chat_tokenizer.apply_chat_template(
        CONVERSATION[:4], tokenize=False, add_generation_prompt=True
    )
    assert example.prompt_ids == chat_tokenizer(example.prompt).input_ids
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids


def test_chat_needs_a_template(plain_tokenizer: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat template.*the tokenizer has none.*model.tokenizer"):
        load_rows(plain_tokenizer, tmp_path, [{"messages": TWO_TURNS}])
    with pytest.raises(UserError, match="data.template is false"):
        load_rows(chat_tokenizer, tmp_path, [{"messages": TWO_TURNS}], template=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a list of messages.*'hello'"),
        ([], "expected a list of messages"),
        (["hello"], "message 1 must be"),
        ([{"from": "human", "value": "x"}], "message 1 must be"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "message 1 must be"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "message 2 must be"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "without tool calls"),
    ],
)
def test_bad_messages_are_named(messages: Any, message: str, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": TWO_TURNS}, {"messages": messages}]
    with pytest.raises(UserError, match=rf"rows.jsonl:2: .*{message}"):
        load_rows(chat_tokenizer, tmp_path, rows)


def test_tool_definitions_are_refused(chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows.jsonl:1: tool definitions"):
        load_rows(chat_tokenizer, tmp_path, [{"messages": TWO_TURNS, "tools": [{"name": "f"}]}])


# Prompt and completion --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "text", "trained"),
    [
        ("a b", "c", "a b c<|im_end|>", " c<|im_end|>"),
        ("a b\n", "c", "a b\nc<|im_end|>", "c<|im_end|>"),
        ("a b", " c ", "a b c <|im_end|>", " c <|im_end|>"),
        ("12", "34", "12 34<|im_end|>", " 34<|im_end|>"),
    ],
)
def test_plain_completions_train_the_completion_and_eos(
    prompt: str, completion: str, text: str, trained: str, plain_tokenizer: Any, tmp_path: Path
) -> None:
    data = load_rows(plain_tokenizer, tmp_path, [{"prompt": prompt, "completion": completion}])
    assert plain_tokenizer.decode(data.train[0].input_ids) == text
    assert trained_texts(plain_tokenizer, data.train[0]) == [trained]


def test_a_prompt_has_the_tokens_it_is_generated_from(plain_tokenizer: Any, tmp_path: Path) -> None:
    # "\n" + "\n\n\n" would be one token of the joined text: the border is kept, the text too.
    rows = [{"prompt": "yes\n", "completion": "\n\n\nno"}]
    assert plain_tokenizer("yes\n\n\n\nno").input_ids[:2] != plain_tokenizer("yes\n").input_ids
    path = write_jsonl(tmp_path / "eval.jsonl", rows)
    data = load_rows(plain_tokenizer, tmp_path, rows, eval_path=str(path))
    (example,) = data.eval
    assert example.prompt == "yes\n" and example.reference == "\n\n\nno"
    assert example.prompt_ids == plain_tokenizer("yes\n").input_ids == example.input_ids[: len(example.prompt_ids)]
    assert trained_texts(plain_tokenizer, example) == ["\n\n\nno<|im_end|>"]


@pytest.mark.parametrize("first", ["<|im_start|>", "<|im_end|>"])
def test_a_tokenizer_that_sets_a_first_token_keeps_it(first: str, tmp_path: Path) -> None:
    """And the last token that it sets is not taken for the first, as where both are the same."""
    tokenizer = bpe(bos_token=first)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}]
    data = load_rows(tokenizer, tmp_path, rows)
    texts = [tokenizer.decode(one.input_ids) for one in data.train]
    assert texts == [f"{first}a b<|im_end|>", f"{first}b<|im_end|>"]
    assert [trained_texts(tokenizer, one) for one in data.train] == [[" b<|im_end|>"], ["b<|im_end|>"]]


def test_the_template_is_used_where_there_is_one_and_can_be_turned_off(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "yes?", "completion": "no"}]
    data = load_rows(chat_tokenizer, tmp_path, rows)
    assert data.report["template"] is True
    text = "<|im_start|>user\nyes?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    assert chat_tokenizer.decode(data.train[0].input_ids) == text
    assert trained_texts(chat_tokenizer, data.train[0]) == ["no<|im_end|>"]
    off = load_rows(chat_tokenizer, tmp_path, rows, template=False)
    assert chat_tokenizer.decode(off.train[0].input_ids) == "yes? no<|im_end|>"


def test_a_template_or_an_eos_that_is_not_there(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match="data.template: true, but the tokenizer has no chat template"):
        load_rows(plain_tokenizer, tmp_path, rows, template=True)
    endless = bpe()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_rows(endless, tmp_path, rows)


def test_truncation_is_on_the_right_counted_and_reported(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 50},
        {"prompt": "a" * 50, "completion": "b"},
        {"prompt": "a", "completion": " "},
    ]
    data = load_rows(plain_tokenizer, tmp_path, rows, max_length=8)
    counts = data.report["train"]
    assert {key: counts[key] for key in ("rows", "read", "used", "truncated", "skipped_no_target")} == {
        "rows": 4,
        "read": 4,
        "used": 2,
        "truncated": 1,
        "skipped_no_target": 2,
    }
    assert len(data.train[0].input_ids) < len(data.train[1].input_ids) == 8
    assert plain_tokenizer.eos_token_id not in data.train[1].input_ids
    notes = " ".join(data.report["notes"])
    assert "1 of 4 examples were cut" in notes and "2 of 4 examples skipped" in notes
    exact = load_rows(plain_tokenizer, tmp_path, rows[:1], max_length=len(data.train[0].input_ids))
    assert exact.report["train"]["truncated"] == 0 and exact.train == data.train[:1]
    with pytest.raises(UserError, match=r"no train example is left.*all 1.*data.max_length \(8 tokens\)"):
        load_rows(plain_tokenizer, tmp_path, rows[2:3], max_length=8)


# Files ------------------------------------------------------------------------------------------------

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


def test_columns_are_renamed(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "not this", "question": "a", "answer": "b", "idx": 3}]
    data = load_rows(plain_tokenizer, tmp_path, rows, columns={"prompt": "question", "completion": "answer"})
    assert plain_tokenizer.decode(data.train[0].input_ids) == "a b<|im_end|>"


def test_splits_of_a_folder(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": "x"} for i in range(10)]
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", rows[:4])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", rows[4:7])
    write_jsonl(tmp_path / "test.jsonl", rows[7:])
    folder = {"name": "jsonl", "path": str(tmp_path)}
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


def test_a_file_that_is_not_utf8(plain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'{"prompt": "a\xff"}\n')
    with pytest.raises(UserError, match="file: cannot be read.*utf-8"):
        load(plain_tokenizer, name="jsonl", path=str(tmp_path / "file"))


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


# Labels -----------------------------------------------------------------------------------------------


def classify(tokenizer: Any, folder: Path, rows: list[Any], **settings: Any) -> Any:
    return load_rows(tokenizer, folder, rows, task="sequence-classification", **settings)


def test_labels_of_users_files(plain_tokenizer: Any, tmp_path: Path) -> None:
    names = classify(plain_tokenizer, tmp_path, [{"text": "a", "label": one} for one in ("pos", "neg", "pos")])
    assert names.report["labels"] == ["neg", "pos"] and [one.labels for one in names.train] == [1, 0, 1]
    numbers = classify(plain_tokenizer, tmp_path, [{"text": "a", "label": one} for one in (2, 0, True)])
    assert numbers.report["labels"] == ["0", "1", "2"] and [one.labels for one in numbers.train] == [2, 0, 1]
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


@pytest.mark.parametrize("label", [-1, 0.5, None, "one", [1]])
def test_labels_that_are_none(label: Any, plain_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:2: label .*expected a whole number from 0"):
        classify(plain_tokenizer, tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": label}])


def bert_like() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        sep_token="[SEP]",
        cls_token="[CLS]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_pairs_have_separators_and_token_types(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"text": "a b", "text_pair": "c", "label": 0},
        {"text": "a b c d e f", "text_pair": "g h", "label": 1},
        {"text": "a", "text_pair": None, "label": 1},
    ]
    data = classify(bert_like(), tmp_path, rows, max_length=8)
    assert [one.input_ids for one in data.train] == [
        [1, 4, 5, 2, 6, 2],
        [1, 4, 5, 6, 2, 10, 11, 2],  # the longer text is cut, the special tokens stay
        [1, 4, 2],
    ]
    assert data.train[0].token_type_ids == [0, 0, 0, 0, 1, 1]
    assert data.report["train"]["truncated"] == 1
    # Where the tokenizer would set nothing between the two, a line break stands there.
    plain = classify(plain_tokenizer, tmp_path, rows[:1])
    assert plain_tokenizer.decode(plain.train[0].input_ids) == "a b\nc" and plain.train[0].token_type_ids is None


# Published sets ---------------------------------------------------------------------------------------


@needs_shared
def test_gsm8k_files(chat_tokenizer: Any) -> None:
    gsm8k = {"name": "gsm8k", "path": str(SHARED / "gsm8k")}
    data = load(chat_tokenizer, **gsm8k, train_examples=50, eval_examples=20, max_length=2000)
    assert (data.report["train"]["rows"], data.report["eval"]["rows"]) == (7473, 1319)
    assert (len(data.train), len(data.eval)) == (50, 20) and data.report["train"]["truncated"] == 0
    score = data.score([one.reference for one in data.eval], data.eval)
    assert (score.metric, score.correct, score.n) == ("exact_match", 20, 20)
    assert trained_texts(chat_tokenizer, data.eval[0]) == [data.eval[0].reference + "<|im_end|>"]


@needs_shared
def test_sst2_files(plain_tokenizer: Any) -> None:
    sst2 = {"name": "SST2", "path": str(SHARED / "sst2"), "train_examples": 100, "eval_examples": 100}
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


def test_quotation_marks_in_glue_files_are_ordinary(plain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text('sentence\tlabel\n"good\t1\nno" , "yes"\t0\n')
    data = load(plain_tokenizer, name="sst2", path=str(tmp_path))
    texts = [plain_tokenizer.decode(one.input_ids) for one in data.train]
    assert texts == ['"good It was great<|im_end|>', 'no" , "yes" It was terrible<|im_end|>']


def test_a_test_part_without_labels_is_not_taken_by_itself(plain_tokenizer: Any, tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b"}
    write_jsonl(tmp_path / "train.jsonl", [{**row, "label": "entailment"}])
    write_jsonl(tmp_path / "test.jsonl", [row])
    assert load(plain_tokenizer, name="superglue/rte", path=str(tmp_path)).eval == []
    with pytest.raises(UserError, match="test.jsonl:1: label None"):
        load(plain_tokenizer, name="superglue/rte", path=str(tmp_path), eval_split="test")


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
        ("gsm8k", {"question": "a"}, "expected a text in column 'answer', but the columns are question"),
        ("superglue/rte", {"premise": "a", "hypothesis": "b"}, "label None; expected entailment, not_entailment"),
        ("superglue/rte", {"premise": "a", "hypothesis": "b", "label": 2}, "label 2; expected"),
        ("superglue/cb", {"premise": "a", "label": "neutral"}, "expected a text in column 'hypothesis'"),
        ("superglue/wsc", {"text": "a", "target": {}, "label": True}, "expected a text in column 'span1_text'"),
        ("superglue/multirc", {"passage": {"text": "a"}}, "not a row of superglue/multirc as published"),
        ("superglue/copa", {"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0}, "why"),
        ("superglue/record", {"passage": {"text": "a"}, "qas": [{"query": "b"}]}, "expected a query with"),
    ],
)
def test_rows_not_as_published(name: str, row: Any, message: str, plain_tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=message):
        load(plain_tokenizer, name=name, path=str(tmp_path))


# The Hub ----------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="data.split: me/chats has no split 'all'; it has train"):
        load(plain_tokenizer, name="me/chats", split="all")
    with pytest.raises(UserError, match=r"me/chats \(none\) cannot be loaded.*data.subset"):
        load(plain_tokenizer, name="me/chats", subset="none")


def test_an_unreachable_hub_is_said_clearly(plain_tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hub cannot be reached for stanfordnlp/sst2.*give the publisher's files"):
        load(plain_tokenizer, name="sst2")
    with pytest.raises(UserError, match="Hub cannot be reached for me/mine.*use files"):
        load(plain_tokenizer, name="me/mine")


# Settings ---------------------------------------------------------------------------------------------


def test_good_settings_have_no_problems(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{}])
    for settings in (
        DataSettings(),
        DataSettings(name="gsm8k"),
        DataSettings(name="superglue/BoolQ", format="text-label"),
        DataSettings(name="someone/something", subset="main", revision="main", columns={"text": "sentence"}),
        DataSettings(name="jsonl", path=str(path), eval_path=str(tmp_path), eval_split="train"),
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
        ({"name": "sst2", "path": "{file}"}, "is a file; 'sst2' wants the folder"),
        ({"name": "sst2", "path": "{folder}"}, r"data.split: no file train with the ending .tsv.*rows.jsonl"),
        ({"path": "{file}"}, "data.path: .* has no meaning with data.name 'arithmetic'"),
        ({"name": "a/b", "path": "{file}"}, "has no meaning with data.name 'a/b'"),
        ({"name": "jsonl", "path": "{file}", "eval_path": "nowhere"}, "data.eval_path: 'nowhere' does not exist"),
        ({"name": "gsm8k", "eval_path": "{file}"}, "data.eval_path: .* use data.eval_split"),
        ({"name": "jsonl", "path": "{file}", "split": "test"}, "one file, which has no splits"),
        ({"name": "jsonl", "path": "{file}", "eval_split": "test"}, "held-out file as data.eval_path"),
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
    filled = {
        key: value.format(file=file, folder=tmp_path) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    problems = DataSettings(**filled).problems()
    assert len(problems) == 1 and re.search(message, problems[0]), problems


def test_all_problems_are_told_at_once(plain_tokenizer: Any) -> None:
    settings = {"name": "csv", "path": "nowhere", "format": "chart", "max_length": 0, "columns": {"txt": "a"}}
    assert len(DataSettings(**settings).problems()) == 4
    with pytest.raises(UserError, match="(?s)nowhere.*chart.*txt.*max_length"):
        load(plain_tokenizer, **settings)
