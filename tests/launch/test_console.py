"""Console commands without the libraries of the extra `train`."""

from __future__ import annotations

import importlib.metadata

import pytest

from hift_ds.evaluation.console import compare
from hift_ds.launch.console import train


@pytest.mark.parametrize(("command", "name"), [(train, "hift-train"), (compare, "hift-compare")])
def test_missing_libraries_are_named_before_anything_is_imported(
    command: object, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version

    def without_two(distribution: str) -> str:
        if distribution in ("peft", "scikit-learn"):
            raise importlib.metadata.PackageNotFoundError(distribution)
        return version(distribution)

    monkeypatch.setattr(importlib.metadata, "version", without_two)
    with pytest.raises(SystemExit) as end:
        command()  # type: ignore[operator]
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {name} needs peft, scikit-learn, of the extra 'train': pip install 'hift_ds[train]'\n"
    )
