"""Publishers' own files: the same examples as from files in the columns of the Hub's copies; bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hift_ds.evaluation.compare.settings import _folder_of
from hift_ds.evaluation.tasks.catalog import find_task
from hift_ds.evaluation.tasks.loading import TaskData, load_task
from hift_ds.evaluation.tasks.publishers import PUBLISHERS
from hift_ds.launch.errors import UserError
from tests.support.data_fixtures import write_jsonl

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Super_Bowl",
            "paragraphs": [
                {
                    "context": 'It was "golden",\tin San José.',
                    "qas": [
                        {
                            "id": "a1",
                            "question": "Where?",
                            "answers": [
                                {"text": "San José", "answer_start": 19},
                                {"text": "in San José", "answer_start": 0},
                            ],
                        },
                        {"id": "a2", "question": "How?", "answers": [{"text": "golden", "answer_start": 8}]},
                    ],
                }
            ],
        }
    ],
}
NUMBER = {"number": "3", "date": {"day": "", "month": "", "year": ""}, "spans": []}
SPANS = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Ann", "Ben"]}
DROP = {
    "nfl_1": {
        "passage": "Ann and Ben had 3 cats.",
        "qa_pairs": [
            {"question": "How many?", "answer": NUMBER, "query_id": "x", "validated_answers": [SPANS]},
            {"question": "Who?", "answer": SPANS, "query_id": "y"},
        ],
    }
}
NLI = [
    {"gold_label": "neutral", "sentence1": 'A "man".', "sentence2": "He sleeps.", "pairID": "1"},
    {"gold_label": "-", "sentence1": "A dog.", "sentence2": "A cat.", "pairID": "2"},
    {"gold_label": "contradiction", "sentence1": "Two dogs.", "sentence2": "No dog.", "pairID": "3"},
]
NLI_HUB = [
    {"premise": 'A "man".', "hypothesis": "He sleeps.", "label": 1},
    {"premise": "A dog.", "hypothesis": "A cat.", "label": -1},
    {"premise": "Two dogs.", "hypothesis": "No dog.", "label": 2},
]
MNLI_TSV = (
    "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n"
    '0\t9\tA "man".\tHe sleeps.\tneutral\tneutral\n1\t9\tA dog.\tA cat.\tneutral\t-\n'
    "2\t9\tTwo dogs.\tNo dog.\tcontradiction\tcontradiction\n"
)
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe \"left.\tHe went.\n0\t7\t9\tIt rains.\tIt's dry.\n"
)
MRPC_HUB = [
    {"sentence1": 'He "left.', "sentence2": "He went.", "label": 1},
    {"sentence1": "It rains.", "sentence2": "It's dry.", "label": 0},
]

# Task, the training file and its content, and the same rows in the Hub's columns.
CASES: dict[str, tuple[str, str, str, list[dict[str, Any]]]] = {
    "squad": (
        "squad",
        "train-v1.1.json",
        json.dumps(SQUAD),
        [
            {"title": "Super_Bowl", "context": 'It was "golden",\tin San José.', "question": question,
             "answers": {"text": texts}}
            for question, texts in (("Where?", ["San José", "in San José"]), ("How?", ["golden"]))
        ],
    ),
    "drop": (
        "drop",
        "drop_dataset_train.json",
        json.dumps(DROP),
        [
            {"passage": "Ann and Ben had 3 cats.", "question": question, "answer": answer, "validated_answers": more}
            for question, answer, more in (("How many?", NUMBER, [SPANS]), ("Who?", SPANS, None))
        ],
    ),
    "snli": ("snli", "snli_1.0_train.jsonl", "\n".join(map(json.dumps, NLI)), NLI_HUB),
    "mnli": ("mnli", "multinli_1.0_train.jsonl", "\n".join(map(json.dumps, NLI)), NLI_HUB),
    "mnli of GLUE": ("mnli", "MNLI/train.tsv", MNLI_TSV, NLI_HUB),
    "sst5": (
        "sst5",
        "trees/train.txt",
        "(3 (2 The) (2 (2 -LRB-) (2 Rock)))\n(0 (1 7\\/10) (1 's))\n",
        [{"text": "the -lrb- rock", "label": 3}, {"text": r"7\/10 's", "label": 0}],
    ),
    "trec": (
        "trec",
        "train_5500.label",
        "DESC:manner How did it end ?\nNUM:count How many `` cats '' ?\nABBR:exp What is UN ?\n"
        "ENTY:food What is a pie ?\nHUM:ind Who ran ?\nLOC:city Where is it ?\n",
        [
            {"text": text, "coarse_label": label}
            for text, label in (("How did it end ?", 2), ("How many `` cats '' ?", 5), ("What is UN ?", 0),
                                ("What is a pie ?", 1), ("Who ran ?", 3), ("Where is it ?", 4))
        ],
    ),
    "cola": (
        "cola",
        "CoLA/train.tsv",
        'gj04\t1\t\tHe said "no.\nbc01\t0\t*\tHim left.\n',
        [{"sentence": 'He said "no.', "label": 1}, {"sentence": "Him left.", "label": 0}],
    ),
    "mrpc": ("mrpc", "msr_paraphrase_train.txt", MRPC, MRPC_HUB),
    "mrpc of GLUE": ("mrpc", "MRPC/train.tsv", MRPC, MRPC_HUB),
    "qnli": (
        "qnli",
        "QNLI/train.tsv",
        'index\tquestion\tsentence\tlabel\n0\tWhy "now?\tIt is.\tentailment\n1\tWho?\tAnn.\tnot_entailment\n',
        [
            {"question": 'Why "now?', "sentence": "It is.", "label": 0},
            {"question": "Who?", "sentence": "Ann.", "label": 1},
        ],
    ),
    "qqp": (
        "qqp",
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n4\t5\n6\t7\t8\tWho?\tWho is?\t1\n",
        [
            {"question1": "Why?", "question2": "How?", "label": 0},
            {"question1": "", "question2": "", "label": -1},
            {"question1": "Who?", "question2": "Who is?", "label": 1},
        ],
    ),
    "stsb": (
        "stsb",
        "STS-B/train.tsv",
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA b.\tA c.\t3.800\n1\tnews\tD.\tE.\t0.000\n",
        [
            {"sentence1": "A b.", "sentence2": "A c.", "label": 3.8},
            {"sentence1": "D.", "sentence2": "E.", "label": 0.0},
        ],
    ),
    "wnli": (
        "wnli",
        "WNLI/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tIt fell.\tIt is down.\t1\n1\tIt fell.\tIt is up.\t0\n",
        [
            {"sentence1": "It fell.", "sentence2": "It is down.", "label": 1},
            {"sentence1": "It fell.", "sentence2": "It is up.", "label": 0},
        ],
    ),
}  # fmt: skip


# Held out of those whose rows have one passage, since parts of one split have none in common.
CHANGED = {"Where?": "And where?", "How many?": "How many cats?"}
HELD_OUT = {
    "squad": ("dev-v1.1.json", CASES["squad"][2].replace("Where?", "And where?")),
    "drop": ("drop_dataset_dev.json", CASES["drop"][2].replace("How many?", "How many cats?")),
}


def put(folder: Path, name: str, content: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")
    return folder


def load(name: str, folder: Path, **options: Any) -> TaskData:
    return load_task(find_task(name), str(folder), seed=0, test_examples=1, dev_examples=0, **options)


def contents(data: TaskData) -> list[Any]:
    return sorted(
        (one.prompt, one.completion, one.candidates, one.label, one.references, one.text, one.text_pair, one.target)
        for one in (*data.train, *data.test)
    )


@pytest.mark.parametrize("case", CASES)
def test_the_same_examples_as_in_the_hub_s_columns(case: str, tmp_path: Path) -> None:
    name, file, content, rows = CASES[case]
    ours = put(tmp_path / "published", file, content)
    theirs = tmp_path / "columns"
    theirs.mkdir()
    write_jsonl(theirs / "train.jsonl", rows)
    if name in HELD_OUT:
        put(ours, *HELD_OUT[name])
        some = [{**row, "question": CHANGED.get(row["question"], row["question"])} for row in rows]
        write_jsonl(theirs / "validation.jsonl", some)
    published, columns = load(name, ours), load(name, theirs)
    assert contents(published) == contents(columns) and len(contents(columns)) >= 2
    for key in ("unlabeled", "read", "test_from"):
        assert published.report[key] == columns.report[key]
    assert str(ours / file) in published.report["files"]
    assert published.train[0].where.startswith(str(ours / file))


def test_every_publisher_is_tried() -> None:
    tried = {(name, file.rpartition("/")[2]) for name, file, *_ in CASES.values()} | {("squad", "train-v2.0.json")}
    assert tried == {(name, files.splits["train"]) for name, some in PUBLISHERS.items() for files in some}


def test_splits(tmp_path: Path) -> None:
    """The task's own, or the one that is asked for; one that is not there is said."""
    for part, subject in (("train", "A"), ("dev", "B"), ("test", "C")):
        put(tmp_path, f"snli_1.0_{part}.jsonl", json.dumps({**NLI[0], "sentence1": subject}))
    assert load("snli", tmp_path).test[0].text == "B" and load("snli", tmp_path, test_split="test").test[0].text == "C"
    with pytest.raises(UserError, match="snli: no split 'val' in .*; these files have train, validation, test"):
        load("snli", tmp_path, test_split="val")
    (tmp_path / "snli_1.0_test.jsonl").unlink()
    with pytest.raises(UserError, match="snli: no split 'test' in .*; expected snli_1.0_test.jsonl"):
        load("snli", tmp_path, test_split="test")
    for part, subject in (("train", "Six"), ("dev_matched", "Ten"), ("dev_mismatched", "No")):
        put(tmp_path / "MNLI", f"{part}.tsv", MNLI_TSV.replace("A ", f"{subject} ").replace("Two", subject))
    assert load("mnli", tmp_path).test[0].text.startswith("Ten")
    mismatched = load("mnli", tmp_path / "MNLI", test_split="validation_mismatched")
    assert mismatched.test[0].text.startswith("No")


def test_glue_s_folder_is_found(tmp_path: Path) -> None:
    put(tmp_path / "glue", CASES["cola"][1], CASES["cola"][2])
    assert _folder_of(find_task("cola"), str(tmp_path)) == str(tmp_path / "glue")
    assert _folder_of(find_task("squad"), str(tmp_path)) == str(tmp_path / "squad")
    (tmp_path / "cola").mkdir()
    assert _folder_of(find_task("cola"), str(tmp_path)) == str(tmp_path / "cola")


def test_glue_s_folders_in_small_letters(tmp_path: Path) -> None:
    put(tmp_path, "sts-b/train.tsv", CASES["stsb"][2])
    assert load("stsb", tmp_path).report["files"].keys() == {str(tmp_path / "sts-b" / "train.tsv")}


def test_files_to_test_on_alone(tmp_path: Path) -> None:
    """Those to train on are asked for, unless there are some in the Hub's columns."""
    with pytest.raises(UserError, match="squad: '.*' has dev-v1.1.json, but not train-v1.1.json; add it"):
        load("squad", put(tmp_path / "squad", *HELD_OUT["squad"]))
    put(tmp_path / "both", "dev.tsv", MRPC)
    put(tmp_path / "both", "msr_paraphrase_train.txt", MRPC)
    assert load("mrpc", tmp_path / "both").report["test_from"] == "training split"
    put(tmp_path / "mrpc", "dev.tsv", MRPC)
    write_jsonl(tmp_path / "mrpc" / "train.jsonl", MRPC_HUB)
    assert load("mrpc", tmp_path / "mrpc").report["files"].keys() == {str(tmp_path / "mrpc" / "train.jsonl")}


def test_squad_2_is_refused(tmp_path: Path) -> None:
    content = CASES["squad"][2].replace('"id": "a2"', '"is_impossible": true, "id": "a2"')
    with pytest.raises(UserError, match="train-v2.0.json question a2: has no answer, .*the files of SQuAD 1.1"):
        load("squad", put(tmp_path, "train-v2.0.json", content))


@pytest.mark.parametrize(
    ("case", "content", "message"),
    [
        ("squad", "[", "not readable as JSON"),
        ("squad", '{"data": [{"title": "a", "paragraphs": [{"qas": [{"id": "q"}]}]}]}', "no 'context' after"),
        ("squad", '{"data": [1]}', "expected data: .*after question 0"),
        ("squad", json.dumps(SQUAD).replace('"id": "a2"', '"is_impossible": true, "id": "a2"'), "a2: .*SQuAD 2.0"),
        ("drop", "[1]", r"expected \{NAME: .*no attribute 'items' after question 0"),
        ("drop", '{"p": {"passage": "a", "qa_pairs": [{"question": "b"}]}}', "no 'answer' after question 0"),
        ("snli", '{"sentence1": "a", "sentence2": "b"}', "jsonl:1: no column gold_label; it has sentence1, sentence2"),
        ("snli", json.dumps({**NLI[0], "gold_label": "perhaps"}), "train.jsonl:1: label 'perhaps' in column 'label'"),
        ("mnli of GLUE", "a\tb\nc\td\n", "train.tsv:2: no column sentence1, sentence2, gold_label; it has a, b"),
        ("sst5", "(3 (2 a))\nfine\n", r"train.txt:2: expected a tree as \(3 \(2 The\) \(2 Rock\)\), got 'fine'"),
        ("trec", "DESC:x What ?\nWHAT:x Who ?\n", "train_5500.label:2: expected a label of ABBR, .*; got 'WHAT:x Who"),
        ("trec", "DESC:manner\n", "train_5500.label:1: expected a label"),
        ("cola", "a b c\nd e f\n", "train.tsv: no line has 4 values between tabs"),
        ("qqp", "id\tquestion1\n1\tWhy?\n", "train.tsv:2: no column question2, is_duplicate"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.2\n", "train.tsv:2: score '5.2'"),
    ],
)  # fmt: skip
def test_wrong_files_are_named(case: str, content: str, message: str, tmp_path: Path) -> None:
    name, file, *_ = CASES[case]
    with pytest.raises(UserError, match=message):
        load(name, put(tmp_path, file, content))
