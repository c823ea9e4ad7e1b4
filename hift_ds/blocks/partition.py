"""Cut a model's parameters into HiFT's blocks (HiFT paper, section 3.1 and appendix A.4).

All embeddings are one layer, every hidden layer is one, and all head parameters are one; m consecutive layers
are a block. The layers are found from the module tree alone:

* A *hidden layer* is an element of an ``nn.ModuleList`` or ``nn.Sequential`` that holds a normalization and
  two weight matrices or more. Only the outermost such list counts (T5's sub-layers and a mixture's experts
  belong to their layer), except where the element is a stage, a list of layers itself (Swin, Funnel, ALBERT).
* The rest is taken in *units*: the children, without layers in them, of a module that holds layers. A unit
  goes with the embeddings or after the layers by its class (``nn.Embedding``), else by its name, else by
  whether it was registered before or after the layers beside it. "After" is the head for the model's last
  layer, and for any other that layer itself (an encoder's final norm, the projector between two towers). What
  a later stage holds before its layers (ConvNeXt's downsampling) goes with the first of them.
"""

from __future__ import annotations

import difflib
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby, takewhile

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Hints in the name of a unit outside the layers, for where registration order is not execution order.
_OUTPUT = re.compile(
    r"(^|_)(lm|mlm|cls|qa|ctc)_heads?(_|$)|classif|^score$|^cls$|qa_output|logit|(class|bbox)_embed$|unembed"
)
_AFTER = re.compile(r"head|pool|predict|merger|project_out|proj_out|embed_out|_out$")
_EMBEDDING = re.compile(
    r"emb(?!.*(proj|out|head))|position|(^|_)pos_|per_layer|prompt_encoder"
    r"|(audio|image|speech|video|vision)_tower$"
)
_BRIDGE = re.compile(r"projector|connector|aligner|adapter|resampler|merger|_to_")
_TEXT_TOWER = re.compile(r"language|text|decoder|llm")
_OUTPUT_PARAMETER = re.compile(r"logit|scale|temperature|bias$|head|classif")
_FIRST_CONVOLUTION = re.compile(r"^conv(\d|_in)")
_NORM = re.compile(r"norm|^ln|_ln$")
_FIRST_NORM = re.compile(r"emb|(^|_)pre(_|norm|ln|$)|(^|_)in(put)?(_|$)|per_layer")
_FINAL_NORM = re.compile(r"final|post|last|(^|_)out|_f$")
# What is never searched for layers in a first pass: it belongs to the embeddings, or joins two towers.
_NO_LAYERS = re.compile(r"patch_embed|feature_extractor|(^|_)stem$|merger")
# Names and classes of the parts of one layer: a list of these inside a layer is not a list of layers.
_PART = re.compile(r"attention|attn|mlp|ffn|ff$|feed_?forward|expert|moe|mixer", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """The parameters that one HiFT step trains.

    Attributes:
        name: for people, e.g. ``embeddings``, ``model.layers.0-2``, ``model.layers.31 + head``.
        parameter_names: names as in ``model.named_parameters()``, in that order.
        numel: number of trained parameters.
        slices: name -> (start, stop) rows, for a tensor that is cut. Empty: whole tensors.
    """

    name: str
    parameter_names: tuple[str, ...]
    numel: int
    slices: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)


def partition_model(
    model: nn.Module,
    layers_per_block: int = 1,
    freeze: Sequence[str] = (),
    max_block_numel: int | None = None,
    balance: bool = False,
) -> list[Block]:
    """Cut ``model`` into ceil(n / ``layers_per_block``) blocks, from the embeddings to the head.

    The model is only read; it may be on the meta device, wrapped (peft, DistributedDataParallel), or its
    parameters partitioned by ZeRO-3. A parameter with ``requires_grad=False`` counts as frozen, and a layer
    with nothing left to train is dropped before the cut. A tied weight is in one block, the embeddings' where
    they hold it.

    Args:
        model: any model whose hidden layers are in an ``nn.ModuleList`` or ``nn.Sequential``.
        layers_per_block: m of the paper, from 1 to the number of layers n.
        freeze: shell-style patterns (``fnmatch``) over parameter names; those parameters are never trained.
        max_block_numel: cut a block with more parameters than this into parts of about the same size, between
            modules where that will do, else between tensors, and a larger tensor by rows (its first dimension). The
            rows of one tensor are blocks of their own, with nothing else in them.
        balance: even the blocks out. Without ``max_block_numel`` none gets larger than a typical one, the median of
            the blocks of whole layers, by more than an eighth; and a block of less than half of that size joins a
            neighbor, if together they stay within the limit.

    Raises:
        ValueError: no hidden layers were found, a pattern in ``freeze`` matches nothing, nothing is left to
            train, ``layers_per_block`` is out of range, or ``max_block_numel`` is less than a row of a tensor.
    """
    parameters = dict(model.named_parameters())
    frozen = _frozen_by_pattern(model, freeze)
    trained = [name for name, p in parameters.items() if p.requires_grad and name not in frozen]
    layer_names, layer_of = _assign_layers(model)
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
    _check_each_once(trained, blocks)
    if max_block_numel is None and not balance:
        return blocks
    typical = int(statistics.median(block.numel for block in blocks))
    limit = max_block_numel if max_block_numel is not None else typical * 9 // 8
    blocks = _finer(blocks, {name: _shape(parameters[name]) for name in trained}, limit)
    return _joined(blocks, typical, limit) if balance else blocks


def frozen_parameter_names(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Names, in model order, of the parameters that no block trains."""
    in_blocks = {name for block in blocks for name in block.parameter_names}
    return [name for name, _ in model.named_parameters() if name not in in_blocks]


# --- finer than a layer -------------------------------------------------------------------------------------


def _finer(blocks: Sequence[Block], shapes: Mapping[str, Sequence[int]], limit: int) -> list[Block]:
    """Cut blocks that are larger than ``limit``.

    Raises:
        ValueError: a row of a tensor is larger.
    """
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    rows = {name: numels[name] // shape[0] for name, shape in shapes.items() if shape and numels[name] > limit}
    if too_long := [f"{name} ({numel})" for name, numel in rows.items() if numel > limit]:
        raise ValueError(
            f"max_block_numel={limit}: a tensor is cut by rows, and a row has more parameters in "
            f"{', '.join(too_long[:4])}{' ...' if len(too_long) > 4 else ''}; set it to at least {max(rows.values())}"
        )
    result = []
    for block in blocks:
        if block.numel <= limit:
            result.append(block)
            continue
        inside = block.name + "."
        atoms = list(_atoms(block.parameter_names, numels, limit))
        parts: dict[str, list[Block]] = {}  # by the path of the first atom
        for part in _packed([atom for atom in atoms if atom[2] <= limit], limit):
            said = " + ".join(path.removeprefix(inside) for path, _, _ in part)
            names = tuple(name for _, members, _ in part for name in members)
            parts[part[0][0]] = [Block(f"{block.name}: {said}", names, sum(numel for _, _, numel in part))]
        for name, _, numel in atoms:
            if numel > limit:
                count = -(-shapes[name][0] // (limit // rows[name]))
                ends = [shapes[name][0] * part // count for part in range(count + 1)]
                parts[name] = [
                    Block(
                        f"{block.name}: {name.removeprefix(inside)}[{start}:{stop}]",
                        (name,),
                        (stop - start) * rows[name],
                        {name: (start, stop)},
                    )
                    for start, stop in zip(ends, ends[1:], strict=False)
                ]
        result += [part for path, _, _ in atoms for part in parts.get(path, ())]
    return result


_Atom = tuple[str, tuple[str, ...], int]  # path of a module or a tensor, parameters, their number of elements


def _atoms(names: Sequence[str], numels: Mapping[str, int], limit: int, depth: int = 1) -> Iterator[_Atom]:
    """The largest modules that are within the limit, and the tensors that are not in one; in the order of ``names``."""
    for path, run in groupby(names, key=lambda name: ".".join(name.split(".")[:depth])):
        members = tuple(run)
        numel = sum(numels[name] for name in members)
        if numel <= limit:
            yield _common(members), members, numel
        elif members == (path,):
            yield path, members, numel
        else:
            yield from _atoms(members, numels, limit, depth + 1)


def _common(names: Sequence[str]) -> str:
    """Path of the innermost module that holds all these parameters."""
    paths = zip(*(_parent(name).split(".") for name in names), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, paths))


def _packed(atoms: Sequence[_Atom], limit: int) -> list[list[_Atom]]:
    """Atoms in few parts within ``limit``, the largest of them about as small as it can be."""
    if not atoms:
        return []

    def filled(limit: int) -> list[list[_Atom]]:
        parts: list[list[_Atom]] = []
        rooms: list[int] = []
        for atom in atoms:
            fits = next((index for index, room in enumerate(rooms) if atom[2] <= room), len(rooms))
            if fits == len(rooms):
                parts.append([])
                rooms.append(limit)
            parts[fits].append(atom)
            rooms[fits] -= atom[2]
        return parts

    fewest = len(filled(limit))
    low, high = max(numel for _, _, numel in atoms), limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(filled(middle)) <= fewest else (middle + 1, high)
    return filled(high)


def _joined(blocks: Sequence[Block], typical: int, limit: int) -> list[Block]:
    """Blocks of less than half the typical size joined to the one before, else to the one after, within the limit."""
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


# --- which layer a parameter belongs to ---------------------------------------------------------------------


def _assign_layers(model: nn.Module) -> tuple[list[str], dict[str, int]]:
    """Names of the layers from embeddings to head, and for each parameter name the index of its layer."""
    layers = _find_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    tree = _Tree(modules, layers)
    by_identity: dict[int, int] = {}
    head = len(layers) + 1
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = tree.layer_of(name)
        # A tied weight has several names: the embeddings win, then the first layer.
        by_identity[id(parameter)] = min(layer, by_identity.get(id(parameter), head))
    layer_of = {name: by_identity[id(parameter)] for name, parameter in model.named_parameters()}
    return ["embeddings", *(layer[0] for layer in layers), "head"], layer_of


class _Tree:
    """Answers where a parameter belongs: 0 embeddings, 1 to n hidden layers, n + 1 head."""

    def __init__(self, modules: Mapping[str, nn.Module], layers: Sequence[tuple[str, ...]]) -> None:
        self.modules = modules
        self.position = {path: position for position, path in enumerate(modules)}
        self.head = len(layers) + 1
        self.layer_at = {path: index for index, paths in enumerate(layers, start=1) for path in paths}
        self.start = [-1, *(self.position[paths[0]] for paths in layers)]
        held: dict[str, set[int]] = {}
        for path, index in self.layer_at.items():
            for ancestor in _ancestors(path):
                held.setdefault(ancestor, set()).add(index)
        self.held = {path: sorted(indices) for path, indices in held.items()}  # the layers below a module
        self.stages = {
            path
            for path in held
            if path and isinstance(modules[_parent(path)], _LISTS) and not _has_embedding(modules[path])
        }

    def layer_of(self, name: str) -> int:
        owner = _parent(name)
        unit = name
        for path in _self_and_ancestors(owner):
            if path in self.layer_at:
                return self.layer_at[path]
            if path in self.held:
                break
            unit = path
        if isinstance(self.modules[owner], (nn.Embedding, nn.EmbeddingBag)):
            return 0
        holder = _parent(unit)
        held = self.held[holder]
        # What a stage holds beside its layers (a downsampling) stays in the stage.
        in_stage = not self.stages.isdisjoint(_self_and_ancestors(holder))
        kind = self.kind(unit)
        if kind == "embeddings":
            return 0
        if kind == "output":
            return self.head
        if kind == "before":
            return held[0] if in_stage and held[0] > 1 else 0
        earlier = [index for index in held if self.start[index] < self.position.get(unit, -1)]
        follows = earlier[-1] if earlier else held[-1]
        if in_stage or follows < self.head - 1:
            return follows
        return self.bridged_from(unit) if _BRIDGE.search(_last(unit)) else self.head

    def kind(self, unit: str) -> str:
        """Whether a unit is "embeddings" or "output", or comes "before" or "after" the layers beside it."""
        name, module = _last(unit), self.modules.get(unit)
        if module is None:  # a parameter of the holder itself: registration order says nothing about it
            if _OUTPUT_PARAMETER.search(name):
                return "after"
            return "embeddings" if re.search("emb|token|pos", name) else "before"
        if _OUTPUT.search(name):
            return "output"
        after = self.start[self.held[_parent(unit)][0]] < self.position[unit]
        if _EMBEDDING.search(name) and not (_is_norm(module) or _NORM.search(name)):
            return "embeddings"
        if _is_norm(module) or _NORM.search(name):
            return self.kind_of_norm(unit, after)
        if _AFTER.search(name):
            return "after"
        if "embed" in type(module).__name__.lower() or (after and self.is_feature_extractor(unit)):
            return "embeddings"
        return "after" if after else "before"

    def kind_of_norm(self, unit: str, after: bool) -> str:
        """A norm's place where registration order may mislead.

        Stacks with RMS norms are pre-norm and end with one (T5Gemma registers it first, LFM2 calls it
        ``embedding_norm``); a norm of the embeddings may be registered last (BART, DeBERTa).
        """
        name, module = _last(unit), self.modules[unit]
        previous = self.previous_sibling(unit)
        if _FINAL_NORM.search(name):
            return "after"
        is_rms = "rms" in type(module).__name__.lower()
        follows_layers = previous in self.held or previous in self.layer_at
        if _FIRST_NORM.search(name) and not (is_rms and follows_layers):
            return "embeddings" if "emb" in name or "per_layer" in name or not after else "after"
        if not after:
            return "after" if is_rms else "before"
        return "embeddings" if isinstance(self.modules.get(previous), nn.Embedding) else "after"

    def previous_sibling(self, unit: str) -> str:
        """The last unit with parameters that was registered before this one; "" where there is none."""
        previous = ""
        for path, module in _children(self.modules[_parent(unit)], _parent(unit)):
            if path == unit:
                break
            if next(module.parameters(), None) is not None:
                previous = path
        return previous

    def is_feature_extractor(self, unit: str) -> bool:
        """A bare convolution beside layers that have none (the audio tower of Qwen3-Omni)."""
        if not isinstance(self.modules[unit], _CONVOLUTIONS) or not _FIRST_CONVOLUTION.search(_last(unit)):
            return False
        beside = [path for path, index in self.layer_at.items() if index in self.held[_parent(unit)]]
        return not any(isinstance(m, _CONVOLUTIONS) for path in beside for m in self.modules[path].modules())

    def bridged_from(self, unit: str) -> int:
        """Layer for a projector that is registered after all towers: the last of the tower that it reads."""
        holder = _parent(unit)
        towers = [path for path, _ in _children(self.modules[holder], holder) if path in self.held]
        if len(towers) < 2:
            return self.head
        sources = [path for path in towers if not _TEXT_TOWER.search(_last(path))]
        return self.held[(sources or towers)[-1 if sources else 0]][-1]


# --- finding the hidden layers ------------------------------------------------------------------------------


def _find_layers(model: nn.Module) -> list[tuple[str, ...]]:
    """Module paths of each hidden layer, in module order; several where its parts are in parallel lists."""
    for is_layer in (_is_full_layer, _has_two_matrices, _has_norm_and_matrix):
        for guard in (True, False):
            # One module under two paths is one layer.
            layers: dict[nn.Module, tuple[str, ...]] = {}
            for paths in _walk(model, "", is_layer, guard):
                layers.setdefault(model.get_submodule(paths[0]), paths)
            if layers:
                return list(layers.values())
    raise ValueError(
        f"no hidden layers found in {type(model).__name__}: looked at any depth for an nn.ModuleList or "
        "nn.Sequential whose elements each hold a normalization and two weight matrices or more; put the "
        "model's repeated layers into an nn.ModuleList, or train it without HiFT (hift.enabled=false)"
    )


def _walk(
    module: nn.Module, path: str, is_layer: Callable[[nn.Module], bool], guard: bool, in_element: bool = False
) -> Iterator[tuple[str, ...]]:
    """Paths of the layers below ``module``; ``in_element``: it is inside a list's element, a stage if it has any."""
    children = _children(module, path)
    if isinstance(module, _LISTS):
        if in_element and all(_PART.search(type(child).__name__) for _, child in children):
            return
        for child_path, child in children:
            if not is_layer(child):
                yield from _walk(child, child_path, is_layer, guard, in_element)
                continue
            is_single = in_element or any(_PART.search(name) for name, _ in child.named_children())
            inner = [] if is_single else list(_walk(child, child_path, is_layer, guard, in_element=True))
            yield from inner or [(child_path,)]
        return
    found = False
    for child_path, child in children:
        if guard and _NO_LAYERS.search(_last(child_path)):
            continue
        for layer in _walk(child, child_path, is_layer, guard, in_element):
            found = True
            yield layer
    if not found and not in_element:
        yield from _parallel_lists(children, is_layer)


def _parallel_lists(
    children: Sequence[tuple[str, nn.Module]], is_layer: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, ...]]:
    """Layers whose parts are in sibling lists, one of them of norms (XLM: attentions, layer_norm1, ffns)."""
    lists = [(path, child) for path, child in children if isinstance(child, nn.ModuleList)]
    for length in dict.fromkeys(len(child) for _, child in lists):
        parallel = [(path, child) for path, child in lists if len(child) == length > 0]
        if not any(_is_norm(child[0]) for _, child in parallel):
            continue
        for index in range(length):
            if is_layer(nn.ModuleList(child[index] for _, child in parallel)):
                yield tuple(f"{path}.{index}" for path, _ in parallel)


def _is_full_layer(module: nn.Module) -> bool:
    return any(_is_norm(child) for child in module.modules()) and _has_two_matrices(module)


def _has_two_matrices(module: nn.Module) -> bool:
    return _matrices(module) >= 2


def _has_norm_and_matrix(module: nn.Module) -> bool:
    return any(_is_norm(child) for child in module.modules()) and _matrices(module) >= 1


def _matrices(module: nn.Module) -> int:
    if next(module.children(), None) is None:
        return 0
    # ZeRO-3 keeps the shape of a partitioned parameter beside it.
    return sum(len(getattr(p, "ds_shape", p.shape)) >= 2 for p in module.parameters())


def _has_embedding(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Embedding) for child in module.modules())


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "norm" in name and "weightnorm" not in name and next(module.children(), None) is None


# --- small parts --------------------------------------------------------------------------------------------


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = _parent(path)
        yield path


def _self_and_ancestors(path: str) -> Iterator[str]:
    yield path
    yield from _ancestors(path)


def _children(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    return [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]


def numel_of(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where it is partitioned."""
    # ZeRO-3 leaves an empty tensor in place of a partitioned parameter and keeps its size beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _frozen_by_pattern(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"freeze={patterns!r}: expected a list of patterns over parameter names: ['*.bias']")
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
            return f"({name} is tied: it is the parameter {first_name[id(parameter)]}, name that one)"
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"(nearest names: {', '.join(nearest)})"


def _check_layers_per_block(layers_per_block: int, n: int) -> None:
    is_int = isinstance(layers_per_block, int) and not isinstance(layers_per_block, bool)
    if not is_int or not 1 <= layers_per_block <= n:
        raise ValueError(
            f"layers_per_block={layers_per_block!r}: expected an integer from 1 to {n}, the number of layers "
            "with something to train; set it to a value in that range (1 needs least memory)"
        )


def _check_each_once(trained: Sequence[str], blocks: Sequence[Block]) -> None:
    count = dict.fromkeys(trained, 0)
    for block in blocks:
        for name in block.parameter_names:
            count[name] += 1
    wrong = [name for name, times in count.items() if times != 1]
    if wrong:
        raise ValueError(f"parameters that are not in exactly one block: {', '.join(wrong)}")


def _block_name(layer_names: Sequence[str]) -> str:
    """Join names of consecutive layers; runs of one list become ``model.layers.0-2``."""
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
