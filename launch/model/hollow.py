"""Loading on a rank that gets the weights from another one."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from unittest import mock

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Inside, a parameter that transformers has read from a file becomes zeros, which take no memory until they are
    written to. Weights that are not in the files are initialized as usual."""
    handle = register_module_parameter_registration_hook(_registered)
    # Else transformers reads tensors ahead in threads, and may have the whole model in memory.
    environment = mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"})
    try:
        with environment:
            yield
    finally:
        handle.remove()


def _registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
    """Empty a parameter that is assigned to a module, if transformers has marked it as read."""
    is_read = parameter is not None and getattr(parameter, "_is_hf_initialized", False)
    if parameter is None or not is_read or parameter.is_meta or not parameter.numel():
        return
    memory = mmap.mmap(-1, parameter.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    parameter.data = torch.frombuffer(memory, dtype=parameter.dtype).view(parameter.shape)
