"""A wrong value of any kind, for any setting, ends in a message that names the setting, or the value is used."""

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from hift_ds.evaluation.compare import settings as comparisons
from hift_ds.launch.config.library_checks import check_with_libraries, library_problems
from hift_ds.launch.config.settings import SECTIONS, check_settings, load_settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.runtime import outputs
from tests.support.paths import REPOSITORY
from tests.support.training import TINY
from tests.support.wrong_values import DEEPSPEED, WRONG_VALUES, leaves, with_value

SAMPLE = 300  # of the cases of a fuzz, without `-m slow`


def valid(folder: Path) -> dict[str, Any]:
    """All settings of a run with valid values: each field of each section, and DeepSpeed's section at any depth."""
    raw: dict[str, Any] = yaml.safe_load(Path(TINY).read_text())
    for name, kind in SECTIONS.items():
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            default = field.default if field.default is not dataclasses.MISSING else {}
            raw.setdefault(name, {}).setdefault(field.name, default)
    del raw["training"]["lr_schedule"]  # the deepspeed section has a scheduler
    raw["training"] |= {"learning_rate": None, "max_steps": 12}
    return raw | {"deepspeed": copy.deepcopy(DEEPSPEED), "output": {"dir": str(folder / "out"), "overwrite": False}}


def check(raw: dict[str, Any]) -> list[str]:
    """All that is checked before data are loaded; gives the lines of the message."""
    problems: list[str] = []
    settings = check_settings(raw, 1, problems)
    if settings is None:
        return problems
    try:
        outputs.check_start(outputs.folder(settings), settings, None)
        outputs.check_writable(outputs.folder(settings))
    except UserError as error:
        return [str(error)]
    return library_problems(settings)


def names(line: str, path: tuple[Any, ...]) -> bool:
    """Whether a line begins with a setting, the section that it is in, or two settings that disagree."""
    keys = [".".join(map(str, path[:depth])) for depth in range(1, len(path) + 1)]
    return keys[-1] in line or any(line.startswith(key) for key in keys)


def cases(raw: dict[str, Any], seed: int) -> list[tuple[tuple[Any, ...], Any]]:
    every = [(path, value) for path in leaves(raw) for value in WRONG_VALUES]
    random.Random(seed).shuffle(every)
    return every


def fuzz(raw: dict[str, Any], chosen: list[tuple[tuple[Any, ...], Any]]) -> None:
    for path, value in chosen:
        try:
            lines = check(with_value(raw, path, value))
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, path))}={value!r}: {type(error).__name__}") from error
        for line in lines:
            assert "\n" not in line, (path, value, line)
        assert not lines or any(names(line, path) for line in lines), (path, value, lines)


def test_the_valid_settings_are_valid(tmp_path: Path) -> None:
    raw = valid(tmp_path)
    assert check(raw) == []
    assert len(list(leaves(raw))) > 200


def test_wrong_values_of_some_settings(tmp_path: Path) -> None:
    raw = valid(tmp_path)
    fuzz(raw, cases(raw, seed=0)[:SAMPLE])


@pytest.mark.slow
def test_wrong_values_of_every_setting(tmp_path: Path) -> None:
    raw = valid(tmp_path)
    fuzz(raw, cases(raw, seed=0))


# ---- files -------------------------------------------------------------------------------------------------------

MULTIPLIED = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 9))
DOCUMENTS = {
    "nothing": ("", "expected a mapping"),
    "null": ("null", "expected a mapping"),
    "list": ("- 1", "expected a mapping"),
    "set": ("!!set {a, b}", "expected a mapping"),
    "bytes": ("!!binary aGk=", "expected a mapping"),
    "tab": ("training:\n\tseed: 1", "character '\\t'"),
    "list as a key": ("? [1]\n: 2", "a key is [1]"),
    "mapping as a key": ("training:\n  ? {a: 1}\n  : 2", "a key is {'a': 1}"),
    "number as a key": ("1: 2", "1: unknown section"),
    "date as a key": ("2026-01-01: 2", "2026-01-01: unknown section"),
    "contains itself": ("training: &a [*a]", "recursive"),
    "multiplied by aliases": (MULTIPLIED, "more than 100000 values"),
    "deep": ("training: " + "[" * 3000 + "]" * 3000, "more than 50 levels deep"),
    "no date": ("training: {seed: 2026-13-45}", "month must be in 1..12"),
    "date": ("training: {seed: 2026-01-01}", "training.seed: got datetime.date(2026, 1, 1), expected a whole number"),
    "date for a name": ("logging: {wandb_name: 2026-01-01}", "logging.wandb_name: got datetime.date"),
    "date inside": ("model: {config: {model_type: llama, x: 2026-01-01}}", "model.config.x: got datetime.date"),
    "long number": ("training: {seed: " + "9" * 5000 + "}", "Exceeds the limit"),
    "large number": ("training: {seed: 99999999999999999999}", "training.seed: got 99999999999999999999"),
    "large seed": ("training: {seed: 4294967296}", "training.seed: got 4294967296. Expected at most 4294967295"),
    "false tag": ("training: {seed: !!int abc}", "invalid literal"),
    "false time": ("training: {seed: !!timestamp abc}", "not valid YAML"),
    "false bool": ("training: {seed: !!bool maybe}", "not valid YAML"),
    "unknown tag": ("training: !!python/none x", "could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 2", "a single document"),
    "unknown alias": ("a: *b", "undefined alias"),
    "control character": ("a: \x01", "special characters"),
    "half a character": ('logging: {wandb_name: "\\ud800"}', "logging.wandb_name: got '\\ud800'. It has half a"),
    "list of pairs": ("training: !!omap [seed: 1]", "training: got [('seed', 1)], expected a mapping"),
    "values of columns": ("data: {columns: {prompt: 1}}", "data.columns: got {'prompt': 1}"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_strange_documents(name: str, tmp_path: Path) -> None:
    content, expected = DOCUMENTS[name]
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_settings(str(tmp_path / "run.yaml"))
    assert expected in str(raised.value)


def test_merge_keys_and_aliases_are_followed(tmp_path: Path) -> None:
    text = Path(TINY).read_text().replace("  seed: 0\n", "  <<: {seed: 3}\n")
    (tmp_path / "run.yaml").write_text(text)
    assert load_settings(str(tmp_path / "run.yaml")).training.seed == 3


@pytest.mark.parametrize(
    "override",
    ["=1", "a", ".=1", "a..b=1", "training.seed", "training.seed=[", "training.seed={", "training=&a [*a]",
     "training.seed=!!bool x", "training.seed=? [1]", "deepspeed=[1]", "deepspeed=5", "deepspeed.x.y=1", "model=[1]",
     "1=2", "training.1=2", "training.seed=2026-01-01", "training.seed=" + "[" * 3000, "data.columns.a.b=1",
     "deepspeed.optimizer.1=2", "deepspeed.optimizer.params.1=2", "deepspeed.hift.1=2", "deepspeed.zero_optimization=x",
     "training.seed=\udc80", "\udc80=1"],
)  # fmt: skip
def test_strange_overrides(override: str) -> None:
    with pytest.raises(UserError):
        check_with_libraries(load_settings(TINY, [override]), TINY)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"train_batch_size": 4, "train_batch_size": 8}', "the key 'train_batch_size' is given twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"x": ' * 60 + "1" + "}" * 60, "more than 50 levels deep"),
        ('{"gradient_clipping": NaN}', "deepspeed.gradient_clipping: got nan. Expected a finite number."),
        ('{"gradient_clipping": -1e999}', "deepspeed.gradient_clipping: got -inf. Expected a finite number."),
        ('{"optimizer": {"params": {"betas": [0.9, NaN]}}}', "deepspeed.optimizer.params.betas[1]: got nan."),
        ('{"zero_optimization": {"sub_group_size": Infinity}}', "deepspeed.zero_optimization.sub_group_size: got inf."),
    ],
)
def test_strange_deepspeed_files(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError) as raised:
        load_settings(TINY, [f"deepspeed={tmp_path / 'ds.json'}"])
    assert expected in str(raised.value)


# ---- comparisons -------------------------------------------------------------------------------------------------


def entries(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in nested mappings and lists."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return ([path] if path else []) + [found for key, value in inner for found in entries(value, (*path, key))]


def comparison(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / "compare_tiny.yaml").read_text())
    row = {"name": "hift", "label": "own", "learning_rates": [1e-3], "shots": 2, "training": {"batch_size": 4}}
    return raw | {
        "tasks": ["yes-no", {"name": "arithmetic", "path": None, "revision": None}],
        "methods": ["full", row | {"method": {}, "deepspeed": {"hift": {"layers_per_block": 1}}}],
        "learning_rates": [1e-3],
        "budgets": [{"samples": 8}, {"seconds": 5}],
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "evaluation": dataclasses.asdict(comparisons.EvaluationSettings()),
        "logging": {"every": 1, "wandb": "off"},
        "output": {"dir": str(folder / "out")},
        "model_name": "tiny",
    }


def fuzz_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    raw = comparison(folder)
    every = [(path, value) for path in entries(raw) for value in WRONG_VALUES]
    random.Random(1).shuffle(every)
    for path, value in every[:size]:
        changed = with_value(raw, path, value)
        monkeypatch.setattr(comparisons, "read_yaml", lambda *_, given=changed: (given, []))
        try:
            comparisons.load_comparison("compare.yaml")
        except UserError as error:
            assert any(key.rstrip("s") in str(error) for key in path if isinstance(key, str)), (path, value, error)
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, path))}={value!r}: {type(error).__name__}") from error


def test_wrong_values_of_some_settings_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz_comparison(tmp_path, monkeypatch, SAMPLE)


@pytest.mark.slow
def test_wrong_values_of_every_setting_of_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz_comparison(tmp_path, monkeypatch, None)
