"""What is wrong with a path is said before anything is opened, by every command that takes one."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from hift_ds import paths
from hift_ds.evaluation import harness
from hift_ds.evaluation.compare.settings import load_comparison
from hift_ds.evaluation.mt_bench import command as mt_bench
from hift_ds.evaluation.report import command as report
from hift_ds.launch import train
from hift_ds.launch.config.settings import load_settings
from hift_ds.launch.errors import UserError
from hift_ds.planner import command as planner
from tests.support.paths import REPOSITORY
from tests.support.training import TINY


@pytest.fixture
def names(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Names that no command can use, each with what the message must hold."""
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return {
        "long": (str(tmp_path / ("n" * 300)), "has 300 bytes, and the drive takes at most 255"),
        "long in bytes": (str(tmp_path / ("é" * 200)), "has 400 bytes"),
        "below a missing folder": (str(tmp_path / "missing" / ("n" * 300)), "has 300 bytes"),
        "long path": (str(tmp_path) + "/" + "/".join(["n" * 200] * 25), "drive takes at most 4096"),
        "NUL": (str(tmp_path / "a\0b"), "NUL character"),
        "surrogate": (str(tmp_path / "a\ud800b"), "characters that no file name can have"),
        "empty": (" ", "is empty"),
        "no such user": ("~nobody-of-this-name/x", "no user 'nobody-of-this-name'"),
        "below a file": (str(tmp_path / "file" / "x"), "file' is a file, not a folder"),
        "dangling link": (str(tmp_path / "dangling"), "gone', which does not exist"),
        "below a dangling link": (str(tmp_path / "dangling" / "x"), "gone', which does not exist"),
        "circle of links": (str(tmp_path / "circle"), "cannot be reached"),
    }


def test_faults_of_a_path(names: dict[str, tuple[str, str]]) -> None:
    for name, (path, expected) in names.items():
        assert expected in str(paths.fault(path)), name


def test_paths_without_a_fault(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path in (tmp_path, tmp_path / "link" / "new", tmp_path / "a" / "b", tmp_path / ("n" * 255), "relative", "~/x"):
        assert paths.fault(path, reads=True, inside=paths.INSIDE) is None


def test_room_for_the_files_inside(tmp_path: Path) -> None:
    parts = [str(tmp_path)]
    while len("/".join(parts)) < 3800:
        parts.append("n" * min(200, 3999 - len("/".join(parts))))
    path = "/".join(parts)
    assert paths.fault(path) is None and "for the files inside" in str(paths.fault(path, inside=paths.INSIDE))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert "no permission" in str(paths.fault(tmp_path / "closed", reads=True))
    assert "Permission denied" in str(paths.fault(tmp_path / "closed" / "x" / "y"))


def test_arguments_of_a_command(tmp_path: Path) -> None:
    assert paths.to_write(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(argparse.ArgumentTypeError, match="has 300 bytes"):
        paths.to_read("n" * 300)


SETTINGS = {
    "output.dir": ["output.dir={}"],
    "data.path": ["data.name=jsonl", "data.path={}"],
    "data.eval_path": ["data.name=jsonl", f"data.path={REPOSITORY / 'configs'}", "data.eval_path={}"],
    "model.name_or_path": ["model.config=null", "model.name_or_path={}"],
    "model.tokenizer": ["model.tokenizer={}"],
    "deepspeed": ["deepspeed={}"],
    "deepspeed.hift.offload.nvme_path": ["deepspeed.hift.offload={{device: nvme, nvme_path: {}}}"],
    "deepspeed.tensorboard.output_path": ["deepspeed.tensorboard={{enabled: true, output_path: {}}}"],
    "deepspeed.csv_monitor.output_path": ["deepspeed.csv_monitor={{enabled: true, output_path: {}}}"],
    "deepspeed.flops_profiler.output_file": ["deepspeed.flops_profiler.output_file={}"],
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_are_paths(key: str, names: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    for name, (path, expected) in names.items():
        if name == "empty" and key.endswith(("output_path", "nvme_path")):
            continue  # DeepSpeed's word for "none"; with nvme_path, another message
        quoted = yaml.safe_dump(path, default_style='"', width=10**6, allow_unicode=False).strip()
        content = yaml.safe_load(Path(TINY).read_text())
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(content))
        overrides = [one.format(quoted) for one in SETTINGS[key]]
        with pytest.raises(UserError) as raised:
            load_settings(str(file), overrides)
        lines = str(raised.value).splitlines()
        words = (expected, "half a character") if name == "surrogate" else (expected,)  # refused as a text, too
        told = [line for line in lines if line.startswith(f"  - {key}") and any(word in line for word in words)]
        assert told, (name, lines)
        assert len(lines) == 2 or name == "surrogate", (name, lines)


COMMANDS: dict[str, tuple[Any, list[str]]] = {
    "--config": (train.main, ["--config", "{}"]),
    "argument --answers": (mt_bench.main, ["judge", "--data", ".", "--verdicts", "v.jsonl", "--answers", "{}"]),
    "argument --verdicts": (mt_bench.main, ["show", "--verdicts", "{}"]),
    "--data": (mt_bench.main, ["answer", "--model", "m", "--answers", "a.jsonl", "--data", "{}"]),
    "argument OUT": (report.main, ["{}"]),
    "argument --add": (report.main, ["out", "--add", "{}"]),
    "--write-config": (planner.main, ["--model", "llama-7b", "--write-config", "{}"]),
    "--plot": (planner.main, ["--model", "llama-7b", "--plot", "{}"]),
}


@pytest.mark.parametrize("option", COMMANDS)
def test_commands_name_the_option(
    option: str,
    names: dict[str, tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "1" if key == "WORLD_SIZE" else "0")
    before = sorted(os.listdir(tmp_path))
    run, arguments = COMMANDS[option]
    for name, (path, expected) in names.items():
        if name == "surrogate":
            continue  # a command line cannot hold it
        assert run([one.format(path) for one in arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {option}: ") and expected in printed, (name, printed)
    assert sorted(os.listdir(tmp_path)) == before


def test_output_of_a_comparison(names: dict[str, tuple[str, str]]) -> None:
    config = str(REPOSITORY / "configs" / "compare_tiny.yaml")
    for path, expected in names.values():
        quoted = yaml.safe_dump(path, default_style='"', width=10**6, allow_unicode=False).strip()
        with pytest.raises(UserError) as raised:
            load_comparison(config, [f"output.dir={quoted}"])
        message = str(raised.value)
        assert "output.dir: " in message and (expected in message or "half a character" in message)


def test_the_output_folder_of_the_harness_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "missing" / "scores.json"
    given = ["--model", str(tmp_path), "--tasks", "rte", "--data", str(tmp_path), "--output", str(output)]
    assert harness.main(given) == 2
    assert "missing' does not exist; create it" in capsys.readouterr().err
