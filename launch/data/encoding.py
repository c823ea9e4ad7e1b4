"""Tokenize rows of one format, and mark the tokens to train on.

The loss counts what the model must write itself: a completion or an assistant's turn, with the token that ends it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hift_ds.launch.data.chat import Written, write_conversation
from hift_ds.launch.data.remarks import Remark, Remarks
from hift_ds.launch.data.sources import Row
from hift_ds.launch.errors import UserError, shown

IGNORED = -100  # the label that cross-entropy ignores


@dataclass
class Example:
    """One tokenized example.

    For causal language models `labels` is as long as `input_ids`, not shifted, and -100 for tokens without a loss. For
    sequence classification it is the id of the label, for regression the number itself.
    """

    input_ids: list[int]
    labels: list[int] | int | float
    token_type_ids: list[int] | None = None  # only from some tokenizers (sentence pairs of BERT)


@dataclass
class EvalExample(Example):
    """A held-out example, with the prompt and the expected answer."""

    prompt_ids: list[int] = field(default_factory=list)  # everything before the answer; never truncated
    prompt: str = ""  # as text, for printing
    reference: str = ""  # the answer; for classification the label's name, for regression the number
    accepted: tuple[str, ...] = ()  # all correct answers, for data scored by label words


def choose_template(wanted: bool | None, format_: str, tokenizer: Any) -> bool:
    """Return whether texts are written with the tokenizer's chat template; `wanted` is `data.template`.

    Raises:
        UserError: the data needs a template that the tokenizer does not have, or has no use for one.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if format_ == "text-label":
        if wanted:
            raise UserError("data.template: true, but a classifier reads texts without a chat template; remove it")
        return False
    if format_ == "chat" and (wanted is False or not has_template):
        reason = "data.template is false" if has_template else "the tokenizer has none"
        raise UserError(
            f"data: chat messages need a chat template, but {reason}; use the tokenizer of an "
            "instruction-tuned model (model.tokenizer), or give prompt and completion columns"
        )
    if wanted and not has_template:
        raise UserError("data.template: true, but the tokenizer has no chat template; set it to null")
    template = has_template if wanted is None else wanted
    if not template and tokenizer.eos_token_id is None:
        raise UserError(
            "data: the tokenizer has no end-of-sequence token, so a model could not learn where a completion ends; "
            "use another one (model.tokenizer)"
        )
    return template


@dataclass
class Found:
    """What was found in rows. Its size does not grow with their number.

    Attributes:
        read, used, truncated, skipped_no_target: numbers of rows, of their examples, of those that were cut, and of the
            rows without a trained token.
        tokens, trained_tokens: of the examples.
        longest, longest_prompt: tokens of the longest example and of the longest prompt.
        highest_token, highest_type: the highest token id and the highest token type of the examples; -1 if none.
        ends: ids of the tokens that end answers.
        first: the place of the first row that was cut ("truncated") or skipped ("skipped_no_target").
        remarks: see `hift_ds.launch.data.remarks`.
    """

    read: int = 0
    used: int = 0
    truncated: int = 0
    skipped_no_target: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    longest_prompt: int = 0
    highest_token: int = -1
    highest_type: int = -1
    ends: set[int] = field(default_factory=set)
    first: dict[str, str] = field(default_factory=dict)
    remarks: Remarks = field(default_factory=Remarks)

    def add(self, example: EvalExample, length: int, trained: int, max_length: int) -> None:
        """Count an example with `length` tokens before it was cut, `trained` of which have a loss."""
        self.used += 1
        self.truncated += length > max_length
        self.tokens += len(example.input_ids)
        self.trained_tokens += trained
        self.longest = max(self.longest, len(example.input_ids))
        self.longest_prompt = max(self.longest_prompt, len(example.prompt_ids))
        self.highest_token = max(self.highest_token, max(example.input_ids))
        self.highest_type = max(self.highest_type, max(example.token_type_ids or [-1]))

    def merge(self, later: Found) -> None:
        """Add what was found in later rows."""
        for name in ("read", "used", "truncated", "skipped_no_target", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in ("longest", "longest_prompt", "highest_token", "highest_type"):
            setattr(self, name, max(getattr(self, name), getattr(later, name)))
        self.ends |= later.ends
        self.first = later.first | self.first
        self.remarks.merge(later.remarks)

    @classmethod
    def of(cls, report: dict[str, Any]) -> Found:
        """Return what `report` has returned."""
        remarks = {matter: Remark(**one) for matter, one in report["remarks"].items()}
        first = dict(report["first"])
        return cls(**{**report, "ends": set(report["ends"]), "first": first, "remarks": Remarks(remarks)})

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        remarks = {matter: asdict(remark) for matter, remark in self.remarks.found.items()}
        return {**vars(self), "ends": sorted(self.ends), "first": dict(self.first), "remarks": remarks}


class Encoder:
    """Tokenizes rows of one format.

    Args:
        labels: for sequence classification, the labels' names in the order of their ids. A row's label is an id, or a
            float for regression, which has one name. None for causal language models.
        template: whether prompts and completions are written with the chat template; messages always are.
        question: whether prompts without the chat template are written as questions.
        max_length: tokens of an example; longer ones are truncated on the right.
    """

    def __init__(
        self, tokenizer: Any, *, labels: list[str] | None, template: bool, question: bool, max_length: int
    ) -> None:
        self._tokenizer, self._labels, self._template = tokenizer, labels, template
        self._question, self._max_length = question, max_length
        self._added = tokenizer.added_tokens_decoder  # made anew at each access
        self._control_tokens = _control_tokens(tokenizer, self._added)
        self._beginning = beginning(tokenizer)

    def encode(self, where: str, row: dict[str, Any], found: Found) -> list[EvalExample]:
        """Return the examples of a row, and add what was found to `found`. A conversation may be several examples.

        Raises:
            UserError: the chat template cannot write a conversation, or leaves out what should be trained.
        """
        for token in (token for text in _texts(row) for token in self._control_tokens.findall(text)):
            found.remarks.add("control tokens", where, token)
        if self._labels is not None:
            made = [_label_example(self._tokenizer, row, self._labels, self._max_length)]
        else:
            made = list(self._token_examples(where, row, found))
        found.read += 1
        counted = ((example, length, _count_trained(example)) for example, length in made)
        used = [one for one in counted if one[2]]
        found.skipped_no_target += not used
        if not used:
            found.first.setdefault("skipped_no_target", where)
        if any(length > self._max_length for _, length, _ in used):
            found.first.setdefault("truncated", where)
        for example, length, trained in used:
            found.add(example, length, trained, self._max_length)
        return [example for example, _, _ in used]

    def _token_examples(self, where: str, row: dict[str, Any], found: Found) -> Iterator[tuple[EvalExample, int]]:
        """Yield the examples of a row of texts, with their lengths before truncation."""
        tokenizer = self._tokenizer
        for written in _written(tokenizer, row, self._template, self._question, where, found.remarks):
            tokens = _tokens(tokenizer, written, None if self._template else self._beginning)
            yield _token_example(written, tokens, row, self._max_length)
            for segment, is_trained in tokens:
                if is_trained and _is_end(tokenizer, self._added, segment[-1], written):
                    found.ends.add(segment[-1])
                elif is_trained:
                    found.remarks.add("no end mark", where, shown(tokenizer.decode(segment[-8:])))


def row_bytes(row: dict[str, Any]) -> bytes:
    """Return a row as it enters the hash of the rows."""
    return json.dumps(row, default=str).encode() + b"\n"  # Parquet has dates and bytes


def encode(rows: Iterable[Row], tokenizer: Any, **options: Any) -> tuple[list[EvalExample], dict[str, Any]]:
    """Tokenize rows of one format into memory.

    Args:
        options: those of :class:`Encoder`.

    Returns:
        The examples, and the report of what was found in the rows (see :class:`Found`), with their `sha256`.

    Raises:
        UserError: see :meth:`Encoder.encode`.
    """
    encoder, found, digest = Encoder(tokenizer, **options), Found(), hashlib.sha256()
    examples = []
    for where, row in rows:
        digest.update(row_bytes(row))
        examples += encoder.encode(where, row, found)
    return examples, {**found.report(), "sha256": digest.hexdigest()}


def _control_tokens(tokenizer: Any, added: dict[int, Any]) -> re.Pattern[str]:
    """Return the pattern of the special tokens that a text can contain."""
    special = [str(token) for token in added.values() if token.special]
    known = {token for token in [*special, *tokenizer.all_special_tokens] if token.strip()}
    return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))) or r"(?!)")


def _is_end(tokenizer: Any, added: dict[int, Any], token: int, written: Written) -> bool:
    """Return whether the last token of an answer can end generation: a control token, not a piece of the answer."""
    if token not in added:
        return token in tokenizer.all_special_ids
    return added[token].special or not written.answer.rstrip().endswith(added[token].content)


def _texts(row: dict[str, Any]) -> Iterator[str]:
    """Return the texts of a row that are tokenized. Of conversations, the chat template may write any."""
    for column in ("prompt", "completion", "text", "text_pair", "messages", "tools"):
        yield from _texts_in(row.get(column))


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(one)


def _written(
    tokenizer: Any, row: dict[str, Any], template: bool, question: bool, where: str, remarks: Remarks
) -> list[Written]:
    if "messages" in row:
        return write_conversation(tokenizer, row["messages"], row.get("tools"), where, remarks)
    if template:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return write_conversation(tokenizer, messages, None, where, remarks)
    return [Written(_plain_segments(row, question), row["completion"])]


def _count_trained(example: Example) -> int:
    if isinstance(example.labels, int | float):
        return 1 if example.input_ids else 0
    return sum(label != IGNORED for label in example.labels[1:])  # nothing predicts the first token


def _label_example(tokenizer: Any, row: dict[str, Any], labels: list[str], max_length: int) -> tuple[EvalExample, int]:
    """Return the example, and its length before truncation."""
    text, pair = row["text"], row["text_pair"]
    prompt = text if pair is None else f"{text}\n{pair}"
    if tokenizer.sep_token_id is None:  # nothing would separate the two
        text, pair = prompt, None
    tokens = tokenizer(text, pair)
    length = len(tokens["input_ids"])
    if length > max_length:  # the tokenizer keeps its special tokens
        tokens = tokenizer(text, pair, truncation=True, max_length=max_length)
    label = row["label"]
    example = EvalExample(
        input_ids=tokens["input_ids"],
        labels=label,
        token_type_ids=tokens.get("token_type_ids"),
        prompt_ids=tokens["input_ids"],
        prompt=prompt,
        reference=str(label) if isinstance(label, float) else labels[label],
    )
    return example, length


def _tokens(tokenizer: Any, written: Written, opening: list[int] | None) -> list[tuple[list[int], bool]]:
    """Return the tokens of each segment, with whether they are trained.

    Args:
        opening: the tokens to put before a text without the special tokens of a chat template. An end-of-sequence token
            is put after it, which is trained. None: the text has the tokens of a chat template.
    """
    tokens = tokenize_segments(tokenizer, [text for text, _ in written.segments])
    found = [(segment, trained) for segment, (_, trained) in zip(tokens, written.segments, strict=True)]
    if opening is not None:
        found.insert(0, (opening, False))
        if found[-1][1]:
            found[-1][0].append(tokenizer.eos_token_id)
    return found


def _token_example(
    written: Written, tokens: list[tuple[list[int], bool]], row: dict[str, Any], max_length: int
) -> tuple[EvalExample, int]:
    """Return the example of the segments' tokens, and its length before truncation."""
    ids: list[int] = []
    labels: list[int] = []
    for segment, is_trained in tokens:
        ids += segment
        labels += segment if is_trained else [IGNORED] * len(segment)
    example = EvalExample(
        input_ids=ids[:max_length],
        labels=labels[:max_length],
        prompt_ids=ids[: len(ids) - len(tokens[-1][0])],
        prompt="".join(text for text, _ in written.segments[:-1]),
        reference=written.answer,
        accepted=row.get("accepted", ()),
    )
    return example, len(ids)


def beginning(tokenizer: Any) -> list[int]:
    """Return the beginning-of-sequence token in a list, or an empty list if the tokenizer sets none."""
    return [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]


def tokenize_segments(tokenizer: Any, segments: list[str]) -> list[list[int]]:
    """Tokenize consecutive segments of a text so that the tokens of a prefix do not depend on what follows.

    So the text before an answer has the same tokens in training and when the answer is generated. If no token of the
    whole text spans two segments, the result equals the tokens of the whole text.
    """
    tokens: list[list[int]] = []
    before: list[int] = []
    text = ""
    for segment in segments:
        text += segment
        whole = tokenizer(text, add_special_tokens=False).input_ids
        if whole[: len(before)] == before:
            tokens.append(whole[len(before) :])
        else:
            tokens.append(tokenizer(segment, add_special_tokens=False).input_ids)
        before = before + tokens[-1]
    return tokens


def _plain_segments(row: dict[str, Any], question: bool) -> list[tuple[str, bool]]:
    """Return prompt and completion without a chat template; word problems are written as questions."""
    prompt, completion = row["prompt"], row["completion"]
    if question:
        prompt = as_question(prompt)
    return [(prompt, False), (spaced(prompt, completion), True)] if completion.strip() else [(prompt, False)]


def as_question(text: str) -> str:
    """Write a word problem as a question to answer."""
    return f"Question: {text}\nAnswer:"


def spaced(prompt: str, completion: str) -> str:
    """Return the completion as it follows the prompt: after a space, if neither side has whitespace."""
    return completion if not prompt or prompt[-1].isspace() or completion[0].isspace() else " " + completion
