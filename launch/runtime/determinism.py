"""Runs that repeat: seeds, and runs that repeat bit for bit on the same machine (`training.deterministic`)."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy
import torch

from hift_ds.launch.errors import UserError


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (on all devices).

    It does what `transformers.set_seed` does. Importing that imports PEFT and bitsandbytes.
    """
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use only deterministic kernels, if wanted. Enter it before the run touches the accelerator.

    Raises:
        UserError: an operation of the model has no deterministic kernel.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "determin" not in str(error):
            raise
        raise UserError(
            f"training.deterministic: {str(error).split(chr(10))[0]} Set training.deterministic=false, or choose a "
            "model or an attention implementation (model.attention) without this operation."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
