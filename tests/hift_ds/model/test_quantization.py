"""Quantized checkpoints are found from their configuration, whoever quantized them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, BitsAndBytesConfig

from hift_ds.model.quantization import quantization_method

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("kind", "keys", "method"),
    [
        ("llama", {}, None),
        ("llama", {"quantization_config": None}, None),
        ("llama", {"quantization_config": GPTQ}, "gptq"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ("llama", {"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ("llama", {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "bitsandbytes"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ("llama", {"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "a method without a name"),  # MLX
        ("gemma3", {"text_config": {"quantization_config": GPTQ}}, "gptq"),
        ("ibert", {"quant_mode": False}, None),  # quantizes itself in training
    ],
)
def test_the_method(kind: str, keys: dict[str, Any], method: str | None) -> None:
    assert quantization_method(AutoConfig.for_model(kind, **keys)) == method
