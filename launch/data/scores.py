"""Scores of answers: exact match of the final numbers of GSM8K, and accuracy of labels. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

# The number after `####`: an optional sign before or after an optional currency mark, digits with commas, and an
# optional decimal fraction. Text that would change the number (a fraction bar, an exponent, a second decimal point)
# must not follow; a unit, a percent sign or a full stop may.
_FINAL_NUMBER = re.compile(
    r"####[ \t]*(?P<sign>[-+\u2212]?)[ \t]*[$€£]?[ \t]*(?P<minus>[-\u2212]?)"
    r"(?P<number>\d[\d,]*(?:\.\d+)?|\.\d+)(?![\d,]*\d)(?![ \t]*/[ \t]*\d)(?!\.\d)(?![eE][+-]?\d)"
)


@dataclass(frozen=True)
class Score:
    """A score with its counts. `unanswered` of the `n` predictions hold no answer; they count as wrong."""

    metric: str
    correct: int
    n: int
    unanswered: int = 0

    @property
    def value(self) -> float:
        """The fraction of correct predictions, 0 to 1; NaN without predictions."""
        return self.correct / self.n if self.n else float("nan")

    def __add__(self, other: Score) -> Score:
        """Return the score of both sets of predictions together, for example of two ranks."""
        if self.metric != other.metric:
            raise ValueError(f"cannot add the metrics {self.metric!r} and {other.metric!r}")
        return Score(self.metric, self.correct + other.correct, self.n + other.n, self.unanswered + other.unanswered)


def extract_number(text: str) -> Decimal | None:
    """Return the final answer of a solution in GSM8K's format: the number after the first `####`, or None.

    The first one counts, because a model that continues after its answer writes further problems. `1,000`, `$1000.00`
    and `1000.` are the same number. A text without `####`, or without a plain number after it, has no answer.
    """
    position = text.find("####")
    match = _FINAL_NUMBER.match(text, position) if position >= 0 else None
    if match is None:
        return None
    number = Decimal(match["number"].replace(",", ""))
    negative = match["sign"] in ("-", "\u2212") or match["minus"] != ""
    return -number if negative else number


def number_match(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """Compare the final numbers of predicted and reference solutions: exact match, GSM8K's metric.

    Raises:
        ValueError: a reference has no final number.
    """
    correct = unanswered = 0
    for prediction, reference in zip(predictions, references, strict=True):
        expected = extract_number(reference)
        if expected is None:
            raise ValueError(f"the reference solution has no number after '####': {reference!r}")
        answer = extract_number(prediction)
        unanswered += answer is None
        correct += answer == expected
    return Score("exact_match", correct, len(predictions), unanswered)


def leading_words_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the accuracy of generated label words: a prediction must begin with one of its accepted answers.

    Letter case, punctuation and the text after the answer do not matter, so a model may continue after its answer.
    Whole words are compared: `Nothing` is not `No`.
    """
    correct = unanswered = 0
    for prediction, accepted in zip(predictions, references, strict=True):
        words = _words(prediction)
        unanswered += not words
        correct += any(_begins(words, _words(answer)) for answer in accepted)
    return Score("accuracy", correct, len(predictions), unanswered)


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> Score:
    """Return the fraction of predicted label ids that equal the reference ids."""
    correct = sum(int(a) == int(b) for a, b in zip(predictions, references, strict=True))
    return Score("accuracy", correct, len(predictions))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _begins(words: list[str], answer: list[str]) -> bool:
    return bool(answer) and words[: len(answer)] == answer
