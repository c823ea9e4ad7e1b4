"""Keep keys and tokens in the environment: refuse them in settings, which are recorded, and remove them from output."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

# Names of environment variables (HF_TOKEN, WANDB_API_KEY ...) and of settings that hold a secret.
_VARIABLE = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SETTING = re.compile(
    r"(api|access|secret|private)_?key$|(^|auth_|access_|hf_|api_)token$|passw(or)?d$|secret$|credentials?$",
    re.IGNORECASE,
)
# Secrets by their form: keys of Hugging Face and OpenAI, and an address with a password.
_LOOKS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_SHORTEST = 8  # characters; shorter values are words like "EMPTY", which occur in ordinary text


def redacted(text: str) -> str:
    """Return the text without the secrets of the environment and without strings that look like keys."""
    for name, value in _secrets():
        text = text.replace(value, f"[{name}]")
    return _LOOKS.sub("[removed]", text)


def problems(settings: Any) -> list[str]:
    """Return a problem for each secret in nested settings, one line each; the messages do not show the secrets."""
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
    """Print the usual traceback without secrets; a `sys.excepthook`."""
    print(redacted("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr, flush=True)


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield names and values of the environment's secrets, the longest value first: one may contain another."""
    found = [(name, value.strip()) for name, value in os.environ.items() if _VARIABLE.search(name)]
    yield from sorted((one for one in found if len(one[1]) >= _SHORTEST), key=lambda one: -len(one[1]))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of each leaf of nested mappings and lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node
