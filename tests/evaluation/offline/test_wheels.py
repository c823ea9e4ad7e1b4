"""Which wheels travel, and how pip is asked for them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from hift_ds.evaluation.offline.wheels import carried, commands, download
from hift_ds.launch.errors import UserError
from tests.support.paths import REPOSITORY


def test_what_is_carried_has_the_pinned_versions() -> None:
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert set(carried()) <= set(pinned) and carried()


def test_wheels_are_downloaded_but_for_what_is_published_as_source() -> None:
    download, build = commands(Path("wheels"), "3.12", [*carried(), "pyarrow==26.0.1"])
    named = {package for package in [*download, *build] if "==" in package}
    assert named == {*carried(), "pyarrow==26.0.1"}
    assert [package.split("==")[0] for package in build if "==" in package] == ["deepspeed"]
    assert download[download.index("--python-version") + 1] == "3.12"


def test_the_remedy_names_what_was_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="give another version in --add, another --python, or a folder"):
        download(tmp_path, "3.12", [*carried(), "xxhash==99.0"])
    with pytest.raises(UserError, match="give another --python, or a folder"):
        download(tmp_path, "3.12", carried())
