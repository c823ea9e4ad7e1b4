"""Answer extraction and the scores made of it."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest
import yaml

from hift_ds.launch.data.scores import (
    Score,
    accuracy,
    extract_number,
    leading_words_match,
    number_match,
    reference_number,
)
from tests.support.paths import REPOSITORY

DATA = Path(os.environ.get("HIFT_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 3 = 8\n#### 8", "8"),
        ("#### 1,234,567", "1234567"),
        ("#### 1,000.", "1000"),
        ("#### 12.50", "12.50"),
        ("#### .5", ".5"),
        ("#### -7", "-7"),
        ("#### 007", "007"),
        ("#### 20%", "20"),
        ("#### 15 apples", "15"),
        ("#### 15.", "15"),
        ("#### 1/2", "1"),
        ("#### 1e5", "1"),
        ("#### 1.2.3", "1.2.3"),
        ("#### 5-3", "5"),
        ("#### 18<|im_end|>", "18"),
        ("#### 3\nQuestion: next\n#### 4", "3"),  # a model that runs on
        ("the #1 answer\n#### 9", "9"),
        ("#### Step 1: add\n2 + 2 = 4\n#### Answer\n#### 4", "4"),  # headings
        ("#### Solution\n2 + 2 = 4\n#### 4", "4"),
        ("##### 4", "4"),
        ("#### #### 4", "4"),
        ("#### **5**\n#### 4", "4"),
        ("#### $5\n#### 4", "4"),
        ("#### 1. Add\n#### 4", "1"),  # a number, for the harness too
    ],
)
def test_the_first_number_after_a_mark(text: str, number: str) -> None:
    assert extract_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "8", "The answer is 8.", "### 8", "####", "####8", "####  8", "####\t8", "####\n8", "#### none", "#### $8",
     "#### -$8", "#### \u22128", "#### +8", "#### **8**", "#### \uff18", "#### .", "#### ,", "#### -"],
)  # fmt: skip
def test_no_answer_is_none(text: str) -> None:
    assert extract_number(text) is None


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 1,000", "1000"),
        ("#### $1,000.", "1000"),
        ("#### -2.50\n", "-2.50"),
        ("#### 3\n#### 4", "4"),  # the last one
        ("#### ", None),
        ("4", None),
        ("####4", None),
        ("#### 4 apples", None),
        ("#### 20%", None),
        ("#### 1/2", None),
        ("#### \u22124", None),
        ("#### .", None),
    ],
)
def test_the_number_of_a_reference(solution: str, number: str | None) -> None:
    assert reference_number(solution) == number


def test_number_match_counts_wrong_and_missing_answers() -> None:
    references = ["#### 1,000", "#### 3", "#### 4", "#### 5", "#### 6", "#### 7"]
    score = number_match(["so\n#### 1000.", "#### 30", "four", "5", "#### 6.0", "#### $7"], references)
    assert score == Score("exact_match", correct=1, n=6, unanswered=3)
    assert score.value == 1 / 6


def solution_like(draw: random.Random) -> str:
    """A text of pieces that GSM8K's answers, and the traps in them, are made of."""
    pieces = ("#### ", "####", "###", "#", "##### ", "#### Answer", "4", "4", "12", "1,000", "4.0", ".", ",", "-", "+",
              "\u2212", "$", "%", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u200b", "\uff14", "**", "Question:", "x",
              "[invalid]", "<|im_end|>", "</s>", "\0", "e5", "/", "=", "Step 1: add", "")  # fmt: skip
    if draw.random() < 0.3:  # something near to a whole answer
        return f"2 + 2 = 4\n#### {draw.choice(pieces)}{draw.choice(pieces)}{draw.choice(pieces)}"
    return "".join(draw.choice(pieces) for _ in range(draw.randint(0, 9)))


@pytest.mark.parametrize("n", [20_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_the_score_is_lm_evals_strict_match_for_any_text(n: int) -> None:
    """Its own filters, metric and settings, from its definition of the task."""
    extraction = pytest.importorskip("lm_eval.filters.extraction", reason="lm-evaluation-harness is not installed")
    selection = pytest.importorskip("lm_eval.filters.selection")
    theirs = pytest.importorskip("lm_eval.api.metrics")
    tasks = pytest.importorskip("lm_eval.tasks")
    definition = yaml.safe_load((Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text("utf-8"))
    strict = next(one for one in definition["filter_list"] if one["name"] == "strict-match")["filter"]
    assert [one["function"] for one in strict] == ["regex", "take_first"]
    match = extraction.RegexFilter(strict[0]["regex_pattern"])
    metric = dict(definition["metric_list"][0])
    assert metric.pop("metric") == "exact_match" and metric.pop("aggregation") == "mean"
    metric.pop("higher_is_better")
    draw = random.Random(n)
    references = ["2 + 2 = 4\n#### 4", "#### 12", "so 1000\n#### 1,000", "$4.0\n#### 4.0", "#### -4", "#### $4."]
    right = answered = 0
    for _ in range(n):
        text, reference = solution_like(draw), draw.choice(references)
        (found,) = selection.TakeFirstFilter().apply(match.apply([[text]], [{}]), [{}])
        expected = theirs.exact_match_fn(predictions=[found], references=[reference], **metric)["exact_match"]
        ours = number_match([text], [reference])
        assert ours.correct == expected, (text, reference, found)
        assert ours.unanswered == (not any(one.isdigit() for one in found)), (text, found)
        right, answered = right + ours.correct, answered + 1 - ours.unanswered
    assert right > n / 100 and n / 20 < answered < n / 2


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
        ("\n\nGreat", True),
        ("<think>\nNot good.\n</think>\n\nGreat", True),
        ("<think>great", False),
        ("<|assistant|>\nGreat", True),
        ("**Answer:** great", True),
        ("```\ngreat\n```", True),
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
    empty = ["", " \n", "<think>no", "<|im_start|>assistant\n", "\ufeff\u200b", "Answer:"]
    assert leading_words_match(empty, [("No",)] * 6).unanswered == 6
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
        assert all(extract_number(a) == a.split("####")[1].strip().replace(",", "") for a in answers)
