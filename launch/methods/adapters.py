"""What each method of the HiFT paper's comparison trains: each turns the loaded model into a module to train.

In a model for sequence classification every method also trains the classification head: the modules outside of
``model.base_model``, which are not pretrained.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hift_ds import partition_model
from hift_ds.blocks.block import numel_of
from hift_ds.launch.errors import NotApplicable, UserError, expected
from hift_ds.launch.methods.adapter_modules import (
    MATRICES,
    Bottleneck,
    attach,
    hidden_layers,
    outermost_attention,
    sub_layer_ends,
)
from hift_ds.launch.methods.settings import CHOICES, AdapterSettings
from hift_ds.launch.methods.virtual_tokens import add_hidden_tokens, add_prefixes

WEIGHTS, SETTINGS = "adapter.safetensors", "adapter.json"


# --- methods that add modules --------------------------------------------------------------------------------------


def lora(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
    """Add LoRA (Hu et al. 2022) to the default matrices of PEFT for the architecture, else to all matrices."""
    peft = import_peft()
    head = _head_modules(model)
    config = _lora_config(settings, model, _lora_targets(model) or "all-linear")
    config.task_type = peft.TaskType.SEQ_CLS if head else peft.TaskType.CAUSAL_LM
    config.modules_to_save = head or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses deprecated names of transformers
            # PEFT would train 16-bit models with LoRA in fp32.
            return peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise NotApplicable("lora", model, str(error)) from None


def prefix(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
    """Add prefixes (Li and Liang 2021) without reparametrization, as in MeZO."""
    parameters = add_prefixes("prefix", model, hidden_layers("prefix", model), settings.prefix_tokens)
    return _train(model, parameters)


def prelayer(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
    """Add PreLayer (Hu et al. 2022, section 5.1): layers x width x virtual tokens weights."""
    parameters = add_hidden_tokens("prelayer", model, hidden_layers("prelayer", model), settings.prefix_tokens)
    return _train(model, parameters)


def adapter(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
    """Add bottleneck adapters of `settings.adapter_kind`; Houlsby et al. also train the layer norms."""
    if settings.adapter_kind not in CHOICES["adapter_kind"]:
        raise UserError(
            f"adapter_kind: got {settings.adapter_kind!r}. {expected(settings.adapter_kind, CHOICES['adapter_kind'])}"
        )
    layers = hidden_layers("adapter", model)
    ends = sub_layer_ends("adapter", model, layers)
    if settings.adapter_kind == "houlsby":
        added = _add_bottlenecks(model, [path for pair in ends for path in pair], settings)
        return _train(model, [*added, *_norms(model)])
    added = []
    for layer, (_, end) in zip(layers.values(), ends, strict=True):
        bottleneck = Bottleneck(_width(model.get_submodule(end)), settings.adapter_size, nn.ReLU(), own_norm=True)
        attach(layer, bottleneck)
        added += bottleneck.parameters()
    return _train(model, added)


def s4(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
    """Add the S4-model (Chen et al. 2023): four groups of layers, larger in the middle, each with its own modules.

    From the bottom: adapter and LoRA; adapter and prefix; adapter, prefix and biases; prefix, biases and LoRA. The
    modules have the same size in every layer, which is our reading of "uniform". The paper does not give the numbers of
    layers; we take 1 : 2 : 2 : 1. Adapters are Houlsby's without layer norms, and LoRA is on the same matrices as in
    the method "lora". In a model without biases none are trained.
    """
    layers = hidden_layers("s4", model)
    if len(layers) < 4:
        raise NotApplicable("s4", model, f"it has {len(layers)} hidden layers, and needs at least 4")
    groups = _spindle(list(layers))
    ends = dict(zip(layers, sub_layer_ends("s4", model, layers), strict=True))
    biases = [p for path in groups[2] + groups[3] for p in _biases(layers[path])]
    if not biases:
        warnings.warn(f"s4: {type(model).__name__} has no biases in its layers, so none are trained", stacklevel=2)
    with_prefix = groups[1] + groups[2] + groups[3]
    parameters = add_prefixes("s4", model, {path: layers[path] for path in with_prefix}, settings.prefix_tokens)
    parameters += _add_lora(model, groups[0] + groups[3], settings)
    with_adapter = groups[0] + groups[1] + groups[2]
    parameters += _add_bottlenecks(model, [end for path in with_adapter for end in ends[path]], settings)
    return _train(model, [*parameters, *biases])


# --- methods that train a part of the model ------------------------------------------------------------------------


def bitfit(model: PreTrainedModel, _: AdapterSettings) -> nn.Module:
    """Train all biases, including those of layer norms (Ben Zaken et al. 2022)."""
    biases = _biases(model)
    if not biases or all(any(p is of_head for of_head in _head(model)) for p in biases):
        raise NotApplicable("bitfit", model, "it has no biases")
    return _train(model, biases)


def full_top2(model: Any, _: AdapterSettings) -> nn.Module:
    """Train the two highest hidden layers (Li and Liang 2021), and the final norm, pooler and classifier after them.

    The output embedding of a causal model is not trained.
    """
    layers = list(hidden_layers("full-top2", model).values())
    after = [block for block in partition_model(model) if block.name == "head"]
    named = dict(model.named_parameters())
    output = model.get_output_embeddings()
    kept = set() if output is None else set(output.parameters())
    above = [named[name] for block in after for name in block.parameter_names]
    parameters = [p for layer in layers[-2:] for p in layer.parameters()]
    return _train(model, [*parameters, *(p for p in above if p not in kept)])


def linear_probing(model: Any, _: AdapterSettings) -> nn.Module:
    """Train the classification head, or the output embedding of a causal model; a tied one is copied first."""
    if _head(model):
        return _train(model, [])
    output = model.get_output_embeddings()
    if output is None:
        raise NotApplicable("linear-probing", model, "it has no output embedding")
    if output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return _train(model, output.parameters())


def _recorded(name: str, method: Callable[[Any, AdapterSettings], Any]) -> Callable[..., nn.Module]:
    def apply(model: PreTrainedModel, settings: AdapterSettings) -> nn.Module:
        module = method(model, settings)
        sizes = {one.name: getattr(settings, one.name) for one in fields(AdapterSettings)}  # not those of subclasses
        module.adapter_record = {"method": name, "settings": sizes}  # for `merge` and `save_adapter`
        return module

    apply.__doc__ = method.__doc__
    return apply


ADAPTERS: dict[str, Callable[[PreTrainedModel, AdapterSettings], nn.Module]] = {
    name: _recorded(name, method)
    for name, method in {
        "lora": lora,
        "prefix": prefix,
        "bitfit": bitfit,
        "adapter": adapter,
        "prelayer": prelayer,
        "s4": s4,
        "full-top2": full_top2,
        "linear-probing": linear_probing,
    }.items()
}


# --- after training ------------------------------------------------------------------------------------------------


def trained_parameters(module: nn.Module) -> int:
    """Count the weights that are trained; tied ones count once."""
    return sum(numel_of(p) for p in module.parameters() if p.requires_grad)


def merge(module: Any) -> Any:
    """Return a plain Hugging Face model that computes the same as `module`, or None for added modules other than LoRA.

    LoRA is merged into its matrices in place, so ``module`` cannot be used afterwards. Its weights must be whole (not
    ZeRO-3 shards).
    """
    method = module.adapter_record["method"]
    if method == "lora":
        return module.merge_and_unload()
    return module if method in ("bitfit", "full-top2", "linear-probing") else None


def save_adapter(module: Any, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the trained weights to ``folder``: adapter.safetensors, and adapter.json.

    The latter has the method, its settings, the base model, and the tokens at which generation stops.

    Args:
        weights: whole tensors by name in the module's state dict, for a module with ZeRO-3 shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: (weights or {}).get(name, p) for name, p in module.named_parameters() if p.requires_grad}
    save_file({name: p.detach().cpu().contiguous() for name, p in trained.items()}, folder / WEIGHTS)
    record = module.adapter_record | {"base_model": module.config.name_or_path or None}
    if module.can_generate():
        record["eos_token_id"] = module.generation_config.eos_token_id  # training may have added one
    (folder / SETTINGS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> nn.Module:
    """Load an adapter that `save_adapter` wrote, on the same base model. PyTorch's generator does not advance.

    Raises:
        UserError: ``folder`` holds no adapter, or the adapter belongs to another model.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        method, settings = ADAPTERS[record["method"]], AdapterSettings(**record["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: no adapter. Expected {SETTINGS} and {WEIGHTS} of a training run ({error})"
        ) from None
    with torch.random.fork_rng(devices=[]):
        module = method(model, settings)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wrong = sorted(trained.keys() ^ weights.keys())
    wrong += [name for name in trained.keys() & weights.keys() if trained[name].shape != weights[name].shape]
    if wrong:
        named = f" ({record['base_model']})" if record.get("base_model") else ""
        raise UserError(
            f"{folder}: the adapter belongs to another model than {type(model).__name__}: {wrong[0]} differs. Expected "
            f"the model that its run started from{named}."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    if "eos_token_id" in record:
        model.generation_config.eos_token_id = record["eos_token_id"]
    return module


# --- selecting parameters ------------------------------------------------------------------------------------------


def _train(model: PreTrainedModel, parameters: Iterable[nn.Parameter]) -> PreTrainedModel:
    """Train ``parameters`` and the classification head, and nothing else."""
    model.requires_grad_(False)
    for parameter in [*parameters, *_head(model)]:
        parameter.requires_grad_(True)
    return model


def _head_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules of a classification head; none in a causal model."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    return [p for name in _head_modules(model) for p in model.get_submodule(name).parameters()]


def _biases(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if name.endswith("bias") and p.dim() == 1]


def _norms(module: nn.Module) -> list[nn.Parameter]:
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    return [p for leaf in leaves if "norm" in type(leaf).__name__.lower() for p in leaf.parameters()]


def _spindle(paths: list[str]) -> list[list[str]]:
    """Divide layers into four groups as 1 : 2 : 2 : 1; the remainder goes to the middle, an odd one to the second."""
    outer = max(1, len(paths) // 6)
    middle = len(paths) - 2 * outer
    ends = [outer, outer + (middle + 1) // 2, len(paths) - outer, len(paths)]
    return [paths[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _add_bottlenecks(model: Any, paths: Iterable[str], settings: AdapterSettings) -> list[nn.Parameter]:
    """Add Houlsby's adapter after each of these matrices, and return its parameters."""
    added: list[nn.Parameter] = []
    for path in paths:
        module = model.get_submodule(path)
        bottleneck = Bottleneck(_width(module), settings.adapter_size, nn.GELU())
        attach(module, bottleneck)
        added += bottleneck.parameters()
    return added


def _width(matrix: Any) -> int:
    """Return the number of a matrix's outputs, also through LoRA's wrapper."""
    matrix = getattr(matrix, "base_layer", matrix)
    return matrix.nf if isinstance(matrix, Conv1D) else matrix.out_features


def _add_lora(model: Any, paths: Iterable[str], settings: AdapterSettings) -> list[nn.Parameter]:
    """Add LoRA to PEFT's default matrices in these layers, else to all of their attention's matrices."""
    known = tuple(_lora_targets(model) or ())
    targets = []
    for path in paths:
        layer = model.get_submodule(path)
        matrices = [name for name, module in layer.named_modules() if isinstance(module, MATRICES)]
        attention = tuple(f"{name}." for name, _ in outermost_attention(layer))
        chosen = [name for name in matrices if name.rpartition(".")[2] in known]
        targets += [f"{path}.{name}" for name in chosen or [m for m in matrices if m.startswith(attention)]]
    import_peft().inject_adapter_in_model(_lora_config(settings, model, targets), model)
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def _lora_config(settings: AdapterSettings, model: Any, targets: Any) -> Any:
    return import_peft().LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def _lora_targets(model: Any) -> Any:
    """Return PEFT's default matrices for the model's architecture by the ends of their names, or None."""
    return import_peft().utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)


def import_peft() -> Any:
    """Import PEFT at its first use, without the warning that bitsandbytes then logs about a missing 4-bit kernel.

    The import takes seconds. No method uses 4-bit weights.
    """
    ops = logging.getLogger("bitsandbytes.backends.cpu.ops")
    ops.addFilter(_is_not_about_4bit_kernel)
    try:
        return importlib.import_module("peft")
    finally:
        ops.removeFilter(_is_not_about_4bit_kernel)


def _is_not_about_4bit_kernel(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
