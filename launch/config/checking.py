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
from typing import Annotated, Any, Literal

from hift_ds.launch.errors import expected, shown

LARGEST = 2**63  # an integer that PyTorch and C++ can hold is smaller


def setting(default: Any, **limits: Any) -> Any:
    """Declare a dataclass field with limits for its value.

    `build` checks the limits `choices`, `at_least`, `above`, `below` and `at_most`, and takes null for the default with
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
        if value is None and known[key].metadata.get("null_is_default"):
            continue
        value, fault = fit(value, hints[key], known[key].metadata)
        if fault:
            problems.append(f"{where}.{key}: {fault}")
            continue
        values[key] = value
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            if name not in given:
                problems.append(f"{where}.{name}: not set. Expected {_type_name(hints[name])}.")
            values[name] = None
    return kind(**values)


def check_keys(
    node: dict[Any, Any], keys: Mapping[str, Any], where: str, problems: list[str], whole: bool = True
) -> None:
    """Check the keys of a nested mapping and the types of their values. What is wrong is reported and taken out.

    Args:
        node: the mapping.
        keys: for each known key a type, possibly `Annotated` with limits as in `setting`, or the keys of a mapping.
        where: the mapping's name for the messages.
        whole: a number such as 1e9 becomes an integer where one is expected, as JSON files have it.
    """
    for key, value in list(node.items()):
        place = f"{where}.{key}"
        if key not in keys:
            problems.append(f"{place}: unknown key, DeepSpeed would ignore it. {expected(key, keys)}")
            del node[key]
        elif isinstance(keys[key], Mapping):
            if isinstance(value, dict):
                check_keys(value, keys[key], place, problems, whole)
            elif value is None:
                del node[key]
            else:
                problems.append(f"{place}: got {shown(value)}, expected a mapping.")
                del node[key]
        else:
            if whole and isinstance(value, float) and value.is_integer() and fit(value, keys[key])[1] is not None:
                value = int(value)
            value, fault = fit(value, keys[key])
            if fault:
                problems.append(f"{place}: {fault}")
                del node[key]
            else:
                node[key] = value


def not_storable(node: Any, where: str = "") -> list[str]:
    """Return a problem for each value in nested settings that no file or library can hold.

    These are numbers that are infinite, NaN or too large, texts with half a character (a lone surrogate), and what only
    YAML has, such as dates.
    """
    if isinstance(node, dict):
        found = [
            f"{where}: the key {shown(key)} is no text; write it in quotes"
            for key in node
            if where and not isinstance(key, (str, int))
        ]
        inside = {f"{where}.{key}" if where else str(key): value for key, value in node.items()}
        return found + [text for name, value in inside.items() for text in not_storable(value, name)]
    if isinstance(node, (list, tuple)):
        return [text for index, value in enumerate(node) for text in not_storable(value, f"{where}[{index}]")]
    if not isinstance(node, (str, int, float, type(None))):
        return [f"{where}: got {shown(node)}. Expected text, a number, true, false or null; write a date in quotes."]
    fault = _outside(node, {})
    return [f"{where}: {fault}"] if fault else []


def fit(value: Any, hint: Any, limits: Mapping[str, Any] = types.MappingProxyType({})) -> tuple[Any, str | None]:
    """Return `value` as the type `hint` and None, or the value and what was expected.

    Args:
        hint: a type; with `Annotated`, its second argument adds to the limits.
        limits: see `setting`.
    """
    if typing.get_origin(hint) is Annotated:
        hint, limits = typing.get_args(hint)
    fits, fitted = _fit(value, hint)
    if fits:
        return fitted, _outside(fitted, limits)
    fault = f"got {shown(value)}, expected {_type_name(hint)}."
    if isinstance(value, str):
        if value == "auto":
            fault += ' Only the Hugging Face Trainer replaces "auto" here; set a value, or remove the key.'
        elif _is_written(value, hint):
            fault += " The quotes make it a text; remove them."
    return value, fault


def _is_written(text: str, hint: Any) -> bool:
    """Return whether a text reads as a value of the type: "1e-8" as a number, "true" as a bool."""
    if text.lower() in ("true", "false"):
        return _fit(True, hint)[0]
    try:
        number = float(text)
    except ValueError:
        return False
    return _fit(number, hint)[0] or number.is_integer() and _fit(int(number), hint)[0]


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
    if base is Literal:
        return value in typing.get_args(hint), value
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value) if abs(value) < LARGEST else value
    if base is tuple and isinstance(value, list):
        return True, tuple(value)
    inner = typing.get_args(hint)
    if base is Mapping or base is dict:
        if not isinstance(value, dict):
            return False, value
        key_hint, value_hint = inner or (Any, Any)
        return all(_fit(key, key_hint)[0] and _fit(one, value_hint)[0] for key, one in value.items()), value
    if base is list:
        return isinstance(value, list) and all(_fit(one, kind)[0] for one in value for kind in inner), value
    if base is int and isinstance(value, bool):
        return False, value
    return isinstance(value, base), value


def _type_name(hint: Any) -> str:
    """Name a type for a user who writes YAML."""
    base = typing.get_origin(hint) or hint
    if base in (list, dict) and typing.get_args(hint):
        inner = _type_name(typing.get_args(hint)[-1])
        return f"a list, each entry {inner}" if base is list else f"a mapping, each value {inner}"
    if base is Literal:
        return " or ".join(repr(one) for one in typing.get_args(hint))
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
    return names.get(base, getattr(base, "__name__", str(base)))


def _outside(value: Any, limits: Mapping) -> str | None:
    """Return the value found and what `limits` expect where it violates them, else None."""
    if value is None:
        return None
    got = f"got {shown(value)}. "
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return got + "It has half a character (a lone surrogate), which no file can hold; remove it."
    if "choices" in limits and value not in limits["choices"]:
        return got + expected(str(value), map(str, limits["choices"]))
    if isinstance(value, float) and not math.isfinite(value):
        return got + "Expected a finite number."
    if isinstance(value, int) and abs(value) >= LARGEST:
        return got + "Expected a number below 2^63."
    if isinstance(value, str):
        return None  # such as "auto" in place of a number
    if "at_least" in limits and value < limits["at_least"]:
        return got + f"Expected at least {limits['at_least']}."
    if "above" in limits and value <= limits["above"]:
        return got + f"Expected more than {limits['above']}."
    if "below" in limits and value >= limits["below"]:
        return got + f"Expected less than {limits['below']}."
    if "at_most" in limits and value > limits["at_most"]:
        return got + f"Expected at most {limits['at_most']}."
    return None
