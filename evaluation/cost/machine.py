"""Describe the machine that measurements come from."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator


def machine() -> str:
    """Return the processor, cores, threads, device, and the versions of torch and DeepSpeed."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    device = get_accelerator().device_name()
    module = torch.get_device_module(device)
    device = module.get_device_name() if hasattr(module, "get_device_name") else device
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, device {device}, "
        f"torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    )
