"""Model FLOPs of training, the proxy for energy: what the method's matrix products need, by counting weights.

A product with P weights costs 2 P a token forward, 2 P for the gradient of its input, and 2 P for that of its weights.
A method is spared the gradients of weights that it does not train, and of the inputs of everything below the lowest one
that it does. Left out: attention's products of activations, what is small beside them (norms, the optimizer's step),
and what is computed again under activation checkpointing. A classifier counts as if it read every token.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from hift_ds.launch.config.settings import Settings
from hift_ds.launch.methods.table import METHODS


def step_flops(engine: Any, settings: Settings, trained: Collection[str], tokens: int, predicted: int) -> int:
    """Of an optimizer step as `settings.method` takes it.

    Args:
        trained: `trained_names` before the step.
    """
    method = METHODS[settings.method.name]
    forward = forward_flops(engine.module, tokens, predicted)
    if method.engine == "mezo":
        return 2 * forward
    flops = training_flops(engine.module, trained, tokens, predicted)
    if method.engine == "lomo" and settings.deepspeed["gradient_clipping"]:
        flops += flops - forward  # a backward pass of its own for the norm
    return flops


def trained_names(module: nn.Module) -> tuple[str, ...]:
    """Of the parameters that the next step trains: what is not of the active block is frozen."""
    return tuple(name for name, p in module.named_parameters() if p.requires_grad)


def forward_flops(model: nn.Module, tokens: int, predicted: int) -> int:
    """Of one forward pass over that many tokens, of which `predicted` go through the output head."""
    return sum(2 * size * count for _, size, count, _ in _products(model, tokens, predicted))


def training_flops(model: nn.Module, trained: Collection[str], tokens: int, predicted: int) -> int:
    """Of a forward and a backward pass.

    Args:
        trained: names of the parameters whose gradients are taken.
    """
    wanted = set(trained)
    total, reached = 0, False
    for names, size, count, weight in _products(model, tokens, predicted):
        total += 2 * size * count  # forward
        total += 2 * size * count if reached else 0  # the gradient goes on to what is trained below
        total += 2 * size * count if weight in wanted else 0
        reached = reached or not wanted.isdisjoint(names)
    return total


def _products(model: nn.Module, tokens: int, predicted: int) -> list[tuple[list[str], int, int, str]]:
    """For each module with parameters of its own, from the input up: their names, weights in a product, the tokens
    that go through it, and the name of the product's weight."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    first_names = {id(p): name for name, p in model.named_parameters()}  # a tied weight has one
    found = []
    for _, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False)}
        if not own:
            continue
        weight = own.get("weight")
        shape: Any = getattr(weight, "ds_shape", weight.shape) if weight is not None else ()  # of ZeRO-3's parts: whole
        # Linear, and GPT-2's Conv1D, which is one with its weight the other way around.
        is_product = len(shape) == 2 and not isinstance(module, nn.Embedding)
        size = math.prod(shape) if is_product else 0
        names = [first_names[id(p)] for p in own.values()]
        count = predicted if module is head else tokens
        found.append((names, size, count, first_names[id(weight)] if is_product else ""))
    return found
