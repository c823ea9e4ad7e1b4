"""The `model` section of a run and its checks. Only `config_problems` imports transformers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hift_ds import paths
from hift_ds.launch.errors import nearest

TASKS = ("causal-lm", "sequence-classification")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class ModelSettings:
    """The `model` section. Limits in `metadata` are checked by `hift_ds.launch.config.checking.build`."""

    name_or_path: str | None = None  # Hub id, local folder or .gguf file
    config: dict | None = None  # {model_type: ..., ...}: a model from scratch
    tokenizer: str | None = None  # null: the model's own; "byte": the built-in one
    task: str = field(default="causal-lm", metadata={"choices": TASKS})
    num_labels: int | None = field(default=None, metadata={"at_least": 2})
    revision: str | None = None  # on the Hub: branch, tag or commit; of a `tokenizer`: OWNER/NAME@REVISION
    trust_remote_code: bool = False  # true: run Python code that comes with the model
    gradient_checkpointing: bool | str = False  # "cpu": what each layer keeps for backward waits in host memory
    attention: str | None = field(default=None, metadata={"choices": ATTENTIONS})

    def describe(self) -> str:
        """Return a short name of the model, for summaries."""
        if self.config is not None:
            return f"{self.config['model_type']} from scratch"
        return str(self.name_or_path)

    def problems(self) -> list[str]:
        """Return every problem that can be found before anything is loaded, one line each."""
        found = []
        if (self.name_or_path is None) == (self.config is None):
            found.append(
                f"model: name_or_path is {self.name_or_path!r} and config is {self.config!r}; expected exactly "
                f"one of them: a Hub id, folder or .gguf file to start from, or a config to train from scratch."
            )
        found += self._path_problems()
        if self.revision is not None and (self.name_or_path is None or looks_like_path(self.name_or_path)):
            found.append(f"model.revision: {self.revision!r} is for models from the Hub; remove it.")
        if self.tokenizer is not None and (reason := _name_fault(self.tokenizer)):
            found.append(f"model.tokenizer: {reason}.")
        elif self.tokenizer not in (None, "byte") and looks_like_path(self.tokenizer):
            if not Path(self.tokenizer).expanduser().exists():
                found.append(
                    f"model.tokenizer: {self.tokenizer!r} does not exist. Expected a Hub id, a folder, a .gguf "
                    f'file, or "byte" for the built-in tokenizer.'
                )
        if self.config is not None:
            if not isinstance(self.config.get("model_type"), str):
                found.append("model.config.model_type: no name. Expected an architecture of transformers, e.g. llama.")
            if self.tokenizer is None:
                found.append(
                    "model.tokenizer: not set, and a model.config comes without a tokenizer. Expected "
                    '"byte" for the built-in tokenizer, a Hub id or a folder.'
                )
        if isinstance(self.gradient_checkpointing, str) and self.gradient_checkpointing != "cpu":
            found.append(
                f"model.gradient_checkpointing: got {self.gradient_checkpointing!r}, expected true, false or "
                '"cpu" (what each layer keeps for backward waits in host memory).'
            )
        if self.num_labels is not None and self.task != "sequence-classification":
            found.append(
                f"model.num_labels: got {self.num_labels}, but model.task is {self.task!r}. Remove it, or set "
                f"model.task=sequence-classification."
            )
        return found

    def _path_problems(self) -> list[str]:
        name = self.name_or_path
        if name is not None and (reason := _name_fault(name)):
            return [f"model.name_or_path: {reason}."]
        if name is None or not looks_like_path(name):
            return []
        path = Path(name).expanduser()
        if not path.exists():
            return [
                f"model.name_or_path: {name!r} does not exist. Expected a Hub id, a folder with config.json, or a "
                ".gguf file."
            ]
        if (path / "adapter_config.json").exists():
            auto = "SequenceClassification" if self.task == "sequence-classification" else "CausalLM"
            return [
                f"model.name_or_path: {name!r} holds a PEFT adapter, which cannot be trained further. Merge it into "
                f"its model in Python: peft.AutoPeftModelFor{auto}.from_pretrained({name!r}).merge_and_unload()"
                ".save_pretrained(NEW); save the tokenizer there too, and set model.name_or_path=NEW."
            ]
        if path.is_dir() and not (path / "config.json").exists():
            return [f"model.name_or_path: the folder {name!r} has no config.json. {_instead(path)}"]
        if path.is_file() and path.suffix != ".gguf":
            return [
                f"model.name_or_path: {name!r} is a file but not a .gguf file. Expected a Hub id, a folder with "
                "config.json, or a .gguf file."
            ]
        return []


def _instead(folder: Path) -> str:
    """Return what to do about a folder that is no model: a sentence."""
    inside = sorted([*folder.glob("*.gguf"), *folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if inside:
        return f"Name {inside[0] if inside[0].suffix == '.gguf' else inside[0].parent}."
    if (folder / "zero_to_fp32.py").exists():
        return (
            "It is a checkpoint of DeepSpeed. Convert it with its zero_to_fp32.py, and put the model's config.json "
            "and tokenizer beside the result."
        )
    return "Expected a Hugging Face model folder."


def looks_like_path(name: str) -> bool:
    """Return whether a model or tokenizer name means a file or folder on this machine and not a Hub id."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or os.path.exists(name)


def _name_fault(name: str) -> str | None:
    """Return why a name cannot be a path. A Hub id, OWNER/NAME, is not judged as one."""
    return paths.fault(name, reads=True) if looks_like_path(name) or "/" not in name else None


def config_problems(given: dict[str, Any]) -> list[str]:
    """Check a `model.config` with transformers, and return every problem, one line each.

    The configuration classes of transformers would silently keep an unknown key.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, AutoConfig  # imports torch

    rest = dict(given)
    name = rest.pop("model_type")
    if name not in CONFIG_MAPPING_NAMES:
        hint = nearest(str(name), CONFIG_MAPPING_NAMES)
        return [f"model.config.model_type: got {name!r}. Expected an architecture of transformers, e.g. llama{hint}"]
    default = AutoConfig.for_model(name)
    found = []
    for key in rest:
        if not hasattr(default, key):
            hint = nearest(key, vars(default))
            found.append(f"model.config.{key}: not a key of {type(default).__name__}, remove it{hint}")
    if not found:
        try:
            AutoConfig.for_model(name, **rest)
        except Exception as error:  # transformers checks types and values with exceptions of several libraries
            found.append(f"model.config: {' '.join(str(error).split())}")
    return found
