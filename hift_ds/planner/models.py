"""The models of a plan: presets and configurations, built on the meta device without weights.

``PRESETS`` holds the configurations of well-known models, so that a plan of one needs no download. ``llama-7b`` to
``llama-65b`` are the first generation of LLaMA; ``llama-70b`` is Llama 2. RoBERTa has the head that the HiFT paper
uses: a classifier with two labels.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import textwrap
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds import paths
from hift_ds.config import ConfigError


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
    """Return the configuration of LLaMA or a decoder like it."""
    mapping = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": positions, "tie_word_embeddings": tied,
    }  # fmt: skip
    return mapping | ({} if head is None else {"head_dim": head}) | more


_L1, _L2, _L3 = (32000, 2048), (32000, 4096), (128256, 8192)
_Q, _QT = (152064, 32768), (151936, 32768, True)  # Qwen's larger models do not tie the head to the embeddings
_Q3, _Q3T = (151936, 40960, False, 128), (151936, 40960, True, 128)
_LLAMA_7B = ("llama", 4096, 11008, 32, 32, 32)
_LLAMA_13B = ("llama", 5120, 13824, 40, 40, 40)
_LLAMA2_70B = _decoder("llama", 8192, 28672, 80, 64, 8, *_L2)
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}

# name -> arguments of transformers.AutoConfig.for_model
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


def load_config(model: Any) -> Any:
    """Load a Hugging Face configuration.

    Args:
        model: the name of a preset, a folder with a ``config.json``, such a file, a GGUF file, a Hub id, a mapping with
            a ``model_type``, or a configuration, which is returned as it is.

    Raises:
        ConfigError: ``model`` is none of these, or cannot be read.
    """
    if not isinstance(model, (str, Path, Mapping)):
        if hasattr(model, "model_type"):
            return model
        raise ConfigError([f"--model={model!r}: expected a name, a path, a mapping or a transformers configuration"])
    if isinstance(model, str) and model in PRESETS:
        model = PRESETS[model]
    if isinstance(model, Mapping):
        return _from_mapping(dict(model), "--model")
    path, name = Path(os.path.expanduser(model)), str(model)
    if "/" not in name and (reason := paths.fault(name)):
        raise ConfigError([f"--model: {reason}"])
    is_file = os.path.isfile(path)
    if is_file and path.suffix != ".gguf":
        return _from_mapping(_read_json(path), f"--model={name}")
    if os.path.isdir(path):
        _check_folder(path)
    known = f"a preset ({', '.join(PRESETS)}), a folder with a config.json, a config.json, a GGUF file, or a Hub id"
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.75)
    if near and "/" not in name and not os.path.exists(path):
        raise ConfigError([f"--model={name!r} is unknown; did you mean {near[0]!r}? Expected {known} like owner/name"])
    from transformers import AutoConfig

    try:
        if is_file:
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoConfig.from_pretrained(str(path) if os.path.exists(path) else name, trust_remote_code=False)
    except Exception as error:  # transformers checks types and values with exceptions of several libraries
        reason = textwrap.shorten(str(error), 300).rstrip(".")
        raise ConfigError([f"--model={name!r} cannot be read: {reason}. Expected {known}"]) from error


def _check_folder(folder: Path) -> None:
    """Refuse a folder without a valid ``config.json``.

    Raises:
        ConfigError: why.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError([f"--model={str(folder)!r}: the folder has no config.json; give the folder of a model"])
    if not isinstance(_read_json(file).get("model_type"), str):
        raise ConfigError([f'--model={str(file)!r} has no model_type; add the architecture, such as "llama"'])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"--model={str(path)!r} is not valid JSON: {error}; expected a config.json"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"--model={str(path)!r} holds a {type(values).__name__}; expected a JSON object"])
    return values


def _from_mapping(values: dict[str, Any], where: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING_NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError([f"{where}: model_type={kind!r} is not an architecture of transformers{hint}"])
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers checks types and values with exceptions of several libraries
        raise ConfigError([f"{where}: {textwrap.shorten(str(error), 300)}"]) from error


def task_of(config: Any) -> str:
    """Return the task of a model: the one of its ``architectures``, else classification for encoders without decoder.

    Returns:
        ``causal-lm`` or ``sequence-classification``.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    for name in architectures(config):
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal-lm"
        if name.endswith(("ForSequenceClassification", "ForMaskedLM", "ForPreTraining")):
            return "sequence-classification"
    if config.is_encoder_decoder:
        return "causal-lm"
    return "sequence-classification" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "causal-lm"


def architectures(config: Any) -> list[str]:
    """Return the names of model classes in a configuration."""
    names = config.architectures
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def attention_window(config: Any) -> float:
    """Return the tokens that local attention sees. Longer sequences have a mask. Infinity without local attention."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds and not any("sliding" in kind or kind == "attention" for kind in kinds):
        return math.inf
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_window_size")]
    return min([window for window in windows if isinstance(window, int)], default=math.inf)


def skeleton(config: Any, task: str, dtype: torch.dtype, attention: str | None = None, gpu: bool = True) -> nn.Module:
    """Build the model of a configuration on the meta device, in training mode.

    Args:
        config: a transformers configuration.
        task: ``causal-lm`` or ``sequence-classification``.
        dtype: type of the weights.
        attention: ``eager``, ``sdpa``, or None for the default of transformers.
        gpu: attention saves the same tensors for backward as the kernels of a GPU. The kernels of a CPU save all
            scores if the model has dropout.

    Raises:
        ConfigError: the architecture does not support this task or this attention.
    """
    import transformers

    if problem := _unplannable(config, task):
        raise ConfigError([f"--model: {problem}"])
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            model = _auto_class(task).from_config(config, dtype=dtype, **options)
    except Exception as error:  # the model's own checks, with exceptions of any kind
        reason = textwrap.shorten(str(error) or type(error).__name__, 300).rstrip(".")
        raise ConfigError(
            [f"--model: {config.model_type} as {task} cannot be built: {reason}; correct the configuration"]
        ) from error
    if model.config._attn_implementation == "sdpa":
        # transformers reads values to find out whether a mask is needed. Fake tensors have no values.
        name = "maskless_gpu" if gpu else "maskless_cpu"
        transformers.AttentionInterface.register(name, partial(_attend, gpu))
        transformers.AttentionMaskInterface.register(name, _mask)
        model.set_attn_implementation(name)
    model.config.use_cache = False  # no key-value cache in training
    return model.train()


def _auto_class(task: str) -> Any:
    import transformers

    causal = task == "causal-lm"
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification


def _unplannable(config: Any, task: str) -> str | None:
    """Return why a model cannot be planned for a task, or None."""
    kind = config.model_type
    if task == "causal-lm" and config.is_encoder_decoder:
        return (
            f"{kind} is an encoder-decoder, and {_auto_class(task).__name__} would make its decoder alone; "
            "launch/train.py trains decoders and classifiers of text. Use such a model"
        )
    if type(config) in _auto_class(task)._model_mapping:
        return None
    text = config.get_text_config()
    if text is not config and type(text) in _auto_class("causal-lm")._model_mapping:
        remedy = "to plan its language model alone, save its text_config as a file and give that file to --model"
    elif type(config) in _auto_class("sequence-classification")._model_mapping:
        remedy = "use --task sequence-classification"
    elif type(config) in _auto_class("causal-lm")._model_mapping:
        remedy = "use --task causal-lm"
    else:
        remedy = "use a model that reads and predicts text"
    return f"transformers has no {kind} as {task} ({_auto_class(task).__name__}); {remedy}"


def _attend(gpu: bool, *args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **(kwargs | {"dropout": 0.0} if gpu else kwargs))


def _mask(batch_size: int, q_length: int, kv_length: int, local_size: int | None = None, **_: Any) -> Tensor | None:
    """Return a mask for local attention only. A planned batch has no padding, so nothing else needs one."""
    if local_size is None or kv_length < local_size:
        return None
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool)


def with_lora(model: Any, rank: int, task: str) -> Any:
    """Add LoRA adapters to the layers that PEFT chooses by default, and freeze the model's own weights.

    Raises:
        ConfigError: PEFT is not installed or does not support the architecture.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(["--method=lora: PEFT is not installed; install it with: pip install peft"]) from error
    kind = "CAUSAL_LM" if task == "causal-lm" else "SEQ_CLS"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses deprecated names of transformers
            return get_peft_model(model, LoraConfig(task_type=kind, r=rank))
    except ValueError as error:
        raise ConfigError([f"--method=lora: {textwrap.shorten(str(error), 300)}"]) from error
