"""Check the deepspeed section with what DeepSpeed and torch say themselves: models, signatures, and a trial.

DeepSpeed turns the text "1e9" into a number in some sections and ignores keys in others, and an optimizer first notices
a wrong value in its first step.
"""

from __future__ import annotations

import copy
import enum
import importlib.util
import inspect
import logging
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from deepspeed import DeepSpeedConfig
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from pydantic import BaseModel, ValidationError

from hift_ds.engine import scheduler_class
from hift_ds.launch.config.checking import check_keys, fit
from hift_ds.launch.errors import nearest, shown
from hift_ds.optim.lion import Lion
from hift_ds.optim.properties import ELEMENTWISE, optimizer_class

# The sections that DeepSpeed checks with a model, and where its parsed config has the model.
MODELS = {
    "bf16": "bfloat16_config",
    "bfloat16": "bfloat16_config",
    "comet": "monitor_config.comet",
    "comms_logger": "comms_config.comms_logger",
    "compile": "compile_config",
    "csv_monitor": "monitor_config.csv_monitor",
    "fp16": "float16_config",
    "hybrid_engine": "hybrid_engine",
    "tensor_parallel": "tensor_parallel_config",
    "tensorboard": "monitor_config.tensorboard",
    "timers": "timers_config",
    "wandb": "monitor_config.wandb",
    "weight_quantization": "weight_quantization_config",
    "zero_optimization": "zero_config",
}
# Numbers of optimizers and schedules that have no sense outside these limits; not every class checks them.
_NOT_NEGATIVE, _SHARE = {"at_least": 0, "at_most": 1e30}, {"at_least": 0, "below": 1}
LIMITS = {
    **dict.fromkeys(("lr", "eps", "weight_decay", "muon_lr", "adam_lr", "warmup_min_ratio"), _NOT_NEGATIVE),
    **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr"), _NOT_NEGATIVE),
    "lr_range_test_min_lr": _NOT_NEGATIVE,
    **dict.fromkeys(("betas", "momentum", "alpha", "rho"), _SHARE),
}
COUNTS = ("total_num_steps", "warmup_num_steps", "cycle_first_step_size", "lr_range_test_step_size")
# Limits that the models of DeepSpeed do not have, where other values fail during training.
MODEL_LIMITS = {
    "fp16.initial_scale_power": Annotated[int, {"at_least": 0, "at_most": 126}],
    "fp16.hysteresis": Annotated[int, {"at_least": 1}],
    "fp16.loss_scale": Annotated[float, {"at_least": 0, "at_most": 2.0**126}],
    "comet.samples_log_interval": Annotated[int, {"at_least": 1}],
}
PER_GROUP = ("_lr", "_mom")  # ends of schedules' keys whose value may be a list with a number for each parameter group
WARMUP_TYPES = ("log", "linear")
# Keys that DeepSpeed takes out of the parameters of Adam before it makes the optimizer.
ADAM_KEYS = {"torch_adam": bool, "adam_w_mode": bool, "fp32_optimizer_states": bool}
# DeepSpeed's Muon divides its parameters among two optimizers.
MUON_KEYS = {
    **dict.fromkeys(("lr", "momentum", "weight_decay", "eps", "muon_lr", "adam_lr"), float),
    "betas": list[float],
    "ns_method": str,
    **ADAM_KEYS,
}
MUP = ("muadam", "muadamw", "musgd")


def deepspeed_problems(section: Mapping[str, Any]) -> list[str]:
    """Return the problems of a completed section, one line each. Nothing is compiled, and no device is used."""
    section = copy.deepcopy({key: value for key, value in section.items() if key != "hift"})
    problems: list[str] = []
    with _quiet():
        parsed = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "comms_logger": {}, "weight_quantization": {}})
        for key, path in MODELS.items():
            if key in section:
                model: Any = parsed
                for part in path.split("."):
                    model = getattr(model, part)
                keys = _model_keys(type(model))
                keys |= {name: MODEL_LIMITS[f"{key}.{name}"] for name in keys if f"{key}.{name}" in MODEL_LIMITS}
                keys = {"throughput": keys} if key == "timers" else keys
                check_keys(section[key], keys, f"deepspeed.{key}", problems)
        problems += [] if problems else _zero_problems(section)
        problems += _optimizer_problems(section)
        problems += _scheduler_problems(section)
        return problems or _parser_problems(section)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what DeepSpeed logs about a config: the engine's own start says it again."""
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# ---- sections with a model ---------------------------------------------------------------------------------------


def _model_keys(model: type[BaseModel]) -> dict[str, Any]:
    """Return the keys of a model with their types, for `check_keys`."""
    keys = {}
    for name, field in model.model_fields.items():
        keys[name] = keys[field.alias or name] = _hint(field.annotation)
    return keys


def _hint(annotation: Any) -> Any:
    """Return the type of a model's field as `check_keys` knows it. What it does not know is left to the model."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        hints = [_hint(one) for one in inner if one is not types.NoneType]
        if len(hints) == 1 and not isinstance(hints[0], type):
            return hints[0]  # the keys of a section, or a choice
        return typing.Union[tuple(hints) + (None,) * (types.NoneType in inner)]  # noqa: UP007
    if origin is list:
        return list[_hint(inner[0])]  # type: ignore[misc]
    if origin is dict or annotation is dict:
        return dict
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return _model_keys(annotation)
        if issubclass(annotation, enum.Enum) and issubclass(annotation, (int, str)):
            kind = int if issubclass(annotation, int) else str
            return Annotated[kind, {"choices": tuple(dict.fromkeys(one.value for one in annotation))}]
        if issubclass(annotation, Path):
            return str
        if annotation in (bool, int, float, str, list):
            return annotation
    return annotation if origin is typing.Literal else Any


def _zero_problems(section: Mapping[str, Any]) -> list[str]:
    """Return what ZeRO asserts about settings together, only when its optimizer is made."""
    zero = section.get("zero_optimization", {})
    if not zero.get("stage", 0):
        return []
    found = []
    if zero.get("reduce_scatter", True):
        for key, default in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if section.get(key, default) != default:
                found.append(
                    f"deepspeed.{key}: got {section[key]!r}, which ZeRO does not support with "
                    "reduce_scatter. Remove it, or set deepspeed.zero_optimization.reduce_scatter=false."
                )
    if zero["stage"] < 3 and zero.get("allgather_bucket_size", 2) % 2:
        found.append(
            f"deepspeed.zero_optimization.allgather_bucket_size: got {zero['allgather_bucket_size']}. Expected an even "
            "number."
        )
    return found


def _parser_problems(section: Mapping[str, Any]) -> list[str]:
    """Return what DeepSpeed's parser says about the section; keys that it refuses by themselves are named."""
    candidate = {key: value for key, value in section.items() if key != "train_batch_size"}  # it knows one rank here
    if not (whole := _parsed(candidate)):
        return []
    sizes = {key: candidate[key] for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")}
    alone = [
        f"deepspeed.{key}{text}" for key, value in candidate.items() for text in _parsed({**sizes, key: value}, key)
    ]
    return alone or [f"deepspeed{text}" for text in whole]


def _parsed(candidate: dict[str, Any], key: str = "") -> list[str]:
    """Return the ends of messages about a config that DeepSpeed's parser refuses: inner keys, and the reason."""
    try:
        DeepSpeedConfig(copy.deepcopy(candidate))
    except ValidationError as error:
        found = []
        for fault in error.errors():
            inner = [str(one) for one in fault["loc"] if one != key]
            reason = fault["msg"].removeprefix("Value error, ")
            found.append(f"{''.join('.' + one for one in inner)}: got {fault['input']!r}: {reason}.")
        return found
    except Exception as error:  # of any type: it takes values as they come
        return [f": {_reason(error)}"]
    return []


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text or type(error).__name__}{'.' * (not text.endswith('.'))}"


# ---- optimizer and scheduler -------------------------------------------------------------------------------------


def _signature_keys(kind: type) -> dict[str, Any]:
    """Return the arguments of a class with the types of their defaults, without the first (what it works on)."""
    keys: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(kind).parameters.items())[1:]:
        default, limits = parameter.default, LIMITS.get(name, {})
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "warmup_type":
            keys[name] = Annotated[str, {"choices": WARMUP_TYPES}]
        elif name in COUNTS:
            keys[name] = Annotated[int, {"at_least": 1}]
        elif isinstance(default, bool) or "bool" in str(parameter.annotation):
            keys[name] = bool if default is not None else bool | None
        elif parameter.annotation in (int, "int"):
            keys[name] = int
        elif isinstance(default, (int, float)):
            keys[name] = Annotated[float, limits]
        elif "Iterable[int]" in str(parameter.annotation):
            keys[name] = list[int]
        elif isinstance(default, tuple):
            keys[name] = list[float | None] if None in default else list[float]
        elif isinstance(default, str):
            keys[name] = str
        elif default is parameter.empty or name.endswith(("_lr", "_size", "_count")):
            keys[name] = Annotated[float | None if default is None else float, limits]
        else:
            keys[name] = Any
    return keys


def _check_params(params: dict[str, Any], keys: Mapping[str, Any], where: str, problems: list[str]) -> None:
    """Check names, types and limits of the arguments of an optimizer or a schedule."""
    before = len(problems)
    checked = {
        key: value[0] if str(key).endswith(PER_GROUP) and isinstance(value, list) and len(value) == 1 else value
        for key, value in params.items()
    }
    check_keys(checked, keys, where, problems, whole=False)
    for key, value in checked.items() if len(problems) == before else ():
        for one in value if isinstance(value, list) and key in LIMITS else ():
            _, fault = fit(one, Annotated[float | None, LIMITS[key]])
            problems += [f"{where}.{key}: {fault}"] if fault else []


def _optimizer_problems(section: Mapping[str, Any]) -> list[str]:
    """Check the optimizer's name and parameters by its signature, and by two steps of a small parameter."""
    kind, params = section["optimizer"]["type"], dict(section["optimizer"]["params"])
    name, where = kind.lower(), "deepspeed.optimizer"
    if name in MUP:
        missing = importlib.util.find_spec("mup") is None
        return [f"{where}.type: got {kind!r}, which needs the package mup: pip install mup"] if missing else []
    problems: list[str] = []
    if "max_grad_norm" in params:
        return [f"{where}.params.max_grad_norm: the optimizer does not clip. Set training.max_grad_norm instead."]
    if name == "muon":
        _check_params(params, MUON_KEYS, f"{where}.params", problems)
        return problems
    on_host = (section.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none"
    made = optimizer_class(kind, on_host, params.get("torch_adam") is True)
    if made is None:
        known = ["Adam", "AdamW", "Lion", "Lamb", "Muon", *_names(torch.optim, torch.optim.Optimizer)]
        return [f"{where}.type: got {kind!r}. Expected an optimizer of DeepSpeed or torch.optim{nearest(kind, known)}"]
    if inspect.signature(made.step).parameters["closure"].default is inspect.Parameter.empty:
        return [f"{where}.type: got {kind!r}, which evaluates the loss several times a step. Set another one."]
    if "weight_decay" not in inspect.signature(made).parameters:
        return [f"{where}.type: got {kind!r}, which has no weight decay, and a run always sets one. Set another one."]
    extra = ADAM_KEYS if name in ("adam", "adamw") else {}
    _check_params(params, {**_signature_keys(made), **extra}, f"{where}.params", problems)
    if problems:
        return problems
    plain, taken = _plain(name, made, params)
    if get_accelerator().device_name() != "cpu":
        taken = {key: value for key, value in taken.items() if key not in ("fused", "capturable")}
    return _tried(lambda params: _step(plain, params), taken, f"{where}.params")


def _plain(name: str, made: type, params: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """Return the class that needs no kernel compiled for the device, and those parameters that it takes."""
    plain = {"lion": Lion, "lamb": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}.get(name, made)
    plain = torch.optim.AdamW if name in ("adam", "adamw") else plain
    return plain, {key: value for key, value in params.items() if key in inspect.signature(plain).parameters}


def plain_optimizer(section: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    """Return the optimizer of an `optimizer` section over one small parameter, by the class that needs no kernel.

    None: it is no element-wise optimizer of DeepSpeed or torch.
    """
    name = section["type"].lower()
    plain, taken = _plain(name, optimizer_class(section["type"]) or object, section.get("params", {}))
    if name == "lamb" or plain not in ELEMENTWISE:
        return None
    made: torch.optim.Optimizer = plain([torch.nn.Parameter(torch.zeros(8))], **taken)
    return made


def _step(kind: type, params: Mapping[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = kind([parameter], **params)
    for _ in range(2):
        parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    if not parameter.isfinite().all():
        raise ValueError("a step makes weights infinite or NaN; lower the numbers")


def _scheduler_problems(section: Mapping[str, Any]) -> list[str]:
    """Check the schedule's name and parameters by its signature, and by three steps of it."""
    if "scheduler" not in section:
        return []
    scheduler, where = section["scheduler"], "deepspeed.scheduler"
    if "type" not in scheduler:
        return [f"{where}.type: not set. Expected a schedule of DeepSpeed, e.g. WarmupDecayLR."]
    kind, params = scheduler["type"], scheduler.get("params", {})
    made = scheduler_class(kind)
    if made is None:
        known = ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
        known += _names(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        return [f"{where}.type: got {kind!r}. Expected a schedule of DeepSpeed or torch{nearest(kind, known)}"]
    problems: list[str] = []
    keys = _signature_keys(made)
    _check_params(dict(params), keys, f"{where}.params", problems)
    required = [
        name
        for name, parameter in list(inspect.signature(made).parameters.items())[1:]
        if parameter.default is parameter.empty and name not in params
    ]
    problems += [f"{where}.params.{name}: not set, and {kind} needs it." for name in required]
    if problems:
        return problems

    def drive(params: Mapping[str, Any]) -> None:
        schedule = made_schedule({**scheduler, "params": params}, section["optimizer"]["params"]["lr"])
        for _ in range(3):
            schedule.optimizer.step()
            schedule.step()

    return _tried(drive, params, f"{where}.params")


def made_schedule(scheduler: Mapping[str, Any], rate: float) -> Any:
    """Return the schedule of a `scheduler` section, over an optimizer of one parameter without a gradient."""
    made: Any = scheduler_class(scheduler["type"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    with _quiet():
        return made(optimizer, **scheduler.get("params", {}))


def _tried(trial: Callable[[Mapping[str, Any]], None], params: Mapping[str, Any], where: str) -> list[str]:
    """Return the problem of arguments with which a trial fails. It names the one without which the trial succeeds."""

    def reason(arguments: Mapping[str, Any]) -> str | None:
        try:
            trial(arguments)
        except Exception as error:  # of any type: these classes do not check what they are given
            return _reason(error)
        return None

    if (why := reason(params)) is None:
        return []
    for key, value in params.items():
        if reason({name: one for name, one in params.items() if name != key}) is None:
            return [f"{where}.{key}: got {shown(value)}: {why}"]
    return [f"{where}: got {shown(dict(params))}: {why}"]


def _names(module: Any, base: type) -> list[str]:
    return [name for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, base)]
