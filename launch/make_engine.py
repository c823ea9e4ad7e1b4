"""The engine of a training method, and its learning-rate schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed import comm as dist
from torch.optim.lr_scheduler import LambdaLR

import hift_ds
from hift_ds.blocks.block import numel_of
from hift_ds.config import AS_ALLOWED, with_deferred_step
from hift_ds.launch.config.deepspeed_trial import plain_optimizer
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.cuts import cut_of
from hift_ds.launch.errors import NotApplicable, UserError
from hift_ds.launch.methods.adapters import ADAPTERS
from hift_ds.launch.methods.package_engines import make_plain_engine
from hift_ds.launch.methods.table import METHODS
from hift_ds.optim.properties import has_fused
from hift_ds.state.placement import StateSpec, host_needs
from hift_ds.state.placement import page_locking_problem as locking_problem
from hift_ds.state.trial import examine


def find_blocks(settings: Settings, model: Any) -> list[hift_ds.Block]:
    """Return the blocks that HiFT cuts the model into; [] if the method has no blocks.

    Args:
        model: the model, or its skeleton on the meta device.

    Raises:
        UserError: the model cannot be cut into blocks as asked.
    """
    if not METHODS[settings.method.name].block_wise:
        return []
    hift = hift_ds.HiFTConfig.from_dict(settings.deepspeed["hift"])
    try:
        return hift_ds.partition_model(model, hift.layers_per_block, hift.freeze, hift.max_block_numel, hift.balance)
    except ValueError as error:
        raise UserError(f"deepspeed.hift: {error}") from None


def schedule_ticks(settings: Settings, blocks: Sequence[hift_ds.Block]) -> int:
    """Return how often the learning-rate schedule advances in the run.

    Block-wise training advances it once a cycle, so that all blocks of a cycle share one rate (HiFT paper, delayed
    update in Algorithm 1), unless the schedule counts steps. An incomplete last cycle counts, too.
    """
    return math.ceil(settings.training.max_steps / cut_of(settings, len(blocks)).steps_per_tick)


def page_locking_problem(settings: Settings, blocks: Sequence[hift_ds.Block], model: Any) -> str | None:
    """Return what the system does not let HiFT page-lock, with what that costs and the remedy. All ranks call it.

    Args:
        blocks: from `find_blocks`.
        model: the model, or its skeleton on the meta device.

    Raises:
        UserError: the settings demand it, or do not fit the optimizer.
    """
    hift = hift_ds.HiFTConfig.from_dict(settings.deepspeed["hift"])
    zero = settings.deepspeed.get("zero_optimization", {})
    section, waiting = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    on_host = SimpleNamespace(**{"pin_memory": False, **section}) if section.get("device", "none") != "none" else None
    if not blocks or hift.offload.device == "none" and on_host is None:
        return None
    if (optimizer := plain_optimizer(settings.deepspeed["optimizer"])) is None:
        return None  # the engine finds out
    dtype, ranks = getattr(torch, settings.dtype), dist.get_world_size()
    named = dict(model.named_parameters())
    of_weights = ranks if waiting.get("device") == "cpu" and waiting.get("pin_memory") else 0
    of_weights = 1 if hift.offload.weights == "cpu" and hift.offload.pins else of_weights
    weights = sum(-(-numel_of(p) // of_weights) * dtype.itemsize for p in named.values()) if of_weights else 0
    try:
        spec = StateSpec(
            hift.offload,
            blocks,
            [[named[name] for name in block.parameter_names] for block in blocks],
            type(optimizer),
            examine(optimizer),
            on_host,
            dtypes=(dtype, dtype),
            ranks=ranks if settings.zero_stage else 1,
            has_masters=settings.zero_stage > 0 or settings.dtype == "bfloat16",
        )
        return locking_problem(spec, host_needs(spec), weights)
    except ValueError as error:
        raise UserError(f"deepspeed: {error}") from None


def check_reach(settings: Settings, blocks: Sequence[hift_ds.Block], model: Any, unreached: Sequence[str]) -> str:
    """Check that the loss depends on a parameter of each block.

    Args:
        blocks: from `find_blocks`.
        model: the model or its skeleton.
        unreached: names of the parameters that the loss does not depend on.

    Returns:
        A note about parameters that are not trained, or "".

    Raises:
        UserError: the loss does not depend on some block; the message has the value of `hift.freeze`.
    """
    method = METHODS[settings.method.name]
    sizes = {name: numel_of(parameter) for name, parameter in model.named_parameters()}
    trained = [name for block in blocks for name in block.parameter_names] if method.block_wise else list(sizes)
    missed = [name for name in trained if name in set(unreached)]
    if not missed or method.adapter:
        return ""
    share = sum(sizes[name] for name in missed) / sum(sizes.values())
    patterns = hift_ds.freeze_patterns(missed, trained)
    what = (
        f"the loss does not depend on {len(missed)} of the {len(sizes)} parameters of the model ({100 * share:.1f} % "
        f"of its weights): {', '.join(patterns)}"
    )
    if not method.block_wise:
        return f"note: {what}. They stay as they are."
    freeze = [*settings.deepspeed["hift"].get("freeze", ()), *patterns]
    remedy = f'--set "deepspeed.hift.freeze={freeze}"'
    empty = [block.name for block in blocks if set(block.parameter_names) <= set(missed)]
    if not empty:
        return (
            f"note: {what}. They take memory for optimizer state, and weight decay may change them. To leave them out: "
            f"{remedy}"
        )
    raise UserError(
        f"deepspeed.hift.freeze: {what}. Text does not reach these parameters, so the steps of {len(empty)} of "
        f"{len(blocks)} blocks (such as {empty[0]}) would train nothing. Freeze them: {remedy}"
    )


def make_engine(
    model: Any,
    settings: Settings,
    factor: Callable[[int], float],
    unreached: Sequence[str] = (),
    page_locking_is_checked: bool = False,
) -> Any:
    """Make the engine of the method, with `training.lr_schedule` unless the deepspeed section has a scheduler.

    Args:
        factor: the learning rate at a tick of the schedule (0-based), as a fraction of the highest one.
        unreached: names of the parameters that the loss does not depend on. Methods without blocks do not train them:
            they would take memory for gradients and optimizer state, and weight decay or MeZO would change them.
        page_locking_is_checked: by `page_locking_problem`, so that the engine does not check and warn again.

    Raises:
        NotApplicable: the method does not fit the model.
        UserError: the engine refuses the settings.
    """
    method = METHODS[settings.method.name]
    left_out = [] if method.block_wise else [model.get_parameter(name) for name in unreached]
    if method.adapter:
        model = ADAPTERS[method.adapter](model, settings.method)
    for parameter in left_out:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NotApplicable(settings.method.name, model, "text does not reach the weights it trains")
    if not method.uses_deepspeed:
        return make_plain_engine(model, settings, factor)
    config = copy.deepcopy(settings.deepspeed)
    config["hift"] = with_deferred_step(config["hift"])
    if page_locking_is_checked:
        offload = config["hift"].get("offload", {})
        if offload.get("pin_memory", "auto") == "auto":
            config["hift"]["offload"] = {**offload, "pin_memory": AS_ALLOWED}
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
    # OSError: a drive for files is full. DeepSpeed checks some settings with assertions.
    except (ValueError, MemoryError, OSError, AssertionError) as error:
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
