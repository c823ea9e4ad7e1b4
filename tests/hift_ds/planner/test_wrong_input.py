"""Arguments and configurations with values of wrong kinds: one line for each problem, exit code 2, no traceback."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hift_ds.planner.command import main

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: list[dict[str, Any]] = [
    LLAMA,
    {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    {
        "model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 8},
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    },
]  # fmt: skip
OTHER_KEYS = (
    "rope_parameters architectures layer_types head_dim hidden_act quantization_config dtype tie_word_embeddings "
    "pad_token_id sliding_window num_labels id2label is_encoder_decoder auto_map rms_norm_eps attn_implementation"
).split()
VALUES: list[Any] = [
    None, 0, -1, 1.5, "64", "", [], {}, True, 10**30, float("nan"), float("inf"), [None], {"a": 1}, 7, "auto",
]  # fmt: skip
OPTIONS = (
    "method precision optimizer batch-size seq-len layers-per-block max-block-numel zero-stage ranks offload-device "
    "offload-step buffer-size nvme-path offload-optimizer gradient-accumulation-steps loss-chunk layout accelerator "
    "attention task lora-rank gpu-memory reserve write-config plot model"
).split()
ARGUMENTS = [
    "0", "-1", "1e3", "1" + "0" * 30, "nan", "inf", "", "none", "true", "1.5", "24 GB", "24gb", " ", "--x", "\0", "ü",
    "[]", "9" * 400, "1e400GiB", "4294967296",
]  # fmt: skip


def check(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> int:
    code = main(arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("planning ", "sim", "sea"))]
    assert code in (0, 1, 2) and [file.name for file in folder.iterdir()] == ["config.json"]
    assert (code == 2) == bool(errors) and all(line.startswith("error: ") for line in errors), errors
    return code


@pytest.mark.parametrize(
    "seeds", [range(25), pytest.param(range(25, 3000), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_wrong_arguments(seeds: range, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for seed in seeds:
        rng = random.Random(seed)
        wrong = [part for name in rng.sample(OPTIONS, 3) for part in (f"--{name}", rng.choice(ARGUMENTS))]
        print(seed, wrong)
        check(["--model", str(tmp_path), "--seq-len", "8", *wrong], tmp_path, capsys)


@pytest.mark.parametrize(
    "seeds", [range(12), pytest.param(range(12, 1000), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_wrong_configurations(seeds: range, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        config = json.loads(json.dumps(rng.choice(MODELS)))
        part = rng.choice([config, *(value for value in config.values() if isinstance(value, dict))])
        part[rng.choice([*part, *OTHER_KEYS])] = rng.choice(VALUES)
        print(seed, config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        check(["--model", str(tmp_path), "--seq-len", "8"], tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list; expected a JSON object"),
        ("{}", "has no model_type"),
        (json.dumps(LLAMA | {"model_type": "lama"}), "lama"),
        (json.dumps(LLAMA | {"hidden_size": "64"}), "hidden_size"),
        (json.dumps(LLAMA | {"num_hidden_layers": 0}), "no hidden layers"),
        (json.dumps(LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 3}), "multiple"),
        (None, "the folder has no config.json"),
    ],
)
def test_a_folder_that_is_no_model(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["--model", str(tmp_path), "--seq-len", "8"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("planning ")]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "0"], "--seq-len=0: expected an integer of at least 1"),
        (["--seq-len", "-1"], "--seq-len=-1: expected an integer of at least 1"),
        (["--seq-len", "1" + "0" * 30], "expected at most 2,147,483,647"),
        (["--ranks", "1000000"], "expected at most 65,536"),
        (["--gpu-memory", "NaN"], "expected a size like 24GiB"),
        (["--gpu-memory", "0"], "expected a size like 24GiB"),
        (["--gpu-memory", "24 GB"], "expected a size like 24GiB, above 0 (a card sold as 24 GB has 24 GiB)"),
        (["--gpu-memory", "24gb"], "expected a size like 24GiB, above 0 (a card sold as 24 GB has 24 GiB)"),
        (["--gpu-memory", "9" * 400], "expected a size like 24GiB"),
    ],
)
def test_sizes_out_of_range(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "gpt2", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
