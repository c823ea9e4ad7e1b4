"""E2E: prompts from meaning representations, grouped references, parts, beams, and metrics by hand and by package."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from hift_ds.evaluation.tasks import metrics
from hift_ds.evaluation.tasks.catalog import TaskExample, find_task
from hift_ds.evaluation.tasks.loading import TaskData, load_task, training_rows
from hift_ds.evaluation.tasks.scoring import predict
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.tokenizer import byte_tokenizer
from tests.evaluation.tasks.test_scoring import llama

MEANING = "name[The Eagle], eatType[coffee shop], priceRange[£20-25], customer rating[5 out of 5], near[Café Adriatic]"
PROMPT = (
    "name : The Eagle | eatType : coffee shop | priceRange : £20-25 | customer rating : 5 out of 5 | "
    "near : Café Adriatic ||"
)


def rows(numbers: range, references: int) -> list[dict[str, str]]:
    """The first reference of each meaning, then the second ones."""
    return [
        {"meaning_representation": f"name[Place {i}], food[Thai]", "human_reference": f"Place {i} is Thai, {k}."}
        for k in range(references)
        for i in numbers
    ]


def write(folder: Path, kind: str, train: list[dict[str, str]], test: list[dict[str, str]]) -> Path:
    for part, some in (("train", train), ("test", test)):
        if kind == "parquet":
            datasets.Dataset.from_list(some).to_parquet(folder / f"{part}-00000-of-00001.parquet")
        elif kind == "jsonl":
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        else:  # as published
            name = {"train": "trainset", "test": "testset_w_refs"}[part]
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file, quoting=csv.QUOTE_MINIMAL)
                table.writerows([("mr", "ref"), *(row.values() for row in some)])
    return folder


def load(folder: Path, seed: int = 0, **options: Any) -> TaskData:
    return load_task(find_task("e2e"), str(folder), seed=seed, **options)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_prompts_and_grouped_references(kind: str, tmp_path: Path) -> None:
    test = [
        {"meaning_representation": MEANING, "human_reference": 'The "Eagle", a café.'},
        *rows(range(90, 92), 3),
        {"meaning_representation": MEANING, "human_reference": "A café, The Eagle."},
        {"meaning_representation": MEANING, "human_reference": "A café, The Eagle."},
    ]
    data = load(write(tmp_path, kind, rows(range(20), 3), test), train_examples=40, dev_examples=4)
    assert len(data.test) == 3 and data.report["test_from"] == "held-out split"
    (example,) = (one for one in data.test if one.prompt == PROMPT)
    assert example.references == ('The "Eagle", a café.', "A café, The Eagle.")
    assert example.completion == example.references[0]
    assert sorted(len(one.references) for one in data.test) == [2, 3, 3]
    # To train on, each reference is an example; to choose by, meanings have all of theirs.
    assert len(data.train) == 40 and len(data.dev) == 4
    assert all(one.references == (one.completion,) for one in data.train)
    assert all(len(one.references) == 3 for one in data.dev)
    assert len({(one.prompt, one.completion) for one in data.train}) == 40
    assert len({one.prompt for one in data.train}) < 40
    assert not {one.prompt for one in data.train} & {one.prompt for one in data.dev}
    assert training_rows(data.train)[0][1]["prompt"].startswith("name : Place ")
    again, other = load(tmp_path, train_examples=40, dev_examples=4), load(tmp_path, seed=1, train_examples=40)
    assert again.report == data.report and other.report["train"] != data.report["train"]


def test_what_is_tested_is_not_trained(tmp_path: Path) -> None:
    """Whatever its references."""
    train = rows(range(10), 2)
    planted = [{**row, "human_reference": "Other words."} for row in rows(range(90, 92), 1)]
    planted[0]["meaning_representation"] = planted[0]["meaning_representation"].upper().replace(", ", " ,  ")
    data = load(write(tmp_path, "jsonl", [*train, *planted, train[0]], rows(range(90, 95), 2)))
    assert data.report["in_test"] == 2 and data.report["duplicates"] == 1
    tested = {one.fingerprint for one in data.test}
    assert len(tested) == 5 and not tested & {one.fingerprint for one in [*data.train, *data.dev]}


def test_test_part_cut_from_training(tmp_path: Path) -> None:
    """Its meanings are whole, and nobody else's."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(range(60), 4)))
    data = load(tmp_path, train_examples=100, dev_examples=5, test_examples=10)
    assert [len(data.train), len(data.dev), len(data.test)] == [100, 5, 10]
    assert all(len(one.references) == 4 for one in [*data.dev, *data.test])
    prompts = [{one.prompt for one in part} for part in (data.train, data.dev, data.test)]
    assert not prompts[0] & prompts[1] and not (prompts[0] | prompts[1]) & prompts[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mr": "name[The Eagle", "ref": "a"}, r"train.jsonl:2: 'name\[The Eagle' in column 'mr'; expected attributes"),
        ({"mr": "name[A], x food[B]] y", "ref": "a"}, "train.jsonl:2: .* expected attributes as in"),
        ({"mr": "", "ref": "a"}, "train.jsonl:2: '' in column 'mr'"),
        ({"meaning_representation": MEANING}, "train.jsonl:2: expected a text in column 'human_reference'"),
        ({"mr": MEANING, "ref": " "}, "train.jsonl:2: the column 'ref' is empty; expected a text"),
    ],
)
def test_wrong_rows_are_named(row: dict[str, str], message: str, tmp_path: Path) -> None:
    good = {"mr": MEANING, "ref": "a"}
    (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@torch.no_grad()
def test_beams_do_not_depend_on_the_batch() -> None:
    tokenizer = byte_tokenizer()
    model = llama(1, len(tokenizer))
    task = dataclasses.replace(find_task("e2e"), max_new_tokens=8)
    examples = [TaskExample("", f"name : Place {'very ' * (i % 3)}{i} ||", "x", references=("x",)) for i in range(6)]
    expected = []
    for one in examples:
        ids = torch.tensor([tokenizer(one.prompt, add_special_tokens=False).input_ids])
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1) if tokenizer("").input_ids else ids
        new = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=4, length_penalty=0.9, do_sample=False,
            max_new_tokens=8, pad_token_id=0, eos_token_id=2, stop_strings=["\n"], tokenizer=tokenizer,
        )  # fmt: skip
        text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(text.split("\n")[0].strip())
    for batch_size in (1, 4):
        found = predict(task, model, tokenizer, examples, batch_size=batch_size, num_beams=4, length_penalty=0.9)
        assert found.values == expected
    assert predict(task, model, tokenizer, examples).values != expected  # greedy


def test_length_penalty_prefers_long_beams() -> None:
    tokenizer = byte_tokenizer()
    model = llama.__wrapped__(1, len(tokenizer))
    model.generation_config.eos_token_id = list(range(100, 140))  # such that beams end at different lengths
    task = dataclasses.replace(find_task("e2e"), max_new_tokens=8)
    examples = [TaskExample("", f"name : Place {i} ||", "x", references=("x",)) for i in range(6)]
    short, long = (
        predict(task, model, tokenizer, examples, num_beams=4, length_penalty=penalty).values for penalty in (-4.0, 4.0)
    )
    assert sum(map(len, short)) < sum(map(len, long))


# Metrics ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_meteor")
def test_metrics_by_hand() -> None:
    # All 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; 5 words instead of 6.
    score = metrics.e2e(["The cat sat on mat"], [["the cat sat on the mat"]])
    assert {*score, "meteor"} == {*metrics.E2E} and metrics.E2E == find_task("e2e").metrics
    assert score["bleu"] == pytest.approx(math.exp(1 - 6 / 5) * (3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert score["rouge_l"] == pytest.approx(2.44 * (5 / 6) / (5 / 6 + 1.44))
    # Five words once each: each says log2(5), what follows it nothing more.
    score = metrics.e2e(["one two three four five"], [["One two three four five"]])
    assert score["nist"] == pytest.approx(math.log2(5)) and score["bleu"] == pytest.approx(1)
    # Two texts, none of whose words are in the other's: similarities 1 and 0, times 10.
    texts = [["a nice pub by the river."], ["cheap thai food for all!"]]
    score = metrics.e2e(["A nice pub by the river", ""], texts)
    assert score["cider"] == pytest.approx(5.0)
    # The best reference counts; each text may have another number of them.
    score = metrics.e2e(["a nice pub", "x"], [["cheap food", "a nice pub"], ["y"]])
    assert score["rouge_l"] == pytest.approx(0.5) and score["nist"] == 0.0


def outputs(n: int = 40) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(3)
    places, foods = ["The Eagle", "Blue Spice", "Cotto"], ["Italian", "fast food", "English"]

    def text() -> str:
        name, food = draw.choice(places), draw.choice(foods)
        forms = [f"{name} is a {food} pub.", f"In the centre, {name} serves {food}; it isn't cheap (£20-25).",
                 f"Try {name}! It is a {food} place near the river, rated 5 out of 5."]  # fmt: skip
        return draw.choice(forms)

    return [text() for _ in range(n)], [[text() for _ in range(draw.randint(1, 5))] for _ in range(n)]


@pytest.mark.usefixtures("no_meteor")
def test_metrics_against_the_packages() -> None:
    """Called in other ways: sacrebleu's BLEU with an upper bound of references, sentences and their mean, and so on."""
    sacrebleu = pytest.importorskip("sacrebleu")
    nist = pytest.importorskip("nltk.translate.nist_score")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    predictions, references = outputs()
    score = metrics.e2e(predictions, references)
    columns = [[(one * 5)[i] for one in references] for i in range(5)]  # a reference again changes no BLEU
    bleu = sacrebleu.corpus_bleu([one.lower() for one in predictions], [[text.lower() for text in column]
                                                                       for column in columns])  # fmt: skip
    assert score["bleu"] == pytest.approx(bleu.score / 100, abs=1e-12) and 0.1 < score["bleu"] < 0.9
    few, wanted = ["The cat is here now", "a dog"], [["the cat was here today"], ["a dog"]]  # no four words alike
    bleu = sacrebleu.corpus_bleu([one.lower() for one in few], [[one for (one,) in wanted]])
    assert metrics.bleu(few, wanted)["bleu"] == pytest.approx(bleu.score / 100, abs=1e-12) and bleu.score > 0
    part = sacrebleu.BLEU(lowercase=True).tokenizer
    words = [part(one.lower()).split() for one in predictions]
    truths = [[part(one.lower()).split() for one in some] for some in references]
    assert score["nist"] == pytest.approx(nist.corpus_nist(truths, words), abs=1e-12)

    def spoken(words: list[str]) -> str:
        return " ".join(word for word in words if any(map(str.isalnum, word)))

    found = [rouge.calc_score([spoken(one)], list(map(spoken, some))) for one, some in zip(words, truths, strict=True)]
    assert score["rouge_l"] == pytest.approx(sum(found) / len(found), abs=1e-12)
    cider = scorer.CiderScorer()
    for one, some in zip(words, truths, strict=True):
        cider += (
            spoken(one),
            list(map(spoken, some)),
        )
    assert score["cider"] == pytest.approx(cider.compute_score()[0], abs=1e-12)
    examples = [TaskExample("", "p", some[0], references=tuple(some)) for some in references]
    assert find_task("e2e").score(predictions, examples) == score
    assert find_task("e2e").score(predictions, examples, headline_only=True) == {"bleu": score["bleu"]}


def test_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of its reference's words is nearly one chunk of matches; the figure is the package's own."""
    if shutil.which("java") is None:
        pytest.skip("there is no Java on the PATH")
    package = pytest.importorskip("pycocoevalcap.meteor.meteor")
    texts, references = ["The eagle is cheap", "a pub"], [["the eagle is cheap"], ["a bar", "by the river"]]
    asked: list[Any] = []

    class Meteor(package.Meteor):  # Java takes six seconds to start, so it is asked once
        def compute_score(self, *given: Any) -> Any:
            asked.append((given, answer := super().compute_score(*given)))
            return answer

    monkeypatch.setattr(package, "Meteor", Meteor)
    score = metrics.e2e(texts, references)["meteor"]
    ((given, (whole, (first, second))),) = asked
    assert given == (dict(enumerate(references)), {0: [texts[0].lower()], 1: [texts[1]]})
    assert score == whole and first == pytest.approx(1) and 0 < second < score < 1


@pytest.mark.usefixtures("no_meteor")
def test_without_java_meteor_is_missing() -> None:
    assert {*metrics.E2E} - {*metrics.e2e(["a pub"], [["a pub"]])} == {*metrics.MISSING}


def test_java_that_fails_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the package keeps locked then does not stop the process at its end."""
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert {*metrics.E2E} - {*metrics.e2e(["a pub"], [["a pub"]])} == {"meteor"}
    gc.collect()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match=r"sacrebleu.metrics.*pip install 'hift_ds\[e2e\]'"):
        metrics.e2e(["a"], [["a"]])
