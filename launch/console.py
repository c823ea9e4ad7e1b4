"""The console commands of an installed package: they check that their libraries are installed."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import NoReturn

from hift_ds.launch.exit_codes import MISTAKE


def train() -> NoReturn:
    """Run ``hift-train``."""
    require_extra("train", "hift-train")
    from hift_ds.launch.train import command

    command()


def require_extra(extra: str, command: str) -> None:
    """Exit with `MISTAKE` and a message if a library of the package's extra is not installed."""
    needs = importlib.metadata.requires("hift_ds") or []
    names = [match[0] for need in needs if f'extra == "{extra}"' in need and (match := re.match(r"[\w.-]+", need))]
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        print(
            f"error: {command} needs {', '.join(missing)}, of the extra {extra!r}: pip install 'hift_ds[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(MISTAKE)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
