"""The second stage of checking settings: checks by transformers and DeepSpeed, whose import takes seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from hift_ds.launch.config.checking import problem_list
from hift_ds.launch.config.settings import Settings
from hift_ds.launch.errors import UserError
from hift_ds.launch.model.settings import config_problems


def check_with_libraries(settings: Settings, source: str) -> None:
    """Check `model.config` with transformers and the deepspeed section with DeepSpeed. Nothing is loaded or written.

    Args:
        settings: from `hift_ds.launch.config.settings.load_settings`.
        source: origin of the settings, for the message (see `hift_ds.launch.config.reading.source`).

    Raises:
        UserError: with every problem found, one line each.
    """
    if problems := library_problems(settings):
        raise UserError(problem_list(source, problems))


def library_problems(settings: Settings) -> list[str]:
    """Return the problems that transformers and DeepSpeed find, one line each."""
    found = [] if settings.model.config is None else config_problems(settings.model.config)
    return found + _deepspeed_problems(settings.deepspeed)


def _deepspeed_problems(section: Mapping[str, Any]) -> list[str]:
    """Return the problems that DeepSpeed's own parser finds; importing it loads the engine."""
    from deepspeed import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    candidate = {key: value for key, value in section.items() if key not in ("hift", "train_batch_size")}
    try:
        DeepSpeedConfig(copy.deepcopy(candidate))
    except ValidationError as error:
        return [
            f"deepspeed ({error.title}) {'.'.join(map(str, fault['loc']))}: got {fault['input']!r}: {fault['msg']}."
            for fault in error.errors()
        ]
    except (DeepSpeedConfigError, ValueError, AssertionError, KeyError, TypeError) as error:
        return [f"deepspeed: {error}"]
    return []
