"""Folders that are no model are refused before anything is loaded, with what to name instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from hift_ds.launch.model.settings import ModelSettings


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["run.json", "model/config.json"], "Name {}/model."),  # the output folder of a run
        (["refs/main", "snapshots/4f1d/config.json"], "Name {}/snapshots/4f1d."),  # the Hub's cache
        (["README.md", "tiny.gguf"], "Name {}/tiny.gguf."),
        (["latest", "zero_to_fp32.py"], "It is a checkpoint of DeepSpeed. Convert it with its zero_to_fp32.py"),
        (["adapter_config.json"], "peft.AutoPeftModelForCausalLM.from_pretrained('{}').merge_and_unload()"),
        (["adapter_config.json", "config.json"], "holds a PEFT adapter"),
        (["README.md"], "Expected a Hugging Face model folder."),
        (["config.json"], None),
    ],
)
def test_what_a_folder_is_instead(files: list[str], expected: str | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    problems = ModelSettings(name_or_path=str(tmp_path)).problems()
    if expected is None:
        assert problems == []
    else:
        assert len(problems) == 1 and expected.format(tmp_path) in problems[0], problems
