"""Scores of answers: exact match of the final numbers of GSM8K, and accuracy of labels. Pure functions.

GSM8K's score is the strict match of lm-evaluation-harness (its gsm8k.yaml), for any text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hift_ds.launch.data.answers import read_answer

_ANSWER = re.compile(r"#### (-?[0-9.,]+)")  # the first one is the answer, so text after other `####` does not matter
_NUMBER = re.compile(r"-?[0-9.]*[0-9][0-9.]*")


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


def extract_number(text: str) -> str | None:
    """Return the final answer of a solution: the number after the first `#### ` that a number follows, or None.

    It is compared as a text, without commas and a final full stop: `1,000`, `1000` and `1000.` are equal, but `1000.0`
    is another answer, as for lm-evaluation-harness. A currency mark before the number is no answer.
    """
    found = _ANSWER.search(text)
    number = "" if found is None else _plain(found[1])
    return number if any(map(str.isdigit, number)) else None


def reference_number(solution: str) -> str | None:
    """Return the final answer of a reference solution: what follows the last `#### `, or None if it is no number.

    Unlike in a model's answer, dollar signs are ignored.
    """
    _, mark, number = _plain(solution.strip()).rpartition("#### ")
    return number if mark and _NUMBER.fullmatch(number) else None


def number_match(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """Compare the final answers of predicted and reference solutions: GSM8K's metric.

    Raises:
        ValueError: a reference has no final number.
    """
    correct = unanswered = 0
    for prediction, reference in zip(predictions, references, strict=True):
        expected = reference_number(reference)
        if expected is None:
            raise ValueError(f"the reference solution has no number after '#### ': {reference!r}")
        answer = extract_number(prediction)
        unanswered += answer is None
        correct += answer == expected
    return Score("exact_match", correct, len(predictions), unanswered)


def _plain(text: str) -> str:
    return text.replace(",", "").replace("$", "").removesuffix(".")


def leading_words_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the accuracy of generated label words: a prediction must begin with one of its accepted answers.

    Letter case, punctuation and the text after the answer do not matter, so a model may continue after its answer. The
    answer begins where `read_answer` finds it. Whole words are compared: `Nothing` is not `No`.
    """
    correct = unanswered = 0
    for prediction, accepted in zip(predictions, references, strict=True):
        words = _words(read_answer(prediction))
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
