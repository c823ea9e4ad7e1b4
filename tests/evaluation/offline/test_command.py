"""A pack is unpacked as it was packed, or not at all; whatever is missing is said at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hift_ds.evaluation.offline import command
from hift_ds.evaluation.offline.parts import Entry, write_parts
from tests.support.paths import REPOSITORY

VERSION = "{}.{}".format(*sys.version_info)
PYPROJECT = 'dependencies = [\n    "numpy>=2",\n]\n\n[project.optional-dependencies]\ntrain = [\n    "packaging",\n]\n'


def run(*arguments: str, cwd: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, env=environment)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small clone with a link, a script and a file that git does not track; a model, data and a wheel beside it."""
    root = tmp_path / "clone"
    ready = root / "evaluation" / "offline" / "ready.py"
    ready.parent.mkdir(parents=True)
    ready.write_text((REPOSITORY / "evaluation" / "offline" / "ready.py").read_text())
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "linked").symlink_to("evaluation")
    (root / "script ä.sh").write_text("#!/bin/sh\n")
    (root / "script ä.sh").chmod(0o755)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        assert run(*git, *arguments, cwd=root).returncode == 0
    (root / "untracked").write_text("x")
    (tmp_path / "blob").write_bytes(os.urandom(3000))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "sst2" / "train.tsv").write_text("sentence\tlabel\n")
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "answer = 42\n")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(command, "ROOT", root)
    return root


def pack(tmp_path: Path, name: str, *more: str) -> int:
    given = [str(tmp_path / name), "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    given += ["--wheels", str(tmp_path / "wheels"), "--part-mb", "0.008", "--python", VERSION]
    return command.main([*given, *more])


def test_a_pack_is_unpacked_as_it_was_packed(project: Path, tmp_path: Path) -> None:
    assert pack(tmp_path, "parts") == 0
    parts = sorted((tmp_path / "parts").glob("part-*"))
    assert len(parts) > 2 and {one.stat().st_size for one in parts[:-1]} == {8000}
    done = run("sh", str(tmp_path / "parts" / "unpack.sh"), "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = tmp_path / "there"
    assert f". {there / 'env.sh'} && cd {there / 'project'} && make gpu-compare ARGS=" in done.stdout
    sourced = ". there/env.sh && cd / && $PYTHON -c 'import tiny; print(tiny.answer)'"
    assert run("sh", "-c", sourced, cwd=tmp_path, python="none").stdout == "42\n"
    assert (there / "models" / "model" / "weights").read_bytes() == (tmp_path / "blob").read_bytes()
    assert (there / "data" / "sst2" / "train.tsv").read_text() == "sentence\tlabel\n"
    assert os.readlink(there / "project" / "linked") == "evaluation"
    assert os.access(there / "project" / "script ä.sh", os.X_OK) and not (there / "project" / "untracked").exists()
    commit = run("git", "rev-parse", "HEAD", cwd=project).stdout.strip()
    assert (there / "project" / "COMMIT").read_text() == commit
    assert (there / "site" / "tiny.py").read_text() == "answer = 42\n"


def test_the_same_content_gives_the_same_bytes(project: Path, tmp_path: Path) -> None:
    assert pack(tmp_path, "one") == 0
    for path in (tmp_path / "data" / "sst2" / "train.tsv", project / "pyproject.toml"):
        os.utime(path, (1, 1))
    assert pack(tmp_path, "two") == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_parts_that_are_missing_or_damaged_are_named_and_nothing_is_unpacked(project: Path, tmp_path: Path) -> None:
    assert pack(tmp_path, "parts") == 0
    folder = tmp_path / "parts"
    first, second = sorted(folder.glob("part-*"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    done = run("sh", "parts/unpack.sh", "there", cwd=tmp_path)
    assert done.returncode == 1
    assert f"missing: {first.name}\ndamaged: {second.name} (7999 bytes)\n" in done.stderr
    assert "copy these parts again" in done.stderr
    assert list((tmp_path / "there").iterdir()) == []


def test_a_list_without_the_last_part_is_noticed(project: Path, tmp_path: Path) -> None:
    assert pack(tmp_path, "parts") == 0
    sums = tmp_path / "parts" / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:-1]))
    done = run("sh", "parts/unpack.sh", "there", cwd=tmp_path)
    assert done.returncode == 1 and "SHA256SUMS does not list all parts" in done.stderr
    sums.unlink()
    done = run("sh", "parts/unpack.sh", "there", cwd=tmp_path)
    assert done.returncode == 1 and "SHA256SUMS is missing" in done.stderr


def test_another_python_than_packed_for_is_refused_before_anything_is_unpacked(project: Path, tmp_path: Path) -> None:
    other = "3.13" if VERSION != "3.13" else "3.12"
    assert pack(tmp_path, "parts", "--python", other) == 0
    done = run("sh", "parts/unpack.sh", "there", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        f"packed for Python {other}, {sys.executable} is {VERSION}: PYTHON=python{other} sh unpack.sh there"
        in done.stderr
    )
    assert f"or pack again with --python {VERSION}" in done.stderr
    done = run("sh", "parts/unpack.sh", "there", cwd=tmp_path, python="no-python")
    assert done.returncode == 1 and f"no-python cannot be run; packed for Python {other}: PYTHON=" in done.stderr
    assert not (tmp_path / "there").exists()


def test_a_second_pack_keeps_the_runs_and_mixes_nothing(project: Path, tmp_path: Path) -> None:
    assert pack(tmp_path, "parts") == 0
    unpack = ("sh", "parts/unpack.sh", "there")
    assert run(*unpack, cwd=tmp_path).returncode == 0
    there = tmp_path / "there"
    for name in ("project/runs/one/runs.jsonl", "project/removed.py", "site/removed.py", "wheels/removed.txt"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("mine")
    done = run(*unpack, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "project/runs is that of the old project" in done.stdout
    assert (there / "project" / "runs" / "one" / "runs.jsonl").read_text() == "mine"
    assert not list(there.glob("[!o]*/removed*")) and len(list(there.glob("old-1/*/removed*"))) == 3
    assert not (there / "kept-runs").exists()

    (there / "project" / "runs").rename(there / "kept-runs")  # as an interrupted call leaves it
    assert run(*unpack, cwd=tmp_path).returncode == 0
    assert (there / "project" / "runs" / "one" / "runs.jsonl").read_text() == "mine"

    (there / "kept-runs").mkdir()
    done = run(*unpack, cwd=tmp_path)
    assert done.returncode == 1 and "move one of them away" in done.stderr
    assert (there / "project" / "runs" / "one" / "runs.jsonl").read_text() == "mine"


MAKE = shutil.which("make")


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["gpu-check", "gpu-compare"])
def test_make_sets_up_nothing_in_an_unpacked_project(tmp_path: Path, target: str) -> None:
    project = tmp_path / "there" / "project"
    accelerator = tmp_path / "site" / "deepspeed" / "accelerator.py"
    accelerator.parent.mkdir(parents=True)
    (accelerator.parent / "__init__.py").write_text("")
    (project / "evaluation").mkdir(parents=True)
    (project / "COMMIT").write_text("0")
    shutil.copy(REPOSITORY / "Makefile", project)

    def made(device: str) -> subprocess.CompletedProcess[str]:
        accelerator.write_text(
            f"class A:\n    def device_name(self):\n        return {device!r}\n\n\nget_accelerator = A\n"
        )
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(["make", target], cwd=project, capture_output=True, text=True, env=environment)

    assert "finds no GPU" in made("cpu").stderr
    assert f"== {target}: {sys.executable} -m evaluation." in made("cuda").stdout
    (accelerator.parent / "__init__.py").write_text("import a_module_that_is_not_there\n")
    done = made("cuda")
    assert f"error: deepspeed cannot be imported by {sys.executable}" in done.stderr
    assert f". '{tmp_path / 'there' / 'env.sh'}'" in done.stderr and "a_module_that_is_not_there" in done.stderr
    assert not (project / ".venv").exists()


def test_all_that_is_missing_is_said_at_once(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "pyproject.toml").write_text("changed")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    given = ["--model", "nowhere", "--data", "nothing", "--wheels", str(tmp_path), "--add", "pyarrow", "--part-mb", "0"]
    given += ["--python", "3.9"]
    assert command.main([str(tmp_path / "full"), *given]) == 2
    said = capsys.readouterr().err
    for expected in (
        "--model: 'nowhere' does not exist",
        "--data: 'nothing' is no folder",
        "--python: got '3.9'; expected one of 3.10, ",
        "has no wheels",
        "--add: got 'pyarrow'; expected NAME==VERSION",
        "--add: with --wheels, nothing is downloaded",
        "--part-mb: got 0",
        "is not an empty folder",
        "1 files in",
    ):
        assert expected in said, f"{expected}\n--- in ---\n{said}"
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["file"]


def test_a_model_of_the_hub_is_to_be_downloaded_first(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / "parts"), "--model", "owner/Model-1", "--data", str(tmp_path / "data")]
    assert command.main(given) == 2
    assert "(hf download owner/Model-1 --local-dir Model-1)" in capsys.readouterr().err


def test_two_models_of_one_name_are_refused(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other" / "model"
    other.mkdir(parents=True)
    assert (
        command.main([str(tmp_path / "parts"), "--model", str(tmp_path / "model"), str(other), "--data", str(other)])
        == 2
    )
    assert "--model: two are named 'model'" in capsys.readouterr().err


def test_parts_end_where_they_are_full(tmp_path: Path) -> None:
    """Also where the content ends exactly at the end of a part: a tar stream is a whole number of 10,240 bytes."""
    sums = write_parts(tmp_path, [Entry("a", b"x" * 100)], 5120)
    assert sorted(sums) == ["part-001-of-002", "part-002-of-002"]
    assert [(tmp_path / name).stat().st_size for name in sorted(sums)] == [5120, 5120]
