"""Keys and tokens stay in the environment: not in settings, which are recorded, and not in what is printed."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

# Names of environment variables that hold a secret (HF_TOKEN, WANDB_API_KEY ...), and of settings that would.
_VARIABLE = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SETTING = re.compile(
    r"(api|access|secret|private)_?key$|(^|auth_|access_|hf_|api_)token$|passw(or)?d$|secret$|credentials?$",
    re.IGNORECASE,
)
# What looks like one wherever it stands: keys of Hugging Face and OpenAI, and an address with a password.
_LOOKS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_SHORTEST = 8  # characters; a shorter value is a word like "EMPTY", and stands in ordinary texts


def redacted(text: str) -> str:
    """The text without what is secret in the environment or looks like a key."""
    for name, value in _secrets():
        text = text.replace(value, f"[{name}]")
    return _LOOKS.sub("[removed]", text)


def problems(settings: Any) -> list[str]:
    """Keys and values in nested settings that are secrets; the messages do not show them."""
    found = []
    for path, value in _leaves(settings, ""):
        if _SETTING.search(path.rpartition(".")[2]) and value not in (None, ""):
            found.append(
                f"{path}: looks like a key or a password, and settings are written into the run's files. Remove it; "
                "keys are read from the environment only (HF_TOKEN, WANDB_API_KEY, ...)."
            )
        elif isinstance(value, str) and redacted(value) != value:
            found.append(
                f"{path}: the value holds a key or a password (not shown), and settings are written into the run's "
                "files. Remove it; keys are read from the environment only (HF_TOKEN, WANDB_API_KEY, ...)."
            )
    return found


def print_redacted(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """For `sys.excepthook`: the usual traceback, without secrets."""
    print(redacted("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr, flush=True)


def _secrets() -> Iterator[tuple[str, str]]:
    """Names and values of the environment's secrets, the longest value first: one may be a part of another."""
    found = [(name, value.strip()) for name, value in os.environ.items() if _VARIABLE.search(name)]
    yield from sorted((one for one in found if len(one[1]) >= _SHORTEST), key=lambda one: -len(one[1]))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Path and value of everything that is no mapping or list; a mapping's keys are texts too."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node
