"""The files of a model's processor: from a folder or the Hub's cache, with their code, and nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hift_ds.launch.model.loading import processor_files
from hift_ds.launch.model.settings import ModelSettings

IMAGES = {"image_processor_type": "CLIPImageProcessor"}
COMMIT = "a" * 40
NO_CONFIG: Any = SimpleNamespace()


def write(folder: Path, **files: Any) -> Path:
    """Files by their stems: .json for a dictionary, .py for a text."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        if isinstance(content, str):
            (folder / f"{stem}.py").write_text(content)
        else:
            (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def test_of_a_folder(tmp_path: Path) -> None:
    folder = write(
        tmp_path, config={}, tokenizer_config={}, preprocessor_config=IMAGES, video_preprocessor_config={},
        chat_template={"chat_template": "x"}, other={},
    )  # fmt: skip
    files = processor_files(ModelSettings(name_or_path=str(folder)), NO_CONFIG)
    assert set(files) == {"preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"}
    assert json.loads(files["preprocessor_config.json"]) == IMAGES


def test_code_of_a_processor_comes_with_what_it_imports(tmp_path: Path) -> None:
    code = {"AutoProcessor": "reading.Reader", "AutoImageProcessor": "owner/name--images.Images", "AutoTokenizer": []}
    folder = write(tmp_path, processor_config={"auto_map": code}, reading="from .cells import cell\n",
                   cells="cell = 1\n", modeling="")  # fmt: skip
    files = processor_files(ModelSettings(name_or_path=str(folder)), NO_CONFIG)
    assert set(files) == {"processor_config.json", "reading.py", "cells.py"}


@pytest.mark.parametrize("content", ["", "[]", '{"auto_map": null}'])
def test_a_file_that_is_no_configuration_is_kept_as_it_is(content: str, tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(content)
    files = processor_files(ModelSettings(name_or_path=str(tmp_path)), NO_CONFIG)
    assert files == {"processor_config.json": content.encode()}


def test_of_the_commit_that_the_configuration_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshots = tmp_path / "models--owner--name" / "snapshots"
    write(snapshots / COMMIT, config={}, preprocessor_config=IMAGES)
    write(snapshots / ("b" * 40), config={}, preprocessor_config={"newer": True})
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings, config = ModelSettings(name_or_path="owner/name"), SimpleNamespace(_commit_hash=COMMIT)
    assert list(processor_files(settings, config)) == ["preprocessor_config.json"]  # type: ignore[arg-type]
    assert json.loads(processor_files(settings, config)["preprocessor_config.json"]) == IMAGES  # type: ignore[arg-type]


def test_a_model_from_scratch_has_none() -> None:
    assert processor_files(ModelSettings(config={"model_type": "llama"}), NO_CONFIG) == {}
