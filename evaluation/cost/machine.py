"""The machine that measurements are from, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator


def machine() -> str:
    """Kind of machine, and the versions that decide its speed."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    device = get_accelerator().device_name()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, device {device}, "
        f"torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    )
