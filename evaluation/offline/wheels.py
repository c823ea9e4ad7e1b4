"""Download the wheels that another machine lacks, for Linux on x86-64.

DeepSpeed is published as source. Its wheel is built here without kernels, which are compiled at their first use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hift_ds.launch.errors import UserError

CARRIED = Path(__file__).with_name("carried.txt")
SOURCES = ("deepspeed",)  # published without a wheel
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
BUILD = {"DS_BUILD_OPS": "0", "SOURCE_DATE_EPOCH": "315532800"}  # 1980, the first year that a zip file can have


def carried() -> list[str]:
    """Return the packages, each as name==version."""
    lines = CARRIED.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def commands(folder: Path, version: str, packages: Sequence[str]) -> list[list[str]]:
    """Return the commands of pip that fill a folder with wheels for a version of Python."""
    built = [package for package in packages if package.split("==")[0] in SOURCES]
    tags = [option for platform in PLATFORMS for option in ("--platform", platform)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version, *tags]
    pip = [sys.executable, "-m", "pip"]
    return [
        [*pip, "download", "--no-deps", *target, "-d", str(folder), *(p for p in packages if p not in built)],
        [*pip, "wheel", "--no-deps", "--no-cache-dir", "--no-build-isolation", "-w", str(folder), *built],
    ]


def download(folder: Path, version: str, packages: Sequence[str]) -> None:
    """Fill a folder with wheels.

    Raises:
        UserError: pip cannot get one of them; it has printed which.
    """
    for command in commands(folder, version, packages):
        if subprocess.run(command, env={**os.environ, **BUILD}).returncode:
            another = "" if set(packages) <= set(carried()) else "another version in --add, "
            raise UserError(
                f"pip could not get the wheels for Python {version} (its message is above); give {another}another "
                "--python, or a folder that has them as --wheels"
            )
