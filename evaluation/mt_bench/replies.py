"""Read the body of a chat completion: its text, how it ended, and the tokens that it cost.

A reply is its text parts; a judge's thinking is none of it. Bodies differ between endpoints: the content is a text or a
list of parts, and a body may come as a stream of chunks. What cannot be read still has a cost.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hift_ds.launch.data.answers import without_thinking

MOST_TOKENS = 10**7  # more than the context of any model; a larger count is a mistake of the endpoint
_COUNTS = (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))  # names of the two counts
_TEXT_PARTS = ("text", "output_text")


@dataclass(frozen=True)
class Reply:
    """A chat model's reply.

    Attributes:
        text: without thinking; empty if there is nothing else.
        ended: the finish reason: "stop", "length", or another of the endpoint.
        estimated: whether a count of tokens was not reported, so that it is the most that it can be.
    """

    text: str
    ended: str
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False


@dataclass(frozen=True)
class Unread:
    """An attempt without a reply that may cost tokens; the fields are as in `Reply`."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    estimated: bool = False


def bound(body: Mapping[str, Any], max_tokens: int) -> tuple[int, int]:
    """Return the most tokens of prompt and reply that a request should cost: the bytes of its messages, as no token is
    shorter than a byte, and the limit of the reply.

    Args:
        body: the request. Its own limit of the reply counts, if it sets one, else `max_tokens`.
    """
    prompt = len(json.dumps(body.get("messages"), ensure_ascii=False).encode("utf-8", "backslashreplace"))
    limits = [_count(body.get(name)) for name in ("max_tokens", "max_completion_tokens")]
    return prompt, max((limit for limit in limits if limit), default=max_tokens) * (_count(body.get("n")) or 1)


def read(content: bytes, most: tuple[int, int], redacted: Callable[[str], str] = str) -> Reply | Unread:
    """Read a body.

    Args:
        most: the tokens of prompt and reply to count where the body does not report them.
        redacted: removes secrets from texts of the endpoint.
    """
    values = _values(content)
    prompt, completion, estimated = _cost(_usage(values or _remains(content)), most)
    chunks = [one for one in values if isinstance(one, dict)]
    texts, refusals, ended = [], [], None
    for choice in filter(None, map(_first_choice, chunks)):
        ended = choice.get("finish_reason") or ended
        message = choice["message"] if choice.get("message") is not None else choice.get("delta")
        if message is None and len(chunks) > 1:  # an event of a stream that only says how it ended
            message = {}
        texts.append(_text(message.get("content")) if isinstance(message, dict) else None)
        if isinstance(message, dict) and isinstance(message.get("refusal"), str):
            refusals.append(message["refusal"])
    known = [text for text in texts if text is not None]
    if not texts or len(known) < len(texts):
        reason = f"HTTP 200 with {_what(content, chunks, bool(texts))}"
        return Unread(redacted(reason)[:300], prompt, completion, estimated)
    text = without_thinking("".join(known)) or "".join(refusals)
    return Reply(redacted(text), ended if isinstance(ended, str) else "stop", prompt, completion, estimated)


def _values(content: bytes) -> list[Any]:
    """Return the values of a body: one, those of a list, or those of a stream of server-sent events."""
    try:
        whole = json.loads(content)
        return whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError):
        return list(_events(content))


def _events(content: bytes) -> Iterator[Any]:
    for line in content.decode("utf-8", "replace").splitlines():
        if line.startswith("data:"):
            with contextlib.suppress(ValueError, RecursionError):  # the end, [DONE], or a part that is cut off
                yield json.loads(line.removeprefix("data:"))


def _first_choice(chunk: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a chunk's first choice, or an empty message if it has choices of a wrong form; None if it has none."""
    choices = chunk.get("choices")
    if not choices:
        return None  # an error, or the last event of a stream, which has only the usage
    first = choices[0] if isinstance(choices, list) else None
    return first if isinstance(first, dict) and first else {"message": 0}


def _text(content: Any) -> str | None:
    """Return the text of a message's content; None if it is of no known form."""
    if content is None:  # there is only thinking, or a refusal
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
        return None
    text = ""
    for part in content:
        piece = part if isinstance(part, str) else _of_part(part)
        # Parts are paragraphs, except where white space says how they go on.
        together = not text or not piece or text[-1].isspace() or piece[0].isspace()
        text += piece if together else "\n" + piece
    return text


def _of_part(part: Mapping[str, Any]) -> str:
    kind = part.get("type", "text")
    value = part.get("text") if kind in _TEXT_PARTS else part.get("refusal") if kind == "refusal" else ""
    return value if isinstance(value, str) else ""


def _what(content: bytes, chunks: Sequence[Mapping[str, Any]], has_message: bool) -> str:
    """Describe a body that is no reply."""
    for chunk in chunks:
        if error := chunk.get("error"):
            said = error.get("message") if isinstance(error, dict) else error
            return f"an error: {' '.join(str(said or error).split())}"
    if has_message:
        return "a message that is not text"
    if chunks:
        return "a body that is not a chat completion (it has no choices)"
    start = " ".join(content[:200].decode("utf-8", "replace").split())
    return f"a body that is not a chat completion: {start[:60] or 'no text'}"


# --- tokens -------------------------------------------------------------------------------------------


def _usage(values: Sequence[Any]) -> dict[str, Any]:
    """Return what a body reports, at whatever depth: outer values count before inner ones, later before earlier."""
    found: list[dict[str, Any]] = []
    level = list(values)
    while level:
        found = [one["usage"] for one in level if isinstance(one, dict) and isinstance(one.get("usage"), dict)] + found
        level = [inner for one in level for inner in _parts_of(one)]
    return {name: value for usage in found for name, value in usage.items() if value is not None}


def _parts_of(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _remains(content: bytes) -> list[Any]:
    """Return the reports of tokens in a body that is not JSON, for example because it is cut off."""
    text = content.decode("utf-8", "replace")
    remains = []
    for found in re.finditer(r'"usage"\s*:\s*(?=\{)', text):
        with contextlib.suppress(ValueError, RecursionError):
            remains.append({"usage": json.JSONDecoder().raw_decode(text, found.end())[0]})
    return remains


def _cost(usage: Mapping[str, Any], most: tuple[int, int]) -> tuple[int, int, bool]:
    """Return the tokens of prompt and reply, and whether one of them is not reported."""
    prompt, completion = (next((n for n in map(_count, map(usage.get, names)) if n is not None), None)
                          for names in _COUNTS)  # fmt: skip
    total = _count(usage.get("total_tokens"))
    if total is not None:  # some endpoints count a reply's thinking only here
        if prompt is not None:
            completion = max(completion or 0, total - prompt)
        elif completion is not None:
            prompt = max(0, total - completion)
        else:
            prompt, completion = 0, total
    estimated = prompt is None or completion is None
    return most[0] if prompt is None else prompt, most[1] if completion is None else completion, estimated


def _count(value: Any) -> int | None:
    """Return a count of tokens, which may be a text or a whole float; None if it is not one."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
    return value if is_count else None
