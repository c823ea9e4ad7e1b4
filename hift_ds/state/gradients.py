"""Slices of a gradient that consists of several tensors."""

from collections.abc import Iterable, Iterator, Sequence

import torch


def elements_between(parts: Iterable[torch.Tensor], start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the elements ``start`` to ``stop`` of the concatenation of tensors, as views.

    Args:
        parts: the tensors.
        start: the first element.
        stop: the element after the last.

    Yields:
        The position after ``start`` and a flat view, for each tensor that has some of these elements.
    """
    offset = 0
    for part in parts:
        begin, end = max(start, offset), min(stop, offset + part.numel())
        if begin < end:
            yield begin - start, part.reshape(-1)[begin - offset : end - offset]
        offset += part.numel()
    assert offset >= stop, "the gradients have fewer elements than their tensor"


def fp32_slice(
    parts: Sequence[torch.Tensor], start: int, stop: int, factor: torch.Tensor | float | None
) -> torch.Tensor:
    """Return the elements ``start`` to ``stop`` of the concatenation of tensors as a new flat fp32 tensor.

    Args:
        parts: the tensors, at least one.
        start: the first element.
        stop: the element after the last.
        factor: multiply by this; None: by nothing.
    """
    result = parts[0].new_empty(stop - start, dtype=torch.float32)
    for position, values in elements_between(parts, start, stop):
        result[position : position + values.numel()].copy_(values)
    return result if factor is None else result.mul_(factor)
