"""Models of several towers through `launch/train.py` with text: refused before anything is written, or left alone."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_on_ranks
from tests.support.towers import GEMMA3, save_gemma3_processor, save_model
from tests.support.training import SHORT, arguments, run_tiny, train_and_compare


def model_at(folder: Path) -> list[str]:
    return ["model.config=null", f"model.name_or_path={folder}", "training.weight_decay=0.5"]


def assert_only_text_changed(before: dict[str, torch.Tensor], out: Path) -> None:
    after = load_file(out / "model" / "model.safetensors")
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert same and same == {name for name in before if "vision_tower" in name or "projector" in name}


def test_a_vision_tower_is_refused_before_anything_is_written_and_the_remedy_trains_the_rest(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    before = save_model(tmp_path / "gemma3", "gemma3", GEMMA3)
    save_gemma3_processor(tmp_path / "gemma3")
    options = [*SHORT, *model_at(tmp_path / "gemma3"), "model.tokenizer=null", "training.max_steps=4"]
    refused = run_tiny(1, tmp_path / "out", *options)
    assert refused["code"] == 2 and not (tmp_path / "out").exists()
    assert "Traceback" not in refused["printed"]
    (remedy,) = re.findall(r'--set "(.*?)"', refused["printed"])
    trained = run_tiny(1, tmp_path / "out", *options, remedy)
    assert trained["code"] == 0 and "processor_config.json" in trained["printed"]
    assert_only_text_changed(before, tmp_path / "out")
    read = [AutoProcessor.from_pretrained(tmp_path / folder) for folder in ("gemma3", "out/model")]
    image = Image.linear_gradient("L").convert("RGB")
    original, exported = (one(text="<|system|> a", images=image, return_tensors="pt") for one in read)
    assert original.keys() == exported.keys() and "pixel_values" in exported
    assert all(torch.equal(original[key], exported[key]) for key in original)


@pytest.mark.parametrize("method", ["mezo", pytest.param("full", marks=pytest.mark.slow)])
def test_methods_without_blocks_do_not_change_it(method: str, tmp_path: Path) -> None:
    before = save_model(tmp_path / "gemma3", "gemma3", GEMMA3)
    result = run_tiny(1, tmp_path / "out", *SHORT, *model_at(tmp_path / "gemma3"), f"method.name={method}")
    assert result["code"] == 0 and "model.vision_tower.*" in result["printed"]
    assert_only_text_changed(before, tmp_path / "out")


def run_without_check(argv: list[str]) -> dict[str, Any]:
    """As if neither the skeleton nor the loaded model could tell what the loss depends on."""
    from hift_ds.launch import run

    with (
        mock.patch.object(run, "unreached_by_text", lambda *_: None),
        mock.patch.object(run, "unreached_by_example", lambda *_: []),
    ):
        return train_and_compare(argv)


def test_a_step_without_gradients_is_an_error_without_traceback(tmp_path: Path) -> None:
    save_model(tmp_path / "gemma3", "gemma3", GEMMA3)
    options = [*SHORT, *model_at(tmp_path / "gemma3"), "training.max_steps=4"]
    (result,) = run_on_ranks(1, run_without_check, arguments(tmp_path / "out", *options))
    assert result["code"] == 2 and "model.vision_tower.encoder.layers.0.*" in result["printed"]
