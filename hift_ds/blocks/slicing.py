"""Cut blocks that are larger than a limit, and join small ones (``max_block_numel`` and ``balance``).

A large block is cut between modules. A module that is too large is cut between its children, and so on down to single
tensors. A tensor that is too large is cut by rows. The items that result are packed into as few blocks as first-fit
packing needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple

from hift_ds.blocks.block import Block


class _Item(NamedTuple):
    """A module or a tensor whose parameters stay in one block, except for a tensor that is cut by rows."""

    path: str
    parameter_names: tuple[str, ...]
    numel: int


def cut_large_blocks(blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]], limit: int) -> list[Block]:
    """Return ``blocks`` with every block of more than ``limit`` elements replaced by smaller ones.

    Args:
        blocks: blocks of whole tensors.
        shapes: the shape of each parameter by name.
        limit: largest number of elements that a block may have.

    Raises:
        ValueError: one row of a tensor has more elements than ``limit``.
    """
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    row_numels = {name: numels[name] // shape[0] for name, shape in shapes.items() if shape and numels[name] > limit}
    if too_long := [f"{name} ({numel})" for name, numel in row_numels.items() if numel > limit]:
        raise ValueError(
            f"max_block_numel={limit}: a tensor is cut by rows, and a row has more parameters in "
            f"{', '.join(too_long[:4])}{' ...' if len(too_long) > 4 else ''}; "
            f"set it to at least {max(row_numels.values())}"
        )
    result = []
    for block in blocks:
        if block.numel <= limit:
            result.append(block)
            continue
        items = list(_split(block.parameter_names, numels, limit))
        new_blocks: dict[str, list[Block]] = {}  # path of the first item in a block -> the block, or those of a tensor
        for packed in _pack([item for item in items if item.numel <= limit], limit):
            label = " + ".join(item.path.removeprefix(f"{block.name}.") for item in packed)
            names = tuple(name for item in packed for name in item.parameter_names)
            numel = sum(item.numel for item in packed)
            new_blocks[packed[0].path] = [Block(f"{block.name}: {label}", names, numel)]
        for item in items:
            if item.numel > limit:
                rows = shapes[item.path][0]
                new_blocks[item.path] = _cut_rows(block.name, item.path, rows, row_numels[item.path], limit)
        result += [new for item in items for new in new_blocks.get(item.path, ())]
    return result


def join_small_blocks(blocks: Sequence[Block], typical: int, limit: int) -> list[Block]:
    """Join each block of less than half the typical size to its predecessor, or else to its successor.

    Blocks that hold rows of a tensor stay as they are.

    Args:
        blocks: blocks in order.
        typical: elements of a typical block.
        limit: largest number of elements that a joined block may have.
    """
    result: list[Block] = []
    for block in blocks:
        before = result[-1] if result else block
        is_small = min(block.numel, before.numel) < typical / 2
        if result and is_small and not (block.slices or before.slices) and block.numel + before.numel <= limit:
            names = before.parameter_names + block.parameter_names
            result[-1] = Block(f"{before.name} + {block.name}", names, before.numel + block.numel)
        else:
            result.append(block)
    return result


def _split(names: Sequence[str], numels: Mapping[str, int], limit: int, depth: int = 1) -> Iterator[_Item]:
    """Yield the largest modules within the limit and the tensors outside of these, in the order of ``names``."""
    for path, run in groupby(names, key=lambda name: ".".join(name.split(".")[:depth])):
        members = tuple(run)
        numel = sum(numels[name] for name in members)
        if numel <= limit:
            yield _Item(_innermost_module(members), members, numel)
        elif members == (path,):
            yield _Item(path, members, numel)
        else:
            yield from _split(members, numels, limit, depth + 1)


def _innermost_module(names: Sequence[str]) -> str:
    """Return the path of the innermost module that holds all these parameters."""
    paths = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, paths))


def _pack(items: Sequence[_Item], limit: int) -> list[list[_Item]]:
    """Pack items into as few bins as first fit needs within ``limit``, with the smallest capacity that still does."""
    if not items:
        return []

    def first_fit(capacity: int) -> list[list[_Item]]:
        bins: list[list[_Item]] = []
        free: list[int] = []
        for item in items:
            index = next((index for index, room in enumerate(free) if item.numel <= room), len(free))
            if index == len(free):
                bins.append([])
                free.append(capacity)
            bins[index].append(item)
            free[index] -= item.numel
        return bins

    fewest = len(first_fit(limit))
    low, high = max(item.numel for item in items), limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(first_fit(middle)) <= fewest else (middle + 1, high)
    return first_fit(high)


def _cut_rows(block_name: str, name: str, rows: int, row_numel: int, limit: int) -> list[Block]:
    """Cut a tensor of ``rows`` rows into blocks of about equally many rows."""
    count = -(-rows // (limit // row_numel))
    ends = [rows * index // count for index in range(count + 1)]
    label = f"{block_name}: {name.removeprefix(f'{block_name}.')}"
    return [
        Block(f"{label}[{start}:{stop}]", (name,), (stop - start) * row_numel, {name: (start, stop)})
        for start, stop in zip(ends, ends[1:], strict=False)
    ]
