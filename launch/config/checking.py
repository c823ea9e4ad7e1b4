"""Build a settings dataclass from a mapping and report every problem: unknown keys, wrong types, values out of range.

A problem is one line of text with the key, the value found, what was expected and a remedy. The functions append
problems to a list, so that a user sees all of them at once.
"""

from __future__ import annotations

import copy
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from typing import Any

from hift_ds.launch.errors import expected


def setting(default: Any, **limits: Any) -> Any:
    """Declare a dataclass field with limits for its value.

    `build` checks the limits `choices`, `at_least`, `above` and `at_most`, and takes null for the default with
    `null_is_default`. A `dict` or `list` default is copied for each instance.
    """
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=limits)
    return field(default=default, metadata=limits)


def problem_list(where: str, problems: list[str]) -> str:
    """Format all problems as the text of one error, one line each, under a heading that names their source `where`."""
    return "\n".join(
        [
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in {where}:",
            *(f"  - {problem}" for problem in problems),
        ]
    )


def build(kind: Any, given: Mapping, where: str, problems: list[str]) -> Any:
    """Build an instance of the dataclass `kind` from the mapping `given`.

    A wrong value adds a problem, and its field keeps the default. `where` is the section's name for the messages.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    values = {}
    for key, value in given.items():
        if key not in known:
            problems.append(f"{where}.{key}: unknown key. {expected(key, known)}")
            continue
        fits, value = _fit(value, hints[key])
        if value is None and known[key].metadata.get("null_is_default"):
            continue
        if not fits:
            problems.append(f"{where}.{key}: got {value!r}, expected {_type_name(hints[key])}.")
            continue
        fault = _outside(value, known[key].metadata)
        if fault:
            problems.append(f"{where}.{key}: got {value!r}. {fault}")
            continue
        values[key] = value
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            if name not in given:
                problems.append(f"{where}.{name}: not set. Expected {_type_name(hints[name])}.")
            values[name] = None
    return kind(**values)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Return whether `value` has the type `hint`, and the value itself; a whole number becomes a float for `float`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for option in typing.get_args(hint):
            fits, fitted = _fit(value, option)
            if fits:
                return True, fitted
        return False, value
    base = typing.get_origin(hint) or hint
    if base is Any:
        return True, value
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if base is tuple and isinstance(value, list):
        return True, tuple(value)
    if base is Mapping or base is dict:
        return isinstance(value, dict), value
    if base is int and isinstance(value, bool):
        return False, value
    return isinstance(value, base), value


def _type_name(hint: Any) -> str:
    """Name a type for a user who writes YAML."""
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict: "a mapping",
        list: "a list",
        tuple: "a list",
        type(None): "null",
    }
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    base = typing.get_origin(hint) or hint
    return names.get(base, getattr(base, "__name__", str(base)))


def _outside(value: Any, limits: Mapping) -> str | None:
    """Return what `limits` expect where `value` violates them, else None."""
    if value is None:
        return None
    if "choices" in limits and value not in limits["choices"]:
        return expected(str(value), limits["choices"])
    if isinstance(value, float) and not math.isfinite(value):
        return "Expected a finite number."
    if "at_least" in limits and value < limits["at_least"]:
        return f"Expected at least {limits['at_least']}."
    if "above" in limits and value <= limits["above"]:
        return f"Expected more than {limits['above']}."
    if "at_most" in limits and value > limits["at_most"]:
        return f"Expected at most {limits['at_most']}."
    return None
