"""Write the trained model as a Hugging Face folder, from every ZeRO stage, or an adapter that cannot be merged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from transformers import PreTrainedTokenizerBase

from hift_ds.launch.methods.adapters import merge, save_adapter
from hift_ds.launch.runtime import outputs


def export_model(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    use_cache: bool | None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write weights, persistent buffers, configs and tokenizer to `folder`. Every rank calls it; rank 0 writes.

    The folder appears complete or not at all. ZeRO-3 shards are gathered one tensor at a time into rank 0's host
    memory, so the device holds at most one additional whole tensor. LoRA is merged into the weights below ZeRO 3, where
    each rank has whole weights. Other adapters are written without the model, for
    `hift_ds.launch.methods.adapters.load_adapter`.

    Args:
        use_cache: the `use_cache` of the model's config before training disabled the key-value cache; None: unknown.
        files: other files by name, from `hift_ds.launch.model.loading.processor_files`.

    Raises:
        UserError: the folder cannot be written.
    """
    weights = _gather(engine.module)
    if dist.get_rank() == 0:
        beside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        if use_cache is not None:
            engine.module.config.use_cache = use_cache
        with outputs.writing(folder):
            _write(engine.module, weights, beside)
            tokenizer.save_pretrained(beside)
            for name, content in (files or {}).items():
                if not (beside / name).exists():
                    (beside / name).write_bytes(content)
            if folder.exists():
                os.replace(folder, old)
            os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _write(module: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write model and config, or only the adapter."""
    record = getattr(module, "adapter_record", None)
    partitioned = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    merged = module if record is None else None
    if record is not None and not (partitioned and record["method"] == "lora"):
        merged = merge(module)
    if merged is None:
        save_adapter(module, folder, weights)
    else:
        merged.save_pretrained(folder, state_dict=weights if merged is module else None)


def _gather(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gather the whole state dict in rank 0's host memory, {} on the others; tied names share one tensor."""
    copies: dict[int, torch.Tensor] = {}
    named = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if dist.get_rank() == 0:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                named[name] = copies[id(tensor)]
    return named
