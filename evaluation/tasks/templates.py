"""Convert rows of data sets that only evaluation knows to prompts: table 12's templates, SQuAD, DROP and E2E.

A converter takes a row with the columns of the Hub's copy, and its file and line for messages. It returns `prompt`,
`completion`, and `candidates` or `references`; for classifiers `text`, `text_pair` and `target` (a class or a number);
or None for an unlabelled row. The templates of table 13 for classification and multiple choice are in
launch/data/formats.py, because training uses them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hift_ds.launch.data.formats import text_of
from hift_ds.launch.errors import UserError, shown

Convert = Callable[[dict[str, Any], str], dict[str, Any] | None]
MASK = "[MASK]"
_ATTRIBUTE = re.compile(r"\s*([^][,]+?)\s*\[([^][]*)\]\s*(?:,|$)")  # name[The Eagle],


def filled_in(template: str, columns: Sequence[str], label: str, words: Sequence[str]) -> Convert:
    """Make a converter for a template of table 12, in which a label word replaces [MASK].

    A causal model reads from left to right: the text before [MASK] is the prompt, and each candidate is a label word
    with the text after [MASK]. A classifier reads only the texts in `columns`.

    Args:
        template: {0} and {1} are the texts in `columns`.
        words: the label words, in the order of the ids in the column `label`.
    """
    before, after = (part.strip() for part in template.split(MASK))
    classify = labelled(columns, label, len(words))

    def convert(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        classified = classify(row, where)
        if classified is None:
            return None
        texts = [row[column].strip() for column in columns]
        rest = after.format(*texts)
        candidates = tuple(f"{word} {rest}" for word in words)
        completion = candidates[classified["target"]]
        return {**classified, "prompt": before.format(*texts), "completion": completion, "candidates": candidates}

    return convert


def labelled(columns: Sequence[str], label: str, n: int) -> Convert:
    """Make a converter for classifiers: one text or two, and one of `n` classes from the column `label`."""

    def convert(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        texts = _texts(row, columns, where)
        value = _number(row.get(label))
        if value == -1:  # an unlabelled test split, or the annotators did not agree (SNLI)
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n:
            raise UserError(
                f"{where}: label {shown(row.get(label))} in column {label!r}; expected a number from 0 to {n - 1}. A "
                "publisher's test split may have no labels: name another split"
            )
        return {**texts, "target": value}

    return convert


def _number(value: Any) -> Any:
    """Convert the numbers of a CSV file, which are texts."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def rated(columns: Sequence[str], label: str, highest: float) -> Convert:
    """Make a converter for regressions: one text or two, and a number from 0 to `highest` from the column `label`."""

    def convert(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        texts = _texts(row, columns, where)
        value = _number(row.get(label))
        if value == -1:  # an unlabelled test split
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= highest:
            raise UserError(
                f"{where}: score {shown(row.get(label))} in column {label!r}; expected a number from 0 to {highest:g}"
            )
        return {**texts, "target": float(value)}

    return convert


def _texts(row: dict[str, Any], columns: Sequence[str], where: str) -> dict[str, Any]:
    text, *pair = (text_of(row, column, where).strip() for column in columns)
    return {"text": text, "text_pair": pair[0] if pair else None}


def squad(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a row of SQuAD (table 13) with the columns title, context, question and answers {text: [...]}."""
    title, context, question = (text_of(row, column, where).strip() for column in ("title", "context", "question"))
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    texts = _answers(texts, "answers: {text: [...]}", answers, where)
    return {
        "prompt": f"Title: {title} Context: {context} Question: {question} Answer:",
        "completion": texts[0],
        "references": tuple(dict.fromkeys(texts)),
    }


def drop(row: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Convert a row of DROP (table 13) with the columns passage, question and answers_spans {spans: [...]}.

    Each span is an accepted answer. A row may instead have the publisher's `answer` and `validated_answers` (each
    {number, date: {day, month, year}, spans}): an answer can then have several spans, and a question without any answer
    counts as unlabelled.
    """
    passage, question = (text_of(row, column, where).strip() for column in ("passage", "question"))
    if row.get("answer") is not None:
        given = [row["answer"], row.get("validated_answers") or []]
        try:
            found = map(_drop_answer, [given[0], *given[1]])
            references = tuple(dict.fromkeys(spans for spans in found if any(spans)))
            texts = [" ".join(spans) for spans in references]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: expected answers of number, date and spans; got {shown(given)} ({error!r})"
            ) from error
        if not references:
            return None
        _answers(texts, "answer", row["answer"], where)
    else:
        answers = row.get("answers_spans")
        spans = answers.get("spans") if isinstance(answers, dict) else None
        spans = _answers(spans, "answers_spans: {spans: [...]}", answers, where)
        references = tuple((span,) for span in dict.fromkeys(spans))
    return {
        "prompt": f"Passage: {passage} Question: {question} Answer:",
        "completion": ", ".join(references[0]),
        "references": references,
    }


def _drop_answer(answer: dict[str, Any]) -> tuple[str, ...]:
    if answer["number"] not in (None, ""):
        return (str(answer["number"]),)
    if answer["spans"]:
        return tuple(answer["spans"])
    date = answer["date"]
    return (" ".join(date[part] for part in ("day", "month", "year") if date.get(part)),)


def _answers(answers: Any, expected: str, got: Any, where: str) -> list[str]:
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one for one in answers):
        raise UserError(f"{where}: expected {expected} with at least one text, got {shown(got)}")
    return answers


def e2e(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a row of E2E as Hu et al. (2022) do for GPT-2: `name : The Eagle | area : riverside ||`, then the text.

    The columns are meaning_representation and human_reference, or mr and ref as in the publisher's files.
    """
    columns = ("mr", "ref") if "mr" in row else ("meaning_representation", "human_reference")
    meaning, reference = (text_of(row, column, where).strip() for column in columns)
    attributes = [(found[1], found[2].strip()) for found in _ATTRIBUTE.finditer(meaning)]
    if not attributes or _ATTRIBUTE.sub("", meaning):
        raise UserError(
            f"{where}: {shown(meaning)} in column {columns[0]!r}; expected attributes as in name[The Eagle], "
            "area[riverside]"
        )
    if not reference:
        raise UserError(f"{where}: the column {columns[1]!r} is empty; expected a text")
    prompt = " | ".join(f"{name} : {value}" for name, value in attributes) + " ||"
    return {"prompt": prompt, "completion": reference, "references": (reference,)}
