"""The settings of a training run: one YAML file, one dataclass a section, and every problem reported at once.

Nothing here loads a weight or writes a file. `load_settings` either returns settings that hold together or raises one
`UserError` that lists all problems, each with the key, the value found, what was expected and a remedy.
"""

from __future__ import annotations

import copy
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hift_ds.launch.config import credentials
from hift_ds.launch.data.loading import DataSettings
from hift_ds.launch.errors import UserError, nearest
from hift_ds.launch.methods.table import METHODS, MethodSettings, method_problems
from hift_ds.launch.model import loading

PACKAGE = Path(__file__).parents[2]  # hift_ds, which holds configs/ in a clone and in a wheel
LR_SCHEDULES = ("constant", "linear", "cosine")
TASKS = ("causal-lm", "sequence-classification")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

# What `training` means by null where the deepspeed section does not say either.
FALLBACKS = {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0, "optimizer": "AdamW"}

# The top-level keys DeepSpeed 0.19 reads. DeepSpeed ignores others without a word, so a misspelled
# "zero_optimisation" would train at stage 0.
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


def setting(default: Any, **limits: Any) -> Any:
    """A dataclass field with limits: `choices`, `at_least`, `above`, `at_most`."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class ModelSettings:
    name_or_path: str | None = None  # Hub id, local folder or .gguf file
    config: dict | None = None  # {model_type: ..., ...}: trained from scratch
    tokenizer: str | None = None  # default: beside the model; "byte" is the built-in one
    task: str = setting("causal-lm", choices=TASKS)
    num_labels: int | None = setting(None, at_least=2)
    revision: str | None = None  # on the Hub: branch, tag or commit; of a `tokenizer`: OWNER/NAME@REVISION
    trust_remote_code: bool = False  # true: Python code that comes with the model is run
    gradient_checkpointing: bool | str = False  # "cpu": what each layer keeps for backward waits in host memory
    attention: str | None = setting(None, choices=ATTENTIONS)


@dataclass(frozen=True)
class TrainingSettings:
    max_steps: int = setting(100, at_least=1)  # optimizer steps; under HiFT each trains one block
    batch_size: int = setting(16, at_least=1)  # examples a step, over all ranks and micro-batches
    micro_batch_size: int | None = setting(None, at_least=1)  # examples a forward pass, on one rank
    learning_rate: float | None = setting(None, above=0)
    lr_schedule: str = setting("constant", choices=LR_SCHEDULES)
    warmup_ratio: float = setting(0.0, at_least=0, at_most=1)  # of the schedule's ticks (under HiFT: cycles)
    weight_decay: float | None = setting(None, at_least=0)
    max_grad_norm: float | None = setting(None, at_least=0)  # 0 = no clipping
    optimizer: str | None = None
    max_skipped_steps: int = setting(5, at_least=0)  # in a row, for what is not finite; one more stops the run
    loss_chunk: int | None = setting(None, at_least=0)  # tokens whose logits exist at a time; null: by size; 0: all
    seed: int = setting(0, at_least=0)
    deterministic: bool = False  # true: the same bits again on the same machine, at the price of slower kernels
    save_every: int | None = setting(None, at_least=1)  # steps; null = no checkpoints
    keep_last: int | None = setting(2, at_least=1)  # checkpoints; older ones are deleted; null = all are kept
    keep_every: int | None = setting(None, at_least=1)  # steps; checkpoints at multiples of it are kept, too
    rank_timeout: float = setting(1800.0, at_least=1)  # seconds without progress after which a rank counts as lost
    eval_batch_size: int | None = setting(None, at_least=1)  # examples a rank; default: micro_batch_size
    max_new_tokens: int = setting(64, at_least=1)  # generated for a held-out answer


@dataclass(frozen=True)
class OutputSettings:
    dir: str | None = None
    overwrite: bool = False  # true: an earlier run's files in `dir` are deleted first
    export: bool = True  # false: OUT/model is not written


@dataclass(frozen=True)
class LoggingSettings:
    every: int = setting(10, at_least=1)  # steps between two lines where the terminal is not interactive
    verbose: bool = False  # true: DeepSpeed's and transformers' own messages too
    wandb: str = setting("off", choices=("off", "online", "offline"))
    wandb_project: str = "hift"
    wandb_name: str | None = None


@dataclass(frozen=True)
class Settings:
    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    training: TrainingSettings
    deepspeed: dict  # complete: batch sizes, optimizer, clipping and `hift.enabled` are filled in
    output: OutputSettings
    logging: LoggingSettings

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def dtype(self) -> str:
        """The weights' dtype during training: "bfloat16", "float16" or "float32"."""
        for key, name in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
            if self.deepspeed.get(key, {}).get("enabled", False):
                return name
        return "float32"

    @property
    def micro_batch_size(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def accumulation(self) -> int:
        return self.deepspeed["gradient_accumulation_steps"]

    def as_dict(self) -> dict:
        return asdict(self)


SECTIONS = {
    "model": ModelSettings,
    "data": DataSettings,
    "method": MethodSettings,
    "training": TrainingSettings,
    "deepspeed": dict,
    "output": OutputSettings,
    "logging": LoggingSettings,
}


def load_settings(path: str, overrides: Sequence[str] = (), world_size: int = 1) -> Settings:
    """Read the YAML at `path`, apply `KEY=VALUE` overrides and check everything.

    Args:
        path: the YAML file.
        overrides: the `--set` values, `a.b.c=value` with the value in YAML.
        world_size: number of ranks; decides the accumulation steps.

    Raises:
        UserError: with every problem found, one a line.
    """
    raw, problems = read_yaml(path, overrides, tuple(SECTIONS))
    settings = check_settings(raw, world_size, problems)
    if settings is None:
        raise UserError(problem_list(source(path, overrides), problems))
    return settings


def read_yaml(path: str, overrides: Sequence[str], sections: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The YAML at `path` with the `--set` overrides, a deepspeed file's content in its place, and what is wrong so far.

    Raises:
        UserError: the file cannot be read, or there are secrets in it.
    """
    problems: list[str] = []
    raw = _read_mapping(path, sections)
    for override in overrides:
        _apply_override(raw, override, problems)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = _read_deepspeed_file(raw["deepspeed"], problems)
    if secrets := credentials.problems(raw):  # alone: what else is wrong may be said with the value
        raise UserError(problem_list(source(path, overrides), secrets))
    return raw, problems


def check_settings(raw: Mapping[str, Any], world_size: int, problems: list[str]) -> Settings | None:
    """Settings of sections as they are in a YAML; None where something is wrong, which is then in `problems`."""
    for key in raw:
        if key not in SECTIONS:
            problems.append(f"{key}: unknown section. {expected(key, SECTIONS)}")
    sections: dict[str, Any] = {}
    for key, kind in SECTIONS.items():
        given = raw.get(key)
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            problems.append(
                f"{key}: got {given!r}, expected a mapping of settings"
                f"{' or the path of a JSON file' if key == 'deepspeed' else ''}."
            )
            given = {}
        sections[key] = dict(given) if kind is dict else build(kind, given, key, problems)

    problems += model_problems(sections["model"])
    if sections["training"].loss_chunk is not None and sections["model"].task != "causal-lm":
        problems.append(
            f"training.loss_chunk: got {sections['training'].loss_chunk}, but model.task is "
            f"{sections['model'].task!r}, whose logits are few. Remove it."
        )
    problems += sections["data"].problems()
    fp16 = sections["deepspeed"].get("fp16")
    is_fp16 = isinstance(fp16, Mapping) and bool(fp16.get("enabled"))
    problems += method_problems(sections["method"], sections["training"].save_every, is_fp16)
    if not sections["output"].dir:
        problems.append("output.dir: not set. Expected a folder for this run's files, e.g. output.dir=runs/first.")
    sections["deepspeed"] = _complete_deepspeed(sections, raw, world_size, problems)
    return None if problems else Settings(**sections)


def source(path: str, overrides: Sequence[str]) -> str:
    """Where settings come from, for the head of a list of problems."""
    return f"{path} with --set" if overrides else path


def problem_list(where: str, problems: list[str]) -> str:
    """All problems as one text, a line each."""
    return "\n".join(
        [
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in {where}:",
            *(f"  - {problem}" for problem in problems),
        ]
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2's scalars: `1e-4` is a number and `off` is a word. A key given twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)|[-+]?(\d+\.\d*|\.\d+)|[-+]?\.(inf|Inf)|\.(nan|NaN))$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def _read_mapping(path: str, sections: Iterable[str]) -> dict:
    try:
        content = _yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config {path}: cannot be read ({error.strerror}). Expected a YAML file, e.g. configs/tiny.yaml."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected a mapping with the sections {', '.join(sections)}.")
    return content


def _apply_override(raw: dict, override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        problems.append(f"--set {override}: expected KEY=VALUE, e.g. --set training.max_steps=50.")
        return
    try:
        value = _yaml(text)
    except yaml.YAMLError:
        problems.append(f"--set {override}: the value is not valid YAML. Quote it if it is text.")
        return
    node = raw
    for depth, part in enumerate(path[:-1]):
        # `--set deepspeed.hift.seed=1` works on a section that is given as a file too.
        if depth == 0 and part == "deepspeed" and isinstance(node.get(part), str):
            node[part] = _read_deepspeed_file(node[part], problems)
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            problems.append(f"--set {override}: {'.'.join(path[: depth + 1])} is {node[part]!r}, not a section.")
            return
        node = node[part]
    node[path[-1]] = value


def _read_deepspeed_file(name: str, problems: list[str]) -> dict:
    path = Path(name)
    if not path.exists() and (PACKAGE / name).exists():
        path = PACKAGE / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        shipped = sorted(str(p.relative_to(PACKAGE)) for p in (PACKAGE / "configs" / "deepspeed").glob("*.json"))
        problems.append(
            f"deepspeed: {name!r} cannot be read ({error.strerror}). Expected the path of a DeepSpeed "
            f"JSON file or the section itself. {expected(name, shipped)}"
        )
        return {}
    except ValueError as error:
        problems.append(f"deepspeed: {name!r} is not valid JSON: {error}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"deepspeed: {name!r} holds a {type(content).__name__}, expected a JSON object.")
        return {}
    return content


# ---- checking one section --------------------------------------------------------------------------------------------


def build(kind: Any, given: Mapping, where: str, problems: list[str]) -> Any:
    """An instance of the dataclass `kind` from a mapping; a value that is wrong is reported and its default used."""
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    values = {}
    for key, value in given.items():
        if key not in known:
            problems.append(f"{where}.{key}: unknown key. {expected(key, known)}")
            continue
        fits, value = _fit(value, hints[key])
        if not fits:
            problems.append(f"{where}.{key}: got {value!r}, expected {_type_name(hints[key])}.")
            continue
        fault = _outside(value, known[key].metadata)
        if fault:
            problems.append(f"{where}.{key}: got {value!r}. {fault}")
            continue
        values[key] = value
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            if name not in given:
                problems.append(f"{where}.{name}: not set. Expected {_type_name(hints[name])}.")
            values[name] = None
    return kind(**values)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` is of the type `hint`; whole numbers become floats where a float is asked for."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for option in typing.get_args(hint):
            fits, fitted = _fit(value, option)
            if fits:
                return True, fitted
        return False, value
    base = typing.get_origin(hint) or hint
    if base is Any:
        return True, value
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if base is tuple and isinstance(value, list):
        return True, tuple(value)
    if base is Mapping or base is dict:
        return isinstance(value, dict), value
    if base is int and isinstance(value, bool):
        return False, value
    return isinstance(value, base), value


def _type_name(hint: Any) -> str:
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict: "a mapping",
        list: "a list",
        tuple: "a list",
        type(None): "null",
    }
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    base = typing.get_origin(hint) or hint
    return names.get(base, getattr(base, "__name__", str(base)))


def _outside(value: Any, limits: Mapping) -> str | None:
    if value is None:
        return None
    if "choices" in limits and value not in limits["choices"]:
        return expected(str(value), limits["choices"])
    if isinstance(value, float) and value != value:
        return "Expected a number."
    if "at_least" in limits and value < limits["at_least"]:
        return f"Expected at least {limits['at_least']}."
    if "above" in limits and value <= limits["above"]:
        return f"Expected more than {limits['above']}."
    if "at_most" in limits and value > limits["at_most"]:
        return f"Expected at most {limits['at_most']}."
    return None


def expected(found: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    return f"Expected one of: {', '.join(allowed)}{nearest(found, allowed)}"


# ---- checks across keys ----------------------------------------------------------------------------------------------


def looks_like_path(name: str) -> bool:
    """Whether a model or tokenizer name means a file or folder on this machine and not a Hub id."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or Path(name).exists()


def model_problems(model: ModelSettings) -> list[str]:
    """Every mistake that shows before anything is loaded: a line each, with key, value and remedy."""
    problems = []
    if (model.name_or_path is None) == (model.config is None):
        problems.append(
            f"model: name_or_path is {model.name_or_path!r} and config is {model.config!r}; expected exactly "
            f"one of them: a Hub id, folder or .gguf file to start from, or a config to train from scratch."
        )
    if model.name_or_path is not None and looks_like_path(model.name_or_path):
        path = Path(model.name_or_path).expanduser()
        if not path.exists():
            problems.append(
                f"model.name_or_path: {model.name_or_path!r} does not exist. Expected a Hub id, a folder "
                f"with config.json, or a .gguf file."
            )
        elif path.is_dir() and not (path / "config.json").exists():
            inside = sorted(p.name for p in path.glob("*.gguf"))
            remedy = f"Name the file: {path / inside[0]}." if inside else "Expected a Hugging Face model folder."
            problems.append(f"model.name_or_path: the folder {model.name_or_path!r} has no config.json. {remedy}")
        elif path.is_file() and path.suffix != ".gguf":
            problems.append(
                f"model.name_or_path: {model.name_or_path!r} is a file but not a .gguf file. Expected a Hub "
                f"id, a folder with config.json, or a .gguf file."
            )
    if model.revision is not None and (model.name_or_path is None or looks_like_path(model.name_or_path)):
        problems.append(f"model.revision: {model.revision!r} is for models from the Hub; remove it.")
    if model.tokenizer not in (None, "byte") and looks_like_path(model.tokenizer):
        if not Path(model.tokenizer).expanduser().exists():
            problems.append(
                f"model.tokenizer: {model.tokenizer!r} does not exist. Expected a Hub id, a folder, a .gguf "
                f'file, or "byte" for the built-in tokenizer.'
            )
    if model.config is not None:
        if "model_type" not in model.config:
            problems.append("model.config.model_type: not set. Expected an architecture of transformers, e.g. llama.")
        else:
            problems += loading.config_problems(model.config)
        if model.tokenizer is None:
            problems.append(
                'model.tokenizer: not set, but model.config has no tokenizer beside it. Expected "byte" for '
                "the built-in tokenizer, a Hub id or a folder."
            )
    if isinstance(model.gradient_checkpointing, str) and model.gradient_checkpointing != "cpu":
        problems.append(
            f'model.gradient_checkpointing: got {model.gradient_checkpointing!r}, expected true, false or "cpu" (what '
            "each layer keeps for backward waits in host memory)."
        )
    if model.num_labels is not None and model.task != "sequence-classification":
        problems.append(
            f"model.num_labels: got {model.num_labels}, but model.task is {model.task!r}. Remove it, or set "
            f"model.task=sequence-classification."
        )
    return problems


def _complete_deepspeed(sections: dict, raw: Mapping, world_size: int, problems: list[str]) -> dict:
    """The deepspeed section with what `training` and `method` decide filled in, checked by DeepSpeed's own parser."""
    found = len(problems)
    training, method = sections["training"], sections["method"]
    section = copy.deepcopy(sections["deepspeed"])
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
            f"training.micro_batch_size {micro} cannot cut evenly. Expected a multiple of {window}, e.g. "
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

    if section.get("scheduler") and "lr_schedule" in (raw.get("training") or {}):
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
    if len(problems) == found:
        problems += _deepspeed_problems(section)
    return section


def _agree(section: dict, path: tuple[str, ...], name: str, value: Any, problems: list[str]) -> None:
    """Fill one key of the deepspeed section from `training`, or report that the two disagree."""
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
            f"remove the deepspeed key, or set both alike."
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()  # optimizer names: DeepSpeed ignores their case
    return one == other


def _hift_problems(section: dict) -> list[str]:
    """Problems of the hift section and of its combination with the others."""
    from hift_ds import config

    found = config.problems(section)
    if not section["hift"].get("enabled") and section.get("fp16", {}).get("enabled"):
        if section.get("zero_optimization", {}).get("stage", 0) == 0:
            found.append(
                "fp16.enabled=true with zero_optimization.stage=0: DeepSpeed divides by a loss scale there that it "
                "never applied; use bf16, or stage 1, 2 or 3"
            )
    return [f"deepspeed.{problem}" for problem in found]


def _deepspeed_problems(section: dict) -> list[str]:
    """What DeepSpeed's own parser has against the section; it is asked before anything is loaded."""
    from deepspeed import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    candidate = {key: value for key, value in section.items() if key not in ("hift", "train_batch_size")}
    try:
        DeepSpeedConfig(copy.deepcopy(candidate))
    except ValidationError as error:
        return [
            f"deepspeed ({error.title}) {'.'.join(map(str, fault['loc']))}: got {fault['input']!r}: {fault['msg']}."
            for fault in error.errors()
        ]
    except (DeepSpeedConfigError, ValueError, AssertionError, KeyError, TypeError) as error:
        return [f"deepspeed: {error}"]
    return []
