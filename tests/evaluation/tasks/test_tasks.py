"""Tasks: prompts against strings typed from tables 12 and 13, parts by seed, no test example in training, bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest

from hift_ds.evaluation.tasks import loading
from hift_ds.evaluation.tasks.catalog import TASKS, TaskExample, find_task
from hift_ds.evaluation.tasks.loading import TaskData, check_disjoint, few_shot, load_task, training_rows
from hift_ds.evaluation.tasks.sampling import SETS
from hift_ds.launch.data.encoding import encode
from hift_ds.launch.errors import UserError
from tests.support.data_fixtures import SHARED, needs_shared, trained_texts, write_jsonl

PUBLISHED = {name: task.data for name, task in TASKS.items() if task.convert is None and not task.built_in}
FOLDERS = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA", "multirc": "MultiRC",
           "record": "ReCoRD", "rte": "RTE", "wic": "WiC", "wsc": "WSC"}  # fmt: skip
ALL = 10**6  # examples


def load(name: str, path: Path | str, seed: int = 0, **options: Any) -> TaskData:
    return load_task(find_task(name), str(path), seed=seed, **options)


def published(name: str, **options: Any) -> TaskData:
    return load(name, SHARED / ("superglue" if name in FOLDERS else name), **options)


def everything(data: TaskData) -> list[TaskExample]:
    return [*data.train, *data.dev, *data.test]


# Prompts ---------------------------------------------------------------------------------------------


# Typed by hand from table 13 and the files: the file, the line, how the prompt begins and ends, candidates, the label.
TYPED: list[tuple[str, str, int, str, str, tuple[str, ...], int]] = [
    ("rte", "train", 1, "No Weapons",
     'No Weapons of Mass Destruction Found in Iraq Yet. Does this mean that "Weapons of Mass Destruction Found in '
     'Iraq." is true? Yes or No?', ("Yes", "No"), 1),
    ("rte", "val", 1, "Dana Reeve, the widow",
     'according to the Christopher Reeve Foundation. Does this mean that "Christopher Reeve had an accident." is true? '
     "Yes or No?", ("Yes", "No"), 1),
    ("cb", "train", 2, "Suppose ``That's good.'' Ruth stood",
     'and the joys of womanhood. Can we infer that "Emma would have been all congratulations and the joys of '
     'womanhood"? Yes, No, or Maybe?', ("Yes", "No", "Maybe"), 0),
    ("cb", "val", 2, "Suppose ``Who knows?",
     "Suppose ``Who knows? The point is, do we go with it or not?'' Do we assume there is a shipment? "
     'Can we infer that "there is a shipment"? Yes, No, or Maybe?', ("Yes", "No", "Maybe"), 2),
    ("boolq", "train", 1, "Ghost in the Shell -- Animation studio",
     "on March 31, 2017. is ghost in the shell based on the anime?", ("No", "Yes"), 0),
    ("wsc", "train", 2, "The city councilmen",
     "The city councilmen refused the demonstrators a permit because they advocated violence. In the previous "
     'sentence, does the pronoun "they" refer to The demonstrators? Yes or No?', ("No", "Yes"), 1),
    ("wsc", "val", 1, "Bernard ,",
     'In the previous sentence, does the pronoun "him" refer to anyone? Yes or No?', ("No", "Yes"), 0),
    ("wic", "train", 1, "Does the word",
     'Does the word "feel" have the same meaning in these two sentences? Yes, No? You make me feel naked. '
     "She felt small and insignificant.", ("No", "Yes"), 1),
    ("multirc", "train", 1, "A stranger in town meets",
     'Question: How does Jason react to the stranger who arrives with Susan? I found this answer "He shots him". '
     "Is that correct? Yes or No?", ("No", "Yes"), 0),
    ("copa", "train", 1, "The chandelier", "The chandelier shattered on the floor because",
     ("the chandelier dropped from the ceiling.", "the chandelier's lights flickered on and off."), 0),
    ("copa", "train", 2, "The man slid", "The man slid the razor across his chin so",
     ("his stubble grew.", "his stubble disappeared."), 1),
]  # fmt: skip


@needs_shared
@pytest.mark.parametrize(
    ("name", "split", "line", "begin", "end", "candidates", "label"),
    TYPED,
    ids=[f"{name}-{split}-{line}" for name, split, line, *_ in TYPED],
)
def test_prompts_of_superglue(
    name: str, split: str, line: int, begin: str, end: str, candidates: tuple[str, ...], label: int
) -> None:
    where = str(SHARED / "superglue" / FOLDERS[name] / f"{split}.jsonl") + f":{line}"
    data = published(name, train_examples=ALL, test_examples=ALL if split == "val" else 10)
    (example,) = (one for one in everything(data) if one.where == where and one.prompt.endswith(end))
    assert example.prompt.startswith(begin)
    assert example.candidates == candidates and example.label == label
    assert example.completion == candidates[label]


@needs_shared
def test_prompts_of_record_and_the_others() -> None:
    data = published("record", train_examples=ALL)
    (example,) = (one for one in everything(data) if one.where.endswith("train.jsonl:1"))
    assert example.prompt.startswith("By Hamish Mackay Goals from Diego Costa")
    assert example.prompt.endswith("chance to make it 3-1 Speaking after the game, Mourinho said: 'The important thing "
                                   "is to give competition to the players, the best thing was that")  # fmt: skip
    right = example.options.index("Olimpija Ljubljana")
    assert example.label == right and example.references == ("Olimpija Ljubljana",)
    assert example.candidates[right] == example.completion == "Olimpija Ljubljana made it difficult."
    assert len(set(example.options)) == len(example.options) == len(example.candidates) > 5
    assert "Mourinho" in example.options and "Mourinho made it difficult." in example.candidates

    first = next(one for one in published("sst2", test_examples=ALL).test if one.where.endswith("validation.tsv:2"))
    assert first.prompt == "it 's a charming and often affecting journey . It was"
    assert first.candidates == ("terrible", "great") and first.label == 1

    data = published("gsm8k", test_examples=ALL)
    first = next(one for one in data.test if one.where.endswith("test.jsonl:1"))
    assert first.prompt.startswith("Question: Janet\u2019s ducks lay 16 eggs per day.")
    assert first.prompt.endswith("at the farmers' market?\nAnswer:") and first.references[0].endswith("#### 18")
    task = find_task("gsm8k")
    assert task.score([one.completion for one in data.test], data.test) == {"exact_match": 1.0}
    assert task.score(["so it is\n#### 18"] * 1319, data.test)["exact_match"] < 0.1


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_file_is_read_whole(name: str) -> None:
    read = {"multirc": (154, 0), "cb": (32, 56), "wsc": (32, 104), "rte": (2490, 277), "sst2": (60614, 872),
            "gsm8k": (7473, 1319)}.get(name, (32, 0))  # fmt: skip
    data = published(name)
    report = data.report
    assert (report["read"]["train"], report["read"]["test"]) == read and report["unlabeled"] == 0
    assert report["test_from"] == ("held-out split" if read[1] else "training split")
    assert any("drawn from the training split" in note for note in report["notes"]) == (not read[1])
    task = find_task(name)
    right = [one.label if one.candidates else one.completion for one in data.test]
    scores = task.score(right, data.test)
    assert tuple(scores) == task.metrics and set(scores.values()) == {1.0}
    for one in everything(data):
        assert one.prompt and "@placeholder" not in one.prompt + one.completion
        assert one.completion == (one.candidates[one.label] if one.candidates else one.references[0])


# In the Hub's columns, the prompt and all candidates typed from table 12, or the references from table 13.
HUB: dict[str, tuple[dict[str, Any], str, tuple[Any, ...], str]] = {
    "sst5": ({"text": "a fine film ", "label": 3}, "a fine film It was",
             ("terrible .", "bad .", "okay .", "good .", "great ."), "good ."),
    "trec": ({"text": "Who ran ?", "coarse_label": 3, "fine_label": 28}, "",
             ("Expression : Who ran ?", "Entity : Who ran ?", "Description : Who ran ?", "Human : Who ran ?",
              "Location : Who ran ?", "Number : Who ran ?"), "Human : Who ran ?"),
    "mnli": ({"premise": "It rains", "hypothesis": "It is dry.", "label": 2, "idx": 0}, "It rains ?",
             ("Yes , It is dry.", "Maybe , It is dry.", "No , It is dry."), "No , It is dry."),
    "snli": ({"premise": "It rains", "hypothesis": "It is wet.", "label": 0}, "It rains ?",
             ("Yes , It is wet.", "Maybe , It is wet.", "No , It is wet."), "Yes , It is wet."),
    "squad": ({"id": "1", "title": "Rome", "context": "Rome is old.", "question": "What is Rome?",
               "answers": {"text": ["old", "very old", "old"], "answer_start": [8, 8, 8]}},
              "Title: Rome Context: Rome is old. Question: What is Rome? Answer:", ("old", "very old"), "old"),
    "drop": ({"passage": "Two and two.", "question": "How many?", "answers_spans": {"spans": ["4", "four"]}},
             "Passage: Two and two. Question: How many? Answer:", (("4",), ("four",)), "4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", HUB)
def test_prompts_of_files_in_the_columns_of_the_hub(name: str, kind: str, tmp_path: Path) -> None:
    row, prompt, choices, completion = HUB[name]
    column = next(key for key in ("text", "premise", "context", "passage") if key in row)
    rows = [row, *({**row, column: f"{row[column]} {i}"} for i in range(5))]
    split = find_task(name).test_split or "validation"
    for part, some in (("train", rows[1:]), (split, rows[:1])):
        if kind == "jsonl":
            write_jsonl(tmp_path / f"{part}.jsonl", some)
        else:
            datasets.Dataset.from_list(some).to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")
    data = load(name, tmp_path, train_examples=2, dev_examples=1)
    (example,) = data.test
    assert (example.prompt, example.completion) == (prompt, completion)
    assert (example.candidates or example.references) == choices
    assert [len(data.train), len(data.dev)] == [2, 1]


ANSWER: dict[str, Any] = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}


def test_answers_of_drop_in_the_publishers_columns(tmp_path: Path) -> None:
    nothing = ANSWER
    row = {"passage": "p", "question": "q", "answer": {**nothing, "spans": ["Tom", "Eli"]}}
    date = {"day": "3", "month": "May", "year": ""}
    row["validated_answers"] = [{**nothing, "number": "7"}, {**nothing, "date": date}, nothing]
    write_jsonl(tmp_path / "train.jsonl", [{**row, "question": str(i)} for i in range(3)])
    unanswered = {**row, "question": "?", "answer": nothing, "validated_answers": []}
    write_jsonl(tmp_path / "validation.jsonl", [unanswered, row])
    data = load("drop", tmp_path)
    assert len(data.test) == 1 and "1 of 5 rows have no label or answer and are left out" in data.report["notes"]
    assert data.test[0].references == (("Tom", "Eli"), ("7",), ("3 May",)) and data.test[0].completion == "Tom, Eli"
    assert find_task("drop").score(["7.0"], data.test) == {"f1": 1.0, "exact_match": 1.0}
    assert find_task("drop").score(["Tom"], data.test) == {"f1": 0.5, "exact_match": 0.0}


def test_choices_that_begin_with_i_stay_so(tmp_path: Path) -> None:
    row = {"premise": "It rained. ", "choice1": "I stayed.", "choice2": "It stopped.", "question": "effect", "label": 0}
    rows = [{**row, "premise": f"{i} {row['premise']}"} for i in range(6)]
    data = load("copa", write_jsonl(tmp_path / "train.jsonl", rows).parent, train_examples=2, dev_examples=1)
    assert {one.candidates for one in everything(data)} == {("I stayed.", "it stopped.")}
    assert sorted(one.prompt for one in everything(data))[0] == "0 It rained so"


def test_rows_without_a_label_are_counted(tmp_path: Path) -> None:
    rows = [{"premise": str(i), "hypothesis": "b", "label": i % 4 - 1} for i in range(20)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", [{**row, "premise": "x" + row["premise"]} for row in rows])
    data = load("snli", tmp_path)
    assert data.report["unlabeled"] == 10 and len(data.test) == 15 and len(data.train) + len(data.dev) == 15


def test_demonstrations_and_training_rows(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(20)]
    lines = "".join(f"{row['sentence']}\t{row['label']}\n" for row in rows)
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + lines)
    data = load("sst2", tmp_path, train_examples=10, dev_examples=2, test_examples=4)
    assert [len(data.train), len(data.dev), len(data.test)] == [10, 2, 4]
    drawn = data.demonstrations(3, seed=1)
    assert drawn == data.demonstrations(3, seed=1) != data.demonstrations(3, seed=2)
    assert len(set(drawn)) == 3 and set(drawn) <= set(data.train)
    assert few_shot([]) == ""
    texts = [f"film {i} It was {('terrible', 'great')[i % 2]}" for i in range(20)]
    assert all(text in texts for text in few_shot(drawn).removesuffix("\n\n").split("\n\n"))
    with pytest.raises(UserError, match="11 demonstrations, but only 10 training examples"):
        data.demonstrations(11, seed=1)
    examples, _ = encode(
        training_rows(data.train), plain_tokenizer, labels=None, template=False, question=False, max_length=64
    )
    assert trained_texts(plain_tokenizer, examples[0]) == [f" {data.train[0].completion}<|im_end|>"]


# Parts -----------------------------------------------------------------------------------------------


def test_other_references_are_other_data(tmp_path: Path) -> None:
    def hashes(*answers: str) -> list[str]:
        row = {"title": "t", "context": "An old house.", "answers": {"text": ["old", *answers]}}
        for part in ("train", "validation"):
            write_jsonl(tmp_path / f"{part}.jsonl", [row | {"question": f"What is it, {part}?"}])
        report = load_task(find_task("squad"), str(tmp_path), seed=0, dev_examples=0).report
        return [report[part]["sha256"] for part in ("train", "test")]

    assert hashes() == hashes() != hashes("very old")


@pytest.mark.parametrize(("label", "right"), [("3", True), ("5", False), ("x", False), ("1.5", False)])
def test_labels_of_a_csv_are_texts(label: str, right: bool, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text(f"text,label\nfine {part},{label}\n")
    with contextlib.nullcontext() if right else pytest.raises(UserError, match="expected a number from 0 to 4"):
        data = load_task(find_task("sst5"), str(tmp_path), seed=0, dev_examples=0)
        assert [one.target for one in data.train] == [3]


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_seeds_draw_parts(name: str) -> None:
    data, again, other = published(name), published(name), published(name, seed=1)
    assert data.report == again.report and everything(data) == everything(again)
    for part in SETS:
        assert data.report[part]["sha256"] != other.report[part]["sha256"], part
        ours, theirs = getattr(data, part), getattr(other, part)
        if part != "test" or len(ours) != data.report["read"]["test"]:  # not all there is
            assert {one.fingerprint for one in ours} != {one.fingerprint for one in theirs}
        assert 0 < len(ours) == len({one.fingerprint for one in ours}) or part == "test"
    assert len(data.train) <= 1000 and len(data.dev) <= 500 and len(data.test) <= 1000
    fingerprints = [{one.fingerprint for one in getattr(data, part)} for part in SETS]
    assert not fingerprints[0] & fingerprints[1] and not (fingerprints[0] | fingerprints[1]) & fingerprints[2]
    if name in ("multirc", "record", "boolq"):
        passages = [{one.passage for one in getattr(data, part)} for part in SETS]
        assert not passages[0] & passages[1] and not (passages[0] | passages[1]) & passages[2]


@needs_shared
def test_questions_of_multirc_stay_whole() -> None:
    lines = (SHARED / "superglue" / "MultiRC" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [question for line in lines for question in json.loads(line)["passage"]["questions"]]
    sizes = {question["question"]: len({answer["text"] for answer in question["answers"]}) for question in questions}
    assert len(sizes) == 32
    for seed in range(5):
        data = published("multirc", test_examples=50, train_examples=50, seed=seed)
        counts: dict[str, int] = {}
        for one in data.test:
            (question,) = (text for text in sizes if f"Question: {text} I found" in one.prompt)
            counts[question] = counts.get(question, 0) + 1
        assert counts == {question: sizes[question] for question in counts}
        assert len({one.question for one in data.test}) == len(counts) and 30 < len(data.test) <= 50


RTE = {"premise": "A b.", "hypothesis": "C d.", "label": "entailment"}


def rte(folder: Path, train: list[int], held_out: list[int]) -> Path:
    for split, numbers in (("train", train), ("val", held_out)):
        if numbers:
            write_jsonl(folder / f"{split}.jsonl", [{**RTE, "premise": f"A {i}."} for i in numbers])
    return folder


def test_what_is_tested_is_not_trained(tmp_path: Path) -> None:
    """Also what the drawn test part leaves out of the held-out split, and in other letters and spaces."""
    rte(tmp_path, [*range(10), 3, 3, 20, 21], [20, 21, 22, 23])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({**RTE, "premise": " a\u00a022. ", "label": "not_entailment"}) + "\n")
    data = load("rte", tmp_path, test_examples=1)
    assert data.report["in_test"] == 3 and data.report["duplicates"] == 2 and len(data.test) == 1
    assert len(data.train) + len(data.dev) == 10
    assert not any(number in one.prompt for one in [*data.train, *data.dev] for number in ("20", "21", "22"))
    planted = dataclasses.replace(data.test[0], prompt=data.test[0].prompt.upper() + " ", where="here:7")
    check_disjoint([*data.train, *data.dev], data.test)
    with pytest.raises(UserError, match="1 test examples are in the training set; the first is here:7"):
        check_disjoint([*data.train, planted], data.test)


def test_an_example_is_its_prompt_and_its_candidates(tmp_path: Path) -> None:
    """TREC's prompts are empty and COPA's premises recur; only the candidates tell such examples apart."""
    one = TaskExample("a:1", "", "Human : x", ("Human : x", "Entity : x"), 0)
    assert one.fingerprint != dataclasses.replace(one, candidates=("Human : y", "Entity : y")).fingerprint
    assert one.fingerprint == dataclasses.replace(one, label=1, where="b:2", completion="Entity : x").fingerprint


def test_parts_of_a_short_split(tmp_path: Path) -> None:
    data = load("rte", rte(tmp_path, list(range(50)), []), train_examples=40, dev_examples=20, test_examples=40)
    assert [len(data.train), len(data.dev), len(data.test)] == [20, 10, 20]
    assert data.report["test_from"] == "training split" and "train gets at most 20 of 40" in data.report["notes"][0]
    with pytest.raises(UserError, match="rte: no example is left for the train set"):
        load("rte", rte(tmp_path, [1], []))
    with pytest.raises(UserError, match="test_examples is 0; expected at least 1"):
        load("rte", tmp_path, test_examples=0)


@pytest.mark.parametrize("held_out", [True, False])
def test_few_examples_of_each_class(held_out: bool, tmp_path: Path) -> None:
    """As many of each for both parts, by the seed; with and without a split of their own to test on."""
    labels = {"entailment": range(60), "not_entailment": range(100, 120)}
    rows = [{**RTE, "premise": f"A {i}.", "label": label} for label, some in labels.items() for i in some]
    write_jsonl(tmp_path / "train.jsonl", rows)
    if held_out:
        write_jsonl(tmp_path / "val.jsonl", [{**RTE, "premise": f"B {i}."} for i in range(9)])
    data = load("rte", tmp_path, k_shot=4, test_examples=9)
    assert [Counter(one.target for one in part) for part in (data.train, data.dev)] == [{0: 4, 1: 4}] * 2
    assert len(data.test) == 9 and len(data.report["notes"]) == (not held_out) and not data.report["duplicates"]
    assert len({one.fingerprint for one in everything(data)}) == 25
    again, other = load("rte", tmp_path, k_shot=4, test_examples=9), load("rte", tmp_path, seed=1, k_shot=4)
    assert again.report == data.report and other.report["train"] != data.report["train"]
    without = load("rte", tmp_path, k_shot=4, dev_examples=0, test_examples=72)
    assert without.dev == [] and len(without.test) == (9 if held_out else 72)
    assert not any("dev" in note for note in without.report["notes"])
    few = load("rte", tmp_path, k_shot=12, test_examples=1)
    assert f"dev: fewer than 12 examples per class: not_entailment {8 if held_out else 7}" in few.report["notes"]


def test_few_examples_have_no_passage_in_common(tmp_path: Path) -> None:
    passages = [{"passage": f"P {i}.", "question": f"q {j}?", "label": j % 2} for i in range(8) for j in range(6)]
    write_jsonl(tmp_path / "train.jsonl", [{**row, "label": bool(row["label"])} for row in passages])
    data = load("boolq", tmp_path, k_shot=5, test_examples=12)
    parts = [{one.passage for one in part} for part in (data.train, data.dev, data.test)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))


def test_a_task_without_classes_has_no_few_examples_of_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="squad: k_shot is 4; expected at least 1 and a task with classes, or null"):
        load("squad", tmp_path, k_shot=4)
    with pytest.raises(UserError, match="rte: k_shot is 0"):
        load("rte", tmp_path, k_shot=0)


# Bad input -------------------------------------------------------------------------------------------


def test_an_unknown_task_names_the_nearest() -> None:
    assert find_task("BoolQ").name == "boolq"
    with pytest.raises(
        UserError, match="unknown task 'bolq'; expected arithmetic, yes-no, sst2, .*; did you mean 'boolq'?"
    ):
        find_task("bolq")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rte", {"label": "maybe"}, r"train.jsonl:2: label 'maybe'"),
        ("rte", {"premise": None}, r"train.jsonl:2: expected a text in column 'premise'"),
        (
            "snli",
            {"label": "neutral"},
            r"train.jsonl:2: label 'neutral' in column 'label'; expected a number from 0 to 2",
        ),
        ("snli", {"label": True}, r"train.jsonl:2: label True"),
        ("snli", {"label": 3}, r"train.jsonl:2: label 3"),
        ("squad", {"answers": {"text": []}}, r"train.jsonl:2: expected answers: \{text.*with at least one text"),
        ("squad", {"title": 3}, r"train.jsonl:2: expected a text in column 'title', but it is 3"),
        ("drop", {"answers_spans": ["4"]}, r"train.jsonl:2: expected answers_spans"),
        (
            "drop",
            {"answer": {**ANSWER, "spans": ["a", 3]}},
            r"train.jsonl:2: expected answers of number, date and spans",
        ),
        ("drop", {"answer": ANSWER, "validated_answers": 5}, r"train.jsonl:2: expected answers of number, date and"),
        ("drop", {"answer": {"number": ""}}, r"train.jsonl:2: expected answers of number, date and spans"),
        ("record", {"entities": []}, r"train.jsonl:2: expected entities of the passage"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    record = {"passage": "Ann met Bo.", "query": "@placeholder ran", "entities": ["Ann", "Bo"], "answers": ["Ann"]}
    row = {"rte": RTE, "record": record}.get(name) or HUB[name][0]
    write_jsonl(tmp_path / "train.jsonl", [row, {**row, **change}])
    with pytest.raises(UserError, match=message):
        load(name, tmp_path)


def test_missing_splits_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rte: '.*nowhere' does not exist"):
        load("rte", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no file train with the ending .jsonl .*holds nothing"):
        load("rte", tmp_path)
    rte(tmp_path, list(range(20)), [])
    with pytest.raises(UserError, match="data.eval_split: no file validation .*holds train.jsonl"):
        load("rte", tmp_path, test_split="validation")
    (tmp_path / "train.jsonl").write_text('{"premise": "a"\n')
    with pytest.raises(UserError, match="train.jsonl:1: broken JSON"):
        load("rte", tmp_path)
    mnli = tmp_path / "mnli"
    mnli.mkdir()
    write_jsonl(mnli / "train.jsonl", [{**HUB["mnli"][0], "premise": str(i)} for i in range(20)])
    assert load("mnli", mnli).report["test_from"] == "training split"
    with pytest.raises(UserError, match="no file validation_matched"):
        load("mnli", mnli, test_split="validation_matched")


def test_scores_need_as_many_predictions() -> None:
    with pytest.raises(ValueError, match="rte: 1 predictions for 0 examples"):
        find_task("rte").score([1], [])


def test_hub_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder of the same name for the Hub's repository: its own code, without the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = HUB["mnli"][0]
    parts = {"train": 8, "validation_matched": 3, "test_matched": 2}
    sets = {
        "nyu-mll/glue": ("mnli", {
            part: [{**row, "premise": f"{part} {i}"} for i in range(n)] for part, n in parts.items()
        }),
        "aps/super_glue": ("multirc", {part: [
            {"paragraph": f"{part} {i // 4}", "question": f"{i // 2}", "answer": f"{i}", "label": i % 2,
             "idx": {"paragraph": i // 4, "question": i // 2, "answer": i}} for i in range(12)
        ] for part in ("train", "validation")}),
    }  # fmt: skip
    for identity, (subset, rows) in sets.items():
        folder = tmp_path / identity
        folder.mkdir(parents=True)
        files = "".join(f"  - split: {part}\n    path: {part}.parquet\n" for part in rows)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{files}---\n")
        for part, some in rows.items():
            datasets.Dataset.from_list(some).to_parquet(folder / f"{part}.parquet")
    mnli = load_task(find_task("mnli"), seed=0)
    assert sorted(one.prompt for one in mnli.test) == [f"validation_matched {i} ?" for i in range(3)]
    assert len(mnli.train) + len(mnli.dev) == 8 and mnli.report["files"] == {}
    data = load_task(find_task("multirc"), seed=0)
    assert len(data.test) == 12 and len({one.question for one in data.test}) == 6
    task = find_task("multirc")
    assert task.score([1] * 12, data.test) == {"f1a": pytest.approx(2 / 3), "exact_match": 0.0, "accuracy": 0.5}
    with pytest.raises(UserError, match="nyu-mll/glue .mnli. has no split 'all'"):
        load_task(find_task("mnli"), seed=0, test_split="all")


# Several seeds, and scores of single examples ---------------------------------------------------------


def test_the_files_are_read_once_for_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"a film no. {i % 50}\t{i % 2}" for i in range(60)]  # ten occur twice
    for part, own in (("train", rows), ("validation", [f"held out {i}\t1" for i in range(20)])):
        (tmp_path / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *own]) + "\n")
    sizes = {"train_examples": 12, "dev_examples": 6, "test_examples": 8}
    alone = {seed: load("sst2", tmp_path, seed, **sizes) for seed in (3, 5)}
    read: list[Path] = []
    read_file = loading.read_file
    monkeypatch.setattr(loading, "read_file", lambda path, name: read.append(path) or read_file(path, name))
    assert loading.load_seeds(find_task("sst2"), str(tmp_path), seeds=[3, 5], **sizes) == alone
    assert sorted(path.name for path in read) == ["train.tsv", "validation.tsv"]
    assert alone[3].train != alone[5].train and alone[3].report["duplicates"] == 10


def test_built_in_tasks_are_made_for_each_seed() -> None:
    sizes = {"train_examples": 12, "dev_examples": 6, "test_examples": 8}
    together = loading.load_seeds(find_task("yes-no"), seeds=[3, 5], **sizes)
    assert together == {seed: load_task(find_task("yes-no"), seed=seed, **sizes) for seed in (3, 5)}
    assert together[3].train != together[5].train


@pytest.mark.parametrize("name", TASKS)
def test_the_score_of_an_averaged_task_is_the_mean_of_those_of_its_examples(name: str) -> None:
    task, draw = TASKS[name], Random(name)
    texts = ["Paris", "the Paris", "London Paris", "#### 4", "#### 5", "in Rome"]
    examples, predictions = [], []
    for i in range(40):
        solution = draw.choice(texts[3:5])
        references: tuple[Any, ...] = (solution,) if task.solution else tuple(draw.sample(texts, 2))
        if name == "drop":
            references = tuple((one,) for one in references)
        label = draw.randrange(max(2, len(task.labels)))
        about = {"label": label, "options": ("Paris", "Rome"), "question": f"{i // 2}", "target": label}
        examples.append(TaskExample(f"row {i}", "p", "", ("a", "b"), references=references, **about))
        predictions.append(draw.choice(texts) if task.max_new_tokens else draw.randrange(2))
    headline = task.metrics[0]

    def score(some: list[int]) -> float:
        return task.score([predictions[i] for i in some], [examples[i] for i in some], headline_only=True)[headline]

    if task.averaged:
        assert score([*range(40)]) == pytest.approx(sum(score([i]) for i in range(40)) / 40, abs=1e-12)
    else:
        assert headline in ("f1a", "matthews", "spearman", "bleu")  # the metrics of a whole set
