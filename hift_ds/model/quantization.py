"""Whether a checkpoint holds quantized weights, from its configuration and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# transformers, earlier versions of compressed-tensors, and MLX.
_KEYS = ("quantization_config", "compression_config", "quantization")
# Names of the packed weights and their scales. Scales of a key-value cache (k_scale) are not among them.
_SCALES = re.compile(r"[._](?:weight_scale(?:_inv)?|weight_packed|SCB|absmax|quant_map|qweight|qzeros|scales|blocks)\Z")
_REMEDY = (
    ", and quantized weights cannot be trained. Name the checkpoint that it was made from, with weights in bf16, fp16 "
    "or fp32, or a .gguf file, which is dequantized."
)


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
    return None if method is None else f"the weights of {name!r} are quantized ({method}){_REMEDY}"


def leftover_problem(tensors: Iterable[str]) -> str | None:
    """Return why the tensors of a file, by name, cannot be a model's weights although no configuration says so.

    A configuration that has lost its section about quantization would have rounded numbers read as weights.
    """
    found = next((name for name in sorted(tensors) if _SCALES.search(name)), None)
    return None if found is None else f"The weights are quantized, as {found} shows{_REMEDY}"
