"""Read a settings file: YAML with the scalars of YAML 1.2, `--set` overrides, and a DeepSpeed JSON file by its path."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hift_ds import paths
from hift_ds.launch.config import credentials
from hift_ds.launch.config.checking import problem_list
from hift_ds.launch.errors import UserError, expected, shown

# Limits of a settings file, far above any that a person writes.
MAX_DEPTH, MAX_VALUES = 50, 100_000
_TOO_DEEP = f"values are nested more than {MAX_DEPTH} levels deep, or an alias contains itself"
PACKAGE = Path(__file__).parents[2]  # hift_ds; it holds configs/ in a clone and in a wheel


def read_yaml(path: str, overrides: Sequence[str], sections: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Read the YAML at `path`, apply the `--set` overrides and replace the path of a DeepSpeed file by its content.

    Args:
        sections: names of the known sections, for messages.

    Returns:
        The content, and the problems found so far.

    Raises:
        UserError: the file cannot be read, or it holds secrets.
    """
    problems: list[str] = []
    raw = _read_mapping(path, sections)
    for override in overrides:
        _apply_override(raw, override, problems)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = _read_deepspeed_file(raw["deepspeed"], problems)
    if secrets := credentials.problems(raw):  # alone: other problems may quote the value
        raise UserError(problem_list(source(path, overrides), secrets))
    return raw, problems


def source(path: str, overrides: Sequence[str]) -> str:
    """Name the origin of the settings, for the heading of a list of problems."""
    return f"{path} with --set" if overrides else path


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: `1e-4` is a number and `off` is text. A repeated key is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)|[-+]?(\d+\.\d*|\.\d+)|[-+]?\.(inf|Inf)|\.(nan|NaN))$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(
                None, None, f"a key is {shown(key)}, expected text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        ValueError: it is not valid, or too deep or too large for settings.
    """
    try:
        found = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except Exception as error:  # of many types: constructors of PyYAML do not check values with an explicit tag
        raise ValueError(str(error)) from None
    _check_size(found)
    return found


def _check_size(node: Any) -> None:
    """Refuse settings in which an alias (`*name`) contains itself, or aliases multiply what they stand for."""
    queue, count = [(node, 0)], 0
    while queue:
        inner, depth = queue.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        if count > MAX_VALUES:
            raise ValueError(f"there are more than {MAX_VALUES} values, perhaps by aliases")
        values = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, (list, tuple, set)) else ()
        queue += [(one, depth + 1) for one in values]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, as `object_pairs_hook`; Python's own keeps the last of two values."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return content


def _find(name: str) -> Path:
    """Return the file at the path `name`, or the package's own file of that name, such as configs/tiny.yaml."""
    if os.path.isfile(PACKAGE / name) and not os.path.exists(os.path.expanduser(name)):
        return PACKAGE / name
    if reason := paths.fault(name, reads=True):
        raise UserError(reason)
    return Path(name).expanduser()


def _read_mapping(path: str, sections: Iterable[str]) -> dict:
    try:
        content = _yaml(_find(path).read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"--config: {error}.") from None
    except OSError as error:
        raise UserError(
            f"--config {path}: cannot be read ({error.strerror}). Expected a YAML file, e.g. configs/tiny.yaml."
        ) from None
    except ValueError as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected a mapping with the sections {', '.join(sections)}.")
    return content


def _apply_override(raw: dict, override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        problems.append(f"--set {override}: expected KEY=VALUE, e.g. --set training.max_steps=50.")
        return
    try:
        value = _yaml(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        problems.append(f"--set {override}: the value is not valid YAML. Quote it if it is text. ({reason})")
        return
    node = raw
    for depth, part in enumerate(path[:-1]):
        # `--set deepspeed.hift.seed=1` works on a section that is given as a file too.
        if depth == 0 and part == "deepspeed" and isinstance(node.get(part), str):
            node[part] = _read_deepspeed_file(node[part], problems)
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            problems.append(f"--set {override}: {'.'.join(path[: depth + 1])} is {node[part]!r}, not a section.")
            return
        node = node[part]
    node[path[-1]] = value


def _read_deepspeed_file(name: str, problems: list[str]) -> dict:
    try:
        content = json.loads(_find(name).read_text(encoding="utf-8"), object_pairs_hook=_unique)
        _check_size(content)
    except UserError as error:
        problems.append(f"deepspeed: {error}.")
        return {}
    except OSError as error:
        shipped = sorted(str(p.relative_to(PACKAGE)) for p in (PACKAGE / "configs" / "deepspeed").glob("*.json"))
        problems.append(
            f"deepspeed: {name!r} cannot be read ({error.strerror}). Expected the path of a DeepSpeed "
            f"JSON file or the section itself. {expected(name, shipped)}"
        )
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(f"deepspeed: {name!r} is not valid JSON: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"deepspeed: {name!r} holds a {type(content).__name__}, expected a JSON object.")
        return {}
    return content
