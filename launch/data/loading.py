"""Load the data of a run: read rows, convert them to one format, tokenize them.

`load_data` reads rows with `sources.py`, converts them with `formats.py` and tokenizes them with `encoding.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hift_ds.checkpoint.files import sha256_of
from hift_ds.launch.data import scores
from hift_ds.launch.data.built_in import BUILT_IN, built_in_rows
from hift_ds.launch.data.encoding import EvalExample, Example, choose_template, encode
from hift_ds.launch.data.formats import (
    CHOICE_TASKS,
    FORMATS,
    LABEL_TASKS,
    SOLUTION_TASKS,
    convert,
    find_format,
    flatten,
    possible_formats,
    unused_columns,
)
from hift_ds.launch.data.remarks import sentence
from hift_ds.launch.data.settings import DataSettings
from hift_ds.launch.data.sources import Row, read_file, read_hub
from hift_ds.launch.errors import UserError, listed

DEFAULT_PROBLEMS = {"train": 4096, "eval": 256}  # numbers of built-in problems by default


@dataclass
class Data:
    """Tokenized data.

    Attributes:
        train, eval: the examples to train on and the held-out ones.
        report: for "train" and "eval": `rows` in the split, `read` (after taking the subset), `used`, `truncated` (of
            the used ones), `skipped_no_target`, `tokens`, `trained_tokens`, `sha256` of the rows read, `ends` (ids of
            the tokens that end answers) and `remarks` (what was found in rows; see `remarks.Remark`). Also `files`
            (path to sha256), `format`, `template` (whether the chat template is used), `labels` (names in the order of
            their ids; None for causal language models) and `notes`: sentences for the user about what is not used as it
            is written.
        score: `score(predictions, examples)` scores generated texts (causal language models) or label ids
            (classification) of held-out examples. None if the data has no score.
    """

    train: list[Example]
    eval: list[EvalExample]
    report: dict[str, Any]
    score: Callable[[Sequence[Any], Sequence[EvalExample]], scores.Score] | None

    def longest(self, max_new_tokens: int) -> tuple[int, int]:
        """Return the tokens of the longest example, and of the longest held-out prompt with its answer.

        The second number is 0 if no answers are generated.
        """
        answered = self.eval if self.score is not None and self.report["labels"] is None else []
        return (
            max(len(example.input_ids) for example in [*self.train, *self.eval]),
            max((len(example.prompt_ids) + max_new_tokens for example in answered), default=0),
        )

    def renumber(self, labels: list[str]) -> None:
        """Number the classes by their place in `labels`, in which all names of `report["labels"]` are."""
        numbers = [labels.index(name) for name in self.report["labels"]]
        for examples in (self.train, self.eval):
            for one in examples:
                assert isinstance(one.labels, int)
                one.labels = numbers[one.labels]
        self.report["labels"] = labels


def load_data(settings: DataSettings, tokenizer: Any, *, task: str, seed: int) -> Data:
    """Read, convert and tokenize the data into memory.

    The same settings, tokenizer and seed give the same examples in the same order, so every rank can load its own.

    Args:
        task: "causal-lm" or "sequence-classification".

    Raises:
        UserError: the settings have problems, or the data cannot be read or does not fit the task.
    """
    problems = settings.problems()
    if problems:
        raise UserError("\n".join(problems))
    splits, files = _read(settings, seed)
    notes: list[str] = []
    chosen = {part: _subset(settings, part, rows, seed, notes) for part, rows in splits.items()}
    format_, columns = find_format(settings.name, settings.format, settings.columns, chosen["train"], task)
    if columns != settings.columns:
        notes.append(f"data.columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}} is used")
    rows, labels = convert(settings.name, format_, columns, chosen)
    template = choose_template(settings.template, format_, tokenizer)
    report: dict[str, Any] = {}
    encoded: dict[str, list[EvalExample]] = {}
    for part in ("train", "eval"):
        encoded[part], counts = encode(
            rows[part],
            tokenizer,
            labels=labels,
            template=template,
            question=settings.name.lower() in SOLUTION_TASKS,
            max_length=settings.max_length,
        )
        notes += _columns_note(settings, part, format_, columns, chosen[part])
        report[part] = {"rows": len(splits[part]), **counts}
        notes += _notes(settings, part, counts)
    held_out = Counter(tuple(one.input_ids) for one in encoded["eval"])
    trained = {ids for one in encoded["train"] if (ids := tuple(one.input_ids)) in held_out}
    if shared := sum(held_out[ids] for ids in trained):
        notes.append(
            f"warning: {shared} of {len(encoded['eval'])} held-out examples are also training examples, so their score "
            "does not measure new data"
        )
    train = [Example(one.input_ids, one.labels, one.token_type_ids) for one in encoded["train"]]
    report |= {"files": files, "format": format_, "template": template, "labels": labels, "notes": notes}
    return Data(train, encoded["eval"], report, _find_score(settings, format_))


def _read(settings: DataSettings, seed: int) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Read all rows of "train" and "eval" (empty if nothing is held out), and hash the files."""
    name = settings.name.lower()
    hashes: dict[str, str] = {}
    splits: dict[str, list[Row]] = {"train": [], "eval": []}
    if name in BUILT_IN:
        for part, split, n in (("train", "train", settings.train_examples), ("eval", "test", settings.eval_examples)):
            splits[part] += built_in_rows(name, split, DEFAULT_PROBLEMS[part] if n is None else n, seed)
    elif settings.path is not None:
        for part, paths in settings.files().items():
            for path in paths:
                splits[part] += read_file(path, name)
                hashes[str(path)] = sha256_of(path)
    else:
        splits = read_hub(settings.name, settings.subset, settings.revision, settings.split, settings.eval_split)
    if not splits["train"]:
        raise UserError(
            f"data: {settings.path or settings.name!r} has no rows in the split {settings.split!r}; there is "
            "nothing to train on"
        )
    for part, rows in splits.items():
        splits[part] = [(where, flat) for where, row in rows for flat in flatten(name, row, where)]
    return splits, hashes


def _subset(settings: DataSettings, part: str, rows: list[Row], seed: int, notes: list[str]) -> list[Row]:
    """Draw a seeded sample, in the order of the rows."""
    n = settings.train_examples if part == "train" else settings.eval_examples
    if n and not rows:
        raise UserError(
            f"data.eval_examples: {n}, but {settings.name!r} has nothing held out here; give data.eval_split "
            "or data.eval_path, or set data.eval_examples to 0"
        )
    if n is None or n == len(rows):
        return rows
    if n > len(rows):
        notes.append(f"{part}: data.{part}_examples is {n}, but there are only {len(rows)}; all are used")
        return rows
    notes.append(f"{part}: {n} of {len(rows)} rows are drawn by the seed (data.{part}_examples)")
    return [rows[i] for i in sorted(random.Random(f"{part} {seed}").sample(range(len(rows)), n))]


def _notes(settings: DataSettings, part: str, counts: dict[str, Any]) -> list[str]:
    """Return notes for the user about the counts.

    Raises:
        UserError: rows were read, but no example is left.
    """
    read, limit = counts["read"], f"data.max_length ({settings.max_length} tokens)"
    if read and not counts["used"]:
        raise UserError(
            f"data: no {part} example is left, as all {read} have no trained token within {limit}; raise it, or "
            "look for empty completions and conversations without an assistant's turn"
        )
    notes = []
    if part == "eval" and not read and settings.eval_examples is None:
        notes.append("eval: no held-out rows were found, so there will be no score")
    if counts["truncated"]:
        notes.append(f"{part}: {counts['truncated']} of {read} examples were cut on the right to {limit}")
    if skipped := counts["skipped_no_target"]:
        notes.append(
            f"{part}: {skipped} of {read} examples skipped: nothing to train within {limit}, e.g. no assistant's turn"
        )
    notes += [
        f"{part}: {sentence(matter, remark['names'])}: {remark['rows']} of {read} rows, the first is {remark['first']}"
        for matter, remark in counts["remarks"].items()
    ]
    return notes


def _columns_note(
    settings: DataSettings, part: str, format_: str, columns: dict[str, str], rows: list[Row]
) -> list[str]:
    """Name the columns of a user's data that are not used. Those of published sets are known."""
    if len(possible_formats(settings.name)) < len(FORMATS):
        return []
    found = unused_columns(format_, columns, rows)
    named = []
    for name, places in found.items():
        some = f" (in {len(places)} of {len(rows)} rows, the first is {places[0]})" if len(places) < len(rows) else ""
        named.append(f"{listed([name])}{some}")
    return [f"{part}: columns not used: {', '.join(named[:20] + ['...'] * (len(named) > 20))}"] if named else []


def _find_score(
    settings: DataSettings, format_: str
) -> Callable[[Sequence[Any], Sequence[EvalExample]], scores.Score] | None:
    name = settings.name.lower()
    if format_ == "text-label":
        return lambda predictions, examples: scores.accuracy(predictions, [one.labels for one in examples])
    if name in SOLUTION_TASKS:
        return lambda texts, examples: scores.number_match(texts, [one.reference for one in examples])
    if name in (*LABEL_TASKS, *CHOICE_TASKS):
        return lambda texts, examples: scores.leading_words_match(texts, [one.accepted for one in examples])
    return None
