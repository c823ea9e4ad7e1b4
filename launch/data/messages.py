"""Read the messages of a conversation, in the spellings that people's files have, into one form.

OpenAI's and Hugging Face's `{role, content}`, with content as a text or as a list of text parts, and ShareGPT's
`{from, value}`. Other keys (`tool_calls`, `reasoning_content`, `name`, ...) stay for the chat template.
"""

from __future__ import annotations

import json
from typing import Any

from hift_ds.launch.errors import UserError, shown

# Names of the same thing; transformers gives a template whichever one it reads.
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def read_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of a row, each with `role` and `content` (texts) and the other keys that have a value.

    An assistant's turn that stays out of the loss has `weight: 0`; other messages have neither `weight` nor `train`.

    Raises:
        UserError: a message is not understood; `where` names the row.
    """
    return [_message(message, f"{where}: message {i}") for i, message in enumerate(value, 1)]


def read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the tool definitions of a row, which may be a list or its JSON text.

    Raises:
        UserError: they are not a list of objects.
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError):
            tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: column 'tools' must be a list of tool definitions (objects), or such a list as JSON text; got "
            f"{shown(value)}"
        )
    return tools


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where} must be {{role: text, content: text}}; got {shown(message)}")
    # Parquet gives each message the keys of all others, with nulls.
    rest = {key: value for key, value in message.items() if value is not None}
    if "role" not in rest and isinstance(rest.get("from"), str) and "value" in rest:
        role, content = rest.pop("from"), rest.pop("value")
        role = SHAREGPT_ROLES.get(role, role)
    else:
        role, content = rest.pop("role", None), rest.pop("content", None)
    if not isinstance(role, str):
        raise UserError(f"{where} must be {{role: text, content: text}}; got {shown(message)}")
    for key in [*REASONING, *CALLS]:
        if not rest.get(key, True):  # an empty text or list
            del rest[key]
    _check_known(rest, where)
    if content is None and any(key in rest for key in CALLS):
        content = ""
    made = {"role": role, "content": _text(content, message, where)}
    trained = _trained(rest, where)
    if trained and role != "assistant":
        raise UserError(
            f"{where} has the role {role!r} and is marked to be trained, but only an assistant's turns are; remove "
            "its 'weight' or 'train'"
        )
    return made | rest | ({"weight": 0} if trained is False and role == "assistant" else {})


def _text(content: Any, message: dict[str, Any], where: str) -> str:
    """Return content as one text; the parts of a list are joined by line feeds."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            raise UserError(
                f"{where} must be {{role: text, content: text}}, where content may be a list of parts "
                f"{{type: text, text: ...}}, or null beside tool_calls; got {shown(message)}"
            )
        texts.append(part)
    return "\n".join(texts)


def _check_known(rest: dict[str, Any], where: str) -> None:
    """Check the values of keys that templates read."""
    for key in REASONING:
        if not isinstance(rest.get(key, ""), str):
            raise UserError(f"{where}: {key} must be a text; got {shown(rest[key])}")
    calls = rest.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: tool_calls must be a list of objects; got {shown(calls)}")


def _trained(rest: dict[str, Any], where: str) -> bool | None:
    """Take `weight` and `train` out of the keys of a message; return what they say, None if they are not there."""
    said: dict[str, bool] = {}
    for key in ("weight", "train"):
        if key in rest:
            value = rest.pop(key)
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                expected = "0 (not trained) or 1" if key == "weight" else "true or false"
                raise UserError(f"{where}: {key} is {shown(value)}; expected {expected}")
            said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: weight and train contradict each other; remove one")
    return next(iter(said.values()), None)
