"""From rows of one format to tokens, and which of them are trained.

The loss counts what the model itself must write: a completion or an assistant's turn, with the token that ends it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import jinja2

from hift_ds.launch.data.sources import Row
from hift_ds.launch.errors import UserError

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass
class Example:
    """One tokenized example.

    For causal LM `labels` is as long as `input_ids`, not shifted, and -100 outside what is trained. For
    sequence classification it is the id of the label, for regression the number itself.
    """

    input_ids: list[int]
    labels: list[int] | int | float
    token_type_ids: list[int] | None = None  # where the tokenizer makes them (sentence pairs of BERT)


@dataclass
class EvalExample(Example):
    """A held-out example: also what its answer is generated from and scored against."""

    prompt_ids: list[int] = field(default_factory=list)  # up to where the answer begins; never cut
    prompt: str = ""  # the same as text, for printing
    reference: str = ""  # the answer; for classification the label's name, for regression the number
    accepted: tuple[str, ...] = ()  # all answers that are right, for sets scored by label words


def choose_template(wanted: bool | None, format_: str, tokenizer: Any) -> bool:
    """Whether texts go through the tokenizer's chat template; `wanted` is `data.template`."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if format_ == "text-label":
        if wanted:
            raise UserError("data.template: true, but texts to classify take no chat template; remove it")
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
            "data: the tokenizer has no end-of-sequence token, so no model could learn where a completion ends; "
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
    """Tokenized rows of one format, and their counts and hash for the report (see `hift_ds.launch.data.loading.Data`).

    Args:
        labels: names in the order of their ids, for sequence classification (a row's label is an id, or a float for
            regression, whose one name stands for the number); None for causal LM.
        template: whether prompts and completions go through the chat template; messages always do.
        question: whether prompts without the chat template are asked as questions.
        max_length: tokens of an example; what is longer is cut on the right.
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
                pieces = _chat_pieces(tokenizer, row["messages"], where)
            elif template:
                messages = [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
                pieces = _chat_pieces(tokenizer, messages, where)
            else:
                pieces = _plain_pieces(row, question)
            example, length = _token_example(tokenizer, pieces, row, max_length, marked=template)
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
    """The example, and its length before it was cut."""
    text, pair = row["text"], row["text_pair"]
    prompt = text if pair is None else f"{text}\n{pair}"
    if tokenizer.sep_token_id is None:  # nothing would stand between the two
        text, pair = prompt, None
    tokens = tokenizer(text, pair)
    length = len(tokens["input_ids"])
    if length > max_length:  # the tokenizer cuts such that its special tokens stay
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
    tokenizer: Any, pieces: list[tuple[str, bool]], row: dict[str, Any], max_length: int, *, marked: bool
) -> tuple[EvalExample, int]:
    """The example of pieces of text, each with whether it is trained, and its length before it was cut.

    The last piece is a trained one, or none is. `marked`: the text holds the chat template's own marks;
    else it begins with the beginning-of-sequence token, where the tokenizer sets one, and a trained
    end-of-sequence token follows.
    """
    texts = [text for text, _ in pieces]
    segments = tokenize_pieces(tokenizer, texts)
    ids: list[int] = []
    if not marked:
        ids = beginning(tokenizer)
        if pieces[-1][1]:
            segments[-1].append(tokenizer.eos_token_id)
    labels = [IGNORED] * len(ids)
    for segment, (_, trained) in zip(segments, pieces, strict=True):
        ids += segment
        labels += segment if trained else [IGNORED] * len(segment)
    example = EvalExample(
        input_ids=ids[:max_length],
        labels=labels[:max_length],
        prompt_ids=ids[: len(ids) - len(segments[-1])],
        prompt="".join(texts[:-1]),
        reference=_last_answer(row),
        accepted=row.get("accepted", ()),
    )
    return example, len(ids)


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer sets one."""
    return [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]


def _last_answer(row: dict[str, Any]) -> str:
    if "completion" in row:
        return row["completion"]
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return next((answer for answer in reversed(answers) if answer.strip()), "")


def tokenize_pieces(tokenizer: Any, pieces: list[str]) -> list[list[int]]:
    """The tokens of each piece, such that those of the first pieces are what their text alone gives.

    So what precedes an answer has the same tokens in training as when the answer is generated. Where no
    token of the whole text lies across the border of two pieces, the result is the whole text's tokens.
    """
    segments: list[list[int]] = []
    before: list[int] = []
    text = ""
    for piece in pieces:
        text += piece
        whole = tokenizer(text, add_special_tokens=False).input_ids
        if whole[: len(before)] == before:
            segments.append(whole[len(before) :])
        else:
            segments.append(tokenizer(piece, add_special_tokens=False).input_ids)
        before = before + segments[-1]
    return segments


def _plain_pieces(row: dict[str, Any], question: bool) -> list[tuple[str, bool]]:
    """Prompt and completion without a chat template; word problems are asked as questions."""
    prompt, completion = row["prompt"], row["completion"]
    if question:
        prompt = as_question(prompt)
    return [(prompt, False), (spaced(prompt, completion), True)] if completion.strip() else [(prompt, False)]


def as_question(text: str) -> str:
    """How a word problem is asked."""
    return f"Question: {text}\nAnswer:"


def spaced(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: after a space, where neither side has whitespace."""
    return completion if not prompt or prompt[-1].isspace() or completion[0].isspace() else " " + completion


def _chat_pieces(tokenizer: Any, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
    """A conversation through the chat template, cut where the assistant's turns begin and end.

    A trained piece is what the model itself must write: all that follows the generation prompt up to and
    with the end-of-turn mark, but not the whitespace that templates put between turns. What follows the
    last one is left out.
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
    pieces: list[tuple[str, bool]] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        before = render(i, True)
        after = render(i + 1, False) if i + 1 < len(messages) else whole
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{where}: the tokenizer's chat template writes earlier turns differently when later ones "
                f"follow (message {i + 1} of {len(messages)}), so the assistant's tokens cannot be told "
                "apart; give one-turn conversations, or a tokenizer with another template"
            )
        turn = after[len(before) :]
        if not turn.rstrip().endswith(message["content"].rstrip()):  # a visible mark ends the turn
            turn = turn.rstrip()
        pieces += [(whole[done : len(before)], False), (turn, True)]
        done = len(before) + len(turn)
    return pieces or [(whole, False)]
