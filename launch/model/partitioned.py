"""Loading at ZeRO 3: each rank reads all tensors, one after the other, and keeps its part of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.launch.model.read_parameters import each_read
from hift_ds.launch.model.weights import is_finite
from hift_ds.state.free_memory import return_freed_memory
from hift_ds.zero.partitioning import Partitioner

_MANTISSA = 53  # bits of an integer that fp64 holds exactly


class PartitionedLoading:
    """Inside, a parameter that transformers has read from a file is partitioned over the ranks at once.

    transformers reads the files through the page cache, which the ranks of a node share, and converts a tensor only
    when it is its turn. So this rank's own memory holds its part of the model, and the tensor that is being read.

    No rank waits for another one. They must read the same files: compare :attr:`checksums`.

    Args:
        config: the DeepSpeed config of training.

    Attributes:
        checksums: of each parameter of the model, by name, after :meth:`finish`.
        broken: names of the parameters with values that are NaN or infinite, after :meth:`finish`.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._partitioner = Partitioner(config)
        self._seen: dict[int, tuple[torch.nn.Parameter, int, bool]] = {}  # by id: parameter, checksum, is finite
        self.checksums: dict[str, int] = {}
        self.broken: list[str] = []

    def __enter__(self) -> PartitionedLoading:
        self._reading = each_read(self._read)
        self._reading.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reading.__exit__(*error)

    def finish(self, model: torch.nn.Module) -> None:
        """Partition the parameters that were not in the files. The model is as DeepSpeed needs it afterwards."""
        for parameter in model.parameters():
            if id(parameter) not in self._seen:
                self._partition(parameter)
            self._partitioner.empty(parameter)
        for name, parameter in model.named_parameters():
            _, self.checksums[name], finite = self._seen[id(parameter)]
            if not finite:
                self.broken.append(name)
        self._seen.clear()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(get_accelerator().current_device_name())

    def _read(self, parameter: torch.nn.Parameter) -> None:
        if id(parameter) in self._seen:  # a tied weight
            return
        shape = parameter.shape
        self._partition(parameter)
        # transformers still compares shapes, and the values of weights that it ties: these stand in for them.
        checksum = self._seen[id(parameter)][1]
        stand_in = torch.tensor([checksum % 2**_MANTISSA], dtype=torch.float64)
        parameter.data = stand_in.view([1] * len(shape)).expand(shape)

    def _partition(self, parameter: torch.nn.Parameter) -> None:
        large = parameter.nbytes > 2**20
        self._seen[id(parameter)] = parameter, _checksum(parameter), is_finite(parameter)
        self._partitioner.partition(parameter)
        if large:  # between the parts that stay, the C library would keep much of what conversions have freed
            return_freed_memory()


def _checksum(tensor: torch.Tensor) -> int:
    """Return a sum over the bytes of a tensor, eight at a time. It reads 10 GB in a second; it is no hash."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = len(content) // 8 * 8
    return (int(content[:whole].view("<i8").sum()) + int(content[whole:].sum())) % 2**64
