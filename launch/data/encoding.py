"""Tokenize rows of one format, and mark the tokens to train on.

The loss counts what the model must write itself: a completion or an assistant's turn, with the token that ends it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import jinja2

from hift_ds.launch.data.sources import Row
from hift_ds.launch.errors import UserError

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


def encode(
    rows: list[Row],
    tokenizer: Any,
    *,
    labels: list[str] | None,
    template: bool,
    question: bool,
    max_length: int,
) -> tuple[list[EvalExample], dict[str, Any]]:
    """Tokenize rows of one format.

    Args:
        labels: for sequence classification, the labels' names in the order of their ids. A row's label is an id, or a
            float for regression, which has one name. None for causal language models.
        template: whether prompts and completions are written with the chat template; messages always are.
        question: whether prompts without the chat template are written as questions.
        max_length: tokens of an example; longer ones are truncated on the right.

    Returns:
        The examples, and their counts and hash (see `hift_ds.launch.data.loading.Data`).

    Raises:
        UserError: the chat template cannot write a conversation.
    """
    counts = dict.fromkeys(("read", "used", "truncated", "skipped_no_target", "tokens", "trained_tokens"), 0)
    digest = hashlib.sha256()
    examples = []
    for where, row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
        if labels is not None:
            example, length = _label_example(tokenizer, row, labels, max_length)
        else:
            if "messages" in row:
                segments = _chat_segments(tokenizer, row["messages"], where)
            elif template:
                messages = [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
                segments = _chat_segments(tokenizer, messages, where)
            else:
                segments = _plain_segments(row, question)
            example, length = _token_example(tokenizer, segments, row, max_length, marked=template)
        trained = _count_trained(example)
        counts["read"] += 1
        if not trained:
            counts["skipped_no_target"] += 1
            continue
        counts["used"] += 1
        counts["truncated"] += length > max_length
        counts["tokens"] += len(example.input_ids)
        counts["trained_tokens"] += trained
        examples.append(example)
    return examples, {**counts, "sha256": digest.hexdigest()}


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


def _token_example(
    tokenizer: Any, segments: list[tuple[str, bool]], row: dict[str, Any], max_length: int, *, marked: bool
) -> tuple[EvalExample, int]:
    """Return the example of consecutive segments of text, and its length before truncation.

    Args:
        segments: each text with whether it is trained. The last one is trained, or none is.
        marked: whether the text holds the special tokens of a chat template. If not, the beginning-of-sequence token
            is put before it, if the tokenizer sets one, and a trained end-of-sequence token after it.
    """
    texts = [text for text, _ in segments]
    tokens = tokenize_segments(tokenizer, texts)
    ids: list[int] = []
    if not marked:
        ids = beginning(tokenizer)
        if segments[-1][1]:
            tokens[-1].append(tokenizer.eos_token_id)
    labels = [IGNORED] * len(ids)
    for segment, (_, trained) in zip(tokens, segments, strict=True):
        ids += segment
        labels += segment if trained else [IGNORED] * len(segment)
    example = EvalExample(
        input_ids=ids[:max_length],
        labels=labels[:max_length],
        prompt_ids=ids[: len(ids) - len(tokens[-1])],
        prompt="".join(texts[:-1]),
        reference=_last_answer(row),
        accepted=row.get("accepted", ()),
    )
    return example, len(ids)


def beginning(tokenizer: Any) -> list[int]:
    """Return the beginning-of-sequence token in a list, or an empty list if the tokenizer sets none."""
    return [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]


def _last_answer(row: dict[str, Any]) -> str:
    if "completion" in row:
        return row["completion"]
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return next((answer for answer in reversed(answers) if answer.strip()), "")


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


def _chat_segments(tokenizer: Any, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
    """Write a conversation with the chat template, cut at the start and end of each assistant's turn.

    A trained segment is what the model must write itself: everything after the generation prompt up to and including
    the end-of-turn mark, but not the whitespace that templates put between turns. The text after the last assistant's
    turn is dropped.
    """

    def render(n: int, generate: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=generate)
        except (jinja2.TemplateError, ValueError) as error:  # ValueError: there is no message
            roles = ", ".join(message["role"] for message in messages[:n]) or "none"
            raise UserError(
                f"{where}: the chat template cannot write the first {n} of {len(messages)} messages "
                f"(roles: {roles}): {error}"
            ) from error

    whole = render(len(messages), False)
    segments: list[tuple[str, bool]] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = render(i, True)
        after = render(i + 1, False) if i + 1 < len(messages) else whole
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{where}: the tokenizer's chat template writes earlier turns differently when later ones "
                f"follow (message {i + 1} of {len(messages)}), so the assistant's tokens cannot be "
                "found; give one-turn conversations, or a tokenizer with another template"
            )
        turn = after[len(before) :]
        if not turn.rstrip().endswith(message["content"].rstrip()):  # a visible mark ends the turn
            turn = turn.rstrip()
        segments += [(whole[done : len(before)], False), (turn, True)]
        done = len(before) + len(turn)
    return segments or [(whole, False)]
