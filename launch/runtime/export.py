"""Write the trained model as a Hugging Face folder, from every ZeRO stage; an adapter alone where it cannot be one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from transformers import PreTrainedTokenizerBase

from hift_ds.launch.methods.adapters import merge, save_adapter
from hift_ds.launch.runtime import outputs


def export_model(engine: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, use_cache: bool | None) -> None:
    """Write weights, persistent buffers, configs and tokenizer to `folder`. Every rank calls it; rank 0 writes.

    ZeRO-3 shards are gathered one tensor at a time into rank 0's host memory, so the device never holds more than
    one whole tensor above what it holds anyway. The folder appears complete or not at all. LoRA is merged into the
    weights (with whole weights on each rank, that is below ZeRO 3); what cannot be merged is written alone, for
    `hift_ds.launch.methods.adapters.load_adapter`.

    Args:
        use_cache: what the model's config said before training turned the key-value cache off.
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
            if folder.exists():
                os.replace(folder, old)
            os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _write(module: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Model and config, or the adapter alone."""
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
    """The whole state dict on rank 0's host, {} on the others; tied names share one tensor."""
    copies: dict[int, torch.Tensor] = {}
    named = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if dist.get_rank() == 0:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                named[name] = copies[id(tensor)]
    return named
