"""A cached model of `launch/quickstart.py`."""

import subprocess
from pathlib import Path

import pytest

from hift_ds.launch import quickstart


def test_a_cached_model_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", None)
    model = tmp_path / "hift_ds" / quickstart.GGUF
    model.parent.mkdir()
    model.touch()
    assert quickstart.cached_model() == model
