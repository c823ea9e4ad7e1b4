"""How rows of the sets that only evaluation knows become prompts: table 12's templates, SQuAD, DROP and E2E.

Each function takes a row in the columns of the Hub's copy and its place for messages, and returns it in the columns of
launch/data/formats.py: `prompt`, `completion`, and `candidates` or `references`; for classifiers `text`,
`text_pair` and `target`, a class or a number; None for a row that nobody labelled.
The templates of table 13 for classification and multiple choice are in launch/data/formats.py, for training.
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
    """A template of table 12: {0} and {1} stand for the texts in `columns`, a label word fills [MASK].

    `words` are in the order of the labels' ids in the column `label`. A causal model reads from left to right, so the
    candidates are the label words with all that follows; what comes before is the prompt. A classifier reads the texts
    alone.
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
    """What a classifier reads: one text or two, and `target`, one of n classes, from the column `label`."""

    def convert(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        texts = _texts(row, columns, where)
        value = _number(row.get(label))
        if value == -1:  # a test part, or the annotators did not agree (SNLI)
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n:
            raise UserError(
                f"{where}: label {shown(row.get(label))} in column {label!r}; expected a number from 0 to {n - 1}. A "
                "publisher's test part may have no labels: name another split"
            )
        return {**texts, "target": value}

    return convert


def _number(value: Any) -> Any:
    """A CSV file's numbers are texts."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def rated(columns: Sequence[str], label: str, highest: float) -> Convert:
    """What a regression reads: one text or two, and `target`, a number from 0 to `highest`, from the column `label`."""

    def convert(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        texts = _texts(row, columns, where)
        value = _number(row.get(label))
        if value == -1:  # a test part
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
    """Table 13's SQuAD; the columns are title, context, question and answers {text: [...]}."""
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
    """Table 13's DROP; the columns are passage, question and answers_spans {spans: [...]}, each span an answer.

    Where the row has the publisher's own `answer` and `validated_answers` (each {number, date: {day, month, year},
    spans}), answers of several spans stay together, and a question without any answer is one that nobody labelled.
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
    """E2E, as GPT-2 is trained on it by Hu et al. (2022): `name : The Eagle | area : riverside ||` and the text.

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
        raise UserError(f"{where}: expected a text in column {columns[1]!r}, but it is empty")
    prompt = " | ".join(f"{name} : {value}" for name, value in attributes) + " ||"
    return {"prompt": prompt, "completion": reference, "references": (reference,)}
