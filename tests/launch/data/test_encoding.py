"""Encoding: which tokens are trained, the chat template, truncation, and the byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hift_ds.launch.data.encoding import IGNORED
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.support.data_fixtures import (
    CHATML,
    CHATML_WITHOUT_MARKERS,
    TWO_TURNS,
    bpe,
    classify,
    load_rows,
    trained_texts,
    write_jsonl,
)

# Chat ------------------------------------------------------------------------------------------------


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
        expected: Any = marked.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        n = len(example.input_ids)
        mask = expected["assistant_masks"]
        assert sum(mask[n:]) == 0  # only what follows the last turn is left out
        assert marked.decode(example.input_ids) == marked.decode(expected["input_ids"][:n])
        if example.input_ids == expected["input_ids"][:n]:  # no token lies across a border
            assert [label != IGNORED for label in example.labels] == [bool(one) for one in mask[:n]]
        assert trained_texts(marked, example) == [
            turn["content"] + "<|im_end|>" for turn in row["messages"] if turn["role"] == "assistant"
        ]


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


def test_a_template_that_rewrites_earlier_turns_gets_an_example_for_each(tmp_path: Path) -> None:
    tokenizer = bpe(FORGETS_THOUGHTS)
    data = load_rows(tokenizer, tmp_path, [{"messages": TWO_TURNS}, {"messages": TWO_TURNS[:2]}])
    assert [trained_texts(tokenizer, one) for one in data.train] == [
        ["one THINK two</>"],
        ["three</>"],
        ["one THINK two</>"],
    ]
    assert tokenizer.decode(data.train[1].input_ids) == "<user>a</><assistant> two</><user>b</><assistant>three</>"


def test_what_a_template_refuses_is_said_with_its_own_words(tmp_path: Path) -> None:
    rows = [{"messages": TWO_TURNS}, {"messages": CONVERSATION}]
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*system.*no system role here"):
        load_rows(bpe(GEMMA_LIKE), tmp_path, rows)


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


# Prompt and completion -------------------------------------------------------------------------------


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
    assert exact.report["train"]["truncated"] == 0 and list(exact.train) == [data.train[0]]
    with pytest.raises(UserError, match=r"no train example is left.*all 1.*data.max_length \(8 tokens\)"):
        load_rows(plain_tokenizer, tmp_path, rows[2:3], max_length=8)


# Pairs of texts to classify --------------------------------------------------------------------------


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


# The byte tokenizer ----------------------------------------------------------------------------------


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
