"""Built-in yes-or-no questions: right and balanced labels, disjoint splits, the same rows for a seed; in training."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from hift_ds.launch.data.built_in import BUILT_IN, built_in_rows
from hift_ds.launch.data.yes_no import yes_no_questions
from tests.support.data_fixtures import load, trained_texts


def answered(row: dict[str, str]) -> str:
    """The right label, read from the text of the row alone."""
    numbers = [int(one) for one in re.findall(r"\d+", row["passage"])]
    asked = [int(one) for one in re.findall(r"\d+", row["question"])]
    a, b = numbers
    if " buys " in row["passage"]:
        left, right = a * b, asked[0]
    elif " finds " in row["passage"]:
        left, right = a + b, asked[0]
    else:
        left, right = a, b
    return "yes" if (left > right if " more " in row["question"] else left < right) else "no"


def verb_of(row: dict[str, str]) -> str:
    return next(one for one in ("buys", "finds", "has") if f" {one} " in row["passage"])


def test_labels_are_right_and_balanced() -> None:
    rows = yes_no_questions("train", 2000, seed=3)
    assert [row["label"] for row in rows] == [answered(row) for row in rows]
    for i in range(0, len(rows), 2):
        assert {rows[i]["label"], rows[i + 1]["label"]} == {"no", "yes"}
    assert {rows[i]["label"] for i in range(0, len(rows), 2)} == {"no", "yes"}  # neither always comes first
    # The words do not give the label away: it takes the numbers.
    kinds = Counter((verb_of(row), " more " in row["question"], row["label"]) for row in rows)
    assert len(kinds) == 3 * 2 * 2
    for (verb, more, _), count in kinds.items():
        assert 0.25 < count / (kinds[verb, more, "yes"] + kinds[verb, more, "no"]) < 0.75


def test_splits_are_disjoint_whatever_the_seeds() -> None:
    def stories(split: str, n: int, seeds: tuple[int, ...]) -> set[tuple[str, ...]]:
        """What distinguishes passages apart from names and things."""
        found = set()
        for seed in seeds:
            for row in yes_no_questions(split, n, seed):
                found.add((verb_of(row), *re.findall(r"\d+", row["passage"])))
        return found

    train, test = stories("train", 4000, (0, 1)), stories("test", 2000, (0, 7))
    assert train and test and not train & test
    assert {verb for verb, *_ in train} == {verb for verb, *_ in test} == {"buys", "finds", "has"}


def test_rows_depend_on_the_seed_and_not_on_how_many() -> None:
    rows = yes_no_questions("train", 500, seed=1)
    assert rows[:101] == yes_no_questions("train", 101, seed=1)
    assert rows[:101] != yes_no_questions("train", 101, seed=2)
    assert len({row["passage"] for row in rows}) == 500


@pytest.mark.parametrize(("split", "n"), [("validation", 3), ("train", -1), ("train", 10**6)])
def test_what_cannot_be_made_is_refused(split: str, n: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        yes_no_questions(split, n, seed=0)


def test_training_takes_them_as_label_words_and_as_labels(plain_tokenizer: Any) -> None:
    sizes = {"name": "yes-no", "train_examples": 6, "eval_examples": 4}
    (_, first), *_ = built_in_rows("yes-no", "train", 6, 0)
    words = load(plain_tokenizer, **sizes)
    ends = {"no": " No<|im_end|>", "yes": " Yes<|im_end|>"}
    assert trained_texts(plain_tokenizer, words.train[0]) == [ends[first["label"]]]
    assert words.eval[0].prompt.endswith("? Yes or No?")
    right = [one.reference.lower() + ", because" for one in words.eval]
    assert words.score(right, words.eval).value == 1.0
    labels = load(plain_tokenizer, task="sequence-classification", **sizes)
    assert labels.report["labels"] == ["no", "yes"]
    assert [one.labels for one in labels.train][:1] == [["no", "yes"].index(first["label"])]
    assert sum(one.labels for one in labels.train) == 3 and sum(one.labels for one in labels.eval) == 2


def test_the_built_in_sets() -> None:
    assert list(BUILT_IN) == ["arithmetic", "yes-no"]
