"""Conversations: what is trained where templates keep reasoning apart, take tools, or leave something out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hift_ds.launch.errors import UserError
from tests.support.data_fixtures import CHATML_WITHOUT_MARKERS, bpe, load_rows, trained_texts, write_jsonl

# Keeps the reasoning of the last turn only, and writes an empty block where there is none (as Qwen3).
LATEST_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set inside = parts[0].split('<think>')[-1] if parts[1:] else '' %}"
    "{% set thought = m.reasoning_content or inside %}"
    "{% if loop.last %}{{ '<think>\n' + thought.strip() + '\n</think>\n\n' }}{% endif %}{{ parts[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Opens the reasoning in the generation prompt, and writes turns without their reasoning (as DeepSeek-R1).
OPENED_REASONING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}"
    "{% else %}{{ '<|im_start|>A:' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>A:<think>\n' }}{% endif %}"
)
# Writes tools and tool calls as JSON, and ids of calls never (as most).
WITH_TOOLS = (
    "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + call.function.arguments | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def trained(chat_template: str, folder: Path, *rows: Any, **settings: Any) -> tuple[list[list[str]], list[str], Any]:
    """The trained texts of each example, the notes, and the data."""
    tokenizer = bpe(chat_template)
    rows = tuple(row if isinstance(row, dict) else {"messages": row} for row in rows)
    data = load_rows(tokenizer, folder, list(rows), eval_examples=0, **settings)
    return [trained_texts(tokenizer, one) for one in data.train], data.report["notes"], data


# Turns that stay out of the loss ---------------------------------------------------------------------


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}])
def test_turns_marked_as_untrained_are_read_but_not_trained(mark: dict[str, Any], tmp_path: Path) -> None:
    row = [user("2+2?"), assistant("five", **mark), user("Sure?"), assistant("No, four.", weight=1)]
    texts, _, data = trained(CHATML_WITHOUT_MARKERS, tmp_path, row)
    assert texts == [["No, four.<|im_end|>"]]
    assert "five<|im_end|>" in bpe().decode(data.train[0].input_ids)
    swapped = [user("2+2?"), assistant("four"), user("Sure?"), assistant("No, five.", **mark)]
    texts, _, data = trained(CHATML_WITHOUT_MARKERS, tmp_path, swapped)
    assert texts == [["four<|im_end|>"]]
    assert "five" not in bpe().decode(data.train[0].input_ids)  # nothing after it is trained


def test_conversations_without_a_trained_turn_are_skipped(tmp_path: Path) -> None:
    rows = [[user("a"), assistant("b", train=False)], [user("a"), assistant("b", train=True)]]
    texts, notes, _ = trained(CHATML_WITHOUT_MARKERS, tmp_path, *rows)
    assert texts == [["b<|im_end|>"]] and any("1 of 2 examples skipped" in note for note in notes)


# Reasoning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_to_the_template(key: str, tmp_path: Path) -> None:
    texts, _, _ = trained(LATEST_REASONING, tmp_path, [user("2+2?"), assistant("4", **{key: "two and two"})])
    assert texts == [["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]]


def test_reasoning_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    row = [user("2+2?"), assistant("4", reasoning_content="two and two")]
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*does not write reasoning_content of message 2.*into content"):
        trained(CHATML_WITHOUT_MARKERS, tmp_path, row)
    # The remedies.
    inside = [user("2+2?"), assistant("<think>two and two</think>4")]
    assert trained(CHATML_WITHOUT_MARKERS, tmp_path, inside)[0] == [["<think>two and two</think>4<|im_end|>"]]
    # Of a turn that is not trained, it is named.
    row = [user("a"), assistant("b", reasoning="c", weight=0), user("d"), assistant("e")]
    texts, notes, _ = trained(CHATML_WITHOUT_MARKERS, tmp_path, row)
    assert texts == [["e<|im_end|>"]] and any(
        "keys of messages that are not used" in n and "reasoning" in n for n in notes
    )
    # An empty one says nothing.
    assert trained(CHATML_WITHOUT_MARKERS, tmp_path, [user("a"), assistant("b", reasoning="", thinking=None)])[0]


def test_a_template_that_forgets_reasoning_gets_an_example_for_each_turn(tmp_path: Path) -> None:
    """Each as when the turn is generated: earlier turns without their reasoning, this one with it."""
    row = [user("a"), assistant("b", reasoning_content="B"), user("c"), assistant("<think>D</think>d")]
    texts, notes, data = trained(LATEST_REASONING, tmp_path, row, [user("a"), assistant("b")])
    assert texts == [
        ["<think>\nB\n</think>\n\nb<|im_end|>"],
        ["<think>\nD\n</think>\n\nd<|im_end|>"],
        ["<think>\n\n</think>\n\nb<|im_end|>"],
    ]
    before = bpe().decode(data.train[1].input_ids).removesuffix(texts[1][0])
    assert before == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (data.report["train"]["read"], data.report["train"]["used"]) == (2, 3)
    (note,) = [note for note in notes if "one example for each turn" in note]
    assert "1 of 2 rows" in note and "rows.jsonl:1" in note


def test_held_out_turns_have_their_own_prompts_and_references(tmp_path: Path) -> None:
    tokenizer = bpe(LATEST_REASONING)
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    path = write_jsonl(tmp_path / "eval.jsonl", [row])
    data = load_rows(tokenizer, tmp_path, [{"messages": row["messages"][:2]}], eval_path=str(path))
    assert [one.reference for one in data.eval] == ["b", "d"]
    assert data.eval[1].prompt == tokenizer.apply_chat_template(
        row["messages"][:3], tokenize=False, add_generation_prompt=True
    )


def test_reasoning_that_the_generation_prompt_opens(tmp_path: Path) -> None:
    """The answer follows the opening, as when it is generated; without reasoning nothing right can be trained."""
    row = [user("2+2?"), assistant("<think>\nB\n</think>\n\n4"), user("c"), assistant("<think>D</think>d")]
    texts, _, data = trained(OPENED_REASONING, tmp_path, row)
    assert texts == [["B\n</think>\n\n4<|im_end|>"], ["D</think>d<|im_end|>"]]
    read = bpe().decode(data.train[1].input_ids)
    assert (
        read == "<|im_start|>2+2?<|im_start|>A:\n\n4<|im_end|><|im_start|>c<|im_start|>A:<think>\nD</think>d<|im_end|>"
    )
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: .*generation prompt ends with '<think>\\n'.*message 2.*template=false"
    ):
        trained(OPENED_REASONING, tmp_path, [user("2+2?"), assistant("4")])
    # The other remedy.
    plain = {"prompt": "2+2?", "completion": "4"}
    with pytest.raises(UserError, match="generation prompt ends with"):
        trained(OPENED_REASONING, tmp_path, plain)
    assert trained(OPENED_REASONING, tmp_path, plain, template=False)[0] == [[" 4<|im_end|>"]]


@pytest.mark.parametrize("turn", [assistant("<think>\nB\n</think>\n\nb"), assistant("b", reasoning_content="B")])
def test_reasoning_that_the_generation_prompt_opens_and_the_template_keeps(turn: Any, tmp_path: Path) -> None:
    opens = LATEST_REASONING.replace(
        "'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif"
    )
    texts, _, data = trained(opens, tmp_path, [user("a"), turn], [user("a"), assistant("b")])
    assert texts == [["B\n</think>\n\nb<|im_end|>"], ["\n</think>\n\nb<|im_end|>"]]
    assert bpe().decode(data.train[0].input_ids).endswith("assistant\n<think>\nB\n</think>\n\nb<|im_end|>")


def test_content_that_a_template_cuts_is_refused(tmp_path: Path) -> None:
    forgets = LATEST_REASONING.replace("{% if loop.last %}", "{% if false %}")
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: .*not write the whole content of message 2: '<think>x</think>4'"
    ):
        trained(forgets, tmp_path, [user("2+2?"), assistant("<think>x</think>4")])


# Assistant first -------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be good"}]])
def test_a_first_turn_that_nothing_asks_for_is_read_but_not_trained(system: list[Any], tmp_path: Path) -> None:
    row = [*system, assistant("Welcome"), user("a"), assistant("b")]
    texts, notes, data = trained(CHATML_WITHOUT_MARKERS, tmp_path, row)
    # After a system message, a generation prompt can be written.
    assert texts == [[*(["Welcome<|im_end|>"] if system else []), "b<|im_end|>"]]
    assert "Welcome" in bpe().decode(data.train[0].input_ids)
    assert any("begin with the assistant" in note for note in notes) == (not system)


def test_a_template_that_refuses_an_assistant_first_is_quoted(tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}"
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*roles: assistant, user, assistant\): must begin with user"):
        trained(strict + CHATML_WITHOUT_MARKERS, tmp_path, [assistant("Welcome"), user("a"), assistant("b")])


# Tools -----------------------------------------------------------------------------------------------


def test_tools_go_to_a_template_that_writes_them(tmp_path: Path) -> None:
    messages = [
        user("1+?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        assistant("It is 3."),
    ]
    texts, notes, data = trained(WITH_TOOLS, tmp_path, {"messages": messages, "tools": [TOOL]})
    assert texts == [['<call>add{"a": 1}<|im_end|>', "It is 3.<|im_end|>"]]  # arguments as an object
    read = bpe().decode(data.train[0].input_ids)
    assert read.startswith("tools: [{") and "<|im_start|>tool\n3<|im_end|>" in read
    (note,) = [note for note in notes if "keys of messages" in note]
    assert "tool_call_id (1)" in note
    as_text = trained(WITH_TOOLS, tmp_path, {"messages": messages, "tools": '[{"type": "function"}]'})[2]
    assert bpe().decode(as_text.train[0].input_ids).startswith('tools: [{"type": "function"}]')


def test_a_template_that_writes_arguments_as_text_gets_them_as_text(tmp_path: Path) -> None:
    joins = WITH_TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    assert trained(joins, tmp_path, [user("1+?"), assistant("", tool_calls=[CALL])])[0] == [
        ['<call>add{"a": 1}<|im_end|>']
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("a"), assistant("b")], "tools": [TOOL]}, "does not write tool definitions"),
        ({"messages": [user("a"), assistant("b", tool_calls=[CALL])]}, "does not write tool_calls of message 2"),
        ({"messages": [user("a"), assistant("b", function_call={"name": "f"})]}, "does not write function_call"),
        (  # a call that is only read is missing, too
            {"messages": [user("a"), assistant("b", tool_calls=[CALL], weight=0), user("c"), assistant("d")]},
            "does not write tool_calls of message 2",
        ),
    ],
)
def test_tools_that_the_template_leaves_out_are_refused(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"rows.jsonl:1: .*{message}"):
        trained(CHATML_WITHOUT_MARKERS, tmp_path, row)


def test_messages_that_a_template_leaves_out_are_named(tmp_path: Path) -> None:
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML_WITHOUT_MARKERS
    rows = [[{"role": "system", "content": "be good"}, user("a"), assistant("b")], [user("a"), assistant("b")]]
    texts, notes, _ = trained(drops, tmp_path, *rows)
    assert texts == [["b<|im_end|>"]] * 2
    assert any("leaves out, by role: system (1): 1 of 2 rows" in note for note in notes)


# Ends ------------------------------------------------------------------------------------------------


def test_the_tokens_that_end_turns_are_reported(tmp_path: Path) -> None:
    *_, data = trained(CHATML_WITHOUT_MARKERS, tmp_path, [user("a"), assistant("b")])
    assert data.report["train"]["ends"] == [2]
    # Another special token than the end-of-sequence token, which is 2; and calls that end otherwise than answers.
    other = CHATML_WITHOUT_MARKERS.replace("message['content'] + '<|im_end|>", "message['content'] + '<|im_start|>")
    *_, data = trained(other, tmp_path, [user("a"), assistant("b")])
    assert data.report["train"]["ends"] == [1]
    mixed = WITH_TOOLS.replace("{{ '<|im_end|>\n' }}", "{{ '<|im_start|>\n' if m.tool_calls else '<|im_end|>\n' }}")
    *_, data = trained(mixed, tmp_path, [user("a"), assistant("b"), user("c"), assistant("", tool_calls=[CALL])])
    assert data.report["train"]["ends"] == [1, 2]
    *_, data = trained(CHATML_WITHOUT_MARKERS, tmp_path, {"prompt": "a", "completion": "b"}, template=False)
    assert data.report["train"]["ends"] == [2]


def test_added_tokens_end_answers_unless_the_answer_wrote_them(tmp_path: Path) -> None:
    """Some tokenizers do not mark the template's end of turn as special."""
    tokenizer = bpe(CHATML_WITHOUT_MARKERS.replace("<|im_end|>", "<end>"))
    tokenizer.add_tokens(["<end>", "<b>"])
    data = load_rows(tokenizer, tmp_path, [{"messages": [user("a"), assistant("b")]}], eval_examples=0)
    assert data.report["train"]["ends"] == [tokenizer.convert_tokens_to_ids("<end>")]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    data = load_rows(tokenizer, tmp_path, [{"messages": [user("a"), assistant("<b>")]}], eval_examples=0)
    assert data.report["train"]["ends"] == [] and data.report["train"]["remarks"]["no end mark"]["rows"] == 1


def test_a_template_without_an_end_is_said(tmp_path: Path) -> None:
    endless = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    texts, notes, data = trained(endless, tmp_path, [user("a"), assistant("b")])
    assert texts == [["b\n"]] and data.report["train"]["ends"] == []
    assert any("answers end without a control token" in note and "1 of 1 rows" in note for note in notes)
    # An end that the user wrote is one.
    _, notes, data = trained(endless.replace("+ '\n'", ""), tmp_path, [user("a"), assistant("b<|im_end|>")])
    assert data.report["train"]["ends"] == [2]


def test_the_template_writes_each_prefix_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing is a third of the time of loading."""
    lengths = []
    original = PreTrainedTokenizerFast.apply_chat_template

    def counting(self: Any, messages: list[Any], **options: Any) -> Any:
        lengths.append((len(messages), options["add_generation_prompt"]))
        return original(self, messages, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", counting)
    trained(CHATML_WITHOUT_MARKERS, tmp_path, [user("a"), assistant("b"), user("c"), assistant("d")])
    assert sorted(lengths) == [(1, True), (2, False), (3, True), (4, False)]


def test_turns_of_other_roles_are_said(tmp_path: Path) -> None:
    """ShareGPT's `function_call` is a turn of the model that no template writes as one."""
    row = [user("a"), {"role": "function_call", "content": "{}"}, {"role": "tool", "content": "1"}, assistant("b")]
    texts, notes, _ = trained(CHATML_WITHOUT_MARKERS, tmp_path, [user("a"), assistant("b")], row)
    assert texts == [["b<|im_end|>"], ["b<|im_end|>"]]
    (note,) = [note for note in notes if "never trained" in note]
    assert "function_call (1)" in note and "1 of 2 rows" in note and "rows.jsonl:2" in note


# Control tokens in texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings", "names"),
    [
        ([user("a"), assistant("a <|im_end|> b")], {}, "<|im_end|> (1)"),
        ([user("<|im_start|> <|im_start|>"), assistant("b")], {}, "<|im_start|> (1)"),
        ({"prompt": "<|im_start|>user\na<|im_end|>", "completion": "b"}, {"template": False}, "<|im_start|> (1)"),
        ({"prompt": "a", "completion": "<pad>"}, {}, "<pad> (1)"),
        ([user("a"), assistant("b", reasoning_content="<pad>", weight=0), user("c"), assistant("d")], {}, "<pad> (1)"),
    ],
)
def test_control_tokens_in_texts_are_counted_and_named(
    row: Any, settings: dict[str, Any], names: str, tmp_path: Path
) -> None:
    usual = [user("a"), assistant("b")] if isinstance(row, list) else {"prompt": "a", "completion": "b"}
    _, notes, _ = trained(CHATML_WITHOUT_MARKERS, tmp_path, usual, row, **settings)
    (note,) = [note for note in notes if "control tokens" in note]
    assert names in note and "1 of 2 rows" in note and "rows.jsonl:2" in note
    assert not any("control tokens" in n for n in trained(CHATML_WITHOUT_MARKERS, tmp_path, usual, **settings)[1])
