"""Find the layers of a model from its module tree, and assign each parameter to one (HiFT paper, appendix A.4).

Layer 0 is all embeddings, layers 1 to n are the hidden layers, layer n + 1 is the head.

A *hidden layer* is an element of an ``nn.ModuleList`` or ``nn.Sequential`` that holds a normalization and at least two
weight matrices. Only the outermost such list counts: T5's sub-layers and the experts of a mixture belong to their
layer. If the element is a stage, which is itself a list of layers (Swin, Funnel, ALBERT), the stage's elements are the
layers.

A *sibling* is a child, without layers in it, of a module that holds layers. These rules assign a sibling to a layer:

1. The class decides (``nn.Embedding``), otherwise the name, otherwise whether the sibling was registered before or
   after the layers next to it.
2. A sibling that comes before the layers belongs to the embeddings. In a later stage (ConvNeXt's downsampling) it
   belongs to the stage's first layer.
3. A sibling that comes after the model's last layer belongs to the head. A sibling that comes after another layer
   belongs to that layer (the final norm of an encoder, the projector between two towers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from hift_ds.blocks.block import numel_of, shape_of

_LISTS = (nn.ModuleList, nn.Sequential)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Names of siblings of layers that say where the sibling runs, for models that do not register modules in that order.
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
# The first search for layers does not look into these modules. They belong to the embeddings or join two towers.
_NO_LAYERS = re.compile(r"patch_embed|feature_extractor|(^|_)stem$|merger")
# Names and classes of the sub-layers of one layer: a list of them inside a layer is not a list of layers.
_SUB_LAYER = re.compile(r"attention|attn|mlp|ffn|ff$|feed_?forward|expert|moe|mixer", re.IGNORECASE)


def assign_layers(model: nn.Module) -> tuple[list[str], dict[str, int]]:
    """Assign each parameter of a model to a layer.

    Returns:
        The names of the layers from the embeddings to the head, and a mapping from each parameter's name to the index
        of its layer.

    Raises:
        ValueError: the model has no hidden layers.
    """
    layers = find_hidden_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    tree = _Tree(modules, layers)
    by_identity: dict[int, int] = {}
    head = len(layers) + 1
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = tree.layer_of(name)
        # A tied weight has several names. The lowest layer owns it: the embeddings if they hold it.
        by_identity[id(parameter)] = min(layer, by_identity.get(id(parameter), head))
    layer_of = {name: by_identity[id(parameter)] for name, parameter in model.named_parameters()}
    return ["embeddings", *(layer[0] for layer in layers), "head"], layer_of


def largest_hidden_layer(model: nn.Module) -> int:
    """Return the number of elements of the largest hidden layer of a model.

    Raises:
        ValueError: the model has no hidden layers.
    """
    names, layer_of = assign_layers(model)
    sizes = [0] * len(names)
    for name, parameter in model.named_parameters():
        sizes[layer_of[name]] += numel_of(parameter)
    return max(sizes[1:-1])


class _Tree:
    """A model's modules and where its hidden layers are among them."""

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
        self.held = {path: sorted(indices) for path, indices in held.items()}  # the layers inside each module
        self.stages = {
            path
            for path in held
            if path and isinstance(modules[_parent(path)], _LISTS) and not _has_embedding(modules[path])
        }

    def layer_of(self, name: str) -> int:
        """Return the index of the layer that the parameter ``name`` belongs to."""
        owner = _parent(name)
        sibling = name
        for path in _self_and_ancestors(owner):
            if path in self.layer_at:
                return self.layer_at[path]
            if path in self.held:
                break
            sibling = path
        if isinstance(self.modules[owner], (nn.Embedding, nn.EmbeddingBag)):
            return 0
        holder = _parent(sibling)
        held = self.held[holder]
        # A sibling in a stage (a downsampling) belongs to a layer of that stage.
        in_stage = not self.stages.isdisjoint(_self_and_ancestors(holder))
        kind = self.kind(sibling)
        if kind == "embeddings":
            return 0
        if kind == "output":
            return self.head
        if kind == "before":
            return held[0] if in_stage and held[0] > 1 else 0
        earlier = [index for index in held if self.start[index] < self.position.get(sibling, -1)]
        follows = earlier[-1] if earlier else held[-1]
        if in_stage or follows < self.head - 1:
            return follows
        return self.bridged_from(sibling) if _BRIDGE.search(_last(sibling)) else self.head

    def kind(self, sibling: str) -> str:
        """Return "embeddings" or "output", or whether a sibling comes "before" or "after" the layers next to it."""
        name, module = _last(sibling), self.modules.get(sibling)
        if module is None:  # a parameter of the holder itself, of which the registration order is not known
            if _OUTPUT_PARAMETER.search(name):
                return "after"
            return "embeddings" if re.search("emb|token|pos", name) else "before"
        if _OUTPUT.search(name):
            return "output"
        after = self.start[self.held[_parent(sibling)][0]] < self.position[sibling]
        if _EMBEDDING.search(name) and not (_is_norm(module) or _NORM.search(name)):
            return "embeddings"
        if _is_norm(module) or _NORM.search(name):
            return self.kind_of_norm(sibling, after)
        if _AFTER.search(name):
            return "after"
        if "embed" in type(module).__name__.lower() or (after and self.is_feature_extractor(sibling)):
            return "embeddings"
        return "after" if after else "before"

    def kind_of_norm(self, sibling: str, after: bool) -> str:
        """Return the kind of a normalization, for which the registration order can be misleading.

        A stack with RMS norms is pre-norm and ends with a norm, which T5Gemma registers first and LFM2 calls
        ``embedding_norm``. BART and DeBERTa register a norm of the embeddings last.
        """
        name, module = _last(sibling), self.modules[sibling]
        previous = self.registered_before(sibling)
        if _FINAL_NORM.search(name):
            return "after"
        is_rms = "rms" in type(module).__name__.lower()
        follows_layers = previous in self.held or previous in self.layer_at
        if _FIRST_NORM.search(name) and not (is_rms and follows_layers):
            return "embeddings" if "emb" in name or "per_layer" in name or not after else "after"
        if not after:
            return "after" if is_rms else "before"
        return "embeddings" if isinstance(self.modules.get(previous), nn.Embedding) else "after"

    def registered_before(self, sibling: str) -> str:
        """Return the path of the last module with parameters that was registered before a sibling, or ""."""
        previous = ""
        for path, module in _children(self.modules[_parent(sibling)], _parent(sibling)):
            if path == sibling:
                break
            if next(module.parameters(), None) is not None:
                previous = path
        return previous

    def is_feature_extractor(self, sibling: str) -> bool:
        """Return whether a sibling is a convolution next to layers without one (the audio tower of Qwen3-Omni)."""
        if not isinstance(self.modules[sibling], _CONVOLUTIONS) or not _FIRST_CONVOLUTION.search(_last(sibling)):
            return False
        layers = [path for path, index in self.layer_at.items() if index in self.held[_parent(sibling)]]
        return not any(isinstance(m, _CONVOLUTIONS) for path in layers for m in self.modules[path].modules())

    def bridged_from(self, sibling: str) -> int:
        """Return the layer of a projector registered after all towers: the last layer of the tower it reads from."""
        holder = _parent(sibling)
        towers = [path for path, _ in _children(self.modules[holder], holder) if path in self.held]
        if len(towers) < 2:
            return self.head
        sources = [path for path in towers if not _TEXT_TOWER.search(_last(path))]
        return self.held[(sources or towers)[-1 if sources else 0]][-1]


def find_hidden_layers(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the module paths of each hidden layer, in module order.

    A layer has several paths if its sub-layers are in parallel lists.

    Raises:
        ValueError: the model has no hidden layers.
    """
    for is_layer in (_is_full_layer, _has_two_matrices, _has_norm_and_matrix):
        for guard in (True, False):
            # A module that is registered under two paths is one layer.
            layers: dict[nn.Module, tuple[str, ...]] = {}
            for paths in _walk(model, "", is_layer, guard):
                layers.setdefault(model.get_submodule(paths[0]), paths)
            if layers:
                return list(layers.values())
    raise ValueError(
        f"no hidden layers found in {type(model).__name__}: expected, at any depth, an nn.ModuleList or "
        "nn.Sequential whose elements each hold a normalization and at least two weight matrices; put the model's "
        "repeated layers into an nn.ModuleList, or train it without HiFT (hift.enabled=false)"
    )


def _walk(
    module: nn.Module, path: str, is_layer: Callable[[nn.Module], bool], guard: bool, in_element: bool = False
) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the layers inside ``module``.

    Args:
        guard: do not look into modules whose names match ``_NO_LAYERS``.
        in_element: ``module`` is inside an element of a list. The element is a stage if layers are found in it.
    """
    children = _children(module, path)
    if isinstance(module, _LISTS):
        if in_element and all(_SUB_LAYER.search(type(child).__name__) for _, child in children):
            return
        for child_path, child in children:
            if not is_layer(child):
                yield from _walk(child, child_path, is_layer, guard, in_element)
                continue
            is_single = in_element or any(_SUB_LAYER.search(name) for name, _ in child.named_children())
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
    """Yield the layers whose sub-layers are in parallel lists, one of norms (XLM: attentions, layer_norm1, ffns)."""
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
    return sum(len(shape_of(p)) >= 2 for p in module.parameters())


def _has_embedding(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Embedding) for child in module.modules())


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "norm" in name and "weightnorm" not in name and next(module.children(), None) is None


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
