"""What can be asked of the planner: the choices of a run, and the models, on the meta device without weights.

``PRESETS`` holds the shapes of well-known ones, so that nothing has to be downloaded. LLaMA without a generation is the
first one, but ``llama-70b``, which only Llama 2 has. RoBERTa has the paper's head, a classifier of two labels.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds.config import MIN_BUFFER, ConfigError, OffloadConfig
from hift_ds.config import problems as config_problems
from hift_ds.planner.accounting import FP32, FUSED, MOMENTS

TASKS = ("causal-lm", "sequence-classification")
METHODS = ("hift", "full", "lora", "mezo")
PRECISIONS = ("fp32", "mixed", "mixed-hi")
OPTIMIZERS = (*MOMENTS, "adafactor")
LAYOUTS = ("engine", "paper")


def _roberta(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 4 * hidden, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "architectures": ["RobertaForSequenceClassification"],
    }  # fmt: skip


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "tie_word_embeddings": True}


def _gpt_neo(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neo", "hidden_size": hidden, "num_layers": layers, "num_heads": heads,
        "attention_types": [[["global", "local"], layers // 2]], "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }  # fmt: skip


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "tie_word_embeddings": True,
    }  # fmt: skip


def _decoder(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    positions: int, tied: bool = False, head: int | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """LLaMA and its relatives."""
    mapping = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": positions, "tie_word_embeddings": tied,
    }  # fmt: skip
    return mapping | ({} if head is None else {"head_dim": head}) | more


_L1, _L2, _L3 = (32000, 2048), (32000, 4096), (128256, 8192)
_Q, _QT = (152064, 32768), (151936, 32768, True)  # Qwen's larger models have a head of their own
_Q3, _Q3T = (151936, 40960, False, 128), (151936, 40960, True, 128)
_LLAMA_7B = ("llama", 4096, 11008, 32, 32, 32)
_LLAMA_13B = ("llama", 5120, 13824, 40, 40, 40)
_LLAMA2_70B = _decoder("llama", 8192, 28672, 80, 64, 8, *_L2)
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}

# name -> mapping for transformers.AutoConfig.for_model
PRESETS: dict[str, dict[str, Any]] = {
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt-neo-125m": _gpt_neo(768, 12, 12),
    "gpt-neo-1.3b": _gpt_neo(2048, 24, 16),
    "gpt-neo-2.7b": _gpt_neo(2560, 32, 20),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "llama-7b": _decoder(*_LLAMA_7B, *_L1),
    "llama-13b": _decoder(*_LLAMA_13B, *_L1),
    "llama-33b": _decoder("llama", 6656, 17920, 60, 52, 52, *_L1),
    "llama-65b": _decoder("llama", 8192, 22016, 80, 64, 64, *_L1),
    "llama-70b": _LLAMA2_70B,
    "llama-2-7b": _decoder(*_LLAMA_7B, *_L2),
    "llama-2-13b": _decoder(*_LLAMA_13B, *_L2),
    "llama-2-70b": _LLAMA2_70B,
    "llama-3-8b": _decoder("llama", 4096, 14336, 32, 32, 8, *_L3),
    "llama-3-70b": _decoder("llama", 8192, 28672, 80, 64, 8, *_L3),
    "llama-3.2-1b": _decoder("llama", 2048, 8192, 16, 32, 8, 128256, 131072, True, 64),
    "llama-3.2-3b": _decoder("llama", 3072, 8192, 28, 24, 8, 128256, 131072, True, 128),
    "smollm2-135m": _decoder("llama", 576, 1536, 30, 9, 3, 49152, 8192, True),
    "smollm2-360m": _decoder("llama", 960, 2560, 32, 15, 5, 49152, 8192, True),
    "smollm2-1.7b": _decoder("llama", 2048, 8192, 24, 32, 32, 49152, 8192, True),
    "mistral-7b": _decoder("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=None),
    "qwen2.5-0.5b": _decoder("qwen2", 896, 4864, 24, 14, 2, *_QT),
    "qwen2.5-1.5b": _decoder("qwen2", 1536, 8960, 28, 12, 2, *_QT),
    "qwen2.5-3b": _decoder("qwen2", 2048, 11008, 36, 16, 2, *_QT),
    "qwen2.5-7b": _decoder("qwen2", 3584, 18944, 28, 28, 4, *_Q),
    "qwen2.5-14b": _decoder("qwen2", 5120, 13824, 48, 40, 8, *_Q),
    "qwen2.5-32b": _decoder("qwen2", 5120, 27648, 64, 40, 8, *_Q),
    "qwen2.5-72b": _decoder("qwen2", 8192, 29568, 80, 64, 8, *_Q),
    "qwen3-0.6b": _decoder("qwen3", 1024, 3072, 28, 16, 8, *_Q3T),
    "qwen3-1.7b": _decoder("qwen3", 2048, 6144, 28, 16, 8, *_Q3T),
    "qwen3-4b": _decoder("qwen3", 2560, 9728, 36, 32, 8, *_Q3T),
    "qwen3-8b": _decoder("qwen3", 4096, 12288, 36, 32, 8, *_Q3),
    "qwen3-14b": _decoder("qwen3", 5120, 17408, 40, 40, 8, *_Q3),
    "qwen3-32b": _decoder("qwen3", 5120, 25600, 64, 64, 8, *_Q3),
    "gemma-2b": _decoder("gemma", 2048, 16384, 18, 8, 1, 256000, 8192, True, 256, **_GEMMA),
    "gemma-7b": _decoder("gemma", 3072, 24576, 28, 16, 16, 256000, 8192, True, 256, **_GEMMA),
    "gemma-2-2b": _decoder("gemma2", 2304, 9216, 26, 8, 4, 256000, 8192, True, 256, **_GEMMA),
    "gemma-2-9b": _decoder("gemma2", 3584, 14336, 42, 16, 8, 256000, 8192, True, 256, **_GEMMA),
    "gemma-2-27b": _decoder("gemma2", 4608, 36864, 46, 32, 16, 256000, 8192, True, 128, **_GEMMA),
    "gemma-3-270m": _decoder("gemma3_text", 640, 2048, 18, 4, 1, 262144, 32768, True, 256, sliding_window=512),
    "gemma-3-1b": _decoder("gemma3_text", 1152, 6912, 26, 4, 1, 262144, 32768, True, 256, sliding_window=512),
}


# --- the choices -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What to plan. The fields are :func:`plan_memory`'s arguments."""

    model: Any
    method: str = "hift"
    precision: str = "mixed-hi"
    optimizer: str = "adamw"
    batch_size: int = 1
    seq_len: int = 512
    layers_per_block: int = 1
    max_block_numel: int | None = None
    balance: bool = False
    zero_stage: int | None = None
    ranks: int = 1
    offload_device: str = OffloadConfig.device
    offload_step: str = OffloadConfig.step
    buffer_size: int = OffloadConfig.buffer_size
    nvme_path: str | None = None
    offload_optimizer: str = "none"
    activation_checkpointing: bool = False
    checkpoint_offload: bool = False
    loss_chunk: int | None = None
    gradient_accumulation_steps: int = 1
    layout: str = "engine"
    accelerator: str = "gpu"
    attention: str | None = None
    task: str | None = None
    lora_rank: int = 8

    @property
    def name(self) -> str:
        """Of the model, for people."""
        return str(self.model if isinstance(self.model, (str, Path)) else getattr(self.model, "model_type", "model"))

    @property
    def stage(self) -> int:
        if self.zero_stage is not None:
            return self.zero_stage
        return 0 if self.optimizer == "adafactor" else 2

    @property
    def weight(self) -> int:
        """Bytes of an element of the weights that compute."""
        return FP32 if self.precision == "fp32" else 2

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self.activation_checkpointing or self.checkpoint_offload

    @property
    def placement(self) -> str:
        """Where masters and optimizer state are for the step, as in :class:`hift_ds.planner.accounting.Setup`."""
        if self.offload_optimizer == "cpu":
            return "host"
        if self.method != "hift" or self.precision == "mixed" or self.offload_device == "none":
            return "resident"
        if self.offload_step != "auto":
            return self.offload_step
        return "block" if self.optimizer == "adafactor" else "streamed"

    def problems(self) -> list[str]:
        found = []
        choices: dict[str, Sequence[Any]] = {
            "method": METHODS,
            "precision": PRECISIONS,
            "optimizer": OPTIMIZERS,
            "offload_device": ("cpu", "nvme", "none"),
            "offload_step": ("auto", "block", "streamed"),
            "offload_optimizer": ("none", "cpu"),
            "layout": LAYOUTS,
            "accelerator": ("gpu", "cpu"),
            "attention": (None, "sdpa", "eager"),
            "task": (None, *TASKS),
            "zero_stage": (None, 0, 1, 2, 3),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool):
                shown = [str(choice) for choice in allowed if choice is not None]
                near = difflib.get_close_matches(str(value), shown, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                found.append(f"{_option(name)}={value!r}: expected one of {', '.join(shown)}{hint}")
        for name in ("batch_size", "seq_len", "layers_per_block", "ranks", "gradient_accumulation_steps", "lora_rank"):
            value = getattr(self, name)
            if not _is_count(value):
                found.append(f"{_option(name)}={value!r}: expected an integer of at least 1")
        if self.max_block_numel is not None and (not _is_count(self.max_block_numel)):
            found.append(f"--max-block-numel={self.max_block_numel!r}: expected an integer of at least 1")
        if not isinstance(self.buffer_size, int) or self.buffer_size < MIN_BUFFER:
            found.append(f"--buffer-size={self.buffer_size!r}: expected bytes, an integer of at least {MIN_BUFFER}")
        chunk = self.loss_chunk
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 0):
            found.append(f"--loss-chunk={chunk!r}: expected tokens, an integer of at least 0, where 0 is all of them")
        return found or self._conflicts()

    def _conflicts(self) -> list[str]:
        found = []
        moved = [
            f"{_option(name)}={getattr(self, name)}"
            for name in ("offload_device", "offload_step", "offload_optimizer")
            if getattr(self, name) != getattr(Request, name)
        ]
        if self.layout == "paper":
            if self.ranks > 1:
                found.append(f"--ranks={self.ranks}: the paper counts one device; use --layout engine, or --ranks 1")
            if moved and self.offload_step != "block":
                found.append(
                    f"{', '.join(moved)}: the paper has the active block's whole state on the device and the others' "
                    "in host memory; leave it out, or use --layout engine"
                )
            return found
        if self.optimizer == "adafactor" and self.stage > 0:
            found.append(
                f"--optimizer=adafactor with --zero-stage={self.stage}: it uses a weight's shape, and ZeRO flattens "
                "weights; use --zero-stage 0 or another optimizer"
            )
        if self.offload_optimizer == "cpu" and self.stage == 0 and self.method != "mezo":
            found.append(
                "--offload-optimizer=cpu with --zero-stage=0: DeepSpeed has no host step there; use stage 1 to 3"
            )
        if self.offload_optimizer == "cpu" and len(moved) > 1:
            found.append(f"{', '.join(moved)}: with the step on the host, state stays there; leave the others out")
        elif self.method != "hift" and moved and self.offload_optimizer == "none":
            found.append(f"{', '.join(moved)} with --method={self.method}: only hift has blocks to move; leave it out")
        elif self.offload_device == "none" and self.offload_step != "auto":
            found.append(
                f"--offload-step={self.offload_step} with --offload-device=none: state that stays on the device does "
                "not come to it; leave one of them out"
            )
        elif self.offload_step == "streamed" and self.optimizer == "adafactor":
            found.append("--offload-step=streamed with --optimizer=adafactor: it is not element-wise; use block")
        if self.method != "hift" and (self.max_block_numel or self.balance):
            found.append(
                f"--max-block-numel={self.max_block_numel}, --balance={self.balance} with --method={self.method}: only "
                "hift has blocks; leave them out"
            )
        if self.nvme_path is not None and self.offload_device != "nvme":
            found.append(f"--nvme-path={self.nvme_path}: only --offload-device nvme has files; leave it out")
        return found

    def notes(self, task: str) -> list[str]:
        """What a reader has to know about the plan."""
        notes = []
        if self.layout == "paper":
            return ["the paper's accounting, of the block with most parameters; activations as simulated here"]
        if self.method == "hift" and self.precision == "mixed":
            notes.append("mixed keeps the masters of all blocks on the device; the engine does mixed-hi")
        if self.method == "mezo":
            notes.append("MeZO has neither gradients nor optimizer state: what concerns them has no effect")
        elif self.accelerator == "gpu" and self.optimizer in FUSED and self.placement != "host":
            notes.append("stepped by DeepSpeed's fused kernel; where it does not compile, PyTorch's needs a copy more")
        if self.ranks > 1:
            notes.append(f"sizes of one of {self.ranks} ranks; the ranks of a machine share its host memory")
        if self.recomputes:
            value = '"cpu"' if self.checkpoint_offload else "true"
            notes.append(f"activation checkpointing is set on the model: model.gradient_checkpointing: {value} in a "
                         "run's YAML")  # fmt: skip
        if task == "causal-lm" and self.seq_len >= 4096 and self.batch_size > 1:
            notes.append("sequences of one length; padding adds attention masks of batch x length x length")
        return notes

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed config of the planned run, with the ``hift`` section.

        The learning rate is ``auto``: ``launch/train.py`` fills it in, and ``hift_ds.initialize`` asks for a number.

        Raises:
            ConfigError: the engine cannot run what was planned.
        """
        found = []
        if self.layout == "paper":
            found.append("--write-config with --layout=paper: it is not what the engine does; use --layout engine")
        if self.method == "mezo":
            found.append("--write-config with --method=mezo: it has no DeepSpeed optimizer; use another method")
        if self.method == "hift" and self.precision == "mixed":
            found.append("--write-config with --precision=mixed: the engine does mixed-hi; use that, or --method full")
        if found:
            raise ConfigError(found)
        kind, params = _DEEPSPEED_OPTIMIZERS[self.optimizer]
        zero: dict[str, Any] = {"stage": self.stage}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.batch_size,
            "optimizer": {"type": kind, "params": {"lr": "auto", **params}},
            "zero_optimization": zero,
            "hift": {"enabled": False},
        }
        if self.gradient_accumulation_steps > 1:
            config["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        if self.precision != "fp32":
            config["bf16"] = {"enabled": True}
        if self.offload_optimizer == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if self.optimizer in ("sgd", "sgdm"):  # DeepSpeed has no host kernel for it and wants to be told
                config["zero_force_ds_cpu_optimizer"] = False
        if self.method == "hift":
            config["hift"] = {"enabled": True, "layers_per_block": self.layers_per_block}
            offload = {
                "device": self.offload_device, "step": self.offload_step, "buffer_size": self.buffer_size,
                "nvme_path": self.nvme_path,
            }  # fmt: skip
            changed = {key: value for key, value in offload.items() if value != getattr(OffloadConfig, key)}
            config["hift"] |= {"offload": changed} if changed else {}
            finer = {"max_block_numel": self.max_block_numel, "balance": self.balance}
            config["hift"] |= {key: value for key, value in finer.items() if value}
        elif self.stage > 0:
            config["zero_allow_untested_optimizer"] = True
        with_rate = config | {"optimizer": {"type": kind, "params": params}}
        problems = config_problems(with_rate)
        if problems:
            raise ConfigError([f"--write-config: {problem}" for problem in problems])
        return config


_DEEPSPEED_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "sgd": ("SGD", {}),
    "sgdm": ("SGD", {"momentum": 0.9}),
    "adafactor": ("Adafactor", {}),
    "adagrad": ("Adagrad", {}),
    "lion": ("Lion", {}),
}

# field of Request -> what the command's help says
HELP = {
    "model": "a preset, a folder with a config.json, a config.json, or a Hub id; presets: " + ", ".join(PRESETS),
    "method": "hift (default), full (stock DeepSpeed), lora or mezo",
    "precision": "fp32, mixed (fp32 masters of all weights on the device), or mixed-hi (of the active block; default)",
    "optimizer": ", ".join(OPTIMIZERS) + "; default adamw",
    "batch_size": "sequences in a rank's micro-batch; default 1",
    "seq_len": "tokens in a sequence; default 512",
    "layers_per_block": "the paper's m; default 1",
    "max_block_numel": "cut blocks with more parameters, as hift.max_block_numel",
    "balance": "even the blocks out, as hift.balance",
    "zero_stage": "0 to 3; default 2, and 0 with adafactor",
    "ranks": "GPUs; default 1",
    "offload_device": "where the state of blocks lives, as hift.offload.device: cpu (default), nvme or none",
    "offload_step": "auto (default), block or streamed, as hift.offload.step",
    "buffer_size": "bytes of a slice of the streamed step, as hift.offload.buffer_size; default 64 MiB",
    "nvme_path": "for --write-config: the folder of --offload-device nvme",
    "offload_optimizer": "none (default) or cpu: the step is on the host",
    "activation_checkpointing": "layers are computed again in the backward pass",
    "checkpoint_offload": "and from what they kept in host memory",
    "gradient_accumulation_steps": "micro-batches of a step; default 1",
    "loss_chunk": "tokens whose logits exist at a time; default: those of 128 MiB in fp32; 0: all",
    "layout": "engine (default): what the engine does; paper: the HiFT paper's accounting",
    "accelerator": "gpu (default), or cpu: whose kernels",
    "attention": "sdpa or eager; default: what transformers takes",
    "task": "causal-lm or sequence-classification; default: by the configuration",
    "lora_rank": "default 8",
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_size(option: str, value: int | str) -> int:
    """Bytes of a size such as ``24GiB``."""
    units = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    if match is None or match[2] not in units or isinstance(value, bool) or float(match[1]) <= 0 and "mem" in option:
        raise ConfigError([f"{option}={value!r}: expected a size like 24GiB (a card sold as 24 GB has 24 GiB)"])
    return int(float(match[1]) * units[match[2]])


# --- configuration -----------------------------------------------------------------------------------------------


def load_config(model: Any) -> Any:
    """The Hugging Face configuration of a preset, a folder, a ``config.json``, a Hub id, a mapping, or one itself.

    Raises:
        ConfigError: it is none of these, or cannot be read.
    """
    if not isinstance(model, (str, Path, Mapping)):
        if hasattr(model, "model_type"):
            return model
        raise ConfigError([f"--model={model!r}: expected a name, a path, a mapping, or a transformers configuration"])
    if isinstance(model, str) and model in PRESETS:
        model = PRESETS[model]
    if isinstance(model, Mapping):
        return _from_mapping(dict(model), "--model")
    path, name = Path(model).expanduser(), str(model)
    if path.is_file() and path.suffix != ".gguf":
        return _from_mapping(_read_json(path), f"--model={name}")
    known = f"a preset ({', '.join(PRESETS)}), a folder with a config.json, a config.json, a GGUF file, or a Hub id"
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.75)
    if near and "/" not in name and not path.exists():
        raise ConfigError([f"--model={name!r} is unknown; did you mean {near[0]!r}? Expected {known} like owner/name"])
    from transformers import AutoConfig

    try:
        if path.is_file():
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoConfig.from_pretrained(str(path) if path.exists() else name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ConfigError([f"--model={name!r} cannot be read. Expected {known}. The reason: {reason}"]) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"--model={str(path)!r} is no readable JSON: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"--model={str(path)!r} holds a {type(values).__name__}; expected a JSON object"])
    return values


def _from_mapping(values: dict[str, Any], where: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING_NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError([f"{where}: model_type={kind!r} is no architecture of transformers{hint}"])
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers checks types and values with exceptions of several libraries
        raise ConfigError([f"{where}: {' '.join(str(error).split())}"]) from error


def task_of(config: Any) -> str:
    """The task a configuration is for: that of its ``architectures``, else classification for encoders."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    for name in config.architectures or ():
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal-lm"
        if name.endswith(("ForSequenceClassification", "ForMaskedLM", "ForPreTraining")):
            return "sequence-classification"
    return "sequence-classification" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal-lm"


# --- the model ---------------------------------------------------------------------------------------------------


def skeleton(config: Any, task: str, dtype: torch.dtype, attention: str | None = None, gpu: bool = True) -> nn.Module:
    """The model of a configuration on the meta device.

    Args:
        attention: ``eager``, ``sdpa``, or None for what transformers takes by itself.
        gpu: attention keeps what a GPU's kernels keep. With dropout the CPU's keep all scores for backward.

    Raises:
        ConfigError: the architecture has not this task or this attention.
    """
    import transformers

    autos: dict[str, Any] = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
    }
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            model = autos[task].from_config(config, dtype=dtype, **options)
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise ConfigError([f"--model: {config.model_type} as {task} cannot be built: {reason}"]) from error
    if model.config._attn_implementation == "sdpa":
        # transformers looks into the data to see that no mask is needed, which fake tensors do not have.
        name = "maskless_gpu" if gpu else "maskless_cpu"
        transformers.AttentionInterface.register(name, partial(_attend, gpu))
        transformers.AttentionMaskInterface.register(name, _mask)
        model.set_attn_implementation(name)
    model.config.use_cache = False  # no key-value cache in training
    return model.train()


def _attend(gpu: bool, *args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **(kwargs | {"dropout": 0.0} if gpu else kwargs))


def _mask(batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **_: Any) -> Tensor | None:
    """A mask only where attention is local: batches are planned without padding."""
    if local_size is None or kv_length < local_size:
        return None
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool)


def with_lora(model: Any, rank: int, task: str) -> Any:
    """The model with PEFT's LoRA adapters in the layers that PEFT takes by default, and the rest frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(["--method=lora: PEFT is not installed; install it with: pip install peft"]) from error
    kind = "CAUSAL_LM" if task == "causal-lm" else "SEQ_CLS"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, whose old names PEFT uses
            return get_peft_model(model, LoraConfig(task_type=kind, r=rank))
    except ValueError as error:
        raise ConfigError([f"--method=lora: {textwrap.shorten(str(error), 300)}"]) from error


def longest_input(model: nn.Module) -> int | None:
    """Tokens that learned positions allow; None where there are none."""
    limits = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            offset = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - offset)
    return min(limits, default=None)
