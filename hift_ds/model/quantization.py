"""Whether a checkpoint holds quantized weights, from its configuration."""

from __future__ import annotations

from typing import Any

# transformers, earlier versions of compressed-tensors, and MLX.
_KEYS = ("quantization_config", "compression_config", "quantization")


def quantization_method(config: Any) -> str | None:
    """Return the name of the method that quantized a model's weights, such as "gptq"; None for plain weights.

    Args:
        config: a transformers configuration. In a model of several towers, each tower is looked at.
    """
    for key in _KEYS:
        section = getattr(config, key, None)
        if section is None:
            continue
        if not isinstance(section, dict):
            section = section.to_dict()
        if method := section.get("quant_method"):
            return str(getattr(method, "value", method))
        return "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & section.keys() else "a method without a name"
    for tower in getattr(config, "sub_configs", ()):
        if (part := getattr(config, tower, None)) is not None and (method := quantization_method(part)):
            return str(method)
    return None


def quantization_problem(name: str, config: Any) -> str | None:
    """Return why a model cannot be trained because its weights are quantized; None for plain weights."""
    method = quantization_method(config)
    if method is None:
        return None
    return (
        f"the weights of {name!r} are quantized ({method}), and quantized weights cannot be trained. Name the "
        "checkpoint that it was made from, with weights in bf16, fp16 or fp32, or a .gguf file, which is dequantized."
    )
