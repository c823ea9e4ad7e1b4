"""Loading on a rank that gets the weights from another one."""

from __future__ import annotations

import contextlib
import mmap

import torch

from hift_ds.launch.model.read_parameters import each_read
from hift_ds.state.free_memory import return_freed_memory


def without_weights() -> contextlib.AbstractContextManager[None]:
    """Inside, a parameter that transformers has read from a file becomes zeros, which take no memory until they are
    written to. Weights that are not in the files are initialized as usual."""
    return each_read(_empty)


def _empty(parameter: torch.nn.Parameter) -> None:
    if not parameter.numel():
        return
    memory = mmap.mmap(-1, parameter.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # the system may fill huge pages with zeros that were only read
    parameter.data = torch.frombuffer(memory, dtype=parameter.dtype).view(parameter.shape)
    if parameter.nbytes > 2**20:  # between the pages that stay, the C library would keep what was read
        return_freed_memory()
