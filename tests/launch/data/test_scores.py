"""Answer extraction and the scores made of it."""

from __future__ import annotations

import json
import math
import os
from decimal import Decimal
from pathlib import Path

import pytest

from hift_ds.launch.data.scores import Score, accuracy, extract_number, leading_words_match, number_match
from tests.support.paths import REPOSITORY

DATA = Path(os.environ.get("HIFT_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 3 = 8\n#### 8", "8"),
        ("####8", "8"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,000.", "1000"),
        ("#### 12.50", "12.5"),
        ("#### .5", "0.5"),
        ("#### -7", "-7"),
        ("#### -$7", "-7"),
        ("#### $-7", "-7"),
        ("#### \u22127", "-7"),
        ("#### 007", "7"),
        ("#### 20%", "20"),
        ("#### 15 apples", "15"),
        ("#### 15.", "15"),
        ("#### 18<|im_end|>", "18"),
        ("#### 3\nQuestion: next\n#### 4", "3"),  # a model that runs on
        ("the #1 answer\n#### 9", "9"),
    ],
)
def test_the_number_after_the_mark(text: str, number: str) -> None:
    assert extract_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "The answer is 8.",
        "### 8",
        "####",
        "#### none",
        "#### 1/2",
        "#### 12/5",
        "#### 1.50/2",
        "#### 1e5",
        "#### 1.2.3",
        "####\n8",
    ],
)
def test_no_answer_is_none(text: str) -> None:
    assert extract_number(text) is None


def test_number_match_counts_wrong_and_missing_answers() -> None:
    references = ["#### 1,000", "#### 3", "#### 4", "#### 5"]
    score = number_match(["so\n#### 1000.00", "#### 30", "four", "5"], references)
    assert score == Score("exact_match", correct=1, n=4, unanswered=2)
    assert score.value == 0.25


def test_number_match_refuses_a_reference_without_number() -> None:
    with pytest.raises(ValueError, match="reference"):
        number_match(["#### 1"], ["one"])
    with pytest.raises(ValueError):
        number_match(["#### 1"], [])


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("great", True),
        (" Great.\nIt was", True),
        ("great<|im_end|>", True),
        ("greatly", False),
        ("not great", False),
        ("", False),
        ("Yes!", False),
    ],
)
def test_label_words(prediction: str, right: bool) -> None:
    assert leading_words_match([prediction], [("great",)]).correct == right


def test_label_words_of_several_answers_and_words() -> None:
    accepted = [("New York won.", "The city won."), ("No",), ("Maybe",)]
    score = leading_words_match(["the City won, they say", "Nothing", "..."], accepted)
    assert score == Score("accuracy", correct=1, n=3, unanswered=1)
    assert leading_words_match(["New Yorkers won"], [accepted[0]]).correct == 0
    # Nothing is right where nothing, or nothing but punctuation, is accepted.
    assert leading_words_match(["anything", "anything"], [(), ("...",)]).correct == 0


def test_accuracy_and_sums() -> None:
    assert accuracy([0, 1, 2, 1], [0, 1, 1, 1]) == Score("accuracy", 3, 4)
    assert accuracy([1], [1]) + accuracy([0, 0], [1, 0]) == Score("accuracy", 2, 3)
    assert math.isnan(accuracy([], []).value)
    with pytest.raises(ValueError, match="metrics"):
        accuracy([1], [1]) + Score("exact_match", 1, 1)


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="../shared/data/gsm8k is not there")
def test_every_published_gsm8k_answer_has_a_number() -> None:
    for name, n in (("train", 7473), ("test", 1319)):
        lines = (DATA / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line)["answer"] for line in lines]
        assert number_match(answers, answers) == Score("exact_match", n, n)
        # The same numbers as a plain split finds.
        assert all(extract_number(a) == Decimal(a.split("####")[1].strip().replace(",", "")) for a in answers)
