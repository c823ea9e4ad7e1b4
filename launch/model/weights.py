"""Whether the weights in a model's files are the weights of the model, and files that are damaged."""

from __future__ import annotations

import json
import math
import re
import textwrap
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hift_ds.launch.errors import UserError
from hift_ds.model.quantization import leftover_problem

# Names that wrappers leave in a state dict: torch.compile, FSDP and activation checkpointing wrap any module,
# DataParallel and DeepSpeed the whole model.
_WRAPPER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER_WRAPPER = re.compile(r"^(?:module\.)+")

_MASKS = ("bias", "masked_bias", "causal_mask")
_LFS_POINTER = b"version https://git-lfs"
_REMEDY = (
    "Give files and a config.json that belong together, as save_pretrained writes them; if config.json was edited, "
    "restore it."
)
_EMPTY = (
    "ZeRO-3 leaves such tensors when a model is saved without gathering its weights. Save it again with "
    "zero_optimization.stage3_gather_16bit_weights_on_model_save, or convert the DeepSpeed checkpoint with the "
    "zero_to_fp32.py in its folder."
)


def unwrapped(name: str) -> str:
    """Return a tensor's name without what wrappers have added to it."""
    return _OUTER_WRAPPER.sub("", _WRAPPER.sub("", name))


def read_unwrapped(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weight files of a model's folder, and return their tensors by their names without wrappers."""
    tensors: dict[str, torch.Tensor] = {}
    for path in _files(folder):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        else:  # mapped, as safetensors are: the ranks of a node share them
            tensors |= torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {unwrapped(name): tensor for name, tensor in tensors.items()}


def check_weights(model: Any, found: dict[str, Any], task: str, broken: Sequence[str] | None = None) -> list[str]:
    """Refuse weights that would train from random numbers, and weights in the files that the model should have.

    A classification head may be new. Heads of other tasks may be in the files. Poolers count as parts of heads.

    Args:
        model: as loaded; weights that were missing or had another shape are new.
        found: transformers' report about the files, without tied weights: `missing_keys`, `unexpected_keys` and
            `mismatched_keys` (name, shape in the files, shape in the model).
        broken: names of the parameters with values that are not finite; None: read them from the model.

    Returns:
        Notes for the user: weights that are new, not used, or not finite.

    Raises:
        UserError: naming the number of weights and examples.
    """
    classifies = task == "sequence-classification"

    def may_be_new(name: str) -> bool:
        return classifies and not _is_in_body(model, name)

    shapes = {
        name: f"{name}: {tuple(theirs)} in the files, {tuple(ours)} in the model"
        for name, theirs, ours in found["mismatched_keys"]
    }
    empty = {name for name, theirs, _ in found["mismatched_keys"] if math.prod(theirs) == 0}
    new, missing = _split(found["missing_keys"], may_be_new)
    resized, unfit = _split(shapes.keys() - empty, may_be_new)
    unused, unknown = _split(found["unexpected_keys"], lambda name: _may_be_unused(model, name, classifies))
    if missing:  # perhaps under other names
        unused, unknown = [], sorted(found["unexpected_keys"])

    problems = []
    if missing:
        count = f"{len(missing)} of {len(model.state_dict())} weights"
        problems.append(f"Not in the files, so that they would be random: {count}, {_examples(missing)}.")
    if unknown:
        problems.append(f"Not in the model: {_tensors(unknown)} of the files, {_examples(unknown)}.")
    if unfit:
        problems.append(f"Of another shape: {_tensors(unfit)}, {_examples(map(shapes.__getitem__, unfit))}.")
    quantized = leftover_problem(found["unexpected_keys"])
    if quantized:
        problems.append(quantized)
    elif problems:
        saved = ", ".join(model.config.architectures or ())
        source = f"The files were saved from {saved}. " if saved not in ("", type(model).__name__) else ""
        problems.append(source + _REMEDY)
    if unknown and not (missing or unfit or quantized):
        problems.append(
            "If the model is right without these tensors, save it without them: "
            f"transformers.{type(model).__name__}.from_pretrained(OLD).save_pretrained(NEW)."
        )
    if empty:
        examples = _examples(map(shapes.__getitem__, sorted(empty)))
        problems.append(f"Without values: {_tensors(empty)} of the files, {examples}. {_EMPTY}")
    if problems:
        raise UserError(f"the weights do not match {type(model).__name__}. {' '.join(problems)}")

    notes = []
    if new or resized:
        weights = [f"{name}: not in the files" for name in new] + [shapes[name] for name in resized]
        notes.append(f"note: the classification head is new ({'; '.join(weights)})")
    if unused:
        notes.append(f"note: not used for {task}: {_tensors(unused)} of the files, {_examples(unused)}")
    if broken is None:
        broken = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if broken:
        notes.append(f"warning: NaN or infinite values in {_tensors(broken)} of the model, {_examples(broken)}")
    return notes


def explain_damage(folder: Path) -> str | None:
    """Return a sentence about the first weight file of a model's folder that is missing, damaged or empty."""
    try:
        files = _files(folder)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder}: the index of the weight files is damaged. Copy or download it again."
    if missing := [path for path in files if not path.exists()]:
        return (
            f"{missing[0]} does not exist, though the index of the weight files names it. Missing files: "
            f"{len(missing)} of {len(files)}. Copy or download them."
        )
    for path in files:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs pull` in its folder."
        try:
            empty = [name for name, shape in _shapes(path).items() if math.prod(shape) == 0]
        except Exception as error:  # safetensors, torch and pickle raise many kinds
            reason = textwrap.shorten(str(error), 200)
            return f"{path} is damaged or cut off ({reason}). Copy or download it again."
        if empty:
            return f"{path}: without values: {_tensors(empty)}, {_examples(empty)}. {_EMPTY}"
    return None


def _files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, in the order in which transformers looks for them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / shard for shard in sorted(shards)]
    return []


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix == ".bin":
        loaded = torch.load(path, map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _is_in_body(model: Any, name: str) -> bool:
    """Return whether a weight belongs to the model without its head. Files may leave out the name of the body."""
    parts = name.split(".")
    body = getattr(model, model.base_model_prefix or "", model)
    first_names = {name for name, _ in body.named_children()} | {model.base_model_prefix}
    return parts[0] in first_names and "pooler" not in parts


def _may_be_unused(model: Any, name: str, classifies: bool) -> bool:
    """Return whether a tensor of the files that the model does not load belongs to another head, or is a buffer.

    Earlier versions of transformers saved more buffers: the causal mask of GPT-Neo, GPT-J and others is the `bias` of
    the whole attention.
    """
    path, _, last = name.rpartition(".")
    parent = _module(model, path)
    if parent is None:  # files may leave out the name of the body
        parent = _module(model, f"{model.base_model_prefix}.{path}")
    if parent is not None and (last in parent._buffers or last in _MASKS and any(parent.children())):
        return True
    return not _is_in_body(model, name) and (classifies or parent is None)


def _module(model: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value of a tensor is NaN or infinite."""
    # Reads the tensor once, copies nothing, and takes a thirtieth of the time of a sum of 16-bit values in fp32.
    return tensor.numel() == 0 or all(map(math.isfinite, torch.aminmax(tensor.detach())))


def _split(names: Iterable[str], belongs: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    parts: tuple[list[str], list[str]] = [], []
    for name in sorted(names):
        parts[not belongs(name)].append(name)
    return parts


def _tensors(names: Collection[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _examples(names: Iterable[str]) -> str:
    first, *others = names
    if not others:
        return first
    return f"e.g. {first}, {others[0]}"
