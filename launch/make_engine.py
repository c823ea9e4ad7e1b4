"""The engine of a training method, and its learning-rate schedule."""

from __future__ import annotations

import copy
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

import hift_ds
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.adapters import ADAPTERS
from hift_ds.launch.methods.lr_schedules import schedule_factor
from hift_ds.launch.methods.package_engines import make_plain_engine
from hift_ds.launch.methods.table import METHODS
from hift_ds.launch.model import loading
from hift_ds.optim.properties import has_fused


def schedule_ticks(settings: Settings, config: Any) -> int:
    """Return how often the learning-rate schedule advances in the run. The blocks are found on a meta-device model.

    Raises:
        UserError: the model cannot be cut into blocks as asked.
    """
    method = METHODS[settings.method.name]
    if not method.block_wise:
        return method.schedule_ticks(settings.training.max_steps, 1, 1)
    hift = hift_ds.HiFTConfig.from_dict(settings.deepspeed["hift"])
    skeleton = loading.skeleton(settings.model, config)
    try:
        blocks = hift_ds.partition_model(
            skeleton, hift.layers_per_block, hift.freeze, hift.max_block_numel, hift.balance
        )
    except ValueError as error:
        raise UserError(f"deepspeed.hift: {error}") from None
    return method.schedule_ticks(settings.training.max_steps, len(blocks), hift.steps_per_block)


def make_engine(model: Any, settings: Settings, ticks: int) -> Any:
    """Make the engine of the method, with `training.lr_schedule` unless the deepspeed section has a scheduler.

    Raises:
        NotApplicable: the method does not fit the model.
        UserError: the engine refuses the settings.
    """
    training, method = settings.training, METHODS[settings.method.name]

    def factor(tick: int) -> float:
        return schedule_factor(training.lr_schedule, training.warmup_ratio, ticks, tick)

    if method.adapter:
        model = ADAPTERS[method.adapter](model, settings.method)
    if not method.uses_deepspeed:
        return make_plain_engine(model, settings, factor)
    config = copy.deepcopy(settings.deepspeed)
    has_scheduler = config.get("scheduler")
    offloaded = config.get("zero_optimization", {}).get("offload_optimizer")
    if config["optimizer"]["type"].lower() in ("adam", "adamw") and not offloaded:
        if not has_fused("FusedAdamBuilder"):  # torch's step, as HiFT takes then: methods compare like with like
            config["optimizer"]["params"].setdefault("torch_adam", True)
    try:
        engine, *_ = hift_ds.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=config,
            lr_scheduler=None if has_scheduler else lambda optimizer: LambdaLR(optimizer, factor),
        )
    except ValueError as error:
        raise UserError(f"deepspeed: {error}") from error
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # `SkippedSteps` stops the run, with a better message
    return engine


def cycle_steps(engine: Any, settings: Settings) -> int:
    """Return the number of steps in a cycle over all blocks; 0 if the method has no blocks."""
    return len(getattr(engine, "blocks", ())) * settings.deepspeed["hift"].get("steps_per_block", 1)


def block_names(engine: Any) -> list[str]:
    """Return the names of the engine's blocks; one name, "all", if the method has no blocks."""
    return [block.name for block in engine.blocks] if hasattr(engine, "blocks") else ["all"]
