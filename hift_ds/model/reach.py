"""Find the parameters that a model's output does not depend on, such as the vision tower of a model that reads text.

HiFT cannot train a block of such parameters: a step on it has no gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

# One of several experts, in a list or a dictionary. Which of them run depends on the tokens.
_EXPERT = re.compile(r"(expert[^.]*)\.[^.]+")
_NUMBER = re.compile(r"\.\d+(?=\.)")
_FEW_TOKENS, _MANY_TOKENS = 8, 1024


def unreached_parameters(model: nn.Module, output: Tensor) -> list[str]:
    """Return the names, in model order, of the trainable parameters that ``output`` does not depend on.

    The function walks autograd's graph of ``output`` and computes no gradients. If some experts of a layer are reached,
    all experts of the layer count as reached.

    Args:
        model: the module that computed ``output``, in evaluation mode, with gradients enabled.
        output: a loss or another output.

    Raises:
        ValueError: the graph has reentrant activation checkpoints, which hide parameters.
    """
    leaves = _leaves(output)
    reached = {_EXPERT.sub(r"\1.*", n) for n, p in model.named_parameters(remove_duplicate=False) if id(p) in leaves}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in leaves and _EXPERT.sub(r"\1.*", name) not in reached
    ]


def _leaves(output: Tensor) -> set[int]:
    """Return the ids of the parameters in the graph of ``output``."""
    leaves = set()
    seen = {output.grad_fn}
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "the model has reentrant activation checkpoints, which hide parameters; use use_reentrant=False, or "
                "turn activation checkpointing off"
            )
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        parents = {parent for parent, _ in node.next_functions} - seen
        seen |= parents
        waiting += parents
    return leaves


def freeze_patterns(unreached: Iterable[str], trained: Iterable[str]) -> list[str]:
    """Return a short list of patterns for ``hift.freeze`` that match the names in ``unreached``.

    Args:
        unreached: names of parameters.
        trained: names of all parameters that are not frozen. The patterns match none of the others.
    """
    missed = dict.fromkeys(unreached)
    others = [name for name in trained if name not in missed]
    reached_prefixes = {prefix for name in others for prefix in _prefixes(name)}
    whole = dict.fromkeys(next((p for p in _prefixes(name) if p not in reached_prefixes), name) for name in missed)
    exact = [f"{prefix}*" if prefix.endswith(".") else prefix for prefix in whole]
    patterns: dict[str, None] = {}
    for pattern in exact:
        joined = _NUMBER.sub(".*", pattern)  # the same part of each layer
        several = sum(_NUMBER.sub(".*", other) == joined for other in exact) > 1
        clear = not any(fnmatchcase(name, joined) for name in others)
        patterns[joined if several and clear else pattern] = None
    return list(patterns)


def _prefixes(name: str) -> list[str]:
    """Return the paths of the modules that hold a parameter, from the outermost, each with a dot at its end."""
    return [name[: match.end()] for match in re.finditer(r"\.", name)]


def unreached_by_text(model: Any, longest: int) -> list[str] | None:
    """Return the trainable parameters that the logits of a Hugging Face model do not depend on if it reads only text.

    The forward pass runs on tensors without data.

    Args:
        model: a model on the meta device, which cannot be used afterwards.
        longest: tokens of the longest sequence. Some modules run for long sequences only.

    Returns:
        Names in model order; None if the model's forward pass needs data.
    """
    unreached = None
    try:
        model.eval()  # no layer drop
        if model.config._attn_implementation not in ("eager", "sdpa"):
            model.set_attn_implementation("sdpa")  # other kernels may need a GPU
        model.set_experts_implementation("batched_mm")  # in others, the shapes depend on data
        mode = give_fake_tensors(model)
        for length in sorted({min(longest, _FEW_TOKENS), min(longest, _MANY_TOKENS)}):
            with mode:
                logits = _logits(model, {"input_ids": torch.zeros(1, length, dtype=torch.long)})
            unreached = unreached_parameters(model, logits)
            if not unreached:
                break
    except Exception:  # of any library: the code may come with the model
        return None
    return unreached


def unreached_by_example(model: Any, batch: Mapping[str, Tensor]) -> list[str]:
    """Return the trainable parameters that the logits of a Hugging Face model do not depend on, by one forward pass.

    Args:
        batch: arguments of the model, except ``labels``, which are left out.

    Returns:
        Names in model order; [] if the forward pass fails, or activation checkpoints hide parameters.
    """
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        return unreached_parameters(model, _logits(model, inputs))
    except Exception:  # of any library: the kernels may need a GPU
        return []
    finally:
        model.train(was_training)


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run a Hugging Face model without a key-value cache, and return its logits."""
    return model(**inputs, **({"use_cache": False} if model.can_generate() else {})).logits


def give_fake_tensors(model: nn.Module) -> FakeTensorMode:
    """Replace the parameters and buffers of a model by tensors on the CPU that have no data.

    Returns:
        The mode in which the model runs.
    """
    mode = FakeTensorMode()
    made: dict[int, Any] = {}  # id of the old tensor -> the new one, so that tied weights stay tied
    with mode:
        for module in model.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, old in store.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        new: Any = torch.empty(old.shape, dtype=old.dtype)
                        is_parameter = isinstance(old, nn.Parameter)
                        made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
                    store[name] = made[id(old)]
    return mode
