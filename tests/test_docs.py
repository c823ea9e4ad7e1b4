"""The documentation: every path, link, command and setting that it names exists, and no setting is left out."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

import hift_ds
from hift_ds.config import HiFTConfig, OffloadConfig
from hift_ds.evaluation.compare import settings as comparison
from hift_ds.launch.config.settings import SECTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = sorted((ROOT / "docs" / "integrations").glob("*.md"))
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *FRAMEWORKS, *RESULTS]
CONFIGURATION = ROOT / "docs" / "configuration.md"
INTEGRATIONS = ROOT / "docs" / "integrations.md"
WIDTH = 120  # columns of everything but tables; of the README, of tables too
FOREIGN = {"script.py", "launch.py", "zero_to_fp32.py"}  # a reader's own script, and files of DeepSpeed
FOLDERS = ("configs", "docs", "evaluation", "examples", "hift_ds", "launch", "tests", ".ci")

# The dataclass behind each table of docs/configuration.md, by the table's heading.
TABLES: dict[str, Any] = {
    "`model`": SECTIONS["model"],
    "`data`": SECTIONS["data"],
    "`method`": SECTIONS["method"],
    "`training`": SECTIONS["training"],
    "`output`": SECTIONS["output"],
    "`logging`": SECTIONS["logging"],
    "`data` of a comparison": comparison.DataSettings,
    "`evaluation` of a comparison": comparison.EvaluationSettings,
    "`output` of a comparison": comparison.OutputSettings,
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path, language: str = r"\w*") -> list[str]:
    """The fenced code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def code_of(page: Path) -> list[str]:
    """All code of a page, fenced and inline, each with one space for line breaks."""
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(one.split()) for one in re.findall(r"`([^`]+)`", prose)]
    lines = [line for block in blocks_of(page) for line in block.replace("\\\n", " ").splitlines()]
    return [*inline, *(" ".join(line.split()) for line in lines)]


def each_code() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for code in code_of(page):
            yield page.name, code


def headings_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# --- form ---------------------------------------------------------------------------------------------------------


def test_readme_is_short_and_names_the_commands():
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 160
    report([line for line in readme.splitlines() if len(line) > WIDTH])
    commands = {code.partition(" #")[0] for code in code_of(ROOT / "README.md")}
    assert {"make quickstart", "make test"} <= commands


def test_pages_are_not_too_wide():
    lines = [(page.name, line) for page in PAGES for line in text_of(page).splitlines()]
    report([f"{name}: {line}" for name, line in lines if len(line) > WIDTH and not line.startswith("|")])


def linked_from(page: Path) -> set[Path]:
    return {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)", text_of(page))}


def test_readme_links_to_every_page():
    assert {*PAGES} - {ROOT / "README.md", *FRAMEWORKS, *RESULTS} <= linked_from(ROOT / "README.md")
    assert {*FRAMEWORKS} <= linked_from(INTEGRATIONS)
    assert {*RESULTS} <= linked_from(ROOT / "docs" / "results.md")


def test_python_code_compiles_and_its_names_exist():
    found = [(page.name, block) for page in PAGES for block in blocks_of(page, "python")]
    assert found
    for name, block in found:
        compile(block, name, "exec")
    names = {(name, one) for name, code in each_code() for one in re.findall(r"\bhift_ds\.(\w+)\(", code)}
    assert ("README.md", "initialize") in names
    report([f"{page}: hift_ds.{name}" for page, name in sorted(names) if not hasattr(hift_ds, name)])


# --- links and paths ----------------------------------------------------------------------------------------------


def test_links_lead_somewhere():
    problems, count = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if re.match(r"https?://", target):
                continue
            count += 1
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            if not other.exists():
                problems.append(f"{page.name}: {target}: no such file")
            elif anchor and anchor not in headings_of(other):
                problems.append(f"{page.name}: {target}: no such heading")
    assert count > 20
    report(problems)


def test_named_files_exist():
    pattern = re.compile(rf"(?<![\w/.~-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*")
    problems, count = [], 0
    for page, code in each_code():
        for path in (one.rstrip(".") for one in pattern.findall(code)):
            count += 1
            if not any(ROOT.glob(path.rstrip("/"))):
                problems.append(f"{page}: {path}")
        if re.fullmatch(r"[\w-]+\.(py|yaml|json|svg|toml)", code) and code.endswith(".py") and code not in FOREIGN:
            count += 1
            if not any(one for folder in FOLDERS for one in (ROOT / folder).rglob(code)):
                problems.append(f"{page}: {code}")
    assert count > 40
    report(problems)


def test_named_tests_exist():
    problems, count = [], 0
    for page, code in each_code():
        for path, name in re.findall(r"^(tests/[\w/]+\.py)::(\w+)", code):
            count += 1
            if not re.search(rf"^ *def {name}\(", text_of(ROOT / path), re.MULTILINE):
                problems.append(f"{page}: {code}")
    assert count > 100
    report(problems)


def test_each_integration_names_its_tests_and_each_example_is_shown():
    tested = text_of(INTEGRATIONS).split("# What was tested\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| (?!framework|---).*", tested, re.MULTILINE)
    assert rows
    report([f"{row}: names no test" for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row)])
    shown = {code for page in (INTEGRATIONS, *FRAMEWORKS) for code in code_of(page)}
    examples = [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.py"))]
    report([f"{example}: on no page" for example in examples if not any(example in code for code in shown)])


# --- commands -----------------------------------------------------------------------------------------------------


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {(page, target) for page, code in each_code() for target in re.findall(r"^make ([a-z][a-z-]*)", code)}
    assert ("README.md", "test") in named
    report([f"{page}: make {target}" for page, target in sorted(named) if target not in targets])


def test_commands_exist():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    problems, count = [], 0
    for page, code in each_code():
        for module in re.findall(r"(?:python -m|--module) ([\w.]+)", code):
            count += 1
            if not _runs(module):
                problems.append(f"{page}: {code}: {module} cannot be run")
        for script in re.findall(r"(?:^|\s)deepspeed (?:.*? )?([\w/]+\.py)\b", code):
            count += 1
            if script not in FOREIGN and not (ROOT / script).is_file():
                problems.append(f"{page}: {code}: no {script}")
        for command in re.findall(r"\bhift-[a-z]+\b", code):
            count += 1
            if command not in scripts:
                problems.append(f"{page}: {code}: {command} is not installed")
    assert count > 20
    report(problems)


def _runs(module: str) -> bool:
    """Whether `python -m module` has something to run; imports only the packages above it."""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        return False
    return found is not None


def test_settings_named_in_code_exist():
    """In `--set section.key=...`, and where `section.key` is alone; with the comparison's own keys."""
    known = {f"{section}.{f.name}" for section, kind in SECTIONS.items() if kind is not dict for f in fields(kind)}
    for section, kind in (
        ("data", comparison.DataSettings),
        ("evaluation", comparison.EvaluationSettings),
        ("output", comparison.OutputSettings),
    ):
        known |= {f"{section}.{f.name}" for f in fields(kind)}
    known |= {*comparison.SECTIONS, *SECTIONS}
    sections = "|".join({*SECTIONS, "evaluation"} - {"deepspeed"})
    problems, count = [], 0
    for page, code in each_code():
        keys = re.findall(r"--set '?([a-z][\w.]*)=", code)
        keys += re.findall(rf"^((?:{sections})\.\w+)(?:[:=].*)?$", code)
        for key in keys:
            count += 1
            if key not in known and not key.startswith("deepspeed.") and not _runs(key):
                problems.append(f"{page}: {code}: no setting {key}")
    assert count > 30
    report(problems)


# --- keys ---------------------------------------------------------------------------------------------------------


def table(heading: str) -> dict[str, str]:
    """Key -> default of the table that follows a heading of docs/configuration.md."""
    section = text_of(CONFIGURATION).split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", section, re.MULTILINE)
    assert len({key for key, _ in rows}) == len(rows), f"{heading}: a key has two rows"
    return dict(rows)


def defaults(kind: Any) -> dict[str, Any]:
    return {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(kind)}


def as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check(heading: str, expected: dict[str, Any]) -> None:
    found = table(heading)
    assert found.keys() == expected.keys()
    given = {key: json.loads(default) for key, default in found.items()}
    assert given == {key: as_json(value) for key, value in expected.items()}


@pytest.mark.parametrize("heading", TABLES)
def test_key_tables(heading: str):
    check(heading, defaults(TABLES[heading]))


def test_every_section_has_a_table():
    assert {f"`{name}`" for name in SECTIONS} - {"`deepspeed`"} <= TABLES.keys()


def test_hift_table():
    expected = defaults(HiFTConfig)
    del expected["offload"]
    check("The `hift` section", expected | {f"offload.{key}": value for key, value in defaults(OffloadConfig).items()})


def test_keys_of_a_comparison():
    section = text_of(CONFIGURATION).split("# A comparison's YAML\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    with_tables = {"data", "evaluation", "output"}
    assert keys == set(comparison.SECTIONS) - with_tables - SECTIONS.keys()
    row_keys = re.search(r"^\| `methods` \|.*`\{([\w, ]+)\}`", section, re.MULTILINE)
    assert row_keys is not None
    assert set(row_keys[1].split(", ")) == set(comparison.ROW_KEYS)
