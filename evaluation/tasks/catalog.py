"""The list of tasks: prompts (the paper's tables 12 and 13), metrics, classes, and where the data comes from.

Most tasks work with a causal language model and with a model that has a classification head. The GLUE tasks that the
paper has no prompt for need a head; tasks with written answers need a language model.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hift_ds.evaluation.tasks import metrics, templates
from hift_ds.launch.data import scores
from hift_ds.launch.data.answers import has_words
from hift_ds.launch.data.built_in import BUILT_IN
from hift_ds.launch.data.formats import LABEL_TASKS
from hift_ds.launch.errors import UserError, nearest

GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class TaskExample:
    """One example: a prompt with its answer, and the texts and class for a classifier."""

    where: str  # file and row, for messages
    prompt: str
    completion: str  # the answer to train on
    candidates: tuple[str, ...] = ()  # answers to choose from; empty for written answers
    label: int = -1  # index of the right candidate; -1 for written answers, or if none is right
    options: tuple[str, ...] = ()  # ReCoRD: the entity of each candidate
    references: tuple[Any, ...] = ()  # accepted answers: texts; DROP: tuples of spans
    passage: str = ""  # hash of the text that the question is about; sets from one split share no passage
    question: str = ""  # MultiRC: hash of passage and question; its answers stay together
    text: str = ""  # the classifier's input; empty for tasks without classes
    text_pair: str | None = None
    target: int | float | None = None  # index into `Task.labels`, or the number of a regression

    @property
    def content(self) -> tuple[str, ...]:
        """The prompt and its candidates; for tasks without a prompt, the texts."""
        if self.prompt or self.candidates:
            return self.prompt, *self.candidates
        return self.text, self.text_pair or ""

    @property
    def fingerprint(self) -> str:
        """Hash of the content, ignoring letter case, whitespace and Unicode form."""
        return content_hash(" ".join(unicodedata.normalize("NFKC", "\n".join(self.content)).casefold().split()))


# Takes predictions, right answers and examples.
Metric = Callable[[Sequence[Any], Sequence[Any], Sequence[TaskExample]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task: its data, how it is prompted or classified, and how it is scored.

    `data` is a name that launch/ knows (`data.name`), or an id on the Hub. Local files have the Hub's columns (parquet,
    JSONL or CSV, one file per split; see `columns`) or the publisher's own format (evaluation/tasks/publishers.py).
    `metrics` names the values that `metric` returns; the first one is the score. If `metric` leaves one out, the reason
    is in `metrics.MISSING`.
    """

    name: str
    data: str
    metric: Metric
    metrics: tuple[str, ...] = ("accuracy",)
    headline: Metric | None = None  # the score alone, for resamples, if the other metrics are slow
    subset: str | None = None  # the configuration on the Hub
    columns: str = ""  # a description of the columns, for data that launch/ does not know
    convert: templates.Convert | None = None  # for those: converts a row to the columns that launch/ uses
    test_split: str | None = None  # None = validation, or test if there is no validation split
    published: tuple[str, str] | None = None  # the publisher's names of the training and test files
    grouped: bool = False  # merge held-out rows with the same prompt into one example with all references
    max_new_tokens: int = 0  # for written answers; 0 for tasks with candidates
    stops: tuple[str, ...] = ()  # texts at which a written answer ends
    solution: bool = False  # the written answer is a solution in GSM8K's format, scored as a whole
    labels: tuple[str, ...] = ()  # the classes, for a model with a head; () if there are none
    regression: bool = False  # the head predicts a number; the only label is the number's name
    prompted: bool = True  # whether the task has a prompt template

    def __reduce__(self) -> tuple[Callable[[str], Task], tuple[str]]:
        """Pickle a task by its name, because its functions cannot be pickled."""
        return find_task, (self.name,)

    @property
    def built_in(self) -> bool:
        """Whether the examples are generated, without files or network."""
        return self.data in BUILT_IN

    @property
    def has_classes(self) -> bool:
        """Whether a classification head can be trained on it (a regression has no classes)."""
        return bool(self.labels) and not self.regression

    @property
    def averaged(self) -> bool:
        """Whether the score is the mean of the scores of single examples. F1 of classes is no task's score."""
        return self.metrics[0] in ("accuracy", "exact_match", "f1")

    def unanswered(self, texts: Sequence[str]) -> int:
        """Return how many written answers are empty; of solutions, how many have no final number."""
        answered = scores.extract_number if self.solution else has_words
        return sum(not answered(text) for text in texts)

    def score(
        self,
        predictions: Sequence[Any],
        examples: Sequence[TaskExample],
        *,
        classified: bool | None = None,
        headline_only: bool = False,
    ) -> dict[str, float]:
        """Return the metrics of predictions by name.

        Args:
            predictions: indices of candidates, or texts if `max_new_tokens` is not 0. With `classified`: indices into
                `labels`, or numbers for a regression.
            classified: whether the predictions come from a model with a head; None = only if the task has no prompt.
            headline_only: return the score alone.

        Raises:
            ValueError: the number of predictions differs from the number of examples, or the task has no such form.
        """
        if not examples or len(predictions) != len(examples):
            raise ValueError(f"{self.name}: {len(predictions)} predictions for {len(examples)} examples")
        if classified is None:
            classified = not self.prompted
        if classified and not self.labels or not classified and not self.prompted:
            raise ValueError(f"{self.name}: {classified=}, but {self.labels=} and {self.prompted=}")
        metric = self.headline if headline_only and self.headline else self.metric
        return metric(predictions, [one.target if classified else one.label for one in examples], examples)


def _labels(metric: Callable[..., dict[str, float]]) -> Metric:
    return lambda predictions, truths, _: metric(predictions, truths)


def _multirc(predictions: Sequence[Any], truths: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.multirc(predictions, truths, [one.question for one in examples])


def _record(predictions: Sequence[Any], _: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    chosen = [one.options[index] for index, one in zip(predictions, examples, strict=True)]
    return metrics.answers_match(chosen, [one.references for one in examples])


def _squad(predictions: Sequence[Any], _: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.answers_match(predictions, [one.references for one in examples])


def _drop(predictions: Sequence[Any], _: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.drop(predictions, [one.references for one in examples])


def _e2e(predictions: Sequence[Any], _: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.e2e(predictions, [one.references for one in examples])


def _bleu(predictions: Sequence[Any], _: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    return metrics.bleu(predictions, [one.references for one in examples])


def _solutions(predictions: Sequence[Any], _: Sequence[Any], examples: Sequence[TaskExample]) -> dict[str, float]:
    score = scores.number_match(predictions, [one.references[0] for one in examples])
    return {score.metric: score.value}


_accuracy = _labels(metrics.accuracy)
_QA = {"metrics": ("f1", "exact_match"), "max_new_tokens": 50, "stops": ("\n",)}
# A solution ends where lm-evaluation-harness ends it.
_SOLUTION = {"metrics": ("exact_match",), "stops": ("Question:", "</s>", "<|im_end|>"), "solution": True}


def _published(
    name: str, data: str, metric: Metric = _accuracy, metrics: tuple[str, ...] = ("accuracy",), **options: Any
) -> Task:
    """A task whose rows launch/ can read and convert."""
    labels = LABEL_TASKS[data].labels if data in LABEL_TASKS else ()
    return Task(name, data, metric, metrics, labels=labels, **options)


def _filled_in(
    name: str,
    data: str,
    template: str,
    columns: tuple[str, ...],
    label: str,
    words: dict[str, str],
    also: str = "",
    **options: Any,
) -> Task:
    """A task with a template of table 12. `words` maps each class, in the order of the ids, to its label word."""
    ids = ", ".join(f"{i} {one}" for i, one in enumerate(words))
    return Task(
        name,
        data,
        _accuracy,
        columns=f"{', '.join(columns)}, {label} ({ids}{also})",
        convert=templates.filled_in(template, columns, label, tuple(words.values())),
        labels=tuple(words),
        **options,
    )


def _glue(
    name: str,
    columns: tuple[str, ...],
    metric: Callable[..., dict[str, float]],
    metrics: tuple[str, ...],
    labels: tuple[str, ...],
) -> Task:
    """A GLUE task for which the paper has no template: it needs a classification head."""
    return Task(
        name,
        GLUE,
        _labels(metric),
        metrics,
        subset=name,
        columns=f"{', '.join(columns)}, label ({', '.join(f'{i} {one}' for i, one in enumerate(labels))})",
        convert=templates.labelled(columns, "label", len(labels)),
        labels=labels,
        prompted=False,
    )


_PAIR = ("sentence1", "sentence2")
_NLI_WORDS = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}

TASKS = {
    task.name: task
    for task in (
        _published("arithmetic", "arithmetic", _solutions, max_new_tokens=96, **_SOLUTION),  # type: ignore[arg-type]
        _published("yes-no", "yes-no"),
        _published("sst2", "sst2"),
        _filled_in(
            "sst5",
            "SetFit/sst5",
            "{0} It was [MASK] .",
            ("text",),
            "label",
            {
                "very negative": "terrible",
                "negative": "bad",
                "neutral": "okay",
                "positive": "good",
                "very positive": "great",
            },
            test_split="test",
        ),
        _filled_in(
            "snli",
            "stanfordnlp/snli",
            "{0} ? [MASK] , {1}",
            ("premise", "hypothesis"),
            "label",
            _NLI_WORDS,
            ", -1 none",
        ),
        _filled_in(
            "mnli",
            GLUE,
            "{0} ? [MASK] , {1}",
            ("premise", "hypothesis"),
            "label",
            _NLI_WORDS,
            subset="mnli",
            test_split="validation_matched",
        ),
        _filled_in(
            "trec",
            "CogComp/trec",
            "[MASK] : {0}",
            ("text",),
            "coarse_label",
            {
                "abbreviation": "Expression",
                "entity": "Entity",
                "description": "Description",
                "human": "Human",
                "location": "Location",
                "number": "Number",
            },
            test_split="test",
        ),
        _published("rte", "superglue/rte"),
        _published("boolq", "superglue/boolq"),
        _published("cb", "superglue/cb", _labels(metrics.accuracy_and_macro_f1), ("accuracy", "f1_macro")),
        _published("copa", "superglue/copa"),
        _published("multirc", "superglue/multirc", _multirc, ("f1a", "exact_match", "accuracy")),
        _published("record", "superglue/record", _record, ("f1", "exact_match")),
        _published("wic", "superglue/wic"),
        _published("wsc", "superglue/wsc"),
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
        Task(
            "e2e",
            "tuetschek/e2e_nlg",
            _e2e,
            metrics.E2E,
            headline=_bleu,
            columns="meaning_representation, human_reference; or mr, ref",
            convert=templates.e2e,
            test_split="test",
            published=("trainset", "testset_w_refs"),
            grouped=True,
            max_new_tokens=100,
            stops=("\n",),
        ),
        _published("gsm8k", "gsm8k", _solutions, max_new_tokens=320, **_SOLUTION),  # type: ignore[arg-type]
        _glue("cola", ("sentence",), metrics.matthews, ("matthews",), ("unacceptable", "acceptable")),
        _glue("mrpc", _PAIR, metrics.accuracy_and_f1, ("accuracy", "f1"), ("not_equivalent", "equivalent")),
        _glue("wnli", _PAIR, metrics.accuracy, ("accuracy",), ("not_entailment", "entailment")),
        _glue("qnli", ("question", "sentence"), metrics.accuracy, ("accuracy",), ("entailment", "not_entailment")),
        _glue(
            "qqp",
            ("question1", "question2"),
            metrics.accuracy_and_f1,
            ("accuracy", "f1"),
            ("not_duplicate", "duplicate"),
        ),
        Task(
            "stsb",
            GLUE,
            _labels(metrics.correlations),
            ("spearman", "pearson"),
            subset="stsb",
            columns="sentence1, sentence2, label (0 to 5, how similar they are)",
            convert=templates.rated(_PAIR, "label", 5),
            labels=("score",),
            regression=True,
            prompted=False,
        ),
    )
}

WITHOUT_DATA = " and ".join(name for name, task in TASKS.items() if task.built_in) + " are built in and need no data"


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        UserError: there is no such task; names all of them.
    """
    if name.lower() not in TASKS:
        known = f"expected {', '.join(TASKS)}{nearest(name.lower(), TASKS)}"
        raise UserError(f"unknown task {name!r}; {known} ({WITHOUT_DATA})")
    return TASKS[name.lower()]


def content_hash(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
