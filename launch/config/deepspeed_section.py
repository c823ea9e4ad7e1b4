"""The `deepspeed` section of a run: fill in what `training` and `method` decide, and check it without DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hift_ds import config, paths
from hift_ds.launch.config.checking import check_keys, fit
from hift_ds.launch.config.deepspeed_keys import KEYS, NOT_NEGATIVE, NOT_STARTED, WRITTEN
from hift_ds.launch.errors import UserError
from hift_ds.launch.methods.lr_schedules import warmup_ticks
from hift_ds.launch.methods.settings import MethodSettings
from hift_ds.launch.methods.table import METHODS, TRAINED

if TYPE_CHECKING:
    from hift_ds.launch.config.settings import TrainingSettings

# Values of `training` keys that are null, where the deepspeed section does not set them either.
FALLBACKS = {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0, "optimizer": "AdamW"}

# Keys whose "auto" `fill_in` replaces as the Hugging Face Trainer does, once the model and the steps are known.
FROM_MODEL = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
FROM_TRAINING = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "optimizer"),
)
FROM_SCHEDULE = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_min_ratio")


def complete(
    given: Mapping[str, Any],
    training: TrainingSettings,
    method: MethodSettings,
    world_size: int,
    has_lr_schedule: bool,
    problems: list[str],
    notes: list[str],
) -> dict[str, Any]:
    """Return the section with batch sizes, optimizer, clipping and `hift.enabled` filled in.

    Args:
        given: the section from the settings file.
        world_size: number of ranks.
        has_lr_schedule: whether the settings file sets `training.lr_schedule`.
        problems: unknown keys, values of wrong types, and values that contradict `training` or `method`, are appended
            here.
        notes: what an "auto" stands for is appended here, where `training` does not say it.
    """
    section = {key: value for key, value in copy.deepcopy(dict(given)).items() if value is not None}
    _replace_auto(section, notes)
    check_keys(section, KEYS, "deepspeed", problems)
    params = section.get("optimizer", {}).get("params", {})
    for key in ("lr", "weight_decay"):
        value, fault = fit(params.get(key, 0), NOT_NEGATIVE)
        if fault:
            problems.append(f"deepspeed.optimizer.params.{key}: {fault}")
            del params[key]
    problems += _not_started(section) + _path_problems(section)

    micro, rest = micro_batch_size(training.batch_size, training.micro_batch_size, world_size)
    window = micro * world_size
    if rest:
        fitting = [str(ranks) for ranks in range(1, training.batch_size + 1) if training.batch_size % ranks == 0]
        problems.append(
            f"training.batch_size: got {training.batch_size}, which {world_size} ranks cannot divide evenly. Start "
            f"{' or '.join(fitting)} ranks, or, in a new run, set a multiple of {world_size}, e.g. "
            f"training.batch_size={-(-training.batch_size // world_size) * world_size}."
        )
    elif training.micro_batch_size not in (None, micro):
        notes.append(
            f"training.micro_batch_size: {training.micro_batch_size} does not divide the "
            f"{training.batch_size // world_size} examples of each rank; micro-batches have {micro}, and a step takes "
            f"{training.batch_size // window} of them"
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
    rate = training.learning_rate
    if rate == "auto":  # the number is known when the model is (launch/learning_rates.py)
        rate = training.full_learning_rate
        if "lr" in params:
            rate = None
            problems.append(
                f"deepspeed.optimizer.params.lr: got {params['lr']!r}, but training.learning_rate is 'auto'. Expected "
                "one of them; remove the other."
            )
    _agree(section, ("optimizer", "params", "lr"), "learning_rate", rate, problems)
    _agree(section, ("optimizer", "params", "weight_decay"), "weight_decay", training.weight_decay, problems)

    if section.get("scheduler") and has_lr_schedule:
        problems.append(
            "deepspeed.scheduler: given, and so is training.lr_schedule. Expected one of them; remove the other."
        )
    problems += _scheduler_problems(section, training, method)

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


def micro_batch_size(batch_size: int, most: int | None, world_size: int) -> tuple[int, int]:
    """Return the size of a micro-batch, and how many examples of a step the ranks cannot divide evenly.

    The size is the largest that divides a rank's examples evenly, so that a run keeps its batch on any number of ranks.

    Args:
        batch_size: examples of a step, over all ranks.
        most: examples in a micro-batch, at most; None: all of a rank's.
    """
    share, rest = divmod(batch_size, world_size)
    sizes = range(1, min(most or share, share) + 1)
    return max((size for size in sizes if share % size == 0), default=1), rest


def fill_in(
    section: Mapping[str, Any], training: TrainingSettings, hidden_size: int | None, ticks: int
) -> dict[str, Any]:
    """Return the section with a value for each "auto" that depends on the model or the length of the run.

    The sizes of buckets are those of the Hugging Face Trainer. A warm-up does not start at 0 as there, but at the rate
    of `training.lr_schedule`: under HiFT, a cycle over all blocks would be lost.

    Args:
        hidden_size: the width of the model; None if its configuration has none.
        ticks: how often the learning-rate schedule advances.

    Raises:
        UserError: an "auto" needs the width of the model, and the model has none.
    """
    filled = copy.deepcopy(dict(section))
    zero = filled.get("zero_optimization", {})
    missing = [f"deepspeed.zero_optimization.{key}" for key in FROM_MODEL if zero.get(key) == "auto"]
    if missing and hidden_size is None:
        raise UserError(
            f"{', '.join(missing)}: got 'auto', which is computed from the model's hidden_size, and its configuration "
            "has none. Set numbers, or remove the keys for DeepSpeed's defaults."
        )
    size = hidden_size or 0
    rate = filled["optimizer"]["params"]["lr"]
    warmup = warmup_ticks(training.warmup_ratio, ticks)
    first = 1 / (warmup + 1)
    values = dict(zip(FROM_MODEL, (size * size, int(0.9 * size * size), 10 * size), strict=True))
    schedule = dict(zip(FROM_SCHEDULE, (rate * first, rate, max(1, warmup), ticks, first), strict=True))
    for node, known in ((zero, values), (filled.get("scheduler", {}).get("params", {}), schedule)):
        node.update({key: known[key] for key, value in node.items() if value == "auto" and key in known})
    return filled


def differences(before: Any, after: Any, where: str = "deepspeed") -> list[str]:
    """Return a line for each "auto" in nested mappings that has a value afterwards."""
    if isinstance(before, dict):
        return [text for key, value in before.items() for text in differences(value, after[key], f"{where}.{key}")]
    return [f"{where}: auto is {after!r}"] if before != after else []


def _replace_auto(section: dict[str, Any], notes: list[str]) -> None:
    """Take out each "auto" that `training` or a default decides, and decide the dtype where it is "auto"."""
    for key in FROM_TRAINING:
        if section.get(key) == "auto":
            del section[key]
    optimizer = section.get("optimizer")
    inner = optimizer.get("params") if isinstance(optimizer, dict) else None
    for node in [one for one in (optimizer, inner) if isinstance(one, dict)]:
        for key in [key for key, value in node.items() if value == "auto"]:
            del node[key]
            if key not in ("type", "params", "lr", "weight_decay"):
                notes.append(f"deepspeed.optimizer.params.{key}: auto is the optimizer's own default")
    precisions = {key: section[key] for key in ("bf16", "bfloat16", "fp16") if isinstance(section.get(key), dict)}
    auto = [key for key, node in precisions.items() if node.get("enabled") == "auto"]
    for key in auto:  # fp16 last: bf16 has the range of fp32 and needs no loss scale
        others = any(node.get("enabled") is True for other, node in precisions.items() if other != key)
        precisions[key]["enabled"] = key != "fp16" and not others
        notes.append(f"deepspeed.{key}.enabled: auto is {str(precisions[key]['enabled']).lower()}")


def _not_started(section: dict[str, Any]) -> list[str]:
    """Return a problem for each section of a feature that this program never starts; take out those switched off."""
    found = []
    for key in [key for key in NOT_STARTED if key in section]:
        if section.pop(key).get("enabled", True) is not False:
            found.append(f"deepspeed.{key}: has no effect here, because {NOT_STARTED[key]}. Remove it.")
    return found


def _path_problems(section: Mapping[str, Any]) -> list[str]:
    found = []
    for key in WRITTEN:
        outer, _, inner = key.partition(".")
        path = section.get(outer, {}).get(inner)
        if isinstance(path, str) and path and (reason := paths.fault(path)):
            found.append(f"deepspeed.{key}: {reason}.")
    return found


def _scheduler_problems(section: Mapping[str, Any], training: TrainingSettings, method: MethodSettings) -> list[str]:
    """Return the problems of `deepspeed.scheduler` with the method, and of `training.warmup_ratio` with it."""
    if "scheduler" not in section:
        return []
    found = []
    if method.name in TRAINED and not TRAINED[method.name].uses_deepspeed:
        found.append(
            f"deepspeed.scheduler: given, but method {method.name!r} does not use DeepSpeed. Remove it and use "
            "training.lr_schedule and training.warmup_ratio."
        )
    params = section["scheduler"].get("params", {})
    if training.warmup_ratio and "auto" not in (params.get("warmup_num_steps"), params.get("warmup_min_lr")):
        found.append(
            f"training.warmup_ratio: got {training.warmup_ratio:g}, but deepspeed.scheduler decides about the warm-up. "
            "Remove it, or set deepspeed.scheduler.params.warmup_num_steps=auto."
        )
    return found


def _agree(section: dict, path: tuple[str, ...], name: str, value: Any, problems: list[str]) -> None:
    """Fill in one key of the section from `training`, or report that the two disagree."""
    node = section
    for part in path[:-1]:
        node = node.setdefault(part, {})
    given = node.setdefault(path[-1], FALLBACKS[name] if value is None else value)
    if value is not None and not _same(given, value):
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
