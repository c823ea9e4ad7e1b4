"""The benchmark of saving writes the same files in each way, in turns. How fast they are, no test asserts."""

from pathlib import Path
from typing import Any

import pytest

from hift_ds.evaluation.cost import saving
from hift_ds.evaluation.cost.timed_methods import Setup


def test_each_way_writes_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[dict[str, bytes]]] = {}

    def timed(run: Any, folder: Path) -> float:
        folder.mkdir(parents=True)
        run(folder)
        inside = folder / saving.TAG if folder.name == "save" else folder
        files = {path.name: path.read_bytes() for path in inside.iterdir() if path.name != "manifest.json"}
        written.setdefault(folder.name, []).append(files)
        folder.rename(folder.with_name(f"{folder.name}{len(written[folder.name])}"))
        return float(len(written[folder.name]))

    monkeypatch.setattr(saving, "timed", timed)
    saving.join()
    found = saving.time_saves(Setup("tiny", "bf16", 2, 1, 8), 2, tmp_path)
    assert list(written) == ["save", "torch", "plain"]
    (of_save, *_), (of_torch, *_), (of_plain, *_) = written.values()
    assert sorted(of_plain) == sorted(of_torch) == sorted(of_save) and len(of_save) >= 3
    for name, content in of_save.items():
        assert len(of_plain[name]) == len(content)
        assert len(of_torch[name]) == pytest.approx(len(content), rel=0.05, abs=4096)
    assert found.seconds == {way: [2.0, 3.0] for way in saving.WAYS}, "the first turn is a warm-up"
    assert 0 <= found.nbytes - sum(map(len, of_save.values())) < 20_000, "and the manifest"
    assert not list(tmp_path.iterdir())
    assert "| 1.00 (1.00 to 1.00) |" in saving.table([found])
