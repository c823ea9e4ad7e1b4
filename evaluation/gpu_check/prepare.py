"""Download what a machine without a network needs for the check, as wheels for Linux on x86-64.

    python -m evaluation.gpu_check.prepare FOLDER --python 3.12

On that machine, where torch, transformers and peft are installed:

    python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl
    PYTHONPATH=SITE make gpu-check

DeepSpeed is published as source. Its wheel is built here without kernels, which are compiled at their first use.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CARRIED = Path(__file__).with_name("carried.txt")
SOURCES = ("deepspeed",)  # published without a wheel
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def carried() -> list[str]:
    """Return the packages, each as name==version."""
    lines = CARRIED.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def commands(folder: Path, version: str) -> list[list[str]]:
    """Return the commands of pip that fill a folder with wheels for a version of Python."""
    packages = carried()
    built = [package for package in packages if package.split("==")[0] in SOURCES]
    tags = [option for platform in PLATFORMS for option in ("--platform", platform)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version, *tags]
    pip = [sys.executable, "-m", "pip"]
    return [
        [*pip, "download", "--no-deps", *target, "-d", str(folder), *(p for p in packages if p not in built)],
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), *built],
    ]


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.gpu_check.prepare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the wheels go; it is created")
    parser.add_argument("--python", default="3.12", help="the version on the other machine (default: %(default)s)")
    options = parser.parse_args(given)
    options.folder.mkdir(parents=True, exist_ok=True)
    for command in commands(options.folder, options.python):
        subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
    wheels = sorted(options.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.1f} MiB, in {options.folder}")


if __name__ == "__main__":
    main()
