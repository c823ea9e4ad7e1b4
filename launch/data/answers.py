"""Find the answer in what a model wrote.

Models that were not trained for a task open their answers with white space, a thinking block, a chat's control tokens,
a label or a Markdown fence. The answer begins after these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BLANK = r"[\s\0\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"  # white space, or nothing visible
_THINKING_TAG = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|reflection)"
# A block that is never closed reaches to the end: the answer was cut off before it began.
_THINKING = (
    rf"<(?P<tag>{_THINKING_TAG})>.*?(?:</(?P=tag)>|\Z)"
    r"|\[THINK\].*?(?:\[/THINK\]|\Z)"
    r"|◁think▷.*?(?:◁/think▷|\Z)"
    r"|<\|channel\|>(?:analysis|commentary)\b.*?(?=<\|channel\|>final\b|\Z)"
)
# The end of a block that the prompt has opened: no block begins before it.
_END_OF_THINKING = re.compile(
    rf"\A(?:(?!<{_THINKING_TAG}>|\[THINK\]|◁think▷).)*?(?:</{_THINKING_TAG}>|\[/THINK\]|◁/think▷)",
    re.IGNORECASE | re.DOTALL,
)
_OPENING = re.compile(
    rf"{_BLANK}+|{_THINKING}"
    r"|<\|channel\|>final\b"
    # <|im_start|>assistant, <|assistant|>, <|start_header_id|>assistant<|end_header_id|>
    r"|<[|｜](?!channel\|)[^<>|｜\s]{1,40}[|｜]>(?:\s*(?:assistant|model|bot)(?=\s*\n|\s*<[|｜]|:|\s*\Z):?)?"
    r"|</?(?:start_of_turn|end_of_turn)>(?:\s*model(?=\s*\n|\s*\Z))?"
    r"|</?s>|<(?:bos|eos|pad)>|\[/?INST\]"
    # Answer:  **Final answer:**  ### Response:
    r"|[*_#> \t]*(?:(?:the|my|final|short)[ \t]+)*(?:answer|response|assistant)(?:[ \t]+is)?[*_]*[ \t]*[:：][*_]*"
    r"|```(?:[\w+.-]*[ \t]*\r?\n)?",
    re.IGNORECASE | re.DOTALL,
)
_BLANKS = re.compile(rf"{_BLANK}*")
_LEADING_THINKING = re.compile(rf"{_BLANK}*(?:{_THINKING})", re.IGNORECASE | re.DOTALL)
# Special tokens that `_OPENING` needs.
_MARK = re.compile(
    r"</?think>|\[/?THINK\]|◁/?think▷|<\|(?:channel|message|start|im_start|start_header_id|end_header_id)\|>"
    r"|<start_of_turn>"
)


def read_answer(text: str, stops: Sequence[str] = ()) -> str:
    """Return the answer in a text: what follows its opening, up to the first of `stops`; empty if there is none."""
    return _stripped(until(text[_opening(text) :], stops))


def _stripped(text: str) -> str:
    begin, end = (len(_BLANKS.match(one)[0]) for one in (text, text[::-1]))  # type: ignore[index]
    return text[begin : len(text) - end]


def until(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first of `stops`."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def has_ended(text: str, stops: Sequence[str]) -> bool:
    """Return whether one of `stops` follows the beginning of the answer."""
    begin = _opening(text)
    return any(text.find(stop, begin) >= 0 for stop in stops)


def has_words(text: str) -> bool:
    """Return whether there is a letter or a digit."""
    return re.search(r"[^\W_]", text) is not None


def without_thinking(text: str) -> str:
    """Return the text after a thinking block at its beginning; the block may have been opened by the prompt."""
    block = _LEADING_THINKING.match(text)
    if block is not None:
        return text[block.end() :]
    end = _END_OF_THINKING.search(text)
    return text if end is None else text[end.end() :]


def _opening(text: str) -> int:
    """Return the position at which the answer begins."""
    position = len(text) - len(without_thinking(text))
    while (found := _OPENING.match(text, position)) is not None and found.end() > position:
        position = found.end()
    return position


class Decoder:
    """Decodes written tokens to texts without special tokens, except those that an answer's opening is known by."""

    def __init__(self, tokenizer: Any) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._tokenizer = tokenizer
        self._special = {*added, *tokenizer.all_special_ids}
        self._marks = {number for number, token in added.items() if _MARK.fullmatch(str(token))}

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids."""
        dropped = self._special - self._marks
        return [
            self._tokenizer.decode([token for token in row if token not in dropped])
            if self._marks.intersection(row)
            else self._tokenizer.decode(row, skip_special_tokens=True)
            for row in rows
        ]
