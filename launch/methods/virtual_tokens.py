"""Virtual tokens before the text: prefixes train their keys and values, prelayer trains their hidden states.

Virtual tokens act on the text only as additional keys and values of each layer's attention. An attention function that
is registered with transformers adds them. So the text keeps its positions, logits and classifiers see only the text,
a key-value cache holds only the text, and activation checkpointing works. PEFT's prefix tuning uses the cache instead:
it refuses activation checkpointing, and its ``generate`` fails on Llama (PEFT 0.21, transformers 5.23).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from hift_ds.launch.errors import NotApplicable
from hift_ds.launch.methods.adapter_modules import without_cache
from hift_ds.launch.model.loading import evaluating

KeysValues = tuple[Tensor, Tensor]  # each (batch, heads, tokens, head width)

# Records keys and values by attention module while the virtual tokens themselves are computed.
_noted: ContextVar[dict[nn.Module, KeysValues] | None] = ContextVar("_noted", default=None)


class Prefix(nn.Module):
    """Trained keys and values of one attention module (Li and Liang 2021), (heads, tokens, head width) each."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.key, self.value = _owned(key), _owned(value)

    def forward(self) -> KeysValues:
        """Return keys and values, (1, heads, tokens, head width) each."""
        return self.key[None], self.value[None]  # views, because ZeRO-3 releases the parameters again


def _owned(start: Tensor) -> nn.Parameter:
    """Make a contiguous parameter: attention returns transposed keys, which MeZO cannot perturb in place."""
    return nn.Parameter(start.clone(memory_format=torch.contiguous_format))


class HiddenTokens(nn.Module):
    """Trained hidden states at the input of one layer, (tokens, width), and the layer's other arguments for them."""

    def __init__(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]):
        super().__init__()
        self.hidden = _owned(hidden)
        self.call = (args, kwargs)  # positions and masks of the virtual tokens: constants

    def forward(self) -> Tensor:
        """Return the hidden states, (1, tokens, width)."""
        return self.hidden[None]

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the constants on the device and in the dtype of the hidden states."""

        def fit(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(self.hidden.device, self.hidden.dtype if value.is_floating_point() else value.dtype)

        return tree_map(fit, self.call)


def add_prefixes(method: str, model: Any, layers: dict[str, nn.Module], count: int) -> list[nn.Parameter]:
    """Add a prefix of ``count`` tokens to the attention of each of ``layers``, and return its parameters.

    They start as the keys and values of random tokens of the vocabulary, as in MeZO (Malladi et al. 2023), whose small
    steps need a prefix with some attention at first.

    Raises:
        NotApplicable: the model's attention cannot take additional keys.
    """
    _install(method, model)
    seen = _run_tokens(model, layers, count)
    parameters: list[nn.Parameter] = []
    for path, (_, _, attention) in seen.items():
        if not attention:
            raise NotApplicable(method, model, f"the attention of {path} takes no additional keys and values")
        for module, (key, value) in attention.items():
            module.virtual_tokens = Prefix(key[0], value[0])
            parameters += module.virtual_tokens.parameters()
    return parameters


def add_hidden_tokens(method: str, model: Any, layers: dict[str, nn.Module], count: int) -> list[nn.Parameter]:
    """Add ``count`` virtual tokens before each layer ("PreLayer", Hu et al. 2022, section 5.1); return its parameters.

    A layer's output for them is discarded, because the next layer has its own. They start as the hidden states of
    random tokens of the vocabulary. With rotary positions they have the positions -count to -1, right before the text;
    where positions are added to the embeddings, the trained hidden states include them. Each forward pass recomputes
    them, as if the text were ``count`` tokens longer, also for each token that is generated with a cache.

    Raises:
        NotApplicable: the model's attention cannot take additional keys.
    """
    _install(method, model)
    seen = _run_tokens(model, layers, count)
    parameters: list[nn.Parameter] = []
    for path, (hidden, (args, kwargs), attention) in seen.items():
        if not attention:
            raise NotApplicable(method, model, f"the attention of {path} takes no additional keys and values")
        layer = layers[path]
        layer.virtual_tokens = HiddenTokens(hidden[0], args, kwargs)
        for module in attention:
            module.__dict__["layer_with_tokens"] = layer  # bypasses `Module`, which would make the layer a child
        parameters += layer.virtual_tokens.parameters()
    return parameters


# --- in the forward pass -------------------------------------------------------------------------------------------


def _keys_values(layer: Any, attention: nn.Module) -> KeysValues:
    """Compute the keys and values of the layer's virtual tokens.

    This runs inside of the layer's own forward pass, so that activation checkpointing repeats it in the backward pass.
    """
    args, kwargs = layer.virtual_tokens.arguments()
    checkpointing = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False  # this is already inside of a checkpoint
    try:
        with _noting() as noted:
            layer.forward(layer.virtual_tokens(), *args, **kwargs)
    finally:
        layer.gradient_checkpointing = checkpointing
    return noted[attention]


def _attention(base: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return an attention function for transformers that puts virtual tokens first.

    Args:
        base: the attention function to call; None for the model's eager one.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        noted = _noted.get()
        before: KeysValues | None = None
        if noted is not None:
            noted[module] = (key, value)
        elif "virtual_tokens" in module._modules:
            before = module.virtual_tokens()
        elif "layer_with_tokens" in module.__dict__:
            before = _keys_values(module.layer_with_tokens, module)
        if before is not None:
            count = before[0].shape[2]
            causal = options.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            attention_mask = _widened(attention_mask, count, query, key, causal)
            if options.get("position_bias") is not None:
                options["position_bias"] = F.pad(options["position_bias"], (count, 0))
            key, value = (
                torch.cat([first.to(rest.dtype).expand(len(rest), -1, -1, -1), rest], dim=2)
                for first, rest in zip(before, (key, value), strict=True)
            )
        run = base or sys.modules[type(module).__module__].eager_attention_forward
        return run(module, query, key, value, attention_mask, **options)

    return attention


def _widened(mask: Tensor | None, count: int, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """Return a mask, (batch, 1, queries, keys), with ``count`` more keys at the front that every query sees."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return None
        lowest = torch.finfo(query.dtype).min
        mask = query.new_full((queries, keys), lowest).triu(keys - queries + 1)[None, None]
    return F.pad(mask, (count, 0), value=1 if mask.dtype == torch.bool else 0)


# --- setup ---------------------------------------------------------------------------------------------------------


def _install(method: str, model: Any) -> None:
    """Switch the model to the attention function with virtual tokens."""
    if model.config.is_encoder_decoder:
        raise NotApplicable(method, model, "it has an encoder and a decoder")
    # Flash attention does not take custom masks. sdpa does, and chooses among its own kernels.
    kind = "eager" if model.config._attn_implementation == "eager" else "sdpa"
    base = None if kind == "eager" else sdpa_attention_forward
    AttentionInterface.register(f"virtual_tokens_{kind}", _attention(base))
    AttentionMaskInterface.register(f"virtual_tokens_{kind}", sdpa_mask if kind == "sdpa" else eager_mask)
    model.set_attn_implementation(f"virtual_tokens_{kind}")
    if _rotates(model):
        model.register_forward_pre_hook(_count_positions, with_kwargs=True)


_Seen = dict[str, tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]], dict[nn.Module, KeysValues]]]


def _run_tokens(model: Any, layers: dict[str, nn.Module], count: int) -> _Seen:
    """Run the model on random tokens, with rotary positions before the text.

    Returns:
        By layer: its hidden states, (1, count, width), its other arguments, and its attention's keys and values.
    """
    # Drawn on the host, so that a seed gives the same tokens on every device.
    inputs = {"input_ids": torch.randint(model.config.get_text_config().vocab_size, (1, count)).to(model.device)}
    if _rotates(model):
        inputs["position_ids"] = torch.arange(-count, 0, device=model.device)[None]
    calls: dict[str, Any] = {}
    paths = {layer: path for path, layer in layers.items()}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        others = tree_map(lambda value: None if isinstance(value, Cache) else value, (args[1:], rest))
        calls[paths[layer]] = (hidden, others)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
    try:
        with evaluating(model), _noting() as noted:
            model(**inputs, **without_cache(model))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        path: (*calls[path], {module: noted[module] for module in layer.modules() if module in noted})
        for path, layer in layers.items()
    }


@contextmanager
def _noting() -> Iterator[dict[nn.Module, KeysValues]]:
    noted: dict[nn.Module, KeysValues] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def _rotates(model: Any) -> bool:
    """Return whether the model rotates keys and queries by the positions in its argument `position_ids`."""
    has_rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    return has_rotary and "position_ids" in inspect.signature(type(model).forward).parameters


def _count_positions(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Count positions from the first token after the padding, so that distances to virtual tokens ignore padding."""
    mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if mask is None or mask.dim() != 2 or tokens is None or kwargs.get("position_ids") is not None:
        return args, kwargs
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return args, {**kwargs, "position_ids": positions}
