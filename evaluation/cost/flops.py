"""Count the model FLOPs of training, a proxy for energy: the FLOPs of the matrix products with weights.

A product with P weights takes 2 P FLOPs per token in the forward pass, 2 P for the gradient of its input and 2 P for
the gradient of its weights. A method does not compute the gradients of weights that it does not train, nor the input
gradients below the lowest weight that it trains. Not counted: attention's products of activations, small terms (norms,
the optimizer step), and recomputation under activation checkpointing. A classification head counts for every token.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from hift_ds.launch.config.settings import Settings
from hift_ds.launch.methods.table import METHODS


def step_flops(engine: Any, settings: Settings, trained: Collection[str], tokens: int, predicted: int) -> int:
    """Return the FLOPs of an optimizer step of `settings.method`.

    Args:
        trained: the result of `trained_names` before the step.
        tokens: tokens of the step.
        predicted: tokens that go through the output head.
    """
    method = METHODS[settings.method.name]
    forward = forward_flops(engine.module, tokens, predicted)
    if method.engine == "mezo":
        return 2 * forward
    flops = training_flops(engine.module, trained, tokens, predicted)
    if method.engine == "lomo" and settings.deepspeed["gradient_clipping"]:
        flops += flops - forward  # a separate backward pass for the gradient norm
    return flops


def trained_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that the next step trains; all others are frozen."""
    return tuple(name for name, p in module.named_parameters() if p.requires_grad)


def forward_flops(model: nn.Module, tokens: int, predicted: int) -> int:
    """Return the FLOPs of a forward pass over `tokens` tokens, of which `predicted` go through the output head."""
    return sum(2 * size * count for _, size, count, _ in _products(model, tokens, predicted))


def training_flops(model: nn.Module, trained: Collection[str], tokens: int, predicted: int) -> int:
    """Return the FLOPs of a forward and a backward pass.

    Args:
        trained: names of the parameters whose gradients are computed.
    """
    wanted = set(trained)
    total, reached = 0, False
    for names, size, count, weight in _products(model, tokens, predicted):
        total += 2 * size * count  # forward
        total += 2 * size * count if reached else 0  # the gradient of the input, for trained weights below
        total += 2 * size * count if weight in wanted else 0
        reached = reached or not wanted.isdisjoint(names)
    return total


def _products(model: nn.Module, tokens: int, predicted: int) -> list[tuple[list[str], int, int, str]]:
    """List the modules that have parameters, from the input to the output.

    Returns:
        For each: the names of its parameters, the number of weights in a product, the tokens that go through it, and
        the name of the product's weight.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    first_names = {id(p): name for name, p in model.named_parameters()}  # a tied weight has one name
    found = []
    for _, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False)}
        if not own:
            continue
        weight = own.get("weight")
        shape: Any = getattr(weight, "ds_shape", weight.shape) if weight is not None else ()  # ZeRO-3: the whole shape
        # Linear, or GPT-2's Conv1D, a linear layer with a transposed weight.
        is_product = len(shape) == 2 and not isinstance(module, nn.Embedding)
        size = math.prod(shape) if is_product else 0
        names = [first_names[id(p)] for p in own.values()]
        count = predicted if module is head else tokens
        found.append((names, size, count, first_names[id(weight)] if is_product else ""))
    return found
