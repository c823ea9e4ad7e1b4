"""Built-in problems: right, in GSM8K's format, seeded, and never both in training and in the test."""

from __future__ import annotations

import re
from typing import Any

from hift_ds.launch.data import arithmetic
from hift_ds.launch.data.arithmetic import arithmetic_problems
from hift_ds.launch.data.scores import extract_number
from tests.support.data_fixtures import load


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
        assert extract_number(problem["answer"]) == steps[-1][3]
        assert problem["question"].endswith("?")
        assert len(problem["answer"].split()) <= 20
    assert step_counts == {1, 2, 3}


def skeleton(question: str) -> str:
    """A problem without its names and things: the template and the numbers."""
    words = (*arithmetic.NAMES, *arithmetic.THINGS, *arithmetic.PACKS)
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
    assert all(word in text for word in (*arithmetic.NAMES, *arithmetic.THINGS, *arithmetic.PACKS))
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
