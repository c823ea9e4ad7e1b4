"""The design's picture of the project, held against the sources without importing them: who imports whom, who
may touch what, and that the declared versions, the pinned ones and the imports agree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # folder -> the project's folders that its files may import from
    "hift_ds": {"hift_ds"},
    "launch": {"hift_ds", "launch"},
    "evaluation": {"hift_ds", "launch", "evaluation"},
}
KNOWS_DEEPSPEED = ("hift_ds/engine.py", "hift_ds/zero/")  # files and folders that may use its private names
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

SOURCES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of all that a file imports, anywhere in it; `from a import b` counts as a.b."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parent, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def dotted(node: ast.expr) -> list[str]:
    """["a", "b", "c"] of the expression a.b.c; empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def safe_loaders(path: Path) -> set[str]:
    """PyYAML's safe loaders and what a file derives from them."""
    safe = {"SafeLoader", "CSafeLoader"}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef) and any(safe.intersection(dotted(base)[-1:]) for base in node.bases):
            safe.add(node.name)
    return safe


def is_under(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def report(problems: Iterator[str] | list[str]) -> None:
    lines = list(problems)
    assert not lines, "\n" + "\n".join(lines)


# --- who imports whom -------------------------------------------------------------------------------


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(MAY_IMPORT)


# Room -> the rooms of the same folder that its files may import from. A room is a folder, or a file beside the folders.
ROOMS = {
    "hift_ds": {
        "blocks": "",
        "collectives": "",
        "paths": "",
        "config": "blocks paths",
        "optim": "config",
        "state": "blocks collectives config optim",
        "weights": "blocks collectives config state",
        "model": "state",
        "zero": "config optim state weights",
        "checkpoint": "collectives state",
        "engine": "blocks checkpoint collectives config model optim state weights zero",
        "initialization": "blocks config engine",
        "integrations": "config engine initialization model optim",
        "planner": "blocks config model paths state weights",
        "plan": "planner",
        "__init__": "blocks config engine initialization integrations model optim planner",
    },
    "launch": {
        "errors": "",
        "exit_codes": "",
        "console": "errors exit_codes train",
        "data": "errors",
        "model": "errors",
        "methods": "errors model",
        "config": "data errors methods model",
        "cuts": "config errors methods",
        "runtime": "config cuts data errors exit_codes methods",
        "callbacks": "config data errors methods model runtime",
        "make_engine": "config cuts errors methods model",
        "learning_rates": "config methods",
        "loop": "callbacks config data make_engine methods model runtime",
        "run": "callbacks config cuts data errors learning_rates loop make_engine methods model runtime",
        "train": "errors exit_codes run runtime",
        "quickstart": "config errors model runtime train",
        "__init__": "",
    },
    "evaluation": {
        "json_lines": "",
        "console": "compare",
        "tasks": "json_lines",
        "cost": "json_lines tasks",
        "mt_bench": "json_lines tasks",
        "report": "json_lines mt_bench",
        "compare": "cost json_lines report tasks",
        "harness": "json_lines tasks",
        "efficiency": "cost",
        "gpu_check": "compare cost",
        "offline": "",
        "__init__": "",
    },
}


def module_of(path: Path) -> str:
    """The name under which a file is imported: launch and evaluation are linked into hift_ds."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "hift_ds" else ("hift_ds", *parts))


def room_of(path: Path) -> tuple[str, str]:
    """Top-level folder and room."""
    folder, room = path.relative_to(ROOT).with_suffix("").parts[:2]
    return folder, room


@cache
def modules() -> dict[str, Path]:
    return {module_of(path).removesuffix(".__init__"): path for path in SOURCES}


def local_imports(path: Path, at_run_time: bool = False) -> list[tuple[int, Path]]:
    """(line, file) of every file of the project that a file imports; `at_run_time`: without those for type checkers."""
    only_types: set[int] = set()
    for node in ast.walk(tree_of(path)) if at_run_time else ():
        if isinstance(node, ast.If) and dotted(node.test)[-1:] == ["TYPE_CHECKING"]:
            only_types |= {inner.lineno for one in node.body for inner in ast.walk(one) if hasattr(inner, "lineno")}
    found = []
    for line, name in imports_of(path):
        while name and name not in modules():  # `from a.b import name_in_b`
            name = name.rpartition(".")[0]
        if name and line not in only_types and modules()[name] != path:
            found.append((line, modules()[name]))
    return found


def circles(graph: dict[Any, set[Any]]) -> list[list[Any]]:
    """All groups of nodes each of which reaches every other one of its group."""
    reached: dict[Any, set[Any]] = {}
    for start in graph:
        reached[start], queue = set(), list(graph[start])
        while queue:
            node = queue.pop()
            if node not in reached[start]:
                reached[start].add(node)
                queue += graph.get(node, set())
    groups = {frozenset(other for other in reached[one] if one in reached.get(other, ())) for one in graph}
    return sorted(sorted(group) for group in groups if group)


def test_circles_are_found() -> None:
    graph = {1: {2}, 2: {3}, 3: {2, 4}, 4: set(), 5: {6}, 6: {7}, 7: {5}}
    assert circles(graph) == [[2, 3], [5, 6, 7]] and circles({1: {2, 3}, 2: {3}, 3: set()}) == []


def test_imports_go_one_way():
    problems = []
    for path in SOURCES:
        folder, room = room_of(path)
        if room not in ROOMS[folder]:
            problems.append(f"{name_of(path)}: {room} is no room of {folder}: add it to ROOMS in this test")
            continue
        for line, other in local_imports(path):
            other_folder, other_room = room_of(other)
            if other_folder not in MAY_IMPORT[folder]:
                problems.append(f"{name_of(path)}:{line}: {folder} must not import {name_of(other)}")
            elif other_folder == folder and other_room not in {room, *ROOMS[folder][room].split()}:
                problems.append(f"{name_of(path)}:{line}: {folder}/{room} must not import {name_of(other)}")
    report(problems)


def test_rooms_form_no_circle():
    """Neither those that exist nor those that ROOMS allows."""
    graph: dict[tuple[str, str], set[tuple[str, str]]] = {room_of(path): set() for path in SOURCES}
    for path in SOURCES:
        graph[room_of(path)] |= {room_of(other) for _, other in local_imports(path)} - {room_of(path)}
    report(f"these rooms import each other: {group}" for group in circles(graph))
    allowed = {
        (folder, a): {(folder, b) for b in may.split()} for folder, rooms in ROOMS.items() for a, may in rooms.items()
    }
    report(f"ROOMS lets these import each other: {group}" for group in circles(allowed))


def test_files_form_no_circle():
    graph = {name_of(path): {name_of(other) for _, other in local_imports(path, at_run_time=True)} for path in SOURCES}
    report(f"these files import each other: {group}" for group in circles(graph))


# All of hift_ds that hift_ds/blocks must not know.
OTHER_ROOMS = sorted({f"hift_ds.{path.stem}" for path in (ROOT / "hift_ds").iterdir()} - {"hift_ds.blocks"})


@pytest.mark.parametrize(
    ("file", "strangers"),
    [
        ("hift_ds/blocks/block.py", [*MAY_IMPORT, "deepspeed", "torch.distributed"]),
        ("hift_ds/blocks/layers.py", [*OTHER_ROOMS, "deepspeed", "torch.distributed"]),
        ("hift_ds/blocks/partition.py", [*OTHER_ROOMS, "deepspeed", "torch.distributed"]),
        ("hift_ds/blocks/slicing.py", [*OTHER_ROOMS, "deepspeed", "torch"]),
        ("hift_ds/blocks/schedule.py", [*MAY_IMPORT, "deepspeed", "torch"]),
    ],
)
def test_the_core_stands_alone(file, strangers):
    path = ROOT / file
    used = [
        (node.lineno, ".".join(dotted(node))) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)
    ]
    report(
        f"{file}:{line}: must not know {name}" for line, name in imports_of(path) + used if is_under(name, *strangers)
    )


def test_private_names_of_deepspeed_stay_in_the_engine_and_zero():
    problems = []
    for path in SOURCES:
        if name_of(path).startswith(KNOWS_DEEPSPEED):
            continue
        imported = [(line, name) for line, name in imports_of(path) if is_under(name, "deepspeed")]
        bound = {"deepspeed"} if imported else set()  # what the file calls DeepSpeed and its parts
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                origin = getattr(node, "module", None) or ""
                bound |= {
                    alias.asname or alias.name for alias in node.names if is_under(origin or alias.name, "deepspeed")
                }
            elif isinstance(node, ast.Attribute) and (names := dotted(node)) and names[0] in bound:
                imported.append((node.lineno, ".".join(names)))
        for line, name in imported:
            private = [part for part in name.split(".") if re.match(r"_(?!_)", part)]
            if private or is_under(name, "deepspeed.runtime"):
                problems.append(f"{name_of(path)}:{line}: {name} belongs in {' or '.join(KNOWS_DEEPSPEED)}")
    report(problems)


def test_scripts_shadow_no_library():
    """A script's folder is first on its path: launch/logging.py would hide Python's from launch/quickstart.py."""
    libraries = sys.stdlib_module_names | set(importlib.metadata.packages_distributions())
    report(
        f"{name_of(path)}: rename it, it hides the module {path.stem} from scripts in the same folder"
        for path in (ROOT / "launch").glob("*")
        if path.stem in libraries - set(MAY_IMPORT) and not path.stem.startswith("__")
    )


# --- what no source may hold ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r"torch\.cuda|from torch import .*\bcuda\b", "deepspeed.accelerator.get_accelerator()"),
        (r"\b(TODO|FIXME|XXX)\b|NotImplementedError", "finish it, or file an issue"),
        (r"(^|[^\w.])/(work|tmp|root)/[A-Za-z.]", "a path that exists on every machine"),
    ],
    ids=["torch-cuda", "stubs", "machine-paths"],
)
def test_no_source_holds(pattern, instead):
    report(
        f"{name_of(path)}:{number}: {line.strip()!r} (instead: {instead})"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    )


def test_no_unsafe_loading():
    loaders = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    unsafe = {"weights_only": False, "trust_remote_code": True, "allow_pickle": True}
    problems = []
    for path in SOURCES:
        where = name_of(path)
        problems += [f"{where}:{line}: imports {name}" for line, name in imports_of(path) if is_under(name, *loaders)]
        for node in ast.walk(tree_of(path)):
            settings: list[tuple[object, ast.expr]] = []
            if isinstance(node, ast.Call):
                settings = [(keyword.arg, keyword.value) for keyword in node.keywords]
                if dotted(node.func) in (["yaml", "load"], ["yaml", "unsafe_load"], ["yaml", "full_load"]):
                    loader = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
                    if not any(safe_loaders(path).intersection(dotted(value)[-1:]) for value in loader):
                        problems.append(f"{where}:{node.lineno}: use yaml.safe_load")
            elif isinstance(node, ast.Dict):
                settings = [(getattr(k, "value", None), v) for k, v in zip(node.keys, node.values, strict=True)]
            elif isinstance(node, ast.Assign):
                settings = [(name, node.value) for target in node.targets for name in dotted(target)[-1:]]
            for key, value in settings:
                if key in unsafe and isinstance(value, ast.Constant) and value.value is unsafe[key]:
                    problems.append(f"{where}:{value.lineno}: {key}={value.value}")
    report(problems)


def test_files_have_a_subject():
    report(
        f"{name_of(path)}: name it after its subject"
        for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
        if path.stem in {"utils", "util"}
    )


# --- versions ---------------------------------------------------------------------------------------


NOT_IN_ALL = ("torchao",)  # extras that the tests' environment does not have


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(*extras: str) -> list[Requirement]:
    """The libraries that pyproject.toml names, the given extras' too, without its reference to itself."""
    extra = project()["optional-dependencies"]
    lines = project()["dependencies"] + [line for name in extras for line in extra[name]]
    return [need for need in map(Requirement, lines) if need.name != project()["name"]]


@cache
def pins(python: str) -> dict[str, str]:
    """Library -> version that constraints.txt pins for one Python."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        (clause,) = pin.specifier
        assert clause.operator == "==" and "*" not in clause.version, f"constraints.txt: {line}: not one exact version"
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert canonicalize_name(pin.name) not in found, f"constraints.txt: {pin.name} is pinned twice for {python}"
            found[canonicalize_name(pin.name)] = clause.version
    return found


def test_the_extra_all_is_all():
    extras = project()["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.name == project()["name"] and everything.extras == set(extras) - {"all", *NOT_IN_ALL}


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_within_the_declared_ranges(python):
    version = f"{python}.0"
    assert version in Requirement(f"python{project()['requires-python']}").specifier
    report(
        f"{need}: constraints.txt pins {pinned} for Python {python}"
        for need in declared(*project()["optional-dependencies"])
        for pinned in [pins(python).get(canonicalize_name(need.name), "0")]
        if not need.specifier.contains(pinned, prereleases=True)
    )


def test_everything_that_gets_installed_is_pinned():
    """Follows what installed libraries need, for the running Python; torch's GPU packages are exempt."""
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    extras_of_all = set(project()["optional-dependencies"]) - set(NOT_IN_ALL)
    queue = [(need, frozenset(need.extras)) for need in declared(*extras_of_all)]
    seen, problems = set(), []
    while queue:
        need, extras = queue.pop()
        name = canonicalize_name(need.name)
        if (name, extras) in seen or re.match(r"nvidia-|cuda-|triton$", name):
            continue
        seen.add((name, extras))
        if name not in pinned:
            problems.append(f"constraints.txt lacks {name}")
            continue
        for further in map(Requirement, importlib.metadata.requires(name) or []):
            marker = further.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                queue.append((further, frozenset(further.extras)))
    report(sorted(problems))


def test_imported_libraries_are_declared():
    """hift_ds must run on the dependencies alone; launch and evaluation also have the extra `train`.

    Evaluation says so where those of `e2e` and `harness` are not installed.
    The planner draws with matplotlib and wraps with peft where they are installed, and says so where they are not.
    The callback needs what the Trainer of transformers itself needs. A machine is checked with pip's copy of packaging
    where packaging is not installed.
    """
    modules: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        modules[module] = {canonicalize_name(name) for name in distributions}
    extras = {"hift_ds": (), "launch": ("train",), "evaluation": ("train", "e2e", "harness")}
    problems = []
    for path in SOURCES:
        folder = path.relative_to(ROOT).parts[0]
        allowed = {canonicalize_name(need.name) for need in declared(*extras[folder])}
        allowed |= {
            "hift_ds/planner/picture.py": {"matplotlib"},
            "hift_ds/planner/models.py": {"peft"},
            "hift_ds/integrations/callback.py": {"accelerate"},
            "evaluation/offline/ready.py": {"pip"},
        }.get(name_of(path), set())
        for line, name in imports_of(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in MAY_IMPORT:
                continue
            if not modules.get(top, {canonicalize_name(top)}) & allowed:
                problems.append(f"{name_of(path)}:{line}: {top} is not among the libraries that {folder} may need")
    report(problems)


# --- the top level ----------------------------------------------------------------------------------


def test_top_level_is_the_designs():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so that files of the project and others cannot be told apart")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {name.split("/")[0] for name in listed if "/" in name}
    files = {name for name in listed if "/" not in name}
    assert folders - {"docs"} == {*MAY_IMPORT, "configs", "examples", "tests", ".ci"}
    needed = {
        *("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt"),
        *(".gitignore", ".pre-commit-config.yaml"),
    }
    assert not needed - files, f"missing: {sorted(needed - files)}"
    strays = {name for name in files - needed if not name.endswith(".md")}
    assert not strays, f"not part of the design: {sorted(strays)}"


def test_readme_and_ci_name_the_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [command for command in ("make quickstart", "make test") if command not in readme] == []
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
