"""How rows of the sets that only evaluation knows become prompts: table 12's templates, SQuAD and DROP.

Each function takes a row in the columns of the Hub's copy and its place for messages, and returns it in the columns of
launch/formats.py: `prompt`, `completion`, and `candidates` or `references`; None for a row that nobody labelled.
The templates of table 13 for classification and multiple choice are in launch/formats.py, which trains on them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from launch.errors import UserError, shown
from launch.formats import text_of

Convert = Callable[[dict[str, Any], str], dict[str, Any] | None]
MASK = "[MASK]"


def filled_in(template: str, columns: Sequence[str], label: str, words: Sequence[str]) -> Convert:
    """A template of table 12: {0} and {1} stand for the texts in `columns`, a label word fills [MASK].

    `words` are in the order of the labels' ids in the column `label`. A causal model reads from left to right, so the
    candidates are the label words with all that follows; what comes before is the prompt.
    """
    before, after = (part.strip() for part in template.split(MASK))

    def convert(row: dict[str, Any], where: str) -> dict[str, Any] | None:
        texts = [text_of(row, column, where).strip() for column in columns]
        value = row.get(label)
        if value == -1:  # the annotators did not agree (SNLI)
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(words):
            raise UserError(
                f"{where}: label {shown(value)} in column {label!r}; expected a number from 0 to {len(words) - 1}. A "
                "publisher's test part may have no labels: name another split"
            )
        rest = after.format(*texts)
        candidates = tuple(f"{word} {rest}" for word in words)
        return {"prompt": before.format(*texts), "completion": candidates[value], "candidates": candidates}

    return convert


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


def drop(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Table 13's DROP; the columns are passage, question and answers_spans {spans: [...]}, each span an answer.

    Where the row has the publisher's own `answer` and `validated_answers` (each {number, date: {day, month, year},
    spans}), answers of several spans stay together.
    """
    passage, question = (text_of(row, column, where).strip() for column in ("passage", "question"))
    if row.get("answer") is not None:
        given = [row["answer"], *(row.get("validated_answers") or ())]
        try:
            references = tuple(dict.fromkeys(spans for spans in map(_drop_answer, given) if any(spans)))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: expected answers of number, date and spans; got {shown(given)} ({error!r})"
            ) from error
        _answers([" ".join(spans) for spans in references], "answer", row["answer"], where)
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
