"""What a machine lacks is said at once, with what needs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pip
import pytest

from hift_ds.evaluation.offline import ready
from tests.support.paths import REPOSITORY

PYPROJECT = """
dependencies = [
    "numpy>=2",
    "nobody-s-package>=3,<4",  # a comment with "quotes"
]

[project.optional-dependencies]
# The rest.
train = [
    "packaging<20",
    "wandb>=0.31",
]
peers = [
    "lomo-optim>=0.1.1",
]
"""


def test_the_requirements_of_the_project_are_found() -> None:
    found = ready.requirements((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    names = {ready.Requirement(text).name for text in found}
    assert {"torch", "deepspeed", "transformers", "datasets", "pyarrow", "peft", "gguf", "scikit-learn"} <= names
    assert "pytest" not in names and "wandb" not in names


def folder(tmp_path: Path, text: str) -> Path:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pyproject.toml").write_text(text)
    (tmp_path / "models" / "small").mkdir(parents=True)
    metadata = tmp_path / "site" / "carried-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    needs = ["numpy>=2", "its-need", "not-here; python_version < '3'", "tested-with; extra == 'dev'"]
    lines = ["Metadata-Version: 2.1", "Name: carried", "Version: 1.0", *(f"Requires-Dist: {one}" for one in needs)]
    metadata.write_text("\n".join(lines) + "\n")
    return tmp_path


def test_what_is_missing_or_too_new_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ready.main(folder(tmp_path, PYPROJECT)) == 1
    said = capsys.readouterr().err
    assert "nobody-s-package is not installed; hift_ds needs nobody-s-package<4,>=3\n" in said
    assert "its-need is not installed; carried needs its-need\n" in said
    assert "; hift_ds needs packaging<20\n" in said and "packaging is " in said
    assert "--add NAME==VERSION" in said
    assert not any(name in said for name in ("numpy", "wandb", "lomo", "not-here", "tested-with"))


def test_a_machine_with_all_of_it_is_told_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = folder(tmp_path, PYPROJECT.replace('"nobody', '# "nobody').replace("<20", ">=20"))
    needs = place / "site" / "its_need-2.dist-info" / "METADATA"
    needs.parent.mkdir()
    needs.write_text("Metadata-Version: 2.1\nName: its-need\nVersion: 2\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place / "site"))  # as unpack.sh does
        assert ready.main(place) == 0
    said = capsys.readouterr().out
    sourced, _, rest = said.splitlines()[-1].partition(" make ")
    assert sourced == f". {place / 'env.sh'} && cd {place / 'project'} &&"
    target, arguments = shlex.split(rest)
    assert target == "gpu-compare" and arguments.startswith("ARGS=--set model.name_or_path=")
    assert shlex.split(arguments)[1:4] == [
        f"model.name_or_path={place / 'models' / 'small'}",
        "--set",
        f"data.path={place / 'data'}",
    ]

    (place / "models" / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place / "site"))
        assert ready.main(place) == 0
    said = capsys.readouterr().out
    assert "model.name_or_path=MODEL" in said and str(place / "models" / "other") in said


def test_a_machine_without_packaging_is_told_all_that_it_lacks(tmp_path: Path) -> None:
    """Only pip is there."""
    place = folder(tmp_path, PYPROJECT)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "pip").symlink_to(Path(pip.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-S", ready.__file__, str(place)],
        env={"PYTHONPATH": str(tmp_path / "only")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    for expected in (
        "packaging is not installed; hift_ds needs packaging<20\n",
        "numpy is not",
        "nobody-s-package is not",
    ):
        assert expected in done.stderr
