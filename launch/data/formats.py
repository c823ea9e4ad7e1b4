"""Convert rows of published data sets and of users' files to the columns of one format.

prompt-completion: `prompt`, `completion` (texts). Trained: the completion and the end-of-sequence token.
chat: `messages` (list of {role, content}), optional `tools`. Trained: each assistant's turn with its end-of-turn token.
text-label: `text`, `label`, optional `text_pair`. Trained: the label (sequence classification).

Users' files have these columns, or others that `data.columns` maps to them. The columns of Alpaca, of ShareGPT and of
published sets are known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from hift_ds.launch.data import scores
from hift_ds.launch.data.messages import read_messages, read_tools
from hift_ds.launch.errors import UserError, listed, nearest, shown

FORMATS = {
    "prompt-completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text-label": ("text", "label"),
}
COLUMNS = ("prompt", "input", "completion", "messages", "text", "text_pair", "label")
# Columns that a format takes if they are there. `input` continues the prompt; it must be mapped, as in Alpaca's files.
OPTIONAL = {"prompt-completion": ("input",), "chat": ("tools",), "text-label": ("text_pair",)}
KNOWN_COLUMNS = (
    {"prompt": "instruction", "completion": "output"},  # Alpaca
    {"messages": "conversations"},  # ShareGPT
)
MAX_LABELS = 100_000  # a larger number is no class


# Published sets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelTask:
    """A published set of labelled texts.

    Attributes:
        columns: its text columns.
        prompt: writes the prompt of the HiFT paper's Table 13 for a row.
        texts: returns the text of a row, and the second text or None, for a classifier.
        labels: the labels' names in the order of their ids.
        words: the answer in words for each label.
    """

    columns: tuple[str, ...]
    prompt: Callable[[dict[str, Any]], str]
    texts: Callable[[dict[str, Any]], tuple[str, str | None]]
    labels: tuple[str, ...] = ("false", "true")
    words: tuple[str, ...] = ("No", "Yes")


LABEL_TASKS = {
    "yes-no": LabelTask(
        columns=("passage", "question"),
        prompt=lambda row: f"{row['passage']} {row['question']} Yes or No?",
        texts=lambda row: (row["passage"], row["question"]),
        labels=("no", "yes"),
    ),
    "sst2": LabelTask(
        columns=("sentence",),
        prompt=lambda row: f"{row['sentence'].strip()} It was",
        texts=lambda row: (row["sentence"].strip(), None),
        labels=("0", "1"),
        words=("terrible", "great"),
    ),
    "superglue/rte": LabelTask(
        columns=("premise", "hypothesis"),
        prompt=lambda row: f'{row["premise"]} Does this mean that "{row["hypothesis"]}" is true? Yes or No?',
        texts=lambda row: (row["premise"], row["hypothesis"]),
        labels=("entailment", "not_entailment"),
        words=("Yes", "No"),
    ),
    "superglue/cb": LabelTask(
        columns=("premise", "hypothesis"),
        prompt=lambda row: f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?',
        texts=lambda row: (row["premise"], row["hypothesis"]),
        labels=("entailment", "contradiction", "neutral"),
        words=("Yes", "No", "Maybe"),
    ),
    "superglue/boolq": LabelTask(
        columns=("passage", "question"),
        prompt=lambda row: f"{row['passage']} {row['question'].rstrip(' ?')}?",
        texts=lambda row: (row["passage"], row["question"]),
    ),
    "superglue/wsc": LabelTask(
        columns=("text", "span1_text", "span2_text"),
        prompt=lambda row: (
            f'{row["text"]} In the previous sentence, does the pronoun "{row["span2_text"]}" refer to '
            f"{row['span1_text']}? Yes or No?"
        ),
        texts=lambda row: (row["text"], f"{row['span2_text']} refers to {row['span1_text']}"),
    ),
    "superglue/wic": LabelTask(
        columns=("word", "sentence1", "sentence2"),
        prompt=lambda row: (
            f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No? '
            f"{row['sentence1']} {row['sentence2']}"
        ),
        texts=lambda row: (f"{row['word']}: {row['sentence1']}", row["sentence2"]),
    ),
    "superglue/multirc": LabelTask(
        columns=("paragraph", "question", "answer"),
        prompt=lambda row: (
            f'{row["paragraph"]} Question: {row["question"]} I found this answer "{row["answer"]}". '
            "Is that correct? Yes or No?"
        ),
        texts=lambda row: (row["paragraph"], f"{row['question']} {row['answer']}"),
    ),
}
SOLUTION_TASKS = ("arithmetic", "gsm8k")  # columns question and answer, the answer ending in `#### N`
CHOICE_TASKS = ("superglue/copa", "superglue/record")


def flatten(name: str, row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Split a nested row of SuperGLUE into flat rows, one for each question; return other rows unchanged.

    Raises:
        UserError: the row is not as published; `where` names its place.
    """
    passage = row.get("passage")
    try:
        if name == "superglue/multirc" and isinstance(passage, dict):
            return [
                {
                    "paragraph": passage["text"],
                    "question": question["question"],
                    "answer": answer["text"],
                    "label": answer.get("label"),
                }
                for question in passage["questions"]
                for answer in question["answers"]
            ]
        if name == "superglue/record" and isinstance(passage, dict):
            return [
                {
                    "passage": passage["text"],
                    "query": query["query"],
                    "answers": [answer["text"] for answer in query.get("answers", [])],
                    "entities": [
                        passage["text"][entity["start"] : entity["end"] + 1] for entity in passage.get("entities", [])
                    ],
                }
                for query in row["qas"]
            ]
        if name == "superglue/wsc" and isinstance(row.get("target"), dict):
            return [{**row, **row["target"]}]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a row of {name} as published ({error!r})") from error
    return [row]


def _label_task_row(task: LabelTask, classify: bool, row: dict[str, Any], where: str) -> dict[str, Any]:
    for column in task.columns:
        text_of(row, column, where)
    value = row.get("label")
    spelled = str(value).lower()  # publishers write true, "true" and 1 for the same label
    if spelled in task.labels:
        label = task.labels.index(spelled)
    elif spelled in map(str, range(len(task.labels))):
        label = int(spelled)
    else:
        raise UserError(
            f"{where}: label {shown(value)}; expected {', '.join(task.labels)} or its number. Publishers' "
            "test splits may have no labels: name another split"
        )
    if classify:
        text, pair = task.texts(row)
        return {"text": text, "text_pair": pair, "label": label}
    return {
        "prompt": task.prompt(row),
        "completion": task.words[label],
        "accepted": (task.words[label],),
        "candidates": task.words,
    }


def _solution_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    question, answer = text_of(row, "question", where), text_of(row, "answer", where)
    if scores.reference_number(answer) is None:
        raise UserError(
            f"{where}: the answer must end in '#### ' and a plain number, such as 1,000 or -2.5, without a unit; got "
            f"{shown(answer[-80:])}"
        )
    return {"prompt": question, "completion": answer}


def _copa_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    premise, *choices = (text_of(row, column, where) for column in ("premise", "choice1", "choice2"))
    links = {"cause": "because", "effect": "so", 0: "because", 1: "so"}  # the Hub's copy has numbers
    if row.get("question") not in list(links) or row.get("label") not in (0, 1):
        raise UserError(
            f"{where}: expected question cause or effect and label 0 or 1, got "
            f"{shown((row.get('question'), row.get('label')))}"
        )
    # The choices continue a sentence.
    choices = [one if one.startswith("I ") else one[:1].lower() + one[1:] for one in choices]
    choice = choices[int(row["label"])]
    prompt = f"{premise.rstrip(' .')} {links[row['question']]}"
    return {"prompt": prompt, "completion": choice, "accepted": (choice,), "candidates": tuple(choices)}


def _record_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Cut the query at the missing entity; the completion is the entity and the rest of the query."""
    passage, query = text_of(row, "passage", where), text_of(row, "query", where)
    before, placeholder, after = query.partition("@placeholder")
    answers, entities = (_distinct_texts(row.get(column), column, where) for column in ("answers", "entities"))
    accepted = tuple(answer + after for answer in answers)
    if not accepted or not placeholder:
        raise UserError(f"{where}: expected a query with @placeholder and an answer; got {shown(query)}")
    return {
        "prompt": f"{passage} {before}".rstrip(),
        "completion": accepted[0],
        "accepted": accepted,
        "candidates": tuple(entity + after for entity in entities),
        "entities": entities,
    }


def _distinct_texts(value: Any, column: str, where: str) -> tuple[str, ...]:
    texts = value or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: expected a list of texts in column {column!r}, got {shown(value)}")
    return tuple(dict.fromkeys(texts))


# Any set ---------------------------------------------------------------------------------------------


def possible_formats(name: str) -> tuple[str, ...]:
    """Return the formats that `data.format` may name for `data.name`."""
    name = name.lower()
    if name in (*SOLUTION_TASKS, *CHOICE_TASKS):
        return ("prompt-completion",)
    return ("prompt-completion", "text-label") if name in LABEL_TASKS else tuple(FORMATS)


@dataclass
class Survey:
    """What must be known of all rows of a part before the first one can be converted.

    Args:
        label: the column of a user's labels; None if rows have none.

    Attributes:
        rows: how many there are.
        columns: the columns found, each with the number of rows in which it has a value, and the first of them.
        names: the labels that are texts.
        highest: the highest label that is a whole number; None if there is none.
    """

    label: str | None = None
    rows: int = 0
    columns: dict[str, tuple[int, str]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    highest: int | None = None

    def add(self, where: str, row: dict[str, Any]) -> None:
        """Count a row, which is at `where`."""
        self.rows += 1
        for column, value in row.items():
            found, first = self.columns.get(column, (0, ""))
            self.columns[column] = (found, first) if value is None else (found + 1, first or where)
        if self.label is not None:
            value = row.get(self.label)
            number = _as_number(value)
            if number is not None:
                self.highest = max(number, self.highest or 0)
            elif isinstance(value, str):
                self.names.add(value)


def unused_columns(format_: str, columns: dict[str, str], survey: Survey) -> dict[str, tuple[int, str]]:
    """Return the columns with values that a format does not take, each with its number of rows and the first one."""
    used = {columns.get(ours, ours) for ours in FORMATS[format_]}
    used |= {columns.get(ours, ours) for ours in OPTIONAL[format_] if ours in columns or ours != "input"}
    return {column: found for column, found in survey.columns.items() if column not in used and found[0]}


def find_format(
    name: str, wanted: str | None, columns: dict[str, str], found: Iterable[str], task: str
) -> tuple[str, dict[str, str]]:
    """Return the format that `data.format` (`wanted`) names or that the columns `found` in rows fit, and its columns.

    The columns are those of `data.columns`, and the known ones of Alpaca's and ShareGPT's files.

    Raises:
        UserError: the columns fit no format or several ones, or the format does not fit the model's task.
    """
    candidates = list(possible_formats(name))
    mapping = columns
    if len(candidates) == len(FORMATS):  # a data set with unknown columns
        present = sorted(found)
        mapping = _with_known_columns(columns, set(present))
        for ours, theirs in columns.items():
            if theirs not in present:
                raise UserError(
                    f"data.columns: {ours}: {theirs!r} is not among the columns found ({listed(present)})"
                    f"{nearest(theirs, present)}"
                )
        mapped = {column for column in COLUMNS if mapping.get(column, column) in present}
        candidates = [one for one, needed in FORMATS.items() if mapped.issuperset(needed)]
        if not candidates or wanted and wanted not in candidates:
            asked = [wanted] if wanted else list(FORMATS)
            expected = [f"{' and '.join(FORMATS[one])} ({one})" for one in asked]
            raise UserError(
                f"data: the columns found are {listed(present)}; expected {', or '.join(expected)}. Map "
                "the columns, as in data.columns: {prompt: question, completion: answer}"
            )
    if wanted:
        candidates = [wanted]
    classify = task == "sequence-classification"
    fitting = [one for one in candidates if (one == "text-label") == classify]
    if not fitting:
        other = "causal-lm" if classify else "sequence-classification"
        raise UserError(
            f"data: {name!r} is {' or '.join(candidates)} here, which does not fit model.task "
            f"{task!r}; set model.task to {other}, or give other columns with data.columns"
        )
    if len(fitting) > 1:
        raise UserError(f"data.format: the columns fit {' and '.join(fitting)}; set data.format to one of them")
    taken = (*FORMATS[fitting[0]], *OPTIONAL[fitting[0]])
    if unused := set(columns) - set(taken):
        raise UserError(f"data.columns: {', '.join(sorted(unused))} is not used by {fitting[0]}; remove it")
    return fitting[0], {ours: theirs for ours, theirs in mapping.items() if ours in taken}


def _with_known_columns(columns: dict[str, str], present: set[str]) -> dict[str, str]:
    """Return `data.columns` with what is known of the names in Alpaca's and ShareGPT's files.

    They are taken where the format's own columns are neither there nor mapped. An `input` beside a prompt in
    `instruction` always belongs to the prompt.
    """
    for known in KNOWN_COLUMNS:
        if present.issuperset(known.values()) and not present & known.keys() and not columns.keys() & known.keys():
            columns = columns | known
    if columns.get("prompt") == "instruction" and "input" in present and "input" not in columns:
        columns = columns | {"input": "input"}
    return columns


Converter = Callable[[dict[str, Any], str], dict[str, Any]]


def converter(name: str, format_: str, columns: dict[str, str], labels: Labels | None = None) -> Converter:
    """Return the function that converts a row, at a place for messages, to the columns of a format.

    Rows of data scored by label words also have `accepted`, the correct answers, and `candidates`, all answers to
    choose from. Rows of ReCoRD have `entities`, one for each candidate.

    Args:
        labels: how a user's labels are numbered (text-label).

    Raises:
        UserError: by the function: the row does not fit.
    """
    name = name.lower()
    if name in LABEL_TASKS:
        return functools.partial(_label_task_row, LABEL_TASKS[name], format_ == "text-label")
    if name in SOLUTION_TASKS:
        return _solution_row
    if name in CHOICE_TASKS:
        return _copa_row if name == "superglue/copa" else _record_row
    if format_ == "text-label":
        assert labels is not None
        return functools.partial(_text_row, columns, labels)
    return functools.partial(_chat_row if format_ == "chat" else _completion_row, columns)


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """Return the text in a column of a row.

    Raises:
        UserError: the column is missing or holds no text; `where` names the row.
    """
    value = row.get(column)
    if not isinstance(value, str):
        found = f"it is {shown(value)}" if column in row else f"the columns are {listed(row)}"
        raise UserError(f"{where}: expected a text in column {column!r}, but {found}")
    return value


def _completion_row(columns: dict[str, str], row: dict[str, Any], where: str) -> dict[str, Any]:
    names = [columns.get(ours, ours) for ours in FORMATS["prompt-completion"]]
    if all(isinstance(row.get(name), list) for name in names):
        raise UserError(
            f"{where}: columns {names[0]!r} and {names[1]!r} are lists; expected texts. Put messages into one column "
            "'messages', with weight: 0 in the assistant's messages that are part of the prompt"
        )
    made = {ours: text_of(row, name, where) for ours, name in zip(FORMATS["prompt-completion"], names, strict=True)}
    column = columns.get("input")
    if column is not None and row.get(column) is not None and text_of(row, column, where).strip():
        made["prompt"] += "\n" + row[column]
    return made


def _chat_row(columns: dict[str, str], row: dict[str, Any], where: str) -> dict[str, Any]:
    column = columns.get("messages", "messages")
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of messages in column {column!r}, got {shown(messages)}")
    made: dict[str, Any] = {"messages": read_messages(messages, where)}
    if row.get("tools"):
        made["tools"] = read_tools(row["tools"], where)
    return made


def _text_row(columns: dict[str, str], labels: Labels, row: dict[str, Any], where: str) -> dict[str, Any]:
    text, pair, label = (columns.get(ours, ours) for ours in ("text", "text_pair", "label"))
    return {
        "text": text_of(row, text, where),
        "text_pair": text_of(row, pair, where) if row.get(pair) is not None else None,
        "label": labels.number(row.get(label), f"{where}: label {shown(row.get(label))} in column {label!r}"),
    }


@dataclass(frozen=True)
class Labels:
    """The numbers of a user's labels: whole numbers from 0 stay, names are numbered in alphabetical order.

    Args:
        names: the names in the order of their numbers.
        are_numbers: whether the labels in the rows are the numbers.
    """

    names: tuple[str, ...]
    are_numbers: bool

    @classmethod
    def of(cls, parts: dict[str, Survey]) -> Labels:
        """Return the labels found in "train", and the numbers in all parts."""
        if parts["train"].highest is None:
            return cls(tuple(sorted(parts["train"].names)), are_numbers=False)
        highest = max(survey.highest or 0 for survey in parts.values())
        return cls(tuple(map(str, range(highest + 1))), are_numbers=True)

    def number(self, value: Any, described: str) -> int:
        """Return the number of a label.

        Raises:
            UserError: there is no such label; `described` names it with its place.
        """
        if self.are_numbers:
            number = _as_number(value)
        else:
            number = self._numbers.get(value) if isinstance(value, str) else None
        if number is None:
            expected = f"a whole number from 0, below {MAX_LABELS}"
            if not self.are_numbers:
                expected = f"one of the names in training ({listed(self.names)})"
            raise UserError(f"{described}; expected {expected}")
        return number

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def _as_number(value: Any) -> int | None:
    """Return a label that is a whole number, in whatever way it is written."""
    if isinstance(value, float) and value.is_integer():  # as pandas writes them beside empty cells
        value = int(value)
    is_number = isinstance(value, int) or isinstance(value, str) and value.isascii() and value.isdigit()
    return int(value) if is_number and len(str(value)) < 20 and 0 <= int(value) < MAX_LABELS else None
