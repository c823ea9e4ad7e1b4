"""Read the publishers' files of tasks that launch/ does not know, into rows with the columns of the Hub's copies.

They are SQuAD 1.1, DROP, SNLI, MNLI (its own and GLUE's files), SST-5 (the trees), TREC, and GLUE's other tasks.
`loading.py` reads files that already have the Hub's columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ds.evaluation.tasks.catalog import Task
from hift_ds.launch.data.sources import VALIDATION, Row, read_file, read_lines
from hift_ds.launch.errors import UserError, shown

Read = Callable[[Path], list[Row]]
_NLI = {"entailment": 0, "neutral": 1, "contradiction": 2, "-": -1}  # "-" = the annotators did not agree
_TREC = {name: i for i, name in enumerate(("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"))}
_TREE = re.compile(r"\(([0-4]) .*\)")
_WORD = re.compile(r"\([0-4] ([^()]+)\)")


@dataclass(frozen=True)
class Files:
    """The files of a publisher's folder by split, and the function that reads them. `folder` is GLUE's subfolder."""

    splits: dict[str, str]
    read: Read
    folder: str = ""


def find_published(task: Task, place: Path, test_split: str | None) -> tuple[Read, dict[str, Path]] | None:
    """Find a publisher's files of "train" and, if something is held out, "eval"; None if there are none.

    Args:
        place: the task's folder, or GLUE's.
        test_split: the split to hold out; None = `task.test_split`, or else validation, or else test.

    Returns:
        The function that reads a file, and the files.

    Raises:
        UserError: the split does not exist, or there are test files but no training files.
    """
    lacking: UserError | None = None
    for files in PUBLISHERS.get(task.name, ()) if place.is_dir() else ():
        inside = (one for one in sorted(place.iterdir()) if one.is_dir() and one.name.lower() == files.folder.lower())
        for folder in (*inside, place):
            found = {split: folder / name for split, name in files.splits.items() if (folder / name).is_file()}
            if "train" not in found:
                if found and not any(folder.glob("train*")):  # otherwise these may be files with the Hub's columns
                    there = ", ".join(one.name for one in found.values())
                    expected = f"but not {files.splits['train']}; add it"
                    lacking = lacking or UserError(f"{task.name}: {str(folder)!r} has {there}, {expected}")
                continue
            wanted = (task.test_split, *VALIDATION, "test") if test_split is None else (test_split,)
            held_out = next((found[split] for split in wanted if split in found), None)
            if held_out is None and test_split is not None:
                name = files.splits.get(test_split)
                expected = f"expected {name}" if name else f"these files have {', '.join(files.splits)}"
                raise UserError(f"{task.name}: no split {test_split!r} in {str(folder)!r}; {expected}")
            return files.read, {"train": found["train"]} | ({"eval": held_out} if held_out else {})
    if lacking is not None:
        raise lacking
    return None


def _json_lines(columns: Mapping[str, str], labels: Mapping[str, int]) -> Read:
    """Make a reader of JSON lines. `columns` maps the Hub's column names to the publisher's."""

    def read(path: Path) -> list[Row]:
        return [(where, _renamed(row, columns, labels, where)) for where, row in read_file(path, "jsonl")]

    return read


def _table(columns: Mapping[str, str], labels: Mapping[str, int] | None = None, header: Sequence[str] = ()) -> Read:
    """Make a reader of tab-separated values, in which quotation marks are ordinary characters.

    Args:
        header: the column names of a file without a header line.

    Rows with another number of values count as unlabelled (QQP has a few).
    """

    def read(path: Path) -> list[Row]:
        lines = [line.rstrip("\r\n").split("\t") for line in read_lines(path)]
        names = header or (lines.pop(0) if lines else [])
        rows = []
        for number, values in enumerate(lines, 1 if header else 2):
            where = f"{path}:{number}"
            if len(values) == len(names):
                rows.append((where, _renamed(dict(zip(names, values, strict=True)), columns, labels or {}, where)))
            elif values != [""]:
                rows.append((where, dict.fromkeys(columns, "") | {"label": -1}))
        if lines and not any(row["label"] != -1 for _, row in rows):
            raise UserError(
                f"{path}: no line has {len(names)} values between tabs ({', '.join(names)}); give the publisher's file"
            )
        return rows

    return read


def _renamed(row: dict[str, Any], columns: Mapping[str, str], labels: Mapping[str, int], where: str) -> dict[str, Any]:
    lacking = [name for name in columns.values() if name not in row]
    if lacking:
        raise UserError(f"{where}: no column {', '.join(lacking)}; it has {', '.join(row)}; give the publisher's file")
    renamed = {ours: row[theirs] for ours, theirs in columns.items()}
    label = renamed["label"]
    return renamed | {"label": labels.get(label, label) if isinstance(label, str) else label}


def _squad(path: Path) -> list[Row]:
    rows = []
    try:
        for article in _json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    where = f"{path} question {qa['id']}"
                    if qa.get("is_impossible"):
                        raise UserError(f"{where}: has no answer, as in SQuAD 2.0; expected the files of SQuAD 1.1")
                    row = {"title": article["title"], "context": paragraph["context"], "question": qa["question"]}
                    rows.append((where, row | {"answers": {"text": [answer["text"] for answer in qa["answers"]]}}))
    except (KeyError, TypeError) as error:
        expected = "data: [{title, paragraphs: [{context, qas: [{id, question, answers: [{text}]}]}]}]"
        raise UserError(f"{path}: expected {expected}; {_fault(error)} after question {len(rows)}") from error
    return rows


def _drop(path: Path) -> list[Row]:
    rows = []
    try:
        for name, passage in _json(path).items():
            for number, qa in enumerate(passage["qa_pairs"], 1):
                row = {"passage": passage["passage"], "question": qa["question"], "answer": qa["answer"]}
                row["validated_answers"] = qa.get("validated_answers")
                rows.append((f"{path} {name}, question {number}", row))
    except (KeyError, TypeError, AttributeError) as error:
        expected = "{NAME: {passage, qa_pairs: [{question, answer, validated_answers}]}}"
        raise UserError(f"{path}: expected {expected}; {_fault(error)} after question {len(rows)}") from error
    return rows


def _fault(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def _trees(path: Path) -> list[Row]:
    """Read SST-5: one parse tree per line, with a label at each node; the root's label is the sentence's."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            tree, words = _TREE.fullmatch(line.strip()), _WORD.findall(line)
            if tree is None or not words:
                raise UserError(f"{path}:{number}: expected a tree as (3 (2 The) (2 Rock)), got {shown(line.strip())}")
            # As in the Hub's copy, SetFit/sst5: lower case, and -lrb-, -rrb-, \/ and \* stay as they are.
            rows.append((f"{path}:{number}", {"text": " ".join(words).lower(), "label": int(tree[1])}))
    return rows


def _trec(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_lines(path, "latin-1"), 1):
        label, _, text = line.strip().partition(" ")
        coarse = label.partition(":")[0]
        if line.strip() and (coarse not in _TREC or not text):
            raise UserError(
                f"{path}:{number}: expected a label of {', '.join(_TREC)} and a question, as in 'DESC:manner How ...'; "
                f"got {shown(line.strip())}"
            )
        if text:  # the file's only character beyond ASCII is a mistake
            rows.append((f"{path}:{number}", {"text": text.replace("\xf0", " "), "coarse_label": _TREC[coarse]}))
    return rows


def _glue(folder: str, read: Read) -> Files:
    return Files({"train": "train.tsv", "validation": "dev.tsv"}, read, folder)


_PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}
_PREMISE = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}
_STRINGS = {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}
_QUESTIONS = {"question1": "question1", "question2": "question2", "label": "is_duplicate"}

PUBLISHERS: dict[str, tuple[Files, ...]] = {
    "squad": (
        Files({"train": "train-v1.1.json", "validation": "dev-v1.1.json"}, _squad),
        Files({"train": "train-v2.0.json", "validation": "dev-v2.0.json"}, _squad),  # `_squad` refuses them
    ),
    "drop": (Files({"train": "drop_dataset_train.json", "validation": "drop_dataset_dev.json"}, _drop),),
    "snli": (
        Files(
            {
                "train": "snli_1.0_train.jsonl",
                "validation": "snli_1.0_dev.jsonl",
                "test": "snli_1.0_test.jsonl",
            },
            _json_lines(_PREMISE, _NLI),
        ),
    ),
    "mnli": (
        Files(
            {
                "train": "multinli_1.0_train.jsonl",
                "validation_matched": "multinli_1.0_dev_matched.jsonl",
                "validation_mismatched": "multinli_1.0_dev_mismatched.jsonl",
            },
            _json_lines(_PREMISE, _NLI),
        ),
        Files(
            {
                "train": "train.tsv",
                "validation_matched": "dev_matched.tsv",
                "validation_mismatched": "dev_mismatched.tsv",
            },
            _table(_PREMISE, _NLI),
            "MNLI",
        ),
    ),
    "sst5": (Files({"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}, _trees, "trees"),),
    "trec": (Files({"train": "train_5500.label", "test": "TREC_10.label"}, _trec),),
    "cola": (
        _glue("CoLA", _table({"sentence": "text", "label": "label"}, header=("source", "label", "mark", "text"))),
    ),
    "mrpc": (
        _glue("MRPC", _table(_STRINGS)),
        Files({"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}, _table(_STRINGS), "MRPC"),
    ),
    "qnli": (
        _glue(
            "QNLI",
            _table(
                {"question": "question", "sentence": "sentence", "label": "label"},
                {"entailment": 0, "not_entailment": 1},
            ),
        ),
    ),
    "qqp": (_glue("QQP", _table(_QUESTIONS)),),
    "stsb": (_glue("STS-B", _table(_PAIR | {"label": "score"})),),
    "wnli": (_glue("WNLI", _table(_PAIR | {"label": "label"})),),
}
