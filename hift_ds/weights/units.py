"""The units in which weights travel to the device: the layers of a model, and what is outside of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hift_ds.blocks.layers import find_hidden_layers


@dataclass(eq=False)
class Unit:
    """Weights that travel together.

    Attributes:
        parameters: they belong to this unit alone.
        modules: those that hold the parameters, at any depth inside the layer. No other module reads the weights, as
            far as anybody knows.
        sources, targets: the same bytes in host memory and on the device, as few contiguous pieces.
        nbytes: bytes that the unit takes in a slot.
        slot: where it is when it is on the device.
        written: events after which ``sources`` hold the current weights.
        is_changing: an update of the weights in ``sources`` is due that is not issued yet.
    """

    parameters: list[nn.Parameter] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    nbytes: int = 0
    slot: Any = None
    written: Sequence[Any] = ()
    is_changing: bool = False


def find_units(model: nn.Module) -> tuple[list[Unit], Unit]:
    """Return a unit for each layer of a model, in module order, and one for all other parameters.

    A parameter that several layers share, or a layer and something outside, is outside. Layers without parameters of
    their own are left out.

    Raises:
        ValueError: the model has no layers.
    """
    layers = [[model.get_submodule(path) for path in paths] for paths in find_hidden_layers(model)]
    layer_of = {module: number for number, modules in enumerate(layers) for module in modules}
    places: dict[nn.Parameter, set[int | None]] = {}
    inside: dict[nn.Module, int | None] = {}
    for module, number in _walk(model, layer_of, None):
        inside[module] = number
        for parameter in module.parameters(recurse=False):
            places.setdefault(parameter, set()).add(number)
    units = [Unit() for _ in layers]
    outside = Unit()
    home: dict[nn.Parameter, Unit] = {}
    for parameter, numbers in places.items():
        number = next(iter(numbers))
        home[parameter] = outside if number is None or len(numbers) > 1 else units[number]
        home[parameter].parameters.append(parameter)
    for module, number in inside.items():
        unit = outside if number is None else units[number]
        own = module.parameters(recurse=number is not None)
        if any(home[parameter] is unit for parameter in own):
            unit.modules.append(module)
        elif any(home[parameter] is outside for parameter in module.parameters(recurse=False)):
            outside.modules.append(module)
    return [unit for unit in units if unit.parameters], outside


def _walk(
    module: nn.Module, layer_of: dict[nn.Module, int], number: int | None
) -> Iterator[tuple[nn.Module, int | None]]:
    """Yield each module with the number of the layer that it is in; a module with several parents several times."""
    number = layer_of.get(module, number)
    yield module, number
    for child in module.children():
        yield from _walk(child, layer_of, number)
