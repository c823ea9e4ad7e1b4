"""Where an answer begins in what a model wrote, and when it is empty."""

from __future__ import annotations

import time

import pytest
from tokenizers import AddedToken

from hift_ds.launch.data.answers import Decoder, has_ended, has_words, read_answer, without_thinking
from hift_ds.launch.model.tokenizer import byte_tokenizer

OPENINGS = {
    "nothing": "",
    "a line break": "\n",
    "line breaks of Windows": "\r\n\r\n",
    "white space": " \t \n ",
    "spaces of Unicode": "\u00a0\u2003\u3000\u202f",
    "separators of Unicode": "\u2028\u2029\u0085",
    "nothing visible": "\u200b\u200d\u2060\u00ad\u200e",
    "a byte order mark": "\ufeff",
    "NUL": "\0",
    "thinking": "<think>\nParis or London?\n\nLondon\n</think>\n\n",
    "thinking about nothing (Qwen)": "<think>\n\n</think>\n\n",
    "thinking after a line break": "\n<Thinking>London</Thinking>",
    "reasoning": "<reasoning>London\n</reasoning>\n",
    "thinking (Magistral)": "[THINK]London\n[/THINK]",
    "thinking (Kimi)": "◁think▷London\n◁/think▷",
    "thinking (Seed)": "<seed:think>London\n</seed:think>",
    "thinking that the prompt has opened": "London\n</think>\n",
    "channels (gpt-oss)": "<|channel|>analysis<|message|>London\n<|end|><|start|>assistant<|channel|>final<|message|>",
    "a channel without thinking": "<|channel|>final<|message|>",
    "a role": "<|assistant|>\n",
    "a turn (ChatML)": "<|im_start|>assistant\n",
    "the end of the user's turn": "<|im_end|>\n<|im_start|>assistant\n",
    "a turn (Llama 3)": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "a turn (Gemma)": "<start_of_turn>model\n",
    "a turn (DeepSeek)": "<｜Assistant｜>",
    "an instruction's end (Llama 2)": " [/INST] ",
    "the beginning of a text": "<s> ",
    "a label": "Answer: ",
    "a label of its own line": "\nanswer:\n",
    "a label in bold": "**Answer:** ",
    "a label in bold without its colon": "**Final answer**: ",
    "a label as a sentence": "The answer is: ",
    "a heading": "### Response:\n",
    "a fence": "```\n",
    "a fence with a language": "```text\n",
    "several": "\n<|im_start|>assistant\n<think>\n\n</think>\n\n**Answer:**\n```\n",
}


@pytest.mark.parametrize("name", OPENINGS)
def test_the_answer_begins_after_its_opening(name: str) -> None:
    opening = OPENINGS[name]
    assert read_answer(f"{opening}Paris") == "Paris"
    assert read_answer(f"{opening}Paris, France. \r\nLondon\n", ("\n",)) == "Paris, France."
    assert read_answer(opening) == read_answer(f"{opening}\u200b \n", ("\n",)) == ""
    # While it is written, nothing ends it before it has begun, at whatever character the tokens are cut.
    for cut in range(len(opening) + 6):
        whole = f"{opening}Paris\n"[:cut]
        assert not has_ended(whole, ("\n",)) or "prompt has opened" in name, whole
    assert has_ended(f"{opening}Paris\n", ("\n",))


@pytest.mark.parametrize(
    "text",
    ["Paris", "the answer", "Answers: none", "assistant", "an assistant: a person", "Response", "model",
     "a <think> tag", "<b>Paris</b>", "[1] Paris", "<3", "|x|", "- Paris", "# 1", "**Paris**", "`Paris`", "\"Paris\"",
     "A: Paris",
     "Question: capital of France? Answer: Paris"],
)  # fmt: skip
def test_what_is_no_opening_stays(text: str) -> None:
    assert read_answer(text) == read_answer(f" {text}\n") == text


def test_thinking_that_is_not_closed_holds_no_answer() -> None:
    for text in ("<think>", "<think>\nIt is Paris", "\n[THINK]Paris", "<|channel|>analysis<|message|>Paris"):
        assert read_answer(text) == "" and not has_ended(text, ("\n",))
        assert without_thinking(text) == ""


def test_words() -> None:
    assert not any(has_words(text) for text in ("", " \n", "...", "```", "\u200b", "___"))
    assert all(has_words(text) for text in ("٣", "é", "0", "- x"))


def test_without_thinking_leaves_other_texts_alone() -> None:
    for text in ("", " x", "\nAnswer: x", "<|assistant|>x", "```\nx\n```", "x <think>y", "Use <thoughts>a</thoughts>.",
                 "The tag <think> ends at </think>."):  # fmt: skip
        assert without_thinking(text) == text
    assert without_thinking("<think>a</think>\nb</think>") == "\nb</think>"


def test_special_tokens_are_dropped_but_for_marks() -> None:
    tokenizer = byte_tokenizer()
    marks = ["<|im_start|>", "[THINK]", "[/THINK]", "<|channel|>", "<|message|>"]
    tokenizer.add_tokens([AddedToken(one, special=True) for one in [*marks, "<|other|>"]])

    def written(text: str) -> str:
        return Decoder(tokenizer)([[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])[0]

    assert written("\nParis<|other|> ") == "\nParis "
    assert written("<|im_start|>assistant\nParis<|other|>") == "<|im_start|>assistant\nParis"
    assert read_answer(written("[THINK]London[/THINK]Paris<|other|>")) == "Paris"
    assert read_answer(written("<|channel|>analysis<|message|>hm<|channel|>final<|message|>Paris")) == "Paris"
    assert read_answer(written("")) == read_answer(written("<|other|>")) == ""


def test_long_white_space_takes_no_time() -> None:
    """Models that were not trained write it until they are stopped."""
    start = time.perf_counter()
    assert read_answer(f"\u200b a{' ' * 100_000}b \n\0") == f"a{' ' * 100_000}b"
    assert read_answer(" " * 100_000) == ""
    assert time.perf_counter() - start < 2
