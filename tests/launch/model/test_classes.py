"""The names of classes reach the configuration, with the numbers that the checkpoint knows them by."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from hift_ds.launch.errors import UserError
from hift_ds.launch.model.classes import set_classes
from hift_ds.launch.model.settings import ModelSettings

DATA = ["negative", "neutral", "positive"]  # in the alphabetical order of a user's data


def classes(names: list[str], labels: list[str], count: int | None = None, **keys: Any) -> tuple[Any, ...]:
    """The names in the configuration by number, what `set_classes` returns, and what it says."""
    config = AutoConfig.for_model("bert", id2label=dict(enumerate(names)), **keys)
    said: list[str] = []
    settings = ModelSettings(name_or_path="m", task="sequence-classification", num_labels=count)
    returned = set_classes(config, settings, labels, said.append)
    assert config.label2id == {name: number for number, name in config.id2label.items()}
    assert config.num_labels == len(config.id2label)
    return [config.id2label[number] for number in range(config.num_labels)], returned, said


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_0", "LABEL_1"], DATA])
def test_names_of_the_data(names: list[str]) -> None:
    assert classes(names, DATA) == (DATA, DATA, [])


def test_the_checkpoint_keeps_its_numbers() -> None:
    theirs = ["POSITIVE", "NEGATIVE", "NEUTRAL"]
    ours = ["positive", "negative", "neutral"]
    note = "note: the classes keep the numbers that they have in the checkpoint: 0 positive, 1 negative, 2 neutral"
    assert classes(theirs, DATA) == (ours, ours, [note])


def test_a_part_of_the_classes_if_asked_for() -> None:
    theirs = ["positive", "negative", "neutral"]
    in_config, returned, said = classes(theirs, ["negative", "positive"], count=3)
    assert in_config == returned == theirs and len(said) == 1
    assert classes(theirs, ["negative", "positive"])[:2] == (["negative", "positive"], ["negative", "positive"])


def test_names_that_differ_by_case_only() -> None:
    assert classes(["a", "b"], ["A", "a"])[:2] == (["A", "a"], ["A", "a"])


def test_other_classes_are_said() -> None:
    note = "note: the classes of the checkpoint, no, yes, are now contradiction, entailment"
    assert classes(["no", "yes"], ["contradiction", "entailment"])[2] == [note]


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["no", "yes"]])
def test_numbers_name_nothing(names: list[str]) -> None:
    assert classes(names, ["0", "1"]) == (names, ["0", "1"], [])
    assert classes(names, ["0", "1"], count=4)[1] == ["0", "1", "2", "3"]


def test_names_for_classes_that_the_data_lacks() -> None:
    expected = [*DATA, "LABEL_3"]
    assert classes(["LABEL_0", "LABEL_1"], DATA, count=4) == (expected, expected, [])


def test_more_classes_than_outputs() -> None:
    with pytest.raises(UserError, match=r"model.num_labels: got 2, but the data has 3 classes. Set at least 3"):
        classes(["a", "b"], DATA, count=2)


def test_problem_type() -> None:
    """Pipelines of transformers choose softmax or sigmoid by it."""
    config = AutoConfig.for_model("bert", problem_type="multi_label_classification", num_labels=3)
    said: list[str] = []
    set_classes(config, ModelSettings(name_or_path="m", task="sequence-classification"), DATA, said.append)
    assert config.problem_type == "single_label_classification" and "multi_label_classification" in said[0]
