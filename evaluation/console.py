"""The console command ``hift-compare`` of an installed package."""

from __future__ import annotations

from typing import NoReturn

from hift_ds.launch.console import require_extra


def compare() -> NoReturn:
    """Run ``hift-compare``."""
    require_extra("train", "hift-compare")
    from hift_ds.evaluation.compare.command import command

    command()
