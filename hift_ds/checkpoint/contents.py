"""What a checkpoint holds, by parameter name, whatever number of ranks and ZeRO stage saved it."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from hift_ds.checkpoint.files import CheckpointError
from hift_ds.state.saved import SavedState

# DeepSpeed's names of files: at ZeRO 3 each rank saves a part of the weights; state has one file, or one a rank.
_WEIGHTS, _PARTS_OF_WEIGHTS = "mp_rank_{mp:02d}_model_states.pt", "zero_pp_rank_*_mp_rank_{mp:02d}_model_states.pt"
_STATE = ("*zero_pp_rank_*_mp_rank_{mp:02d}_optim_states.pt", "expp_rank_*_mp_rank_{mp:02d}_optim_states.pt")


class Contents:
    """The files of a checkpoint.

    Args:
        folder: of the checkpoint.
        load: reads a file. Its tensors should be mapped, so that memory is only taken for what is used.
        mp_rank: the model-parallel rank.

    Attributes:
        files: of the weights.
        are_weights_sharded: each rank saved a part of each weight (ZeRO 3).

    Raises:
        CheckpointError: there is no file of weights.
    """

    def __init__(self, folder: Path, load: Callable[[str], Any], mp_rank: int = 0):
        self._folder, self._load, self._mp_rank = folder, load, mp_rank
        whole = folder / _WEIGHTS.format(mp=mp_rank)
        self.files = [whole] if whole.exists() else _by_rank(folder, [_PARTS_OF_WEIGHTS.format(mp=mp_rank)])
        self.are_weights_sharded = not whole.exists()
        if not self.files:
            raise CheckpointError(f"{str(folder)!r} has no file of weights; expected {whole.name}")

    @functools.cached_property
    def weights(self) -> list[dict[str, Any]]:
        """What the files of weights hold, of each rank that saved one."""
        return [self._load(str(path)) for path in self.files]

    @functools.cached_property
    def states(self) -> list[dict[str, Any]]:
        """The optimizer state of each rank that saved one."""
        files = _by_rank(self._folder, [pattern.format(mp=self._mp_rank) for pattern in _STATE])
        loaded = [self._load(str(path)) for path in files] or self.weights[:1]
        return [entry.get("optimizer_state_dict") or entry["optimizer"] for entry in loaded]

    @functools.cached_property
    def _masters(self) -> SavedState:
        return SavedState.read(self.states)

    @functools.cached_property
    def _without_hift(self) -> dict[str, Any] | None:
        """The sharded weights that a run without HiFT saved, as DeepSpeed finds them in its flat masters."""
        if not self.are_weights_sharded or all("masters" in state for state in self.states):
            return None
        folder, tag = str(self._folder.parent), self._folder.name
        return get_fp32_state_dict_from_zero_checkpoint(folder, tag, lazy_mode=True)

    @functools.cached_property
    def names(self) -> set[str]:
        """Names of the weights. Where ranks saved parts, tied weights have the first of their names."""
        if not self.are_weights_sharded:
            return set(self.weights[0]["module"])
        if self._without_hift is not None:
            return set(self._without_hift)
        return self._masters.names | set(self.weights[0]["frozen_param_fragments"] or ())  # None: they were left out

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a weight."""
        if not self.are_weights_sharded:
            return self.weights[0]["module"][name].shape
        shapes = [*self.weights[0]["param_shapes"], self.weights[0]["frozen_param_shapes"] or {}]
        return next(torch.Size(of_group[name]) for of_group in shapes if name in of_group)

    def weight(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements of a flattened weight. Those that ranks saved in parts are rounded from their masters."""
        if not self.are_weights_sharded:
            return self.weights[0]["module"][name].reshape(-1)[start:stop]
        if self._without_hift is not None:
            return self._without_hift[name].contiguous().view(-1)[start:stop]
        if name in self._masters.names:
            masters = self._masters.parameter(name, start, stop)
            assert masters is not None  # at ZeRO 3 there are some
            return masters
        parts = [entry["frozen_param_fragments"][name].view(-1) for entry in self.weights]
        size = parts[0].numel()
        begin, end = start // size, -(-stop // size)
        return torch.cat(parts[begin:end])[start - begin * size : stop - begin * size]


def _by_rank(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of the first pattern that has any, in the order of ranks."""
    for pattern in patterns:
        if found := list(folder.glob(pattern)):
            return sorted(found, key=lambda path: int(path.name.partition("rank_")[2].partition("_")[0]))
    return []
