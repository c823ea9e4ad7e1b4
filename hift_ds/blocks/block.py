"""The block, HiFT's unit of training, and the sizes of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Block:
    """The parameters that one HiFT step trains.

    Attributes:
        name: readable name, e.g. ``embeddings``, ``model.layers.0-2``, ``model.layers.31 + head``.
        parameter_names: names as in ``model.named_parameters()``, in that order.
        numel: number of trained elements.
        slices: name -> (start, stop) rows, for a tensor that is cut by rows. Empty if the block holds whole tensors.
    """

    name: str
    parameter_names: tuple[str, ...]
    numel: int
    slices: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)


def numel_of(parameter: nn.Parameter) -> int:
    """Return the number of elements of a whole parameter, also if ZeRO-3 has partitioned it."""
    # ZeRO-3 replaces a partitioned parameter by an empty tensor and keeps the original size in an attribute.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a whole parameter, also if ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
