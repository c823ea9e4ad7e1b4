"""Load model and tokenizer from the Hub, a local folder or a GGUF file, or make a model from a config."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import json
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import AUDIO_TOKENIZER_NAME, FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file
from transformers.utils.logging import is_progress_bar_enabled

import hift_ds
from hift_ds.checkpoint.files import sha256_of
from hift_ds.launch.errors import UserError
from hift_ds.launch.model import weights
from hift_ds.launch.model.classes import number_of_classes
from hift_ds.launch.model.partitioned import PartitionedLoading
from hift_ds.launch.model.settings import ModelSettings
from hift_ds.launch.model.tokenizer import byte_tokenizer
from hift_ds.model.quantization import quantization_problem

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}

# The first one can hold the others. The images' is also the audio's.
PROCESSOR_FILES = (
    PROCESSOR_NAME,
    FEATURE_EXTRACTOR_NAME,
    VIDEO_PROCESSOR_NAME,
    AUDIO_TOKENIZER_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)

T = TypeVar("T")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer. If it has no padding token, its end-of-sequence token takes that role.

    Padding is masked in attention and loss, so the choice of the token changes no number.

    Raises:
        UserError: not found, not reachable, or without both tokens.
    """
    if settings.tokenizer == "byte":
        return byte_tokenizer()
    name = settings.tokenizer or settings.name_or_path
    assert name is not None  # `ModelSettings.problems` has checked it
    source = _source(*tokenizer_source(settings))
    tokenizer = _explained(
        "model.tokenizer" if settings.tokenizer else "model.name_or_path",
        name,
        lambda: AutoTokenizer.from_pretrained(**source, trust_remote_code=settings.trust_remote_code),
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model.tokenizer: {name!r} has neither a padding nor an end-of-sequence token. "
                f"Expected a tokenizer with at least one of them."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_source(settings: ModelSettings) -> tuple[str, str | None]:
    """Return name and revision of the tokenizer: the model's, or those of `model.tokenizer` (OWNER/NAME@REVISION)."""
    if settings.tokenizer is None:
        return str(settings.name_or_path), settings.revision
    name, at, revision = settings.tokenizer.partition("@")
    if not at or Path(settings.tokenizer).expanduser().exists():
        return settings.tokenizer, None
    return name, revision


def load_config(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int | None = None,
    say: Callable[[str], object] = print,
    allow_quantized: bool = False,
) -> PretrainedConfig:
    """Load the model's configuration, and no weights. Makes the padding token of the tokenizer fit the model.

    Args:
        num_labels: classes of the data, for sequence classification.
        say: called with notes for the user.
        allow_quantized: do not refuse quantized weights, which cannot be trained.

    Raises:
        UserError: the configuration cannot be loaded, its vocabulary is smaller than the tokenizer's, its weights are
            quantized, or `model.num_labels` is smaller than `num_labels`.
    """
    if settings.config is not None:
        given = dict(settings.config)
        given.setdefault("vocab_size", len(tokenizer))
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given.setdefault(token, getattr(tokenizer, token))
        config = AutoConfig.for_model(given.pop("model_type"), **given)
        if config.vocab_size < len(tokenizer):
            raise UserError(
                f"model.config.vocab_size: got {config.vocab_size}, but the tokenizer has {len(tokenizer)} "
                f"tokens. Expected at least that many, or remove the key."
            )
    else:
        name = str(settings.name_or_path)
        source = _source(name, settings.revision)
        config = _explained(
            "model.name_or_path",
            name,
            lambda: AutoConfig.from_pretrained(**source, trust_remote_code=settings.trust_remote_code),
        )
        checked = "gguf_file" not in source and not allow_quantized  # GGUF is dequantized
        if checked and (problem := quantization_problem(name, config)):
            raise UserError(f"model.name_or_path: {problem}")
    _agree_on_padding(config, tokenizer, settings.task == "sequence-classification", say)
    if settings.task == "sequence-classification":
        if settings.num_labels or num_labels:
            config.num_labels = number_of_classes(settings, num_labels or 0)
    return config


def _agree_on_padding(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, classifies: bool, say: Callable[[str], object]
) -> None:
    """Make the tokenizer pad with a token that the model has; for a classifier, with the one of the configuration.

    Classifiers on decoders find the end of a text by it, and models like RoBERTa count positions by it.

    Raises:
        UserError: the model has neither the padding nor the end-of-sequence token.
    """
    text = config.get_text_config()
    size = getattr(text, "vocab_size", None) or math.inf

    def is_usable(token: int | None) -> bool:
        return token is not None and 0 <= token < size and bool(tokenizer.convert_ids_to_tokens(token))

    theirs: Any = getattr(text, "pad_token_id", None)
    before = tokenizer.pad_token
    if classifies and is_usable(theirs):
        chosen, reason = theirs, "as in the model's configuration"
    elif is_usable(tokenizer.pad_token_id):
        chosen, reason = tokenizer.pad_token_id, ""
    elif is_usable(tokenizer.eos_token_id):
        chosen, reason = tokenizer.eos_token_id, f"whose id {tokenizer.pad_token_id} the model does not have"
    else:
        raise UserError(
            f"model.tokenizer: its padding token {before!r} has the id {tokenizer.pad_token_id}, but the model has "
            f"{size} tokens. Expected a tokenizer whose padding or end-of-sequence token is among them."
        )
    if chosen != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
        say(f"note: model.tokenizer: {tokenizer.pad_token!r} is the padding token instead of {before!r}, {reason}")
    if classifies:
        for part in (config, text):
            part.pad_token_id = chosen


def identity(settings: ModelSettings) -> dict[str, Any]:
    """Return what identifies the model: the settings, with a hash of the files instead of local paths."""
    parts: dict[str, Any] = asdict(settings)
    for key in ("name_or_path", "tokenizer"):
        parts[key] = files_sha256(parts[key] or "") or parts[key]
    return parts


def files_sha256(source: str) -> str | None:
    """Hash a model's file, or the files in its folder with their names. Return None for a model on the Hub.

    The hash changes when the model is trained further, and stays the same when its folder is moved.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(one for one in path.glob("*") if one.is_file())
    if not source or not files:
        return None
    return hashlib.sha256("".join(f"{one.name} {sha256_of(one)}\n" for one in files).encode()).hexdigest()


def skeleton(settings: ModelSettings, config: PretrainedConfig) -> PreTrainedModel:
    """Make the model on the meta device (names and shapes only), to find its blocks before loading weights.

    Raises:
        UserError: the sizes in its configuration do not make a model.
    """
    try:
        with torch.device("meta"):
            return _from_config(settings, config)
    except (RuntimeError, ArithmeticError, LookupError) as error:  # e.g. a negative or missing dimension
        raise UserError(
            f"{'model.config' if settings.config is not None else 'model.name_or_path'}: no {config.model_type} can be "
            f"made of these sizes ({' '.join(str(error).split())}). Correct them."
        ) from error


def load_model(
    settings: ModelSettings,
    config: PretrainedConfig,
    dtype: str,
    say: Callable[[str], object] = print,
    device: str | None = None,
    partitioned: PartitionedLoading | None = None,
) -> PreTrainedModel:
    """Load the model with weights in `dtype`: "float32", "bfloat16", "float16", or "auto" as saved.

    A model from scratch is always drawn in fp32 and in host memory, so that a seed gives the same weights for each
    dtype and device; DeepSpeed casts and moves it.

    Args:
        say: called with notes for the user, e.g. about a new classification head.
        device: load files onto this device, a few tensors at a time, so that no copy of the model is made in host
            memory; None: into host memory.
        partitioned: for ZeRO 3: keep this rank's part of each tensor. A model from scratch is whole until it is drawn.

    Raises:
        UserError: the model cannot be found or reached, does not fit the task, or its files do not hold its weights.
    """
    if settings.config is not None:
        model = _from_config(settings, config)
        if partitioned is not None:
            partitioned.finish(model)
    else:
        model = _from_files(settings, config, dtype, say, device, partitioned)
    if model.can_generate():
        _make_savable(model.generation_config)
    model.config.use_cache = False  # training needs no key-value cache; generation enables it
    if settings.gradient_checkpointing:
        hift_ds.checkpoint_activations(model, offload=settings.gradient_checkpointing == "cpu")
    return model


def stop_at(model: PreTrainedModel, ends: list[int]) -> list[int]:
    """Make generation stop at the tokens that end the trained answers, also in the exported model.

    Returns:
        The tokens that the model's generation config did not have among its `eos_token_id`.
    """
    if not model.can_generate():
        return []
    known = model.generation_config.eos_token_id
    stops = list(known) if isinstance(known, list | tuple) else [] if known is None else [known]
    added = [end for end in ends if end not in stops]
    if added:
        stops += added
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    return added


def processor_files(settings: ModelSettings, config: PretrainedConfig) -> dict[str, bytes]:
    """Return the files of the model's processor for images, audio and video, by name; {} for most models.

    Training does not use them, and saving model and tokenizer does not write them. Python code of a processor is
    included, unless it is in another repository.
    """
    if settings.name_or_path is None or settings.name_or_path.endswith(".gguf"):
        return {}
    source = _source(settings.name_or_path, getattr(config, "_commit_hash", None) or settings.revision)
    name = source.pop("pretrained_model_name_or_path")
    files: dict[str, bytes] = {}
    waiting = list(PROCESSOR_FILES)
    while waiting:
        file = waiting.pop(0)
        try:
            path = Path(str(cached_file(name, file, **source)))
            files[file] = path.read_bytes()
        except OSError:
            continue
        imported = get_relative_imports(path) if path.suffix == ".py" else _named_code(files[file])
        waiting += [f"{module}.py" for module in dict.fromkeys(imported) if f"{module}.py" not in files]
    return files


def _named_code(content: bytes) -> list[str]:
    """Return the modules of the Python code that a configuration names, as in {"AutoProcessor": "module.Class"}."""
    try:
        classes = json.loads(content)["auto_map"].values()
    except (ValueError, LookupError, TypeError, AttributeError):
        return []
    return [one.partition(".")[0] for one in classes if isinstance(one, str) and "--" not in one]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Disable gradients, dropout and router losses within the context, then restore the model's mode.

    The router loss of a mixture of experts belongs to training. transformers cannot compute it while it generates text.
    """
    training = model.training
    config: Any = model.config.get_text_config() if hasattr(model, "config") else None  # a wrapper may have none
    routes = getattr(config, "output_router_logits", None)
    model.eval()
    try:
        if routes:
            config.output_router_logits = False
        with torch.no_grad():
            yield
    finally:
        if routes:
            config.output_router_logits = routes
        model.train(training)


def _from_files(
    settings: ModelSettings,
    config: PretrainedConfig,
    dtype: str,
    say: Callable[[str], object],
    device: str | None,
    partitioned: PartitionedLoading | None,
) -> PreTrainedModel:
    key, name = "model.name_or_path", str(settings.name_or_path)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "device_map": device and {"": device},
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # `check_weights` names them
        **_options(settings),
    }
    source = _source(name, settings.revision)
    if "gguf_file" in source:
        source["quantization_config"] = GgufConfig(dequantize=True)  # quantized weights cannot be trained
    auto: Any = AUTO_CLASSES[settings.task]

    def load() -> tuple[Any, dict[str, Any]]:
        try:
            return auto.from_pretrained(**source, **options)
        except Exception as error:  # safetensors, torch and pickle raise many kinds for damaged files
            if problem := weights.explain_damage(_folder(name, settings.revision)):
                raise UserError(f"{key}: {problem}") from None
            if isinstance(error, RuntimeError):
                raise ValueError(f"{error} (logging.verbose=true prints the report)") from error
            raise

    with _gguf_bar_as_set(), partitioned or contextlib.nullcontext():
        model, found = _explained(key, name, load)
        if wrapped := sorted(one for one in found["unexpected_keys"] if weights.unwrapped(one) != one):
            say(f"note: {key}: a wrapper has changed the names of {len(wrapped)} tensors, e.g. {wrapped[0]}; they are "
                f"read as {weights.unwrapped(wrapped[0])}")  # fmt: skip
            # Not by `key_mapping` of transformers: it would apply the mapping in reverse when the model is saved.
            tensors = weights.read_unwrapped(_folder(name, settings.revision))
            generation, model_class = getattr(model, "generation_config", None), type(model)
            del model
            options.pop("trust_remote_code")
            model, found = model_class.from_pretrained(None, state_dict=tensors, **options)
            model.config.name_or_path, model.generation_config = name, generation
    if partitioned is not None:
        partitioned.finish(model)
    _forget_gguf(model)
    if getattr(model, "peft_config", None):
        raise UserError(
            f"{key}: {name!r} holds a PEFT adapter besides the model. Remove its adapter_config.json from a local "
            "copy, or merge it with PEFT's merge_and_unload and save the result."
        )
    try:
        broken = None if partitioned is None else partitioned.broken
        for note in weights.check_weights(model, found, settings.task, broken):
            say(note)
    except UserError as error:
        raise UserError(f"{key}: {name!r}: {error}") from None
    return model


def _from_config(settings: ModelSettings, config: PretrainedConfig) -> PreTrainedModel:
    auto = AUTO_CLASSES[settings.task]
    return _explained(
        "model",
        f"{settings.task} with the architecture {config.model_type}",
        lambda: auto.from_config(copy.deepcopy(config), dtype=torch.float32, **_options(settings)),
    )


def _options(settings: ModelSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.attention is not None:
        options["attn_implementation"] = settings.attention
    return options


@contextlib.contextmanager
def _gguf_bar_as_set() -> Iterator[None]:
    """Hide the progress bar of reading a GGUF file if transformers' bars are disabled: it ignores their switch.

    Without a terminal the bar is hundreds of lines.
    """
    module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = module.tqdm
    if not is_progress_bar_enabled():
        module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


def _make_savable(config: GenerationConfig) -> None:
    """Enable sampling if the config is invalid without it, as Llama 2's own is; transformers refuses to save that."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def _forget_gguf(model: Any) -> None:
    """Remove the quantizer of a GGUF file: the weights are plain tensors, and transformers would not save them."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and isinstance(quantizer.quantization_config, GgufConfig):
        quantizer.remove_quantization_config(model)
        del model.hf_quantizer


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for the origin of a model."""
    if name.endswith(".gguf"):
        path = Path(name).expanduser().resolve()
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    local = Path(name).expanduser()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(local) if local.exists() else name}
    if revision is not None:
        source["revision"] = revision
    return source


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder with a model's files; for a model of the Hub, the snapshot in the cache."""
    local = Path(name).expanduser()
    if local.exists():
        return local if local.is_dir() else local.parent
    file = cached_file(name, "config.json", revision=revision, local_files_only=True)
    return Path(str(file)).parent


def _explained(key: str, name: str, load: Callable[[], T]) -> T:
    """Call `load`, and turn transformers' errors for a missing, unreachable or unfit model into a `UserError`."""
    try:
        return load()
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{key}: {name!r} needs its own Python code, and that code was not run. If you have "
                "read the code and trust it, set model.trust_remote_code=true; from the Hub, also set model.revision "
                "to the commit that you have read."
            ) from None
        reason = textwrap.shorten(str(error), 600)
        raise UserError(
            f"{key}: {name!r} cannot be loaded. Expected a Hub id that this machine can reach or has in its cache, a "
            f"local folder, a .gguf file, or a model.config; and an architecture that has the model.task. The reason: "
            f"{reason}"
        ) from None
