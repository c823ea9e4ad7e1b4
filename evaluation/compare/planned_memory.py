"""Ask the planner for the memory of a training, to compare with the measured peak."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator

import hift_ds
from hift_ds.launch.config.settings import Settings
from hift_ds.planner.plan import Planner
from hift_ds.planner.request import Request

METHODS = ("hift", "full", "lora", "mezo")  # the methods that the planner knows
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "adafactor": "adafactor", "adagrad": "adagrad", "lion": "lion"}


def planned_memory(settings: Settings, config: Any, length: int, ranks: int) -> dict[str, int] | None:
    """Return the planned bytes on a rank's device at the peak, by category; None if the planner cannot plan the run.

    The arguments are those of :func:`request_of`.
    """
    request = request_of(settings, config, length, ranks)
    try:
        return None if request is None else dict(Planner(request).plan(request).as_dict()["device"])
    except hift_ds.ConfigError:
        return None


def request_of(settings: Settings, config: Any, length: int, ranks: int) -> Request | None:
    """Return what to ask the planner for a run, or None if it knows no such method, optimizer or frozen parameters.

    Args:
        settings: of the run.
        config: the model's transformers config, or the name of a preset.
        length: tokens of each sequence.
        ranks: number of ranks.
    """
    method, hift = settings.method.name, hift_ds.HiFTConfig.from_dict(settings.deepspeed["hift"])
    optimizer = "adamw" if method == "mezo" else _optimizer(settings)
    if method not in METHODS or optimizer is None or method == "hift" and hift.freeze:
        return None
    options: dict[str, Any] = {}
    if method == "hift":
        options = {name: getattr(hift, name) for name in ("layers_per_block", "max_block_numel", "balance")}
        options |= {f"offload_{name}": getattr(hift.offload, name) for name in ("device", "step")}
        options |= {name: getattr(hift.offload, name) for name in ("buffer_size", "weights", "master", "moments")}
        if not isinstance(hift.offload.prefetch, bool):
            options["prefetch"] = hift.offload.prefetch
    elif method == "lora":
        options["lora_rank"] = settings.method.lora_rank
    if method != "mezo":
        options["zero_stage"] = settings.zero_stage
        for name in ("offload_optimizer", "offload_param") if method == "hift" else ("offload_optimizer",):
            section = settings.deepspeed.get("zero_optimization", {}).get(name) or {}
            options[name] = section.get("device", "none")
    precision = "mixed-hi" if method in ("hift", "mezo") else "mixed"
    checkpointing, attention = settings.model.gradient_checkpointing, settings.model.attention
    return Request(
        config,
        method=method,
        precision="fp32" if settings.dtype == "float32" else precision,
        optimizer=optimizer,
        batch_size=settings.micro_batch_size,
        seq_len=length,
        ranks=ranks,
        activation_checkpointing=bool(checkpointing),
        checkpoint_offload=checkpointing == "cpu",
        gradient_accumulation_steps=settings.accumulation,
        loss_chunk=settings.training.loss_chunk,
        accelerator="cpu" if get_accelerator().device_name() == "cpu" else "gpu",
        attention="eager" if attention == "eager" else None,  # all others keep no scores
        task=settings.model.task,
        **options,
    )


def _optimizer(settings: Settings) -> str | None:
    """Return the planner's name of the optimizer, or None if it has none."""
    section = settings.deepspeed["optimizer"]
    kind = section["type"].lower()
    if kind == "sgd":
        return "sgdm" if section.get("params", {}).get("momentum") else "sgd"
    return OPTIMIZERS.get(kind)
