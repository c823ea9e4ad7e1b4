"""The tasks that methods are compared on: prompts by the paper's templates (tables 12 and 13), parts by seed, metrics.

As in MeZO (Malladi et al. 2023), a seed draws 1,000 examples to train on, 500 to choose by (`dev`) and 1,000 to test.
Files and published rows are read by launch/, which also trains; evaluation/scoring.py makes the predictions.
"""

from __future__ import annotations

import collections
import hashlib
import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation import metrics, templates
from launch import scores
from launch.encoding import as_question, spaced
from launch.errors import UserError, nearest
from launch.formats import convert, flatten
from launch.sources import PUBLISHED, Row, file_sha256, find_files, read_file, read_hub

SEPARATOR = "\n\n"  # between demonstrations, as in MeZO
PARTS = ("train", "dev", "test")
WEIGHTS = {"train": 2, "dev": 1, "test": 2}  # in which they share a split that is too small: 1,000 to 500 to 1,000


@dataclass(frozen=True)
class TaskExample:
    """One thing to answer."""

    where: str  # the row it comes from, for messages
    prompt: str
    completion: str  # what training teaches after the prompt
    candidates: tuple[str, ...] = ()  # texts to choose from after the prompt; empty where an answer is written
    label: int = -1  # the right candidate's index; -1 where an answer is written, or none is right
    options: tuple[str, ...] = ()  # ReCoRD: the entity that each candidate stands for
    references: tuple[Any, ...] = ()  # accepted answers: texts; DROP: tuples of spans
    passage: str = ""  # hash of the text that the question is about; parts cut from one split share none
    question: str = ""  # MultiRC: hash of passage and question, whose answers stay together

    @property
    def fingerprint(self) -> str:
        """Hash of the prompt and its candidates, up to letter case, whitespace and Unicode form."""
        text = "\n".join((self.prompt, *self.candidates))
        return _hash(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


Metric = Callable[[Sequence[Any], Sequence[TaskExample]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What a task is made of.

    `data` is its name in launch/, or its id on the Hub, whose columns files at a path must have, too (JSONL or
    parquet, a file for each split): see `columns`. `metrics` names the values of `metric`; the first is the headline.
    """

    name: str
    data: str
    metric: Metric
    metrics: tuple[str, ...] = ("accuracy",)
    subset: str | None = None  # the Hub's configuration
    columns: str = ""  # of sets that launch/ does not know
    convert: templates.Convert | None = None  # for those: a row in launch's columns
    test_split: str | None = None  # null: validation, else test
    max_new_tokens: int = 0  # of a written answer; 0 for tasks with candidates
    stop: str | None = None  # text that ends a written answer

    def score(self, predictions: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
        """The metrics of predictions: indices of candidates, or texts where `max_new_tokens` is not 0."""
        if not examples or len(predictions) != len(examples):
            raise ValueError(f"{self.name}: {len(predictions)} predictions for {len(examples)} examples")
        return self.metric(predictions, examples)


def _labels(metric: Callable[..., dict[str, float]]) -> Metric:
    return lambda predictions, examples: metric(predictions, [one.label for one in examples])


def _multirc(predictions: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.multirc(predictions, [one.label for one in examples], [one.question for one in examples])


def _record(predictions: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    chosen = [one.options[index] for index, one in zip(predictions, examples, strict=True)]
    return metrics.answers_match(chosen, [one.references for one in examples])


def _squad(predictions: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.answers_match(predictions, [one.references for one in examples])


def _drop(predictions: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.drop(predictions, [one.references for one in examples])


def _gsm8k(predictions: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    score = scores.number_match(predictions, [one.references[0] for one in examples])
    return {score.metric: score.value}


_accuracy = _labels(metrics.accuracy)
_NLI = ("Yes", "Maybe", "No")  # entailment, neutral, contradiction, by the labels' ids
_QA = {"metrics": ("f1", "exact_match"), "max_new_tokens": 50, "stop": "\n"}

TASKS = {
    task.name: task
    for task in (
        Task("sst2", "sst2", _accuracy),
        Task(
            "sst5",
            "SetFit/sst5",
            _accuracy,
            columns="text, label (0 very negative to 4 very positive)",
            convert=templates.filled_in(
                "{0} It was [MASK] .", ["text"], "label", ("terrible", "bad", "okay", "good", "great")
            ),
            test_split="test",
        ),
        Task(
            "snli",
            "stanfordnlp/snli",
            _accuracy,
            columns="premise, hypothesis, label (0 entailment, 1 neutral, 2 contradiction, -1 none)",
            convert=templates.filled_in("{0} ? [MASK] , {1}", ["premise", "hypothesis"], "label", _NLI),
        ),
        Task(
            "mnli",
            "nyu-mll/glue",
            _accuracy,
            subset="mnli",
            columns="premise, hypothesis, label (0 entailment, 1 neutral, 2 contradiction)",
            convert=templates.filled_in("{0} ? [MASK] , {1}", ["premise", "hypothesis"], "label", _NLI),
            test_split="validation_matched",
        ),
        Task(
            "trec",
            "CogComp/trec",
            _accuracy,
            columns="text, coarse_label (0 abbreviation, 1 entity, 2 description, 3 human, 4 location, 5 number)",
            convert=templates.filled_in(
                "[MASK] : {0}",
                ["text"],
                "coarse_label",
                ("Expression", "Entity", "Description", "Human", "Location", "Number"),
            ),
            test_split="test",
        ),
        Task("rte", "superglue/rte", _accuracy),
        Task("boolq", "superglue/boolq", _accuracy),
        Task("cb", "superglue/cb", _labels(metrics.accuracy_and_macro_f1), ("accuracy", "f1_macro")),
        Task("copa", "superglue/copa", _accuracy),
        Task("multirc", "superglue/multirc", _multirc, ("f1a", "exact_match", "accuracy")),
        Task("record", "superglue/record", _record, ("f1", "exact_match")),
        Task("wic", "superglue/wic", _accuracy),
        Task("wsc", "superglue/wsc", _accuracy),
        Task(
            "squad",
            "rajpurkar/squad",
            _squad,
            columns="title, context, question, answers {text: [...]}",
            convert=templates.squad,
            **_QA,  # type: ignore[arg-type]
        ),
        Task(
            "drop",
            "ucinlp/drop",
            _drop,
            columns="passage, question, answers_spans {spans: [...]}; or answer and validated_answers",
            convert=templates.drop,
            **_QA,  # type: ignore[arg-type]
        ),
        Task("gsm8k", "gsm8k", _gsm8k, ("exact_match",), max_new_tokens=320),
    )
}


def find_task(name: str) -> Task:
    """The task of that name."""
    if name.lower() not in TASKS:
        raise UserError(f"unknown task {name!r}; expected {', '.join(TASKS)}{nearest(name.lower(), TASKS)}")
    return TASKS[name.lower()]


# Data ------------------------------------------------------------------------------------------------


@dataclass
class TaskData:
    """The parts of a task for one seed.

    `report` has `task`, `seed`, `files` (path -> sha256), `test_from` (where the test part comes from), `read` (rows
    by split), `unlabeled`, `duplicates` (dropped from training), `in_test` (dropped from training because the test
    split has them), for each part its count and `sha256`, and `notes`: sentences for the user.
    """

    train: list[TaskExample]
    dev: list[TaskExample]
    test: list[TaskExample]
    report: dict[str, Any] = field(default_factory=dict)

    def demonstrations(self, k: int, seed: int) -> list[TaskExample]:
        """k training examples for in-context learning, drawn by the seed."""
        if k > len(self.train):
            raise UserError(f"{k} demonstrations, but {len(self.train)} training examples; lower the number")
        return random.Random(f"demonstrations {seed}").sample(self.train, k)


def load_task(
    task: Task,
    path: str | None = None,
    *,
    seed: int,
    train_examples: int = 1000,
    dev_examples: int = 500,
    test_examples: int = 1000,
    test_split: str | None = None,
    revision: str | None = None,
) -> TaskData:
    """Read a task and draw its parts; the same arguments give the same parts.

    Where nothing labelled is held out, the test part is cut from the training split. Where that split has too few
    examples for all parts that come from it, they share it. Parts from one split have no passage in
    common, and no example of the whole test split is in the others.

    Args:
        path: the publisher's folder (gsm8k, sst2, SuperGLUE's), for other tasks a folder with files of the splits in
            `task.columns`; None = from the Hub.
        test_split: the split to test on; None = the task's own, if it is there.
        revision: git revision on the Hub.
    """
    wanted = {"train": train_examples, "dev": dev_examples, "test": test_examples}
    for part, n in wanted.items():
        least = 0 if part == "dev" else 1
        if n < least:
            raise UserError(f"{task.name}: {part}_examples is {n}; expected at least {least}")
    rows, files = _read(task, path, test_split, revision)
    if not rows["train"]:
        raise UserError(f"{task.name}: {path or task.data!r} has no training rows; give another path")
    notes: list[str] = []
    pool = _examples(task, rows["train"])
    published = _examples(task, rows["eval"])
    unlabeled = sum(one is None for one in (*pool, *published))
    tested = [one for one in published if one is not None]
    known = {one.fingerprint for one in tested}
    unseen = [one for one in pool if one is not None and one.fingerprint not in known]
    in_test = sum(one is not None for one in pool) - len(unseen)
    distinct = list({one.fingerprint: one for one in reversed(unseen)}.values())[::-1]  # the first of each

    parts = ("train", "dev") if tested else PARTS
    shares = _shares(len(distinct), {part: wanted[part] for part in parts})
    if any(shares[part] < wanted[part] for part in parts):
        notes.append(
            f"the training split has {len(distinct)} different examples for {sum(wanted[p] for p in parts)} wanted; "
            + ", ".join(f"{part} gets at most {shares[part]} of {wanted[part]}" for part in parts)
        )
    if not tested:
        notes.append("nothing labelled is held out: the test part is cut from the training split by the seed")
    drawn = _divide(distinct, shares, seed)
    if tested:
        drawn["test"] = _draw(tested, test_examples, f"test {seed}")
        if len(drawn["test"]) < min(test_examples, len(tested)):
            notes.append(f"test: {len(drawn['test'])} of {test_examples}, because questions stay whole")
        elif len(tested) < test_examples:
            notes.append(f"test: {test_examples} wanted, but the split has {len(tested)}; all are used")
    for part in ("train", "test"):
        if not drawn[part]:
            raise UserError(
                f"{task.name}: no example is left for {part} ({len(distinct)} different ones in the training split "
                f"and {len(tested)} held out); raise {part}_examples, lower the others, or give more data"
            )
    check_disjoint(drawn["train"] + drawn["dev"], drawn["test"])
    report = {
        "task": task.name,
        "seed": seed,
        "files": files,
        "test_from": "held-out split" if tested else "training split",
        "read": {"train": len(pool), "test": len(published)},
        "unlabeled": unlabeled,
        "duplicates": len(unseen) - len(distinct),
        "in_test": in_test,
        **{part: {"examples": len(drawn[part]), "sha256": _sha256(drawn[part])} for part in PARTS},
        "notes": notes,
    }
    return TaskData(**drawn, report=report)


def check_disjoint(training: Iterable[TaskExample], test: Iterable[TaskExample]) -> None:
    """Fails where a test example is in the training set (by hash of the normalized prompt)."""
    tested = {one.fingerprint: one.where for one in test}
    found = [(one.where, tested[one.fingerprint]) for one in training if one.fingerprint in tested]
    if found:
        raise UserError(
            f"{len(found)} test examples are in the training set; the first is {found[0][0]}, which tests as "
            f"{found[0][1]}; remove them from one side"
        )


def few_shot(demonstrations: Sequence[TaskExample]) -> str:
    """Demonstrations as the text before a prompt; empty without any."""
    return "".join(one.prompt + spaced(one.prompt, one.completion) + SEPARATOR for one in demonstrations)


def training_rows(examples: Sequence[TaskExample]) -> list[Row]:
    """Examples as rows of the format prompt-completion, for `launch.encoding.encode` (without its `question`)."""
    return [(one.where, {"prompt": one.prompt, "completion": one.completion}) for one in examples]


def _read(
    task: Task, path: str | None, test_split: str | None, revision: str | None
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows of "train" and "eval" (empty where nothing is held out), and the files' hashes."""
    if path is None:
        return read_hub(task.data, task.subset, revision, "train", test_split or task.test_split), {}
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{task.name}: {path!r} does not exist (looked in {Path.cwd()})")
    kind = task.data
    if kind not in PUBLISHED:
        files = [place] if place.is_file() else list(place.iterdir())
        kind = "parquet" if any(one.suffix == ".parquet" for one in files) else "jsonl"
    try:
        found = find_files(kind, path, "train", None, test_split or task.test_split)
    except UserError:
        if test_split is not None or task.test_split is None:
            raise
        found = find_files(kind, path, "train", None, None)  # without the task's own
    rows: dict[str, list[Row]] = {"train": [], "eval": []}
    for part, paths in found.items():
        for one in paths:
            rows[part] += read_file(one, kind)
    return rows, {str(one): file_sha256(one) for paths in found.values() for one in paths}


def _examples(task: Task, rows: Sequence[Row]) -> list[TaskExample | None]:
    """One for each row, or each answer of a nested one; None where nobody labelled it."""
    if task.convert is not None:
        return [_example(task, row, task.convert(row, where), where) for where, row in rows]
    flat = [(where, one) for where, row in rows for one in flatten(task.data, row, where)]
    converted, _ = convert(task.data, "prompt-completion", {}, {"rows": flat})
    pairs = zip(flat, converted["rows"], strict=True)
    return [_example(task, row, made, where) for (where, row), (_, made) in pairs]


def _example(task: Task, row: dict[str, Any], made: dict[str, Any] | None, where: str) -> TaskExample | None:
    if made is None:
        return None
    prompt, completion, candidates = made["prompt"], made["completion"], made.get("candidates", ())
    references = made.get("references", ())
    if task.name == "record":
        references = tuple(dict.fromkeys(row["answers"]))
        if not candidates:
            raise UserError(f"{where}: expected the passage's entities to choose from, found none")
    elif task.name == "gsm8k":
        prompt, references = as_question(prompt), (completion,)
    passage = next((row[column] for column in ("passage", "paragraph", "context") if column in row), None)
    passage = passage or "\n".join((prompt, *candidates))
    return TaskExample(
        where=where,
        prompt=prompt,
        completion=completion,
        candidates=candidates,
        label=candidates.index(completion) if completion in candidates else -1,
        options=made.get("entities", ()),
        references=references,
        passage=_hash(passage),
        question=_hash(passage + "\n" + row["question"]) if task.name == "multirc" else "",
    )


# Drawing ---------------------------------------------------------------------------------------------


def _shares(n: int, wanted: dict[str, int]) -> dict[str, int]:
    """How many of n examples each part gets: what it wants, or its share by weight where they are too few."""
    shares: dict[str, int] = {}
    left = n
    for part in sorted(wanted, key=lambda part: wanted[part]):  # those who want little get it, the others share
        weights = sum(WEIGHTS[other] for other in wanted if other not in shares)
        shares[part] = min(wanted[part], max(left * WEIGHTS[part] // weights, 1), left)
        left -= shares[part]
    return shares


def _divide(examples: list[TaskExample], shares: dict[str, int], seed: int) -> dict[str, list[TaskExample]]:
    """Parts without a passage in common: whole passages go to test and dev until those are full, the rest to train."""
    passages: dict[str, list[TaskExample]] = collections.defaultdict(list)
    for one in examples:
        passages[one.passage].append(one)
    order = list(passages)
    random.Random(f"passages {seed}").shuffle(order)
    drawn: dict[str, list[TaskExample]] = {}
    for part in ("test", "dev"):
        if part in shares:
            members: list[TaskExample] = []
            while len(order) > 1 and len(members) < shares[part]:  # one is for train
                members += passages[order.pop()]
            drawn[part] = _draw(members, shares[part], f"{part} {seed}")
    drawn["train"] = _draw([one for key in order for one in passages[key]], shares["train"], f"train {seed}")
    return drawn


def _draw(examples: Sequence[TaskExample], n: int, seed: str) -> list[TaskExample]:
    """At most n examples in a seeded order; the answers to a question stay together."""
    questions: dict[str, list[TaskExample]] = collections.defaultdict(list)
    for index, one in enumerate(examples):
        questions[one.question or str(index)].append(one)
    order = list(questions.values())
    random.Random(seed).shuffle(order)
    drawn: list[TaskExample] = []
    for members in order:
        if len(drawn) + len(members) <= n:
            drawn += members
    return drawn


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(examples: Sequence[TaskExample]) -> str:
    return _hash("\n".join(json.dumps([one.prompt, one.completion, one.candidates]) for one in examples))
