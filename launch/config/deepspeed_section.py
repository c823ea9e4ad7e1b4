"""The `deepspeed` section of a run: fill in what `training` and `method` decide, and check it without DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hift_ds import config
from hift_ds.launch.errors import expected
from hift_ds.launch.methods.settings import MethodSettings
from hift_ds.launch.methods.table import METHODS

if TYPE_CHECKING:
    from hift_ds.launch.config.settings import TrainingSettings

# Values of `training` keys that are null, where the deepspeed section does not set them either.
FALLBACKS = {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0, "optimizer": "AdamW"}

# The top-level keys that DeepSpeed 0.19 reads. It silently ignores all others, so a misspelled "zero_optimisation"
# would train at stage 0.
DEEPSPEED_KEYS = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "hift", "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown", "optimizer",
    "pipeline", "prescale_gradients", "scheduler", "seq_parallel_communication_data_type",
    "sequence_parallel_size", "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast",
    "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism",
    "use_node_local_storage", "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip


def complete(
    given: Mapping[str, Any],
    training: TrainingSettings,
    method: MethodSettings,
    world_size: int,
    has_lr_schedule: bool,
    problems: list[str],
) -> dict[str, Any]:
    """Return the section with batch sizes, optimizer, clipping and `hift.enabled` filled in.

    Args:
        given: the section from the settings file.
        world_size: number of ranks.
        has_lr_schedule: whether the settings file sets `training.lr_schedule`.
        problems: unknown keys, and values that contradict `training` or `method`, are appended here.
    """
    section = copy.deepcopy(dict(given))
    for key in section:
        if key not in DEEPSPEED_KEYS:
            problems.append(f"deepspeed.{key}: unknown key, DeepSpeed would ignore it. {expected(key, DEEPSPEED_KEYS)}")
    for key in ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "hift"):
        if not isinstance(section.get(key, {}), dict):
            problems.append(f"deepspeed.{key}: got {section[key]!r}, expected a mapping.")
            section.pop(key)

    micro = training.micro_batch_size or max(1, training.batch_size // world_size)
    window = micro * world_size
    if training.batch_size % window:
        problems.append(
            f"training.batch_size: got {training.batch_size}, which {world_size} rank{'s' * (world_size > 1)} with "
            f"training.micro_batch_size {micro} cannot divide evenly. Expected a multiple of {window}, e.g. "
            f"training.batch_size={-(-training.batch_size // window) * window}."
        )
    _agree(section, ("train_batch_size",), "batch_size", training.batch_size, problems)
    _agree(section, ("train_micro_batch_size_per_gpu",), "micro_batch_size", micro, problems)
    _agree(
        section,
        ("gradient_accumulation_steps",),
        "batch_size / (micro_batch_size x ranks)",
        max(1, training.batch_size // window),
        problems,
    )
    _agree(section, ("gradient_clipping",), "max_grad_norm", training.max_grad_norm, problems)
    _agree(section, ("optimizer", "type"), "optimizer", training.optimizer, problems)
    _agree(section, ("optimizer", "params", "lr"), "learning_rate", training.learning_rate, problems)
    _agree(section, ("optimizer", "params", "weight_decay"), "weight_decay", training.weight_decay, problems)

    if section.get("scheduler") and has_lr_schedule:
        problems.append(
            "deepspeed.scheduler: given, and so is training.lr_schedule. Expected one of them; remove the other."
        )

    hift = section.setdefault("hift", {})
    if method.name in METHODS:
        enabled = METHODS[method.name].block_wise
        if hift.get("enabled", enabled) is not enabled:
            problems.append(
                f"deepspeed.hift.enabled: got {hift['enabled']!r}, but method.name is {method.name!r}. Remove "
                f"it (method.name decides), or set another method.name."
            )
        hift["enabled"] = enabled
    problems += _hift_problems(section)
    return section


def _agree(section: dict, path: tuple[str, ...], name: str, value: Any, problems: list[str]) -> None:
    """Fill in one key of the section from `training`, or report that the two disagree."""
    node = section
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            problems.append(f"deepspeed.{'.'.join(path[:-1])}: got {node!r}, expected a mapping.")
            return
    given = node.get(path[-1], "auto")
    if given == "auto":
        node[path[-1]] = FALLBACKS[name] if value is None else value
    elif value is not None and not _same(given, value):
        problems.append(
            f"deepspeed.{'.'.join(path)}: got {given!r}, but training.{name} is {value!r}. They must agree: "
            f"remove the deepspeed key, or set both to the same value."
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()  # DeepSpeed ignores the case of optimizer names
    return one == other


def _hift_problems(section: dict) -> list[str]:
    """Return the problems of the hift section and of its combination with the others."""
    found = config.problems(section)
    if not section["hift"].get("enabled") and section.get("fp16", {}).get("enabled"):
        if section.get("zero_optimization", {}).get("stage", 0) == 0:
            found.append(
                "fp16.enabled=true with zero_optimization.stage=0: DeepSpeed divides by a loss scale there that it "
                "never applied; use bf16, or stage 1, 2 or 3"
            )
    return [f"deepspeed.{problem}" for problem in found]
