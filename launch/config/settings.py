"""The settings of a training run: one YAML file, one dataclass for each section.

`load_settings` returns settings that agree with each other, or raises one `UserError` that lists all problems, each
with the key, the value found, what was expected and a remedy. It loads no weights, writes no file, and imports neither
torch nor transformers nor DeepSpeed. These libraries check their sections in a second stage (`library_checks.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hift_ds import paths
from hift_ds.launch.config import deepspeed_section
from hift_ds.launch.config.checking import build, not_storable, problem_list, setting
from hift_ds.launch.config.reading import read_yaml, source
from hift_ds.launch.data.settings import DataSettings
from hift_ds.launch.errors import UserError, expected, shown
from hift_ds.launch.methods.lr_schedules import SCHEDULES
from hift_ds.launch.methods.settings import MethodSettings
from hift_ds.launch.methods.table import METHODS, TRAINED
from hift_ds.launch.model.settings import ModelSettings

MAX_SHARD_SIZE = "50GB"  # transformers' default
_SHARD_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingSettings:
    """The `training` section."""

    max_steps: int = setting(100, at_least=1, null_is_default=True)  # optimizer steps; HiFT trains one block in each
    epochs: float | None = setting(None, above=0)  # passes over the training data, in place of max_steps
    batch_size: int = setting(16, at_least=1)  # examples a step, over all ranks and micro-batches
    micro_batch_size: int | None = setting(None, at_least=1)  # examples a forward pass, on one rank, at most
    # "auto": HiFT's, from the next key and the number of blocks (launch/learning_rates.py).
    learning_rate: float | Literal["auto"] | None = setting(None, above=0, at_most=1e30)
    full_learning_rate: float | None = setting(None, above=0, at_most=1e30)  # of full fine-tuning with as many steps
    lr_schedule: str = setting("constant", choices=tuple(SCHEDULES))
    warmup_ratio: float = setting(0.0, at_least=0, at_most=1)  # of the schedule's ticks (under HiFT: cycles)
    weight_decay: float | None = setting(None, at_least=0)
    max_grad_norm: float | None = setting(None, at_least=0)  # 0 = no clipping
    optimizer: str | None = None
    max_skipped_steps: int = setting(5, at_least=0)  # in a row, for what is not finite; one more stops the run
    loss_chunk: int | None = setting(None, at_least=0)  # tokens whose logits exist at a time; null: by size; 0: all
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    deterministic: bool = False  # true: the same bits again on the same machine, at the price of slower kernels
    save_every: int | None = setting(None, at_least=1)  # steps; null = no checkpoints
    keep_last: int | None = setting(2, at_least=1)  # checkpoints; older ones are deleted; null = all are kept
    keep_every: int | None = setting(None, at_least=1)  # steps; checkpoints at multiples of it are kept, too
    # Seconds without progress after which a rank counts as lost; at most a year.
    rank_timeout: float = setting(1800.0, at_least=1, at_most=31_536_000)
    eval_every: int | None = setting(None, at_least=1)  # steps between two held-out evaluations; null = none
    keep_best: bool = False  # true: the best of these evaluations' checkpoints is kept, and its model is exported
    eval_batch_size: int | None = setting(None, at_least=1)  # examples a rank; default: micro_batch_size
    max_new_tokens: int = setting(64, at_least=1)  # generated for a held-out answer


@dataclass(frozen=True)
class OutputSettings:
    """The `output` section."""

    dir: str | None = None
    overwrite: bool = False  # true: an earlier run's files in `dir` are deleted first
    export: bool = True  # false: OUT/model is not written
    max_shard_size: int | str = MAX_SHARD_SIZE  # of a file of weights in OUT/model, in bytes or as "5GB"


@dataclass(frozen=True)
class LoggingSettings:
    """The `logging` section."""

    every: int = setting(10, at_least=1)  # steps between two lines where the terminal is not interactive
    verbose: bool = False  # true: DeepSpeed's and transformers' own messages too
    wandb: str = setting("off", choices=("off", "online", "offline"))
    wandb_project: str = "hift"
    wandb_name: str | None = None


@dataclass(frozen=True)
class Settings:
    """All sections of a run, checked and complete."""

    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    training: TrainingSettings
    deepspeed: dict  # complete (see deepspeed_section.py)
    output: OutputSettings
    logging: LoggingSettings
    notes: tuple[str, ...] = ()  # what each "auto" of the deepspeed section stands for

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def dtype(self) -> str:
        """The dtype of the weights during training: "bfloat16", "float16" or "float32"."""
        for key, name in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
            if self.deepspeed.get(key, {}).get("enabled", False):
                return name
        return "float32"

    @property
    def micro_batch_size(self) -> int:
        """Examples of one forward pass on one rank."""
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step on one rank."""
        return self.deepspeed["gradient_accumulation_steps"]

    def with_steps(self, n_examples: int) -> Settings:
        """Return the settings with `training.max_steps` for `training.epochs` over so many examples, if it is set.

        Steps are whole batches: the last step of the last epoch may contain examples of the next one.
        """
        if self.training.epochs is None:
            return self
        steps = math.ceil(round(self.training.epochs * n_examples / self.training.batch_size, 6))
        return replace(self, training=replace(self.training, max_steps=max(1, steps)))

    def for_model(self, config: Any, ticks: int) -> Settings:
        """Return the settings with a value for each "auto" of the deepspeed section that is still open.

        Args:
            config: the model's transformers configuration.
            ticks: how often the learning-rate schedule advances.

        Raises:
            UserError: the model has no width to compute a value from.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        sizes = [getattr(text, "hidden_size", None), *(getattr(text, "hidden_sizes", None) or ())]
        size = max((one for one in sizes if isinstance(one, int)), default=None)
        filled = deepspeed_section.fill_in(self.deepspeed, self.training, size, ticks)
        notes = deepspeed_section.differences(self.deepspeed, filled)
        return replace(self, deepspeed=filled, notes=(*self.notes, *notes))

    def as_dict(self) -> dict:
        """Return the sections as nested dictionaries, for records."""
        return {key: value for key, value in asdict(self).items() if key in SECTIONS}


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
    """Read the YAML at `path`, apply the overrides and check everything that needs no heavy library.

    Args:
        path: the YAML file.
        overrides: the `--set` values, `a.b.c=value` with the value in YAML.
        world_size: number of ranks; it decides the number of accumulation steps.

    Raises:
        UserError: with every problem found, one line each.
    """
    raw, problems = read_yaml(path, overrides, tuple(SECTIONS))
    settings = check_settings(raw, world_size, problems)
    if settings is None:
        raise UserError(problem_list(source(path, overrides), problems))
    return settings


def check_settings(raw: Mapping[str, Any], world_size: int, problems: list[str]) -> Settings | None:
    """Return the settings for the sections of a YAML file, or None after appending what is wrong to `problems`."""
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

    problems += sections["model"].problems()
    if sections["training"].loss_chunk is not None and sections["model"].task != "causal-lm":
        problems.append(
            f"training.loss_chunk: got {sections['training'].loss_chunk}, but model.task is "
            f"{sections['model'].task!r}, which has few logits. Remove it."
        )
    problems += _training_problems(sections["training"], sections["method"], sections["data"], raw.get("training"))
    problems += _rate_problems(sections["training"], sections["method"], sections["deepspeed"])
    problems += sections["data"].problems()
    fp16 = sections["deepspeed"].get("fp16")
    is_fp16 = isinstance(fp16, Mapping) and bool(fp16.get("enabled"))
    problems += sections["method"].problems(sections["training"].save_every, is_fp16)
    problems += output_problems(sections["output"].dir, "runs/first")
    problems += _shard_problems(sections["output"].max_shard_size)
    notes: list[str] = []
    sections["deepspeed"] = deepspeed_section.complete(
        sections["deepspeed"],
        sections["training"],
        sections["method"],
        world_size,
        has_lr_schedule=isinstance(raw.get("training"), Mapping) and "lr_schedule" in raw["training"],
        problems=problems,
        notes=notes,
    )
    told = tuple(problem.partition(": ")[0] for problem in problems)
    problems += [text for text in not_storable(dict(raw)) if text.partition(": ")[0] not in told]
    return None if problems else Settings(**sections, notes=tuple(notes))


def output_problems(folder: str | None, example: str) -> list[str]:
    """Return the problem of `output.dir`, of a run or of a comparison."""
    if not folder:
        return [f"output.dir: not set. Expected a folder for the files to write, e.g. output.dir={example}."]
    reason = paths.fault(folder, inside=paths.INSIDE)
    if reason is None and Path(folder).expanduser().is_file():
        reason = f"{folder!r} is a file; expected a folder, or a name that is free"
    return [f"output.dir: {reason}."] if reason else []


def _shard_problems(size: int | str) -> list[str]:
    """Return the problem of `output.max_shard_size`, which transformers would find when the training is done."""
    if isinstance(size, int):
        fits = size > 0
    else:
        found = _SHARD_SIZE.fullmatch(size.strip())
        fits = found is not None and float(found[1]) >= 1
    if fits:
        return []
    return [
        f"output.max_shard_size: got {size!r}, expected a number of bytes, or at least 1 with the unit KB, MB, GB or "
        f"TB, such as {MAX_SHARD_SIZE}."
    ]


def _rate_problems(training: TrainingSettings, method: MethodSettings, section: Mapping[str, Any]) -> list[str]:
    """Return the problems of `training.learning_rate: auto` and `training.full_learning_rate`.

    Args:
        section: the deepspeed section as it is in the YAML.
    """
    rate, of_full = training.learning_rate, training.full_learning_rate
    if rate != "auto":
        if of_full is None:
            return []
        return [
            f"training.full_learning_rate: got {of_full!r}, but training.learning_rate is {shown(rate)}, so it has no "
            "effect. Set training.learning_rate=auto, or remove it (training.full_learning_rate=null)."
        ]
    problems = []
    if method.name in METHODS and not METHODS[method.name].block_wise:
        problems.append(
            f"training.learning_rate: got 'auto', which is HiFT's, but method.name is {method.name!r}. Set a number, "
            "e.g. training.learning_rate=1e-4, or method.name=hift."
        )
    if of_full is None:
        problems.append(
            "training.full_learning_rate: not set, but training.learning_rate is 'auto'. Expected the rate that you "
            "would use for full fine-tuning with as many steps, e.g. training.full_learning_rate=2e-5."
        )
    optimizer = section.get("optimizer")
    given = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    name = training.optimizer or (given if isinstance(given, str) and given != "auto" else "AdamW")
    if name.lower() not in ("adam", "adamw"):
        problems.append(
            f"training.learning_rate: got 'auto', which is for Adam and AdamW, but the optimizer is {name}. Set a "
            "number, or training.optimizer=AdamW."
        )
    if section.get("scheduler"):
        problems.append(
            "training.learning_rate: got 'auto', but deepspeed.scheduler has rates of its own. Use "
            "training.lr_schedule instead (deepspeed.scheduler=null), or set a number."
        )
    return problems


def _training_problems(training: TrainingSettings, method: MethodSettings, data: DataSettings, given: Any) -> list[str]:
    """Return the problems of the training section's keys with each other, the method and the data.

    Args:
        given: the section as it is in the YAML.
    """
    problems = []
    if training.epochs is not None and isinstance(given, Mapping) and given.get("max_steps") is not None:
        problems.append(
            f"training.epochs: got {training.epochs:g}, and training.max_steps is {training.max_steps}. Expected one "
            "of them; remove the other, e.g. by --set training.max_steps=null."
        )
    if data.streaming and training.epochs is not None:
        problems.append(
            f"training.epochs: got {training.epochs:g}, but the rows of a stream are not counted (data.streaming). Set "
            "training.max_steps instead."
        )
    elif data.streaming and (not isinstance(given, Mapping) or given.get("max_steps") is None):
        problems.append(
            "training.max_steps: not set, but data.streaming is true, and a stream has no end. Expected the number of "
            "steps."
        )
    if training.eval_every and data.eval_examples == 0:
        problems.append(
            f"training.eval_every: got {training.eval_every}, but data.eval_examples is 0, so nothing is held out. "
            "Remove one of them."
        )
    if training.keep_best and not training.eval_every:
        problems.append(
            "training.keep_best: true, but training.eval_every is not set, so there is nothing to compare. Set "
            "training.eval_every to the number of steps between two evaluations."
        )
    if training.keep_best and method.name in TRAINED and not TRAINED[method.name].resumable:
        problems.append(
            f"training.keep_best: true, but {method.name}'s package cannot save all of its state, so it has no "
            "checkpoints. Set training.keep_best=false."
        )
    return problems
