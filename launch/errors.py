"""The one exception that means "the user can fix this": shown as plain text, never as a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in the settings, the data or the environment; the message says what to do about it."""


def nearest(value: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `value`: the known one it resembles, if any."""
    near = difflib.get_close_matches(value, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def looked_in(path: str | Path) -> str:
    """The end of a message about a path that does not exist: where it was looked for, if it is a relative one."""
    return "" if Path(path).expanduser().is_absolute() else f" (looked in {Path.cwd()})"


def shown(value: Any) -> str:
    """A value from the data as it goes into a message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class NotApplicable(UserError):
    """A training method does not fit a model; the message says why."""

    def __init__(self, method: str, model: Any, reason: str):
        super().__init__(f"method.name: {method!r} does not fit {type(model).__name__}: {reason}")
