"""Write the trained model as a Hugging Face folder, from every ZeRO stage, or an adapter that cannot be merged."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hift_ds.blocks.block import numel_of
from hift_ds.launch.config.settings import MAX_SHARD_SIZE
from hift_ds.launch.methods.adapters import merge, save_adapter
from hift_ds.launch.runtime import logs, outputs
from hift_ds.state.allocator import scratch


def export_model(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    use_cache: bool | None,
    files: Mapping[str, bytes] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write weights, persistent buffers, configs and tokenizer to `folder`. Every rank calls it; rank 0 writes.

    The folder appears complete or not at all. Weights that are not in host memory, or only in parts, come one tensor at
    a time over the device into unnamed files beside the folder, from which transformers writes them. So the device
    holds at most one additional whole tensor, and no anonymous memory holds the model a second time. LoRA is merged
    into the weights below ZeRO 3, where each rank has whole weights. Other adapters are written without the model, for
    `hift_ds.launch.methods.adapters.load_adapter`.

    Args:
        use_cache: the `use_cache` of the model's config before training disabled the key-value cache; None: unknown.
        files: other files by name, from `hift_ds.launch.model.loading.processor_files`.
        max_shard_size: of a file of weights, in bytes or as transformers writes it ("5GB"). A larger tensor has a file
            of its own.

    Raises:
        UserError: the folder cannot be written.
    """
    weights = _gather(engine.module, folder.parent)
    if dist.get_rank() == 0:
        beside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        if use_cache is not None:
            engine.module.config.use_cache = use_cache
        with outputs.writing(folder):
            _write(engine.module, weights, beside, max_shard_size)
            tokenizer.save_pretrained(beside)
            for name, content in (files or {}).items():
                if not (beside / name).exists():
                    (beside / name).write_bytes(content)
            _allow_as_usual(beside)
            if folder.exists():
                os.replace(folder, old)
            os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _write(module: Any, weights: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Write model and config, or only the adapter."""
    record = getattr(module, "adapter_record", None)
    partitioned = any(hasattr(parameter, "ds_id") for parameter in module.parameters())
    merged = module if record is None else None
    if record is not None and not (partitioned and record["method"] == "lora"):
        merged = merge(module)
    if merged is None:
        save_adapter(module, folder, weights)
        return
    numel = sum(map(numel_of, merged.parameters()))
    merged.save_pretrained(folder, state_dict=weights if merged is module else None, max_shard_size=max_shard_size)
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_parameters"] = numel  # transformers counts no partitioned parameters
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _allow_as_usual(folder: Path) -> None:
    """Let others read the files as the user's umask says: safetensors lets only the user read those that it writes."""
    usual = folder / ".new"
    usual.touch()
    mode = stat.S_IMODE(usual.stat().st_mode)
    usual.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def _gather(module: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole state dict in host memory or in unnamed files in `folder`, {} on ranks other than 0.

    Tied names share one tensor.
    """
    copy = _Copies(folder)
    whole: dict[int, torch.Tensor] = {}
    named = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        is_partitioned = hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor], enabled=is_partitioned):
            if dist.get_rank() == 0:
                if id(tensor) not in whole:
                    stays = tensor.device.type == "cpu" and not is_partitioned
                    whole[id(tensor)] = tensor.detach() if stays else copy.of(tensor.detach())
                named[name] = whole[id(tensor)]
    return named


class _Copies:
    """Copies of tensors in unnamed files in a folder; in memory if that is full, because other ranks wait for them."""

    def __init__(self, folder: Path):
        self._folder: Path | None = folder

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor."""
        if self._folder is not None:
            try:
                return scratch(tensor.shape, tensor.dtype, str(self._folder)).copy_(tensor)
            except OSError as error:
                logs.say(
                    0,
                    f"warning: the weights are gathered in memory for the export, and not in files in {self._folder}: "
                    f"{error.strerror}",
                )
                self._folder = None
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
