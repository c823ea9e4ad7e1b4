"""Parameters that transformers reads from a model's files, one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextlib.contextmanager
def each_read(action: Callable[[torch.nn.Parameter], None]) -> Iterator[None]:
    """Inside, call an action on each parameter that transformers has read from a file, before it reads the next one.

    A tied weight may come more than once.
    """

    def registered(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and getattr(parameter, "_is_hf_initialized", False):
            action(parameter)

    handle = register_module_parameter_registration_hook(registered)
    try:
        # Else transformers reads tensors ahead in threads, and may have the whole model in memory before the first
        # parameter comes here.
        with mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
            yield
    finally:
        handle.remove()
