"""Random number generators of one process, as part of a checkpoint."""

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator


def generator_states() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch and the device."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(numpy.int64)), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if get_accelerator().device_name() != "cpu":
        states["device"] = get_accelerator().get_rng_state()
    return states


def restore_generator_states(states: Mapping[str, Any]) -> None:
    """Restore what :func:`generator_states` returned."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "device" in states and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(states["device"])
