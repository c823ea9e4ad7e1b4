"""Errors that the user can fix: the command prints their message without a traceback. And how messages are worded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in the settings, the data or the environment; the message names the remedy."""


def nearest(value: Any, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown `value`: the most similar known one, or nothing."""
    names = {str(one).lower(): str(one) for one in known}
    near = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def expected(found: Any, allowed: Iterable[str]) -> str:
    """Return the end of a message about a value that is not among `allowed`: the list, and the most similar one."""
    allowed = list(allowed)
    return f"Expected one of: {', '.join(allowed)}{nearest(found, allowed)}"


def looked_in(path: str | Path) -> str:
    """Return the end of a message about a missing relative path: the working directory. Empty for absolute paths."""
    return "" if Path(path).expanduser().is_absolute() else f" (looked in {Path.cwd()})"


def shown(value: Any) -> str:
    """Format a value from the data for a message, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Iterable[str], most: int = 20) -> str:
    """List names from the data for a message: at most `most` of them, each in at most 80 characters."""
    found = [(name if len(name) <= 80 else name[:77] + "...") or "''" for name in names]
    return ", ".join(found[:most] + ["..."] * (len(found) > most)) or "none"


class NotApplicable(UserError):
    """A training method cannot train this model; the message gives the reason."""

    def __init__(self, method: str, model: Any, reason: str):
        super().__init__(f"method.name: {method!r} does not fit {type(model).__name__}: {reason}")
