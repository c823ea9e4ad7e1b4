"""Bottleneck adapters, and their places in a model: its hidden layers and the last matrices of their sub-layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hift_ds import partition_model
from hift_ds.launch.errors import NotApplicable
from hift_ds.launch.model.loading import evaluating

MATRICES = (nn.Linear, Conv1D)
PROBE = 8  # tokens of the forward pass that finds the matrices of a layer


class Bottleneck(nn.Module):
    """``x + up(activation(down(norm(x))))``; ``up`` starts at zero, so that the model computes the same at first.

    Args:
        width: width d of the hidden states.
        size: width m of the bottleneck. Weights: 2dm + d + m, and 2d for the norm.
        own_norm: whether a layer norm of the adapter comes first.
    """

    def __init__(self, width: int, size: int, activation: nn.Module, own_norm: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width) if own_norm else nn.Identity()
        self.down = nn.Linear(width, size)
        self.activation = activation
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., width) to the same shape."""
        return hidden + self.up(self.activation(self.down(self.norm(hidden))))


def attach(module: nn.Module, adapter: Bottleneck) -> None:
    """Make ``adapter`` a child of ``module`` and apply it to the module's output (of a tuple, to the first element)."""
    first = next(module.parameters())
    module.adapter = adapter.to(first.device, first.dtype)
    module.register_forward_hook(_through_adapter)


def _through_adapter(module: Any, _: Any, output: Any) -> Any:
    # A function of the file and an adapter that is a child, so that a copy of the module has a copy of the adapter.
    if isinstance(output, tuple):
        return module.adapter(output[0]), *output[1:]
    return module.adapter(output)


def hidden_layers(method: str, model: Any) -> dict[str, nn.Module]:
    """Return the hidden layers by path, in the order of :func:`hift_ds.partition_model`.

    Raises:
        NotApplicable: the model has none.
    """
    try:
        names = [block.name for block in partition_model(model)]
    except ValueError as error:
        raise NotApplicable(method, model, str(error)) from None
    return {name: model.get_submodule(name) for name in names if name not in ("embeddings", "head")}


def sub_layer_ends(method: str, model: Any, layers: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """Return for each layer the paths of the last matrix of its attention and of its MLP, which feed the residual sum.

    A forward pass over a few tokens finds them: the last matrix that runs inside of the layer's attention, and the last
    one that runs outside of it.

    Raises:
        NotApplicable: a layer lacks one of the two (state-space layers, experts in one tensor).
    """
    paths = {module: path for path, module in model.named_modules()}
    ran: list[tuple[str, int]] = []  # path, and number of elements of the output
    hooks = [
        module.register_forward_hook(lambda module, _, output: ran.append((paths[module], output.numel())))
        for module in paths
        if isinstance(module, MATRICES)
    ]
    widths: dict[str, int] = {}

    def measure(layer: nn.Module, _: Any, output: Any) -> None:
        widths[paths[layer]] = (output[0] if isinstance(output, tuple) else output).numel()

    hooks += [layer.register_forward_hook(measure) for layer in layers.values()]
    tokens = (torch.arange(PROBE, device=model.device) % model.config.get_text_config().vocab_size)[None]
    try:
        with evaluating(model):
            model(input_ids=tokens, **without_cache(model))
    finally:
        for hook in hooks:
            hook.remove()
    ends = []
    for path, layer in layers.items():
        attention = [f"{path}.{name}" for name, _ in outermost_attention(layer)]
        inside = [name for name, numel in ran if name.startswith(path + ".") and numel == widths.get(path)]
        of_attention = [name for name in inside if name.startswith(tuple(f"{at}." for at in attention))]
        of_mlp = [name for name in inside if name not in of_attention and "expert" not in name]
        for part, found in (("attention", of_attention), ("MLP", of_mlp)):
            if not found:
                reason = f"no matrix was found in {path} whose output is that of its {part}"
                raise NotApplicable(method, model, reason)
        ends.append((of_attention[-1], of_mlp[-1]))
    return ends


def outermost_attention(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of each attention in a layer, but not of modules inside of an attention."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if "attention" in type(child).__name__.lower():
            yield inner, child
        else:
            yield from outermost_attention(child, inner)


def without_cache(model: Any) -> dict[str, bool]:
    """Return the argument that disables the key-value cache, for a model that has one."""
    return {"use_cache": False} if model.can_generate() else {}
