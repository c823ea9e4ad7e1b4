"""Cut a model's parameters into HiFT's blocks (HiFT paper, section 3.1 and appendix A.4).

All embeddings together are one layer, each hidden layer is one, and all head parameters together are one. A block is
m consecutive layers. :mod:`hift_ds.blocks.layers` finds the layers; :mod:`hift_ds.blocks.slicing` makes blocks of more
equal size.
"""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from hift_ds.blocks.block import Block, numel_of, shape_of
from hift_ds.blocks.layers import assign_layers
from hift_ds.blocks.slicing import cut_large_blocks, join_small_blocks


def partition_model(
    model: nn.Module,
    layers_per_block: int = 1,
    freeze: Sequence[str] = (),
    max_block_numel: int | None = None,
    balance: bool = False,
) -> list[Block]:
    """Cut ``model`` into ceil(n / ``layers_per_block``) blocks, from the embeddings to the head.

    The function only reads the model. The model may be on the meta device or wrapped (PEFT, DistributedDataParallel),
    and ZeRO-3 may have partitioned its parameters. A parameter with ``requires_grad=False`` counts as frozen. A layer
    without trainable parameters is dropped before the cut. A tied weight is in one block: the one of the embeddings
    if they hold it.

    Args:
        model: any model whose hidden layers are in an ``nn.ModuleList`` or ``nn.Sequential``.
        layers_per_block: m of the paper, from 1 to the number of layers n.
        freeze: shell-style patterns (``fnmatch``) of the names of parameters that no block trains.
        max_block_numel: largest number of elements of a block. A larger block is cut into blocks of similar size:
            between modules if possible, otherwise between tensors, and a larger tensor by rows (its first dimension).
            A block of rows of a tensor holds nothing else.
        balance: make the blocks more equal. The typical size is the median over the blocks of whole layers. Unless
            ``max_block_numel`` is given, blocks are cut that exceed the typical size by more than an eighth. Blocks of
            less than half the typical size join a neighbor if the result stays within the limit.

    Returns:
        The blocks, which together hold each trainable parameter exactly once.

    Raises:
        ValueError: the model has no hidden layers, a pattern in ``freeze`` matches nothing, no parameter is left to
            train, ``layers_per_block`` is out of range, or ``max_block_numel`` is smaller than a row of a tensor.
    """
    parameters = dict(model.named_parameters())
    frozen = _frozen_by_pattern(model, freeze)
    trained = [name for name, p in parameters.items() if p.requires_grad and name not in frozen]
    layer_names, layer_of = assign_layers(model)
    if not trained:
        raise ValueError(
            f"nothing is left to train: all {len(parameters)} parameters have requires_grad=False or match "
            f"freeze={list(freeze)!r}; take patterns out of freeze or set requires_grad=True"
        )
    members: dict[int, list[str]] = {}
    for name in trained:
        members.setdefault(layer_of[name], []).append(name)
    layers = sorted(members)
    _check_layers_per_block(layers_per_block, len(layers))

    order = {name: position for position, name in enumerate(parameters)}
    blocks = []
    for start in range(0, len(layers), layers_per_block):
        chosen = layers[start : start + layers_per_block]
        names = sorted((name for layer in chosen for name in members[layer]), key=order.__getitem__)
        numel = sum(numel_of(parameters[name]) for name in names)
        blocks.append(Block(_block_name([layer_names[layer] for layer in chosen]), tuple(names), numel))
    check_each_in_one_block(trained, blocks)
    if max_block_numel is None and not balance:
        return blocks
    typical = int(statistics.median(block.numel for block in blocks))
    limit = max_block_numel if max_block_numel is not None else typical * 9 // 8
    blocks = cut_large_blocks(blocks, {name: shape_of(parameters[name]) for name in trained}, limit)
    return join_small_blocks(blocks, typical, limit) if balance else blocks


def frozen_parameter_names(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Return the names, in model order, of the parameters that no block trains."""
    in_blocks = {name for block in blocks for name in block.parameter_names}
    return [name for name, _ in model.named_parameters() if name not in in_blocks]


def check_each_in_one_block(trained: Sequence[str], blocks: Sequence[Block]) -> None:
    """Check that each of the parameters named in ``trained`` is in exactly one block.

    Raises:
        ValueError: with the names of all parameters that are in no block or in several.
    """
    count = dict.fromkeys(trained, 0)
    for block in blocks:
        for name in block.parameter_names:
            count[name] += 1
    wrong = [name for name, times in count.items() if times != 1]
    if wrong:
        raise ValueError(f"parameters that are not in exactly one block: {', '.join(wrong)}")


def _frozen_by_pattern(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"freeze={patterns!r}: expected a list of patterns of parameter names, such as ['*.bias']")
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    problems = []
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        frozen |= matched
        if not matched:
            problems.append(f"{pattern!r} {_why_unmatched(model, names, pattern)}")
    if problems:
        raise ValueError(f"freeze: patterns that match no parameter: {'; '.join(problems)}")
    return frozen


def _why_unmatched(model: nn.Module, names: Sequence[str], pattern: str) -> str:
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if fnmatchcase(name, pattern):
            return f"({name} is tied to {first_name[id(parameter)]}; use that name)"
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"(nearest names: {', '.join(nearest)})"


def _check_layers_per_block(layers_per_block: int, n: int) -> None:
    is_int = isinstance(layers_per_block, int) and not isinstance(layers_per_block, bool)
    if not is_int or not 1 <= layers_per_block <= n:
        raise ValueError(
            f"layers_per_block={layers_per_block!r}: expected an integer from 1 to {n}, the number of layers "
            "with trainable parameters; choose a value in that range (1 needs the least memory)"
        )


def _block_name(layer_names: Sequence[str]) -> str:
    """Join names of consecutive layers; consecutive elements of one list become ``model.layers.0-2``."""
    parts: list[str] = []
    run: tuple[str, int, int] | None = None  # list path, first, last
    for name in layer_names:
        stem, _, index = name.rpartition(".")
        if run and index.isdigit() and stem == run[0] and int(index) == run[2] + 1:
            run = (stem, run[1], int(index))
            parts[-1] = name.removesuffix(index) + f"{run[1]}-{run[2]}"
        else:
            run = (stem, int(index), int(index)) if index.isdigit() else None
            parts.append(name)
    return " + ".join(parts)
